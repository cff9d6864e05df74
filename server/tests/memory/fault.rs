//! Faults of devices and of the CPU.

use shootdown_core::{Access, AddrRange, AddressSpaceId, PageSize};
use shootdown_server::source::memory::{FrameError, MemoryError, StoreBranch};
use shootdown_server::source::{FaultError, Translate};

use crate::recorder::source;
use crate::{PAGE, branch, get, mapped, pages, put};

#[tokio::test]
async fn a_device_gets_the_frames_that_the_cpu_uses_and_no_more_leave_than_it_asked_for() {
    let (source, recorder) = source(8);
    let space = mapped(&source, pages(510, 514));
    put(&source, space, 511, 9).await;
    let translations = source.fault(space, pages(510, 513), Access::Read).await.unwrap();
    let ranges: Vec<AddrRange> = translations.iter().map(|translation| translation.range).collect();
    assert_eq!(ranges, [510, 511, 512].map(|page| AddrRange::page_of(page * PAGE, PageSize::BASE)));
    assert!(translations.iter().all(|translation| translation.access == Access::Read));
    let bytes = source.bytes(&translations).unwrap();
    assert_eq!((bytes.len(), bytes[0], bytes[PAGE as usize]), (3 * PAGE as usize, 0, 9));
    let write = source.fault(space, pages(511, 512), Access::Write).await.unwrap();
    assert_eq!((write[0].frame, write[0].access), (translations[1].frame, Access::Write));
    source.frames().write(write[0].frame, 0, &[4]).unwrap();
    assert_eq!(get(&source, space, 511).await, 4);
    assert_eq!(recorder.methods(), []);
}

#[tokio::test]
async fn a_fault_is_refused_where_nothing_is_mapped_or_writing_is_not_allowed() {
    let (source, _recorder) = source(8);
    let space = source.create("test").unwrap();
    source.map(space, pages(0, 2), Access::Read).unwrap();
    let unmapped = source.fault(space, pages(0, 3), Access::Read).await;
    assert!(matches!(unmapped, Err(FaultError::Unmapped { address }) if address == 2 * PAGE));
    let read_only = source.fault(space, pages(1, 2), Access::Write).await;
    assert!(matches!(read_only, Err(FaultError::ReadOnly { address: PAGE })));
    let nobody = AddressSpaceId::new(99).unwrap();
    assert!(matches!(
        source.fault(nobody, pages(0, 1), Access::Read).await,
        Err(FaultError::Unmapped { .. })
    ));
    assert_eq!(source.stats().mapped_pages, 0);
}

#[tokio::test]
async fn when_no_frame_is_left_nothing_changes() {
    let (source, _recorder) = source(2);
    let space = mapped(&source, pages(0, 8));
    for page in 0..2 {
        assert!(matches!(branch(&put(&source, space, page, 1).await), StoreBranch::ZeroFill));
    }
    let before = source.stats();
    let store = source.store(space, 5 * PAGE, b"x").await;
    assert!(matches!(store, Err(MemoryError::Frame(FrameError::OutOfMemory { frames: 2 }))));
    let load = source.load(space, 5 * PAGE, 1).await;
    assert!(matches!(load, Err(MemoryError::Frame(FrameError::OutOfMemory { frames: 2 }))));
    let fault = source.fault(space, pages(5, 6), Access::Read).await;
    assert!(matches!(fault, Err(FaultError::OutOfMemory { frames: 2 })));
    assert_eq!(source.stats(), before);
    assert_eq!(get(&source, space, 1).await, 1);
    source.dont_need(space, pages(0, 1)).await.unwrap();
    put(&source, space, 5, 3).await;
}

#[tokio::test]
async fn loads_and_stores_have_any_alignment() {
    let (source, _recorder) = source(8);
    let top = AddrRange::new(0u64.wrapping_sub(3 * PAGE), 0).unwrap();
    let space = mapped(&source, top);
    let data: Vec<u8> = (0..5000u32).map(|byte| byte as u8).collect();
    let at = top.start() + 4000;
    let outcome = source.store(space, at, &data).await.unwrap();
    assert_eq!(outcome.pages.len(), 3);
    assert_eq!(source.load(space, at, 5000).await.unwrap()[..], data[..]);
    source.store(space, u64::MAX, b"!").await.unwrap();
    assert_eq!(source.load(space, u64::MAX, 1).await.unwrap()[..], *b"!");
    assert!(source.load(space, at, 0).await.unwrap().is_empty());
    assert_eq!(source.exit(space).await.unwrap().frames, 3);
}
