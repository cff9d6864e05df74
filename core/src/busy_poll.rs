//! How long to poll before sleeping, learnt from how long the last waits were.
//!
//! To wake a core that sleeps costs more than the rest of a round between two processes of a machine. So
//! whoever waits polls for a while first, if the last waits say that this will do: waits that are longer
//! than polling may last, as most are over a network, end it, and cost one poll.
//!
//! Follows the kernel's halt polling for virtual machines (`grow_halt_poll_ns`, `shrink_halt_poll_ns`;
//! Documentation/virt/kvm/halt-polling.rst).

use std::time::Duration;

/// Where polling begins again after it was given up: `halt_poll_ns_grow_start`.
const GROW_START: Duration = Duration::from_micros(10);

/// How long one waiter polls before it sleeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BusyPoll {
    allowance: Duration,
    most: Duration,
}

impl BusyPoll {
    /// For waits of which at most `most` is spent polling; nothing, if that is zero.
    #[must_use]
    pub fn new(most: Duration) -> Self {
        Self { allowance: GROW_START.min(most), most }
    }

    /// How long to poll in the next wait; zero: sleep at once.
    #[must_use]
    pub const fn allowance(&self) -> Duration {
        self.allowance
    }

    /// A wait is over, of which [`BusyPoll::allowance`] was spent polling. One that polling could not have
    /// covered ends it; one that more polling could have covered doubles it.
    pub fn on_waited(&mut self, waited: Duration) {
        if waited > self.most {
            self.allowance = Duration::ZERO;
        } else if waited > self.allowance {
            self.allowance = (self.allowance * 2).max(GROW_START).min(self.most);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn micros(micros: u64) -> Duration {
        Duration::from_micros(micros)
    }

    fn after(most: u64, waits: &[u64]) -> Duration {
        let mut busy_poll = BusyPoll::new(micros(most));
        waits.iter().for_each(|wait| busy_poll.on_waited(micros(*wait)));
        busy_poll.allowance()
    }

    #[test]
    fn polling_grows_to_cover_short_waits_and_no_further() {
        assert_eq!(after(100, &[]), micros(10));
        assert_eq!(after(100, &[5, 5]), micros(10));
        assert_eq!(after(100, &[30]), micros(20));
        assert_eq!(after(100, &[30, 30, 30, 30]), micros(40));
        assert_eq!(after(100, &[90, 90, 90, 90, 90]), micros(100));
    }

    #[test]
    fn a_wait_too_long_to_poll_for_ends_polling_until_a_short_one_comes() {
        assert_eq!(after(100, &[30, 500_000]), Duration::ZERO);
        assert_eq!(after(100, &[500_000, 500_000]), Duration::ZERO);
        assert_eq!(after(100, &[500_000, 50]), micros(10));
    }

    #[test]
    fn whoever_may_not_poll_never_does() {
        assert_eq!(after(0, &[]), Duration::ZERO);
        assert_eq!(after(0, &[1, 1, 500]), Duration::ZERO);
    }
}
