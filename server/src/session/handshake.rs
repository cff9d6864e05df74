//! What must be settled before there is a session.

use std::sync::Arc;

use shootdown_core::PageSize;
use shootdown_core::outbox::OutboxLimits;
use shootdown_core::session::{Enforcement, Session, SessionConfig};
use shootdown_proto::error::Reason;
use shootdown_proto::message::{
    DeviceSays, Hello, HostSays, PROTOCOL_VERSIONS, Resume, SessionError, Welcome,
};

use super::resume::Flush;
use super::task::start_outliving;
use super::{LineId, SessionHandle, State};
use crate::clock::Clock;
use crate::fence;
use crate::host::Host;
use crate::journal;
use crate::shard::Shard;

/// The first message must be Hello.
pub(crate) fn expect_hello(says: DeviceSays) -> Result<Hello, SessionError> {
    match says {
        DeviceSays::Hello(hello) => Ok(hello),
        _ => Err(SessionError::fatal(
            Reason::HelloExpected,
            "the first message of a session must be Hello; nothing that came before it took effect",
        )),
    }
}

/// The newest version that both sides speak.
fn agree_on_version(hello: &Hello) -> Result<u32, SessionError> {
    let common = PROTOCOL_VERSIONS.iter().rev().find(|version| hello.versions.contains(version));
    common.copied().ok_or_else(|| SessionError {
        supported_versions: PROTOCOL_VERSIONS.to_vec(),
        ..SessionError::fatal(
            Reason::VersionUnsupported,
            format!("the host agent speaks versions {PROTOCOL_VERSIONS:?}, the device {:?}", hello.versions),
        )
    })
}

/// A session, and the stream that it begins or goes on on.
pub(crate) struct Opened {
    pub(crate) handle: Arc<SessionHandle>,
    pub(crate) line: LineId,
}

/// Which word of the device says that it holds nothing of its earlier sessions: of those before this one, on
/// whichever of its streams it comes.
///
/// Not its Hello: that may have lain on a connection which the device gave up long ago, and be read after it has
/// made other sessions. What answers this session's Welcome has not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Earlier {
    /// It was said, or there is nothing to say it of.
    None,
    /// Any: its Hello promised that it holds nothing.
    UntilAnyWord,
    /// A fault: it was told to flush everything before its first.
    UntilFault,
}

impl Earlier {
    pub(super) fn are_left(self, says: &DeviceSays) -> bool {
        match self {
            Self::None => false,
            Self::UntilAnyWord => true,
            Self::UntilFault => matches!(says, DeviceSays::Fault(_)),
        }
    }
}

/// Opens a session for a device that said Hello, or goes on with the one that it names. The Welcome is its first
/// answer, and is given when the session is durable.
///
/// # Cancel safety
/// A device that goes away before it is welcomed holds nothing: its session is over at once. Where it goes on
/// with an earlier one, nothing is awaited.
pub(crate) async fn open(host: &Host, hello: &Hello, shard: Shard) -> Result<Opened, SessionError> {
    let version = agree_on_version(hello)?;
    if !host.is_current() {
        return Err(superseded());
    }
    if host.is_stopping() {
        return Err(draining());
    }
    if journal::is_unnamed(&hello.device) {
        return Err(SessionError::fatal(
            Reason::FieldInvalid,
            format!(
                "hello.device_id is {}, which stands for the device of a torn record of the journal; call it something else",
                hello.device
            ),
        ));
    }
    if !hello.page_sizes.contains(&PageSize::BASE) {
        return Err(SessionError::fatal(
            Reason::FieldInvalid,
            format!(
                "hello.page_sizes is {:?}; every grant is of pages of {:?}",
                hello.page_sizes,
                PageSize::BASE
            ),
        ));
    }
    let config = session_config(host.session_config(), hello);
    let clock = host.clock();
    let wants_timing = host.wants_timing() && !hello.clock_id.is_empty() && hello.clock_id == Clock::id();
    let (lease, window) = (config.lease.duration, config.outbox.window);
    let mut earlier = Earlier::UntilAnyWord;
    if let Some(point) = hello.resume {
        let terms = super::resume::Terms { version, wants_timing };
        match super::resume::resume(host, hello, point, terms) {
            Ok(opened) => return Ok(opened),
            // A new session would take the place of the one that has gone on.
            Err(overtaken @ Flush::Overtaken { .. }) => {
                return Err(SessionError::fatal(Reason::SessionReplaced, overtaken.to_string()));
            }
            Err(flush) => {
                tracing::info!(device = %hello.device, session = point.session.get(), %flush, "not resumed");
                earlier = Earlier::UntilFault;
            }
        }
    }
    let now = clock.now();
    let handle = host.registry().admit(&hello.device, hello.incarnation, |id, epoch| SessionHandle {
        id,
        device: hello.device.clone(),
        incarnation: hello.incarnation,
        epoch,
        change_pte: hello.change_pte,
        enforcement: config.enforcement,
        fencer: host.fencers().of(&hello.device),
        ask_fencer: tokio::sync::Notify::new(),
        shard,
        state: State::new(Session::new(id, hello.device.clone(), config, now), earlier, now).into(),
        accesses: parking_lot::RwLock::new(()),
        room: tokio::sync::Notify::new(),
        listen: tokio::sync::Notify::new(),
        over: tokio_util::sync::CancellationToken::new(),
        clock,
    })?;
    let unwelcomed = Unwelcomed { host, handle: Some(Arc::clone(&handle)) };
    host.restart().make_durable(&handle, config.lease, hello.enforces_lease).await?;
    // In this order: if a successor has come, either it finds the session in the journal, or this finds it.
    if !host.is_current() {
        return Err(superseded());
    }
    if host.is_stopping() {
        return Err(draining());
    }
    unwelcomed.welcomed();
    fence::watch_over(host, &handle);
    let line = LineId::FIRST;
    handle.welcome(HostSays::Welcome(Welcome {
        session: handle.id,
        host_incarnation: host.incarnation(),
        version,
        lease,
        window,
        epoch: handle.epoch,
        // Nothing was sent yet.
        retained_floor: None,
        resume: Resume::Flush,
        page_size: PageSize::BASE,
        wants_timing,
    }));
    tracing::info!(session = handle.id.get(), device = %handle.device, shard = handle.shard.index, "session opened");
    Ok(Opened { handle, line })
}

