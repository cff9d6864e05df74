//! The report for people.

use std::io::{self, Write};

use super::outcome::Outcome;
use crate::control::{Branches, PathTally};
use crate::path::Path;

/// The most stale reads that are told in full.
const MOST_TOLD: usize = 8;

/// Latency by stage, in microseconds.
///
/// # Errors
/// What `out` fails with.
pub fn write_latencies(out: &mut impl Write, run: &Outcome) -> io::Result<()> {
    writeln!(
        out,
        "{:<12}{:>10}{:>11}{:>11}{:>11}{:>11}{:>11}",
        "stage (us)", "count", "p50", "p90", "p99", "p99.9", "max"
    )?;
    for stage in &run.host.stages {
        writeln!(
            out,
            "{:<12}{:>10}{:>11.1}{:>11.1}{:>11.1}{:>11.1}{:>11.1}",
            stage.stage.name(),
            stage.count,
            stage.p50_us,
            stage.p90_us,
            stage.p99_us,
            stage.p999_us,
            stage.max_us
        )?;
    }
    writeln!(out)
}

/// What each path did.
///
/// # Errors
/// What `out` fails with.
pub fn write_paths(out: &mut impl Write, run: &Outcome) -> io::Result<()> {
    writeln!(
        out,
        "{:<14}{:>11}{:>9}{:>9}{:>13}{:>13}{:>13}",
        "path", "operations", "rounds", "notices", "reads after", "stale reads", "lost writes"
    )?;
    for path in Path::EVERY {
        let tally = run.path(path);
        let chosen = run.plan.paths.contains(&path);
        if !chosen && tally.operations == 0 {
            continue;
        }
        let name = if chosen { path.name().to_owned() } else { format!("({path})") };
        let (operations, reads) = (tally.operations, run.reads_after(path));
        // A path that takes nothing from devices has no rounds to count.
        let [rounds, notices, reads] = if path.has_rounds() {
            [tally.rounds.to_string(), tally.notices.to_string(), reads.to_string()]
        } else {
            ["-".to_owned(), "-".to_owned(), if reads > 0 { reads.to_string() } else { "-".to_owned() }]
        };
        let (stale, lost) = (run.stale_after(path), run.lost_after(path));
        writeln!(out, "{name:<14}{operations:>11}{rounds:>9}{notices:>9}{reads:>13}{stale:>13}{lost:>13}")?;
    }
    writeln!(out)?;
    for path in Path::EVERY.into_iter().filter(|path| path.asks_young()) {
        let PathTally { asked_young, young, .. } = run.path(path);
        if asked_young > 0 {
            let no = asked_young - young;
            writeln!(out, "test_young: {path} asked {asked_young} times, {young} yes, {no} no")?;
        }
    }
    writeln!(out, "{} page tables freed", run.host.tables_freed)?;
    let Branches { cow_reuse, cow_copy, cow_lost_race, swap_in, swap_fail, swap_again } = run.host.branches;
    writeln!(out, "copy on write: {cow_reuse} reused, {cow_copy} copied, {cow_lost_race} lost the race")?;
    writeln!(
        out,
        "{swap_in} pages swapped in; {swap_fail} not taken because they are locked, {swap_again} because they are busy"
    )?;
    writeln!(out)
}

/// What was read, what was found, and what that means.
///
/// # Errors
/// What `out` fails with.
pub fn write_verdict(out: &mut impl Write, run: &Outcome) -> io::Result<()> {
    let totals = run.totals();
    writeln!(
        out,
        "{} reads by {} devices in {:.1} s: {} from copies, {} TLB hits, {} faults, {} refused, {} torn by a store",
        totals.reads,
        run.plan.devices,
        run.seconds,
        totals.copy_reads,
        totals.tlb_hits,
        totals.faults,
        totals.refused,
        totals.torn
    )?;
    writeln!(
        out,
        "{} reads by the CPU, {} writes and {} flushes by devices; seed {}",
        run.host.loads, totals.writes, totals.flushes, run.plan.seed
    )?;
    if let (Some(first), Some(last)) = (run.host.memory.get(1), run.host.memory.last()) {
        writeln!(
            out,
            "host agent: {} KiB resident after {:.0} s, {} after {:.0}, beside {} frames",
            first.rss_kib, first.seconds, last.rss_kib, last.seconds, last.frames
        )?;
    }
    if let Some(left) = &run.host.left_behind {
        writeln!(out, "left behind: {left}")?;
    }
    if let Some(rule) = run.plan.rule {
        writeln!(out, "broken on purpose: {}", rule.name())?;
    }
    if run.stopped_early {
        writeln!(out, "stopped early: something was found")?;
    }
    let failings = run.failings();
    if failings.is_empty() {
        return writeln!(out, "PASSED: 0 stale reads, 0 lost writes");
    }
    for stale in run.stale().take(MOST_TOLD) {
        writeln!(out, "  stale: {stale}")?;
    }
    for lost in run.lost().take(MOST_TOLD) {
        writeln!(out, "  lost: {lost}")?;
    }
    for lost in run.lost_young().take(MOST_TOLD) {
        writeln!(out, "  lost: {lost}")?;
    }
    let history = run.shortest_history();
    if !history.is_empty() {
        writeln!(out, "what led to the first of them:")?;
    }
    for happened in history {
        writeln!(out, "  {happened}")?;
    }
    let told: Vec<String> = failings.iter().map(ToString::to_string).collect();
    writeln!(out, "FAILED: {}", told.join("; "))
}
