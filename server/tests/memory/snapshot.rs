//! Pictures of an address space.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use shootdown_core::{Access, AddressSpaceId, Cause};
use shootdown_server::source::memory::{FrameError, FrameStore, MemoryError, POISON, StoreBranch};

use crate::recorder::{Answer, Method, Recorder, settle_down, source, source_on, until};
use crate::{PAGE, branch, dma, get, mapped, pages, put};

#[tokio::test]
async fn a_picture_is_taken_inside_a_bracket_for_each_mapping_and_stays_as_it_was() {
    let (source, recorder) = source(32);
    let space = mapped(&source, pages(0, 1024));
    source.map(space, pages(2000, 2002), Access::Write).unwrap();
    source.map(space, pages(3000, 3002), Access::Read).unwrap();
    for page in [0, 511, 512, 1023, 2001] {
        put(&source, space, page, 1).await;
    }
    let device = recorder.grant(space, 0, Access::Write).await.unwrap();
    recorder.answer([Answer::Held]);
    let snapshot = tokio::spawn({
        let source = source.clone();
        async move { source.snapshot(space).await.unwrap() }
    });
    until(|| !recorder.calls().is_empty()).await;
    settle_down().await;
    assert!(matches!(branch(&put(&source, space, 0, 2).await), StoreBranch::InPlace));
    recorder.open_gate();
    let snapshot = snapshot.await.unwrap();
    let told: Vec<_> = recorder.calls().iter().map(|call| (call.method, call.range)).collect();
    let start = Method::RangeStart(Cause::ProtectionPage);
    let (low, high) = (pages(0, 1024), pages(2000, 2002));
    let brackets = [(start, low), (Method::RangeEnd, low), (start, high), (Method::RangeEnd, high)];
    assert_eq!(told, brackets, "nobody may write to the third mapping, and it has no page");
    recorder.with_grants(|grants| assert!(grants.is_empty(), "the device lost its leave to write"));
    let stats = source.stats();
    assert_eq!((stats.address_spaces, stats.frames_in_use), (1, 5), "it shares every page");

    assert!(matches!(branch(&put(&source, space, 0, 3).await), StoreBranch::Copied(_)));
    let again = recorder.grant(space, 511 * PAGE, Access::Write).await.unwrap();
    recorder.frames().write(again.frame, 0, &[4]).unwrap();
    source.unmap(space, pages(2000, 2002)).await.unwrap();
    assert_eq!(snapshot.ranges(), [low, high, pages(3000, 3002)]);
    let first = |page: u64| snapshot.load(page * PAGE, 1).unwrap()[0];
    assert_eq!([0, 511, 512, 2001, 7, 3000].map(first), [2, 1, 1, 1, 0, 0]);
    assert_eq!((get(&source, space, 0).await, get(&source, space, 511).await), (3, 4));
    assert_eq!(dma(source.frames(), device.frame), 2, "its old frame is the picture's");
    let across = snapshot.load(510 * PAGE, 4 * PAGE as usize).unwrap();
    assert_eq!(across.len(), 4 * PAGE as usize);
    assert_eq!([0, 1, 2, 3].map(|page| across[page * PAGE as usize + 7]), [0, 1, 1, 0]);
    assert_eq!(snapshot.load(PAGE - 1, 2).unwrap()[..], [0; 2]);
    let hole = snapshot.load(1023 * PAGE, 2 * PAGE as usize);
    assert!(matches!(hole, Err(MemoryError::Unmapped { address }) if address == 1024 * PAGE));
    assert!(matches!(snapshot.load(u64::MAX, 2), Err(MemoryError::Range(_))));
    assert!(snapshot.load(5000 * PAGE, 0).unwrap().is_empty());
    source.exit(space).await.unwrap();
    drop(snapshot);
    assert_eq!(source.stats(), Default::default());
}

