//! The invariants that need a whole host agent, each under its name, over real sockets.

mod common;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use common::{Agent, Device, is_pending, pages, quiesced, soon, unmap, until, wire};
use futures_util::future::BoxFuture;
use shootdown_core::{Access, AddrRange, AddressSpaceId, Cause, Translation};
use shootdown_proto::error::Reason;
use shootdown_proto::v1;
use shootdown_proto::v1::session_request::Message as Ask;
use shootdown_proto::v1::session_response::Message as Say;
use shootdown_server::source::{
    FaultError, Invalidation, Notifier as _, NotifyError, Outcome, Translate, Verdict, Wait,
};
use tokio::sync::Semaphore;

/// 1, in the host agent's part: a round waits for each of its targets; the memory source's tests have
/// the part of the pages.
#[tokio::test]
async fn no_free_before_quiesce() {
    let agent = Agent::start();
    let space = agent.space();
    let (mut left, mut right) = (agent.device("left").await, agent.device("right").await);
    left.subscribe(space, pages(1, 2)).await;
    right.subscribe(space, pages(2, 2)).await;
    let round = agent.round(space, pages(1, 4));
    // Both are told before either has acked: a round takes as long as its slowest device.
    let (first, second) = (left.notice().await, right.notice().await);
    right.ack(second.number).await;
    right.settled().await;
    assert!(!round.is_finished(), "one of two has acked");
    left.ack(first.number).await;
    let targets = quiesced(round).await;
    assert!(targets.iter().all(|target| target.outcome == Outcome::Acked && target.elapsed.is_some()));
}

/// 3: a fault that meets an open bracket is held until its end.
#[tokio::test]
async fn no_grant_in_window() {
    let agent = Agent::start();
    let space = agent.space();
    let mut device = agent.device("gpu").await;
    device.subscribe(space, pages(1, 8)).await;
    let round = agent.round(space, pages(1, 2));
    let notice = device.notice().await.number;
    device.ack(notice).await;
    let seq = soon(round).await.unwrap().seq.unwrap();
    device.start_fault(space, pages(2, 1)).await;
    // What the bracket does not cover is granted meanwhile.
    device.start_fault(space, pages(5, 1)).await;
    assert_eq!(device.grant().await.translations[0].frame, 5);
    device.settled().await;
    agent.host().invalidate_range_end(space, seq).unwrap();
    assert_eq!(device.grant().await.translations[0].frame, 2);
}

/// A source whose answers wait for the test.
struct Slow {
    asked: Semaphore,
    answers: Semaphore,
}

impl Translate for Slow {
    fn source(&self) -> &'static str {
        "api"
    }

    fn fault(
        &self,
        space: AddressSpaceId,
        range: AddrRange,
        access: Access,
    ) -> BoxFuture<'_, Result<Vec<Translation>, FaultError>> {
        Box::pin(async move {
            self.asked.add_permits(1);
            self.answers.acquire().await.expect("nobody closes it").forget();
            common::Identity.fault(space, range, access).await
        })
    }

    fn bytes(&self, _: &[Translation]) -> Result<Bytes, FaultError> {
        Err(FaultError::NotServed)
    }
}

/// 3: what the source said before an event is not granted after it, even when the event is over.
#[tokio::test]
async fn a_translation_from_before_an_event_is_asked_for_again() {
    let agent = Agent::start();
    let source = Arc::new(Slow { asked: Semaphore::new(0), answers: Semaphore::new(0) });
    let space = agent.host().register("slow", Arc::clone(&source) as Arc<dyn Translate>).unwrap();
    let mut device = agent.device("gpu").await;
    device.subscribe(space, pages(1, 8)).await;
    device.start_fault(space, pages(1, 1)).await;
    soon(source.asked.acquire()).await.unwrap().forget();
    // A whole event passes between question and answer.
    let round = agent.round(space, pages(1, 1));
    let notice = device.notice().await.number;
    device.ack(notice).await;
    let seq = soon(round).await.unwrap().seq.unwrap();
    agent.host().invalidate_range_end(space, seq).unwrap();
    source.answers.add_permits(1);
    // The first answer is not granted: the source is asked once more.
    soon(source.asked.acquire()).await.unwrap().forget();
    assert!(device.is_silent().await);
    source.answers.add_permits(1);
    assert_eq!(device.grant().await.seq, seq.get());
}

