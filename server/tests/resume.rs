//! A device that lost its connection and comes back, over real sockets: it goes on where it stopped, or it
//! flushes everything.

mod common;

use std::time::Duration;

use common::{Agent, Device, lease_of, pages, quiesced, soon, until, wire};
use shootdown_core::{AddrRange, AddressSpaceId};
use shootdown_proto::error::Reason;
use shootdown_proto::v1;
use shootdown_proto::v1::session_request::Message as Ask;
use shootdown_proto::v1::session_response::Message as Say;
use shootdown_server::source::{Notifier as _, Outcome, RoundResult};
use tokio::task::JoinHandle;

/// Where `device` stopped, if it received every notice up to that one.
fn point(agent: &Agent, device: &Device, received_through: u64) -> v1::ResumePoint {
    v1::ResumePoint {
        session_id: device.session,
        host_incarnation: agent.incarnation(),
        received_through,
        attempt: 0,
    }
}

/// Comes back, and is welcomed one way or the other.
async fn back(agent: &Agent, resume: v1::ResumePoint) -> (Device, v1::Welcome) {
    back_as(agent, v1::Hello { resume: Some(resume), ..Device::hello_of("gpu") }).await
}

async fn back_as(agent: &Agent, hello: v1::Hello) -> (Device, v1::Welcome) {
    let mut device = Device::connect(agent).await;
    let welcome = device.welcomed(hello).await;
    (device, welcome)
}

/// Loses its connection, and comes back from where it stopped.
async fn lost_and_back(agent: &Agent, device: Device, received_through: u64) -> (Device, v1::Welcome) {
    let resume = point(agent, &device, received_through);
    device.cut();
    back(agent, resume).await
}

/// A device with a subscription of pages 0 to 63, and its session's ids.
async fn subscribed(agent: &Agent, space: AddressSpaceId) -> Device {
    let mut device = agent.device("gpu").await;
    device.subscribe(space, pages(0, 64)).await;
    device
}

/// The same, which has a notice and has not acked it; with its round.
async fn owing(agent: &Agent, space: AddressSpaceId) -> (Device, JoinHandle<RoundResult>) {
    let mut device = subscribed(agent, space).await;
    let round = agent.round(space, pages(1, 1));
    device.notice().await;
    (device, round)
}

fn report(notice: u64, dirty: AddrRange) -> v1::FlushReport {
    v1::FlushReport { notice, dirty: vec![wire(dirty)], ..v1::FlushReport::default() }
}

/// 12: what is not acked is sent again, in its order and with its numbers, before anything new; nothing else is
/// flushed, and the round is complete by an ack on the new stream.
#[tokio::test]
async fn resume_or_flush() {
    let agent = Agent::start();
    let space = agent.space();
    let mut device = subscribed(&agent, space).await;
    let rounds: Vec<_> = (1..=3).map(|page| agent.round(space, pages(page * 2, 1))).collect();
    let mut first = Vec::new();
    for _ in 0..3 {
        first.push(device.notice().await);
    }
    // The second is acked, out of turn.
    let ack = v1::Ack { selective: vec![2], ..v1::Ack::default() };
    device.ask(Ask::Ack(ack)).await;
    device.settled().await;
    let (epoch, resume) = (device.epoch, point(&agent, &device, 3));
    device.cut();
    let (mut device, welcome) = back(&agent, resume).await;
    assert_eq!(welcome.resume(), v1::Resume::Continue);
    assert_eq!((welcome.session_id, welcome.epoch), (resume.session_id, epoch));
    assert_eq!(welcome.retained_floor, 1);
    let fourth = agent.round(space, pages(9, 1));
    assert_eq!(device.notice().await, first[0]);
    assert_eq!(device.notice().await, first[2]);
    assert_eq!(device.notice().await.number, 4, "nothing is sent again that was acked");
    assert!(!rounds[0].is_finished(), "to come back is no ack");
    device.ack(4).await;
    for round in rounds {
        assert_eq!(quiesced(round).await[0].outcome, Outcome::Acked);
    }
    quiesced(fourth).await;
    // The subscription is the one that it was.
    device.start_fault(space, pages(40, 1)).await;
    device.grant().await;
}

