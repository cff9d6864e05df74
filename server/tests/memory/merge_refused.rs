//! KSM, where devices could not be told: what comes back, and what is kept.

use shootdown_core::{Access, Cause};
use shootdown_server::source::Translate;
use shootdown_server::source::memory::{MemoryError, StoreBranch};

use crate::merge::{end, life, read_only, start, twins};
use crate::recorder::{Answer, Method, until};
use crate::{PAGE, branch, dma, get, pages, put};

#[tokio::test]
async fn a_notifier_that_refuses_leaves_both_pages_as_they_were() {
    let rounds = [Answer::Quiesced, Answer::Quiesced, Answer::Quiesced];
    for refused in 0..3 {
        let (source, recorder, kept, gone) = twins().await;
        let before = (life(&source, kept), life(&source, gone));
        recorder.answer(rounds[..refused].iter().copied().chain([Answer::Refused]));
        assert!(matches!(source.merge(100).await, Err(MemoryError::Notify(_))));
        assert_eq!((life(&source, kept), life(&source, gone)), before);
        let stats = source.stats();
        assert_eq!((stats.frames_in_use, stats.quarantined, stats.operations), (2, 0, 0));
        for space in [kept, gone] {
            let outcome = put(&source, space, 3, 8).await;
            // Whoever was not told may write, and so may the entry.
            let in_place = matches!(branch(&outcome), StoreBranch::InPlace);
            assert_eq!(in_place, refused < 2, "{outcome:?}");
        }
        // The pass ended at the page; the next one comes to the end, and the one after it begins again.
        assert_eq!(source.merge(100).await.unwrap().looked_at, 0);
        assert_eq!(source.merge(100).await.unwrap().merged, 1, "it can be tried again");
        end(&source, &recorder, [kept, gone]).await;
    }
}

#[tokio::test]
async fn a_write_protection_that_was_refused_is_asked_for_again_by_the_next_pass() {
    let (source, recorder, kept, gone) = twins().await;
    let device = recorder.grant(gone, 3 * PAGE, Access::Write).await.unwrap();
    recorder.answer([Answer::NotQuiesced]);
    assert!(matches!(source.merge(100).await, Err(MemoryError::NotQuiesced { .. })));
    recorder.forget_calls();
    recorder.meanwhile(move |recorder, method, space, _| {
        if method == Method::Page(Cause::Clear) && space == gone {
            recorder.frames().write(device.frame, 0, b"!").unwrap();
        }
    });
    assert_eq!(source.merge(100).await.unwrap().looked_at, 0);
    assert_eq!(source.merge(100).await.unwrap().merged, 0, "the device wrote to it");
    assert_eq!(recorder.methods(), [Method::Page(Cause::Clear); 2]);
    end(&source, &recorder, [kept, gone]).await;
}

#[tokio::test]
async fn a_replacement_that_is_not_quiesced_keeps_both_frames_and_the_next_store_tells_whoever_reads_either()
{
    let (source, recorder, kept, gone) = twins().await;
    read_only(&source, &recorder, [kept, gone]).await;
    let device = recorder.grant(gone, 3 * PAGE, Access::Read).await.unwrap();
    let before = life(&source, gone);
    recorder.answer([Answer::NotQuiesced]);
    assert!(matches!(source.merge(100).await, Err(MemoryError::NotQuiesced { .. })));
    assert_eq!((life(&source, gone), source.stats().quarantined), (before, 2), "it came back");
    // The other's last place goes, and this one is the only entry: neither is freed, nor written in place.
    let kept_frame = source.fault(kept, pages(3, 4), Access::Read).await.unwrap()[0].frame;
    source.unmap(kept, pages(0, 8)).await.unwrap();
    assert_eq!((dma(source.frames(), kept_frame), dma(source.frames(), device.frame)), (7, 7));
    recorder.forget_calls();
    assert!(matches!(branch(&put(&source, gone, 3, 8).await), StoreBranch::Copied(_)));
    assert_eq!(recorder.methods(), [Method::Page(Cause::Clear)], "its devices were told");
    assert_eq!(source.merge(100).await.unwrap().merged, 0);
    end(&source, &recorder, [kept, gone]).await;
}

