//! mprotect and mlock.

use std::sync::Arc;
use std::time::Duration;

use shootdown_core::{Access, AddrRange, AddressSpaceId, Cause};
use shootdown_server::source::memory::{MemoryError, POISON, StoreBranch};
use shootdown_server::source::{FaultError, Translate};

use crate::recorder::{Answer, Method, Recorder, Source, settle_down, source, until};
use crate::{PAGE, branch, get, mapped, pages, put};

const ROUND: [Method; 2] = [Method::RangeStart(Cause::ProtectionVma), Method::RangeEnd];

fn protect(
    source: &Source,
    space: AddressSpaceId,
    range: AddrRange,
    access: Access,
) -> tokio::task::JoinHandle<Result<usize, MemoryError>> {
    let source = source.clone();
    tokio::spawn(async move { source.protect(space, range, access).await })
}

#[tokio::test]
async fn when_protect_has_returned_neither_the_cpu_nor_a_device_writes() {
    let (source, recorder) = source(16);
    let space = mapped(&source, pages(0, 1024));
    for page in [0, 511, 512, 1023] {
        put(&source, space, page, 1).await;
    }
    let held = recorder.grant(space, 0, Access::Write).await.unwrap();
    recorder.answer([Answer::Held]);
    let protect = protect(&source, space, pages(0, 1024), Access::Read);
    until(|| !recorder.calls().is_empty()).await;
    let fault = tokio::spawn({
        let recorder = Arc::clone(&recorder);
        async move { recorder.grant(space, 511 * PAGE, Access::Write).await }
    });
    settle_down().await;
    assert!(!protect.is_finished() && !fault.is_finished(), "nothing is granted while the bracket is open");
    let early = put(&source, space, 0, 2).await;
    assert!(matches!(branch(&early), StoreBranch::InPlace), "nothing changes before devices have stopped");

    recorder.open_gate();
    assert_eq!(protect.await.unwrap().unwrap(), 4);
    assert_eq!(recorder.methods(), ROUND);
    assert_eq!(recorder.calls()[0].range, pages(0, 1024));
    recorder.with_grants(|grants| assert!(grants.is_empty(), "the device lost its leave to write"));
    assert_eq!(fault.await.unwrap(), None, "it was answered while writing was allowed, and not granted");
    for page in [0, 7, 512] {
        let store = source.store(space, page * PAGE, b"x").await;
        assert!(matches!(store, Err(MemoryError::ReadOnly { address }) if address == page * PAGE));
        let fault = source.fault(space, pages(page, page + 1), Access::Write).await;
        assert!(matches!(fault, Err(FaultError::ReadOnly { .. })));
    }
    let read = recorder.grant(space, 0, Access::Read).await.unwrap();
    assert_eq!(read.frame, held.frame, "the page stays in its frame");
    assert_eq!(get(&source, space, 0).await, 2);
    source.exit(space).await.unwrap();
    assert_eq!(source.stats(), Default::default());
}

#[tokio::test]
async fn an_entry_is_raised_by_the_next_write_and_not_by_protect() {
    let (source, recorder) = source(8);
    let space = mapped(&source, pages(0, 2));
    put(&source, space, 0, 1).await;
    let before = source.generation(space, 0);
    assert_eq!(source.protect(space, pages(0, 2), Access::Read).await.unwrap(), 1);
    assert_eq!(source.protect(space, pages(0, 2), Access::Write).await.unwrap(), 0);
    assert_eq!(recorder.methods(), [ROUND, ROUND].concat());
    recorder.forget_calls();
    assert!(matches!(branch(&put(&source, space, 0, 2).await), StoreBranch::Reuse));
    assert!(matches!(branch(&put(&source, space, 0, 3).await), StoreBranch::InPlace));
    assert_eq!((source.generation(space, 0), recorder.methods()), (before, vec![]));
    assert!(matches!(branch(&put(&source, space, 1, 4).await), StoreBranch::ZeroFill));
}

#[tokio::test]
async fn pages_that_a_fork_shares_stay_copy_on_write_however_often_their_protection_changes() {
    let (source, recorder) = source(8);
    let parent = mapped(&source, pages(0, 2));
    put(&source, parent, 0, 1).await;
    put(&source, parent, 1, 1).await;
    let child = source.fork(parent, "child").await.unwrap();
    for space in [parent, child, parent] {
        assert_eq!(source.protect(space, pages(0, 2), Access::Read).await.unwrap(), 0, "fork lowered them");
        source.protect(space, pages(0, 2), Access::Write).await.unwrap();
    }
    let device = recorder.grant(parent, PAGE, Access::Write).await.unwrap();
    recorder.frames().write(device.frame, 0, &[3]).unwrap();
    assert!(matches!(branch(&put(&source, parent, 0, 2).await), StoreBranch::Copied(_)));
    assert_eq!((get(&source, parent, 0).await, get(&source, child, 0).await), (2, 1));
    assert_eq!((get(&source, parent, 1).await, get(&source, child, 1).await), (3, 1));
    source.protect(child, pages(0, 2), Access::Read).await.unwrap();
    for space in [parent, child] {
        source.exit(space).await.unwrap();
    }
    assert_eq!(source.stats(), Default::default());
}

