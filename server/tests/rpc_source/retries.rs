//! Calls that are tried again, beside each other and after their connections were lost.

use shootdown_proto::error::Reason;
use shootdown_proto::v1;
use shootdown_proto::v1::session_request::Message as Ask;
use shootdown_proto::v1::session_response::Message as Say;
use tokio::task::JoinHandle;
use tonic::Status;

use super::{Vmm, refused, translation};
use crate::common::{Agent, Device, pages, soon, wire};

async fn open_brackets(agent: &Agent) -> u64 {
    agent.listed_space().await.open_brackets
}

/// Waits until as many brackets are open.
async fn brackets_are(agent: &Agent, wanted: u64) {
    soon(async {
        while open_brackets(agent).await != wanted {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_retry_beside_the_first_try_joins_its_round() {
    let agent = Agent::start();
    let vmm = Vmm::start(&agent).await;
    let other = vmm.reconnected(&agent).await;
    let mut device = agent.device("gpu").await;
    device.subscribe(vmm.id(), pages(1, 1)).await;
    let tries: Vec<_> = [&vmm, &other, &vmm].map(|vmm| vmm.invalidating(vmm.unmap(pages(1, 1), "a"))).into();
    let notice = device.notice().await.number;
    // A round of another id is one of its own.
    let apart = vmm.invalidating(vmm.unmap(pages(1, 1), "b"));
    let second = device.notice().await.number;
    assert_eq!((notice, second), (1, 2));
    device.ack(second).await;
    for answer in tries {
        let result = answer.await.unwrap().unwrap();
        assert_eq!((result.seq, result.verdict(), result.targets.len()), (1, v1::Verdict::Quiesced, 1));
    }
    assert_eq!(apart.await.unwrap().unwrap().seq, 2);
    assert_eq!(open_brackets(&agent).await, 2);
    // Long after it is over the answer is still the same, and is not a new event.
    vmm.end(1, "").await.unwrap();
    vmm.end(2, "").await.unwrap();
    let again = other.invalidate(vmm.unmap(pages(1, 1), "a")).await.unwrap();
    assert_eq!((again.seq, again.verdict(), again.targets.len()), (1, v1::Verdict::Quiesced, 1));
    assert_eq!((agent.listed_space().await.seq, open_brackets(&agent).await), (2, 0));
    device.settled().await;
    assert!(device.is_silent().await);
}

/// A round lasts until its devices have stopped. How long its answer was lost is another matter.
#[tokio::test]
async fn a_round_that_is_over_lasted_as_long_whenever_it_is_asked_for() {
    let agent = Agent::start();
    let vmm = Vmm::start(&agent).await;
    let mut device = agent.device("gpu").await;
    device.subscribe(vmm.id(), pages(1, 1)).await;
    let started = vmm.invalidating(vmm.unmap(pages(1, 1), "a"));
    let notice = device.notice().await.number;
    device.ack(notice).await;
    let result = started.await.unwrap().unwrap();
    assert!(result.elapsed_ns >= result.targets[0].elapsed_ns);
    let again = vmm.invalidate(vmm.unmap(pages(1, 1), "a")).await.unwrap();
    let wait = v1::AwaitRoundRequest { address_space_id: vmm.space, seq: result.seq, ..Default::default() };
    let awaited = soon(vmm.calls.clone().await_round(wait)).await.unwrap().into_inner().result.unwrap();
    assert_eq!([again.elapsed_ns, awaited.elapsed_ns], [result.elapsed_ns; 2]);
}

#[tokio::test]
async fn a_bracket_whose_caller_lost_its_connection_waits_for_the_retry() {
    let agent = Agent::start();
    let vmm = Vmm::start(&agent).await;
    let mut device = agent.device("gpu").await;
    device.subscribe(vmm.id(), pages(0, 8)).await;
    let lost = vmm.reconnected(&agent).await;
    let with_id = lost.invalidating(lost.unmap(pages(1, 1), "a"));
    let first = device.notice().await.number;
    let without = lost.invalidating(lost.unmap(pages(2, 1), ""));
    let second = device.notice().await.number;
    with_id.abort();
    without.abort();
    drop((lost, with_id.await, without.await));
    device.ack(first).await;
    device.ack(second).await;
    // Nobody can come back for the one without an id: its bracket is aborted (Pairing).
    brackets_are(&agent, 1).await;
    device.start_fault(vmm.id(), pages(2, 1)).await;
    assert_eq!(device.error().await.reason(), Reason::FaultNotServed, "not held any more");

    let result = vmm.invalidate(vmm.unmap(pages(1, 1), "a")).await.unwrap();
    assert_eq!((result.seq, result.verdict()), (1, v1::Verdict::Quiesced));
    assert_eq!(open_brackets(&agent).await, 1);
    vmm.end(1, "").await.unwrap();
    assert_eq!(open_brackets(&agent).await, 0);
}

#[tokio::test]
async fn a_retry_learns_what_became_of_a_round_that_was_not_quiesced() {
    let agent = Agent::start();
    let vmm = Vmm::start(&agent).await;
    let mut device = agent.device("gpu").await;
    device.subscribe(vmm.id(), pages(1, 1)).await;
    let start = |deadline_ms| v1::InvalidateRangeStartRequest { deadline_ms, ..vmm.unmap(pages(1, 1), "a") };
    for _ in 0..2 {
        // How long it waits is not part of the request. No time that passes is an ack.
        let result = vmm.invalidate(start(Some(10))).await.unwrap();
        assert_eq!((result.seq, result.verdict()), (1, v1::Verdict::NotQuiesced));
    }
    let waiting = vmm.invalidating(start(None));
    let notice = device.notice().await.number;
    device.ack(notice).await;
    assert_eq!(waiting.await.unwrap().unwrap().verdict(), v1::Verdict::Quiesced);
    vmm.end(1, "").await.unwrap();
}

#[tokio::test]
async fn an_id_names_one_request() {
    let agent = Agent::start();
    let vmm = Vmm::start(&agent).await;
    let start = vmm.unmap(pages(1, 1), "a");
    let seq = vmm.invalidate(start.clone()).await.unwrap().seq;
    for other in [
        v1::InvalidateRangeStartRequest { range: Some(wire(pages(1, 2))), ..start.clone() },
        v1::InvalidateRangeStartRequest { cause: v1::Cause::Clear.into(), ..start.clone() },
        v1::InvalidateRangeStartRequest { owner: 1, ..start.clone() },
        v1::InvalidateRangeStartRequest { non_blockable: true, ..start.clone() },
    ] {
        assert_eq!(refused(vmm.invalidate(other).await), Reason::RequestIdReused);
    }
    assert_eq!(refused(vmm.end(seq, "a").await), Reason::RequestIdReused);
    assert_eq!(refused(vmm.release("a").await), Reason::RequestIdReused);
    assert_eq!(refused(page(&vmm, 1, "a").await), Reason::RequestIdReused);
    assert_eq!(refused(young(&vmm, 1, "a").await), Reason::RequestIdReused);
    assert_eq!(agent.listed_space().await.seq, 1, "nothing of it took effect");
    // What the id is refused for does not make it another's.
    assert_eq!(vmm.invalidate(start).await.unwrap().seq, seq);
    // Another address space has ids of its own.
    let neighbour = Vmm::start(&agent).await;
    neighbour.invalidate(neighbour.unmap(pages(9, 1), "a")).await.unwrap();
}

#[tokio::test]
async fn an_id_has_at_most_64_bytes() {
    let agent = Agent::start();
    let vmm = Vmm::start(&agent).await;
    let (fits, too_long) = ("x".repeat(64), "x".repeat(65));
    vmm.invalidate(vmm.unmap(pages(1, 1), &fits)).await.unwrap();
    let start = vmm.unmap(pages(1, 1), &too_long);
    assert_eq!(refused(vmm.invalidate(start).await), Reason::FieldInvalid);
    assert_eq!(refused(vmm.end(1, &too_long).await), Reason::FieldInvalid);
    assert_eq!(refused(vmm.release(&too_long).await), Reason::FieldInvalid);
    assert_eq!(refused(page(&vmm, 1, &too_long).await), Reason::FieldInvalid);
    assert_eq!(refused(young(&vmm, 1, &too_long).await), Reason::FieldInvalid);
    vmm.end(1, "").await.unwrap();
}

/// 8, with ids: it leaves no bracket, and no try that comes late makes one.
#[tokio::test]
async fn non_block_atomic_with_retries() {
    let agent = Agent::start();
    let vmm = Vmm::start(&agent).await;
    let mut device = agent.device("gpu").await;
    let subscription = device.subscribe(vmm.id(), pages(1, 1)).await;
    let start = |id| v1::InvalidateRangeStartRequest { non_blockable: true, ..vmm.unmap(pages(1, 1), id) };
    for _ in 0..2 {
        let result = vmm.invalidate(start("a")).await.unwrap();
        assert_eq!((result.verdict(), result.seq), (v1::Verdict::WouldBlock, 0));
    }
    // Nobody is in the way any more when the try arrives that was first: its caller has gone on without a bracket.
    device.ask(Ask::Unsubscribe(v1::Unsubscribe { request_id: 9, subscription_id: subscription })).await;
    assert!(matches!(device.say().await, Say::Unsubscribed(_)));
    let late = vmm.reconnected(&agent).await.invalidate(start("a")).await.unwrap();
    assert_eq!((late.verdict(), late.seq, late.targets.len()), (v1::Verdict::WouldBlock, 0, 1));
    assert_eq!((agent.listed_space().await.seq, open_brackets(&agent).await), (0, 0));
    assert!(device.is_silent().await);
    let other = v1::InvalidateRangeStartRequest { range: Some(wire(pages(5, 1))), ..start("a") };
    assert_eq!(refused(vmm.invalidate(other).await), Reason::RequestIdReused);
    // By an id of its own it is a call of its own.
    for _ in 0..2 {
        let result = vmm.invalidate(start("b")).await.unwrap();
        assert_eq!((result.verdict(), result.seq), (v1::Verdict::Quiesced, 1));
    }
    vmm.end(1, "").await.unwrap();
}

/// 7, with ids: however often a start is tried, and whoever goes away, it is one bracket with one end.
#[tokio::test]
async fn pairing_with_retries() {
    let agent = Agent::start_with(|config| config.shards = 2);
    let vmm = Vmm::start(&agent).await;
    let mut device = agent.device("gpu").await;
    device.subscribe(vmm.id(), pages(0, 64)).await;
    let mut acks = 0;
    for round in 0..32 {
        let id = format!("round-{round}");
        let mut tries = Vec::new();
        for _ in 0..3 {
            let vmm = vmm.reconnected(&agent).await;
            tries.push(vmm.invalidating(vmm.unmap(pages(round, 1), &id)));
        }
        // One goes away before the round is known to be open, one after.
        tries.remove(0).abort();
        let notice = device.notice().await.number;
        tries.remove(0).abort();
        device.ack(notice).await;
        acks += 1;
        let result = tries.remove(0).await.unwrap().unwrap();
        assert_eq!((result.seq, result.verdict()), (acks, v1::Verdict::Quiesced));
        let again = vmm.invalidate(vmm.unmap(pages(round, 1), &id)).await.unwrap();
        assert_eq!(again.seq, acks);
    }
    assert_eq!((agent.listed_space().await.seq, open_brackets(&agent).await), (32, 32));
    for seq in 1..=32 {
        let id = format!("end-{seq}");
        let ends = [0, 1, 2].map(|_| {
            let (vmm, id) = (vmm.clone(), id.clone());
            tokio::spawn(async move { vmm.end(seq, &id).await })
        });
        for end in ends {
            end.await.unwrap().unwrap();
        }
        assert_eq!(refused(vmm.end(seq, "").await), Reason::RoundUnknown, "it has ended, once");
    }
    assert_eq!((agent.listed_space().await.seq, open_brackets(&agent).await), (32, 0));
    device.settled().await;
    assert!(device.is_silent().await, "one notice a round");
}

#[tokio::test]
async fn an_end_by_id_is_one_end_of_one_bracket() {
    let agent = Agent::start();
    let vmm = Vmm::start(&agent).await;
    for seq in [1, 2] {
        assert_eq!(vmm.invalidate(vmm.unmap(pages(seq, 1), "")).await.unwrap().seq, seq);
    }
    // One that was refused is not remembered: the bracket may come to be.
    assert_eq!(refused(vmm.end(3, "e").await), Reason::RoundUnknown);
    vmm.end(1, "e").await.unwrap();
    vmm.end(1, "e").await.unwrap();
    assert_eq!(refused(vmm.end(2, "e").await), Reason::RequestIdReused);
    assert_eq!(refused(vmm.end(1, "f").await), Reason::RoundUnknown);
    let start = vmm.unmap(pages(3, 1), "e");
    assert_eq!(refused(vmm.invalidate(start).await), Reason::RequestIdReused);
    assert_eq!(open_brackets(&agent).await, 1);
}

/// A host agent with one place for a round, which is taken until the device acks `notice`.
struct Full {
    agent: Agent,
    vmm: Vmm,
    device: Device,
    full: JoinHandle<Result<v1::RoundResult, Status>>,
    notice: u64,
}

async fn full() -> Full {
    let agent = Agent::start_with(|config| config.host.max_rounds_in_flight = 1);
    let vmm = Vmm::start(&agent).await;
    let mut device = agent.device("gpu").await;
    device.subscribe(vmm.id(), pages(0, 8)).await;
    let full = vmm.invalidating(vmm.unmap(pages(1, 1), "full"));
    let notice = device.notice().await.number;
    Full { agent, vmm, device, full, notice }
}

#[tokio::test]
async fn who_waits_for_a_place_may_go_away_and_its_retry_takes_it() {
    let Full { agent, vmm, mut device, full, notice } = full().await;
    let first = vmm.invalidating(vmm.unmap(pages(2, 1), "a"));
    let second = vmm.invalidating(vmm.unmap(pages(2, 1), "a"));
    first.abort();
    drop(first.await);
    device.ack(notice).await;
    full.await.unwrap().unwrap();
    let notice = device.notice().await.number;
    device.ack(notice).await;
    assert_eq!(second.await.unwrap().unwrap().seq, 2);
    assert_eq!(agent.listed_space().await.seq, 2);
}

#[tokio::test]
async fn a_call_that_was_refused_for_want_of_room_is_refused_to_each_try_of_it() {
    let Full { agent, vmm, mut device, full, notice } = full().await;
    // Its caller lost it, and it waits for a place for ever. The caller's next try is refused, and it goes on without a
    // bracket: the one that waits must open none.
    let waits = vmm.reconnected(&agent).await.invalidating(vmm.unmap(pages(2, 1), "a"));
    let hasty = v1::InvalidateRangeStartRequest { deadline_ms: Some(20), ..vmm.unmap(pages(2, 1), "a") };
    assert_eq!(refused(vmm.invalidate(hasty).await), Reason::RoundQuota);
    assert_eq!(refused(waits.await.unwrap()), Reason::RoundQuota);
    device.ack(notice).await;
    full.await.unwrap().unwrap();
    // Nor one that arrives when there is room.
    assert_eq!(refused(vmm.invalidate(vmm.unmap(pages(2, 1), "a")).await), Reason::RoundQuota);
    assert_eq!((agent.listed_space().await.seq, open_brackets(&agent).await), (1, 1));
    assert!(device.is_silent().await);
    // By an id of its own it is a call of its own.
    let anew = vmm.invalidating(vmm.unmap(pages(2, 1), "b"));
    let notice = device.notice().await.number;
    device.ack(notice).await;
    assert_eq!(anew.await.unwrap().unwrap().seq, 2);
}

/// It was true when its first try was made; by now the page may be somebody else's.
#[tokio::test]
async fn a_change_pte_that_waits_beside_another_try_of_it_is_an_invalidation() {
    let Full { agent: _agent, vmm, mut device, full, notice } = full().await;
    let changing = || {
        let vmm = vmm.clone();
        tokio::spawn(async move { change(&vmm, 2, 5, "a").await })
    };
    let tries = [changing(), changing()];
    device.settled().await;
    device.ack(notice).await;
    full.await.unwrap().unwrap();
    let notice = device.notice().await;
    assert_eq!((notice.kind(), notice.change_pte), (v1::NoticeKind::Invalidate, None));
    device.ack(notice.number).await;
    for one in tries {
        assert_eq!(one.await.unwrap().unwrap().seq, 2);
    }
}

#[tokio::test]
async fn brackets_that_nobody_comes_back_for_are_bounded_and_end_with_the_release() {
    let agent = Agent::start_with(|config| config.host.max_rounds_in_flight = 1);
    let vmm = Vmm::start(&agent).await;
    for id in ["a", "b"] {
        let lost = vmm.reconnected(&agent).await;
        lost.invalidate(lost.unmap(pages(1, 1), id)).await.unwrap();
    }
    let third = vmm.unmap(pages(1, 1), "c");
    assert_eq!(refused(vmm.invalidate(third.clone()).await), Reason::RoundQuota);
    // The retry of one that is open is not one more.
    assert_eq!(vmm.invalidate(vmm.unmap(pages(1, 1), "a")).await.unwrap().seq, 1);
    vmm.end(1, "").await.unwrap();
    // What was refused stays so; by another id it is another call.
    assert_eq!(refused(vmm.invalidate(third).await), Reason::RoundQuota);
    assert_eq!(vmm.invalidate(vmm.unmap(pages(1, 1), "d")).await.unwrap().seq, 3);
    assert_eq!(vmm.release("").await.unwrap().verdict(), v1::Verdict::Quiesced);
}

async fn page(vmm: &Vmm, page: u64, request_id: &str) -> Result<v1::RoundResult, Status> {
    let request = v1::InvalidatePageRequest {
        address_space_id: vmm.space,
        address: page * 4096,
        cause: v1::Cause::Unmap.into(),
        request_id: request_id.to_owned(),
        ..Default::default()
    };
    Ok(soon(vmm.calls.clone().invalidate_page(request)).await?.into_inner().result.unwrap())
}

async fn change(vmm: &Vmm, page: u64, frame: u64, request_id: &str) -> Result<v1::RoundResult, Status> {
    let request = v1::ChangePteRequest {
        address_space_id: vmm.space,
        translation: Some(translation(page, frame, v1::Access::Read)),
        request_id: request_id.to_owned(),
        ..Default::default()
    };
    Ok(soon(vmm.calls.clone().change_pte(request)).await?.into_inner().result.unwrap())
}

async fn young(vmm: &Vmm, page: u64, request_id: &str) -> Result<(u64, bool), Status> {
    let request = v1::ClearYoungRequest {
        address_space_id: vmm.space,
        range: Some(wire(pages(page, 1))),
        request_id: request_id.to_owned(),
        ..Default::default()
    };
    let answer = soon(vmm.calls.clone().clear_young(request)).await?.into_inner();
    Ok((answer.result.unwrap().seq, answer.young))
}

async fn flush_young(vmm: &Vmm, page: u64, request_id: &str) -> Result<(u64, bool), Status> {
    let request = v1::ClearFlushYoungRequest {
        address_space_id: vmm.space,
        range: Some(wire(pages(page, 1))),
        request_id: request_id.to_owned(),
        ..Default::default()
    };
    let answer = soon(vmm.calls.clone().clear_flush_young(request)).await?.into_inner();
    Ok((answer.result.unwrap().seq, answer.young))
}

#[tokio::test]
async fn each_method_is_done_once_for_an_id() {
    let agent = Agent::start();
    let vmm = Vmm::start(&agent).await;
    for _ in 0..3 {
        assert_eq!(page(&vmm, 1, "page").await.unwrap().seq, 1);
        assert_eq!(change(&vmm, 1, 5, "change").await.unwrap().seq, 2);
        assert_eq!(young(&vmm, 1, "young").await.unwrap(), (3, false));
        assert_eq!(flush_young(&vmm, 1, "flush").await.unwrap(), (4, false));
    }
    assert_eq!(refused(page(&vmm, 2, "page").await), Reason::RequestIdReused);
    assert_eq!(refused(change(&vmm, 1, 6, "change").await), Reason::RequestIdReused);
    assert_eq!(refused(young(&vmm, 2, "young").await), Reason::RequestIdReused);
    assert_eq!(refused(flush_young(&vmm, 1, "young").await), Reason::RequestIdReused);
    let listed = agent.listed_space().await;
    assert_eq!((listed.seq, listed.open_brackets), (4, 0));
}

/// The lost answer of a query that took bits away would lose them; its retry has them.
#[tokio::test]
async fn young_bits_are_taken_once_and_told_as_often_as_it_is_asked() {
    let agent = Agent::start();
    let vmm = Vmm::start(&agent).await;
    let mut device = agent.device("gpu").await;
    device.subscribe(vmm.id(), pages(1, 1)).await;
    let used = v1::Young { address_space_id: vmm.space, ranges: vec![wire(pages(1, 1))] };
    device.ask(Ask::Young(used.clone())).await;
    device.settled().await;
    let is_young = || async {
        let test = v1::TestYoungRequest { address_space_id: vmm.space, range: Some(wire(pages(1, 1))) };
        vmm.calls.clone().test_young(test).await.unwrap().into_inner().young
    };
    assert!(is_young().await);
    let asking = {
        let vmm = vmm.clone();
        tokio::spawn(async move { young(&vmm, 1, "y").await })
    };
    let notice = device.notice().await.number;
    device.ack(notice).await;
    assert_eq!(asking.await.unwrap().unwrap(), (1, true));
    assert!(!is_young().await);
    assert_eq!(young(&vmm, 1, "y").await.unwrap(), (1, true));
    // What is used after the query belongs to the next one.
    device.ask(Ask::Young(used)).await;
    device.settled().await;
    assert_eq!(young(&vmm, 1, "y").await.unwrap(), (1, true));
    assert!(is_young().await, "the retry of an old query takes nothing away");
}

#[tokio::test]
async fn a_release_is_done_once_and_told_after_the_address_space_has_gone() {
    let agent = Agent::start();
    let vmm = Vmm::start(&agent).await;
    let mut device = agent.device("gpu").await;
    device.subscribe(vmm.id(), pages(1, 1)).await;
    let releasing = |vmm: Vmm, id: &'static str| tokio::spawn(async move { vmm.release(id).await });
    let lost = vmm.reconnected(&agent).await;
    let first = releasing(lost.clone(), "bye");
    let notice = device.notice().await.number;
    first.abort();
    drop((first.await, lost));
    let second = releasing(vmm.clone(), "bye");
    assert_eq!(refused(vmm.release("other").await), Reason::AddressSpaceReleased);
    assert_eq!(refused(vmm.release("").await), Reason::AddressSpaceReleased);
    assert!(!second.is_finished(), "the device has not stopped");
    device.ack(notice).await;
    let result = second.await.unwrap().unwrap();
    assert_eq!((result.verdict(), result.targets.len()), (v1::Verdict::Quiesced, 1));
    let again = vmm.release("bye").await.unwrap();
    assert_eq!((again.seq, again.targets), (result.seq, result.targets));
    assert_eq!(refused(vmm.release("other").await), Reason::AddressSpaceUnknown);
    let start = vmm.unmap(pages(1, 1), "bye");
    assert_eq!(refused(vmm.invalidate(start).await), Reason::AddressSpaceUnknown);
}

#[tokio::test]
async fn a_release_by_id_of_what_another_releases_is_refused_and_not_remembered() {
    let agent = Agent::start();
    let vmm = Vmm::start(&agent).await;
    let mut device = agent.device("gpu").await;
    device.subscribe(vmm.id(), pages(1, 1)).await;
    let other = vmm.clone();
    let first = tokio::spawn(async move { other.release("").await });
    let notice = device.notice().await.number;
    for _ in 0..2 {
        assert_eq!(refused(vmm.release("bye").await), Reason::AddressSpaceReleased);
    }
    device.ack(notice).await;
    first.await.unwrap().unwrap();
    assert_eq!(refused(vmm.release("bye").await), Reason::AddressSpaceUnknown);
}
