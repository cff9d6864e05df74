//! Wire -> core at the receiver, core -> wire at the sender. Nothing else in the workspace looks
//! into a protobuf message of a session.

use std::num::NonZeroU64;
use std::time::Duration;

use shootdown_core::{
    Access, Ack, AddrRange, AddressSpaceId, Cause, CauseSet, DeviceId, Epoch, FlushReason, FlushReport,
    FlushTiming, FrameNumber, Incarnation, Moment, Notice, NoticeKind, NoticeNumber, OwnerTag, PageSize,
    Scope, Seq, SessionId, SubscriptionId, Translation,
};

use crate::error::{Malformed, Reason};
use crate::message::{
    DeviceSays, Fault, FrameSpan, Grant, Hello, HostSays, MAX_FAULT_DATA_PAGES, MAX_FAULT_PAGES,
    MAX_NOTICES_A_MESSAGE, MAX_RANGES_A_MESSAGE, MAX_SPANS, RequestId, Resume, ResumePoint, SessionError,
    Subscribe, Welcome,
};
use crate::v1;

// ---- words ------------------------------------------------------------------------------------

/// The page size that every range on the wire is made of.
const BASE: PageSize = PageSize::BASE;

macro_rules! nonzero {
    ($name:ident, $type:ty) => {
        /// # Errors
        /// [`Malformed::Zero`].
        pub fn $name(value: u64, field: &'static str) -> Result<$type, Malformed> {
            <$type>::new(value).ok_or(Malformed::Zero { field })
        }
    };
}
nonzero!(address_space_id, AddressSpaceId);
nonzero!(session_id, SessionId);
nonzero!(subscription_id, SubscriptionId);
nonzero!(incarnation, Incarnation);
nonzero!(epoch, Epoch);
nonzero!(seq, Seq);
nonzero!(notice_number, NoticeNumber);
nonzero!(request_id, RequestId);

fn list<T>(items: Vec<T>, most: usize, field: &'static str) -> Result<Vec<T>, Malformed> {
    if items.len() > most {
        return Err(Malformed::TooLong { field, length: items.len(), most });
    }
    Ok(items)
}

fn present<T>(item: Option<T>, field: &'static str) -> Result<T, Malformed> {
    item.ok_or(Malformed::Missing { field })
}

/// # Errors
/// [`Malformed`] when the range is empty, inverted, unaligned, or both whole and bounded.
pub fn range(wire: v1::AddressRange) -> Result<AddrRange, Malformed> {
    match wire {
        v1::AddressRange { start: 0, end: 0, all: true } => Ok(AddrRange::ALL),
        v1::AddressRange { all: true, .. } => Err(Malformed::AllWithEnds),
        v1::AddressRange { start, end, all: false } => Ok(AddrRange::page_aligned(start, end, BASE)?),
    }
}

/// # Errors
/// [`Malformed`] as for [`range()`], and when the field is absent.
pub fn required_range(wire: Option<v1::AddressRange>, field: &'static str) -> Result<AddrRange, Malformed> {
    range(present(wire, field)?)
}

/// # Errors
/// As for [`required_range()`], and when it is the whole address space.
pub fn bounded_range(wire: Option<v1::AddressRange>, field: &'static str) -> Result<AddrRange, Malformed> {
    match required_range(wire, field)? {
        range if range.is_all() => Err(Malformed::Unbounded { field }),
        range => Ok(range),
    }
}

/// A range for the wire.
#[must_use]
pub fn wire_range(range: AddrRange) -> v1::AddressRange {
    if range.is_all() {
        v1::AddressRange { start: 0, end: 0, all: true }
    } else {
        v1::AddressRange { start: range.start(), end: range.wire_end(), all: false }
    }
}

fn ranges(wire: Vec<v1::AddressRange>, field: &'static str) -> Result<Vec<AddrRange>, Malformed> {
    list(wire, MAX_RANGES_A_MESSAGE, field)?.into_iter().map(range).collect()
}

