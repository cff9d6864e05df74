//! What a run has shown.

use std::time::Duration;

use serde::Serialize;

use super::inject::Tally;
use super::plan::{Broken, FaultKind};
use super::shared::{Counts, Status};
use super::vmm::Ledger;

/// How much longer than T_ack and T_fence a round may take, in percent: the machine is shared.
const ALLOWANCE: u32 = 20;

/// Everything that is known of a run that has ended.
#[derive(Debug, Clone, Serialize)]
pub struct Verdict {
    /// Of the report's form.
    pub version: u32,
    /// Nothing is wrong, and something was shown.
    pub passed: bool,
    /// What is wrong, or was not shown; empty where it passed.
    pub failings: Vec<String>,
    /// Of every random choice.
    pub seed: u64,
    /// The command that repeats the run.
    pub repeat: String,
    /// How long faults were injected, in seconds.
    pub seconds: f64,
    /// The rule that was broken on purpose.
    #[serde(rename = "break")]
    pub rule: Option<Broken>,
    /// Pages that a device read through a translation that was not the page's any more.
    pub stale_reads: u64,
    /// Writes of devices that are not where they were written.
    pub lost_writes: u64,
    /// The longest round, as the host agent measured it, without the time for which it was stopped itself;
    /// in milliseconds.
    pub longest_round_ms: f64,
    /// T_ack and T_fence together, in milliseconds.
    pub bound_ms: f64,
    /// What a round must not exceed, in milliseconds.
    pub limit_ms: f64,
    /// Faults that were asked for and cannot be injected here, and why.
    pub left_out: Vec<LeftOut>,
    #[serde(flatten)]
    pub(crate) tally: Tally,
    /// The program whose memory it is.
    pub(crate) host: Ledger,
    /// The devices together.
    pub(crate) devices: Devices,
    /// What was found, in the order in which it was.
    pub findings: Vec<String>,
    #[serde(skip)]
    shown: Vec<&'static str>,
    #[serde(skip)]
    wrong: bool,
}

/// Faults that are left out.
#[derive(Debug, Clone, Serialize)]
pub struct LeftOut {
    /// Which.
    pub fault: FaultKind,
    /// Why.
    pub because: String,
}

/// The devices together.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Devices {
    pub(crate) reads: u64,
    pub(crate) writes: u64,
    pub(crate) stale_reads: u64,
    pub(crate) lost_writes: u64,
    /// Reads whose lease had ended before they were done; they were not used.
    pub(crate) discarded_reads: u64,
    /// Writes that were done only after the lease and its margin: outside of what a lease promises.
    pub(crate) late_writes: u64,
    pub(crate) refused_uses: u64,
    pub(crate) sessions: u64,
    pub(crate) flushes: u64,
    pub(crate) grants: u64,
    pub(crate) lapses: u64,
    pub(crate) refusals_of_replaced_host_agents: u64,
    pub(crate) grants_before_the_flush: u64,
}

impl Devices {
    pub(crate) fn add(&mut self, status: &Status, workers: &[Counts]) {
        self.sessions += status.sessions;
        self.flushes += status.flushes;
        self.grants += status.grants;
        self.lapses += status.lapses;
        self.refusals_of_replaced_host_agents += status.superseded;
        self.grants_before_the_flush += status.unflushed_grants;
        for counts in workers {
            self.reads += counts.reads;
            self.writes += counts.writes;
            self.stale_reads += counts.stale;
            self.lost_writes += counts.lost;
            self.discarded_reads += counts.discarded;
            self.late_writes += counts.late;
            self.refused_uses += counts.refused;
        }
    }
}

/// What is known when a run has ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) seed: u64,
    pub(crate) repeat: String,
    pub(crate) seconds: f64,
    pub(crate) rule: Option<Broken>,
    /// T_ack and T_fence together.
    pub(crate) bound: Duration,
    pub(crate) left_out: Vec<LeftOut>,
    pub(crate) tally: Tally,
    pub(crate) host: Ledger,
    pub(crate) devices: Devices,
    pub(crate) findings: Vec<String>,
    /// What the end of the run was to bring and did not.
    pub(crate) unfinished: Vec<&'static str>,
}