/// 4: a subscriber that joins during an event is not its target, and its fault meets the bracket.
#[tokio::test]
async fn join_covers() {
    let agent = Agent::start();
    let space = agent.space();
    let mut early = agent.device("early").await;
    early.subscribe(space, pages(1, 1)).await;
    let round = agent.round(space, pages(1, 1));
    let notice = early.notice().await.number;
    let mut joiner = agent.device("joiner").await;
    joiner.subscribe(space, pages(1, 1)).await;
    joiner.start_fault(space, pages(1, 1)).await;
    joiner.settled().await;
    early.ack(notice).await;
    let result = soon(round).await.unwrap();
    assert_eq!(result.targets.len(), 1, "its targets were fixed at the start");
    joiner.settled().await;
    agent.host().invalidate_range_end(space, result.seq.unwrap()).unwrap();
    joiner.grant().await;
}

/// 6: unsubscribe returns after the rounds that count on it, and nothing comes after it.
#[tokio::test]
async fn unsubscribe_barrier() {
    let agent = Agent::start();
    let space = agent.space();
    let mut device = agent.device("leaver").await;
    let subscription = device
        .try_subscribe_with(v1::Subscribe {
            address_space_id: space.get(),
            ranges: vec![wire(pages(1, 1))],
            wants_end: true,
            ..v1::Subscribe::default()
        })
        .await
        .unwrap();
    let round = agent.round(space, pages(1, 1));
    let notice = device.notice().await.number;
    device.ask(Ask::Unsubscribe(v1::Unsubscribe { request_id: 3, subscription_id: subscription })).await;
    device.settled().await;
    assert!(!round.is_finished());
    assert!(device.is_silent().await, "the round still counts on it");
    device.ack(notice).await;
    let result = soon(round).await.unwrap();
    match device.say().await {
        Say::Unsubscribed(unsubscribed) => assert_eq!(unsubscribed.subscription_id, subscription),
        other => panic!("{other:?}"),
    }
    agent.host().invalidate_range_end(space, result.seq.unwrap()).unwrap();
    let next = soon(agent.host().invalidate_range_start(unmap(space, pages(1, 1)))).await.unwrap();
    assert!(next.is_quiesced() && next.targets.is_empty());
    device.settled().await;
    assert!(device.is_silent().await, "neither a notice nor the end of the bracket");
}

/// 7: each start that succeeded has exactly one end.
#[tokio::test]
async fn pairing() {
    let agent = Agent::start();
    let space = agent.space();
    let result = agent.host().invalidate_range_start(unmap(space, pages(1, 1))).await.unwrap();
    let seq = result.seq.unwrap();
    assert_eq!(agent.listed_space().await.open_brackets, 1);
    agent.host().invalidate_range_end(space, seq).unwrap();
    assert_eq!(agent.listed_space().await.open_brackets, 0);
    let again = agent.host().invalidate_range_end(space, seq);
    assert!(matches!(again, Err(NotifyError::BracketUnknown { .. })));
    // A whole method ends its own bracket, and it is nobody else's to end.
    let page = agent.host().invalidate_page(space, 4096, Cause::Clear, Wait::ForTargets).await.unwrap();
    assert_eq!(agent.listed_space().await.open_brackets, 0);
    assert!(agent.host().invalidate_range_end(space, page.seq.unwrap()).is_err());
}

/// 7: a start whose caller went away is aborted: its bracket ends when its round does, no earlier.
#[tokio::test]
async fn an_abandoned_start_keeps_its_bracket_until_its_round_is_complete() {
    let agent = Agent::start();
    let space = agent.space();
    let mut device = agent.device("gpu").await;
    device.subscribe(space, pages(1, 1)).await;
    let host = agent.host().clone();
    let mut start = Box::pin(host.invalidate_range_start(unmap(space, pages(1, 1))));
    assert!(is_pending(&mut start).await);
    drop(start);
    let notice = device.notice().await.number;
    device.start_fault(space, pages(1, 1)).await;
    device.settled().await;
    let listed = agent.listed_space().await;
    assert_eq!((listed.open_brackets, listed.rounds_in_flight), (1, 1), "the gate is shut");
    device.ack(notice).await;
    device.grant().await;
    assert_eq!(agent.listed_space().await.open_brackets, 0);
}

