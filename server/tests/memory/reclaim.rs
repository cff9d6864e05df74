//! Aging, the LRU lists, and what happens when no frame is left.

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::sync::Arc;

use shootdown_core::{Access, AddressSpaceId, Cause};
use shootdown_server::source::FaultError;
use shootdown_server::source::Translate;
use shootdown_server::source::memory::{
    Aged, FrameError, FrameStore, MemoryError, Reclaimed, SwapFile, Twin,
};

use crate::cancel::poll_and_drop;
use crate::recorder::{Answer, Method, Reports, Source, settle_down, source_with, until};
use crate::swap_out::{nothing_is_left, swapping};
use crate::{PAGE, get, mapped, pages, put};

/// `count` pages that were written, each with its number.
async fn filled(source: &Source, count: u64) -> AddressSpaceId {
    let space = mapped(source, pages(0, count));
    for page in 0..count {
        put(source, space, page, page as u8).await;
    }
    space
}

fn lists(source: &Source) -> (usize, usize) {
    let stats = source.stats();
    assert_eq!(stats.isolated, 0);
    (stats.active, stats.inactive)
}

#[tokio::test]
async fn a_page_that_neither_the_cpu_nor_a_device_used_becomes_inactive_and_devices_keep_translations() {
    let (source, recorder, _swap) = swapping(8, 8, 8);
    let space = filled(&source, 3).await;
    assert_eq!(source.age(8).await.unwrap(), Aged { looked_at: 3, young: 3 }, "all were written");
    assert_eq!(lists(&source), (3, 0));
    recorder.grant(space, PAGE, Access::Read).await.unwrap();
    assert_eq!(source.age(8).await.unwrap(), Aged { looked_at: 3, young: 1 }, "a device was given one");
    assert_eq!(lists(&source), (1, 2));
    assert!(recorder.uses(space, PAGE), "it was asked without a flush");
    assert_eq!(source.age(8).await.unwrap(), Aged { looked_at: 1, young: 1 }, "and used it again");
    assert_eq!(source.age(8).await.unwrap(), Aged { looked_at: 1, young: 0 });
    assert_eq!(lists(&source), (0, 3));
    assert!(recorder.uses(space, PAGE));
    let calls = recorder.calls();
    assert!(calls.iter().all(|call| (call.method, call.twin) == (Method::ClearYoung, Some(Twin::Aging))));
    assert_eq!(calls.len(), 8, "one a page that was looked at");
    nothing_is_left(&source, &recorder).await;
}

#[tokio::test]
async fn one_of_those_who_share_a_page_is_enough_to_keep_it() {
    let (source, recorder, _swap) = swapping(8, 8, 8);
    let parent = filled(&source, 1).await;
    let child = source.fork(parent, "child").await.unwrap();
    source.age(1).await.unwrap();
    recorder.forget_calls();
    assert_eq!(get(&source, child, 0).await, 0);
    assert_eq!(source.age(1).await.unwrap().young, 1, "the child's CPU");
    recorder.grant(child, 0, Access::Read).await.unwrap();
    source.age(1).await.unwrap();
    assert!(recorder.uses(child, 0));
    assert_eq!(source.age(1).await.unwrap().young, 1, "the child's device");
    assert_eq!(source.age(1).await.unwrap().young, 0);
    assert_eq!(recorder.calls().len(), 8, "the devices of both, each time");
    nothing_is_left(&source, &recorder).await;
}

