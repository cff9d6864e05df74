//! A connection that is lost, and the session that goes on, or does not.
#![allow(clippy::unwrap_used, reason = "a helper of tests, which fail by panicking")]

mod host;

use std::sync::Arc;
use std::time::Duration;

use host::{
    Call, FakeHost, FakeSession, TestTlb, manual_clock, notice, notice_of, number, numbers, page, pages,
    soon, space, until, welcome,
};
use shootdown_client::{
    Access, AddrRange, ConnectError, Device, DeviceTlb, EndCause, FaultError, FlushAllCause, FlushReason,
    Incarnation, Moment, NoticeNumber, Reason, SessionError, StaleHost, SubscriptionId, UseRefused,
    Violation,
};
use shootdown_core::{Cause, Notice, NoticeKind, Scope};
use shootdown_proto::message::{DeviceSays, Hello, HostSays, Resume, ResumePoint, Welcome};

/// The next connection, and the Hello on it.
async fn hello(host: &mut FakeHost) -> (FakeSession, Hello) {
    let mut session = host.session().await;
    match soon(session.next()).await {
        Some(DeviceSays::Hello(hello)) => (session, hello),
        other => panic!("Hello comes first, not {other:?}"),
    }
}

fn continued(hello: &Hello, floor: u64) -> Welcome {
    Welcome {
        resume: Resume::Continue,
        retained_floor: NoticeNumber::new(floor),
        ..welcome(hello.window.unwrap())
    }
}

/// Loses the connection and goes on: the next one, on which Welcome and the first heartbeat were said.
async fn resumed(host: &mut FakeHost, lost: FakeSession, floor: u64) -> (FakeSession, ResumePoint) {
    drop(lost);
    let (mut session, hello) = hello(host).await;
    session.say(HostSays::Welcome(continued(&hello, floor))).await;
    let first = soon(session.next()).await;
    assert!(matches!(first, Some(DeviceSays::Heartbeat { .. })), "a lease is asked for at once: {first:?}");
    (session, hello.resume.expect("it says where it stopped"))
}

#[tokio::test]
async fn uses_go_on_while_there_is_no_connection_and_faults_wait() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (device, mut session) = host.subscribed(host.resuming(), &tlb).await;
    let mapping = session.mapped(&device, 1).await;
    let until_then = device.gate().valid_until();
    // Sent, and not answered.
    let mut asked = Box::pin(device.fault(space(), page(2), Access::Read));
    let fault = tokio::select! {
        biased;
        _ = &mut asked => panic!("nobody granted it"),
        fault = session.fault() => fault,
    };
    drop(session);
    let (mut session, hello) = hello(&mut host).await;
    let point = ResumePoint {
        session: device.session_id(),
        host_incarnation: device.host_incarnation(),
        received_through: None,
        attempt: 1,
    };
    assert_eq!(hello.resume, Some(point));
    drop(mapping.begin_use().expect("the lease goes on"));
    assert!(device.is_live());
    // Asked while there is none.
    let mut waits = Box::pin(device.fault(space(), page(3), Access::Read));
    assert!(futures_util::poll!(&mut waits).is_pending());
    session.say(HostSays::Welcome(continued(&hello, 0))).await;
    soon(device.resumed(1)).await;
    assert_eq!(device.gate().valid_until(), until_then, "to be welcomed back is no lease");
    // The one that was sent is asked again, under another name: nobody waits for the old grant any more.
    session.grant(&fault).await;
    let both = async {
        let mut ranges = Vec::new();
        for _ in 0..2 {
            let again = session.fault().await;
            assert_ne!(again.request, fault.request);
            ranges.push(again.range);
            session.grant(&again).await;
        }
        ranges.sort();
        assert_eq!(ranges, [page(2), page(3)]);
    };
    let (first, second, ()) = soon(async { tokio::join!(asked, waits, both) }).await;
    drop((first.unwrap(), second.unwrap()));
    drop(mapping.begin_use().expect("it was never withdrawn"));
    assert_eq!(tlb.calls().await, [Call::FlushAll(FlushAllCause::Connecting)]);
}

#[tokio::test]
async fn a_ticketed_fault_that_is_interrupted_says_so() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (device, mut session) = host.subscribed(host.resuming(), &tlb).await;
    let (asked, _lost) = tokio::join!(soon(device.fault_ticketed(space(), page(2), Access::Read)), async {
        session.fault().await;
        drop(session);
    });
    assert!(matches!(asked, Err(FaultError::Interrupted)), "{asked:?}");
}