/// 2 of the traps: a call that is dropped, wherever it was, either did nothing, or its round goes on
/// and its pages stay until every device has acked.
#[tokio::test]
async fn a_call_that_is_dropped_at_any_await_point_never_opens_the_gate() {
    let agent = Agent::start();
    let memory = agent.running.as_ref().unwrap().memory().clone();
    let frames = std::sync::Arc::clone(agent.running.as_ref().unwrap().frames());
    let mut device = agent.device("gpu").await;
    for polls in 0..8 {
        let space = memory.create("dropped").unwrap();
        memory.map(space, pages(16, 1), Access::Write).unwrap();
        memory.store(space, 16 * 4096, b"content").await.unwrap();
        device.subscribe(space, pages(16, 1)).await;
        device.start_fault(space, pages(16, 1)).await;
        let frame = device.grant().await.translations[0].frame;
        let in_use = frames.in_use();
        let mut unmap = Box::pin(memory.unmap(space, pages(16, 1)));
        for _ in 0..polls {
            assert!(is_pending(&mut unmap).await, "the device has not acked");
            tokio::task::yield_now().await;
        }
        drop(unmap);
        if polls == 0 {
            assert_eq!(agent.host().rounds_in_flight(), 0, "it never began");
            continue;
        }
        let notice = device.notice().await.number;
        let mut content = bytes::BytesMut::new();
        let span = shootdown_proto::message::FrameSpan {
            frame: shootdown_core::FrameNumber(frame),
            offset: 0,
            length: 7,
        };
        frames.read(&[span], &mut content).unwrap();
        assert_eq!((&content[..], frames.in_use()), (&b"content"[..], in_use), "the page is not released");
        device.ack(notice).await;
        until(|| frames.in_use() < in_use).await;
    }
}

/// 8: a call that cannot wait and has a target leaves nothing behind.
#[tokio::test]
async fn non_block_atomic() {
    let agent = Agent::start();
    let space = agent.space();
    let mut device = agent.device("gpu").await;
    device.subscribe(space, pages(1, 1)).await;
    device.start_fault(space, pages(1, 1)).await;
    device.grant().await;
    let before = (agent.listed_space().await, agent.listed_sessions().await);
    let oom_reaper = Invalidation { wait: Wait::NotAtAll, ..unmap(space, pages(1, 4)) };
    let result = agent.host().invalidate_range_start(oom_reaper).await.unwrap();
    assert_eq!((result.verdict, result.seq), (Verdict::WouldBlock, None));
    assert_eq!(result.targets[0].device.as_str(), "gpu", "it says who stood in the way");
    let mut after = (agent.listed_space().await, agent.listed_sessions().await);
    // Time goes on; nothing else may differ.
    after.1[0].lease_remaining_ms = before.1[0].lease_remaining_ms;
    assert_eq!(before, after);
    device.settled().await;
    assert!(device.is_silent().await, "no notice was sent");
    // Without a target the same call is done at once.
    let beside = Invalidation { wait: Wait::NotAtAll, ..unmap(space, pages(7, 1)) };
    assert!(agent.host().invalidate_range_start(beside).await.unwrap().is_quiesced());
}

/// 10, and 18 and 41 of the traps: a device that reads nothing keeps its connection, its outbox keeps
/// its bound, and in the end it is told all it must flush.
#[tokio::test]
async fn never_drop() {
    device_that_reads_nothing(Duration::ZERO).await;
}

/// The same for a minute.
#[tokio::test]
#[ignore = "takes a minute: cargo test -p shootdown-server --test invariants -- --ignored"]
async fn never_drop_in_a_minute() {
    device_that_reads_nothing(Duration::from_secs(60)).await;
}

