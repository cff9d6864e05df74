//! Pages that their callers could not release in time: what is kept of them, under which budget, for how long.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::time::Duration;

use common::{Agent, BOUND, is_pending, pages, quiesced, soon, unmap, until, wire};
use shootdown_core::{Access, AddrRange, AddressSpaceId, Cause, FrameNumber, Translation};
use shootdown_proto::error::Reason;
use shootdown_proto::v1;
use shootdown_proto::v1::notifier_service_client::NotifierServiceClient;
use shootdown_proto::v1::session_request::Message as Ask;
use shootdown_server::QuarantineBudget;
use shootdown_server::config::Config;
use shootdown_server::source::{Invalidation, Notifier as _, NotifyError, Outcome, Verdict, Wait};

const T_ACK: Duration = Duration::from_millis(50);
const LEASE: Duration = Duration::from_millis(300);

/// `T_ack + T_fence` is 50 ms and 320 ms.
fn short(config: &mut Config) {
    config.host.session.ack_timeout = T_ACK;
    config.host.session.lease.duration = LEASE;
    config.host.session.lease.margin = Duration::from_millis(20);
}

fn room_for(pages: u64) -> impl FnOnce(&mut Config) {
    move |config| config.host.quarantine = QuarantineBudget { bytes: 1 << 40, pages }
}

/// A call whose time is over as soon as its round is open.
fn impatient(space: AddressSpaceId, range: AddrRange) -> Invalidation {
    Invalidation { wait: Wait::AtMost(Duration::ZERO), ..unmap(space, range) }
}

/// Nothing is quarantined, by the entries and by the sums.
async fn is_empty(agent: &Agent) -> bool {
    let listed = agent.listed_quarantine().await;
    listed.quarantined.is_empty() && (listed.bytes, listed.pages) == (0, 0)
}

