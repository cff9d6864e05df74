//! Faults that a source serves: source <-> host agent.

use super::{
    access, address_space_id, bounded_range, fault_id, list, translation, wire_access, wire_range,
    wire_translation,
};
use crate::error::{Malformed, Reason};
use crate::message::{Decline, FaultAsked, MAX_FAULT_PAGES, SourceSays};
use crate::v1;

impl TryFrom<v1::ServeFaultsRequest> for SourceSays {
    type Error = Malformed;

    fn try_from(wire: v1::ServeFaultsRequest) -> Result<Self, Malformed> {
        use v1::serve_faults_request::Message;
        match wire.message.ok_or(Malformed::Unknown)? {
            Message::Open(open) => Ok(Self::Open {
                address_space: address_space_id(open.address_space_id, "open.address_space_id")?,
            }),
            Message::Translated(translated) => Ok(Self::Translated {
                fault: fault_id(translated.fault_id, "translated.fault_id")?,
                translations: list(
                    translated.translations,
                    MAX_FAULT_PAGES as usize,
                    "translated.translations",
                )?
                .into_iter()
                .map(translation)
                .collect::<Result<_, _>>()?,
            }),
            Message::Declined(declined) => Ok(Self::Declined {
                fault: fault_id(declined.fault_id, "declined.fault_id")?,
                why: match declined.reason() {
                    Reason::FaultUnmapped => Decline::Unmapped,
                    Reason::FaultAccess => Decline::Access,
                    Reason::OutOfMemory => Decline::OutOfMemory,
                    _ => {
                        return Err(Malformed::Value {
                            field: "declined.reason",
                            value: declined.reason as u64,
                            expected: "FAULT_UNMAPPED, FAULT_ACCESS or OUT_OF_MEMORY",
                        });
                    }
                },
                address: declined.address,
            }),
        }
    }
}

impl From<SourceSays> for v1::ServeFaultsRequest {
    fn from(says: SourceSays) -> Self {
        use v1::serve_faults_request::Message;
        let message = match says {
            SourceSays::Open { address_space } => {
                Message::Open(v1::ServeFaultsOpen { address_space_id: address_space.get() })
            }
            SourceSays::Translated { fault, translations } => Message::Translated(v1::FaultTranslated {
                fault_id: fault.get(),
                translations: translations.into_iter().map(wire_translation).collect(),
            }),
            SourceSays::Declined { fault, why, address } => Message::Declined(v1::FaultDeclined {
                fault_id: fault.get(),
                reason: match why {
                    Decline::Unmapped => Reason::FaultUnmapped,
                    Decline::Access => Reason::FaultAccess,
                    Decline::OutOfMemory => Reason::OutOfMemory,
                }
                .into(),
                address,
            }),
        };
        Self { message: Some(message) }
    }
}

impl TryFrom<v1::ServeFaultsResponse> for FaultAsked {
    type Error = Malformed;

    fn try_from(wire: v1::ServeFaultsResponse) -> Result<Self, Malformed> {
        let asked = wire.asked.ok_or(Malformed::Unknown)?;
        Ok(Self {
            fault: fault_id(asked.fault_id, "asked.fault_id")?,
            range: bounded_range(asked.range, "asked.range")?,
            access: access(asked.access)?,
        })
    }
}

impl From<FaultAsked> for v1::ServeFaultsResponse {
    fn from(asked: FaultAsked) -> Self {
        Self {
            asked: Some(v1::FaultAsked {
                fault_id: asked.fault.get(),
                range: Some(wire_range(asked.range)),
                access: wire_access(asked.access).into(),
            }),
        }
    }
}
