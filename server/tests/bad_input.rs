//! What a wrong message does: it is refused by name, to whoever sent it, and to nobody else. Each
//! test runs beside a bystander whose round is waiting all the while; at the end the bystander's
//! session works and its round completes by its own ack, no earlier.

mod common;

use std::time::Duration;

use common::{Agent, Device, pages, quiesced, wire};
use shootdown_core::AddressSpaceId;
use shootdown_proto::error::Reason;
use shootdown_proto::v1;
use shootdown_proto::v1::session_request::Message as Ask;
use shootdown_server::source::{Outcome, RoundResult};
use tokio::task::JoinHandle;

/// A session that did nothing wrong, with a round that waits for it.
struct Bystander {
    device: Device,
    round: JoinHandle<RoundResult>,
    notice: u64,
}

impl Bystander {
    async fn start(agent: &Agent, space: AddressSpaceId) -> Self {
        let mut device = agent.device("bystander").await;
        device.subscribe(space, pages(900, 1)).await;
        let round = agent.round(space, pages(900, 1));
        let notice = device.notice().await.number;
        Self { device, round, notice }
    }

    async fn check_unharmed(mut self) {
        self.device.settled().await;
        assert!(!self.round.is_finished(), "its round waits for its own ack");
        self.device.ack(self.notice).await;
        let targets = quiesced(self.round).await;
        assert_eq!(targets[0].outcome, Outcome::Acked);
    }
}

struct Scene {
    agent: Agent,
    space: AddressSpaceId,
    bystander: Bystander,
}

impl Scene {
    async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    async fn start_with(change: impl FnOnce(&mut shootdown_server::config::Config)) -> Self {
        let agent = Agent::start_with(change);
        let space = agent.space();
        let bystander = Bystander::start(&agent, space).await;
        Self { agent, space, bystander }
    }

    async fn unharmed(self) {
        self.bystander.check_unharmed().await;
    }
}

#[tokio::test]
async fn a_first_message_that_is_not_hello_ends_the_stream() {
    let scene = Scene::start().await;
    let mut device = Device::connect(&scene.agent).await;
    device.ask(Ask::Heartbeat(v1::Heartbeat { request_id: 1 })).await;
    let (error, _) = device.last_word().await;
    assert_eq!(error.reason(), Reason::HelloExpected);
    scene.unharmed().await;
}

#[tokio::test]
async fn a_second_hello_ends_the_session() {
    let scene = Scene::start().await;
    let mut device = scene.agent.device("twice").await;
    device.ask(Ask::Hello(Device::hello_of("twice"))).await;
    let (error, _) = device.last_word().await;
    assert_eq!(error.reason(), Reason::HelloRepeated);
    scene.unharmed().await;
}

#[tokio::test]
async fn an_unsupported_version_is_answered_with_the_supported_ones() {
    let scene = Scene::start().await;
    let mut device = Device::connect(&scene.agent).await;
    device.ask(Ask::Hello(v1::Hello { protocol_versions: vec![77], ..Device::hello_of("future") })).await;
    let (error, _) = device.last_word().await;
    assert_eq!(error.reason(), Reason::VersionUnsupported);
    assert_eq!(error.supported_versions, [1]);
    scene.unharmed().await;
}

#[tokio::test]
async fn a_device_that_does_not_enforce_its_lease_is_refused_in_a_strict_address_space() {
    let scene = Scene::start().await;
    let mut device = Device::connect(&scene.agent).await;
    device.welcomed(v1::Hello { capabilities: None, ..Device::hello_of("unbound") }).await;
    let refused = device.try_subscribe(scene.space.get(), vec![wire(pages(1, 1))]).await.unwrap_err();
    assert_eq!((refused.reason(), refused.fatal), (Reason::LeaseRequired, false));
    device.settled().await;
    scene.unharmed().await;
}

