//! mremap.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use shootdown_core::{Access, AddrRange, AddressSpaceId, Cause};
use shootdown_proto::message::FrameSpan;
use shootdown_server::source::memory::{MemoryError, POISON, Released, StoreBranch};
use shootdown_server::source::{FaultError, Translate};

use crate::recorder::{Answer, Method, Recorder, Source, settle_down, source, until};
use crate::{PAGE, branch, dma, get, mapped, pages, put};

const START: Method = Method::RangeStart(Cause::Unmap);

fn remap(
    source: &Source,
    space: AddressSpaceId,
    old: AddrRange,
    to: u64,
) -> tokio::task::JoinHandle<Result<Released, MemoryError>> {
    let source = source.clone();
    tokio::spawn(async move { source.remap(space, old, to * PAGE).await })
}

#[tokio::test]
async fn both_places_are_invalidated_before_a_page_moves_or_what_was_there_is_freed() {
    let (source, recorder) = source(32);
    let space = mapped(&source, pages(0, 8));
    source.map(space, pages(508, 513), Access::Write).unwrap();
    for page in [2, 3, 5] {
        put(&source, space, page, page as u8).await;
    }
    for page in [508, 511, 512] {
        put(&source, space, page, 9).await;
    }
    let of_old = recorder.grant(space, 3 * PAGE, Access::Write).await.unwrap();
    let of_new = recorder.grant(space, 511 * PAGE, Access::Write).await.unwrap();
    let generations = [2, 3, 5].map(|page| source.generation(space, page * PAGE));
    recorder.answer([Answer::Quiesced, Answer::Held]);
    // From 2..6 to 510..514: over the border of two tables, onto 510..513 and a hole.
    let remap = remap(&source, space, pages(2, 6), 510);
    until(|| recorder.calls().len() == 2).await;
    settle_down().await;
    assert_eq!((dma(source.frames(), of_old.frame), dma(source.frames(), of_new.frame)), (3, 9));
    assert_eq!(source.stats().frames_in_use, 6, "nothing is freed while a device may use it");
    for page in [2, 5, 511, 513] {
        let load = source.load(space, page * PAGE, 1).await;
        assert!(matches!(load, Err(MemoryError::Unmapped { .. })), "{page}: {load:?}");
    }
    for page in [3, 511, 513] {
        let map = source.map(space, pages(page, page + 1), Access::Read);
        assert!(matches!(map, Err(MemoryError::Busy { .. })), "{page}: {map:?}");
    }
    assert_eq!((get(&source, space, 7).await, get(&source, space, 508).await), (0, 9), "beside them nothing");

    recorder.open_gate();
    let released = remap.await.unwrap().unwrap();
    assert_eq!((released.pages, released.frames, released.rounds.len()), (2, 2, 2));
    assert!(released.rounds[0].seq < released.rounds[1].seq);
    let calls = recorder.calls();
    let told: Vec<_> = calls.iter().map(|call| (call.method, call.range)).collect();
    let (old, new) = (pages(2, 6), pages(510, 514));
    assert_eq!(told, [(START, new), (START, old), (Method::RangeEnd, old), (Method::RangeEnd, new)]);
    assert_eq!(calls[2].stats.frames_in_use, 5, "page 7 was touched meanwhile, and two frames were freed");
    assert_eq!(dma(source.frames(), of_new.frame), POISON);

    assert_eq!([510, 511, 513].map(|page| source.generation(space, page * PAGE)), generations);
    assert_eq!(source.generation(space, 512 * PAGE), None, "page 4 had never been touched");
    let again = recorder.grant(space, 511 * PAGE, Access::Write).await.unwrap();
    assert_eq!(again.frame, of_old.frame, "the device finds the frame at its new place");
    assert!(matches!(branch(&put(&source, space, 513, 6).await), StoreBranch::InPlace));
    for page in 2..6 {
        assert!(matches!(source.load(space, page * PAGE, 1).await, Err(MemoryError::Unmapped { .. })));
        let fault = source.fault(space, pages(page, page + 1), Access::Read).await;
        assert!(matches!(fault, Err(FaultError::Unmapped { .. })));
    }
    source.map(space, old, Access::Write).unwrap();
    assert_eq!(get(&source, space, 3).await, 0);
    source.exit(space).await.unwrap();
    assert_eq!(source.stats(), Default::default());
}

