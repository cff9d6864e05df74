//! The ladder's last step by force: programs and services that cut devices off, and what of them counts. Each
//! program is a real process, each service a real socket.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use common::{Agent, Device, log, pages, quiesced, soon, until, wire};
use parking_lot::Mutex;
use shootdown_core::{Access, AddrRange, AddressSpaceId, FrameNumber};
use shootdown_proto::error::Reason;
use shootdown_proto::v1;
use shootdown_proto::v1::fencer_service_server::{FencerService, FencerServiceServer};
use shootdown_proto::v1::page_service_client::PageServiceClient;
use shootdown_proto::v1::session_request::Message as Ask;
use shootdown_server::config::Config;
use shootdown_server::embed::FencerConnector;
use shootdown_server::source::{Outcome, RoundResult, TargetReport, Verdict};
use shootdown_server::{DevicePattern, Endpoint, Fencer, FencerRule};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::JoinHandle;
use tokio_stream::Stream;
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tonic::transport::server::Connected;
use tonic::{Request, Response, Status};

const T_ACK: Duration = Duration::from_millis(50);

/// Longer than an attempt and its pauses, and much shorter than a test may take.
const LEASE: Duration = Duration::from_secs(3);

fn rule(device: &str, fencer: Fencer, time_limit: Duration) -> FencerRule {
    FencerRule { devices: vec![DevicePattern::new(device)], fencer, time_limit }
}

fn short_lease(config: &mut Config) {
    config.host.session.ack_timeout = T_ACK;
    config.host.session.lease.duration = LEASE;
    config.host.session.lease.margin = Duration::from_millis(20);
}

/// Only a fencer can end it: the lease lasts as long as a test may.
fn long_lease(config: &mut Config) {
    config.host.session.ack_timeout = T_ACK;
}

/// A program that can be run.
fn script(folder: &Path, name: &str, body: &str) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

fn lines(path: &Path) -> Vec<String> {
    // Not there yet: nobody has written to it.
    std::fs::read_to_string(path).unwrap_or_default().lines().map(str::to_owned).collect()
}

