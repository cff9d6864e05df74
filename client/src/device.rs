//! A device with a session: the entrance of the SDK.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use shootdown_core::lease::LeaseTerms;
use shootdown_core::session::Enforcement;
use shootdown_core::{Access, AddrRange, AddressSpaceId, Incarnation, SessionId};
use shootdown_proto::error::Malformed;
use shootdown_proto::message::{
    Hello, HostSays, MAX_SESSION_MESSAGE, PROTOCOL_VERSIONS, Resume, ResumePoint, SessionError, Welcome,
};
use shootdown_proto::v1;
use shootdown_proto::v1::device_service_client::DeviceServiceClient;

use crate::config::{ChangePte, ConfigError, DeviceConfig};
use crate::connection::{self, TransportError, Watch};
use crate::fault::{FaultError, Faulter, Grant, MappedPage};
use crate::hosts::StaleHost;
use crate::mapping::Mapping;
use crate::page::PageClient;
use crate::session::Session;
use crate::session::driver::Driver;
use crate::session::end::{EndCause, NotLive, SessionEnd};
use crate::session::flush::{AnyTlb, Vendor};
use crate::session::gate::Gate;
use crate::session::outgoing::{Outgoing, OutgoingStream};
use crate::subscription::{SubscribeError, SubscribeOptions, Subscription};
use crate::tlb::{DeviceTlb, FlushAllCause};

/// A device with a session at a host agent. Clones share the session; when the last is dropped the device
/// leaves in the background, as by [`Device::leave`].
///
/// When the connection is lost it connects again by itself and goes on with the session, as long as the lease
/// lasts: what the device holds stays in use, and faults wait. When that cannot be, [`Device::lost`] resolves: the device
/// has flushed everything, and may connect again.
///
/// The price of a session: one task that reads the stream and one that keeps the lease, one connection,
/// and a task for each flush that is not ready when it is first polled.
pub struct Device<T> {
    handle: Arc<Handle>,
    tlb: Arc<T>,
}

