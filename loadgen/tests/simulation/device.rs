//! A device: connects, subscribes, faults, uses what it was granted, and flushes when it is told to.

use std::io;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use shootdown_client::{
    Access, AddressSpaceId, ChangePte, Clock, Connector, Device, DeviceConfig, DeviceId, Endpoint,
    Enforcement, Incarnation, Mapping, PageClient, SubscribeError, SubscribeOptions, Subscription,
};
use shootdown_proto::error::Reason;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::clock::virtual_now;
use crate::content;
use crate::cuttable::Cuttable;
use crate::fabric::DeviceRun;
use crate::memory::{PAGES, range_of};
use crate::plan::{Broken, DevicePlan, Reach, Table, millis};
use crate::shared::{Shared, Stage};
use crate::tlb::{Asking, SimTlb, Use};
use crate::trace::{Frame, Life, What};

/// Where the host agent listens for devices.
pub const PORT: u16 = 7400;

/// When a device whose accesses fail gives up.
const NOTICED: Duration = millis(40);

/// The longest use through a device that enforces no lease: longer than the longest lease.
const LONG_USE: Duration = millis(300);

/// The host agent's machine.
pub const AGENT: &str = "agent";

/// What stands for its processes on the network: they have one clock and one disk, and a port each.
pub const AGENTS: [&str; 2] = [AGENT, "successor"];

/// A device agent, from its start until it is stopped or crashes.
pub async fn run(shared: Arc<Shared>, plan: DevicePlan) -> turmoil::Result {
    let mut start = shared.start_of(plan.index);
    let mut rng = shared.rng(1000 + plan.index as u64 * 100 + start);
    let mut tries = 0;
    while !shared.is_past(Stage::Healed) {
        let mut run = DeviceRun { device: plan.index, start };
        if shared.fabric.is_cut_off(run) {
            // Nothing that it does reaches the memory: it begins anew.
            start = shared.start_of(plan.index);
            run = DeviceRun { start, ..run };
        }
        // A device agent that was left by its session goes on with the same incarnation.
        let incarnation = Incarnation::new(start).expect("starts are counted from 1");
        tries += 1;
        let life = shared.trace.next_life();
        shared.trace.record(What::Connecting { life, device: plan.index, start });
        if let Some(cut_off_by) = shared.plan.cut_off_by(plan.index) {
            shared.trace.record(What::EnforcesNoLease { life, cut_off_by });
        }
        let seed = rng.random();
        let tlb = Arc::new(SimTlb::new(Arc::clone(&shared), life, run, plan.clone(), seed));
        match Device::connect(config(&shared, &plan, incarnation), tlb).await {
            Ok(device) => Session { shared: &shared, plan: &plan, life, run, device }.live(&mut rng).await,
            Err(error) => {
                let cause = format!("{}", Chain(&error));
                shared.trace.record(What::Closed { life, cause });
                tokio::time::sleep(millis(10 * tries.min(5))).await;
            }
        }
    }
    shared.stopped.change(|stopped| *stopped += 1);
    Ok(())
}

fn config(shared: &Arc<Shared>, plan: &DevicePlan, incarnation: Incarnation) -> DeviceConfig {
    let device = DeviceId::new(&name(plan.index)).expect("it is short");
    let endpoint = Endpoint::Tcp { host: AGENT.to_owned(), port: PORT };
    let mut config = DeviceConfig::new(device, endpoint);
    config.incarnation = incarnation;
    config.window = plan.window;
    config.parallel_flushes = plan.parallel_flushes;
    config.change_pte = if plan.change_pte { ChangePte::Supported } else { ChangePte::Unsupported };
    config.enforcement = plan.enforcement;
    config.lease_drift_ppm = shared.plan.terms.drift_ppm;
    config.lease_margin = Some(shared.plan.terms.margin);
    config.connect_timeout = millis(300);
    config.keepalive = match (plan.reach, plan.enforcement) {
        // What it asked to read may come when its session has long been fenced.
        (Reach::PageService, Enforcement::ByDevice) => millis(500),
        // A lost connection of one whose lease fences nobody is found by this alone: there is no TCP keepalive here.
        (Reach::Itself, _) | (_, Enforcement::ByNobody) => millis(80),
    };
    config.busy_poll = Duration::ZERO;
    let (world, index) = (Arc::clone(shared), plan.index);
    config.connector = Connector::from_fn(move |endpoint| {
        let (cut, agent) = (world.begin_connection(index), AGENTS[world.newest.get()]);
        connect(endpoint, agent, cut)
    });
    let clock = plan.clock;
    config.clock = match shared.plan.broken {
        Broken::DeviceClock => {
            let stuck = clock.shows(virtual_now());
            Clock::from_fn(move || stuck)
        }
        _ => Clock::from_fn(move || clock.shows(virtual_now())),
    };
    config
}

