//! What happened in a world, as its seams saw it: the only thing that the oracle looks at.

mod words;
mod what;

use std::fmt;
use std::hash::{Hash as _, Hasher as _};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use crate::clock;

pub use self::what::What;
pub use self::words::{
    Answer, Asks, Called, CutOffBy, Frame, Life, Lost, Op, Outcome, Pages, Patience, Reply, Scope, Span,
    Target, Told, Verdict,
};

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Event {
    /// In virtual time.
    pub at: Duration,
    pub what: What,
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>9.3} ms  {:?}", self.at.as_secs_f64() * 1e3, self.what)
    }
}

/// Where events are written down. Clones write to the same trace.
#[derive(Debug, Clone, Default)]
pub struct Trace(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    events: Vec<Event>,
    spans: usize,
    ops: usize,
    lives: usize,
}

impl Trace {
    pub fn record(&self, what: What) {
        self.0.lock().events.push(Event { at: clock::virtual_now(), what });
    }

    pub fn next_span(&self) -> Span {
        let mut inner = self.0.lock();
        inner.spans += 1;
        Span(inner.spans)
    }

    pub fn next_op(&self) -> Op {
        let mut inner = self.0.lock();
        inner.ops += 1;
        Op(inner.ops)
    }

    pub fn next_life(&self) -> Life {
        let mut inner = self.0.lock();
        inner.lives += 1;
        Life(inner.lives)
    }

    /// Runs something that ends many tasks at once, which tokio does in an order that depends on what else the
    /// process does: what is recorded meanwhile is put into an order of its own.
    pub fn in_no_order(&self, act: impl FnOnce()) {
        let before = self.0.lock().events.len();
        act();
        self.0.lock().events[before..].sort_by_cached_key(|event| format!("{event:?}"));
    }

    /// All that was recorded, leaving nothing.
    pub fn take(&self) -> Vec<Event> {
        std::mem::take(&mut self.0.lock().events)
    }
}

/// A number that two equal traces share, and hardly any others.
pub fn fingerprint(events: &[Event]) -> u64 {
    // Without random keys, so that it is the same in each process.
    let mut hasher = std::hash::DefaultHasher::new();
    events.hash(&mut hasher);
    hasher.finish()
}
