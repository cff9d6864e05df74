//! When a notice is acked, and how.

mod host;

use host::{Call, FakeHost, Plan, TestTlb, notice, notice_of, number, numbers, page, pages, soon};
use shootdown_client::{AllFlushed, EndCause, FlushAllCause, FlushReason, Flushed, Violation};
use shootdown_core::{Ack, NoticeKind, Scope};
use shootdown_proto::message::DeviceSays;

/// Invariant 2. That nothing comes is shown by what does: the ack of a later notice, which leaves out the
/// one whose flush is held.
#[tokio::test]
async fn ack_means_stopped() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (_device, mut session) = host.connect(host.config(), &tlb).await;
    let release = tlb.hold(1);
    session.notices([notice(1, page(1)), notice(2, page(2))]).await;
    assert_eq!(session.ack().await, Ack { through: None, selective: numbers([2]), reports: vec![] });
    session.notices([notice(3, page(3))]).await;
    assert_eq!(session.ack().await, Ack { through: None, selective: numbers([3]), reports: vec![] });
    release.send(()).unwrap();
    assert_eq!(session.ack().await, Ack { through: Some(number(3)), selective: vec![], reports: vec![] });
}

#[tokio::test]
async fn flushes_run_at_the_same_time_and_are_acked_in_the_order_in_which_they_end() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (_device, mut session) = host.connect(host.config(), &tlb).await;
    let held: Vec<_> = (1..=3).map(|notice| tlb.hold(notice)).collect();
    session.notices((1..=3).map(|n| notice(n, page(n)))).await;
    tlb.wait_for_flush_all(FlushAllCause::Connecting).await;
    for n in 1..=3 {
        assert!(matches!(tlb.call().await, Call::Invalidate(it) if it.notice == Some(number(n))));
    }
    let [one, two, three] = held.try_into().unwrap();
    three.send(()).unwrap();
    assert_eq!(session.ack().await.selective, numbers([3]));
    one.send(()).unwrap();
    assert_eq!(session.ack().await, Ack { through: Some(number(1)), selective: vec![], reports: vec![] });
    two.send(()).unwrap();
    assert_eq!(session.ack().await.through, Some(number(3)));
}

#[tokio::test]
async fn a_notice_beyond_the_parallel_flushes_waits_for_one_to_end() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let mut config = host.config();
    config.parallel_flushes = 2;
    let (_device, mut session) = host.connect(config, &tlb).await;
    let (one, _two) = (tlb.hold(1), tlb.hold(2));
    session.notices((1..=3).map(|n| notice(n, page(n)))).await;
    tlb.wait_for_flush_all(FlushAllCause::Connecting).await;
    for n in 1..=2 {
        assert!(matches!(tlb.call().await, Call::Invalidate(it) if it.notice == Some(number(n))));
    }
    assert_eq!(tlb.calls().await, [], "the third waits");
    one.send(()).unwrap();
    assert!(matches!(tlb.call().await, Call::Invalidate(it) if it.notice == Some(number(3))));
    let mut through = session.ack().await;
    while through.selective.is_empty() {
        through = session.ack().await;
    }
    assert_eq!((through.through, through.selective), (Some(number(1)), numbers([3])));
}

#[tokio::test]
async fn what_was_flushed_while_the_transport_was_busy_is_one_ack() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (_device, mut session) = host.connect(host.config(), &tlb).await;
    // On this runtime of one thread the whole batch is applied before the transport is asked again.
    session.notices((1..=500).map(|n| notice(n, page(n)))).await;
    assert_eq!(session.ack().await, Ack { through: Some(number(500)), selective: vec![], reports: vec![] });
}

/// h2 closes a connection with too many small unread frames: the stream is read while nothing is flushed.
#[tokio::test]
async fn a_window_of_messages_of_one_notice_each_is_read_while_every_flush_is_held() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let mut config = host.config();
    (config.window, config.parallel_flushes) = (4096, 1);
    let (device, mut session) = host.connect(config, &tlb).await;
    let release = tlb.hold(1);
    for n in 1..=4096 {
        session.notices([notice(n, page(n))]).await;
    }
    host::until(|| device.counts().flushes == 4096).await;
    release.send(()).unwrap();
    while session.ack().await.through != Some(number(4096)) {}
}

