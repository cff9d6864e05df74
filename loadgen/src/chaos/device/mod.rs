//! The process of a device: a session of the SDK, a TLB, and workers that read and write the frames directly.

mod clock;
mod tlb;
mod worker;
mod process;

pub use process::{ChaosDeviceError, run};
