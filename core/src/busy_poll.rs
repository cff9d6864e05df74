//! How long to poll before sleeping, learnt from how long the last waits were.
//!
//! To wake a core that sleeps costs more than the rest of a round between two processes of a machine. So
//! whoever waits polls for a while first, if the last waits say that this will do: waits that are longer
//! than polling may last, as most are over a network, end it, and cost one poll.
//!
//! A core that others want is not polled on: a turn of polling that took long had somebody else in it, or
//! work of the poller's own, and either way there is nothing to be gained.
//!
//! Follows the kernel's halt polling for virtual machines (`grow_halt_poll_ns`, `shrink_halt_poll_ns`;
//! Documentation/virt/kvm/halt-polling.rst).

use std::time::Duration;

/// Where polling begins again after it was given up: `halt_poll_ns_grow_start`.
const GROW_START: Duration = Duration::from_micros(10);

/// A turn of polling takes one or two microseconds where nobody else runs.
const LONG_TURN: Duration = Duration::from_micros(8);

/// How long one waiter polls before it sleeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BusyPoll {
    allowance: Duration,
    most: Duration,
    crowding: Crowding,
}

/// Whether the core was wanted for something else in this wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Crowding {
    None,
    Seen,
}

/// Whether to go on polling.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// Poll on.
    Again,
    /// Sleep.
    Last,
}

impl BusyPoll {
    /// For waits of which at most `most` is spent polling; nothing, if that is zero.
    #[must_use]
    pub fn new(most: Duration) -> Self {
        Self { allowance: GROW_START.min(most), most, crowding: Crowding::None }
    }

    /// How long to poll in the next wait; zero: sleep at once.
    #[must_use]
    pub const fn allowance(&self) -> Duration {
        self.allowance
    }

    /// A turn of polling is over. It took `took`, and the wait has been going on for `waited`.
    pub fn on_turn(&mut self, took: Duration, waited: Duration) -> Turn {
        if took > LONG_TURN {
            self.crowding = Crowding::Seen;
            return Turn::Last;
        }
        if waited < self.allowance { Turn::Again } else { Turn::Last }
    }

    /// A wait is over. One that polling could not have covered ends it, as does one in which the core was
    /// wanted for something else; one that more polling could have covered doubles it.
    pub fn on_waited(&mut self, waited: Duration) {
        let crowding = std::mem::replace(&mut self.crowding, Crowding::None);
        if waited > self.most || crowding == Crowding::Seen {
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
    fn a_core_that_others_want_is_not_polled_on() {
        let mut busy_poll = BusyPoll::new(micros(100));
        assert_eq!(busy_poll.on_turn(micros(2), micros(2)), Turn::Again);
        assert_eq!(busy_poll.on_turn(micros(2), micros(10)), Turn::Last, "the allowance is spent");
        busy_poll.on_waited(micros(12));
        assert_eq!(busy_poll.on_turn(micros(13), micros(13)), Turn::Last);
        busy_poll.on_waited(micros(14));
        assert_eq!(busy_poll.allowance(), Duration::ZERO);
        busy_poll.on_waited(micros(30));
        assert_eq!(busy_poll.allowance(), micros(10), "it is tried again");
    }

    #[test]
    fn whoever_may_not_poll_never_does() {
        assert_eq!(after(0, &[]), Duration::ZERO);
        assert_eq!(after(0, &[1, 1, 500]), Duration::ZERO);
    }
}
