//! A planned end: the successor goes on where it stopped.

use rustix::process::Signal;
use shootdown_proto::error::Reason;
use shootdown_proto::v1;
use shootdown_proto::v1::session_response::Message as Say;

use crate::common::{Device, pages, soon, wire};
use crate::place::{Place, invalidate, register};

/// Waits for the end of a stream that ends without a word of error.
async fn ended(device: &mut Device) {
    loop {
        match device.next().await {
            Ok(None) => return,
            Ok(Some(Say::Drain(drain))) => assert!(drain.resumable),
            other => panic!("it is cut without a word: {other:?}"),
        }
    }
}

#[tokio::test]
async fn after_a_planned_end_the_successor_goes_on_where_it_stopped() {
    let place = Place::new();
    let first = place.start(&["--lease", "60s"]);
    let mut notifier = place.notifier().await;
    let space = register(&mut notifier).await;
    let mut device = place.device().await;
    let welcomed = device.welcomed(Device::hello_of("old")).await;
    device.try_subscribe(space, vec![wire(pages(0, 4))]).await.unwrap();
    // A round that is complete, and whose bracket stays open.
    let round = tokio::spawn({
        let mut notifier = notifier.clone();
        async move { invalidate(&mut notifier, space, None).await.unwrap() }
    });
    let notice = device.notice().await;
    device.ack(notice.number).await;
    let round = soon(round).await.unwrap();
    assert_eq!(round.verdict(), v1::Verdict::Quiesced);
    first.signal(Signal::TERM);
    ended(&mut device).await;
    first.ended_as_planned().await;

    let second = place.start(&["--lease", "60s"]);
    let listed = place.sessions().await;
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].session_id, listed[0].phase()), (device.session, v1::SessionPhase::Severed));
    assert_eq!((listed[0].subscriptions, listed[0].acked_through), (1, 1));
    let spaces = place.address_spaces().await;
    assert_eq!(spaces.len(), 1);
    assert_eq!((spaces[0].address_space_id, spaces[0].name.as_str(), spaces[0].seq), (space, "vm", 1));
    assert_eq!(spaces[0].open_brackets, 1);

    // Its device is waited for where it had subscribed, and nowhere else: there is no grace.
    let mut notifier = place.notifier().await;
    let elsewhere = v1::InvalidateRangeStartRequest {
        address_space_id: space,
        range: Some(wire(pages(100, 1))),
        cause: v1::Cause::Unmap.into(),
        non_blockable: true,
        ..Default::default()
    };
    let result = soon(notifier.invalidate_range_start(elsewhere)).await.unwrap().into_inner().result.unwrap();
    assert_eq!((result.verdict(), result.seq), (v1::Verdict::Quiesced, 2));
    let waits = invalidate(&mut notifier, space, Some(0)).await.unwrap();
    assert_eq!((waits.verdict(), waits.targets.len()), (v1::Verdict::NotQuiesced, 1));
    assert_eq!(waits.targets[0].session_id, device.session);
    // Its caller ends the bracket as if nothing had happened, once.
    let end = v1::InvalidateRangeEndRequest { address_space_id: space, seq: round.seq, ..Default::default() };
    notifier.invalidate_range_end(end.clone()).await.unwrap();
    let twice = notifier.invalidate_range_end(end).await.unwrap_err();
    assert_eq!(Reason::of_status(&twice), Some(Reason::RoundUnknown));
    // Nobody is granted less than before.
    let mut other = place.device().await;
    let welcome = other.welcomed(Device::hello_of("other")).await;
    assert_eq!(welcome.host_incarnation, welcomed.host_incarnation, "the run goes on");
    second.kill();

    // A crash is a crash.
    let _third = place.start(&["--lease", "60s"]);
    let mut notifier = place.notifier().await;
    let space = register(&mut notifier).await;
    let waits = invalidate(&mut notifier, space, Some(0)).await.unwrap();
    assert_eq!(waits.verdict(), v1::Verdict::NotQuiesced, "its devices are waited for everywhere");
    let mut again = place.device().await;
    let later = again.welcomed(Device::hello_of("other")).await;
    assert!(later.host_incarnation > welcome.host_incarnation);
}

