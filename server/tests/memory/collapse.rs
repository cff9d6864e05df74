//! collapse_huge_page, with huge pages of eight pages.

use std::sync::Arc;

use shootdown_core::{Access, AddrRange, AddressSpaceId, Cause};
use shootdown_server::source::Translate;
use shootdown_server::source::memory::{
    Collapsed, FrameError, FrameStore, MemoryError, MemoryStats, POISON, Twin,
};

use crate::cancel::poll_and_drop;
use crate::recorder::{Answer, Method, Recorder, Source, settle_down, source, source_with, until};
use crate::{PAGE, dma, get, mapped, pages, put};

const HUGE: u64 = 8;

/// The huge page that the tests collapse: the second of the address space.
fn huge() -> AddrRange {
    pages(HUGE, 2 * HUGE)
}

/// An address space whose huge page is filled, each page with its number, in frames that are in no order;
/// what happened so far is forgotten.
async fn filled(frames: usize) -> (Source, Arc<Recorder>, AddressSpaceId) {
    let (source, recorder) = source(frames);
    let space = mapped(&source, pages(0, 4 * HUGE));
    for page in (HUGE..2 * HUGE).rev() {
        put(&source, space, page, page as u8).await;
    }
    assert!(!source.is_collapsed(space, huge()));
    recorder.forget_calls();
    (source, recorder, space)
}

async fn check_bytes(source: &Source, space: AddressSpaceId) {
    for page in HUGE..2 * HUGE {
        assert_eq!(get(source, space, page).await, page as u8);
    }
}

fn start(source: &Source, space: AddressSpaceId) -> tokio::task::JoinHandle<Result<Collapsed, MemoryError>> {
    let source = source.clone();
    tokio::spawn(async move { source.collapse(space, huge()).await })
}

#[tokio::test]
async fn the_pages_are_one_run_of_frames_afterwards_and_the_old_ones_are_freed_inside_the_bracket() {
    let (source, recorder, space) = filled(32).await;
    let device = recorder.grant(space, 9 * PAGE, Access::Read).await.unwrap();
    let old = source.generation(space, 9 * PAGE).unwrap();
    recorder.answer([Answer::Held]);
    let collapse = start(&source, space);
    until(|| !recorder.calls().is_empty()).await;
    settle_down().await;
    let call = recorder.calls()[0].clone();
    assert_eq!((call.method, call.range), (Method::RangeStart(Cause::Clear), huge()));
    assert_eq!(call.twin, Some(Twin::Collapse));
    assert_eq!(source.stats().mapped_pages, 8, "no entry is taken out before the round is over");
    assert_eq!((dma(source.frames(), device.frame), source.generation(space, 9 * PAGE)), (9, Some(old)));
    check_bytes(&source, space).await;

    recorder.open_gate();
    assert_eq!(collapse.await.unwrap().unwrap(), Collapsed::Yes);
    assert!(source.is_collapsed(space, huge()));
    assert_eq!(recorder.methods(), [Method::RangeStart(Cause::Clear), Method::RangeEnd]);
    let end = recorder.calls()[1].clone();
    assert_eq!((end.stats.frames_in_use, end.stats.mapped_pages), (8, 8), "freed before the end");
    assert_eq!(dma(source.frames(), device.frame), POISON);
    check_bytes(&source, space).await;
    assert_eq!(source.load(space, 9 * PAGE + 8, 8).await.unwrap()[..], [0; 8], "whole pages were copied");
    // A page of it is a page like others: nothing is split.
    assert_eq!(source.unmap(space, pages(10, 11)).await.unwrap().frames, 1);
    assert!(!source.is_collapsed(space, huge()));
    source.exit(space).await.unwrap();
    assert_eq!(source.stats(), MemoryStats::default());
}

