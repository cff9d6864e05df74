//! Keeps the lease: a heartbeat three times a lease, and the end of the session when it has run out.

use std::sync::Arc;
use std::time::Duration;

use crate::session::Session;
use crate::session::end::EndCause;

/// Two heartbeats may be lost, and the third still comes in time.
const HEARTBEATS_A_LEASE: u32 = 3;

/// Runs until the lease has run out or its owner, the session's driver, stops it. The lease counts from
/// the moment at which the transport took the heartbeat, not from here.
pub(crate) async fn keep_lease(session: Arc<Session>) {
    let period = (session.welcome.lease / HEARTBEATS_A_LEASE).max(Duration::from_millis(1));
    let mut next = session.clock().now() + period;
    loop {
        let now = session.clock().now();
        let Some(valid_until) = session.gate.valid_until().filter(|until| *until > now) else {
            // Uses are refused since then: every one of them looks at the clock itself.
            return session.close(EndCause::LeaseExpired);
        };
        if now >= next {
            session.outgoing.heartbeat(session.requests.next_id());
            next = now + period;
        }
        tokio::time::sleep(next.min(valid_until).since(now)).await;
    }
}
