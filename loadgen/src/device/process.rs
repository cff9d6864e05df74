//! The process of a device agent, from its first line to its report.

use std::sync::Arc;
use std::time::Duration;

use shootdown_client::agent::{Accelerator, AcceleratorConfig, FlushTimeError, WritePolicy};
use shootdown_client::{
    AddrRange, AddressSpaceId, ChangePte, Clock, ConnectError, Device, DeviceConfig, DeviceId, DeviceIdError,
    Endpoint, OwnerTag, Reason, SubscribeError, SubscribeOptions, TransportError,
};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::seam::Seam;
use super::worker::Bench;
use super::writes::Writes;
use crate::check::floor::FloorError;
use crate::control::{self, DeviceReport, FromAgent, ToAgent, device_name, say};
use crate::path::Path;

/// Threads of a device agent: its flushes and its accesses run at the same time.
const THREADS: usize = 2;

/// How often the parent is told how far it is.
const PROGRESS: Duration = Duration::from_millis(100);

/// Why a device agent's process failed.
#[derive(Debug, thiserror::Error)]
pub enum DeviceProcessError {
    /// No runtime.
    #[error("no runtime could be started")]
    Runtime(#[source] std::io::Error),
    /// The parent said something else, or nothing.
    #[error("the parent did not say what to do")]
    NoPlan,
    /// The device's name.
    #[error("the device's name cannot be used")]
    Name(#[from] DeviceIdError),
    /// The flush time.
    #[error("the flush time cannot be used")]
    FlushTime(#[from] FlushTimeError),
    /// No session.
    #[error("the device could not connect")]
    Connect(#[from] ConnectError),
    /// No connection for pages.
    #[error("the device has no way to the host's pages")]
    Pages(#[from] TransportError),
    /// The host agent refused a subscription, and not because the address space had ended.
    #[error("the device could not subscribe")]
    Subscribe(#[from] SubscribeError),
    /// The session ended by itself.
    #[error("the session was lost: {0}")]
    Lost(#[source] shootdown_client::EndCause),
    /// The floor file.
    #[error(transparent)]
    Floor(#[from] FloorError),
    /// A worker was stopped.
    #[error("a worker ended by itself")]
    Worker,
    /// The parent is gone.
    #[error("the parent does not listen")]
    Parent(#[source] std::io::Error),
}

/// Runs a device agent until the parent says Stop, or is gone.
///
/// # Errors
/// [`DeviceProcessError`].
pub fn run() -> Result<(), DeviceProcessError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(THREADS)
        .enable_all()
        .build()
        .map_err(DeviceProcessError::Runtime)?;
    runtime.block_on(Box::pin(serve(control::lines())))
}

async fn serve(mut parent: mpsc::Receiver<ToAgent>) -> Result<(), DeviceProcessError> {
    let Some(ToAgent::Plan { plan, index }) = parent.recv().await else {
        return Err(DeviceProcessError::NoPlan);
    };
    let accelerator = Accelerator::new(AcceleratorConfig {
        // Every second device keeps copies of pages, and what it writes, until a flush; the others see what
        // is in the frames.
        cache_pages: if index % 2 == 1 { plan.cache_pages } else { 0 },
        write_policy: WritePolicy::Back,
        flush_time: plan
            .slow_flush_time
            .as_ref()
            .filter(|_| index == 0)
            .unwrap_or(&plan.flush_time)
            .parse()?,
        seed: plan.seed.wrapping_add(index as u64),
        ..AcceleratorConfig::default()
    });
    let own = OwnerTag::new(index as u64 + 1).unwrap_or(OwnerTag::FIRST);
    let seam = Arc::new(Seam::new(Arc::clone(&accelerator), own, plan.rule));
    let endpoint = Endpoint::Unix(plan.socket.clone());
    let mut config = DeviceConfig::new(DeviceId::new(&device_name(index))?, endpoint);
    config.change_pte = ChangePte::Supported;
    let device = Device::connect(config, Arc::clone(&seam)).await?;
    accelerator.attach(&device)?;

    let layout = plan.layout();
    let by_path = vec![0; Path::EVERY.len()];
    let report = DeviceReport {
        reads_after: by_path.clone(),
        stale_after: by_path.clone(),
        lost_after: by_path,
        ..DeviceReport::default()
    };
    let bench = Arc::new(Bench {
        accelerator,
        shared: plan.open_shared()?,
        layout,
        plan: *plan,
        index,
        lives: parking_lot::RwLock::new(vec![None; layout.homes()]),
        writes: Writes::new(&layout, index),
        clock: Clock::boottime(),
        report: parking_lot::Mutex::new(report),
    });
    let stopped = attend(&mut parent, &device, &bench).await?;
    device.leave().await;
    if stopped == Stopped::Asked {
        let mut report = bench.report.lock().clone();
        report.flushes = seam.flushes();
        let counts = bench.accelerator.access_counts();
        (report.tlb_hits, report.faults) = (counts.hits, counts.faults);
        report.dirty_lost = counts.dirty_lost;
        say(&FromAgent::DeviceReport(Box::new(report))).map_err(DeviceProcessError::Parent)?;
    }
    Ok(())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stopped {
    Asked,
    ParentGone,
}

async fn attend(
    parent: &mut mpsc::Receiver<ToAgent>,
    device: &Device<Seam>,
    bench: &Arc<Bench>,
) -> Result<Stopped, DeviceProcessError> {
    say(&FromAgent::Ready).map_err(DeviceProcessError::Parent)?;
    let stop = CancellationToken::new();
    let mut workers = JoinSet::new();
    let mut tick = tokio::time::interval(PROGRESS);
    let stopped = loop {
        tokio::select! {
            // The parent goes first: what it says is rare, and may be the end.
            biased;
            said = parent.recv() => match said {
                Some(ToAgent::Lives { slot, address_space }) => {
                    subscribe(device, bench, slot, address_space).await?;
                }
                Some(ToAgent::Ended { slot, address_space }) => forget(bench, slot, address_space),
                Some(ToAgent::Start) => for worker in 0..bench.plan.workers {
                    let (bench, stop) = (Arc::clone(bench), stop.clone());
                    workers.spawn(async move { bench.work(worker, stop).await });
                },
                Some(ToAgent::Stop { .. }) => break Stopped::Asked,
                Some(ToAgent::Plan { .. }) => {}
                None => break Stopped::ParentGone,
            },
            end = device.lost() => return Err(DeviceProcessError::Lost(end.cause)),
            Some(ended) = workers.join_next() => ended.map_err(|_| DeviceProcessError::Worker)??,
            _ = tick.tick() => {
                let (done, wrong, shown) = {
                    let report = bench.report.lock();
                    let shown = Path::EVERY.into_iter().filter(|path| report.reads_after[path.index()] > 0);
                    (report.reads, report.stale_reads + report.lost_writes, shown.collect())
                };
                say(&FromAgent::Progress { done, wrong, shown }).map_err(DeviceProcessError::Parent)?;
            }
        }
    };
    stop.cancel();
    while let Some(ended) = workers.join_next().await {
        ended.map_err(|_| DeviceProcessError::Worker)??;
    }
    Ok(stopped)
}

/// An address space that ended before it was subscribed is none to hear of.
async fn subscribe(
    device: &Device<Seam>,
    bench: &Bench,
    slot: usize,
    address_space: u64,
) -> Result<(), DeviceProcessError> {
    let Some(id) = AddressSpaceId::new(address_space) else { return Ok(()) };
    match device.subscribe(id, &[AddrRange::ALL], SubscribeOptions::default()).await {
        Ok(_) => bench.lives.write()[slot] = Some(id),
        Err(SubscribeError::Refused(refused)) if has_ended(refused.reason) => {}
        // The run is coming to its end; what ended the session is told elsewhere.
        Err(SubscribeError::NotLive(_)) => {}
        Err(error) => return Err(error.into()),
    }
    say(&FromAgent::Subscribed { address_space }).map_err(DeviceProcessError::Parent)
}

const fn has_ended(reason: Reason) -> bool {
    matches!(reason, Reason::AddressSpaceUnknown | Reason::AddressSpaceReleased)
}

fn forget(bench: &Bench, slot: usize, address_space: u64) {
    let lives = &mut bench.lives.write()[slot];
    if lives.is_some_and(|id| id.get() == address_space) {
        *lives = None;
    }
}
