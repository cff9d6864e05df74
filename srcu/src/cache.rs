//! The records that a thread keeps for its next sections.
//!
//! A section takes a record out of its thread's cache and puts it into the cache of the thread on which it ends. A
//! record refers to its domain, and moving it counts no reference, so a read section keeps its domain alive, on any
//! thread and for any time, without an atomic of its own.
//!
//! The price: a thread holds on to records of the domains it read last, and so to the memory of domains that are gone,
//! until it reads others or ends. That is at most `LANES` domains a thread, without what was protected in them; the
//! last handle of a domain takes the records of its own thread along.

#[cfg(not(loom))]
pub(crate) use thread_cache::{evict, put, take};

#[cfg(not(loom))]
mod thread_cache {
    use crate::{
        core::Core,
        record::{Record, Records},
    };
    use std::{cell::RefCell, sync::Arc};

    /// Domains that a thread remembers; a power of two. A thread that reads more of them in turn pays an allocation,
    /// a lock and two reference counts for a read that misses.
    const LANES: usize = 16;
    /// Records kept of each: sections that a thread may have open at once without that price.
    const DEPTH: usize = 32;

    /// Records that are free, all of one domain.
    type Lane = Vec<Arc<Record>>;

    // Not to be borrowed while a record is dropped: the last one of a domain drops its callbacks, which are code of a
    // user and may come back here. A borrow that fails all the same goes to the domain, as a thread does whose locals
    // are being dropped.
    std::thread_local! {
        static LANES_OF_THREAD: RefCell<[Lane; LANES]> = const { RefCell::new([const { Vec::new() }; LANES]) };
    }

    #[inline]
    fn lane_of(core: &Core) -> usize {
        core.serial % LANES
    }

    #[inline]
    fn is_of(lane: &Lane, core: &Arc<Core>) -> bool {
        lane.last().is_some_and(|record| Arc::ptr_eq(record.core(), core))
    }

    #[inline]
    pub(crate) fn take(core: &Arc<Core>) -> Arc<Record> {
        let cached = LANES_OF_THREAD.try_with(|lanes| {
            let mut lanes = lanes.try_borrow_mut().ok()?;
            let lane = &mut lanes[lane_of(core)];
            if is_of(lane, core) { lane.pop() } else { None }
        });
        match cached {
            Ok(Some(record)) => record,
            _ => Records::create(core),
        }
    }

    #[inline]
    pub(crate) fn put(record: Arc<Record>) {
        let mut record = Some(record);
        // An error leaves the record here, to be dropped.
        let _ = LANES_OF_THREAD.try_with(|lanes| {
            let Ok(mut lanes) = lanes.try_borrow_mut() else { return };
            let Some(core) = record.as_ref().map(|record| record.core()) else { return };
            let lane = &mut lanes[lane_of(core)];
            if lane.len() < lane.capacity() && (lane.is_empty() || is_of(lane, core)) {
                lane.extend(record.take());
            }
        });
        if let Some(record) = record {
            put_slowly(record);
        }
    }

    /// Into a lane that is empty, or full, or of another domain. That one is given up: what a thread reads now is what
    /// it will read next.
    #[cold]
    fn put_slowly(record: Arc<Record>) {
        let mut record = Some(record);
        let evicted = LANES_OF_THREAD.try_with(|lanes| {
            let mut lanes = lanes.try_borrow_mut().ok()?;
            let core = record.as_ref()?.core();
            let lane = &mut lanes[lane_of(core)];
            if is_of(lane, core) && lane.len() == DEPTH {
                return None;
            }
            let evicted = if is_of(lane, core) { Lane::new() } else { std::mem::take(lane) };
            lane.reserve_exact(DEPTH - lane.len());
            lane.extend(record.take());
            Some(evicted)
        });
        // After the borrow.
        drop((evicted, record));
    }

    pub(crate) fn evict(core: &Arc<Core>) {
        let evicted = LANES_OF_THREAD.try_with(|lanes| {
            let mut lanes = lanes.try_borrow_mut().ok()?;
            let lane = &mut lanes[lane_of(core)];
            is_of(lane, core).then(|| std::mem::take(lane))
        });
        drop(evicted);
    }
}

#[cfg(loom)]
pub(crate) use no_cache::{evict, put, take};

/// Loom's objects live for one run of the model and a thread's cache for longer, so a model goes to the domain each
/// time. That adds no order that loom could see.
#[cfg(loom)]
mod no_cache {
    use crate::{
        core::Core,
        record::{Record, Records},
    };
    use std::sync::Arc;

    pub(crate) fn take(core: &Arc<Core>) -> Arc<Record> {
        Records::create(core)
    }

    pub(crate) fn put(record: Arc<Record>) {
        drop(record);
    }

    pub(crate) fn evict(_: &Arc<Core>) {}
}
