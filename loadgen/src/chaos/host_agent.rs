//! The process of the host agent: what `shootdownd` runs, with its own flags.

use std::io;

use shootdown_server::StartError;
use shootdown_server::config::ConfigError;
use tokio::signal::unix::{SignalKind, signal};

use super::plan::HostSettings;

/// Why the host agent's process failed.
#[derive(Debug, thiserror::Error)]
pub enum ChaosHostError {
    /// The flags.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No runtime.
    #[error("no runtime could be started")]
    Runtime(#[source] io::Error),
    /// Signals cannot be waited for.
    #[error("signals cannot be waited for")]
    Signal(#[source] io::Error),
    /// The host agent.
    #[error("the host agent could not be started")]
    Start(#[from] StartError),
}

/// Runs a host agent until it is asked to stop.
///
/// # Errors
/// [`ChaosHostError`].
pub fn run(settings: HostSettings) -> Result<(), ChaosHostError> {
    let config = settings.resolve()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(ChaosHostError::Runtime)?.block_on(async {
        // Before anything can be waited for: a signal that comes early is not lost.
        let mut terminate = signal(SignalKind::terminate()).map_err(ChaosHostError::Signal)?;
        let running = shootdown_server::start(config)?;
        tokio::select! {
            // First: a host agent that is superseded has nothing to drain.
            biased;
            () = running.superseded() => running.abandon().await,
            _ = terminate.recv() => running.shutdown().await,
        }
        Ok(())
    })
}
