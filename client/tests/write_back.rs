//! The accelerator's write-back cache: what was written is with the host before its page is given back.
#![cfg(feature = "agent")]
#![allow(clippy::unwrap_used, reason = "a helper of tests, which fail by panicking")]

mod host;

use std::sync::Arc;

use bytes::Bytes;
use futures_util::poll;
use host::{FakeHost, FakeSession, notice, notice_of, number, page, pages, soon, space, until};
use shootdown_client::agent::{Accelerator, AcceleratorConfig, AccessError};
use shootdown_client::{
    AllFlushed, Cause, Device, DeviceTlb, EndCause, FlushAllCause, Invalidation, UseRefused,
};
use shootdown_core::NoticeKind;
use shootdown_proto::message::DeviceSays;

/// A cache and a TLB of so many pages.
fn hardware(tlb_ways: usize, cache_pages: usize) -> AcceleratorConfig {
    AcceleratorConfig { tlb_sets: 1, tlb_ways, cache_pages, ..AcceleratorConfig::default() }
}

async fn attached(
    host: &mut FakeHost,
    config: AcceleratorConfig,
) -> (Arc<Accelerator>, Device<Accelerator>, FakeSession) {
    let accelerator = Accelerator::new(config);
    let (device, session) = host.subscribed(host.config(), &accelerator).await;
    accelerator.attach(&device).unwrap();
    (accelerator, device, session)
}

/// An access that faults, and the host that grants it.
async fn granted<T>(session: &mut FakeSession, access: impl Future<Output = T>) -> T {
    let (done, ()) = tokio::join!(soon(access), async {
        let fault = session.fault().await;
        session.grant(&fault).await;
    });
    done
}

async fn written(accelerator: &Accelerator, session: &mut FakeSession, number: u64, byte: u8) {
    granted(session, accelerator.write(space(), number << 12, whole(byte))).await.unwrap();
}

fn whole(byte: u8) -> Bytes {
    Bytes::from(vec![byte; 4096])
}

/// As by [`Subscription::unsubscribe`](shootdown_client::Subscription::unsubscribe).
fn asked_by_the_device(number: u64) -> Invalidation {
    let (address_space, range) = (space(), page(number));
    Invalidation { address_space, range, cause: Cause::Unmap, owner: None, seq: None, notice: None }
}

fn first_byte(host: &FakeHost, frame: u64) -> Option<u8> {
    host.frames.bytes.lock().get(&frame).map(|bytes| bytes[0])
}

#[tokio::test]
async fn a_write_stays_in_the_cache_until_its_page_is_flushed_and_is_with_the_host_before_the_ack() {
    let mut host = FakeHost::start();
    let (accelerator, _device, mut session) = attached(&mut host, AcceleratorConfig::default()).await;
    host.frames.bytes.lock().insert(1, vec![7; 4096]);
    let write = accelerator.write(space(), 0x1004, Bytes::from_static(b"dirt"));
    granted(&mut session, write).await.unwrap();
    let read = accelerator.read(space(), 0x1000, 10).await.unwrap();
    assert_eq!((&read.bytes[..], read.from_cache), (&b"\x07\x07\x07\x07dirt\x07\x07"[..], true));
    assert_eq!((accelerator.dirty_pages(), first_byte(&host, 1)), (1, Some(7)));
    assert_eq!(*host.frames.written.lock(), [], "the host has heard nothing of it");

    // Somebody else writes beside it.
    host.frames.bytes.lock().get_mut(&1).unwrap()[0] = 9;
    let held = Arc::clone(&host.frames.answers).write_owned().await;
    session.notices([notice(1, page(1)), notice_of(2, NoticeKind::ClearYoung, page(90))]).await;
    assert_eq!(session.ack().await.through, None, "what was written is on its way");
    assert_eq!((accelerator.dirty_pages(), accelerator.dmas_in_flight()), (0, 1));
    drop(held);
    let ack = session.ack().await;
    assert_eq!((ack.through, &ack.reports[0].dirty[..]), (Some(number(2)), &[page(1)][..]));
    assert_eq!(host.frames.bytes.lock()[&1][..10], *b"\x09\x07\x07\x07dirt\x07\x07");
    assert_eq!(*host.frames.written.lock(), [(1, 4, 4)], "nothing that was not written goes back");
    assert_eq!((accelerator.access_counts().written_back, accelerator.cached_pages()), (1, 0));
}

