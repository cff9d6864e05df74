//! What a run has shown.

use std::time::Duration;

use serde::Serialize;

use super::inject::{RECOVERY, Tally};
use super::plan::{Broken, FaultKind};
use super::shared::{Counts, Status};
use super::vmm::Ledger;
use crate::report::Failing;

/// How much longer than T_ack and T_fence a round may take, in percent: the machine is shared.
const ALLOWANCE: u32 = 20;

/// And so much at least: how long a scheduler keeps a process waiting is no part of the bound.
const LEAST_ALLOWANCE: Duration = Duration::from_millis(100);

/// How often the machine can hold one round up: caller, host agent and device, there and back, and a lease's end. What
/// takes longer than so many stalls is not the machine's doing.
const STALLS_A_ROUND: u32 = 8;

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
    /// The longest without the time in which the host agent's threads waited for a processor, in milliseconds.
    pub longest_running_ms: f64,
    /// T_ack and T_fence together, in milliseconds.
    pub bound_ms: f64,
    /// What a round must not exceed, in milliseconds.
    pub limit_ms: f64,
    /// The longest that the machine kept the run's own process from running, in milliseconds.
    pub longest_stall_ms: f64,
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
    silent: bool,
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
    /// Of the lease.
    pub(crate) margin: Duration,
    /// The longest that the machine kept a process from running.
    pub(crate) longest_stall: Duration,
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
        let Self { seed, repeat, seconds, rule, bound, margin, longest_stall, .. } = self;
        let Self { left_out, tally, host, devices, findings, unfinished, .. } = self;
        let millis = |time: Duration| time.as_secs_f64() * 1e3;
        let limit = bound + (bound * ALLOWANCE / 100).max(LEAST_ALLOWANCE);
        let longest = Duration::from_nanos(host.longest_round_ns);
        let running = Duration::from_nanos(host.longest_running_ns);
        let lost = devices.lost_writes + host.lost_writes + host.writes_after_release;
        let mut wrong = Vec::new();
        let mut must_be_none = |count: u64, what: &str| {
            if count > 0 {
                wrong.push(format!("{what}: {count}"));
            }
        };
        must_be_none(devices.stale_reads, "stale reads");
        // A write that the machine let happen only after the lease and its margin is outside of what a lease
        // promises, and may be what was found: neither shows that a rule is broken, nor that none is.
        let unclear = rule.is_none() && lost > 0 && devices.late_writes > 0;
        must_be_none(if unclear { 0 } else { lost }, "lost writes");
        must_be_none(host.releases_in_grace, "pages released inside a grace period");
        must_be_none(host.second_outcomes, "calls with two outcomes");
        must_be_none(devices.grants_before_the_flush, "grants before everything was flushed");
        must_be_none(tally.went_on_past_the_lease, "devices that went on past their lease");
        must_be_none(tally.acted_though_replaced, "host agents that acted though they were replaced");
        let not_found = rule.is_some() && wrong.is_empty();
        // What is slow is no broken promise of safety: it does not show that a rule was broken, nor that anything is
        // wrong where the machine did not run the processes for longer than a lease allows for.
        let (mut slow, mut starved) = (Vec::new(), None);
        if tally.not_recovered > 0 {
            slow.push(format!("times that nothing worked again after a fault: {}", tally.not_recovered));
        }
        if longest > limit {
            let said = format!("a round took {longest:?}, and must not take more than {limit:?}");
            // The host agent itself was not run for as long as its round was too long.
            if running <= limit { starved = Some(said) } else { slow.push(said) }
        }
        slow.extend(unfinished.iter().map(|what| format!("at the end, {what}")));
        let counted = if starved.is_some() { running } else { longest };
        let stalls = longest_stall > margin && counted <= limit + longest_stall * STALLS_A_ROUND;
        // Where nothing goes on any more it was waited for so long that only stalls of that order explain it.
        let stands_still = tally.not_recovered > 0 || !unfinished.is_empty();
        let stalls = stalls && (!stands_still || longest_stall * STALLS_A_ROUND >= RECOVERY);
        let excused = stalls || slow.is_empty();
        let stalled = excused && (!slow.is_empty() || starved.is_some());
        let is_wrong = !wrong.is_empty() || (!excused && !not_found);
        slow.extend(starved);
        let injected: u64 = tally.faults.values().map(|fault| fault.injected).sum();
        let shown = [
            (devices.reads, "no device read"),
            (devices.writes, "no device wrote"),
            (host.rounds, "no round was over"),
            (injected, "no fault was injected"),
        ];
        let shown: Vec<&str> = shown.iter().filter(|(count, _)| *count == 0).map(|(_, what)| *what).collect();
        let mut failings = [wrong, slow].concat();
        failings.extend(shown.iter().map(|what| format!("nothing was shown: {what}")));
        failings.extend(unclear.then(|| {
            let late = devices.late_writes;
            format!(
                "nothing was shown: lost writes: {lost}, and {late} writes came later than the margin after their \
                 lease, which may have done that; this machine needs a longer --lease-margin"
            )
        }));
        failings.extend(stalled.then(|| {
            format!(
                "nothing was shown: the machine kept a process waiting for {longest_stall:?}, and the margin of the \
                 lease is {margin:?}; no round took longer than {running:?} of the time that the host agent was run"
            )
        }));
        failings.extend(not_found.then(|| Failing::BreakNotFound.to_string()));
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
            longest_running_ms: millis(running),
            bound_ms: millis(bound),
            limit_ms: millis(limit),
            longest_stall_ms: millis(longest_stall),
            left_out,
            tally,
            host,
            devices,
            findings,
            silent: not_found || unclear || stalled || !shown.is_empty(),
            wrong: is_wrong,
        }
    }
}