#[tokio::test]
async fn no_device_may_call_itself_what_a_torn_record_is_called() {
    let scene = Scene::start().await;
    let mut device = Device::connect(&scene.agent).await;
    device.ask(Ask::Hello(Device::hello_of("unnamed:torn-journal"))).await;
    let (error, _) = device.last_word().await;
    assert_eq!((error.reason(), error.fatal), (Reason::FieldInvalid, true));
    assert!(error.message.contains("torn record"), "{}", error.message);
    scene.unharmed().await;
}

#[tokio::test]
async fn a_hello_with_a_bad_name_or_incarnation_is_refused() {
    let scene = Scene::start().await;
    for hello in [
        v1::Hello { device_id: String::new(), ..Device::hello_of("x") },
        v1::Hello { device_id: "a b".to_owned(), ..Device::hello_of("x") },
        v1::Hello { device_id: "y".repeat(65), ..Device::hello_of("x") },
        v1::Hello { incarnation: 0, ..Device::hello_of("x") },
        v1::Hello { page_sizes: vec![4095], ..Device::hello_of("x") },
        v1::Hello { clock_id: "c".repeat(1000), ..Device::hello_of("x") },
    ] {
        let mut device = Device::connect(&scene.agent).await;
        device.ask(Ask::Hello(hello)).await;
        let (error, _) = device.last_word().await;
        assert_eq!(error.reason(), Reason::FieldInvalid);
    }
    scene.unharmed().await;
}

#[tokio::test]
async fn a_message_without_content_is_refused_and_the_session_goes_on() {
    let scene = Scene::start().await;
    let mut device = scene.agent.device("mute").await;
    device.ask_raw(v1::SessionRequest { message: None }).await;
    let error = device.error().await;
    assert_eq!((error.reason(), error.fatal), (Reason::MessageUnknown, false));
    device.settled().await;
    scene.unharmed().await;
}

#[tokio::test]
async fn a_bad_range_is_refused_wherever_it_stands() {
    let scene = Scene::start().await;
    let mut device = scene.agent.device("ranger").await;
    let range = |start, end, all| v1::AddressRange { start, end, all };
    for (name, bad) in [
        ("unaligned", range(0x1000, 0x1fff, false)),
        ("unaligned start", range(0x1001, 0x2000, false)),
        ("empty", range(0x1000, 0x1000, false)),
        ("empty at zero", range(0, 0, false)),
        ("inverted", range(0x3000, 0x1000, false)),
        ("wrapped", range(u64::MAX - 0xfff, 0x1000, false)),
        ("all with ends", range(0x1000, 0x2000, true)),
    ] {
        let refused = device.try_subscribe(scene.space.get(), vec![bad]).await.unwrap_err();
        assert_eq!(refused.reason(), Reason::RangeInvalid, "subscribe, {name}");
        device
            .ask(Ask::Fault(v1::Fault {
                request_id: 9,
                address_space_id: scene.space.get(),
                range: Some(bad),
                access: v1::Access::Read.into(),
                wants_data: false,
            }))
            .await;
        let error = device.error().await;
        assert_eq!((error.reason(), error.request_id), (Reason::RangeInvalid, 9), "fault, {name}");
        let young = v1::Young { address_space_id: scene.space.get(), ranges: vec![bad] };
        device.ask(Ask::Young(young)).await;
        assert_eq!(device.error().await.reason(), Reason::RangeInvalid, "young, {name}");
    }
    let refused = device.try_subscribe(scene.space.get(), vec![]).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::FieldInvalid, "no range at all");
    scene.unharmed().await;
}

#[tokio::test]
async fn an_unknown_address_space_is_refused_by_each_request() {
    let scene = Scene::start().await;
    let mut device = scene.agent.device("lost").await;
    let refused = device.try_subscribe(4711, vec![wire(pages(1, 1))]).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::AddressSpaceUnknown);
    let unknown = AddressSpaceId::new(4711).unwrap();
    let request = device.start_fault(unknown, pages(1, 1)).await;
    let error = device.error().await;
    assert_eq!((error.reason(), error.request_id), (Reason::AddressSpaceUnknown, request));
    scene.unharmed().await;
}

