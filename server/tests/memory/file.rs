//! Memory that a file backs: sharing, faults, holes and their placeholder, and what is left at the end.

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use shootdown_core::{Access, AddressSpaceId, Cause};
use shootdown_proto::message::FrameSpan;
use shootdown_server::source::memory::{FrameStore, MemoryError, MemoryFile};
use shootdown_server::source::{FaultError, Translate};

use crate::recorder::{Answer, Method, Source, settle_down, source, source_on, until};
use crate::{PAGE, dma, get, pages, put};

/// A file on disk of so many pages; every byte of a page is its index and one.
pub(crate) fn filled(count: u8) -> File {
    let file = tempfile::tempfile().unwrap();
    for page in 0..count {
        file.write_all_at(&[page + 1; PAGE as usize], u64::from(page) * PAGE).unwrap();
    }
    file
}

/// A file of so many pages, as it is on disk and as it is mapped.
pub(crate) fn opened(source: &Source, on_disk: &File, pages: u64) -> MemoryFile {
    source.open_file(on_disk.try_clone().unwrap(), pages * PAGE).unwrap()
}

/// An address space that shows the first pages of a file from its page 0 on.
pub(crate) fn showing(source: &Source, file: &MemoryFile, count: u64) -> AddressSpaceId {
    let space = source.create("test").unwrap();
    source.map_file(space, pages(0, count), Access::Write, file, 0).unwrap();
    space
}

/// The first byte of a page on disk.
pub(crate) fn on_disk(file: &File, page: u64) -> u8 {
    let mut byte = [0];
    file.read_exact_at(&mut byte, page * PAGE).unwrap();
    byte[0]
}

#[tokio::test]
async fn two_address_spaces_see_each_others_stores_and_the_file_gives_its_bytes() {
    let (source, recorder) = source(16);
    let disk = filled(4);
    let file = opened(&source, &disk, 4);
    let first = showing(&source, &file, 4);
    let second = source.create("second").unwrap();
    source.map_file(second, pages(100, 102), Access::Write, &file, 2 * PAGE).unwrap();
    assert_eq!((get(&source, first, 2).await, get(&source, second, 100).await), (3, 3));
    assert_eq!(source.generation(first, 2 * PAGE), source.generation(second, 100 * PAGE), "one frame");
    put(&source, first, 2, 50).await;
    assert_eq!(get(&source, second, 100).await, 50);
    put(&source, second, 101, 51).await;
    assert_eq!((get(&source, first, 3).await, get(&source, first, 0).await), (51, 1));
    let device = recorder.grant(second, 100 * PAGE, Access::Write).await.unwrap();
    source.frames().write(device.frame, 0, &[52]).unwrap();
    assert_eq!(get(&source, first, 2).await, 52);
    assert_eq!((file.cached_pages(), file.dirty_pages(), recorder.methods()), (3, 2, vec![]));
    assert_eq!(source.stats().frames_in_use, 3);
}