#[tokio::test]
async fn a_write_of_a_whole_page_fetches_nothing() {
    let mut host = FakeHost::start();
    let (accelerator, _device, mut session) = attached(&mut host, AcceleratorConfig::default()).await;
    let _held = Arc::clone(&host.frames.answers).write_owned().await;
    written(&accelerator, &mut session, 1, 5).await;
    assert!(accelerator.read(space(), 0x1000, 1).await.unwrap().from_cache);
}

#[tokio::test]
async fn of_two_flushes_that_overlap_neither_returns_before_the_page_is_delivered() {
    let mut host = FakeHost::start();
    let (accelerator, _device, mut session) = attached(&mut host, AcceleratorConfig::default()).await;
    written(&accelerator, &mut session, 1, 5).await;
    let held = Arc::clone(&host.frames.answers).write_owned().await;
    session.notices([notice(1, page(1)), notice(2, pages(0, 9))]).await;
    session.notices([notice_of(3, NoticeKind::ClearYoung, page(90))]).await;
    let ack = session.ack().await;
    assert_eq!((ack.through, ack.selective), (None, vec![number(3)]));
    drop(held);
    while session.ack().await.through != Some(number(3)) {}
    assert_eq!(first_byte(&host, 1), Some(5));
}

#[tokio::test]
async fn a_flush_that_is_dropped_leaves_its_write_backs_to_the_next() {
    let mut host = FakeHost::start();
    let (accelerator, _device, mut session) = attached(&mut host, AcceleratorConfig::default()).await;
    written(&accelerator, &mut session, 1, 5).await;
    let held = Arc::clone(&host.frames.answers).write_owned().await;
    {
        let mut flush = Box::pin(accelerator.invalidate(asked_by_the_device(1)));
        assert!(poll!(&mut flush).is_pending());
    }
    let mut flush = Box::pin(accelerator.invalidate(asked_by_the_device(1)));
    assert!(poll!(&mut flush).is_pending(), "the first has begun it, and nobody has finished it");
    drop(held);
    soon(flush).await;
    assert_eq!((first_byte(&host, 1), accelerator.dmas_in_flight()), (Some(5), 0));
}

/// The write has begun before the flush and fetches its page: it is accepted, so the flush delivers it.
#[tokio::test]
async fn a_flush_delivers_the_writes_that_it_finds_on_their_way_into_the_cache() {
    let mut host = FakeHost::start();
    let (accelerator, _device, mut session) = attached(&mut host, AcceleratorConfig::default()).await;
    let held = Arc::clone(&host.frames.answers).write_owned().await;
    let mut writing = Box::pin(accelerator.write(space(), 0x1000, Bytes::from_static(b"late")));
    tokio::select! {
        biased;
        _ = &mut writing => panic!("its page is held"),
        fault = session.fault() => session.grant(&fault).await,
    }
    tokio::select! {
        biased;
        _ = &mut writing => panic!("its page is held"),
        () = until(|| accelerator.dmas_in_flight() == 1) => {}
    }
    session.notices([notice(1, page(1)), notice_of(2, NoticeKind::ClearYoung, page(90))]).await;
    assert_eq!(session.ack().await.through, None);
    assert_eq!(accelerator.tlb_entries(), 0);
    drop(held);
    soon(writing).await.unwrap();
    let ack = session.ack().await;
    assert_eq!((ack.through, &ack.reports[0].dirty[..]), (Some(number(2)), &[page(1)][..]));
    assert_eq!(host.frames.bytes.lock()[&1][..4], *b"late");
}

