//! The process of the host agent, from its first line to its report.

use std::sync::Arc;
use std::time::Duration;

use shootdown_client::Clock;
use shootdown_server::config::{ConfigError, Settings, Span};
use shootdown_server::source::memory::{MemoryConfig, MemorySource, MemoryStats, SwapFile};
use shootdown_server::{ListenAddr, Running, StartError};
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use super::breaks::{Breaks, Moving};
use super::recorder::{Ledger, Recorder};
use super::told::Told;
use super::walks::Walks;
use super::workload::Workload;
use super::world::{Checks, WorkloadError, World};
use super::young::Watch;
use crate::check::floor::FloorError;
use crate::check::history::Histories;
use crate::check::lost::UseFile;
use crate::control::{self, FromAgent, HostReport, MemorySample, Plan, ToAgent, say};

/// Threads of the workload, beside the host agent's own.
const WORKLOAD_THREADS: usize = 2;

/// How often the parent is told how far it is.
const PROGRESS: Duration = Duration::from_millis(200);

/// How often the process's memory is looked at.
const SAMPLING: Duration = Duration::from_secs(5);

/// Of a run of a day.
const MOST_SAMPLES: usize = 20_000;

/// Devices have left by then; it bounds a device that was killed.
const DRAIN: Duration = Duration::from_secs(2);

