//! Grants, and the notices that overtake them; uses, and what they hold up.

mod host;

use host::{Call, FakeHost, TestTlb, grant_of, notice, notice_of, number, numbers, page, pages, soon, space};
use shootdown_client::{
    Access, CommitError, Counts, EndCause, FaultError, FrameNumber, Reason, SubscriptionId, Translation,
    UseRefused, Violation,
};
use shootdown_core::NoticeKind;
use shootdown_proto::message::{DeviceSays, HostSays, SessionError};

/// Invariant 3.
#[tokio::test]
async fn no_grant_in_window() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (device, mut session) = host.subscribed(host.config(), &tlb).await;
    let (grant, ()) = tokio::join!(soon(device.fault_ticketed(space(), pages(1, 3), Access::Read)), async {
        let fault = session.fault().await;
        session.grant(&fault).await;
        // In the stream behind the grant, and acked before the device commits.
        session.notices([notice(1, page(2))]).await;
        session.ack().await;
    });
    let outcomes: Vec<_> =
        grant.unwrap().tickets.into_iter().map(|it| it.commit().map(|it| it.range())).collect();
    assert_eq!(outcomes, [Ok(page(1)), Err(CommitError::Spoiled), Ok(page(3))]);
}

#[tokio::test]
async fn a_fault_whose_grant_was_overtaken_is_asked_again() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (device, mut session) = host.subscribed(host.config(), &tlb).await;
    let (mapped, ()) = tokio::join!(soon(device.fault(space(), page(1), Access::Read)), async {
        let fault = session.fault().await;
        // One write to the device: the grant is applied and spoiled before the waiting fault runs.
        session.grant(&fault).await;
        session.notices([notice(1, page(1))]).await;
        let mut again = None;
        while again.is_none() {
            match session.hear().await {
                DeviceSays::Fault(fault) => again = Some(fault),
                DeviceSays::Ack { .. } => {}
                other => panic!("{other:?}"),
            }
        }
        session.grant(&again.unwrap()).await;
    });
    let mapping = mapped.unwrap().remove(0);
    assert_eq!(mapping.begin_use().unwrap().frame(), FrameNumber(1));
}

#[tokio::test]
async fn a_fault_gives_up_after_its_bound() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let mut config = host.config();
    config.max_refaults = 2;
    let (device, mut session) = host.subscribed(config, &tlb).await;
    let (mapped, ()) = tokio::join!(soon(device.fault(space(), page(1), Access::Read)), async {
        for _ in 0..3 {
            let request = Some(session.fault().await.request);
            let refused = SessionError::refused(Reason::FaultContended, "the page changed", request);
            session.say(HostSays::Error(refused)).await;
        }
    });
    assert!(matches!(mapped, Err(FaultError::Contended { attempts: 3 })), "{mapped:?}");
}

#[tokio::test]
async fn a_refusal_reaches_the_fault_that_it_is_for() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (device, mut session) = host.subscribed(host.config(), &tlb).await;
    let (mapped, ()) = tokio::join!(soon(device.fault(space(), page(1), Access::Read)), async {
        let request = Some(session.fault().await.request);
        session
            .say(HostSays::Error(SessionError::refused(Reason::FaultUnmapped, "nothing there", request)))
            .await;
    });
    assert!(matches!(mapped, Err(FaultError::Refused(error)) if error.reason == Reason::FaultUnmapped));
    assert!(device.is_live());
}

#[tokio::test]
async fn a_grant_that_is_not_for_what_was_asked_ends_the_session() {
    type Spoil = fn(&mut shootdown_proto::message::Grant);
    let wrongs: [Spoil; 5] = [
        |grant| grant.translations.clear(),
        |grant| grant.translations.truncate(1),
        |grant| grant.translations[1].access = Access::Read,
        |grant| grant.translations[1].range = page(7),
        |grant| grant.data = vec![0; 4096].into(),
    ];
    for spoil in wrongs {
        let mut host = FakeHost::start();
        let tlb = TestTlb::new();
        let (device, mut session) = host.subscribed(host.config(), &tlb).await;
        let (mapped, _) = tokio::join!(soon(device.fault(space(), pages(1, 2), Access::Write)), async {
            let fault = session.fault().await;
            let mut grant = grant_of(&fault);
            spoil(&mut grant);
            session.say(HostSays::Grant(grant)).await;
            session.close().await
        });
        assert!(matches!(mapped, Err(FaultError::NotLive(_))), "{mapped:?}");
        let end = soon(device.lost()).await;
        assert!(matches!(end.cause, EndCause::Violation(Violation::GrantMismatch { .. })), "{end:?}");
    }
}

#[tokio::test]
async fn an_answer_of_the_wrong_kind_ends_the_session() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (device, mut session) = host.subscribed(host.config(), &tlb).await;
    let (mapped, _) = tokio::join!(soon(device.fault(space(), page(1), Access::Write)), async {
        let request = session.fault().await.request;
        session.say(HostSays::Unsubscribed { request, subscription: SubscriptionId::FIRST }).await;
        session.close().await
    });
    assert!(matches!(mapped, Err(FaultError::NotLive(_))), "{mapped:?}");
    let end = soon(device.lost()).await;
    assert!(matches!(end.cause, EndCause::Violation(Violation::AnswerMismatch { .. })), "{end:?}");
}

