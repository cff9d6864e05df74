//! A round against the floor of the transport: the same two threads, the same kind of socket, the same run.
//!
//! *round*: from the notifier call of a source that runs on the host agent's one shard, to its completion;
//! one device, which has nothing to flush, on a thread of its own.
//!
//! *echo*: a raw tonic bidirectional stream that carries one small message there and one back; server and
//! client are on a thread each, with a current-thread runtime each, as host agent and device are.
//!
//! *would_block*: a notifier call that may not wait, over a range that the device has subscribed: the host
//! agent looks for targets, finds one, and answers WOULD_BLOCK. Nothing is sent.
//!
//! They take turns in blocks, so that what the machine does meanwhile meets both; and each is measured
//! with its two threads in the same places, because a wake-up across cores that sleep costs more than all
//! of gRPC, and the kernel moves the two kinds apart as it likes: both ends on one core, one end on each of
//! two cores, and wherever the kernel puts them. Run it with
//! `cargo bench -p shootdown-loadgen --bench round`; `ROUNDS=50000` before it asks for more, and
//! `BUSY_POLL=0s` lets both ends of a round sleep at once, as the echo's do, instead of polling for a moment
//! first.

#![allow(clippy::print_stdout, missing_docs, reason = "a program that prints its figures")]

use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::Context as _;
use hdrhistogram::Histogram;
use shootdown_client::{
    AddrRange, AddressSpaceId, Cause, Clock, Device, DeviceConfig, DeviceId, DeviceTlb, Endpoint,
    FlushAllCause, Flushed, Invalidation, PageSize, SubscribeOptions,
};
use shootdown_proto::v1;
use shootdown_proto::v1::device_service_client::DeviceServiceClient;
use shootdown_proto::v1::device_service_server::{DeviceService, DeviceServiceServer};
use shootdown_server::config::{Settings, Span};
use shootdown_server::source::rpc::RpcSource;
use shootdown_server::source::{Invalidation as Event, Notifier as _, Verdict, Wait};
use shootdown_server::{Host, ListenAddr};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::{Request, Response, Status, Streaming};

/// Of each kind, unless ROUNDS says otherwise.
const ROUNDS: usize = 30_000;

/// In a block; the kinds take turns.
const BLOCK: usize = 500;

/// Blocks of each kind that are not counted.
const WARM_UP: usize = 4;

