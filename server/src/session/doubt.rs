//! A device that owes an ack for too long, by what was read of it so far.
//!
//! Its ack may lie in a socket, because the shard that reads it was kept from running, or all of the host agent was
//! stopped. So the watchdog, which runs elsewhere, does not decide: it has the shard look first. A lease that is over is
//! another matter: it is so whatever comes.

use std::sync::Arc;

use super::SessionHandle;

/// Turns of a shard until what had come is read and applied. It looks at its sockets before the first is over; then the
/// connection has its turn, then the session's task.
const TURNS: usize = 3;

/// What a tick comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tick {
    Done,
    /// It is to be made on the session's shard: see [`settle`].
    InDoubt,
}

/// On the session's shard: reads what has come, and makes the tick then.
pub(crate) async fn settle(handle: Arc<SessionHandle>) {
    for _ in 0..TURNS {
        tokio::task::yield_now().await;
    }
    let now = handle.clock.now();
    handle.with(now, |state, effects| {
        state.is_in_doubt = false;
        state.session.on_tick(now, effects);
    });
}
