//! A host agent on Unix sockets in a folder of its own, and peers that speak the wire by hand: what a
//! vendor in another language sees.
#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test file uses its part")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

pub mod daemon;
pub mod log;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use hyper_util::rt::TokioIo;
use shootdown_core::{Access, AddrRange, AddressSpaceId, Cause, FrameNumber, PageSize, Translation};
use shootdown_proto::error::Reason;
use shootdown_proto::v1;
use shootdown_proto::v1::device_service_client::DeviceServiceClient;
use shootdown_proto::v1::notifier_service_client::NotifierServiceClient;
use shootdown_proto::v1::session_request::Message as Ask;
use shootdown_proto::v1::session_response::Message as Say;
use shootdown_server::config::{Config, Settings};
use shootdown_server::source::{
    FaultError, Invalidation, Notifier as _, RoundResult, Strictness, TargetReport, Translate, Wait,
};
use shootdown_server::{Host, ListenAddr, Running};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Status, Streaming};

/// No wait in a test is longer: what has not happened by then does not happen.
pub const BOUND: Duration = Duration::from_secs(20);

/// Waits for something that must happen.
pub async fn soon<F: Future>(what: F) -> F::Output {
    tokio::time::timeout(BOUND, what).await.expect("this must happen within the bound")
}

/// Waits for a state that must be reached.
pub async fn until(mut reached: impl FnMut() -> bool) {
    soon(async {
        while !reached() {
            tokio::task::yield_now().await;
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}

/// Polls a future once, for a test that must see it wait.
pub async fn is_pending<F: Future + Unpin>(future: &mut F) -> bool {
    futures_util::poll!(future).is_pending()
}

pub fn pages(first: u64, count: u64) -> AddrRange {
    AddrRange::new(first * 4096, (first + count) * 4096).unwrap()
}

pub fn wire(range: AddrRange) -> v1::AddressRange {
    shootdown_proto::convert::wire_range(range)
}

/// A running host agent.
pub struct Agent {
    pub running: Option<Running>,
    incarnation: u64,
    folder: tempfile::TempDir,
}

impl Agent {
    pub fn start() -> Self {
        Self::start_with(|_| {})
    }

    /// One shard, long time-outs: a test that is about a time-out shortens it.
    pub fn start_with(change: impl FnOnce(&mut Config)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = |name: &str| vec![ListenAddr::Unix(folder.path().join(name))];
        let settings = Settings {
            listen: socket("device.sock"),
            source_listen: socket("source.sock"),
            admin_listen: socket("admin.sock"),
            shards: Some(1),
            lease: Some("60s".parse().unwrap()),
            ack_timeout: Some("60s".parse().unwrap()),
            drain_timeout: Some("5s".parse().unwrap()),
            ..Settings::default()
        };
        let mut config = settings.resolve().unwrap();
        change(&mut config);
        let incarnation = config.host.incarnation.get();
        Self { incarnation, running: Some(shootdown_server::start(config).unwrap()), folder }
    }

    pub fn host(&self) -> &Host {
        self.running.as_ref().unwrap().host()
    }

    pub fn socket(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub async fn channel(&self, name: &str) -> Channel {
        connect(&self.socket(name)).await
    }

    /// What a source speaks by.
    pub async fn notifier(&self) -> NotifierServiceClient<Channel> {
        NotifierServiceClient::new(self.channel("source.sock").await)
    }

    /// An address space whose pages all exist: page n is in frame n.
    pub fn space(&self) -> AddressSpaceId {
        self.host().register("test", Arc::new(Identity)).unwrap()
    }

    /// One that is also for devices which are not certain to stop.
    pub fn lenient_space(&self) -> AddressSpaceId {
        self.host().register_address_space("lenient", Arc::new(Identity), Strictness::Lenient).unwrap()
    }

    /// A device that does not stop when its lease has run out.
    pub async fn unbound_device(&self, name: &str) -> Device {
        let mut device = Device::connect(self).await;
        let capabilities = Some(v1::Capabilities { enforces_lease: false, change_pte: true });
        device.welcomed(v1::Hello { capabilities, ..Device::hello_of(name) }).await;
        device
    }

    pub async fn listed_quarantine(&self) -> v1::ListQuarantineResponse {
        let mut admin = v1::admin_service_client::AdminServiceClient::new(self.channel("admin.sock").await);
        admin.list_quarantine(v1::ListQuarantineRequest::default()).await.unwrap().into_inner()
    }

    /// A device that has said Hello.
    pub async fn device(&self, name: &str) -> Device {
        let mut device = Device::connect(self).await;
        device.hello(name).await;
        device
    }

    /// What the administrator sees of the only address space there is.
    pub async fn listed_space(&self) -> v1::AddressSpace {
        let mut admin = v1::admin_service_client::AdminServiceClient::new(self.channel("admin.sock").await);
        let listed = admin.list_address_spaces(v1::ListAddressSpacesRequest::default()).await.unwrap();
        listed.into_inner().address_spaces.remove(0)
    }

    pub async fn listed_sessions(&self) -> Vec<v1::Session> {
        let mut admin = v1::admin_service_client::AdminServiceClient::new(self.channel("admin.sock").await);
        admin.list_sessions(v1::ListSessionsRequest::default()).await.unwrap().into_inner().sessions
    }

    /// This run of it, as a resume point names it.
    pub fn incarnation(&self) -> u64 {
        self.incarnation
    }

    pub async fn evict(&self, session_id: u64) {
        let mut admin = v1::admin_service_client::AdminServiceClient::new(self.channel("admin.sock").await);
        admin.evict_session(v1::EvictSessionRequest { session_id, is_cut_off: false }).await.unwrap();
    }

    /// A round over `range`, in a task of its own.
    pub fn round(&self, space: AddressSpaceId, range: AddrRange) -> tokio::task::JoinHandle<RoundResult> {
        let host = self.host().clone();
        tokio::spawn(async move { host.invalidate_range_start(unmap(space, range)).await.unwrap() })
    }
}

/// For a test that waits for the end of a lease: it lasts as long as that, and T_ack is much shorter.
pub fn lease_of(config: &mut Config, duration: Duration) {
    config.host.session.ack_timeout = Duration::from_millis(50);
    config.host.session.lease.duration = duration;
    config.host.session.lease.margin = Duration::from_millis(20);
}

/// A round that completes now, with every target stopped: its targets.
pub async fn quiesced(round: tokio::task::JoinHandle<RoundResult>) -> Vec<TargetReport> {
    let result = soon(round).await.unwrap();
    assert!(result.is_quiesced(), "{result:?}");
    result.targets
}

pub fn unmap(address_space: AddressSpaceId, range: AddrRange) -> Invalidation {
    let (cause, wait) = (Cause::Unmap, Wait::ForTargets);
    Invalidation { address_space, range, cause, owner: None, wait, resident_pages: None }
}

pub async fn connect(socket: &Path) -> Channel {
    connect_with(socket, 8 << 20).await
}

/// With this many bytes that the peer may send and nobody reads.
pub async fn connect_with(socket: &Path, window: u32) -> Channel {
    try_connect(socket, window).await.unwrap()
}

async fn try_connect(socket: &Path, window: u32) -> Result<Channel, tonic::transport::Error> {
    let socket = socket.to_owned();
    Endpoint::from_static("http://localhost")
        .initial_connection_window_size(window)
        .initial_stream_window_size(window)
        .connect_with_connector(tower::service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
        }))
        .await
}

/// A source whose page n is always in frame n.
pub struct Identity;

impl Translate for Identity {
    fn source(&self) -> &'static str {
        "api"
    }

    fn fault(
        &self,
        _: AddressSpaceId,
        range: AddrRange,
        access: Access,
    ) -> BoxFuture<'_, Result<Vec<Translation>, FaultError>> {
        let pages = range.pages(PageSize::BASE);
        let all = pages
            .map(|page| Translation {
                range: AddrRange::page_of(page, PageSize::BASE),
                frame: FrameNumber(page / 4096),
                access,
            })
            .collect();
        Box::pin(async move { Ok(all) })
    }

    fn bytes(&self, _: &[Translation]) -> Result<Bytes, FaultError> {
        Err(FaultError::NotServed)
    }
}

