//! How other systems broke, and that this one does not: what no invariant's own test shows. docs/traps.md has
//! the whole list.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::time::Duration;

use common::{Agent, Device, connect_with, is_pending, pages, quiesced, soon, unmap, until};
use shootdown_core::{AddrRange, AddressSpaceId};
use shootdown_proto::v1;
use shootdown_proto::v1::page_service_client::PageServiceClient;
use shootdown_proto::v1::session_request::Message as Ask;
use shootdown_proto::v1::session_response::Message as Say;
use shootdown_server::source::{Notifier as _, Verdict, Wait};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Whether a round that was seen waiting still waits after a while, asked twice.
async fn waits(agent: &Agent, space: AddressSpaceId, seq: shootdown_core::Seq) {
    for _ in 0..2 {
        let wait = Wait::AtMost(Duration::from_millis(1));
        let result = agent.host().await_round(space, seq, wait).await.unwrap();
        assert_eq!(result.verdict, Verdict::NotQuiesced);
    }
}

/// Trap 4: an abort that covered only some slots of a batch of flushes.
#[tokio::test]
async fn of_a_batch_the_one_that_is_not_acked_waits_and_no_other_does_in_any_position() {
    let agent = Agent::start();
    let space = agent.space();
    let mut device = agent.device("gpu").await;
    device.subscribe(space, pages(0, 16)).await;
    let mut last = 0;
    for batch in 1..=6_u64 {
        for missing in 0..batch {
            let mut rounds = Vec::new();
            for slot in 0..batch {
                rounds.push(agent.round(space, pages(slot, 1)));
                // In the order of the slots: each is a notice of its own.
                last = device.notice().await.number;
            }
            let first = last - batch;
            let selective = (0..batch).filter(|slot| *slot != missing).map(|slot| first + slot + 1).collect();
            if batch > 1 {
                device.ask(Ask::Ack(v1::Ack { selective, ..v1::Ack::default() })).await;
            }
            let open = rounds.remove(usize::try_from(missing).unwrap());
            for round in rounds {
                let result = soon(round).await.unwrap();
                assert!(result.is_quiesced());
                agent.host().invalidate_range_end(space, result.seq.unwrap()).unwrap();
            }
            assert!(!open.is_finished());
            let mut admin =
                v1::admin_service_client::AdminServiceClient::new(agent.channel("admin.sock").await);
            let listed = admin.list_rounds(v1::ListRoundsRequest::default()).await.unwrap().into_inner();
            assert_eq!(listed.rounds.len(), 1);
            waits(&agent, space, shootdown_core::Seq::new(listed.rounds[0].seq).unwrap()).await;
            device.ack(last).await;
            let result = soon(open).await.unwrap();
            assert!(result.is_quiesced());
            agent.host().invalidate_range_end(space, result.seq.unwrap()).unwrap();
        }
    }
    assert_eq!(agent.listed_space().await.open_brackets, 0);
}

/// Trap 7: starts inside of starts, from one caller and from two, while somebody waits for a grace period.
#[tokio::test]
async fn brackets_inside_of_brackets_do_not_wait_for_each_other_nor_for_a_leaver() {
    let agent = Agent::start();
    let (host, space) = (agent.host().clone(), agent.space());
    let mut device = agent.device("gpu").await;
    device.subscribe(space, pages(0, 16)).await;
    let leaving = device.subscribe(space, pages(64, 1)).await;
    let outer = agent.round(space, pages(0, 8));
    let first = device.notice().await.number;
    // The leaver waits for the outer round's read section; the inner starts must not wait behind it.
    let request_id = device.request();
    device.ask(Ask::Unsubscribe(v1::Unsubscribe { request_id, subscription_id: leaving })).await;
    let inner = agent.round(space, pages(2, 2));
    assert_eq!(device.notice().await.number, first + 1);
    let other = agent.round(space, pages(1, 8));
    let newest = device.notice().await.number;
    device.ack(newest).await;
    let mut seqs = Vec::new();
    for round in [outer, inner, other] {
        let result = soon(round).await.unwrap();
        assert!(result.is_quiesced());
        seqs.push(result.seq.unwrap());
    }
    assert!(matches!(device.say().await, Say::Unsubscribed(_)));
    // Outer first: what overlaps is held until the last of them has ended.
    device.start_fault(space, pages(2, 1)).await;
    for (index, seq) in seqs.into_iter().enumerate() {
        device.settled().await;
        assert!(device.is_silent().await, "held by bracket {index}");
        host.invalidate_range_end(space, seq).unwrap();
    }
    device.grant().await;
}