#[tokio::test]
async fn a_report_comes_with_the_first_ack_of_its_notice_and_with_timing_where_it_is_asked_for() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (_device, mut session) =
        host.connect_with(host.config(), &tlb, |welcome| welcome.wants_timing = true).await;
    let flushed = Flushed { young: vec![page(1)], dirty: vec![page(3), page(2)] };
    tlb.plan(1, Plan::Bring(flushed));
    session.notices([notice(1, pages(1, 3))]).await;
    let ack = session.ack().await;
    assert_eq!(ack.through, Some(number(1)));
    let [report] = &ack.reports[..] else { panic!("one report, not {:?}", ack.reports) };
    assert_eq!(
        (report.notice, &report.young[..], &report.dirty[..]),
        (number(1), &[page(1)][..], &[pages(2, 2)][..])
    );
    let timing = report.timing.unwrap();
    assert!(timing.received <= timing.flushed);
}

#[tokio::test]
async fn reports_too_large_for_one_message_are_spread_and_each_notice_is_named_once_with_its_report() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (_device, mut session) = host.connect(host.config(), &tlb).await;
    let many: Vec<_> = (0..512).map(|n| page(n * 2)).collect();
    for n in 1..=60 {
        tlb.plan(n, Plan::Bring(Flushed { young: many.clone(), dirty: many.clone() }));
    }
    session.notices((1..=60).map(|n| notice(n, pages(0, 1024)))).await;
    let (mut through, mut reported, mut acks) = (0, Vec::new(), 0);
    while through < 60 {
        let ack = session.ack().await;
        let now = ack.through.unwrap().get();
        assert!(now > through, "each names something new");
        assert!(ack.reports.iter().all(|it| it.notice.get() > through && it.notice.get() <= now));
        reported.extend(ack.reports.iter().map(|it| it.notice.get()));
        (through, acks) = (now, acks + 1);
    }
    assert_eq!(reported, (1..=60).collect::<Vec<_>>());
    assert!(acks > 1, "60 reports of 1024 ranges are more than a message holds");
}

/// Invariant 9.
#[tokio::test]
async fn contiguity() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (device, session) = host.connect(host.config(), &tlb).await;
    session.notices([notice(1, page(1)), notice(3, page(3))]).await;
    let end = tokio::spawn(async move { soon(device.lost()).await });
    tlb.wait_for_flush_all(FlushAllCause::Lost).await;
    let words = session.close().await;
    assert!(
        words.iter().all(|it| match it {
            DeviceSays::Ack { ack, .. } => ack.through <= Some(number(1)) && ack.selective.is_empty(),
            other => *other == DeviceSays::Leave,
        }),
        "{words:?}"
    );
    assert_eq!(words.last(), Some(&DeviceSays::Leave), "everything was flushed, and the host is told");
    let end = end.await.unwrap();
    assert!(matches!(end.cause, EndCause::Gap(gap) if gap.expected == number(2)), "{end:?}");
    assert_eq!(end.flushed, AllFlushed::Yes);
}

#[tokio::test]
async fn a_flush_that_panics_is_never_acked_and_ends_the_session() {
    for held in [false, true] {
        let mut host = FakeHost::start();
        let tlb = TestTlb::new();
        let (device, session) = host.connect(host.config(), &tlb).await;
        let gate = device.gate();
        // At the first poll, where the stream is read, or later in a task: behind a full house it waits.
        let _busy = held.then(|| tlb.hold(1));
        let first = if held { 2 } else { 1 };
        tlb.plan(first, Plan::Panic);
        session.notices((1..=first).map(|n| notice(n, page(n)))).await;
        tlb.wait_for_flush_all(FlushAllCause::Lost).await;
        assert!(gate.check().is_err(), "the gate is shut before anything is flushed");
        assert_eq!(session.close().await, [], "neither an ack nor Leave, which stands for one");
        assert!(matches!(soon(device.lost()).await.cause, EndCause::FlushPanicked));
    }
}

