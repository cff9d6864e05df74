//! The software accelerator: hardware that goes on using what it holds until its flush is done.
#![cfg(feature = "agent")]
#![allow(clippy::unwrap_used, reason = "a helper of tests, which fail by panicking")]

mod host;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use host::{FakeHost, FakeSession, notice, notice_of, number, numbers, page, pages, soon, space, until};
use shootdown_client::agent::{Accelerator, AcceleratorConfig, AccessError, FlushTime, WritePolicy};
use shootdown_client::{Device, DeviceTlb, FlushAllCause, Flushed, Invalidation, UseRefused};
use shootdown_core::NoticeKind;
use shootdown_proto::message::DeviceSays;
use tokio::sync::Semaphore;

/// An accelerator whose flushes begin when the test says so: what a wrapper of the load generator is.
struct Wrapped {
    accelerator: Arc<Accelerator>,
    flushes: Semaphore,
}

impl DeviceTlb for Wrapped {
    async fn invalidate(&self, invalidation: Invalidation) -> Flushed {
        self.flushes.acquire().await.unwrap().forget();
        self.accelerator.invalidate(invalidation).await
    }

    async fn flush_all(&self, cause: FlushAllCause) {
        self.accelerator.flush_all(cause).await;
    }
}

async fn wrapped(
    host: &mut FakeHost,
    config: AcceleratorConfig,
) -> (Arc<Wrapped>, Device<Wrapped>, FakeSession) {
    let wrapped = Arc::new(Wrapped { accelerator: Accelerator::new(config), flushes: Semaphore::new(0) });
    let (device, session) = host.subscribed(host.config(), &wrapped).await;
    wrapped.accelerator.attach(&device).unwrap();
    (wrapped, device, session)
}

/// An access that faults, and the host that grants it.
async fn granted<T>(session: &mut FakeSession, access: impl Future<Output = T>) -> T {
    let (done, ()) = tokio::join!(soon(access), async {
        let fault = session.fault().await;
        session.grant(&fault).await;
    });
    done
}

#[tokio::test]
async fn a_read_comes_from_the_host_once_and_then_from_the_cache_until_a_flush() {
    let mut host = FakeHost::start();
    let (device, _handle, mut session) = wrapped(&mut host, AcceleratorConfig::default()).await;
    let accelerator = &device.accelerator;
    host.frames.bytes.lock().insert(1, vec![7; 4096]);
    let first = granted(&mut session, accelerator.read(space(), 0x1010, 16)).await.unwrap();
    assert_eq!((&first.bytes[..], first.from_cache), (&[7; 16][..], false));
    let second = accelerator.read(space(), 0x1ff0, 16).await.unwrap();
    assert_eq!((&second.bytes[..], second.from_cache), (&[7; 16][..], true));

    session.notices([notice(1, page(1)), notice_of(2, NoticeKind::ClearYoung, page(90))]).await;
    assert_eq!(session.ack().await.selective, numbers([2]), "the flush has not begun");
    assert!(accelerator.read(space(), 0x1000, 1).await.unwrap().from_cache, "hardware knows nothing yet");
    device.flushes.add_permits(1);
    let ack = session.ack().await;
    assert_eq!((ack.through, &ack.reports[0].young[..]), (Some(number(2)), &[page(1)][..]));
    assert_eq!((accelerator.tlb_entries(), accelerator.cached_pages()), (0, 0));

    host.frames.bytes.lock().insert(1, vec![8; 4096]);
    let third = granted(&mut session, accelerator.read(space(), 0x1010, 16)).await.unwrap();
    assert_eq!((&third.bytes[..], third.from_cache), (&[8; 16][..], false));
}

#[tokio::test]
async fn a_write_goes_through_and_its_page_is_reported_dirty() {
    let mut host = FakeHost::start();
    let through = AcceleratorConfig { write_policy: WritePolicy::Through, ..AcceleratorConfig::default() };
    let (device, _handle, mut session) = wrapped(&mut host, through).await;
    let accelerator = &device.accelerator;
    granted(&mut session, accelerator.read(space(), 0x3000, 8)).await.unwrap();
    // The entry allows reads only: the write faults again.
    let write = accelerator.write(space(), 0x3004, Bytes::from_static(b"dirt"));
    granted(&mut session, write).await.unwrap();
    assert_eq!(host.frames.bytes.lock()[&3][4..8], *b"dirt");
    let read = accelerator.read(space(), 0x3000, 8).await.unwrap();
    assert_eq!(
        (&read.bytes[..], read.from_cache),
        (&b"\0\0\0\0dirt"[..], false),
        "the write dropped the old bytes"
    );
    device.flushes.add_permits(1);
    session.notices([notice(1, pages(0, 100))]).await;
    let ack = session.ack().await;
    assert_eq!((&ack.reports[0].young[..], &ack.reports[0].dirty[..]), (&[page(3)][..], &[page(3)][..]));
}

#[tokio::test]
async fn an_evicted_entry_is_still_reported() {
    let mut host = FakeHost::start();
    let small = AcceleratorConfig { tlb_sets: 1, tlb_ways: 2, ..AcceleratorConfig::default() };
    let (device, _handle, mut session) = wrapped(&mut host, small).await;
    for number in 1..=6 {
        let write = device.accelerator.write(space(), number << 12, Bytes::from_static(b"x"));
        granted(&mut session, write).await.unwrap();
    }
    assert_eq!(device.accelerator.tlb_entries(), 2);
    device.flushes.add_permits(2);
    session.notices([notice(1, page(2))]).await;
    let report = session.ack().await.reports.remove(0);
    assert!(report.young.iter().chain(&report.dirty).all(|it| it.contains(page(2))), "{report:?}");
    session.notices([notice(2, pages(0, 10))]).await;
    let report = session.ack().await.reports.remove(0);
    assert!(report.dirty.iter().any(|it| it.contains(page(6))), "{report:?}");
}

