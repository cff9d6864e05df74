//! Faults into processes that run: the host agent and the devices are killed, stopped, cut off and replaced
//! while a program frees and reuses memory that the devices read and write.
//!
//! ```text
//!      shootdown-loadgen chaos (the program whose memory it is, "the VMM")
//!        page table, frames, moves ---- NotifierService (Unix socket) ----> host agent  <- kill -9, SIGSTOP,
//!        inject: one lane a device, one for the host agent                     |           successor, SIGTERM
//!                 |                                                           TCP
//!                 |  frames file                                               |
//!                 +------------------- read and written directly --------- device agents <- kill -9, SIGSTOP,
//!                                                                                           reset, partition
//! ```
//!
//! Devices reach the frames as RDMA does: nobody on the host's side can refuse them. What keeps them from a
//! frame that was given away is the protocol alone, and each page that they read says whose it is.
//!
//! The modules stand in the order in which a run meets them.

mod plan;
mod content;
mod shared;
mod process;
mod netns;
mod host_agent;
mod vmm;
mod device;
mod inject;
mod stall;
mod verdict;
mod run;
mod report;

pub use device::{ChaosDeviceError, run as run_device};
pub use host_agent::{ChaosHostError, run as run_host_agent};
pub use plan::{Broken, ChaosArgs, FaultKind};
pub use process::has_its_parent;
pub use run::{ChaosError, run};
pub use verdict::Verdict;

/// The hidden subcommand of the host agent's process.
pub const CHAOS_HOST: &str = "chaos-host";

/// The hidden subcommand of a device agent's process.
pub const CHAOS_DEVICE: &str = "chaos-device";
