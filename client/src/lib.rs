//! The device side of Shootdown.
//!
//! A device that holds translations of a host's memory implements [`DeviceTlb`]: how it stops using a
//! range. [`Device::connect`] opens a session with the host agent; from then on the SDK
//!
//! * asks for translations ([`Device::fault`]) and installs them only where no invalidation has overtaken
//!   them,
//! * calls the [`DeviceTlb`] for every invalidation, many at a time, and acks each when its flush has
//!   returned and no use of its range is open, never earlier,
//! * keeps the lease, and refuses every use past it (fail closed),
//! * connects again when the connection is lost, and goes on with the session as long as the lease lasts.
//!
//! `examples/smallest_device.rs` is a whole device in under 60 lines. [`agent`] is a software accelerator
//! with a TLB of its own, and what `shootdown-agent` runs.
//!
//! The modules stand in the order in which a session meets them; `[n of 9]` in a module's head is its place
//! on the way of an invalidation:
//!
//! ```text
//!  [1] source -> [2] directory -> [3] dispatch -> [4] stream -> [5] flush
//!                                                                  |
//!  [9] release <- [8] completion <- [7] stream <- [6] ack <--------+
//! ```
//!
//! No type of the gRPC library is part of the public API.
#![forbid(unsafe_code)]

mod clock;
mod config;
mod hosts;
mod connector;
mod connection;
mod device;
mod subscription;
mod fault;
mod ticket;
mod mapping;
mod page;
mod tlb;
mod session;
mod ranges;
#[cfg(feature = "agent")]
pub mod agent;

use shootdown_proto::endpoint;

pub use clock::Clock;
pub use config::{ChangePte, ConfigError, DeviceConfig, ResumePolicy};
pub use connection::TransportError;
pub use connector::Connector;
pub use device::{ConnectError, Counts, Device};
pub use endpoint::{Endpoint, EndpointError};
pub use fault::{FaultError, Faulter, Grant, MappedPage};
pub use hosts::{HostsSeen, StaleHost};
pub use mapping::{Mapping, UseGuard};
pub use page::{PageClient, PageError};
pub use session::end::{AllFlushed, EndCause, NotLive, SessionEnd, Violation};
pub use session::gate::{Gate, UseRefused};
pub use subscription::{RangeEnds, SubscribeError, SubscribeOptions, Subscription, UnsubscribeError};
pub use ticket::CommitTicket;
pub use tlb::{DeviceTlb, FlushAllCause, Flushed, Invalidation, Young};

pub use shootdown_core::ack::ContiguityError;
pub use shootdown_core::id::DeviceIdError;
pub use shootdown_core::mapping::CommitError;
pub use shootdown_core::session::Enforcement;
pub use shootdown_core::{
    Access, AddrRange, AddressSpaceId, Cause, CauseSet, DeviceId, Epoch, FlushReason, FrameNumber,
    Incarnation, Moment, NoticeNumber, OwnerTag, PageSize, RangeError, Seq, SessionId, SubscriptionId,
    Translation,
};
pub use shootdown_proto::error::{Malformed, Reason};
pub use shootdown_proto::message::{FrameSpan, SessionError};
