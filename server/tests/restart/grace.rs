//! After a crash: who may hold a lease of the run before is waited for, and nobody else.

use shootdown_core::AddressSpaceId;
use shootdown_proto::error::Reason;
use shootdown_proto::v1;
use shootdown_proto::v1::memory_service_client::MemoryServiceClient;
use shootdown_proto::v1::session_request::Message as Ask;
use shootdown_proto::v1::session_response::Message as Say;

use crate::common::{Device, connect, pages, soon, until, wire};
use crate::place::{Place, SHORT, SHORT_ON_THE_HOST, invalidate, now, register};

/// Invariant 16.
#[tokio::test]
async fn restart_grace() {
    let place = Place::new();
    let old = place.one_that_is_killed(&SHORT).await;
    let started = now();
    let _second = place.start(&["--lease", "60s"]);
    let listed = place.sessions().await;
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].session_id, listed[0].device_id.as_str()), (old.session, "old"));
    assert_eq!(listed[0].phase(), v1::SessionPhase::Severed);

    // Nothing is granted …
    let mut memory = MemoryServiceClient::new(connect(&place.path("source")).await);
    let created = memory.create_address_space(v1::CreateAddressSpaceRequest { name: "vm".to_owned() }).await;
    let mapped = created.unwrap().into_inner().address_space_id;
    let range = Some(wire(pages(0, 4)));
    let access = v1::Access::Write.into();
    memory.map(v1::MapRequest { address_space_id: mapped, range, access }).await.unwrap();
    let mut new = place.hello("new").await;
    new.try_subscribe(mapped, vec![wire(pages(0, 4))]).await.unwrap();
    new.start_fault(AddressSpaceId::new(mapped).unwrap(), pages(0, 1)).await;
    // … and nothing released.
    let mut notifier = place.notifier().await;
    let space = register(&mut notifier).await;
    let early = invalidate(&mut notifier, space, Some(0)).await.unwrap();
    let ((whole, released), granted) =
        tokio::join!(async { (invalidate(&mut notifier, space, None).await.unwrap(), now()) }, async {
            new.grant().await;
            now()
        },);
    assert!(released.since(started) >= SHORT_ON_THE_HOST, "after {:?}", released.since(started));
    assert!(granted.since(started) >= SHORT_ON_THE_HOST, "after {:?}", granted.since(started));
    assert_eq!(early.verdict(), v1::Verdict::NotQuiesced);
    assert_eq!((early.targets[0].device_id.as_str(), early.targets[0].session_id), ("old", old.session));
    assert_eq!(whole.verdict(), v1::Verdict::Quiesced);
    assert_eq!(whole.targets[0].outcome(), v1::TargetOutcome::Fenced);

    // It is over for good.
    assert_eq!(place.sessions().await.len(), 1, "the new one");
    let after = invalidate(&mut notifier, space, Some(0)).await.unwrap();
    assert_eq!((after.verdict(), after.targets.len()), (v1::Verdict::Quiesced, 0));
}