/// 12: each way in which a resume point does not fit. The new session is another one, and the old one is waited for.
#[tokio::test]
async fn what_does_not_fit_is_flushed() {
    let agent = Agent::start();
    let space = agent.space();
    for case in ["host", "session", "device", "run", "ahead", "below the floor", "evicted", "broke the rules"]
    {
        let mut device = subscribed(&agent, space).await;
        let rounds = [agent.round(space, pages(1, 1)), agent.round(space, pages(3, 1))];
        device.notice().await;
        device.notice().await;
        let ack = v1::Ack { selective: vec![2], ..v1::Ack::default() };
        device.ask(Ask::Ack(ack)).await;
        device.settled().await;
        let good = point(&agent, &device, 2);
        let mut hello = v1::Hello { resume: Some(good), ..Device::hello_of("gpu") };
        let mut bad = good;
        match case {
            "host" => bad.host_incarnation += 1,
            "session" => bad.session_id += 1000,
            "device" => hello.device_id = "other".to_owned(),
            "run" => hello.incarnation = 2,
            "ahead" => bad.received_through = 3,
            "below the floor" => bad.received_through = 1,
            "evicted" => agent.evict(device.session).await,
            "broke the rules" => {
                device.ack(99).await;
                assert_eq!(device.last_word().await.0.reason(), Reason::AckNeverSent);
            }
            _ => unreachable!(),
        }
        hello.resume = Some(bad);
        let (mut new, welcome) = back_as(&agent, hello).await;
        assert_eq!(welcome.resume(), v1::Resume::Flush, "{case}");
        assert!(welcome.session_id > good.session_id && welcome.retained_floor == 0, "{case}");
        new.settled().await;
        assert!(!rounds[0].is_finished(), "{case}: a refused resume is no ack");
        new.ask(Ask::Leave(v1::Leave {})).await;
        soon(async {
            while agent.listed_sessions().await.iter().any(|it| it.session_id == new.session) {
                tokio::task::yield_now().await;
            }
        })
        .await;
        // The next case has a device of its own: this run of it says that it holds nothing.
        let mut next = agent.device("gpu").await;
        next.settled().await;
        for round in rounds {
            quiesced(round).await;
        }
        next.ask(Ask::Leave(v1::Leave {})).await;
    }
}

/// 12: an old connection that nobody reads or closes is not waited for, and says nothing that counts any more.
#[tokio::test]
async fn a_connection_that_is_stuck_does_not_block_the_next() {
    let agent = Agent::start();
    let space = agent.space();
    let mut old = subscribed(&agent, space).await;
    let round = agent.round(space, pages(1, 1));
    let notice = old.notice().await;
    // The host agent has no reason to think that the old one is lost.
    let (mut new, welcome) = back(&agent, point(&agent, &old, 1)).await;
    assert_eq!(welcome.resume(), v1::Resume::Continue);
    assert_eq!(new.notice().await, notice);
    old.try_ack(1).await;
    assert_eq!(old.last_word().await.0.reason(), Reason::SessionReplaced);
    new.settled().await;
    assert!(!round.is_finished(), "what came in on the old one does not count");
    // Its end is not the end of the session.
    old.cut();
    new.settled().await;
    new.ack(1).await;
    assert_eq!(quiesced(round).await[0].outcome, Outcome::Acked);
}

/// 12: acks are idempotent across a resume, and what the lost ack had to tell is told by the next.
#[tokio::test]
async fn an_ack_that_was_lost_is_given_again() {
    let agent = Agent::start();
    let space = agent.space();
    let (device, round) = owing(&agent, space).await;
    let (mut device, _) = lost_and_back(&agent, device, 1).await;
    assert_eq!(device.notice().await.number, 1);
    let again = v1::Ack { through: 1, reports: vec![report(1, pages(1, 1))], ..v1::Ack::default() };
    device.ask(Ask::Ack(again.clone())).await;
    let result = soon(round).await.unwrap();
    assert!(result.is_quiesced() && result.dirty, "{result:?}");
    // A device that does not know that it arrived says it once more: nothing happens, nothing is refused.
    let (mut device, welcome) = lost_and_back(&agent, device, 1).await;
    assert_eq!((welcome.resume(), welcome.retained_floor), (v1::Resume::Continue, 0));
    device.ask(Ask::Ack(again.clone())).await;
    device.ask(Ask::Ack(v1::Ack { selective: vec![1], ..v1::Ack::default() })).await;
    device.settled().await;
    // What was sent on this stream is acked once, as ever; and what was never sent ends the session.
    let round = agent.round(space, pages(3, 1));
    device.notice().await;
    device.ack(2).await;
    quiesced(round).await;
    device.ack(2).await;
    assert_eq!(device.error().await.reason(), Reason::AckTwice);
    device.ack(3).await;
    assert_eq!(device.last_word().await.0.reason(), Reason::AckNeverSent);
}