#[tokio::test]
async fn an_inactive_page_is_asked_for_with_a_flush_and_goes_only_if_nobody_used_it() {
    let (source, recorder, _swap) = swapping(8, 8, 8);
    let space = filled(&source, 2).await;
    recorder.grant(space, 0, Access::Read).await.unwrap();
    recorder.grant(space, PAGE, Access::Read).await.unwrap();
    source.age(2).await.unwrap();
    source.age(2).await.unwrap();
    assert_eq!(lists(&source), (0, 2));
    assert!(recorder.uses(space, PAGE), "the second is used after it was aged");
    recorder.forget_calls();
    let reclaimed = source.reclaim(1).await.unwrap();
    assert_eq!(reclaimed, Reclaimed { freed: 1, activated: 0, kept: 0 });
    assert_eq!(recorder.methods(), [Method::ClearFlushYoung, Method::Page(Cause::Clear)]);
    let twins: Vec<_> = recorder.calls().iter().map(|call| call.twin).collect();
    assert_eq!(twins, [Some(Twin::Aging), Some(Twin::SwapOut)]);
    let asked = &recorder.calls()[0];
    assert!(asked.generation.is_some(), "the page is mapped while it is asked for");
    assert_eq!((source.generation(space, 0), lists(&source)), (None, (0, 1)));

    recorder.forget_calls();
    recorder.answer([Answer::Held]);
    let reclaim = tokio::spawn({
        let source = source.clone();
        async move { source.reclaim(1).await.unwrap() }
    });
    until(|| !recorder.calls().is_empty()).await;
    recorder.open_gate();
    let reclaimed = reclaim.await.unwrap();
    assert_eq!(reclaimed.activated, 1, "it was used");
    assert!(!recorder.uses(space, PAGE), "it was asked for with a flush");
    assert_eq!(get(&source, space, 0).await, 0);
    nothing_is_left(&source, &recorder).await;
}

#[tokio::test]
async fn a_locked_page_counts_as_used_and_nobody_is_asked_about_it() {
    let (source, recorder, _swap) = swapping(8, 8, 8);
    let space = filled(&source, 1).await;
    source.age(1).await.unwrap();
    source.lock(space, pages(0, 1)).unwrap();
    recorder.forget_calls();
    assert_eq!(source.age(1).await.unwrap(), Aged { looked_at: 1, young: 1 });
    assert_eq!(source.reclaim(1).await.unwrap().freed, 0);
    assert_eq!((recorder.methods(), get(&source, space, 0).await), (vec![], 0));
}

#[tokio::test]
async fn a_device_that_could_not_be_asked_may_have_used_the_page() {
    for answer in [Answer::Refused, Answer::NotQuiesced] {
        let (source, recorder, _swap) = swapping(8, 8, 8);
        let space = filled(&source, 1).await;
        source.age(1).await.unwrap();
        recorder.answer([answer]);
        assert_eq!(source.age(1).await.unwrap(), Aged { looked_at: 1, young: 1 });
        assert_eq!(source.age(1).await.unwrap(), Aged { looked_at: 1, young: 0 });
        recorder.answer([answer]);
        let reclaimed = source.reclaim(1).await.unwrap();
        assert_eq!((reclaimed.activated, reclaimed.freed), (1, 1), "one pass later it goes");
        assert_eq!(get(&source, space, 0).await, 0);
        nothing_is_left(&source, &recorder).await;
    }
}

#[tokio::test]
async fn the_pages_of_a_batch_go_at_the_same_time() {
    let (source, recorder, _swap) = swapping(64, 64, 64);
    let space = filled(&source, 40).await;
    source.age(40).await.unwrap();
    source.age(40).await.unwrap();
    recorder.forget_calls();
    recorder.answer([Answer::Held; 64]);
    let reclaim = tokio::spawn({
        let source = source.clone();
        async move { source.reclaim(40).await.unwrap() }
    });
    until(|| recorder.calls().len() == 32).await;
    settle_down().await;
    assert!(recorder.methods().iter().all(|method| *method == Method::ClearFlushYoung));
    assert_eq!((recorder.calls().len(), source.stats().isolated), (32, 32), "and not more than a cluster");
    recorder.open_gate();
    assert_eq!(reclaim.await.unwrap().freed, 40);
    for page in 0..40 {
        assert_eq!(get(&source, space, page).await, page as u8);
    }
    nothing_is_left(&source, &recorder).await;
}