fn runs(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The state comes after the name, which stands in brackets.
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

/// Devices that subscribed, were told of a round, and say nothing.
async fn silent_targets(
    agent: &Agent,
    space: AddressSpaceId,
    names: &[&str],
) -> (Vec<Device>, JoinHandle<RoundResult>) {
    let mut devices = Vec::new();
    for name in names {
        let mut device = agent.device(name).await;
        device.subscribe(space, pages(1, 1)).await;
        devices.push(device);
    }
    let round = agent.round(space, pages(1, 1));
    for device in &mut devices {
        device.notice().await;
    }
    (devices, round)
}

/// None was fenced before its lease, which began before the round did, was over.
fn assert_outlived(targets: &[TargetReport]) {
    for target in targets {
        assert_eq!(target.outcome, Outcome::Fenced, "{target:?}");
        assert!(target.elapsed.unwrap() > LEASE / 2, "no earlier than its lease: {target:?}");
    }
}

#[tokio::test]
async fn exit_status_0_confirms_and_the_round_is_over_before_the_lease() {
    let folder = tempfile::tempdir().unwrap();
    let told = folder.path().join("told");
    let body = format!(
        "echo \"$@\" >> {0}; env | grep -E '^SHOOTDOWN_(DEVICE|EPOCH|HOST|SESSION)' | sort >> {0}",
        told.display()
    );
    let program = script(folder.path(), "fence", &body);
    let agent = Agent::start_with(|config| {
        long_lease(config);
        config.host.fencers = vec![rule("gpu*", Fencer::Command(program), Duration::from_secs(10))];
    });
    let space = agent.space();
    let (mut devices, round) = silent_targets(&agent, space, &["gpu0"]).await;
    let targets = quiesced(round).await;
    assert_eq!(targets[0].outcome, Outcome::Fenced);
    assert!(targets[0].elapsed.unwrap() >= T_ACK, "not before it owed an ack for too long");
    let (error, _) = devices[0].last_word().await;
    assert_eq!(error.reason(), Reason::SessionFenced);
    let (session, epoch) = (devices[0].session, devices[0].epoch);
    let told = lines(&told);
    let arguments = format!(
        "--device-id=gpu0 --device-incarnation=1 --session-id={session} --epoch={epoch} --host-incarnation="
    );
    assert!(told[0].starts_with(&arguments), "{told:#?}");
    let environment = &told[1..];
    assert_eq!(environment[..2], ["SHOOTDOWN_DEVICE_ID=gpu0", "SHOOTDOWN_DEVICE_INCARNATION=1"]);
    assert_eq!(environment[2], format!("SHOOTDOWN_EPOCH={epoch}"));
    assert!(environment[3].starts_with("SHOOTDOWN_HOST_INCARNATION="));
    assert_eq!(environment[4..], [format!("SHOOTDOWN_SESSION_ID={session}")], "asked once");
}

/// Everything that a program can do but exit with 0, one device each. All are asked for again and again; the
/// lease fences them.
#[tokio::test]
async fn no_other_end_of_a_program_confirms() {
    let folder = tempfile::tempdir().unwrap();
    let attempts = |name: &str| folder.path().join(format!("{name}.attempts"));
    let logged = |name: &str, body: &str| {
        script(folder.path(), name, &format!("echo $$ >> {}\n{body}", attempts(name).display()))
    };
    let plain_file = folder.path().join("plain");
    std::fs::write(&plain_file, "exit 0").unwrap();
    let children = folder.path().join("children");
    let hang = format!("sleep 600 & echo $! >> {}\ntrap '' TERM; sleep 600", children.display());
    let programs = [
        ("exit1", logged("exit1", "exit 1")),
        ("exit127", logged("exit127", "exit 127")),
        ("signal", logged("signal", "kill -9 $$")),
        ("hang", logged("hang", &hang)),
        ("missing", folder.path().join("no-such-program")),
        ("not-executable", plain_file),
    ];
    let agent = Agent::start_with(|config| {
        short_lease(config);
        let limit = Duration::from_millis(200);
        let rules =
            programs.iter().map(|(name, program)| rule(name, Fencer::Command(program.clone()), limit));
        config.host.fencers = rules.collect();
    });
    let space = agent.space();
    let (_devices, round) = silent_targets(&agent, space, &programs.each_ref().map(|(name, _)| *name)).await;
    for name in ["exit1", "exit127", "signal", "hang"] {
        until(|| lines(&attempts(name)).len() >= 2).await;
    }
    assert!(!round.is_finished());
    let suspects = agent.listed_sessions().await;
    assert!(suspects.iter().all(|session| session.phase() == v1::SessionPhase::Suspect), "{suspects:#?}");
    assert_outlived(&quiesced(round).await);
    // What hung was killed at its limit, with what it had started.
    let started = [lines(&attempts("hang")), lines(&children)].concat();
    until(|| !started.iter().any(|pid| runs(pid))).await;
}

/// A program that hangs is killed when the host agent is cut, and its children with it.
#[tokio::test]
async fn no_program_outlives_the_host_agent() {
    let folder = tempfile::tempdir().unwrap();
    let pids = folder.path().join("pids");
    let body = format!("sleep 600 & echo $! $$ >> {}; wait", pids.display());
    let program = script(folder.path(), "fence", &body);
    let mut agent = Agent::start_with(|config| {
        long_lease(config);
        config.drain_timeout = Duration::from_millis(100);
        config.host.fencers = vec![rule("*", Fencer::Command(program), Duration::from_secs(600))];
    });
    let space = agent.space();
    let (_devices, round) = silent_targets(&agent, space, &["gpu"]).await;
    until(|| !lines(&pids).is_empty()).await;
    soon(agent.running.take().unwrap().shutdown()).await;
    let result = soon(round).await.unwrap();
    assert_eq!(result.verdict, Verdict::NotQuiesced, "to be cut is not to be confirmed");
    let pids: Vec<String> = lines(&pids)[0].split(' ').map(str::to_owned).collect();
    assert_eq!(pids.len(), 2);
    until(|| !pids.iter().any(|pid| runs(pid))).await;
}

/// What a service does when it is asked about the device of that name.
#[derive(Clone, Default)]
struct Switch {
    asked: Arc<Mutex<Vec<v1::FenceRequest>>>,
}

#[tonic::async_trait]
impl FencerService for Switch {
    async fn fence(&self, request: Request<v1::FenceRequest>) -> Result<Response<v1::FenceResponse>, Status> {
        let request = request.into_inner();
        self.asked.lock().push(request.clone());
        let outcome = match request.device_id.as_str() {
            "confirmed" => v1::FenceOutcome::Confirmed.into(),
            "not-confirmed" => v1::FenceOutcome::NotConfirmed.into(),
            "unspecified" => v1::FenceOutcome::Unspecified.into(),
            "unknown" => 4711,
            "hang" => std::future::pending().await,
            _ => return Err(Status::internal("the switch is on fire")),
        };
        Ok(Response::new(v1::FenceResponse { outcome }))
    }
}

impl Switch {
    fn serve(&self, socket: &Path) {
        let listener = tokio::net::UnixListener::bind(socket).unwrap();
        self.serve_on(UnixListenerStream::new(listener));
    }

    fn serve_on<C>(&self, incoming: impl Stream<Item = std::io::Result<C>> + Send + 'static)
    where
        C: Connected<ConnectInfo: Clone + Send + Sync> + AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let serving = tonic::transport::Server::builder()
            .add_service(FencerServiceServer::new(self.clone()))
            .serve_with_incoming(incoming);
        tokio::spawn(serving);
    }

    fn times_asked(&self, device: &str) -> usize {
        self.asked.lock().iter().filter(|request| request.device_id == device).count()
    }
}

#[tokio::test]
async fn a_service_confirms_by_its_word_and_by_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let socket = |name: &str| Fencer::Service(Endpoint::Unix(folder.path().join(name)));
    let switch = Switch::default();
    switch.serve(&folder.path().join("switch"));
    let limit = Duration::from_millis(300);
    let agent = Agent::start_with(|config| {
        short_lease(config);
        config.host.fencers =
            vec![rule("unreachable", socket("nobody"), limit), rule("*", socket("switch"), limit)];
    });
    let space = agent.space();
    let confirmed = agent.space();
    let names = ["not-confirmed", "unspecified", "unknown", "hang", "fails", "unreachable"];
    let (_devices, round) = silent_targets(&agent, space, &names).await;
    let (_device, by_word) = silent_targets(&agent, confirmed, &["confirmed"]).await;
    let targets = quiesced(by_word).await;
    assert_eq!(targets[0].outcome, Outcome::Fenced);
    assert!(targets[0].elapsed.unwrap() < LEASE / 2, "by its word: {targets:?}");
    let asked = switch.asked.lock().clone();
    let request = asked.iter().find(|request| request.device_id == "confirmed").unwrap();
    assert_eq!((request.device_incarnation, request.session_id), (1, targets[0].session.get()));
    assert!(request.epoch > 0 && request.host_incarnation > 0);
    for name in &names[..5] {
        until(|| switch.times_asked(name) >= 2).await;
    }
    assert_outlived(&quiesced(round).await);
    assert_eq!(switch.times_asked("confirmed"), 1, "nobody is asked about what is over");
}