/// # Errors
/// [`Malformed::Value`] when it is not a cause that version 1 knows.
pub fn cause(wire: i32) -> Result<Cause, Malformed> {
    match v1::Cause::try_from(wire) {
        Ok(v1::Cause::Unmap) => Ok(Cause::Unmap),
        Ok(v1::Cause::Clear) => Ok(Cause::Clear),
        Ok(v1::Cause::ProtectionVma) => Ok(Cause::ProtectionVma),
        Ok(v1::Cause::ProtectionPage) => Ok(Cause::ProtectionPage),
        Ok(v1::Cause::SoftDirty) => Ok(Cause::SoftDirty),
        Ok(v1::Cause::Release) => Ok(Cause::Release),
        Ok(v1::Cause::Migrate) => Ok(Cause::Migrate),
        Ok(v1::Cause::Exclusive) => Ok(Cause::Exclusive),
        Ok(v1::Cause::Unspecified) | Err(_) => {
            Err(Malformed::Value { field: "cause", value: wire as u64, expected: "one of the named causes" })
        }
    }
}

/// A cause for the wire.
#[must_use]
pub fn wire_cause(cause: Cause) -> v1::Cause {
    match cause {
        Cause::Unmap => v1::Cause::Unmap,
        Cause::Clear => v1::Cause::Clear,
        Cause::ProtectionVma => v1::Cause::ProtectionVma,
        Cause::ProtectionPage => v1::Cause::ProtectionPage,
        Cause::SoftDirty => v1::Cause::SoftDirty,
        Cause::Release => v1::Cause::Release,
        Cause::Migrate => v1::Cause::Migrate,
        Cause::Exclusive => v1::Cause::Exclusive,
    }
}

/// # Errors
/// [`Malformed::Value`] when it is not an access that version 1 knows.
pub fn access(wire: i32) -> Result<Access, Malformed> {
    match v1::Access::try_from(wire) {
        Ok(v1::Access::Read) => Ok(Access::Read),
        Ok(v1::Access::Write) => Ok(Access::Write),
        Ok(v1::Access::Unspecified) | Err(_) => Err(Malformed::Value {
            field: "access",
            value: wire as u64,
            expected: "ACCESS_READ or ACCESS_WRITE",
        }),
    }
}

/// An access for the wire.
#[must_use]
pub fn wire_access(access: Access) -> v1::Access {
    match access {
        Access::Read => v1::Access::Read,
        Access::Write => v1::Access::Write,
    }
}

/// # Errors
/// [`Malformed`] when a field is.
pub fn translation(wire: v1::Translation) -> Result<Translation, Malformed> {
    let range = bounded_range(wire.range, "translation.range")?;
    let length = range.length().unwrap_or(0);
    if PageSize::from_bytes(length).is_none_or(|page| range.start() & page.offset_mask() != 0) {
        let expected = "one page: its length a power of two, its start a multiple of that";
        return Err(Malformed::Value { field: "translation.range (bytes)", value: length, expected });
    }
    Ok(Translation { range, frame: FrameNumber(wire.frame), access: access(wire.access)? })
}

/// A translation for the wire.
#[must_use]
pub fn wire_translation(translation: Translation) -> v1::Translation {
    v1::Translation {
        range: Some(wire_range(translation.range)),
        frame: translation.frame.0,
        access: wire_access(translation.access).into(),
    }
}

fn millis(value: u64, field: &'static str) -> Result<Duration, Malformed> {
    if value == 0 { Err(Malformed::Zero { field }) } else { Ok(Duration::from_millis(value)) }
}

fn wire_millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

// ---- device -> host agent ---------------------------------------------------------------------

impl TryFrom<v1::SessionRequest> for DeviceSays {
    type Error = Malformed;

    fn try_from(wire: v1::SessionRequest) -> Result<Self, Malformed> {
        use v1::session_request::Message;
        match wire.message.ok_or(Malformed::Unknown)? {
            Message::Hello(hello) => Ok(Self::Hello(hello.try_into()?)),
            Message::Subscribe(subscribe) => Ok(Self::Subscribe(subscribe.try_into()?)),
            Message::Unsubscribe(v1::Unsubscribe { request_id: id, subscription_id: subscription }) => {
                Ok(Self::Unsubscribe {
                    request: request_id(id, "unsubscribe.request_id")?,
                    subscription: subscription_id(subscription, "unsubscribe.subscription_id")?,
                })
            }
            Message::Fault(fault) => Ok(Self::Fault(fault.try_into()?)),
            Message::Ack(ack) => {
                Ok(Self::Ack { session: SessionId::new(ack.session_id), ack: ack.try_into()? })
            }
            Message::Young(v1::Young { address_space_id: id, ranges: wire }) => Ok(Self::Young {
                address_space: address_space_id(id, "young.address_space_id")?,
                ranges: ranges(wire, "young.ranges")?,
            }),
            Message::Heartbeat(v1::Heartbeat { request_id: id }) => {
                Ok(Self::Heartbeat { request: request_id(id, "heartbeat.request_id")? })
            }
            Message::Leave(v1::Leave {}) => Ok(Self::Leave),
        }
    }
}