async fn device_that_reads_nothing(how_long: Duration) {
    const EVENTS: u64 = 100_000;
    const BATCH: u64 = 1000;
    let agent = Agent::start_with(|config| {
        config.host.max_rounds_in_flight = EVENTS as usize + 1;
        config.host.session.lease.duration = Duration::from_secs(300);
        config.host.session.ack_timeout = Duration::from_secs(300);
    });
    let space = agent.space();
    let mut device = agent.device("sleeper").await;
    device.subscribe(space, pages(0, 4 * EVENTS)).await;
    let mut rounds = Vec::new();
    for event in 0..EVENTS {
        let no_longer = Wait::AtMost(Duration::ZERO);
        // Every second page, so that no two ranges touch.
        let invalidation = Invalidation { wait: no_longer, ..unmap(space, pages(2 * event, 1)) };
        let result = agent.host().invalidate_range_start(invalidation).await.expect("it is registered");
        assert_eq!(result.verdict, Verdict::NotQuiesced);
        rounds.push(result.seq.expect("it began"));
        if event % BATCH == 0 && !how_long.is_zero() {
            // Not a wait for something: that the device sleeps is what is tested.
            tokio::time::sleep(how_long / (EVENTS / BATCH) as u32).await;
        }
    }
    let listed = &agent.listed_sessions().await[0];
    assert_eq!(listed.phase(), v1::SessionPhase::Live);
    assert!(listed.notices_pending + listed.notices_unacked <= 1024 + 64, "{listed:?}");
    assert_eq!(agent.listed_space().await.rounds_in_flight, EVENTS);
    // It wakes up, and works through what it is told until it has been told everything.
    let mut told = std::collections::BTreeSet::new();
    let mut all = false;
    while agent.host().rounds_in_flight() > 0 {
        let notice = device.notice().await;
        match notice.range {
            Some(range) => drop(told.insert(range.start / 4096)),
            None => all = true,
        }
        device.ack(notice.number).await;
        if notice.range.is_none() {
            until(|| agent.host().rounds_in_flight() == 0).await;
        }
    }
    assert!(all, "more ranges than it may keep became one notice for everything");
    for seq in rounds {
        let result = agent.host().await_round(space, seq, Wait::ForTargets).await.expect("it began");
        assert!(result.is_quiesced());
    }
}

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

/// 17: a device that blocks one address space blocks no other, nor any other device's session.
#[tokio::test]
async fn isolation() {
    let agent = Agent::start();
    let (blocked, free) = (agent.space(), agent.space());
    let mut stuck = agent.device("stuck").await;
    let mut live = agent.device("live").await;
    stuck.subscribe(blocked, pages(1, 1)).await;
    live.subscribe(blocked, pages(2, 1)).await;
    live.subscribe(free, pages(1, 1)).await;
    stuck.subscribe(free, pages(9, 1)).await;
    let held = agent.round(blocked, pages(1, 1));
    stuck.notice().await;
    for _ in 0..100 {
        // Another address space, and another range of the same one.
        for (space, page) in [(free, 1), (blocked, 2)] {
            let round = agent.round(space, pages(page, 1));
            let notice = live.notice().await.number;
            live.ack(notice).await;
            let result = soon(round).await.unwrap();
            agent.host().invalidate_range_end(space, result.seq.unwrap()).unwrap();
        }
    }
    // The grace period of the other address space does not wait either.
    let leaving = live.subscribe(free, pages(3, 1)).await;
    live.ask(Ask::Unsubscribe(v1::Unsubscribe { request_id: 1, subscription_id: leaving })).await;
    assert!(matches!(live.say().await, Say::Unsubscribed(_)));
    assert!(!held.is_finished());
    stuck.ack(1).await;
    quiesced(held).await;
}

/// 18: a fault that has to notify its own session's device does not wait for itself.
#[tokio::test]
async fn no_self_wait() {
    let agent = Agent::start();
    let memory = agent.running.as_ref().unwrap().memory().clone();
    let parent = memory.create("parent").unwrap();
    memory.map(parent, pages(16, 1), Access::Write).unwrap();
    memory.store(parent, 16 * 4096, b"before").await.unwrap();
    let mut device = agent.device("writer").await;
    device.subscribe(parent, pages(16, 1)).await;
    device.start_fault(parent, pages(16, 1)).await;
    device.grant().await;
    let forking = memory.clone();
    let fork = tokio::spawn(async move { forking.fork(parent, "child").await });
    let notice = device.notice().await.number;
    device.ack(notice).await;
    soon(fork).await.unwrap().unwrap();
    // A write fault of the device breaks COW, which invalidates the device's own old translation.
    device
        .ask(Ask::Fault(v1::Fault {
            request_id: 99,
            address_space_id: parent.get(),
            range: Some(wire(pages(16, 1))),
            access: v1::Access::Write.into(),
            wants_data: false,
        }))
        .await;
    let notice = device.notice().await.number;
    device.ack(notice).await;
    let grant = device.grant().await;
    assert_eq!((grant.request_id, grant.translations[0].access()), (99, v1::Access::Write));
}

