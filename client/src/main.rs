//! `shootdown-agent`: the reference accelerator of Shootdown. See [`shootdown_client::agent`].

use std::error::Error;
use std::io::Write as _;
use std::process::ExitCode;

use clap::Parser as _;
use shootdown_client::agent::{self, Command, Config, Flags, LogFormat};
use tokio::signal::unix::{SignalKind, signal};

const EX_SOFTWARE: u8 = 70;
const EX_OSERR: u8 = 71;
const EX_CONFIG: u8 = 78;

fn main() -> ExitCode {
    let flags = Flags::parse();
    let config = match flags.config() {
        Ok(config) => config,
        Err(error) => return fail(&error, EX_CONFIG),
    };
    if flags.command() == Some(Command::CheckConfig) {
        return match writeln!(std::io::stdout(), "{config:#?}") {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error, EX_SOFTWARE),
        };
    }
    start_logging(config.log_format);
    // One thread: waking a second costs more than all that one invalidation does.
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error, EX_OSERR),
    };
    match runtime.block_on(run(config)) {
        Ok(()) => ExitCode::SUCCESS,
        Err((error, code)) => fail(&*error, code),
    }
}

async fn run(config: Config) -> Result<(), (Box<dyn Error>, u8)> {
    let no_signals = |error: std::io::Error| (Box::from(error), EX_OSERR);
    let mut terminate = signal(SignalKind::terminate()).map_err(no_signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(no_signals)?;
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    match agent::run(config, stop).await {
        Ok(summary) => {
            tracing::info!(?summary, "left");
            Ok(())
        }
        Err(error) => {
            let code = error.exit_code();
            Err((Box::from(error), code))
        }
    }
}

fn start_logging(format: LogFormat) {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => logs.init(),
        LogFormat::Json => logs.json().init(),
    }
}

/// Tells a person what went wrong, cause by cause.
fn fail(error: &dyn Error, code: u8) -> ExitCode {
    let mut text = format!("shootdown-agent: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    // Where nobody reads it there is nobody to tell.
    let _ = writeln!(std::io::stderr(), "{text}");
    ExitCode::from(code)
}
