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
    /// Each message may break its connection for good, with every device.
    Loss,
}

/// From a quiet world to one where several things go wrong at once.
pub fn draw(devices: usize, terms: &LeaseTerms, rng: &mut StdRng) -> Vec<Planned> {
    let count = rng.random_range(0..7);
    let mut faults: Vec<_> = (0..count).map(|_| draw_one(devices, terms, rng)).collect();
    faults.sort_by_key(|planned| planned.at);
    faults
}

fn draw_one(devices: usize, terms: &LeaseTerms, rng: &mut StdRng) -> Planned {
    let device = rng.random_range(0..devices);
    let fault = match rng.random_range(0..15) {
        0..3 => Fault::Partition(device),
        3 => Fault::DeafDevice(device),
        4 => Fault::MuteDevice(device),
        5..7 => Fault::Hold(device),
        7..9 => Fault::Crash(device),
        9..11 => Fault::PowerLoss(device),
        11..14 => Fault::Hang(device),
        _ => Fault::Loss,
    };
    let lease = u64::try_from(terms.duration.as_millis()).unwrap();
    // Some are over before anybody notices, some outlast the lease, and some hangs the bound of a round.
    let longest = if matches!(fault, Fault::Hang(_)) { lease * 4 } else { lease * 2 };
    let lasts = millis(rng.random_range(5..longest));
    let latest = u64::try_from(STORM.as_millis()).unwrap();
    Planned { at: millis(rng.random_range(50..latest)), lasts, fault }
}

impl Fault {
    /// Whether the end of one would end the other, or could not be told from it.
    pub fn interferes(self, other: Self) -> bool {
        match (self.device(), other.device()) {
            (Some(one), Some(two)) => {
                let hang = |fault| matches!(fault, Self::Hang(_));
                one == two && hang(self) == hang(other)
            }
            // Message loss is of the whole network.
            (None, None) => true,
            (None, Some(_)) => !matches!(other, Self::Hang(_)),
            (Some(_), None) => !matches!(self, Self::Hang(_)),
        }
    }

    fn device(self) -> Option<usize> {
        match self {
            Self::Partition(device)
            | Self::DeafDevice(device)
            | Self::MuteDevice(device)
            | Self::Hold(device)
            | Self::Crash(device)
            | Self::PowerLoss(device)
            | Self::Hang(device) => Some(device),
            Self::Loss => None,
        }
    }
}
