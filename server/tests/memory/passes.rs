//! The passes that run beside a program (merge, collapse, migration) on several threads, while it loads and
//! stores, forks and unmaps, and devices read and write. Each worker has pages of its own and knows what must
//! be in them; values are few, so that pages of different workers are equal all the time.

use std::sync::Arc;
use std::time::Duration;

use shootdown_core::{Access, AddressSpaceId};
use shootdown_proto::message::FrameSpan;
use shootdown_server::source::memory::{Collapsed, FrameStore, MemoryError, MemoryStats, SwapFile};
use tokio::sync::watch;

use crate::recorder::{Recorder, Source, source, source_with};
use crate::{PAGE, mapped, pages};

const HUGE: u64 = 8;
const STEPS: u64 = 400;
/// As far from where it was a worker's pages are moved, in pages.
const FAR: u64 = 512;
/// So often each pass has something to do before the workers end.
const ENOUGH: usize = 10;

/// A random number, the next of its stream.
fn next(random: &mut u64) -> u64 {
    *random ^= *random << 13;
    *random ^= *random >> 7;
    *random ^= *random << 17;
    *random
}

/// What a page must have at its first byte and its last.
type Page = [u8; 2];

fn at(page: u64, which: usize) -> u64 {
    page * PAGE + which as u64 * (PAGE - 1)
}

async fn check(source: &Source, space: AddressSpaceId, page: u64, expected: Page) {
    let read = source.load(space, page * PAGE, PAGE as usize).await.unwrap();
    assert_eq!([read[0], read[PAGE as usize - 1]], expected, "page {page} of {space}");
}

/// The pages of one worker.
#[derive(Clone, Copy)]
struct Place {
    space: AddressSpaceId,
    first: u64,
    mergeable: bool,
    /// The pass has something to do so often before the worker ends.
    enough: usize,
}

/// A worker on the pages of one huge page, until the passes have done enough beside it.
async fn work(
    source: Source,
    recorder: Arc<Recorder>,
    place: Place,
    mut random: u64,
    done: watch::Receiver<[usize; 3]>,
) {
    let Place { space, mut first, mergeable, enough } = place;
    let mut kept = [[0; 2]; HUGE as usize];
    let mut step = 0;
    while step < STEPS || done.borrow().iter().any(|done| *done < enough) {
        step += 1;
        let index = (next(&mut random) % HUGE) as usize;
        let (page, which) = (first + index as u64, next(&mut random) as usize % 2);
        let byte = (next(&mut random) % 2) as u8;
        match next(&mut random) % 14 {
            0..4 => {
                source.store(space, at(page, which), &[byte]).await.unwrap();
                kept[index][which] = byte;
            }
            4..6 => {
                if recorder.grant(space, page * PAGE, Access::Write).await.is_some() {
                    // A device that lost its leave meanwhile does not write.
                    let written = recorder.with_grants(|grants| {
                        let grant = grants.get(&(space, page * PAGE))?;
                        let offset = (which as u64 * (PAGE - 1)) as u32;
                        (grant.access == Access::Write)
                            .then(|| recorder.frames().write(grant.frame, offset, &[byte]).unwrap())
                    });
                    if written.is_some() {
                        kept[index][which] = byte;
                    }
                }
            }
            6 => {
                recorder.grant(space, page * PAGE, Access::Read).await.unwrap();
                check_devices(&recorder, space, page, kept[index]);
            }
            7 => {
                source.dont_need(space, pages(page, page + 1)).await.unwrap();
                kept[index] = [0; 2];
            }
            8 => {
                let child = source.fork(space, "child").await.unwrap();
                source.store(child, at(page, which), &[byte ^ 1]).await.unwrap();
                for (index, kept) in kept.iter().enumerate().filter(|(other, _)| *other != index) {
                    check(&source, child, first + index as u64, *kept).await;
                }
                source.exit(child).await.unwrap();
            }
            9 => {
                source.protect(space, pages(page, page + 1), Access::Read).await.unwrap();
                let refused = source.store(space, at(page, which), &[byte ^ 1]).await;
                assert!(matches!(refused, Err(MemoryError::ReadOnly { .. })), "{refused:?}");
                assert_eq!(recorder.grant(space, page * PAGE, Access::Write).await, None);
                source.protect(space, pages(page, page + 1), Access::Write).await.unwrap();
            }
            // What moves is not where the pass collapses.
            10 if enough == 0 => {
                let elsewhere = if first < FAR { first + FAR } else { first - FAR };
                source.remap(space, pages(first, first + HUGE), elsewhere * PAGE).await.unwrap();
                let gone = source.load(space, page * PAGE, 1).await;
                assert!(matches!(gone, Err(MemoryError::Unmapped { .. })), "{gone:?}");
                first = elsewhere;
                continue;
            }
            // A picture keeps its frames in memory, and where there is little of that nothing else has room.
            11 if enough > 0 => {
                let snapshot = source.snapshot(space).await.unwrap();
                source.store(space, at(page, which), &[byte]).await.unwrap();
                let read = snapshot.load(page * PAGE, PAGE as usize).unwrap();
                assert_eq!([read[0], read[PAGE as usize - 1]], kept[index], "page {page} of a snapshot");
                kept[index][which] = byte;
            }
            10..13 => drop(source.page_out(space, pages(page, page + 1)).await),
            _ => {
                source.unmap(space, pages(page, page + 1)).await.unwrap();
                source.map(space, pages(page, page + 1), Access::Write).unwrap();
                if mergeable {
                    source.advise_merge(space, pages(page, page + 1)).unwrap();
                }
                kept[index] = [0; 2];
            }
        }
        check(&source, space, page, kept[index]).await;
        check_devices(&recorder, space, page, kept[index]);
    }
    for (index, kept) in kept.iter().enumerate() {
        check(&source, space, first + index as u64, *kept).await;
    }
}