#[tokio::test]
async fn a_working_set_of_four_times_the_limit_is_read_back_and_the_limit_is_kept() {
    let (source, recorder, swap) = swapping(64, 16, 256);
    let space = filled(&source, 64).await;
    for round in 1..4u8 {
        for page in 0..64 {
            let expected = (page as u8).wrapping_mul(round);
            assert_eq!(get(&source, space, page).await, expected);
            put(&source, space, page, (page as u8).wrapping_mul(round + 1)).await;
            assert!(source.stats().frames_in_use <= 16);
        }
    }
    // Devices fault pages in too, and what they wrote comes back.
    for page in 0..64 {
        let grant = recorder.grant(space, page * PAGE, Access::Write).await.unwrap();
        source.frames().write(grant.frame, 0, &[page as u8 ^ 0x55]).unwrap();
    }
    for page in 0..64 {
        assert_eq!(get(&source, space, page).await, page as u8 ^ 0x55);
    }
    let most = recorder.calls().iter().map(|call| call.stats.frames_in_use).max().unwrap();
    assert!(most <= 16, "{most} frames were in use");
    assert!(swap.in_use() >= 48);
    nothing_is_left(&source, &recorder).await;
}

#[tokio::test]
async fn the_last_frame_is_enough_to_copy_a_page_that_is_shared() {
    let (source, recorder, _swap) = swapping(1, 1, 8);
    let parent = filled(&source, 3).await;
    let child = source.fork(parent, "child").await.unwrap();
    for page in 0..3 {
        put(&source, parent, page, 100).await;
    }
    for page in 0..3 {
        assert_eq!((get(&source, parent, page).await, get(&source, child, page).await), (100, page as u8));
    }
    nothing_is_left(&source, &recorder).await;
}

/// How often a device finds a page of its hot set gone, while the CPU goes through more pages than there is room
/// for.
async fn hot_pages_that_went(reports: Reports) -> usize {
    const HOT: u64 = 6;
    let (source, recorder, _swap) = swapping(64, 32, 512);
    recorder.report(reports);
    let space = mapped(&source, pages(0, 256));
    let mut gone = 0;
    for step in 0..600 {
        put(&source, space, HOT + step % 200, step as u8).await;
        for page in 0..HOT {
            if !recorder.uses(space, page * PAGE) {
                gone += usize::from(source.generation(space, page * PAGE).is_none());
                recorder.grant(space, page * PAGE, Access::Read).await.unwrap();
                assert!(recorder.uses(space, page * PAGE));
            }
        }
    }
    nothing_is_left(&source, &recorder).await;
    gone
}

#[tokio::test]
async fn pages_that_devices_use_often_stay_because_devices_tell_that_they_use_them() {
    let told = hot_pages_that_went(Reports::Young).await;
    let silent = hot_pages_that_went(Reports::Nothing).await;
    // Each is absent before its first touch, and while reclaim makes several passes no device has its turn.
    assert!((6..=12).contains(&told) && silent > 10 * told, "{told} against {silent}");
}

#[tokio::test]
async fn of_many_who_find_no_room_one_reclaims() {
    let (source, recorder, _swap) = swapping(128, 64, 256);
    let space = filled(&source, 64).await;
    source.map(space, pages(100, 110), Access::Write).unwrap();
    recorder.answer([Answer::Held; 200]);
    let stores: Vec<_> = (100..105)
        .map(|page| {
            let source = source.clone();
            tokio::spawn(async move { put(&source, space, page, 1).await })
        })
        .collect();
    until(|| !recorder.calls().is_empty()).await;
    settle_down().await;
    let asked: BTreeSet<u64> = recorder.calls().iter().map(|call| call.range.start()).collect();
    assert_eq!((recorder.calls().len(), asked.len()), (32, 32), "one pass, over a cluster, each page once");
    recorder.open_gate();
    for store in stores {
        store.await.unwrap();
    }
    assert_eq!(source.stats().frames_in_use, 64 - 8 + 5, "one pass made room for all");
    nothing_is_left(&source, &recorder).await;
}

async fn finds_no_room(source: &Source, space: AddressSpaceId, page: u64, limit: usize) {
    let store = source.store(space, page * PAGE, b"x").await;
    assert!(
        matches!(store, Err(MemoryError::Frame(FrameError::OutOfMemory { frames })) if frames == limit),
        "{store:?}"
    );
}

