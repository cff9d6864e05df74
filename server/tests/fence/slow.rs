//! A slow device: T_ack, its lease and its fencer say what becomes of it, and nothing else does. On a clock that
//! stands still until the test moves it.

use std::net::SocketAddr;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use shootdown_core::Moment;
use shootdown_core::lease::LeaseTerms;
use shootdown_core::outbox::OutboxLimits;
use shootdown_proto::error::Reason;
use shootdown_proto::v1;
use shootdown_proto::v1::session_response::Message as Say;
use shootdown_server::clock::Clock;
use shootdown_server::config::Config;
use shootdown_server::source::{Invalidation, Notifier as _, Outcome, Verdict, Wait};
use shootdown_server::{Fencer, ListenAddr};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::watch;
use tonic::transport::{Channel, Endpoint, Uri};

use super::{lines, rule, script};
use crate::common::{Agent, Device, log, pages, quiesced, soon, unmap, until};

const T_ACK: Duration = Duration::from_millis(80);
const INSTANT: Duration = Duration::from_millis(1);
const SUSPECT: &str = "a device owes an ack for too long";

/// Each test has one of its own.
struct Time(Mutex<Duration>);

impl Time {
    const fn new() -> Self {
        Self(Mutex::new(Duration::from_secs(60)))
    }

    fn now(&self) -> Moment {
        Moment::ZERO + *self.0.lock()
    }

    fn pass(&self, time: Duration) {
        *self.0.lock() += time;
    }
}

fn lease() -> LeaseTerms {
    LeaseTerms {
        duration: Duration::from_millis(200),
        margin: Duration::from_millis(20),
        ..LeaseTerms::default()
    }
}

fn terms(config: &mut Config, clock: fn() -> Moment) {
    config.host.clock = Clock::new(clock);
    config.host.session.ack_timeout = T_ACK;
    config.host.session.lease = lease();
}

/// What it is told until its heartbeat is answered: by a renewal, so it is Live and owes nothing for too long.
async fn told(device: &mut Device) -> Vec<v1::Notice> {
    let mut told = Vec::new();
    device.beat().await;
    loop {
        match device.say().await {
            Say::Notices(notices) => told.extend(notices.notices),
            Say::LeaseRenewed(_) => return told,
            other => panic!("neither told nor renewed: {other:?}"),
        }
    }
}

async fn is_not_renewed(device: &mut Device) {
    device.beat().await;
    let error = device.error().await;
    assert_eq!((error.reason(), error.fatal), (Reason::LeaseNotRenewed, false));
}

async fn phases(agent: &Agent) -> Vec<(String, v1::SessionPhase)> {
    let listed = agent.listed_sessions().await;
    listed.iter().map(|session| (session.device_id.clone(), session.phase())).collect()
}

async fn until_suspect(agent: &Agent, devices: &[&str]) {
    until(|| devices.iter().all(|device| !log::lines(device, SUSPECT).is_empty())).await;
    let suspect = devices.iter().map(|device| ((*device).to_owned(), v1::SessionPhase::Suspect));
    assert_eq!(phases(agent).await, suspect.collect::<Vec<_>>());
}