struct Handle {
    session: Arc<Session>,
    faulter: Faulter,
    tlb: Arc<dyn AnyTlb>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.session.close(EndCause::Dropped);
    }
}

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No connection, or it broke.
    #[error("cannot reach the host agent at {endpoint}")]
    Transport {
        /// Where it was looked for.
        endpoint: crate::Endpoint,
        /// What happened.
        #[source]
        source: TransportError,
    },
    /// No answer in time.
    #[error("the host agent at {endpoint} did not answer within {patience:?}")]
    Timeout {
        /// Where it was looked for.
        endpoint: crate::Endpoint,
        /// [`DeviceConfig::connect_timeout`].
        patience: Duration,
    },
    /// The host agent refused the session and said why.
    #[error("the host agent refused the session")]
    Refused(#[source] SessionError),
    /// The host agent closed the stream without an answer.
    #[error("the host agent closed the stream instead of answering")]
    Closed,
    /// The answer cannot be understood.
    #[error("the host agent sent a malformed answer")]
    Malformed(#[source] Malformed),
    /// The answer is not what the protocol allows.
    #[error("the host agent's answer is not one to Hello: {what}")]
    Answer {
        /// What is wrong with it.
        what: &'static str,
    },
    /// A host agent that has been succeeded.
    #[error("the host agent at {endpoint} is an old one")]
    StaleHost {
        /// Where it was looked for.
        endpoint: crate::Endpoint,
        /// Which, and its successor.
        #[source]
        source: StaleHost,
    },
    /// The lease is over before it begins.
    #[error("a lease of {lease:?} is not longer than this device's margin and drift")]
    LeaseTooShort {
        /// What the host agent gave.
        lease: Duration,
    },
}

impl<T: DeviceTlb> Device<T> {
    /// Flushes everything through `tlb`, connects, and opens a session. Must run on a tokio runtime, which
    /// the session lives on.
    ///
    /// After a session was lost, wait for [`Device::lost`] before this: Hello promises that the device holds
    /// nothing.
    ///
    /// # Errors
    /// [`ConnectError`].
    ///
    /// # Cancel safety
    /// Dropped, there is no session.
    pub async fn connect(config: DeviceConfig, tlb: Arc<T>) -> Result<Self, ConnectError> {
        config.check()?;
        tlb.flush_all(FlushAllCause::Connecting).await;
        let endpoint = config.endpoint.clone();
        let patience = config.connect_timeout;
        let opened = tokio::time::timeout(patience, Box::pin(open(&config))).await;
        let Opened { inbound, welcome, outgoing, gate } =
            opened.map_err(|_| ConnectError::Timeout { endpoint, patience })??;
        tracing::info!(
            device = %config.device, session = %welcome.session, host = %welcome.host_incarnation,
            lease = ?welcome.lease, window = welcome.window, "session opened"
        );
        let (session, tell) = Session::new(config, welcome, gate, outgoing);
        let any: Arc<dyn AnyTlb> = Arc::new(Vendor(Arc::clone(&tlb)));
        Driver::start(Arc::clone(&session), Arc::clone(&any), inbound, tell);
        let faulter = Faulter::new(Arc::clone(&session));
        Ok(Self { handle: Arc::new(Handle { session, faulter, tlb: any }), tlb })
    }
}

impl<T> Device<T> {
    /// Asks to be told of what happens to ranges of an address space; only what is subscribed can be
    /// faulted. Overlapping notices may come before this returns.
    ///
    /// # Errors
    /// [`SubscribeError`].
    ///
    /// # Cancel safety
    /// Dropped, the subscription is withdrawn, or ended again when the host agent's answer comes.
    pub async fn subscribe(
        &self,
        address_space: AddressSpaceId,
        ranges: &[AddrRange],
        options: SubscribeOptions,
    ) -> Result<Subscription, SubscribeError> {
        let tlb = Arc::clone(&self.handle.tlb);
        Subscription::open(&self.handle.session, tlb, address_space, ranges, options).await
    }

    /// The vendor's TLB.
    #[must_use]
    pub fn tlb(&self) -> &Arc<T> {
        &self.tlb
    }

    /// See [`Faulter::fault`].
    ///
    /// # Errors
    /// [`FaultError`].
    ///
    /// # Cancel safety
    /// As [`Faulter::fault`].
    pub async fn fault(
        &self,
        address_space: AddressSpaceId,
        range: AddrRange,
        access: Access,
    ) -> Result<Vec<Mapping>, FaultError> {
        self.handle.faulter.fault(address_space, range, access).await
    }

    /// See [`Faulter::fault_ticketed`].
    ///
    /// # Errors
    /// [`FaultError`].
    ///
    /// # Cancel safety
    /// As [`Faulter::fault`].
    pub async fn fault_ticketed(
        &self,
        address_space: AddressSpaceId,
        range: AddrRange,
        access: Access,
    ) -> Result<Grant, FaultError> {
        self.handle.faulter.fault_ticketed(address_space, range, access).await
    }

    /// See [`Faulter::fault_with_data`].
    ///
    /// # Errors
    /// [`FaultError`].
    ///
    /// # Cancel safety
    /// As [`Faulter::fault`].
    pub async fn fault_with_data(
        &self,
        address_space: AddressSpaceId,
        range: AddrRange,
        access: Access,
    ) -> Result<Vec<MappedPage>, FaultError> {
        self.handle.faulter.fault_with_data(address_space, range, access).await
    }

    /// What asks for translations, without keeping the session alive.
    #[must_use]
    pub fn faulter(&self) -> Faulter {
        self.handle.faulter.clone()
    }

    /// A client for frames, which does not keep the session alive. Each call makes one with a connection of
    /// its own; clone it instead of asking twice.
    ///
    /// # Errors
    /// [`TransportError`] when the endpoint cannot be one; it is not connected yet.
    pub fn pages(&self) -> Result<PageClient, TransportError> {
        PageClient::new(Arc::clone(&self.handle.session))
    }

    /// What a device with a TLB of its own asks before every access.
    #[must_use]
    pub fn gate(&self) -> Gate {
        self.handle.session.gate.clone()
    }

    /// Tells what the device used, without being asked, so that `test_young` is answered without asking.
    /// Reports that are not sent yet are joined, and widened where they get too many.
    ///
    /// # Errors
    /// [`NotLive`].
    pub fn report_young(&self, address_space: AddressSpaceId, ranges: Vec<AddrRange>) -> Result<(), NotLive> {
        self.handle.session.live()?;
        self.handle.session.report_young(address_space, ranges);
        Ok(())
    }

    /// Leaves: refuses new faults and uses at once, flushes everything through
    /// [`DeviceTlb::flush_all`], waits for open uses, tells the host agent, and closes. Resolves as
    /// [`Device::lost`] does. A session that was lost before stays lost for its own cause.
    ///
    /// # Cancel safety
    /// Dropped, the device leaves in the background.
    pub async fn leave(&self) -> SessionEnd {
        self.handle.session.close(EndCause::Left);
        self.lost().await
    }

    /// Resolves when the session has ended, the device has flushed everything and no use is open. The gate
    /// is shut long before, at the moment at which the cause is known.
    ///
    /// # Cancel safety
    /// May be dropped and called again.
    pub async fn lost(&self) -> SessionEnd {
        self.handle.session.ended().await
    }

    /// Resolves when the host agent is about to stop, with the time that is left: finish, then
    /// [`Device::leave`]. `None`: the session ended without it.
    ///
    /// # Cancel safety
    /// May be dropped and called again.
    pub async fn drain_asked(&self) -> Option<Duration> {
        self.handle.session.drain_asked().await
    }

    /// How often the session went on on a new connection, after one was lost.
    #[must_use]
    pub fn resumes(&self) -> u64 {
        *self.handle.session.resumes.borrow()
    }

    /// Resolves when [`Device::resumes`] is at least `count`; if the session ends before that, never.
    ///
    /// # Cancel safety
    /// May be dropped and called again.
    pub async fn resumed(&self, count: u64) {
        let mut resumes = self.handle.session.resumes.subscribe();
        if resumes.wait_for(|resumes| *resumes >= count).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Whether the session is open and its lease has not run out; also while it has no connection.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.handle.session.gate.check().is_ok()
    }

    /// The session's name at the host agent.
    #[must_use]
    pub fn session_id(&self) -> SessionId {
        self.handle.session.welcome.session
    }

    /// The run of the host agent that the session is with.
    #[must_use]
    pub fn host_incarnation(&self) -> Incarnation {
        self.handle.session.welcome.host_incarnation
    }

    /// What the session holds right now: for tests, logs and metrics.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let session = &self.handle.session;
        let holdings = session.holdings.lock();
        let (mappings, tickets) = (holdings.mappings.len(), holdings.mappings.tickets());
        let (uses, flushes) = (holdings.mappings.uses(), session.outgoing.in_flight());
        Counts { mappings, tickets, uses, flushes, requests: session.requests.len() }
    }
}

