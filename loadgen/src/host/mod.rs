//! The host agent's process: the library of `shootdownd`, a memory source, and a workload on it.

mod recorder;
mod young;
mod told;
mod walks;
mod breaks;
mod world;
mod cells;
mod space;
mod release;
mod keep;
mod file;
mod family;
mod slot;
mod workload;
mod process;

pub use process::{HostProcessError, run};
pub use world::WorkloadError;
