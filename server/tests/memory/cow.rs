//! do_wp_page: both branches, and the races.

use std::sync::Arc;

use shootdown_core::{Access, AddressSpaceId, Cause};
use shootdown_server::source::memory::{
    CopiedPage, FrameError, FrameStore, MemoryError, MemoryEvents, POISON, StoreBranch,
};
use shootdown_server::source::{FaultError, Translate};

use crate::recorder::{Answer, Method, Recorder, Source, settle_down, source, source_on, until};
use crate::{PAGE, branch, dma, get, mapped, pages, put};

/// A parent with one page of 1s, shared with its child; what happened so far is forgotten.
async fn forked(frames: usize) -> (Source, Arc<Recorder>, AddressSpaceId, AddressSpaceId) {
    let (source, recorder) = source(frames);
    let parent = mapped(&source, pages(0, 4));
    put(&source, parent, 0, 1).await;
    let child = source.fork(parent, "child").await.unwrap();
    recorder.forget_calls();
    (source, recorder, parent, child)
}

#[tokio::test]
async fn the_reuse_branch_neither_notifies_nor_frees() {
    let (source, recorder, parent, child) = forked(8).await;
    source.exit(child).await.unwrap();
    recorder.forget_calls();
    let before = source.generation(parent, 0);
    assert!(matches!(branch(&put(&source, parent, 0, 2).await), StoreBranch::Reuse));
    assert_eq!(recorder.methods(), []);
    assert_eq!((source.generation(parent, 0), source.stats().frames_in_use), (before, 1));
    assert!(matches!(branch(&put(&source, parent, 0, 3).await), StoreBranch::InPlace));
    assert_eq!(source.events(), MemoryEvents { reused: 1, ..MemoryEvents::default() });
}

#[tokio::test]
async fn the_copy_branch_notifies_before_the_old_pages_last_reference_goes() {
    let (source, recorder, parent, child) = forked(8).await;
    let held = recorder.grant(parent, 0, Access::Read).await.unwrap();
    let old = source.generation(parent, 0).unwrap();
    recorder.answer([Answer::Held, Answer::Held]);
    let store = tokio::spawn({
        let source = source.clone();
        async move { put(&source, parent, 0, 2).await }
    });
    until(|| !recorder.calls().is_empty()).await;
    // The child lets go of its reference while the parent's round is open: the old frame is the parent's.
    let exit = tokio::spawn({
        let source = source.clone();
        async move { source.exit(child).await.unwrap() }
    });
    until(|| recorder.calls().len() == 2).await;
    settle_down().await;

    let call = recorder.calls()[0].clone();
    assert_eq!(call.method, Method::Page(Cause::Clear));
    assert_eq!(call.range, pages(0, 1));
    assert!(call.generation.unwrap() > old, "the entry was changed before the notifier was called");
    assert_eq!(call.stats.frames_in_use, 2, "nothing was freed before");
    assert_eq!((source.frames().generation(held.frame), dma(source.frames(), held.frame)), (old, 1));

    recorder.open_gate();
    let StoreBranch::Copied(copied) = branch(&store.await.unwrap()).clone() else { panic!("it was shared") };
    let released = exit.await.unwrap();
    assert_eq!(copied.old_generation, old);
    assert_eq!(
        usize::from(copied.release.is_some()) + released.frames,
        1,
        "freed once, by the last of the two"
    );
    assert_eq!(dma(source.frames(), held.frame), POISON);
    assert_eq!(get(&source, parent, 0).await, 2);
    assert_eq!(source.stats().frames_in_use, 1);
}

#[tokio::test]
async fn the_copy_branch_frees_nothing_that_is_still_shared() {
    let (source, recorder, parent, child) = forked(8).await;
    let outcome = put(&source, child, 0, 2).await;
    let StoreBranch::Copied(CopiedPage { release, .. }) = branch(&outcome) else { panic!("it was shared") };
    assert_eq!(*release, None);
    assert_eq!(outcome.pages_copied(), 1);
    assert_eq!(recorder.calls()[0].space, child);
    assert_eq!((get(&source, parent, 0).await, get(&source, child, 0).await), (1, 2));
    assert_eq!(source.load(child, 8, 4).await.unwrap()[..], [0; 4], "the rest of the page was copied");
    assert_eq!(source.stats().frames_in_use, 2);
}

