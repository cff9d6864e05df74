//! What a device says: device -> host agent.

use shootdown_core::{
    Ack, Cause, CauseSet, DeviceId, FlushReport, FlushTiming, Moment, NoticeNumber, PageSize, SessionId,
};

use super::{
    BASE, access, address_space_id, bounded_range, cause, incarnation, list, notice_number, page_size,
    ranges, request_id, session_id, subscription_id, wire_access, wire_causes, wire_range,
};
use crate::error::Malformed;
use crate::message::{
    DeviceSays, Fault, Hello, MAX_FAULT_DATA_PAGES, MAX_FAULT_PAGES, MAX_NOTICES_A_MESSAGE, RequestId,
    ResumePoint, Subscribe,
};
use crate::v1;

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

impl TryFrom<v1::ResumePoint> for ResumePoint {
    type Error = Malformed;

    fn try_from(wire: v1::ResumePoint) -> Result<Self, Malformed> {
        Ok(Self {
            session: session_id(wire.session_id, "hello.resume.session_id")?,
            host_incarnation: incarnation(wire.host_incarnation, "hello.resume.host_incarnation")?,
            received_through: NoticeNumber::new(wire.received_through),
            attempt: wire.attempt,
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
                received_through: resume.received_through.map_or(0, NoticeNumber::get),
                attempt: resume.attempt,
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