async fn connect(endpoint: Endpoint, agent: &str, cut: CancellationToken) -> io::Result<Cuttable> {
    match endpoint {
        // Its name is resolved anew each time.
        Endpoint::Tcp { port, .. } => {
            let stream = turmoil::net::TcpStream::connect((agent, port)).await?;
            Ok(Cuttable::new(stream, cut))
        }
        Endpoint::Unix(_) => Err(io::ErrorKind::Unsupported.into()),
    }
}

/// The machine of a device.
pub fn name(device: usize) -> String {
    format!("device-{device}")
}

/// The device whose machine that is.
pub fn index(name: &str) -> usize {
    name.strip_prefix("device-").and_then(|index| index.parse().ok()).expect("a name of a device's machine")
}

struct Session<'a> {
    shared: &'a Arc<Shared>,
    plan: &'a DevicePlan,
    life: Life,
    run: DeviceRun,
    device: Device<SimTlb>,
}

impl Session<'_> {
    /// Until the session is lost, or the device leaves.
    async fn live(self, rng: &mut StdRng) {
        let Self { shared, plan, life, device, .. } = &self;
        let (session, host) = (device.session_id().get(), device.host_incarnation().get());
        shared.trace.record(What::Opened { life: *life, session, host });
        shared.watch_lease(*life, plan.clock, device.gate());
        let mut workers = JoinSet::new();
        for _ in 0..plan.workers {
            let pages =
                (plan.reach == Reach::PageService).then(|| device.pages().expect("it has an endpoint"));
            let (patience, rng) = (shared.plan.terms.duration * 2, StdRng::seed_from_u64(rng.random()));
            let worker = Worker { device: device.clone(), pages, patience, rng };
            workers.spawn(worker.run(DevicePlan::clone(plan), shared.plan.broken));
        }
        tokio::select! {
            // First: there is nothing to drive any more.
            biased;
            _ = device.lost() => {}
            () = self.tell_resumes() => {}
            () = shared.until(Stage::Quiet) => {}
            () = self.finds_itself_cut_off() => {}
            () = self.drive(rng) => {}
        }
        // What they use is used until here.
        workers.shutdown().await;
        let end = device.leave().await;
        shared.trace.record(What::Closed { life: *life, cause: format!("{}", Chain(&end.cause)) });
    }

    /// Writes down each resume. Does not return.
    async fn tell_resumes(&self) {
        for count in 1.. {
            self.device.resumed(count).await;
            self.shared.trace.record(What::Resumed { life: self.life });
        }
    }

    /// Its accesses fail; after a while it gives up.
    async fn finds_itself_cut_off(&self) {
        self.shared.fabric.until_cut_off(self.run).await;
        tokio::time::sleep(NOTICED).await;
    }

    /// Subscribes to what there is, and leaves now and then. Returns when the device is to leave.
    async fn drive(&self, rng: &mut StdRng) {
        let mut subscriptions: Vec<Subscription> = Vec::new();
        loop {
            let spaces = self.shared.memory.lock().live_spaces();
            subscriptions.retain(|held| spaces.contains(&held.address_space().get()));
            for space in spaces {
                let has = subscriptions.iter().any(|held| held.address_space().get() == space);
                if !has && rng.random_bool(0.6) {
                    subscriptions.extend(self.subscribe(space).await);
                }
            }
            self.tell_workers(&subscriptions);
            tokio::time::sleep(millis(rng.random_range(5..40))).await;
            match rng.random_range(0..40) {
                0..3 if !subscriptions.is_empty() => {
                    let given_up = subscriptions.swap_remove(rng.random_range(0..subscriptions.len()));
                    let space = given_up.address_space().get();
                    self.tell_workers(&subscriptions);
                    if given_up.unsubscribe().await.is_ok() {
                        self.shared.trace.record(What::Unsubscribed { life: self.life, space });
                    }
                }
                3 => return,
                _ => {}
            }
        }
    }

    async fn subscribe(&self, space: u64) -> Option<Subscription> {
        self.shared.trace.record(What::Subscribing { life: self.life, space });
        let id = AddressSpaceId::new(space)?;
        let whole = [range_of(0..PAGES)];
        let asked = self.device.subscribe(id, &whole, SubscribeOptions::default()).await;
        if let Err(SubscribeError::Refused(error)) = &asked
            && error.reason == Reason::LeaseRequired
        {
            self.shared.trace.record(What::Barred { life: self.life, space });
        }
        let subscribed = asked.ok()?;
        let seq = subscribed.seq().map(|seq| seq.get());
        self.shared.trace.record(What::Subscribed { life: self.life, space, seq });
        Some(subscribed)
    }

    fn tell_workers(&self, subscriptions: &[Subscription]) {
        let spaces = subscriptions.iter().map(|held| held.address_space().get()).collect();
        *self.device.tlb().subscribed.lock() = spaces;
    }
}

