//! KSM: equal pages become one.

use std::sync::Arc;

use shootdown_core::{Access, AddressSpaceId, Cause};
use shootdown_server::source::Translate;
use shootdown_server::source::memory::{
    FrameStore, MemoryError, MemoryStats, Merged, POISON, StoreBranch, Twin,
};

use crate::cancel::poll_and_drop;
use crate::recorder::{Answer, Method, Recorder, Source, settle_down, source, source_on, until};
use crate::{PAGE, branch, dma, get, mapped, pages, put};

/// Two address spaces, each with one page of 7s; what happened so far is forgotten.
pub(crate) async fn twins() -> (Source, Arc<Recorder>, AddressSpaceId, AddressSpaceId) {
    twins_on(FrameStore::new(32).unwrap()).await
}

async fn twins_on(frames: Arc<FrameStore>) -> (Source, Arc<Recorder>, AddressSpaceId, AddressSpaceId) {
    let (source, recorder) = source_on(frames);
    let [kept, gone] = [0, 1].map(|_| mapped(&source, pages(0, 8)));
    for space in [kept, gone] {
        source.advise_merge(space, pages(0, 8)).unwrap();
        put(&source, space, 3, 7).await;
    }
    recorder.forget_calls();
    (source, recorder, kept, gone)
}

pub(crate) fn start(source: &Source) -> tokio::task::JoinHandle<Result<Merged, MemoryError>> {
    let source = source.clone();
    tokio::spawn(async move { source.merge(100).await })
}

pub(crate) fn life(source: &Source, space: AddressSpaceId) -> u64 {
    source.generation(space, 3 * PAGE).unwrap()
}

pub(crate) async fn end(
    source: &Source,
    recorder: &Recorder,
    spaces: impl IntoIterator<Item = AddressSpaceId>,
) {
    for space in spaces {
        source.exit(space).await.unwrap();
    }
    assert_eq!(source.stats(), MemoryStats::default());
    assert_eq!((recorder.open_brackets(), recorder.frames().broken_poison()), (0, 0));
}

#[tokio::test]
async fn equal_pages_of_two_address_spaces_share_a_frame_and_a_store_to_one_is_not_seen_by_the_other() {
    let (source, recorder, kept, gone) = twins().await;
    let before = life(&source, kept);
    let merged = source.merge(100).await.unwrap();
    assert_eq!(merged, Merged { looked_at: 2, merged: 1 });
    assert_eq!((life(&source, kept), life(&source, gone)), (before, before));
    assert_eq!(source.stats().frames_in_use, 1);
    let frame = source.fault(kept, pages(3, 4), Access::Read).await.unwrap()[0].frame;

    recorder.forget_calls();
    assert!(matches!(branch(&put(&source, gone, 3, 8).await), StoreBranch::Copied(_)));
    assert_eq!(recorder.methods(), [Method::Page(Cause::Clear)]);
    assert_eq!(recorder.calls()[0].space, gone);
    assert_eq!((get(&source, kept, 3).await, get(&source, gone, 3).await), (7, 8));
    assert_eq!((life(&source, kept), dma(source.frames(), frame)), (before, 7), "the other is untouched");
    assert!(matches!(branch(&put(&source, kept, 3, 9).await), StoreBranch::Reuse), "it is alone again");
    end(&source, &recorder, [kept, gone]).await;
}

