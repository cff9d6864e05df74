//! A host agent that says exactly what a test tells it to, on a real Unix socket.
#![allow(dead_code, reason = "each test file uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a helper of tests, which fail by panicking")]

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use shootdown_client::{
    Access, AddrRange, AddressSpaceId, Cause, Clock, CommitTicket, Device, DeviceConfig, DeviceId, DeviceTlb,
    Endpoint, FlushAllCause, Flushed, FrameNumber, Invalidation, Moment, NoticeNumber, PageSize, Reason,
    ResumePolicy, Seq, SessionId, SubscribeOptions, Subscription, SubscriptionId, Translation, Young,
};
use shootdown_core::{Ack, Notice, NoticeKind, Scope};
use shootdown_proto::message::{DeviceSays, Fault, Grant, HostSays, Resume, Welcome};
use shootdown_proto::v1;
use shootdown_proto::v1::device_service_server::{DeviceService, DeviceServiceServer};
use shootdown_proto::v1::page_service_server::{PageService, PageServiceServer};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};

/// How long a test waits for what must happen. It only has to be longer than a slow machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Bounds every wait of a test.
pub(crate) async fn soon<F: Future>(what: F) -> F::Output {
    tokio::time::timeout(PATIENCE, what).await.expect("what the test waits for must happen")
}