/// A device that speaks the wire by hand.
pub struct Device {
    asks: mpsc::Sender<v1::SessionRequest>,
    opening: Option<BoxFuture<'static, Result<Streaming<v1::SessionResponse>, Status>>>,
    says: Option<Streaming<v1::SessionResponse>>,
    pub session: u64,
    pub epoch: u64,
    next_request: u64,
    /// Notices that came in one frame with another and are not handed out yet.
    notices: std::collections::VecDeque<v1::Notice>,
}

impl Device {
    /// A stream that nothing was said on.
    pub async fn connect(agent: &Agent) -> Self {
        Self::on(agent.channel("device.sock").await)
    }

    /// The same on a connection of the test's own.
    pub fn on(channel: Channel) -> Self {
        let (asks, rx) = mpsc::channel(64);
        let mut client = DeviceServiceClient::new(channel).max_encoding_message_size(64 << 20);
        let opening =
            async move { client.session(ReceiverStream::new(rx)).await.map(tonic::Response::into_inner) };
        Self {
            asks,
            // The response begins with the answer to the first message.
            opening: Some(Box::pin(opening)),
            says: None,
            session: 0,
            epoch: 0,
            next_request: 1,
            notices: std::collections::VecDeque::new(),
        }
    }

    /// The same, where the host agent may have no room for a connection.
    pub async fn try_on(socket: &Path) -> Result<Self, tonic::transport::Error> {
        Ok(Self::on(try_connect(socket, 8 << 20).await?))
    }

