//! A call of the source, in a history.

use std::ops::Range;
use std::time::Duration;

use crate::trace::{Answer, Called, Frame, Op, Pages, Patience, Target, Verdict};

/// A call of the source, and all that became of it.
#[derive(Debug)]
pub struct Round {
    pub op: Op,
    pub at: Duration,
    /// The incarnation of the host agent that was called.
    pub host: u64,
    /// That run has crashed since: what had not become of the call until then never will.
    pub outlived_host: bool,
    pub called: Called,
    pub pages: Pages,
    /// What was named of them.
    pub bytes: Range<u64>,
    /// A device's fault waits for it.
    pub in_fault: bool,
    pub patience: Patience,
    pub answers: Vec<(Duration, Answer)>,
    /// When its caller ended the bracket.
    pub ended: Vec<Duration>,
    pub refused: Vec<(Duration, String)>,
    pub abandoned: Vec<Duration>,
    /// Its tries over the wire, and what they were answered.
    pub sent: Vec<Duration>,
    pub heard: Vec<Heard>,
    /// How long the host agent took for the first answer that was good.
    pub took: Option<Duration>,
}

/// An answer to a try.
#[derive(Debug, Clone, Copy)]
pub struct Heard {
    pub at: Duration,
    pub host: u64,
    pub registered: u64,
    pub seq: Option<u64>,
}

impl Round {
    /// What the last answer says of each target. Once its bracket has ended, an answer names none.
    pub fn last_targets(&self) -> &[Target] {
        let named = self.answers.iter().rev().map(|(_, answer)| &answer.targets);
        named.into_iter().find(|targets| !targets.is_empty()).map_or(&[], Vec::as_slice)
    }

    /// When the answer came that the pages may be released, and when the last target had stopped.
    pub fn quiesced(&self) -> Option<(Duration, Duration)> {
        let quiesced = |(_, answer): &&(Duration, Answer)| answer.verdict == Verdict::Quiesced;
        let (at, answer) = self.answers.iter().find(quiesced)?;
        Some((*at, answer.resolved.unwrap_or(*at)))
    }

    /// Its number in the address space, as soon as it has one.
    pub fn seq(&self) -> Option<u64> {
        self.answers.iter().find_map(|(_, answer)| answer.seq)
    }

    /// When the notices were in the outboxes.
    pub fn dispatched(&self) -> Option<Duration> {
        let (_, first) = self.answers.first()?;
        (first.verdict != Verdict::WouldBlock).then_some(first.dispatched)
    }

    /// Until when nothing that overlaps may be granted; `None`: it is not known.
    pub fn window_ends(&self) -> Option<Duration> {
        let (_, resolved) = self.quiesced()?;
        match self.called {
            Called::RangeStart => Some(self.ended.first()?.max(&resolved).to_owned()),
            Called::Page | Called::ChangePte(_) | Called::ClearFlushYoung | Called::ClearYoung => {
                Some(resolved)
            }
            Called::Release => Some(Duration::MAX),
        }
    }

    /// Whether a device stops using the pages for it.
    pub fn withdraws(&self) -> bool {
        self.called != Called::ClearYoung
    }

    pub fn installs(&self, frame: Frame) -> bool {
        self.called == Called::ChangePte(frame)
    }
}