#[tokio::test]
async fn a_fault_outside_of_the_subscriptions_is_refused() {
    let scene = Scene::start().await;
    let mut device = scene.agent.device("curious").await;
    device.subscribe(scene.space, pages(10, 2)).await;
    for beyond in [pages(9, 2), pages(11, 2), pages(50, 1)] {
        device.start_fault(scene.space, beyond).await;
        assert_eq!(device.error().await.reason(), Reason::FaultNotSubscribed, "{beyond}");
    }
    device.start_fault(scene.space, pages(10, 2)).await;
    assert_eq!(device.grant().await.translations.len(), 2);
    scene.unharmed().await;
}

#[tokio::test]
async fn a_fault_of_too_many_pages_is_refused() {
    let scene = Scene::start().await;
    let mut device = scene.agent.device("greedy").await;
    device.start_fault(scene.space, pages(0, 513)).await;
    assert_eq!(device.error().await.reason(), Reason::FieldInvalid);
    scene.unharmed().await;
}

#[tokio::test]
async fn an_unknown_subscription_is_refused_and_so_is_one_of_another_session() {
    let mut scene = Scene::start().await;
    let others = scene.bystander.device.subscribe(scene.space, pages(800, 1)).await;
    let mut device = scene.agent.device("thief").await;
    for subscription_id in [others, 999_999] {
        device.ask(Ask::Unsubscribe(v1::Unsubscribe { request_id: 5, subscription_id })).await;
        let error = device.error().await;
        assert_eq!((error.reason(), error.request_id), (Reason::SubscriptionUnknown, 5));
    }
    scene.unharmed().await;
}

#[tokio::test]
async fn an_ack_of_a_notice_that_was_never_sent_ends_the_session_and_releases_nothing() {
    let scene = Scene::start().await;
    let mut device = scene.agent.device("liar").await;
    device.subscribe(scene.space, pages(1, 1)).await;
    let round = scene.agent.round(scene.space, pages(1, 1));
    let notice = device.notice().await;
    device.ack(notice.number + 1).await;
    let (error, _) = device.last_word().await;
    assert_eq!(error.reason(), Reason::AckNeverSent);
    assert!(!round.is_finished(), "what it acked beside the lie does not count either");
    scene.unharmed().await;
    round.abort();
}

#[tokio::test]
async fn an_ack_that_comes_twice_is_refused_and_the_session_goes_on() {
    let scene = Scene::start().await;
    let mut device = scene.agent.device("stutterer").await;
    device.subscribe(scene.space, pages(1, 1)).await;
    let round = scene.agent.round(scene.space, pages(1, 1));
    let notice = device.notice().await;
    device.ack(notice.number).await;
    quiesced(round).await;
    device.ack(notice.number).await;
    assert_eq!(device.error().await.reason(), Reason::AckTwice);
    device.settled().await;
    scene.unharmed().await;
}

#[tokio::test]
async fn an_ack_that_goes_back_is_refused_and_the_session_goes_on() {
    let scene = Scene::start().await;
    let mut device = scene.agent.device("backwards").await;
    device.subscribe(scene.space, pages(1, 1)).await;
    for _ in 0..2 {
        let round = scene.agent.round(scene.space, pages(1, 1));
        let notice = device.notice().await;
        device.ack(notice.number).await;
        quiesced(round).await;
    }
    device.ack(1).await;
    assert_eq!(device.error().await.reason(), Reason::AckRegressed);
    device.settled().await;
    scene.unharmed().await;
}

#[tokio::test]
async fn an_ack_of_another_session_acks_nothing() {
    let scene = Scene::start().await;
    let mut device = scene.agent.device("mixed-up").await;
    device.subscribe(scene.space, pages(1, 1)).await;
    let round = scene.agent.round(scene.space, pages(1, 1));
    let through = device.notice().await.number;
    let session_id = scene.bystander.device.session;
    device.ask(Ask::Ack(v1::Ack { session_id, through, ..v1::Ack::default() })).await;
    assert_eq!(device.error().await.reason(), Reason::AckOtherSession);
    assert!(!round.is_finished());
    device.ack(through).await;
    quiesced(round).await;
    scene.unharmed().await;
}

