//! Faults that the source answers, rightly, wrongly, late and never.

use std::time::Duration;

use shootdown_proto::error::Reason;
use shootdown_proto::v1;
use shootdown_proto::v1::notifier_service_client::NotifierServiceClient;
use shootdown_proto::v1::serve_faults_request::Message as Answer;
use shootdown_proto::v1::session_request::Message as Ask;

use super::{Faults, Vmm, refused, translation};
use crate::common::{Agent, Device, pages, soon, until, wire};

/// A host agent, a program with an address space, and a device that subscribes to it.
struct Scene {
    agent: Agent,
    vmm: Vmm,
    device: Device,
}

impl Scene {
    async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    async fn start_with(change: impl FnOnce(&mut shootdown_server::config::Config)) -> Self {
        let agent = Agent::start_with(change);
        let vmm = Vmm::start(&agent).await;
        let mut device = agent.device("gpu").await;
        device.subscribe(vmm.id(), pages(0, 4096)).await;
        Self { agent, vmm, device }
    }

    async fn fault(&mut self, first: u64, count: u64, access: v1::Access) {
        let request_id = self.device.request();
        self.device
            .ask(Ask::Fault(v1::Fault {
                request_id,
                address_space_id: self.vmm.space,
                range: Some(wire(pages(first, count))),
                access: access.into(),
                wants_data: false,
            }))
            .await;
    }

    async fn refusal(&mut self) -> Reason {
        let error = self.device.error().await;
        assert!(!error.fatal, "{error:?}");
        error.reason()
    }

    /// A source that answers as it should, on a stream of its own.
    async fn unharmed(&mut self) {
        let mut faults = self.vmm.serve().await.expect("the stream before is over");
        self.fault(7, 1, v1::Access::Write).await;
        let asked = faults.asked().await;
        faults.grant(&asked, 0).await;
        assert_eq!(self.device.grant().await.translations[0].frame, 7);
    }
}

#[tokio::test]
async fn faults_are_served_only_while_a_stream_is_open_and_by_one() {
    let mut scene = Scene::start().await;
    scene.fault(1, 1, v1::Access::Read).await;
    assert_eq!(scene.refusal().await, Reason::FaultNotServed);
    let mut faults = scene.vmm.serve().await.unwrap();
    let beside = scene.vmm.reconnected(&scene.agent).await;
    assert_eq!(refused(beside.serve().await.map(drop)), Reason::FaultsAlreadyServed);
    scene.fault(1, 1, v1::Access::Read).await;
    let asked = faults.asked().await;
    assert_ne!(asked.fault_id, 0);
    faults.grant(&asked, 0).await;
    scene.device.grant().await;
    // Closed by the source: the host agent closes its half, and another may open.
    let Faults { answers, mut questions } = faults;
    drop(answers);
    assert!(soon(questions.message()).await.unwrap().is_none());
    scene.unharmed().await;
}

#[tokio::test]
async fn a_stream_begins_with_an_address_space_of_this_source() {
    let scene = Scene::start().await;
    let open = |address_space_id| Answer::Open(v1::ServeFaultsOpen { address_space_id });
    let api = scene.agent.space().get();
    for (first, expected) in [
        (open(0), Reason::FieldInvalid),
        (open(4711), Reason::AddressSpaceUnknown),
        (open(api), Reason::AddressSpaceNotOwned),
        (Answer::Translated(v1::FaultTranslated { fault_id: 1, translations: vec![] }), Reason::FieldInvalid),
        (Answer::Declined(v1::FaultDeclined::default()), Reason::FieldInvalid),
    ] {
        assert_eq!(refused(Faults::begin(&scene.vmm, first).await.map(drop)), expected);
    }
}

#[tokio::test]
async fn a_caller_without_leave_serves_no_faults() {
    // The tests' own user is not in the list.
    let agent = Agent::start_with(|config| config.allow_uids = vec![4_000_000_000]);
    let calls = NotifierServiceClient::new(agent.channel("source.sock").await);
    let vmm = Vmm { calls, space: agent.space().get() };
    assert_eq!(refused(vmm.serve().await.map(drop)), Reason::PermissionDenied);
}

