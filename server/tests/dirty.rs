//! What devices wrote, as the source that asked for the flush is told of it.
#![allow(clippy::unwrap_used, reason = "a helper of tests, which fail by panicking")]

mod common;

use std::time::Duration;

use common::{Agent, Device, lease_of, pages, soon, unmap, until, wire};
use shootdown_core::Cause;
use shootdown_proto::v1;
use shootdown_server::source::{Invalidation, Notifier as _, Outcome, RoundResult, Wait};
use tokio::task::JoinHandle;

async fn ack_with(device: &mut Device, notice: u64, dirty: Vec<v1::AddressRange>) {
    device.ack_with(v1::FlushReport { notice, dirty, ..v1::FlushReport::default() }).await;
}

async fn completed(round: JoinHandle<RoundResult>) -> RoundResult {
    let result = soon(round).await.unwrap();
    assert!(result.is_quiesced(), "{result:?}");
    result
}

#[tokio::test]
async fn a_round_tells_whether_a_target_wrote_its_range() {
    let agent = Agent::start();
    let space = agent.space();
    let mut device = agent.device("gpu").await;
    device.subscribe(space, pages(0, 16)).await;
    for (dirty, expected) in
        [(vec![wire(pages(2, 1))], true), (vec![wire(pages(5, 3))], false), (Vec::new(), false)]
    {
        let host = agent.host().clone();
        let protect = Invalidation { cause: Cause::ProtectionPage, ..unmap(space, pages(1, 4)) };
        let round = tokio::spawn(async move { host.invalidate_range_start(protect).await.unwrap() });
        let notice = device.notice().await.number;
        ack_with(&mut device, notice, dirty).await;
        let result = completed(round).await;
        assert_eq!((result.dirty, result.targets[0].dirty), (expected, expected), "{result:?}");
    }
}

#[tokio::test]
async fn a_target_that_has_not_told_counts_as_one_that_wrote() {
    let agent = Agent::start_with(|config| lease_of(config, Duration::from_millis(300)));
    let space = agent.space();
    let mut dead = agent.device("dead").await;
    dead.subscribe(space, pages(1, 1)).await;
    let unblockable = Invalidation { wait: Wait::NotAtAll, ..unmap(space, pages(1, 1)) };
    assert!(agent.host().invalidate_range_start(unblockable).await.unwrap().dirty, "nobody was asked");
    let impatient = Invalidation { wait: Wait::AtMost(Duration::ZERO), ..unmap(space, pages(1, 1)) };
    assert!(agent.host().invalidate_range_start(impatient).await.unwrap().dirty, "it has not acked");
    let result = completed(agent.round(space, pages(1, 1))).await;
    assert_eq!(result.targets[0].outcome, Outcome::Fenced);
    assert!(result.dirty && result.targets[0].dirty);
    let alone = agent.host().invalidate_range_start(unmap(space, pages(1, 1))).await.unwrap();
    assert!(!alone.dirty, "nobody is left who could have written");
}

#[tokio::test]
async fn a_target_that_flushed_everything_counts_as_one_that_wrote() {
    let agent = Agent::start_with(|config| {
        (config.host.session.outbox.window, config.host.session.outbox.max_pending) = (1, 1);
    });
    let space = agent.space();
    let mut device = agent.device("gpu").await;
    device.subscribe(space, pages(0, 100)).await;
    let precise = agent.round(space, pages(0, 1));
    let notice = device.notice().await;
    let widened: Vec<_> = [10, 20, 30].map(|page| agent.round(space, pages(page, 1))).into();
    until(|| agent.host().rounds_in_flight() == 4).await;
    device.ack(notice.number).await;
    assert!(!completed(precise).await.dirty);
    let notice = device.notice().await;
    assert_eq!(notice.range, None, "a flush of everything");
    device.ack(notice.number).await;
    for round in widened {
        assert!(completed(round).await.dirty);
    }
}

#[tokio::test]
async fn the_caller_over_grpc_is_told_of_the_round_and_of_each_target() {
    let agent = Agent::start();
    let mut writer = agent.device("writer").await;
    let mut reader = agent.device("reader").await;
    let mut notifier = agent.notifier().await;
    let register = v1::RegisterAddressSpaceRequest::default();
    let id = notifier.register_address_space(register).await.unwrap().into_inner().address_space_id;
    for device in [&mut writer, &mut reader] {
        device.try_subscribe(id, vec![wire(pages(1, 1))]).await.unwrap();
    }
    let start = v1::InvalidateRangeStartRequest {
        address_space_id: id,
        range: Some(wire(pages(1, 1))),
        cause: v1::Cause::ProtectionPage.into(),
        ..v1::InvalidateRangeStartRequest::default()
    };
    let calling = tokio::spawn(async move { notifier.invalidate_range_start(start).await });
    let notice = writer.notice().await.number;
    ack_with(&mut writer, notice, vec![wire(pages(1, 1))]).await;
    let notice = reader.notice().await.number;
    reader.ack(notice).await;
    let result = soon(calling).await.unwrap().unwrap().into_inner().result.unwrap();
    let mut targets: Vec<_> =
        result.targets.iter().map(|target| (target.device_id.as_str(), target.dirty)).collect();
    targets.sort_unstable();
    assert_eq!((result.dirty, targets), (true, vec![("reader", false), ("writer", true)]));
}
