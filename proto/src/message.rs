//! What the two ends of a session say, in core's terms. [`crate::convert`] makes these from the wire
//! and back; behind it nobody sees a protobuf type.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use shootdown_core::{
    Access, Ack, AddrRange, AddressSpaceId, CauseSet, DeviceId, Epoch, Incarnation, Notice, NoticeNumber,
    PageSize, Seq, SessionId, SubscriptionId, Translation,
};

use crate::error::Reason;

/// The protocol versions that this code speaks, newest last.
pub const PROTOCOL_VERSIONS: [u32; 1] = [1];

/// The largest message of a session, in bytes, in either direction: a grant of 64 pages with their
/// bytes and some room. A larger one ends the session.
pub const MAX_SESSION_MESSAGE: usize = 512 * 1024;

/// The most notices in one message, and the most numbers or reports in one ack.
pub const MAX_NOTICES_A_MESSAGE: usize = 4096;

/// The most ranges in one report or subscription request.
pub const MAX_RANGES_A_MESSAGE: usize = 512;

/// The most pages that one fault may ask for.
pub const MAX_FAULT_PAGES: u64 = 512;

/// The most pages that one fault may ask for together with their bytes.
pub const MAX_FAULT_DATA_PAGES: u64 = 64;

/// The most spans in one read or write of frames.
pub const MAX_SPANS: usize = 256;

/// The most bytes of a [`CallId`]: a UUID in any of its spellings, and room for a prefix.
pub const MAX_CALL_ID: usize = 64;

/// Chosen by whoever asks; comes back in the answer. Never 0.
pub type RequestId = NonZeroU64;

/// The `request_id` of a call of `NotifierService`: a call that is tried again carries the same one.
/// Never empty.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CallId(pub(crate) Arc<str>);

impl std::fmt::Display for CallId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// From the device to the host agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceSays {
    /// Opens the session.
    Hello(Hello),
    /// Asks to be told of what happens to ranges.
    Subscribe(Subscribe),
    /// Ends a subscription.
    Unsubscribe {
        /// Comes back in the answer.
        request: RequestId,
        /// Which.
        subscription: SubscriptionId,
    },
    /// Asks for translations.
    Fault(Fault),
    /// Flushes are complete.
    Ack {
        /// The session it is meant for, if the device says so.
        session: Option<SessionId>,
        /// What is acked.
        ack: Ack,
    },
    /// Pages were used.
    Young {
        /// Whose.
        address_space: AddressSpaceId,
        /// Which.
        ranges: Vec<AddrRange>,
    },
    /// Renews the lease.
    Heartbeat {
        /// Comes back in the answer.
        request: RequestId,
    },
    /// Holds nothing any more and leaves.
    Leave,
}

/// Opens a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// The device's name.
    pub device: DeviceId,
    /// This run of its agent.
    pub incarnation: Incarnation,
    /// What it speaks; not checked here for a version in common.
    pub versions: Vec<u32>,
    /// The most unacked notices it wants; `None`: as the host agent likes.
    pub window: Option<u32>,
    /// What its TLB supports.
    pub page_sizes: Vec<PageSize>,
    /// It stops by itself when its lease has run out.
    pub enforces_lease: bool,
    /// It understands change_pte.
    pub change_pte: bool,
    /// Where an earlier session stopped.
    pub resume: Option<ResumePoint>,
    /// The identity of its clock; empty: unknown.
    pub clock_id: String,
}

/// Where an earlier session stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResumePoint {
    /// The earlier session.
    pub session: SessionId,
    /// The host agent's incarnation in it.
    pub host_incarnation: Incarnation,
    /// Every notice up to and including this one was received, and is flushed or being flushed.
    pub received_through: Option<NoticeNumber>,
    /// Counts the tries to go on with the session; 0: the device does not say.
    pub attempt: u64,
}

/// Asks for a subscription.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subscribe {
    /// Comes back in the answer.
    pub request: RequestId,
    /// Whose memory.
    pub address_space: AddressSpaceId,
    /// Which pages; at least one range.
    pub ranges: Vec<AddrRange>,
    /// The causes to hear of.
    pub causes: CauseSet,
    /// Also hear of the ends of brackets.
    pub wants_end: bool,
}

/// Asks for translations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Comes back in the answer.
    pub request: RequestId,
    /// Whose memory.
    pub address_space: AddressSpaceId,
    /// Which pages; at most [`MAX_FAULT_PAGES`].
    pub range: AddrRange,
    /// What the device wants to do.
    pub access: Access,
    /// Also send the bytes.
    pub wants_data: bool,
}