/// What a session holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Translations that may be used.
    pub mappings: usize,
    /// Tickets that can be committed.
    pub tickets: usize,
    /// Uses that are open.
    pub uses: usize,
    /// Notices that arrived and are not flushed.
    pub flushes: usize,
    /// Requests that wait for an answer.
    pub requests: usize,
}

struct Opened {
    inbound: tonic::Streaming<v1::SessionResponse>,
    welcome: Welcome,
    outgoing: Arc<Outgoing>,
    gate: Gate,
}

/// A stream on which Hello was answered with Welcome.
pub(crate) async fn greet(
    config: &DeviceConfig,
    said: OutgoingStream,
) -> Result<(tonic::Streaming<v1::SessionResponse>, Welcome), ConnectError> {
    let transport = |source| ConnectError::Transport { endpoint: config.endpoint.clone(), source };
    let broken = |status: tonic::Status| transport(TransportError::of_status(&status));
    let watch = Watch::of(config);
    let channel = connection::connect(&config.endpoint, &watch).await.map_err(transport)?;
    let mut client = DeviceServiceClient::new(channel)
        .max_decoding_message_size(MAX_SESSION_MESSAGE)
        .max_encoding_message_size(MAX_SESSION_MESSAGE);
    let mut inbound = client.session(said).await.map_err(broken)?.into_inner();
    let first = inbound.message().await.map_err(broken)?.ok_or(ConnectError::Closed)?;
    let welcome = match HostSays::try_from(first).map_err(ConnectError::Malformed)? {
        HostSays::Welcome(welcome) => welcome,
        HostSays::Error(error) => return Err(ConnectError::Refused(error)),
        _ => return Err(ConnectError::Answer { what: "it is neither Welcome nor Error" }),
    };
    if !PROTOCOL_VERSIONS.contains(&welcome.version) {
        return Err(ConnectError::Answer { what: "it chose a protocol version that was not offered" });
    }
    if welcome.window > config.window {
        return Err(ConnectError::Answer { what: "its window is larger than what was asked for" });
    }
    let endpoint = config.endpoint.clone();
    let stale = |source| ConnectError::StaleHost { endpoint, source };
    config.hosts.see(&config.endpoint, welcome.host_incarnation).map_err(stale)?;
    Ok((inbound, welcome))
}

async fn open(config: &DeviceConfig) -> Result<Opened, ConnectError> {
    let outgoing = Outgoing::new(config.clock.clone(), hello(config, None));
    let (inbound, welcome) = greet(config, outgoing.stream()).await?;
    if welcome.resume == Resume::Continue {
        return Err(ConnectError::Answer { what: "it goes on with a session that this device did not name" });
    }
    let sent = outgoing.on_welcome(welcome.session);
    let sent = sent.ok_or(ConnectError::Answer { what: "it came before Hello was sent" })?;
    let margin = config.lease_margin.unwrap_or_else(|| LeaseTerms::default_margin(welcome.lease));
    let gate = Gate::new(config.clock.clone(), config.lease_drift_ppm, margin);
    gate.on_granted(sent, welcome.lease);
    if gate.valid_until().is_none_or(|until| until <= sent) {
        return Err(ConnectError::LeaseTooShort { lease: welcome.lease });
    }
    Ok(Opened { inbound, welcome, outgoing, gate })
}

pub(crate) fn hello(config: &DeviceConfig, resume: Option<ResumePoint>) -> Hello {
    Hello {
        device: config.device.clone(),
        incarnation: config.incarnation,
        versions: PROTOCOL_VERSIONS.to_vec(),
        window: Some(config.window),
        page_sizes: config.page_sizes.clone(),
        enforces_lease: config.enforcement == Enforcement::ByDevice,
        change_pte: config.change_pte == ChangePte::Supported,
        resume,
        clock_id: config.clock.identity(),
    }
}

impl<T> Clone for Device<T> {
    fn clone(&self) -> Self {
        Self { handle: Arc::clone(&self.handle), tlb: Arc::clone(&self.tlb) }
    }
}

impl<T> fmt::Debug for Device<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device")
            .field("device", &self.handle.session.config.device)
            .field("session", &self.handle.session.welcome.session)
            .finish_non_exhaustive()
    }
}
