//! How a domain is set up.

use crate::{
    domain::Domain,
    stall::{Report, Stall},
};
use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

/// A section that is open for longer is reported, unless the builder says otherwise. Half of what the kernel allows an
/// RCU reader (21 s): long for a section that spans a round trip to a peer, short for whoever waits for it.
const STALL_AFTER: Duration = Duration::from_secs(10);

/// More stripes than this make a scan dear and help no reader.
const MAX_STRIPES: usize = 64;

/// How well the age of a read section is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ages {
    /// A section's age counts from the first [`check_stalls`](Domain::check_stalls) that saw it, or from when a grace
    /// period began to wait for it, whichever is longer ago. It is never too high, and too low by at most the time
    /// between two checks. It costs a reader nothing.
    #[default]
    Sampled,
    /// Each section reads the clock when it begins. That costs several times what the section itself costs.
    Exact,
}

/// Where a domain reads the time.
#[derive(Clone)]
pub(crate) enum Clock {
    Monotonic,
    Lent(Arc<dyn Fn() -> Instant + Send + Sync>),
}

impl Clock {
    #[allow(
        clippy::disallowed_methods,
        reason = "the crate's one reading of the clock: ages of sections are diagnosis, and a domain's owner can lend another clock"
    )]
    pub(crate) fn now(&self) -> Instant {
        match self {
            Self::Monotonic => Instant::now(),
            Self::Lent(clock) => clock(),
        }
    }
}

pub(crate) struct Config {
    pub(crate) name: Arc<str>,
    pub(crate) stripes: usize,
    pub(crate) stall_after: Duration,
    pub(crate) report: Report,
    pub(crate) ages: Ages,
    pub(crate) clock: Clock,
}

/// Sets up a [`Domain`]; see [`Domain::builder`].
///
/// ```
/// use std::time::Duration;
///
/// let domain = srcu::Domain::builder()
///     .name("address space 7")
///     .stall_after(Duration::from_secs(3))
///     .on_stall(|stall| eprintln!("{stall}"))
///     .build();
/// assert_eq!(domain.name(), "address space 7");
/// ```
#[must_use = "a builder does nothing until `build`"]
pub struct DomainBuilder {
    name: String,
    stripes: Option<usize>,
    stall_after: Duration,
    report: Report,
    ages: Ages,
    clock: Clock,
}

impl DomainBuilder {
    pub(crate) fn new() -> Self {
        Self {
            name: "srcu".to_owned(),
            stripes: None,
            stall_after: STALL_AFTER,
            report: Report::StandardError,
            ages: Ages::Sampled,
            clock: Clock::Monotonic,
        }
    }

    /// What reports call the domain. "srcu" if not given.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// How many stripes the counters have, rounded up to a power of two, 64 at most. Four for each
    /// core of the machine if not given. Readers of one stripe share a cache line; a grace period visits each stripe.
    pub fn stripes(mut self, stripes: usize) -> Self {
        self.stripes = Some(stripes);
        self
    }

    /// How long a section may be open before it is a [`Stall`]. Ten seconds if not given.
    pub fn stall_after(mut self, stall_after: Duration) -> Self {
        self.stall_after = stall_after;
        self
    }

    /// What is done with a stall: called by [`Domain::check_stalls`] and by the drop of the last handle, on their
    /// thread and under no lock, when a section becomes a stall and again each time its age has doubled. A line on
    /// standard error if not given: a section that never ends is not to go unnoticed.
    pub fn on_stall(mut self, on_stall: impl Fn(&Stall) + Send + Sync + 'static) -> Self {
        self.report = Report::Callback(Arc::new(on_stall));
        self
    }

    /// How well the ages of sections are known. [`Ages::Sampled`] if not given.
    pub fn ages(mut self, ages: Ages) -> Self {
        self.ages = ages;
        self
    }

    /// Where the domain reads the time, for tests and simulations that own it. It must not use the domain.
    pub fn clock(mut self, clock: impl Fn() -> Instant + Send + Sync + 'static) -> Self {
        self.clock = Clock::Lent(Arc::new(clock));
        self
    }

    /// The domain, in its first handle.
    #[must_use]
    pub fn build(self) -> Domain {
        let stripes = self.stripes.unwrap_or_else(default_stripes);
        Domain::with_config(Config {
            name: self.name.into(),
            stripes: stripes.clamp(1, MAX_STRIPES),
            stall_after: self.stall_after,
            report: self.report,
            ages: self.ages,
            clock: self.clock,
        })
    }
}

impl fmt::Debug for DomainBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DomainBuilder")
            .field("name", &self.name)
            .field("stripes", &self.stripes)
            .field("stall_after", &self.stall_after)
            .field("ages", &self.ages)
            .finish_non_exhaustive()
    }
}

/// Threads come and go and are numbered as they come, so two that run at once are kept apart only by chance once the
/// numbers have gone round: with this many stripes a core, mostly.
const STRIPES_PER_CORE: usize = 4;

/// Under loom one, since each stripe multiplies the interleavings.
fn default_stripes() -> usize {
    if cfg!(loom) {
        return 1;
    }
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get).saturating_mul(STRIPES_PER_CORE)
}
