//! munmap and MADV_DONTNEED.

use shootdown_core::{Access, AddrRange, Cause};
use shootdown_server::source::memory::{MemoryError, POISON};

use crate::recorder::{Answer, Method, settle_down, source, until};
use crate::{PAGE, dma, get, mapped, pages, put};

#[tokio::test]
async fn munmap_gathers_per_block_and_frees_inside_the_bracket() {
    let (source, recorder) = source(64);
    let space = mapped(&source, pages(500, 530));
    for page in 505..515 {
        put(&source, space, page, 1).await;
    }
    let device = recorder.grant(space, 505 * PAGE, Access::Read).await.unwrap();
    recorder.answer([Answer::Held]);
    let unmap = tokio::spawn({
        let source = source.clone();
        async move { source.unmap(space, pages(500, 530)).await.unwrap() }
    });
    until(|| !recorder.calls().is_empty()).await;
    settle_down().await;
    let held = source.stats();
    assert_eq!(
        (held.mapped_pages, held.frames_in_use),
        (10, 10),
        "no entry is cleared before the round is over"
    );
    assert_eq!(dma(source.frames(), device.frame), 1);
    assert!(matches!(source.map(space, pages(529, 531), Access::Read), Err(MemoryError::Busy { .. })));
    assert!(matches!(source.load(space, 505 * PAGE, 1).await, Err(MemoryError::Unmapped { .. })));

    recorder.open_gate();
    let released = unmap.await.unwrap();
    assert_eq!((released.pages, released.frames, released.blocks), (10, 10, 3), "4 + 4 + 2, over two tables");
    assert_eq!(released.rounds.len(), 1);
    assert!(!released.release.is_zero());
    let [start, end] = &recorder.calls()[..] else { panic!("one bracket") };
    assert_eq!((start.method, start.range), (Method::RangeStart(Cause::Unmap), pages(500, 530)));
    assert_eq!((end.method, end.stats.frames_in_use), (Method::RangeEnd, 0), "freed before the end");
    assert_eq!(dma(source.frames(), device.frame), POISON, "a stale read sees poison");
    let stats = source.address_space_stats(space).unwrap();
    assert_eq!(stats, Default::default(), "the page tables went with it");
    source.map(space, pages(500, 530), Access::Write).unwrap();
    assert_eq!(get(&source, space, 505).await, 0);
}

#[tokio::test]
async fn munmap_splits_at_its_ends_skips_holes_and_keeps_tables_that_neighbours_use() {
    let (source, recorder) = source(64);
    let space = mapped(&source, pages(0, 10));
    source.map(space, pages(20, 30), Access::Write).unwrap();
    for page in [0, 5, 9, 20, 25] {
        put(&source, space, page, page as u8 + 1).await;
    }
    let released = source.unmap(space, pages(5, 21)).await.unwrap();
    assert_eq!((released.pages, released.frames, released.blocks), (3, 3, 1));
    assert_eq!(recorder.methods(), [Method::RangeStart(Cause::Unmap), Method::RangeEnd]);
    let stats = source.address_space_stats(space).unwrap();
    assert_eq!((stats.mappings, stats.mapped_pages, stats.page_tables), (2, 2, 1));
    assert_eq!(released.tables, 0, "its neighbours use it still");
    assert_eq!((get(&source, space, 0).await, get(&source, space, 25).await), (1, 26));
    let nothing = source.unmap(space, pages(5, 21)).await.unwrap();
    assert_eq!((nothing.pages, nothing.rounds.len()), (0, 0));
    assert_eq!(recorder.methods().len(), 2, "where nothing is mapped nobody is told");
}

