//! A device that owes an ack for too long, by what was read of it so far.
//!
//! Its ack may lie in a socket, because the shard that reads it was kept from running, or all of the host agent was
//! stopped. So the watchdog, which runs elsewhere, does not decide: it has the shard look first. A lease that is over is
//! another matter: it is so whatever comes.

use std::sync::Arc;

use tokio::runtime::Handle;

use super::{LineId, SessionHandle};

/// Turns of a shard until what had come was read and applied. It looks at its sockets before the first is over; then the
/// connection has its turn, then the session's task.
const TURNS: usize = 3;

/// What a tick comes to.
#[derive(Debug)]
pub(crate) enum Tick {
    Done,
    /// It is to be made where that stream is read: see [`settle`].
    InDoubt {
        on: LineId,
        reader: Handle,
    },
}

/// On the runtime that reads the stream: reads what has come, and makes the tick then.
pub(crate) async fn settle(handle: Arc<SessionHandle>, on: LineId) {
    for _ in 0..TURNS {
        tokio::task::yield_now().await;
    }
    let now = handle.clock.now();
    handle.with(now, |state, effects| {
        // The device is on another stream by now: what was read of this one says nothing of that.
        if state.line.id == on {
            state.line.is_in_doubt = false;
            state.session.on_tick(now, effects);
        }
    });
}