#[tokio::test]
async fn pages_move_back_and_forth_and_children_keep_what_they_share() {
    let (source, recorder) = source(64);
    let parent = mapped(&source, pages(0, 8));
    for page in 0..8 {
        put(&source, parent, page, page as u8 + 1).await;
    }
    let first = source.fork(parent, "first").await.unwrap();
    assert_eq!(source.remap(parent, pages(2, 6), 1000 * PAGE).await.unwrap().pages, 0);
    let second = source.fork(parent, "second").await.unwrap();
    let stats = source.address_space_stats(parent).unwrap();
    assert_eq!((stats.mappings, stats.page_tables, stats.mapped_pages), (3, 2, 8));
    recorder.forget_calls();
    let copied = put(&source, parent, 1001, 99).await;
    assert!(matches!(branch(&copied), StoreBranch::Copied(_)), "it is shared at its new place too");
    assert_eq!((get(&source, first, 3).await, get(&source, second, 1001).await), (4, 4));
    source.remap(first, pages(0, 8), 500 * PAGE).await.unwrap();
    assert_eq!((get(&source, first, 503).await, get(&source, parent, 1001).await), (4, 99));

    source.remap(parent, pages(1000, 1004), 2 * PAGE).await.unwrap();
    let stats = source.address_space_stats(parent).unwrap();
    assert_eq!((stats.mappings, stats.page_tables, stats.mapped_pages), (1, 1, 8), "as if it had never left");
    let mut seen = Vec::new();
    for page in 0..8 {
        seen.push(get(&source, parent, page).await);
    }
    assert_eq!(seen, [1, 2, 3, 99, 5, 6, 7, 8]);
    for space in [first, parent, second] {
        source.exit(space).await.unwrap();
    }
    assert_eq!(source.stats(), Default::default());
    assert_eq!(recorder.frames().broken_poison(), 0);
}

#[tokio::test]
async fn a_page_that_moved_is_found_by_its_position_at_its_new_place() {
    let (source, _recorder) = source(64);
    let space = mapped(&source, pages(0, 4));
    for page in 0..4 {
        put(&source, space, page, page as u8 + 1).await;
    }
    source.remap(space, pages(1, 3), 700 * PAGE).await.unwrap();
    // The old place shows the same part of the same object again, with pages of its own.
    source.map(space, pages(1, 3), Access::Write).unwrap();
    put(&source, space, 1, 77).await;
    let child = source.fork(space, "child").await.unwrap();
    let before = source.generation(space, 700 * PAGE);
    assert_eq!(source.migrate(space, pages(700, 702)).await.unwrap().moved, 2);
    assert_eq!(source.migrate(child, pages(0, 4)).await.unwrap().moved, 3);
    assert_ne!(source.generation(space, 700 * PAGE), before);
    for space in [space, child] {
        assert_eq!(source.generation(space, 700 * PAGE), source.generation(child, 700 * PAGE));
        let seen =
            [get(&source, space, 700).await, get(&source, space, 701).await, get(&source, space, 1).await];
        assert_eq!(seen, [2, 3, 77]);
    }
    for space in [space, child] {
        source.exit(space).await.unwrap();
    }
    assert_eq!(source.stats(), Default::default());
}

