//! The gRPC services: each turns a request into core's terms, calls, and turns the result back. No
//! rule lives here.

pub(crate) mod device;
pub(crate) mod page;
pub(crate) mod notifier;
pub(crate) mod memory;
pub(crate) mod admin;
