//! Calls that are tried again after a planned end: they have the outcome that they had.

use shootdown_proto::error::Reason;
use shootdown_proto::v1;
use shootdown_proto::v1::notifier_service_client::NotifierServiceClient;
use tonic::Status;
use tonic::transport::Channel;

use crate::common::{pages, soon, wire};
use crate::place::{Place, register};

/// The first page, by a call that may be tried again.
fn start_by_id(space: u64, request_id: &str) -> v1::InvalidateRangeStartRequest {
    v1::InvalidateRangeStartRequest {
        address_space_id: space,
        range: Some(wire(pages(0, 1))),
        cause: v1::Cause::Unmap.into(),
        request_id: request_id.to_owned(),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_call_whose_answer_went_with_a_planned_end_has_its_outcome_and_counts_as_dirty() {
    let place = Place::new();
    let first = place.start(&["--lease", "60s"]);
    let mut notifier = place.notifier().await;
    let space = register(&mut notifier).await;
    let started = notifier.invalidate_range_start(start_by_id(space, "start-1")).await.unwrap().into_inner();
    let started = started.result.unwrap();
    assert!(!started.dirty, "nobody was asked");
    first.end_as_planned().await;

    let second = place.start(&["--lease", "60s"]);
    let mut notifier = place.notifier().await;
    let again = notifier.invalidate_range_start(start_by_id(space, "start-1")).await.unwrap().into_inner();
    let again = again.result.unwrap();
    assert_eq!((again.seq, again.verdict()), (started.seq, v1::Verdict::Quiesced), "no second bracket");
    assert!(again.dirty, "what its targets told is forgotten");
    let end = v1::InvalidateRangeEndRequest {
        address_space_id: space,
        seq: started.seq,
        request_id: "end-1".to_owned(),
        host_incarnation: started.host_incarnation,
    };
    notifier.invalidate_range_end(end.clone()).await.unwrap();
    second.end_as_planned().await;

    let _third = place.start(&["--lease", "60s"]);
    place.notifier().await.invalidate_range_end(end).await.expect("it was ended, and is told so");
    assert_eq!(listed(&place).await.open_brackets, 0);
}

#[tokio::test]
async fn a_registration_and_a_release_whose_answers_went_with_a_planned_end_have_their_outcome() {
    let place = Place::new();
    let by_id = |name: &str| v1::RegisterAddressSpaceRequest {
        name: name.to_owned(),
        request_id: format!("register-{name}"),
        ..Default::default()
    };
    let release = |space| v1::ReleaseAddressSpaceRequest {
        address_space_id: space,
        request_id: format!("release-{space}"),
    };
    let first = place.start(&[]);
    let mut notifier = place.notifier().await;
    let kept = notifier.register_address_space(by_id("kept")).await.unwrap().into_inner().address_space_id;
    let gone = notifier.register_address_space(by_id("gone")).await.unwrap().into_inner().address_space_id;
    let released = notifier.release_address_space(release(gone)).await.unwrap().into_inner().result.unwrap();
    first.end_as_planned().await;

    // And the run after the next knows as much.
    for _ in 0..2 {
        let next = place.start(&[]);
        let mut notifier = place.notifier().await;
        let again = notifier.register_address_space(by_id("kept")).await.unwrap().into_inner();
        assert_eq!(again.address_space_id, kept);
        let again = notifier.release_address_space(release(gone)).await.unwrap().into_inner().result.unwrap();
        assert_eq!((again.verdict(), again.seq), (released.verdict(), released.seq));
        assert!(again.dirty, "what its targets told is forgotten");
        let another = v1::ReleaseAddressSpaceRequest { request_id: "another".to_owned(), ..release(gone) };
        let unknown = notifier.release_address_space(another).await.unwrap_err();
        assert_eq!(Reason::of_status(&unknown), Some(Reason::AddressSpaceUnknown));
        next.end_as_planned().await;
    }

    // Under the name that was released another may begin, and end.
    let _last = place.start(&[]);
    let mut notifier = place.notifier().await;
    let back = v1::RegisterAddressSpaceRequest { address_space_id: gone, ..Default::default() };
    notifier.register_address_space(back).await.unwrap();
    let another = v1::ReleaseAddressSpaceRequest { request_id: "another".to_owned(), ..release(gone) };
    notifier.release_address_space(another).await.unwrap();
}

/// What a call is told.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Told {
    call: &'static str,
    verdict: v1::Verdict,
    seq: u64,
    young: bool,
}

type Notifier = NotifierServiceClient<Channel>;

fn told(call: &'static str, result: Option<v1::RoundResult>, young: bool) -> Told {
    let result = result.unwrap();
    Told { call, verdict: result.verdict(), seq: result.seq, young }
}

async fn start(notifier: &mut Notifier, request: v1::InvalidateRangeStartRequest) -> Result<Told, Status> {
    let answer = soon(notifier.invalidate_range_start(request)).await?.into_inner();
    Ok(told("start", answer.result, false))
}

/// One call of each other method, with an id, over pages that nobody has subscribed to.
async fn each_method(notifier: &mut Notifier, space: u64) -> Vec<Told> {
    let range = Some(wire(pages(100, 1)));
    let page = v1::InvalidatePageRequest {
        address_space_id: space,
        address: 100 * 4096,
        cause: v1::Cause::Clear.into(),
        owner: 3,
        request_id: "page".to_owned(),
        ..Default::default()
    };
    let access = v1::Access::Read.into();
    let change = v1::ChangePteRequest {
        address_space_id: space,
        translation: Some(v1::Translation { range, frame: 7, access }),
        request_id: "change".to_owned(),
        ..Default::default()
    };
    let (address_space_id, request_id) = (space, "clear-flush".to_owned());
    let flush = v1::ClearFlushYoungRequest { address_space_id, range, request_id, ..Default::default() };
    let request_id = "clear".to_owned();
    let clear = v1::ClearYoungRequest { address_space_id, range, request_id, ..Default::default() };
    let page = soon(notifier.invalidate_page(page)).await.unwrap().into_inner();
    let change = soon(notifier.change_pte(change)).await.unwrap().into_inner();
    let flush = soon(notifier.clear_flush_young(flush)).await.unwrap().into_inner();
    let clear = soon(notifier.clear_young(clear)).await.unwrap().into_inner();
    vec![
        told("page", page.result, false),
        told("change", change.result, false),
        told("clear-flush", flush.result, flush.young),
        told("clear", clear.result, clear.young),
    ]
}

async fn listed(place: &Place) -> v1::AddressSpace {
    place.address_spaces().await.remove(0)
}

#[tokio::test]
async fn each_method_and_each_outcome_is_the_same_after_planned_restarts() {
    let place = Place::new();
    let few = ["--lease", "60s", "--max-rounds-in-flight", "1"];
    let first = place.start(&few);
    let mut notifier = place.notifier().await;
    let space = register(&mut notifier).await;
    let (mut device, _) = place.subscribed("old", space).await;
    let blocked = v1::InvalidateRangeStartRequest { non_blockable: true, ..start_by_id(space, "blocked") };
    let beyond = Some(wire(pages(100, 1)));
    let apart = |id| v1::InvalidateRangeStartRequest { range: beyond, ..start_by_id(space, id) };

    let would_block = start(&mut notifier, blocked.clone()).await.unwrap();
    assert_eq!((would_block.verdict, would_block.seq), (v1::Verdict::WouldBlock, 0));
    let methods = each_method(&mut notifier, space).await;
    assert_eq!(methods.iter().map(|told| told.seq).collect::<Vec<_>>(), [1, 2, 3, 4]);
    let opened =
        [start(&mut notifier, apart("a")).await.unwrap(), start(&mut notifier, apart("b")).await.unwrap()];
    assert_eq!([opened[0].seq, opened[1].seq], [5, 6]);
    let refused = start(&mut notifier, apart("refused")).await.unwrap_err();
    assert_eq!(Reason::of_status(&refused), Some(Reason::RoundQuota));
    let end = |seq| v1::InvalidateRangeEndRequest { address_space_id: space, seq, ..Default::default() };
    for seq in [5, 6] {
        notifier.invalidate_range_end(end(seq)).await.unwrap();
    }
    assert!(device.is_silent().await, "nobody asked it");
    first.end_as_planned().await;

    for _ in 0..2 {
        let next = place.start(&few);
        let mut notifier = place.notifier().await;
        // The bracket that it opened has ended. Another try opens none, of which nobody would know.
        for opened in &opened {
            let id = if opened.seq == 5 { "a" } else { "b" };
            assert_eq!(start(&mut notifier, apart(id)).await.unwrap(), *opened);
        }
        assert_eq!(start(&mut notifier, blocked.clone()).await.unwrap(), would_block);
        let again = start(&mut notifier, apart("refused")).await.unwrap_err();
        assert_eq!((again.code(), again.message()), (refused.code(), refused.message()));
        // What was reported of young bits is forgotten: too much is young, never too little.
        let known = |told: &Told| Told { young: told.call.starts_with("clear"), ..told.clone() };
        let methods: Vec<_> = methods.iter().map(known).collect();
        assert_eq!(each_method(&mut notifier, space).await, methods);
        let other = v1::InvalidateRangeStartRequest { owner: 9, ..apart("a") };
        let other = start(&mut notifier, other).await.unwrap_err();
        assert_eq!(Reason::of_status(&other), Some(Reason::RequestIdReused));
        let space = listed(&place).await;
        assert_eq!((space.seq, space.open_brackets), (6, 0));
        next.end_as_planned().await;
    }
}

#[tokio::test]
async fn a_late_try_of_a_release_does_not_release_who_has_the_name_now() {
    let place = Place::new();
    let release = |space, id: &str| v1::ReleaseAddressSpaceRequest {
        address_space_id: space,
        request_id: id.to_owned(),
    };
    let first = place.start(&[]);
    let space = register(&mut place.notifier().await).await;
    first.end_as_planned().await;

    let second = place.start(&[]);
    let mut notifier = place.notifier().await;
    let released = notifier.release_address_space(release(space, "first")).await.unwrap().into_inner();
    let back = v1::RegisterAddressSpaceRequest { address_space_id: space, ..Default::default() };
    notifier.register_address_space(back).await.unwrap();
    let late = notifier.release_address_space(release(space, "first")).await.unwrap().into_inner();
    assert_eq!(late.result.unwrap().seq, released.result.clone().unwrap().seq);
    assert_eq!(listed(&place).await.address_space_id, space);
    second.end_as_planned().await;

    // Nor in the next run, which does not take it for released either.
    let _third = place.start(&[]);
    let mut notifier = place.notifier().await;
    let late = notifier.release_address_space(release(space, "first")).await.unwrap().into_inner();
    assert_eq!(late.result.unwrap().seq, released.result.unwrap().seq);
    assert_eq!(listed(&place).await.address_space_id, space);
    notifier.release_address_space(release(space, "second")).await.unwrap();
}

#[tokio::test]
async fn a_late_try_of_a_registration_makes_no_address_space_after_a_planned_end() {
    let place = Place::new();
    let by_id = |name: &str| v1::RegisterAddressSpaceRequest {
        name: name.to_owned(),
        request_id: format!("register-{name}"),
        ..Default::default()
    };
    let one = ["--max-address-spaces", "1"];
    let first = place.start(&one);
    let mut notifier = place.notifier().await;
    let gone = notifier.register_address_space(by_id("gone")).await.unwrap().into_inner().address_space_id;
    let full = notifier.register_address_space(by_id("full")).await.unwrap_err();
    assert_eq!(Reason::of_status(&full), Some(Reason::AddressSpaceQuota));
    let release = v1::ReleaseAddressSpaceRequest { address_space_id: gone, ..Default::default() };
    notifier.release_address_space(release).await.unwrap();
    let kept = notifier.register_address_space(by_id("kept")).await.unwrap().into_inner().address_space_id;
    first.end_as_planned().await;

    // Taken back by another call, whose name it is as well.
    let second = place.start(&one);
    let mut notifier = place.notifier().await;
    let back = v1::RegisterAddressSpaceRequest { address_space_id: kept, ..by_id("back") };
    notifier.register_address_space(back.clone()).await.unwrap();
    second.end_as_planned().await;

    let _third = place.start(&["--max-address-spaces", "9"]);
    let mut notifier = place.notifier().await;
    for (late, of) in [(by_id("gone"), gone), (by_id("kept"), kept), (back, kept)] {
        let again = notifier.register_address_space(late).await.unwrap().into_inner();
        assert_eq!(again.address_space_id, of);
    }
    let again = notifier.register_address_space(by_id("full")).await.unwrap_err();
    assert_eq!((again.code(), again.message()), (full.code(), full.message()), "there is room now");
    assert_eq!(place.address_spaces().await.len(), 1);
}
