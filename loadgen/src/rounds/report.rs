//! What `run` writes.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::time::Duration;

use hdrhistogram::serialization::V2DeflateSerializer;
use hdrhistogram::serialization::interval_log::IntervalLogWriterBuilder;
use serde_json::{Value, json};

use super::RoundsError;
use super::loops::Measured;
use crate::cli::RoundsArgs;
use crate::report::{Stage, StageSummary};

/// Of the shape below.
const VERSION: u32 = 1;

pub(super) fn write_text(out: &mut impl Write, args: &RoundsArgs, measured: &Measured) -> io::Result<()> {
    let figures = StageSummary::of(Stage::Round, &measured.latency);
    match measured.asked {
        Some(asked) => {
            writeln!(out, "open loop: {:.0} rounds/s asked, {:.0} achieved", asked, measured.achieved)?;
        }
        None => {
            let callers = args.closed_loop.unwrap_or(0);
            writeln!(out, "closed loop: {callers} callers, {:.0} rounds/s achieved", measured.achieved)?;
        }
    }
    let StageSummary { count, p50_us, p90_us, p99_us, p999_us, p9999_us, max_us, .. } = figures;
    writeln!(
        out,
        "{:>10}{:>11}{:>11}{:>11}{:>11}{:>11}{:>11}",
        "rounds", "p50 us", "p90", "p99", "p99.9", "p99.99", "max"
    )?;
    writeln!(
        out,
        "{count:>10}{p50_us:>11.1}{p90_us:>11.1}{p99_us:>11.1}{p999_us:>11.1}{p9999_us:>11.1}{max_us:>11.1}"
    )?;
    if measured.is_valid() {
        return Ok(());
    }
    writeln!(
        out,
        "INVALID: {} failed, {} began late, {} were not answered; the figures are not those of the asked rate",
        measured.failed, measured.late, measured.unanswered
    )
}

pub(super) fn to_json(args: &RoundsArgs, measured: &Measured) -> Value {
    let figures = StageSummary::of(Stage::Round, &measured.latency);
    json!({
        "version": VERSION,
        "valid": measured.is_valid(),
        "loop": if measured.asked.is_some() { "open" } else { "closed" },
        "asked_per_s": measured.asked,
        "achieved_per_s": measured.achieved,
        "callers": args.closed_loop,
        "devices": args.devices,
        "seconds": args.seconds,
        "warm_up_s": args.warm_up,
        "range_pages": args.range_pages,
        "failed": measured.failed,
        "late": measured.late,
        "unanswered": measured.unanswered,
        "rounds": figures.count,
        "p50_us": figures.p50_us,
        "p90_us": figures.p90_us,
        "p99_us": figures.p99_us,
        "p999_us": figures.p999_us,
        "p9999_us": figures.p9999_us,
        "max_us": figures.max_us,
    })
}

/// One interval: the whole run, in nanoseconds.
pub(super) fn write_log(path: &Path, measured: &Measured) -> Result<(), RoundsError> {
    let failed = |error| RoundsError::Log { path: path.into(), error };
    let mut file = BufWriter::new(File::create(path).map_err(failed)?);
    let mut serializer = V2DeflateSerializer::new();
    let mut log = IntervalLogWriterBuilder::new()
        .add_comment("shootdown-loadgen run, nanoseconds")
        .begin_log_with(&mut file, &mut serializer)
        .map_err(failed)?;
    log.write_histogram(&measured.latency, Duration::ZERO, Duration::ZERO, None)
        .map_err(RoundsError::LogWrite)?;
    file.flush().map_err(failed)
}