#[tokio::test]
async fn bytes_come_with_the_grant() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (device, mut session) = host.subscribed(host.config(), &tlb).await;
    let (pages, ()) = tokio::join!(soon(device.fault_with_data(space(), pages(1, 2), Access::Read)), async {
        let fault = session.fault().await;
        session.grant(&fault).await;
    });
    let data: Vec<_> = pages.unwrap().into_iter().map(|it| (it.mapping.range(), it.data)).collect();
    assert_eq!(data, [(page(1), vec![1; 4096].into()), (page(2), vec![2; 4096].into())]);
}

#[tokio::test]
async fn a_use_that_is_open_delays_the_ack_and_none_begins_after_the_notice() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (device, mut session) = host.subscribed(host.config(), &tlb).await;
    let mapping = session.mapped(&device, 1).await;
    let open = mapping.begin_use().unwrap();
    session.notices([notice(1, page(1)), notice(2, page(2))]).await;
    assert_eq!(session.ack().await.selective, numbers([2]), "the first waits for the use");
    assert_eq!(mapping.begin_use().unwrap_err(), UseRefused::Revoked);
    drop(open);
    let ack = session.ack().await;
    assert_eq!(ack.through, Some(number(2)));
    assert_eq!(ack.reports[0].young, [page(1)], "it was used");
}

/// The use waits for a grant, the grant for a flush, and that flush must not wait for the use.
#[tokio::test]
async fn a_flush_that_waits_for_a_use_keeps_no_other_flush_waiting() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let mut config = host.config();
    config.parallel_flushes = 1;
    let (device, mut session) = host.subscribed(config, &tlb).await;
    let mapping = session.mapped(&device, 1).await;
    let open = mapping.begin_use().unwrap();
    session.notices([notice(1, page(1))]).await;
    session.notices([notice(2, page(2))]).await;
    assert_eq!(session.ack().await.selective, numbers([2]));
    drop(open);
    assert_eq!(session.ack().await.through, Some(number(2)));
}

#[tokio::test]
async fn a_fault_that_is_dropped_leaves_nothing_behind() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let mut config = host.config();
    config.max_faults = 1;
    let (device, mut session) = host.subscribed(config, &tlb).await;
    // Dropped before it was sent: the transport has not run since.
    {
        let mut faulting = Box::pin(device.fault(space(), page(9), Access::Read));
        assert!(futures_util::poll!(&mut faulting).is_pending());
        assert_eq!(device.counts().requests, 1);
    }
    assert_eq!(device.counts(), Counts::default());
    // Sent, and dropped before the grant.
    let fault = {
        let mut faulting = Box::pin(device.fault(space(), page(1), Access::Read));
        tokio::select! {
            biased;
            _ = &mut faulting => panic!("nobody granted it"),
            fault = session.fault() => fault,
        }
    };
    assert_eq!(device.counts().requests, 1, "the host agent still counts it");
    session.grant(&fault).await;
    // The next fault needs the only permit, which the answer gave back.
    let mapping = session.mapped(&device, 2).await;
    assert_eq!(device.counts(), Counts { mappings: 1, ..Counts::default() });
    // Granted, and dropped before the ticket was looked at.
    let mut faulting = Box::pin(device.fault(space(), page(3), Access::Read));
    tokio::select! {
        biased;
        _ = &mut faulting => panic!("nobody granted it"),
        fault = session.fault() => session.grant(&fault).await,
    }
    session.notices([notice(1, page(40))]).await;
    session.ack().await;
    assert_eq!(device.counts(), Counts { mappings: 1, tickets: 1, ..Counts::default() });
    drop(faulting);
    assert_eq!(device.counts(), Counts { mappings: 1, ..Counts::default() });
    drop(mapping);
    assert_eq!(device.counts(), Counts::default());
}

#[tokio::test]
async fn a_replacement_that_a_later_notice_overtakes_is_not_committed() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (_device, mut session) = host.subscribed(host.config(), &tlb).await;
    let replacement = |number| {
        let translation = Translation { range: page(number), frame: FrameNumber(70), access: Access::Read };
        notice_of(number, NoticeKind::ChangePte(translation), page(number))
    };
    let held = tlb.hold(1);
    session.notices([replacement(1), replacement(2), notice(3, page(1))]).await;
    assert_eq!(session.ack().await.selective, numbers([2, 3]));
    let tickets = std::mem::take(&mut *tlb.tickets.lock());
    let frames: Vec<_> = tickets.into_iter().map(|it| it.commit_raw().map(|it| it.frame)).collect();
    assert_eq!(frames, [Err(CommitError::Spoiled), Ok(FrameNumber(70))]);
    held.send(()).unwrap();
    assert_eq!(session.ack().await.through, Some(number(3)));
}

#[tokio::test]
async fn release_withdraws_the_whole_address_space() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (device, mut session) = host.subscribed(host.config(), &tlb).await;
    let mapping = session.mapped(&device, 1).await;
    tlb.calls().await;
    // Its range may be anything: the whole space goes.
    session.notices([notice_of(1, NoticeKind::Release, page(900))]).await;
    session.ack().await;
    assert!(matches!(tlb.calls().await[..], [Call::Invalidate(it)] if it.range.is_all()));
    assert_eq!(mapping.begin_use().unwrap_err(), UseRefused::Revoked);
}

#[tokio::test]
async fn the_end_of_a_bracket_flushes_nothing() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (device, mut session) = host.subscribed(host.config(), &tlb).await;
    let mapping = session.mapped(&device, 1).await;
    tlb.calls().await;
    session.notices([notice_of(1, NoticeKind::RangeEnd, page(1))]).await;
    session.ack().await;
    assert_eq!(tlb.calls().await, [Call::RangeEnd(page(1))]);
    drop(mapping.begin_use().unwrap());
}
