//! A software accelerator, and the agent around it: what a device with a TLB of its own looks like.
//!
//! * [`Accelerator`] models hardware: a set-associative TLB of raw frames, a cache of page bytes, DMAs in
//!   flight, and a flush that takes its time. It is a [`DeviceTlb`](crate::DeviceTlb).
//! * [`run`] is the agent: it connects, subscribes, lets workers use the accelerator, and leaves.
//!   `shootdown-agent` is [`Config`] and [`run`], and the load generator runs the same in its processes.

mod tlb;
mod cache;
mod writeback;
mod flush_time;
mod accelerator;
mod worker;
mod config;
mod start;

pub use accelerator::{Accelerator, AcceleratorConfig, AccessCounts, AccessError, PageRead, WritePolicy};
pub use config::{Command, Config, ConfigError, Flags, LogFormat, PageRange};
pub use flush_time::{FlushTime, FlushTimeError};
pub use start::{AgentError, Summary, run};
pub use worker::{Work, WorkCounts};
