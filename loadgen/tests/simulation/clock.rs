//! Clocks of the simulated machines: each has an origin of its own and runs a little too fast or too slow.

use std::cell::Cell;
use std::time::Duration;

use shootdown_core::Moment;

/// A machine's clock, in terms of virtual time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SkewedClock {
    /// What it shows at the start of the simulation, in nanoseconds.
    pub origin: u64,
    /// Parts per million by which it runs fast; slow: below 0.
    pub ppm: i64,
}

thread_local! {
    /// The clock of the machine that the host agent runs on. A world has one such machine and lives on one
    /// thread, so that the host agent's clock can stay a plain function.
    static HOST: Cell<SkewedClock> = const { Cell::new(SkewedClock { origin: 0, ppm: 0 }) };
    /// The newest virtual time that was seen: destructors of a world run outside of it.
    static NEWEST: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

/// Virtual time: what a perfect clock shows on the machine whose turn it is.
pub fn virtual_now() -> Duration {
    match turmoil::sim_elapsed() {
        Some(now) => {
            NEWEST.set(NEWEST.get().max(now));
            now
        }
        None => NEWEST.get(),
    }
}

/// A new world begins on this thread, at time zero.
pub fn begin_world(host: SkewedClock) {
    HOST.set(host);
    NEWEST.set(Duration::ZERO);
}

/// Between two steps of the world.
pub fn world_is_at(now: Duration) {
    NEWEST.set(now);
}

/// What the host agent reads.
pub fn host_now() -> Moment {
    HOST.get().shows(virtual_now())
}

impl SkewedClock {
    /// What it shows `now` after the start of the simulation, rounded down as clocks do.
    pub fn shows(self, now: Duration) -> Moment {
        let ran = signed(now) * i128::from(1_000_000 + self.ppm) / 1_000_000;
        Moment::from_nanos(self.origin + u64::try_from(ran).unwrap())
    }

    /// How long it is, in virtual time, until as much has passed on it.
    pub fn lasts(self, shown: Duration) -> Duration {
        Self { origin: 0, ..self }.when(Moment::from_nanos(u64::try_from(shown.as_nanos()).unwrap()))
    }

    /// The first virtual time at which it shows `moment`.
    pub fn when(self, moment: Moment) -> Duration {
        let ran = i128::from(moment.as_nanos().saturating_sub(self.origin)) * 1_000_000;
        let rate = i128::from(1_000_000 + self.ppm);
        Duration::from_nanos(u64::try_from((ran + rate - 1) / rate).unwrap())
    }
}

fn signed(now: Duration) -> i128 {
    i128::try_from(now.as_nanos()).unwrap()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_shows_a_moment_from_the_virtual_time_on_that_it_names() {
        for ppm in [-100_000, -1, 0, 1, 100_000] {
            let clock = SkewedClock { origin: 7_000_000_000, ppm };
            for nanos in [0, 1, 999, 1_000_000_007, 86_400_000_000_123] {
                let moment = clock.shows(Duration::from_nanos(nanos));
                let when = clock.when(moment);
                assert!(clock.shows(when) >= moment && when <= Duration::from_nanos(nanos), "{ppm} {nanos}");
            }
        }
    }
}