/// The request that a message makes, read before it is known to be well-formed: a refusal can then name
/// what it refuses.
#[must_use]
pub fn request_of(wire: &v1::SessionRequest) -> Option<RequestId> {
    use v1::session_request::Message;
    let request = match wire.message.as_ref()? {
        Message::Subscribe(subscribe) => subscribe.request_id,
        Message::Unsubscribe(unsubscribe) => unsubscribe.request_id,
        Message::Fault(fault) => fault.request_id,
        Message::Heartbeat(heartbeat) => heartbeat.request_id,
        Message::Hello(_) | Message::Ack(_) | Message::Young(_) | Message::Leave(_) => 0,
    };
    RequestId::new(request)
}

impl TryFrom<v1::Hello> for Hello {
    type Error = Malformed;

    fn try_from(wire: v1::Hello) -> Result<Self, Malformed> {
        /// More would be noise: versions and page sizes are few.
        const MOST: usize = 32;
        if wire.clock_id.len() > DeviceId::MAX_BYTES {
            let (length, most) = (wire.clock_id.len(), DeviceId::MAX_BYTES);
            return Err(Malformed::TooLong { field: "hello.clock_id", length, most });
        }
        let page_sizes = list(wire.page_sizes, MOST, "hello.page_sizes")?
            .into_iter()
            .map(|bytes| page_size(bytes, "hello.page_sizes"))
            .collect::<Result<Vec<_>, _>>()?;
        let capabilities = wire.capabilities.unwrap_or_default();
        Ok(Self {
            device: DeviceId::new(&wire.device_id)?,
            incarnation: incarnation(wire.incarnation, "hello.incarnation")?,
            versions: list(wire.protocol_versions, MOST, "hello.protocol_versions")?,
            window: (wire.window != 0).then_some(wire.window),
            page_sizes: if page_sizes.is_empty() { vec![BASE] } else { page_sizes },
            enforces_lease: capabilities.enforces_lease,
            change_pte: capabilities.change_pte,
            resume: wire.resume.map(ResumePoint::try_from).transpose()?,
            clock_id: wire.clock_id,
        })
    }
}

fn page_size(bytes: u64, field: &'static str) -> Result<PageSize, Malformed> {
    PageSize::from_bytes(bytes).ok_or(Malformed::Value {
        field,
        value: bytes,
        expected: "a power of two from 4096 to 2^48",
    })
}

impl TryFrom<v1::ResumePoint> for ResumePoint {
    type Error = Malformed;

    fn try_from(wire: v1::ResumePoint) -> Result<Self, Malformed> {
        Ok(Self {
            session: session_id(wire.session_id, "hello.resume.session_id")?,
            host_incarnation: incarnation(wire.host_incarnation, "hello.resume.host_incarnation")?,
            acked_through: NoticeNumber::new(wire.acked_through),
        })
    }
}

impl TryFrom<v1::Subscribe> for Subscribe {
    type Error = Malformed;

    fn try_from(wire: v1::Subscribe) -> Result<Self, Malformed> {
        let ranges = ranges(wire.ranges, "subscribe.ranges")?;
        if ranges.is_empty() {
            return Err(Malformed::Missing { field: "subscribe.ranges" });
        }
        let causes = list(wire.causes, Cause::EVERY.len(), "subscribe.causes")?
            .into_iter()
            .map(cause)
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            request: request_id(wire.request_id, "subscribe.request_id")?,
            address_space: address_space_id(wire.address_space_id, "subscribe.address_space_id")?,
            ranges,
            causes: if causes.is_empty() { CauseSet::EVERY } else { CauseSet::of(causes) },
            wants_end: wire.wants_end,
        })
    }
}

impl TryFrom<v1::Fault> for Fault {
    type Error = Malformed;

