//! How a subscription, a session, an address space and the host agent end.

use std::time::Duration;

use shootdown_proto::error::Reason;
use shootdown_proto::v1;
use shootdown_proto::v1::session_request::Message as Ask;
use shootdown_proto::v1::session_response::Message as Say;
use shootdown_server::source::{Notifier as _, NotifyError, Outcome, Verdict};

use crate::common::{Agent, pages, quiesced, soon, unmap, until, wire};

/// 6: unsubscribe returns after the rounds that count on it, and nothing comes after it.
#[tokio::test]
async fn unsubscribe_barrier() {
    let agent = Agent::start();
    let space = agent.space();
    let mut device = agent.device("leaver").await;
    let subscription = device
        .try_subscribe_with(v1::Subscribe {
            address_space_id: space.get(),
            ranges: vec![wire(pages(1, 1))],
            wants_end: true,
            ..v1::Subscribe::default()
        })
        .await
        .unwrap();
    let round = agent.round(space, pages(1, 1));
    let notice = device.notice().await.number;
    device.ask(Ask::Unsubscribe(v1::Unsubscribe { request_id: 3, subscription_id: subscription })).await;
    device.settled().await;
    assert!(!round.is_finished());
    assert!(device.is_silent().await, "the round still counts on it");
    device.ack(notice).await;
    let result = soon(round).await.unwrap();
    match device.say().await {
        Say::Unsubscribed(unsubscribed) => assert_eq!(unsubscribed.subscription_id, subscription),
        other => panic!("{other:?}"),
    }
    agent.host().invalidate_range_end(space, result.seq.unwrap()).unwrap();
    let next = soon(agent.host().invalidate_range_start(unmap(space, pages(1, 1)))).await.unwrap();
    assert!(next.is_quiesced() && next.targets.is_empty());
    device.settled().await;
    assert!(device.is_silent().await, "neither a notice nor the end of the bracket");
}

/// 6: the answer to Unsubscribe does not wait for notices that came after it was due, however many.
#[tokio::test]
async fn an_unsubscriber_does_not_starve_under_other_events() {
    let agent = Agent::start_with(|config| config.host.session.outbox.window = 1);
    let (left, kept) = (agent.space(), agent.space());
    let mut device = agent.device("leaver").await;
    let leaving = device.subscribe(left, pages(1, 1)).await;
    device.subscribe(kept, pages(0, 10_000)).await;
    // One event more for each that is acked: more is always pending than the window lets out.
    let mut more = (0..).map(|event| agent.round(kept, pages(2 * event, 1)));
    let mut rounds: Vec<_> = more.by_ref().take(8).collect();
    until(|| agent.host().rounds_in_flight() == 8).await;
    device.ask(Ask::Unsubscribe(v1::Unsubscribe { request_id: 3, subscription_id: leaving })).await;
    for _ in 0..100 {
        match device.say().await {
            Say::Unsubscribed(unsubscribed) => {
                assert_eq!(unsubscribed.subscription_id, leaving);
                return;
            }
            Say::Notices(notices) => {
                rounds.extend(more.next());
                until(|| agent.host().rounds_in_flight() == 9).await;
                device.ack(notices.notices[0].number).await;
                until(|| agent.host().rounds_in_flight() == 8).await;
            }
            other => panic!("{other:?}"),
        }
    }
    panic!("a hundred notices came before the answer");
}

/// Release: every session is told once, subscriptions end, held faults are refused, nothing follows.
#[tokio::test]
async fn a_release_comes_once_and_last() {
    let agent = Agent::start();
    let space = agent.space();
    let mut device = agent.device("gpu").await;
    device.subscribe(space, pages(1, 1)).await;
    device.subscribe(space, pages(5, 1)).await;
    let host = agent.host().clone();
    let release = tokio::spawn(async move { host.release(space).await });
    let notice = device.notice().await;
    assert_eq!((notice.kind(), notice.range.unwrap().all), (v1::NoticeKind::Release, true));
    device.start_fault(space, pages(1, 1)).await;
    assert_eq!(device.error().await.reason(), Reason::AddressSpaceReleased);
    let refused = device.try_subscribe(space.get(), vec![wire(pages(9, 1))]).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::AddressSpaceReleased);
    let late = agent.host().invalidate_range_start(unmap(space, pages(1, 1))).await;
    assert_eq!(late.unwrap_err(), NotifyError::Released(space));
    assert_eq!(agent.host().release(space).await.unwrap_err(), NotifyError::Released(space));
    assert!(!release.is_finished());
    device.ack(notice.number).await;
    assert!(soon(release).await.unwrap().unwrap().is_quiesced());
    assert_eq!(agent.listed_sessions().await[0].subscriptions, 0);
    assert!(agent.host().release(space).await.is_err(), "it is forgotten");
    device.settled().await;
    assert!(device.is_silent().await);
}

/// A device that leaves with a word is not waited for any more.
#[tokio::test]
async fn a_device_that_leaves_resolves_its_rounds() {
    let agent = Agent::start();
    let space = agent.space();
    let mut device = agent.device("leaver").await;
    device.subscribe(space, pages(1, 1)).await;
    let round = agent.round(space, pages(1, 1));
    device.notice().await;
    device.ask(Ask::Leave(v1::Leave {})).await;
    assert_eq!(quiesced(round).await[0].outcome, Outcome::Left);
    soon(async {
        while !agent.listed_sessions().await.is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

/// SIGTERM's way: devices are told, and the bound holds even when one does not leave.
#[tokio::test]
async fn a_shutdown_drains_and_is_bounded() {
    let mut agent = Agent::start_with(|config| config.drain_timeout = Duration::from_millis(300));
    let space = agent.space();
    let mut polite = agent.device("polite").await;
    let mut stuck = agent.device("stuck").await;
    stuck.subscribe(space, pages(1, 1)).await;
    let round = agent.round(space, pages(1, 1));
    stuck.notice().await;
    let running = agent.running.take().unwrap();
    let host = running.host().clone();
    let stopping = tokio::spawn(running.shutdown());
    assert!(matches!(polite.say().await, Say::Drain(_)));
    polite.ask(Ask::Leave(v1::Leave {})).await;
    assert!(matches!(stuck.say().await, Say::Drain(_)));
    let refused = host.invalidate_range_start(unmap(space, pages(5, 1))).await.unwrap_err();
    assert_eq!(refused, NotifyError::Stopping);
    soon(stopping).await.unwrap();
    let result = soon(round).await.unwrap();
    assert_eq!(result.verdict, Verdict::NotQuiesced, "what was not acked is not to be released");
}

/// Health and reflection are offered where devices connect.
#[tokio::test]
async fn health_and_reflection_are_served() {
    let agent = Agent::start();
    let channel = agent.channel("device.sock").await;
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel.clone());
    let check = tonic_health::pb::HealthCheckRequest { service: String::new() };
    let status = health.check(check).await.unwrap().into_inner().status();
    assert_eq!(status, tonic_health::pb::health_check_response::ServingStatus::Serving);
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
    let ask = tonic_reflection::pb::v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut client = ServerReflectionClient::new(channel);
    let answers = client.server_reflection_info(tokio_stream::iter([ask])).await.unwrap();
    let answer = answers.into_inner().message().await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(listed)) = answer.message_response else {
        panic!("no list")
    };
    let names: Vec<_> = listed.service.iter().map(|service| service.name.as_str()).collect();
    assert!(names.contains(&"shootdown.v1.DeviceService"), "{names:?}");
}
