//! One session with a host agent: what its tasks and the device's handles share.
//!
//! ```text
//!             Welcome            leave(), last handle dropped, gap, panic,
//!  connect() --------> Live ---- lease expired, fatal error, not resumed ----> Closing
//!                      |  ^       (gate shut, mappings closed, requests failed)   |
//!          stream lost v  | Welcome{CONTINUE}                                     |
//!                   Reconnecting                                                  |
//!                                                                   flush_all, uses ended, Leave
//!                                                                                 v
//!                                                                   Ended: lost() resolves
//! ```
//!
//! * [`driver`]: the one task that reads the stream, [4 of 9]. It applies what the host agent says in
//!   the stream's order and never waits for a flush.
//! * [`flush`]: one notice's flush, [5 of 9]: polled once where the stream is read, and a task of its own
//!   only if it is not ready then.
//! * [`outgoing`]: what the transport takes when it can send, [6 of 9]. It is no task: an ack is put
//!   together at the moment at which it can be sent, from all that was flushed until then.
//! * [`reconnect`]: a stream that was lost, and the session with it or not.
//! * [`heartbeat`]: renews the lease, ends the session when it has run out, and finds a stream that is dead.

pub(crate) mod gate;
pub(crate) mod requests;
pub(crate) mod driver;
pub(crate) mod vigil;
pub(crate) mod holdings;
pub(crate) mod flush;
pub(crate) mod outgoing;
pub(crate) mod reconnect;
pub(crate) mod heartbeat;
pub(crate) mod end;

use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use shootdown_core::{AddrRange, AddressSpaceId, NoticeNumber, Scope};
use shootdown_proto::message::Welcome;
use tokio::sync::{Notify, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::config::DeviceConfig;
use crate::session::end::{EndCause, NotLive, SessionEnd};
use crate::session::gate::Gate;
use crate::session::holdings::Holdings;
use crate::session::outgoing::Outgoing;
use crate::session::requests::Requests;

/// What is shared. Locks: the gate's is taken under that of the holdings, that of what goes out under that of the
/// requests, no other under another, and none is held across an await or a call into the vendor's code. A vendor may call in under locks of its own.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) config: DeviceConfig,
    pub(crate) welcome: Welcome,
    pub(crate) gate: Gate,
    pub(crate) holdings: Mutex<Holdings>,
    pub(crate) requests: Requests,
    pub(crate) outgoing: Arc<Outgoing>,
    /// Cancelled when the session is closed.
    pub(crate) closing: CancellationToken,
    /// Rings when nothing comes on the stream any more.
    pub(crate) unheard: Notify,
    /// How often it tried to go on on another stream.
    attempts: Mutex<u64>,
    /// How often it did.
    pub(crate) resumes: watch::Sender<u64>,
    cause: OnceLock<EndCause>,
    ended: watch::Receiver<Option<SessionEnd>>,
    drain: watch::Receiver<Option<std::time::Duration>>,
}

/// What the driver tells the handles.
#[derive(Debug)]
pub(crate) struct Tell {
    pub(crate) ended: watch::Sender<Option<SessionEnd>>,
    pub(crate) drain: watch::Sender<Option<std::time::Duration>>,
}

impl Session {
    pub(crate) fn new(
        config: DeviceConfig,
        welcome: Welcome,
        gate: Gate,
        outgoing: Arc<Outgoing>,
    ) -> (Arc<Self>, Tell) {
        let (tell_ended, ended) = watch::channel(None);
        let (tell_drain, drain) = watch::channel(None);
        let requests = Requests::new(config.max_faults);
        let session = Self {
            config,
            welcome,
            gate,
            holdings: Mutex::default(),
            requests,
            outgoing,
            closing: CancellationToken::new(),
            unheard: Notify::new(),
            attempts: Mutex::default(),
            resumes: watch::Sender::new(0),
            cause: OnceLock::new(),
            ended,
            drain,
        };
        (Arc::new(session), Tell { ended: tell_ended, drain: tell_drain })
    }

    /// Fails closed, at once: nothing may be used, installed or asked for any more. The first cause
    /// stays. The driver does the rest.
    pub(crate) fn close(&self, cause: EndCause) {
        let first = self.cause.set(cause).is_ok();
        self.gate.shut();
        if first {
            self.holdings.lock().mappings.close();
            self.requests.fail_all();
            self.closing.cancel();
        }
    }

    /// The stream is lost. Uses go on until the lease ends.
    pub(crate) fn on_lost(&self) {
        let again = self.requests.interrupt(|| self.outgoing.cut());
        self.outgoing.ask_again(again);
    }

    /// The session goes on on a new stream. A lease is not granted by that: it is asked for at once.
    fn on_resumed(&self, floor: Option<NoticeNumber>) {
        self.outgoing.heartbeat(self.requests.next_id());
        self.outgoing.on_resumed(floor);
        self.resumes.send_modify(|resumes| *resumes += 1);
    }

    /// The number of the try that begins, from 1 on.
    pub(crate) fn begin_attempt(&self) -> u64 {
        let mut attempts = self.attempts.lock();
        *attempts += 1;
        *attempts
    }

    /// Why the session was closed.
    pub(crate) fn not_live(&self) -> NotLive {
        NotLive { cause: self.cause.get().cloned().unwrap_or(EndCause::RuntimeStopped) }
    }

    /// # Errors
    /// [`NotLive`].
    pub(crate) fn live(&self) -> Result<(), NotLive> {
        if self.closing.is_cancelled() { Err(self.not_live()) } else { Ok(()) }
    }

    pub(crate) fn clock(&self) -> &Clock {
        &self.config.clock
    }

    /// # Cancel safety
    /// May be dropped and called again.
    pub(crate) async fn ended(&self) -> SessionEnd {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await.map(|end| end.clone()) {
            Ok(Some(end)) => end,
            // The driver's task was dropped with its runtime: nothing was flushed.
            Ok(None) | Err(_) => SessionEnd::unflushed(self.not_live().cause),
        }
    }

    /// # Cancel safety
    /// May be dropped and called again.
    pub(crate) async fn drain_asked(&self) -> Option<std::time::Duration> {
        let mut drain = self.drain.clone();
        drain.wait_for(Option::is_some).await.ok().and_then(|deadline| *deadline)
    }

    /// A use ended; the flushes that waited for it go on.
    pub(crate) fn end_use(&self, id: shootdown_core::mapping::MappingId) {
        let quiesced = self.holdings.lock().end_use(id);
        for flush in quiesced {
            // A flush that is gone belongs to a session that has ended.
            let _ = flush.send(());
        }
    }

    /// Withdraws what overlaps; resolves when the uses that were open have ended.
    pub(crate) fn revoke(&self, scope: Scope) -> Option<oneshot::Receiver<()>> {
        self.holdings.lock().revoke(scope)
    }

    pub(crate) fn report_young(&self, address_space: AddressSpaceId, ranges: Vec<AddrRange>) {
        if !ranges.is_empty() {
            self.outgoing.report_young(address_space, ranges);
        }
    }
}
