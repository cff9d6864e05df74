//! Several threads at once on one address space. Each writer has bytes of its own on every page and a stamp
//! that only rises; what devices, children and the writer itself read is never older than the last store
//! that had returned, and never poison.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use shootdown_core::{Access, AddressSpaceId};
use shootdown_proto::message::FrameSpan;
use shootdown_server::source::memory::POISON;

use crate::recorder::{Recorder, Source, source};
use crate::{PAGE, mapped, pages};

const PAGES: u64 = 4;
const WRITERS: usize = 3;
const STORES: u64 = 300;
const FORKS: u64 = 60;

/// The last stamp that a store had returned with, by page and writer.
type Floors = Arc<Mutex<[[u64; WRITERS]; PAGES as usize]>>;

fn place(page: u64, writer: usize) -> u64 {
    page * PAGE + 64 * writer as u64
}

fn stamp_in(bytes: &[u8]) -> u64 {
    assert_ne!(bytes, [POISON; 8], "poison was read");
    u64::from_le_bytes(bytes.try_into().unwrap())
}

async fn write(source: Source, space: AddressSpaceId, writer: usize, floors: Floors) {
    for stamp in 1..=STORES {
        let page = stamp % PAGES;
        source.store(space, place(page, writer), &stamp.to_le_bytes()).await.unwrap();
        floors.lock()[page as usize][writer] = stamp;
        let read = source.load(space, place(page, writer), 8).await.unwrap();
        assert_eq!(stamp_in(&read), stamp);
    }
}

async fn read_as_device(recorder: Arc<Recorder>, space: AddressSpaceId, floors: Floors) {
    for round in 0..STORES {
        let page = round % PAGES;
        recorder.grant(space, page * PAGE, Access::Read).await.unwrap();
        for page in 0..PAGES {
            recorder.with_grants(|grants| {
                let floors = floors.lock()[page as usize];
                let Some(grant) = grants.get(&(space, page * PAGE)) else { return };
                for (writer, floor) in floors.into_iter().enumerate() {
                    let mut out = bytes::BytesMut::new();
                    let span = FrameSpan { frame: grant.frame, offset: 64 * writer as u32, length: 8 };
                    recorder.frames().read(&[span], &mut out).unwrap();
                    assert!(stamp_in(&out) >= floor, "a device read what a store had replaced");
                }
            });
        }
        tokio::task::yield_now().await;
    }
}

async fn fork_and_exit(source: Source, space: AddressSpaceId, floors: Floors) {
    for round in 0..FORKS {
        let before = *floors.lock();
        let child = source.fork(space, "child").await.unwrap();
        for page in 0..PAGES {
            for (writer, floor) in before[page as usize].into_iter().enumerate() {
                let read = source.load(child, place(page, writer), 8).await.unwrap();
                assert!(stamp_in(&read) >= floor);
            }
            source.store(child, page * PAGE + 1024, &round.to_le_bytes()).await.unwrap();
        }
        source.exit(child).await.unwrap();
    }
}

/// Maps, fills, drops and unmaps a range of its own, which a second task unmaps too.
async fn map_and_unmap(source: Source, space: AddressSpaceId) {
    for round in 0..FORKS {
        let range = pages(100, 120);
        source.map(space, range, Access::Write).unwrap();
        for page in 100..120 {
            source.store(space, page * PAGE, &round.to_le_bytes()).await.unwrap();
        }
        source.dont_need(space, pages(105, 110)).await.unwrap();
        assert_eq!(source.load(space, 105 * PAGE, 8).await.unwrap()[..], [0; 8]);
        let (low, high) =
            tokio::join!(source.unmap(space, pages(100, 112)), source.unmap(space, pages(108, 120)));
        assert_eq!(low.unwrap().pages + high.unwrap().pages, 16);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn what_anybody_reads_is_never_older_than_a_store_that_had_returned() {
    let (source, recorder) = source(512);
    recorder.yield_at_random(0x5eed);
    let space = mapped(&source, pages(0, PAGES));
    let floors: Floors = Arc::default();
    let mut tasks = tokio::task::JoinSet::new();
    for writer in 0..WRITERS {
        tasks.spawn(write(source.clone(), space, writer, Arc::clone(&floors)));
    }
    for _ in 0..2 {
        tasks.spawn(read_as_device(Arc::clone(&recorder), space, Arc::clone(&floors)));
    }
    tasks.spawn(fork_and_exit(source.clone(), space, Arc::clone(&floors)));
    tasks.spawn(map_and_unmap(source.clone(), space));
    let all = async {
        while let Some(done) = tasks.join_next().await {
            done.unwrap();
        }
    };
    tokio::time::timeout(Duration::from_secs(120), all).await.expect("it ends");
    assert_eq!(source.stats().operations, 0);
    source.exit(space).await.unwrap();
    assert_eq!(source.stats(), Default::default());
    assert_eq!(recorder.frames().broken_poison(), 0);
}