/// For thirty T_ack, and eleven leases: there is always more than the window, and than what is kept apart beside it.
#[tokio::test]
async fn a_device_that_is_always_behind_and_acks_within_t_ack_keeps_its_session() {
    static TIME: Time = Time::new();
    const STEP: Duration = Duration::from_millis(30);
    const STEPS: u64 = 80;
    const EVENTS_A_STEP: u64 = 16;
    let folder = tempfile::tempdir().unwrap();
    let attempts = folder.path().join("attempts");
    let program = script(folder.path(), "fence", &format!("echo >> {}", attempts.display()));
    let was_suspect = || !log::lines("behind", SUSPECT).is_empty();
    assert!(!was_suspect());
    let agent = Agent::start_with(|config| {
        terms(config, || TIME.now());
        config.host.session.outbox = OutboxLimits { window: 2, max_pending: 8 };
        config.host.fencers = vec![rule("*", Fencer::Command(program), Duration::from_secs(10))];
    });
    let space = agent.space();
    let mut device = agent.device("behind").await;
    device.subscribe(space, pages(0, 2 * EVENTS_A_STEP * STEPS)).await;
    let (mut received, mut acked, mut of_all, mut full, mut rounds) = (0, 0, 0, 0, Vec::new());
    for step in 0..STEPS {
        for event in 0..EVENTS_A_STEP {
            // Every second page, so that no two ranges touch.
            let range = pages(2 * (step * EVENTS_A_STEP + event), 1);
            let no_longer = Invalidation { wait: Wait::AtMost(Duration::ZERO), ..unmap(space, range) };
            let result = agent.host().invalidate_range_start(no_longer).await.unwrap();
            assert_eq!(result.verdict, Verdict::NotQuiesced);
            rounds.push(result.seq.unwrap());
        }
        let listed = &agent.listed_sessions().await[0];
        full += u64::from(listed.notices_unacked == 2 && listed.notices_pending > 0);
        // What it received a step ago, and was sent at most two ago.
        if acked < received {
            device.ack(received).await;
            acked = received;
        }
        for notice in told(&mut device).await {
            received = notice.number;
            of_all += u64::from(notice.range.is_none());
        }
        TIME.pass(STEP);
    }
    assert!(of_all > STEPS / 4, "more than is kept apart became one notice for everything: {of_all}");
    assert!(full > STEPS / 2, "its window was full: {full}");
    soon(async {
        while agent.host().rounds_in_flight() > 0 {
            if acked < received {
                device.ack(received).await;
                acked = received;
            }
            received = told(&mut device).await.last().map_or(received, |notice| notice.number);
        }
    })
    .await;
    for seq in rounds {
        let result = agent.host().await_round(space, seq, Wait::ForTargets).await.unwrap();
        assert_eq!(result.targets[0].outcome, Outcome::Acked);
    }
    let listed = &agent.listed_sessions().await[0];
    assert_eq!((listed.session_id, listed.phase()), (device.session, v1::SessionPhase::Live));
    assert!(!was_suspect() && lines(&attempts).is_empty());
}

#[tokio::test]
async fn a_device_past_t_ack_is_suspect_until_it_acks_or_its_lease_or_its_fencer_ends_it() {
    static TIME: Time = Time::new();
    let folder = tempfile::tempdir().unwrap();
    let gate = folder.path().join("cut-off");
    let program = script(folder.path(), "fence", &format!("test -e {}", gate.display()));
    assert!(log::lines("fenced", SUSPECT).is_empty());
    let agent = Agent::start_with(|config| {
        terms(config, || TIME.now());
        config.host.fencers = vec![rule("fenced", Fencer::Command(program), Duration::from_secs(10))];
    });
    let space = agent.lenient_space();
    let mut enforces = agent.device("enforces").await;
    let mut fenced = agent.unbound_device("fenced").await;
    let mut nobodys = agent.unbound_device("nobodys").await;
    for device in [&mut enforces, &mut fenced, &mut nobodys] {
        device.subscribe(space, pages(1, 1)).await;
    }
    let no_longer = Invalidation { wait: Wait::AtMost(Duration::ZERO), ..unmap(space, pages(1, 1)) };
    let seq = agent.host().invalidate_range_start(no_longer).await.unwrap().seq.unwrap();
    for device in [&mut enforces, &mut fenced, &mut nobodys] {
        device.notice().await;
    }
    TIME.pass(T_ACK - INSTANT);
    for device in [&mut enforces, &mut fenced, &mut nobodys] {
        assert!(told(device).await.is_empty(), "its lease is renewed");
    }
    TIME.pass(INSTANT);
    for device in [&mut enforces, &mut fenced, &mut nobodys] {
        is_not_renewed(device).await;
    }
    until_suspect(&agent, &["enforces", "fenced", "nobodys"]).await;
    TIME.pass(lease().host_duration() - INSTANT * 2);
    for device in [&mut enforces, &mut fenced, &mut nobodys] {
        is_not_renewed(device).await;
    }
    TIME.pass(INSTANT);
    assert_eq!(enforces.last_word().await.0.reason(), Reason::SessionFenced);
    // However long: nobody has said that these have stopped.
    TIME.pass(lease().host_duration() * 1000);
    for device in [&mut fenced, &mut nobodys] {
        is_not_renewed(device).await;
    }
    until_suspect(&agent, &["fenced", "nobodys"]).await;
    std::fs::write(&gate, "").unwrap();
    assert_eq!(fenced.last_word().await.0.reason(), Reason::SessionFenced);
    nobodys.ack(1).await;
    assert!(told(&mut nobodys).await.is_empty(), "it has its lease renewed");
    assert_eq!(phases(&agent).await, [("nobodys".to_owned(), v1::SessionPhase::Live)]);
    let result = agent.host().await_round(space, seq, Wait::ForTargets).await.unwrap();
    let mut outcomes: Vec<_> =
        result.targets.iter().map(|target| (target.device.as_str(), target.outcome)).collect();
    outcomes.sort_unstable_by_key(|(device, _)| *device);
    let (fenced, acked) = (Outcome::Fenced, Outcome::Acked);
    assert_eq!(outcomes, [("enforces", fenced), ("fenced", fenced), ("nobodys", acked)]);
}