/// From the host agent to the device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostSays {
    /// Answers Hello.
    Welcome(Welcome),
    /// Answers Subscribe.
    Subscribed {
        /// The request that this answers.
        request: RequestId,
        /// The subscription.
        subscription: SubscriptionId,
        /// The newest event of the address space.
        seq: Option<Seq>,
    },
    /// Answers Unsubscribe.
    Unsubscribed {
        /// The request that this answers.
        request: RequestId,
        /// The subscription that ended.
        subscription: SubscriptionId,
    },
    /// Answers Fault.
    Grant(Grant),
    /// Invalidations.
    Notices(Vec<Notice>),
    /// Answers Heartbeat.
    LeaseRenewed {
        /// The heartbeat that this answers.
        request: RequestId,
        /// From when the heartbeat was sent.
        lease: Duration,
    },
    /// Finish, then leave.
    Drain {
        /// When the host agent stops at the latest, from now.
        deadline: Duration,
        /// A successor goes on with the sessions: do not leave, connect again and resume.
        resumable: bool,
    },
    /// A request was refused, or the session ends.
    Error(SessionError),
}

/// Answers Hello.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Welcome {
    /// The session's name.
    pub session: SessionId,
    /// This run of the host agent.
    pub host_incarnation: Incarnation,
    /// The version of this session.
    pub version: u32,
    /// From when the device sent its Hello.
    pub lease: Duration,
    /// The most notices sent and not acked.
    pub window: u32,
    /// What PageService asks for.
    pub epoch: Epoch,
    /// Of a session that goes on: the lowest notice that is not acked; `None`: all are.
    pub retained_floor: Option<NoticeNumber>,
    /// Whether the device may keep what it holds.
    pub resume: Resume,
    /// The host agent's base page.
    pub page_size: PageSize,
    /// The host agent asks for timing in acks.
    pub wants_timing: bool,
}

/// What a device must do with the translations of an earlier session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resume {
    /// Drop them before the first fault.
    Flush,
    /// Keep them.
    Continue,
}

/// Answers Fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// The request that this answers.
    pub request: RequestId,
    /// Whose memory.
    pub address_space: AddressSpaceId,
    /// The newest event of the address space when it was given.
    pub seq: Option<Seq>,
    /// One for each page, in ascending order.
    pub translations: Vec<Translation>,
    /// The pages' bytes, if they were asked for.
    pub data: Bytes,
}

/// A request was refused, or the session ends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct SessionError {
    /// For a program.
    pub reason: Reason,
    /// For a person: what happened and what to do.
    pub message: String,
    /// The request that was refused, if it was one.
    pub request: Option<RequestId>,
    /// The session ends.
    pub fatal: bool,
    /// What the host agent speaks, where the version is the reason.
    pub supported_versions: Vec<u32>,
}

/// Part of one frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameSpan {
    /// The frame.
    pub frame: shootdown_core::FrameNumber,
    /// First byte within it.
    pub offset: u32,
    /// Bytes; never 0; `offset + length` is at most the base page.
    pub length: u32,
}

/// Names a question to a source; comes back in its answer. Never 0.
pub type FaultId = NonZeroU64;

/// From a source that serves the faults of its address space to the host agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceSays {
    /// Opens the stream.
    Open {
        /// Whose faults.
        address_space: AddressSpaceId,
    },
    /// Answers a question.
    Translated {
        /// Which.
        fault: FaultId,
        /// Not checked here against what was asked; at most [`MAX_FAULT_PAGES`].
        translations: Vec<Translation>,
    },
    /// There is no answer to a question.
    Declined {
        /// Which.
        fault: FaultId,
        /// Why.
        why: Decline,
        /// The first address that has no translation.
        address: u64,
    },
}

/// Why a source has no translations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decline {
    /// Nothing is mapped there.
    Unmapped,
    /// The mapping does not allow the access.
    Access,
    /// The source has no memory left.
    OutOfMemory,
}

/// From the host agent to such a source: a device asks for translations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FaultAsked {
    /// Comes back in the answer.
    pub fault: FaultId,
    /// Which pages; at most [`MAX_FAULT_PAGES`].
    pub range: AddrRange,
    /// What the device wants to do.
    pub access: Access,
}
