//! The invariants that need a whole host agent, each under its name, over real sockets.

mod common;
#[path = "invariants/rounds.rs"]
mod rounds;
#[path = "invariants/grants.rs"]
mod grants;
#[path = "invariants/notices.rs"]
mod notices;
#[path = "invariants/fences.rs"]
mod fences;
#[path = "invariants/ends.rs"]
mod ends;
