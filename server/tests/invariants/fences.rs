//! Devices that do not answer: no time and no lost stream is an ack, and each is waited for as long as its lease.

use std::time::Duration;

use shootdown_proto::error::Reason;
use shootdown_proto::v1;
use shootdown_proto::v1::session_request::Message as Ask;
use shootdown_proto::v1::session_response::Message as Say;
use shootdown_server::source::{Invalidation, Notifier as _, Outcome, Verdict, Wait};

use crate::common::{Agent, Device, pages, quiesced, soon, unmap, until};

/// 13: neither a deadline, nor a wait that is dropped, nor a second wait ever counts as an ack.
#[tokio::test]
async fn timeout_is_not_ack() {
    let agent = Agent::start();
    let space = agent.space();
    let mut device = agent.device("silent").await;
    device.subscribe(space, pages(1, 1)).await;
    let impatient =
        Invalidation { wait: Wait::AtMost(Duration::from_millis(1)), ..unmap(space, pages(1, 1)) };
    let result = agent.host().invalidate_range_start(impatient).await.unwrap();
    assert_eq!(result.verdict, Verdict::NotQuiesced);
    assert_eq!(result.targets[0].outcome, Outcome::Waiting, "it says who is missing");
    let seq = result.seq.unwrap();
    for _ in 0..2 {
        let wait = Wait::AtMost(Duration::from_millis(1));
        let again = agent.host().await_round(space, seq, wait).await.unwrap();
        assert_eq!(again.verdict, Verdict::NotQuiesced);
    }
    // Its end, asked for now, comes when the round is complete.
    agent.host().invalidate_range_end(space, seq).unwrap();
    assert_eq!(agent.listed_space().await.open_brackets, 1);
    let notice = device.notice().await.number;
    device.ack(notice).await;
    let answer = soon(agent.host().await_round(space, seq, Wait::ForTargets)).await.unwrap();
    assert!(answer.is_quiesced());
    until(|| agent.host().rounds_in_flight() == 0).await;
    assert_eq!(agent.listed_space().await.open_brackets, 0);
}

/// 14 and 19: a device that says nothing any more is fenced when its lease ends, and its rounds with
/// it; until then they wait.
#[tokio::test]
async fn bounded_resolution() {
    let agent = Agent::start_with(|config| {
        config.host.session.ack_timeout = Duration::from_millis(50);
        config.host.session.lease.duration = Duration::from_millis(300);
        config.host.session.lease.margin = Duration::from_millis(20);
    });
    let space = agent.space();
    let mut dead = agent.device("dead").await;
    dead.subscribe(space, pages(1, 1)).await;
    let round = agent.round(space, pages(1, 1));
    dead.notice().await;
    let targets = quiesced(round).await;
    assert_eq!(targets[0].outcome, Outcome::Fenced);
    let elapsed = targets[0].elapsed.unwrap();
    assert!(elapsed >= Duration::from_millis(200), "no earlier than its lease: {elapsed:?}");
    let (error, _) = dead.last_word().await;
    assert_eq!(error.reason(), Reason::SessionFenced);
    // What was fenced reads nothing and writes nothing.
    let channel = agent.channel("device.sock").await;
    let mut frames = v1::page_service_client::PageServiceClient::new(channel);
    let spans = vec![v1::FrameSpan { frame: 0, offset: 0, length: 1 }];
    let (session_id, epoch) = (dead.session, dead.epoch);
    let read = v1::ReadRequest { session_id, epoch, spans: spans.clone() };
    let refused = Reason::of_status(&frames.read(read).await.unwrap_err()).unwrap();
    assert!(matches!(refused, Reason::SessionFenced | Reason::SessionUnknown), "{refused:?}");
    let write = v1::WriteRequest { session_id, epoch, spans, data: vec![1].into() };
    let refused = Reason::of_status(&frames.write(write).await.unwrap_err()).unwrap();
    assert!(matches!(refused, Reason::SessionFenced | Reason::SessionUnknown), "{refused:?}");
}

/// 14: a heartbeat does not help a device that owes an ack: its lease ends all the same.
#[tokio::test]
async fn a_device_that_only_sends_heartbeats_is_fenced_too() {
    let agent = Agent::start_with(|config| {
        config.host.session.ack_timeout = Duration::from_millis(50);
        config.host.session.lease.duration = Duration::from_millis(300);
        config.host.session.lease.margin = Duration::from_millis(20);
    });
    let space = agent.space();
    let mut device = agent.device("chatty").await;
    device.subscribe(space, pages(1, 1)).await;
    let round = agent.round(space, pages(1, 1));
    device.notice().await;
    // Each is answered: a heartbeat without an answer means that the connection is lost.
    let (mut renewed, mut refused) = (0, 0);
    loop {
        device.beat().await;
        match device.say().await {
            Say::LeaseRenewed(_) if refused == 0 => renewed += 1,
            Say::Error(error) if !error.fatal => {
                assert_eq!(
                    (error.reason(), error.request_id),
                    (Reason::LeaseNotRenewed, device.last_request())
                );
                refused += 1;
            }
            Say::Error(error) => break assert_eq!(error.reason(), Reason::SessionFenced),
            other => panic!("{other:?}"),
        }
    }
    assert!(renewed > 0 && refused > 0, "{renewed} {refused}");
    assert_eq!(quiesced(round).await[0].outcome, Outcome::Fenced);
}