/// 12, the device's half: what was flushed is not flushed twice, and its ack is given again with all that it may
/// have had to tell.
#[tokio::test]
async fn resume_or_flush() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (device, mut session) = host.subscribed(host.resuming(), &tlb).await;
    let held = tlb.hold(2);
    session.notices([notice(1, page(1)), notice(2, page(2)), notice(3, page(3)), notice(4, page(4))]).await;
    let mut told = Vec::new();
    while told.len() < 3 {
        let ack = session.ack().await;
        told.extend(
            ack.through.into_iter().chain(ack.selective).filter(|n| !told.contains(n)).collect::<Vec<_>>(),
        );
    }
    tlb.calls().await;
    // The host agent has the ack of 1 and of 4; that of 3 was lost.
    let (mut session, point) = resumed(&mut host, session, 2).await;
    assert_eq!(point.received_through, Some(number(4)));
    session.notices([notice(2, page(2)), notice(3, page(3))]).await;
    let ack = session.ack().await;
    assert_eq!((ack.through, ack.selective), (Some(number(1)), numbers([3])));
    assert_eq!(ack.reports.len(), 1);
    assert_eq!((&ack.reports[0].young, &ack.reports[0].dirty), (&vec![page(3)], &vec![page(3)]));
    // 2 was being flushed all the time.
    held.send(()).unwrap();
    let ack = session.ack().await;
    assert_eq!((ack.through, ack.selective), (Some(number(3)), vec![]));
    session.notices([notice(5, page(5))]).await;
    assert_eq!(session.ack().await.through, Some(number(5)));
    assert!(matches!(tlb.calls().await[..], [Call::Invalidate(it)] if it.notice == Some(number(5))));
    assert_eq!((device.resumes(), device.counts().flushes), (1, 0));
}

#[tokio::test]
async fn what_a_lost_ack_is_given_again_with_depends_on_what_was_asked() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (_device, mut session) = host.subscribed(host.resuming(), &tlb).await;
    let flush_all = Notice {
        scope: Scope::FlushAll,
        seq: None,
        cause: Cause::Clear,
        flush_reason: Some(FlushReason::OutboxFull),
        ..notice(3, page(0))
    };
    let all = [
        notice_of(1, NoticeKind::ClearYoung, page(1)),
        notice_of(2, NoticeKind::RangeEnd, page(2)),
        flush_all,
        notice_of(4, NoticeKind::ClearFlushYoung, page(4)),
    ];
    session.notices(all).await;
    while session.ack().await.through != Some(number(4)) {}
    let (mut session, _) = resumed(&mut host, session, 1).await;
    session.notices(all).await;
    let mut reports = Vec::new();
    loop {
        let ack = session.ack().await;
        reports.extend(ack.reports);
        if ack.through == Some(number(4)) {
            break;
        }
    }
    let told: Vec<_> =
        reports.iter().map(|report| (report.notice.get(), &report.young[..], &report.dirty[..])).collect();
    assert_eq!(told, [(1, &[page(1)][..], &[][..]), (4, &[page(4)][..], &[page(4)][..])]);
}

/// The device's half of "else it flushes all".
#[tokio::test]
async fn a_session_that_is_not_resumed_is_flushed_and_over() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (device, mut session) = host.subscribed(host.resuming(), &tlb).await;
    let mapping = session.mapped(&device, 1).await;
    drop(session);
    let (session, hello) = hello(&mut host).await;
    session
        .say(HostSays::Welcome(Welcome {
            host_incarnation: incarnation(6),
            ..welcome(hello.window.unwrap())
        }))
        .await;
    let end = soon(device.lost()).await;
    assert!(matches!(end.cause, EndCause::NotResumed), "{end:?}");
    assert_eq!(mapping.begin_use().unwrap_err(), UseRefused::SessionEnded);
    assert_eq!(tlb.calls().await.last(), Some(&Call::FlushAll(FlushAllCause::Lost)));
    // What comes next says that it holds nothing.
    let (_again, _session) =
        host.connect_with(host.resuming(), &tlb, |welcome| welcome.host_incarnation = incarnation(6)).await;
}

fn incarnation(value: u64) -> Incarnation {
    Incarnation::new(value).unwrap()
}

#[tokio::test]
async fn a_session_that_another_was_resumed_for_is_over() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (device, session) = host.subscribed(host.resuming(), &tlb).await;
    drop(session);
    let (session, hello) = hello(&mut host).await;
    let other = shootdown_client::SessionId::new(8).unwrap();
    session.say(HostSays::Welcome(Welcome { session: other, ..continued(&hello, 0) })).await;
    let end = soon(device.lost()).await;
    assert!(matches!(end.cause, EndCause::Violation(Violation::ResumeMismatch)), "{end:?}");
}