#[tokio::test]
async fn a_flush_that_panics_after_it_slept_is_never_acked() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let mut config = host.config();
    config.parallel_flushes = 1;
    let (device, mut session) = host.connect(config, &tlb).await;
    let first = tlb.hold(1);
    tlb.plan(2, Plan::Panic);
    session.notices((1..=2).map(|n| notice(n, page(n)))).await;
    tlb.wait_for_flush_all(FlushAllCause::Connecting).await;
    assert!(matches!(tlb.call().await, Call::Invalidate(it) if it.notice == Some(number(1))));
    first.send(()).unwrap();
    let words = session.last_words().await;
    assert!(
        words.iter().all(|it| matches!(it, DeviceSays::Ack { ack, .. } if ack.through == Some(number(1)))),
        "{words:?}"
    );
    drop(session);
    assert!(matches!(soon(device.lost()).await.cause, EndCause::FlushPanicked));
}

#[tokio::test]
async fn a_device_whose_flush_all_panicked_is_not_said_to_be_clean() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (device, session) = host.connect(host.config(), &tlb).await;
    tlb.panic_in_flush_all();
    let (end, words) = tokio::join!(soon(device.leave()), session.close());
    assert_eq!(end.flushed, AllFlushed::No);
    assert_eq!(words, [], "no Leave");
}

#[tokio::test]
async fn a_host_that_exceeds_the_window_loses_the_session() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let mut config = host.config();
    config.window = 2;
    let (device, session) = host.connect(config, &tlb).await;
    let _held: Vec<_> = (1..=3).map(|n| tlb.hold(n)).collect();
    session.notices((1..=3).map(|n| notice(n, page(n)))).await;
    session.close().await;
    let end = soon(device.lost()).await;
    assert!(matches!(end.cause, EndCause::Violation(Violation::WindowExceeded { window: 2 })), "{end:?}");
}

#[tokio::test]
async fn a_flush_all_is_one_call_and_what_may_be_young_is_told_before_its_ack() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (device, mut session) = host.connect(host.config(), &tlb).await;
    let _subscription = session.subscribe(&device, pages(0, 64)).await;
    let mapping = session.mapped(&device, 5).await;
    drop(mapping.begin_use().unwrap());
    let mut all = notice(1, page(0));
    (all.scope, all.seq, all.flush_reason) = (Scope::FlushAll, None, Some(FlushReason::OutboxFull));
    session.notices([all]).await;
    tlb.wait_for_flush_all(FlushAllCause::Host(FlushReason::OutboxFull)).await;
    let young = session.hear().await;
    assert_eq!(young, DeviceSays::Young { address_space: host::space(), ranges: vec![page(5)] });
    assert_eq!(session.ack().await, Ack { through: Some(number(1)), selective: vec![], reports: vec![] });
    assert!(mapping.begin_use().is_err());
}

#[tokio::test]
async fn clear_young_withdraws_nothing_and_reports_what_was_used() {
    let mut host = FakeHost::start();
    let tlb = TestTlb::new();
    let (device, mut session) = host.subscribed(host.config(), &tlb).await;
    let mapping = session.mapped(&device, 5).await;
    drop(mapping.begin_use().unwrap());
    session.notices([notice_of(1, NoticeKind::ClearYoung, pages(0, 64))]).await;
    let ack = session.ack().await;
    assert_eq!(ack.reports[0].young, [page(5)]);
    drop(mapping.begin_use().expect("it was not withdrawn"));
    // With a translation in a TLB of the device's own nobody knows: the whole range is young.
    let (grant, ()) = tokio::join!(
        soon(device.fault_ticketed(host::space(), page(6), shootdown_client::Access::Read)),
        async {
            let fault = session.fault().await;
            session.grant(&fault).await;
        }
    );
    grant.unwrap().tickets.remove(0).commit_raw().unwrap();
    session.notices([notice_of(2, NoticeKind::ClearYoung, pages(0, 64))]).await;
    assert_eq!(session.ack().await.reports[0].young, [pages(0, 64)]);
    // A device that does know is believed.
    *tlb.young.lock() = Some(vec![]);
    session.notices([notice_of(3, NoticeKind::ClearYoung, pages(32, 32))]).await;
    assert_eq!(session.ack().await.reports, []);
}
