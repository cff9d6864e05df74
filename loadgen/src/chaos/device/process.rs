//! The device's process, from its argument to its leave, over as many sessions as it takes.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use shootdown_client::{
    AddrRange, AddressSpaceId, ConnectError, Device, DeviceConfig, DeviceId, DeviceIdError, EndCause,
    Endpoint, FlushAllCause, Moment, Reason, SubscribeError, SubscribeOptions,
};
use tokio::task::JoinSet;

use super::clock::DeviceClock;
use super::tlb::Tlb;
use super::worker::{Bench, Worker};
use crate::chaos::content::Frames;
use crate::chaos::plan::{Broken, DevicePlan};
use crate::chaos::shared::{Phase, Shared, Status};
use crate::check::table::TableError;

/// Flushes and accesses run at the same time.
const THREADS: usize = 2;

/// How often orders are read, and the end of the lease is told.
const TICK: Duration = Duration::from_millis(5);

/// Between two tries to connect.
const BACKOFF: Duration = Duration::from_millis(20);

/// How long the answer to Hello may take: a host agent may be stopped.
const CONNECT: Duration = Duration::from_secs(1);

/// Why a device's process failed.
#[derive(Debug, thiserror::Error)]
pub enum ChaosDeviceError {
    /// Its argument.
    #[error("the plan cannot be read")]
    Plan(#[from] serde_json::Error),
    /// No runtime.
    #[error("no runtime could be started")]
    Runtime(#[source] io::Error),
    /// The device's name.
    #[error("the device's name cannot be used")]
    Name(#[from] DeviceIdError),
    /// The frames.
    #[error("the frames cannot be used")]
    Frames(#[source] io::Error),
    /// What the processes share.
    #[error(transparent)]
    Shared(#[from] TableError),
    /// What was found could not be told.
    #[error("what was found cannot be told")]
    Tell(#[from] io::Error),
    /// A worker was stopped.
    #[error("a worker ended by itself")]
    Worker,
}

/// Runs a device until its orders say Stop.
///
/// # Errors
/// [`ChaosDeviceError`].
pub fn run(plan: &str) -> Result<(), ChaosDeviceError> {
    let plan: DevicePlan = serde_json::from_str(plan)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(THREADS).enable_all().build();
    runtime.map_err(ChaosDeviceError::Runtime)?.block_on(Box::pin(serve(plan)))
}

/// What the device says of itself, and what its parts tell each other.
#[derive(Debug)]
pub(super) struct Bulletin {
    index: usize,
    shared: Arc<Shared>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    status: Status,
    device: Option<Arc<Device<Tlb>>>,
    phase: Phase,
    sweepers: usize,
    /// The last session that something was granted in, and whether all was flushed since it ended.
    granted_in: u64,
    flushed_since: bool,
}

impl Bulletin {
    fn new(plan: &DevicePlan, shared: Arc<Shared>, incarnation: u64) -> Result<Self, ChaosDeviceError> {
        let earlier = shared.status.read(plan.index, 0)?;
        // What an earlier run of the agent held went with it.
        let status = Status { incarnation, session: 0, valid_until: 0, swept: 0, ..earlier };
        let state = State {
            status,
            device: None,
            phase: Phase::Faults,
            sweepers: plan.workers,
            granted_in: 0,
            flushed_since: true,
        };
        let bulletin = Self { index: plan.index, shared, state: Mutex::new(state) };
        bulletin.change(|_| {});
        Ok(bulletin)
    }

    /// Changes it, and tells.
    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state.lock();
        change(&mut state);
        if let Err(error) = self.shared.status.write(self.index, 0, &state.status) {
            tracing::error!(%error, "the status cannot be told");
        }
    }

    fn on_session(&self, device: Arc<Device<Tlb>>) {
        self.change(|state| {
            state.status.session = device.session_id().get();
            state.status.host_incarnation = device.host_incarnation().get();
            state.status.valid_until = device.gate().valid_until().map_or(0, |until| until.as_nanos());
            state.status.sessions += 1;
            state.device = Some(device);
        });
    }

    fn on_lost(&self, cause: &EndCause) {
        self.change(|state| {
            state.device = None;
            match cause {
                EndCause::LeaseExpired => state.status.lapses += 1,
                EndCause::Host(error) if error.reason == Reason::SessionFenced => state.status.lapses += 1,
                EndCause::Host(error) if error.reason == Reason::HostSuperseded => {
                    state.status.superseded += 1;
                }
                _ => {}
            }
        });
    }

    /// Nothing is held any more: the SDK calls it before it says so to any host agent.
    pub(super) fn on_flushed(&self, cause: FlushAllCause) {
        self.change(|state| {
            state.status.flushes += 1;
            if !matches!(cause, FlushAllCause::Host(_)) {
                state.status.session = 0;
                state.flushed_since = true;
            }
        });
    }

    /// `asked` is when the fault began: what was asked for before the device was stopped may be counted after it.
    pub(super) fn on_granted(&self, device: &Device<Tlb>, asked: Moment) {
        let session = device.session_id().get();
        self.change(|state| {
            if session != state.granted_in {
                state.status.unflushed_grants += u64::from(!state.flushed_since);
                state.granted_in = session;
                state.flushed_since = false;
            }
            state.status.grants += 1;
            state.status.last_asked = state.status.last_asked.max(asked.as_nanos());
        });
    }

    pub(super) fn on_swept(&self) {
        self.change(|state| {
            state.sweepers -= 1;
            state.status.swept = u64::from(state.sweepers == 0);
        });
    }

    fn on_superseded(&self) {
        self.change(|state| state.status.superseded += 1);
    }

    fn on_tick(&self, phase: Phase) {
        self.change(|state| {
            state.phase = phase;
            if let Some(device) = &state.device {
                state.status.valid_until = device.gate().valid_until().map_or(0, |until| until.as_nanos());
            }
        });
    }

    pub(super) fn phase(&self) -> Phase {
        self.state.lock().phase
    }

    pub(super) fn device(&self) -> Option<Arc<Device<Tlb>>> {
        self.state.lock().device.clone()
    }

    pub(super) fn has_session(&self) -> bool {
        self.state.lock().device.is_some()
    }
}

async fn serve(plan: DevicePlan) -> Result<(), ChaosDeviceError> {
    let shared = Arc::new(Shared::open(&plan.places, plan.workers, plan.pages)?);
    let clock = DeviceClock::new();
    let mut config = DeviceConfig::new(DeviceId::new(&device_name(plan.index))?, endpoint(plan.host_agent));
    config.lease_margin = Some(plan.lease_margin);
    config.connect_timeout = CONNECT;
    config.keepalive = match plan.rule {
        // The lease is all that is left to tell a device that it was cut off.
        Some(Broken::Lease) => 20 * plan.lease,
        // A connection that says nothing is found within a lease.
        _ => plan.lease / 2,
    };
    config.clock = clock.of_the_sdk(plan.rule);
    let bulletin = Arc::new(Bulletin::new(&plan, Arc::clone(&shared), config.incarnation.get())?);
    let tlb = Arc::new(Tlb::new(Arc::clone(&bulletin), plan.rule));
    let bench = Arc::new(Bench {
        frames: Frames::open(&plan.places.frames()).map_err(ChaosDeviceError::Frames)?,
        clock,
        shared,
        bulletin,
        tlb,
        plan,
    });
    let mut workers = JoinSet::new();
    for number in 0..bench.plan.workers {
        workers.spawn(Worker::new(Arc::clone(&bench), number)?.run());
    }
    let sessions = tokio::spawn(keep_a_session(Arc::clone(&bench), config));
    let orders = tokio::spawn(follow_orders(Arc::clone(&bench)));
    while let Some(ended) = workers.join_next().await {
        ended.map_err(|_| ChaosDeviceError::Worker)??;
    }
    sessions.abort();
    orders.abort();
    if let Some(device) = bench.bulletin.device() {
        device.leave().await;
    }
    Ok(())
}

/// The device's name at the host agent.
pub(crate) fn device_name(index: usize) -> String {
    format!("chaos-{index}")
}

fn endpoint(address: SocketAddr) -> Endpoint {
    Endpoint::Tcp { host: address.ip().to_string(), port: address.port() }
}

async fn follow_orders(bench: Arc<Bench>) -> Result<(), ChaosDeviceError> {
    loop {
        let orders = bench.shared.orders.read(bench.plan.index, 0)?;
        bench.tlb.set_flush_time(Duration::from_millis(orders.flush_ms));
        match orders.clock_stands {
            0 => bench.clock.go_on(),
            _ => bench.clock.stand_still(),
        }
        bench.bulletin.on_tick(orders.phase());
        tokio::time::sleep(TICK).await;
    }
}

/// Opens a session, and the next when it is lost.
async fn keep_a_session(bench: Arc<Bench>, config: DeviceConfig) {
    loop {
        match Device::connect(config.clone(), Arc::clone(&bench.tlb)).await {
            Ok(device) => attend(&bench, Arc::new(device)).await,
            Err(ConnectError::Refused(error)) if error.reason == Reason::HostSuperseded => {
                bench.bulletin.on_superseded();
            }
            Err(error) => tracing::info!(%error, "no session"),
        }
        tokio::time::sleep(BACKOFF).await;
    }
}

/// Until the session is lost.
async fn attend(bench: &Bench, device: Arc<Device<Tlb>>) {
    let Some(address_space) = AddressSpaceId::new(bench.plan.address_space) else { return };
    let subscribed = loop {
        match device.subscribe(address_space, &[AddrRange::ALL], SubscribeOptions::default()).await {
            Ok(subscription) => break Some(subscription),
            // A host agent that has just started hears of it in a moment.
            Err(SubscribeError::Refused(error)) if error.reason == Reason::AddressSpaceUnknown => {
                tokio::time::sleep(BACKOFF).await;
            }
            Err(error) => {
                tracing::info!(%error, "no subscription");
                break None;
            }
        }
    };
    if subscribed.is_some() {
        bench.bulletin.on_session(Arc::clone(&device));
    }
    let end = device.lost().await;
    tracing::info!(cause = %end.cause, "the session was lost");
    bench.bulletin.on_lost(&end.cause);
}