/// 14, the device's half: the lease is the bound, whatever the connection does.
#[tokio::test]
async fn a_device_that_reaches_nobody_fails_closed_when_its_lease_ends() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (clock, now) = manual_clock();
    let mut config = host.resuming();
    config.clock = clock;
    (config.lease_drift_ppm, config.lease_margin) = (0, Some(Duration::ZERO));
    let lease = Duration::from_millis(800);
    let (device, mut session) = host.connect_with(config, &tlb, |welcome| welcome.lease = lease).await;
    let _subscription = session.subscribe(&device, page(1)).await;
    let mapping = session.mapped(&device, 1).await;
    let sent = Moment::from_nanos(1_000_000_000);
    drop(session);
    // It is tried more than once: nobody answers.
    let (_silent, _) = hello(&mut host).await;
    let (_silent_too, _) = hello(&mut host).await;
    *now.lock() = sent + lease - Duration::from_nanos(1);
    drop(mapping.begin_use().expect("until the lease ends"));
    *now.lock() = sent + lease;
    assert_eq!(mapping.begin_use().unwrap_err(), UseRefused::LeaseExpired);
    let end = soon(device.lost()).await;
    assert!(matches!(end.cause, EndCause::LeaseExpired), "{end:?}");
    assert_eq!(tlb.calls().await.last(), Some(&Call::FlushAll(FlushAllCause::Lost)));
}

/// A host agent that was stopped, and went on after its successor had begun.
#[tokio::test]
async fn an_old_host_agent_is_not_listened_to() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let config = host.resuming();
    let (device, session) =
        host.connect_with(config.clone(), &tlb, |welcome| welcome.host_incarnation = incarnation(6)).await;
    assert_eq!(config.hosts.newest(&config.endpoint), Some(incarnation(6)));
    drop(session);
    // It is passed over, and the next try finds the right one.
    let (old, greeting) = hello(&mut host).await;
    old.say(HostSays::Welcome(continued(&greeting, 0))).await;
    let (new, greeting) = hello(&mut host).await;
    let right = Welcome { host_incarnation: incarnation(6), ..continued(&greeting, 0) };
    new.say(HostSays::Welcome(right)).await;
    soon(device.resumed(1)).await;
    soon(device.leave()).await;
    // A new session of the same configuration goes on knowing.
    let connecting = tokio::spawn(Device::connect(config, Arc::clone(&tlb)));
    let (old, greeting) = hello(&mut host).await;
    old.say(HostSays::Welcome(welcome(greeting.window.unwrap()))).await;
    let refused = soon(connecting).await.unwrap().unwrap_err();
    let stale = StaleHost { got: incarnation(5), newest: incarnation(6) };
    assert!(matches!(refused, ConnectError::StaleHost { source, .. } if source == stale), "{refused:?}");
}

#[tokio::test]
async fn a_host_agent_that_makes_room_for_its_successor_is_tried_again_and_one_that_refuses_is_not() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (device, session) = host.subscribed(host.resuming(), &tlb).await;
    drop(session);
    let (draining, _) = hello(&mut host).await;
    draining.say(HostSays::Error(SessionError::fatal(Reason::Draining, "a successor comes"))).await;
    let (session, greeting) = hello(&mut host).await;
    session.say(HostSays::Welcome(continued(&greeting, 0))).await;
    soon(device.resumed(1)).await;
    // Superseded in the middle of a session is no end of it either.
    session.say(HostSays::Error(SessionError::fatal(Reason::HostSuperseded, "a successor runs"))).await;
    let (replaced, _) = hello(&mut host).await;
    replaced.say(HostSays::Error(SessionError::fatal(Reason::SessionReplaced, "a newer one runs"))).await;
    let end = soon(device.lost()).await;
    assert!(matches!(end.cause, EndCause::Host(error) if error.reason == Reason::SessionReplaced));
}

