//! fork: sharing, write protection, and what a failure leaves.

use shootdown_core::{Access, Cause};
use shootdown_server::source::Translate;
use shootdown_server::source::memory::{MemoryError, StoreBranch};

use crate::recorder::{Answer, Method, settle_down, source, until};
use crate::{branch, get, mapped, pages, put};

#[tokio::test]
async fn fork_shares_the_frames_and_write_protects_the_parent_inside_a_bracket() {
    let (source, recorder) = source(16);
    let parent = mapped(&source, pages(0, 1024));
    for page in [0, 511, 512, 1023] {
        put(&source, parent, page, 1).await;
    }
    let device = recorder.grant(parent, 0, Access::Write).await.unwrap();
    recorder.answer([Answer::Held]);
    let fork = tokio::spawn({
        let source = source.clone();
        async move { source.fork(parent, "child").await.unwrap() }
    });
    until(|| !recorder.calls().is_empty()).await;
    settle_down().await;
    assert!(
        matches!(branch(&put(&source, parent, 0, 2).await), StoreBranch::InPlace),
        "nothing is protected yet"
    );
    recorder.open_gate();
    let child = fork.await.unwrap();

    assert_eq!(recorder.methods(), [Method::RangeStart(Cause::ProtectionPage), Method::RangeEnd]);
    assert_eq!(recorder.calls()[0].range, pages(0, 1024));
    recorder.with_grants(|grants| assert!(grants.is_empty(), "the device lost its leave to write"));
    for page in [0, 511, 512, 1023] {
        let frame_of = |space| source.generation(space, page * crate::PAGE).unwrap();
        assert_eq!(frame_of(parent), frame_of(child));
    }
    let stats = source.address_space_stats(child).unwrap();
    assert_eq!((stats.mapped_pages, stats.page_tables, stats.mappings), (4, 2, 1));
    assert_eq!(source.stats().frames_in_use, 4);
    assert_eq!(get(&source, child, 0).await, 2);
    assert!(matches!(branch(&put(&source, parent, 0, 3).await), StoreBranch::Copied(_)));
    assert_ne!(source.generation(parent, 0), Some(source.frames().generation(device.frame)));
    assert_eq!(get(&source, child, 0).await, 2);
}

#[tokio::test]
async fn fork_tells_nobody_of_mappings_without_pages_or_that_nobody_may_write() {
    let (source, recorder) = source(16);
    let parent = source.create("parent").unwrap();
    source.map(parent, pages(0, 4), Access::Write).unwrap();
    source.map(parent, pages(8, 12), Access::Read).unwrap();
    assert_eq!(get(&source, parent, 8).await, 0);
    let child = source.fork(parent, "child").await.unwrap();
    assert_eq!(recorder.methods(), []);
    assert_eq!(source.generation(parent, 8 * crate::PAGE), source.generation(child, 8 * crate::PAGE));
    assert!(matches!(source.store(child, 8 * crate::PAGE, b"x").await, Err(MemoryError::ReadOnly { .. })));
    assert!(matches!(branch(&put(&source, child, 0, 1).await), StoreBranch::ZeroFill));
}

#[tokio::test]
async fn a_fork_that_fails_leaves_no_child_and_no_reference() {
    let (source, recorder) = source(16);
    let parent = mapped(&source, pages(0, 2));
    source.map(parent, pages(4, 6), Access::Read).unwrap();
    source.map(parent, pages(8, 10), Access::Write).unwrap();
    for page in [0, 8] {
        put(&source, parent, page, 1).await;
    }
    for second in [Answer::Refused, Answer::NotQuiesced] {
        recorder.answer([Answer::Quiesced, second]);
        assert!(source.fork(parent, "child").await.is_err());
    }
    recorder.refuse_spaces();
    assert!(matches!(source.fork(parent, "child").await, Err(MemoryError::Notify(_))));
    let stats = source.stats();
    assert_eq!((stats.address_spaces, stats.frames_in_use, stats.operations), (1, 2, 0));
    assert_eq!((stats.mapped_pages, recorder.open_brackets()), (2, 0));
    recorder.forget_calls();
    for page in [0, 8] {
        assert!(
            matches!(branch(&put(&source, parent, page, 2).await), StoreBranch::Reuse),
            "nobody shares it"
        );
    }
    assert_eq!(recorder.methods(), []);
}

#[tokio::test]
async fn a_page_that_is_settling_while_it_is_forked_is_shared_and_not_written_in_place() {
    let (source, recorder) = source(16);
    let parent = mapped(&source, pages(0, 1));
    put(&source, parent, 0, 1).await;
    let first = source.fork(parent, "first").await.unwrap();
    recorder.forget_calls();
    recorder.answer([Answer::Held]);
    let store = tokio::spawn({
        let source = source.clone();
        async move { put(&source, parent, 0, 2).await }
    });
    until(|| !recorder.calls().is_empty()).await;
    let second = source.fork(parent, "second").await.unwrap();
    recorder.open_gate();
    store.await.unwrap();
    let seen = [get(&source, parent, 0).await, get(&source, first, 0).await, get(&source, second, 0).await];
    assert_eq!(seen, [2, 1, 1]);
    for space in [parent, first, second] {
        source.exit(space).await.unwrap();
    }
    assert_eq!(source.stats(), Default::default());
}

#[tokio::test]
async fn a_read_fault_on_a_shared_page_never_allows_a_write() {
    let (source, _recorder) = source(16);
    let parent = mapped(&source, pages(0, 2));
    put(&source, parent, 0, 1).await;
    let child = source.fork(parent, "child").await.unwrap();
    let read = source.fault(child, pages(0, 2), Access::Read).await.unwrap();
    assert!(read.iter().all(|translation| translation.access == Access::Read));
    assert_eq!(source.generation(parent, 0), source.generation(child, 0), "and copies nothing");
    let write = source.fault(child, pages(0, 1), Access::Write).await.unwrap();
    assert_eq!(write[0].access, Access::Write);
    assert_ne!(write[0].frame, read[0].frame);
}
