//! The faults: a lane for each device and one for the host agent, each with a fault after the other, so that
//! faults of different lanes meet.

mod device;
mod host;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rand::RngExt as _;
use rand::rngs::SmallRng;
use serde::Serialize;
use shootdown_client::Moment;
use tokio::sync::Mutex as AsyncMutex;
use tokio_util::sync::CancellationToken;

use super::netns::{Network, NetworkError};
use super::plan::{ChaosArgs, DevicePlan, FaultKind, Places};
use super::process::{Process, ProcessError, Sockets};
use super::shared::{Orders, Phase, Status};
use super::vmm::Vmm;
use crate::check::table::TableError;

pub(crate) use device::run as device_lane;
pub(crate) use host::run as host_lane;

/// How long it may take until a device that was left alone has a session and a grant again, or until the
/// next round is over.
pub(super) const RECOVERY: Duration = Duration::from_secs(15);

/// How often is looked.
const TICK: Duration = Duration::from_millis(5);

/// Why a fault could not be injected.
#[derive(Debug, thiserror::Error)]
pub enum InjectError {
    /// A process.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// What the processes share.
    #[error(transparent)]
    Shared(#[from] TableError),
    /// A network could not be cut or healed.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// A connection could not be reset.
    #[error("the connections of device {device} could not be reset")]
    Reset {
        /// Which.
        device: usize,
        /// Why.
        #[source]
        error: std::io::Error,
    },
    /// The journal could not be removed.
    #[error("the journal could not be removed")]
    Journal(#[source] std::io::Error),
    /// A device was always in the middle of a write.
    #[error("device {device} could not be stopped between two writes")]
    NeverBetween {
        /// Which.
        device: usize,
    },
    /// A task was stopped.
    #[error("a task ended by itself")]
    Task,
}

/// What became of the faults.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Tally {
    pub(crate) faults: BTreeMap<FaultKind, FaultTally>,
    /// Devices, or host agents, that did not work again in time.
    pub(crate) not_recovered: u64,
    /// Devices that were stopped or cut off past their lease, and went on with what they held.
    pub(crate) went_on_past_the_lease: u64,
    /// Host agents that were replaced, and acted all the same.
    pub(crate) acted_though_replaced: u64,
    /// The longest from a crash of the host agent to the next round that was over, in milliseconds.
    pub(crate) longest_grace_ms: u64,
}

/// What became of the faults of one kind.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct FaultTally {
    pub(crate) injected: u64,
    pub(crate) outcomes: BTreeMap<&'static str, u64>,
}

/// A device of the run.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) plan: DevicePlan,
    pub(crate) network: Option<Arc<Network>>,
    /// Whoever injects a fault holds it.
    pub(crate) process: AsyncMutex<Process>,
}

/// What the lanes share.
#[derive(Debug)]
pub(crate) struct Field {
    pub(crate) args: ChaosArgs,
    pub(crate) seed: u64,
    pub(crate) kinds: Vec<FaultKind>,
    pub(crate) places: Places,
    pub(crate) sockets: Sockets,
    pub(crate) vmm: Arc<Vmm>,
    pub(crate) host: AsyncMutex<Process>,
    pub(crate) devices: Vec<Slot>,
    pub(crate) tally: Mutex<Tally>,
    /// Faults that are still to be injected; `None`: as many as there is time for.
    pub(crate) left: Mutex<Option<u32>>,
    pub(crate) over: CancellationToken,
}

impl Field {
    /// Waits between two faults; whether there is to be another.
    async fn next_turn(&self, gap: Duration) -> bool {
        tokio::select! {
            // The end goes first.
            biased;
            () = self.over.cancelled() => return false,
            () = tokio::time::sleep(gap) => {}
        }
        let mut left = self.left.lock();
        match &mut *left {
            None => true,
            Some(0) => false,
            Some(left) => {
                *left -= 1;
                true
            }
        }
    }

    /// Whether all faults that were asked for were begun.
    pub(crate) fn is_spent(&self) -> bool {
        *self.left.lock() == Some(0)
    }

