//! A world: its machines on turmoil's network, stepped through virtual time, and what goes wrong with them.

use std::sync::Arc;
use std::time::Duration;

use rand::RngExt as _;
use rand::rngs::StdRng;
use turmoil::Sim;

use crate::agent;
use crate::clock;
use crate::device::{self, AGENTS};
use crate::faults::{Fault, Planned};
use crate::fencer::{self, FENCER};
use crate::plan::{Caller, Plan, STORM, millis};
use crate::remote::{self, SOURCE};
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
    let longest = STORM + RECOVERY + 3 * (plan.resolution_bound() + plan.cut_off_bound()) + millis(3000);
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
    for (index, name) in agents(plan) {
        let world = Arc::clone(shared);
        sim.host(name, move || agent::run(Arc::clone(&world), index));
    }
    if plan.source == Caller::Remote {
        let world = Arc::clone(shared);
        sim.host(SOURCE, move || remote::run(Arc::clone(&world)));
    }
    for device in plan.devices.clone() {
        let world = Arc::clone(shared);
        sim.host(device::name(device.index), move || device::run(Arc::clone(&world), device.clone()));
    }
    if plan.fencer.is_some() {
        let world = Arc::clone(shared);
        sim.host(FENCER, move || fencer::run(Arc::clone(&world)));
    }
    sim
}

/// The host agent's processes: with a successor where one takes over.
fn agents(plan: &Plan) -> impl Iterator<Item = (usize, &'static str)> {
    let takes_over = plan.faults.iter().any(|planned| planned.fault == Fault::TakeOver);
    AGENTS.into_iter().enumerate().take(1 + usize::from(takes_over))
}

/// The faults, as they begin and end.
struct Weather<'a> {
    shared: &'a Shared,
    coming: std::vec::IntoIter<Planned>,
    next: Option<Planned>,
    going_on: Vec<(Duration, Fault)>,
    agent: Process,
    /// Which of the host agent's processes that is.
    current: usize,
    /// Whether one that was taken over from has been cleared away.
    old_is_gone: bool,
    /// Planned ends of the host agent that were seen.
    handovers: u64,
    /// When the power of its machine goes at the latest: it may go in the middle of a write before.
    power_goes: Option<Duration>,
    /// When it comes back, to go again.
    power_flickers: Option<Duration>,
    rng: StdRng,
}

/// The host agent's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Process {
    Up,
    /// It ends, and is started again when it has.
    Restarting,
    Down,
}