#[tokio::test]
async fn a_report_for_a_notice_that_is_not_acked_with_it_is_refused() {
    let scene = Scene::start().await;
    let mut device = scene.agent.device("reporter").await;
    device.subscribe(scene.space, pages(1, 1)).await;
    let round = scene.agent.round(scene.space, pages(1, 1));
    let through = device.notice().await.number;
    let reports = vec![v1::FlushReport { notice: through + 3, ..v1::FlushReport::default() }];
    device.ask(Ask::Ack(v1::Ack { through, reports, ..v1::Ack::default() })).await;
    assert_eq!(device.error().await.reason(), Reason::AckReportMisplaced);
    assert!(!round.is_finished(), "a refused ack changes nothing");
    device.ack(through).await;
    quiesced(round).await;
    scene.unharmed().await;
}

#[tokio::test]
async fn a_message_over_the_size_limit_ends_the_session() {
    let scene = Scene::start().await;
    let mut device = scene.agent.device("bulky").await;
    let selective = vec![u64::MAX; 100_000];
    device.ask(Ask::Ack(v1::Ack { selective, ..v1::Ack::default() })).await;
    let (error, _) = device.last_word().await;
    assert_eq!(error.reason(), Reason::MessageTooLarge);
    scene.unharmed().await;
}

#[tokio::test]
async fn lists_that_are_too_long_are_refused_below_the_size_limit() {
    let scene = Scene::start().await;
    let mut device = scene.agent.device("lister").await;
    let many = vec![wire(pages(1, 1)); 513];
    let refused = device.try_subscribe(scene.space.get(), many).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::FieldInvalid);
    device.ask(Ask::Ack(v1::Ack { selective: vec![1; 4097], ..v1::Ack::default() })).await;
    assert_eq!(device.error().await.reason(), Reason::FieldInvalid);
    scene.unharmed().await;
}

#[tokio::test]
async fn subscriptions_beyond_the_quota_are_refused_until_one_ends() {
    let scene = Scene::start_with(|config| {
        config.host.session.max_subscriptions = 2;
        config.host.session.max_ranges_per_subscription = 256;
    })
    .await;
    let mut device = scene.agent.device("collector").await;
    let first = device.subscribe(scene.space, pages(1, 1)).await;
    device.subscribe(scene.space, pages(2, 1)).await;
    let third = vec![wire(pages(3, 1))];
    let refused = device.try_subscribe(scene.space.get(), third.clone()).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::SubscriptionQuota);
    device.ask(Ask::Unsubscribe(v1::Unsubscribe { request_id: 7, subscription_id: first })).await;
    // It counts until its answer, which waits for the address space's rounds, the bystander's among them.
    let refused = device.try_subscribe(scene.space.get(), third).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::SubscriptionQuota);
    let mut other = scene.agent.device("ranger").await;
    let ranges = vec![wire(pages(1, 1)); 300];
    let refused = other.try_subscribe(scene.space.get(), ranges).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::SubscriptionQuota, "ranges of one subscription");
    scene.unharmed().await;
}

#[tokio::test]
async fn a_flood_of_faults_is_refused_beyond_the_quota() {
    let scene = Scene::start_with(|config| config.host.session.max_faults_in_flight = 4).await;
    let mut device = scene.agent.device("flooder").await;
    // The bystander's round holds these pages: the faults wait.
    device.subscribe(scene.space, pages(900, 1)).await;
    for _ in 0..50 {
        device.start_fault(scene.space, pages(900, 1)).await;
    }
    for _ in 0..46 {
        assert_eq!(device.error().await.reason(), Reason::FaultQuota);
    }
    let listed = scene.agent.listed_sessions().await;
    assert_eq!(listed.iter().map(|session| session.faults_in_flight).max(), Some(4));
    scene.unharmed().await;
}

