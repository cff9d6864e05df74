//! A file that is mapped becomes shorter or longer.

use shootdown_core::{Access, Cause};
use shootdown_server::source::memory::{MemoryError, POISON};
use shootdown_server::source::{FaultError, Translate};

use crate::file::{filled, on_disk, opened, showing};
use crate::recorder::{Answer, Method, settle_down, source, until};
use crate::{PAGE, dma, get, pages, put};

#[tokio::test]
async fn no_frame_is_freed_while_a_device_reads_and_no_page_beyond_the_end_is_found() {
    let (source, recorder) = source(32);
    let disk = filled(12);
    let file = opened(&source, &disk, 12);
    let (first, second) = (showing(&source, &file, 12), showing(&source, &file, 12));
    for page in 0..10 {
        put(&source, first, page, 50).await;
    }
    assert_eq!(get(&source, second, 5).await, 50);
    let device = recorder.grant(second, 5 * PAGE, Access::Read).await.unwrap();
    recorder.answer([Answer::Held, Answer::Held]);
    let truncate = tokio::spawn({
        let (source, file) = (source.clone(), file.clone());
        async move { source.truncate(&file, 4 * PAGE).await.unwrap() }
    });
    until(|| !recorder.calls().is_empty()).await;
    settle_down().await;
    let begun = &recorder.calls()[0];
    assert_eq!((begun.method, begun.range), (Method::RangeStart(Cause::Clear), pages(4, 12)));
    assert_eq!((dma(source.frames(), device.frame), source.stats().frames_in_use), (50, 10));
    let load = source.load(first, 11 * PAGE, 1).await;
    assert!(matches!(load, Err(MemoryError::BeyondEnd { .. })), "from the moment it begins");
    assert_eq!((get(&source, first, 3).await, file.length()), (50, 4 * PAGE));

    recorder.open_gate();
    let released = truncate.await.unwrap();
    assert_eq!((released.pages, released.frames, released.rounds.len()), (7, 6, 2));
    let bracket = [Method::RangeStart(Cause::Clear), Method::RangeEnd];
    assert_eq!(recorder.methods(), [bracket, bracket].concat());
    assert!(
        recorder.calls().iter().all(|call| call.stats.frames_in_use == 10),
        "they go after the last round"
    );
    assert_eq!((dma(source.frames(), device.frame), file.cached_pages()), (POISON, 4));
    assert_eq!(disk.metadata().unwrap().len(), 4 * PAGE);
    for space in [first, second] {
        assert!(matches!(source.store(space, 4 * PAGE, b"x").await, Err(MemoryError::BeyondEnd { .. })));
        let fault = source.fault(space, pages(5, 6), Access::Read).await;
        assert!(matches!(fault, Err(FaultError::BeyondEnd { address }) if address == 5 * PAGE));
    }
    assert_eq!(source.write_back(&file).await.unwrap().written, 4);
    assert_eq!(disk.metadata().unwrap().len(), 4 * PAGE, "what was cut off does not come back");
}

#[tokio::test]
async fn the_tail_of_the_last_page_is_zeros_and_its_head_is_kept() {
    let (source, recorder) = source(32);
    let disk = filled(4);
    let file = opened(&source, &disk, 4);
    let space = showing(&source, &file, 4);
    put(&source, space, 1, 9).await;
    let device = recorder.grant(space, PAGE, Access::Write).await.unwrap();
    recorder.answer([Answer::Held]);
    let truncate = tokio::spawn({
        let (source, file) = (source.clone(), file.clone());
        async move { source.truncate(&file, PAGE + 4).await.unwrap() }
    });
    until(|| !recorder.calls().is_empty()).await;
    assert_eq!(recorder.calls()[0].range, pages(1, 4), "the device stops using the page with the tail too");
    source.frames().write(device.frame, 0, &[8; 16]).unwrap();
    recorder.open_gate();
    truncate.await.unwrap();
    assert_eq!(source.load(space, PAGE, 6).await.unwrap()[..], [8, 8, 8, 8, 0, 0]);
    // What is stored beyond the end is not in the file, though its page is mapped.
    source.store(space, PAGE + 4, &[7; 4]).await.unwrap();
    source.write_back(&file).await.unwrap();
    assert_eq!(disk.metadata().unwrap().len(), PAGE + 4);
    source.store(space, PAGE + 4, &[6; 4]).await.unwrap();
    source.truncate(&file, 3 * PAGE).await.unwrap();
    assert_eq!(source.load(space, PAGE, 8).await.unwrap()[..], [8, 8, 8, 8, 0, 0, 0, 0], "nor when it grows");
    assert_eq!((get(&source, space, 2).await, disk.metadata().unwrap().len()), (0, 3 * PAGE));
    put(&source, space, 2, 5).await;
    source.write_back(&file).await.unwrap();
    assert_eq!((on_disk(&disk, 2), on_disk(&disk, 1)), (5, 8));
    assert!(matches!(source.load(space, 3 * PAGE, 1).await, Err(MemoryError::BeyondEnd { .. })));
}

