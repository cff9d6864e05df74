//! Callers that give up: a dropped future never opens the gate, and leaks nothing.

use std::future::Future;
use std::pin::Pin;
use std::task::Poll;

use shootdown_core::{Access, AddressSpaceId};
use shootdown_server::source::memory::POISON;

use crate::recorder::{Answer, Source, settle_down, source};
use crate::{PAGE, dma, get, mapped, pages, put};

type Op = fn(Source, AddressSpaceId) -> Pin<Box<dyn Future<Output = ()> + Send>>;

const OPS: [(&str, Op); 8] = [
    ("store", |source, space| Box::pin(async move { drop(source.store(space, 0, &[2; 8]).await) })),
    ("fork", |source, space| Box::pin(async move { drop(source.fork(space, "child").await) })),
    ("unmap", |source, space| Box::pin(async move { drop(source.unmap(space, pages(0, 8)).await) })),
    ("dont_need", |source, space| Box::pin(async move { drop(source.dont_need(space, pages(0, 8)).await) })),
    ("protect", |source, space| {
        Box::pin(async move { drop(source.protect(space, pages(0, 8), Access::Read).await) })
    }),
    ("remap", |source, space| {
        Box::pin(async move { drop(source.remap(space, pages(0, 8), 600 * PAGE).await) })
    }),
    ("snapshot", |source, space| Box::pin(async move { drop(source.snapshot(space).await) })),
    ("exit", |source, space| Box::pin(async move { drop(source.exit(space).await) })),
];

/// Polls `op` so many times, with everything else running in between, and drops it.
pub(crate) async fn poll_and_drop(mut op: Pin<Box<dyn Future<Output = ()> + Send>>, polls: usize) {
    for _ in 0..polls {
        let done = std::future::poll_fn(|context| Poll::Ready(op.as_mut().poll(context).is_ready())).await;
        if done {
            break;
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_dropped_future_does_not_open_the_gate_and_its_operation_ends_when_the_gate_opens() {
    for (name, op) in OPS {
        for polls in 0..8 {
            let (source, recorder) = source(64);
            let parent = mapped(&source, pages(0, 8));
            for page in 0..8 {
                put(&source, parent, page, 1).await;
            }
            // Shared, so that a store copies; and the child has gone, so that the frames can be freed.
            let child = source.fork(parent, "child").await.unwrap();
            let device = recorder.grant(parent, 0, Access::Read).await.unwrap();
            recorder.forget_calls();
            recorder.answer([Answer::Held]);
            poll_and_drop(op(source.clone(), parent), polls).await;
            settle_down().await;
            assert_eq!(dma(source.frames(), device.frame), 1, "{name}, {polls} polls: freed too early");
            assert_eq!(recorder.calls().len(), usize::from(polls > 0), "{name}, {polls} polls");

            recorder.open_gate();
            source.drain().await;
            assert_eq!(source.stats().operations, 0, "{name}, {polls} polls");
            assert_eq!(recorder.open_brackets(), 0, "{name}, {polls} polls");
            assert_eq!(get(&source, child, 0).await, 1);
            for id in 1..=4 {
                drop(source.exit(AddressSpaceId::new(id).unwrap()).await);
            }
            assert_eq!(source.stats(), Default::default(), "{name}, {polls} polls: leaked");
            assert_eq!(dma(source.frames(), device.frame), POISON);
        }
    }
}

#[tokio::test]
async fn a_dropped_wait_for_a_turn_or_for_a_page_to_settle_leaves_no_place_behind() {
    let (source, recorder) = source(64);
    let space = mapped(&source, pages(0, 8));
    put(&source, space, 0, 1).await;
    let child = source.fork(space, "child").await.unwrap();
    recorder.forget_calls();
    recorder.answer([Answer::Held]);
    // The first store copies and is held; the second waits for it to settle, and gives up.
    poll_and_drop(
        Box::pin({
            let source = source.clone();
            async move { drop(source.store(space, 0, b"first").await) }
        }),
        4,
    )
    .await;
    poll_and_drop(
        Box::pin({
            let source = source.clone();
            async move { drop(source.store(space, 100, b"second").await) }
        }),
        4,
    )
    .await;
    recorder.open_gate();
    source.drain().await;
    assert_eq!(source.load(space, 0, 1).await.unwrap()[..], [1], "nobody was there to write");
    source.store(space, PAGE - 1, b"ab").await.unwrap();
    for id in [space, child] {
        source.exit(id).await.unwrap();
    }
    assert_eq!(source.stats(), Default::default());
}
