//! A device agent's process: the library of `shootdown-agent`, and workers whose every read is checked.

mod seam;
mod writes;
mod worker;
mod process;

pub use process::{DeviceProcessError, run};