#[tokio::test]
async fn a_service_is_asked_over_a_connection_of_the_embedding_programs() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("switch");
    let switch = Switch::default();
    switch.serve(&path);
    let connector = FencerConnector::from_fn(move || tokio::net::UnixStream::connect(path.clone()));
    let unreachable = FencerConnector::from_fn(|| async {
        Err::<tokio::net::UnixStream, _>(std::io::ErrorKind::ConnectionRefused.into())
    });
    assert_ne!(connector, unreachable);
    let agent = Agent::start_with(|config| {
        short_lease(config);
        let limit = Duration::from_secs(10);
        config.host.fencers = vec![
            rule("unreachable", Fencer::Embedded(unreachable), limit),
            rule("*", Fencer::Embedded(connector), limit),
        ];
    });
    let (space, other) = (agent.space(), agent.space());
    let (_devices, round) = silent_targets(&agent, space, &["confirmed"]).await;
    let (_device, without) = silent_targets(&agent, other, &["unreachable"]).await;
    let targets = quiesced(round).await;
    assert_eq!(targets[0].outcome, Outcome::Fenced);
    assert!(targets[0].elapsed.unwrap() < LEASE / 2, "by its word: {targets:?}");
    assert_outlived(&quiesced(without).await);
}

/// A name is as good as an address; one that does not resolve confirms nothing, and the log says which it was.
#[tokio::test]
async fn a_service_may_be_given_by_name() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let by_name = format!("tcp://localhost:{}", listener.local_addr().unwrap().port());
    let switch = Switch::default();
    switch.serve_on(TcpListenerStream::new(listener));
    let nobody = "tcp://switch.invalid:7400";
    let service = |endpoint: &str| Fencer::Service(endpoint.parse().unwrap());
    let limit = Duration::from_millis(500);
    let not_confirmed = || log::lines("nameless", "a fence is not confirmed");
    assert!(not_confirmed().is_empty());
    let agent = Agent::start_with(|config| {
        short_lease(config);
        config.host.fencers =
            vec![rule("confirmed", service(&by_name), limit), rule("nameless", service(nobody), limit)];
    });
    let space = agent.space();
    let (_devices, by_word) = silent_targets(&agent, space, &["confirmed"]).await;
    let targets = quiesced(by_word).await;
    assert_eq!(targets[0].outcome, Outcome::Fenced);
    assert!(targets[0].elapsed.unwrap() < LEASE / 2, "by its word: {targets:?}");
    let (_devices, round) = silent_targets(&agent, agent.space(), &["nameless"]).await;
    assert_outlived(&quiesced(round).await);
    assert!(not_confirmed().len() >= 2, "it was tried again");
    for line in not_confirmed() {
        assert_eq!(line.field("fencer"), nobody);
    }
    assert_eq!(switch.times_asked("confirmed"), 1);
}