fn main() -> anyhow::Result<()> {
    // `cargo test --all-targets` runs it too, to see that it runs.
    let default = if std::env::args().any(|arg| arg == "--bench") { ROUNDS } else { BLOCK };
    let rounds = std::env::var("ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(default);
    let dir = tempfile::tempdir()?;
    let (device_socket, echo_socket) = (dir.path().join("device"), dir.path().join("echo"));

    let busy_poll: Option<Span> = std::env::var("BUSY_POLL").ok().map(|span| span.parse()).transpose()?;
    let settings = Settings {
        listen: vec![ListenAddr::Unix(device_socket.clone())],
        shards: Some(1),
        busy_poll,
        ..Settings::default()
    };
    let running = shootdown_server::start(settings.resolve()?)?;
    let peer = Thread::start("peer")?;
    let echo = Thread::start("echo")?;
    let main = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    main.block_on(async {
        let space = running.host().register("bench", Arc::new(RpcSource::default()))?;
        let device = peer.handle.spawn(connect(device_socket, space, busy_poll)).await??;
        let mut line = EchoLine::open(&echo.handle, &peer.handle, echo_socket).await?;
        let shard = running.shards().next().context("a host agent has a shard")?.clone();

        for placement in Placement::EVERY.into_iter().filter(Placement::is_possible) {
            pin(&shard, placement.host_side()).await?;
            pin(&echo.handle, placement.host_side()).await?;
            pin(&peer.handle, placement.device_side()).await?;
            let (mut round, mut raw, mut would_block) = (histogram()?, histogram()?, histogram()?);
            for block in 0..WARM_UP + rounds.div_ceil(BLOCK) {
                let host = running.host().clone();
                let took = shard.spawn(measure_rounds(host, space)).await?;
                let (back, echoed) = echo.handle.spawn(line.measure()).await?;
                line = back;
                let refused = shard.spawn(measure_refusals(running.host().clone(), space)).await?;
                if block >= WARM_UP {
                    took.into_iter().for_each(|nanos| round.saturating_record(nanos));
                    echoed.into_iter().for_each(|nanos| raw.saturating_record(nanos));
                    refused.into_iter().for_each(|nanos| would_block.saturating_record(nanos));
                }
            }
            report(placement, &round, &raw, &would_block);
        }
        device.leave().await;
        anyhow::Ok(())
    })?;
    main.block_on(running.shutdown());
    peer.stop();
    echo.stop();
    Ok(())
}

/// Where the two ends run.
#[derive(Debug, Clone, Copy)]
enum Placement {
    OneCore,
    TwoCores,
    Anywhere,
}

impl Placement {
    const EVERY: [Self; 3] = [Self::OneCore, Self::TwoCores, Self::Anywhere];

    fn is_possible(&self) -> bool {
        !matches!(self, Self::TwoCores) || cores() > 1
    }

    fn host_side(self) -> Vec<usize> {
        match self {
            Self::OneCore | Self::TwoCores => vec![0],
            Self::Anywhere => (0..cores()).collect(),
        }
    }

    fn device_side(self) -> Vec<usize> {
        match self {
            Self::TwoCores => vec![1],
            Self::OneCore | Self::Anywhere => self.host_side(),
        }
    }
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// Keeps the thread of a current-thread runtime on these cores.
async fn pin(runtime: &Handle, cores: Vec<usize>) -> anyhow::Result<()> {
    let pinned = runtime.spawn(async move {
        let mut set = rustix::thread::CpuSet::new();
        cores.into_iter().for_each(|core| set.set(core));
        rustix::thread::sched_setaffinity(None, &set)
    });
    Ok(pinned.await??)
}

/// Of nanoseconds, up to ten seconds.
fn histogram() -> Result<Histogram<u64>, hdrhistogram::CreationError> {
    Histogram::new_with_max(10_000_000_000, 3)
}

#[expect(clippy::cast_precision_loss, reason = "latencies have far fewer than 53 bits")]
fn report(placement: Placement, round: &Histogram<u64>, raw: &Histogram<u64>, would_block: &Histogram<u64>) {
    let micros = |nanos: u64| nanos as f64 / 1000.0;
    println!("{placement:?}");
    println!("{:<12}{:>10}{:>10}{:>10}{:>10}{:>10}", "(us)", "count", "p50", "p90", "p99", "max");
    for (name, histogram) in [("round", round), ("echo", raw), ("would_block", would_block)] {
        let at = |quantile| micros(histogram.value_at_quantile(quantile));
        let (p50, p90, p99, max) = (at(0.5), at(0.9), at(0.99), micros(histogram.max()));
        println!("{name:<12}{:>10}{p50:>10.1}{p90:>10.1}{p99:>10.1}{max:>10.1}", histogram.len());
    }
    let p50 = |histogram: &Histogram<u64>| histogram.value_at_quantile(0.5) as f64;
    println!("ratio of the medians of round and echo: {:.2}\n", p50(round) / p50(raw));
}

async fn measure_rounds(host: Host, space: AddressSpaceId) -> Vec<u64> {
    let clock = Clock::boottime();
    let mut took = Vec::with_capacity(BLOCK);
    for number in 0..BLOCK as u64 {
        let began = clock.now();
        let address = 0x10_0000 + number * 4096;
        let round = host.invalidate_page(space, address, Cause::Clear, Wait::ForTargets).await;
        took.push(clock.now().as_nanos() - began.as_nanos());
        let round = round.expect("the address space lives as long as the benchmark");
        assert!(round.is_quiesced() && round.targets.len() == 1, "one device has stopped");
    }
    took
}

async fn measure_refusals(host: Host, space: AddressSpaceId) -> Vec<u64> {
    let clock = Clock::boottime();
    let mut took = Vec::with_capacity(BLOCK);
    for number in 0..BLOCK as u64 {
        let range = AddrRange::page_of(0x10_0000 + number * 4096, PageSize::BASE);
        let (cause, wait) = (Cause::Clear, Wait::NotAtAll);
        let event = Event { address_space: space, range, cause, owner: None, wait, resident_pages: None };
        let began = clock.now();
        let round = host.invalidate_range_start(event).await;
        took.push(clock.now().as_nanos() - began.as_nanos());
        let round = round.expect("the address space lives as long as the benchmark");
        assert!(round.verdict == Verdict::WouldBlock && round.seq.is_none(), "there is a target: {round:?}");
    }
    took
}

/// A device with nothing to flush.
struct Idle;

impl DeviceTlb for Idle {
    async fn invalidate(&self, _: Invalidation) -> Flushed {
        Flushed::default()
    }

    async fn flush_all(&self, _: FlushAllCause) {}
}

async fn connect(
    socket: std::path::PathBuf,
    space: AddressSpaceId,
    busy_poll: Option<Span>,
) -> anyhow::Result<Device<Idle>> {
    let mut config = DeviceConfig::new(DeviceId::new("bench")?, Endpoint::Unix(socket));
    if let Some(Span(busy_poll)) = busy_poll {
        config.busy_poll = busy_poll;
    }
    let device = Device::connect(config, Arc::new(Idle)).await?;
    device.subscribe(space, &[AddrRange::ALL], SubscribeOptions::default()).await?;
    Ok(device)
}

/// The server's two ends of the raw stream.
struct EchoLine {
    tx: mpsc::Sender<Result<v1::SessionResponse, Status>>,
    rx: Streaming<v1::SessionRequest>,
}

impl EchoLine {
    /// A server on one runtime and its client on another.
    async fn open(server: &Handle, client: &Handle, socket: std::path::PathBuf) -> anyhow::Result<Self> {
        let (line_tx, line_rx) = oneshot::channel();
        let listening = server
            .spawn({
                let socket = socket.clone();
                async move { tokio::net::UnixListener::bind(socket) }
            })
            .await??;
        let service = DeviceServiceServer::new(EchoServer { line: parking_lot::Mutex::new(Some(line_tx)) });
        server.spawn(
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(UnixListenerStream::new(listening)),
        );
        client.spawn(echo(socket));
        Ok(line_rx.await?)
    }

    async fn measure(mut self) -> (Self, Vec<u64>) {
        let clock = Clock::boottime();
        let mut took = Vec::with_capacity(BLOCK);
        for number in 0..BLOCK as u64 {
            let renewed = v1::LeaseRenewed { request_id: number + 1, lease_ms: 10_000 };
            let there = v1::session_response::Message::LeaseRenewed(renewed);
            let began = clock.now();
            let sent = self.tx.send(Ok(v1::SessionResponse { message: Some(there) })).await;
            let back = self.rx.message().await;
            took.push(clock.now().as_nanos() - began.as_nanos());
            sent.expect("the stream is open");
            back.expect("the stream is whole").expect("the stream is open");
        }
        (self, took)
    }
}

type Line = oneshot::Sender<EchoLine>;

struct EchoServer {
    line: parking_lot::Mutex<Option<Line>>,
}

#[tonic::async_trait]
impl DeviceService for EchoServer {
    type SessionStream = ReceiverStream<Result<v1::SessionResponse, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<v1::SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let (tx, rx) = mpsc::channel(16);
        if let Some(line) = self.line.lock().take() {
            drop(line.send(EchoLine { tx, rx: request.into_inner() }));
        }
        Ok(Response::new(ReceiverStream::new(rx)))
    }
}

async fn echo(socket: std::path::PathBuf) -> anyhow::Result<()> {
    let channel =
        tonic::transport::Endpoint::from_shared(format!("unix:{}", socket.display()))?.connect().await?;
    let (tx, rx) = mpsc::channel(16);
    let mut inbound = DeviceServiceClient::new(channel).session(ReceiverStream::new(rx)).await?.into_inner();
    while let Some(there) = inbound.message().await? {
        if let Some(v1::session_response::Message::LeaseRenewed(renewed)) = there.message {
            let back = v1::Heartbeat { request_id: renewed.request_id };
            let message = Some(v1::session_request::Message::Heartbeat(back));
            tx.send(v1::SessionRequest { message }).await?;
        }
    }
    Ok(())
}

/// A thread with a current-thread runtime.
struct Thread {
    handle: Handle,
    stop: oneshot::Sender<()>,
    join: JoinHandle<()>,
}

impl Thread {
    fn start(name: &str) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel();
        let join = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            let _ = runtime.block_on(stopped);
            runtime.shutdown_background();
        })?;
        Ok(Self { handle, stop, join })
    }

    fn stop(self) {
        // A thread that panicked has said so, and is gone.
        let _ = self.stop.send(());
        let _ = self.join.join();
    }
}
