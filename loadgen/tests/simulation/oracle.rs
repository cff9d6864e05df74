//! The oracle: reads a trace and says which invariant does not hold in it. It knows nothing of how the code
//! does its work: only what was called, answered, granted, used, flushed and freed, and when.

mod history;
mod round;

use std::fmt;
use std::time::Duration;

use crate::checks;
use crate::plan::{Plan, STORM, millis};
use crate::trace::Event;

pub use self::history::{Flush, History, Install, Use};
pub use self::round::{Heard, Round};

/// Something that must not happen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    pub invariant: &'static str,
    pub at: Duration,
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {:.3} ms: {}", self.invariant, self.at.as_secs_f64() * 1e3, self.what)
    }
}

/// What a check needs to know of the world beside its trace.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// How long a round may take.
    pub resolution: Duration,
    /// Within how long a caller is answered that waits for a device which is not certain to stop.
    pub answer: Duration,
    /// When every fault is over, and how much longer than that it may take until somebody has cut a device off that
    /// enforces no lease.
    pub cut_off: (Duration, Duration),
    /// Pages that may be quarantined.
    pub quarantine_pages: u64,
    /// By how much longer, for each round that waits for its turn behind a full window.
    pub turn: Duration,
    /// The smallest window of a device.
    pub window: usize,
    /// The longest that a message is on its way where nothing goes wrong.
    pub on_its_way: Duration,
}

impl Bounds {
    pub fn of(plan: &Plan) -> Self {
        let windows = plan.devices.iter().map(|device| device.window.min(plan.window));
        let window = windows.min().unwrap_or(1) as usize;
        Self {
            resolution: plan.resolution_bound(),
            answer: plan.answer_bound(),
            cut_off: (STORM, plan.cut_off_bound()),
            quarantine_pages: plan.quarantine_pages,
            turn: plan.host_clock.lasts(plan.ack_timeout),
            window,
            on_its_way: plan.latency.most + millis(5),
        }
    }
}

/// All that does not hold.
pub fn check(events: &[Event], bounds: Bounds) -> Vec<Violation> {
    let history = History::of(events, bounds);
    checks::ALL.iter().flat_map(|(_, check)| check(&history)).collect()
}