#[tokio::test]
async fn dont_need_keeps_the_mapping_and_gives_zeros() {
    let (source, recorder) = source(64);
    let space = mapped(&source, pages(0, 8));
    for page in 0..8 {
        put(&source, space, page, 1).await;
    }
    let old = source.generation(space, PAGE).unwrap();
    let released = source.dont_need(space, pages(1, 7)).await.unwrap();
    assert_eq!((released.pages, released.frames, released.blocks), (6, 6, 2));
    assert_eq!(recorder.methods(), [Method::RangeStart(Cause::Clear), Method::RangeEnd]);
    assert_eq!(source.generation(space, PAGE), None);
    assert_eq!(
        (get(&source, space, 0).await, get(&source, space, 1).await, get(&source, space, 7).await),
        (1, 0, 1)
    );
    assert!(source.generation(space, PAGE).unwrap() > old);
    let hole = source.dont_need(space, pages(7, 9)).await.unwrap_err();
    assert!(matches!(hole, MemoryError::Unmapped { address } if address == 8 * PAGE));
    assert_eq!(get(&source, space, 7).await, 1, "nothing was dropped");
}

#[tokio::test]
async fn a_frame_that_a_child_shares_is_not_freed_by_the_parents_munmap() {
    let (source, _recorder) = source(64);
    let parent = mapped(&source, pages(0, 2));
    put(&source, parent, 0, 1).await;
    let child = source.fork(parent, "child").await.unwrap();
    let released = source.unmap(parent, pages(0, 2)).await.unwrap();
    assert_eq!((released.pages, released.frames), (1, 0));
    assert_eq!(get(&source, child, 0).await, 1);
    assert_eq!(source.dont_need(child, pages(0, 2)).await.unwrap().frames, 1);
}

#[tokio::test]
async fn a_notifier_that_refuses_keeps_the_pages_and_their_content() {
    let (source, recorder) = source(64);
    let space = mapped(&source, pages(0, 8));
    put(&source, space, 3, 7).await;
    for answer in [Answer::Refused, Answer::NotQuiesced] {
        recorder.answer([answer]);
        let unmap = source.unmap(space, pages(2, 5)).await.unwrap_err();
        assert!(matches!(unmap, MemoryError::Notify(_) | MemoryError::NotQuiesced { .. }), "{unmap:?}");
        recorder.answer([answer]);
        assert!(source.dont_need(space, pages(2, 5)).await.is_err());
        assert_eq!(get(&source, space, 3).await, 7);
        assert_eq!(recorder.open_brackets(), 0, "each start that succeeded has its end");
    }
    let stats = source.stats();
    assert_eq!((stats.mappings, stats.mapped_pages, stats.frames_in_use, stats.operations), (1, 1, 1, 0));
}

#[tokio::test]
async fn unmaps_that_overlap_wait_for_each_other_and_those_apart_do_not() {
    let (source, recorder) = source(64);
    let space = mapped(&source, pages(0, 16));
    for page in 0..16 {
        put(&source, space, page, 1).await;
    }
    recorder.answer([Answer::Held]);
    let task = |range: AddrRange| {
        let source = source.clone();
        tokio::spawn(async move { source.unmap(space, range).await.unwrap() })
    };
    let first = task(pages(0, 4));
    until(|| !recorder.calls().is_empty()).await;
    let overlaps = task(pages(2, 6));
    assert_eq!(task(pages(8, 12)).await.unwrap().frames, 4);
    settle_down().await;
    assert!(!overlaps.is_finished());
    assert_eq!(recorder.calls().len(), 3, "the one that waits has not called");
    recorder.open_gate();
    assert_eq!((first.await.unwrap().frames, overlaps.await.unwrap().frames), (4, 2));
}

#[tokio::test]
async fn ranges_that_are_not_whole_pages_are_refused() {
    let (source, recorder) = source(4);
    let space = mapped(&source, pages(0, 1));
    let odd = AddrRange::new(1, PAGE).unwrap();
    assert!(matches!(source.map(space, odd, Access::Read), Err(MemoryError::Range(_))));
    assert!(matches!(source.unmap(space, odd).await, Err(MemoryError::Range(_))));
    assert!(matches!(source.dont_need(space, odd).await, Err(MemoryError::Range(_))));
    assert!(matches!(source.load(space, u64::MAX, 2).await, Err(MemoryError::Range(_))));
    assert_eq!(source.unmap(space, AddrRange::ALL).await.unwrap().pages, 0, "all is asked for by name");
    assert_eq!(recorder.methods().len(), 2);
}
