//! `demo` and `check`: a run, and its report.

use std::io::{self, IsTerminal as _, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use shootdown_client::Clock;

use crate::cli::{Load, Output};
use crate::fleet::{FleetError, Length, Progress, Workspace, conduct};
use crate::report::{self, Outcome};

/// What is told of a run, and while it runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Detail {
    /// Progress and latencies by stage besides.
    Full,
    /// What each path did, the verdict, and the command that repeats the run.
    Check,
}

/// Why a run came to no report.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// No directory for its files.
    #[error("no directory for the run could be made")]
    Workspace(#[source] io::Error),
    /// A process.
    #[error("the run failed")]
    Fleet(#[from] FleetError),
    /// The report could not be written.
    #[error("the report could not be written")]
    Write(#[source] io::Error),
}

/// Runs `load` and writes its report to `out`.
///
/// # Errors
/// [`DemoError`].
pub async fn run(
    load: &Load,
    detail: Detail,
    output: Output,
    out: &mut impl Write,
) -> Result<Outcome, DemoError> {
    let workspace = Workspace::new().map_err(DemoError::Workspace)?;
    let seed = load.seed.unwrap_or_else(|| Clock::boottime().now().as_nanos());
    let plan = load.plan(&workspace, seed);
    let length = Length { least: Duration::from_secs_f64(load.seconds), patience: load.patience };
    let bar = (detail == Detail::Full && io::stderr().is_terminal()).then(|| progress_bar(length.least));
    let watch = |progress: Progress| {
        if let Some(bar) = &bar {
            show(bar, progress);
        }
    };
    let conducted = Box::pin(conduct(&plan, length, load.noise(), watch)).await;
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    let conducted = conducted?;
    let outcome = Outcome {
        plan,
        seconds: conducted.took.as_secs_f64(),
        stopped_early: conducted.stopped_early,
        host: conducted.host,
        devices: conducted.devices,
    };
    write(out, load, detail, output, &outcome).map_err(DemoError::Write)?;
    Ok(outcome)
}

fn write(
    out: &mut impl Write,
    load: &Load,
    detail: Detail,
    output: Output,
    outcome: &Outcome,
) -> io::Result<()> {
    match output {
        Output::Json => {
            let mut json = report::to_json(outcome);
            json["repeat"] = load.repeat(&outcome.plan).into();
            writeln!(out, "{json:#}")?;
        }
        Output::Text => {
            if detail == Detail::Full {
                report::write_latencies(out, outcome)?;
            }
            report::write_paths(out, outcome)?;
            report::write_verdict(out, outcome)?;
            writeln!(out, "repeat: {}", load.repeat(&outcome.plan))?;
        }
    }
    out.flush()
}

fn progress_bar(length: Duration) -> ProgressBar {
    let bar = ProgressBar::new(u64::try_from(length.as_millis()).unwrap_or(u64::MAX));
    let style = ProgressStyle::with_template("{bar:30} {msg}");
    bar.with_style(style.expect("the template is a constant that is valid"))
}

fn show(bar: &ProgressBar, progress: Progress) {
    bar.set_position(u64::try_from(progress.elapsed.as_millis()).unwrap_or(u64::MAX));
    let Progress { elapsed, reads, operations, wrong } = progress;
    let seconds = elapsed.as_secs();
    bar.set_message(format!("{seconds} s, {operations} operations, {reads} reads checked, {wrong} wrong"));
}
