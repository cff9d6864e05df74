//! `shootdownd`: configuration, telemetry, run, exit code.

use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use shootdown_server::admin::{self, AdminArgs, AdminError};
use shootdown_server::config::{Config, ConfigError, Settings};
use shootdown_server::telemetry::{self, LogFormat};
use shootdown_server::{JournalError, Loss, StartError};
use tokio::signal::unix::{SignalKind, signal};

/// The host agent: tells remote devices what happens to this machine's memory, and waits for them.
#[derive(Debug, Parser)]
#[command(name = "shootdownd", version)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    /// Read settings from this file (TOML); flags and the environment win over it
    #[arg(long, env = "SHOOTDOWND_CONFIG", global = true)]
    config: Option<PathBuf>,
    /// How to write the log
    #[arg(long, env = "SHOOTDOWND_LOG_FORMAT", default_value = "text", value_enum)]
    log_format: LogFormat,
    #[command(flatten)]
    settings: Settings,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Check the settings and exit: 0 when they are right, 78 when not
    CheckConfig,
    /// Ask a host agent that runs, and end sessions of devices that do not come back
    Admin(AdminArgs),
}

/// Exit codes of sysexits.h, as service managers know them.
const EX_DATAERR: u8 = 65;
const EX_UNAVAILABLE: u8 = 69;
const EX_OSERR: u8 = 71;
const EX_IOERR: u8 = 74;
const EX_TEMPFAIL: u8 = 75;
const EX_NOPERM: u8 = 77;
const EX_CONFIG: u8 = 78;

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Some(Command::Admin(args)) = &cli.command {
        return administer(args);
    }
    if let Err(error) = telemetry::start(cli.log_format) {
        return fail(&anyhow::Error::from(error).context("RUST_LOG is not a valid filter"), EX_CONFIG);
    }
    let config = match configure(cli.config, cli.settings) {
        Ok(config) => config,
        Err(error) => return fail(&error.into(), EX_CONFIG),
    };
    if let Some(Command::CheckConfig) = cli.command {
        return ExitCode::SUCCESS;
    }
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error.into(), EX_OSERR),
    };
    match runtime.block_on(run(config)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let code = exit_code(&error);
            fail(&error, code)
        }
    }
}

/// Another process than the host agent, which it asks: no settings, no log.
fn administer(args: &AdminArgs) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let asked = runtime.map_err(|error| (anyhow::Error::from(error), EX_OSERR)).and_then(|runtime| {
        let asked = runtime.block_on(admin::run(args, &mut io::stdout().lock()));
        asked.map_err(|error| {
            let code = match &error {
                AdminError::NoSession { .. } | AdminError::NoAddressSpace { .. } => EX_DATAERR,
                AdminError::NoLeave { .. } | AdminError::Denied { .. } => EX_NOPERM,
                AdminError::Write(_) => EX_IOERR,
                _ => EX_UNAVAILABLE,
            };
            (error.into(), code)
        })
    });
    match asked {
        Ok(()) => ExitCode::SUCCESS,
        Err((error, code)) => {
            // Standard error may be closed.
            let _ = writeln!(io::stderr(), "shootdownd: {error:#}");
            ExitCode::from(code)
        }
    }
}

fn configure(file: Option<PathBuf>, flags: Settings) -> Result<Config, ConfigError> {
    let settings = match file {
        Some(path) => flags.or(Settings::from_file(&path)?),
        None => flags,
    };
    settings.resolve()
}

async fn run(config: Config) -> anyhow::Result<()> {
    // Before anything can be waited for: a signal that comes early is not lost.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    if config.state.is_none() {
        tracing::warn!(
            "without --state-dir a restart is not covered: the next run will not wait for devices that hold leases of this one"
        );
    }
    let running = shootdown_server::start(config)?;
    for address in &running.addresses().device {
        tracing::info!(%address, "listening for devices");
    }
    // Fails only outside systemd, where nobody listens.
    drop(sd_notify::notify(&[sd_notify::NotifyState::Ready]));
    tokio::select! {
        biased;
        // First: a host agent that is superseded has nothing to drain.
        () = running.superseded() => {
            let loss = running.loss().expect("it is known before it is told");
            running.abandon().await;
            return Err(loss.into());
        }
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping");
    drop(sd_notify::notify(&[sd_notify::NotifyState::Stopping]));
    running.shutdown().await;
    Ok(())
}

fn exit_code(error: &anyhow::Error) -> u8 {
    match error.downcast_ref::<Loss>() {
        Some(Loss::Superseded) => return EX_TEMPFAIL,
        // A service manager that started it again at once would start one that waits for nobody.
        Some(Loss::JournalRemoved) => return EX_CONFIG,
        None => {}
    }
    match error.downcast_ref::<StartError>() {
        Some(StartError::Listen { error, .. }) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            EX_NOPERM
        }
        Some(StartError::Listen { .. }) => EX_UNAVAILABLE,
        Some(StartError::Journal(JournalError::Held { .. })) => EX_TEMPFAIL,
        Some(StartError::Journal(JournalError::Damaged { .. })) => EX_CONFIG,
        Some(StartError::Journal(JournalError::Folder { error, .. } | JournalError::Io { error, .. }))
            if is_a_wrong_place(error.kind()) =>
        {
            EX_CONFIG
        }
        _ => EX_OSERR,
    }
}

/// Another state directory would do, or other permissions on this one; trying again does not.
fn is_a_wrong_place(kind: std::io::ErrorKind) -> bool {
    use std::io::ErrorKind::{
        AlreadyExists, NotADirectory, NotFound, PermissionDenied, ReadOnlyFilesystem, Unsupported,
    };
    matches!(
        kind,
        AlreadyExists | NotADirectory | NotFound | PermissionDenied | ReadOnlyFilesystem | Unsupported
    )
}

fn fail(error: &anyhow::Error, code: u8) -> ExitCode {
    tracing::error!("{error:#}");
    ExitCode::from(code)
}