#[tokio::test]
async fn a_store_tells_devices_before_it_gives_its_frame_up_to_the_picture() {
    let (source, recorder) = source(8);
    let space = mapped(&source, pages(0, 1));
    put(&source, space, 0, 1).await;
    let snapshot = source.snapshot(space).await.unwrap();
    let device = recorder.grant(space, 0, Access::Read).await.unwrap();
    recorder.forget_calls();
    recorder.answer([Answer::Held]);
    let store = tokio::spawn({
        let source = source.clone();
        async move { put(&source, space, 0, 2).await }
    });
    until(|| recorder.methods() == [Method::Page(Cause::Clear)]).await;
    drop(snapshot);
    settle_down().await;
    assert_eq!(dma(source.frames(), device.frame), 1, "the picture's reference was not the last");
    recorder.open_gate();
    assert!(matches!(branch(&store.await.unwrap()), StoreBranch::Copied(page) if page.release.is_some()));
    assert_eq!(dma(source.frames(), device.frame), POISON);
    assert_eq!(source.stats().frames_in_use, 1);
}

#[tokio::test]
async fn when_the_picture_is_dropped_pages_are_written_in_place_again_and_nobody_is_told() {
    let (source, recorder) = source(8);
    let space = mapped(&source, pages(0, 2));
    put(&source, space, 0, 1).await;
    put(&source, space, 1, 1).await;
    let snapshot = source.snapshot(space).await.unwrap();
    put(&source, space, 1, 2).await;
    assert_eq!(source.stats().frames_in_use, 3);
    recorder.forget_calls();
    let before = source.generation(space, 0);
    drop(snapshot);
    assert_eq!(source.stats().frames_in_use, 2);
    assert!(matches!(branch(&put(&source, space, 0, 2).await), StoreBranch::Reuse));
    assert!(matches!(branch(&put(&source, space, 1, 3).await), StoreBranch::InPlace));
    assert_eq!((source.generation(space, 0), recorder.methods()), (before, vec![]));
}

#[tokio::test]
async fn a_picture_outlives_its_address_space_and_no_address_space_is_made_for_it() {
    let (source, _recorder) = source(8);
    let space = mapped(&source, pages(0, 2));
    put(&source, space, 1, 6).await;
    let snapshot = source.snapshot(space).await.unwrap();
    assert_eq!(source.stats().address_spaces, 1);
    let next = source.create("next").unwrap();
    assert_eq!(next.get(), space.get() + 1, "the notifier was not asked for one");
    for id in [space, next] {
        source.exit(id).await.unwrap();
    }
    let stats = source.stats();
    assert_eq!((stats.address_spaces, stats.frames_in_use), (0, 1));
    assert_eq!(snapshot.load(PAGE, 8).unwrap()[..], [6; 8]);
    drop(snapshot);
    assert_eq!(source.stats(), Default::default());
}

#[tokio::test]
async fn a_picture_that_fails_leaves_no_reference() {
    let (source, recorder) = source_on(FrameStore::with_reference_limit(8, 2).unwrap());
    let space = mapped(&source, pages(0, 2));
    source.map(space, pages(4, 6), Access::Read).unwrap();
    source.map(space, pages(8, 10), Access::Write).unwrap();
    for page in [0, 8] {
        put(&source, space, page, 1).await;
    }
    for second in [Answer::Refused, Answer::NotQuiesced] {
        recorder.answer([Answer::Quiesced, second]);
        assert!(source.snapshot(space).await.is_err());
    }
    let first = source.snapshot(space).await.unwrap();
    let error = source.snapshot(space).await.unwrap_err();
    assert!(matches!(error, MemoryError::Frame(FrameError::TooManyReferences { most: 2, .. })));
    assert_eq!((source.stats().operations, recorder.open_brackets()), (0, 0));
    drop(first);
    recorder.forget_calls();
    for page in [0, 8] {
        assert!(matches!(branch(&put(&source, space, page, 2).await), StoreBranch::Reuse));
    }
    assert_eq!(recorder.methods(), []);
}

