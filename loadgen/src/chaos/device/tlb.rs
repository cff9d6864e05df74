//! [5 of 9] The device's TLB: the translations that the SDK guards, by page.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;
use shootdown_client::{
    AddrRange, DeviceTlb, FlushAllCause, Flushed, Gate, Invalidation, Mapping, UseGuard, UseRefused,
};

use super::process::Bulletin;
use crate::chaos::content::address_of;
use crate::chaos::plan::Broken;

/// Leave to reach one page.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) mapping: Mapping,
    pub(super) frame: u64,
    /// Of the session that it was granted in.
    pub(super) gate: Gate,
    /// The page's generation at the first use: it does not change under a translation that is valid.
    pub(super) generation: OnceLock<u64>,
}

/// What a use holds until it is over.
pub(super) enum Held {
    /// By the SDK's leave. No notice of the page is acked before it is dropped.
    Guarded(UseGuard),
    /// Without any: the run breaks that rule.
    Nothing,
}

/// The entries.
#[derive(Debug)]
pub(super) struct Tlb {
    entries: Mutex<HashMap<usize, Arc<Entry>>>,
    flush_time: Mutex<Duration>,
    bulletin: Arc<Bulletin>,
    rule: Option<Broken>,
}

impl Tlb {
    pub(super) fn new(bulletin: Arc<Bulletin>, rule: Option<Broken>) -> Self {
        Self { entries: Mutex::default(), flush_time: Mutex::default(), bulletin, rule }
    }

    pub(super) fn set_flush_time(&self, time: Duration) {
        *self.flush_time.lock() = time;
    }

    pub(super) fn find(&self, page: usize) -> Option<Arc<Entry>> {
        self.entries.lock().get(&page).cloned()
    }

    pub(super) fn install(&self, page: usize, entry: Arc<Entry>) {
        self.entries.lock().insert(page, entry);
    }

    /// Forgets it, unless it was replaced meanwhile.
    pub(super) fn forget(&self, page: usize, entry: &Arc<Entry>) {
        let mut entries = self.entries.lock();
        if entries.get(&page).is_some_and(|held| Arc::ptr_eq(held, entry)) {
            entries.remove(&page);
        }
    }

    /// Begins a use.
    pub(super) fn begin_use(&self, entry: &Entry) -> Result<Held, UseRefused> {
        match entry.mapping.begin_use() {
            Ok(guard) => Ok(Held::Guarded(guard)),
            // The break: what was held before a session ended is used in the next.
            Err(UseRefused::SessionEnded | UseRefused::LeaseExpired)
                if self.rule == Some(Broken::ResumeSkipsFlush) && self.bulletin.has_session() =>
            {
                Ok(Held::Nothing)
            }
            Err(refused) => Err(refused),
        }
    }

    /// Whether what a use that has been done found may be taken for true: whether its leave had not ended.
    pub(super) fn was_valid(held: &Held) -> bool {
        match held {
            Held::Guarded(guard) => guard.check().is_ok(),
            Held::Nothing => true,
        }
    }

    fn drop_range(&self, range: AddrRange) {
        self.entries.lock().retain(|page, _| !range.contains_address(address_of(*page)));
    }
}

impl DeviceTlb for Tlb {
    async fn invalidate(&self, invalidation: Invalidation) -> Flushed {
        self.drop_range(invalidation.range);
        let time = *self.flush_time.lock();
        if !time.is_zero() {
            tokio::time::sleep(time).await;
        }
        // The writes are in the frames already, and which they were the program does not ask.
        Flushed { dirty: vec![invalidation.range], ..Flushed::default() }
    }

    async fn flush_all(&self, cause: FlushAllCause) {
        if self.rule != Some(Broken::ResumeSkipsFlush) {
            self.entries.lock().clear();
        }
        self.bulletin.on_flushed(cause);
    }
}