#[tokio::test]
async fn a_fault_that_the_source_declines_is_refused_by_its_reason() {
    let mut scene = Scene::start().await;
    let mut faults = scene.vmm.serve().await.unwrap();
    for declined in [Reason::FaultUnmapped, Reason::FaultAccess, Reason::OutOfMemory] {
        scene.fault(3, 2, v1::Access::Write).await;
        let asked = faults.asked().await;
        faults.decline(&asked, declined.into(), 4 * 4096).await;
        assert_eq!(scene.refusal().await, declined);
    }
    // Where there is no memory no address is to blame.
    scene.fault(3, 2, v1::Access::Write).await;
    let asked = faults.asked().await;
    faults.decline(&asked, Reason::OutOfMemory.into(), 0).await;
    assert_eq!(scene.refusal().await, Reason::OutOfMemory);
}

/// What a source may answer to "pages 3 and 4, to be written" that is no answer.
fn wrong_answers() -> Vec<(&'static str, Vec<v1::Translation>)> {
    use v1::Access::{Read, Write};
    let page = |page| translation(page, page, Write);
    let range = |range| v1::Translation { range, frame: 3, access: Write.into() };
    vec![
        ("nothing", vec![]),
        ("too few", vec![page(3)]),
        ("too many", vec![page(3), page(4), page(5)]),
        ("the first twice", vec![page(3), page(3)]),
        ("backwards", vec![page(4), page(3)]),
        ("beside it", vec![page(2), page(3)]),
        ("elsewhere", vec![page(4000), page(4001)]),
        ("a hole", vec![page(3), page(5)]),
        ("read-only", vec![page(3), translation(4, 4, Read)]),
        ("one page of two", vec![range(Some(wire(pages(3, 2))))]),
        ("a huge page over it", vec![range(Some(wire(pages(0, 512)))), page(4)]),
        ("everything", vec![range(Some(v1::AddressRange { start: 0, end: 0, all: true })), page(4)]),
        ("an empty range", vec![range(Some(v1::AddressRange::default())), page(4)]),
        ("no range", vec![range(None), page(4)]),
        ("no access", vec![v1::Translation { access: 0, ..page(3) }, page(4)]),
        ("more than a fault may have", (3..600).map(page).collect()),
    ]
}

#[tokio::test]
async fn a_wrong_answer_is_never_granted_and_ends_the_stream() {
    let mut scene = Scene::start().await;
    for (what, answer) in wrong_answers() {
        let mut faults = scene.vmm.serve().await.unwrap();
        scene.fault(3, 2, v1::Access::Write).await;
        let asked = faults.asked().await;
        faults.answer(&asked, answer).await;
        assert_eq!(scene.refusal().await, Reason::FaultNotServed, "{what}");
        let last_word = faults.last_word().await;
        assert!(
            matches!(last_word, Some(Reason::FieldInvalid | Reason::RangeInvalid)),
            "{what}: {last_word:?}"
        );
    }
    scene.unharmed().await;
}

#[tokio::test]
async fn an_answer_to_nothing_ends_the_stream() {
    let mut scene = Scene::start().await;
    let space = scene.vmm.space;
    let unmapped = Reason::FaultUnmapped.into();
    let decline =
        |fault_id, reason, address| Answer::Declined(v1::FaultDeclined { fault_id, reason, address });
    // Each comes beside an open question, number 1, over pages 3 and 4.
    for (said, expected) in [
        (Some(Answer::Open(v1::ServeFaultsOpen { address_space_id: space })), Reason::FieldInvalid),
        (Some(decline(2, unmapped, 3 * 4096)), Reason::FieldInvalid),
        (Some(decline(0, unmapped, 3 * 4096)), Reason::FieldInvalid),
        (Some(decline(1, unmapped, 5 * 4096)), Reason::FieldInvalid),
        (Some(decline(1, unmapped, 3 * 4096 - 1)), Reason::FieldInvalid),
        (Some(decline(1, 0, 3 * 4096)), Reason::FieldInvalid),
        (Some(decline(1, Reason::FaultContended.into(), 3 * 4096)), Reason::FieldInvalid),
        (Some(decline(1, -1, 3 * 4096)), Reason::FieldInvalid),
        (None, Reason::MessageUnknown),
    ] {
        let mut faults = scene.vmm.serve().await.unwrap();
        scene.fault(3, 2, v1::Access::Read).await;
        assert_eq!(faults.asked().await.fault_id, 1);
        soon(faults.answers.send(v1::ServeFaultsRequest { message: said.clone() })).await.unwrap();
        assert_eq!(faults.last_word().await, Some(expected), "{said:?}");
        assert_eq!(scene.refusal().await, Reason::FaultNotServed, "{said:?}");
    }
    scene.unharmed().await;
}

