//! The host agent's process: the library of `shootdownd`, a memory source, and a workload on it.

mod recorder;
mod breaks;
mod space;
mod slot;
mod workload;
mod process;

pub use process::{HostProcessError, run};
pub(crate) use space::address_of;