#[tokio::test]
async fn many_faults_at_once_on_one_page_bring_in_one_frame() {
    let (source, _recorder) = source(16);
    let file = opened(&source, &filled(1), 1);
    let spaces: Vec<_> = (0..8).map(|_| showing(&source, &file, 1)).collect();
    let mut tasks = tokio::task::JoinSet::new();
    for (number, space) in spaces.iter().copied().enumerate() {
        let source = source.clone();
        tasks.spawn(async move {
            source.store(space, 8 * number as u64, &[number as u8 + 10; 8]).await.unwrap();
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    let read = source.load(spaces[0], 0, 65).await.unwrap();
    let expected: Vec<u8> = (10..18).flat_map(|byte| [byte; 8]).chain([1]).collect();
    assert_eq!((&read[..], source.stats().frames_in_use), (&expected[..], 1));
}

#[tokio::test]
async fn a_placeholder_that_a_device_reads_is_taken_away_before_a_store_returns() {
    let (source, recorder) = source(16);
    let disk = tempfile::tempfile().unwrap();
    let file = opened(&source, &disk, 4);
    let reader = showing(&source, &file, 4);
    let writer = showing(&source, &file, 4);
    assert_eq!((get(&source, reader, 1).await, get(&source, reader, 2).await), (0, 0));
    assert_eq!(
        source.generation(reader, PAGE),
        source.generation(reader, 2 * PAGE),
        "one frame for all holes"
    );
    assert_eq!((source.stats().frames_in_use, file.cached_pages()), (1, 0));
    let device = recorder.grant(reader, PAGE, Access::Read).await.unwrap();
    recorder.answer([Answer::Held]);
    let store = tokio::spawn({
        let source = source.clone();
        async move { put(&source, writer, 1, 7).await }
    });
    until(|| !recorder.calls().is_empty()).await;
    settle_down().await;
    let [told] = &recorder.calls()[..] else { panic!("one place shows it, one call") };
    assert_eq!((told.method, told.space, told.range), (Method::Page(Cause::Clear), reader, pages(1, 2)));
    assert_eq!(told.generation, None, "the entry was cleared before");
    assert!(!store.is_finished(), "no store returns while a device may read the zeros");
    assert_eq!((dma(source.frames(), device.frame), source.generation(writer, PAGE)), (0, None));
    let load = tokio::spawn({
        let source = source.clone();
        async move { get(&source, reader, 1).await }
    });
    settle_down().await;
    assert!(!load.is_finished(), "nor does a touch find the placeholder again");

    recorder.open_gate();
    store.await.unwrap();
    assert_eq!(load.await.unwrap(), 7);
    recorder.with_grants(|grants| assert!(grants.is_empty()));
    assert_eq!(dma(source.frames(), device.frame), 0, "the other hole shows it still");
    assert_eq!((get(&source, reader, 2).await, source.stats().frames_in_use), (0, 2));
    assert_eq!(recorder.methods().len(), 1);
}

#[tokio::test]
async fn a_refused_round_leaves_the_placeholder_and_the_next_store_tells_again() {
    let (source, recorder) = source(16);
    let file = opened(&source, &tempfile::tempfile().unwrap(), 2);
    let (reader, writer) = (showing(&source, &file, 2), showing(&source, &file, 2));
    assert_eq!(get(&source, reader, 0).await, 0);
    let placeholder = source.generation(reader, 0);
    for answer in [Answer::Refused, Answer::NotQuiesced] {
        recorder.answer([answer]);
        assert!(source.store(writer, 0, &[1]).await.is_err());
        assert_eq!((source.generation(reader, 0), file.cached_pages()), (placeholder, 0));
        assert_eq!((get(&source, reader, 0).await, source.stats().frames_in_use), (0, 1));
    }
    recorder.forget_calls();
    put(&source, writer, 0, 9).await;
    assert_eq!(recorder.methods(), [Method::Page(Cause::Clear)]);
    assert_eq!(get(&source, reader, 0).await, 9);
}

#[tokio::test]
async fn a_store_into_a_hole_waits_for_the_release_of_an_address_space_that_shows_the_placeholder() {
    for answer in [Answer::Held, Answer::HeldNotQuiesced] {
        let (source, recorder) = source(16);
        let file = opened(&source, &tempfile::tempfile().unwrap(), 1);
        let (reader, writer) = (showing(&source, &file, 1), showing(&source, &file, 1));
        assert_eq!(get(&source, reader, 0).await, 0);
        recorder.answer([answer]);
        let exit = tokio::spawn({
            let source = source.clone();
            async move { source.exit(reader).await }
        });
        until(|| !recorder.calls().is_empty()).await;
        let store = tokio::spawn({
            let source = source.clone();
            async move { source.store(writer, 0, &[7]).await }
        });
        settle_down().await;
        assert!(!store.is_finished(), "its devices may read the zeros until the release is over");
        recorder.open_gate();
        let (exit, store) = (exit.await.unwrap(), store.await.unwrap());
        if answer == Answer::Held {
            assert!(exit.is_ok() && store.is_ok());
            assert_eq!((get(&source, writer, 0).await, recorder.methods()), (7, vec![Method::Release]));
            source.exit(writer).await.unwrap();
            drop(file);
            assert_eq!(source.stats(), Default::default());
        } else {
            assert!(matches!(exit, Err(MemoryError::NotQuiesced { .. })));
            assert!(matches!(store, Err(MemoryError::Notify(_))), "they may read them for ever");
            assert_eq!((get(&source, writer, 0).await, file.cached_pages()), (0, 0));
        }
    }
}

#[tokio::test]
async fn what_is_unmapped_leaves_its_dirty_bit_and_its_bytes_with_the_page() {
    let (source, _recorder) = source(16);
    let disk = filled(4);
    let file = opened(&source, &disk, 4);
    let space = showing(&source, &file, 4);
    for page in 0..3 {
        put(&source, space, page, 90 + page as u8).await;
    }
    source.dont_need(space, pages(0, 1)).await.unwrap();
    assert_eq!(get(&source, space, 0).await, 90, "the page cache has it still");
    let released = source.unmap(space, pages(1, 2)).await.unwrap();
    assert_eq!((released.pages, released.frames), (1, 0));
    source.exit(space).await.unwrap();
    assert_eq!((file.cached_pages(), file.dirty_pages()), (3, 3));
    let written = source.write_back(&file).await.unwrap();
    assert_eq!((written.written, written.clean), (3, 0));
    assert_eq!([0, 1, 2, 3].map(|page| on_disk(&disk, page)), [90, 91, 92, 4]);
}

#[tokio::test]
async fn a_fork_shares_the_file_and_copies_no_entry() {
    let (source, recorder) = source(16);
    let file = opened(&source, &filled(2), 2);
    let parent = showing(&source, &file, 2);
    put(&source, parent, 0, 8).await;
    let child = source.fork(parent, "child").await.unwrap();
    assert_eq!(source.address_space_stats(child).unwrap().mapped_pages, 0);
    put(&source, child, 0, 9).await;
    assert_eq!((get(&source, parent, 0).await, recorder.methods()), (9, vec![]));
    assert_eq!(source.generation(parent, 0), source.generation(child, 0));
}

#[tokio::test]
async fn a_files_page_is_migrated_in_every_mapping_and_in_the_cache() {
    let (source, recorder) = source(16);
    let disk = filled(2);
    let file = opened(&source, &disk, 2);
    let (first, second) = (showing(&source, &file, 2), showing(&source, &file, 2));
    put(&source, first, 0, 5).await;
    assert_eq!(get(&source, second, 0).await, 5);
    let before = source.generation(first, 0);
    let moved = source.migrate(first, pages(0, 2)).await.unwrap();
    assert_eq!((moved.moved, moved.stayed), (1, 0));
    assert_eq!(recorder.methods(), [Method::Page(Cause::Migrate); 2]);
    assert_ne!(source.generation(first, 0), before);
    assert_eq!(source.generation(first, 0), source.generation(second, 0));
    source.dont_need(second, pages(0, 1)).await.unwrap();
    assert_eq!((get(&source, second, 0).await, source.stats().frames_in_use), (5, 1));
    source.write_back(&file).await.unwrap();
    assert_eq!(on_disk(&disk, 0), 5);
}

#[tokio::test]
async fn every_frame_comes_back_when_nobody_has_the_file_any_more() {
    let (source, _recorder) = source(16);
    for handle_first in [true, false] {
        let file = opened(&source, &filled(4), 8);
        let space = showing(&source, &file, 8);
        put(&source, space, 0, 8).await;
        assert_eq!((get(&source, space, 1).await, get(&source, space, 6).await), (2, 0));
        let child = source.fork(space, "child").await.unwrap();
        source.exit(space).await.unwrap();
        assert_eq!(source.stats().frames_in_use, 3, "the file and the placeholder");
        if handle_first {
            drop(file);
            assert_eq!(get(&source, child, 0).await, 8, "a mapping keeps it");
            source.exit(child).await.unwrap();
        } else {
            source.exit(child).await.unwrap();
            assert_eq!(source.stats().frames_in_use, 3, "a handle keeps it");
            drop(file);
        }
        assert_eq!(source.stats(), Default::default());
    }
    assert_eq!(source.frames().broken_poison(), 0);
}

#[tokio::test]
async fn what_cannot_be_mapped_is_refused_with_its_reason() {
    let (source, _recorder) = source(4);
    let disk = filled(2);
    let file = source.open_file(disk.try_clone().unwrap(), PAGE + 1).unwrap();
    let space = source.create("test").unwrap();
    let map = |first, end, offset| source.map_file(space, pages(first, end), Access::Read, &file, offset);
    assert!(matches!(map(0, 3, 0), Err(MemoryError::BeyondEnd { address }) if address == 2 * PAGE));
    assert!(matches!(map(5, 7, PAGE), Err(MemoryError::BeyondEnd { address }) if address == 6 * PAGE));
    assert!(matches!(map(0, 1, 9 * PAGE), Err(MemoryError::BeyondEnd { address: 0 })));
    assert!(matches!(map(0, 1, 7), Err(MemoryError::Range(_))));
    map(0, 2, 0).unwrap();
    assert!(matches!(map(1, 2, 0), Err(MemoryError::AlreadyMapped { .. })));
    assert_eq!(source.load(space, PAGE, 2).await.unwrap()[..], [2, 0], "beyond its end a page has zeros");
    assert!(matches!(source.open_file(disk, u64::MAX), Err(MemoryError::File(_))));
    let other = source_on(FrameStore::new(1).unwrap()).0;
    let foreign = other.map_file(space, pages(0, 1), Access::Read, &file, 0);
    assert!(matches!(foreign, Err(MemoryError::File(_))));
    let path = tempfile::NamedTempFile::new().unwrap();
    path.as_file().set_len(PAGE).unwrap();
    let read_only = source.open_file(File::open(path.path()).unwrap(), PAGE).unwrap();
    let write = source.map_file(space, pages(8, 9), Access::Write, &read_only, 0);
    assert!(matches!(write, Err(MemoryError::ReadOnly { .. })));
}

#[tokio::test]
async fn a_disk_that_cannot_be_read_is_told_and_leaves_nothing_behind() {
    let (source, _recorder) = source(4);
    let path = tempfile::NamedTempFile::new().unwrap();
    path.as_file().write_all_at(&[1; PAGE as usize], 0).unwrap();
    let write_only = File::options().write(true).open(path.path()).unwrap();
    let file = source.open_file(write_only, PAGE).unwrap();
    let space = showing(&source, &file, 1);
    for _ in 0..2 {
        assert!(matches!(source.load(space, 0, 1).await, Err(MemoryError::File(_))));
    }
    let device = source.fault(space, pages(0, 1), Access::Read).await;
    assert!(matches!(device, Err(FaultError::Store(_))));
    assert_eq!((source.stats().frames_in_use, source.stats().operations), (0, 0));
}

#[tokio::test]
async fn a_whole_page_of_a_device_reaches_another_mapping() {
    let (source, recorder) = source(4);
    let file = opened(&source, &tempfile::tempfile().unwrap(), 1);
    let (first, second) = (showing(&source, &file, 1), showing(&source, &file, 1));
    let device = recorder.grant(first, 0, Access::Write).await.unwrap();
    source.frames().write(device.frame, 0, &[3; PAGE as usize]).unwrap();
    assert_eq!(source.load(second, 0, PAGE as usize).await.unwrap()[..], [3; PAGE as usize]);
    let mut out = bytes::BytesMut::new();
    let span = FrameSpan { frame: device.frame, offset: 0, length: PAGE as u32 };
    source.frames().read(&[span], &mut out).unwrap();
    assert_eq!(out[..], [3; PAGE as usize]);
}

#[tokio::test]
async fn a_mapping_of_a_file_that_was_opened_for_reading_never_allows_writes() {
    let (source, _recorder) = source(16);
    let path = tempfile::NamedTempFile::new().unwrap();
    path.as_file().set_len(PAGE).unwrap();
    let file = source.open_file(File::open(path.path()).unwrap(), PAGE).unwrap();
    let space = source.create("test").unwrap();
    source.map_file(space, pages(0, 1), Access::Read, &file, 0).unwrap();
    let refused = source.protect(space, pages(0, 1), Access::Write).await;
    assert!(matches!(refused, Err(MemoryError::ReadOnly { address: 0 })), "{refused:?}");
    assert_eq!(get(&source, space, 0).await, 0);
    let refused = source.store(space, 0, &[1]).await;
    assert!(matches!(refused, Err(MemoryError::ReadOnly { address: 0 })), "{refused:?}");
}
