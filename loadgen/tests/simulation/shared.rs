//! What the actors of one world share besides the network: the world is one process.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use parking_lot::Mutex;
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use shootdown_client::{Gate, Moment};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use crate::clock::SkewedClock;
use crate::disk::Disk;
use crate::fabric::Fabric;
use crate::level::Level;
use crate::memory::Memory;
use crate::observer::Seen;
use crate::plan::Plan;
use crate::process::Process;
use crate::tlb::Entry;
use crate::trace::{Life, Trace, What};

/// A world, as its actors see it.
#[derive(Debug)]
pub struct Shared {
    pub plan: Plan,
    pub trace: Trace,
    pub memory: Mutex<Memory>,
    pub fabric: Fabric,
    /// Address spaces that admit devices which nobody can stop.
    pub lenient: Mutex<BTreeSet<u64>>,
    registered: Mutex<u64>,
    /// By device: whether its flushes hang.
    pub hangs: Vec<Level<bool>>,
    pub stage: Level<Stage>,
    /// The devices that have stopped for good.
    pub stopped: Level<usize>,
    /// By device: how often it was started.
    starts: Mutex<Vec<u64>>,
    /// By device: what it should have flushed; see [`crate::plan::Broken::TableOutlivesSession`].
    pub kept: Mutex<BTreeMap<usize, Vec<Entry>>>,
    leases: Mutex<Vec<Watched>>,
    connections: Mutex<Vec<u64>>,
    /// By device: cancelled when its connections are lost.
    cuts: Mutex<Vec<CancellationToken>>,
    /// The host agent's state directory: what outlives it.
    pub state: TempDir,
    /// What it is on.
    pub disk: Arc<Disk>,
    /// How often the host agent was started.
    runs: Mutex<u64>,
    /// The host agent's processes: the first, and the one that may take over from it.
    pub agents: [Process; 2],
    /// The one of them that was last to listen: where its name leads to.
    pub newest: Level<usize>,
    /// How often a successor was asked for.
    pub takeovers_asked: Level<u64>,
    /// What the host agent knows of its rounds, and does not tell over the wire.
    pub seen: Mutex<Seen>,
    /// A source on a machine of its own calls nobody any more.
    pub source_is_done: Level<bool>,
}

/// How far the world is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Calls, uses, faults.
    Storm,
    /// Every fault is healed; the source calls nobody any more, devices go on.
    Healed,
    /// Devices leave.
    Quiet,
    /// The host agent was looked at for what is left.
    Over,
}

/// A lease whose end is looked at after each step.
#[derive(Debug)]
struct Watched {
    life: Life,
    clock: SkewedClock,
    gate: Gate,
    told: Option<Option<Moment>>,
}

impl Shared {
    pub fn new(plan: Plan) -> Self {
        let devices = plan.devices.len();
        let (trace, agents) = (Trace::default(), <[Process; 2]>::default());
        // On memory, where there is such a thing: a disk's syncs would be most of what a world costs.
        let state = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let on_it = agents.iter().map(|process| Arc::clone(&process.standstill)).collect();
        let disk = Disk::new(state.path(), on_it, trace.clone(), rng_of(&plan, 8000));
        Self {
            trace,
            memory: Mutex::default(),
            fabric: Fabric::default(),
            lenient: Mutex::default(),
            registered: Mutex::default(),
            hangs: (0..devices).map(|_| Level::new(false)).collect(),
            stage: Level::new(Stage::Storm),
            stopped: Level::new(0),
            starts: Mutex::new(vec![0; devices]),
            kept: Mutex::default(),
            leases: Mutex::default(),
            // One more than there are devices: the source's.
            connections: Mutex::new(vec![0; devices + 1]),
            cuts: Mutex::new((0..=devices).map(|_| CancellationToken::new()).collect()),
            state,
            disk: Arc::new(disk),
            runs: Mutex::default(),
            agents,
            newest: Level::new(0),
            takeovers_asked: Level::new(0),
            seen: Mutex::default(),
            source_is_done: Level::new(false),
            plan,
        }
    }

    /// Numbers that depend on the seed and on who draws them, not on who drew before.
    pub fn rng(&self, who: u64) -> StdRng {
        rng_of(&self.plan, who)
    }

    /// The number of this start of a device, from 1.
    pub fn start_of(&self, device: usize) -> u64 {
        let mut starts = self.starts.lock();
        starts[device] += 1;
        starts[device]
    }

    /// The number of its last start.
    pub fn starts_of(&self, device: usize) -> u64 {
        self.starts.lock()[device]
    }

    /// The number of this start of the host agent, from 1.
    pub fn start_of_agent(&self) -> u64 {
        let mut runs = self.runs.lock();
        *runs += 1;
        *runs
    }

    /// Whether the address space that is registered next is one of those: every second is.
    pub fn next_is_lenient(&self) -> bool {
        let mut registered = self.registered.lock();
        *registered += 1;
        *registered % 2 == 1
    }

    pub fn starts_of_agent(&self) -> u64 {
        *self.runs.lock()
    }

    /// The device makes a connection; cancelled when it is lost.
    pub fn begin_connection(&self, device: usize) -> CancellationToken {
        self.connections.lock()[device] += 1;
        self.cuts.lock()[device].clone()
    }

    /// How often the device has connected.
    pub fn connections_of(&self, device: usize) -> u64 {
        self.connections.lock()[device]
    }

    pub fn cut(&self, device: usize) {
        let cut = std::mem::take(&mut self.cuts.lock()[device]);
        cut.cancel();
    }

    pub fn watch_lease(&self, life: Life, clock: SkewedClock, gate: Gate) {
        self.leases.lock().push(Watched { life, clock, gate, told: None });
        self.look_at_leases();
    }

    /// Writes down each lease that has changed.
    pub fn look_at_leases(&self) {
        for watched in self.leases.lock().iter_mut() {
            let until = watched.gate.valid_until();
            if watched.told != Some(until) {
                watched.told = Some(until);
                let until = until.map(|until| watched.clock.when(until));
                self.trace.record(What::Lease { life: watched.life, until });
            }
        }
    }

    /// Waits until the world is that far.
    pub async fn until(&self, stage: Stage) {
        self.stage.until(|now| now >= stage).await;
    }

    pub fn is_past(&self, stage: Stage) -> bool {
        self.stage.get() > stage
    }
}

fn rng_of(plan: &Plan, who: u64) -> StdRng {
    StdRng::seed_from_u64(plan.seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ who)
}