#[tokio::test]
async fn a_read_that_a_write_overtakes_does_not_undo_it() {
    let mut host = FakeHost::start();
    let (accelerator, _device, mut session) = attached(&mut host, AcceleratorConfig::default()).await;
    let held = Arc::clone(&host.frames.answers).write_owned().await;
    let mut reading = Box::pin(accelerator.read(space(), 0x1000, 4));
    tokio::select! {
        biased;
        _ = &mut reading => panic!("its answer is held"),
        fault = session.fault() => session.grant(&fault).await,
    }
    tokio::select! {
        biased;
        _ = &mut reading => panic!("its answer is held"),
        () = until(|| accelerator.dmas_in_flight() == 1) => {}
    }
    written(&accelerator, &mut session, 1, 5).await;
    drop(held);
    soon(reading).await.unwrap();
    let after = accelerator.read(space(), 0x1000, 1).await.unwrap();
    assert_eq!((after.bytes[0], after.from_cache), (5, true));
    session.notices([notice(1, page(1))]).await;
    session.ack().await;
    assert_eq!(first_byte(&host, 1), Some(5));
}

#[tokio::test]
async fn a_dirty_page_is_delivered_before_it_makes_room_in_the_cache() {
    let mut host = FakeHost::start();
    let (accelerator, _device, mut session) = attached(&mut host, hardware(8, 1)).await;
    written(&accelerator, &mut session, 1, 5).await;
    let held = Arc::clone(&host.frames.answers).write_owned().await;
    {
        let mut second = Box::pin(accelerator.write(space(), 0x2000, whole(6)));
        tokio::select! {
            biased;
            _ = &mut second => panic!("there is no room yet"),
            fault = session.fault() => session.grant(&fault).await,
        }
        tokio::select! {
            biased;
            _ = &mut second => panic!("there is no room yet"),
            () = until(|| accelerator.dmas_in_flight() == 2) => {}
        }
        assert_eq!(accelerator.read(space(), 0x1000, 1).await.unwrap().bytes[0], 5, "it is still there");
        // Nobody waits any more: what is on its way goes on.
    }
    drop(held);
    until(|| accelerator.dmas_in_flight() == 0).await;
    assert_eq!((first_byte(&host, 1), first_byte(&host, 2)), (Some(5), None));
    soon(accelerator.write(space(), 0x2000, whole(6))).await.unwrap();
    assert_eq!((accelerator.cached_pages(), accelerator.dirty_pages()), (1, 1));
    let back = soon(accelerator.read(space(), 0x1000, 1)).await.unwrap();
    assert_eq!((back.bytes[0], back.from_cache, first_byte(&host, 2)), (5, false, Some(6)));
}

#[tokio::test]
async fn what_was_written_through_an_entry_is_delivered_before_it_makes_room_in_the_tlb() {
    let mut host = FakeHost::start();
    let (accelerator, _device, mut session) = attached(&mut host, hardware(1, 8)).await;
    written(&accelerator, &mut session, 1, 5).await;
    let held = Arc::clone(&host.frames.answers).write_owned().await;
    let mut second = Box::pin(accelerator.write(space(), 0x2000, whole(6)));
    tokio::select! {
        biased;
        _ = &mut second => panic!("there is no room yet"),
        fault = session.fault() => session.grant(&fault).await,
    }
    tokio::select! {
        biased;
        _ = &mut second => panic!("there is no room yet"),
        () = until(|| accelerator.dmas_in_flight() == 1) => {}
    }
    let first = soon(accelerator.read(space(), 0x1000, 1)).await.unwrap();
    assert_eq!((first.bytes[0], first.from_cache), (5, true), "through its entry, which is still there");
    drop(held);
    soon(second).await.unwrap();
    assert_eq!((first_byte(&host, 1), accelerator.tlb_entries(), accelerator.dirty_pages()), (Some(5), 1, 1));
    // The flush still tells what the entry that went was used for.
    session.notices([notice(1, page(1))]).await;
    assert_eq!(session.ack().await.reports[0].dirty, [page(1)]);
}