#[tokio::test]
async fn a_notifier_that_refuses_leaves_what_the_mapping_allows_as_it_was() {
    let (source, recorder) = source(8);
    let space = mapped(&source, pages(0, 8));
    put(&source, space, 3, 7).await;
    for answer in [Answer::Refused, Answer::NotQuiesced] {
        recorder.answer([answer]);
        let error = source.protect(space, pages(2, 5), Access::Read).await.unwrap_err();
        assert!(matches!(error, MemoryError::Notify(_) | MemoryError::NotQuiesced { .. }), "{error:?}");
        assert!(matches!(branch(&put(&source, space, 3, 8).await), StoreBranch::InPlace));
        put(&source, space, 4, 1).await;
        assert_eq!(recorder.open_brackets(), 0, "each start that succeeded has its end");
    }
    let stats = source.stats();
    assert_eq!((stats.mappings, stats.mapped_pages, stats.operations), (1, 2, 0));
}

#[tokio::test]
async fn a_hole_or_one_mapping_too_many_changes_nothing() {
    let (source, recorder) = source(8);
    let space = mapped(&source, pages(0, 4));
    source.map(space, pages(5, 8), Access::Write).unwrap();
    put(&source, space, 3, 1).await;
    let hole = source.protect(space, pages(3, 6), Access::Read).await;
    assert!(matches!(hole, Err(MemoryError::Unmapped { address }) if address == 4 * PAGE));
    let odd = AddrRange::new(1, PAGE).unwrap();
    assert!(matches!(source.protect(space, odd, Access::Read).await, Err(MemoryError::Range(_))));
    assert_eq!(recorder.methods(), []);
    for page in 0..62 {
        source.map(space, pages(100 + 2 * page, 101 + 2 * page), Access::Write).unwrap();
    }
    let full = source.protect(space, pages(3, 4), Access::Read).await;
    assert!(matches!(full, Err(MemoryError::TooManyMappings { most: 64 })));
    assert_eq!(recorder.open_brackets(), 0);
    assert!(matches!(branch(&put(&source, space, 3, 2).await), StoreBranch::InPlace));
}

#[tokio::test]
async fn where_nothing_changes_or_no_page_is_present_nobody_is_told() {
    let (source, recorder) = source(8);
    let space = mapped(&source, pages(0, 4));
    source.map(space, pages(4, 8), Access::Read).unwrap();
    put(&source, space, 1, 1).await;
    assert_eq!(get(&source, space, 5).await, 0);
    assert_eq!(source.protect(space, pages(0, 4), Access::Write).await.unwrap(), 0);
    assert_eq!(source.protect(space, pages(2, 8), Access::Read).await.unwrap(), 0);
    assert_eq!(recorder.methods(), [], "the pages that are present are not those that change");
    assert!(matches!(source.store(space, 2 * PAGE, b"x").await, Err(MemoryError::ReadOnly { .. })));

    assert_eq!(source.protect(space, pages(0, 8), Access::Read).await.unwrap(), 1);
    assert_eq!(recorder.calls()[0].range, pages(0, 2), "from the first that changes to the last");
    assert_eq!(source.protect(space, pages(1, 2), Access::Write).await.unwrap(), 0);
    assert_eq!(source.stats().mappings, 3);
    assert_eq!(source.protect(space, pages(1, 2), Access::Read).await.unwrap(), 0);
    assert_eq!(source.stats().mappings, 1, "what is alike, and belongs together, is one");
}

#[tokio::test]
async fn an_entry_that_is_moving_comes_back_with_no_more_than_its_mapping_allows() {
    for answer in [Answer::Held, Answer::HeldNotQuiesced] {
        let (source, recorder) = source(8);
        let space = mapped(&source, pages(0, 1));
        put(&source, space, 0, 1).await;
        recorder.answer([answer]);
        let migrate = tokio::spawn({
            let source = source.clone();
            async move { source.migrate(space, pages(0, 1)).await.unwrap() }
        });
        until(|| recorder.methods() == [Method::Page(Cause::Migrate)]).await;
        assert_eq!(source.protect(space, pages(0, 1), Access::Read).await.unwrap(), 1);
        recorder.open_gate();
        assert_eq!(migrate.await.unwrap().moved, usize::from(answer == Answer::Held));
        assert!(source.store(space, 0, b"x").await.is_err());
        source.protect(space, pages(0, 1), Access::Write).await.unwrap();
        let raised = put(&source, space, 0, 2).await;
        assert!(matches!(branch(&raised), StoreBranch::Reuse), "{answer:?}: it was writable all the time");
    }
}

