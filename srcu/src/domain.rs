//! A domain: its read sections, and the grace periods that wait for them.

use crate::{
    builder::{Config, DomainBuilder},
    cache,
    core::Core,
    guard::ReadGuard,
    stall::{Occasion, Stall},
    wait::{Barrier, Synchronize},
};
use std::{fmt, panic::Location, sync::Arc};

/// Read sections, and grace periods that wait for them. Clones are handles of the same domain.
///
/// A grace period waits for the sections of its own domain only, so use a domain for each thing whose readers may be
/// slow on their own account. A domain has no thread and needs no runtime: see [the crate](crate#who-does-the-work).
#[derive(Clone)]
pub struct Domain {
    handle: Arc<Handle>,
}

/// Dropped with the last handle of a domain; sections refer to its core alone.
struct Handle(Arc<Core>);

impl Drop for Handle {
    fn drop(&mut self) {
        cache::evict(&self.0);
        if self.0.counters.open() > 0 {
            self.0.find_stalls(Occasion::LastHandleDropped);
        }
    }
}

/// A grace period to come, or one that is over. Cookies of one domain are ordered as their grace periods are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[must_use = "a cookie is for `Domain::poll`"]
pub struct Cookie {
    domain: usize,
    grace_period: u64,
}

impl Domain {
    /// A domain with the defaults of [`Domain::builder`].
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        Self::builder().name(name).build()
    }

    /// For a domain that is not like the others.
    pub fn builder() -> DomainBuilder {
        DomainBuilder::new()
    }

    pub(crate) fn with_config(config: Config) -> Self {
        Self { handle: Arc::new(Handle(Core::new(config))) }
    }

    pub(crate) fn core(&self) -> &Arc<Core> {
        &self.handle.0
    }

    /// What reports call the domain.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.core().config.name
    }

    /// Begins a read section. It never waits, whatever grace periods are doing, and sections may nest.
    ///
    /// Follows `srcu_read_lock`. The caller's place in the source is kept with the section, for the watchdog.
    #[inline]
    #[track_caller]
    pub fn read(&self) -> ReadGuard {
        ReadGuard::begin(self.core(), Location::caller())
    }

    /// Waits until every read section that began before its first poll has ended. Sections that begin later are not
    /// waited for.
    ///
    /// Everything that was published before is seen by every section that it does not wait for, and everything that
    /// the sections did happens before it returns. It sleeps and never spins. Follows `synchronize_srcu`.
    ///
    /// Awaited by whoever holds a section of the same domain it never returns: [NoSelfWait](crate#noselfwait).
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up the caller's place and nothing else: the grace period goes on, and others who wait
    /// for it are not held up.
    pub fn synchronize(&self) -> Synchronize {
        Synchronize::new(self)
    }

    /// Runs `f` once every read section open now has ended. Follows `call_srcu`.
    ///
    /// Nobody has to wait for it: `f` runs before this returns if no section is open, and otherwise in the drop of the
    /// guard that was the last, or in whatever else moves the domain on first ([who does the work](
    /// crate#who-does-the-work)). Callbacks of a domain run one at a time, in the order in which they were queued,
    /// under no lock of the crate and after the section that set them off has ended; one may begin and end sections,
    /// update values and defer more callbacks, which run after it and not inside it.
    ///
    /// It runs on a thread that was about something else, so it should be short, must not take a lock that somebody
    /// may hold while dropping a guard, and must not block on a grace period or a [`barrier`](Domain::barrier). A
    /// callback that always defers itself again keeps its thread. If one panics, those after it still run, and the
    /// panic goes on in the thread that ran it, unless that thread is unwinding already.
    ///
    /// A callback is never run if a section open now is never ended ([`check_stalls`](Domain::check_stalls) names it).
    pub fn call(&self, f: impl FnOnce() + Send + 'static) {
        self.core().call(Box::new(f));
    }

    /// Waits until every callback that was queued before its first poll has run. If there is none it is ready at once,
    /// so it does not stand for a grace period. Follows `srcu_barrier`.
    ///
    /// Awaited by whoever holds a section that one of them waits for it never returns.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up the caller's place and nothing else: the callbacks run all the same.
    pub fn barrier(&self) -> Barrier {
        Barrier::new(self)
    }

    /// Starts a grace period if none that is to come covers every section open now, and returns the one that does.
    /// Never waits. Follows `start_poll_synchronize_srcu`.
    pub fn start_poll(&self) -> Cookie {
        Cookie { domain: self.core().serial, grace_period: self.core().start_grace_period() }
    }

    /// Whether the cookie's grace period is over. Never waits and takes no lock; true once is true for ever. Follows
    /// `poll_state_synchronize_srcu`.
    ///
    /// # Panics
    ///
    /// If the cookie is of another domain: it says nothing about this one's sections.
    #[must_use]
    pub fn poll(&self, cookie: Cookie) -> bool {
        assert_eq!(
            cookie.domain,
            self.core().serial,
            "the cookie is of another domain than {:?}",
            self.name()
        );
        self.core().is_completed(cookie.grace_period)
    }

    /// Sections now open. For diagnosis and tests: it may have changed when the caller looks at it.
    #[must_use]
    pub fn readers(&self) -> usize {
        self.core().counters.open()
    }

    /// One pass of the watchdog: the read sections that are older than the domain's `stall_after`, oldest first.
    ///
    /// The crate has no timer, so nothing is reported unless this is called: call it at a period, a fraction of
    /// `stall_after` (the feature `tokio` has a task that does). With sampled ages ([`Ages`](crate::Ages)) a pass also
    /// takes note of the sections it sees for the first time, so their ages are right to within the period.
    ///
    /// Each stall is also handed to the domain's `on_stall`, when it becomes one and each time its age has doubled.
    /// It visits every record of the domain and takes a lock that no reader takes.
    pub fn check_stalls(&self) -> Vec<Stall> {
        self.core().find_stalls(Occasion::Check)
    }

    /// A handle that does not keep the domain from being dropped, for a watchdog.
    #[cfg(all(feature = "tokio", not(loom)))]
    pub(crate) fn downgrade(&self) -> WeakDomain {
        WeakDomain(Arc::downgrade(&self.handle))
    }
}

#[cfg(all(feature = "tokio", not(loom)))]
pub(crate) struct WeakDomain(std::sync::Weak<Handle>);

#[cfg(all(feature = "tokio", not(loom)))]
impl WeakDomain {
    /// None once the last handle is gone.
    pub(crate) fn upgrade(&self) -> Option<Domain> {
        Some(Domain { handle: self.0.upgrade()? })
    }
}

impl fmt::Debug for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Domain").field("name", &self.name()).field("readers", &self.readers()).finish()
    }
}
