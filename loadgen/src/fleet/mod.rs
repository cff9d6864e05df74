//! The processes of a run: one host agent and some device agents, started by re-executing this program, and
//! ended with it.

mod workspace;
mod child;
mod conduct;

pub use child::{ChildError, Noise};
pub use conduct::{Conducted, FleetError, Length, Progress, conduct};
pub use workspace::Workspace;

/// The hidden subcommand of the host agent's process.
pub const HOST_AGENT: &str = "host-agent";

/// The hidden subcommand of a device agent's process.
pub const DEVICE_AGENT: &str = "device-agent";