/// 19: to connect again renews no lease and excuses no ack.
#[tokio::test]
async fn a_device_that_only_connects_again_is_fenced() {
    let agent = Agent::start_with(|config| lease_of(config, Duration::from_millis(400)));
    let space = agent.space();
    let (mut device, round) = owing(&agent, space).await;
    let mut resumes = 0;
    soon(async {
        loop {
            let resume = point(&agent, &device, 1);
            let (next, welcome) = back(&agent, resume).await;
            device = next;
            if welcome.resume() == v1::Resume::Flush {
                break;
            }
            resumes += 1;
            assert_eq!(device.notice().await.number, 1, "sent again each time");
            device.beat().await;
            // Its lease is renewed until it is suspect.
            assert!(matches!(device.say().await, Say::LeaseRenewed(_) | Say::Error(_)));
        }
    })
    .await;
    assert!(resumes > 1, "it did come back");
    let targets = quiesced(round).await;
    assert_eq!(targets[0].outcome, Outcome::Fenced);
    // T_ack and a lease; the rest is this machine.
    assert!(targets[0].elapsed.unwrap() < Duration::from_secs(5), "{targets:?}");
}

/// 4, 6 and 12: a request whose answer was lost is asked again by its id, and is not done twice.
#[tokio::test]
async fn a_subscription_that_is_asked_for_again_is_the_same() {
    let agent = Agent::start();
    let space = agent.space();
    let mut device = subscribed(&agent, space).await;
    let ask = v1::Subscribe {
        request_id: 77,
        address_space_id: space.get(),
        ranges: vec![wire(pages(100, 1))],
        ..v1::Subscribe::default()
    };
    device.ask(Ask::Subscribe(ask.clone())).await;
    let Say::Subscribed(first) = device.say().await else { panic!("subscribed") };
    let (mut device, _) = lost_and_back(&agent, device, 0).await;
    device.ask(Ask::Subscribe(ask.clone())).await;
    let Say::Subscribed(second) = device.say().await else { panic!("subscribed") };
    assert_eq!(first, second);
    assert_eq!(agent.listed_sessions().await[0].subscriptions, 2);
    // On the same stream it is another one: that is not a device that came back.
    device.ask(Ask::Subscribe(ask)).await;
    let Say::Subscribed(third) = device.say().await else { panic!("subscribed") };
    assert_ne!(third.subscription_id, first.subscription_id);
}

/// 6: the barrier holds for an Unsubscribe that is asked again while rounds still count on the subscription.
#[tokio::test]
async fn an_unsubscription_that_is_asked_again_waits_for_its_rounds() {
    let agent = Agent::start();
    let space = agent.space();
    let mut device = agent.device("gpu").await;
    let subscription_id = device.subscribe(space, pages(0, 4)).await;
    let round = agent.round(space, pages(1, 1));
    device.notice().await;
    let ask = Ask::Unsubscribe(v1::Unsubscribe { request_id: 78, subscription_id });
    device.ask(ask.clone()).await;
    device.settled().await;
    let (mut device, _) = lost_and_back(&agent, device, 1).await;
    device.ask(ask.clone()).await;
    assert_eq!(device.notice().await.number, 1);
    device.settled().await;
    device.ack(1).await;
    quiesced(round).await;
    let Say::Unsubscribed(answer) = device.say().await else { panic!("unsubscribed") };
    assert_eq!((answer.request_id, answer.subscription_id), (78, subscription_id));
    assert_eq!(agent.listed_sessions().await[0].subscriptions, 0);
    // And once more, after it is over: the answer was lost, and the subscription is no longer there.
    let (mut device, _) = lost_and_back(&agent, device, 1).await;
    device.ask(ask).await;
    assert_eq!(device.error().await.reason(), Reason::SubscriptionUnknown);
}

/// 3: a grant that waited when the connection was lost is not delivered; its place is given back.
#[tokio::test]
async fn a_grant_of_the_old_stream_is_not_delivered_on_the_new_one() {
    let agent = Agent::start_with(|config| config.host.session.max_faults_in_flight = 2);
    let space = agent.space();
    let (mut device, round) = owing(&agent, space).await;
    // Held by the bracket, as many as there may be.
    device.start_fault(space, pages(1, 1)).await;
    device.start_fault(space, pages(1, 1)).await;
    device.settled().await;
    let (mut device, _) = back(&agent, point(&agent, &device, 1)).await;
    assert_eq!(device.notice().await.number, 1);
    let asked = device.start_fault(space, pages(20, 1)).await;
    let granted = device.grant().await;
    assert_eq!((granted.request_id, granted.translations[0].frame), (asked, 20), "there is a place for it");
    device.ack(1).await;
    let seq = soon(round).await.unwrap().seq.unwrap();
    agent.host().invalidate_range_end(space, seq).unwrap();
    device.settled().await;
    assert_eq!(agent.listed_sessions().await[0].faults_in_flight, 0);
}