#[tokio::test]
async fn a_question_is_answered_once() {
    let mut scene = Scene::start().await;
    let mut faults = scene.vmm.serve().await.unwrap();
    scene.fault(3, 1, v1::Access::Read).await;
    let asked = faults.asked().await;
    faults.grant(&asked, 0).await;
    faults.grant(&asked, 5).await;
    assert_eq!(scene.device.grant().await.translations[0].frame, 3);
    assert_eq!(faults.last_word().await, Some(Reason::FieldInvalid));
    scene.unharmed().await;
}

/// 3: an answer that an invalidation overtook is thrown away, and asked for again.
#[tokio::test]
async fn no_grant_in_window_with_a_source_that_is_slow() {
    let mut scene = Scene::start().await;
    let mut faults = scene.vmm.serve().await.unwrap();
    for offset in [100, 200, 300] {
        scene.fault(3, 1, v1::Access::Read).await;
        let before = faults.asked().await;
        // A whole bracket passes while the source works out its answer.
        let round = scene.vmm.invalidating(scene.vmm.unmap(pages(3, 1), ""));
        let notice = scene.device.notice().await.number;
        scene.device.ack(notice).await;
        let result = round.await.unwrap().unwrap();
        // Answered inside of the bracket, or after it: it is as stale.
        if offset == 100 {
            faults.grant(&before, 0).await;
            scene.device.settled().await;
            assert!(faults.is_silent().await && scene.device.is_silent().await, "held");
        }
        scene.vmm.end(result.seq, "").await.unwrap();
        if offset != 100 {
            faults.grant(&before, 0).await;
        }
        let after = faults.asked().await;
        assert_ne!(after.fault_id, before.fault_id);
        assert!(scene.device.is_silent().await);
        faults.grant(&after, offset).await;
        let granted = scene.device.grant().await;
        assert_eq!((granted.translations[0].frame, granted.seq), (3 + offset, result.seq));
    }
}

#[tokio::test]
async fn a_refusal_that_an_invalidation_overtook_is_asked_for_again() {
    let mut scene = Scene::start().await;
    let mut faults = scene.vmm.serve().await.unwrap();
    for declined in [Reason::FaultUnmapped, Reason::FaultAccess] {
        scene.fault(3, 1, v1::Access::Write).await;
        let before = faults.asked().await;
        let round = scene.vmm.invalidating(scene.vmm.unmap(pages(3, 1), ""));
        let notice = scene.device.notice().await.number;
        scene.device.ack(notice).await;
        let seq = round.await.unwrap().unwrap().seq;
        // The page is on its way: there is no entry at the moment.
        faults.decline(&before, declined.into(), 3 * 4096).await;
        scene.device.settled().await;
        assert!(scene.device.is_silent().await, "neither granted nor refused");
        scene.vmm.end(seq, "").await.unwrap();
        let after = faults.asked().await;
        faults.grant(&after, 100).await;
        assert_eq!(scene.device.grant().await.translations[0].frame, 103);
    }
}

#[tokio::test]
async fn a_source_that_is_gone_is_not_waited_for() {
    let mut scene = Scene::start().await;
    let gone = scene.vmm.reconnected(&scene.agent).await;
    let mut faults = gone.serve().await.unwrap();
    for page in 0..3 {
        scene.fault(page, 1, v1::Access::Read).await;
        faults.asked().await;
    }
    // Its process dies: all of its connection with it.
    drop((faults, gone));
    for _ in 0..3 {
        assert_eq!(scene.refusal().await, Reason::FaultNotServed);
    }
    scene.unharmed().await;
}

#[tokio::test]
async fn a_source_that_never_answers_holds_nobody_for_longer_than_the_limit() {
    let mut scene =
        Scene::start_with(|config| config.host.source_fault_timeout = Duration::from_millis(50)).await;
    let mut faults = scene.vmm.serve().await.unwrap();
    scene.fault(3, 1, v1::Access::Read).await;
    let late = faults.asked().await;
    assert_eq!(scene.refusal().await, Reason::FaultNotServed);
    // Its answer is late, not wrong: the stream goes on, and nothing is granted by it.
    faults.grant(&late, 0).await;
    scene.device.settled().await;
    assert!(scene.device.is_silent().await);
    assert!(faults.is_silent().await, "the stream goes on");
}