#[tokio::test]
async fn what_nobody_used_is_left_alone_without_a_bracket_and_a_device_s_use_counts() {
    let (source, recorder, parent) = filled(64).await;
    // The child's entries are not young, and when the parent has gone they are not shared.
    let space = source.fork(parent, "child").await.unwrap();
    source.exit(parent).await.unwrap();
    recorder.forget_calls();
    let before: Vec<_> = (HUGE..2 * HUGE).map(|page| source.generation(space, page * PAGE)).collect();
    assert_eq!(source.collapse(space, huge()).await.unwrap(), Collapsed::NotYoung);
    assert_eq!(recorder.methods(), [Method::TestYoung], "no bracket at all");
    let after: Vec<_> = (HUGE..2 * HUGE).map(|page| source.generation(space, page * PAGE)).collect();
    assert_eq!((before, source.stats().frames_in_use), (after, 8));

    recorder.used(space, HUGE * PAGE);
    assert_eq!(source.collapse(space, huge()).await.unwrap(), Collapsed::Yes);
    let methods = [Method::TestYoung, Method::TestYoung, Method::RangeStart(Cause::Clear), Method::RangeEnd];
    assert_eq!(recorder.methods(), methods);
    assert!(source.is_collapsed(space, huge()));
    check_bytes(&source, space).await;
}

#[tokio::test]
async fn what_a_device_writes_until_it_stops_is_in_the_new_frames() {
    let (source, recorder, space) = filled(32).await;
    let device = recorder.grant(space, 12 * PAGE, Access::Write).await.unwrap();
    recorder.meanwhile(move |recorder, method, _, _| {
        if method == Method::RangeStart(Cause::Clear) {
            recorder.frames().write(device.frame, 100, b"last").unwrap();
        }
    });
    assert_eq!(source.collapse(space, huge()).await.unwrap(), Collapsed::Yes);
    assert_eq!(source.load(space, 12 * PAGE + 100, 4).await.unwrap()[..], *b"last");
    assert_eq!(recorder.with_grants(|grants| grants.len()), 0);
}

#[tokio::test]
async fn a_store_and_a_fault_while_the_pages_move_wait_and_are_not_lost() {
    let (source, recorder, space) = filled(32).await;
    let collapse = start(&source, space);
    until(|| source.generation(space, 9 * PAGE).is_none()).await;
    assert_eq!(source.stats().mapped_pages, 0, "every entry is out before the first byte is copied");
    let store = tokio::spawn({
        let source = source.clone();
        async move { source.store(space, 9 * PAGE + 50, b"stored").await.unwrap() }
    });
    let fault = tokio::spawn({
        let source = source.clone();
        async move { source.fault(space, pages(9, 10), Access::Read).await.unwrap()[0] }
    });
    assert_eq!(collapse.await.unwrap().unwrap(), Collapsed::Yes);
    let (_, translation) = (store.await.unwrap(), fault.await.unwrap());
    assert_eq!(source.load(space, 9 * PAGE + 50, 6).await.unwrap()[..], *b"stored");
    assert!(source.is_collapsed(space, huge()), "the store did not take a page out of it");
    let generation = source.frames().generation(translation.frame);
    assert_eq!(Some(generation), source.generation(space, 9 * PAGE), "the fault got the new frame");
    assert_eq!(recorder.open_brackets(), 0);
}

#[tokio::test]
async fn pages_that_are_absent_become_zeros_and_a_range_without_a_page_is_let_be() {
    let (source, recorder) = source(32);
    let space = mapped(&source, pages(0, 4 * HUGE));
    put(&source, space, 11, 11).await;
    assert_eq!(source.collapse(space, huge()).await.unwrap(), Collapsed::Yes);
    assert!(source.is_collapsed(space, huge()));
    for page in HUGE..2 * HUGE {
        let expected = if page == 11 { 11 } else { 0 };
        let read = source.load(space, page * PAGE, PAGE as usize).await.unwrap();
        assert_eq!((read[0], read[PAGE as usize - 1]), (expected, 0));
    }
    assert_eq!(source.stats().frames_in_use, 8);
    recorder.forget_calls();
    assert_eq!(source.collapse(space, pages(0, HUGE)).await.unwrap(), Collapsed::Busy);
    assert_eq!((recorder.methods(), source.stats().frames_in_use), (vec![], 8));
    // They may be reclaimed and migrated as others may.
    assert_eq!(source.migrate(space, huge()).await.unwrap().moved, 8);
    source.exit(space).await.unwrap();
    assert_eq!(source.stats(), MemoryStats::default());
}