#[tokio::test]
async fn a_lost_race_releases_nothing_twice() {
    let (source, recorder, parent, child) = forked(8).await;
    // On one thread both writers have their copies before either is back at the page table.
    let stores = [2, 3].map(|byte| {
        let source = source.clone();
        tokio::spawn(async move { put(&source, parent, 0, byte).await })
    });
    let mut branches = Vec::new();
    for store in stores {
        branches.push(branch(&store.await.unwrap()).clone());
    }
    branches.sort_by_key(|branch| matches!(branch, StoreBranch::LostRace));
    assert!(matches!(branches[..], [StoreBranch::Copied(_), StoreBranch::LostRace]), "{branches:?}");
    assert_eq!(recorder.methods(), [Method::Page(Cause::Clear)], "the loser tells nobody");
    assert_eq!(source.stats().frames_in_use, 2);
    assert_eq!(source.events(), MemoryEvents { copied: 1, lost_races: 1, ..MemoryEvents::default() });
    assert_eq!(get(&source, child, 0).await, 1);
    source.exit(child).await.unwrap();
    source.exit(parent).await.unwrap();
    assert_eq!(source.stats(), Default::default());
}

#[tokio::test]
async fn while_devices_may_read_the_old_page_nobody_writes_to_the_new_one() {
    let (source, recorder, parent, _child) = forked(8).await;
    recorder.answer([Answer::Held]);
    let first = tokio::spawn({
        let source = source.clone();
        async move { put(&source, parent, 0, 2).await }
    });
    until(|| !recorder.calls().is_empty()).await;
    let second = tokio::spawn({
        let source = source.clone();
        async move { source.store(parent, 100, b"second").await.unwrap() }
    });
    let fault = tokio::spawn({
        let source = source.clone();
        async move { source.fault(parent, pages(0, 1), Access::Read).await.unwrap() }
    });
    settle_down().await;
    assert!(!first.is_finished() && !second.is_finished() && !fault.is_finished());
    assert_eq!(source.load(parent, 100, 6).await.unwrap()[..], [0; 6], "a load need not wait");

    recorder.open_gate();
    assert!(matches!(branch(&first.await.unwrap()), StoreBranch::Copied(_)));
    assert!(matches!(branch(&second.await.unwrap()), StoreBranch::InPlace));
    let frame = fault.await.unwrap()[0].frame;
    assert_eq!(
        Some(source.frames().generation(frame)),
        source.generation(parent, 0),
        "it gets the new frame"
    );
    assert_eq!(source.load(parent, 100, 6).await.unwrap()[..], *b"second");
}

#[tokio::test]
async fn a_notifier_that_refuses_the_copy_leaves_the_page_as_it_was() {
    for answer in [Answer::Refused, Answer::NotQuiesced] {
        let (source, recorder, parent, child) = forked(8).await;
        let before = source.generation(parent, 0);
        recorder.answer([answer, answer]);
        let error = source.store(parent, 0, &[2; 8]).await.unwrap_err();
        assert!(matches!(error, MemoryError::Notify(_) | MemoryError::NotQuiesced { .. }), "{error:?}");
        let fault = source.fault(parent, pages(0, 1), Access::Write).await.unwrap_err();
        assert!(matches!(fault, FaultError::Notify(_) | FaultError::Store(_)), "{fault:?}");
        assert_eq!(source.generation(parent, 0), before);
        assert_eq!((get(&source, parent, 0).await, get(&source, child, 0).await), (1, 1));
        let stats = source.stats();
        assert_eq!((stats.frames_in_use, stats.quarantined, stats.operations), (1, 0, 0));
        assert!(
            matches!(branch(&put(&source, parent, 0, 2).await), StoreBranch::Copied(_)),
            "it can be tried again"
        );
    }
}

