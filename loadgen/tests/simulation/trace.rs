//! What happened in a world, as its seams saw it: the only thing that the oracle looks at.

use std::fmt;
use std::hash::{Hash as _, Hasher as _};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use crate::clock;
use crate::memory::PAGE;

/// One frame from its allocation until it is freed. The device's [`shootdown_core::FrameNumber`] carries
/// both numbers, so that a use always says which allocation it means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Frame {
    /// Which of the machine's frames.
    pub index: u64,
    /// How often it was freed before.
    pub generation: u64,
}

/// Pages of an address space, by number.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Pages {
    pub space: u64,
    pub pages: Range<u64>,
}

/// One call of a notifier method.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Op(pub usize);

/// One try of a device to have a session: from before Hello until everything is flushed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Life(pub usize);

/// A flush or a use, from its beginning to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span(pub usize);

/// Which method was called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Called {
    RangeStart,
    Page,
    ChangePte(Frame),
    ClearFlushYoung,
    ClearYoung,
    Release,
}

/// How long the caller waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Patience {
    Unlimited,
    AtMost(Duration),
    None,
}

/// The verdict of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verdict {
    Quiesced,
    NotQuiesced,
    WouldBlock,
}

/// What became of a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    Waiting,
    Acked,
    Left,
    Fenced,
}

/// A target of a round, as an answer tells of it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Target {
    pub session: u64,
    pub outcome: Outcome,
    /// When, in virtual time.
    pub resolved: Option<Duration>,
}

/// An answer to the caller.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Answer {
    pub verdict: Verdict,
    pub seq: Option<u64>,
    pub targets: Vec<Target>,
    /// What the devices said, and what the host agent had kept of what they had said before.
    pub young: bool,
    /// When the notices were in the outboxes, and when the last target was resolved.
    pub dispatched: Duration,
    pub resolved: Option<Duration>,
}

/// Who cuts a device off that does not stop when its lease is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CutOffBy {
    Fencer,
    /// By hand: there is no fencer for it.
    Administrator,
}

/// What a fencer does when it is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reply {
    /// It has cut the device off, and says so.
    Confirmed,
    /// It does so when nobody waits for it any more.
    ConfirmedLate,
    /// It has cut the device off, and says that something went wrong.
    WordLost,
    NotConfirmed,
    Unspecified,
    Failed,
}

/// What a device flushes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Scope {
    Pages(Pages),
    /// Because the host agent said so.
    Everything,
    /// Because a session begins or ends.
    EverythingOfTheSession,
}

/// A notice, as the device has it from the SDK.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Told {
    pub notice: u64,
    pub seq: u64,
    /// Of its range; to the end of the numbers, where that is everything.
    pub bytes: Range<u64>,
    pub asks: Asks,
}

/// What a notice asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Asks {
    /// To say what was used.
    Young,
    /// To stop.
    Stop,
}