/// 14: a stream that broke is not an ack. The session is waited for until its lease has ended.
#[tokio::test]
async fn fence_is_positive() {
    let agent = Agent::start_with(|config| {
        config.host.session.lease.duration = Duration::from_secs(3);
        config.host.session.lease.margin = Duration::from_millis(20);
    });
    let space = agent.space();
    let mut device = agent.device("cut").await;
    device.subscribe(space, pages(1, 1)).await;
    let round = agent.round(space, pages(1, 1));
    device.notice().await;
    device.cut();
    soon(async {
        while agent.listed_sessions().await[0].phase() != v1::SessionPhase::Severed {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert!(!round.is_finished(), "the stream is gone, the lease is not");
    assert_eq!(quiesced(round).await[0].outcome, Outcome::Fenced);
}

/// A device that connects and goes, over and over, does not use up the sessions there may be.
#[tokio::test]
async fn a_device_that_never_subscribed_is_not_waited_for() {
    let agent = Agent::start_with(|config| config.host.max_sessions = 2);
    for _ in 0..20 {
        agent.device("fickle").await.cut();
        soon(async {
            while !agent.listed_sessions().await.is_empty() {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }
}

/// A device that is started over and over, and whose runs nobody can take for stopped: it has its place whatever
/// there is of others, and takes nobody's.
#[tokio::test]
async fn earlier_sessions_keep_neither_their_device_nor_another_out_and_are_bounded() {
    const MOST: usize = 3;
    let agent = Agent::start_with(|config| config.host.max_sessions = MOST);
    let space = agent.lenient_space();
    let capabilities = Some(v1::Capabilities { enforces_lease: false, change_pte: false });
    let said = async |name: &str, incarnation| {
        let mut device = Device::connect(&agent).await;
        device.ask(Ask::Hello(v1::Hello { capabilities, incarnation, ..Device::hello_of(name) })).await;
        match device.say().await {
            Say::Welcome(welcome) => {
                device.session = welcome.session_id;
                device.subscribe(space, pages(0, 4)).await;
                Ok(device)
            }
            Say::Error(error) => Err(error.reason()),
            other => panic!("{other:?}"),
        }
    };
    let mut kept = Vec::new();
    // Where nobody else is, as many as may be.
    for incarnation in 1..=3 {
        kept.push(said("loops", incarnation).await.unwrap());
    }
    assert_eq!(said("loops", 4).await.err(), Some(Reason::SessionQuota));
    // Each of the others has its session, and one beside an earlier one.
    for (name, incarnation) in [("gpu", 1), ("nic", 1), ("gpu", 2), ("nic", 2)] {
        kept.push(said(name, incarnation).await.unwrap());
    }
    for (name, incarnation) in [("gpu", 3), ("loops", 4), ("other", 1)] {
        assert_eq!(said(name, incarnation).await.err(), Some(Reason::SessionQuota), "{name}");
    }
    assert_eq!(agent.listed_sessions().await.len(), 3 + 4);
    // A device is there as long as one of its sessions may be.
    let leaver = kept.pop().unwrap();
    leaver.ask(Ask::Leave(v1::Leave {})).await;
    soon(async {
        while agent.listed_sessions().await.len() > 3 + 3 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(said("other", 1).await.err(), Some(Reason::SessionQuota));
    kept.push(said("nic", 3).await.unwrap());
}

/// 12, in the part that is there: a newer session of a device takes the place of the older, which is
/// still waited for.
#[tokio::test]
async fn an_older_session_of_a_device_never_blocks_the_newer() {
    let agent = Agent::start_with(|config| {
        config.host.session.lease.duration = Duration::from_secs(5);
        config.host.session.lease.margin = Duration::from_millis(20);
    });
    let space = agent.space();
    let mut old = agent.device("gpu").await;
    old.subscribe(space, pages(1, 1)).await;
    let round = agent.round(space, pages(1, 1));
    old.notice().await;
    let mut new = Device::connect(&agent).await;
    new.ask(Ask::Hello(v1::Hello { incarnation: 2, ..Device::hello_of("gpu") })).await;
    assert!(matches!(new.say().await, Say::Welcome(_)));
    assert_eq!(old.last_word().await.0.reason(), Reason::SessionReplaced);
    assert!(!round.is_finished(), "a new session is no ack of the old one");
    new.subscribe(space, pages(7, 1)).await;
    let mut stale = Device::connect(&agent).await;
    stale.ask(Ask::Hello(v1::Hello { incarnation: 1, ..Device::hello_of("gpu") })).await;
    assert_eq!(stale.last_word().await.0.reason(), Reason::SessionReplaced);
    assert_eq!(quiesced(round).await[0].outcome, Outcome::Fenced);
}

/// An administrator's eviction ends the stream and makes up no ack.
#[tokio::test]
async fn an_eviction_is_not_an_ack() {
    let agent = Agent::start_with(|config| {
        config.host.session.lease.duration = Duration::from_secs(3);
        config.host.session.lease.margin = Duration::from_millis(20);
    });
    let space = agent.space();
    let mut device = agent.device("evicted").await;
    device.subscribe(space, pages(1, 1)).await;
    let round = agent.round(space, pages(1, 1));
    device.notice().await;
    let mut admin = v1::admin_service_client::AdminServiceClient::new(agent.channel("admin.sock").await);
    admin
        .evict_session(v1::EvictSessionRequest { session_id: device.session, is_cut_off: false })
        .await
        .unwrap();
    assert_eq!(device.last_word().await.0.reason(), Reason::SessionEvicted);
    assert!(!round.is_finished());
    assert_eq!(quiesced(round).await[0].outcome, Outcome::Fenced);
    let unknown = admin
        .evict_session(v1::EvictSessionRequest { session_id: 4711, is_cut_off: false })
        .await
        .unwrap_err();
    assert_eq!(Reason::of_status(&unknown), Some(Reason::SessionUnknown));
}
