//! Young bits where they were lost once: found by the simulation.

mod common;

use std::sync::Arc;

use common::{Agent, Identity, pages, quiesced, wire};
use shootdown_core::{AddressSpaceId, Cause};
use shootdown_proto::v1;
use shootdown_proto::v1::session_request::Message as Ask;

use shootdown_server::source::{Invalidation, Notifier as _, Strictness};

/// 20: the ack of a round that an unsubscription waits for still tells what was used.
#[tokio::test]
async fn what_an_ack_brings_back_is_kept_while_its_subscription_ends() {
    let agent = Agent::start();
    let space = agent.space();
    let mut device = agent.device("leaver").await;
    let ranges = vec![wire(pages(1, 8))];
    let asked = v1::Subscribe { address_space_id: space.get(), ranges, ..v1::Subscribe::default() };
    let subscription_id = device.try_subscribe_with(asked).await.unwrap();
    let host = agent.host().clone();
    let migration = Invalidation { cause: Cause::Migrate, ..common::unmap(space, pages(1, 8)) };
    let round = tokio::spawn(async move { host.invalidate_range_start(migration).await.unwrap() });
    let notice = device.notice().await.number;
    device.ask(Ask::Unsubscribe(v1::Unsubscribe { request_id: 3, subscription_id })).await;
    device.settled().await;
    let young = vec![wire(pages(2, 1))];
    let reports = vec![v1::FlushReport { notice, young, ..v1::FlushReport::default() }];
    device.ask(Ask::Ack(v1::Ack { through: notice, reports, ..v1::Ack::default() })).await;
    quiesced(round).await;
    assert!(agent.host().test_young(space, pages(2, 1)).unwrap());
    assert!(!agent.host().test_young(space, pages(3, 1)).unwrap());
}

/// 20: of an address space of an earlier run nobody knows what was used.
#[tokio::test]
async fn an_address_space_that_is_taken_back_is_young() {
    let agent = Agent::start();
    let of_an_earlier_run = AddressSpaceId::new(77).unwrap();
    let source = Arc::new(Identity);
    agent.host().take_back(of_an_earlier_run, "back", source, Strictness::Strict).unwrap();
    assert!(agent.host().test_young(of_an_earlier_run, pages(5, 1)).unwrap());
    assert!(!agent.host().test_young(agent.space(), pages(5, 1)).unwrap(), "a new one is not");
}