#[tokio::test]
async fn both_are_write_protected_and_told_before_the_replacement_and_nobody_is_told_where_nothing_changed() {
    let (source, recorder, kept, gone) = twins().await;
    let frame = source.fault(kept, pages(3, 4), Access::Read).await.unwrap()[0].frame;
    source.merge(100).await.unwrap();
    let told: Vec<_> = recorder.calls().into_iter().map(|call| (call.method, call.space)).collect();
    let protect = Method::Page(Cause::Clear);
    assert_eq!(told, [(protect, gone), (protect, kept), (Method::ChangePte(frame), gone)]);
    for call in recorder.calls() {
        assert_eq!((call.range, call.twin), (pages(3, 4), Some(Twin::Merge)));
        assert_eq!(call.stats.frames_in_use, 2, "nothing is freed before the last round is over");
    }
    // A third: what was merged is read-only already.
    let third = mapped(&source, pages(0, 8));
    source.advise_merge(third, pages(0, 8)).unwrap();
    put(&source, third, 5, 7).await;
    recorder.forget_calls();
    assert_eq!(source.merge(100).await.unwrap().merged, 1);
    let told: Vec<_> = recorder.calls().into_iter().map(|call| (call.method, call.space)).collect();
    assert_eq!(told, [(protect, third), (Method::ChangePte(frame), third)]);
    assert_eq!(source.stats().frames_in_use, 1);
    recorder.forget_calls();
    assert_eq!(source.merge(100).await.unwrap(), Merged { looked_at: 3, merged: 0 });
    assert_eq!(recorder.methods(), [], "there is nothing left to merge");
    end(&source, &recorder, [kept, gone, third]).await;
}

#[tokio::test]
async fn what_a_device_writes_until_it_stops_makes_the_pages_differ_and_they_are_not_merged() {
    for writes_to_kept in [false, true] {
        let (source, recorder, kept, gone) = twins().await;
        let written = if writes_to_kept { kept } else { gone };
        let device = recorder.grant(written, 3 * PAGE, Access::Write).await.unwrap();
        recorder.meanwhile(move |recorder, method, space, _| {
            if method == Method::Page(Cause::Clear) && space == written {
                recorder.frames().write(device.frame, 4095, b"!").unwrap();
            }
        });
        assert_eq!(source.merge(100).await.unwrap(), Merged { looked_at: 2, merged: 0 });
        assert_eq!(recorder.methods(), [Method::Page(Cause::Clear); 2], "no change_pte");
        assert_ne!(life(&source, kept), life(&source, gone));
        assert_eq!(source.load(written, 3 * PAGE + 4095, 1).await.unwrap()[..], *b"!");
        assert!(matches!(branch(&put(&source, gone, 3, 1).await), StoreBranch::Reuse), "no pin was left");
        end(&source, &recorder, [kept, gone]).await;
    }
}

#[tokio::test]
async fn a_store_while_a_device_may_still_write_waits_and_loses_nothing_of_what_the_device_wrote() {
    let (source, recorder, kept, gone) = twins().await;
    let device = recorder.grant(gone, 3 * PAGE, Access::Write).await.unwrap();
    recorder.answer([Answer::Held, Answer::Held]);
    let merge = start(&source);
    until(|| recorder.calls().len() == 2).await;
    let stores = [kept, gone].map(|space| {
        let source = source.clone();
        tokio::spawn(async move { source.store(space, 3 * PAGE + 100, b"cpu").await.unwrap() })
    });
    settle_down().await;
    assert!(stores.iter().all(|store| !store.is_finished()), "they wait");
    assert_eq!(get(&source, gone, 3).await, 7, "a load need not");
    recorder.frames().write(device.frame, 200, b"device").unwrap();
    recorder.open_gate();
    assert_eq!(merge.await.unwrap().unwrap().merged, 0);
    for store in stores {
        store.await.unwrap();
    }
    assert_eq!(source.load(gone, 3 * PAGE + 100, 3).await.unwrap()[..], *b"cpu");
    assert_eq!(source.load(gone, 3 * PAGE + 200, 6).await.unwrap()[..], *b"device");
    assert_eq!(source.load(kept, 3 * PAGE + 100, 3).await.unwrap()[..], *b"cpu");
    end(&source, &recorder, [kept, gone]).await;
}

/// Makes the entries read-only, with nothing shared: a merge has nothing to write-protect then.
pub(crate) async fn read_only(source: &Source, recorder: &Recorder, spaces: [AddressSpaceId; 2]) {
    for space in spaces {
        let child = source.fork(space, "child").await.unwrap();
        source.exit(child).await.unwrap();
    }
    recorder.forget_calls();
}

