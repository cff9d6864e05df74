//! Load on Shootdown, and the proof that it holds: a host agent and device agents as processes of their own,
//! real memory, and a checker that looks at every byte that a device reads.
//!
//! ```text
//!                     shootdown-loadgen (the parent)
//!            control  |             |             |   lines of JSON on stdin and stdout
//!                     v             v             v
//!               host agent     device agent   device agent …
//!            workload, source       workers read and write
//!               Recorder    <-gRPC->    Seam
//!                 Host                Accelerator
//!                     \     floor file    /
//!                      +---- checker ----+
//! ```
//!
//! The modules stand in the order in which a run meets them.
#![forbid(unsafe_code)]

pub mod cli;
pub mod path;
pub mod rule;
pub mod control;
pub mod fleet;
pub mod host;
pub mod device;
pub mod check;
pub mod report;
pub mod demo;
pub mod rounds;
pub mod chaos;
