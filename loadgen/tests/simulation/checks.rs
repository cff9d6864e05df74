//! One function an invariant, of its name. What a trace cannot show is left to the tests of
//! docs/architecture.md.

mod stopping;
mod granting;
mod delivery;
mod calling;
mod answers;
mod sessions;

use std::time::Duration;

use crate::oracle::{History, Violation};

/// A check, and the name of its invariant.
pub type Check = (&'static str, fn(&History) -> Vec<Violation>);

pub use answers::{acks_during_its_fault, answers_that_nothing_was_used};

/// What is looked at. `NoStaleUse` is what all the others are for.
pub const ALL: &[Check] = &[
    ("NoStaleUse", stopping::no_stale_use),
    ("NoFreeBeforeQuiesce", stopping::no_free_before_quiesce),
    ("AckMeansStopped", stopping::ack_means_stopped),
    ("NoGrantInWindow", granting::no_grant_in_window),
    ("JoinCovers", granting::join_covers),
    ("StableTargets", granting::stable_targets),
    ("UnsubscribeBarrier", granting::unsubscribe_barrier),
    ("Pairing", calling::pairing),
    ("NonBlockAtomic", calling::non_block_atomic),
    ("Contiguity", sessions::contiguity),
    ("TimeoutIsNotAck", stopping::timeout_is_not_ack),
    ("FenceIsPositive", stopping::fence_is_positive),
    ("FenceReachesReuse", stopping::fence_reaches_reuse),
    ("Isolation", calling::isolation),
    ("BoundedResolution", calling::bounded_resolution),
    ("QuarantineHasABudget", calling::quarantine_has_a_budget),
    ("ResumeOrFlush", sessions::resume_or_flush),
    ("RestartGrace", sessions::restart_grace),
    ("NothingIsLeft", sessions::nothing_is_left),
    ("OneOutcome", calling::one_outcome),
    ("NeverDrop", delivery::never_drop),
    ("MergeIsUnion", delivery::merge_is_union),
    ("NoSelfWait", answers::no_self_wait),
    ("YoungIsConservative", answers::young_is_conservative),
    ("RangeOverApproximates", delivery::range_over_approximates),
    ("SeqCompare", delivery::seq_compare),
];

/// A caller is answered in the step in which its round is complete.
const STEP: Duration = Duration::from_millis(2);

#[cfg(test)]
mod tests;