#[tokio::test]
async fn the_old_frame_lives_while_devices_switch_and_a_store_waits_for_them() {
    let (source, recorder, kept, gone) = twins().await;
    read_only(&source, &recorder, [kept, gone]).await;
    let device = recorder.grant(gone, 3 * PAGE, Access::Read).await.unwrap();
    let old = life(&source, gone);
    recorder.answer([Answer::Held]);
    let merge = start(&source);
    until(|| recorder.calls().len() == 1).await;
    let store = tokio::spawn({
        let source = source.clone();
        async move { put(&source, gone, 3, 8).await }
    });
    settle_down().await;
    assert!(!store.is_finished(), "a device could still read the old frame");
    assert_eq!(recorder.calls()[0].generation, Some(life(&source, kept)), "replaced before the call");
    assert_eq!((dma(source.frames(), device.frame), source.frames().generation(device.frame)), (7, old));
    assert_eq!(get(&source, gone, 3).await, 7, "a load need not wait");

    // The store that waits takes the page from the device once more, and waits for it.
    recorder.answer([Answer::HeldLonger]);
    recorder.open_gate();
    assert_eq!(merge.await.unwrap().unwrap().merged, 1);
    assert!(source.frames().generation(device.frame) > old, "it was freed");
    let switched = recorder.with_grants(|grants| grants[&(gone, 3 * PAGE)]);
    assert_eq!(
        (switched.access, source.frames().generation(switched.frame)),
        (Access::Read, life(&source, kept))
    );
    assert_ne!(switched.frame, device.frame, "it took the hint");
    recorder.open_last_gate();
    assert!(matches!(branch(&store.await.unwrap()), StoreBranch::Copied(_)));
    assert_eq!((get(&source, kept, 3).await, get(&source, gone, 3).await), (7, 8));
    assert_eq!(recorder.with_grants(|grants| grants.len()), 0);
    end(&source, &recorder, [kept, gone]).await;
}

#[tokio::test]
async fn an_unmap_waits_until_devices_have_switched_and_the_page_is_freed_once() {
    for kept_too in [false, true] {
        let (source, recorder, kept, gone) = twins().await;
        read_only(&source, &recorder, [kept, gone]).await;
        let device = recorder.grant(gone, 3 * PAGE, Access::Read).await.unwrap();
        recorder.answer([Answer::Held]);
        let merge = start(&source);
        until(|| recorder.calls().len() == 1).await;
        // Else its bracket could be over when the hint arrives, and a device take K for whatever is there then.
        let dropping = tokio::spawn({
            let source = source.clone();
            async move { source.dont_need(gone, pages(3, 4)).await.unwrap().pages }
        });
        settle_down().await;
        assert!(!dropping.is_finished());
        assert_eq!(dma(source.frames(), device.frame), 7, "the round is not over");
        recorder.open_gate();
        merge.await.unwrap().unwrap();
        assert_eq!(dropping.await.unwrap(), 1);
        assert_eq!(dma(source.frames(), device.frame), POISON);
        if kept_too {
            source.unmap(kept, pages(0, 8)).await.unwrap();
        }
        assert_eq!(get(&source, gone, 3).await, 0);
        assert_eq!(source.stats().frames_in_use, if kept_too { 1 } else { 2 });
        put(&source, gone, 3, 1).await;
        end(&source, &recorder, [kept, gone]).await;
    }
}