#[tokio::test]
async fn a_grant_that_a_notice_overtook_is_not_put_into_the_tlb() {
    let mut host = FakeHost::start();
    let (device, _handle, mut session) = wrapped(&mut host, AcceleratorConfig::default()).await;
    device.flushes.add_permits(10);
    let (read, ()) = tokio::join!(soon(device.accelerator.read(space(), 0x1000, 1)), async {
        let fault = session.fault().await;
        session.grant(&fault).await;
        session.notices([notice(1, page(1))]).await;
        let fault = loop {
            match session.hear().await {
                DeviceSays::Fault(fault) => break fault,
                DeviceSays::Ack { .. } => {}
                other => panic!("{other:?}"),
            }
        };
        session.grant(&fault).await;
    });
    read.unwrap();
}

#[tokio::test]
async fn no_access_is_allowed_when_the_session_is_lost() {
    let mut host = FakeHost::start();
    let (device, handle, mut session) = wrapped(&mut host, AcceleratorConfig::default()).await;
    granted(&mut session, device.accelerator.read(space(), 0x1000, 1)).await.unwrap();
    drop(session);
    soon(handle.lost()).await;
    assert_eq!((device.accelerator.tlb_entries(), device.accelerator.cached_pages()), (0, 0));
    let refused = device.accelerator.read(space(), 0x1000, 1).await;
    assert!(matches!(refused, Err(AccessError::Fault { .. })), "{refused:?}");
}

#[tokio::test]
async fn a_cached_page_is_refused_when_the_gate_is_shut() {
    let mut host = FakeHost::start();
    let (device, handle, mut session) = wrapped(&mut host, AcceleratorConfig::default()).await;
    granted(&mut session, device.accelerator.read(space(), 0x1000, 1)).await.unwrap();
    let leaving = handle.leave();
    tokio::pin!(leaving);
    assert!(futures_util::poll!(&mut leaving).is_pending());
    assert_eq!(device.accelerator.cached_pages(), 1, "nothing has run since, so nothing is flushed");
    let refused = device.accelerator.read(space(), 0x1000, 1).await;
    assert!(matches!(refused, Err(AccessError::UseRefused(UseRefused::SessionEnded))), "{refused:?}");
}

/// On virtual time: that a flush takes its time is the subject.
#[tokio::test(start_paused = true)]
async fn a_flush_takes_its_time() {
    let time = Duration::from_millis(250);
    let accelerator =
        Accelerator::new(AcceleratorConfig { flush_time: FlushTime::Fixed(time), ..Default::default() });
    let before = tokio::time::Instant::now();
    accelerator.flush_all(FlushAllCause::Lost).await;
    assert_eq!(before.elapsed(), time);
}

/// AckMeansStopped, in the hardware: the host's answer to a DMA is held, and so is the ack.
#[tokio::test]
async fn a_flush_waits_for_the_dmas_in_flight_also_for_those_that_nobody_waits_for() {
    let mut host = FakeHost::start();
    let through = AcceleratorConfig { write_policy: WritePolicy::Through, ..AcceleratorConfig::default() };
    let (device, _handle, mut session) = wrapped(&mut host, through).await;
    let accelerator = &device.accelerator;
    device.flushes.add_permits(10);
    let held = Arc::clone(&host.frames.answers).write_owned().await;
    {
        let mut writing = Box::pin(accelerator.write(space(), 0x1000, Bytes::from_static(b"late")));
        tokio::select! {
            biased;
            _ = &mut writing => panic!("its answer is held"),
            fault = session.fault() => session.grant(&fault).await,
        }
        // The write's own task holds the DMA; dropping the caller must not end it.
        tokio::select! {
            biased;
            _ = &mut writing => panic!("its answer is held"),
            () = until(|| accelerator.dmas_in_flight() == 1 && accelerator.tlb_entries() == 1) => {}
        }
        let _ = futures_util::poll!(&mut writing);
    }
    assert_eq!(accelerator.dmas_in_flight(), 1);
    session.notices([notice(1, page(1)), notice(2, page(2))]).await;
    assert_eq!(session.ack().await.selective, numbers([2]));
    assert_eq!(accelerator.tlb_entries(), 0, "the entry is gone, its DMA is not");
    drop(held);
    let ack = session.ack().await;
    assert_eq!((ack.through, &ack.reports[0].dirty[..]), (Some(number(2)), &[page(1)][..]));
    assert_eq!(host.frames.bytes.lock()[&1][..4], *b"late");
}

/// The bytes of a read that a flush has overtaken reach their reader, and nobody else.
#[tokio::test]
async fn what_was_read_beside_a_flush_is_not_cached() {
    let mut host = FakeHost::start();
    let (device, _handle, mut session) = wrapped(&mut host, AcceleratorConfig::default()).await;
    let accelerator = &device.accelerator;
    device.flushes.add_permits(10);
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
    session.notices([notice(1, page(1))]).await;
    tokio::select! {
        biased;
        _ = &mut reading => panic!("its answer is held"),
        () = until(|| accelerator.tlb_entries() == 0) => {}
    }
    drop(held);
    assert!(!soon(reading).await.unwrap().from_cache);
    assert_eq!(session.ack().await.through, Some(number(1)));
    assert_eq!(accelerator.cached_pages(), 0);
}