/// 20: test_young answers from what was reported, and clear_young takes it away.
#[tokio::test]
async fn young_is_conservative() {
    let agent = Agent::start();
    let space = agent.space();
    let mut device = agent.device("gpu").await;
    device.subscribe(space, pages(1, 8)).await;
    assert!(!agent.host().test_young(space, pages(1, 8)).unwrap());
    device
        .ask(Ask::Young(v1::Young { address_space_id: space.get(), ranges: vec![wire(pages(3, 1))] }))
        .await;
    device.settled().await;
    assert!(agent.host().test_young(space, pages(1, 8)).unwrap());
    assert!(!agent.host().test_young(space, pages(4, 1)).unwrap());
    let host = agent.host().clone();
    let aging =
        tokio::spawn(async move { host.clear_flush_young(space, pages(1, 8), Wait::ForTargets).await });
    let notice = device.notice().await;
    assert_eq!(notice.kind(), v1::NoticeKind::ClearFlushYoung);
    device.ack(notice.number).await;
    let result = soon(aging).await.unwrap().unwrap();
    assert!(result.young, "the device's ack said nothing, but it had reported the page before");
    assert!(!agent.host().test_young(space, pages(1, 8)).unwrap());
    // With a report in the ack.
    let host = agent.host().clone();
    let aging = tokio::spawn(async move { host.clear_young(space, pages(1, 8), Wait::ForTargets).await });
    let notice = device.notice().await;
    assert_eq!(notice.kind(), v1::NoticeKind::ClearYoung);
    let report = v1::FlushReport {
        notice: notice.number,
        young: vec![wire(pages(2, 1))],
        ..v1::FlushReport::default()
    };
    let (through, reports) = (notice.number, vec![report]);
    device.ask(Ask::Ack(v1::Ack { through, reports, ..v1::Ack::default() })).await;
    assert!(soon(aging).await.unwrap().unwrap().young);
}

/// 20: what a device reports with an ack is kept, also beside the notice and whatever the flush was for.
#[tokio::test]
async fn young_bits_of_any_flush_are_kept() {
    let agent = Agent::start();
    let space = agent.space();
    let mut device = agent.device("gpu").await;
    device.subscribe(space, pages(0, 16)).await;
    let host = agent.host().clone();
    let protect = Invalidation { cause: Cause::ProtectionPage, ..unmap(space, pages(2, 1)) };
    let round = tokio::spawn(async move { host.invalidate_range_start(protect).await.unwrap() });
    let notice = device.notice().await.number;
    let young = vec![wire(pages(1, 8))];
    let reports = vec![v1::FlushReport { notice, young, ..v1::FlushReport::default() }];
    device.ask(Ask::Ack(v1::Ack { through: notice, reports, ..v1::Ack::default() })).await;
    quiesced(round).await;
    assert!(agent.host().test_young(space, pages(7, 1)).unwrap());
    assert!(!agent.host().test_young(space, pages(9, 1)).unwrap());
    // What is unmapped is not young any more.
    let round = agent.round(space, pages(4, 8));
    let notice = device.notice().await.number;
    device.ack(notice).await;
    quiesced(round).await;
    assert!(!agent.host().test_young(space, pages(4, 8)).unwrap());
    assert!(agent.host().test_young(space, pages(3, 1)).unwrap());
}

/// 1: a subscription that leaves causes out is not granted pages whose end it would not hear of.
#[tokio::test]
async fn a_subscription_to_some_causes_is_told_of_them_and_granted_nothing() {
    let agent = Agent::start();
    let space = agent.space();
    let mut device = agent.device("picky").await;
    device
        .try_subscribe_with(v1::Subscribe {
            address_space_id: space.get(),
            ranges: vec![wire(pages(1, 1))],
            causes: vec![v1::Cause::Unmap.into()],
            ..v1::Subscribe::default()
        })
        .await
        .unwrap();
    device.start_fault(space, pages(1, 1)).await;
    assert_eq!(device.error().await.reason(), Reason::FaultNotSubscribed);
    let clear = Invalidation { cause: Cause::Clear, ..unmap(space, pages(1, 1)) };
    let unheard = agent.host().invalidate_range_start(clear).await.unwrap();
    assert!(unheard.is_quiesced() && unheard.targets.is_empty());
    let round = agent.round(space, pages(1, 1));
    let notice = device.notice().await.number;
    device.ack(notice).await;
    quiesced(round).await;
}