#[tokio::test]
async fn a_replacement_that_is_not_quiesced_keeps_the_old_page_in_quarantine_when_its_place_is_unmapped() {
    let (source, recorder, kept, gone) = twins().await;
    read_only(&source, &recorder, [kept, gone]).await;
    let device = recorder.grant(gone, 3 * PAGE, Access::Read).await.unwrap();
    recorder.answer([Answer::HeldNotQuiesced]);
    let merge = start(&source);
    until(|| recorder.calls().len() == 1).await;
    let unmapping = tokio::spawn({
        let source = source.clone();
        async move { source.unmap(gone, pages(0, 8)).await.unwrap() }
    });
    recorder.open_gate();
    assert!(matches!(merge.await.unwrap(), Err(MemoryError::NotQuiesced { .. })));
    unmapping.await.unwrap();
    assert_eq!((source.stats().quarantined, dma(source.frames(), device.frame)), (2, 7));
    end(&source, &recorder, [kept, gone]).await;
}

#[tokio::test]
async fn a_fork_while_devices_switch_shares_whichever_page_is_there_and_loses_none() {
    for answer in [Answer::Held, Answer::HeldNotQuiesced] {
        let (source, recorder, kept, gone) = twins().await;
        read_only(&source, &recorder, [kept, gone]).await;
        recorder.answer([answer]);
        let merge = start(&source);
        until(|| recorder.calls().len() == 1).await;
        let forking = tokio::spawn({
            let source = source.clone();
            async move { source.fork(gone, "child").await.unwrap() }
        });
        recorder.open_gate();
        assert_eq!(merge.await.unwrap().is_ok(), answer == Answer::Held);
        let child = forking.await.unwrap();
        put(&source, kept, 3, 9).await;
        assert_eq!((get(&source, gone, 3).await, get(&source, child, 3).await), (7, 7));
        // The child's page is found by its owner, whichever it is.
        assert_eq!(
            source.migrate(child, pages(0, 8)).await.unwrap().moved,
            usize::from(answer == Answer::Held)
        );
        put(&source, child, 3, 5).await;
        assert_eq!((get(&source, gone, 3).await, get(&source, child, 3).await), (7, 5));
        end(&source, &recorder, [kept, gone, child]).await;
    }
}

#[tokio::test]
async fn a_write_protection_that_was_refused_does_not_make_a_page_writable_that_a_fork_shared_meanwhile() {
    let (source, recorder, kept, gone) = twins().await;
    recorder.answer([Answer::HeldNotQuiesced, Answer::HeldNotQuiesced]);
    let merge = start(&source);
    until(|| recorder.calls().len() == 2).await;
    let child = source.fork(gone, "child").await.unwrap();
    recorder.open_gate();
    assert!(matches!(merge.await.unwrap(), Err(MemoryError::NotQuiesced { .. })));
    assert!(matches!(branch(&put(&source, gone, 3, 8).await), StoreBranch::Copied(_)));
    assert_eq!((get(&source, gone, 3).await, get(&source, child, 3).await), (8, 7));
    assert!(matches!(branch(&put(&source, kept, 3, 9).await), StoreBranch::InPlace));
    end(&source, &recorder, [kept, gone, child]).await;
}

#[tokio::test]
async fn a_write_protection_that_was_refused_is_undone_in_a_mapping_that_is_leaving_and_stays_after_all() {
    let (source, recorder, kept, gone) = twins().await;
    let device = recorder.grant(gone, 3 * PAGE, Access::Write).await.unwrap();
    let refused = [Answer::HeldNotQuiesced, Answer::HeldNotQuiesced, Answer::HeldLongerNotQuiesced];
    recorder.answer(refused);
    let merge = start(&source);
    until(|| recorder.calls().len() == 2).await;
    let unmapping = tokio::spawn({
        let source = source.clone();
        async move { source.unmap(gone, pages(0, 8)).await }
    });
    until(|| recorder.calls().len() == 3).await;
    recorder.open_gate();
    assert!(matches!(merge.await.unwrap(), Err(MemoryError::NotQuiesced { .. })));
    recorder.open_last_gate();
    assert!(matches!(unmapping.await.unwrap(), Err(MemoryError::NotQuiesced { .. })));
    // The device may write still, so the entry must say so, or whoever wants it read-only tells nobody.
    recorder.forget_calls();
    recorder.meanwhile(move |recorder, method, space, _| {
        if method == Method::Page(Cause::Clear) && space == gone {
            recorder.frames().write(device.frame, 0, b"!").unwrap();
        }
    });
    assert_eq!(source.merge(100).await.unwrap().looked_at, 0, "the pass before ended here");
    assert_eq!(source.merge(100).await.unwrap().merged, 0, "the device wrote to it");
    assert_eq!(recorder.methods(), [Method::Page(Cause::Clear); 2], "both were asked to stop");
    assert!(matches!(branch(&put(&source, gone, 3, 8).await), StoreBranch::Reuse), "it is read-only by now");
    end(&source, &recorder, [kept, gone]).await;
}
