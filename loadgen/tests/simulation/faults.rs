//! What goes wrong in a world, and when.

use std::time::Duration;

use rand::RngExt as _;
use rand::rngs::StdRng;
use shootdown_core::lease::LeaseTerms;

use crate::plan::{STORM, millis};

/// Something goes wrong at `at`, for `lasts`.
#[derive(Debug, Clone, Copy)]
pub struct Planned {
    pub at: Duration,
    pub lasts: Duration,
    pub fault: Fault,
}

/// What goes wrong with a device, or on its way to the host agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// All that is sent is lost, both ways.
    Partition(usize),
    /// What the host agent sends is lost.
    DeafDevice(usize),
    /// What the device sends is lost.
    MuteDevice(usize),
    /// All that is sent arrives at the end.
    Hold(usize),
    /// The device stops without a word and comes back as a new incarnation; the kernel of its machine
    /// still closes its sockets.
    Crash(usize),
    /// The same, and nobody closes anything.
    PowerLoss(usize),
    /// Flushes do not return.
    Hang(usize),
    /// The device's connections are lost, and it can connect again at once.
    Cut(usize),
    /// All between the host agent and the fencer is lost.
    FencerLost,
    /// Each message may break its connection for good, with every device.
    Loss,
    /// The host agent stops without a word, and the calls of its source with it; the kernel of its machine
    /// still closes its sockets. Its next run finds its journal.
    AgentCrash,
    /// The same of its machine: nobody closes anything, and of what was written to the disk only what was synced is
    /// there for sure. It may go in the middle of a write.
    AgentPowerLoss,
    /// The host agent stops as planned, and its successor goes on.
    Handover,
    /// The connections of the source, which is on a machine of its own, are lost.
    CutSource,
    /// All that is sent between it and the host agent is lost.
    PartitionSource,
    /// All that is sent between them arrives at the end.
    HoldSource,
    /// The host agent stands still, what it told its source before is late, and a successor takes over; at the
    /// end it goes on beside it.
    TakeOver,
}

/// From a quiet world to one where several things go wrong at once.
pub fn draw(devices: usize, terms: &LeaseTerms, rng: &mut StdRng) -> Vec<Planned> {
    let count = rng.random_range(0..9);
    let mut faults: Vec<_> = (0..count).map(|_| draw_one(devices, terms, rng)).collect();
    faults.sort_by_key(|planned| planned.at);
    faults
}

fn draw_one(devices: usize, terms: &LeaseTerms, rng: &mut StdRng) -> Planned {
    let device = rng.random_range(0..devices);
    let fault = match rng.random_range(0..25) {
        0..3 => Fault::Partition(device),
        3 => Fault::DeafDevice(device),
        4 => Fault::MuteDevice(device),
        5..7 => Fault::Hold(device),
        7..9 => Fault::Crash(device),
        9..11 => Fault::PowerLoss(device),
        11..14 => Fault::Hang(device),
        14 => Fault::Loss,
        15..19 => Fault::Cut(device),
        19..21 => Fault::AgentCrash,
        21..23 => Fault::AgentPowerLoss,
        _ => Fault::Handover,
    };
    let lease = u64::try_from(terms.duration.as_millis()).unwrap();
    // Some are over before anybody notices, some outlast the lease, and some hangs the bound of a round.
    let longest = if matches!(fault, Fault::Hang(_)) { lease * 4 } else { lease * 2 };
    let lasts = millis(rng.random_range(5..longest));
    let latest = u64::try_from(STORM.as_millis()).unwrap();
    Planned { at: millis(rng.random_range(50..latest)), lasts, fault }
}

/// What goes wrong beside that where the source is on a machine of its own.
pub fn draw_of_source(terms: &LeaseTerms, rng: &mut StdRng) -> Vec<Planned> {
    let latest = u64::try_from(STORM.as_millis()).unwrap();
    let lease = u64::try_from(terms.duration.as_millis()).unwrap();
    let mut faults: Vec<_> = (0..rng.random_range(0..4))
        .map(|_| {
            let fault = match rng.random_range(0..4) {
                0..2 => Fault::CutSource,
                2 => Fault::PartitionSource,
                _ => Fault::HoldSource,
            };
            let lasts = millis(rng.random_range(5..lease));
            Planned { at: millis(rng.random_range(50..latest)), lasts, fault }
        })
        .collect();
    // Once: each successor is a process more.
    if rng.random_bool(0.6) {
        let at = millis(rng.random_range(80..latest / 2));
        faults.push(Planned { at, lasts: millis(rng.random_range(40..lease * 2)), fault: Fault::TakeOver });
    }
    faults
}

/// A host agent that stands still for longer than its devices' leases last.
pub fn long_takeover(terms: &LeaseTerms, rng: &mut StdRng) -> Vec<Planned> {
    let lasts = terms.duration * 2;
    vec![Planned { at: millis(rng.random_range(80..200)), lasts, fault: Fault::TakeOver }]
}

/// All of them, in their order.
pub fn with(mut faults: Vec<Planned>, more: Vec<Planned>) -> Vec<Planned> {
    faults.extend(more);
    faults.sort_by_key(|planned| planned.at);
    faults
}

impl Fault {
    /// Whether the end of one would end the other, or could not be told from it.
    pub fn interferes(self, other: Self) -> bool {
        use Of::{Agent, Device, Link, Moment, Network};
        match (self.of(), other.of()) {
            _ if matches!((self, other), (Self::TakeOver, other) | (other, Self::TakeOver) if other.is_of_source()) => {
                true
            }
            (Moment, _) | (_, Moment) | (Device(_) | Link(_), Agent) | (Agent, Device(_) | Link(_)) => false,
            (Device(one), Device(two)) | (Link(one), Link(two)) => one == two,
            (Device(_), Link(_) | Network) | (Link(_) | Network, Device(_)) => false,
            (Network, Link(_) | Network | Agent) | (Link(_) | Agent, Network) | (Agent, Agent) => true,
        }
    }

    pub const fn is_of_agent(self) -> bool {
        matches!(self, Self::AgentCrash | Self::AgentPowerLoss | Self::Handover | Self::TakeOver)
    }

    /// Of what it is sent and sends.
    const fn is_of_source(self) -> bool {
        matches!(self, Self::PartitionSource | Self::HoldSource)
    }

    const fn of(self) -> Of {
        match self {
            Self::Hang(device) => Of::Device(device),
            Self::Partition(device)
            | Self::DeafDevice(device)
            | Self::MuteDevice(device)
            | Self::Hold(device)
            | Self::Crash(device)
            | Self::PowerLoss(device) => Of::Link(device),
            Self::FencerLost => Of::Link(FENCER),
            Self::Cut(_) | Self::CutSource => Of::Moment,
            Self::PartitionSource | Self::HoldSource => Of::Link(SOURCE),
            Self::Loss | Self::AgentPowerLoss => Of::Network,
            Self::AgentCrash | Self::Handover | Self::TakeOver => Of::Agent,
        }
    }
}

/// No device has that number.
const FENCER: usize = usize::MAX;

/// And the source's, where it has one.
const SOURCE: usize = usize::MAX - 1;

/// What a fault is of.
#[derive(Clone, Copy)]
enum Of {
    /// A device's flushes.
    Device(usize),
    /// A device, and its way to the host agent.
    Link(usize),
    /// Everybody's way to the host agent.
    Network,
    Agent,
    /// It has no duration.
    Moment,
}
