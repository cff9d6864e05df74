//! Why a session ended.

use shootdown_core::ack::ContiguityError;
use shootdown_proto::error::Malformed;
use shootdown_proto::message::SessionError;

use crate::connection::TransportError;

/// Why a session ended.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum EndCause {
    /// [`Device::leave`](crate::Device::leave).
    #[error("the device left")]
    Left,
    /// The last [`Device`](crate::Device) was dropped.
    #[error("the last handle of the device was dropped")]
    Dropped,
    /// The host agent ended it and said why.
    #[error("the host agent ended the session")]
    Host(#[source] SessionError),
    /// The connection broke.
    #[error("the connection to the host agent was lost")]
    Transport(#[source] TransportError),
    /// The host agent closed the stream without a word.
    #[error("the host agent closed the stream")]
    Closed,
    /// A notice is missing, so that nothing could be flushed precisely any more (Contiguity).
    #[error("a notice is missing")]
    Gap(#[source] ContiguityError),
    /// The host agent sent what cannot be understood.
    #[error("the host agent sent a malformed message")]
    Malformed(#[source] Malformed),
    /// The host agent sent what it must not.
    #[error("the host agent broke the protocol")]
    Violation(#[source] Violation),
    /// The connection was lost, and the host agent could not go on where the device had stopped.
    #[error("the host agent could not resume the session")]
    NotResumed,
    /// The lease was not renewed in time.
    #[error("the lease ran out")]
    LeaseExpired,
    /// The vendor's [`DeviceTlb`](crate::DeviceTlb) panicked. What it was asked to flush was not acked.
    #[error("a flush panicked")]
    FlushPanicked,
    /// The tokio runtime that the session lived on is gone.
    #[error("the runtime of the session stopped")]
    RuntimeStopped,
}

/// What a host agent must not do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// More notices than the window are sent and not acked.
    #[error("more than {window} notices were sent and not acked")]
    WindowExceeded {
        /// The session's window.
        window: u32,
    },
    /// A grant does not fit its fault.
    #[error("the grant for request {request} is not for what was asked: {what}")]
    GrantMismatch {
        /// The fault.
        request: u64,
        /// What does not fit.
        what: &'static str,
    },
    /// An answer of another kind than its request.
    #[error("request {request} was answered with what it did not ask for")]
    AnswerMismatch {
        /// The request.
        request: u64,
    },
    /// A second Welcome.
    #[error("Welcome came twice")]
    WelcomeTwice,
    /// A session goes on, and it is not the one that this device had.
    #[error("another session was resumed than the one that was lost")]
    ResumeMismatch,
}

/// How a session ended.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the session ended, {flushed}")]
pub struct SessionEnd {
    /// Why.
    #[source]
    pub cause: EndCause,
    /// Whether the device holds nothing any more.
    pub flushed: AllFlushed,
}

/// Whether a device that lost its session holds nothing any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AllFlushed {
    /// [`DeviceTlb::flush_all`](crate::DeviceTlb::flush_all) returned, and no use is open.
    Yes,
    /// [`DeviceTlb::flush_all`](crate::DeviceTlb::flush_all) panicked or was cut off. Reset the device
    /// before it connects again.
    No,
}

impl std::fmt::Display for AllFlushed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Yes => "and the device has flushed everything",
            Self::No => "and the device did NOT flush everything: reset it before it connects again",
        })
    }
}

impl SessionEnd {
    pub(crate) fn unflushed(cause: EndCause) -> Self {
        Self { cause, flushed: AllFlushed::No }
    }
}

/// The session is closed: nothing can be asked of the host agent.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the session is closed")]
pub struct NotLive {
    /// Why.
    #[source]
    pub cause: EndCause,
}
