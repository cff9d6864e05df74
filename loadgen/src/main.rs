//! `shootdown-loadgen`: see the library.

use std::io::{self, Write as _};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::error::ErrorKind;
use clap::{CommandFactory as _, Parser as _};
use rustix::process::{Signal, set_parent_process_death_signal};
use shootdown_loadgen::cli::{Cli, Command};
use shootdown_loadgen::demo::{self, Detail};
use shootdown_loadgen::report::Outcome;
use shootdown_loadgen::{chaos, device, host, rounds};
use tracing_subscriber::EnvFilter;

/// A read was stale, or something was lost.
const STALE: u8 = 1;

/// The run failed, or has shown nothing (EX_SOFTWARE).
const FAILED: u8 = 70;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).init();
    run(cli.command).unwrap_or_else(|error| {
        // Standard error may be closed.
        let _ = writeln!(io::stderr(), "shootdown-loadgen: {error:#}");
        ExitCode::from(FAILED)
    })
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Demo { load, output } => {
            let outcome = block_on(demo::run(&load, Detail::Full, output, &mut io::stdout().lock()))??;
            Ok(code_of(&outcome))
        }
        Command::Check { load, output } => {
            let outcome = block_on(demo::run(&load, Detail::Check, output, &mut io::stdout().lock()))??;
            Ok(code_of(&outcome))
        }
        Command::Run(args) => {
            let measured = block_on(rounds::run(&args, &mut io::stdout().lock()))??;
            Ok(if measured.is_valid() { ExitCode::SUCCESS } else { ExitCode::from(FAILED) })
        }
        Command::HostAgent => {
            die_with_the_parent()?;
            host::run()?;
            Ok(ExitCode::SUCCESS)
        }
        Command::DeviceAgent => {
            die_with_the_parent()?;
            device::run()?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Chaos(args) => {
            if let Err(error) = args.check() {
                Cli::command().error(ErrorKind::ArgumentConflict, error).exit();
            }
            let verdict = block_on(chaos::run(&args, &mut io::stdout().lock()))??;
            Ok(match (verdict.is_wrong(), verdict.has_shown_nothing()) {
                (true, _) => ExitCode::from(STALE),
                (false, true) => ExitCode::from(FAILED),
                (false, false) => ExitCode::SUCCESS,
            })
        }
        // Started by one who was killed before this could be told of it.
        Command::ChaosHost(_) | Command::ChaosDevice { .. }
            if die_with_the_parent().is_err() || !chaos::has_its_parent() =>
        {
            Ok(ExitCode::from(FAILED))
        }
        Command::ChaosHost(settings) => {
            chaos::run_host_agent(*settings)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::ChaosDevice { plan } => {
            chaos::run_device(&plan)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// On this thread: the agents that it starts die with it.
fn block_on<T>(future: impl Future<Output = T>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    Ok(runtime.context("no runtime could be started")?.block_on(future))
}

/// A parent that was killed cannot end its agents. (One that is killed before this line closes their
/// standard input, which ends them too.)
fn die_with_the_parent() -> anyhow::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL)).context("cannot be told of the parent's death")
}

fn code_of(outcome: &Outcome) -> ExitCode {
    let failings = outcome.failings();
    match failings.iter().any(|failing| failing.is_wrong()) {
        true => ExitCode::from(STALE),
        false if failings.is_empty() => ExitCode::SUCCESS,
        false => ExitCode::from(FAILED),
    }
}
