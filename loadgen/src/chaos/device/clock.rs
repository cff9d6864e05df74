//! The device's clock, which a run that breaks the lease can stop.

use std::sync::Arc;

use parking_lot::RwLock;
use shootdown_client::{Clock, Moment};

use crate::chaos::plan::Broken;

/// Where the device reads the time.
#[derive(Clone, Debug)]
pub(super) struct DeviceClock {
    real: Clock,
    /// When it was stopped.
    stands: Arc<RwLock<Option<Moment>>>,
}

impl DeviceClock {
    pub(super) fn new() -> Self {
        Self { real: Clock::boottime(), stands: Arc::default() }
    }

    /// The machine's.
    pub(super) fn real(&self) -> Moment {
        self.real.now()
    }

    /// The clock for the SDK: the machine's own, unless the run breaks that rule.
    pub(super) fn of_the_sdk(&self, rule: Option<Broken>) -> Clock {
        if rule != Some(Broken::Lease) {
            return self.real.clone();
        }
        let clock = self.clone();
        Clock::from_fn(move || {
            let stands = *clock.stands.read();
            stands.unwrap_or_else(|| clock.real.now())
        })
    }

    /// From now on it shows what it shows now.
    pub(super) fn stand_still(&self) {
        let now = self.real.now();
        self.stands.write().get_or_insert(now);
    }

    pub(super) fn go_on(&self) {
        *self.stands.write() = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_run_that_breaks_the_lease_has_a_clock_that_can_stand_still() {
        let clock = DeviceClock::new();
        let (sound, broken) = (clock.of_the_sdk(None), clock.of_the_sdk(Some(Broken::Lease)));
        clock.stand_still();
        let stands = broken.now();
        let moves = sound.now();
        while sound.now() == moves {}
        assert_eq!(broken.now(), stands);
        clock.go_on();
        assert!(broken.now() > stands);
    }
}
