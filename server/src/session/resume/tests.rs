use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use shootdown_core::ack::Ack;
use shootdown_core::{
    Access, AddrRange, AddressSpaceId, Cause, CauseSet, DeviceId, NoticeNumber, SubscriptionId, Translation,
};
use shootdown_proto::message::{Fault, RequestId, Subscribe};

use super::*;
use crate::config::Settings;
use crate::session::fault;
use crate::shard::Shard;
use crate::source::{FaultError, Invalidation, Notifier as _, Translate, Wait};
use crate::vigil::Vigil;

struct Never;

impl Translate for Never {
    fn source(&self) -> &'static str {
        "api"
    }

    fn fault(
        &self,
        _: AddressSpaceId,
        _: AddrRange,
        _: Access,
    ) -> BoxFuture<'_, Result<Vec<Translation>, FaultError>> {
        Box::pin(std::future::pending())
    }

    fn bytes(&self, _: &[Translation]) -> Result<Bytes, FaultError> {
        Err(FaultError::NotServed)
    }
}

fn host() -> Host {
    let config = Settings { listen: vec!["unix:/never".parse().unwrap()], ..Settings::default() };
    Host::new(config.resolve().unwrap().host, tokio::runtime::Handle::current())
}

async fn come(host: &Host, resume: Option<ResumePoint>) -> Opened {
    let hello = Hello {
        device: DeviceId::new("gpu0").unwrap(),
        incarnation: Incarnation::FIRST,
        versions: vec![1],
        window: None,
        page_sizes: vec![PageSize::BASE],
        enforces_lease: true,
        change_pte: false,
        resume,
        clock_id: String::new(),
    };
    let vigil = Arc::new(Vigil::new(Duration::ZERO, host.clock()));
    let shard = Shard { index: 0, runtime: tokio::runtime::Handle::current(), vigil };
    crate::session::handshake::open(host, &hello, shard).await.unwrap()
}

fn page(number: u64) -> AddrRange {
    AddrRange::new(number << 12, (number + 1) << 12).unwrap()
}

fn subscribe(address_space: AddressSpaceId, request: u64, number: u64) -> Subscribe {
    Subscribe {
        request: RequestId::new(request).unwrap(),
        address_space,
        ranges: vec![page(number)],
        causes: CauseSet::EVERY,
        wants_end: false,
    }
}

/// Everything about a session that what a device says could change.
fn standing(handle: &SessionHandle) -> (Vec<String>, String) {
    let said = handle.state.lock().line.answers.iter().map(|says| format!("{says:?}")).collect();
    let standing = handle.standing();
    let counts = (standing.subscriptions, standing.unacked, standing.pending, standing.faults_in_flight);
    let state = (standing.phase, standing.lease_expires, counts, handle.state.lock().line.closed);
    (said, format!("{state:?}"))
}

/// The task of an earlier stream may have read a message, and come to apply it only after the resume.
#[tokio::test]
async fn what_came_in_on_an_earlier_stream_changes_nothing() {
    let host = host();
    let space = host.register("test", Arc::new(Never)).unwrap();
    let Opened { handle, line: old, .. } = come(&host, None).await;
    handle.subscribe(&host, old, subscribe(space, 1, 1));
    let round = {
        let host = host.clone();
        tokio::spawn(async move {
            let range = page(1);
            let call = Invalidation {
                address_space: space,
                range,
                cause: Cause::Unmap,
                owner: None,
                wait: Wait::ForTargets,
                resident_pages: None,
            };
            host.invalidate_range_start(call).await
        })
    };
    while handle.standing().pending == 0 {
        tokio::task::yield_now().await;
    }
    {
        let mut state = handle.state.lock();
        assert_eq!(state.session.take_notices(8, host.clock().now()).len(), 1);
    }
    let point = ResumePoint {
        session: handle.id,
        host_incarnation: host.incarnation(),
        received_through: Some(NoticeNumber::FIRST),
        attempt: 0,
    };
    let resumed = come(&host, Some(point)).await;
    assert!(Arc::ptr_eq(&resumed.handle, &handle) && resumed.line > old);
    let before = standing(&handle);
    assert_eq!(before.0.len(), 1, "the Welcome, and no answer of the old stream: {before:?}");

    let ack = Ack { through: Some(NoticeNumber::FIRST), ..Ack::default() };
    handle.on_ack(old, &ack);
    handle.on_ack(old, &Ack { through: NoticeNumber::new(99), ..Ack::default() });
    handle.subscribe(&host, old, subscribe(space, 2, 2));
    handle.unsubscribe(&host, old, RequestId::MIN, SubscriptionId::FIRST);
    let address_space = space;
    let wanted = Fault {
        request: RequestId::MIN,
        address_space,
        range: page(1),
        access: Access::Read,
        wants_data: false,
    };
    fault::start(&host, &handle, old, wanted);
    handle.end_on(old, shootdown_proto::error::Reason::MessageTooLarge, "too large");
    handle.refuse(old, shootdown_proto::error::Reason::FieldInvalid, "wrong", None);
    handle.on_severed(old);
    handle.on_left(old);
    assert_eq!(standing(&handle), before);
    assert!(handle.is_up(resumed.line) && !handle.is_up(old));
    assert!(!round.is_finished());

    handle.on_ack(resumed.line, &ack);
    assert!(round.await.unwrap().unwrap().is_quiesced());
}

/// A subscription that was being published when the stream was lost is answered once, on the stream on which it
/// was asked for last.
#[tokio::test]
async fn a_subscription_is_answered_on_the_stream_on_which_it_was_asked_for_last() {
    let host = host();
    let space = host.register("test", Arc::new(Never)).unwrap();
    let Opened { handle, line: old, .. } = come(&host, None).await;
    handle.subscribe(&host, old, subscribe(space, 1, 1));
    let ask = subscribe(space, 7, 2);
    // As `subscribe` leaves it before it is published.
    let id = host.directory().next_subscription();
    {
        let mut state = handle.state.lock();
        state.session.try_subscribe(1).unwrap();
        let (space, asked) =
            (host.directory().get(space).unwrap(), crate::session::Asked { request: ask.request, on: old });
        state.hold(
            id,
            crate::session::Held {
                space,
                ranges: ask.ranges.clone(),
                causes: ask.causes,
                asked,
                answer: None,
            },
        );
    }
    let point = ResumePoint {
        session: handle.id,
        host_incarnation: host.incarnation(),
        received_through: None,
        attempt: 0,
    };
    let new = come(&host, Some(point)).await.line;
    let answer = HostSays::Subscribed { request: ask.request, subscription: id, seq: None };
    let told = |handle: &SessionHandle| {
        handle.state.lock().line.answers.iter().filter(|says| **says == answer).count()
    };
    handle.subscribe(&host, new, ask.clone());
    assert_eq!(told(&handle), 0, "it is not published yet");
    handle.published(old, id, answer.clone());
    assert_eq!(told(&handle), 1);
    assert_eq!(handle.standing().subscriptions, 2, "and there is one of it");
}
