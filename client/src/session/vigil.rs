//! The session's driver stays awake for a moment after a message, because another may be about to come: see
//! [`shootdown_core::busy_poll`].

use std::convert::Infallible;

use shootdown_core::Moment;
use shootdown_core::busy_poll::{BusyPoll, Turn};

use crate::clock::Clock;

/// A poll takes about a microsecond; a clock that stands still, as one of a simulation may, ends it here.
const MOST_POLLS: usize = 10_000;

/// Polls until there is nothing more to be gained.
pub(crate) async fn keep(clock: &Clock, began: Moment, busy_poll: &mut BusyPoll) -> Infallible {
    let polls = if busy_poll.allowance().is_zero() { 0 } else { MOST_POLLS };
    let mut before = began;
    for _ in 0..polls {
        // The first lets the runtime look at its sockets, the second lets the connection take what has come.
        tokio::task::yield_now().await;
        tokio::task::yield_now().await;
        // To a host agent on the same core, if it has something to do.
        std::thread::yield_now();
        let now = clock.now();
        if busy_poll.on_turn(now.since(before), now.since(began)) == Turn::Last {
            break;
        }
        before = now;
    }
    std::future::pending().await
}
