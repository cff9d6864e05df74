//! Keeps the lease: a heartbeat three times a lease, and the end of the session when it has run out. And finds a
//! connection that is lost without a word, while there is time to come back on another.
//!
//! A host agent answers every heartbeat, also one that renews nothing, and the answer goes before whatever else it has
//! to say. So where nothing at all has come for a quarter of the lease after one, the connection is lost, or what is
//! behind it hangs. Why not by the transport: HTTP/2's pings are set before the first word of the host agent, and so
//! before the lease is known; TCP's time limits can be set later, but not every connection is TCP.

use std::sync::Arc;
use std::time::Duration;

use shootdown_proto::message::RequestId;

use crate::session::Session;
use crate::session::end::EndCause;

/// Two heartbeats may be lost, and the third still comes in time.
const HEARTBEATS_A_LEASE: u32 = 3;

/// Looks for an answer, between two heartbeats.
const LOOKS_A_HEARTBEAT: u32 = 4;
/// As many looks in vain, a quarter of the lease, and the connection is lost. What is left of the lease is a quarter
/// at least, less its margin: time for one try. It is looks that are counted and not the time, because a device that
/// was stopped itself has heard nothing either: what came meanwhile is read before the next look.
const LOOKS_IN_VAIN: u32 = 3;

/// A heartbeat since which nothing has come, and how often that was seen.
#[derive(Clone, Copy)]
struct Silence {
    since: RequestId,
    looks: u32,
}

impl Silence {
    fn seen(before: Option<Self>, since: RequestId) -> Self {
        match before {
            Some(silence) if silence.since == since => Self { looks: silence.looks + 1, ..silence },
            _ => Self { since, looks: 0 },
        }
    }
}

/// Runs until the lease has run out or its owner, the session's driver, stops it. The lease counts from
/// the moment at which the transport took the heartbeat, not from here.
pub(crate) async fn keep_lease(session: Arc<Session>) {
    let period = (session.welcome.lease / HEARTBEATS_A_LEASE).max(Duration::from_millis(1));
    let look = (period / LOOKS_A_HEARTBEAT).max(Duration::from_millis(1));
    let mut next = session.clock().now() + period;
    let mut silence: Option<Silence> = None;
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
        silence = session.outgoing.unheard().map(|since| Silence::seen(silence, since));
        if let Some(silence) = silence.filter(|silence| silence.looks >= LOOKS_IN_VAIN) {
            session.outgoing.give_up(silence.since);
            session.unheard.notify_one();
        }
        let wait = next.min(valid_until).since(now);
        tokio::time::sleep(if silence.is_some() { wait.min(look) } else { wait }).await;
    }
}
