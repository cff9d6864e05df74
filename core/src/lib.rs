//! Every coherence rule of Shootdown, and nothing else: no I/O, no clock, no runtime.
//!
//! The dependency list proves it: there is no tokio, no tonic and no random number here. Time is an
//! argument ([`Moment`]). A machine takes `on_x(input, now)` and hands its outputs back, so that one
//! body serves the host agent, the SDK, the model tests and a simulation on virtual time.
//!
//! The modules stand in the order in which an invalidation meets them. `[n of 9]` in a module's head
//! is its place on the way of an invalidation (see `docs/architecture.md`):
//!
//! ```text
//!  [1] source -> [2] directory -> [3] dispatch -> [4] stream -> [5] flush
//!                                                                  |
//!  [9] release <- [8] completion <- [7] stream <- [6] ack <--------+
//! ```
#![forbid(unsafe_code)]

pub mod id;
pub mod moment;
pub mod range;
pub mod event;
mod interval;
mod ticket;
pub mod interest;
pub mod gate;
pub mod round;
pub mod notice;
pub mod outbox;
pub mod mapping;
pub mod ack;
pub mod lease;
pub mod busy_poll;
pub mod session;
pub mod young;

pub use ack::{Ack, FlushReport, FlushTiming};
pub use event::{Access, Cause, CauseSet, Event, Method, Translation};
pub use id::{
    AddressSpaceId, DeviceId, Epoch, FrameNumber, Incarnation, NoticeNumber, OwnerTag, Seq, SessionId,
    SubscriptionId,
};
pub use moment::Moment;
pub use notice::{FlushReason, Notice, NoticeKind, Scope};
pub use range::{AddrRange, PageSize, RangeError};
