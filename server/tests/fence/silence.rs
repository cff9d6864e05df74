//! A device that keeps no lease and is not heard: whose silence it is, the device's or the host agent's own.

use std::path::Path;
use std::time::Duration;

use shootdown_core::AddressSpaceId;
use shootdown_proto::v1;
use shootdown_proto::v1::session_request::Message as Ask;
use shootdown_proto::v1::session_response::Message as Say;
use shootdown_server::Fencer;

use super::{T_ACK, lines, rule, script};
use crate::common::{Agent, Device, connect_with, log, pages, soon, until};

/// What the watchdog says whenever it asks a shard, what the shard says when it found nothing, and when that is enough.
const ASKED: &str = "is anything heard of a device?";
const IN_VAIN: &str = "a device said nothing for a whole lease";
const SUSPECT: &str = "a device owes an ack for too long";
const LOST: &str = "a device said nothing for a whole lease: its stream is taken for lost";

/// With a fencer that leaves a line in `attempts` for each time it is asked.
fn agent(attempts: &Path) -> Agent {
    agent_on(attempts, 1)
}

/// The same with so many shards, to which connections go in turn.
fn agent_on(attempts: &Path, shards: usize) -> Agent {
    let program =
        script(attempts.parent().unwrap(), "fence", &format!("echo >> {}; exit 1", attempts.display()));
    Agent::start_with(|config| {
        config.shards = shards;
        config.host.session.ack_timeout = T_ACK;
        config.host.session.lease.duration = Duration::from_secs(1);
        config.host.session.lease.margin = Duration::from_millis(20);
        config.host.fencers = vec![rule("*", Fencer::Command(program), Duration::from_secs(10))];
    })
}

/// The watchdog has asked for longer than T_ack, and more often than it takes, since this was called.
async fn asked_for_long(device: &str) {
    let before = log::lines(device, ASKED).len();
    until(|| log::lines(device, ASKED).len() >= before + 24).await;
}

async fn phase_of(agent: &Agent, device: &Device) -> v1::SessionPhase {
    let listed = agent.listed_sessions().await;
    listed.iter().find(|session| session.session_id == device.session).unwrap().phase()
}

#[tokio::test]
async fn a_device_is_not_lost_for_what_a_starved_shard_has_not_read() {
    let folder = tempfile::tempdir().unwrap();
    let attempts = folder.path().join("attempts");
    let agent = agent(&attempts);
    let space = agent.space();
    let shard_stands = log::stop("stops-its-shard", "session opened");
    let mut device = agent.unbound_device("starved").await;
    device.subscribe(space, pages(1, 1)).await;
    let mut other = Device::connect(&agent).await;
    other.ask(Ask::Hello(Device::hello_of("stops-its-shard"))).await;
    let stops = tokio::spawn(async move { other.next().await.map(drop) });
    until(|| shard_stands.is_reached()).await;
    // On its way in good time, and not read for longer than it takes to be lost.
    device.beat().await;
    asked_for_long("starved").await;
    assert_eq!(phase_of(&agent, &device).await, v1::SessionPhase::Live);
    shard_stands.release();
    soon(stops).await.unwrap().unwrap();
    assert!(matches!(device.say().await, Say::LeaseRenewed(_)));
    device.settled().await;
    assert_eq!(phase_of(&agent, &device).await, v1::SessionPhase::Live);
    assert!(log::lines("starved", LOST).is_empty());
    assert!(lines(&attempts).is_empty(), "nobody is to cut a healthy device off");
}

#[tokio::test]
async fn a_shard_that_is_asked_reads_before_it_says_that_there_is_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let attempts = folder.path().join("attempts");
    let agent = agent(&attempts);
    let space = agent.space();
    let mut device = agent.unbound_device("late").await;
    device.subscribe(space, pages(1, 1)).await;
    // Nothing comes for a lease. Then, while the shard stands still with its first look behind it, something does.
    let shard_stands = log::stop("late", IN_VAIN);
    until(|| shard_stands.is_reached()).await;
    device.beat().await;
    asked_for_long("late").await;
    shard_stands.release();
    assert!(matches!(device.say().await, Say::LeaseRenewed(_)));
    device.settled().await;
    // A later silence begins its looks anew.
    let looks: Vec<_> =
        log::lines("late", IN_VAIN).iter().map(|line| line.field("looks").to_owned()).collect();
    assert!(!looks.is_empty() && looks.iter().all(|looks| looks == "1"), "{looks:?}");
    assert!(log::lines("late", LOST).is_empty() && lines(&attempts).is_empty());
}

/// A device of this name has long answers, which fill what the transport keeps of them soon.
fn talkative(name: &str) -> String {
    format!("{name}{}", "-".repeat(60))
}

