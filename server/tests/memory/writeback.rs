//! Write-back: page_mkclean_one.

use std::fs::File;

use shootdown_core::{Access, Cause};
use shootdown_server::source::memory::MemoryError;

use crate::file::{filled, on_disk, opened, showing};
use crate::recorder::{Answer, Method, settle_down, source, until};
use crate::{PAGE, dma, get, pages, put};

#[tokio::test]
async fn the_bytes_are_read_after_the_acks_and_devices_lose_their_leave_to_write() {
    let (source, recorder) = source(16);
    let disk = filled(2);
    let file = opened(&source, &disk, 2);
    let (first, second) = (showing(&source, &file, 2), showing(&source, &file, 2));
    put(&source, first, 0, 50).await;
    assert_eq!(get(&source, second, 0).await, 50);
    let device = recorder.grant(first, 0, Access::Write).await.unwrap();
    let generation = source.generation(first, 0);
    recorder.answer([Answer::Held]);
    let write_back = tokio::spawn({
        let (source, file) = (source.clone(), file.clone());
        async move { source.write_back(&file).await.unwrap() }
    });
    until(|| !recorder.calls().is_empty()).await;
    settle_down().await;
    let [told] = &recorder.calls()[..] else { panic!("the other mapping is clean: nobody is told of it") };
    assert_eq!(
        (told.method, told.space, told.range),
        (Method::Page(Cause::ProtectionPage), first, pages(0, 1))
    );
    assert_eq!((told.generation, file.dirty_pages()), (generation, 0), "the page stays mapped, and is clean");
    assert_eq!(on_disk(&disk, 0), 1, "nothing is written before the acks");
    // What the device had written and hands over with its ack.
    source.frames().write(device.frame, 0, &[60]).unwrap();

    recorder.open_gate();
    let done = write_back.await.unwrap();
    assert_eq!((done.written, done.clean, done.skipped), (1, 0, 0));
    assert_eq!((on_disk(&disk, 0), dma(source.frames(), device.frame)), (60, 60));
    recorder.with_grants(|grants| assert!(grants.is_empty()));
    assert_eq!((source.generation(first, 0), source.generation(second, 0)), (generation, generation));
    recorder.forget_calls();
    let again = recorder.grant(first, 0, Access::Write).await.unwrap();
    assert_eq!((again.frame, file.dirty_pages()), (device.frame, 1), "the next leave makes it dirty again");
}

#[tokio::test]
async fn nobody_is_told_of_a_page_that_is_clean() {
    let (source, recorder) = source(16);
    let disk = filled(4);
    let file = opened(&source, &disk, 4);
    let space = showing(&source, &file, 4);
    for page in 0..3 {
        get(&source, space, page).await;
    }
    recorder.grant(space, 0, Access::Read).await.unwrap();
    let clean = source.write_back(&file).await.unwrap();
    assert_eq!((clean.written, clean.clean, recorder.methods()), (0, 3, vec![]));
    put(&source, space, 1, 9).await;
    let one = source.write_back(&file).await.unwrap();
    assert_eq!((one.written, one.clean), (1, 2));
    assert_eq!(recorder.methods(), [Method::Page(Cause::ProtectionPage)]);
    let again = source.write_back(&file).await.unwrap();
    assert_eq!((again.written, again.clean, recorder.methods().len()), (0, 3, 1));
}

#[tokio::test]
async fn a_store_during_the_round_is_not_kept_waiting_and_makes_the_page_dirty_again() {
    let (source, recorder) = source(16);
    let disk = filled(1);
    let file = opened(&source, &disk, 1);
    let space = showing(&source, &file, 1);
    put(&source, space, 0, 50).await;
    recorder.answer([Answer::Held]);
    let write_back = tokio::spawn({
        let (source, file) = (source.clone(), file.clone());
        async move { source.write_back(&file).await.unwrap() }
    });
    until(|| !recorder.calls().is_empty()).await;
    put(&source, space, 0, 51).await;
    assert_eq!((file.dirty_pages(), get(&source, space, 0).await), (1, 51));
    recorder.open_gate();
    assert_eq!(write_back.await.unwrap().written, 1);
    assert_eq!(file.dirty_pages(), 1, "the store came after the page had been made clean");
    put(&source, space, 0, 52).await;
    assert_eq!(source.write_back(&file).await.unwrap().written, 1);
    assert_eq!(on_disk(&disk, 0), 52);
}