/// Waits for a state that other tasks of this runtime bring about.
pub(crate) async fn until(what: impl Fn() -> bool) {
    soon(async {
        while !what() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

/// A host agent whose every word a test chooses.
pub(crate) struct FakeHost {
    pub(crate) endpoint: Endpoint,
    pub(crate) frames: Frames,
    sessions: mpsc::Receiver<FakeSession>,
    _directory: tempfile::TempDir,
    server: tokio::task::JoinHandle<()>,
}

/// Frames that PageService serves: 4096 bytes each, zero until written.
#[derive(Clone, Default)]
pub(crate) struct Frames {
    pub(crate) bytes: Arc<Mutex<HashMap<u64, Vec<u8>>>>,
    /// Writes are refused, as those of a fenced session are.
    pub(crate) fenced: Arc<Mutex<bool>>,
    /// The frame, offset and length of each span that was written, in order.
    pub(crate) written: Arc<Mutex<Vec<(u64, u32, u32)>>>,
    /// While a test holds it, what was read stays under way; how many reads have looked.
    pub(crate) under_way: Arc<tokio::sync::RwLock<()>>,
    pub(crate) looked: Arc<Mutex<usize>>,
    /// While a test holds it, no answer goes out.
    pub(crate) answers: Arc<tokio::sync::RwLock<()>>,
}

/// The host agent's end of one session.
pub(crate) struct FakeSession {
    inbound: tonic::Streaming<v1::SessionRequest>,
    outbound: mpsc::Sender<Result<v1::SessionResponse, tonic::Status>>,
    pub(crate) lease: Duration,
}

struct Service {
    sessions: mpsc::Sender<FakeSession>,
}

#[tonic::async_trait]
impl DeviceService for Service {
    type SessionStream = ReceiverStream<Result<v1::SessionResponse, tonic::Status>>;

    async fn session(
        &self,
        request: tonic::Request<tonic::Streaming<v1::SessionRequest>>,
    ) -> Result<tonic::Response<Self::SessionStream>, tonic::Status> {
        let (outbound, messages) = mpsc::channel(1024);
        let session = FakeSession { inbound: request.into_inner(), outbound, lease: Duration::from_secs(60) };
        self.sessions.send(session).await.map_err(|_| tonic::Status::unavailable("the test is over"))?;
        Ok(tonic::Response::new(ReceiverStream::new(messages)))
    }
}

#[tonic::async_trait]
impl PageService for Frames {
    async fn read(
        &self,
        request: tonic::Request<v1::ReadRequest>,
    ) -> Result<tonic::Response<v1::ReadResponse>, tonic::Status> {
        let request = request.into_inner();
        assert_eq!(
            (request.session_id, request.epoch),
            (7, 3),
            "the session and its epoch travel with each call"
        );
        let _answer = self.answers.read().await;
        let mut data = Vec::new();
        {
            let frames = self.bytes.lock();
            let empty = vec![0; 4096];
            for span in request.spans {
                let frame = frames.get(&span.frame).unwrap_or(&empty);
                data.extend_from_slice(&frame[span.offset as usize..][..span.length as usize]);
            }
            *self.looked.lock() += 1;
        }
        let _arrived = self.under_way.read().await;
        Ok(tonic::Response::new(v1::ReadResponse { data: data.into() }))
    }

    async fn write(
        &self,
        request: tonic::Request<v1::WriteRequest>,
    ) -> Result<tonic::Response<v1::WriteResponse>, tonic::Status> {
        let request = request.into_inner();
        let mut data = request.data;
        let _answer = self.answers.read().await;
        if *self.fenced.lock() {
            return Err(shootdown_proto::error::status(Reason::SessionFenced, "fenced", &[]));
        }
        let mut frames = self.bytes.lock();
        self.written.lock().extend(request.spans.iter().map(|span| (span.frame, span.offset, span.length)));
        for span in request.spans {
            let frame = frames.entry(span.frame).or_insert_with(|| vec![0; 4096]);
            frame[span.offset as usize..][..span.length as usize]
                .copy_from_slice(&data.split_to(span.length as usize));
        }
        Ok(tonic::Response::new(v1::WriteResponse {}))
    }
}

impl FakeHost {
    pub(crate) fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path: PathBuf = directory.path().join("device.sock");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let (sessions_tx, sessions) = mpsc::channel(4);
        let frames = Frames::default();
        let router = tonic::transport::Server::builder()
            .add_service(DeviceServiceServer::new(Service { sessions: sessions_tx }))
            .add_service(PageServiceServer::new(frames.clone()));
        let server = tokio::spawn(async move {
            router.serve_with_incoming(UnixListenerStream::new(listener)).await.unwrap();
        });
        Self { endpoint: Endpoint::Unix(path), frames, sessions, _directory: directory, server }
    }

    /// A device that does not connect again: a test that is about that says so.
    pub(crate) fn config(&self) -> DeviceConfig {
        let mut config = DeviceConfig::new(DeviceId::new("test-device").unwrap(), self.endpoint.clone());
        config.resume = ResumePolicy::Flush;
        config
    }

    /// A device that does.
    pub(crate) fn resuming(&self) -> DeviceConfig {
        let mut config = self.config();
        config.resume = ResumePolicy::Resume;
        config
    }

    /// A device with a session.
    pub(crate) async fn connect<T: DeviceTlb>(
        &mut self,
        config: DeviceConfig,
        tlb: &Arc<T>,
    ) -> (Device<T>, FakeSession) {
        self.connect_with(config, tlb, |_| {}).await
    }

    /// A device with a session, and a subscription of all of [`space`] that lasts as long.
    pub(crate) async fn subscribed<T: DeviceTlb>(
        &mut self,
        config: DeviceConfig,
        tlb: &Arc<T>,
    ) -> (Device<T>, FakeSession) {
        let (device, mut session) = self.connect(config, tlb).await;
        // Dropping it ends nothing.
        drop(session.subscribe(&device, AddrRange::ALL).await);
        (device, session)
    }

    /// A device with a session whose Welcome the test changes.
    pub(crate) async fn connect_with<T: DeviceTlb>(
        &mut self,
        config: DeviceConfig,
        tlb: &Arc<T>,
        change: impl FnOnce(&mut Welcome),
    ) -> (Device<T>, FakeSession) {
        let window = config.window;
        let connecting = tokio::spawn(Device::connect(config, Arc::clone(tlb)));
        let mut session = soon(self.sessions.recv()).await.expect("the device opens a session");
        match soon(session.next()).await {
            Some(DeviceSays::Hello(hello)) => assert!(hello.enforces_lease && hello.resume.is_none()),
            other => panic!("Hello comes first, not {other:?}"),
        }
        let mut welcome = welcome(window);
        change(&mut welcome);
        session.lease = welcome.lease;
        session.say(HostSays::Welcome(welcome)).await;
        (soon(connecting).await.unwrap().unwrap(), session)
    }

    pub(crate) async fn session(&mut self) -> FakeSession {
        soon(self.sessions.recv()).await.expect("the device opens a session")
    }

    /// One that a device has opened by now.
    pub(crate) fn try_session(&mut self) -> Option<FakeSession> {
        self.sessions.try_recv().ok()
    }

    /// Lets the server outlive this: a session needs its connection only. What must be kept for it.
    pub(crate) fn keep(self) -> impl Sized {
        self._directory
    }

    /// The host agent is killed: its connections break.
    pub(crate) fn kill(&self) {
        self.server.abort();
    }
}

pub(crate) fn welcome(window: u32) -> Welcome {
    Welcome {
        session: SessionId::new(7).unwrap(),
        host_incarnation: shootdown_client::Incarnation::new(5).unwrap(),
        version: 1,
        lease: Duration::from_secs(60),
        window,
        epoch: shootdown_client::Epoch::new(3).unwrap(),
        retained_floor: None,
        resume: Resume::Flush,
        page_size: PageSize::BASE,
        wants_timing: false,
    }
}

impl FakeSession {
    pub(crate) async fn say(&self, says: HostSays) {
        self.outbound.send(Ok(says.into())).await.expect("the device reads");
    }

    /// On a stream that the device may have given up.
    pub(crate) async fn try_say(&self, says: HostSays) {
        drop(self.outbound.send(Ok(says.into())).await);
    }

    pub(crate) async fn notices(&self, notices: impl IntoIterator<Item = Notice>) {
        self.say(HostSays::Notices(notices.into_iter().collect())).await;
    }

    /// The next message; `None`: the device closed its side, or is gone.
    pub(crate) async fn next(&mut self) -> Option<DeviceSays> {
        let wire = self.inbound.message().await.ok().flatten()?;
        Some(DeviceSays::try_from(wire).expect("the device sends well-formed messages"))
    }

    /// The next message that is no heartbeat; those are answered.
    pub(crate) async fn hear(&mut self) -> DeviceSays {
        loop {
            match soon(self.next()).await.expect("the device says something") {
                DeviceSays::Heartbeat { request } => {
                    self.say(HostSays::LeaseRenewed { request, lease: self.lease }).await;
                }
                says => return says,
            }
        }
    }

    pub(crate) async fn ack(&mut self) -> Ack {
        match self.hear().await {
            DeviceSays::Ack { session, ack } => {
                assert_eq!(session.map(SessionId::get), Some(7));
                ack
            }
            other => panic!("an ack was expected, not {other:?}"),
        }
    }

    pub(crate) async fn fault(&mut self) -> Fault {
        match self.hear().await {
            DeviceSays::Fault(fault) => fault,
            other => panic!("a fault was expected, not {other:?}"),
        }
    }

    /// Grants a fault, each page the frame of its number.
    pub(crate) async fn grant(&self, fault: &Fault) {
        self.say(HostSays::Grant(grant_of(fault))).await;
    }

    /// Answers what the device asks while `device` runs; the subscription.
    pub(crate) async fn subscribe<T: DeviceTlb>(
        &mut self,
        device: &Device<T>,
        range: AddrRange,
    ) -> Subscription {
        let ranges = [range];
        let asked = device.subscribe(space(), &ranges, SubscribeOptions::default());
        let answered = async {
            match self.hear().await {
                DeviceSays::Subscribe(subscribe) => {
                    let (request, subscription) = (subscribe.request, SubscriptionId::FIRST);
                    self.say(HostSays::Subscribed { request, subscription, seq: None }).await;
                }
                other => panic!("a subscription was expected, not {other:?}"),
            }
        };
        let (subscription, ()) = tokio::join!(asked, answered);
        subscription.unwrap()
    }

    /// A page that the device has faulted and installed.
    pub(crate) async fn mapped<T: DeviceTlb>(
        &mut self,
        device: &Device<T>,
        number: u64,
    ) -> shootdown_client::Mapping {
        let (mapped, ()) = tokio::join!(soon(device.fault(space(), page(number), Access::Write)), async {
            let fault = self.fault().await;
            self.grant(&fault).await;
        });
        mapped.unwrap().remove(0)
    }

    /// Nothing more will come from the host agent; the device's last words.
    pub(crate) async fn close(mut self) -> Vec<DeviceSays> {
        self.outbound = mpsc::channel(1).0;
        self.last_words().await
    }

    /// All that comes until the device closes its side.
    pub(crate) async fn last_words(&mut self) -> Vec<DeviceSays> {
        let mut words = Vec::new();
        while let Some(says) = soon(self.next()).await {
            if !matches!(says, DeviceSays::Heartbeat { .. }) {
                words.push(says);
            }
        }
        words
    }
}

pub(crate) fn space() -> AddressSpaceId {
    AddressSpaceId::new(11).unwrap()
}

pub(crate) fn page(number: u64) -> AddrRange {
    pages(number, 1)
}

pub(crate) fn pages(number: u64, count: u64) -> AddrRange {
    AddrRange::new(number << 12, (number + count) << 12).unwrap()
}

pub(crate) fn number(value: u64) -> NoticeNumber {
    NoticeNumber::new(value).unwrap()
}

pub(crate) fn numbers(values: impl IntoIterator<Item = u64>) -> Vec<NoticeNumber> {
    values.into_iter().map(number).collect()
}

pub(crate) fn notice(value: u64, range: AddrRange) -> Notice {
    notice_of(value, NoticeKind::Invalidate, range)
}

pub(crate) fn notice_of(value: u64, kind: NoticeKind, range: AddrRange) -> Notice {
    Notice {
        number: number(value),
        kind,
        scope: Scope::Range(space(), range),
        seq: Seq::new(value),
        cause: Cause::Unmap,
        owner: None,
        flush_reason: None,
    }
}

pub(crate) fn grant_of(fault: &Fault) -> Grant {
    let translations: Vec<_> = fault
        .range
        .pages(PageSize::BASE)
        .map(|address| Translation {
            range: AddrRange::page_of(address, PageSize::BASE),
            frame: FrameNumber(address >> 12),
            access: fault.access,
        })
        .collect();
    let data = if fault.wants_data {
        translations.iter().flat_map(|translation| vec![translation.frame.0 as u8; 4096]).collect()
    } else {
        Bytes::new()
    };
    Grant { request: fault.request, address_space: fault.address_space, seq: None, translations, data }
}

/// What a [`TestTlb`] was asked, and that it returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Call {
    Invalidate(Invalidation),
    ClearYoung(Invalidation),
    ChangePte(Invalidation),
    RangeEnd(AddrRange),
    FlushAll(FlushAllCause),
}

/// What a flush does before it returns.
pub(crate) enum Plan {
    /// Waits for the test.
    Hold(oneshot::Receiver<()>),
    Panic,
    Bring(Flushed),
}

/// A TLB that flushes when the test says so. Without a plan a flush is done at once.
pub(crate) struct TestTlb {
    plans: Mutex<HashMap<u64, Plan>>,
    flush_all: Mutex<Option<Plan>>,
    pub(crate) tickets: Mutex<Vec<CommitTicket>>,
    pub(crate) young: Mutex<Option<Vec<AddrRange>>>,
    calls_tx: mpsc::Sender<Call>,
    calls: tokio::sync::Mutex<mpsc::Receiver<Call>>,
}

impl TestTlb {
    pub(crate) fn new() -> Arc<Self> {
        let (calls_tx, calls) = mpsc::channel(65536);
        Arc::new(Self {
            plans: Mutex::default(),
            flush_all: Mutex::default(),
            tickets: Mutex::default(),
            young: Mutex::default(),
            calls_tx,
            calls: tokio::sync::Mutex::new(calls),
        })
    }

    pub(crate) fn plan(&self, notice: u64, plan: Plan) {
        self.plans.lock().insert(notice, plan);
    }

    /// The flush of that notice waits until the sender sends or is dropped.
    pub(crate) fn hold(&self, notice: u64) -> oneshot::Sender<()> {
        let (release, hold) = oneshot::channel();
        self.plan(notice, Plan::Hold(hold));
        release
    }

    pub(crate) fn hold_flush_all(&self) -> oneshot::Sender<()> {
        let (release, hold) = oneshot::channel();
        *self.flush_all.lock() = Some(Plan::Hold(hold));
        release
    }

    pub(crate) fn panic_in_flush_all(&self) {
        *self.flush_all.lock() = Some(Plan::Panic);
    }

    pub(crate) async fn call(&self) -> Call {
        soon(async { self.calls.lock().await.recv().await }).await.expect("the TLB is there")
    }

    /// The calls since the last look.
    pub(crate) async fn calls(&self) -> Vec<Call> {
        let mut calls = self.calls.lock().await;
        std::iter::from_fn(|| calls.try_recv().ok()).collect()
    }

    pub(crate) async fn wait_for_flush_all(&self, cause: FlushAllCause) {
        while self.call().await != Call::FlushAll(cause) {}
    }

    fn log(&self, call: Call) {
        self.calls_tx.try_send(call).expect("a test makes fewer calls than this holds");
    }
}

async fn follow(plan: Option<Plan>) -> Flushed {
    match plan {
        None => Flushed::default(),
        Some(Plan::Bring(flushed)) => flushed,
        Some(Plan::Panic) => panic!("the test wants this flush to panic"),
        Some(Plan::Hold(hold)) => {
            let _ = hold.await;
            Flushed::default()
        }
    }
}

impl DeviceTlb for TestTlb {
    async fn invalidate(&self, invalidation: Invalidation) -> Flushed {
        self.log(Call::Invalidate(invalidation));
        let plan = invalidation.notice.and_then(|notice| self.plans.lock().remove(&notice.get()));
        follow(plan).await
    }

    async fn flush_all(&self, cause: FlushAllCause) {
        self.log(Call::FlushAll(cause));
        if cause != FlushAllCause::Connecting {
            let plan = self.flush_all.lock().take();
            follow(plan).await;
        }
    }

    async fn clear_young(&self, invalidation: Invalidation) -> Young {
        self.log(Call::ClearYoung(invalidation));
        self.young.lock().clone().map_or(Young::Unknown, Young::Known)
    }

    async fn change_pte(&self, invalidation: Invalidation, replacement: CommitTicket) -> Flushed {
        self.log(Call::ChangePte(invalidation));
        self.tickets.lock().push(replacement);
        let plan = invalidation.notice.and_then(|notice| self.plans.lock().remove(&notice.get()));
        follow(plan).await
    }

    async fn range_end(&self, _: AddressSpaceId, range: AddrRange) {
        self.log(Call::RangeEnd(range));
    }
}

/// A clock that stands still until the test moves it.
pub(crate) fn manual_clock() -> (Clock, Arc<Mutex<Moment>>) {
    let now = Arc::new(Mutex::new(Moment::from_nanos(1_000_000_000)));
    let read = Arc::clone(&now);
    (Clock::from_fn(move || *read.lock()), now)
}