impl Verdict {
    /// Something is wrong, whatever else was not shown; where a rule was broken on purpose, what shows that.
    #[must_use]
    pub fn is_wrong(&self) -> bool {
        self.wrong
    }

    /// Nothing was read, written, moved or broken, or a rule was broken and not found, or the machine kept no
    /// lease.
    #[must_use]
    pub fn has_shown_nothing(&self) -> bool {
        self.silent
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chaos::inject::FaultTally;

    /// The longest round took so long, and the host agent ran all the time.
    fn of_rounds(longest: u64) -> Ledger {
        Ledger { rounds: 1, longest_round_ns: longest, longest_running_ns: longest, ..Ledger::default() }
    }

    fn ended() -> Ended {
        let mut tally = Tally::default();
        tally.faults.insert(FaultKind::HostKill, FaultTally { injected: 1, ..FaultTally::default() });
        Ended {
            seed: 1,
            repeat: String::new(),
            seconds: 1.0,
            rule: None,
            bound: Duration::from_millis(700),
            margin: Duration::from_millis(100),
            longest_stall: Duration::from_millis(3),
            left_out: Vec::new(),
            tally,
            host: of_rounds(839_000_000),
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
            |run| run.host = of_rounds(841_000_000),
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
    fn a_broken_rule_that_is_not_found_is_not_passed() {
        let mut run = ended();
        run.rule = Some(Broken::Lease);
        let verdict = run.judge();
        assert!(verdict.has_shown_nothing() && !verdict.is_wrong() && !verdict.passed, "{verdict:?}");
        assert_eq!(verdict.failings, [Failing::BreakNotFound.to_string()]);
        // Nor is it by what a slow machine does, too.
        let mut run = ended();
        (run.rule, run.host) = (Some(Broken::Lease), of_rounds(841_000_000));
        let verdict = run.judge();
        assert!(verdict.has_shown_nothing() && !verdict.is_wrong() && verdict.failings.len() == 2);
        let mut run = ended();
        (run.rule, run.tally.went_on_past_the_lease) = (Some(Broken::Lease), 1);
        let verdict = run.judge();
        assert!(verdict.is_wrong() && !verdict.has_shown_nothing() && verdict.failings.len() == 1);
    }

    #[test]
    fn what_writes_past_a_lease_may_have_done_is_not_told_as_found() {
        let explained: [fn(&mut Ended); 3] = [
            |run| run.devices.lost_writes = 1,
            |run| run.host.lost_writes = 1,
            |run| run.host.writes_after_release = 1,
        ];
        for change in explained {
            let mut run = ended();
            run.devices.late_writes = 2;
            change(&mut run);
            let verdict = run.judge();
            assert!(!verdict.passed && !verdict.is_wrong() && verdict.has_shown_nothing(), "{verdict:?}");
            assert!(verdict.failings.iter().any(|failing| failing.contains("2 writes")), "{verdict:?}");
        }
        let mut run = ended();
        run.devices.late_writes = 2;
        assert!(run.judge().passed, "they met nothing");
        let mut run = ended();
        (run.devices.late_writes, run.devices.stale_reads) = (2, 1);
        assert!(run.judge().is_wrong(), "a read that is used was looked at the lease for after it");
        let mut run = ended();
        (run.devices.late_writes, run.devices.lost_writes) = (2, 1);
        run.rule = Some(Broken::TimeoutIsAck);
        assert!(run.judge().is_wrong(), "it is known what is broken");
    }

    #[test]
    fn a_short_bound_leaves_a_shared_machine_its_time() {
        let mut run = ended();
        (run.bound, run.host) = (Duration::from_millis(105), of_rounds(204_000_000));
        assert!(run.judge().passed);
        let mut run = ended();
        (run.bound, run.host) = (Duration::from_millis(105), of_rounds(206_000_000));
        assert!(run.judge().is_wrong());
    }

    #[test]
    fn what_is_slow_where_the_machine_stalls_for_longer_than_the_margin_is_not_told_as_found() {
        let slow: [fn(&mut Ended); 3] = [
            |run| run.host = of_rounds(841_000_000),
            |run| run.tally.not_recovered = 1,
            |run| run.unfinished.push("a device did not leave"),
        ];
        for (change, stall) in slow.into_iter().zip([101, 1875, 1875]) {
            let mut run = ended();
            change(&mut run);
            run.longest_stall = Duration::from_millis(stall);
            let verdict = run.judge();
            assert!(!verdict.passed && !verdict.is_wrong() && verdict.has_shown_nothing(), "{verdict:?}");
            let said = format!("{:?}", Duration::from_millis(stall));
            assert!(verdict.failings.iter().any(|failing| failing.contains(&said)), "{verdict:?}");
            let mut run = ended();
            change(&mut run);
            run.longest_stall = Duration::from_millis(stall - 1);
            assert!(run.judge().is_wrong() || stall == 101, "a hiccup does not explain that nothing works");
        }
        let mut run = ended();
        run.longest_stall = Duration::from_millis(101);
        assert!(run.judge().passed, "it was fast enough all the same");
        let mut run = ended();
        (run.host, run.longest_stall) = (of_rounds(2_000_000_000), Duration::from_millis(101));
        assert!(run.judge().is_wrong(), "stalls do not explain that");
        let mut run = ended();
        run.host = Ledger { longest_running_ns: 839_000_000, ..of_rounds(2_000_000_000) };
        let verdict = run.judge();
        assert!(
            verdict.has_shown_nothing() && !verdict.is_wrong() && !verdict.passed,
            "it was not run: {verdict:?}"
        );
        let mut run = ended();
        run.host = Ledger { longest_running_ns: 839_000_000, ..of_rounds(2_000_000_000) };
        run.tally.not_recovered = 1;
        assert!(run.judge().is_wrong(), "that excuses its round, and nothing else");
        let mut run = ended();
        (run.devices.stale_reads, run.longest_stall) = (1, Duration::from_millis(101));
        assert!(run.judge().is_wrong(), "no machine is too slow to be safe on");
    }

    #[test]
    fn a_run_that_did_nothing_has_shown_nothing() {
        let mut run = ended();
        run.host.rounds = 0;
        let verdict = run.judge();
        assert!(verdict.has_shown_nothing() && !verdict.is_wrong() && !verdict.passed);
    }
}
