//! One run, from the first process to the last report.
//!
//! ```text
//!   host agent: Plan -> address spaces made -> Ready
//!   devices:    Plan -> connected -> Ready -> Lives … -> Subscribed …
//!   all subscribed: Start to all; then time passes, and news of address spaces are passed on
//!   Stop to the devices first, so that nobody reads what the host takes down; then to the host agent
//! ```

use std::time::Duration;

use shootdown_client::{Clock, Moment};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use super::child::{Agent, ChildError, Noise, Said};
use super::{DEVICE_AGENT, HOST_AGENT};
use crate::check::floor::FloorError;
use crate::check::history::PageName;
use crate::control::{DeviceReport, FromAgent, HostReport, Plan, ToAgent};
use crate::path::Path;

/// Lines that agents said and that were not handled yet; when it is full their readers wait.
const LINES: usize = 256;

/// How long it may take until every device is subscribed, and until every report is there.
const PATIENCE: Duration = Duration::from_secs(30);

/// How often the end of the time is looked for.
const TICK: Duration = Duration::from_millis(50);

/// Why a run came to no report.
#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    /// The floor file.
    #[error(transparent)]
    Floor(#[from] FloorError),
    /// An agent.
    #[error(transparent)]
    Agent(#[from] ChildError),
    /// Signals cannot be waited for.
    #[error("signals cannot be waited for")]
    Signal(#[source] std::io::Error),
    /// It was asked to end.
    #[error("interrupted")]
    Interrupted,
    /// An agent takes too long.
    #[error("the agents were not {until} within {PATIENCE:?}")]
    Late {
        /// What they were waited for to be.
        until: &'static str,
    },
}

/// How far a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Since the start.
    pub elapsed: Duration,
    /// Checked reads by devices.
    pub reads: u64,
    /// Operations of the host.
    pub operations: u64,
    /// Stale reads, lost writes, lost young bits.
    pub wrong: u64,
}

/// How long a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Length {
    /// At least, unless something is found to be wrong.
    pub least: Duration,
    /// How much longer, until every path has shown something.
    pub patience: Duration,
}

/// What a run brought.
#[derive(Debug, Clone)]
pub struct Conducted {
    /// From the host agent.
    pub host: HostReport,
    /// From each device, in their order.
    pub devices: Vec<DeviceReport>,
    /// From Start to Stop.
    pub took: Duration,
    /// It ended before its time.
    pub stopped_early: bool,
}

/// Runs `plan` for its length, or until something is found to be wrong: what led to it is known then, and later
/// is not. `watch` is told how far it is.
///
/// # Errors
/// [`FleetError`]; no process is left behind.
///
/// # Cancel safety
/// Dropped, every agent is killed.
pub async fn conduct(
    plan: &Plan,
    length: Length,
    noise: Noise,
    watch: impl FnMut(Progress),
) -> Result<Conducted, FleetError> {
    plan.create_shared()?;
    let mut signals = Signals::new()?;
    let (tx, rx) = mpsc::channel(LINES);
    let mut fleet = Fleet::new(plan.clone(), rx);
    tokio::select! {
        // A signal goes first: it ends everything.
        biased;
        () = signals.next() => Err(FleetError::Interrupted),
        conducted = fleet.conduct(length, noise, tx, watch) => conducted,
    }
}

struct Fleet {
    plan: Plan,
    clock: Clock,
    rx: mpsc::Receiver<Said>,
    /// The host agent first, then the devices.
    agents: Vec<Agent>,
    /// The address space in each slot.
    lives: Vec<Option<u64>>,
    /// By agent.
    done: Vec<(u64, u64)>,
    /// By agent: the paths that have shown something there.
    shown: Vec<Vec<Path>>,
    ready: usize,
    subscribed: usize,
    host: Option<HostReport>,
    devices: Vec<Option<DeviceReport>>,
    /// Devices were told to stop: nothing that happens to address spaces is of use to them.
    stopping: bool,
}

impl Fleet {
    fn new(plan: Plan, rx: mpsc::Receiver<Said>) -> Self {
        let (slots, devices) = (plan.layout().homes(), plan.devices);
        Self {
            plan,
            clock: Clock::boottime(),
            rx,
            agents: Vec::new(),
            lives: vec![None; slots],
            done: vec![(0, 0); devices + 1],
            shown: vec![Vec::new(); devices + 1],
            ready: 0,
            subscribed: 0,
            host: None,
            devices: vec![None; devices],
            stopping: false,
        }
    }

    async fn conduct(
        &mut self,
        length: Length,
        noise: Noise,
        tx: mpsc::Sender<Said>,
        mut watch: impl FnMut(Progress),
    ) -> Result<Conducted, FleetError> {
        self.add("host agent".to_owned(), HOST_AGENT, noise, &tx).await?;
        self.until("ready", |fleet| fleet.ready == 1).await?;
        for index in 0..self.plan.devices {
            self.add(format!("device agent {index}"), DEVICE_AGENT, noise, &tx).await?;
        }
        let all = 1 + self.plan.devices;
        self.until("ready", |fleet| fleet.ready == all).await?;
        for (slot, address_space) in self.lives.clone().into_iter().enumerate() {
            if let Some(address_space) = address_space {
                self.tell_devices(&ToAgent::Lives { slot, address_space }).await?;
            }
        }
        let subscriptions = self.plan.address_spaces * self.plan.devices;
        self.until("subscribed", |fleet| fleet.subscribed >= subscriptions).await?;

        let started = self.clock.now();
        self.tell_devices(&ToAgent::Start).await?;
        self.tell(0, &ToAgent::Start).await?;
        let stopped_early = self.pass(started, length, &mut watch).await?;
        let took = self.clock.now().since(started);
        self.tell_devices(&ToAgent::Stop { wanted: Vec::new() }).await?;
        self.stopping = true;
        self.until("done", |fleet| fleet.devices.iter().all(Option::is_some)).await?;
        let wanted = self.wanted();
        self.tell(0, &ToAgent::Stop { wanted }).await?;
        self.until("done", |fleet| fleet.host.is_some()).await?;
        for agent in self.agents.drain(..) {
            agent.finish().await?;
        }
        let host = self.host.take().unwrap_or_default();
        let devices = self.devices.drain(..).flatten().collect();
        Ok(Conducted { host, devices, took, stopped_early })
    }