#[tokio::test]
async fn a_write_back_that_finds_another_at_its_page_returns_when_the_page_is_in_the_file() {
    let (source, recorder) = source(16);
    let disk = filled(1);
    let file = opened(&source, &disk, 1);
    let space = showing(&source, &file, 1);
    put(&source, space, 0, 50).await;
    recorder.answer([Answer::Held]);
    let write_back = || {
        let (source, file) = (source.clone(), file.clone());
        tokio::spawn(async move { source.write_back(&file).await.unwrap() })
    };
    let first = write_back();
    until(|| !recorder.calls().is_empty()).await;
    let second = write_back();
    settle_down().await;
    assert!(!second.is_finished(), "the page counts as clean, and is not in the file");
    recorder.open_gate();
    assert_eq!(first.await.unwrap().written, 1);
    assert_eq!(second.await.unwrap().clean, 1);
    assert_eq!(on_disk(&disk, 0), 50);
}

#[tokio::test]
async fn after_a_refused_round_the_page_is_dirty_and_the_next_one_tells_its_devices() {
    let (source, recorder) = source(16);
    let disk = filled(1);
    let file = opened(&source, &disk, 1);
    let space = showing(&source, &file, 1);
    let device = recorder.grant(space, 0, Access::Write).await.unwrap();
    source.frames().write(device.frame, 0, &[50]).unwrap();
    for answer in [Answer::Refused, Answer::NotQuiesced] {
        recorder.forget_calls();
        recorder.answer([answer]);
        let error = source.write_back(&file).await.unwrap_err();
        assert!(matches!(error, MemoryError::Notify(_) | MemoryError::NotQuiesced { .. }));
        assert_eq!((file.dirty_pages(), on_disk(&disk, 0), recorder.methods().len()), (1, 1, 1));
        recorder.with_grants(|grants| assert_eq!(grants.len(), 1, "it may still write"));
    }
    source.frames().write(device.frame, 0, &[51]).unwrap();
    recorder.forget_calls();
    source.write_back(&file).await.unwrap();
    assert_eq!(recorder.methods(), [Method::Page(Cause::ProtectionPage)]);
    recorder.with_grants(|grants| assert!(grants.is_empty()));
    assert_eq!((on_disk(&disk, 0), file.dirty_pages()), (51, 0));
}