#[tokio::test]
async fn a_notifier_that_refuses_either_place_leaves_both_as_they_were() {
    let (source, recorder) = source(32);
    let space = mapped(&source, pages(0, 8));
    source.map(space, pages(20, 22), Access::Write).unwrap();
    for page in [2, 3, 20] {
        put(&source, space, page, page as u8).await;
    }
    let before = source.stats();
    for answers in [
        vec![Answer::Refused],
        vec![Answer::NotQuiesced],
        vec![Answer::Quiesced, Answer::Refused],
        vec![Answer::Quiesced, Answer::NotQuiesced],
    ] {
        recorder.answer(answers.clone());
        let error = source.remap(space, pages(2, 6), 20 * PAGE).await.unwrap_err();
        assert!(matches!(error, MemoryError::Notify(_) | MemoryError::NotQuiesced { .. }), "{error:?}");
        for page in [2, 3, 20] {
            assert_eq!(get(&source, space, page).await, page as u8, "{answers:?}");
            assert!(matches!(branch(&put(&source, space, page, page as u8).await), StoreBranch::InPlace));
        }
        assert_eq!((source.stats(), recorder.open_brackets()), (before, 0), "{answers:?}");
        source.map(space, pages(22, 24), Access::Read).unwrap();
        source.unmap(space, pages(22, 24)).await.unwrap();
    }
    assert_eq!(source.remap(space, pages(2, 6), 20 * PAGE).await.unwrap().frames, 1);
}

#[tokio::test]
async fn what_cannot_move_is_refused_and_nobody_is_told() {
    let (source, recorder) = source(8);
    let space = mapped(&source, pages(0, 4));
    source.map(space, pages(5, 8), Access::Write).unwrap();
    put(&source, space, 3, 1).await;
    let hole = source.remap(space, pages(3, 6), 100 * PAGE).await;
    assert!(matches!(hole, Err(MemoryError::Unmapped { address }) if address == 4 * PAGE));
    for (old, to) in [(pages(0, 4), 0), (pages(0, 4), 3), (pages(1, 4), 0), (AddrRange::ALL, 0)] {
        let refused = source.remap(space, old, to * PAGE).await;
        assert!(
            matches!(refused, Err(MemoryError::Overlap { .. } | MemoryError::Range(_))),
            "{old} to page {to}: {refused:?}"
        );
    }
    let odd = AddrRange::new(0, PAGE + 1).unwrap();
    for (old, to) in [(odd, 16 * PAGE), (pages(0, 1), 16 * PAGE + 1), (pages(0, 2), 0u64.wrapping_sub(PAGE))]
    {
        assert!(matches!(source.remap(space, old, to).await, Err(MemoryError::Range(_))));
    }
    for page in 0..61 {
        source.map(space, pages(100 + 2 * page, 101 + 2 * page), Access::Write).unwrap();
    }
    // Room for one split, which the old place takes; the new one needs another.
    let full = source.remap(space, pages(2, 4), 5 * PAGE).await;
    assert!(matches!(full, Err(MemoryError::TooManyMappings { most: 64 })));
    assert_eq!((source.stats().mappings, recorder.methods()), (63, vec![]));
    assert_eq!((get(&source, space, 3).await, get(&source, space, 5).await), (1, 0));
    source.remap(space, pages(2, 4), 1000 * PAGE).await.unwrap();
    assert_eq!((source.stats().mappings, get(&source, space, 1001).await), (64, 1));
}

#[tokio::test]
async fn mappings_keep_what_they_allow_and_their_locks_wherever_they_go() {
    let (source, recorder) = source(16);
    let space = mapped(&source, pages(0, 6));
    for page in 0..6 {
        put(&source, space, page, 1).await;
    }
    source.protect(space, pages(2, 4), Access::Read).await.unwrap();
    source.lock(space, pages(4, 6)).unwrap();
    source.lock(space, pages(5, 6)).unwrap();
    let device = recorder.grant(space, 2 * PAGE, Access::Read).await.unwrap();
    // To the top of the address space, over a mapping that is locked: munmap does not mind.
    let top = 0u64.wrapping_sub(6 * PAGE);
    source.map(space, AddrRange::new(top, 0).unwrap(), Access::Write).unwrap();
    source.lock(space, AddrRange::new(top, 0).unwrap()).unwrap();
    source.remap(space, pages(0, 6), top).await.unwrap();
    assert_eq!(source.stats().mappings, 3);
    assert!(matches!(source.store(space, top + 2 * PAGE, b"x").await, Err(MemoryError::ReadOnly { .. })));
    source.store(space, top, b"x").await.unwrap();
    let range = |first: u64, end: u64| {
        AddrRange::new(top.wrapping_add(first * PAGE), top.wrapping_add(end * PAGE)).unwrap()
    };
    assert!(matches!(source.dont_need(space, range(4, 6)).await, Err(MemoryError::Locked { .. })));
    let again = recorder.grant(space, top + 2 * PAGE, Access::Read).await.unwrap();
    assert_eq!(again.frame, device.frame);
    assert_eq!(source.dont_need(space, range(0, 4)).await.unwrap().frames, 4);
    source.exit(space).await.unwrap();
    assert_eq!(source.stats(), Default::default());
}