    fn injected(&self, kind: FaultKind) {
        self.tally.lock().faults.entry(kind).or_default().injected += 1;
    }

    fn outcome(&self, kind: FaultKind, outcome: &'static str) {
        let mut tally = self.tally.lock();
        *tally.faults.entry(kind).or_default().outcomes.entry(outcome).or_default() += 1;
    }

    /// How long a host agent waits for a device that has gone: after it no lease is left.
    fn past_the_lease(&self) -> Duration {
        let terms = self.args.lease_terms();
        terms.host_duration() + terms.margin
    }

    pub(crate) fn order(&self, device: usize, orders: Orders) -> Result<(), TableError> {
        self.vmm.shared.orders.write(device, 0, &orders)
    }

    fn status(&self, device: usize) -> Result<Status, TableError> {
        self.vmm.shared.status.read(device, 0)
    }

    /// Until the device works: it has a session, and was granted something since `before`. `None`: it does
    /// not.
    async fn recovered(&self, device: usize, since: Moment) -> Result<Option<Status>, TableError> {
        let looked = async {
            loop {
                let status = self.status(device)?;
                let granted = status.last_asked > since.as_nanos();
                if status.session != 0 && granted {
                    return Ok(status);
                }
                tokio::time::sleep(TICK).await;
            }
        };
        match tokio::time::timeout(RECOVERY, looked).await {
            Ok(status) => status.map(Some),
            Err(_) => {
                self.tally.lock().not_recovered += 1;
                Ok(None)
            }
        }
    }

    /// Until a round is over that was not at `before`; whether one was.
    async fn a_round_is_over(&self, before: u64) -> bool {
        let looked = async {
            while self.vmm.ledger.lock().rounds <= before {
                tokio::time::sleep(TICK).await;
            }
        };
        let over = tokio::time::timeout(RECOVERY, looked).await.is_ok();
        self.tally.lock().not_recovered += u64::from(!over);
        over
    }

    /// Stops a device where no write of it is under way: one that was looked at the lease for before, and
    /// would be done after.
    async fn stop_between_writes(&self, slot: &Slot, process: &Process) -> Result<(), InjectError> {
        const MOST_TRIES: usize = 1000;
        for _ in 0..MOST_TRIES {
            process.stop().await?;
            let mut in_write = 0;
            for worker in 0..slot.plan.workers {
                in_write += self.vmm.shared.counts.read(slot.plan.index, worker)?.in_write;
            }
            if in_write == 0 {
                return Ok(());
            }
            process.go_on()?;
            tokio::time::sleep(Duration::from_micros(200)).await;
        }
        Err(InjectError::NeverBetween { device: slot.plan.index })
    }
}

fn between(random: &mut SmallRng, least_ms: u64, most_ms: u64) -> Duration {
    Duration::from_millis(random.random_range(least_ms..=most_ms))
}

fn sweep_or_stop(phase: Phase) -> Orders {
    Orders { phase: phase as u64, ..Orders::default() }
}

impl Field {
    /// Tells every device how far the run is.
    pub(crate) fn tell_devices(&self, phase: Phase) -> Result<(), TableError> {
        (0..self.devices.len()).try_for_each(|device| self.order(device, sweep_or_stop(phase)))
    }

    /// Whether every device has used every page since the faults ended, looked for so long.
    pub(crate) async fn all_swept(&self, patience: Duration) -> Result<bool, TableError> {
        let looked = async {
            loop {
                let mut swept = 0;
                for device in 0..self.devices.len() {
                    swept += self.status(device)?.swept;
                }
                if swept as usize == self.devices.len() {
                    return Ok(());
                }
                tokio::time::sleep(TICK).await;
            }
        };
        match tokio::time::timeout(patience, looked).await {
            Ok(swept) => swept.map(|()| true),
            Err(_) => Ok(false),
        }
    }

    /// Until every device works for the first time.
    pub(crate) async fn all_live(&self) -> Result<bool, TableError> {
        for device in 0..self.devices.len() {
            if self.recovered(device, Moment::default()).await?.is_none() {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
