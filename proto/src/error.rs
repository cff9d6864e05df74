//! What is wrong with a message, and how it is told: one of the two places where a gRPC status is
//! made (the other is the host agent's `status` module).

use std::collections::HashMap;

use shootdown_core::RangeError;
use tonic_types::{ErrorDetails, StatusExt as _};

pub use crate::v1::ErrorReason as Reason;

/// The domain of every `google.rpc.ErrorInfo`: the package of the protocol.
pub const ERROR_DOMAIN: &str = "shootdown.v1";

impl Reason {
    /// The word in `google.rpc.ErrorInfo.reason`: the enum's name without its prefix.
    #[must_use]
    pub fn word(self) -> &'static str {
        self.as_str_name().trim_start_matches("ERROR_REASON_")
    }

    /// The gRPC status code that fits the reason.
    #[must_use]
    pub fn code(self) -> tonic::Code {
        use tonic::Code;
        match self {
            Self::Unspecified => Code::Unknown,
            Self::HelloExpected
            | Self::HelloRepeated
            | Self::FaultNotSubscribed
            | Self::FaultUnmapped
            | Self::FaultNotServed
            | Self::AckNeverSent
            | Self::AckTwice
            | Self::AckRegressed
            | Self::AckReportMisplaced
            | Self::AckOtherSession
            | Self::SessionFenced
            | Self::LeaseRequired
            | Self::LeaseNotRenewed
            | Self::EpochStale
            | Self::FaultsAlreadyServed
            | Self::NotQuiesced
            | Self::AddressSpaceReleased => Code::FailedPrecondition,
            Self::VersionUnsupported => Code::Unimplemented,
            Self::FieldInvalid | Self::RangeInvalid | Self::MessageUnknown | Self::RequestIdReused => {
                Code::InvalidArgument
            }
            Self::MessageTooLarge
            | Self::SubscriptionQuota
            | Self::FaultQuota
            | Self::OutOfMemory
            | Self::SessionQuota
            | Self::RoundQuota
            | Self::QuarantineFull
            | Self::AddressSpaceQuota => Code::ResourceExhausted,
            Self::AddressSpaceUnknown
            | Self::SubscriptionUnknown
            | Self::SessionUnknown
            | Self::RoundUnknown
            | Self::FrameUnknown => Code::NotFound,
            Self::FaultAccess | Self::PermissionDenied | Self::AddressSpaceNotOwned => Code::PermissionDenied,
            Self::FaultContended | Self::SessionEvicted | Self::SessionReplaced => Code::Aborted,
            Self::Draining | Self::HostSuperseded => Code::Unavailable,
            Self::MappingExists => Code::AlreadyExists,
            Self::StoreFailed => Code::DataLoss,
        }
    }

    /// The reason in a status that came over the wire, if it is one of ours.
    #[must_use]
    pub fn of_status(status: &tonic::Status) -> Option<Self> {
        let info = status.get_details_error_info()?;
        (info.domain == ERROR_DOMAIN)
            .then(|| Self::from_str_name(&format!("ERROR_REASON_{}", info.reason)))
            .flatten()
    }
}

/// A status with a `google.rpc.ErrorInfo`. `metadata` names what the message speaks of.
#[must_use]
pub fn status(reason: Reason, message: impl Into<String>, metadata: &[(&str, String)]) -> tonic::Status {
    let metadata: HashMap<String, String> =
        metadata.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
    let details = ErrorDetails::with_error_info(reason.word(), ERROR_DOMAIN, metadata);
    tonic::Status::with_error_details(reason.code(), message, details)
}

/// What is wrong with a message. Nothing of a malformed message takes effect.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// The message says nothing, or something that this version does not know.
    #[error("the message has no content that protocol version 1 knows; set exactly one field of its oneof")]
    Unknown,
    /// A field is missing.
    #[error("{field} must be set")]
    Missing {
        /// The field, by its name in the .proto file.
        field: &'static str,
    },
    /// A number that may not be 0 is 0.
    #[error("{field} must not be 0")]
    Zero {
        /// The field, by its name in the .proto file.
        field: &'static str,
    },
    /// A value that the field cannot have.
    #[error("{field} is {value}, which it cannot be: {expected}")]
    Value {
        /// The field, by its name in the .proto file.
        field: &'static str,
        /// What was sent.
        value: u64,
        /// What would do.
        expected: &'static str,
    },
    /// A list or a text is too long.
    #[error("{field} has {length} entries, the most is {most}")]
    TooLong {
        /// The field, by its name in the .proto file.
        field: &'static str,
        /// How many were sent.
        length: usize,
        /// How many would do.
        most: usize,
    },
    /// A range with its flag for the whole address space, and ends beside it.
    #[error("an address range has `all` set together with start or end; set one or the other")]
    AllWithEnds,
    /// The whole address space where a bounded range is needed.
    #[error("{field} must be a bounded range, not the whole address space")]
    Unbounded {
        /// The field, by its name in the .proto file.
        field: &'static str,
    },
    /// A range that is none.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// A device's name that is none.
    #[error(transparent)]
    DeviceId(#[from] shootdown_core::id::DeviceIdError),
}

impl Malformed {
    /// The reason that a program is told.
    #[must_use]
    pub fn reason(&self) -> Reason {
        match self {
            Self::Unknown => Reason::MessageUnknown,
            Self::Range(_) | Self::AllWithEnds | Self::Unbounded { .. } => Reason::RangeInvalid,
            Self::Missing { .. }
            | Self::Zero { .. }
            | Self::Value { .. }
            | Self::TooLong { .. }
            | Self::DeviceId(_) => Reason::FieldInvalid,
        }
    }
}

impl From<Malformed> for tonic::Status {
    fn from(malformed: Malformed) -> Self {
        status(malformed.reason(), malformed.to_string(), &[])
    }
}
