//! A world: its machines on turmoil's network, stepped through virtual time, and what goes wrong with them.

use std::sync::Arc;
use std::time::Duration;

use turmoil::Sim;

use crate::agent;
use crate::clock;
use crate::device::{self, AGENT};
use crate::faults::{Fault, Planned};
use crate::plan::{Plan, STORM, millis};
use crate::shared::{Shared, Stage};
use crate::trace::{Event, What};

/// What turmoil advances all machines by. Timers of tokio are no finer.
const TICK: Duration = millis(1);

/// For how long devices go on when everything is healed.
const RECOVERY: Duration = millis(100);

/// What happened in the world of a seed.
#[derive(Debug)]
pub struct Run {
    pub plan: Plan,
    pub events: Vec<Event>,
    /// Why the world stopped before its end.
    pub broke: Option<String>,
}

/// Runs a world from its beginning to its end.
pub fn run(plan: Plan) -> Run {
    clock::begin_world(plan.host_clock);
    let shared = Arc::new(Shared::new(plan.clone()));
    let mut sim = build(&shared);
    let mut weather = Weather::new(&shared);
    // The bound of the last rounds and sessions, and a device that waits for the host agent to hang up.
    let longest = STORM + RECOVERY + 3 * plan.resolution_bound() + millis(3000);
    let broke = loop {
        let now = sim.elapsed();
        clock::world_is_at(now);
        weather.change(&mut sim, now);
        if let Err(error) = sim.step() {
            break Some(error.to_string());
        }
        clock::world_is_at(sim.elapsed());
        shared.look_at_leases();
        if shared.stage.get() == Stage::Over {
            break None;
        }
        if now > longest {
            break Some(format!("it is not over after {longest:?}"));
        }
    };
    let events = shared.trace.take();
    // Destructors run from here on, outside of any time.
    drop(sim);
    Run { plan, events, broke }
}

fn build<'a>(shared: &Arc<Shared>) -> Sim<'a> {
    let plan = &shared.plan;
    let mut sim = turmoil::Builder::new()
        .rng_seed(plan.seed)
        .enable_random_order()
        .tick_duration(TICK)
        .simulation_duration(Duration::MAX)
        .min_message_latency(plan.latency.least)
        .max_message_latency(plan.latency.most)
        .build();
    sim.set_message_latency_curve(plan.latency.curve);
    let world = Arc::clone(shared);
    sim.host(AGENT, move || agent::run(Arc::clone(&world)));
    for device in plan.devices.clone() {
        let world = Arc::clone(shared);
        sim.host(device::name(device.index), move || device::run(Arc::clone(&world), device.clone()));
    }
    sim
}

/// The faults, as they begin and end.
struct Weather<'a> {
    shared: &'a Shared,
    coming: std::vec::IntoIter<Planned>,
    next: Option<Planned>,
    going_on: Vec<(Duration, Fault)>,
}

impl<'a> Weather<'a> {
    fn new(shared: &'a Shared) -> Self {
        let mut coming = shared.plan.faults.clone().into_iter();
        let next = coming.next();
        Self { shared, coming, next, going_on: Vec::new() }
    }

    fn change(&mut self, sim: &mut Sim<'_>, now: Duration) {
        let storm_is_over = now >= STORM;
        let (ended, going_on) =
            self.going_on.drain(..).partition(|(until, _)| *until <= now || storm_is_over);
        self.going_on = going_on;
        for (_, fault) in ended {
            self.tell("end of", fault);
            self.heal(sim, fault);
        }
        while let Some(planned) = self.next.filter(|next| next.at <= now && !storm_is_over) {
            self.next = self.coming.next();
            // One at a time of those that would end each other.
            if !self.going_on.iter().any(|(_, other)| other.interferes(planned.fault)) {
                self.tell("begin of", planned.fault);
                self.strike(sim, planned.fault);
                self.going_on.push((now + planned.lasts, planned.fault));
            }
        }
        let stage = match now {
            now if now >= STORM + RECOVERY => Stage::Quiet,
            now if now >= STORM => Stage::Healed,
            _ => Stage::Storm,
        };
        if self.shared.stage.get() < stage {
            self.shared.stage.change(|at| *at = stage);
        }
    }

    fn tell(&self, what: &str, fault: Fault) {
        self.shared.trace.record(What::Fault(format!("{what} {fault:?}")));
    }

    fn strike(&self, sim: &mut Sim<'_>, fault: Fault) {
        match fault {
            Fault::Partition(device) => sim.partition(AGENT, device::name(device)),
            Fault::DeafDevice(device) => sim.partition_oneway(AGENT, device::name(device)),
            Fault::MuteDevice(device) => sim.partition_oneway(device::name(device), AGENT),
            Fault::Hold(device) => sim.hold(AGENT, device::name(device)),
            Fault::Crash(device) => self.crash(sim, device),
            Fault::PowerLoss(device) => {
                sim.partition(AGENT, device::name(device));
                self.crash(sim, device);
            }
            Fault::Hang(device) => self.shared.hangs[device].change(|hangs| *hangs = true),
            Fault::Loss => sim.set_fail_rate(LOSS),
        }
    }

    fn crash(&self, sim: &mut Sim<'_>, device: usize) {
        self.shared.trace.in_no_order(|| sim.crash(device::name(device)));
    }

    fn heal(&self, sim: &mut Sim<'_>, fault: Fault) {
        match fault {
            Fault::Partition(device) => sim.repair(AGENT, device::name(device)),
            Fault::DeafDevice(device) => sim.repair_oneway(AGENT, device::name(device)),
            Fault::MuteDevice(device) => sim.repair_oneway(device::name(device), AGENT),
            Fault::Hold(device) => sim.release(AGENT, device::name(device)),
            Fault::Crash(device) => sim.bounce(device::name(device)),
            Fault::PowerLoss(device) => {
                sim.repair(AGENT, device::name(device));
                sim.bounce(device::name(device));
            }
            Fault::Hang(device) => self.shared.hangs[device].change(|hangs| *hangs = false),
            Fault::Loss => {
                sim.set_fail_rate(0.0);
                // What it broke and no message has repaired yet.
                self.shared
                    .plan
                    .devices
                    .iter()
                    .for_each(|device| sim.repair(AGENT, device::name(device.index)));
            }
        }
    }
}

/// The probability that a message breaks its link; the next message repairs it.
const LOSS: f64 = 0.01;