#[tokio::test]
async fn a_page_that_a_child_shares_makes_it_busy_and_nothing_changes() {
    let (source, recorder, parent) = filled(64).await;
    let child = source.fork(parent, "child").await.unwrap();
    for page in (HUGE..2 * HUGE).filter(|page| *page != 13) {
        put(&source, child, page, 1).await;
    }
    recorder.forget_calls();
    let before: Vec<_> = (HUGE..2 * HUGE).map(|page| source.generation(parent, page * PAGE)).collect();
    let stats = source.stats();
    assert_eq!(source.collapse(parent, huge()).await.unwrap(), Collapsed::Busy, "one is shared");
    let after: Vec<_> = (HUGE..2 * HUGE).map(|page| source.generation(parent, page * PAGE)).collect();
    assert_eq!((before, stats, recorder.methods()), (after, source.stats(), vec![]));
    source.exit(child).await.unwrap();
    assert_eq!(source.collapse(parent, huge()).await.unwrap(), Collapsed::Yes);
    check_bytes(&source, parent).await;
}

#[tokio::test]
async fn a_fork_that_comes_between_the_first_look_and_the_round_makes_it_busy() {
    let (source, recorder, parent) = filled(64).await;
    recorder.answer([Answer::Held]);
    let fork = tokio::spawn({
        let source = source.clone();
        async move { source.fork(parent, "child").await.unwrap() }
    });
    until(|| recorder.calls().len() == 1).await;
    let collapse = start(&source, parent);
    settle_down().await;
    assert_eq!((source.stats().frames_in_use, recorder.calls().len()), (16, 1), "it has its run, and waits");
    recorder.open_gate();
    let child = fork.await.unwrap();
    assert_eq!(collapse.await.unwrap().unwrap(), Collapsed::Busy);
    assert_eq!((source.stats().frames_in_use, recorder.open_brackets()), (8, 0));
    put(&source, parent, 9, 1).await;
    check_bytes(&source, child).await;
}

#[tokio::test]
async fn a_huge_page_of_the_usual_size_is_all_of_a_page_table() {
    let frames = FrameStore::new(2048).unwrap();
    let (source, recorder) = source_with(frames, |config| config.huge_page_pages = 512);
    let space = mapped(&source, pages(0, 1024));
    for page in (512..1024).rev().filter(|page| page % 3 != 0) {
        put(&source, space, page, page as u8).await;
    }
    assert_eq!(source.collapse(space, pages(512, 1024)).await.unwrap(), Collapsed::Yes);
    assert!(source.is_collapsed(space, pages(512, 1024)));
    let first = source.fault(space, pages(512, 513), Access::Read).await.unwrap()[0].frame;
    assert!(first.0.is_multiple_of(512));
    for page in 512..1024 {
        assert_eq!(get(&source, space, page).await, if page % 3 == 0 { 0 } else { page as u8 });
    }
    assert_eq!((source.stats().frames_in_use, recorder.open_brackets()), (512, 0));
}

#[tokio::test]
async fn a_page_that_comes_into_other_hands_during_the_round_makes_it_busy_and_all_comes_back() {
    let (source, recorder, space) = filled(32).await;
    recorder.answer([Answer::Held, Answer::HeldLonger]);
    let collapse = start(&source, space);
    until(|| recorder.calls().len() == 1).await;
    let migrate = tokio::spawn({
        let source = source.clone();
        async move { source.migrate(space, pages(15, 16)).await.unwrap() }
    });
    until(|| recorder.calls().len() == 2).await;
    let before: Vec<_> = (HUGE..15).map(|page| source.generation(space, page * PAGE)).collect();
    recorder.open_gate();
    assert_eq!(collapse.await.unwrap().unwrap(), Collapsed::Busy);
    assert_eq!(recorder.open_brackets(), 1, "the migration's alone");
    let after: Vec<_> = (HUGE..15).map(|page| source.generation(space, page * PAGE)).collect();
    assert_eq!((before, source.stats().frames_in_use), (after, 8), "the run went back");
    recorder.open_last_gate();
    assert_eq!(migrate.await.unwrap().moved, 1);
    check_bytes(&source, space).await;
    assert_eq!(source.collapse(space, huge()).await.unwrap(), Collapsed::Yes, "it can be tried again");
    check_bytes(&source, space).await;
}