/// 4 and 6: nothing that was asked is lost, and nothing is asked under another name.
#[tokio::test]
async fn subscriptions_that_were_not_answered_are_asked_for_again() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (device, mut session) = host.connect(host.resuming(), &tlb).await;
    let subscription = session.subscribe(&device, page(1)).await;
    let mut leaving = Box::pin(subscription.unsubscribe());
    let unsubscribe = tokio::select! {
        biased;
        _ = &mut leaving => panic!("nobody answered it"),
        says = session.hear() => says,
    };
    let ranges = [page(2)];
    let mut joining = Box::pin(device.subscribe(space(), &ranges, Default::default()));
    let subscribe = tokio::select! {
        biased;
        _ = &mut joining => panic!("nobody answered it"),
        says = session.hear() => says,
    };
    // Nobody waits for this one; the host agent may have made it all the same.
    let nobodys = {
        let ranges = [page(3)];
        let mut dropped = Box::pin(device.subscribe(space(), &ranges, Default::default()));
        tokio::select! {
            biased;
            _ = &mut dropped => panic!("nobody answered it"),
            says = session.hear() => says,
        }
    };
    let (mut session, _) = resumed(&mut host, session, 0).await;
    assert_eq!(session.hear().await, unsubscribe);
    assert_eq!(session.hear().await, subscribe);
    assert_eq!(session.hear().await, nobodys);
    let DeviceSays::Unsubscribe { request, subscription } = unsubscribe else { panic!("{unsubscribe:?}") };
    session.say(HostSays::Unsubscribed { request, subscription }).await;
    for (says, id) in [(subscribe, 2), (nobodys, 3)] {
        let DeviceSays::Subscribe(ask) = says else { panic!("{says:?}") };
        let subscription = SubscriptionId::new(id).unwrap();
        session.say(HostSays::Subscribed { request: ask.request, subscription, seq: None }).await;
    }
    soon(leaving).await.unwrap();
    assert_eq!(soon(joining).await.unwrap().id(), SubscriptionId::new(2).unwrap());
    let ended = session.hear().await;
    let DeviceSays::Unsubscribe { subscription, .. } = ended else { panic!("{ended:?}") };
    assert_eq!(subscription, SubscriptionId::new(3).unwrap(), "no subscription is left to nobody");
}

/// 20: what was told, and may not have arrived, is told again.
#[tokio::test]
async fn young_is_told_again_until_it_is_known_to_have_arrived() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    // A heartbeat a second.
    let lease = Duration::from_secs(3);
    let (device, mut session) =
        host.connect_with(host.resuming(), &tlb, |welcome| welcome.lease = lease).await;
    drop(session.subscribe(&device, AddrRange::ALL).await);
    let young = |number| DeviceSays::Young { address_space: space(), ranges: vec![page(number)] };
    device.report_young(space(), vec![page(1)]).unwrap();
    assert_eq!(session.hear().await, young(1));
    drop(session);
    let (mut session, greeting) = hello(&mut host).await;
    session.say(HostSays::Welcome(continued(&greeting, 0))).await;
    // In front of it goes the heartbeat: its answer says nothing of what came after it.
    assert_eq!(session.hear().await, young(1));
    let (mut session, _) = resumed(&mut host, session, 0).await;
    assert_eq!(session.hear().await, young(1));
    // A heartbeat behind it that is answered: it has arrived.
    let beat = loop {
        let Some(DeviceSays::Heartbeat { request }) = soon(session.next()).await else { continue };
        break request;
    };
    session.say(HostSays::LeaseRenewed { request: beat, lease: Duration::from_secs(60) }).await;
    session.notices([notice(1, page(9))]).await;
    session.ack().await;
    let (mut session, _) = resumed(&mut host, session, 0).await;
    device.report_young(space(), vec![page(2)]).unwrap();
    assert_eq!(session.hear().await, young(2));
}

/// A peer that vanished without a word: the connection stays open for as long as the kernel likes, which may be
/// longer than the lease.
#[tokio::test]
async fn a_connection_on_which_no_heartbeat_is_answered_is_given_up_while_the_lease_lasts() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let lease = Duration::from_secs(4);
    let (device, mut lost) = host.connect_with(host.resuming(), &tlb, |welcome| welcome.lease = lease).await;
    drop(lost.subscribe(&device, AddrRange::ALL).await);
    let mapping = lost.mapped(&device, 1).await;
    let (mut session, hello) = hello(&mut host).await;
    drop(mapping.begin_use().expect("the lease goes on, and so does the use"));
    assert_eq!(hello.resume.map(|point| point.session), Some(device.session_id()));
    session.say(HostSays::Welcome(continued(&hello, 0))).await;
    soon(device.resumed(1)).await;
    // What still comes on the connection that was given up counts for nothing.
    let until_then = device.gate().valid_until();
    while let Some(says) = soon(lost.next()).await {
        let DeviceSays::Heartbeat { request } = says else { panic!("{says:?}") };
        lost.try_say(HostSays::LeaseRenewed { request, lease: 10 * lease }).await;
        lost.try_say(HostSays::Notices(vec![notice(1, page(1))])).await;
    }
    let Some(DeviceSays::Heartbeat { request }) = soon(session.next()).await else { panic!("a heartbeat") };
    assert_eq!(device.gate().valid_until(), until_then);
    session.say(HostSays::LeaseRenewed { request, lease }).await;
    until(|| device.gate().valid_until() > until_then).await;
    drop(mapping.begin_use().expect("nothing was withdrawn"));
    assert_eq!(tlb.calls().await, [Call::FlushAll(FlushAllCause::Connecting)]);
}