/// One use in so many is a long one.
const LONG_USES: u32 = 60;

/// One of the device's engines.
struct Worker {
    device: Device<SimTlb>,
    /// What it reads through, if it does not reach the memory by itself.
    pages: Option<PageClient>,
    /// For how long it waits for what it reads: longer than for the end of its session.
    patience: Duration,
    rng: StdRng,
}

impl Worker {
    async fn run(mut self, plan: DevicePlan, broken: Broken) {
        loop {
            tokio::time::sleep(millis(self.rng.random_range(1..12))).await;
            let spaces = self.device.tlb().subscribed.lock().clone();
            if spaces.is_empty() {
                continue;
            }
            let space = spaces[self.rng.random_range(0..spaces.len())];
            let page = self.rng.random_range(0..PAGES);
            match plan.table {
                Table::Sdk => self.use_mappings(&plan, space, page, broken).await,
                Table::Own => self.use_own_table(&plan, space, page).await,
            }
        }
    }

    async fn use_mappings(&mut self, plan: &DevicePlan, space: u64, page: u64, broken: Broken) {
        let tlb = Arc::clone(self.device.tlb());
        let mut mappings = tlb.replacements.lock().split_off(0);
        if mappings.is_empty() {
            let id = AddressSpaceId::new(space).expect("it was given out");
            let end = self.rng.random_range(page + 1..=PAGES);
            let asked = Asking::begin(&tlb, space, page..end);
            let Ok(granted) = self.device.fault(id, range_of(page..end), Access::Write).await else { return };
            asked.granted();
            mappings = granted;
            mappings.iter().for_each(|mapping| tlb.on_installed(mapping));
        }
        for _ in 0..self.rng.random_range(1..6) {
            let mapping: &Mapping = &mappings[self.rng.random_range(0..mappings.len())];
            let Ok(guard) = mapping.begin_use() else { return };
            let (space, page) = (mapping.address_space().get(), mapping.range().start() >> 12);
            if let Some(pages) = &self.pages {
                let frame = Frame::of(guard.frame());
                let guard = (broken != Broken::AckBeforeUsesEnded).then_some(guard);
                content::read(&tlb, pages, frame, self.patience).await;
                drop(guard);
                tokio::time::sleep(millis(self.rng.random_range(0..4))).await;
                continue;
            }
            let Some(access) = Use::begin(&tlb, space, page, Frame::of(guard.frame())) else { return };
            if self.rng.random_range(0..LONG_USES) == 0 {
                let work = tokio::time::sleep(plan.long_use);
                match broken {
                    Broken::UseOutlastsLease => work.await,
                    // Past the lease it is ended: the next one is refused.
                    _ => drop(guard.run_until_expired(work).await),
                }
                drop(access);
                drop(guard);
                continue;
            }
            let guard = (broken != Broken::AckBeforeUsesEnded).then_some(guard);
            tokio::time::sleep(self.length(plan)).await;
            drop(access);
            drop(guard);
            tokio::time::sleep(millis(self.rng.random_range(0..4))).await;
        }
    }

    async fn use_own_table(&mut self, plan: &DevicePlan, space: u64, page: u64) {
        let tlb = Arc::clone(self.device.tlb());
        let gate = self.device.gate();
        for _ in 0..self.rng.random_range(1..6) {
            if let Some(access) = tlb.begin_use(&gate, space, page) {
                tokio::time::sleep(self.length(plan)).await;
                drop(access);
            } else {
                let id = AddressSpaceId::new(space).expect("it was given out");
                let range = range_of(page..page + 1);
                let asked = Asking::begin(&tlb, space, page..page + 1);
                let Ok(grant) = self.device.fault_ticketed(id, range, Access::Write).await else { return };
                asked.granted();
                // A device that works out of order is late with what it was granted.
                tokio::time::sleep(millis(self.rng.random_range(0..4))).await;
                grant.tickets.into_iter().for_each(|ticket| tlb.install(ticket));
            }
        }
    }

    fn length(&mut self, plan: &DevicePlan) -> Duration {
        // What nobody stops may last longer than any lease.
        let is_long = plan.enforcement == Enforcement::ByNobody && self.rng.random_ratio(1, 12);
        let most = if is_long { LONG_USE } else { plan.most_use };
        self.rng.random_range(Duration::ZERO..=most)
    }
}

/// Listens on every address of its machine.
pub const fn everywhere(port: u16) -> (Ipv4Addr, u16) {
    (Ipv4Addr::UNSPECIFIED, port)
}

/// An error with its sources.
struct Chain<'a>(&'a dyn std::error::Error);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}
