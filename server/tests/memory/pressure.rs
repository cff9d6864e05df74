//! Several threads on one address space with less memory than it uses, while it is forked, unmapped, aged and
//! paged out. Each writer has bytes of its own on every page, and reads back what it wrote last.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use shootdown_core::{Access, AddressSpaceId};
use shootdown_proto::message::FrameSpan;
use shootdown_server::source::memory::POISON;

use crate::recorder::{Recorder, Source};
use crate::swap_out::{nothing_is_left, swapping};
use crate::{PAGE, mapped, pages};

const PAGES: u64 = 40;
const LIMIT: usize = 16;
const WRITERS: usize = 3;
const STEPS: u64 = 250;
const FORKS: u64 = 25;

/// Writers, readers, who forks, who unmaps, who pages out: as many frames may be taken at once beyond the limit.
const TASKS: usize = WRITERS + 5;

/// The last stamp that a store had returned with, by page and writer.
type Floors = Arc<Mutex<[[u64; WRITERS]; PAGES as usize]>>;

#[derive(Clone, Copy)]
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % end
    }
}

#[derive(Clone)]
struct Stage {
    source: Source,
    recorder: Arc<Recorder>,
    space: AddressSpaceId,
    floors: Floors,
}

fn place(page: u64, writer: usize) -> u64 {
    page * PAGE + 64 * writer as u64
}

fn stamp_in(bytes: &[u8]) -> u64 {
    assert_ne!(bytes, [POISON; 8], "poison was read");
    u64::from_le_bytes(bytes.try_into().unwrap())
}

async fn write(stage: Stage, writer: usize, mut random: Random) {
    let Stage { source, space, floors, .. } = stage;
    for stamp in 1..=STEPS {
        let page = random.below(PAGES);
        source.store(space, place(page, writer), &stamp.to_le_bytes()).await.unwrap();
        floors.lock()[page as usize][writer] = stamp;
        let page = random.below(PAGES);
        let read = source.load(space, place(page, writer), 8).await.unwrap();
        assert_eq!(stamp_in(&read), floors.lock()[page as usize][writer], "page {page}");
        assert!(source.stats().frames_in_use <= LIMIT + TASKS);
    }
}

async fn read_as_device(stage: Stage, mut random: Random) {
    for _ in 0..STEPS {
        let page = random.below(PAGES);
        stage.recorder.grant(stage.space, page * PAGE, Access::Read).await.unwrap();
        let page = random.below(PAGES);
        stage.recorder.with_grants(|grants| {
            let floors = stage.floors.lock()[page as usize];
            let Some(grant) = grants.get(&(stage.space, page * PAGE)) else { return };
            for (writer, floor) in floors.into_iter().enumerate() {
                let mut out = bytes::BytesMut::new();
                let span = FrameSpan { frame: grant.frame, offset: 64 * writer as u32, length: 8 };
                stage.recorder.frames().read(&[span], &mut out).unwrap();
                assert!(stamp_in(&out) >= floor, "a device read what a store had replaced");
            }
        });
        stage.recorder.uses(stage.space, page * PAGE);
    }
}

async fn fork_and_exit(stage: Stage, mut random: Random) {
    let Stage { source, space, floors, .. } = stage;
    for round in 0..FORKS {
        let before = *floors.lock();
        let child = source.fork(space, "child").await.unwrap();
        for _ in 0..12 {
            let page = random.below(PAGES);
            source.store(child, page * PAGE + 1024, &round.to_le_bytes()).await.unwrap();
            for (writer, floor) in before[page as usize].into_iter().enumerate() {
                let read = source.load(child, place(page, writer), 8).await.unwrap();
                assert!(stamp_in(&read) >= floor);
            }
            assert_eq!(source.load(space, page * PAGE + 1024, 8).await.unwrap()[..], [0; 8]);
        }
        source.exit(child).await.unwrap();
    }
}

async fn map_and_unmap(stage: Stage) {
    let Stage { source, space, .. } = stage;
    for round in 1..=FORKS {
        source.map(space, pages(100, 112), Access::Write).unwrap();
        for page in 100..112 {
            source.store(space, page * PAGE, &round.to_le_bytes()).await.unwrap();
        }
        source.dont_need(space, pages(103, 106)).await.unwrap();
        for page in 100..112 {
            let expected = if (103..106).contains(&page) { 0 } else { round };
            assert_eq!(stamp_in(&source.load(space, page * PAGE, 8).await.unwrap()), expected);
        }
        let unmapped = source.unmap(space, pages(100, 112)).await.unwrap();
        assert!((9..=12).contains(&unmapped.pages));
    }
}

async fn page_out(stage: Stage, mut random: Random) {
    for _ in 0..FORKS {
        let first = random.below(PAGES - 4);
        stage.source.page_out(stage.space, pages(first, first + 4)).await.unwrap();
        stage.source.migrate(stage.space, pages(first, PAGES)).await.unwrap();
        stage.source.age(4).await.unwrap();
        stage.source.reclaim(2).await.unwrap();
    }
}

async fn run(seed: u64, frames: usize) {
    let (source, recorder, swap) = swapping(frames, LIMIT, 1024);
    recorder.yield_at_random(seed);
    let mut random = Random(seed);
    let space = mapped(&source, pages(0, PAGES));
    let floors: Floors = Arc::new(Mutex::new([[0; WRITERS]; PAGES as usize]));
    let stage = Stage { source: source.clone(), recorder: Arc::clone(&recorder), space, floors };
    let mut tasks = tokio::task::JoinSet::new();
    let mut other = || Random(random.below(u64::MAX) | 1);
    for writer in 0..WRITERS {
        tasks.spawn(write(stage.clone(), writer, other()));
    }
    for _ in 0..2 {
        tasks.spawn(read_as_device(stage.clone(), other()));
    }
    tasks.spawn(fork_and_exit(stage.clone(), other()));
    tasks.spawn(map_and_unmap(stage.clone()));
    tasks.spawn(page_out(stage.clone(), other()));
    let all = async {
        while let Some(done) = tasks.join_next().await {
            done.unwrap();
        }
    };
    tokio::time::timeout(Duration::from_secs(120), all).await.expect("it ends");
    let written = *stage.floors.lock();
    for page in 0..PAGES {
        for (writer, stamp) in written[page as usize].into_iter().enumerate() {
            let read = source.load(space, place(page, writer), 8).await;
            assert_eq!(stamp_in(&read.unwrap()), stamp);
        }
    }
    let stats = source.stats();
    assert_eq!((stats.operations, stats.isolated, stats.quarantined), (0, 0, 0));
    source.exit(space).await.unwrap();
    nothing_is_left(&source, &recorder).await;
    assert_eq!(swap.in_use(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn under_pressure_everybody_reads_what_was_written_last() {
    for seed in [0x5eed, 0xfeed_beef, 0x0dd_ba11] {
        run(seed, 64).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn without_a_frame_beyond_the_limit_who_comes_too_late_asks_again() {
    for seed in [0x1ce, 0xcafe] {
        run(seed, LIMIT).await;
    }
}