    fn try_from(wire: v1::Fault) -> Result<Self, Malformed> {
        let range = bounded_range(wire.range, "fault.range")?;
        let pages = (range.last() - range.start()) / BASE.bytes() + 1;
        let (most, expected) = if wire.wants_data {
            (MAX_FAULT_DATA_PAGES, "at most 64 pages together with their bytes")
        } else {
            (MAX_FAULT_PAGES, "at most 512 pages")
        };
        if pages > most {
            return Err(Malformed::Value { field: "fault.range (pages)", value: pages, expected });
        }
        Ok(Self {
            request: request_id(wire.request_id, "fault.request_id")?,
            address_space: address_space_id(wire.address_space_id, "fault.address_space_id")?,
            range,
            access: access(wire.access)?,
            wants_data: wire.wants_data,
        })
    }
}

impl TryFrom<v1::Ack> for Ack {
    type Error = Malformed;

    fn try_from(wire: v1::Ack) -> Result<Self, Malformed> {
        Ok(Self {
            through: NoticeNumber::new(wire.through),
            selective: list(wire.selective, MAX_NOTICES_A_MESSAGE, "ack.selective")?
                .into_iter()
                .map(|number| notice_number(number, "ack.selective"))
                .collect::<Result<_, _>>()?,
            reports: list(wire.reports, MAX_NOTICES_A_MESSAGE, "ack.reports")?
                .into_iter()
                .map(FlushReport::try_from)
                .collect::<Result<_, _>>()?,
        })
    }
}

impl TryFrom<v1::FlushReport> for FlushReport {
    type Error = Malformed;

    fn try_from(wire: v1::FlushReport) -> Result<Self, Malformed> {
        Ok(Self {
            notice: notice_number(wire.notice, "ack.reports.notice")?,
            young: ranges(wire.young, "ack.reports.young")?,
            dirty: ranges(wire.dirty, "ack.reports.dirty")?,
            timing: wire.timing.map(|timing| FlushTiming {
                received: Moment::from_nanos(timing.received_ns),
                flushed: Moment::from_nanos(timing.flushed_ns),
            }),
        })
    }
}

impl From<DeviceSays> for v1::SessionRequest {
    fn from(says: DeviceSays) -> Self {
        use v1::session_request::Message;
        let message = match says {
            DeviceSays::Hello(hello) => Message::Hello(hello.into()),
            DeviceSays::Subscribe(subscribe) => Message::Subscribe(v1::Subscribe {
                request_id: subscribe.request.get(),
                address_space_id: subscribe.address_space.get(),
                ranges: subscribe.ranges.into_iter().map(wire_range).collect(),
                causes: wire_causes(subscribe.causes),
                wants_end: subscribe.wants_end,
            }),
            DeviceSays::Unsubscribe { request, subscription } => Message::Unsubscribe(v1::Unsubscribe {
                request_id: request.get(),
                subscription_id: subscription.get(),
            }),
            DeviceSays::Fault(fault) => Message::Fault(v1::Fault {
                request_id: fault.request.get(),
                address_space_id: fault.address_space.get(),
                range: Some(wire_range(fault.range)),
                access: wire_access(fault.access).into(),
                wants_data: fault.wants_data,
            }),
            DeviceSays::Ack { session, ack } => Message::Ack(wire_ack(session, ack)),
            DeviceSays::Young { address_space, ranges } => Message::Young(v1::Young {
                address_space_id: address_space.get(),
                ranges: ranges.into_iter().map(wire_range).collect(),
            }),
            DeviceSays::Heartbeat { request } => {
                Message::Heartbeat(v1::Heartbeat { request_id: request.get() })
            }
            DeviceSays::Leave => Message::Leave(v1::Leave {}),
        };
        Self { message: Some(message) }
    }
}

/// The causes of a set; empty where it holds every one.
#[must_use]
pub fn wire_causes(causes: CauseSet) -> Vec<i32> {
    if causes == CauseSet::EVERY {
        return Vec::new();
    }
    Cause::EVERY
        .into_iter()
        .filter(|cause| causes.contains(*cause))
        .map(|cause| wire_cause(cause).into())
        .collect()
}