#[tokio::test]
async fn a_session_beyond_the_quota_is_refused() {
    let scene = Scene::start_with(|config| config.host.max_sessions = 1).await;
    let mut device = Device::connect(&scene.agent).await;
    device.ask(Ask::Hello(Device::hello_of("late"))).await;
    assert_eq!(device.last_word().await.0.reason(), Reason::SessionQuota);
    scene.unharmed().await;
}

#[tokio::test]
async fn a_caller_without_leave_is_refused_by_every_privileged_service() {
    // The tests' own user is not in the list.
    let scene = Scene::start_with(|config| config.allow_uids = vec![4_000_000_000]).await;
    let channel = scene.agent.channel("source.sock").await;
    let mut notifier = v1::notifier_service_client::NotifierServiceClient::new(channel.clone());
    let register = v1::RegisterAddressSpaceRequest::default();
    let refused = notifier.register_address_space(register).await.unwrap_err();
    assert_eq!(Reason::of_status(&refused), Some(Reason::PermissionDenied));
    let release = v1::ReleaseAddressSpaceRequest {
        address_space_id: scene.space.get(),
        ..v1::ReleaseAddressSpaceRequest::default()
    };
    let refused = notifier.release_address_space(release).await.unwrap_err();
    assert_eq!(Reason::of_status(&refused), Some(Reason::PermissionDenied));
    let mut memory = v1::memory_service_client::MemoryServiceClient::new(channel);
    let refused = memory.create_address_space(v1::CreateAddressSpaceRequest::default()).await.unwrap_err();
    assert_eq!(Reason::of_status(&refused), Some(Reason::PermissionDenied));
    let channel = scene.agent.channel("admin.sock").await;
    let mut admin = v1::admin_service_client::AdminServiceClient::new(channel);
    let evict = v1::EvictSessionRequest { session_id: scene.bystander.device.session, is_cut_off: false };
    let refused = admin.evict_session(evict).await.unwrap_err();
    assert_eq!(Reason::of_status(&refused), Some(Reason::PermissionDenied));
    scene.unharmed().await;
}

#[tokio::test]
async fn the_privileged_services_are_not_offered_to_devices() {
    let scene = Scene::start().await;
    let channel = scene.agent.channel("device.sock").await;
    let mut notifier = v1::notifier_service_client::NotifierServiceClient::new(channel);
    let refused =
        notifier.register_address_space(v1::RegisterAddressSpaceRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Unimplemented);
    scene.unharmed().await;
}

#[tokio::test]
async fn bad_requests_of_a_source_are_refused_by_reason() {
    let scene = Scene::start().await;
    let channel = scene.agent.channel("source.sock").await;
    let mut notifier = v1::notifier_service_client::NotifierServiceClient::new(channel);
    let register = v1::RegisterAddressSpaceRequest {
        name: "vm".to_owned(),
        ..v1::RegisterAddressSpaceRequest::default()
    };
    let id = notifier.register_address_space(register).await.unwrap().into_inner().address_space_id;
    let start = v1::InvalidateRangeStartRequest {
        address_space_id: id,
        range: Some(wire(pages(1, 1))),
        cause: v1::Cause::Unmap.into(),
        ..v1::InvalidateRangeStartRequest::default()
    };
    let unaligned = v1::AddressRange { start: 1, end: 2, all: false };
    for (request, reason) in [
        (v1::InvalidateRangeStartRequest { range: Some(unaligned), ..start.clone() }, Reason::RangeInvalid),
        (v1::InvalidateRangeStartRequest { range: None, ..start.clone() }, Reason::FieldInvalid),
        (v1::InvalidateRangeStartRequest { cause: 0, ..start.clone() }, Reason::FieldInvalid),
        (v1::InvalidateRangeStartRequest { cause: -7, ..start.clone() }, Reason::FieldInvalid),
        (v1::InvalidateRangeStartRequest { address_space_id: 0, ..start.clone() }, Reason::FieldInvalid),
        (
            v1::InvalidateRangeStartRequest { address_space_id: 4711, ..start.clone() },
            Reason::AddressSpaceUnknown,
        ),
        (
            v1::InvalidateRangeStartRequest { address_space_id: scene.space.get(), ..start.clone() },
            Reason::AddressSpaceNotOwned,
        ),
    ] {
        let refused = notifier.invalidate_range_start(request).await.unwrap_err();
        assert_eq!(Reason::of_status(&refused), Some(reason), "{refused:?}");
    }
    let end = v1::InvalidateRangeEndRequest {
        address_space_id: id,
        seq: 77,
        ..v1::InvalidateRangeEndRequest::default()
    };
    let refused = notifier.invalidate_range_end(end).await.unwrap_err();
    assert_eq!(Reason::of_status(&refused), Some(Reason::RoundUnknown));
    let wait = v1::AwaitRoundRequest { address_space_id: id, seq: 77, ..Default::default() };
    let refused = notifier.await_round(wait).await.unwrap_err();
    assert_eq!(Reason::of_status(&refused), Some(Reason::RoundUnknown));
    scene.unharmed().await;
}

