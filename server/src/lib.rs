//! The host agent of Shootdown, as a library: embed it in a VMM, or run it as `shootdownd`.
//!
//! An invalidation goes through these modules, in this order (`docs/architecture.md` follows one step
//! by step):
//!
//! ```text
//!  [1] source ── [2] directory ── [3] dispatch ── [4] session::stream ──▶ the device
//!                                                                              │ [5] flush
//!  [9] source ◀─ [8] completion ◀──────────────── [7] session::task ◀── [6] ack┘
//! ```
//!
//! # Embedding
//!
//! [`start()`] takes a [`config::Config`] and returns a [`Running`] host agent with threads of its own;
//! its [`Host`] is a [`source::Notifier`], whose methods are those of the kernel's
//! `struct mmu_notifier_ops`. A program that has a runtime and connections of its own takes the parts
//! from [`embed`].
#![deny(unsafe_code)]

pub mod clock;
pub mod config;
mod journal;
pub mod source;
mod directory;
mod dispatch;
mod session;
mod completion;
mod fence;
mod quarantine;
mod vigil;
mod restart;
mod handover;
mod host;
mod service;
mod status;
mod listen;
mod inherited;
mod connections;
mod shard;
mod watchdog;
mod serve;
pub mod embed;
mod start;
pub mod telemetry;
pub mod admin;

pub use connections::ConnectionLimits;
pub use fence::{DevicePattern, Fencer, FencerRule};
pub use host::{Host, HostConfig};
pub use journal::{Damage, JournalError};
pub use listen::{ListenAddr, ListenAddrError};
pub use quarantine::QuarantineBudget;
pub use restart::Loss;
pub use shootdown_proto::endpoint::{Endpoint, EndpointError};
pub use start::{Addresses, Running, StartError, start};