impl From<Hello> for v1::Hello {
    fn from(hello: Hello) -> Self {
        Self {
            device_id: hello.device.as_str().to_owned(),
            incarnation: hello.incarnation.get(),
            protocol_versions: hello.versions,
            window: hello.window.unwrap_or(0),
            page_sizes: hello.page_sizes.into_iter().map(PageSize::bytes).collect(),
            capabilities: Some(v1::Capabilities {
                enforces_lease: hello.enforces_lease,
                change_pte: hello.change_pte,
            }),
            resume: hello.resume.map(|resume| v1::ResumePoint {
                session_id: resume.session.get(),
                host_incarnation: resume.host_incarnation.get(),
                acked_through: resume.acked_through.map_or(0, NoticeNumber::get),
            }),
            clock_id: hello.clock_id,
        }
    }
}

fn wire_ack(session: Option<SessionId>, ack: Ack) -> v1::Ack {
    v1::Ack {
        session_id: session.map_or(0, SessionId::get),
        through: ack.through.map_or(0, NoticeNumber::get),
        selective: ack.selective.into_iter().map(NoticeNumber::get).collect(),
        reports: ack
            .reports
            .into_iter()
            .map(|report| v1::FlushReport {
                notice: report.notice.get(),
                young: report.young.into_iter().map(wire_range).collect(),
                dirty: report.dirty.into_iter().map(wire_range).collect(),
                timing: report.timing.map(|timing| v1::FlushTiming {
                    received_ns: timing.received.as_nanos(),
                    flushed_ns: timing.flushed.as_nanos(),
                }),
            })
            .collect(),
    }
}

// ---- host agent -> device ---------------------------------------------------------------------

impl TryFrom<v1::SessionResponse> for HostSays {
    type Error = Malformed;

    fn try_from(wire: v1::SessionResponse) -> Result<Self, Malformed> {
        use v1::session_response::Message;
        match wire.message.ok_or(Malformed::Unknown)? {
            Message::Welcome(welcome) => Ok(Self::Welcome(welcome.try_into()?)),
            Message::Subscribed(subscribed) => Ok(Self::Subscribed {
                request: request_id(subscribed.request_id, "subscribed.request_id")?,
                subscription: subscription_id(subscribed.subscription_id, "subscribed.subscription_id")?,
                seq: Seq::new(subscribed.seq),
            }),
            Message::Unsubscribed(unsubscribed) => Ok(Self::Unsubscribed {
                request: request_id(unsubscribed.request_id, "unsubscribed.request_id")?,
                subscription: subscription_id(unsubscribed.subscription_id, "unsubscribed.subscription_id")?,
            }),
            Message::Grant(grant) => Ok(Self::Grant(grant.try_into()?)),
            Message::Notices(v1::Notices { notices }) => Ok(Self::Notices(
                list(notices, MAX_NOTICES_A_MESSAGE, "notices.notices")?
                    .into_iter()
                    .map(Notice::try_from)
                    .collect::<Result<_, _>>()?,
            )),
            Message::LeaseRenewed(renewed) => Ok(Self::LeaseRenewed {
                request: request_id(renewed.request_id, "lease_renewed.request_id")?,
                lease: millis(renewed.lease_ms, "lease_renewed.lease_ms")?,
            }),
            Message::Drain(v1::Drain { deadline_ms }) => {
                Ok(Self::Drain { deadline: Duration::from_millis(deadline_ms) })
            }
            Message::Error(error) => Ok(Self::Error(error.into())),
        }
    }
}

impl TryFrom<v1::Welcome> for Welcome {
    type Error = Malformed;

    fn try_from(wire: v1::Welcome) -> Result<Self, Malformed> {
        if wire.window == 0 {
            return Err(Malformed::Zero { field: "welcome.window" });
        }
        Ok(Self {
            session: session_id(wire.session_id, "welcome.session_id")?,
            host_incarnation: incarnation(wire.host_incarnation, "welcome.host_incarnation")?,
            version: wire.protocol_version,
            lease: millis(wire.lease_ms, "welcome.lease_ms")?,
            window: wire.window,
            epoch: epoch(wire.epoch, "welcome.epoch")?,
            retained_floor: NoticeNumber::new(wire.retained_floor),
            resume: match v1::Resume::try_from(wire.resume) {
                Ok(v1::Resume::Continue) => Resume::Continue,
                // What a device does not understand must never let it keep a translation.
                Ok(v1::Resume::Flush | v1::Resume::Unspecified) | Err(_) => Resume::Flush,
            },
            page_size: page_size(wire.page_size, "welcome.page_size")?,
            wants_timing: wire.wants_timing,
        })
    }
}

impl TryFrom<v1::Grant> for Grant {
    type Error = Malformed;