fn draining() -> SessionError {
    SessionError::fatal(Reason::Draining, "the host agent is stopping; connect to its successor")
}

pub(crate) fn superseded() -> SessionError {
    SessionError::fatal(
        Reason::HostSuperseded,
        "the state directory is not this host agent's any more; drop every translation and connect to its successor",
    )
}

/// A session whose device has not been welcomed: it was granted nothing and holds nothing, so it is over
/// when this is dropped.
struct Unwelcomed<'a> {
    host: &'a Host,
    handle: Option<Arc<SessionHandle>>,
}

impl Unwelcomed<'_> {
    fn welcomed(mut self) {
        self.handle = None;
    }
}

impl Drop for Unwelcomed<'_> {
    fn drop(&mut self) {
        let Some(handle) = self.handle.take() else { return };
        handle.on_left_behind();
        start_outliving(self.host, handle);
    }
}

impl SessionHandle {
    /// What is still to be said of the device's earlier sessions.
    pub(super) fn earlier(&self) -> Earlier {
        self.state.lock().earlier
    }

    /// It was said, and need not be on another stream.
    pub(super) fn on_earlier_left(&self) {
        self.state.lock().earlier = Earlier::None;
    }

    /// The Welcome goes before whatever else the session has been told meanwhile.
    fn welcome(&self, welcome: HostSays) {
        let waker = {
            let mut state = self.state.lock();
            state.line.answers.push_front(welcome);
            state.line.stream.take()
        };
        super::wake(waker);
    }
}

/// The device may ask for a smaller window than the host agent's, never for a larger one: the window
/// bounds what the host keeps for it. That it enforces its lease is its own word.
fn session_config(config: SessionConfig, hello: &Hello) -> SessionConfig {
    let window = hello.window.map_or(config.outbox.window, |asked| asked.clamp(1, config.outbox.window));
    let enforcement = match hello.enforces_lease {
        true => Enforcement::ByDevice,
        false => Enforcement::ByNobody,
    };
    SessionConfig { outbox: OutboxLimits { window, ..config.outbox }, enforcement, ..config }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(versions: &[u32]) -> Hello {
        Hello {
            device: shootdown_core::DeviceId::new("gpu0").unwrap(),
            incarnation: shootdown_core::Incarnation::FIRST,
            versions: versions.to_vec(),
            window: None,
            page_sizes: vec![PageSize::BASE],
            enforces_lease: true,
            change_pte: false,
            resume: None,
            clock_id: String::new(),
        }
    }

    #[test]
    fn an_unsupported_version_is_answered_with_those_that_would_do() {
        let refused = agree_on_version(&hello(&[7, 9])).unwrap_err();
        assert_eq!(refused.reason, Reason::VersionUnsupported);
        assert_eq!(refused.supported_versions, PROTOCOL_VERSIONS);
        assert_eq!(agree_on_version(&hello(&[9, 1])), Ok(1));
    }

    #[test]
    fn a_device_gets_at_most_the_window_of_the_host_agent() {
        let config = SessionConfig::default();
        let asked = |window| session_config(config, &Hello { window, ..hello(&[1]) }).outbox.window;
        assert_eq!(asked(Some(u32::MAX)), config.outbox.window);
        assert_eq!(asked(Some(2)), 2);
        assert_eq!(asked(None), config.outbox.window);
    }
}
