//! What the protocol is built from: std's primitives, or loom's when a model is checked.
//!
//! Only what decides who waits for whom goes through here. Diagnosis (records, call sites, ages) uses std in
//! both builds: loom then sees no ordering that comes from it, so a model never passes thanks to a diagnostic lock.

use std::sync::PoisonError;

#[cfg(loom)]
pub(crate) use loom::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicU64, AtomicUsize, Ordering},
};
#[cfg(not(loom))]
pub(crate) use std::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicU64, AtomicUsize, Ordering},
};

/// Locks, poisoned or not: no code of a user runs under a lock of this crate except in [`crate::Srcu::update`],
/// which publishes last, so what a panic leaves behind is always whole.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The same for what is std's in both builds.
pub(crate) fn lock_plain<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A number of the running thread, small and dense, by which it picks its stripe.
#[cfg(not(loom))]
#[inline]
pub(crate) fn thread_number() -> usize {
    use std::cell::Cell;
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    const UNSET: usize = usize::MAX;
    // No destructor, so it still answers while the thread's other locals are being dropped.
    std::thread_local! { static NUMBER: Cell<usize> = const { Cell::new(UNSET) } }

    NUMBER.with(|number| {
        if number.get() == UNSET {
            // Relaxed: only the number's value matters, nothing is published by it.
            number.set(NEXT.fetch_add(1, Ordering::Relaxed));
        }
        number.get()
    })
}

/// Loom replays a schedule, so the number has to be the same in each replay: loom's own.
#[cfg(loom)]
pub(crate) fn thread_number() -> usize {
    let id = format!("{:?}", loom::thread::current().id());
    id.chars().filter(char::is_ascii_digit).collect::<String>().parse().expect("loom numbers its threads")
}

/// The pointer that readers load and an update replaces.
#[cfg(not(loom))]
pub(crate) use published::{Loaded, Published};
#[cfg(loom)]
pub(crate) use published_loom::{Loaded, Published};

#[cfg(not(loom))]
mod published {
    use arc_swap::ArcSwap;
    use std::sync::Arc;

    /// A loaded value. arc-swap lends it without touching the count that all readers would share.
    pub(crate) type Loaded<T> = arc_swap::Guard<Arc<T>>;

    pub(crate) struct Published<T>(ArcSwap<T>);

    impl<T> Published<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(ArcSwap::from_pointee(value))
        }

        #[inline]
        pub(crate) fn load(&self) -> Loaded<T> {
            self.0.load()
        }

        pub(crate) fn swap(&self, value: T) -> Arc<T> {
            self.0.swap(Arc::new(value))
        }
    }
}

/// arc-swap cannot run under loom. The stand-in has its orderings and no more: an index that is stored with
/// Release and loaded with Acquire, into a table that loom does not see. A mutex that loom did see would order
/// a reader against the update by itself, and hide a missing order in the protocol.
#[cfg(loom)]
mod published_loom {
    use super::{AtomicUsize, Ordering, lock_plain};
    use std::sync::Arc;

    pub(crate) type Loaded<T> = Arc<T>;

    pub(crate) struct Published<T> {
        versions: std::sync::Mutex<Vec<Arc<T>>>,
        current: AtomicUsize,
    }

    impl<T> Published<T> {
        pub(crate) fn new(value: T) -> Self {
            Self { versions: std::sync::Mutex::new(vec![Arc::new(value)]), current: AtomicUsize::new(0) }
        }

        pub(crate) fn load(&self) -> Loaded<T> {
            let index = self.current.load(Ordering::Acquire);
            Arc::clone(&lock_plain(&self.versions)[index])
        }

        /// Calls are serialised by the caller, as `Srcu::update` does.
        pub(crate) fn swap(&self, value: T) -> Arc<T> {
            let (index, old) = {
                let mut versions = lock_plain(&self.versions);
                versions.push(Arc::new(value));
                (versions.len() - 1, Arc::clone(&versions[versions.len() - 2]))
            };
            self.current.store(index, Ordering::Release);
            old
        }
    }
}
