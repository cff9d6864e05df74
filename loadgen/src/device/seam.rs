//! [5 of 9] Stands between the SDK and the accelerator: skips what the device caused itself, counts flushes,
//! and breaks a rule where the run asks for it.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use shootdown_client::agent::Accelerator;
use shootdown_client::{CommitTicket, DeviceTlb, FlushAllCause, Flushed, Invalidation, OwnerTag, Young};

use crate::rule::Rule;

/// How much later a flush is that comes after its ack: time for some reads, on a machine that is busy too.
const LATE: Duration = Duration::from_millis(50);

/// The accelerator, as the SDK sees it.
#[derive(Debug)]
pub(super) struct Seam {
    accelerator: Arc<Accelerator>,
    /// Events with this tag were caused by this device: it has dropped what they take before.
    own: OwnerTag,
    rule: Option<Rule>,
    flushes: Mutex<u64>,
}

impl Seam {
    pub(super) fn new(accelerator: Arc<Accelerator>, own: OwnerTag, rule: Option<Rule>) -> Self {
        Self { accelerator, own, rule, flushes: Mutex::new(0) }
    }

    /// Whether the accelerator is asked as it is.
    fn passes(&self, invalidation: &Invalidation) -> bool {
        invalidation.owner != Some(self.own) && self.rule != Some(Rule::FlushAfterAck)
    }

    pub(super) fn flushes(&self) -> u64 {
        *self.flushes.lock()
    }
}

impl DeviceTlb for Seam {
    async fn invalidate(&self, invalidation: Invalidation) -> Flushed {
        *self.flushes.lock() += 1;
        if invalidation.owner == Some(self.own) {
            return Flushed::default();
        }
        if self.rule == Some(Rule::FlushAfterAck) {
            let accelerator = Arc::clone(&self.accelerator);
            // Nobody awaits it, which is the break.
            tokio::spawn(async move {
                tokio::time::sleep(LATE).await;
                accelerator.invalidate(invalidation).await
            });
            return Flushed::default();
        }
        self.accelerator.invalidate(invalidation).await
    }

    async fn flush_all(&self, cause: FlushAllCause) {
        self.accelerator.flush_all(cause).await;
    }

    async fn clear_flush_young(&self, invalidation: Invalidation) -> Flushed {
        match self.passes(&invalidation) {
            true => {
                *self.flushes.lock() += 1;
                self.accelerator.clear_flush_young(invalidation).await
            }
            false => self.invalidate(invalidation).await,
        }
    }

    async fn change_pte(&self, invalidation: Invalidation, replacement: CommitTicket) -> Flushed {
        match self.passes(&invalidation) {
            true => {
                *self.flushes.lock() += 1;
                self.accelerator.change_pte(invalidation, replacement).await
            }
            false => self.invalidate(invalidation).await,
        }
    }

    async fn release(&self, invalidation: Invalidation) -> Flushed {
        match self.passes(&invalidation) {
            true => {
                *self.flushes.lock() += 1;
                self.accelerator.release(invalidation).await
            }
            false => self.invalidate(invalidation).await,
        }
    }

    async fn clear_young(&self, invalidation: Invalidation) -> Young {
        self.accelerator.clear_young(invalidation).await
    }
}