#[tokio::test]
async fn a_merged_page_is_found_at_every_place_and_moves_everywhere() {
    let (source, recorder, kept, gone) = twins().await;
    for page in [4, 6] {
        put(&source, kept, page, 7).await;
    }
    let child = source.fork(gone, "child").await.unwrap();
    assert_eq!(source.merge(100).await.unwrap().merged, 3, "of the one address space too");
    let places = [(kept, 3), (kept, 4), (kept, 6), (gone, 3), (child, 3)];
    let lives = |source: &Source| places.map(|(space, page)| source.generation(space, page * PAGE).unwrap());
    let before = lives(&source);
    assert_eq!((before, source.stats().frames_in_use), ([before[0]; 5], 1));
    for (space, page) in places {
        recorder.grant(space, page * PAGE, Access::Read).await.unwrap();
    }
    recorder.forget_calls();
    assert_eq!(source.migrate(child, pages(0, 8)).await.unwrap().moved, 1);
    let after = lives(&source);
    assert!(after[0] > before[0]);
    assert_eq!((after, source.stats().frames_in_use), ([after[0]; 5], 1));
    assert_eq!(recorder.methods(), [Method::Page(Cause::Migrate); 5], "each place's devices were told");
    assert_eq!(recorder.with_grants(|grants| grants.len()), 0);
    put(&source, kept, 4, 1).await;
    for (space, page) in places {
        assert_eq!(get(&source, space, page).await, if (space, page) == (kept, 4) { 1 } else { 7 });
    }
    end(&source, &recorder, [kept, gone, child]).await;
}

#[tokio::test]
async fn a_page_that_a_child_shares_is_replaced_in_both_and_its_frame_goes_after_the_slower_round() {
    let (source, recorder, kept, gone) = twins().await;
    let child = source.fork(gone, "child").await.unwrap();
    read_only(&source, &recorder, [kept, kept]).await;
    let device = recorder.grant(child, 3 * PAGE, Access::Read).await.unwrap();
    recorder.answer([Answer::Held, Answer::HeldLonger]);
    let merge = start(&source);
    until(|| recorder.calls().len() == 2).await;
    recorder.open_gate();
    settle_down().await;
    assert_eq!(dma(source.frames(), device.frame), 7);
    let [first, second] = recorder.calls().try_into().unwrap();
    assert!([first.space, second.space] == [gone, child] || [first.space, second.space] == [child, gone]);
    recorder.open_last_gate();
    assert_eq!(merge.await.unwrap().unwrap().merged, 1);
    assert_eq!((dma(source.frames(), device.frame), source.stats().frames_in_use), (POISON, 1));
    end(&source, &recorder, [kept, gone, child]).await;
}

#[tokio::test]
async fn what_changed_since_it_was_looked_at_costs_no_round() {
    let (source, recorder, kept, gone) = twins().await;
    assert_eq!(source.merge(1).await.unwrap(), Merged { looked_at: 1, merged: 0 });
    put(&source, kept, 3, 8).await;
    assert_eq!(source.merge(100).await.unwrap(), Merged { looked_at: 1, merged: 0 });
    assert_eq!(recorder.methods(), []);
    // A merged page that is alone again and was written to is not what it is known as.
    put(&source, kept, 3, 7).await;
    assert_eq!(source.merge(100).await.unwrap().merged, 1);
    source.dont_need(gone, pages(3, 4)).await.unwrap();
    assert!(matches!(branch(&put(&source, kept, 3, 8).await), StoreBranch::Reuse));
    put(&source, gone, 3, 7).await;
    recorder.forget_calls();
    assert_eq!(source.merge(100).await.unwrap(), Merged { looked_at: 2, merged: 0 });
    assert_eq!((recorder.methods(), get(&source, kept, 3).await), (vec![], 8));
    end(&source, &recorder, [kept, gone]).await;
}

#[tokio::test]
async fn the_cursor_goes_on_where_it_stopped_and_looks_only_where_it_was_asked_to() {
    let (source, recorder) = source(64);
    let spaces = [0, 1].map(|_| mapped(&source, pages(0, 16)));
    for space in spaces {
        source.advise_merge(space, pages(4, 8)).unwrap();
        for page in 0..16 {
            put(&source, space, page, 7).await;
        }
    }
    let top = shootdown_core::AddrRange::new(0u64.wrapping_sub(PAGE), 0).unwrap();
    source.map(spaces[0], top, Access::Write).unwrap();
    source.advise_merge(spaces[0], top).unwrap();
    source.store(spaces[0], top.start(), &[7; 8]).await.unwrap();
    let mut passes = Vec::new();
    for _ in 0..4 {
        let merged = source.merge(3).await.unwrap();
        passes.push((merged.looked_at, merged.merged));
    }
    assert_eq!(passes, [(3, 2), (3, 3), (3, 3), (0, 0)], "nine pages, and then it begins again");
    assert_eq!(source.stats().frames_in_use, 33 - 8);
    assert_eq!(source.merge(100).await.unwrap(), Merged { looked_at: 9, merged: 0 });
    let stats = source.address_space_stats(spaces[1]).unwrap();
    assert_eq!((stats.mappings, stats.mapped_pages), (3, 16), "the mapping was split by the advice");
    let hole = source.advise_merge(spaces[1], pages(14, 18));
    assert!(matches!(hole, Err(MemoryError::Unmapped { address }) if address == 16 * PAGE));
    end(&source, &recorder, spaces).await;
}