#[tokio::test]
async fn an_entry_that_settles_is_waited_for_before_it_moves() {
    for answer in [Answer::Held, Answer::HeldNotQuiesced] {
        let (source, recorder) = source(32);
        let space = mapped(&source, pages(0, 4));
        put(&source, space, 1, 1).await;
        let child = source.fork(space, "child").await.unwrap();
        recorder.forget_calls();
        recorder.answer([answer]);
        let store = tokio::spawn({
            let source = source.clone();
            async move { source.store(space, PAGE, &[2; 8]).await }
        });
        until(|| recorder.calls().len() == 1).await;
        let remap = remap(&source, space, pages(0, 4), 510);
        until(|| recorder.calls().len() == 3).await;
        settle_down().await;
        assert!(!remap.is_finished());
        assert_eq!(recorder.open_brackets(), 3, "the page's own, and those of both places");
        recorder.open_gate();
        remap.await.unwrap().unwrap();
        let error = store.await.unwrap().unwrap_err();
        assert!(matches!(error, MemoryError::Unmapped { .. } | MemoryError::NotQuiesced { .. }), "{error:?}");
        assert_eq!((get(&source, space, 511).await, get(&source, child, 1).await), (1, 1));
        recorder.grant(space, 511 * PAGE, Access::Write).await.unwrap();
        put(&source, space, 511, 5).await;
        assert_eq!(get(&source, child, 1).await, 1);
        for space in [space, child] {
            source.exit(space).await.unwrap();
        }
        assert_eq!(source.stats(), Default::default());
    }
}

#[tokio::test]
async fn an_entry_that_is_moving_elsewhere_is_waited_for_before_it_moves() {
    for answer in [Answer::Held, Answer::HeldNotQuiesced] {
        let (source, recorder) = source(32);
        let space = mapped(&source, pages(0, 4));
        for page in 0..4 {
            put(&source, space, page, 1).await;
        }
        recorder.answer([answer]);
        let migrate = tokio::spawn({
            let source = source.clone();
            async move { source.migrate(space, pages(1, 2)).await.unwrap() }
        });
        until(|| recorder.calls().len() == 1).await;
        let remap = remap(&source, space, pages(0, 4), 510);
        until(|| recorder.calls().len() == 3).await;
        settle_down().await;
        assert!(!remap.is_finished());
        recorder.open_gate();
        remap.await.unwrap().unwrap();
        assert_eq!(migrate.await.unwrap().moved, usize::from(answer == Answer::Held));
        for page in 510..514 {
            assert_eq!(get(&source, space, page).await, 1);
            put(&source, space, page, 5).await;
        }
        source.exit(space).await.unwrap();
        assert_eq!(source.stats(), Default::default());
    }
}

