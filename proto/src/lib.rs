//! The wire: code generated from `proto/shootdown/v1/*.proto`, and the one place where wire types
//! become the types of [`shootdown_core`] and back.
//!
//! A message is checked by its receiver, in [`convert`], and nowhere else: what comes out of there is
//! a core type that cannot be malformed.
#![forbid(unsafe_code)]

/// The generated types of package `shootdown.v1`; the comments are those of the .proto files.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, reason = "generated code")]
pub mod v1 {
    tonic::include_proto!("shootdown.v1");

    /// The compiled descriptors of the package, for server reflection.
    pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
}

pub mod message;
pub mod convert;
pub mod error;
pub mod endpoint;