/// That the lease is not renewed is no sign that the connection is lost: whoever owes an ack would come back again
/// and again.
#[tokio::test]
async fn a_connection_on_which_anything_comes_is_kept_to_the_end_of_a_lease_that_is_not_renewed() {
    for refuses in [true, false] {
        let mut host = FakeHost::start();
        let tlb = TestTlb::new();
        let lease = Duration::from_secs(1);
        let (device, mut session) =
            host.connect_with(host.resuming(), &tlb, |welcome| welcome.lease = lease).await;
        drop(session.subscribe(&device, AddrRange::ALL).await);
        let mut told = 0;
        let mut often = tokio::time::interval(lease / 20);
        let end = loop {
            tokio::select! {
                end = device.lost() => break end,
                says = session.next() => match says {
                    Some(DeviceSays::Heartbeat { request }) if refuses => {
                        let error = SessionError::refused(Reason::LeaseNotRenewed, "it owes an ack", Some(request));
                        session.say(HostSays::Error(error)).await;
                    }
                    Some(_) => {}
                    None => break soon(device.lost()).await,
                },
                _ = often.tick(), if !refuses => {
                    told += 1;
                    session.try_say(HostSays::Notices(vec![notice(told, page(told))])).await;
                }
            }
        };
        assert!(matches!(end.cause, EndCause::LeaseExpired), "{end:?}");
        assert!(host.try_session().is_none(), "it did not connect again");
    }
}

/// A host agent that will be succeeded asks nobody to leave.
#[tokio::test]
async fn a_drain_that_can_be_resumed_is_not_a_reason_to_leave() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (device, session) = host.subscribed(host.resuming(), &tlb).await;
    let deadline = Duration::from_secs(1);
    session.say(HostSays::Drain { deadline, resumable: true }).await;
    let mut asked = Box::pin(device.drain_asked());
    let (session, _) = resumed(&mut host, session, 0).await;
    assert!(futures_util::poll!(&mut asked).is_pending());
    session.say(HostSays::Drain { deadline, resumable: false }).await;
    assert_eq!(soon(asked).await, Some(deadline));
}

/// A device that is dropped while it has no connection holds nothing when it is gone.
#[tokio::test]
async fn a_device_that_is_closed_while_it_has_no_connection_flushes_everything() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (device, mut session) = host.subscribed(host.resuming(), &tlb).await;
    let mapping = session.mapped(&device, 1).await;
    drop(session);
    let (_silent, _) = hello(&mut host).await;
    let end = soon(device.leave()).await;
    assert!(matches!(end.cause, EndCause::Left));
    assert!(mapping.begin_use().is_err());
    until(|| !device.is_live()).await;
    assert!(matches!(tlb.calls().await.last(), Some(Call::FlushAll(_))));
}

/// A vendor's flush that panics while there is no connection ends the session: its notice is never acked.
#[tokio::test]
async fn a_flush_that_panics_while_there_is_no_connection_ends_the_session() {
    let mut host = FakeHost::start();
    let tlb = Arc::new(Fragile::default());
    let (device, session) = host.subscribed(host.resuming(), &tlb).await;
    session.notices([notice(1, pages(1, 1))]).await;
    soon(tlb.begun.notified()).await;
    drop(session);
    let (_silent, _) = hello(&mut host).await;
    tlb.panics.notify_one();
    let end = soon(device.lost()).await;
    assert!(matches!(end.cause, EndCause::FlushPanicked), "{end:?}");
}

#[derive(Default)]
struct Fragile {
    begun: tokio::sync::Notify,
    panics: tokio::sync::Notify,
}

impl DeviceTlb for Fragile {
    async fn invalidate(&self, _: shootdown_client::Invalidation) -> shootdown_client::Flushed {
        self.begun.notify_one();
        self.panics.notified().await;
        panic!("the test wants this flush to panic")
    }

    async fn flush_all(&self, _: FlushAllCause) {}
}

#[tokio::test]
async fn each_try_to_go_on_is_counted_also_one_that_is_not_answered() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (_device, session) = host.subscribed(host.resuming(), &tlb).await;
    drop(session);
    for attempt in 1..=3 {
        // Read, and its connection lost.
        let (_, hello) = hello(&mut host).await;
        assert_eq!(hello.resume.map(|point| point.attempt), Some(attempt));
    }
}
