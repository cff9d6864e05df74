//! The wire's edge: whatever comes in becomes a core type or a typed error, and what goes out comes back
//! the same.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::time::Duration;

use proptest::prelude::*;
use prost::Message as _;
use shootdown_core::{
    Access, Ack, AddrRange, AddressSpaceId, Cause, CauseSet, DeviceId, Epoch, FlushReason, FlushReport,
    FlushTiming, FrameNumber, Incarnation, Moment, Notice, NoticeKind, NoticeNumber, OwnerTag, PageSize,
    Scope, Seq, SessionId, SubscriptionId, Translation,
};
use shootdown_proto::error::{Malformed, Reason};
use shootdown_proto::message::{
    Decline, DeviceSays, Fault, FaultAsked, FaultId, Grant, Hello, HostSays, RequestId, Resume, ResumePoint,
    SessionError, SourceSays, Subscribe, Welcome,
};
use shootdown_proto::v1;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    /// No byte that a peer can send makes either end panic.
    #[test]
    fn any_bytes_become_a_message_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
        if let Ok(wire) = v1::SessionRequest::decode(&bytes[..]) {
            drop(DeviceSays::try_from(wire));
        }
        if let Ok(wire) = v1::SessionResponse::decode(&bytes[..]) {
            drop(HostSays::try_from(wire));
        }
        if let Ok(wire) = v1::ServeFaultsRequest::decode(&bytes[..]) {
            drop(SourceSays::try_from(wire));
        }
        if let Ok(wire) = v1::ServeFaultsResponse::decode(&bytes[..]) {
            drop(FaultAsked::try_from(wire));
        }
    }
}

fn page(number: u64) -> AddrRange {
    AddrRange::new(number << 12, (number + 1) << 12).unwrap()
}

fn translation() -> Translation {
    Translation { range: page(7), frame: FrameNumber(0), access: Access::Write }
}

fn notice(kind: NoticeKind, scope: Scope) -> Notice {
    let all = scope == Scope::FlushAll;
    Notice {
        number: NoticeNumber::new(9).unwrap(),
        kind,
        scope,
        seq: (!all).then(|| Seq::new(12).unwrap()),
        cause: Cause::Migrate,
        owner: if all { None } else { OwnerTag::new(3) },
        flush_reason: all.then_some(FlushReason::OutboxFull),
    }
}

#[test]
fn what_a_device_says_comes_back_the_same() {
    let request = RequestId::new(5).unwrap();
    let address_space = AddressSpaceId::new(2).unwrap();
    let report = FlushReport {
        notice: NoticeNumber::new(4).unwrap(),
        young: vec![page(1)],
        dirty: vec![AddrRange::ALL],
        timing: Some(FlushTiming { received: Moment::from_nanos(1), flushed: Moment::from_nanos(2) }),
    };
    for says in [
        DeviceSays::Hello(Hello {
            device: DeviceId::new("gpu").unwrap(),
            incarnation: Incarnation::new(8).unwrap(),
            versions: vec![1],
            window: Some(16),
            page_sizes: vec![PageSize::BASE, PageSize::HUGE],
            enforces_lease: true,
            change_pte: true,
            resume: Some(ResumePoint {
                session: SessionId::new(6).unwrap(),
                host_incarnation: Incarnation::new(7).unwrap(),
                received_through: None,
                attempt: 9,
            }),
            clock_id: "boot".to_owned(),
        }),
        DeviceSays::Subscribe(Subscribe {
            request,
            address_space,
            ranges: vec![page(1), AddrRange::new(u64::MAX - 4095, 0).unwrap(), AddrRange::ALL],
            causes: CauseSet::of([Cause::Unmap]),
            wants_end: true,
        }),
        DeviceSays::Unsubscribe { request, subscription: SubscriptionId::new(1).unwrap() },
        DeviceSays::Fault(Fault {
            request,
            address_space,
            range: page(3),
            access: Access::Read,
            wants_data: true,
        }),
        DeviceSays::Ack {
            session: SessionId::new(6),
            ack: Ack {
                through: NoticeNumber::new(3),
                selective: vec![NoticeNumber::new(4).unwrap()],
                reports: vec![report],
            },
        },
        DeviceSays::Young { address_space, ranges: vec![page(1)] },
        DeviceSays::Heartbeat { request },
        DeviceSays::Leave,
    ] {
        let wire = v1::SessionRequest::from(says.clone());
        assert_eq!(DeviceSays::try_from(wire), Ok(says));
    }
}