    pub fn hello_of(name: &str) -> v1::Hello {
        v1::Hello {
            device_id: name.to_owned(),
            incarnation: 1,
            protocol_versions: vec![1],
            capabilities: Some(v1::Capabilities { enforces_lease: true, change_pte: true }),
            ..v1::Hello::default()
        }
    }

    /// Says Hello and is welcomed.
    pub async fn hello(&mut self, name: &str) {
        self.welcomed(Self::hello_of(name)).await;
    }

    pub async fn welcomed(&mut self, hello: v1::Hello) -> v1::Welcome {
        self.ask(Ask::Hello(hello)).await;
        match self.say().await {
            Say::Welcome(welcome) => {
                (self.session, self.epoch) = (welcome.session_id, welcome.epoch);
                welcome
            }
            other => panic!("not welcomed: {other:?}"),
        }
    }

    pub async fn ask(&self, ask: Ask) {
        self.ask_raw(v1::SessionRequest { message: Some(ask) }).await;
    }

    pub async fn ask_raw(&self, ask: v1::SessionRequest) {
        soon(self.asks.send(ask)).await.expect("the stream is open");
    }

    /// The next message, or how the stream ended.
    pub async fn next(&mut self) -> Result<Option<Say>, Status> {
        if let Some(opening) = self.opening.take() {
            self.says = Some(soon(opening).await?);
        }
        let says = self.says.as_mut().unwrap();
        Ok(soon(says.message()).await?.map(|response| response.message.expect("says something")))
    }

    pub async fn say(&mut self) -> Say {
        self.next().await.expect("the stream is up").expect("the stream goes on")
    }

    /// Whether there is nothing to read now.
    pub async fn is_silent(&mut self) -> bool {
        self.notices.is_empty() && is_pending(&mut Box::pin(self.says.as_mut().unwrap().message())).await
    }

    pub async fn error(&mut self) -> v1::Error {
        match self.say().await {
            Say::Error(error) => error,
            other => panic!("no error: {other:?}"),
        }
    }

    /// A fatal error, and the status that ends the stream after it.
    pub async fn last_word(&mut self) -> (v1::Error, Status) {
        let error = self.error().await;
        assert!(error.fatal, "{error:?}");
        let status = self.next().await.expect_err("the stream ends with a status");
        assert_eq!(Reason::of_status(&status), Some(error.reason()), "{status:?}");
        (error, status)
    }

