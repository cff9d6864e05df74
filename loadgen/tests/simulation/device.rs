//! A device: connects, subscribes, faults, uses what it was granted, and flushes when it is told to.

use std::io;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use shootdown_client::{
    Access, AddressSpaceId, ChangePte, Clock, Connector, Device, DeviceConfig, DeviceId, Endpoint,
    Incarnation, Mapping, SubscribeOptions, Subscription,
};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::clock::virtual_now;
use crate::cuttable::Cuttable;
use crate::memory::{PAGES, range_of};
use crate::plan::{Broken, DevicePlan, Table, millis};
use crate::shared::{Shared, Stage};
use crate::tlb::{SimTlb, Use};
use crate::trace::{Frame, Life, What};

/// Where the host agent listens for devices.
pub const PORT: u16 = 7400;

/// The host agent's machine.
pub const AGENT: &str = "agent";

/// A device agent, from its start until it is stopped or crashes.
pub async fn run(shared: Arc<Shared>, plan: DevicePlan) -> turmoil::Result {
    let start = shared.start_of(plan.index);
    let mut rng = shared.rng(1000 + plan.index as u64 * 100 + start);
    let mut tries = 0;
    while !shared.is_past(Stage::Healed) {
        // A device agent that was left by its session goes on with the same incarnation.
        let incarnation = Incarnation::new(start).expect("starts are counted from 1");
        tries += 1;
        let life = shared.trace.next_life();
        shared.trace.record(What::Connecting { life, device: plan.index, start });
        let seed = rng.random();
        let tlb = Arc::new(SimTlb::new(Arc::clone(&shared), life, plan.clone(), seed));
        match Device::connect(config(&shared, &plan, incarnation), tlb).await {
            Ok(device) => Session { shared: &shared, plan: &plan, life, device }.live(&mut rng).await,
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
    config.lease_drift_ppm = shared.plan.terms.drift_ppm;
    config.lease_margin = Some(shared.plan.terms.margin);
    config.connect_timeout = millis(300);
    config.keepalive = millis(80);
    config.busy_poll = Duration::ZERO;
    let (world, index) = (Arc::clone(shared), plan.index);
    config.connector = Connector::from_fn(move |endpoint| connect(endpoint, world.begin_connection(index)));
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

async fn connect(endpoint: Endpoint, cut: CancellationToken) -> io::Result<Cuttable> {
    match endpoint {
        Endpoint::Tcp { host, port } => {
            let stream = turmoil::net::TcpStream::connect((host, port)).await?;
            Ok(Cuttable::new(stream, cut))
        }
        Endpoint::Unix(_) => Err(io::ErrorKind::Unsupported.into()),
    }
}

/// The machine of a device.
pub fn name(device: usize) -> String {
    format!("device-{device}")
}

struct Session<'a> {
    shared: &'a Arc<Shared>,
    plan: &'a DevicePlan,
    life: Life,
    device: Device<SimTlb>,
}

impl Session<'_> {
    /// Until the session is lost, or the device leaves.
    async fn live(self, rng: &mut StdRng) {
        let Self { shared, plan, life, device } = &self;
        let (session, host) = (device.session_id().get(), device.host_incarnation().get());
        shared.trace.record(What::Opened { life: *life, session, host });
        shared.watch_lease(*life, plan.clock, device.gate());
        let mut workers = JoinSet::new();
        for _ in 0..plan.workers {
            let worker = Worker { device: device.clone(), rng: StdRng::seed_from_u64(rng.random()) };
            workers.spawn(worker.run(DevicePlan::clone(plan), shared.plan.broken));
        }
        tokio::select! {
            // First: there is nothing to drive any more.
            biased;
            _ = device.lost() => {}
            () = self.tell_resumes() => {}
            () = shared.until(Stage::Quiet) => {}
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
        let subscribed = self.device.subscribe(id, &whole, SubscribeOptions::default()).await.ok()?;
        self.shared.trace.record(What::Subscribed { life: self.life, space });
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
            let Ok(granted) = self.device.fault(id, range_of(page..end), Access::Write).await else { return };
            mappings = granted;
            mappings.iter().for_each(|mapping| tlb.on_installed(mapping));
        }
        for _ in 0..self.rng.random_range(1..6) {
            let mapping: &Mapping = &mappings[self.rng.random_range(0..mappings.len())];
            let Ok(guard) = mapping.begin_use() else { return };
            let (space, page) = (mapping.address_space().get(), mapping.range().start() >> 12);
            let access = Use::begin(&tlb, space, page, Frame::of(guard.frame()));
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
                let Ok(grant) = self.device.fault_ticketed(id, range, Access::Write).await else { return };
                // A device that works out of order is late with what it was granted.
                tokio::time::sleep(millis(self.rng.random_range(0..4))).await;
                grant.tickets.into_iter().for_each(|ticket| tlb.install(ticket));
            }
        }
    }

    fn length(&mut self, plan: &DevicePlan) -> Duration {
        self.rng.random_range(Duration::ZERO..=plan.most_use)
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
