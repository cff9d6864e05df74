//! One run, from its directory to its verdict.
//!
//! ```text
//!   networks, sockets, frames -> host agent -> the address space is known -> devices -> all of them work
//!   movers and lanes, until the time is over, so many faults were injected, or something was found
//!   lanes end -> movers end -> each device uses each page once more -> everybody leaves
//! ```

use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use shootdown_client::Clock;
use tempfile::TempDir;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Mutex as AsyncMutex;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::content::MOST_SLOTS;
use super::inject::{Field, InjectError, Slot, Tally, device_lane, host_lane};
use super::netns::{Network, remove_leftovers};
use super::plan::{Broken, ChaosArgs, DevicePlan, FaultKind, Places};
use super::process::{Process, ProcessError, Sockets, Start, start_device, start_host_agent};
use super::report;
use super::shared::{Phase, Shared};
use super::verdict::{Devices, Ended, LeftOut, Verdict};
use super::vmm::{self, Before, Shape, Vmm, VmmError};
use crate::check::table::TableError;

/// How long a run takes that is not told.
const DEFAULT_SECONDS: u32 = 60;

/// Memory that is a file: what is written there never waits for a disk.
const SHARED_MEMORY: &str = "/dev/shm";

/// What a run's directory is called; its pid follows.
const PREFIX: &str = "shootdown-chaos-";

/// How long the processes may take to start, and the run to end.
const PATIENCE: Duration = Duration::from_secs(30);

/// How often the run is looked at.
const TICK: Duration = Duration::from_millis(20);