#[tokio::test]
async fn a_page_that_a_child_without_leave_to_merge_shares_is_let_be() {
    let (source, recorder) = source(32);
    let [kept, gone] = [0, 1].map(|_| mapped(&source, pages(0, 8)));
    for space in [kept, gone] {
        put(&source, space, 3, 7).await;
    }
    let child = source.fork(gone, "child").await.unwrap();
    for space in [kept, gone] {
        source.advise_merge(space, pages(0, 8)).unwrap();
    }
    assert_eq!(source.merge(100).await.unwrap(), Merged { looked_at: 2, merged: 0 });
    source.exit(child).await.unwrap();
    source.merge(100).await.unwrap();
    assert_eq!(source.merge(100).await.unwrap().merged + source.stats().frames_in_use, 1);
    end(&source, &recorder, [kept, gone]).await;
}

#[tokio::test]
async fn a_frame_that_is_shared_as_often_as_it_may_be_takes_no_further_page() {
    let (source, recorder, kept, gone) = twins_on(FrameStore::with_reference_limit(32, 2).unwrap()).await;
    assert_eq!(source.merge(100).await.unwrap(), Merged { looked_at: 2, merged: 0 });
    assert_ne!(life(&source, kept), life(&source, gone));
    assert_eq!((get(&source, kept, 3).await, get(&source, gone, 3).await), (7, 7));
    assert!(matches!(branch(&put(&source, gone, 3, 8).await), StoreBranch::Reuse), "no reference was left");
    end(&source, &recorder, [kept, gone]).await;
}

#[tokio::test]
async fn a_merge_whose_caller_gives_up_goes_on_and_leaks_nothing() {
    for polls in 0..6 {
        let (source, recorder, kept, gone) = twins().await;
        read_only(&source, &recorder, [kept, gone]).await;
        recorder.answer([Answer::Held]);
        let op = {
            let source = source.clone();
            async move { drop(source.merge(100).await) }
        };
        poll_and_drop(Box::pin(op), polls).await;
        recorder.open_gate();
        source.drain().await;
        assert_eq!(source.stats().frames_in_use, if polls > 0 { 1 } else { 2 });
        end(&source, &recorder, [kept, gone]).await;
    }
}

#[tokio::test]
async fn a_page_that_a_fork_is_about_to_share_is_let_be() {
    let (source, recorder, kept, gone) = twins().await;
    source.map(gone, pages(16, 17), Access::Write).unwrap();
    put(&source, gone, 16, 1).await;
    // The fork has shared the page, and waits for the next mapping's round: nobody finds the child yet.
    recorder.answer([Answer::Quiesced, Answer::Held]);
    let fork = tokio::spawn({
        let source = source.clone();
        async move { source.fork(gone, "child").await.unwrap() }
    });
    until(|| recorder.calls().len() == 3).await;
    assert_eq!(source.merge(100).await.unwrap(), Merged { looked_at: 2, merged: 0 });
    assert_eq!(recorder.calls().len(), 3, "nobody was told");
    recorder.open_gate();
    let child = fork.await.unwrap();
    assert_eq!(source.merge(100).await.unwrap(), Merged { looked_at: 3, merged: 1 });
    assert_eq!((life(&source, child), source.stats().frames_in_use), (life(&source, kept), 2));
    end(&source, &recorder, [kept, gone, child]).await;
}
