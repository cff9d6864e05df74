//! [8 of 9] An event that waits for its targets.
//!
//! ```text
//!              new                        on_resolved, until each target is resolved once
//!   targets = 0 | targets > 0                   +---------+
//!        +------+--------> Waiting -------------+         |
//!        v                  ^  |                          v
//!     Complete              +--+ more targets          Complete
//! ```
//!
//! A target:  Waiting --> Acked | Left | Fenced, and nothing after that.

use std::time::Duration;

use crate::ack::FlushTiming;
use crate::event::{Event, Method};
use crate::id::{DeviceId, SessionId};
use crate::moment::Moment;

/// How a target stopped being waited for. There is no variant for a time-out, and no input of a round
/// by which time alone could resolve a target (TimeoutIsNotAck).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Resolution {
    /// The device stopped using the range and said so.
    Acked {
        /// The device used pages of the event since its last report.
        young: bool,
        /// The device wrote pages of the event since its last report. It may say so of too many events, never
        /// of too few.
        dirty: bool,
        /// When the device received and flushed it, if it said so.
        timing: Option<FlushTiming>,
        /// When its notice was taken for the stream.
        sent: Option<Moment>,
    },
    /// The device said that it flushed everything and leaves.
    Left,
    /// The device cannot reach the memory any more (FenceIsPositive).
    Fenced,
}

/// Where a target of a round stands.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Outcome {
    /// It may still use the range.
    Waiting,
    /// It acked.
    Acked,
    /// It flushed everything and left.
    Left,
    /// It was fenced.
    Fenced,
}

impl Outcome {
    /// Every outcome.
    pub const EVERY: [Self; 4] = [Self::Waiting, Self::Acked, Self::Left, Self::Fenced];

    /// The word that logs and metric labels use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Acked => "acked",
            Self::Left => "left",
            Self::Fenced => "fenced",
        }
    }
}

/// What one input made of a round.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Progress {
    /// Other targets are still waited for.
    Waiting,
    /// This was the last target: the round is complete. Said once.
    Complete,
    /// The target was resolved before; nothing has changed.
    AlreadyResolved,
}

/// One target of a round and what became of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TargetReport {
    /// The target.
    pub session: SessionId,
    /// Its device.
    pub device: DeviceId,
    /// Where it stands.
    pub outcome: Outcome,
    /// From the opening of the round until the target was resolved.
    pub elapsed: Option<Duration>,
    /// Whether the target counts as having used the range. In a round that asks for young bits it
    /// does until it acks that it has not (YoungIsConservative).
    pub young: bool,
    /// Whether the target counts as having written the range. In a round that flushes it does until it
    /// acks that it has not: dirty may be over-reported, never under-reported.
    pub dirty: bool,
    /// From the opening of the round until its notice was taken for the stream.
    pub sent_after: Option<Duration>,
    /// When the device received and flushed it, on the device's clock.
    pub timing: Option<FlushTiming>,
    /// When the target was resolved.
    pub resolved_at: Option<Moment>,
}

/// An event and its targets, which are fixed when the round opens (StableTargets).
///
/// A target is named by its index, in the order in which [`Round::new`] was given them: the caller
/// keeps the index in the token that it gives to the target's outbox, and an ack finds its target
/// without a search. The price: reports of resolved targets stay until the round is dropped.
#[derive(Clone, Debug)]
pub struct Round {
    event: Event,
    opened: Moment,
    completed: Option<Moment>,
    waiting: usize,
    reports: Vec<TargetReport>,
}

impl Round {
    /// Opens a round. Without targets it is complete at once.
    #[must_use]
    pub fn new(event: Event, targets: impl IntoIterator<Item = (SessionId, DeviceId)>, now: Moment) -> Self {
        let (young, dirty) = (asks_young(event.method), asks_dirty(event.method));
        let reports: Vec<TargetReport> = targets
            .into_iter()
            .map(|(session, device)| TargetReport {
                session,
                device,
                outcome: Outcome::Waiting,
                elapsed: None,
                young,
                dirty,
                sent_after: None,
                timing: None,
                resolved_at: None,
            })
            .collect();
        let waiting = reports.len();
        Self { event, opened: now, completed: (waiting == 0).then_some(now), waiting, reports }
    }

    /// A target acked, left or was fenced. Only the first resolution of a target counts.
    ///
    /// # Panics
    /// When `target` is not an index of a target of this round.
    pub fn on_resolved(&mut self, target: usize, how: Resolution, now: Moment) -> Progress {
        let report = self.reports.get_mut(target).expect("a target is named by the index it was given");
        if report.outcome != Outcome::Waiting {
            return Progress::AlreadyResolved;
        }
        report.elapsed = Some(now.since(self.opened));
        report.resolved_at = Some(now);
        match how {
            Resolution::Acked { young, dirty, timing, sent } => {
                report.outcome = Outcome::Acked;
                report.young = young;
                report.dirty = dirty;
                report.timing = timing;
                report.sent_after = sent.map(|sent| sent.since(self.opened));
            }
            // Neither delivered its bits, so `young` and `dirty` stay what they are while nothing is known.
            Resolution::Left => report.outcome = Outcome::Left,
            Resolution::Fenced => report.outcome = Outcome::Fenced,
        }
        self.waiting -= 1;
        if self.waiting > 0 {
            return Progress::Waiting;
        }
        self.completed = Some(now);
        Progress::Complete
    }

    /// Whether every target is resolved.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.waiting == 0
    }

    /// The targets that are still waited for.
    pub fn missing(&self) -> impl Iterator<Item = &TargetReport> {
        self.reports.iter().filter(|report| report.outcome == Outcome::Waiting)
    }

    /// Whether any target used the range. In a round that asks for young bits (`clear_young`,
    /// `clear_flush_young`) a target that is waited for, left or was fenced without reporting counts
    /// as young: reclaim may then keep a page that nobody used, and never takes one that is in use.
    #[must_use]
    pub fn young(&self) -> bool {
        self.reports.iter().any(|report| report.young)
    }

    /// Whether any target wrote the range. In a round that flushes, which is any but `clear_young`, a target
    /// that is waited for, left or was fenced without reporting counts as one that did: a page may then be
    /// written back for nothing, and what a device wrote is never taken for clean.
    #[must_use]
    pub fn dirty(&self) -> bool {
        self.reports.iter().any(|report| report.dirty)
    }

    /// The event.
    #[must_use]
    pub fn event(&self) -> &Event {
        &self.event
    }

    /// When the round opened.
    #[must_use]
    pub fn opened(&self) -> Moment {
        self.opened
    }

    /// When the last target was resolved; `None` while one is waited for.
    #[must_use]
    pub fn completed(&self) -> Option<Moment> {
        self.completed
    }

    /// Every target, in the order of [`Round::new`].
    #[must_use]
    pub fn reports(&self) -> &[TargetReport] {
        &self.reports
    }
}

/// Whether the caller of this method wants to hear of young bits.
const fn asks_young(method: Method) -> bool {
    matches!(method, Method::ClearYoung | Method::ClearFlushYoung)
}

/// Whether devices tell what they wrote: with every flush.
const fn asks_dirty(method: Method) -> bool {
    !matches!(method, Method::ClearYoung)
}

#[cfg(test)]
mod tests;
