//! exit_mmap.

use shootdown_core::{Access, Cause};
use shootdown_server::source::memory::MemoryError;
use shootdown_server::source::{FaultError, Translate};

use crate::recorder::{Answer, Method, settle_down, source, until};
use crate::{PAGE, dma, get, mapped, pages, put};

#[tokio::test]
async fn exit_releases_first_and_exactly_once_and_the_figures_return_to_zero() {
    let (source, recorder) = source(64);
    let space = mapped(&source, pages(0, 600));
    source.map(space, pages(700, 800), Access::Read).unwrap();
    for page in [0, 1, 2, 511, 512, 599] {
        put(&source, space, page, 1).await;
    }
    assert_eq!(get(&source, space, 700).await, 0);
    let device = recorder.grant(space, 0, Access::Read).await.unwrap();
    recorder.answer([Answer::Held]);
    let exit = tokio::spawn({
        let source = source.clone();
        async move { source.exit(space).await.unwrap() }
    });
    until(|| !recorder.calls().is_empty()).await;
    settle_down().await;
    assert_eq!(
        (source.stats().mapped_pages, dma(source.frames(), device.frame)),
        (7, 1),
        "no page before release"
    );
    assert!(matches!(source.exit(space).await, Err(MemoryError::Exiting(_))));
    assert!(matches!(source.load(space, 0, 1).await, Err(MemoryError::Exiting(_))));
    assert!(matches!(source.map(space, pages(900, 901), Access::Read), Err(MemoryError::Exiting(_))));
    assert!(matches!(source.unmap(space, pages(0, 1)).await, Err(MemoryError::Exiting(_))));
    let fault = source.fault(space, pages(0, 1), Access::Read).await;
    assert!(matches!(fault, Err(FaultError::Unmapped { .. })));

    recorder.open_gate();
    let released = exit.await.unwrap();
    assert_eq!((released.pages, released.frames, released.blocks, released.rounds.len()), (7, 7, 2, 1));
    assert_eq!(recorder.methods(), [Method::Release], "no event follows a release");
    assert_eq!(source.stats(), Default::default());
    assert!(matches!(source.exit(space).await, Err(MemoryError::AddressSpaceUnknown(_))));
    assert_eq!(recorder.methods().len(), 1);
}

#[tokio::test]
async fn exit_waits_for_the_operations_in_progress() {
    let (source, recorder) = source(64);
    let space = mapped(&source, pages(0, 4));
    put(&source, space, 0, 1).await;
    recorder.answer([Answer::Held]);
    let unmap = tokio::spawn({
        let source = source.clone();
        async move { source.unmap(space, pages(0, 1)).await.unwrap() }
    });
    until(|| !recorder.calls().is_empty()).await;
    let exit = tokio::spawn({
        let source = source.clone();
        async move { source.exit(space).await.unwrap() }
    });
    settle_down().await;
    assert_eq!(recorder.methods(), [Method::RangeStart(Cause::Unmap)]);
    recorder.open_gate();
    assert_eq!((unmap.await.unwrap().frames, exit.await.unwrap().frames), (1, 0));
    assert_eq!(recorder.methods(), [Method::RangeStart(Cause::Unmap), Method::RangeEnd, Method::Release]);
}

#[tokio::test]
async fn a_release_that_is_refused_changes_nothing_and_can_be_tried_again() {
    let (source, recorder) = source(64);
    let space = mapped(&source, pages(0, 4));
    put(&source, space, 0, 5).await;
    recorder.answer([Answer::Refused]);
    assert!(matches!(source.exit(space).await, Err(MemoryError::Notify(_))));
    assert_eq!(get(&source, space, 0).await, 5);
    source.exit(space).await.unwrap();
    assert_eq!(source.stats(), Default::default());
}

#[tokio::test]
async fn a_release_that_is_not_quiesced_keeps_every_page_and_is_not_called_again() {
    let (source, recorder) = source(64);
    let space = mapped(&source, pages(0, 4));
    put(&source, space, 0, 5).await;
    let device = recorder.grant(space, 0, Access::Read).await.unwrap();
    recorder.answer([Answer::NotQuiesced]);
    assert!(matches!(source.exit(space).await, Err(MemoryError::NotQuiesced { .. })));
    assert!(matches!(source.exit(space).await, Err(MemoryError::Exiting(_))));
    assert_eq!(recorder.methods(), [Method::Release]);
    assert_eq!((dma(source.frames(), device.frame), source.stats().frames_in_use), (5, 1));
    assert!(source.load(space, PAGE, 1).await.is_err());
}
