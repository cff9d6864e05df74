//! What went wrong, in the words of the protocol: the one place of the host agent where an error
//! becomes a reason or a gRPC status.

use shootdown_core::outbox::AckError;
use shootdown_proto::error::{Reason, status};
use shootdown_proto::message::MAX_SESSION_MESSAGE;
use tonic::{Code, Status};

use crate::source::memory::{FrameError, MemoryError, SwapError};
use crate::source::rpc::faults::{AlreadyServed, AnswerError};
use crate::source::rpc::retries::IdReused;
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
        NotifyError::BracketUnknown { .. } | NotifyError::RoundOfAnotherRun { .. } => Reason::RoundUnknown,
        NotifyError::TooManyRounds { .. } => Reason::RoundQuota,
        NotifyError::QuarantineFull { .. } => Reason::QuarantineFull,
        NotifyError::TooManyAddressSpaces { .. } => Reason::AddressSpaceQuota,
        NotifyError::AddressSpaceTaken(_) | NotifyError::OtherStrictness { .. } => Reason::FieldInvalid,
        NotifyError::Stopping => Reason::Draining,
        NotifyError::Superseded => Reason::HostSuperseded,
    }
}

pub(crate) const fn fault_reason(error: &FaultError) -> Reason {
    match error {
        FaultError::Unmapped { .. } | FaultError::BeyondEnd { .. } => Reason::FaultUnmapped,
        FaultError::ReadOnly { .. } | FaultError::Denied { .. } => Reason::FaultAccess,
        FaultError::OutOfMemory { .. } | FaultError::SourceOutOfMemory => Reason::OutOfMemory,
        FaultError::NotServed
        | FaultError::SourceGone
        | FaultError::Unanswered { .. }
        | FaultError::NoBytes => Reason::FaultNotServed,
        FaultError::Notify(error) => notify_reason(error),
        FaultError::Store(_) => Reason::StoreFailed,
    }
}

impl From<NotifyError> for Status {
    fn from(error: NotifyError) -> Self {
        status(notify_reason(&error), error.to_string(), &[])
    }
}

impl From<IdReused> for Status {
    fn from(error: IdReused) -> Self {
        status(Reason::RequestIdReused, error.to_string(), &[])
    }
}

impl From<AlreadyServed> for Status {
    fn from(error: AlreadyServed) -> Self {
        status(Reason::FaultsAlreadyServed, error.to_string(), &[])
    }
}

impl From<AnswerError> for Status {
    fn from(error: AnswerError) -> Self {
        let reason = match &error {
            AnswerError::Malformed(malformed) => malformed.reason(),
            AnswerError::OpenedTwice
            | AnswerError::UnknownQuestion(_)
            | AnswerError::OtherPage { .. }
            | AnswerError::TooMany { .. }
            | AnswerError::ReadOnly { .. }
            | AnswerError::DeclinedElsewhere { .. } => Reason::FieldInvalid,
        };
        status(reason, error.to_string(), &[])
    }
}

/// The last word on a stream of faults whose address space has ended.
pub(crate) fn source_released() -> Status {
    status(Reason::AddressSpaceReleased, "the address space was released; there is nothing to answer", &[])
}

/// The last word on a stream of faults with a message that is too large.
pub(crate) fn answer_too_large() -> Status {
    status(Reason::MessageTooLarge, too_large(), &[])
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
        MemoryError::NotQuiesced { .. } => Reason::NotQuiesced,
        MemoryError::Frame(error) => frame_reason(error),
        MemoryError::Swap(SwapError::Full { .. } | SwapError::TooManyReferences | SwapError::None) => {
            Reason::OutOfMemory
        }
        MemoryError::Swap(SwapError::File(_)) | MemoryError::File(_) => Reason::StoreFailed,
        MemoryError::TaskEnded => Reason::Draining,
    }
}
