//! Wire -> core at the receiver, core -> wire at the sender. Nothing else in the workspace looks
//! into a protobuf message of a session.
//!
//! The words that all messages use are here; what a device says is in `device`, what a host agent says
//! in `host`, what it and a source say of faults in `source`.

mod device;
mod host;
mod source;

pub use self::device::request_of;

use std::time::Duration;

use shootdown_core::{
    Access, AddrRange, AddressSpaceId, Cause, CauseSet, Epoch, FrameNumber, Incarnation, NoticeNumber,
    PageSize, Seq, SessionId, SubscriptionId, Translation,
};

use crate::error::Malformed;
use crate::message::{CallId, FaultId, FrameSpan, MAX_CALL_ID, MAX_RANGES_A_MESSAGE, MAX_SPANS, RequestId};
use crate::v1;

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
nonzero!(fault_id, FaultId);

/// The id of a call that may be tried again; `None` where the caller gave none.
///
/// # Errors
/// [`Malformed::TooLong`].
pub fn call_id(text: &str) -> Result<Option<CallId>, Malformed> {
    if text.len() > MAX_CALL_ID {
        return Err(Malformed::TooLong { field: "request_id", length: text.len(), most: MAX_CALL_ID });
    }
    Ok((!text.is_empty()).then(|| CallId(text.into())))
}

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

fn page_size(bytes: u64, field: &'static str) -> Result<PageSize, Malformed> {
    PageSize::from_bytes(bytes).ok_or(Malformed::Value {
        field,
        value: bytes,
        expected: "a power of two from 4096 to 2^48",
    })
}

fn millis(value: u64, field: &'static str) -> Result<Duration, Malformed> {
    if value == 0 { Err(Malformed::Zero { field }) } else { Ok(Duration::from_millis(value)) }
}

fn wire_millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
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