async fn emptied(agent: &Agent) {
    soon(async {
        while !is_empty(agent).await {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

fn is_full(refused: &NotifyError) -> bool {
    matches!(refused, NotifyError::QuarantineFull { .. })
}

/// Trap 1 too: over the wire, as a VMM sees it.
#[tokio::test]
async fn a_round_past_its_callers_deadline_is_listed_with_who_is_missing_until_it_is_complete() {
    let agent = Agent::start_with(room_for(100));
    let mut notifier = NotifierServiceClient::new(agent.channel("source.sock").await);
    let register = v1::RegisterAddressSpaceRequest::default();
    let space = notifier.register_address_space(register).await.unwrap().into_inner().address_space_id;
    let (mut missing, mut acked) = (agent.device("missing").await, agent.device("acked").await);
    missing.try_subscribe(space, vec![wire(pages(0, 64))]).await.unwrap();
    acked.try_subscribe(space, vec![wire(pages(0, 64))]).await.unwrap();
    let start = |first, deadline_ms, resident_pages| v1::InvalidateRangeStartRequest {
        address_space_id: space,
        range: Some(wire(pages(first, 16))),
        cause: v1::Cause::Unmap.into(),
        deadline_ms: Some(deadline_ms),
        resident_pages,
        ..v1::InvalidateRangeStartRequest::default()
    };
    let result = notifier.invalidate_range_start(start(0, 1, 3)).await.unwrap().into_inner().result.unwrap();
    assert_eq!(result.verdict(), v1::Verdict::NotQuiesced);
    let seq = result.seq;
    acked.notice().await;
    acked.ack(1).await;
    acked.settled().await;
    for _ in 0..2 {
        let wait = v1::AwaitRoundRequest {
            address_space_id: space,
            seq,
            deadline_ms: Some(1),
            ..Default::default()
        };
        let again = notifier.await_round(wait).await.unwrap().into_inner().result.unwrap();
        assert_eq!(again.verdict(), v1::Verdict::NotQuiesced, "waiting twice gives the same answer twice");
    }
    notifier.invalidate_range_start(start(16, 0, 0)).await.unwrap();
    let listed = agent.listed_quarantine().await;
    assert_eq!((listed.bytes, listed.most_bytes), (2 * 16 * 4096, 1 << 40));
    assert_eq!((listed.pages, listed.most_pages), (3 + 16, 100));
    let [first, second] = &listed.quarantined[..] else { panic!("{listed:#?}") };
    assert_eq!((first.bytes, first.pages, second.pages), (16 * 4096, 3, 16), "every page, if none is named");
    let round = first.round.clone().unwrap();
    assert_eq!((round.address_space_id, round.seq, round.range), (space, seq, Some(wire(pages(0, 16)))));
    let outcomes: Vec<_> =
        round.targets.iter().map(|target| (target.device_id.as_str(), target.outcome())).collect();
    assert_eq!(outcomes, [("missing", v1::TargetOutcome::Waiting), ("acked", v1::TargetOutcome::Acked)]);
    // Page by page.
    let mut admin = v1::admin_service_client::AdminServiceClient::new(agent.channel("admin.sock").await);
    let mut request = v1::ListQuarantineRequest { page_size: 1, ..v1::ListQuarantineRequest::default() };
    let page = admin.list_quarantine(request.clone()).await.unwrap().into_inner();
    assert_eq!(
        (page.quarantined[0].round.as_ref().unwrap().seq, page.pages),
        (seq, 19),
        "the sums are of all"
    );
    request.page_token = page.next_page_token;
    let page = admin.list_quarantine(request).await.unwrap().into_inner();
    assert_eq!((page.quarantined[0].pages, page.next_page_token.as_str()), (16, ""));
    // The end of its bracket takes nothing out of it; the ack does.
    let end = v1::InvalidateRangeEndRequest { address_space_id: space, seq, ..Default::default() };
    notifier.invalidate_range_end(end).await.unwrap();
    assert_eq!(agent.listed_quarantine().await.pages, 19);
    missing.notice().await;
    missing.ack(1).await;
    soon(async {
        while agent.listed_quarantine().await.pages != 16 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    acked.notice().await;
    acked.ack(2).await;
    missing.notice().await;
    missing.ack(2).await;
    emptied(&agent).await;
}

/// A budget that is spent: who can wait waits, and nothing is open until there is room.
#[tokio::test]
async fn a_call_that_can_wait_waits_for_room_and_goes_on_when_a_round_completes() {
    let agent = Agent::start_with(room_for(2));
    let space = agent.space();
    let mut device = agent.device("slow").await;
    device.subscribe(space, pages(0, 64)).await;
    let parked = agent.host().invalidate_range_start(impatient(space, pages(0, 2))).await.unwrap();
    assert_eq!(parked.verdict, Verdict::NotQuiesced);
    device.notice().await;
    let before = agent.listed_space().await;
    // Its deadline passes before there is room.
    let hasty = Invalidation { wait: Wait::AtMost(Duration::from_millis(20)), ..unmap(space, pages(9, 1)) };
    assert!(is_full(&agent.host().invalidate_range_start(hasty).await.unwrap_err()));
    let page =
        agent.host().invalidate_page(space, 9 * 4096, Cause::Unmap, Wait::AtMost(Duration::ZERO)).await;
    assert!(is_full(&page.unwrap_err()));
    // Cannot wait at all.
    let oom_reaper = Invalidation { wait: Wait::NotAtAll, ..unmap(space, pages(9, 1)) };
    assert!(is_full(&agent.host().invalidate_range_start(oom_reaper).await.unwrap_err()));
    assert_eq!(agent.listed_space().await, before, "nothing was opened");
    assert!(device.is_silent().await);
    // Has time.
    let host = agent.host().clone();
    let patient = Invalidation { wait: Wait::AtMost(BOUND), ..unmap(space, pages(9, 1)) };
    let mut waiting = tokio::spawn(async move { host.invalidate_range_start(patient).await.unwrap() });
    device.settled().await;
    assert!(is_pending(&mut waiting).await && device.is_silent().await);
    assert_eq!(agent.listed_space().await, before, "not yet");
    device.ack(1).await;
    let notice = device.notice().await;
    assert_eq!(notice.range.unwrap(), wire(pages(9, 1)));
    device.ack(notice.number).await;
    quiesced(waiting).await;
    emptied(&agent).await;
}

/// The entry may have changed while it waited: what it would install may be somebody else's by then.
#[tokio::test]
async fn a_change_pte_that_waited_for_room_is_an_invalidation() {
    let agent = Agent::start_with(room_for(2));
    let space = agent.space();
    let mut device = agent.device("slow").await;
    device.subscribe(space, pages(0, 64)).await;
    drop(agent.host().invalidate_range_start(impatient(space, pages(0, 2))).await.unwrap());
    let parked = device.notice().await.number;
    let translation = Translation { range: pages(9, 1), frame: FrameNumber(42), access: Access::Read };
    let host = agent.host().clone();
    let mut waiting =
        tokio::spawn(async move { host.change_pte(space, translation, Wait::AtMost(BOUND)).await.unwrap() });
    device.settled().await;
    assert!(is_pending(&mut waiting).await && device.is_silent().await);
    device.ack(parked).await;
    let notice = device.notice().await;
    assert_eq!((notice.kind(), notice.range.unwrap()), (v1::NoticeKind::Invalidate, wire(pages(9, 1))));
    device.ack(notice.number).await;
    quiesced(waiting).await;
}

/// What waits for room and is dropped leaves nothing behind.
#[tokio::test]
async fn a_call_that_is_dropped_while_it_waits_for_room_did_nothing() {
    let agent = Agent::start_with(room_for(1));
    let space = agent.space();
    let mut device = agent.device("slow").await;
    device.subscribe(space, pages(0, 64)).await;
    drop(agent.host().invalidate_range_start(impatient(space, pages(0, 1))).await.unwrap());
    device.notice().await;
    let before = agent.listed_space().await;
    let patient = Invalidation { wait: Wait::AtMost(BOUND), ..unmap(space, pages(9, 1)) };
    let mut waiting = Box::pin(agent.host().invalidate_range_start(patient));
    assert!(is_pending(&mut waiting).await);
    drop(waiting);
    device.ack(1).await;
    emptied(&agent).await;
    device.settled().await;
    assert!(device.is_silent().await);
    assert_eq!(agent.listed_space().await.seq, before.seq);
}

/// 17: a heap that one stuck device made holds up none but those who might add to it.
#[tokio::test]
async fn a_call_whose_pages_cannot_be_quarantined_does_not_wait_for_room() {
    let agent = Agent::start_with(room_for(1));
    let (space, other) = (agent.space(), agent.space());
    let mut stuck = agent.device("stuck").await;
    stuck.subscribe(space, pages(0, 64)).await;
    let mut live = agent.device("live").await;
    live.subscribe(other, pages(0, 64)).await;
    drop(agent.host().invalidate_range_start(impatient(space, pages(0, 1))).await.unwrap());
    // No target, with and without time.
    for wait in [Wait::NotAtAll, Wait::AtMost(Duration::ZERO), Wait::ForTargets] {
        let beside = Invalidation { wait, ..unmap(other, pages(100, 1)) };
        assert!(soon(agent.host().invalidate_range_start(beside)).await.unwrap().is_quiesced());
    }
    // No deadline, and a target that is certain to stop.
    let round = agent.round(other, pages(1, 1));
    let notice = live.notice().await.number;
    live.ack(notice).await;
    quiesced(round).await;
    // A query frees no page.
    let host = agent.host().clone();
    let wait = Wait::AtMost(BOUND);
    let query = tokio::spawn(async move { host.clear_young(other, pages(1, 1), wait).await.unwrap() });
    let notice = live.notice().await.number;
    live.ack(notice).await;
    quiesced(query).await;
    // A release is never refused.
    let host = agent.host().clone();
    let release = tokio::spawn(async move { host.release(other).await.unwrap() });
    let notice = live.notice().await.number;
    live.ack(notice).await;
    quiesced(release).await;
    assert_eq!(agent.listed_quarantine().await.pages, 1);
}

#[tokio::test]
async fn a_young_query_that_is_not_answered_in_time_quarantines_nothing() {
    let agent = Agent::start();
    let space = agent.space();
    let mut device = agent.device("silent").await;
    device.subscribe(space, pages(1, 1)).await;
    let at_once = Wait::AtMost(Duration::ZERO);
    let aging = agent.host().clear_flush_young(space, pages(1, 1), at_once).await.unwrap();
    assert_eq!(aging.verdict, Verdict::NotQuiesced);
    assert!(is_empty(&agent).await);
}

/// 19: nobody stops this device, so its caller is answered in `T_ack + T_fence`, and never that it stopped.
#[tokio::test]
async fn bounded_resolution() {
    let agent = Agent::start_with(|config| {
        short(config);
        room_for(1)(config);
    });
    let space = agent.lenient_space();
    let mut device = agent.unbound_device("unbound").await;
    device.subscribe(space, pages(0, 64)).await;
    let bound = T_ACK + agent_lease();
    let result = quiesces_not(&agent, space, pages(0, 1)).await;
    let took = result.times.answered.since(result.times.called);
    assert!(took >= bound && took < bound * 2, "{took:?} of {bound:?}");
    assert_eq!(result.targets[0].outcome, Outcome::Waiting);
    assert_eq!(agent.listed_quarantine().await.pages, 1);
    // There is no room for another: refused in the same time, and not for ever.
    let refused = soon(agent.host().invalidate_range_start(unmap(space, pages(1, 1)))).await.unwrap_err();
    assert!(is_full(&refused), "{refused}");
    assert_eq!(
        agent.listed_sessions().await[0].phase(),
        v1::SessionPhase::Suspect,
        "its lease proves nothing"
    );
    // Its release is answered in that time, too, goes on by itself, and waits for the ack.
    let host = agent.host().clone();
    let released = soon(host.release(space)).await.unwrap();
    assert_eq!(released.verdict, Verdict::NotQuiesced);
    let listed = agent.listed_quarantine().await;
    assert_eq!((listed.quarantined.len(), listed.pages), (2, 1), "listed, and not charged");
    assert_eq!(agent.listed_space().await.subscriptions, 1);
    let last = device.notice().await.number + 1;
    device.notice().await;
    device.ack(last).await;
    emptied(&agent).await;
    soon(async {
        while host.test_young(space, pages(1, 1)).is_ok() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

fn agent_lease() -> Duration {
    LEASE + Duration::from_millis(20)
}

async fn quiesces_not(
    agent: &Agent,
    space: AddressSpaceId,
    range: AddrRange,
) -> shootdown_server::source::RoundResult {
    let result = soon(agent.host().invalidate_range_start(unmap(space, range))).await.unwrap();
    assert_eq!(result.verdict, Verdict::NotQuiesced);
    result
}

/// 13: a caller without a deadline that is answered in time is not told that the pages may go, however often
/// it asks; and its bracket holds grants until they may.
#[tokio::test]
async fn timeout_is_not_ack() {
    let agent = Agent::start_with(short);
    let space = agent.lenient_space();
    let mut device = agent.unbound_device("unbound").await;
    device.subscribe(space, pages(1, 1)).await;
    let seq = quiesces_not(&agent, space, pages(1, 1)).await.seq.unwrap();
    for _ in 0..2 {
        let again = soon(agent.host().await_round(space, seq, Wait::ForTargets)).await.unwrap();
        assert_eq!(again.verdict, Verdict::NotQuiesced);
    }
    agent.host().invalidate_range_end(space, seq).unwrap();
    assert_eq!(agent.listed_space().await.open_brackets, 1, "it ends when the round is complete");
    let notice = device.notice().await.number;
    device.start_fault(space, pages(1, 1)).await;
    device.ack(notice).await;
    device.grant().await;
    let answer = agent.host().await_round(space, seq, Wait::ForTargets).await.unwrap();
    assert!(answer.is_quiesced());
    emptied(&agent).await;
}

/// Trap 6: whatever becomes of rounds and of their devices, what was counted is given back.
#[tokio::test]
async fn every_way_in_which_a_round_ends_gives_back_what_was_counted() {
    let agent = Agent::start_with(|config| {
        config.host.session.lease.duration = Duration::from_secs(4);
        config.host.session.lease.margin = Duration::from_millis(20);
    });
    let space = agent.space();
    let mut devices = Vec::new();
    for name in ["acks", "leaves", "is-cut", "is-silent"] {
        let mut device = agent.device(name).await;
        device.subscribe(space, pages(0, 64)).await;
        devices.push(device);
    }
    for page in 0..32 {
        let parked = agent.host().invalidate_range_start(impatient(space, pages(2 * page, 1))).await.unwrap();
        // Some are ended, some asked for again, some forgotten.
        match page % 3 {
            0 => agent.host().invalidate_range_end(space, parked.seq.unwrap()).unwrap(),
            1 => {
                let wait = Wait::AtMost(Duration::from_millis(1));
                let again = agent.host().await_round(space, parked.seq.unwrap(), wait).await.unwrap();
                assert_eq!(again.verdict, Verdict::NotQuiesced);
            }
            _ => {}
        }
    }
    assert_eq!(agent.listed_quarantine().await.pages, 32);
    let silent = devices.pop().unwrap();
    devices.pop().unwrap().cut();
    let leaver = devices.pop().unwrap();
    leaver.ask(Ask::Leave(v1::Leave {})).await;
    let mut acks = devices.pop().unwrap();
    let mut through = 0;
    while through < 32 {
        through = acks.notice().await.number;
        acks.ack(through).await;
    }
    acks.settled().await;
    assert_eq!(agent.listed_quarantine().await.pages, 32, "two are waited for");
    until(|| agent.host().rounds_in_flight() == 0).await;
    emptied(&agent).await;
    drop(silent);
}

/// The reason over the wire, with its code.
#[tokio::test]
async fn a_source_is_told_that_there_is_no_room() {
    let agent = Agent::start_with(room_for(1));
    let mut notifier = NotifierServiceClient::new(agent.channel("source.sock").await);
    let register = v1::RegisterAddressSpaceRequest::default();
    let space = notifier.register_address_space(register).await.unwrap().into_inner().address_space_id;
    let mut device = agent.device("silent").await;
    device.try_subscribe(space, vec![wire(pages(0, 8))]).await.unwrap();
    let mut start = v1::InvalidateRangeStartRequest {
        address_space_id: space,
        range: Some(wire(pages(0, 1))),
        cause: v1::Cause::Unmap.into(),
        deadline_ms: Some(0),
        ..v1::InvalidateRangeStartRequest::default()
    };
    notifier.invalidate_range_start(start.clone()).await.unwrap();
    for (deadline_ms, non_blockable) in [(Some(5), false), (None, true)] {
        (start.deadline_ms, start.non_blockable) = (deadline_ms, non_blockable);
        let refused = notifier.invalidate_range_start(start.clone()).await.unwrap_err();
        assert_eq!(Reason::of_status(&refused), Some(Reason::QuarantineFull), "{refused:?}");
        assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
    }
    // With a name each try waits as long as it may, and what one is told all are.
    (start.deadline_ms, start.non_blockable, start.request_id) = (Some(60_000), false, "a".to_owned());
    let patient = tokio::spawn({
        let (mut notifier, start) = (notifier.clone(), start.clone());
        async move { notifier.invalidate_range_start(start).await }
    });
    start.deadline_ms = Some(20);
    let refused = soon(notifier.invalidate_range_start(start)).await.unwrap_err();
    assert_eq!(Reason::of_status(&refused), Some(Reason::QuarantineFull), "{refused:?}");
    let refused = soon(patient).await.unwrap().unwrap_err();
    assert_eq!(Reason::of_status(&refused), Some(Reason::QuarantineFull), "{refused:?}");
}
