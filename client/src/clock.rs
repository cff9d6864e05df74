//! The clock that leases and flushes are measured on.

use std::fmt;
use std::sync::Arc;

use shootdown_core::Moment;

/// Where the SDK reads the time. Both ends of a lease count on `CLOCK_BOOTTIME`, which goes on while a
/// machine is suspended: a device that slept past its lease must not wake up with it.
///
/// Only the reading can be replaced. The SDK sleeps on tokio's timers, and a timer that fires late does
/// not make a lease longer: every use looks at the clock itself.
#[derive(Clone, Default)]
pub struct Clock(Source);

#[derive(Clone, Default)]
enum Source {
    #[default]
    Boottime,
    Function(Arc<dyn Fn() -> Moment + Send + Sync>),
}

impl Clock {
    /// `CLOCK_BOOTTIME` of this machine.
    #[must_use]
    pub const fn boottime() -> Self {
        Self(Source::Boottime)
    }

    /// Whatever `now` says, which must never go backwards: tests and simulations on virtual time.
    pub fn from_fn(now: impl Fn() -> Moment + Send + Sync + 'static) -> Self {
        Self(Source::Function(Arc::new(now)))
    }

    /// The time.
    #[must_use]
    pub fn now(&self) -> Moment {
        match &self.0 {
            Source::Boottime => {
                let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
                Moment::from_nanos(nanos(time))
            }
            Source::Function(now) => now(),
        }
    }

    /// What tells the host agent whether its own times may be compared with these; empty: unknown.
    pub(crate) fn identity(&self) -> String {
        match self.0 {
            Source::Boottime => std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
                .map(|id| id.trim().to_owned())
                .unwrap_or_default(),
            Source::Function(_) => String::new(),
        }
    }
}

/// Nanoseconds of wall time: only ever a number that is higher than the ones of earlier runs.
pub(crate) fn wall_nanos() -> u64 {
    nanos(rustix::time::clock_gettime(rustix::time::ClockId::Realtime))
}

fn nanos(time: rustix::time::Timespec) -> u64 {
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(time.tv_nsec).unwrap_or(0))
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Source::Boottime => "Clock(CLOCK_BOOTTIME)",
            Source::Function(_) => "Clock(function)",
        })
    }
}
