//! What a host agent owes to the devices of its run before: real processes, killed, stopped, taken over.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;
#[path = "restart/place.rs"]
mod place;
#[path = "restart/grace.rs"]
mod grace;
#[path = "restart/takeover.rs"]
mod takeover;
#[path = "restart/planned.rs"]
mod planned;
#[path = "restart/outcomes.rs"]
mod outcomes;
#[path = "restart/chains.rs"]
mod chains;
#[path = "restart/state.rs"]
mod state;
