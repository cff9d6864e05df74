//! What every source does alike: which call comes next, how one begins, and what becomes of its frames.

use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;
use rand::RngExt as _;
use rand::rngs::StdRng;
use shootdown_server::source::Wait;

use crate::memory::PAGES;
use crate::plan::millis;
use crate::shared::Shared;
use crate::trace::{Called, Frame, Op, Pages, Patience, What};

/// Address spaces at a time.
pub const SPACES: usize = 2;

/// Calls of a source in flight at a time.
pub const MOST_CALLS: usize = 12;

/// The calls of a source, with numbers of its own to draw them by.
#[derive(Clone)]
pub struct Calls {
    shared: Arc<Shared>,
    rng: Arc<Mutex<StdRng>>,
}

/// What a call is about.
#[derive(Debug, Clone, Copy)]
pub struct Drawn {
    pub page: u64,
    /// Behind the last page of a range from that on.
    pub end: u64,
    pub wait: Wait,
    /// Of forty: which call.
    pub which: u64,
}

impl Calls {
    pub fn new(shared: Arc<Shared>, who: u64) -> Self {
        let rng = Arc::new(Mutex::new(shared.rng(who)));
        Self { shared, rng }
    }

    pub fn draw(&self, range: Range<u64>) -> u64 {
        if range.is_empty() { range.start } else { self.rng.lock().random_range(range) }
    }

    /// One of those that there are.
    pub fn draw_space(&self) -> Option<u64> {
        let spaces = self.shared.memory.lock().live_spaces();
        spaces.get(self.draw(0..spaces.len() as u64) as usize).copied()
    }

    pub fn draw_call(&self) -> Drawn {
        let page = self.draw(0..PAGES);
        let end = self.draw(page + 1..PAGES + 1);
        let ack_timeout = self.shared.plan.ack_timeout;
        let wait = match self.draw(0..6) {
            0 => Wait::AtMost(millis(self.draw(0..ack_timeout.as_millis() as u64))),
            1 => Wait::AtMost(ack_timeout * 2),
            _ => Wait::ForTargets,
        };
        Drawn { page, end, wait, which: self.draw(0..40) }
    }

    pub fn begin(&self, pages: Pages, called: Called, wait: Wait) -> Op {
        let op = self.shared.trace.next_op();
        self.shared.trace.record(What::Call { op, called, pages, patience: Patience::of(wait) });
        op
    }

    /// The frames may be used again if the round is quiesced; otherwise they wait for the end of their address space.
    pub fn free_if(&self, quiesced: bool, op: Op, space: u64, frames: Vec<Frame>) {
        let mut memory = self.shared.memory.lock();
        if quiesced {
            memory.free(op, frames, &self.shared.trace);
        } else {
            memory.orphan(space, frames, &self.shared.trace);
        }
    }
}
