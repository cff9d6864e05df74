//! A read section: from [`crate::Domain::read`] to the drop of its guard.

use crate::{cache, core::Core, record::Record, site::Site, sync::thread_number};
use std::{fmt, panic::Location, sync::Arc};

/// An open read section. It ends when this is dropped, on whatever thread that is.
///
/// It is `Send + Sync + 'static`: it may be held across awaits, moved into a task, and kept in a collection. Grace
/// periods of its domain that start while it is open do not end before it does, so hold it for as long as it protects
/// something and no longer.
///
/// Forgetting one (`mem::forget`, or a cycle of `Arc`s) leaves the section open for ever. Memory safety does not hang
/// on it, but each later [`synchronize`](crate::Domain::synchronize) does; the watchdog names where it was taken
/// ([`Domain::check_stalls`](crate::Domain::check_stalls)), and the last handle of the domain reports it.
#[must_use = "the read section ends when the guard is dropped"]
pub struct ReadGuard {
    /// Some until the drop.
    record: Option<Arc<Record>>,
}

impl ReadGuard {
    #[inline]
    pub(crate) fn begin(core: &Arc<Core>, location: &'static Location<'static>) -> Self {
        let record = cache::take(core);
        let bank = core.counters.current();
        // Before the section counts, so that what holds up a grace period is always named.
        record.open(Site::of(location), bank, core.stamp());
        core.counters.begin(bank, thread_number());
        Self { record: Some(record) }
    }
}

impl Drop for ReadGuard {
    #[inline]
    fn drop(&mut self) {
        if let Some(record) = self.record.take() {
            let bank = record.close();
            record.core().end(bank);
            cache::put(record);
        }
    }
}

impl fmt::Debug for ReadGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReadGuard").finish_non_exhaustive()
    }
}