#[tokio::test]
async fn two_moves_in_opposite_directions_at_once_both_end() {
    let (source, recorder) = source(32);
    let space = mapped(&source, pages(0, 4));
    source.map(space, pages(510, 514), Access::Write).unwrap();
    for page in 0..4 {
        put(&source, space, page, 1).await;
        put(&source, space, 510 + page, 2).await;
    }
    recorder.answer([Answer::Held]);
    let there = remap(&source, space, pages(0, 4), 510);
    until(|| recorder.calls().len() == 1).await;
    let back = remap(&source, space, pages(510, 514), 0);
    settle_down().await;
    assert_eq!(recorder.calls().len(), 1, "the second waits for both places before it says anything");
    recorder.open_gate();
    let both = async { (there.await.unwrap().unwrap(), back.await.unwrap().unwrap()) };
    let (there, back) = tokio::time::timeout(Duration::from_secs(60), both).await.expect("both end");
    assert_eq!((there.frames, back.frames), (4, 0), "the second found nothing where the first had left");
    assert_eq!(get(&source, space, 3).await, 1);
    assert!(source.load(space, 510 * PAGE, 1).await.is_err());
}

/// A store or a load at whichever of the two places the page is.
macro_rules! at_either {
    ($page:expr, |$address:ident| $op:expr) => {{
        let mut tries = 0;
        'found: loop {
            for first in [0, 600] {
                let $address = (first + $page) * PAGE;
                match $op.await {
                    Ok(done) => break 'found done,
                    Err(error) => assert!(matches!(error, MemoryError::Unmapped { .. }), "{error:?}"),
                }
            }
            tries += 1;
            assert!(tries < 100_000, "the page is nowhere");
            tokio::task::yield_now().await;
        }
    }};
}

type Floors = Arc<Mutex<[u64; 4]>>;

async fn write(source: Source, space: AddressSpaceId, writer: u64, floors: Floors) {
    for stamp in 1..=300u64 {
        let page = stamp % 4;
        at_either!(page, |at| source.store(space, at + 8 * writer, &stamp.to_le_bytes()));
        if writer == 0 {
            floors.lock()[page as usize] = stamp;
        }
        let read = at_either!(page, |at| source.load(space, at + 8 * writer, 8));
        assert_eq!(read[..], stamp.to_le_bytes(), "a store got lost on the way");
    }
}

async fn read_as_device(recorder: Arc<Recorder>, space: AddressSpaceId, floors: Floors) {
    for round in 0..300 {
        let page = round % 4;
        for first in [0, 600] {
            recorder.grant(space, (first + page) * PAGE, Access::Read).await;
            recorder.with_grants(|grants| {
                let Some(grant) = grants.get(&(space, (first + page) * PAGE)) else { return };
                let floor = floors.lock()[page as usize];
                let mut out = bytes::BytesMut::new();
                let span = FrameSpan { frame: grant.frame, offset: 0, length: 8 };
                recorder.frames().read(&[span], &mut out).unwrap();
                let stamp = u64::from_le_bytes(out[..].try_into().unwrap());
                assert!(stamp >= floor && stamp <= 300, "a device read {stamp:#x} after {floor}");
            });
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn no_store_gets_lost_while_its_page_moves() {
    let (source, recorder) = source(128);
    recorder.yield_at_random(0x2e3a);
    let space = mapped(&source, pages(0, 4));
    let floors: Floors = Arc::default();
    let mut tasks = tokio::task::JoinSet::new();
    for writer in 0..2 {
        tasks.spawn(write(source.clone(), space, writer, Arc::clone(&floors)));
    }
    tasks.spawn(read_as_device(Arc::clone(&recorder), space, floors));
    tasks.spawn({
        let source = source.clone();
        async move {
            for round in 0..60 {
                let mut places = [0, 600];
                for _ in 0..2 {
                    let [from, to] = places;
                    source.remap(space, pages(from, from + 4), to * PAGE).await.unwrap();
                    drop(source.migrate(space, pages(to, to + 4)).await);
                    if round % 5 == 0 {
                        let child = source.fork(space, "child").await.unwrap();
                        source.exit(child).await.unwrap();
                    }
                    places.reverse();
                    tokio::task::yield_now().await;
                }
            }
        }
    });
    let all = async {
        while let Some(done) = tasks.join_next().await {
            done.unwrap();
        }
    };
    tokio::time::timeout(Duration::from_secs(120), all).await.expect("it ends");
    source.exit(space).await.unwrap();
    assert_eq!(source.stats(), Default::default());
    assert_eq!(recorder.frames().broken_poison(), 0);
}