    pub fn request(&mut self) -> u64 {
        self.next_request += 1;
        self.next_request
    }

    pub async fn try_subscribe(
        &mut self,
        space: u64,
        ranges: Vec<v1::AddressRange>,
    ) -> Result<u64, v1::Error> {
        self.try_subscribe_with(v1::Subscribe { address_space_id: space, ranges, ..v1::Subscribe::default() })
            .await
    }

    pub async fn try_subscribe_with(&mut self, subscribe: v1::Subscribe) -> Result<u64, v1::Error> {
        let request_id = self.request();
        self.ask(Ask::Subscribe(v1::Subscribe { request_id, ..subscribe })).await;
        match self.say().await {
            Say::Subscribed(subscribed) => {
                assert_eq!(subscribed.request_id, request_id);
                Ok(subscribed.subscription_id)
            }
            Say::Error(error) => Err(error),
            other => panic!("neither subscribed nor refused: {other:?}"),
        }
    }

    pub async fn subscribe(&mut self, space: AddressSpaceId, range: AddrRange) -> u64 {
        self.try_subscribe(space.get(), vec![wire(range)]).await.unwrap()
    }

    pub async fn start_fault(&mut self, space: AddressSpaceId, range: AddrRange) -> u64 {
        let request_id = self.request();
        self.ask(Ask::Fault(v1::Fault {
            request_id,
            address_space_id: space.get(),
            range: Some(wire(range)),
            access: v1::Access::Read.into(),
            wants_data: false,
        }))
        .await;
        request_id
    }

    pub async fn grant(&mut self) -> v1::Grant {
        match self.say().await {
            Say::Grant(grant) => grant,
            other => panic!("no grant: {other:?}"),
        }
    }

    /// The next notice.
    pub async fn notice(&mut self) -> v1::Notice {
        while self.notices.is_empty() {
            match self.say().await {
                Say::Notices(notices) => self.notices.extend(notices.notices),
                other => panic!("no notice: {other:?}"),
            }
        }
        self.notices.pop_front().unwrap()
    }

    pub async fn ack(&self, through: u64) {
        self.ask(Ask::Ack(v1::Ack { through, ..v1::Ack::default() })).await;
    }

    /// The same with what the flush of the last notice has to tell.
    pub async fn ack_with(&self, report: v1::FlushReport) {
        let ack = v1::Ack { through: report.notice, reports: vec![report], ..v1::Ack::default() };
        self.ask(Ask::Ack(ack)).await;
    }

    /// On a stream that the host agent may have ended by now.
    pub async fn try_ack(&self, through: u64) {
        let ack = Ask::Ack(v1::Ack { through, ..v1::Ack::default() });
        drop(self.asks.send(v1::SessionRequest { message: Some(ack) }).await);
    }

    /// Asks for something and waits for its answer: whatever was said before has been applied then.
    pub async fn settled(&mut self) {
        let request_id = self.request();
        self.ask(Ask::Heartbeat(v1::Heartbeat { request_id })).await;
        match self.say().await {
            Say::LeaseRenewed(renewed) => assert_eq!(renewed.request_id, request_id),
            other => panic!("no lease: {other:?}"),
        }
    }

    /// A heartbeat whose answer is not waited for.
    pub async fn beat(&mut self) {
        let request_id = self.request();
        let ask = v1::SessionRequest { message: Some(Ask::Heartbeat(v1::Heartbeat { request_id })) };
        // The host agent may have ended the stream by now.
        drop(self.asks.send(ask).await);
    }

    /// What was asked last.
    pub fn last_request(&self) -> u64 {
        self.next_request
    }

    /// An ack to a host agent that may have ended the stream.
    pub async fn ack_if_open(&self, through: u64) {
        let ack = v1::Ack { through, ..v1::Ack::default() };
        drop(self.asks.send(v1::SessionRequest { message: Some(Ask::Ack(ack)) }).await);
    }

    /// Ends the stream without a word.
    pub fn cut(self) {
        drop(self);
    }
}