#[tokio::test]
async fn without_a_run_of_free_frames_nothing_changes_and_nobody_is_told() {
    // Eight frames are used, and of the other two blocks of eight one in the middle of each.
    let (source, recorder, space) = filled(24).await;
    let other = mapped(&source, pages(0, 16));
    for page in 0..16 {
        put(&source, other, page, 1).await;
    }
    for range in [pages(0, 4), pages(5, 12), pages(13, 16)] {
        source.dont_need(other, range).await.unwrap();
    }
    let before = source.stats();
    recorder.forget_calls();
    let error = source.collapse(space, huge()).await.unwrap_err();
    assert!(matches!(error, MemoryError::Frame(FrameError::NoRun { frames: 8 })), "{error:?}");
    assert_eq!((before.frames_in_use, source.stats()), (10, before));
    check_bytes(&source, space).await;
    for page in 0..16 {
        put(&source, other, page, 1).await;
    }
    let error = source.collapse(space, huge()).await.unwrap_err();
    assert!(matches!(error, MemoryError::Frame(FrameError::OutOfMemory { frames: 24 })), "{error:?}");
    assert_eq!(recorder.methods(), []);
    source.dont_need(other, pages(0, 16)).await.unwrap();
    assert_eq!(source.collapse(space, huge()).await.unwrap(), Collapsed::Yes);
    check_bytes(&source, space).await;
}

#[tokio::test]
async fn a_notifier_that_refuses_leaves_the_pages_where_they_are() {
    for answer in [Answer::Refused, Answer::NotQuiesced] {
        let (source, recorder, space) = filled(32).await;
        let before = source.stats();
        recorder.answer([answer]);
        let error = source.collapse(space, huge()).await.unwrap_err();
        assert!(matches!(error, MemoryError::Notify(_) | MemoryError::NotQuiesced { .. }), "{error:?}");
        assert_eq!((source.stats(), recorder.open_brackets()), (before, 0));
        check_bytes(&source, space).await;
        assert_eq!(source.collapse(space, huge()).await.unwrap(), Collapsed::Yes);
    }
}

#[tokio::test]
async fn an_unmap_waits_for_a_collapse_and_a_collapse_for_an_unmap() {
    let (source, recorder, space) = filled(32).await;
    recorder.answer([Answer::Held]);
    let collapse = start(&source, space);
    until(|| !recorder.calls().is_empty()).await;
    let unmap = tokio::spawn({
        let source = source.clone();
        async move { source.unmap(space, pages(12, 13)).await.unwrap() }
    });
    settle_down().await;
    assert_eq!(recorder.calls().len(), 1, "the unmap has not begun");
    let late = start(&source, space);
    settle_down().await;
    recorder.open_gate();
    assert_eq!(collapse.await.unwrap().unwrap(), Collapsed::Yes);
    assert_eq!(unmap.await.unwrap().frames, 1);
    assert_eq!(late.await.unwrap().unwrap(), Collapsed::Unsuited, "it looked again after the unmap");
    assert_eq!(source.stats().frames_in_use, 7);
}

#[tokio::test]
async fn what_is_not_one_huge_page_of_one_mapping_is_refused() {
    let (source, recorder, space) = filled(32).await;
    for range in [pages(9, 17), pages(8, 24), pages(8, 12), AddrRange::ALL] {
        let refused = source.collapse(space, range).await;
        assert!(matches!(refused, Err(MemoryError::NotAHugePage { pages: 8, .. })), "{range}");
        assert!(!source.is_collapsed(space, range));
    }
    let unmapped = source.collapse(space, pages(80, 88)).await;
    assert!(matches!(unmapped, Err(MemoryError::Unmapped { address }) if address == 80 * PAGE));
    source.unmap(space, pages(20, 21)).await.unwrap();
    recorder.forget_calls();
    assert_eq!(source.collapse(space, pages(16, 24)).await.unwrap(), Collapsed::Unsuited);
    assert_eq!(recorder.methods(), []);
}

#[tokio::test]
async fn a_collapse_whose_caller_gives_up_goes_on_and_leaks_nothing() {
    for polls in 0..6 {
        let (source, recorder, space) = filled(32).await;
        recorder.answer([Answer::Held]);
        let op = {
            let source = source.clone();
            async move { drop(source.collapse(space, huge()).await) }
        };
        poll_and_drop(Box::pin(op), polls).await;
        recorder.open_gate();
        source.drain().await;
        assert_eq!(source.is_collapsed(space, huge()), polls > 0);
        assert_eq!((recorder.open_brackets(), source.stats().frames_in_use), (0, 8));
        check_bytes(&source, space).await;
        source.exit(space).await.unwrap();
        assert_eq!(source.stats(), MemoryStats::default());
    }
}
