//! What a device is told: everything, in one order, however slowly it reads; and what it reports.

use std::time::Duration;

use shootdown_core::{Access, AddrRange, Cause, Translation};
use shootdown_proto::v1;
use shootdown_proto::v1::session_request::Message as Ask;
use shootdown_proto::v1::session_response::Message as Say;
use shootdown_server::source::{Invalidation, Notifier as _, Verdict, Wait};

use crate::common::{Agent, Device, pages, quiesced, soon, unmap, until, wire};

/// 10, and 18 and 41 of the traps: a device that reads nothing keeps its connection, its outbox keeps
/// its bound, and in the end it is told all it must flush.
#[tokio::test]
async fn never_drop() {
    device_that_reads_nothing(Duration::ZERO).await;
}

/// The same for a minute.
#[tokio::test]
#[ignore = "takes a minute: cargo test -p shootdown-server --test invariants -- --ignored"]
async fn never_drop_in_a_minute() {
    device_that_reads_nothing(Duration::from_secs(60)).await;
}

async fn device_that_reads_nothing(how_long: Duration) {
    const EVENTS: u64 = 100_000;
    const BATCH: u64 = 1000;
    let agent = Agent::start_with(|config| {
        config.host.max_rounds_in_flight = EVENTS as usize + 1;
        config.host.session.lease.duration = Duration::from_secs(300);
        config.host.session.ack_timeout = Duration::from_secs(300);
    });
    let space = agent.space();
    let mut device = agent.device("sleeper").await;
    device.subscribe(space, pages(0, 4 * EVENTS)).await;
    let mut rounds = Vec::new();
    for event in 0..EVENTS {
        let no_longer = Wait::AtMost(Duration::ZERO);
        // Every second page, so that no two ranges touch.
        let invalidation = Invalidation { wait: no_longer, ..unmap(space, pages(2 * event, 1)) };
        let result = agent.host().invalidate_range_start(invalidation).await.expect("it is registered");
        assert_eq!(result.verdict, Verdict::NotQuiesced);
        rounds.push(result.seq.expect("it began"));
        if event % BATCH == 0 && !how_long.is_zero() {
            // Not a wait for something: that the device sleeps is what is tested.
            tokio::time::sleep(how_long / (EVENTS / BATCH) as u32).await;
        }
    }
    let listed = &agent.listed_sessions().await[0];
    assert_eq!(listed.phase(), v1::SessionPhase::Live);
    assert!(listed.notices_pending + listed.notices_unacked <= 1024 + 64, "{listed:?}");
    assert_eq!(agent.listed_space().await.rounds_in_flight, EVENTS);
    // It wakes up, and works through what it is told until it has been told everything.
    let mut told = std::collections::BTreeSet::new();
    let mut all = false;
    while agent.host().rounds_in_flight() > 0 {
        let notice = device.notice().await;
        match notice.range {
            Some(range) => drop(told.insert(range.start / 4096)),
            None => all = true,
        }
        device.ack(notice.number).await;
        if notice.range.is_none() {
            until(|| agent.host().rounds_in_flight() == 0).await;
        }
    }
    assert!(all, "more ranges than it may keep became one notice for everything");
    for seq in rounds {
        let result = agent.host().await_round(space, seq, Wait::ForTargets).await.expect("it began");
        assert!(result.is_quiesced());
    }
}

/// 20: test_young answers from what was reported, and clear_young takes it away.
#[tokio::test]
async fn young_is_conservative() {
    let agent = Agent::start();
    let space = agent.space();
    let mut device = agent.device("gpu").await;
    device.subscribe(space, pages(1, 8)).await;
    assert!(!agent.host().test_young(space, pages(1, 8)).unwrap());
    device
        .ask(Ask::Young(v1::Young { address_space_id: space.get(), ranges: vec![wire(pages(3, 1))] }))
        .await;
    device.settled().await;
    assert!(agent.host().test_young(space, pages(1, 8)).unwrap());
    assert!(!agent.host().test_young(space, pages(4, 1)).unwrap());
    let host = agent.host().clone();
    let aging =
        tokio::spawn(async move { host.clear_flush_young(space, pages(1, 8), Wait::ForTargets).await });
    let notice = device.notice().await;
    assert_eq!(notice.kind(), v1::NoticeKind::ClearFlushYoung);
    device.ack(notice.number).await;
    let result = soon(aging).await.unwrap().unwrap();
    assert!(result.young, "the device's ack said nothing, but it had reported the page before");
    assert!(!agent.host().test_young(space, pages(1, 8)).unwrap());
    // With a report in the ack.
    let host = agent.host().clone();
    let aging = tokio::spawn(async move { host.clear_young(space, pages(1, 8), Wait::ForTargets).await });
    let notice = device.notice().await;
    assert_eq!(notice.kind(), v1::NoticeKind::ClearYoung);
    let report = v1::FlushReport {
        notice: notice.number,
        young: vec![wire(pages(2, 1))],
        ..v1::FlushReport::default()
    };
    let (through, reports) = (notice.number, vec![report]);
    device.ask(Ask::Ack(v1::Ack { through, reports, ..v1::Ack::default() })).await;
    assert!(soon(aging).await.unwrap().unwrap().young);
}