/// 6: the answer to Unsubscribe does not wait for notices that came after it was due, however many.
#[tokio::test]
async fn an_unsubscriber_does_not_starve_under_other_events() {
    let agent = Agent::start_with(|config| config.host.session.outbox.window = 1);
    let (left, kept) = (agent.space(), agent.space());
    let mut device = agent.device("leaver").await;
    let leaving = device.subscribe(left, pages(1, 1)).await;
    device.subscribe(kept, pages(0, 10_000)).await;
    // One event more for each that is acked: more is always pending than the window lets out.
    let mut more = (0..).map(|event| agent.round(kept, pages(2 * event, 1)));
    let mut rounds: Vec<_> = more.by_ref().take(8).collect();
    until(|| agent.host().rounds_in_flight() == 8).await;
    device.ask(Ask::Unsubscribe(v1::Unsubscribe { request_id: 3, subscription_id: leaving })).await;
    for _ in 0..100 {
        match device.say().await {
            Say::Unsubscribed(unsubscribed) => {
                assert_eq!(unsubscribed.subscription_id, leaving);
                return;
            }
            Say::Notices(notices) => {
                rounds.extend(more.next());
                until(|| agent.host().rounds_in_flight() == 9).await;
                device.ack(notices.notices[0].number).await;
                until(|| agent.host().rounds_in_flight() == 8).await;
            }
            other => panic!("{other:?}"),
        }
    }
    panic!("a hundred notices came before the answer");
}

/// Notices stand in an outbox in the order of their sequences, whoever sent them.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn notices_come_in_the_order_of_their_sequences() {
    const SOURCES: u64 = 4;
    const EVENTS: u64 = 200;
    let agent = Agent::start();
    let space = agent.space();
    let mut device = agent.device("gpu").await;
    // Apart from each other, so that none are merged.
    device.subscribe(space, pages(0, 2 * SOURCES)).await;
    let sources: Vec<_> = (0..SOURCES)
        .map(|page| {
            let host = agent.host().clone();
            tokio::spawn(async move {
                for _ in 0..EVENTS {
                    let round =
                        host.invalidate_page(space, 2 * page * 4096, Cause::Clear, Wait::ForTargets).await;
                    assert!(round.unwrap().is_quiesced());
                }
            })
        })
        .collect();
    let mut last = 0;
    while last < SOURCES * EVENTS {
        let notice = device.notice().await;
        assert!(notice.seq > last, "{notice:?} after {last}");
        last = notice.seq;
        device.ack(notice.number).await;
    }
    for source in sources {
        soon(source).await.unwrap();
    }
}

/// 7: a source that never ends its brackets is refused further ones.
#[tokio::test]
async fn brackets_that_nobody_ends_are_bounded() {
    let agent = Agent::start_with(|config| config.host.max_rounds_in_flight = 2);
    let space = agent.space();
    let mut seqs = Vec::new();
    for page in 0..4 {
        let start = agent.host().invalidate_range_start(unmap(space, pages(page, 1))).await.unwrap();
        seqs.push(start.seq.unwrap());
    }
    let refused = agent.host().invalidate_range_start(unmap(space, pages(9, 1))).await.unwrap_err();
    assert!(matches!(refused, NotifyError::TooManyRounds { .. }));
    agent.host().invalidate_range_end(space, seqs[0]).unwrap();
    let start = agent.host().invalidate_range_start(unmap(space, pages(9, 1))).await;
    assert!(start.unwrap().is_quiesced());
    let refused = agent.host().invalidate_range_start(unmap(space, pages(9, 1))).await.unwrap_err();
    assert!(matches!(refused, NotifyError::TooManyRounds { .. }));
    assert!(agent.host().release(space).await.unwrap().is_quiesced(), "a release ends them all");
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

/// Release: every session is told once, subscriptions end, held faults are refused, nothing follows.
#[tokio::test]
async fn a_release_comes_once_and_last() {
    let agent = Agent::start();
    let space = agent.space();
    let mut device = agent.device("gpu").await;
    device.subscribe(space, pages(1, 1)).await;
    device.subscribe(space, pages(5, 1)).await;
    let host = agent.host().clone();
    let release = tokio::spawn(async move { host.release(space).await });
    let notice = device.notice().await;
    assert_eq!((notice.kind(), notice.range.unwrap().all), (v1::NoticeKind::Release, true));
    device.start_fault(space, pages(1, 1)).await;
    assert_eq!(device.error().await.reason(), Reason::AddressSpaceReleased);
    let refused = device.try_subscribe(space.get(), vec![wire(pages(9, 1))]).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::AddressSpaceReleased);
    let late = agent.host().invalidate_range_start(unmap(space, pages(1, 1))).await;
    assert_eq!(late.unwrap_err(), NotifyError::Released(space));
    assert_eq!(agent.host().release(space).await.unwrap_err(), NotifyError::Released(space));
    assert!(!release.is_finished());
    device.ack(notice.number).await;
    assert!(soon(release).await.unwrap().unwrap().is_quiesced());
    assert_eq!(agent.listed_sessions().await[0].subscriptions, 0);
    assert!(agent.host().release(space).await.is_err(), "it is forgotten");
    device.settled().await;
    assert!(device.is_silent().await);
}

