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
    use std::{
        cell::{Cell, RefCell},
        sync::Arc,
    };

    /// Domains that a thread remembers; a power of two. A thread that reads more of them in turn pays an allocation,
    /// a lock and two reference counts for a read that misses.
    const LANES: usize = 16;
    /// Records kept of each: sections that a thread may have open at once without that price.
    const DEPTH: usize = 32;

    /// Records that are free, all of one domain. The last one that came is apart: sections that do not overlap need
    /// no other, and a cell is cheaper than a borrow.
    struct Lane {
        top: Cell<Option<Arc<Record>>>,
        rest: RefCell<Vec<Arc<Record>>>,
    }

    // Nothing is dropped while a lane's rest is borrowed: the last record of a domain drops its callbacks, which are
    // code of a user and may come back here. Where the locals of a thread are being dropped there is no cache.
    std::thread_local! {
        static LANES_OF_THREAD: [Lane; LANES] =
            const { [const { Lane { top: Cell::new(None), rest: RefCell::new(Vec::new()) } }; LANES] };
    }

    fn is_of(record: &Arc<Record>, core: &Arc<Core>) -> bool {
        Arc::ptr_eq(record.core(), core)
    }

    impl Lane {
        #[inline]
        fn of<'a>(lanes: &'a [Self; LANES], core: &Core) -> &'a Self {
            &lanes[core.serial % LANES]
        }

        #[cold]
        fn pop(&self, core: &Arc<Core>) -> Option<Arc<Record>> {
            let mut rest = self.rest.borrow_mut();
            if is_of(rest.last()?, core) { rest.pop() } else { None }
        }

        /// Makes room for `record` on top. The records of another domain are given up: what a thread reads now is what
        /// it will read next.
        #[cold]
        fn push(&self, record: Arc<Record>, top: Arc<Record>) {
            let evicted = if is_of(&top, record.core()) {
                let mut rest = self.rest.borrow_mut();
                if rest.len() < DEPTH && rest.last().is_none_or(|other| is_of(other, top.core())) {
                    rest.push(top);
                    (None, Vec::new())
                } else if rest.len() < DEPTH {
                    let others = std::mem::replace(&mut *rest, vec![top]);
                    (None, others)
                } else {
                    (Some(top), Vec::new())
                }
            } else {
                (Some(top), self.rest.take())
            };
            let below = self.top.replace(Some(record));
            drop((evicted, below));
        }
    }

    #[inline]
    pub(crate) fn take(core: &Arc<Core>) -> Arc<Record> {
        let cached = LANES_OF_THREAD.try_with(|lanes| {
            let lane = Lane::of(lanes, core);
            match lane.top.take() {
                Some(record) if is_of(&record, core) => Some(record),
                None => lane.pop(core),
                of_another => {
                    lane.top.set(of_another);
                    None
                }
            }
        });
        match cached {
            Ok(Some(record)) => record,
            _ => Records::create(core),
        }
    }

    #[inline]
    pub(crate) fn put(record: Arc<Record>) {
        // Dropped with the closure if there is no cache any more.
        let _ = LANES_OF_THREAD.try_with(move |lanes| {
            let lane = Lane::of(lanes, record.core());
            match lane.top.take() {
                None => lane.top.set(Some(record)),
                Some(top) => lane.push(record, top),
            }
        });
    }

    pub(crate) fn evict(core: &Arc<Core>) {
        let evicted = LANES_OF_THREAD.try_with(|lanes| {
            let lane = Lane::of(lanes, core);
            let top = lane.top.take();
            let rest = lane.pop(core).map(|last| (last, lane.rest.take()));
            match top {
                Some(of_another) if !is_of(&of_another, core) => {
                    lane.top.set(Some(of_another));
                    (None, rest)
                }
                top => (top, rest),
            }
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