/// Why the host agent's process failed.
#[derive(Debug, thiserror::Error)]
pub enum HostProcessError {
    /// No runtime.
    #[error("no runtime could be started")]
    Runtime(#[source] std::io::Error),
    /// The parent said something else, or nothing.
    #[error("the parent did not say what to do")]
    NoPlan,
    /// The host agent's settings.
    #[error("the host agent's settings cannot be used")]
    Config(#[from] ConfigError),
    /// The host agent.
    #[error("the host agent did not start")]
    Start(#[from] StartError),
    /// The floor file.
    #[error(transparent)]
    Floor(#[from] FloorError),
    /// The swap file.
    #[error("the swap file could not be made")]
    Swap(#[source] std::io::Error),
    /// The workload.
    #[error("the workload failed")]
    Workload(#[from] WorkloadError),
    /// The parent is gone.
    #[error("the parent does not listen")]
    Parent(#[source] std::io::Error),
}

/// Runs the host agent until the parent says Stop, or is gone.
///
/// # Errors
/// [`HostProcessError`].
pub fn run() -> Result<(), HostProcessError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKLOAD_THREADS)
        .thread_name("workload")
        .enable_all()
        .build()
        .map_err(HostProcessError::Runtime)?;
    runtime.block_on(Box::pin(serve(control::lines())))
}

async fn serve(mut parent: mpsc::Receiver<ToAgent>) -> Result<(), HostProcessError> {
    let Some(ToAgent::Plan { plan, .. }) = parent.recv().await else { return Err(HostProcessError::NoPlan) };
    let running = shootdown_server::start(settings(&plan).resolve()?)?;
    let ledger = Ledger::default();
    let world = Arc::new(world(&running, *plan, &ledger)?);
    let worked = work(&mut parent, &world, &ledger).await;
    running.shutdown().await;
    if let Some(report) = worked? {
        say(&FromAgent::HostReport(Box::new(report))).map_err(HostProcessError::Parent)?;
    }
    Ok(())
}

fn settings(plan: &Plan) -> Settings {
    let frames = 2 * most_pages(plan) + 1024;
    Settings {
        listen: vec![ListenAddr::Unix(plan.socket.clone())],
        shards: Some(plan.shards),
        memory_frames: Some(frames),
        stage_timing: true,
        drain_timeout: Some(Span(DRAIN)),
        ..Settings::default()
    }
}

/// Parents, children, pictures and files: what the workload can hold, without what is being copied or freed.
fn most_pages(plan: &Plan) -> usize {
    4 * plan.address_spaces * plan.layout().pages()
}

fn world(running: &Running, plan: Plan, ledger: &Ledger) -> Result<World, HostProcessError> {
    let clock = running.host().clock();
    let (layout, moving, shared) = (plan.layout(), Moving::default(), plan.open_shared()?);
    let uses = UseFile::open(&plan.directory.join("uses"), layout.pages() * plan.devices)?;
    let watch = Arc::new(Watch::new(layout, plan.devices, uses));
    let histories = Arc::new(Histories::new(layout.slots(), layout.pages()));
    let told = Told::new(Arc::clone(&watch), Arc::clone(&histories));
    let (host, runtime) = (running.host().clone(), Handle::current());
    let walks = Walks::default();
    let breaks = Breaks::new(host, plan.rule, (moving.clone(), walks.clone()), told.clone(), clock, runtime);
    let recorder = Recorder::new(breaks, ledger.clone(), Arc::clone(&watch), told);
    let swap = SwapFile::create(&plan.directory.join("swap"), 2 * most_pages(&plan));
    let mut config = MemoryConfig::new(Arc::new(move || clock.now()), Handle::current());
    config.swap = Some(Arc::new(swap.map_err(HostProcessError::Swap)?));
    if plan.memory_limit_pages > 0 {
        config.limit_frames = plan.memory_limit_pages;
    }
    config.huge_page_pages = crate::check::layout::HUGE_PAGES;
    Ok(World {
        source: MemorySource::new(Arc::new(recorder), Arc::clone(running.frames()), config),
        shared,
        layout,
        ledger: ledger.clone(),
        watch,
        moving,
        walks,
        histories,
        clock: Clock::boottime(),
        plan,
        checks: parking_lot::Mutex::new(Checks::default()),
        version: parking_lot::Mutex::new(0),
    })
}

/// `None`: the parent is gone, and nobody wants a report.
async fn work(
    parent: &mut mpsc::Receiver<ToAgent>,
    world: &Arc<World>,
    ledger: &Ledger,
) -> Result<Option<HostReport>, HostProcessError> {
    let mut workload = Workload::prepare(world).await?;
    say(&FromAgent::Ready).map_err(HostProcessError::Parent)?;
    let mut tick = tokio::time::interval(PROGRESS);
    let mut sampling = tokio::time::interval(SAMPLING);
    let (began, mut memory) = (world.clock.now(), Vec::new());
    let wanted = loop {
        tokio::select! {
            // The parent goes first: what it says is rare, and may be the end.
            biased;
            said = parent.recv() => match said {
                Some(ToAgent::Start) => workload.start(world.plan.pause),
                Some(ToAgent::Stop { wanted }) => break wanted,
                Some(_) => {}
                None => return Ok(None),
            },
            error = workload.failed() => return Err(error.into()),
            _ = tick.tick() => {
                let (done, wrong, shown) = (ledger.operations(), wrong(world), ledger.shown());
                say(&FromAgent::Progress { done, wrong, shown }).map_err(HostProcessError::Parent)?;
            }
            _ = sampling.tick(), if memory.len() < MOST_SAMPLES => memory.push(MemorySample {
                seconds: world.clock.now().since(began).as_secs_f64(),
                rss_kib: rss_kib(),
                frames: world.source.frames().in_use(),
            }),
        }
    };
    workload.stop().await?;
    let left_behind = left_behind(world).await;
    let checks = world.checks.lock();
    let young = world.watch.first();
    let found = checks.stale.iter().map(|stale| stale.page).chain(checks.lost.iter().map(|lost| lost.page));
    let mut pages: Vec<_> =
        wanted.into_iter().chain(found).chain(young.iter().map(|young| young.page)).collect();
    pages.sort_unstable();
    pages.dedup();
    Ok(Some(HostReport {
        paths: ledger.paths(),
        tables_freed: ledger.tables(),
        branches: world.source.events().into(),
        against_young: checks.against_young,
        stages: ledger.stages(),
        loads: checks.loads,
        stale: checks.stale.clone(),
        stale_reads: checks.stale_reads,
        stale_writes: world.source.frames().broken_poison(),
        stale_after: checks.stale_after.to_vec(),
        lost_writes: checks.lost_writes,
        lost_after: checks.lost_after.to_vec(),
        lost: checks.lost.clone(),
        lost_young: world.watch.count(),
        young,
        histories: pages.into_iter().map(|page| world.histories.of(page)).collect(),
        memory,
        left_behind,
    }))
}

/// Ends what there still is; what the source holds then.
async fn left_behind(world: &World) -> Option<String> {
    for id in world.source.address_spaces() {
        if let Err(error) = world.source.exit(id).await {
            return Some(format!("address space {id}, which could not exit: {error}"));
        }
    }
    let stats = world.source.stats();
    (stats != MemoryStats::default()).then(|| format!("{stats:?}"))
}

/// How much of this process is resident, in KiB (`VmRSS` of proc_pid_status(5)); 0 where that is not told.
fn rss_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
    line.split_whitespace().next().and_then(|kib| kib.parse().ok()).unwrap_or(0)
}

fn wrong(world: &World) -> u64 {
    let checks = world.checks.lock();
    checks.stale_reads + checks.lost_writes + checks.against_young + world.watch.count()
}
