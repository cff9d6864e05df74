//! What went wrong, in the words of the protocol: the one place of the host agent where an error
//! becomes a reason or a gRPC status.

use shootdown_core::outbox::AckError;
use shootdown_proto::error::{Reason, status};
use shootdown_proto::message::MAX_SESSION_MESSAGE;
use tonic::{Code, Status};

use crate::source::memory::{FrameError, MemoryError, SwapError};
use crate::source::{FaultError, NotifyError};

pub(crate) const fn ack_reason(error: AckError) -> Reason {
    match error {
        AckError::NeverSent { .. } => Reason::AckNeverSent,
        AckError::Twice { .. } | AckError::Empty => Reason::AckTwice,
        AckError::Regressed { .. } => Reason::AckRegressed,
        AckError::ReportForUnacked { .. } => Reason::AckReportMisplaced,
    }
}

pub(crate) const fn notify_reason(error: &NotifyError) -> Reason {
    match error {
        NotifyError::AddressSpaceUnknown(_) => Reason::AddressSpaceUnknown,
        NotifyError::Released(_) => Reason::AddressSpaceReleased,
        NotifyError::BracketUnknown { .. } => Reason::RoundUnknown,
        NotifyError::TooManyRounds { .. } => Reason::RoundQuota,
        NotifyError::TooManyAddressSpaces { .. } => Reason::AddressSpaceQuota,
        NotifyError::Stopping => Reason::Draining,
    }
}

pub(crate) const fn fault_reason(error: &FaultError) -> Reason {
    match error {
        FaultError::Unmapped { .. } | FaultError::BeyondEnd { .. } => Reason::FaultUnmapped,
        FaultError::ReadOnly { .. } => Reason::FaultAccess,
        FaultError::OutOfMemory { .. } => Reason::OutOfMemory,
        FaultError::NotServed => Reason::FaultNotServed,
        FaultError::Notify(error) => notify_reason(error),
        FaultError::Store(_) => Reason::StoreFailed,
    }
}

impl From<NotifyError> for Status {
    fn from(error: NotifyError) -> Self {
        status(notify_reason(&error), error.to_string(), &[])
    }
}

/// Whether the transport refused a message because of its size. tonic has no type for it, only the
/// code that gRPC gives it.
pub(crate) fn is_too_large(broken: &Status) -> bool {
    broken.code() == Code::OutOfRange
}

pub(crate) fn too_large() -> String {
    format!("a message is over the limit of {MAX_SESSION_MESSAGE} bytes; send more and smaller ones")
}

pub(crate) fn session_unknown(session: u64) -> Status {
    let message = format!("there is no session {session}, or it has ended; connect again");
    status(Reason::SessionUnknown, message, &[("session_id", session.to_string())])
}

pub(crate) const fn frame_reason(error: &FrameError) -> Reason {
    match error {
        FrameError::Unknown { .. } => Reason::FrameUnknown,
        FrameError::Span { .. } => Reason::FieldInvalid,
        FrameError::OutOfMemory { .. } | FrameError::NoRun { .. } | FrameError::TooManyReferences { .. } => {
            Reason::OutOfMemory
        }
        FrameError::Memory(_) => Reason::StoreFailed,
    }
}

pub(crate) const fn memory_reason(error: &MemoryError) -> Reason {
    match error {
        MemoryError::AddressSpaceUnknown(_) => Reason::AddressSpaceUnknown,
        MemoryError::Exiting(_) => Reason::AddressSpaceReleased,
        MemoryError::Range(_)
        | MemoryError::Overlap { .. }
        | MemoryError::Locked { .. }
        | MemoryError::NotAHugePage { .. } => Reason::RangeInvalid,
        MemoryError::Unmapped { .. } | MemoryError::BeyondEnd { .. } => Reason::FaultUnmapped,
        MemoryError::ReadOnly { .. } => Reason::FaultAccess,
        MemoryError::AlreadyMapped { .. } | MemoryError::Busy { .. } => Reason::MappingExists,
        MemoryError::TooManyMappings { .. } => Reason::OutOfMemory,
        MemoryError::Notify(error) => notify_reason(error),
        MemoryError::NotQuiesced { .. } => Reason::Draining,
        MemoryError::Frame(error) => frame_reason(error),
        MemoryError::Swap(SwapError::Full { .. } | SwapError::TooManyReferences | SwapError::None) => {
            Reason::OutOfMemory
        }
        MemoryError::Swap(SwapError::File(_)) | MemoryError::File(_) => Reason::StoreFailed,
        MemoryError::TaskEnded => Reason::Draining,
    }
}