impl Ended {
    /// Judges it.
    pub(crate) fn judge(self) -> Verdict {
        let Self { seed, repeat, seconds, rule, bound, left_out, tally, host, devices, findings, unfinished } =
            self;
        let millis = |time: Duration| time.as_secs_f64() * 1e3;
        let limit = bound * (100 + ALLOWANCE) / 100;
        let longest = Duration::from_nanos(host.longest_round_ns);
        let lost = devices.lost_writes + host.lost_writes + host.writes_after_release;
        let mut wrong = Vec::new();
        let mut must_be_none = |count: u64, what: &str| {
            if count > 0 {
                wrong.push(format!("{what}: {count}"));
            }
        };
        must_be_none(devices.stale_reads, "stale reads");
        must_be_none(lost, "lost writes");
        must_be_none(host.releases_in_grace, "pages released inside a grace period");
        must_be_none(host.second_outcomes, "calls with two outcomes");
        must_be_none(devices.grants_before_the_flush, "grants before everything was flushed");
        must_be_none(tally.went_on_past_the_lease, "devices that went on past their lease");
        must_be_none(tally.acted_though_replaced, "host agents that acted though they were replaced");
        must_be_none(tally.not_recovered, "times that nothing worked again after a fault");
        if longest > limit {
            wrong.push(format!("a round took {longest:?}, and must not take more than {limit:?}"));
        }
        wrong.extend(unfinished.iter().map(|what| format!("at the end, {what}")));
        let injected: u64 = tally.faults.values().map(|fault| fault.injected).sum();
        let shown = [
            (devices.reads, "no device read"),
            (devices.writes, "no device wrote"),
            (host.rounds, "no round was over"),
            (injected, "no fault was injected"),
        ];
        let shown: Vec<&str> = shown.iter().filter(|(count, _)| *count == 0).map(|(_, what)| *what).collect();
        let mut failings = wrong.clone();
        failings.extend(shown.iter().map(|what| format!("nothing was shown: {what}")));
        Verdict {
            version: 1,
            passed: failings.is_empty(),
            failings,
            seed,
            repeat,
            seconds,
            rule,
            stale_reads: devices.stale_reads,
            lost_writes: lost,
            longest_round_ms: millis(longest),
            bound_ms: millis(bound),
            limit_ms: millis(limit),
            left_out,
            tally,
            host,
            devices,
            findings,
            shown,
            wrong: !wrong.is_empty(),
        }
    }
}

impl Verdict {
    /// Something is wrong, whatever else was not shown.
    #[must_use]
    pub fn is_wrong(&self) -> bool {
        self.wrong
    }

    /// Nothing was read, written, moved or broken.
    #[must_use]
    pub fn has_shown_nothing(&self) -> bool {
        !self.shown.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chaos::inject::FaultTally;

    fn ended() -> Ended {
        let mut tally = Tally::default();
        tally.faults.insert(FaultKind::HostKill, FaultTally { injected: 1, ..FaultTally::default() });
        Ended {
            seed: 1,
            repeat: String::new(),
            seconds: 1.0,
            rule: None,
            bound: Duration::from_millis(700),
            left_out: Vec::new(),
            tally,
            host: Ledger { rounds: 1, longest_round_ns: 839_000_000, ..Ledger::default() },
            devices: Devices { reads: 1, writes: 1, ..Devices::default() },
            findings: Vec::new(),
            unfinished: Vec::new(),
        }
    }

    #[test]
    fn a_run_in_which_all_is_well_has_passed() {
        let verdict = ended().judge();
        assert!(verdict.passed && !verdict.is_wrong() && !verdict.has_shown_nothing(), "{verdict:?}");
    }

    #[test]
    fn each_thing_that_is_wrong_fails_the_run() {
        let changes: [fn(&mut Ended); 11] = [
            |run| run.devices.stale_reads = 1,
            |run| run.devices.lost_writes = 1,
            |run| run.host.lost_writes = 1,
            |run| run.host.writes_after_release = 1,
            |run| run.host.releases_in_grace = 1,
            |run| run.host.second_outcomes = 1,
            |run| run.devices.grants_before_the_flush = 1,
            |run| run.tally.went_on_past_the_lease = 1,
            |run| run.tally.acted_though_replaced = 1,
            |run| run.tally.not_recovered = 1,
            |run| run.host.longest_round_ns = 841_000_000,
        ];
        for (number, change) in changes.iter().enumerate() {
            let mut run = ended();
            change(&mut run);
            let verdict = run.judge();
            assert!(
                verdict.is_wrong() && !verdict.passed && verdict.failings.len() == 1,
                "{number}: {verdict:?}"
            );
        }
        let mut run = ended();
        run.unfinished.push("a device could not use every page");
        assert!(run.judge().is_wrong());
    }

    #[test]
    fn a_run_that_did_nothing_has_shown_nothing() {
        let mut run = ended();
        run.host.rounds = 0;
        let verdict = run.judge();
        assert!(verdict.has_shown_nothing() && !verdict.is_wrong() && !verdict.passed);
    }
}