/// Trap 23: of the connections of one device each may die.
#[tokio::test]
async fn a_dead_connection_for_pages_costs_the_session_nothing_and_a_dead_session_ends_the_pages() {
    let agent = Agent::start_with(|config| {
        config.host.session.lease.duration = Duration::from_millis(300);
        config.host.session.lease.margin = Duration::from_millis(20);
        config.host.session.ack_timeout = Duration::from_millis(50);
    });
    let space = agent.space();
    let mut device = agent.device("gpu").await;
    device.subscribe(space, pages(0, 1)).await;
    let read = |device: &Device| v1::ReadRequest {
        session_id: device.session,
        epoch: device.epoch,
        spans: vec![v1::FrameSpan { frame: 0, offset: 0, length: 1 }],
    };
    let mut dying = PageServiceClient::new(agent.channel("device.sock").await);
    dying.read(read(&device)).await.unwrap();
    drop(dying);
    device.settled().await;
    let mut frames = PageServiceClient::new(agent.channel("device.sock").await);
    frames.read(read(&device)).await.unwrap();
    let request = read(&device);
    device.cut();
    // Its lease runs out, and nobody has to tell the other connection.
    soon(async {
        while frames.read(request.clone()).await.is_ok() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    until(|| agent.host().rounds_in_flight() == 0).await;
    quiesced(agent.round(space, pages(0, 1))).await;
}

/// Trap 27: a page that is taken away again and again, by a source that leaves no pause, while two devices
/// want it. Each gets it within a bounded number of rounds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_devices_that_want_a_page_which_is_taken_away_all_the_time_both_get_it() {
    const GRANTS: usize = 20;
    let agent = Agent::start();
    let (host, space) = (agent.host().clone(), agent.space());
    let (count, rounds) = watch::channel(0_usize);
    let stop = CancellationToken::new();
    let (mut one, mut two) = (agent.device("one").await, agent.device("two").await);
    one.subscribe(space, pages(0, 1)).await;
    two.subscribe(space, pages(0, 1)).await;
    let source = {
        let stop = stop.clone();
        tokio::spawn(async move {
            while !stop.is_cancelled() {
                let result = host.invalidate_range_start(unmap(space, pages(0, 1))).await.unwrap();
                host.invalidate_range_end(space, result.seq.unwrap()).unwrap();
                count.send_modify(|count| *count += 1);
            }
        })
    };
    let waits = tokio::join!(wants_it(&mut one, space, &rounds), wants_it(&mut two, space, &rounds));
    stop.cancel();
    soon(source).await.unwrap();
    let most = waits.0.iter().chain(&waits.1).max().unwrap();
    assert!(*most < 1000, "rounds between question and grant: {waits:?}");

    /// Rounds between each question and its grant.
    async fn wants_it(
        device: &mut Device,
        space: AddressSpaceId,
        rounds: &watch::Receiver<usize>,
    ) -> Vec<usize> {
        let mut waits = Vec::new();
        let mut asked = *rounds.borrow();
        device.start_fault(space, pages(0, 1)).await;
        while waits.len() < GRANTS {
            match device.say().await {
                Say::Notices(notices) => device.ack(notices.notices.last().unwrap().number).await,
                Say::Grant(_) => {
                    waits.push(*rounds.borrow() - asked);
                    asked = *rounds.borrow();
                    device.start_fault(space, pages(0, 1)).await;
                }
                // Asked again, at the back: what a device does.
                Say::Error(error) if error.reason() == v1::ErrorReason::FaultContended => {
                    device.start_fault(space, pages(0, 1)).await;
                }
                other => panic!("{other:?}"),
            }
        }
        // The other device may need the rounds to go on.
        device.ask(Ask::Leave(v1::Leave {})).await;
        waits
    }
}

/// Trap 39: bytes that nobody reads, on the connection that is made for them.
#[tokio::test]
async fn bulk_bytes_that_nobody_reads_delay_no_notice() {
    let agent = Agent::start();
    let space = agent.space();
    let mut device = agent.device("gpu").await;
    device.subscribe(space, pages(0, 4)).await;
    let channel = connect_with(&agent.socket("device.sock"), 1 << 16).await;
    let span = v1::FrameSpan { frame: 0, offset: 0, length: 4096 };
    let request = v1::ReadRequest { session_id: device.session, epoch: device.epoch, spans: vec![span; 256] };
    let mut unread = Vec::new();
    for _ in 0..64 {
        let mut frames = PageServiceClient::new(channel.clone()).max_decoding_message_size(2 << 20);
        let request = request.clone();
        // Begun, and then not read: 64 MiB for a window of 64 KiB.
        let mut reading = Box::pin(async move { frames.read(request).await });
        assert!(is_pending(&mut reading).await);
        unread.push(reading);
    }
    for page in 0..100 {
        let round = agent.round(space, pages(page % 4, 1));
        let notice = device.notice().await.number;
        device.ack(notice).await;
        let result = soon(round).await.unwrap();
        agent.host().invalidate_range_end(space, result.seq.unwrap()).unwrap();
    }
    assert_eq!(unread.len(), 64);
}

/// Trap 19: a bound on what is kept apart, with more to keep than the bound: everything is told, as one.
#[tokio::test]
async fn a_limit_of_one_with_two_ranges_tells_of_both() {
    let agent = Agent::start_with(|config| {
        config.host.session.outbox.max_pending = 1;
        config.host.session.outbox.window = 1;
    });
    let space = agent.space();
    let mut device = agent.device("small").await;
    device.subscribe(space, AddrRange::ALL).await;
    let first = agent.round(space, pages(1, 1));
    assert_eq!(device.notice().await.number, 1);
    let (second, third) = (agent.round(space, pages(100, 1)), agent.round(space, pages(300, 1)));
    until(|| agent.host().rounds_in_flight() == 3).await;
    device.ack(1).await;
    quiesced(first).await;
    let all = device.notice().await;
    assert_eq!((all.address_space_id, all.flush_reason()), (0, v1::FlushReason::OutboxFull));
    assert!(!second.is_finished() && !third.is_finished());
    device.ack(2).await;
    quiesced(second).await;
    quiesced(third).await;
}