#[tokio::test]
async fn pages_that_move_while_the_picture_is_taken_are_in_it() {
    let (source, recorder) = source(8);
    let space = mapped(&source, pages(0, 2));
    put(&source, space, 0, 1).await;
    put(&source, space, 1, 2).await;
    recorder.answer([Answer::Held]);
    let migrate = tokio::spawn({
        let source = source.clone();
        async move { source.migrate(space, pages(0, 1)).await.unwrap() }
    });
    until(|| recorder.calls().len() == 1).await;
    let snapshot = tokio::spawn({
        let source = source.clone();
        async move { source.snapshot(space).await.unwrap() }
    });
    settle_down().await;
    assert!(!snapshot.is_finished());
    recorder.open_gate();
    let snapshot = snapshot.await.unwrap();
    assert_eq!(migrate.await.unwrap().moved, 1);
    put(&source, space, 0, 9).await;
    assert_eq!((snapshot.load(0, 1).unwrap()[0], snapshot.load(PAGE, 1).unwrap()[0]), (1, 2));
    assert_eq!(source.migrate(space, pages(1, 2)).await.unwrap().stayed, 1, "a picture holds it");
}

async fn write_as_device(recorder: Arc<Recorder>, space: AddressSpaceId) {
    for stamp in 1..=400u64 {
        let page = stamp % 4;
        recorder.grant(space, page * PAGE, Access::Write).await.unwrap();
        recorder.with_grants(|grants| {
            let grant = grants.get(&(space, page * PAGE)).filter(|grant| grant.access == Access::Write);
            if let Some(grant) = grant {
                recorder.frames().write(grant.frame, 56, &stamp.to_le_bytes()).unwrap();
            }
        });
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn whoever_writes_meanwhile_a_picture_has_each_store_that_had_returned_and_never_changes() {
    let (source, recorder) = source(256);
    recorder.yield_at_random(0x51a9);
    let space = mapped(&source, pages(0, 4));
    let floors: Arc<Mutex<[[u64; 4]; 2]>> = Arc::default();
    let mut tasks = tokio::task::JoinSet::new();
    for writer in 0..2u64 {
        let (source, floors) = (source.clone(), Arc::clone(&floors));
        tasks.spawn(async move {
            for stamp in 1..=400u64 {
                let page = stamp % 4;
                source.store(space, page * PAGE + 8 * writer, &stamp.to_le_bytes()).await.unwrap();
                floors.lock()[writer as usize][page as usize] = stamp;
                tokio::task::yield_now().await;
            }
        });
    }
    tasks.spawn(write_as_device(Arc::clone(&recorder), space));
    tasks.spawn({
        let source = source.clone();
        async move {
            let mut kept = None;
            for _ in 0..80 {
                let before = *floors.lock();
                let snapshot = source.snapshot(space).await.unwrap();
                assert_eq!(snapshot.ranges(), [pages(0, 4)]);
                let all = snapshot.load(0, 4 * PAGE as usize).unwrap();
                for page in 0..4 {
                    for (writer, floors) in before.iter().enumerate() {
                        let at = page * PAGE as usize + 8 * writer;
                        let stamp = u64::from_le_bytes(all[at..at + 8].try_into().unwrap());
                        assert!(stamp >= floors[page] && stamp <= 400, "{stamp:#x}");
                    }
                }
                tokio::task::yield_now().await;
                assert_eq!(snapshot.load(0, 4 * PAGE as usize).unwrap(), all);
                // The one before goes only now: pictures share pages with each other.
                if let Some((snapshot, all)) = kept.replace((snapshot, all)) {
                    let snapshot: shootdown_server::source::memory::Snapshot = snapshot;
                    assert_eq!(snapshot.load(0, 4 * PAGE as usize).unwrap(), all);
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