/// A fencer that comes back is asked again, and a device that acks meanwhile is left in peace.
#[tokio::test]
async fn an_ack_ends_the_attempts_and_a_fencer_that_comes_back_is_asked_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("switch");
    let fencer = Fencer::Service(Endpoint::Unix(path.clone()));
    let agent = Agent::start_with(|config| {
        long_lease(config);
        config.host.fencers = vec![rule("*", fencer, Duration::from_secs(1))];
    });
    let space = agent.space();
    let (mut devices, round) = silent_targets(&agent, space, &["confirmed", "late"]).await;
    soon(async {
        let all_suspect = |listed: &[v1::Session]| {
            listed.iter().all(|session| session.phase() == v1::SessionPhase::Suspect)
        };
        while !all_suspect(&agent.listed_sessions().await) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    // This one's acks come in before the fencer is there.
    devices[1].ack(1).await;
    devices[1].settled().await;
    let switch = Switch::default();
    switch.serve(&path);
    let targets = quiesced(round).await;
    assert_eq!([targets[0].outcome, targets[1].outcome], [Outcome::Fenced, Outcome::Acked]);
    devices[1].settled().await;
    assert_eq!(switch.times_asked("late"), 0);
    // The next time that it owes an ack is another one.
    let next = agent.round(space, pages(1, 1));
    devices[1].notice().await;
    until(|| switch.times_asked("late") >= 1).await;
    devices[1].ack(2).await;
    assert_eq!(quiesced(next).await[0].outcome, Outcome::Acked, "a switch on fire confirms nothing");
}

/// 14: the lease of a device that does not enforce it fences nobody; a fencer's confirmation does, also of a
/// device whose stream is gone.
#[tokio::test]
async fn fence_is_positive() {
    let folder = tempfile::tempdir().unwrap();
    let gate = folder.path().join("cut-off");
    let attempts = folder.path().join("attempts");
    let body = format!("echo >> {}; test -e {}", attempts.display(), gate.display());
    let program = script(folder.path(), "fence", &body);
    let agent = Agent::start_with(|config| {
        config.host.session.ack_timeout = T_ACK;
        config.host.session.lease.duration = Duration::from_millis(200);
        config.host.session.lease.margin = Duration::from_millis(20);
        config.host.fencers = vec![rule("gpu", Fencer::Command(program), Duration::from_secs(10))];
    });
    let space = agent.space();
    let mut device = agent.unbound_device("gpu").await;
    device.subscribe(space, pages(1, 1)).await;
    let session = device.session;
    device.cut();
    // Severed, owes nothing, its lease over: there is a reason to ask, and the answer is no.
    until(|| lines(&attempts).len() >= 3).await;
    let listed = &agent.listed_sessions().await[0];
    assert_eq!((listed.session_id, listed.phase()), (session, v1::SessionPhase::Severed));
    assert_eq!(listed.lease_remaining_ms, 0);
    let round = agent.round(space, pages(1, 1));
    until(|| agent.host().rounds_in_flight() == 1).await;
    std::fs::write(&gate, "").unwrap();
    let result = soon(round).await.unwrap();
    let seq = result.seq.unwrap();
    let wait = shootdown_server::source::Wait::AtMost(common::BOUND);
    let result = agent.host().await_round(space, seq, wait).await.unwrap();
    assert!(result.is_quiesced(), "the fencer confirmed: {result:?}");
    until(|| agent.host().rounds_in_flight() == 0).await;
}

/// 15: a session is Fenced, for `PageService`, before a round hears of it, and an access that is going on then ends
/// first. Only then are the pages free, and granted again.
///
/// Each connection has a shard of its own, for what stands still here holds its thread up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fence_reaches_reuse() {
    const PAGES: u64 = 4;
    let folder = tempfile::tempdir().unwrap();
    let program = script(folder.path(), "fence", "exit 0");
    let agent = Agent::start_with(|config| {
        long_lease(config);
        config.shards = 4;
        config.host.fencers = vec![rule("reached", Fencer::Command(program), Duration::from_secs(10))];
    });
    let write_begun = log::stop("reached", "a device writes frames");
    let fenced = log::stop("reached", "a device is fenced");
    let memory = agent.running.as_ref().unwrap().memory().clone();
    let frames = Arc::clone(agent.running.as_ref().unwrap().frames());
    let space = memory.create("reused").unwrap();
    memory.map(space, pages(0, PAGES), Access::Write).unwrap();
    for page in 0..PAGES {
        memory.store(space, page * 4096, b"before").await.unwrap();
    }
    // Its session is the lower one, so that rounds are on its shard.
    let mut other = agent.device("other").await;
    other.subscribe(space, pages(0, PAGES)).await;
    let mut reached = agent.device("reached").await;
    reached.subscribe(space, pages(0, PAGES)).await;
    let granted = granted_frames(&mut reached, space, pages(0, PAGES)).await;
    let lives = || granted.iter().map(|frame| frames.generation(FrameNumber(*frame))).collect::<Vec<_>>();
    let first_lives = lives();
    let (session_id, epoch) = (reached.session, reached.epoch);
    let spans: Vec<_> =
        granted.iter().map(|frame| v1::FrameSpan { frame: *frame, offset: 0, length: 4096 }).collect();
    let data = vec![0x55; PAGES as usize * 4096].into();
    let write = v1::WriteRequest { session_id, epoch, spans: spans.clone(), data };
    let read = v1::ReadRequest { session_id, epoch, spans };
    let mut early = PageServiceClient::new(agent.channel("device.sock").await);
    let mut late = PageServiceClient::new(agent.channel("device.sock").await);

    // An access is going on when the fencer confirms.
    let going_on = tokio::spawn({
        let write = write.clone();
        async move { early.write(write).await }
    });
    until(|| write_begun.is_reached()).await;
    let mut releasing = tokio::spawn({
        let memory = memory.clone();
        async move { memory.unmap(space, pages(0, PAGES)).await }
    });
    other.notice().await;
    other.ack(1).await;
    // It is not the access that goes on which this waits for.
    until(|| fenced.is_reached()).await;

    // The session is over, and no round has heard of it: what would begin now is refused.
    let over =
        |status: Status| assert_eq!(Reason::of_status(&status), Some(Reason::SessionFenced), "{status:?}");
    over(soon(late.write(write.clone())).await.unwrap_err());
    over(soon(late.read(read.clone())).await.unwrap_err());
    assert!(!is_done_in_a_while(&mut releasing).await, "it is over for rounds before it is for accesses");
    fenced.release();

    // Nor does one hear of it while the access is going on.
    assert!(!is_done_in_a_while(&mut releasing).await, "an access of the fenced session is going on");
    assert_eq!(lives(), first_lives, "nothing is freed");
    assert!(memory.map(space, pages(0, PAGES), Access::Write).is_err(), "nothing can be put there");
    let mut content = bytes::BytesMut::new();
    let whole = |frame: &u64| shootdown_proto::message::FrameSpan {
        frame: FrameNumber(*frame),
        offset: 0,
        length: 4096,
    };
    let all: Vec<_> = granted.iter().map(whole).collect();
    frames.read(&all, &mut content).unwrap();
    assert!(content.chunks(4096).all(|page| page.starts_with(b"before")), "it has written nothing yet");
    write_begun.release();
    soon(going_on).await.unwrap().expect("it began before the fence");
    let released = soon(releasing).await.unwrap().unwrap();
    assert_eq!(released.frames as u64, PAGES);
    let targets = &released.rounds[0].targets;
    assert_eq!([targets[0].outcome, targets[1].outcome], [Outcome::Acked, Outcome::Fenced]);
    reached.notice().await;
    let (error, _) = reached.last_word().await;
    assert_eq!(error.reason(), Reason::SessionFenced);

    // The pages are somebody else's.
    memory.map(space, pages(0, PAGES), Access::Write).unwrap();
    let mut again = granted_frames(&mut other, space, pages(0, PAGES)).await;
    again.sort_unstable();
    let mut before = granted.clone();
    before.sort_unstable();
    assert_eq!(again, before, "the same frames");
    for status in [late.write(write).await.unwrap_err(), late.read(read).await.unwrap_err()] {
        assert!(matches!(Reason::of_status(&status), Some(Reason::SessionFenced | Reason::SessionUnknown)));
    }
    content.clear();
    frames.read(&all, &mut content).unwrap();
    assert!(content.iter().all(|byte| *byte == 0), "written through a fenced session");
    assert_eq!(frames.broken_poison(), 0, "written through a fenced session while they were free");
    assert_eq!(log::lines("reached", "a device writes frames").len(), 1, "no other access began");
    assert_eq!(log::lines("reached", "a device reads frames").len(), 0);
}

