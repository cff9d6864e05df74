//! A shard stays awake for a moment while a round waits: see [`shootdown_core::busy_poll`].

use std::convert::Infallible;
use std::time::Duration;

use parking_lot::Mutex;
use shootdown_core::Moment;
use shootdown_core::busy_poll::{self, BusyPoll};

use crate::clock::Clock;

/// A poll takes about a microsecond; a clock that stands still, as one of a simulation may, ends it here.
const MOST_POLLS: usize = 10_000;

/// What keeps a shard awake. One of its rounds polls at a time: the others gain from it.
#[derive(Debug)]
pub(crate) struct Vigil {
    clock: Clock,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    busy_poll: BusyPoll,
    is_kept: bool,
}

impl Vigil {
    /// For a shard that polls for `most` at a time, or never if that is nothing.
    pub(crate) fn new(most: Duration, clock: Clock) -> Self {
        Self { clock, state: Mutex::new(State { busy_poll: BusyPoll::new(most), is_kept: false }) }
    }

    /// Waits for `done`, which comes of what arrives on this shard; at first without sleeping.
    ///
    /// # Cancel safety
    /// As that of `done`; what the wait would have taught is lost.
    pub(crate) async fn wait<F: Future>(&self, done: F) -> F::Output {
        let Some(turn) = self.start() else { return done.await };
        let began = self.clock.now();
        let output = tokio::select! {
            // First: each poll is for this.
            biased;
            output = done => output,
            never = self.keep(began, turn) => match never {},
        };
        self.state.lock().busy_poll.on_waited(self.clock.now().since(began));
        output
    }

    fn start(&self) -> Option<Turn<'_>> {
        let mut state = self.state.lock();
        if state.is_kept {
            return None;
        }
        state.is_kept = true;
        let polls = if state.busy_poll.allowance().is_zero() { 0 } else { MOST_POLLS };
        Some(Turn { vigil: self, polls })
    }

    /// Polls until there is nothing more to be gained.
    async fn keep(&self, began: Moment, turn: Turn<'_>) -> Infallible {
        let mut before = began;
        for _ in 0..turn.polls {
            // The first lets the shard look at its sockets and the connection take what has come, the second
            // lets the session apply it.
            tokio::task::yield_now().await;
            tokio::task::yield_now().await;
            // To a device on the same core, if it has something to do.
            std::thread::yield_now();
            let now = self.clock.now();
            let (took, waited) = (now.since(before), now.since(began));
            if self.state.lock().busy_poll.on_turn(took, waited) == busy_poll::Turn::Last {
                break;
            }
            before = now;
        }
        drop(turn);
        std::future::pending().await
    }
}

/// Its round is the one that polls.
struct Turn<'a> {
    vigil: &'a Vigil,
    polls: usize,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.vigil.state.lock().is_kept = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: Duration = Duration::from_micros(100);

    #[test]
    fn one_round_polls_at_a_time_and_gives_its_turn_back() {
        let vigil = Vigil::new(MOST, Clock::BOOTTIME);
        let first = vigil.start();
        assert!(first.is_some());
        assert!(vigil.start().is_none());
        drop(first);
        assert!(vigil.start().is_some());
    }

    #[tokio::test]
    async fn what_comes_after_the_polling_is_waited_for_all_the_same() {
        let vigil = Vigil::new(MOST, Clock::BOOTTIME);
        let (tx, rx) = tokio::sync::oneshot::channel();
        let late = async {
            while vigil.state.lock().is_kept {
                tokio::task::yield_now().await;
            }
            tx.send(7)
        };
        // The wait is polled first, so its polling has begun when the other looks.
        assert_eq!(tokio::join!(vigil.wait(rx), late), (Ok(7), Ok(())));
        assert_eq!(vigil.state.lock().busy_poll.allowance(), Duration::ZERO);
        assert!(vigil.start().is_some());
    }
}