/// What a device reads through what it holds, while nobody else writes there.
fn check_devices(recorder: &Recorder, space: AddressSpaceId, page: u64, expected: Page) {
    recorder.with_grants(|grants| {
        let Some(grant) = grants.get(&(space, page * PAGE)) else { return };
        let mut out = bytes::BytesMut::new();
        let span = |offset| FrameSpan { frame: grant.frame, offset, length: 1 };
        recorder.frames().read(&[span(0), span(PAGE as u32 - 1)], &mut out).unwrap();
        assert_eq!(out[..], expected, "a stale translation of page {page} of {space}");
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn what_is_in_memory_is_what_was_stored_whatever_is_merged_collapsed_and_migrated_meanwhile() {
    let (source, recorder) = source(512);
    everything(source, recorder, ENOUGH).await;
}

/// Collapse and migration find no frame most of the time, and nobody waits for them.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn what_is_in_memory_is_what_was_stored_with_half_of_the_memory_that_it_takes() {
    let swap = Arc::new(SwapFile::on(tempfile::tempfile().unwrap(), 4096).unwrap());
    let (source, recorder) = source_with(FrameStore::new(64).unwrap(), |config| {
        config.limit_frames = 24;
        config.swap = Some(Arc::clone(&swap));
    });
    everything(source, recorder, 0).await;
    assert_eq!(swap.in_use(), 0);
}

async fn everything(source: Source, recorder: Arc<Recorder>, enough: usize) {
    recorder.yield_at_random(0xface);
    let spaces = [0, 1, 2].map(|_| mapped(&source, pages(0, 2 * HUGE)));
    let (tell, done) = watch::channel([0; 3]);
    let mut workers = tokio::task::JoinSet::new();
    for (index, space) in spaces.into_iter().enumerate() {
        // Where much is merged little is collapsed, so one is not merged.
        let mergeable = index < 2;
        if mergeable {
            source.advise_merge(space, pages(0, 2 * HUGE)).unwrap();
        }
        for half in 0..2 {
            let seed = 0x9e37_79b9 * (2 * index as u64 + half + 1);
            let place = Place { space, first: half * HUGE, mergeable, enough };
            workers.spawn(work(source.clone(), Arc::clone(&recorder), place, seed, done.clone()));
        }
    }
    drop(done);
    let passes = tokio::spawn(pass(source.clone(), spaces, tell));
    let all = async {
        while let Some(done) = workers.join_next().await {
            done.unwrap();
        }
        passes.await.unwrap();
    };
    tokio::time::timeout(Duration::from_secs(120), all).await.expect("it ends");
    for space in spaces {
        source.exit(space).await.unwrap();
    }
    assert_eq!(source.stats(), MemoryStats::default());
    assert_eq!((recorder.frames().broken_poison(), recorder.open_brackets()), (0, 0));
}

/// Merges, collapses and migrates, and tells how many of each, until no worker listens.
async fn pass(source: Source, spaces: [AddressSpaceId; 3], tell: watch::Sender<[usize; 3]>) {
    while !tell.is_closed() {
        let mut more = [source.merge(20).await.unwrap().merged, 0, 0];
        source.age(4).await.unwrap();
        drop(source.reclaim(2).await);
        for space in spaces {
            for half in [pages(0, HUGE), pages(HUGE, 2 * HUGE)] {
                // A part of it may be unmapped at the moment.
                let collapse = source.collapse(space, half).await;
                more[1] += usize::from(matches!(collapse, Ok(Collapsed::Yes)));
            }
            more[2] += source.migrate(space, pages(0, 2 * HUGE)).await.unwrap().moved;
        }
        tell.send_modify(|done| done.iter_mut().zip(more).for_each(|(done, more)| *done += more));
        tokio::task::yield_now().await;
    }
}
