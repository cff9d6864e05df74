//! Restarts one after the other: what one run took over, the next must know as well.

use std::process::Command;

use rustix::process::Signal;
use shootdown_core::AddressSpaceId;
use shootdown_proto::error::Reason;
use shootdown_proto::v1;
use shootdown_proto::v1::session_request::Message as Ask;
use shootdown_proto::v1::session_response::Message as Say;

use crate::common::daemon::{DAEMON, Daemon};
use crate::common::{Device, pages, soon, wire};
use crate::place::{Place, invalidate, point, register};

async fn take_back(place: &Place, space: u64) {
    let request = v1::RegisterAddressSpaceRequest { address_space_id: space, ..Default::default() };
    let taken = place.notifier().await.register_address_space(request).await.unwrap().into_inner();
    assert_eq!(taken.address_space_id, space);
}

#[tokio::test]
async fn a_round_that_a_crash_cut_off_is_not_quiesced_after_a_planned_restart_either() {
    let place = Place::new();
    let first = place.start(&["--lease", "60s"]);
    let (space, seq, _silent) = place.never_quiesced().await;
    first.kill();
    let second = place.start(&["--lease", "60s"]);
    take_back(&place, space).await;
    assert_eq!(place.look(space, seq).await, Err(Reason::RoundUnknown));
    second.end_as_planned().await;
    // However often: what is restored is written down again.
    for _ in 0..2 {
        let next = place.start(&["--lease", "60s"]);
        assert_eq!(place.look(space, seq).await, Err(Reason::RoundUnknown), "its device never acked");
        take_back(&place, space).await;
        assert_eq!(place.look(space, seq).await, Err(Reason::RoundUnknown));
        next.end_as_planned().await;
    }
}

#[tokio::test]
async fn a_round_that_a_planned_end_left_out_is_not_quiesced_after_another() {
    let place = Place::new();
    let first = place.start(&["--lease", "60s"]);
    let (space, seq, _silent) = place.never_quiesced().await;
    first.end_as_planned().await;
    let second = place.start(&["--lease", "60s"]);
    take_back(&place, space).await;
    second.end_as_planned().await;
    let _third = place.start(&["--lease", "60s"]);
    assert_eq!(place.look(space, seq).await, Err(Reason::RoundUnknown), "its device never acked");
    let mut notifier = place.notifier().await;
    let end = v1::InvalidateRangeEndRequest { address_space_id: space, seq, ..Default::default() };
    let unknown = notifier.invalidate_range_end(end).await.unwrap_err();
    assert_eq!(Reason::of_status(&unknown), Some(Reason::RoundUnknown));
    let waits = invalidate(&mut notifier, space, Some(0)).await.unwrap();
    assert_eq!((waits.verdict(), waits.targets.len()), (v1::Verdict::NotQuiesced, 1));
    assert_eq!(waits.targets[0].device_id, "silent", "it is waited for still");
    assert!(waits.seq > seq);
}

#[tokio::test]
async fn a_round_that_was_quiesced_is_so_after_any_number_of_planned_restarts() {
    let place = Place::new();
    let mut daemon = place.start(&["--lease", "60s"]);
    let mut notifier = place.notifier().await;
    let space = register(&mut notifier).await;
    let done = invalidate(&mut notifier, space, None).await.unwrap();
    let end = v1::InvalidateRangeEndRequest { address_space_id: space, seq: done.seq, ..Default::default() };
    notifier.invalidate_range_end(end).await.unwrap();
    for _ in 0..2 {
        daemon.end_as_planned().await;
        daemon = place.start(&["--lease", "60s"]);
        assert_eq!(place.look(space, done.seq).await.unwrap().verdict(), v1::Verdict::Quiesced);
        assert_eq!(place.look(space, done.seq + 1).await, Err(Reason::RoundUnknown));
    }
}

/// It was away for a whole run; what it holds is as it was.
#[tokio::test]
async fn a_device_that_missed_a_run_resumes_after_two_planned_restarts() {
    let place = Place::new();
    let first = place.start(&["--lease", "60s"]);
    let space = register(&mut place.notifier().await).await;
    let (device, resume) = place.subscribed("old", space).await;
    first.end_as_planned().await;
    drop(device);
    let second = place.start(&["--lease", "60s"]);
    let before = place.sessions().await[0].lease_remaining_ms;
    second.end_as_planned().await;
    let _third = place.start(&["--lease", "60s"]);
    assert!(place.sessions().await[0].lease_remaining_ms <= before, "nobody renewed its lease");
    let (mut back, welcome) = place.come_back(resume).await;
    assert_eq!(welcome.resume(), v1::Resume::Continue);
    assert_eq!((welcome.session_id, welcome.host_incarnation), (resume.session_id, resume.host_incarnation));
    // It hears of what it had subscribed to.
    let mut notifier = place.notifier().await;
    let round = tokio::spawn(async move { invalidate(&mut notifier, space, None).await.unwrap() });
    let notice = back.notice().await;
    back.ack(notice.number).await;
    assert_eq!(soon(round).await.unwrap().verdict(), v1::Verdict::Quiesced);
}

