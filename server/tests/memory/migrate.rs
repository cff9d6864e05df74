//! Migration, and with it `try_to_unmap`: order, what a device writes meanwhile, races and refusals.

use shootdown_core::{Access, Cause, FrameNumber, PageSize};
use shootdown_server::source::Translate as _;
use shootdown_server::source::memory::{FrameStore, Migrated, POISON};

use crate::recorder::{Answer, Method, source, source_on, until};
use crate::{PAGE, dma, get, mapped, pages, put};

const ONE: Migrated = Migrated { moved: 1, stayed: 0 };
const NONE: Migrated = Migrated { moved: 0, stayed: 1 };

/// The frame at a page, as a device gets it.
async fn frame(
    source: &crate::recorder::Source,
    space: shootdown_core::AddressSpaceId,
    page: u64,
) -> FrameNumber {
    let range = shootdown_core::AddrRange::page_of(page * PAGE, PageSize::BASE);
    source.fault(space, range, Access::Read).await.unwrap()[0].frame
}

#[tokio::test]
async fn the_entry_goes_first_then_devices_are_told_and_only_then_is_the_frame_freed() {
    let (source, recorder) = source(8);
    let space = mapped(&source, pages(1, 2));
    put(&source, space, 1, 7).await;
    let old = frame(&source, space, 1).await;
    assert_eq!(source.migrate(space, pages(1, 2)).await.unwrap(), ONE);
    let calls = recorder.calls();
    assert_eq!(recorder.methods(), [Method::Page(Cause::Migrate)]);
    assert_eq!(calls[0].range, pages(1, 2));
    assert_eq!(calls[0].generation, None, "no CPU finds the page by then");
    assert_eq!(calls[0].stats.frames_in_use, 1, "and the frame is not free yet");
    let new = frame(&source, space, 1).await;
    assert_ne!(new, old);
    assert_eq!((dma(recorder.frames(), old), dma(recorder.frames(), new)), (POISON, 7));
    assert_eq!(source.stats().frames_in_use, 1);
}

#[tokio::test]
async fn what_a_device_writes_until_its_ack_is_in_the_new_frame() {
    let (source, recorder) = source(8);
    let space = mapped(&source, pages(1, 2));
    put(&source, space, 1, 7).await;
    let held = recorder.grant(space, PAGE, Access::Write).await.unwrap();
    recorder.answer([Answer::Held]);
    let moving = tokio::spawn({
        let source = source.clone();
        async move { source.migrate(space, pages(1, 2)).await }
    });
    until(|| recorder.calls().len() == 1).await;
    recorder.frames().write(held.frame, 0, &[9; 16]).unwrap();
    recorder.open_gate();
    assert_eq!(moving.await.unwrap().unwrap(), ONE);
    assert_eq!(get(&source, space, 1).await, 9);
}

#[tokio::test]
async fn a_page_that_a_fork_shares_moves_for_both_and_stays_shared() {
    let (source, recorder) = source(8);
    let parent = mapped(&source, pages(1, 2));
    put(&source, parent, 1, 7).await;
    let child = source.fork(parent, "child").await.unwrap();
    recorder.forget_calls();
    assert_eq!(source.migrate(child, pages(1, 2)).await.unwrap(), ONE);
    assert_eq!(recorder.methods(), [Method::Page(Cause::Migrate); 2]);
    assert_eq!(frame(&source, parent, 1).await, frame(&source, child, 1).await);
    assert_eq!(source.stats().frames_in_use, 1);
    put(&source, parent, 1, 8).await;
    assert_eq!((get(&source, parent, 1).await, get(&source, child, 1).await), (8, 7));
}

#[tokio::test]
async fn a_store_during_the_move_waits_for_it_and_is_not_lost() {
    let (source, recorder) = source(8);
    let space = mapped(&source, pages(1, 2));
    put(&source, space, 1, 7).await;
    recorder.answer([Answer::Held]);
    let moving = tokio::spawn({
        let source = source.clone();
        async move { source.migrate(space, pages(1, 2)).await }
    });
    until(|| recorder.calls().len() == 1).await;
    let storing = tokio::spawn({
        let source = source.clone();
        async move { source.store(space, PAGE, &[9; 8]).await }
    });
    crate::recorder::settle_down().await;
    assert!(!storing.is_finished());
    recorder.open_gate();
    assert_eq!(moving.await.unwrap().unwrap(), ONE);
    storing.await.unwrap().unwrap();
    assert_eq!(get(&source, space, 1).await, 9);
}

#[tokio::test]
async fn a_refused_round_leaves_the_page_where_it_was() {
    for answer in [Answer::Refused, Answer::NotQuiesced] {
        let (source, recorder) = source(8);
        let space = mapped(&source, pages(1, 2));
        put(&source, space, 1, 7).await;
        let old = frame(&source, space, 1).await;
        recorder.answer([answer]);
        assert_eq!(source.migrate(space, pages(1, 2)).await.unwrap(), NONE);
        assert_eq!((frame(&source, space, 1).await, get(&source, space, 1).await), (old, 7));
        assert_eq!(source.migrate(space, pages(1, 2)).await.unwrap(), ONE, "it is on its list again");
    }
}

#[tokio::test]
async fn a_page_that_is_unmapped_during_the_move_is_freed_once_and_not_before_its_round() {
    let (source, recorder) = source(8);
    let space = mapped(&source, pages(1, 2));
    put(&source, space, 1, 7).await;
    let old = frame(&source, space, 1).await;
    recorder.answer([Answer::Held]);
    let moving = tokio::spawn({
        let source = source.clone();
        async move { source.migrate(space, pages(1, 2)).await }
    });
    until(|| recorder.calls().len() == 1).await;
    source.unmap(space, pages(1, 2)).await.unwrap();
    assert_eq!(dma(recorder.frames(), old), 7, "the migration has not heard from its devices");
    recorder.open_gate();
    moving.await.unwrap().unwrap();
    assert_eq!(source.stats().frames_in_use, 0);
    assert_eq!(dma(recorder.frames(), old), POISON);
}

#[tokio::test]
async fn a_migration_without_a_frame_for_the_copy_changes_nothing() {
    let (source, _recorder) = source_on(FrameStore::new(1).unwrap());
    let space = mapped(&source, pages(1, 2));
    put(&source, space, 1, 7).await;
    assert_eq!(source.migrate(space, pages(1, 2)).await.unwrap(), NONE);
    assert_eq!(get(&source, space, 1).await, 7);
}

#[tokio::test]
async fn an_exit_waits_for_a_page_that_is_on_its_way() {
    let (source, recorder) = source(8);
    let space = mapped(&source, pages(1, 4));
    for page in 1..4 {
        put(&source, space, page, 7).await;
    }
    recorder.answer([Answer::Held]);
    let moving = tokio::spawn({
        let source = source.clone();
        async move { source.migrate(space, pages(1, 2)).await }
    });
    until(|| recorder.calls().len() == 1).await;
    let ending = tokio::spawn({
        let source = source.clone();
        async move { source.exit(space).await }
    });
    crate::recorder::settle_down().await;
    assert!(!ending.is_finished());
    recorder.open_gate();
    moving.await.unwrap().unwrap();
    ending.await.unwrap().unwrap();
    assert_eq!(source.stats().frames_in_use, 0);
}