#[tokio::test]
async fn a_write_into_the_cache_is_refused_when_the_gate_is_shut() {
    let mut host = FakeHost::start();
    let (accelerator, device, mut session) = attached(&mut host, AcceleratorConfig::default()).await;
    written(&accelerator, &mut session, 1, 5).await;
    let leaving = device.leave();
    tokio::pin!(leaving);
    assert!(poll!(&mut leaving).is_pending());
    let refused = accelerator.write(space(), 0x1000, whole(6)).await;
    assert!(matches!(refused, Err(AccessError::UseRefused(UseRefused::SessionEnded))), "{refused:?}");
    // Leave says that the device holds nothing, so it comes after what was written.
    let (end, ()) = tokio::join!(soon(&mut leaving), async {
        while session.hear().await != DeviceSays::Leave {}
        assert_eq!(first_byte(&host, 1), Some(5));
        drop(session);
    });
    assert_eq!((end.flushed, accelerator.access_counts().dirty_lost), (AllFlushed::Yes, 0));
}

/// The fetch of a partial write takes longer than the lease.
#[tokio::test]
async fn a_write_whose_fetch_outlasts_the_session_is_refused() {
    let mut host = FakeHost::start();
    let (accelerator, device, mut session) = attached(&mut host, AcceleratorConfig::default()).await;
    let held = Arc::clone(&host.frames.answers).write_owned().await;
    let mut writing = Box::pin(accelerator.write(space(), 0x1000, Bytes::from_static(b"late")));
    tokio::select! {
        biased;
        _ = &mut writing => panic!("its page is held"),
        fault = session.fault() => session.grant(&fault).await,
    }
    tokio::select! {
        biased;
        _ = &mut writing => panic!("its page is held"),
        () = until(|| accelerator.dmas_in_flight() == 1) => {}
    }
    let mut leaving = Box::pin(device.leave());
    assert!(poll!(&mut leaving).is_pending());
    drop(held);
    let refused = soon(writing).await;
    assert!(matches!(refused, Err(AccessError::UseRefused(UseRefused::SessionEnded))), "{refused:?}");
    assert_eq!(accelerator.dirty_pages(), 0);
}

#[tokio::test]
async fn a_flush_that_cannot_deliver_is_never_acked_and_ends_the_session() {
    let mut host = FakeHost::start();
    let (accelerator, device, mut session) = attached(&mut host, AcceleratorConfig::default()).await;
    written(&accelerator, &mut session, 1, 5).await;
    *host.frames.fenced.lock() = true;
    session.notices([notice(1, page(1))]).await;
    let words = session.last_words().await;
    assert!(
        words.iter().all(|says| !matches!(says, DeviceSays::Ack { .. } | DeviceSays::Leave)),
        "{words:?}"
    );
    drop(session);
    let end = soon(device.lost()).await;
    assert!(matches!(end.cause, EndCause::FlushPanicked), "{end:?}");
    assert_eq!(end.flushed, AllFlushed::Yes, "what is lost is not held");
    let counts = accelerator.access_counts();
    assert_eq!((counts.written_back, counts.dirty_lost, accelerator.cached_pages()), (0, 1, 0));
}

#[tokio::test]
async fn a_page_whose_eviction_failed_is_not_seen_and_its_flush_is_not_acked() {
    let mut host = FakeHost::start();
    let (accelerator, device, mut session) = attached(&mut host, hardware(8, 1)).await;
    written(&accelerator, &mut session, 1, 5).await;
    *host.frames.fenced.lock() = true;
    written(&accelerator, &mut session, 2, 6).await;
    let read = accelerator.read(space(), 0x1000, 1).await;
    assert!(matches!(read, Err(AccessError::Lost { .. })), "{read:?}");
    let write = accelerator.write(space(), 0x1000, whole(7)).await;
    assert!(matches!(write, Err(AccessError::Lost { .. })), "{write:?}");
    // Other pages are flushed as before.
    session.notices([notice(1, page(3))]).await;
    assert_eq!(session.ack().await.through, Some(number(1)));
    session.notices([notice(2, page(1))]).await;
    let words = session.last_words().await;
    assert!(
        words.iter().all(|says| !matches!(says, DeviceSays::Ack { .. } | DeviceSays::Leave)),
        "{words:?}"
    );
    drop(session);
    soon(device.lost()).await;
    assert_eq!(accelerator.access_counts().dirty_lost, 2);
    // A new session begins with nothing.
    accelerator.flush_all(FlushAllCause::Connecting).await;
    *host.frames.fenced.lock() = false;
    let (device, mut session) = host.subscribed(host.config(), &accelerator).await;
    accelerator.attach(&device).unwrap();
    written(&accelerator, &mut session, 1, 8).await;
    session.notices([notice(1, page(1))]).await;
    session.ack().await;
    assert_eq!(first_byte(&host, 1), Some(8));
}