#[tokio::test]
async fn a_device_that_comes_back_with_nothing_ends_the_grace_and_no_other_does() {
    let place = Place::new();
    place.one_that_is_killed(&["--lease", "60s"]).await;
    let second = place.start(&["--lease", "60s"]);
    let mut notifier = place.notifier().await;
    let space = register(&mut notifier).await;
    let mut waits = tokio::spawn({
        let mut notifier = notifier.clone();
        async move { invalidate(&mut notifier, space, None).await.unwrap() }
    });
    // Another device; and the same device, whose earlier run may still reach memory.
    place.hello("other").await.settled().await;
    let mut next = place.device().await;
    next.ask(Ask::Hello(v1::Hello { incarnation: 2, ..Device::hello_of("old") })).await;
    assert!(matches!(next.say().await, Say::Welcome(_)));
    let early = invalidate(&mut notifier, space, Some(0)).await.unwrap();
    assert_eq!(early.verdict(), v1::Verdict::NotQuiesced, "neither ends it");
    assert!(!waits.is_finished());
    drop(next);
    // An old incarnation never comes back behind a newer one, so the host agent is started anew.
    second.kill();
    assert!(soon(&mut waits).await.is_err(), "its host agent was killed");

    let place = Place::new();
    place.one_that_is_killed(&["--lease", "60s"]).await;
    let second = place.start(&["--lease", "60s"]);
    let mut notifier = place.notifier().await;
    let space = register(&mut notifier).await;
    assert_eq!(invalidate(&mut notifier, space, Some(0)).await.unwrap().verdict(), v1::Verdict::NotQuiesced);
    let waits = tokio::spawn({
        let mut notifier = notifier.clone();
        async move { invalidate(&mut notifier, space, None).await.unwrap() }
    });
    // Its first word after the Welcome says it.
    let mut back = place.hello("old").await;
    back.settled().await;
    let result = soon(waits).await.unwrap();
    assert_eq!(result.verdict(), v1::Verdict::Quiesced);
    assert_eq!(result.targets[0].outcome(), v1::TargetOutcome::Left);
    until(|| second.says("accounted for")).await;
}

/// Trap 29: a lease whose clock began anew with each restart, and so never ended.
#[tokio::test]
async fn a_lease_of_an_earlier_run_goes_on_running_out_however_often_the_host_agent_is_started() {
    let place = Place::new();
    place.one_that_is_killed(&["--lease", "60s"]).await;
    let mut remaining = Vec::new();
    soon(async {
        // A restart takes milliseconds; by then some 500 ms of them are over.
        while remaining.len() < 2 || remaining[0] < remaining[remaining.len() - 1] + 500 {
            let daemon = place.start(&["--lease", "60s"]);
            let sessions = place.sessions().await;
            assert_eq!(sessions.len(), 1, "it is waited for");
            remaining.push(sessions[0].lease_remaining_ms);
            daemon.kill();
        }
    })
    .await;
    assert!(remaining.is_sorted_by(|one, next| one >= next), "{remaining:?}");
}

#[tokio::test]
async fn no_id_is_used_twice_and_the_incarnation_rises() {
    let place = Place::new();
    let mut ids: Vec<(u64, u64, u64, u64)> = Vec::new();
    for _ in 0..3 {
        let daemon = place.start(&["--lease", "60s"]);
        let space = register(&mut place.notifier().await).await;
        let mut device = place.device().await;
        let welcome = device.welcomed(Device::hello_of("old")).await;
        let subscription = device.try_subscribe(space, vec![wire(pages(0, 4))]).await.unwrap();
        ids.push((welcome.host_incarnation, welcome.session_id, welcome.epoch, space.min(subscription)));
        daemon.kill();
    }
    for two in ids.windows(2) {
        let (one, other) = (two[0], two[1]);
        assert!(one.0 < other.0 && one.1 < other.1 && one.2 < other.2 && one.3 < other.3, "{ids:?}");
    }
}

#[tokio::test]
async fn a_run_that_leaves_nobody_behind_costs_the_next_no_wait() {
    let place = Place::new();
    for _ in 0..2 {
        let daemon = place.start(&["--lease", "60s"]);
        let mut notifier = place.notifier().await;
        let space = register(&mut notifier).await;
        let result = invalidate(&mut notifier, space, Some(0)).await.unwrap();
        assert_eq!(result.verdict(), v1::Verdict::Quiesced, "nobody is waited for");
        let device = place.hello("polite").await;
        device.ask(Ask::Leave(v1::Leave {})).await;
        while !place.sessions().await.is_empty() {
            tokio::task::yield_now().await;
        }
        drop(notifier);
        daemon.end_as_planned().await;
    }
}