/// change_pte tells the new translation only while nothing else is going on with the page.
#[tokio::test]
async fn change_pte_degrades_beside_another_bracket_and_for_a_device_that_does_not_know_it() {
    let agent = Agent::start();
    let space = agent.space();
    let mut knows = agent.device("knows").await;
    let mut plain = Device::connect(&agent).await;
    let capabilities = Some(v1::Capabilities { enforces_lease: true, change_pte: false });
    plain.ask(Ask::Hello(v1::Hello { capabilities, ..Device::hello_of("plain") })).await;
    assert!(matches!(plain.say().await, Say::Welcome(_)));
    knows.subscribe(space, pages(1, 1)).await;
    plain.subscribe(space, pages(1, 1)).await;
    let translation =
        Translation { range: pages(1, 1), frame: shootdown_core::FrameNumber(42), access: Access::Read };
    let change = |host: shootdown_server::Host| {
        tokio::spawn(async move { host.change_pte(space, translation, Wait::ForTargets).await.unwrap() })
    };
    let round = change(agent.host().clone());
    let (told, degraded) = (knows.notice().await, plain.notice().await);
    assert_eq!((told.kind(), told.change_pte.unwrap().frame), (v1::NoticeKind::ChangePte, 42));
    assert_eq!(degraded.kind(), v1::NoticeKind::Invalidate);
    knows.ack(told.number).await;
    plain.ack(degraded.number).await;
    quiesced(round).await;
    let outer = agent.round(space, pages(1, 1));
    for device in [&mut knows, &mut plain] {
        let notice = device.notice().await.number;
        device.ack(notice).await;
    }
    quiesced(outer).await;
    let round = change(agent.host().clone());
    for device in [&mut knows, &mut plain] {
        let notice = device.notice().await;
        assert_eq!(notice.kind(), v1::NoticeKind::Invalidate, "the outer bracket is open");
        device.ack(notice.number).await;
    }
    quiesced(round).await;
}