#[tokio::test]
async fn out_of_memory_is_said_when_nothing_can_go_and_everything_is_kept() {
    let (source, recorder, swap) = swapping(8, 4, 2);
    let space = mapped(&source, pages(0, 9));
    for page in 0..6 {
        put(&source, space, page, page as u8 + 1).await;
    }
    assert_eq!(swap.in_use(), 2);
    recorder.forget_calls();
    finds_no_room(&source, space, 8, 4).await;
    let fault = source.fault(space, pages(8, 9), Access::Read).await;
    assert!(matches!(fault, Err(FaultError::OutOfMemory { frames: 4 })));
    assert_eq!(recorder.methods(), [], "nobody was asked, for nothing could have gone");
    for page in 2..6 {
        if source.generation(space, page * PAGE).is_some() {
            assert_eq!(get(&source, space, page).await, page as u8 + 1);
        }
    }
    source.dont_need(space, pages(0, 3)).await.unwrap();
    put(&source, space, 8, 9).await;
    for page in 3..6 {
        assert_eq!(get(&source, space, page).await, page as u8 + 1);
    }
    nothing_is_left(&source, &recorder).await;
}

#[tokio::test]
async fn a_disk_that_fails_ends_in_out_of_memory_and_loses_nothing() {
    let full = OpenOptions::new().read(true).write(true).open("/dev/full").unwrap();
    let swap = Arc::new(SwapFile::on(full, 8).unwrap());
    let (source, recorder) = source_with(FrameStore::new(4).unwrap(), |config| config.swap = Some(swap));
    let space = mapped(&source, pages(0, 8));
    for page in 0..4 {
        put(&source, space, page, page as u8 + 1).await;
    }
    finds_no_room(&source, space, 7, 4).await;
    for page in 0..4 {
        assert_eq!(get(&source, space, page).await, page as u8 + 1);
    }
    nothing_is_left(&source, &recorder).await;
}

#[tokio::test]
async fn pages_that_are_used_all_the_time_go_when_there_is_no_other_way() {
    let (source, recorder, _swap) = swapping(8, 4, 8);
    let space = filled(&source, 4).await;
    source.map(space, pages(10, 11), Access::Write).unwrap();
    for page in 0..4 {
        recorder.grant(space, page * PAGE, Access::Read).await.unwrap();
    }
    // A device that says "used" whenever it is asked.
    let devices = Arc::downgrade(&recorder);
    recorder.meanwhile(move |_, method, space, range| {
        let Some(recorder) = devices.upgrade() else { return };
        if matches!(method, Method::ClearYoung | Method::ClearFlushYoung) {
            recorder.used(space, range.start());
        }
    });
    put(&source, space, 10, 1).await;
    for page in 0..4 {
        assert_eq!(get(&source, space, page).await, page as u8);
    }
    nothing_is_left(&source, &recorder).await;
}

#[tokio::test]
async fn a_store_waits_for_pages_that_are_on_their_way_out_already() {
    let (source, recorder, _swap) = swapping(8, 2, 8);
    let space = mapped(&source, pages(0, 4));
    put(&source, space, 0, 1).await;
    put(&source, space, 1, 2).await;
    recorder.answer([Answer::Held, Answer::Held]);
    let out = tokio::spawn({
        let source = source.clone();
        async move { source.page_out(space, pages(0, 2)).await.unwrap() }
    });
    until(|| recorder.calls().len() == 2).await;
    let store = tokio::spawn({
        let source = source.clone();
        async move { put(&source, space, 2, 3).await }
    });
    settle_down().await;
    assert!(!store.is_finished(), "it is not out of memory: a slow device is waited for");
    recorder.open_gate();
    assert_eq!(out.await.unwrap().out, 2);
    store.await.unwrap();
    assert_eq!((get(&source, space, 0).await, get(&source, space, 2).await), (1, 3));
    nothing_is_left(&source, &recorder).await;
}