#[tokio::test]
async fn a_session_that_is_over_leaves_no_question_that_its_answer_could_break() {
    let mut scene = Scene::start().await;
    let mut faults = scene.vmm.serve().await.unwrap();
    scene.fault(3, 1, v1::Access::Read).await;
    let asked = faults.asked().await;
    scene.device.ask(Ask::Leave(v1::Leave {})).await;
    assert!(scene.device.next().await.unwrap().is_none());
    faults.grant(&asked, 0).await;
    let mut next = scene.agent.device("next").await;
    next.subscribe(scene.vmm.id(), pages(0, 16)).await;
    next.start_fault(scene.vmm.id(), pages(4, 1)).await;
    let asked = faults.asked().await;
    faults.grant(&asked, 0).await;
    next.grant().await;
}

#[tokio::test]
async fn questions_are_bounded_and_what_is_beyond_waits_for_a_place() {
    const PLACES: u64 = 1024;
    let mut scene = Scene::start_with(|config| config.host.session.max_faults_in_flight = 4096).await;
    let mut faults = scene.vmm.serve().await.unwrap();
    for page in 0..PLACES + 2 {
        scene.fault(page, 1, v1::Access::Read).await;
    }
    let mut asked = Vec::new();
    for _ in 0..PLACES {
        asked.push(faults.asked().await);
    }
    scene.device.settled().await;
    assert!(faults.is_silent().await, "no place is left");
    faults.grant(&asked[0], 0).await;
    scene.device.grant().await;
    asked.push(faults.asked().await);
    assert!(faults.is_silent().await);
    for asked in &asked[1..] {
        faults.grant(asked, 0).await;
        scene.device.grant().await;
    }
    let last = faults.asked().await;
    faults.grant(&last, 0).await;
    scene.device.grant().await;
}

#[tokio::test]
async fn the_bytes_of_such_an_address_space_are_not_to_be_had_here() {
    let mut scene = Scene::start().await;
    let mut faults = scene.vmm.serve().await.unwrap();
    let request_id = scene.device.request();
    let fault = v1::Fault {
        request_id,
        address_space_id: scene.vmm.space,
        range: Some(wire(pages(3, 1))),
        access: v1::Access::Read.into(),
        wants_data: true,
    };
    scene.device.ask(Ask::Fault(fault)).await;
    let asked = faults.asked().await;
    faults.grant(&asked, 0).await;
    let error = scene.device.error().await;
    assert_eq!((error.reason(), error.request_id), (Reason::FaultNotServed, request_id));
    assert!(error.message.contains("without wants_data"), "{}", error.message);
}

#[tokio::test]
async fn a_message_that_is_too_large_ends_the_stream_by_reason() {
    let mut scene = Scene::start().await;
    let mut faults = scene.vmm.serve().await.unwrap();
    scene.fault(3, 1, v1::Access::Read).await;
    let asked = faults.asked().await;
    faults.answer(&asked, vec![translation(u64::MAX >> 13, u64::MAX, v1::Access::Write); 200_000]).await;
    assert_eq!(faults.last_word().await, Some(Reason::MessageTooLarge));
    assert_eq!(scene.refusal().await, Reason::FaultNotServed);
    scene.unharmed().await;
}

#[tokio::test]
async fn a_host_agent_that_stops_does_not_wait_for_a_source_that_serves() {
    let mut scene = Scene::start().await;
    let mut faults = scene.vmm.serve().await.unwrap();
    scene.fault(3, 1, v1::Access::Read).await;
    faults.asked().await;
    let running = scene.agent.running.take().unwrap();
    let stopping = tokio::spawn(running.shutdown());
    assert_eq!(faults.last_word().await, Some(Reason::Draining));
    // The device is told to leave, and that its fault has to go to the successor.
    let mut refused = None;
    while refused.is_none() {
        match scene.device.say().await {
            v1::session_response::Message::Drain(_) => {}
            v1::session_response::Message::Error(error) => refused = Some(error.reason()),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(refused, Some(Reason::Draining));
    scene.device.ask(Ask::Leave(v1::Leave {})).await;
    soon(stopping).await.unwrap();
}

/// Waiting for a source takes nothing from whoever does not need it.
#[tokio::test]
async fn rounds_go_on_while_a_source_does_not_answer() {
    let mut scene = Scene::start().await;
    let mut faults = scene.vmm.serve().await.unwrap();
    for page in 0..8 {
        scene.fault(page, 1, v1::Access::Read).await;
        faults.asked().await;
    }
    let round = scene.vmm.invalidating(scene.vmm.unmap(pages(0, 8), ""));
    let notice = scene.device.notice().await.number;
    scene.device.ack(notice).await;
    assert_eq!(round.await.unwrap().unwrap().verdict(), v1::Verdict::Quiesced);
    let host = scene.agent.host().clone();
    until(|| host.rounds_in_flight() == 0).await;
}
