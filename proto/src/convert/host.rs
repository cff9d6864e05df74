//! What a host agent says: host agent -> device.

use std::num::NonZeroU64;
use std::time::Duration;

use shootdown_core::{
    AddressSpaceId, Cause, FlushReason, Notice, NoticeKind, NoticeNumber, OwnerTag, Scope, Seq,
};

use super::{
    address_space_id, cause, epoch, incarnation, list, millis, notice_number, page_size, request_id,
    required_range, session_id, subscription_id, translation, wire_cause, wire_millis, wire_range,
    wire_translation,
};
use crate::error::{Malformed, Reason};
use crate::message::{
    Grant, HostSays, MAX_FAULT_PAGES, MAX_NOTICES_A_MESSAGE, RequestId, Resume, SessionError, Welcome,
};
use crate::v1;

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
            Message::Drain(v1::Drain { deadline_ms, resumable }) => {
                Ok(Self::Drain { deadline: Duration::from_millis(deadline_ms), resumable })
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
            HostSays::Drain { deadline, resumable } => {
                Message::Drain(v1::Drain { deadline_ms: wire_millis(deadline), resumable })
            }
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