#[tokio::test]
async fn a_store_waits_for_a_fork_that_shares_every_page_before_anybody_knows_the_child() {
    let (source, recorder, _swap) = swapping(8, 2, 8);
    let space = mapped(&source, pages(0, 2));
    put(&source, space, 0, 1).await;
    source.map(space, pages(10, 11), Access::Write).unwrap();
    put(&source, space, 10, 2).await;
    source.lock(space, pages(10, 11)).unwrap();
    recorder.answer([Answer::Quiesced, Answer::Held]);
    let fork = tokio::spawn({
        let source = source.clone();
        async move { source.fork(space, "child").await.unwrap() }
    });
    until(|| recorder.calls().len() == 3).await;
    settle_down().await;
    let store = tokio::spawn({
        let source = source.clone();
        async move { put(&source, space, 1, 3).await }
    });
    settle_down().await;
    assert!(!store.is_finished());
    recorder.open_gate();
    let child = fork.await.unwrap();
    store.await.unwrap();
    assert_eq!((get(&source, space, 1).await, source.generation(child, 0)), (3, None));
    assert_eq!((get(&source, child, 0).await, get(&source, child, 10).await), (1, 2));
    nothing_is_left(&source, &recorder).await;
}

#[tokio::test]
async fn those_who_find_no_room_may_give_up_at_any_time() {
    for polls in 0..8 {
        let (source, recorder, _swap) = swapping(32, 16, 64);
        let space = filled(&source, 16).await;
        source.map(space, pages(20, 24), Access::Write).unwrap();
        recorder.answer([Answer::Held; 16]);
        let give_up: Vec<_> = (20..23)
            .map(|page| {
                let source = source.clone();
                Box::pin(async move { drop(source.store(space, page * PAGE, &[1]).await) })
            })
            .collect();
        for store in give_up {
            poll_and_drop(store, polls).await;
        }
        let waits = tokio::spawn({
            let source = source.clone();
            async move { put(&source, space, 23, 1).await }
        });
        settle_down().await;
        assert!(!waits.is_finished(), "{polls} polls");
        recorder.open_gate();
        waits.await.unwrap();
        source.drain().await;
        assert_eq!(source.stats().isolated, 0, "{polls} polls");
        for page in 0..16 {
            assert_eq!(get(&source, space, page).await, page as u8);
        }
        nothing_is_left(&source, &recorder).await;
    }
}

#[tokio::test]
async fn a_page_that_is_dropped_while_it_is_asked_for_is_freed_and_nobody_is_told() {
    let (source, recorder, swap) = swapping(8, 8, 8);
    let space = filled(&source, 1).await;
    source.age(1).await.unwrap();
    source.age(1).await.unwrap();
    recorder.forget_calls();
    recorder.answer([Answer::Held]);
    let reclaim = tokio::spawn({
        let source = source.clone();
        async move { source.reclaim(1).await.unwrap() }
    });
    until(|| !recorder.calls().is_empty()).await;
    source.dont_need(space, pages(0, 1)).await.unwrap();
    assert_eq!(source.stats().frames_in_use, 1, "it is held");
    recorder.open_gate();
    assert_eq!(reclaim.await.unwrap().freed, 1);
    let range = [Method::RangeStart(Cause::Clear), Method::RangeEnd];
    assert_eq!(recorder.methods()[1..], range, "the zap's, and no round more");
    assert_eq!((swap.in_use(), source.stats().frames_in_use), (0, 0));
    nothing_is_left(&source, &recorder).await;
}

/// Pages that cannot go are at the old end of the lists: reclaim looks past them.
#[tokio::test]
async fn pages_that_a_snapshot_keeps_do_not_keep_the_others_in_memory() {
    let (source, recorder, _swap) = swapping(64, 16, 64);
    let space = mapped(&source, pages(0, 32));
    for page in 0..8 {
        put(&source, space, page, 1).await;
    }
    let snapshot = source.snapshot(space).await.unwrap();
    for page in 8..32 {
        put(&source, space, page, page as u8).await;
    }
    for page in 8..32 {
        assert_eq!(get(&source, space, page).await, page as u8);
    }
    drop(snapshot);
    nothing_is_left(&source, &recorder).await;
}