#[tokio::test]
async fn a_device_that_leaves_and_cannot_deliver_does_not_say_that_it_left() {
    let mut host = FakeHost::start();
    let (accelerator, device, mut session) = attached(&mut host, AcceleratorConfig::default()).await;
    written(&accelerator, &mut session, 1, 5).await;
    *host.frames.fenced.lock() = true;
    let (end, words) = tokio::join!(soon(device.leave()), session.last_words());
    assert!(words.iter().all(|says| !matches!(says, DeviceSays::Leave)), "{words:?}");
    assert_eq!((end.flushed, accelerator.access_counts().dirty_lost), (AllFlushed::No, 1));
}

#[tokio::test]
async fn what_is_not_delivered_when_the_host_is_gone_is_counted() {
    let mut host = FakeHost::start();
    let (accelerator, device, mut session) = attached(&mut host, AcceleratorConfig::default()).await;
    written(&accelerator, &mut session, 1, 5).await;
    written(&accelerator, &mut session, 2, 5).await;
    *host.frames.fenced.lock() = true;
    drop(session);
    let end = soon(device.lost()).await;
    assert_eq!(end.flushed, AllFlushed::Yes);
    assert_eq!((accelerator.access_counts().dirty_lost, accelerator.dirty_pages()), (2, 0));
}

#[tokio::test]
async fn what_was_written_is_delivered_while_the_lease_of_a_lost_session_lasts() {
    let mut host = FakeHost::start();
    let (accelerator, device, mut session) = attached(&mut host, AcceleratorConfig::default()).await;
    written(&accelerator, &mut session, 1, 5).await;
    drop(session);
    soon(device.lost()).await;
    assert_eq!((first_byte(&host, 1), accelerator.access_counts().dirty_lost), (Some(5), 0));
}

#[tokio::test]
async fn what_a_session_wrote_does_not_reach_the_next_one() {
    let mut host = FakeHost::start();
    let (accelerator, device, mut session) = attached(&mut host, AcceleratorConfig::default()).await;
    written(&accelerator, &mut session, 1, 5).await;
    accelerator.flush_all(FlushAllCause::Connecting).await;
    assert_eq!((accelerator.dirty_pages(), accelerator.access_counts().dirty_lost), (0, 1));
    assert_eq!(first_byte(&host, 1), None);
    drop(device);
}

#[tokio::test]
async fn without_a_cache_writes_go_through() {
    let mut host = FakeHost::start();
    let (accelerator, _device, mut session) = attached(&mut host, hardware(8, 0)).await;
    written(&accelerator, &mut session, 1, 5).await;
    assert_eq!((first_byte(&host, 1), accelerator.cached_pages()), (Some(5), 0));
}

/// Its bytes are older than a write that has come, been delivered and been evicted meanwhile.
#[tokio::test]
async fn what_was_read_before_a_write_is_not_kept_after_it() {
    let mut host = FakeHost::start();
    let (accelerator, _device, mut session) = attached(&mut host, hardware(8, 1)).await;
    let held = Arc::clone(&host.frames.under_way).write_owned().await;
    let mut reading = Box::pin(accelerator.read(space(), 0x1000, 4));
    tokio::select! {
        biased;
        _ = &mut reading => panic!("its answer is held"),
        fault = session.fault() => session.grant(&fault).await,
    }
    tokio::select! {
        biased;
        _ = &mut reading => panic!("its answer is held"),
        () = until(|| *host.frames.looked.lock() == 1) => {}
    }
    written(&accelerator, &mut session, 1, 5).await;
    written(&accelerator, &mut session, 2, 6).await;
    assert_eq!(first_byte(&host, 1), Some(5), "it has made room");
    drop(held);
    soon(reading).await.unwrap();
    assert_eq!(soon(accelerator.read(space(), 0x1000, 1)).await.unwrap().bytes[0], 5);
}