#[tokio::test]
async fn bad_reads_of_frames_are_refused_by_reason() {
    let scene = Scene::start().await;
    let device = scene.agent.device("reader").await;
    let channel = scene.agent.channel("device.sock").await;
    let mut pages_client = v1::page_service_client::PageServiceClient::new(channel);
    let span = |frame, offset, length| v1::FrameSpan { frame, offset, length };
    let read = |session_id, epoch, span| v1::ReadRequest { session_id, epoch, spans: vec![span] };
    let (session, epoch) = (device.session, device.epoch);
    for (request, reason) in [
        (read(4711, epoch, span(0, 0, 8)), Reason::SessionUnknown),
        (read(0, epoch, span(0, 0, 8)), Reason::SessionUnknown),
        (read(session, epoch + 1, span(0, 0, 8)), Reason::EpochStale),
        (read(session, epoch, span(u64::MAX, 0, 8)), Reason::FrameUnknown),
        (read(session, epoch, span(0, 4090, 8)), Reason::FieldInvalid),
        (read(session, epoch, span(0, u32::MAX, u32::MAX)), Reason::FieldInvalid),
        (read(session, epoch, span(0, 0, 0)), Reason::FieldInvalid),
        (
            v1::ReadRequest { session_id: session, epoch, spans: vec![span(0, 0, 8); 257] },
            Reason::FieldInvalid,
        ),
        (v1::ReadRequest { session_id: session, epoch, spans: vec![] }, Reason::FieldInvalid),
    ] {
        let refused = pages_client.read(request).await.unwrap_err();
        assert_eq!(Reason::of_status(&refused), Some(reason), "{refused:?}");
    }
    let write =
        v1::WriteRequest { session_id: session, epoch, spans: vec![span(0, 0, 8)], data: vec![0; 7].into() };
    let refused = pages_client.write(write).await.unwrap_err();
    assert_eq!(Reason::of_status(&refused), Some(Reason::FieldInvalid));
    drop(device);
    scene.unharmed().await;
}

#[tokio::test]
async fn a_device_that_asks_and_does_not_read_is_not_read_any_more_either() {
    const MANY: u32 = 1_000_000;
    let scene = Scene::start().await;
    let channel = common::connect_with(&scene.agent.socket("device.sock"), 65_535).await;
    let mut device = Device::on(channel);
    device.hello("deaf").await;
    // Each heartbeat has an answer, and none is read.
    let mut sent = 0;
    while sent < MANY {
        let heartbeat = device.ask(Ask::Heartbeat(v1::Heartbeat { request_id: 1 }));
        if tokio::time::timeout(Duration::from_secs(2), heartbeat).await.is_err() {
            break;
        }
        sent += 1;
    }
    assert!(sent < MANY, "its answers must not pile up in the host agent");
    scene.unharmed().await;
}