/// Why a run came to no verdict.
#[derive(Debug, thiserror::Error)]
pub enum ChaosError {
    /// The run's directory, its sockets or its files.
    #[error("the run's {what} could not be made")]
    Files {
        /// What.
        what: &'static str,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// What the processes share.
    #[error(transparent)]
    Shared(#[from] TableError),
    /// A process.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The program whose memory it is.
    #[error("the program whose memory it is failed")]
    Vmm(#[from] VmmError),
    /// A fault.
    #[error("a fault could not be injected")]
    Inject(#[from] InjectError),
    /// Nothing worked from the beginning.
    #[error("{what} within {PATIENCE:?}")]
    Late {
        /// What did not happen.
        what: &'static str,
    },
    /// Faults were asked for, and none can be injected here.
    #[error("none of the faults can be injected here: {because}")]
    NoFaults {
        /// Why.
        because: String,
    },
    /// A task was stopped.
    #[error("a task ended by itself")]
    Task,
    /// It was asked to end.
    #[error("interrupted")]
    Interrupted,
    /// The report could not be written.
    #[error("the report could not be written")]
    Write(#[source] io::Error),
}

/// Runs it and writes the report to `out`.
///
/// # Errors
/// [`ChaosError`]; no process and no network is left behind.
///
/// # Cancel safety
/// Dropped, every process is killed.
pub async fn run(args: &ChaosArgs, out: &mut impl Write) -> Result<Verdict, ChaosError> {
    let failed = |error| ChaosError::Files { what: "waiting for signals", error };
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let verdict = tokio::select! {
        // A signal goes first: it ends everything.
        biased;
        _ = interrupt.recv() => return Err(ChaosError::Interrupted),
        _ = terminate.recv() => return Err(ChaosError::Interrupted),
        verdict = Box::pin(conduct(args)) => verdict?,
    };
    report::write(out, &verdict, args.output).map_err(ChaosError::Write)?;
    Ok(verdict)
}

async fn conduct(args: &ChaosArgs) -> Result<Verdict, ChaosError> {
    // Dropped last: what the processes have open is in it.
    let directory = directory().map_err(|error| ChaosError::Files { what: "directory", error })?;
    let seed = args.seed.unwrap_or_else(|| Clock::boottime().now().as_nanos());
    let mut chaos = Chaos::begin(args, seed, directory.path()).await?;
    let conducted = chaos.inject().await;
    // Whatever became of it, nothing is left behind.
    let ended = match conducted {
        Ok(seconds) => chaos.end(seconds).await,
        Err(error) => Err(error),
    };
    chaos.tasks.shutdown().await;
    Ok(ended?.judge())
}

fn directory() -> io::Result<TempDir> {
    remove_what_killed_runs_left();
    let prefix = format!("{PREFIX}{}-", std::process::id());
    let mut builder = tempfile::Builder::new();
    builder.prefix(&prefix);
    match Path::new(SHARED_MEMORY).is_dir() {
        true => builder.tempdir_in(SHARED_MEMORY).or_else(|_| builder.tempdir()),
        false => builder.tempdir(),
    }
}

/// It is memory, which nobody else gives back.
fn remove_what_killed_runs_left() {
    let Ok(entries) = std::fs::read_dir(SHARED_MEMORY) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.split('-').next());
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            // Another's, or it is being removed by another run.
            drop(std::fs::remove_dir_all(entry.path()));
        }
    }
}

struct Chaos {
    field: Arc<Field>,
    left_out: Vec<LeftOut>,
    tasks: JoinSet<Result<Task, ChaosError>>,
    /// Those that have ended as they should.
    ended: Vec<Task>,
}

/// What a task was that has ended as it should.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Task {
    Faults,
    Mover,
    Lane,
}

impl Chaos {
    /// Everything works when it returns.
    async fn begin(args: &ChaosArgs, seed: u64, directory: &Path) -> Result<Self, ChaosError> {
        let places = Places { directory: directory.to_owned() };
        let files = |what| move |error| ChaosError::Files { what, error };
        std::fs::create_dir(places.state()).map_err(files("state directory"))?;
        let (devices, workers, pages) = (args.devices.into(), args.workers.into(), args.pages.into());
        let (kinds, networks, left_out) = networks(args)?;
        let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let addresses: Vec<SocketAddr> = match networks.as_slice() {
            [] => vec![SocketAddr::new(loopback, 0)],
            networks => networks.iter().map(|network| SocketAddr::new(network.host().into(), 0)).collect(),
        };
        let sockets = Sockets::new(&places, &addresses).map_err(files("sockets"))?;
        let shared = Arc::new(Shared::create(&places, devices, workers, pages)?);
        let slots = devices * workers;
        assert!(slots <= MOST_SLOTS, "the command line allows 64");
        let deadline = match args.rule {
            // Shorter than a device is stopped or cut off.
            Some(Broken::TimeoutIsAck) => args.deadline.min(Duration::from_millis(20)),
            _ => args.deadline,
        };
        let shape = Shape { pages, devices, slots, deadline, seed, rule: args.rule, limits: args.limits() };
        let vmm = Arc::new(Vmm::new(&places, shared, shape)?);

        let mut host = start_host_agent(args, &places, &sockets, Start::Alone)?;
        vmm.on_host_started(&host, Before::Nothing);
        let mut tasks = JoinSet::new();
        let faults = vmm::serve(Arc::clone(&vmm));
        tasks.spawn(async move { Ok(faults.await.map(|()| Task::Faults)?) });
        let address_space = tokio::select! {
            // Not biased: whichever is first.
            address_space = vmm.registered() => address_space,
            Some(failed) = tasks.join_next() => {
                failed.map_err(|_| ChaosError::Task)??;
                return Err(ChaosError::Task);
            }
            status = host.ended(PATIENCE) => {
                host.check()?;
                tracing::error!(?status, "the host agent does not answer");
                return Err(ChaosError::Late { what: "the host agent did not answer" });
            }
        };
        let mut slots = Vec::new();
        for index in 0..devices {
            let plan = DevicePlan {
                places: places.clone(),
                index,
                devices,
                workers,
                pages,
                host_agent: sockets.address(index).map_err(files("sockets"))?,
                address_space,
                lease: args.lease,
                lease_margin: args.lease_terms().margin,
                seed,
                rule: args.rule,
            };
            let network = networks.get(index).cloned();
            let process = AsyncMutex::new(start_device(&plan, network.as_deref(), args.verbose)?);
            slots.push(Slot { plan, network, process });
        }
        let field = Arc::new(Field {
            args: args.clone(),
            seed,
            kinds,
            places,
            sockets,
            vmm,
            host: AsyncMutex::new(host),
            devices: slots,
            tally: Mutex::new(Tally::default()),
            left: Mutex::new(args.count),
            over: CancellationToken::new(),
        });
        let mut chaos = Self { field, left_out, tasks, ended: Vec::new() };
        let field = Arc::clone(&chaos.field);
        tokio::select! {
            // Not biased: whichever is first.
            live = field.all_live() => if !live? {
                chaos.check()?;
                return Err(ChaosError::Late { what: "the devices were not granted anything" });
            },
            failed = chaos.watch() => return Err(failed),
        }
        Ok(chaos)
    }

    /// Until something fails.
    async fn watch(&mut self) -> ChaosError {
        loop {
            if let Err(error) = self.check() {
                return error;
            }
            tokio::time::sleep(TICK).await;
        }
    }

    /// Fails where a task has, or a process that nobody is doing anything to.
    fn check(&mut self) -> Result<(), ChaosError> {
        while let Some(ended) = self.tasks.try_join_next() {
            self.ended.push(ended.map_err(|_| ChaosError::Task)??);
        }
        if let Ok(mut host) = self.field.host.try_lock() {
            host.check()?;
        }
        for device in &self.field.devices {
            if let Ok(mut process) = device.process.try_lock() {
                process.check()?;
            }
        }
        Ok(())
    }

    /// Moves pages and injects faults; how long, in seconds.
    async fn inject(&mut self) -> Result<f64, ChaosError> {
        let field = Arc::clone(&self.field);
        for mover in 0..u64::from(field.args.movers) {
            let moving = vmm::keep_moving(Arc::clone(&field.vmm), mover);
            self.tasks.spawn(async move { Ok(moving.await.map(|()| Task::Mover)?) });
        }
        let host = host_lane(Arc::clone(&field));
        self.tasks.spawn(async move { Ok(host.await.map(|()| Task::Lane)?) });
        for device in 0..field.devices.len() {
            let lane = device_lane(Arc::clone(&field), device);
            self.tasks.spawn(async move { Ok(lane.await.map(|()| Task::Lane)?) });
        }
        let (clock, began) = (&field.vmm.clock, field.vmm.clock.now());
        let seconds = match (field.args.seconds, field.args.count) {
            (None, Some(_)) => None,
            (seconds, _) => Some(Duration::from_secs(seconds.unwrap_or(DEFAULT_SECONDS).into())),
        };
        loop {
            self.check()?;
            let elapsed = clock.now().since(began);
            let over = seconds.is_some_and(|seconds| elapsed >= seconds) || field.is_spent();
            if over || self.has_found()? {
                return Ok(elapsed.as_secs_f64());
            }
            tokio::time::sleep(TICK).await;
        }
    }