async fn granted_frames(device: &mut Device, space: AddressSpaceId, range: AddrRange) -> Vec<u64> {
    device.start_fault(space, range).await;
    device.grant().await.translations.iter().map(|granted| granted.frame).collect()
}

/// For what must not happen: it has had many times as long as it takes.
async fn is_done_in_a_while<T>(task: &mut JoinHandle<T>) -> bool {
    tokio::time::timeout(Duration::from_millis(200), task).await.is_ok()
}

/// Who may subscribe where.
#[tokio::test]
async fn a_strict_address_space_is_for_devices_that_are_certain_to_stop() {
    let fencer = Fencer::Command("/no/such/program".into());
    let agent = Agent::start_with(|config| {
        config.host.fencers = vec![rule("gpu*", fencer, Duration::from_secs(1))];
    });
    let mut notifier =
        v1::notifier_service_client::NotifierServiceClient::new(agent.channel("source.sock").await);
    let mut register = async |strict| {
        let request =
            v1::RegisterAddressSpaceRequest { strict, ..v1::RegisterAddressSpaceRequest::default() };
        notifier.register_address_space(request).await.unwrap().into_inner().address_space_id
    };
    let (strict, lenient) = (register(true).await, register(false).await);
    let embedded = agent.space().get();
    let memory = agent.running.as_ref().unwrap().memory().create("memory").unwrap().get();
    let range = || vec![wire(pages(1, 1))];
    let mut enforces = agent.device("nic").await;
    let mut fenced = agent.unbound_device("gpu7").await;
    let mut unbound = agent.unbound_device("fpga").await;
    for space in [strict, lenient, embedded, memory] {
        enforces.try_subscribe(space, range()).await.unwrap();
        fenced.try_subscribe(space, range()).await.unwrap();
        match unbound.try_subscribe(space, range()).await {
            Ok(_) => assert_eq!(space, lenient),
            Err(error) => {
                assert_ne!(space, lenient);
                assert_eq!((error.reason(), error.fatal), (Reason::LeaseRequired, false));
            }
        }
    }
    unbound.settled().await;
    let sessions = agent.listed_sessions().await;
    assert_eq!(sessions.iter().map(|session| session.subscriptions).collect::<Vec<_>>(), [4, 4, 1]);
}

/// What was never waited for needs no fencer.
#[tokio::test]
async fn a_device_that_leaves_is_not_fenced() {
    let folder = tempfile::tempdir().unwrap();
    let switch = Switch::default();
    switch.serve(&folder.path().join("switch"));
    let fencer = Fencer::Service(Endpoint::Unix(folder.path().join("switch")));
    let agent = Agent::start_with(|config| {
        long_lease(config);
        config.host.fencers = vec![rule("*", fencer, Duration::from_secs(1))];
    });
    let space = agent.space();
    let mut leaver = agent.device("confirmed").await;
    leaver.subscribe(space, pages(1, 1)).await;
    let round = agent.round(space, pages(1, 1));
    leaver.notice().await;
    leaver.ask(Ask::Leave(v1::Leave {})).await;
    assert_eq!(quiesced(round).await[0].outcome, Outcome::Left);
    // Another device of the same fencer is fenced after it; by then it would have been asked.
    let (_devices, round) = silent_targets(&agent, space, &["confirmed"]).await;
    quiesced(round).await;
    assert_eq!(switch.times_asked("confirmed"), 1);
}