#[tokio::test]
async fn a_disk_that_is_full_keeps_the_page_dirty_and_its_content() {
    let (source, recorder) = source(16);
    let full = File::options().read(true).write(true).open("/dev/full").unwrap();
    let file = source.open_file(full, 2 * PAGE).unwrap();
    let space = showing(&source, &file, 2);
    for page in 0..2 {
        put(&source, space, page, 70).await;
    }
    for tried in 1..=2 {
        let error = source.write_back(&file).await.unwrap_err();
        assert!(matches!(error, MemoryError::File(_)), "{error:?}");
        assert_eq!((file.dirty_pages(), recorder.methods().len()), (2, 2 * tried), "every page is tried");
    }
    assert_eq!((get(&source, space, 0).await, get(&source, space, 1).await), (70, 70));
    source.exit(space).await.unwrap();
    drop(file);
    assert_eq!(source.stats(), Default::default());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_store_beside_a_write_back_and_a_move_is_never_lost() {
    const PAGES: u64 = 2;
    let (source, recorder) = source(16);
    recorder.yield_at_random(0xf11e);
    let disk = filled(PAGES as u8);
    let file = opened(&source, &disk, PAGES);
    let spaces = [showing(&source, &file, PAGES), showing(&source, &file, PAGES)];
    let mut tasks = tokio::task::JoinSet::new();
    for (writer, space) in spaces.into_iter().enumerate() {
        let source = source.clone();
        tasks.spawn(async move {
            let mut first = 0;
            for stamp in 1..=400u64 {
                let at = (first + stamp % PAGES) * PAGE + 8 * writer as u64;
                source.store(space, at, &stamp.to_le_bytes()).await.unwrap();
                if stamp % 50 == 0 {
                    source.dont_need(space, pages(first, first + PAGES)).await.unwrap();
                }
                if writer == 1 && stamp % 3 == 0 {
                    // Between two places, beside write-backs that must meet its entries at one of them.
                    let elsewhere = 1024 - first;
                    source.remap(space, pages(first, first + PAGES), elsewhere * PAGE).await.unwrap();
                    first = elsewhere;
                }
            }
        });
    }
    for _ in 0..2 {
        let (source, file) = (source.clone(), file.clone());
        tasks.spawn(async move {
            for _ in 0..100 {
                source.write_back(&file).await.unwrap();
                tokio::task::yield_now().await;
            }
        });
    }
    tasks.spawn({
        let source = source.clone();
        async move {
            for _ in 0..50 {
                source.migrate(spaces[0], pages(0, PAGES)).await.unwrap();
                tokio::task::yield_now().await;
            }
        }
    });
    let all = async {
        while let Some(done) = tasks.join_next().await {
            done.unwrap();
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(120), all).await.expect("it ends");
    let last = source.write_back(&file).await.unwrap();
    assert_eq!((last.skipped, file.dirty_pages()), (0, 0));
    for writer in 0..2 {
        for (page, stamp) in [(0, 400u64), (1, 399)] {
            let mut read = [0; 8];
            std::os::unix::fs::FileExt::read_exact_at(&disk, &mut read, page * PAGE + 8 * writer).unwrap();
            assert_eq!(u64::from_le_bytes(read), stamp, "writer {writer}, page {page}");
        }
    }
    for space in spaces {
        source.exit(space).await.unwrap();
    }
    drop(file);
    assert_eq!(source.stats(), Default::default());
    assert_eq!(recorder.frames().broken_poison(), 0);
}

#[tokio::test]
async fn a_page_whose_entry_is_being_moved_is_met_where_it_arrives() {
    let (source, recorder) = source(16);
    let disk = filled(2);
    let file = opened(&source, &disk, 2);
    let space = showing(&source, &file, 2);
    put(&source, space, 0, 50).await;
    get(&source, space, 1).await;
    // The second page is on its way to another frame, and the move of the mapping waits for it.
    recorder.answer([Answer::Held]);
    let migrating = tokio::spawn({
        let source = source.clone();
        async move { source.migrate(space, pages(1, 2)).await.unwrap() }
    });
    until(|| recorder.calls().len() == 1).await;
    let remapping = tokio::spawn({
        let source = source.clone();
        async move { source.remap(space, pages(0, 2), 1024 * PAGE).await.unwrap() }
    });
    until(|| recorder.calls().len() == 3).await;
    settle_down().await;
    recorder.forget_calls();
    let write_back = tokio::spawn({
        let (source, file) = (source.clone(), file.clone());
        async move { source.write_back(&file).await.unwrap() }
    });
    settle_down().await;
    assert!(!write_back.is_finished());
    recorder.open_gate();
    migrating.await.unwrap();
    remapping.await.unwrap();
    assert_eq!(write_back.await.unwrap().written, 1);
    let told = recorder.calls();
    let told: Vec<_> =
        told.iter().filter(|call| call.method == Method::Page(Cause::ProtectionPage)).collect();
    assert_eq!(told.len(), 1);
    assert_eq!(told[0].range, pages(1024, 1025), "its devices have no leave to write any more");
}
