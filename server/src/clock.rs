//! The one place where the host agent reads a clock.

use shootdown_core::Moment;

/// A clock that leases and rounds are measured on. A simulation brings its own.
#[derive(Clone, Copy)]
pub struct Clock(fn() -> Moment);

impl Clock {
    /// `CLOCK_BOOTTIME`: monotonic, and it goes on while the machine is suspended, as a lease must.
    pub const BOOTTIME: Self = Self(boottime);

    /// A clock that reads `now`.
    #[must_use]
    pub const fn new(now: fn() -> Moment) -> Self {
        Self(now)
    }

    /// The time.
    #[must_use]
    pub fn now(self) -> Moment {
        (self.0)()
    }

    /// The identity of the machine's clock, to be compared with `Hello.clock_id`; empty where the
    /// kernel does not tell.
    #[must_use]
    pub fn id() -> String {
        std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .map(|id| id.trim().to_owned())
            .unwrap_or_default()
    }
}

impl std::fmt::Debug for Clock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Clock")
    }
}

fn boottime() -> Moment {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(time.tv_nsec).unwrap_or(0);
    Moment::from_nanos(seconds.saturating_mul(1_000_000_000).saturating_add(nanos))
}
