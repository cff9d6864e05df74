//! What a caller of the notifier may take for granted: its round waits for every target, and its bracket has one end.

use std::time::Duration;

use shootdown_core::{Access, Cause};
use shootdown_proto::v1;
use shootdown_proto::v1::session_request::Message as Ask;
use shootdown_proto::v1::session_response::Message as Say;
use shootdown_server::source::{Invalidation, Notifier as _, NotifyError, Outcome, Verdict, Wait};

use crate::common::{Agent, is_pending, pages, quiesced, soon, unmap, until, wire};

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