/// What can happen.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum What {
    // The source.
    /// A page got a frame: from here on devices may be granted it.
    Mapped {
        space: u64,
        page: u64,
        frame: Frame,
    },
    Call {
        op: Op,
        called: Called,
        pages: Pages,
        patience: Patience,
    },
    /// What was named were these bytes, and not whole pages.
    Announced {
        op: Op,
        bytes: Range<u64>,
    },
    /// A device's fault waits for it.
    InFault {
        op: Op,
    },
    Answered {
        op: Op,
        answer: Answer,
    },
    Refused {
        op: Op,
        error: String,
    },
    /// The caller ended its bracket.
    Ended {
        op: Op,
    },
    /// The caller's future was dropped before its answer.
    Abandoned {
        op: Op,
    },
    /// The frame may be used for another page, on the strength of `op`.
    Freed {
        op: Op,
        frame: Frame,
    },

    // Devices.
    Connecting {
        life: Life,
        device: usize,
        /// Which start of the device agent: what an earlier one held is gone with it.
        start: u64,
    },
    /// Its device goes on when its lease is over, until somebody cuts it off.
    EnforcesNoLease {
        life: Life,
        cut_off_by: CutOffBy,
    },
    Opened {
        life: Life,
        session: u64,
        /// The host agent's incarnation.
        host: u64,
    },
    /// The session went on, on another connection.
    Resumed {
        life: Life,
    },
    /// The lease of a session was granted, renewed, or has ended, in virtual time.
    Lease {
        life: Life,
        until: Option<Duration>,
    },
    Subscribing {
        life: Life,
        space: u64,
    },
    Subscribed {
        life: Life,
        space: u64,
        /// The newest event at the time.
        seq: Option<u64>,
    },
    /// It was refused: nobody could stop the device.
    Barred {
        life: Life,
        space: u64,
    },
    Unsubscribed {
        life: Life,
        space: u64,
    },
    Installed {
        life: Life,
        space: u64,
        page: u64,
        frame: Frame,
    },
    FlushBegan {
        life: Life,
        span: Span,
        scope: Scope,
        told: Option<Told>,
    },
    FlushEnded {
        span: Span,
    },
    UseBegan {
        life: Life,
        span: Span,
        space: u64,
        page: u64,
        frame: Frame,
    },
    UseEnded {
        span: Span,
    },
    FaultBegan {
        life: Life,
        span: Span,
        pages: Pages,
    },
    /// It was granted.
    FaultEnded {
        span: Span,
    },
    /// The host agent served a frame's bytes, which say how often it had been freed by then.
    Read {
        life: Life,
        frame: Frame,
        times_freed: u64,
    },
    /// It did not.
    ReadRefused {
        life: Life,
        frame: Frame,
        reason: String,
    },
    Closed {
        life: Life,
        cause: String,
    },

    // The host agent.
    /// A run begins.
    AgentStarted {
        incarnation: u64,
    },
    /// It stops without a word, and the source's calls with it.
    AgentCrashed,
    /// It has stopped as planned: its successor goes on with its sessions.
    HandedOver,
    /// It has found that there is a successor, and ends.
    Superseded {
        host: u64,
    },
    /// A round of it that has targets, or a bracket, was opened.
    RoundSeen {
        host: u64,
        space: u64,
        seq: u64,
    },

    // A source on a machine of its own.
    /// The run of the host agent that answers now knows the address space.
    Registered {
        space: u64,
    },
    /// A try of a call sets out.
    Sent {
        op: Op,
    },
    /// A try was answered: by which run, and with which round.
    Heard {
        op: Op,
        host: u64,
        /// How often its address space had been registered when it set out.
        registered: u64,
        seq: Option<u64>,
    },
    /// That answer is good: it comes with the next [`What::Answered`].
    Taken {
        op: Op,
        host: u64,
        /// How long the host agent says that it took, in virtual time.
        took: Duration,
    },

    // The path from the devices to the memory.
    FencerAsked {
        device: usize,
        start: u64,
        reply: Reply,
    },
    /// Nothing of this run of the device agent reaches the memory any more.
    CutOff {
        device: usize,
        start: u64,
        by: CutOffBy,
    },

    // The world.
    Fault(String),
    /// What the administrator's listings count at the end.
    Left {
        sessions: usize,
        rounds: usize,
        brackets: u64,
        subscriptions: u64,
        /// Bytes and pages.
        quarantined: (u64, u64),
    },
}

impl What {
    /// What the listings show when all is over.
    pub const NOTHING_LEFT: Self =
        Self::Left { sessions: 0, rounds: 0, brackets: 0, subscriptions: 0, quarantined: (0, 0) };
}

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

impl Frame {
    const INDEX_BITS: u32 = 16;

    pub fn number(self) -> shootdown_core::FrameNumber {
        shootdown_core::FrameNumber(self.generation << Self::INDEX_BITS | self.index)
    }

    pub fn of(number: shootdown_core::FrameNumber) -> Self {
        let mask = (1 << Self::INDEX_BITS) - 1;
        Self { index: number.0 & mask, generation: number.0 >> Self::INDEX_BITS }
    }
}

impl Pages {
    pub fn overlaps(&self, other: &Self) -> bool {
        self.space == other.space && self.pages.start < other.pages.end && other.pages.start < self.pages.end
    }

    /// Every byte of them.
    pub fn bytes(&self) -> Range<u64> {
        self.pages.start * PAGE..self.pages.end * PAGE
    }

    pub fn holds(&self, space: u64, page: u64) -> bool {
        self.space == space && self.pages.contains(&page)
    }
}