/// A planned end in the middle of the grace does not end it, nor does it begin anew.
#[tokio::test]
async fn a_survivor_of_a_crash_is_waited_for_across_a_planned_restart() {
    let place = Place::new();
    place.one_that_is_killed(&["--lease", "60s"]).await;
    let second = place.start(&["--lease", "60s"]);
    let space = register(&mut place.notifier().await).await;
    let (_device, resume) = place.subscribed("other", space).await;
    let before = remaining(&place, "old").await;
    second.end_as_planned().await;
    let _third = place.start(&["--lease", "60s"]);
    assert!(remaining(&place, "old").await <= before);
    let mut notifier = place.notifier().await;
    let waits = invalidate(&mut notifier, space, Some(0)).await.unwrap();
    let mut targets: Vec<_> = waits.targets.iter().map(|target| target.device_id.as_str()).collect();
    targets.sort_unstable();
    assert_eq!((waits.verdict(), targets), (v1::Verdict::NotQuiesced, vec!["old", "other"]));
    let survivor = place.sessions().await.into_iter().find(|session| session.device_id == "old").unwrap();
    let of_the_crash = v1::ResumePoint { session_id: survivor.session_id, ..resume };
    let (_flushes, welcome) = place.come_back(of_the_crash).await;
    assert_eq!(welcome.resume(), v1::Resume::Flush, "a crash is a crash");
}

async fn remaining(place: &Place, device: &str) -> u64 {
    let sessions = place.sessions().await;
    sessions.iter().find(|session| session.device_id == device).unwrap().lease_remaining_ms
}

#[tokio::test]
async fn a_crash_after_a_planned_restart_resumes_nobody() {
    let place = Place::new();
    let first = place.start(&["--lease", "60s"]);
    let space = register(&mut place.notifier().await).await;
    let (_device, resume) = place.subscribed("old", space).await;
    first.end_as_planned().await;
    let second = place.start(&["--lease", "60s"]);
    second.kill();
    let _third = place.start(&["--lease", "60s"]);
    let (_back, welcome) = place.come_back(resume).await;
    assert_eq!(welcome.resume(), v1::Resume::Flush);
    assert!(welcome.host_incarnation > resume.host_incarnation);
}

/// A daemon that finds another boot id than its predecessor, as after a reboot. `None` where that cannot be made.
fn after_a_reboot(place: &Place, more: &[&str]) -> Option<Daemon> {
    let another = place.path("boot");
    std::fs::write(&another, "11111111-2222-3333-4444-555555555555\n").unwrap();
    let mount = format!("mount --bind {} /proc/sys/kernel/random/boot_id", another.display());
    let can = Command::new("unshare").args(["-m", "sh", "-c", &mount]).output();
    if !can.is_ok_and(|output| output.status.success()) {
        eprintln!("not tested: it takes a user who may mount (root)");
        return None;
    }
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", &format!("{mount} && exec \"$0\" \"$@\""), DAEMON]);
    command.args(place.arguments()).args(more);
    Some(Daemon::start(command))
}

/// The memory behind every translation is gone.
#[tokio::test]
async fn after_a_reboot_nobody_resumes() {
    let place = Place::new();
    let first = place.start(&["--lease", "60s"]);
    let space = register(&mut place.notifier().await).await;
    let (device, resume) = place.subscribed("old", space).await;
    first.end_as_planned().await;
    drop(device);
    let Some(_second) = after_a_reboot(&place, &["--lease", "60s"]) else { return };
    assert_eq!(place.look(space, 1).await, Err(Reason::AddressSpaceUnknown));
    let (_back, welcome) = place.come_back(resume).await;
    assert_eq!(welcome.resume(), v1::Resume::Flush);
    assert!(welcome.host_incarnation > resume.host_incarnation);
    assert!(welcome.session_id > resume.session_id);
    // Until it says that it holds nothing it is waited for, everywhere and for its whole lease.
    let mut notifier = place.notifier().await;
    let elsewhere = register(&mut notifier).await;
    let waits = invalidate(&mut notifier, elsewhere, Some(0)).await.unwrap();
    assert_eq!((waits.verdict(), waits.targets.len()), (v1::Verdict::NotQuiesced, 1));
    assert_eq!(waits.targets[0].session_id, resume.session_id);
}