    async fn add(
        &mut self,
        name: String,
        command: &str,
        noise: Noise,
        tx: &mpsc::Sender<Said>,
    ) -> Result<(), FleetError> {
        let number = self.agents.len();
        self.agents.push(Agent::start(name, command, noise, number, tx.clone())?);
        let plan = Box::new(self.plan.clone());
        let index = number.saturating_sub(1);
        self.tell(number, &ToAgent::Plan { plan, index }).await
    }

    /// Handles what agents say until `reached`.
    async fn until(
        &mut self,
        until: &'static str,
        reached: impl Fn(&Self) -> bool,
    ) -> Result<(), FleetError> {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while !reached(self) {
            let said = tokio::time::timeout_at(deadline, self.rx.recv()).await;
            self.on_said(said.map_err(|_| FleetError::Late { until })?).await?;
        }
        Ok(())
    }

    /// Lets time pass; whether it was cut short.
    async fn pass(
        &mut self,
        started: Moment,
        length: Length,
        watch: &mut impl FnMut(Progress),
    ) -> Result<bool, FleetError> {
        let mut tick = tokio::time::interval(TICK);
        loop {
            tokio::select! {
                // The time goes first: agents always have something to say.
                biased;
                _ = tick.tick() => {
                    let progress = self.progress(self.clock.now().since(started));
                    watch(progress);
                    if progress.wrong > 0 {
                        return Ok(true);
                    }
                    let most = length.least.saturating_add(length.patience);
                    if progress.elapsed >= most || progress.elapsed >= length.least && self.has_shown_all() {
                        return Ok(false);
                    }
                }
                said = self.rx.recv() => self.on_said(said).await?,
            }
        }
    }

    /// The pages on which devices found something; what the host found itself it knows.
    fn wanted(&self) -> Vec<PageName> {
        let devices = self.devices.iter().flatten();
        devices
            .flat_map(|device| {
                let stale = device.stale.iter().map(|stale| stale.page);
                stale.chain(device.lost.iter().map(|lost| lost.page))
            })
            .collect()
    }

    /// Whether the run would pass if nothing were wrong with it.
    fn has_shown_all(&self) -> bool {
        let (host, devices) = (&self.shown[0], &self.shown[1..]);
        let is_read = |path: &Path| devices.iter().any(|shown| shown.contains(path));
        devices.iter().all(|shown| !shown.is_empty())
            && self.plan.paths.iter().all(|path| host.contains(path) && (!path.has_reads() || is_read(path)))
    }

    fn progress(&self, elapsed: Duration) -> Progress {
        Progress {
            elapsed,
            operations: self.done[0].0,
            reads: self.done[1..].iter().map(|(reads, _)| reads).sum(),
            wrong: self.done.iter().map(|(_, wrong)| wrong).sum(),
        }
    }

    async fn on_said(&mut self, said: Option<Said>) -> Result<(), FleetError> {
        let (number, said) = said.expect("every agent holds a sender, and so does the caller");
        match said {
            Some(FromAgent::Ready) => self.ready += 1,
            Some(FromAgent::Subscribed { .. }) => self.subscribed += 1,
            Some(FromAgent::Progress { done, wrong, shown }) => {
                self.done[number] = (done, wrong);
                self.shown[number] = shown;
            }
            Some(FromAgent::Lives { slot, address_space }) => {
                self.lives[slot] = Some(address_space);
                self.tell_devices(&ToAgent::Lives { slot, address_space }).await?;
            }
            Some(FromAgent::Ended { slot, address_space }) => {
                self.lives[slot] = None;
                self.tell_devices(&ToAgent::Ended { slot, address_space }).await?;
            }
            Some(FromAgent::HostReport(report)) => self.host = Some(*report),
            Some(FromAgent::DeviceReport(report)) => self.devices[number - 1] = Some(*report),
            None if self.has_reported(number) => {}
            None => return Err(self.agents.remove(number).post_mortem().await.into()),
        }
        Ok(())
    }

    fn has_reported(&self, number: usize) -> bool {
        match number {
            0 => self.host.is_some(),
            device => self.devices[device - 1].is_some(),
        }
    }

    /// Those that run; the others are told when they do.
    async fn tell_devices(&mut self, what: &ToAgent) -> Result<(), FleetError> {
        for number in 1..self.agents.len() {
            if !self.stopping {
                self.tell(number, what).await?;
            }
        }
        Ok(())
    }

    async fn tell(&mut self, number: usize, what: &ToAgent) -> Result<(), FleetError> {
        if self.agents[number].say(what).await.is_ok() {
            return Ok(());
        }
        // It does not listen, because it has ended: how is what people want to know.
        Err(self.agents.remove(number).post_mortem().await.into())
    }
}

struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn new() -> Result<Self, FleetError> {
        let of = |kind| signal(kind).map_err(FleetError::Signal);
        Ok(Self { interrupt: of(SignalKind::interrupt())?, terminate: of(SignalKind::terminate())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            // Not biased: either is the same.
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