#[tokio::test]
async fn a_refused_round_leaves_the_file_as_long_as_it_was_with_its_content() {
    let (source, recorder) = source(32);
    let disk = filled(4);
    let file = opened(&source, &disk, 4);
    let spaces = [showing(&source, &file, 4), showing(&source, &file, 4)];
    for space in spaces {
        put(&source, space, 2, 9).await;
    }
    for answer in [Answer::Refused, Answer::NotQuiesced] {
        recorder.answer([Answer::Quiesced, answer]);
        assert!(source.truncate(&file, PAGE).await.is_err());
        assert_eq!((file.length(), file.dirty_pages(), recorder.open_brackets()), (4 * PAGE, 1, 0));
        for space in spaces {
            assert_eq!((get(&source, space, 2).await, get(&source, space, 3).await), (9, 4));
        }
    }
    source.truncate(&file, 0).await.unwrap();
    assert_eq!((file.cached_pages(), disk.metadata().unwrap().len()), (0, 0));
    assert_eq!(source.stats().frames_in_use, 0);
}

#[tokio::test]
async fn a_write_back_that_is_at_work_on_a_page_is_waited_for() {
    let (source, recorder) = source(32);
    let disk = filled(4);
    let file = opened(&source, &disk, 4);
    let space = showing(&source, &file, 4);
    put(&source, space, 3, 9).await;
    recorder.answer([Answer::Held]);
    let write_back = tokio::spawn({
        let (source, file) = (source.clone(), file.clone());
        async move { source.write_back(&file).await.unwrap() }
    });
    until(|| !recorder.calls().is_empty()).await;
    let truncate = tokio::spawn({
        let (source, file) = (source.clone(), file.clone());
        async move { source.truncate(&file, PAGE).await.unwrap() }
    });
    settle_down().await;
    assert!(!truncate.is_finished());
    recorder.open_gate();
    write_back.await.unwrap();
    truncate.await.unwrap();
    assert_eq!((disk.metadata().unwrap().len(), source.stats().frames_in_use), (PAGE, 0));
}

#[tokio::test]
async fn a_caller_that_goes_does_not_stop_a_truncate_or_a_write_back() {
    let (source, recorder) = source(32);
    let disk = filled(4);
    let file = opened(&source, &disk, 4);
    let space = showing(&source, &file, 4);
    put(&source, space, 0, 9).await;
    put(&source, space, 3, 9).await;
    recorder.answer([Answer::Held, Answer::Held, Answer::Held]);
    let caller = tokio::spawn({
        let (source, file) = (source.clone(), file.clone());
        async move { tokio::join!(source.write_back(&file), source.truncate(&file, PAGE)) }
    });
    until(|| !recorder.calls().is_empty()).await;
    caller.abort();
    assert!(caller.await.unwrap_err().is_cancelled());
    settle_down().await;
    assert_eq!((source.stats().frames_in_use, on_disk(&disk, 0)), (2, 1));
    recorder.open_gate();
    source.drain().await;
    assert_eq!((source.stats().frames_in_use, on_disk(&disk, 0)), (1, 9));
    assert_eq!((disk.metadata().unwrap().len(), recorder.open_brackets()), (PAGE, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn faults_write_backs_forks_and_exits_beside_truncates_leave_nothing_behind() {
    const PAGES: u64 = 6;
    let (source, recorder) = source(64);
    recorder.yield_at_random(0xc07);
    let disk = filled(PAGES as u8);
    let file = opened(&source, &disk, PAGES);
    let space = showing(&source, &file, PAGES);
    let mut tasks = tokio::task::JoinSet::new();
    for writer in 0..2u64 {
        let source = source.clone();
        tasks.spawn(async move {
            for round in 0..300u64 {
                let page = (round + writer) % PAGES;
                match source.store(space, page * PAGE + 8 + 8 * writer, &round.to_le_bytes()).await {
                    Ok(_) => {}
                    Err(error) => assert!(matches!(error, MemoryError::BeyondEnd { .. }), "{error:?}"),
                }
                drop(source.load(space, page * PAGE, 8).await);
            }
        });
    }
    tasks.spawn({
        let recorder = std::sync::Arc::clone(&recorder);
        async move {
            for round in 0..300 {
                recorder.grant(space, round % PAGES * PAGE, Access::Read).await;
                recorder.with_grants(|grants| {
                    for grant in grants.values() {
                        assert_ne!(
                            dma(recorder.frames(), grant.frame),
                            POISON,
                            "a frame was freed too early"
                        );
                    }
                });
            }
        }
    });
    tasks.spawn({
        let (source, file) = (source.clone(), file.clone());
        async move {
            for round in 0..60 {
                source.truncate(&file, (round % 5) * PAGE + (round % 3) * 100).await.unwrap();
                source.truncate(&file, PAGES * PAGE).await.unwrap();
            }
        }
    });
    tasks.spawn({
        let (source, file) = (source.clone(), file.clone());
        async move {
            for _ in 0..100 {
                source.write_back(&file).await.unwrap();
                source.unmap_cluster(space, 0).await.unwrap();
            }
        }
    });
    tasks.spawn({
        let source = source.clone();
        async move {
            for _ in 0..60 {
                let child = source.fork(space, "child").await.unwrap();
                drop(source.load(child, 2 * PAGE, 8).await);
                drop(source.store(child, 3 * PAGE, &[1]).await);
                source.migrate(child, pages(0, PAGES)).await.unwrap();
                source.unmap(child, pages(2, 3)).await.unwrap();
                source.exit(child).await.unwrap();
            }
        }
    });
    let all = async {
        while let Some(done) = tasks.join_next().await {
            done.unwrap();
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(120), all).await.expect("it ends");
    source.exit(space).await.unwrap();
    drop(file);
    assert_eq!(source.stats(), Default::default());
    assert_eq!((recorder.open_brackets(), recorder.frames().broken_poison()), (0, 0));
}