/// A device that comes back without a resume point holds nothing: by what it says after its Welcome, its earlier
/// session is not waited for. One of another run is.
#[tokio::test]
async fn a_session_is_left_behind_by_the_next_of_the_same_run_only() {
    let agent = Agent::start();
    let space = agent.space();
    for (incarnation, left) in [(1, true), (2, false)] {
        let mut device = subscribed(&agent, space).await;
        let round = agent.round(space, pages(1, 1));
        device.notice().await;
        device.cut();
        let (mut device, _) = back_as(&agent, v1::Hello { incarnation, ..Device::hello_of("gpu") }).await;
        // A Hello may have lain somewhere for long: it alone says nothing of what the device holds now.
        assert!(!round.is_finished());
        device.settled().await;
        if left {
            assert_eq!(quiesced(round).await[0].outcome, Outcome::Left);
        } else {
            device.settled().await;
            assert!(!round.is_finished(), "nobody knows whether the other run has stopped");
        }
        device.ask(Ask::Leave(v1::Leave {})).await;
    }
}

/// 12: a device that was told to flush says by its first fault that it has.
#[tokio::test]
async fn a_device_that_was_told_to_flush_leaves_its_old_session_with_its_first_fault() {
    let agent = Agent::start();
    let space = agent.space();
    let (device, round) = owing(&agent, space).await;
    let (mut device, welcome) = lost_and_back(&agent, device, 9).await;
    assert_eq!(welcome.resume(), v1::Resume::Flush);
    device.subscribe(space, pages(0, 64)).await;
    device.settled().await;
    assert!(!round.is_finished(), "it may still be flushing");
    device.start_fault(space, pages(30, 1)).await;
    assert_eq!(quiesced(round).await[0].outcome, Outcome::Left);
    until(|| agent.host().rounds_in_flight() == 0).await;
}

/// The word that leaves the old session behind may be said on another stream of the new one.
#[tokio::test]
async fn an_old_session_is_left_behind_on_whichever_stream_its_successor_says_so() {
    let agent = Agent::start();
    let space = agent.space();
    let (device, round) = owing(&agent, space).await;
    let (mut device, welcome) = lost_and_back(&agent, device, 9).await;
    assert_eq!(welcome.resume(), v1::Resume::Flush);
    device.subscribe(space, pages(0, 64)).await;
    let (mut device, welcome) = lost_and_back(&agent, device, 0).await;
    assert_eq!(welcome.resume(), v1::Resume::Continue);
    device.settled().await;
    assert!(!round.is_finished(), "it may still be flushing");
    device.start_fault(space, pages(30, 1)).await;
    assert_eq!(quiesced(round).await[0].outcome, Outcome::Left);
}

/// A Hello that lay in a dead connection takes nothing from the stream that goes on.
#[tokio::test]
async fn a_try_to_go_on_that_is_read_after_a_later_one_is_refused() {
    let agent = Agent::start();
    let space = agent.space();
    let device = subscribed(&agent, space).await;
    let attempt = |attempt| v1::ResumePoint { attempt, ..point(&agent, &device, 0) };
    let (stale, third, fourth) = (attempt(2), attempt(3), attempt(4));
    device.cut();
    let (mut device, welcome) = back(&agent, third).await;
    assert_eq!(welcome.resume(), v1::Resume::Continue);
    for stale in [stale, third] {
        let mut late = Device::connect(&agent).await;
        late.ask(Ask::Hello(v1::Hello { resume: Some(stale), ..Device::hello_of("gpu") })).await;
        assert_eq!(late.last_word().await.0.reason(), Reason::SessionReplaced);
    }
    // The stream that went on does so, and the session is the only one.
    let round = agent.round(space, pages(1, 1));
    let notice = device.notice().await.number;
    device.ack(notice).await;
    assert_eq!(quiesced(round).await[0].outcome, Outcome::Acked);
    assert_eq!(agent.listed_sessions().await.len(), 1);
    device.cut();
    let (_device, welcome) = back(&agent, v1::ResumePoint { received_through: notice, ..fourth }).await;
    assert_eq!(welcome.resume(), v1::Resume::Continue);
}
