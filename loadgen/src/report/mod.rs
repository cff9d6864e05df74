//! What a run comes to, for people and for programs.

mod stages;
mod outcome;
mod json;
mod table;

pub use json::to_json;
pub use outcome::{Failing, Outcome, Totals};
pub(crate) use stages::histogram;
pub use stages::{Stage, StageSummary, Stages};
pub use table::{write_latencies, write_paths, write_verdict};