#[tokio::test]
async fn a_refused_copy_whose_place_was_taken_keeps_the_old_page_in_quarantine() {
    let (source, recorder, parent, child) = forked(8).await;
    let stale = recorder.grant(parent, 0, Access::Read).await.unwrap();
    // The first round is the copy's, and is held; it will not be quiesced. The second is the unmap's.
    recorder.answer([Answer::HeldNotQuiesced]);
    let store = tokio::spawn({
        let source = source.clone();
        async move { source.store(parent, 0, &[2; 8]).await }
    });
    until(|| !recorder.calls().is_empty()).await;
    source.unmap(parent, pages(0, 1)).await.unwrap();
    source.exit(child).await.unwrap();
    recorder.open_gate();
    assert!(matches!(store.await.unwrap(), Err(MemoryError::NotQuiesced { .. })));
    assert_eq!(source.stats().quarantined, 1);
    assert_eq!(dma(source.frames(), stale.frame), 1, "its content is kept");
    source.exit(parent).await.unwrap();
    assert_eq!(source.stats(), Default::default(), "after its address space's release it is freed");
}

#[tokio::test]
async fn without_a_frame_for_the_copy_nothing_changes() {
    let (source, recorder, parent, child) = forked(1).await;
    let before = source.generation(parent, 0);
    for _ in 0..2 {
        let error = source.store(parent, 0, &[2; 8]).await.unwrap_err();
        assert!(matches!(error, MemoryError::Frame(FrameError::OutOfMemory { frames: 1 })));
    }
    let fault = source.fault(child, pages(0, 1), Access::Write).await.unwrap_err();
    assert!(matches!(fault, FaultError::OutOfMemory { frames: 1 }));
    assert_eq!((source.generation(parent, 0), recorder.methods()), (before, vec![]));
    assert_eq!((get(&source, parent, 0).await, source.stats().frames_in_use), (1, 1));
    source.exit(child).await.unwrap();
    assert!(
        matches!(branch(&put(&source, parent, 0, 2).await), StoreBranch::Reuse),
        "no pin was left behind"
    );
}

#[tokio::test]
async fn a_frame_that_is_shared_as_often_as_it_may_be_is_not_pinned_once_more() {
    let (source, _recorder) = source_on(FrameStore::with_reference_limit(8, 2).unwrap());
    let parent = mapped(&source, pages(0, 1));
    put(&source, parent, 0, 1).await;
    let child = source.fork(parent, "child").await.unwrap();
    let error = source.fork(parent, "one too many").await.unwrap_err();
    assert!(matches!(error, MemoryError::Frame(FrameError::TooManyReferences { most: 2, .. })));
    assert!(source.store(parent, 0, &[2]).await.is_err());
    source.exit(child).await.unwrap();
    assert!(matches!(branch(&put(&source, parent, 0, 2).await), StoreBranch::Reuse));
    assert_eq!(source.stats().frames_in_use, 1);
}

#[tokio::test]
async fn a_store_across_pages_tells_each_pages_branch_and_fails_before_it_writes() {
    let (source, _recorder, parent, child) = forked(3).await;
    let data = vec![7; 2 * PAGE as usize];
    let outcome = source.store(parent, 10, &data).await.unwrap_err();
    assert!(
        matches!(outcome, MemoryError::Frame(FrameError::OutOfMemory { .. })),
        "three pages, two frames left"
    );
    assert_eq!(source.load(parent, 10, 4).await.unwrap()[..], [0; 4], "not a byte was written");
    let outcome = source.store(parent, 10, &data[..PAGE as usize]).await.unwrap();
    let rows: Vec<u64> = outcome.pages.iter().map(|page| page.page).collect();
    assert_eq!(rows, [0, PAGE]);
    assert_eq!(source.load(parent, 10, PAGE as usize).await.unwrap()[..], data[..PAGE as usize]);
    assert_eq!(get(&source, child, 0).await, 1);
}