/// To the kernel it is as one that is gone: it takes nothing, and its buffers are full. It may be so for 16 s only if
/// its lease is as short.
#[tokio::test]
#[ignore = "takes 20 s: cargo test -p shootdown-server --test fence -- --ignored"]
async fn a_device_that_takes_nothing_from_its_socket_for_less_than_its_lease_keeps_its_stream() {
    const BEATS: usize = 5000;
    let agent = Agent::start_with(|config| config.listen.push("127.0.0.1:0".parse().unwrap()));
    let addresses = agent.running.as_ref().unwrap().addresses().device.clone();
    let address = addresses.iter().find_map(|address| match address {
        ListenAddr::Tcp(address) => Some(*address),
        _ => None,
    });
    let (takes, may_take) = watch::channel(true);
    let channel = connect_through(address.unwrap(), may_take).await;
    let space = agent.space();
    let mut device = Device::on(channel);
    device.hello("full").await;
    device.subscribe(space, pages(0, 1)).await;
    takes.send(false).unwrap();
    for _ in 0..BEATS {
        device.beat().await;
    }
    // Not a wait for something: that the device takes nothing for so long is what is tested.
    tokio::time::sleep(Duration::from_secs(20)).await;
    takes.send(true).unwrap();
    for _ in 0..BEATS {
        assert!(matches!(device.say().await, Say::LeaseRenewed(_)));
    }
    let round = agent.round(space, pages(0, 1));
    let notice = device.notice().await;
    device.ack(notice.number).await;
    assert_eq!(quiesced(round).await[0].outcome, Outcome::Acked);
}

/// A connection over TCP on which as little as can be is on its way, and nothing is taken from while it may not be.
async fn connect_through(address: SocketAddr, may_take: watch::Receiver<bool>) -> Channel {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let (mut from_host, mut to_host) = socket.connect(address).await.unwrap().into_split();
    let (device, here) = tokio::io::duplex(1 << 20);
    let (mut from_device, mut to_device) = tokio::io::split(here);
    tokio::spawn(async move { tokio::io::copy(&mut from_device, &mut to_host).await });
    tokio::spawn(async move {
        let (mut may_take, mut bytes) = (may_take, vec![0; 4096]);
        while may_take.wait_for(|may| *may).await.is_ok() {
            tokio::select! {
                biased;
                // First: what comes after it is not taken.
                changed = may_take.changed() => if changed.is_err() { return },
                length = from_host.read(&mut bytes) => {
                    let length = length.unwrap();
                    if length == 0 || to_device.write_all(&bytes[..length]).await.is_err() {
                        return;
                    }
                }
            }
        }
    });
    let device = Mutex::new(Some(device));
    let connector = tower::service_fn(move |_: Uri| {
        let device = device.lock().take().ok_or(std::io::ErrorKind::NotConnected);
        async move { device.map(TokioIo::new).map_err(std::io::Error::from) }
    });
    Endpoint::from_static("http://localhost").connect_with_connector(connector).await.unwrap()
}
