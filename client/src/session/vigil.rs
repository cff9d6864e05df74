//! The session's driver stays awake for a moment after a message, because another may be about to come: see
//! [`shootdown_core::busy_poll`].

use std::convert::Infallible;
use std::time::Duration;

use shootdown_core::Moment;

use crate::clock::Clock;

/// A poll takes about a microsecond; a clock that stands still, as one of a simulation may, ends it here.
const MOST_POLLS: usize = 10_000;

/// Polls until the time is spent.
pub(crate) async fn keep(clock: &Clock, began: Moment, allowance: Duration) -> Infallible {
    for _ in 0..MOST_POLLS {
        if clock.now().since(began) >= allowance {
            break;
        }
        // The first lets the runtime look at its sockets, the second lets the connection take what has come.
        tokio::task::yield_now().await;
        tokio::task::yield_now().await;
        // To a host agent on the same core, if it has something to do.
        std::thread::yield_now();
    }
    std::future::pending().await
}