/// 6: an Unsubscribe that was under way at a planned end is done when the end comes; asked again it is told so.
#[tokio::test]
async fn unsubscribe_barrier_holds_across_a_planned_restart() {
    let place = Place::new();
    let first = place.start(&["--lease", "60s"]);
    let mut notifier = place.notifier().await;
    let space = register(&mut notifier).await;
    let mut device = place.device().await;
    let welcome = device.welcomed(Device::hello_of("old")).await;
    let leaving = device.try_subscribe(space, vec![wire(pages(0, 4))]).await.unwrap();
    device.try_subscribe(space, vec![wire(pages(8, 4))]).await.unwrap();
    let round = tokio::spawn(async move { invalidate(&mut notifier, space, None).await });
    let notice = device.notice().await.number;
    let ask = Ask::Unsubscribe(v1::Unsubscribe { request_id: 78, subscription_id: leaving });
    device.ask(ask.clone()).await;
    device.settled().await;
    // The end has begun while a round counts on the subscription: it waits for the ack, and so does the answer.
    first.signal(Signal::TERM);
    let Say::Drain(drain) = device.say().await else { panic!("draining") };
    assert!(drain.resumable);
    device.ack(notice).await;
    assert_eq!(soon(round).await.unwrap().unwrap().verdict(), v1::Verdict::Quiesced);
    // Whether its answer came before the stream ended makes no difference to who asks again.
    device.cut();
    first.ended_as_planned().await;
    let _second = place.start(&["--lease", "60s"]);
    let resume = v1::ResumePoint { received_through: notice, ..point(&welcome) };
    let (mut device, welcome) = place.come_back(resume).await;
    assert_eq!(welcome.resume(), v1::Resume::Continue);
    device.ask(ask).await;
    assert_eq!(device.error().await.reason(), Reason::SubscriptionUnknown);
    assert_eq!(place.sessions().await[0].subscriptions, 1);
    let gone = invalidate(&mut place.notifier().await, space, None).await.unwrap();
    assert_eq!((gone.verdict(), gone.targets.len()), (v1::Verdict::Quiesced, 0), "nobody counts on it");
    assert!(device.is_silent().await);
}

/// What its device still has to say of an earlier session it may say in the next run.
#[tokio::test]
async fn a_session_that_its_device_flushed_is_left_behind_after_a_planned_restart_too() {
    let place = Place::new();
    let first = place.start(&["--lease", "60s"]);
    let mut notifier = place.notifier().await;
    let (owed, kept) = (register(&mut notifier).await, register(&mut notifier).await);
    let (mut device, resume) = place.subscribed("old", owed).await;
    let round = invalidate(&mut notifier, owed, Some(0)).await.unwrap();
    assert_eq!(round.verdict(), v1::Verdict::NotQuiesced);
    device.notice().await;
    device.cut();
    // What it says it has received was never sent, so it is to flush; and it does not say yet that it has.
    let (mut device, welcome) = place.come_back(v1::ResumePoint { received_through: 9, ..resume }).await;
    assert_eq!(welcome.resume(), v1::Resume::Flush);
    device.try_subscribe(kept, vec![wire(pages(0, 4))]).await.unwrap();
    device.cut();
    first.end_as_planned().await;
    let _second = place.start(&["--lease", "60s"]);
    let (mut device, welcome) = place.come_back(point(&welcome)).await;
    assert_eq!(welcome.resume(), v1::Resume::Continue);
    device.settled().await;
    assert_eq!(place.sessions().await.len(), 2, "it may still be flushing");
    device.start_fault(AddressSpaceId::new(kept).unwrap(), pages(0, 1)).await;
    soon(async {
        while place.sessions().await.len() > 1 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

/// The answer to a Subscribe may go with the run that gave it.
#[tokio::test]
async fn a_subscription_that_is_asked_for_again_after_a_planned_restart_is_the_one_that_was_made() {
    let place = Place::new();
    let first = place.start(&["--lease", "60s"]);
    let space = register(&mut place.notifier().await).await;
    let mut device = place.device().await;
    let welcome = device.welcomed(Device::hello_of("old")).await;
    let ranges = vec![wire(pages(0, 4))];
    let made = device.try_subscribe(space, ranges.clone()).await.unwrap();
    let request_id = device.last_request();
    device.cut();
    first.end_as_planned().await;
    let _second = place.start(&["--lease", "60s"]);
    let (mut device, welcome) = place.come_back(point(&welcome)).await;
    assert_eq!(welcome.resume(), v1::Resume::Continue);
    device
        .ask(Ask::Subscribe(v1::Subscribe {
            request_id,
            address_space_id: space,
            ranges,
            ..Default::default()
        }))
        .await;
    let Say::Subscribed(again) = device.say().await else { panic!("not subscribed") };
    assert_eq!((again.request_id, again.subscription_id), (request_id, made));
    assert_eq!(place.sessions().await[0].subscriptions, 1);
}