#[test]
fn what_a_host_agent_says_comes_back_the_same() {
    let request = RequestId::new(5).unwrap();
    let address_space = AddressSpaceId::new(2).unwrap();
    let kinds = [
        NoticeKind::RangeEnd,
        NoticeKind::ClearYoung,
        NoticeKind::ClearFlushYoung,
        NoticeKind::ChangePte(translation()),
        NoticeKind::Invalidate,
        NoticeKind::Release,
    ];
    let mut notices: Vec<Notice> =
        kinds.into_iter().map(|kind| notice(kind, Scope::Range(address_space, page(7)))).collect();
    notices.push(notice(NoticeKind::Invalidate, Scope::FlushAll));
    for says in [
        HostSays::Welcome(Welcome {
            session: SessionId::new(6).unwrap(),
            host_incarnation: Incarnation::new(7).unwrap(),
            version: 1,
            lease: Duration::from_secs(5),
            window: 64,
            epoch: Epoch::new(4).unwrap(),
            retained_floor: None,
            resume: Resume::Flush,
            page_size: PageSize::BASE,
            wants_timing: true,
        }),
        HostSays::Subscribed { request, subscription: SubscriptionId::new(1).unwrap(), seq: None },
        HostSays::Unsubscribed { request, subscription: SubscriptionId::new(1).unwrap() },
        HostSays::Grant(Grant {
            request,
            address_space,
            seq: Seq::new(1),
            translations: vec![translation()],
            data: vec![1, 2, 3].into(),
        }),
        HostSays::Notices(notices),
        HostSays::LeaseRenewed { request, lease: Duration::from_millis(50) },
        HostSays::Drain { deadline: Duration::from_secs(1), resumable: true },
        HostSays::Error(SessionError {
            supported_versions: vec![1],
            ..SessionError::fatal(Reason::VersionUnsupported, "no version in common")
        }),
    ] {
        let wire = v1::SessionResponse::from(says.clone());
        assert_eq!(HostSays::try_from(wire), Ok(says));
    }
}

#[test]
fn what_a_source_says_of_faults_and_is_asked_comes_back_the_same() {
    let fault = FaultId::new(5).unwrap();
    let declined = |why| SourceSays::Declined { fault, why, address: 7 << 12 };
    for says in [
        SourceSays::Open { address_space: AddressSpaceId::new(2).unwrap() },
        SourceSays::Translated { fault, translations: vec![translation()] },
        declined(Decline::Unmapped),
        declined(Decline::Access),
        declined(Decline::OutOfMemory),
    ] {
        let wire = v1::ServeFaultsRequest::from(says.clone());
        assert_eq!(SourceSays::try_from(wire), Ok(says));
    }
    let asked = FaultAsked { fault, range: page(7), access: Access::Write };
    let wire = v1::ServeFaultsResponse::from(asked);
    assert_eq!(FaultAsked::try_from(wire), Ok(asked));
}

#[test]
fn the_id_of_a_call_is_none_or_at_most_64_bytes() {
    let convert = shootdown_proto::convert::call_id;
    assert_eq!(convert(""), Ok(None));
    assert!(convert(&"x".repeat(64)).unwrap().is_some());
    assert_eq!(convert("a"), convert("a"));
    assert_ne!(convert("a"), convert("b"));
    assert!(matches!(convert(&"x".repeat(65)), Err(Malformed::TooLong { length: 65, most: 64, .. })));
}

/// What a device does not know must never let it keep a translation.
#[test]
fn an_unknown_kind_cause_or_answer_is_taken_for_the_strongest() {
    let wire = v1::Notice {
        number: 1,
        kind: 99,
        address_space_id: 1,
        range: Some(v1::AddressRange { start: 4096, end: 8192, all: false }),
        cause: 99,
        ..v1::Notice::default()
    };
    let notice = Notice::try_from(wire).unwrap();
    assert_eq!((notice.kind, notice.cause), (NoticeKind::Invalidate, Cause::Unmap));
    let welcome = v1::Welcome {
        session_id: 1,
        host_incarnation: 1,
        lease_ms: 1,
        window: 1,
        epoch: 1,
        page_size: 4096,
        resume: 99,
        ..v1::Welcome::default()
    };
    assert_eq!(Welcome::try_from(welcome).unwrap().resume, Resume::Flush);
}

#[test]
fn a_translation_is_one_aligned_page() {
    let wire = |start, end| v1::Translation {
        range: Some(v1::AddressRange { start, end, all: false }),
        frame: 1,
        access: v1::Access::Read.into(),
    };
    let convert = shootdown_proto::convert::translation;
    assert!(convert(wire(0x1000, 0x2000)).is_ok());
    assert!(convert(wire(0x20_0000, 0x40_0000)).is_ok());
    for (start, end) in [(0x1000, 0x4000), (0x1000, 0x20_1000), (0x1000, 0x3000)] {
        assert!(matches!(convert(wire(start, end)), Err(Malformed::Value { .. })), "{start:#x}");
    }
}
