//! What is granted, and when not.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use shootdown_core::{Access, AddrRange, AddressSpaceId, Cause, Translation};
use shootdown_proto::error::Reason;
use shootdown_proto::v1;
use shootdown_proto::v1::session_request::Message as Ask;
use shootdown_server::source::{FaultError, Invalidation, Notifier as _, Translate};
use tokio::sync::Semaphore;

use crate::common::{Agent, pages, quiesced, soon, unmap, wire};

/// 3: a fault that meets an open bracket is held until its end.
#[tokio::test]
async fn no_grant_in_window() {
    let agent = Agent::start();
    let space = agent.space();
    let mut device = agent.device("gpu").await;
    device.subscribe(space, pages(1, 8)).await;
    let round = agent.round(space, pages(1, 2));
    let notice = device.notice().await.number;
    device.ack(notice).await;
    let seq = soon(round).await.unwrap().seq.unwrap();
    device.start_fault(space, pages(2, 1)).await;
    // What the bracket does not cover is granted meanwhile.
    device.start_fault(space, pages(5, 1)).await;
    assert_eq!(device.grant().await.translations[0].frame, 5);
    device.settled().await;
    agent.host().invalidate_range_end(space, seq).unwrap();
    assert_eq!(device.grant().await.translations[0].frame, 2);
}

/// A source whose answers wait for the test.
struct Slow {
    asked: Semaphore,
    answers: Semaphore,
}

impl Translate for Slow {
    fn source(&self) -> &'static str {
        "api"
    }

    fn fault(
        &self,
        space: AddressSpaceId,
        range: AddrRange,
        access: Access,
    ) -> BoxFuture<'_, Result<Vec<Translation>, FaultError>> {
        Box::pin(async move {
            self.asked.add_permits(1);
            self.answers.acquire().await.expect("nobody closes it").forget();
            crate::common::Identity.fault(space, range, access).await
        })
    }

    fn bytes(&self, _: &[Translation]) -> Result<Bytes, FaultError> {
        Err(FaultError::NotServed)
    }
}

/// 3: what the source said before an event is not granted after it, even when the event is over.
#[tokio::test]
async fn a_translation_from_before_an_event_is_asked_for_again() {
    let agent = Agent::start();
    let source = Arc::new(Slow { asked: Semaphore::new(0), answers: Semaphore::new(0) });
    let space = agent.host().register("slow", Arc::clone(&source) as Arc<dyn Translate>).unwrap();
    let mut device = agent.device("gpu").await;
    device.subscribe(space, pages(1, 8)).await;
    device.start_fault(space, pages(1, 1)).await;
    soon(source.asked.acquire()).await.unwrap().forget();
    // A whole event passes between question and answer.
    let round = agent.round(space, pages(1, 1));
    let notice = device.notice().await.number;
    device.ack(notice).await;
    let seq = soon(round).await.unwrap().seq.unwrap();
    agent.host().invalidate_range_end(space, seq).unwrap();
    source.answers.add_permits(1);
    // The first answer is not granted: the source is asked once more.
    soon(source.asked.acquire()).await.unwrap().forget();
    assert!(device.is_silent().await);
    source.answers.add_permits(1);
    assert_eq!(device.grant().await.seq, seq.get());
}

/// 4: a subscriber that joins during an event is not its target, and its fault meets the bracket.
#[tokio::test]
async fn join_covers() {
    let agent = Agent::start();
    let space = agent.space();
    let mut early = agent.device("early").await;
    early.subscribe(space, pages(1, 1)).await;
    let round = agent.round(space, pages(1, 1));
    let notice = early.notice().await.number;
    let mut joiner = agent.device("joiner").await;
    joiner.subscribe(space, pages(1, 1)).await;
    joiner.start_fault(space, pages(1, 1)).await;
    joiner.settled().await;
    early.ack(notice).await;
    let result = soon(round).await.unwrap();
    assert_eq!(result.targets.len(), 1, "its targets were fixed at the start");
    joiner.settled().await;
    agent.host().invalidate_range_end(space, result.seq.unwrap()).unwrap();
    joiner.grant().await;
}

/// 18: a fault that has to notify its own session's device does not wait for itself.
#[tokio::test]
async fn no_self_wait() {
    let agent = Agent::start();
    let memory = agent.running.as_ref().unwrap().memory().clone();
    let parent = memory.create("parent").unwrap();
    memory.map(parent, pages(16, 1), Access::Write).unwrap();
    memory.store(parent, 16 * 4096, b"before").await.unwrap();
    let mut device = agent.device("writer").await;
    device.subscribe(parent, pages(16, 1)).await;
    device.start_fault(parent, pages(16, 1)).await;
    device.grant().await;
    let forking = memory.clone();
    let fork = tokio::spawn(async move { forking.fork(parent, "child").await });
    let notice = device.notice().await.number;
    device.ack(notice).await;
    soon(fork).await.unwrap().unwrap();
    // A write fault of the device breaks COW, which invalidates the device's own old translation.
    device
        .ask(Ask::Fault(v1::Fault {
            request_id: 99,
            address_space_id: parent.get(),
            range: Some(wire(pages(16, 1))),
            access: v1::Access::Write.into(),
            wants_data: false,
        }))
        .await;
    let notice = device.notice().await.number;
    device.ack(notice).await;
    let grant = device.grant().await;
    assert_eq!((grant.request_id, grant.translations[0].access()), (99, v1::Access::Write));
}

/// 1: a subscription that leaves causes out is not granted pages whose end it would not hear of.
#[tokio::test]
async fn a_subscription_to_some_causes_is_told_of_them_and_granted_nothing() {
    let agent = Agent::start();
    let space = agent.space();
    let mut device = agent.device("picky").await;
    device
        .try_subscribe_with(v1::Subscribe {
            address_space_id: space.get(),
            ranges: vec![wire(pages(1, 1))],
            causes: vec![v1::Cause::Unmap.into()],
            ..v1::Subscribe::default()
        })
        .await
        .unwrap();
    device.start_fault(space, pages(1, 1)).await;
    assert_eq!(device.error().await.reason(), Reason::FaultNotSubscribed);
    let clear = Invalidation { cause: Cause::Clear, ..unmap(space, pages(1, 1)) };
    let unheard = agent.host().invalidate_range_start(clear).await.unwrap();
    assert!(unheard.is_quiesced() && unheard.targets.is_empty());
    let round = agent.round(space, pages(1, 1));
    let notice = device.notice().await.number;
    device.ack(notice).await;
    quiesced(round).await;
}
