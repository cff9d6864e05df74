//! The agent, from its connection to its leave: all its wiring, in the order in which things depend on each
//! other.

use std::sync::Arc;

use shootdown_core::AddrRange;
use shootdown_proto::error::Reason;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::accelerator::Accelerator;
use super::config::Config;
use super::worker::{Work, WorkCounts};
use crate::config::DeviceConfig;
use crate::connection::TransportError;
use crate::device::{ConnectError, Device};
use crate::session::end::{EndCause, SessionEnd};
use crate::subscription::{SubscribeError, SubscribeOptions};

/// Why the agent did not run, or stopped without being asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    /// There is no session.
    #[error("cannot open a session")]
    Connect(#[from] ConnectError),
    /// The endpoint cannot be one.
    #[error("cannot reach the host agent's pages")]
    Pages(#[from] TransportError),
    /// There is no subscription.
    #[error("cannot subscribe to address space {address_space}")]
    Subscribe {
        /// Whose.
        address_space: shootdown_core::AddressSpaceId,
        /// Why.
        #[source]
        source: SubscribeError,
    },
    /// The session was lost.
    #[error("the session was lost")]
    Lost(#[source] SessionEnd),
    /// Leaving took too long: a flush or a use does not end. The host waits for the lease.
    #[error("leaving took more than {patience:?}")]
    DrainTimeout {
        /// [`Config::drain_timeout`].
        patience: std::time::Duration,
    },
}

impl AgentError {
    /// The exit code (sysexits.h).
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        const EX_UNAVAILABLE: u8 = 69;
        const EX_SOFTWARE: u8 = 70;
        const EX_TEMPFAIL: u8 = 75;
        const EX_NOPERM: u8 = 77;
        const EX_CONFIG: u8 = 78;
        let of_reason = |reason: Reason| match reason {
            Reason::PermissionDenied => EX_NOPERM,
            Reason::AddressSpaceUnknown | Reason::FieldInvalid | Reason::RangeInvalid => EX_CONFIG,
            _ => EX_UNAVAILABLE,
        };
        match self {
            Self::Connect(ConnectError::Config(_)) => EX_CONFIG,
            Self::Connect(ConnectError::Refused(error)) => of_reason(error.reason),
            Self::Connect(ConnectError::Transport { source, .. }) => {
                source.reason().map_or(EX_UNAVAILABLE, of_reason)
            }
            Self::Connect(_) | Self::Pages(_) => EX_UNAVAILABLE,
            Self::Subscribe { source: SubscribeError::Refused(error), .. } => of_reason(error.reason),
            Self::Subscribe { .. } => EX_UNAVAILABLE,
            Self::Lost(SessionEnd { cause: EndCause::FlushPanicked, .. }) => EX_SOFTWARE,
            // Started again, it may well work.
            Self::Lost(_) | Self::DrainTimeout { .. } => EX_TEMPFAIL,
        }
    }
}

/// What an agent that ended as it should has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Summary {
    /// All its workers together.
    pub work: WorkCounts,
}

/// Why the workers stop.
enum Stop {
    Asked,
    HostDrains,
    Lost(SessionEnd),
}

/// Connects, subscribes, works, and leaves when `stop` resolves or the host agent asks for it.
///
/// # Errors
/// [`AgentError`].
///
/// # Cancel safety
/// Dropped, the device leaves in the background.
pub async fn run(config: Config, stop: impl Future<Output = ()>) -> Result<Summary, AgentError> {
    let accelerator = Accelerator::new(config.accelerator);
    let mut device_config = DeviceConfig::new(config.device.clone(), config.host_agent.clone());
    if let Some(busy_poll) = config.busy_poll {
        device_config.busy_poll = busy_poll;
    }
    device_config.change_pte = config.change_pte;
    device_config.enforcement = config.enforcement;
    let device = Device::connect(device_config, Arc::clone(&accelerator)).await?;
    accelerator.attach(&device)?;

    let ranges: Vec<AddrRange> = match &config.ranges[..] {
        [] => vec![AddrRange::ALL],
        ranges => ranges.iter().map(|range| range.0).collect(),
    };
    for &address_space in &config.address_spaces {
        // Not kept: it lasts as long as the session, which ends with the agent.
        device
            .subscribe(address_space, &ranges, SubscribeOptions::default())
            .await
            .map_err(|source| AgentError::Subscribe { address_space, source })?;
    }

    let stop_workers = CancellationToken::new();
    let mut workers = JoinSet::new();
    for seed in 0..config.workers as u64 {
        let work = Work {
            address_spaces: config.address_spaces.clone(),
            ranges: config.ranges.clone(),
            read_ratio: config.read_ratio,
            seed,
        };
        workers.spawn(work.run(Arc::clone(&accelerator), stop_workers.clone()));
    }

    let why = tokio::select! {
        // A lost session first: there is nothing left to drain.
        biased;
        end = device.lost() => Stop::Lost(end),
        () = stop => Stop::Asked,
        Some(_) = device.drain_asked() => Stop::HostDrains,
    };
    stop_workers.cancel();
    let work = workers.join_all().await.into_iter().fold(WorkCounts::default(), std::ops::Add::add);
    match why {
        Stop::Lost(end) => return Err(AgentError::Lost(end)),
        Stop::Asked => tracing::info!("asked to stop"),
        Stop::HostDrains => tracing::info!("the host agent is about to stop"),
    }
    let patience = config.drain_timeout;
    let end = tokio::time::timeout(patience, device.leave())
        .await
        .map_err(|_| AgentError::DrainTimeout { patience })?;
    match end.cause {
        EndCause::Left => Ok(Summary { work }),
        _ => Err(AgentError::Lost(end)),
    }
}
