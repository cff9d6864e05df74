//! The accelerator takes a replacement translation in the place of the old one.
#![cfg(feature = "agent")]
#![allow(clippy::unwrap_used, reason = "a helper of tests, which fail by panicking")]

mod host;

use std::sync::Arc;

use bytes::Bytes;
use host::{FakeHost, FakeSession, notice, notice_of, number, numbers, page, soon, space, until};
use shootdown_client::agent::{Accelerator, AcceleratorConfig, FlushTime};
use shootdown_client::{Access, Device, FrameNumber, Translation};
use shootdown_core::{Notice, NoticeKind};

async fn attached(
    host: &mut FakeHost,
    config: AcceleratorConfig,
) -> (Arc<Accelerator>, Device<Accelerator>, FakeSession) {
    let accelerator = Accelerator::new(config);
    let (device, session) = host.subscribed(host.config(), &accelerator).await;
    accelerator.attach(&device).unwrap();
    (accelerator, device, session)
}

async fn granted<T>(session: &mut FakeSession, access: impl Future<Output = T>) -> T {
    let (done, ()) = tokio::join!(soon(access), async {
        let fault = session.fault().await;
        session.grant(&fault).await;
    });
    done
}

/// Page n is in frame `frame` from now on, to be read only.
fn moved(value: u64, number: u64, frame: u64) -> Notice {
    let translation = Translation { range: page(number), frame: FrameNumber(frame), access: Access::Read };
    notice_of(value, NoticeKind::ChangePte(translation), page(number))
}

#[tokio::test]
async fn a_replacement_is_used_without_a_fault_and_nothing_of_the_old_page_is_kept() {
    let mut host = FakeHost::start();
    let (accelerator, _device, mut session) = attached(&mut host, AcceleratorConfig::default()).await;
    host.frames.bytes.lock().insert(70, vec![70; 4096]);
    let write = accelerator.write(space(), 0x1000, Bytes::from_static(b"old"));
    granted(&mut session, write).await.unwrap();
    session.notices([moved(1, 1, 70)]).await;
    let ack = session.ack().await;
    assert_eq!((ack.through, &ack.reports[0].dirty[..]), (Some(number(1)), &[page(1)][..]));
    assert_eq!(&host.frames.bytes.lock()[&1][..3], b"old", "what was written went to the old frame");
    assert_eq!((accelerator.tlb_entries(), accelerator.cached_pages()), (1, 0));
    let faults = accelerator.access_counts().faults;
    let read = soon(accelerator.read(space(), 0x1000, 1)).await.unwrap();
    assert_eq!((read.bytes[0], accelerator.access_counts().faults), (70, faults));
    assert_eq!(host.frames.bytes.lock()[&70], [70; 4096]);
    // It is to be read only.
    let write = accelerator.write(space(), 0x1000, Bytes::from_static(b"new"));
    granted(&mut session, write).await.unwrap();
    assert_eq!(accelerator.access_counts().faults, faults + 1);
}

#[tokio::test]
async fn the_new_entry_tells_of_its_own_uses_only() {
    let mut host = FakeHost::start();
    let (accelerator, _device, mut session) = attached(&mut host, AcceleratorConfig::default()).await;
    granted(&mut session, accelerator.read(space(), 0x1000, 1)).await.unwrap();
    session.notices([moved(1, 1, 70)]).await;
    assert_eq!(session.ack().await.reports[0].young, [page(1)]);
    session.notices([notice(2, page(1))]).await;
    assert_eq!((session.ack().await.reports, accelerator.tlb_entries()), (Vec::new(), 0));
}

#[tokio::test]
async fn a_page_that_is_not_held_is_not_replaced() {
    let mut host = FakeHost::start();
    let (accelerator, _device, mut session) = attached(&mut host, AcceleratorConfig::default()).await;
    granted(&mut session, accelerator.read(space(), 0x2000, 1)).await.unwrap();
    session.notices([moved(1, 1, 70)]).await;
    assert_eq!(session.ack().await.through, Some(number(1)));
    assert_eq!(accelerator.tlb_entries(), 1);
    granted(&mut session, accelerator.read(space(), 0x1000, 1)).await.unwrap();
}

/// AckMeansStopped: what goes through the old entry is waited for, and the new one is there meanwhile.
#[tokio::test]
async fn dmas_through_the_old_entry_are_waited_for() {
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
    session.notices([moved(1, 1, 70), notice_of(2, NoticeKind::ClearYoung, page(90))]).await;
    assert_eq!(session.ack().await.selective, numbers([2]));
    assert_eq!((accelerator.tlb_entries(), accelerator.dmas_in_flight()), (1, 1));
    drop(held);
    soon(reading).await.unwrap();
    assert_eq!(session.ack().await.through, Some(number(2)));
    assert_eq!(accelerator.cached_pages(), 0, "the bytes of the old frame");
}

/// NoGrantInWindow: the flush takes its time, and the page changes again meanwhile.
#[tokio::test]
async fn a_replacement_that_a_later_notice_overtook_is_dropped() {
    let mut host = FakeHost::start();
    let time = FlushTime::Fixed(std::time::Duration::from_millis(20));
    let config = AcceleratorConfig { flush_time: time, ..AcceleratorConfig::default() };
    let (accelerator, _device, mut session) = attached(&mut host, config).await;
    granted(&mut session, accelerator.read(space(), 0x1000, 1)).await.unwrap();
    session.notices([moved(1, 1, 70), notice(2, page(1))]).await;
    while session.ack().await.through != Some(number(2)) {}
    assert_eq!((accelerator.tlb_entries(), accelerator.cached_pages()), (0, 0));
}

/// The same, where the second flush is over before the first looks at its ticket.
#[tokio::test]
async fn a_replacement_is_committed_where_its_flush_finds_the_entry_or_never() {
    let mut host = FakeHost::start();
    let (accelerator, _device, mut session) = attached(&mut host, AcceleratorConfig::default()).await;
    granted(&mut session, accelerator.read(space(), 0x1000, 1)).await.unwrap();
    session.notices([notice(1, page(1)), moved(2, 1, 70)]).await;
    while session.ack().await.through != Some(number(2)) {}
    assert_eq!(accelerator.tlb_entries(), 0);
}