/// Asks so much that it is not read any more, and reads nothing.
async fn asks_and_does_not_read(agent: &Agent, name: &str, space: u64) -> Device {
    // What the transport takes of them (64 KiB, and 400 KiB that wait for leave to be sent), what the host agent
    // keeps (1,024), and as much again: of some 180 bytes each.
    const REQUESTS: usize = 8000;
    let mut device = Device::on(connect_with(&agent.socket("device.sock"), 65_535).await);
    let capabilities = Some(v1::Capabilities { enforces_lease: false, change_pte: true });
    device.welcomed(v1::Hello { capabilities, ..Device::hello_of(&talkative(name)) }).await;
    for _ in 0..REQUESTS {
        let ask = v1::Subscribe {
            request_id: device.request(),
            address_space_id: space,
            ..v1::Subscribe::default()
        };
        device
            .ask(Ask::Subscribe(v1::Subscribe { ranges: vec![crate::common::wire(pages(1, 1))], ..ask }))
            .await;
    }
    device
}

/// Neither is read by the host agent for most of the time, because of the answers that it has not read itself.
#[tokio::test]
async fn a_device_that_reads_slowly_is_heard_and_one_that_reads_nothing_is_lost_although_it_speaks() {
    let agent = Agent::start_with(|config| {
        config.host.session.ack_timeout = T_ACK;
        config.host.session.lease.duration = Duration::from_secs(1);
        config.host.session.lease.margin = Duration::from_millis(20);
    });
    // Strict: each request is refused, at length.
    let space = agent.space().get();
    let lost = |device: &str| !log::lines(&talkative(device), LOST).is_empty();
    assert!(!lost("deaf") && !lost("slow"));
    let mut slow = asks_and_does_not_read(&agent, "slow", space).await;
    let mut deaf = asks_and_does_not_read(&agent, "deaf", space).await;
    let mut read = 0;
    soon(async {
        while !lost("deaf") {
            deaf.beat().await;
            // A window's update comes at half of it, which is about a hundred.
            for _ in 0..50 {
                assert!(matches!(slow.say().await, Say::Error(error) if !error.fatal));
                read += 1;
            }
            // Not a wait for something: that the device is slow is what is tested.
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    })
    .await;
    assert!(read < 4000, "it was not read by the host agent either, all the time: {read}");
    assert!(!lost("slow"));
    assert_eq!(phase_of(&agent, &slow).await, v1::SessionPhase::Live);
}

/// What it has said waits in a socket. Its fencer would cut a healthy device off.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ack_that_a_starved_shard_has_not_read_came_in_time() {
    let folder = tempfile::tempdir().unwrap();
    let agent = agent_on(&folder.path().join("attempts"), 2);
    let mut acks = agent.unbound_device("acks").await;
    let space = agent.space();
    acks.subscribe(space, pages(1, 1)).await;
    let owes = agent.unbound_device("owes").await;
    acks_though_its_shard_stands(&agent, space, ("acks", acks), ("owes", owes), "acks-starves").await;
}

/// A session that was resumed is read where its new stream is, and not where it began.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ack_of_a_resumed_session_is_waited_for_on_the_shard_that_reads_it_now() {
    let folder = tempfile::tempdir().unwrap();
    let agent = agent_on(&folder.path().join("attempts"), 2);
    let mut first = agent.unbound_device("moves").await;
    let space = agent.space();
    first.subscribe(space, pages(1, 1)).await;
    let (session_id, host_incarnation) = (first.session, agent.incarnation());
    let resume = v1::ResumePoint { session_id, host_incarnation, ..Default::default() };
    first.cut();
    let mut moves = Device::connect(&agent).await;
    let capabilities = Some(v1::Capabilities { enforces_lease: false, change_pte: true });
    let hello = v1::Hello { capabilities, resume: Some(resume), ..Device::hello_of("moves") };
    assert_eq!(moves.welcomed(hello).await.session_id, session_id, "it is resumed");
    let owes = agent.unbound_device("stays").await;
    acks_though_its_shard_stands(&agent, space, ("moves", moves), ("stays", owes), "moves-starves").await;
}

/// `acks` has subscribed to page 1; the next connection is on its shard, and `owes` is on the other.
async fn acks_though_its_shard_stands(
    agent: &Agent,
    space: AddressSpaceId,
    (acks_name, mut acks): (&str, Device),
    (owes_name, mut owes): (&str, Device),
    starves: &'static str,
) {
    owes.subscribe(space, pages(2, 1)).await;
    let in_time = agent.round(space, pages(1, 1));
    let notice = acks.notice().await.number;
    let stands_still = log::stop(starves, "session opened");
    let mut other = Device::connect(agent).await;
    other.ask(Ask::Hello(Device::hello_of(starves))).await;
    let opening = tokio::spawn(async move { other.next().await.map(drop) });
    until(|| stands_still.is_reached()).await;
    acks.ask(Ask::Ack(v1::Ack { through: notice, ..Default::default() })).await;
    // A round that began later: by the time its device is suspect the other one would be.
    let late = agent.round(space, pages(2, 1));
    let late_notice = owes.notice().await.number;
    until(|| !log::lines(owes_name, SUSPECT).is_empty()).await;
    assert_eq!(log::lines(acks_name, SUSPECT).len(), 0);
    stands_still.release();
    soon(opening).await.unwrap().unwrap();
    assert!(soon(in_time).await.unwrap().is_quiesced());
    acks.settled().await;
    assert_eq!(log::lines(acks_name, SUSPECT).len(), 0);
    owes.ack(late_notice).await;
    assert!(soon(late).await.unwrap().is_quiesced());
}
