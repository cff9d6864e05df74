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
    /// The longest, in nanoseconds, without the time for which the host agent itself was stopped, and for which the
    /// call may have waited for room.
    pub(crate) longest_round_ns: u64,
    /// The longest without the time in which the host agent's busiest thread waited for a processor, in nanoseconds.
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
    /// Calls whose outcome was that there is no room for them; another was made in their place.
    pub(crate) refused_for_want_of_room: u64,
    /// Of them those that were tried again when there was room, and were refused again.
    pub(crate) refused_again: u64,
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
    /// A round is over that took `elapsed`, and `running` of it without the host agent's waits for a processor.
    pub(super) fn on_round(&mut self, elapsed: Duration, running: Duration) {
        self.rounds += 1;
        self.longest_round_ns = self.longest_round_ns.max(nanos(elapsed));
        self.longest_running_ns = self.longest_running_ns.max(nanos(running));
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
    /// How often one began that knows nothing of the calls before, and how many of those that were replaced have ended.
    pub(super) lives: u64,
    /// The highest that was seen.
    pub(super) incarnation: u64,
    /// One that was replaced goes on beside its successor.
    replaced_goes_on: bool,
    /// When one of them stood still.
    stops: Vec<(Moment, Option<Moment>)>,
}

impl HostView {
    pub(super) fn on_stopped(&mut self, now: Moment) {
        self.stops.push((now, None));
    }

    pub(super) fn on_went_on(&mut self, now: Moment) {
        if let Some((_, until)) = self.stops.last_mut() {
            *until = Some(now);
        }
    }

    /// How long the host agent stood still in this time.
    pub(super) fn stood_still(&self, from: Moment, to: Moment) -> Duration {
        let within = |(began, ended): &(Moment, Option<Moment>)| {
            let (began, ended) = ((*began).max(from), ended.unwrap_or(to).min(to));
            ended.since(began)
        };
        self.stops.iter().map(within).sum()
    }

    pub(super) fn on_forgotten(&mut self) {
        self.lives += 1;
    }

    pub(super) fn on_replaced_goes_on(&mut self) {
        self.replaced_goes_on = true;
    }

    pub(super) fn on_replaced_ended(&mut self) {
        self.replaced_goes_on = false;
        // Of an answer that is read only now nobody knows whose it is.
        self.lives += 1;
    }

    /// Which host agent it is that answers, where only one does. What is the same before a call and after it is that
    /// of its answer.
    pub(super) fn the_only_one(&self) -> Option<u64> {
        (!self.replaced_goes_on).then_some(self.lives)
    }
}

/// How much of a round there certainly was of something that lasted for `idle` since the round's call began. Whether
/// the host agent did it before it heard of the call, in the round, or before its answer was read, nobody knows: what
/// may have been beside the round was there. Nor is it longer than the round.
pub(super) fn within_the_round(idle: Duration, since_the_call: Duration, round: Duration) -> Duration {
    let beside = since_the_call.saturating_sub(round);
    idle.saturating_sub(beside).min(round)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Moment {
        Moment::from_nanos(millis * 1_000_000)
    }

    #[test]
    fn what_may_have_been_beside_the_round_was_not_within_it() {
        let within = |idle, since_the_call, round| {
            let [idle, since_the_call, round] = [idle, since_the_call, round].map(Duration::from_millis);
            within_the_round(idle, since_the_call, round).as_millis()
        };
        assert_eq!(within(40, 100, 100), 40, "there was nothing beside it");
        assert_eq!(within(40, 110, 100), 30, "10 ms before or after it");
        assert_eq!(within(40, 200, 100), 0, "it may all have been before the round");
        assert_eq!(within(150, 160, 100), 90, "as much as the time beside it cannot hold");
        assert_eq!(within(150, 90, 100), 100, "never more than the round");
    }

    #[test]
    fn a_host_agent_stood_still_for_as_long_as_it_was_seen_to() {
        let mut host = HostView::default();
        host.on_stopped(at(10));
        host.on_went_on(at(30));
        host.on_stopped(at(50));
        let stood = |from, to| host.stood_still(at(from), at(to)).as_millis();
        assert_eq!([stood(0, 5), stood(0, 20), stood(15, 25), stood(0, 40)], [0, 10, 10, 20]);
        assert_eq!([stood(31, 49), stood(0, 60)], [0, 30], "it stands still yet");
    }

    #[test]
    fn nobody_knows_who_answered_while_a_host_agent_goes_on_beside_its_successor() {
        let mut host = HostView { lives: 2, ..HostView::default() };
        let before = host.the_only_one();
        assert_eq!(before, Some(2));
        host.on_replaced_goes_on();
        assert_eq!(host.the_only_one(), None);
        host.on_replaced_ended();
        assert!(host.the_only_one().is_some_and(|after| Some(after) != before), "nor of what came meanwhile");
    }
}