    fn try_from(wire: v1::Grant) -> Result<Self, Malformed> {
        Ok(Self {
            request: request_id(wire.request_id, "grant.request_id")?,
            address_space: address_space_id(wire.address_space_id, "grant.address_space_id")?,
            seq: Seq::new(wire.seq),
            translations: list(wire.translations, MAX_FAULT_PAGES as usize, "grant.translations")?
                .into_iter()
                .map(translation)
                .collect::<Result<_, _>>()?,
            data: wire.data,
        })
    }
}

impl TryFrom<v1::Notice> for Notice {
    type Error = Malformed;

    fn try_from(wire: v1::Notice) -> Result<Self, Malformed> {
        let number = notice_number(wire.number, "notice.number")?;
        // A cause or a kind of a later version is taken for the strongest: widened, never ignored.
        let cause = cause(wire.cause).unwrap_or(Cause::Unmap);
        let Some(address_space) = AddressSpaceId::new(wire.address_space_id) else {
            let reason = match v1::FlushReason::try_from(wire.flush_reason) {
                Ok(v1::FlushReason::NoResume) => FlushReason::NoResume,
                _ => FlushReason::OutboxFull,
            };
            return Ok(Self {
                number,
                kind: NoticeKind::Invalidate,
                scope: Scope::FlushAll,
                seq: None,
                cause,
                owner: None,
                flush_reason: Some(reason),
            });
        };
        let kind = match v1::NoticeKind::try_from(wire.kind) {
            Ok(v1::NoticeKind::ChangePte) => match wire.change_pte.map(translation) {
                Some(translation) => NoticeKind::ChangePte(translation?),
                None => NoticeKind::Invalidate,
            },
            Ok(v1::NoticeKind::ClearFlushYoung) => NoticeKind::ClearFlushYoung,
            Ok(v1::NoticeKind::ClearYoung) => NoticeKind::ClearYoung,
            Ok(v1::NoticeKind::Release) => NoticeKind::Release,
            Ok(v1::NoticeKind::RangeEnd) => NoticeKind::RangeEnd,
            Ok(v1::NoticeKind::Invalidate | v1::NoticeKind::Unspecified) | Err(_) => NoticeKind::Invalidate,
        };
        Ok(Self {
            number,
            kind,
            scope: Scope::Range(address_space, required_range(wire.range, "notice.range")?),
            seq: Seq::new(wire.seq),
            cause,
            owner: OwnerTag::new(wire.owner),
            flush_reason: None,
        })
    }
}

impl From<v1::Error> for SessionError {
    fn from(wire: v1::Error) -> Self {
        Self {
            reason: wire.reason(),
            message: wire.message,
            request: NonZeroU64::new(wire.request_id),
            fatal: wire.fatal,
            supported_versions: wire.supported_versions,
        }
    }
}

impl From<HostSays> for v1::SessionResponse {
    fn from(says: HostSays) -> Self {
        use v1::session_response::Message;
        let message = match says {
            HostSays::Welcome(welcome) => Message::Welcome(welcome.into()),
            HostSays::Subscribed { request, subscription, seq } => Message::Subscribed(v1::Subscribed {
                request_id: request.get(),
                subscription_id: subscription.get(),
                seq: seq.map_or(0, Seq::get),
            }),
            HostSays::Unsubscribed { request, subscription } => Message::Unsubscribed(v1::Unsubscribed {
                request_id: request.get(),
                subscription_id: subscription.get(),
            }),
            HostSays::Grant(grant) => Message::Grant(v1::Grant {
                request_id: grant.request.get(),
                address_space_id: grant.address_space.get(),
                seq: grant.seq.map_or(0, Seq::get),
                translations: grant.translations.into_iter().map(wire_translation).collect(),
                data: grant.data,
            }),
            HostSays::Notices(notices) => {
                Message::Notices(v1::Notices { notices: notices.into_iter().map(v1::Notice::from).collect() })
            }
            HostSays::LeaseRenewed { request, lease } => Message::LeaseRenewed(v1::LeaseRenewed {
                request_id: request.get(),
                lease_ms: wire_millis(lease),
            }),
            HostSays::Drain { deadline } => Message::Drain(v1::Drain { deadline_ms: wire_millis(deadline) }),
            HostSays::Error(error) => Message::Error(v1::Error {
                reason: error.reason.into(),
                message: error.message,
                request_id: error.request.map_or(0, NonZeroU64::get),
                fatal: error.fatal,
                supported_versions: error.supported_versions,
            }),
        };
        Self { message: Some(message) }
    }
}

