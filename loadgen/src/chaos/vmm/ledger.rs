//! What the program counts.

use std::time::Duration;

use serde::Serialize;
use shootdown_client::Moment;

/// Of the whole run.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Ledger {
    /// Rounds that ended with all quiet.
    pub(crate) rounds: u64,
    /// Of them those whose deadline passed first.
    pub(crate) not_quiesced_first: u64,
    /// The longest, in nanoseconds, without the time for which the host agent itself was stopped.
    pub(crate) longest_round_ns: u64,
    /// The longest without the time in which one of the host agent's threads waited for a processor, in nanoseconds.
    pub(crate) longest_running_ns: u64,
    /// The longest that a caller waited for its outcome, whatever became of the host agent, in nanoseconds.
    pub(crate) longest_call_ns: u64,
    /// Targets, by how they stopped.
    pub(crate) acked: u64,
    pub(crate) left: u64,
    pub(crate) fenced: u64,
    /// Frames that were given away.
    pub(crate) releases: u64,
    /// Of them while a device of an earlier run of the host agent still had its lease.
    pub(crate) releases_in_grace: u64,
    /// Calls that were tried more than once.
    pub(crate) retried_calls: u64,
    /// Of them those with exactly one outcome.
    pub(crate) retried_with_one_outcome: u64,
    /// The most tries of one call.
    pub(crate) most_tries: u64,
    /// Calls that were repeated although their outcome was known.
    pub(crate) asked_again: u64,
    /// Calls with a second outcome that differs from the first.
    pub(crate) second_outcomes: u64,
    /// Calls that there was no room for; each was made anew by another id.
    pub(crate) refused_for_want_of_room: u64,
    /// Results of a host agent that had been replaced; nothing was released for them.
    pub(crate) superseded_results: u64,
    /// Answers of a host agent that it has been replaced.
    pub(crate) superseded_refusals: u64,
    /// How often a host agent was told of the address space.
    pub(crate) registrations: u64,
    pub(crate) faults_translated: u64,
    pub(crate) faults_declined: u64,
    /// Writes of devices that are not where they were written.
    pub(crate) lost_writes: u64,
    /// Frames that were written after they were given away.
    pub(crate) writes_after_release: u64,
}

impl Ledger {
    /// A round is over, during which one of the host agent's threads waited for a processor for `waited`.
    pub(super) fn on_round(&mut self, elapsed: Duration, waited: Duration) {
        self.rounds += 1;
        self.longest_round_ns = self.longest_round_ns.max(nanos(elapsed));
        self.longest_running_ns = self.longest_running_ns.max(nanos(elapsed.saturating_sub(waited)));
    }

    pub(super) fn on_call(&mut self, tries: u64, took: Duration) {
        self.longest_call_ns = self.longest_call_ns.max(nanos(took));
        self.most_tries = self.most_tries.max(tries);
        self.retried_calls += u64::from(tries > 1);
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// What the program knows of the host agents of its run.
#[derive(Debug, Default)]
pub(super) struct HostView {
    /// How often one began that knows nothing of the calls before: not one that goes on where another ended as planned.
    pub(super) lives: u64,
    /// The highest that was seen.
    pub(super) incarnation: u64,
    /// When one of them stood still.
    pub(super) stops: Vec<(Moment, Option<Moment>)>,
}