#[tokio::test]
async fn a_copy_that_settles_in_a_read_only_mapping_is_not_written_to() {
    for answer in [Answer::Held, Answer::HeldNotQuiesced] {
        let (source, recorder) = source(8);
        let parent = mapped(&source, pages(0, 1));
        put(&source, parent, 0, 1).await;
        let child = source.fork(parent, "child").await.unwrap();
        recorder.forget_calls();
        recorder.answer([answer]);
        let store = tokio::spawn({
            let source = source.clone();
            async move { source.store(parent, 0, &[2; 8]).await }
        });
        until(|| recorder.methods() == [Method::Page(Cause::Clear)]).await;
        assert_eq!(source.protect(parent, pages(0, 1), Access::Read).await.unwrap(), 1);
        recorder.open_gate();
        let error = store.await.unwrap().unwrap_err();
        assert!(matches!(error, MemoryError::ReadOnly { .. } | MemoryError::NotQuiesced { .. }), "{error:?}");
        assert_eq!(get(&source, parent, 0).await, 1);
        source.protect(parent, pages(0, 1), Access::Write).await.unwrap();
        let again = put(&source, parent, 0, 3).await;
        match answer {
            Answer::Held => assert!(matches!(branch(&again), StoreBranch::Reuse), "{again:?}"),
            _ => assert!(matches!(branch(&again), StoreBranch::Copied(_)), "{again:?}"),
        }
        assert_eq!(get(&source, child, 0).await, 1);
    }
}

#[tokio::test]
async fn pages_that_are_locked_in_memory_are_not_dropped_but_can_be_moved_and_unmapped() {
    let (source, recorder) = source(16);
    let space = mapped(&source, pages(0, 8));
    for page in 0..8 {
        put(&source, space, page, 1).await;
    }
    source.lock(space, pages(2, 4)).unwrap();
    recorder.forget_calls();
    let refused = source.dont_need(space, pages(0, 8)).await;
    assert!(matches!(refused, Err(MemoryError::Locked { address }) if address == 2 * PAGE));
    let within = source.dont_need(space, pages(3, 4)).await;
    assert!(matches!(within, Err(MemoryError::Locked { address }) if address == 3 * PAGE));
    assert_eq!((recorder.methods(), get(&source, space, 0).await), (vec![], 1), "nothing was dropped");
    assert_eq!(source.dont_need(space, pages(4, 8)).await.unwrap().frames, 4);
    assert_eq!(source.migrate(space, pages(2, 3)).await.unwrap().moved, 1);

    let child = source.fork(space, "child").await.unwrap();
    assert_eq!(source.dont_need(child, pages(0, 8)).await.unwrap().pages, 4, "a child does not inherit it");
    assert_eq!(source.unmap(space, pages(3, 4)).await.unwrap().pages, 1);
    assert!(matches!(source.lock(space, pages(2, 4)), Err(MemoryError::Unmapped { .. })));
    source.unlock(space, pages(2, 3)).unwrap();
    assert_eq!(source.dont_need(space, pages(0, 3)).await.unwrap().pages, 3);
    assert_eq!(source.address_space_stats(space).unwrap().mappings, 2, "what is alike is one again");
}

/// Bytes at the place of each writer, and of the device, on each page.
async fn bytes_of(source: &Source, space: AddressSpaceId) -> Vec<bytes::Bytes> {
    let mut all = Vec::new();
    for page in 0..4 {
        all.push(source.load(space, page * PAGE, 64).await.unwrap());
    }
    all
}

async fn write_when_allowed(source: Source, space: AddressSpaceId, writer: u64) {
    let mut returned = [0u64; 4];
    for stamp in 1..=600u64 {
        let page = stamp % 4;
        let at = page * PAGE + 8 * writer;
        match source.store(space, at, &stamp.to_le_bytes()).await {
            Ok(_) => returned[page as usize] = stamp,
            Err(error) => assert!(matches!(error, MemoryError::ReadOnly { .. }), "{error:?}"),
        }
        let read = source.load(space, at, 8).await.unwrap();
        assert_eq!(read[..], returned[page as usize].to_le_bytes(), "its own last store that returned well");
        tokio::task::yield_now().await;
    }
}

async fn write_as_device(recorder: Arc<Recorder>, space: AddressSpaceId) {
    for stamp in 1..=600u64 {
        let page = stamp % 4;
        recorder.grant(space, page * PAGE, Access::Write).await;
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
async fn while_it_is_read_only_nothing_changes_whoever_tries() {
    let (source, recorder) = source(64);
    recorder.yield_at_random(0x9107);
    let space = mapped(&source, pages(0, 4));
    let mut tasks = tokio::task::JoinSet::new();
    for writer in 0..2 {
        tasks.spawn(write_when_allowed(source.clone(), space, writer));
    }
    tasks.spawn(write_as_device(Arc::clone(&recorder), space));
    tasks.spawn({
        let source = source.clone();
        async move {
            for round in 0..150 {
                source.protect(space, pages(0, 4), Access::Read).await.unwrap();
                let before = bytes_of(&source, space).await;
                assert!(before.iter().all(|page| page[..] != [POISON; 64]));
                if round % 3 == 0 {
                    let child = source.fork(space, "child").await.unwrap();
                    source.exit(child).await.unwrap();
                } else {
                    drop(source.migrate(space, pages(0, 4)).await);
                }
                assert_eq!(bytes_of(&source, space).await, before, "somebody wrote to what is read-only");
                source.protect(space, pages(0, 4), Access::Write).await.unwrap();
                tokio::task::yield_now().await;
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