impl From<Welcome> for v1::Welcome {
    fn from(welcome: Welcome) -> Self {
        Self {
            session_id: welcome.session.get(),
            host_incarnation: welcome.host_incarnation.get(),
            protocol_version: welcome.version,
            lease_ms: wire_millis(welcome.lease),
            window: welcome.window,
            epoch: welcome.epoch.get(),
            retained_floor: welcome.retained_floor.map_or(0, NoticeNumber::get),
            resume: match welcome.resume {
                Resume::Flush => v1::Resume::Flush.into(),
                Resume::Continue => v1::Resume::Continue.into(),
            },
            page_size: welcome.page_size.bytes(),
            wants_timing: welcome.wants_timing,
        }
    }
}

impl From<Notice> for v1::Notice {
    fn from(notice: Notice) -> Self {
        let (kind, change_pte) = match notice.kind {
            NoticeKind::Invalidate => (v1::NoticeKind::Invalidate, None),
            NoticeKind::ChangePte(translation) => {
                (v1::NoticeKind::ChangePte, Some(wire_translation(translation)))
            }
            NoticeKind::ClearFlushYoung => (v1::NoticeKind::ClearFlushYoung, None),
            NoticeKind::ClearYoung => (v1::NoticeKind::ClearYoung, None),
            NoticeKind::Release => (v1::NoticeKind::Release, None),
            NoticeKind::RangeEnd => (v1::NoticeKind::RangeEnd, None),
        };
        let (address_space_id, range) = match notice.scope {
            Scope::Range(id, range) => (id.get(), Some(wire_range(range))),
            Scope::FlushAll => (0, None),
        };
        let flush_reason = match notice.flush_reason {
            None => v1::FlushReason::Unspecified,
            Some(FlushReason::OutboxFull) => v1::FlushReason::OutboxFull,
            Some(FlushReason::NoResume) => v1::FlushReason::NoResume,
        };
        Self {
            number: notice.number.get(),
            kind: kind.into(),
            address_space_id,
            range,
            seq: notice.seq.map_or(0, Seq::get),
            cause: wire_cause(notice.cause).into(),
            owner: notice.owner.map_or(0, OwnerTag::get),
            change_pte,
            flush_reason: flush_reason.into(),
        }
    }
}

// ---- bulk bytes -------------------------------------------------------------------------------

/// # Errors
/// [`Malformed`] when a span is empty or leaves its frame, or there are none or too many.
pub fn spans(wire: Vec<v1::FrameSpan>) -> Result<Vec<FrameSpan>, Malformed> {
    if wire.is_empty() {
        return Err(Malformed::Missing { field: "spans" });
    }
    list(wire, MAX_SPANS, "spans")?
        .into_iter()
        .map(|span| {
            if span.length == 0 {
                return Err(Malformed::Zero { field: "spans.length" });
            }
            let end = u64::from(span.offset) + u64::from(span.length);
            if end > BASE.bytes() {
                let expected = "offset + length at most 4096";
                return Err(Malformed::Value { field: "spans", value: end, expected });
            }
            Ok(FrameSpan { frame: FrameNumber(span.frame), offset: span.offset, length: span.length })
        })
        .collect()
}

impl From<FrameSpan> for v1::FrameSpan {
    fn from(span: FrameSpan) -> Self {
        Self { frame: span.frame.0, offset: span.offset, length: span.length }
    }
}

impl SessionError {
    /// The error that tells of a malformed message. It is not fatal: nothing of it took effect.
    #[must_use]
    pub fn malformed(malformed: &Malformed, request: Option<RequestId>) -> Self {
        Self {
            reason: malformed.reason(),
            message: malformed.to_string(),
            request,
            fatal: false,
            supported_versions: Vec::new(),
        }
    }

    /// An error that ends the session.
    #[must_use]
    pub fn fatal(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), request: None, fatal: true, supported_versions: Vec::new() }
    }

    /// An error that refuses one request and leaves the session as it is.
    #[must_use]
    pub fn refused(reason: Reason, message: impl Into<String>, request: Option<RequestId>) -> Self {
        Self { reason, message: message.into(), request, fatal: false, supported_versions: Vec::new() }
    }
}
