//! What the accelerator is kept busy with.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use shootdown_core::{AddressSpaceId, PageSize};
use tokio_util::sync::CancellationToken;

use super::accelerator::{Accelerator, AccessError};
use super::config::PageRange;
use crate::session::gate::UseRefused;

/// A worker whose access failed waits for so long: a range that is not mapped yet must not be asked for in
/// a busy loop.
const BACKOFF: Duration = Duration::from_millis(10);

/// Bytes an access: a cache line.
const ACCESS_BYTES: usize = 64;

/// What a worker does: reads and writes at random addresses.
#[derive(Debug, Clone, PartialEq)]
pub struct Work {
    /// Whose memory; one is chosen for each access.
    pub address_spaces: Vec<AddressSpaceId>,
    /// Which pages of it.
    pub ranges: Vec<PageRange>,
    /// How many of the accesses are reads, 0 to 1.
    pub read_ratio: f64,
    /// Where the addresses are drawn from.
    pub seed: u64,
}

/// What a worker has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WorkCounts {
    /// Reads that succeeded.
    pub reads: u64,
    /// Writes that succeeded.
    pub writes: u64,
    /// Accesses that failed.
    pub failures: u64,
}

impl std::ops::Add for WorkCounts {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            reads: self.reads + other.reads,
            writes: self.writes + other.writes,
            failures: self.failures + other.failures,
        }
    }
}

impl Work {
    /// Works until it is stopped, or no use is allowed any more.
    pub(super) async fn run(self, accelerator: Arc<Accelerator>, stop: CancellationToken) -> WorkCounts {
        let mut random = StdRng::seed_from_u64(self.seed);
        let mut counts = WorkCounts::default();
        loop {
            let done = tokio::select! {
                // Stopping goes first: an access that is begun is let go.
                biased;
                () = stop.cancelled() => return counts,
                done = self.access(&accelerator, &mut random, &mut counts) => done,
            };
            match done {
                Ok(()) => {}
                Err(AccessError::UseRefused(UseRefused::SessionEnded | UseRefused::LeaseExpired)) => {
                    return counts;
                }
                Err(error) => {
                    counts.failures += 1;
                    tracing::debug!(error = &error as &dyn std::error::Error, "an access failed");
                    tokio::select! {
                        biased;
                        () = stop.cancelled() => return counts,
                        () = tokio::time::sleep(BACKOFF) => {}
                    }
                }
            }
            // A cache that hits never waits, and others want the thread too.
            tokio::task::yield_now().await;
        }
    }

    async fn access(
        &self,
        accelerator: &Accelerator,
        random: &mut StdRng,
        counts: &mut WorkCounts,
    ) -> Result<(), AccessError> {
        let address_space = self.address_spaces[random.random_range(0..self.address_spaces.len())];
        let range = self.ranges[random.random_range(0..self.ranges.len())].0;
        let pages = (range.last() - range.start()) / PageSize::BASE.bytes();
        let page = range.start() + random.random_range(0..=pages) * PageSize::BASE.bytes();
        let line = random.random_range(0..PageSize::BASE.bytes() / ACCESS_BYTES as u64);
        let address = page + line * ACCESS_BYTES as u64;
        if random.random_bool(self.read_ratio) {
            accelerator.read(address_space, address, ACCESS_BYTES).await?;
            counts.reads += 1;
        } else {
            let bytes = Bytes::from(vec![random.random::<u8>(); ACCESS_BYTES]);
            accelerator.write(address_space, address, bytes).await?;
            counts.writes += 1;
        }
        Ok(())
    }
}
