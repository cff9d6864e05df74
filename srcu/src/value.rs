//! A protected value: read in sections of its domain, replaced by updates.

use crate::{
    domain::Domain,
    guard::ReadGuard,
    sync::{Loaded, Mutex, Published, lock},
    wait::Synchronize,
};
use std::{fmt, ops::Deref, panic::Location, sync::Arc};

/// A value of which readers see a version that does not change under them, and its domain.
///
/// An update makes a new version from the current one and publishes it; sections that are open go on with the version
/// they have. When a [`synchronize`](Srcu::synchronize) after the update returns, nobody holds a version from before it
/// in a [`Guard`]. The version's memory is counted apart from that, so a missing grace period is never a use after
/// free; what is lost is the promise that nobody still acts on the old version.
///
/// ```
/// # #[cfg(not(loom))]
/// # {
/// use srcu::{Domain, Srcu};
///
/// # let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
/// # runtime.block_on(async {
/// let subscribers = Srcu::new(Domain::new("subscribers"), vec!["gpu0", "gpu1"]);
///
/// let before = subscribers.read();
/// subscribers.update(|list| list.iter().copied().filter(|name| *name != "gpu1").collect());
/// assert_eq!(*subscribers.read(), ["gpu0"]);
/// assert_eq!(*before, ["gpu0", "gpu1"]);
///
/// drop(before); // a read section of its own domain must not be open here
/// subscribers.synchronize().await;
/// // Nobody acts on the list with gpu1 in it any more.
/// # });
/// # }
/// ```
pub struct Srcu<T> {
    domain: Domain,
    value: Published<T>,
    updating: Mutex<()>,
}

impl<T: Send + Sync + 'static> Srcu<T> {
    /// Protects `value` in `domain`. Several values may share one.
    pub fn new(domain: Domain, value: T) -> Self {
        Self { domain, value: Published::new(value), updating: Mutex::new(()) }
    }

    /// The domain of its read sections.
    pub fn domain(&self) -> &Domain {
        &self.domain
    }

    /// Begins a read section and takes the current version into it.
    #[inline]
    #[track_caller]
    pub fn read(&self) -> Guard<T> {
        // The section first: a version loaded before it would not be waited for.
        let section = ReadGuard::begin(self.domain.core(), Location::caller());
        Guard { value: self.value.load(), section }
    }

    /// Publishes what `f` makes of the current version, and returns the version it replaced. It does not wait for a
    /// grace period; sections that are open keep what they have.
    ///
    /// Updates of one value are serialised by a lock that is held while `f` runs, so `f` should be short and must not
    /// update the same value. The old version is returned, not dropped here, so that what its drop does is done outside
    /// that lock. If `f` panics nothing is published.
    pub fn update(&self, f: impl FnOnce(&T) -> T) -> Arc<T> {
        self.publish(|value| (f(value), ())).0
    }

    /// [`update`](Srcu::update), with a result from the closure.
    pub fn update_with<R>(&self, f: impl FnOnce(&T) -> (T, R)) -> R {
        let (old, result) = self.publish(f);
        drop(old);
        result
    }

    /// Waits for the readers of all versions before the current one; [`Domain::synchronize`].
    pub fn synchronize(&self) -> Synchronize {
        self.domain.synchronize()
    }

    fn publish<R>(&self, f: impl FnOnce(&T) -> (T, R)) -> (Arc<T>, R) {
        let _updating = lock(&self.updating);
        let (new, result) = f(&self.value.load());
        (self.value.swap(new), result)
    }
}

impl<T: fmt::Debug + Send + Sync + 'static> fmt::Debug for Srcu<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Srcu").field("domain", &self.domain).field("value", &*self.value.load()).finish()
    }
}

/// One version of a value, and the read section that it was taken in. `Send + 'static`, as [`ReadGuard`].
#[must_use = "the read section ends when the guard is dropped"]
pub struct Guard<T> {
    // Dropped in this order: the version is let go before its section ends.
    value: Loaded<T>,
    section: ReadGuard,
}

impl<T> Guard<T> {
    /// Lets go of the version and keeps the read section open, for who has taken from the version what it needs and
    /// still has to be waited for.
    pub fn into_section(self) -> ReadGuard {
        self.section
    }
}

impl<T> Deref for Guard<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T: fmt::Debug> fmt::Debug for Guard<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Guard").field(&**self).finish()
    }
}
