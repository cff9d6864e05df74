//! The report.

use std::io::{self, Write};

use super::verdict::Verdict;
use crate::cli::Output;

/// The most findings that are told to people.
const MOST_TOLD: usize = 12;

pub(crate) fn write(out: &mut impl Write, verdict: &Verdict, output: Output) -> io::Result<()> {
    match output {
        Output::Json => {
            let json = serde_json::to_value(verdict).map_err(io::Error::other)?;
            writeln!(out, "{json:#}")?;
        }
        Output::Text => write_text(out, verdict)?,
    }
    out.flush()
}

fn write_text(out: &mut impl Write, verdict: &Verdict) -> io::Result<()> {
    writeln!(out, "{:<24}{:>9}  outcomes", "fault", "injected")?;
    for (kind, fault) in &verdict.tally.faults {
        let outcomes: Vec<String> =
            fault.outcomes.iter().map(|(outcome, count)| format!("{outcome} {count}")).collect();
        writeln!(out, "{:<24}{:>9}  {}", kind.name(), fault.injected, outcomes.join(", "))?;
    }
    for left_out in &verdict.left_out {
        writeln!(out, "{:<24}{:>9}  left out: {}", left_out.fault.name(), "-", left_out.because)?;
    }
    let (host, devices) = (&verdict.host, &verdict.devices);
    writeln!(out)?;
    writeln!(
        out,
        "rounds          {} over, {} not quiesced at first; targets: {} acked, {} left, {} fenced",
        host.rounds, host.not_quiesced_first, host.acked, host.left, host.fenced
    )?;
    writeln!(
        out,
        "longest round   {:.0} ms, {:.0} ms without waits for a processor; T_ack and T_fence are {:.0} ms, the limit \
         is {:.0} ms; the machine kept a process waiting for {:.0} ms",
        verdict.longest_round_ms,
        verdict.longest_running_ms,
        verdict.bound_ms,
        verdict.limit_ms,
        verdict.longest_stall_ms
    )?;
    writeln!(
        out,
        "grace           {} ms at most until the next round was over; {} pages released inside one",
        verdict.tally.longest_grace_ms, host.releases_in_grace
    )?;
    writeln!(
        out,
        "retries         {} calls were retried, {} of them had exactly one outcome ({} tries at most); {} \
         results and {} refusals of replaced host agents",
        host.retried_calls,
        host.retried_with_one_outcome,
        host.most_tries,
        host.superseded_results,
        host.superseded_refusals + devices.refusals_of_replaced_host_agents
    )?;
    writeln!(
        out,
        "room            {} calls were refused for want of it, {} of them once more when there was room",
        host.refused_for_want_of_room, host.refused_again
    )?;
    writeln!(
        out,
        "devices         {} reads, {} writes, {} reads not used; {} sessions, {} flushes of everything, {} late \
         writes",
        devices.reads,
        devices.writes,
        devices.discarded_reads,
        devices.sessions,
        devices.flushes,
        devices.late_writes
    )?;
    writeln!(out, "releases        {} frames", host.releases)?;
    writeln!(out, "stale reads     {}", verdict.stale_reads)?;
    writeln!(out, "lost writes     {}", verdict.lost_writes)?;
    for finding in verdict.findings.iter().take(MOST_TOLD) {
        writeln!(out, "  {finding}")?;
    }
    if verdict.findings.len() > MOST_TOLD {
        writeln!(out, "  … and {} more", verdict.findings.len() - MOST_TOLD)?;
    }
    for failing in &verdict.failings {
        writeln!(out, "FAILED: {failing}")?;
    }
    if verdict.passed {
        writeln!(out, "passed after {:.1} s", verdict.seconds)?;
    }
    writeln!(out, "repeat: {}", verdict.repeat)
}
