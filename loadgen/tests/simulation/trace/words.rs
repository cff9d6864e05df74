//! What an event speaks of.

use std::ops::Range;
use std::time::Duration;

use shootdown_server::source::Wait;

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

/// What a disk has lost when its power went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Lost {
    /// Nothing by itself: the power went in the middle of a write.
    PowerInWrite,
    /// A file's name.
    Name,
    /// That a file was removed: it is back.
    Removal,
    /// All that was not synced of a file.
    Bytes,
    /// Some of it.
    Tail,
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

impl Patience {
    pub fn of(wait: Wait) -> Self {
        match wait {
            Wait::ForTargets => Self::Unlimited,
            Wait::AtMost(limit) => Self::AtMost(limit),
            Wait::NotAtAll => Self::None,
        }
    }
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