    /// Whether what a broken rule does to the contents was found: there is nothing more to find.
    fn has_found(&self) -> Result<bool, TableError> {
        let found = self.devices()?;
        let host = self.field.vmm.ledger.lock();
        let wrong = found.stale_reads + found.lost_writes + host.lost_writes + host.writes_after_release;
        Ok(self.field.args.rule.is_some() && wrong > 0)
    }

    fn devices(&self) -> Result<Devices, TableError> {
        let (mut together, shared) = (Devices::default(), &self.field.vmm.shared);
        for device in 0..self.field.devices.len() {
            let workers = 0..usize::from(self.field.args.workers);
            let counts = workers.map(|worker| shared.counts.read(device, worker));
            together.add(&shared.status.read(device, 0)?, &counts.collect::<Result<Vec<_>, _>>()?);
        }
        Ok(together)
    }

    /// Ends it, and looks whether everything still works.
    async fn end(&mut self, seconds: f64) -> Result<Ended, ChaosError> {
        let field = Arc::clone(&self.field);
        let mut unfinished = Vec::new();
        field.over.cancel();
        let lanes = 1 + field.devices.len();
        if !self.until_ended(Task::Lane, lanes).await? {
            return Err(ChaosError::Late { what: "the faults did not end" });
        }
        field.vmm.stop_moving();
        if !self.until_ended(Task::Mover, field.args.movers.into()).await? {
            unfinished.push("a call had no outcome");
        }
        field.tell_devices(Phase::Sweep)?;
        if field.args.rule.is_none() && !field.all_swept(PATIENCE).await? {
            unfinished.push("a device could not use every page");
        }
        field.tell_devices(Phase::Stop)?;
        for device in &field.devices {
            let mut process = device.process.lock().await;
            if process.ended(PATIENCE).await.is_none_or(|status| !status.success()) {
                process.check()?;
                unfinished.push("a device did not leave");
            }
        }
        field.vmm.stop();
        let mut host: tokio::sync::MutexGuard<'_, Process> = field.host.lock().await;
        host.ask_to_end()?;
        host.ended(PATIENCE).await;
        let findings = std::fs::read_to_string(field.places.findings()).unwrap_or_default();
        let (tally, ledger) = (field.tally.lock().clone(), field.vmm.ledger.lock().clone());
        Ok(Ended {
            seed: field.seed,
            repeat: field.args.repeat(field.seed),
            seconds,
            rule: field.args.rule,
            bound: field.args.ack_timeout + field.args.lease_terms().host_duration(),
            margin: field.args.lease_terms().margin,
            longest_stall: field.vmm.longest_stall(),
            left_out: std::mem::take(&mut self.left_out),
            tally,
            host: ledger,
            devices: self.devices()?,
            findings: findings.lines().map(str::to_owned).collect(),
            unfinished,
        })
    }

    /// Until so many tasks of a kind have ended, or it takes too long.
    async fn until_ended(&mut self, kind: Task, count: usize) -> Result<bool, ChaosError> {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while self.ended.iter().filter(|ended| **ended == kind).count() < count {
            match tokio::time::timeout_at(deadline, self.tasks.join_next()).await {
                Ok(Some(task)) => self.ended.push(task.map_err(|_| ChaosError::Task)??),
                Ok(None) => return Ok(true),
                Err(_) => return Ok(false),
            }
        }
        Ok(true)
    }
}

type Networks = (Vec<FaultKind>, Vec<Arc<Network>>, Vec<LeftOut>);

/// A network for each device where a fault needs one; without leave to make them those faults are left out.
fn networks(args: &ChaosArgs) -> Result<Networks, ChaosError> {
    let mut kinds = args.faults();
    if !kinds.iter().any(|kind| kind.needs_a_network()) {
        return Ok((kinds, Vec::new(), Vec::new()));
    }
    remove_leftovers();
    match (0..args.devices.into()).map(|index| Network::new(index).map(Arc::new)).collect() {
        Ok(networks) => Ok((kinds, networks, Vec::new())),
        Err(error) => {
            let because = error.to_string();
            let left_out = kinds.iter().filter(|kind| kind.needs_a_network());
            let left_out: Vec<LeftOut> =
                left_out.map(|fault| LeftOut { fault: *fault, because: because.clone() }).collect();
            kinds.retain(|kind| !kind.needs_a_network());
            if kinds.is_empty() {
                return Err(ChaosError::NoFaults { because });
            }
            Ok((kinds, Vec::new(), left_out))
        }
    }
}