/// A device that leaves with a word is not waited for any more.
#[tokio::test]
async fn a_device_that_leaves_resolves_its_rounds() {
    let agent = Agent::start();
    let space = agent.space();
    let mut device = agent.device("leaver").await;
    device.subscribe(space, pages(1, 1)).await;
    let round = agent.round(space, pages(1, 1));
    device.notice().await;
    device.ask(Ask::Leave(v1::Leave {})).await;
    assert_eq!(quiesced(round).await[0].outcome, Outcome::Left);
    soon(async {
        while !agent.listed_sessions().await.is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await;
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

/// A caller over gRPC that goes away, wherever its call has come by then: either the call never arrived,
/// or its round goes on and its bracket stays until the device has acked.
#[tokio::test]
async fn a_source_that_loses_its_connection_does_not_open_the_gate() {
    let agent = Agent::start();
    let mut device = agent.device("gpu").await;
    let channel = agent.channel("source.sock").await;
    let mut notifier = v1::notifier_service_client::NotifierServiceClient::new(channel);
    let register = v1::RegisterAddressSpaceRequest::default();
    let id = notifier.register_address_space(register).await.unwrap().into_inner().address_space_id;
    device.try_subscribe(id, vec![wire(pages(1, 1))]).await.unwrap();
    let start = v1::InvalidateRangeStartRequest {
        address_space_id: id,
        range: Some(wire(pages(1, 1))),
        cause: v1::Cause::Unmap.into(),
        ..v1::InvalidateRangeStartRequest::default()
    };
    let mut arrived = 0;
    for turns in 0..12 {
        let (mut caller, start) = (notifier.clone(), start.clone());
        let calling = tokio::spawn(async move { caller.invalidate_range_start(start).await });
        for _ in 0..turns {
            tokio::task::yield_now().await;
        }
        if turns == 11 {
            until(|| agent.host().rounds_in_flight() == 1).await;
        }
        calling.abort();
        soon(calling).await.unwrap_err();
        // On the same connection: whatever was sent before this has arrived.
        let young = v1::TestYoungRequest { address_space_id: id, range: Some(wire(pages(1, 1))) };
        notifier.test_young(young).await.unwrap();
        let listed = agent.listed_space().await;
        match (listed.open_brackets, listed.rounds_in_flight) {
            (0, 0) => {}
            (1, 1) => {
                arrived += 1;
                let notice = device.notice().await.number;
                device.settled().await;
                assert_eq!(agent.listed_space().await.open_brackets, 1, "the device has not acked");
                device.ack(notice).await;
                soon(async {
                    while agent.listed_space().await.open_brackets > 0 {
                        tokio::task::yield_now().await;
                    }
                })
                .await;
            }
            other => panic!("open brackets and rounds in flight after {turns} turns: {other:?}"),
        }
    }
    assert!(arrived > 0);
}

/// Rounds beyond the bound wait for a place, or are refused when their caller cannot wait for one.
#[tokio::test]
async fn rounds_in_flight_are_bounded_by_back_pressure() {
    let agent = Agent::start_with(|config| config.host.max_rounds_in_flight = 1);
    let space = agent.space();
    let mut device = agent.device("slow").await;
    device.subscribe(space, pages(1, 2)).await;
    let first = agent.round(space, pages(1, 1));
    let notice = device.notice().await.number;
    let mut second = agent.round(space, pages(2, 1));
    let impatient =
        Invalidation { wait: Wait::AtMost(Duration::from_millis(1)), ..unmap(space, pages(2, 1)) };
    let refused = agent.host().invalidate_range_start(impatient).await.unwrap_err();
    assert!(matches!(refused, NotifyError::TooManyRounds { most: 1, .. }));
    assert!(is_pending(&mut second).await);
    device.ack(notice).await;
    quiesced(first).await;
    let notice = device.notice().await.number;
    device.ack(notice).await;
    quiesced(second).await;
}

/// SIGTERM's way: devices are told, and the bound holds even when one does not leave.
#[tokio::test]
async fn a_shutdown_drains_and_is_bounded() {
    let mut agent = Agent::start_with(|config| config.drain_timeout = Duration::from_millis(300));
    let space = agent.space();
    let mut polite = agent.device("polite").await;
    let mut stuck = agent.device("stuck").await;
    stuck.subscribe(space, pages(1, 1)).await;
    let round = agent.round(space, pages(1, 1));
    stuck.notice().await;
    let running = agent.running.take().unwrap();
    let host = running.host().clone();
    let stopping = tokio::spawn(running.shutdown());
    assert!(matches!(polite.say().await, Say::Drain(_)));
    polite.ask(Ask::Leave(v1::Leave {})).await;
    assert!(matches!(stuck.say().await, Say::Drain(_)));
    let refused = host.invalidate_range_start(unmap(space, pages(5, 1))).await.unwrap_err();
    assert_eq!(refused, NotifyError::Stopping);
    soon(stopping).await.unwrap();
    let result = soon(round).await.unwrap();
    assert_eq!(result.verdict, Verdict::NotQuiesced, "what was not acked is not to be released");
}

/// Health and reflection are offered where devices connect.
#[tokio::test]
async fn health_and_reflection_are_served() {
    let agent = Agent::start();
    let channel = agent.channel("device.sock").await;
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel.clone());
    let check = tonic_health::pb::HealthCheckRequest { service: String::new() };
    let status = health.check(check).await.unwrap().into_inner().status();
    assert_eq!(status, tonic_health::pb::health_check_response::ServingStatus::Serving);
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
    let ask = tonic_reflection::pb::v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut client = ServerReflectionClient::new(channel);
    let answers = client.server_reflection_info(tokio_stream::iter([ask])).await.unwrap();
    let answer = answers.into_inner().message().await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(listed)) = answer.message_response else {
        panic!("no list")
    };
    let names: Vec<_> = listed.service.iter().map(|service| service.name.as_str()).collect();
    assert!(names.contains(&"shootdown.v1.DeviceService"), "{names:?}");
}