/// 20: what a device reports with an ack is kept, also beside the notice and whatever the flush was for.
#[tokio::test]
async fn young_bits_of_any_flush_are_kept() {
    let agent = Agent::start();
    let space = agent.space();
    let mut device = agent.device("gpu").await;
    device.subscribe(space, pages(0, 16)).await;
    let host = agent.host().clone();
    let protect = Invalidation { cause: Cause::ProtectionPage, ..unmap(space, pages(2, 1)) };
    let round = tokio::spawn(async move { host.invalidate_range_start(protect).await.unwrap() });
    let notice = device.notice().await.number;
    let young = vec![wire(pages(1, 8))];
    let reports = vec![v1::FlushReport { notice, young, ..v1::FlushReport::default() }];
    device.ask(Ask::Ack(v1::Ack { through: notice, reports, ..v1::Ack::default() })).await;
    quiesced(round).await;
    assert!(agent.host().test_young(space, pages(7, 1)).unwrap());
    assert!(!agent.host().test_young(space, pages(9, 1)).unwrap());
    // What is unmapped is not young any more.
    let round = agent.round(space, pages(4, 8));
    let notice = device.notice().await.number;
    device.ack(notice).await;
    quiesced(round).await;
    assert!(!agent.host().test_young(space, pages(4, 8)).unwrap());
    assert!(agent.host().test_young(space, pages(3, 1)).unwrap());
}

/// Notices stand in an outbox in the order of their sequences, whoever sent them.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn notices_come_in_the_order_of_their_sequences() {
    const SOURCES: u64 = 4;
    const EVENTS: u64 = 200;
    let agent = Agent::start();
    let space = agent.space();
    let mut device = agent.device("gpu").await;
    // Apart from each other, so that none are merged.
    device.subscribe(space, pages(0, 2 * SOURCES)).await;
    let sources: Vec<_> = (0..SOURCES)
        .map(|page| {
            let host = agent.host().clone();
            tokio::spawn(async move {
                for _ in 0..EVENTS {
                    let round =
                        host.invalidate_page(space, 2 * page * 4096, Cause::Clear, Wait::ForTargets).await;
                    assert!(round.unwrap().is_quiesced());
                }
            })
        })
        .collect();
    let mut last = 0;
    while last < SOURCES * EVENTS {
        let notice = device.notice().await;
        assert!(notice.seq > last, "{notice:?} after {last}");
        last = notice.seq;
        device.ack(notice.number).await;
    }
    for source in sources {
        soon(source).await.unwrap();
    }
}

/// change_pte tells the new translation only while nothing else is going on with the page.
#[tokio::test]
async fn change_pte_degrades_beside_another_bracket_and_for_a_device_that_does_not_know_it() {
    let agent = Agent::start();
    let space = agent.space();
    let mut knows = agent.device("knows").await;
    let mut plain = Device::connect(&agent).await;
    let capabilities = Some(v1::Capabilities { enforces_lease: true, change_pte: false });
    plain.ask(Ask::Hello(v1::Hello { capabilities, ..Device::hello_of("plain") })).await;
    assert!(matches!(plain.say().await, Say::Welcome(_)));
    knows.subscribe(space, pages(1, 1)).await;
    plain.subscribe(space, pages(1, 1)).await;
    let translation =
        Translation { range: pages(1, 1), frame: shootdown_core::FrameNumber(42), access: Access::Read };
    let change = |host: shootdown_server::Host| {
        tokio::spawn(async move { host.change_pte(space, translation, Wait::ForTargets).await.unwrap() })
    };
    let round = change(agent.host().clone());
    let (told, degraded) = (knows.notice().await, plain.notice().await);
    assert_eq!((told.kind(), told.change_pte.unwrap().frame), (v1::NoticeKind::ChangePte, 42));
    assert_eq!(degraded.kind(), v1::NoticeKind::Invalidate);
    knows.ack(told.number).await;
    plain.ack(degraded.number).await;
    quiesced(round).await;
    let outer = agent.round(space, pages(1, 1));
    for device in [&mut knows, &mut plain] {
        let notice = device.notice().await.number;
        device.ack(notice).await;
    }
    quiesced(outer).await;
    let round = change(agent.host().clone());
    for device in [&mut knows, &mut plain] {
        let notice = device.notice().await;
        assert_eq!(notice.kind(), v1::NoticeKind::Invalidate, "the outer bracket is open");
        device.ack(notice.number).await;
    }
    quiesced(round).await;
}

/// 21: a program inside the host agent names bytes, and a device hears of the pages that they lie in.
#[tokio::test]
async fn range_over_approximates() {
    let agent = Agent::start();
    let space = agent.space();
    let mut device = agent.device("gpu").await;
    device.subscribe(space, pages(0, 16)).await;
    for (first, last) in [(0x1001, 0x1001), (0x1fff, 0x2000), (0x1000, 0x3001), (0x1800, 0x2fff)] {
        let bytes = AddrRange::new(first, last + 1).unwrap();
        let round = agent.round(space, bytes);
        let notice = device.notice().await;
        let whole = (first >> 12, (last >> 12) - (first >> 12) + 1);
        assert_eq!(notice.range.unwrap(), wire(pages(whole.0, whole.1)), "{bytes:?}");
        device.ack(notice.number).await;
        quiesced(round).await;
    }
}
