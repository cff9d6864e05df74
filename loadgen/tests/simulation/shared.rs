//! What the actors of one world share besides the network: the world is one process.

use parking_lot::Mutex;
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use shootdown_client::{Gate, Moment};

use crate::clock::SkewedClock;
use crate::level::Level;
use crate::memory::Memory;
use crate::plan::Plan;
use crate::trace::{Life, Trace, What};

/// A world, as its actors see it.
#[derive(Debug)]
pub struct Shared {
    pub plan: Plan,
    pub trace: Trace,
    pub memory: Mutex<Memory>,
    /// By device: whether its flushes hang.
    pub hangs: Vec<Level<bool>>,
    pub stage: Level<Stage>,
    /// The devices that have stopped for good.
    pub stopped: Level<usize>,
    /// By device: how often it was started.
    starts: Mutex<Vec<u64>>,
    leases: Mutex<Vec<Watched>>,
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
        Self {
            trace: Trace::default(),
            memory: Mutex::default(),
            hangs: (0..devices).map(|_| Level::new(false)).collect(),
            stage: Level::new(Stage::Storm),
            stopped: Level::new(0),
            starts: Mutex::new(vec![0; devices]),
            leases: Mutex::default(),
            plan,
        }
    }

    /// Numbers that depend on the seed and on who draws them, not on who drew before.
    pub fn rng(&self, who: u64) -> StdRng {
        StdRng::seed_from_u64(self.plan.seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ who)
    }

    /// The number of this start of a device, from 1.
    pub fn start_of(&self, device: usize) -> u64 {
        let mut starts = self.starts.lock();
        starts[device] += 1;
        starts[device]
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