/// A session that owes an ack cannot go on, and its round may not be taken for complete.
#[tokio::test]
async fn what_is_not_quiet_at_a_planned_end_is_treated_as_after_a_crash() {
    let place = Place::new();
    let first = place.start(&["--lease", "60s"]);
    let (space, seq, _silent) = place.never_quiesced().await;
    first.end_as_planned().await;

    let _second = place.start(&["--lease", "60s"]);
    assert_eq!(place.look(space, seq).await, Err(Reason::AddressSpaceUnknown), "never quiesced");
    let mut notifier = place.notifier().await;
    let space = register(&mut notifier).await;
    let waits = invalidate(&mut notifier, space, Some(0)).await.unwrap();
    assert_eq!(waits.verdict(), v1::Verdict::NotQuiesced);
    assert_eq!(waits.targets[0].device_id, "silent");
}

/// What is said of the lease and what is renewed are one thing, also when the setting is another one by now.
#[tokio::test]
async fn a_session_that_goes_on_after_a_planned_restart_is_told_its_own_lease() {
    let place = Place::new();
    let first = place.start(&["--lease", "5s"]);
    let space = register(&mut place.notifier().await).await;
    let (mut device, resume) = place.subscribed("old", space).await;
    first.signal(Signal::TERM);
    ended(&mut device).await;
    first.ended_as_planned().await;
    let _second = place.start(&["--lease", "60s"]);
    let (mut back, again) = place.come_back(resume).await;
    back.beat().await;
    let Say::LeaseRenewed(renewed) = back.say().await else { panic!("not renewed") };
    assert_eq!(again.resume(), v1::Resume::Continue);
    assert_eq!((again.lease_ms, renewed.lease_ms), (5000, 5000));
}

/// What the host agent ended stays ended.
#[tokio::test]
async fn a_session_that_was_evicted_is_not_resumed_after_a_planned_end() {
    let place = Place::new();
    let first = place.start(&["--lease", "60s"]);
    let space = register(&mut place.notifier().await).await;
    let mut device = place.hello("evicted").await;
    device.try_subscribe(space, vec![wire(pages(0, 4))]).await.unwrap();
    let mut admin = place.admin().await;
    let evict = v1::EvictSessionRequest { session_id: device.session, is_cut_off: false };
    admin.evict_session(evict).await.unwrap();
    first.end_as_planned().await;
    let _second = place.start(&["--lease", "60s"]);
    let mut notifier = place.notifier().await;
    let space = register(&mut notifier).await;
    let waits = invalidate(&mut notifier, space, Some(0)).await.unwrap();
    assert_eq!(waits.targets[0].device_id, "evicted", "it is waited for everywhere, as after a crash");
}

#[tokio::test]
async fn an_address_space_that_is_handed_over_is_taken_back_as_strict_as_it_is() {
    let place = Place::new();
    let first = place.start(&[]);
    let space = register(&mut place.notifier().await).await;
    first.end_as_planned().await;
    let _second = place.start(&[]);
    let mut notifier = place.notifier().await;
    let back =
        |strict| v1::RegisterAddressSpaceRequest { address_space_id: space, strict, ..Default::default() };
    let refused = notifier.register_address_space(back(true)).await.unwrap_err();
    assert_eq!(Reason::of_status(&refused), Some(Reason::FieldInvalid), "{refused}");
    notifier.register_address_space(back(false)).await.unwrap();
    let refused = notifier.register_address_space(back(false)).await.unwrap_err();
    assert_eq!(Reason::of_status(&refused), Some(Reason::FieldInvalid), "it was taken back");
}