/// Trap 32, across runs: an end that comes late names nothing.
#[tokio::test]
async fn a_sequence_of_an_earlier_run_names_no_bracket_of_this_one() {
    let place = Place::new();
    let first = place.start(&[]);
    let mut notifier = place.notifier().await;
    let space = register(&mut notifier).await;
    let before = invalidate(&mut notifier, space, None).await.unwrap();
    first.kill();
    let _second = place.start(&[]);
    let mut notifier = place.notifier().await;
    let back = v1::RegisterAddressSpaceRequest { address_space_id: space, ..Default::default() };
    assert_eq!(notifier.register_address_space(back).await.unwrap().into_inner().address_space_id, space);
    let after = invalidate(&mut notifier, space, None).await.unwrap();
    assert!(after.seq > before.seq && after.host_incarnation > before.host_incarnation);
    let asked = v1::AwaitRoundRequest { address_space_id: space, seq: before.seq, ..Default::default() };
    let unknown = notifier.await_round(asked).await.unwrap_err();
    assert_eq!(Reason::of_status(&unknown), Some(Reason::RoundUnknown));
    let end = |seq| v1::InvalidateRangeEndRequest { address_space_id: space, seq, ..Default::default() };
    let unknown = notifier.invalidate_range_end(end(before.seq)).await.unwrap_err();
    assert_eq!(Reason::of_status(&unknown), Some(Reason::RoundUnknown));
    notifier.invalidate_range_end(end(after.seq)).await.unwrap();
}

/// The quota counts devices: what the run before left of them does not keep them out.
#[tokio::test]
async fn a_fleet_as_large_as_the_quota_comes_back_after_a_crash_though_its_old_sessions_never_end() {
    let place = Place::new();
    let more = ["--lease", "60s", "--max-sessions", "2"];
    let daemon = place.start(&more);
    let space = register(&mut place.notifier().await).await;
    let capabilities = Some(v1::Capabilities { enforces_lease: false, change_pte: false });
    let hello = |name, incarnation| v1::Hello { capabilities, incarnation, ..Device::hello_of(name) };
    let mut fleet = Vec::new();
    for name in ["nic", "gpu"] {
        let mut device = place.device().await;
        device.welcomed(hello(name, 1)).await;
        device.try_subscribe(space, vec![wire(pages(0, 4))]).await.unwrap();
        fleet.push(device);
    }
    daemon.kill();
    let _second = place.start(&more);
    // One that lived on, and one that was started anew, whose earlier run may still reach memory.
    let mut back = Vec::new();
    for (name, incarnation) in [("nic", 1), ("gpu", 2)] {
        let mut device = place.device().await;
        device.welcomed(hello(name, incarnation)).await;
        device.settled().await;
        back.push(device);
    }
    let listed = place.sessions().await;
    let of = |name| listed.iter().filter(|session| session.device_id == name).count();
    assert_eq!((of("nic"), of("gpu")), (1, 2), "what is not known to have stopped is waited for");
    let mut other = place.device().await;
    other.ask(Ask::Hello(hello("other", 1))).await;
    assert_eq!(other.last_word().await.0.reason(), Reason::SessionQuota);
}

#[tokio::test]
async fn an_administrator_who_vouches_that_a_device_is_cut_off_ends_the_waiting_for_it() {
    let place = Place::new();
    place.one_that_is_killed(&["--lease", "60s"]).await;
    let second = place.start(&["--lease", "60s"]);
    let mut notifier = place.notifier().await;
    let space = register(&mut notifier).await;
    let waits = tokio::spawn({
        let mut notifier = notifier.clone();
        async move { invalidate(&mut notifier, space, None).await.unwrap() }
    });
    let session_id = place.sessions().await[0].session_id;
    let mut admin = place.admin().await;
    let evict = |is_cut_off| v1::EvictSessionRequest { session_id, is_cut_off };
    admin.evict_session(evict(false)).await.unwrap();
    let early = invalidate(&mut notifier, space, Some(0)).await.unwrap();
    assert_eq!(early.verdict(), v1::Verdict::NotQuiesced, "an eviction says nothing of the device");
    admin.evict_session(evict(true)).await.unwrap();
    assert_eq!(soon(waits).await.unwrap().targets[0].outcome(), v1::TargetOutcome::Fenced);
    until(|| second.says("accounted for")).await;
}