impl<'a> Weather<'a> {
    fn new(shared: &'a Shared) -> Self {
        let mut coming = shared.plan.faults.clone().into_iter();
        let next = coming.next();
        Self {
            shared,
            coming,
            next,
            going_on: Vec::new(),
            agent: Process::Up,
            current: 0,
            old_is_gone: false,
            handovers: 0,
            power_goes: None,
            power_flickers: None,
            rng: shared.rng(7000),
        }
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
        self.look_at_agent(sim);
        while let Some(planned) = self.next.filter(|next| next.at <= now && !storm_is_over) {
            self.next = self.coming.next();
            // One at a time of those that would end each other.
            let interferes = self.going_on.iter().any(|(_, other)| other.interferes(planned.fault));
            let is_over = planned.fault.is_of_agent() && self.agent != Process::Up;
            if !interferes && !is_over {
                self.tell("begin of", planned.fault);
                self.strike(sim, now, &planned);
                self.going_on.push((now + planned.lasts, planned.fault));
            }
        }
        if self.power_goes.is_some_and(|latest| latest <= now || self.shared.disk.is_off()) {
            self.lose_power(sim);
        }
        if self.power_flickers.is_some_and(|returns| returns <= now) && self.agent == Process::Down {
            self.power_flickers = None;
            self.start_agent(sim);
            self.shared.disk.power_goes_in_write(self.rng.random_range(0..WRITES_OF_A_START));
            self.power_goes = Some(Duration::MAX);
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

    /// A process that has ended is cleared away, and started again when it is time.
    fn look_at_agent(&mut self, sim: &mut Sim<'_>) {
        if self.current > 0 && !self.old_is_gone && !sim.is_host_running(AGENTS[0]) {
            self.old_is_gone = true;
            self.shared.trace.in_no_order(|| sim.crash(AGENTS[0]));
        }
        if self.shared.stage.get() != Stage::Over
            && self.agent != Process::Down
            && !sim.is_host_running(AGENTS[self.current])
        {
            let handovers = self.shared.agents[self.current].handovers.get();
            if handovers == self.handovers {
                self.shared.trace.record(What::AgentCrashed);
            }
            self.handovers = handovers;
            self.shared.trace.in_no_order(|| sim.crash(AGENTS[self.current]));
            match self.agent {
                Process::Restarting => self.start_agent(sim),
                Process::Up | Process::Down => self.agent = Process::Down,
            }
        }
    }

    fn start_agent(&mut self, sim: &mut Sim<'_>) {
        self.agent = Process::Up;
        self.shared.disk.power_returns();
        sim.bounce(AGENTS[self.current]);
    }

    /// What stopped it is over. Whoever asked it to stop does not wait any longer.
    fn restart_agent(&mut self, sim: &mut Sim<'_>) {
        match self.agent {
            Process::Down => self.start_agent(sim),
            Process::Up | Process::Restarting => {
                self.agent = Process::Restarting;
                self.kill_agent();
            }
        }
    }

    fn kill_agent(&self) {
        self.shared.agents[self.current].kills.change(|kills| *kills += 1);
    }

    /// The machine stops without a word, with all that runs on it.
    fn lose_power(&mut self, sim: &mut Sim<'_>) {
        self.power_goes = None;
        self.shared.disk.power_goes();
        self.each_link().for_each(|(agent, peer)| sim.partition(agent, peer));
        let on_it = &self.shared.agents[..=self.current];
        on_it.iter().for_each(|process| process.kills.change(|kills| *kills += 1));
    }

    /// Each way to the host agent, as the two ends of it.
    fn each_link(&self) -> impl Iterator<Item = (&'static str, String)> {
        let plan = &self.shared.plan;
        let source = (plan.source == Caller::Remote).then(|| SOURCE.to_owned());
        let fencer = plan.fencer.iter().map(|_| FENCER.to_owned());
        let peers = plan.devices.iter().map(|device| device::name(device.index)).chain(source).chain(fencer);
        peers.flat_map(|peer| agents(plan).map(move |(_, agent)| (agent, peer.clone())))
    }

    /// Each way of one to the host agent.
    fn links_of(&self, peer: impl Into<String>) -> impl Iterator<Item = (&'static str, String)> {
        let peer = peer.into();
        agents(&self.shared.plan).map(move |(_, agent)| (agent, peer.clone()))
    }

    fn tell(&self, what: &str, fault: Fault) {
        self.shared.trace.record(What::Fault(format!("{what} {fault:?}")));
    }

    fn strike(&mut self, sim: &mut Sim<'_>, now: Duration, planned: &Planned) {
        match planned.fault {
            Fault::Partition(device) => {
                self.links_of(device::name(device)).for_each(|(agent, device)| sim.partition(agent, device));
            }
            Fault::DeafDevice(device) => {
                self.links_of(device::name(device))
                    .for_each(|(agent, device)| sim.partition_oneway(agent, device));
            }
            Fault::MuteDevice(device) => {
                self.links_of(device::name(device))
                    .for_each(|(agent, device)| sim.partition_oneway(device, agent));
            }
            Fault::Hold(device) => {
                self.links_of(device::name(device)).for_each(|(agent, device)| sim.hold(agent, device));
            }
            Fault::Crash(device) => self.crash(sim, device),
            Fault::PowerLoss(device) => {
                self.links_of(device::name(device)).for_each(|(agent, device)| sim.partition(agent, device));
                self.crash(sim, device);
            }
            Fault::Hang(device) => self.shared.hangs[device].change(|hangs| *hangs = true),
            Fault::Cut(device) => self.shared.cut(device),
            Fault::FencerLost => {
                self.links_of(FENCER).for_each(|(agent, fencer)| sim.partition(agent, fencer));
            }
            Fault::Loss => sim.set_fail_rate(LOSS),
            Fault::AgentCrash => self.kill_agent(),
            Fault::AgentPowerLoss if self.rng.random_bool(0.3) => self.lose_power(sim),
            Fault::AgentPowerLoss => {
                // In the middle of a write, if there is one soon; and once more when the host agent starts.
                self.shared.disk.power_goes_in_write(self.rng.random_range(0..2));
                self.power_goes = Some(now + planned.lasts / 3);
                self.power_flickers = Some(now + planned.lasts * 2 / 3);
            }
            Fault::Handover => {
                self.shared.agents[self.current].handovers_asked.change(|asked| *asked += 1);
            }
            Fault::CutSource => self.shared.cut(self.shared.plan.devices.len()),
            Fault::PartitionSource => {
                self.links_of(SOURCE).for_each(|(agent, source)| sim.partition(agent, source));
            }
            Fault::HoldSource => self.links_of(SOURCE).for_each(|(agent, source)| sim.hold(agent, source)),
            Fault::TakeOver => {
                sim.hold(AGENTS[0], SOURCE);
                self.shared.takeovers_asked.change(|asked| *asked += 1);
                (self.current, self.handovers) = (1, 0);
            }
        }
    }

    fn crash(&self, sim: &mut Sim<'_>, device: usize) {
        self.shared.trace.in_no_order(|| sim.crash(device::name(device)));
    }

    fn heal(&mut self, sim: &mut Sim<'_>, fault: Fault) {
        match fault {
            Fault::Partition(device) => {
                self.links_of(device::name(device)).for_each(|(agent, device)| sim.repair(agent, device));
            }
            Fault::DeafDevice(device) => {
                self.links_of(device::name(device))
                    .for_each(|(agent, device)| sim.repair_oneway(agent, device));
            }
            Fault::MuteDevice(device) => {
                self.links_of(device::name(device))
                    .for_each(|(agent, device)| sim.repair_oneway(device, agent));
            }
            Fault::Hold(device) => {
                self.links_of(device::name(device)).for_each(|(agent, device)| sim.release(agent, device));
            }
            Fault::Crash(device) => sim.bounce(device::name(device)),
            Fault::PowerLoss(device) => {
                self.links_of(device::name(device)).for_each(|(agent, device)| sim.repair(agent, device));
                sim.bounce(device::name(device));
            }
            Fault::Hang(device) => self.shared.hangs[device].change(|hangs| *hangs = false),
            Fault::FencerLost => {
                self.links_of(FENCER).for_each(|(agent, fencer)| sim.repair(agent, fencer));
            }
            Fault::Cut(_) | Fault::CutSource => {}
            Fault::PartitionSource => {
                self.links_of(SOURCE).for_each(|(agent, source)| sim.repair(agent, source));
            }
            Fault::HoldSource => self.links_of(SOURCE).for_each(|(agent, source)| sim.release(agent, source)),
            Fault::TakeOver => {
                sim.release(AGENTS[0], SOURCE);
                self.shared.agents[0].standstill.end();
            }
            Fault::Loss => {
                sim.set_fail_rate(0.0);
                // What it broke and no message has repaired yet.
                self.each_link().for_each(|(agent, peer)| sim.repair(agent, peer));
            }
            Fault::AgentCrash | Fault::Handover => self.restart_agent(sim),
            Fault::AgentPowerLoss => {
                // With no write in the middle of which it could; or the faults are over before it was time.
                self.power_flickers = None;
                if self.power_goes.is_some() {
                    self.lose_power(sim);
                }
                self.each_link().for_each(|(agent, peer)| sim.repair(agent, peer));
                self.restart_agent(sim);
            }
        }
    }
}

/// What is synced when a host agent takes its state directory, more or less.
const WRITES_OF_A_START: u64 = 5;

/// The probability that a message breaks its link; the next message repairs it.
const LOSS: f64 = 0.01;
