//! [6 of 9] What a device says back.

use std::collections::BTreeSet;

use crate::id::NoticeNumber;
use crate::moment::Moment;
use crate::range::AddrRange;

/// When a device received a notice and when it had finished the flush, on the device's clock.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FlushTiming {
    /// When the notice reached the SDK.
    pub received: Moment,
    /// When the flush was complete.
    pub flushed: Moment,
}

/// What a flush brought back. Left out when there is nothing to tell.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct FlushReport {
    /// The notice that it belongs to.
    pub notice: NoticeNumber,
    /// What the device used since its last report. May name too much, never too little
    /// (YoungIsConservative).
    pub young: Vec<AddrRange>,
    /// What the device wrote since its last report.
    pub dirty: Vec<AddrRange>,
    /// Only where the host agent asked for timing.
    pub timing: Option<FlushTiming>,
}

/// Cumulative and selective acknowledgement.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Ack {
    /// Every notice up to and including this one; `None`: none yet.
    pub through: Option<NoticeNumber>,
    /// Notices above `through`, in any order.
    pub selective: Vec<NoticeNumber>,
    /// What the newly acked flushes brought back.
    pub reports: Vec<FlushReport>,
}

/// The notices of a session do not follow each other: something between them may be lost, so a precise
/// flush is not allowed (Contiguity). The device must flush everything and start a new session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected notice {expected}, got {got}: the device must flush everything")]
pub struct ContiguityError {
    /// The number after the last one.
    pub expected: NoticeNumber,
    /// The number that came.
    pub got: NoticeNumber,
}

/// The device's books: what it received, what it flushed, what it has not yet said so of.
///
/// ```text
///   on_notice ---> in flight --- on_flushed ---> flushed --- take ---> acked
/// ```
///
/// An ack names flushed notices only (AckMeansStopped), each once. In memory are the notices in
/// flight and those flushed since the last take: both at most the session's window.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct AckTracker {
    last: Option<NoticeNumber>,
    in_flight: BTreeSet<NoticeNumber>,
    flushed: Vec<NoticeNumber>,
    reports: Vec<FlushReport>,
}

impl AckTracker {
    /// The books of a new session.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A notice arrived.
    ///
    /// # Errors
    /// [`ContiguityError`] unless it is the one after the last; nothing has changed then, and the
    /// device must flush everything.
    pub fn on_notice(&mut self, n: NoticeNumber) -> Result<(), ContiguityError> {
        let expected = self.last.map_or(NoticeNumber::FIRST, NoticeNumber::next);
        if n != expected {
            return Err(ContiguityError { expected, got: n });
        }
        self.last = Some(n);
        self.in_flight.insert(n);
        Ok(())
    }

    /// The flush that notice `n` asks for is complete, in every level of the TLB, and every access
    /// through an old translation is over.
    ///
    /// # Panics
    /// When `n` is not in flight, or the report belongs to another notice: an ack of what was not
    /// flushed would free memory that is in use.
    pub fn on_flushed(&mut self, report: Option<FlushReport>, n: NoticeNumber) {
        assert!(self.in_flight.remove(&n), "notice {n} was flushed, but is not in flight");
        if let Some(report) = report {
            assert_eq!(report.notice, n, "the report of a flush belongs to its own notice");
            self.reports.push(report);
        }
        self.flushed.push(n);
    }

    /// Everything that was flushed since the last take, in one ack; `None` when nothing was.
    pub fn take(&mut self) -> Option<Ack> {
        if self.flushed.is_empty() {
            return None;
        }
        let through = self.through();
        let mut selective = std::mem::take(&mut self.flushed);
        selective.retain(|n| Some(*n) > through);
        selective.sort_unstable();
        Some(Ack { through, selective, reports: std::mem::take(&mut self.reports) })
    }

    /// Notices that arrived and are not flushed.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Whether [`AckTracker::take`] would make an ack.
    #[must_use]
    pub fn has_flushed(&self) -> bool {
        !self.flushed.is_empty()
    }

    /// The last notice that arrived: the resume point of the session.
    #[must_use]
    pub fn last_received(&self) -> Option<NoticeNumber> {
        self.last
    }

    /// The highest notice such that all up to it are flushed.
    #[must_use]
    pub fn through(&self) -> Option<NoticeNumber> {
        match self.in_flight.first() {
            Some(oldest) => NoticeNumber::new(oldest.get() - 1),
            None => self.last,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn n(number: u64) -> NoticeNumber {
        NoticeNumber::new(number).unwrap()
    }

    fn received(count: u64) -> AckTracker {
        let mut books = AckTracker::new();
        for number in 1..=count {
            books.on_notice(n(number)).unwrap();
        }
        books
    }

    fn report(number: u64) -> FlushReport {
        FlushReport { notice: n(number), young: vec![AddrRange::ALL], dirty: Vec::new(), timing: None }
    }

    /// Invariant 9, the device's side (trap 15).
    #[test]
    fn contiguity() {
        let mut books = received(2);
        for wrong in [1, 2, 4, 9] {
            let refused = books.on_notice(n(wrong));
            assert_eq!(refused, Err(ContiguityError { expected: n(3), got: n(wrong) }));
        }
        assert_eq!(
            (books.in_flight(), books.last_received()),
            (2, Some(n(2))),
            "a refused one changes nothing"
        );
        assert_eq!(AckTracker::new().on_notice(n(2)), Err(ContiguityError { expected: n(1), got: n(2) }));
    }

    /// Invariant 2, as far as the books go.
    #[test]
    fn ack_means_stopped() {
        let mut books = received(4);
        assert_eq!(books.take(), None, "received is not flushed");
        books.on_flushed(Some(report(3)), n(3));
        let ack = books.take().unwrap();
        assert_eq!((ack.through, ack.selective, ack.reports), (None, vec![n(3)], vec![report(3)]));
        assert_eq!(books.take(), None, "said once");
    }

    #[test]
    fn acks_are_coalesced_over_all_that_was_flushed_since_the_last() {
        let mut books = received(6);
        for number in [6, 2, 4, 1] {
            books.on_flushed(None, n(number));
        }
        let ack = books.take().unwrap();
        assert_eq!((ack.through, ack.selective), (Some(n(2)), vec![n(4), n(6)]));
        books.on_flushed(Some(report(3)), n(3));
        let ack = books.take().unwrap();
        assert_eq!(
            (ack.through, ack.selective),
            (Some(n(4)), vec![]),
            "moves up over what was flushed early"
        );
        books.on_flushed(None, n(5));
        assert_eq!(books.take().unwrap().through, Some(n(6)));
    }

    #[test]
    #[should_panic(expected = "not in flight")]
    fn a_flush_of_what_was_not_received_is_a_bug() {
        received(1).on_flushed(None, n(2));
    }

    #[test]
    #[should_panic(expected = "belongs to its own notice")]
    fn a_report_of_another_notice_is_a_bug() {
        received(2).on_flushed(Some(report(1)), n(2));
    }
}
