//! A stream was lost: connects again and goes on with the session, as long as its lease lasts.
//!
//! ```text
//!   Live --- stream lost ---> Reconnecting --- Welcome{CONTINUE} ---> Live
//!    uses go on                |   |  uses go on, faults wait
//!                              |   +-- lease expired, closed -------> Closing
//!                              +------ Welcome{FLUSH}, refused -----> Closing
//! ```

use std::time::Duration;

use shootdown_proto::error::Reason;
use shootdown_proto::message::{Resume, ResumePoint, SessionError, Welcome};
use shootdown_proto::v1;

use crate::device::{self, ConnectError};
use crate::session::Session;
use crate::session::end::{EndCause, Violation};

/// What one try waits for at most is this part of the lease: a host agent that accepts and says nothing must not
/// take all of it.
const TRIES_A_LEASE: u32 = 4;

/// Why a try brought no stream.
enum Failed {
    /// The next may.
    Once(ConnectError),
    /// The session is over.
    ForGood(EndCause),
}

/// Whether the session may go on on another stream after this.
pub(crate) fn is_resumable(cause: &EndCause) -> bool {
    match cause {
        EndCause::Closed => true,
        EndCause::Transport(error) => error.reason().is_none_or(is_passing),
        EndCause::Host(error) => is_passing(error.reason),
        _ => false,
    }
}

/// The host agent makes room for its successor.
fn is_passing(reason: Reason) -> bool {
    matches!(reason, Reason::Draining | Reason::HostSuperseded)
}

/// Tries until there is a stream on which the session goes on. Ends by itself only when the host agent says
/// that it does not: whoever calls it watches the lease.
///
/// # Cancel safety
/// Dropped, there is no stream; may be called again.
pub(crate) async fn reconnect(session: &Session) -> Result<tonic::Streaming<v1::SessionResponse>, EndCause> {
    let config = &session.config;
    let mut pause = config.reconnect_pause;
    loop {
        match reopen(session).await {
            Ok(inbound) => return Ok(inbound),
            Err(Failed::ForGood(cause)) => return Err(cause),
            Err(Failed::Once(error)) => tracing::debug!(%error, ?pause, "not connected again yet"),
        }
        tokio::time::sleep(spread(pause, session.clock().now().as_nanos())).await;
        pause = pause.saturating_mul(2).min(config.reconnect_pause_most);
    }
}

/// Up to a half longer, so that the devices of one host agent do not all come back at the same moment.
fn spread(pause: Duration, by: u64) -> Duration {
    let half = u64::try_from(pause.as_nanos() / 2).unwrap_or(u64::MAX);
    pause + Duration::from_nanos(by % half.max(1))
}

async fn reopen(session: &Session) -> Result<tonic::Streaming<v1::SessionResponse>, Failed> {
    let (config, ours) = (&session.config, &session.welcome);
    let point = ResumePoint {
        session: ours.session,
        host_incarnation: ours.host_incarnation,
        received_through: session.outgoing.last_received(),
        attempt: session.begin_attempt(),
    };
    let said = session.outgoing.greet_again(device::hello(config, Some(point)));
    let patience = (ours.lease / TRIES_A_LEASE).min(config.connect_timeout);
    let endpoint = config.endpoint.clone();
    let greeted = tokio::time::timeout(patience, Box::pin(device::greet(config, said))).await;
    let greeted = greeted.unwrap_or(Err(ConnectError::Timeout { endpoint, patience }));
    let (inbound, welcome) = greeted.map_err(failed)?;
    check(ours, &welcome).map_err(Failed::ForGood)?;
    session.on_resumed(welcome.retained_floor);
    Ok(inbound)
}

fn failed(error: ConnectError) -> Failed {
    match error {
        ConnectError::Refused(SessionError { reason, .. }) if is_passing(reason) => Failed::Once(error),
        ConnectError::Refused(refused) => Failed::ForGood(EndCause::Host(refused)),
        ConnectError::Malformed(malformed) => Failed::ForGood(EndCause::Malformed(malformed)),
        // Most of all a host agent that was stopped, and its successor comes: it is tried again.
        error => Failed::Once(error),
    }
}

fn check(ours: &Welcome, welcome: &Welcome) -> Result<(), EndCause> {
    match welcome.resume {
        Resume::Flush => Err(EndCause::NotResumed),
        Resume::Continue => {
            let same = |it: &Welcome| (it.session, it.host_incarnation, it.epoch, it.window);
            if same(ours) == same(welcome) {
                Ok(())
            } else {
                Err(EndCause::Violation(Violation::ResumeMismatch))
            }
        }
    }
}
