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
///                                                   ^                    |
///                                                   +--------------------+
///                       on_notice, after on_resumed: the ack was lost on its way
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
    replay: Option<Replay>,
}

/// After a resume: notices that arrived on an earlier stream may come again, in ascending order, and before
/// any that did not. Which of their acks arrived is known only when the host agent has passed over them.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Replay {
    /// What is below it is settled.
    next: NoticeNumber,
    /// The last that arrived on an earlier stream.
    through: NoticeNumber,
    /// Those that were in flight, or flushed and not in an ack yet: their acks will come.
    known: BTreeSet<NoticeNumber>,
}

/// What a notice that arrived asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Arrived {
    /// A flush.
    New,
    /// Nothing: it arrived before, and its ack will come.
    Known,
    /// Its ack once more ([`AckTracker::on_lost_ack`]): it was flushed, and the ack was lost with the stream.
    Flushed,
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
    /// [`ContiguityError`] unless it is the one after the last, or, after a resume, one that arrived before
    /// and comes in its turn; nothing has changed then, and the device must flush everything.
    pub fn on_notice(&mut self, n: NoticeNumber) -> Result<Arrived, ContiguityError> {
        if let Some(replay) = self.replay.as_mut().filter(|replay| n <= replay.through) {
            if n < replay.next {
                return Err(ContiguityError { expected: replay.next, got: n });
            }
            let arrived = if replay.known.contains(&n) { Arrived::Known } else { Arrived::Flushed };
            replay.next = n.next();
            if n == replay.through {
                self.replay = None;
            }
            return Ok(arrived);
        }
        let expected = self.last.map_or(NoticeNumber::FIRST, NoticeNumber::next);
        if n != expected {
            return Err(ContiguityError { expected, got: n });
        }
        self.replay = None;
        self.last = Some(n);
        self.in_flight.insert(n);
        Ok(Arrived::New)
    }

    /// The session goes on on a new stream. The host agent has acks of every notice below `floor`; `None`: of
    /// all that arrived. What it has no ack of comes again.
    pub fn on_resumed(&mut self, floor: Option<NoticeNumber>) {
        let (Some(next), Some(through)) = (floor, self.last) else { return self.replay = None };
        let known = self.in_flight.iter().chain(&self.flushed).copied().collect();
        self.replay = (next <= through).then_some(Replay { next, through, known });
    }

    /// Acks notice `n` once more, which came as [`Arrived::Flushed`]. The report of its flush was lost with the ack, so
    /// this one must name all that it may have named.
    ///
    /// # Panics
    /// When the report belongs to another notice.
    pub fn on_lost_ack(&mut self, report: Option<FlushReport>, n: NoticeNumber) {
        if let Some(report) = report {
            assert_eq!(report.notice, n, "the report of a flush belongs to its own notice");
            self.reports.push(report);
        }
        self.flushed.push(n);
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

    /// The highest notice such that all up to it are flushed. After a resume not above what may still come
    /// again: an ack of that without its report would say that it brought nothing back.
    #[must_use]
    pub fn through(&self) -> Option<NoticeNumber> {
        let unsettled = self.replay.as_ref().map(|replay| replay.next);
        match self.in_flight.first().copied().into_iter().chain(unsettled).min() {
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

    /// 1 and 2 are acked and known to be; 3's ack was lost; 4 is in flight; 5 is flushed and in no ack; 6's ack was
    /// lost; 7 is acked, and the device does not know that it is known.
    fn after_a_loss() -> AckTracker {
        let mut books = received(7);
        for number in [1, 2, 3, 6, 7] {
            books.on_flushed(None, n(number));
        }
        books.take().unwrap();
        books.on_flushed(Some(report(5)), n(5));
        books.on_resumed(Some(n(3)));
        books
    }

    /// Invariant 12, the device's side: an ack that was lost is given again, with its report, and no cumulative
    /// ack stands for it meanwhile.
    #[test]
    fn resume_or_flush() {
        let mut books = after_a_loss();
        assert_eq!(books.through(), Some(n(2)), "3 may come again");
        let ack = books.take().unwrap();
        assert_eq!((ack.through, ack.selective, ack.reports), (Some(n(2)), vec![n(5)], vec![report(5)]));
        assert_eq!(books.on_notice(n(3)), Ok(Arrived::Flushed));
        assert_eq!(books.through(), Some(n(3)), "4 is in flight");
        books.on_lost_ack(Some(report(3)), n(3));
        let ack = books.take().unwrap();
        assert_eq!((ack.through, ack.selective, ack.reports), (Some(n(3)), vec![], vec![report(3)]));
        assert_eq!(books.on_notice(n(4)), Ok(Arrived::Known), "its flush goes on");
        assert_eq!(books.on_notice(n(5)), Ok(Arrived::Known), "acked since");
        books.on_flushed(None, n(4));
        assert_eq!(books.take().unwrap().through, Some(n(5)), "6 may come again");
        assert_eq!(books.on_notice(n(6)), Ok(Arrived::Flushed));
        books.on_lost_ack(None, n(6));
        assert_eq!(books.take().unwrap().through, Some(n(6)));
        assert_eq!(books.on_notice(n(8)), Ok(Arrived::New), "7 is passed over: the host agent has its ack");
        books.on_flushed(None, n(8));
        assert_eq!(books.take().unwrap().through, Some(n(8)));
    }

    #[test]
    fn what_comes_again_comes_in_its_order() {
        let mut books = after_a_loss();
        assert_eq!(books.on_notice(n(6)), Ok(Arrived::Flushed));
        let refused = books.on_notice(n(3));
        assert_eq!(refused, Err(ContiguityError { expected: n(7), got: n(3) }));
        let refused = books.on_notice(n(9));
        assert_eq!(refused, Err(ContiguityError { expected: n(8), got: n(9) }));
        assert_eq!(books.last_received(), Some(n(7)));
    }

    #[test]
    fn a_loss_during_a_replay_begins_it_anew() {
        let mut books = after_a_loss();
        assert_eq!(books.on_notice(n(3)), Ok(Arrived::Flushed));
        books.on_lost_ack(None, n(3));
        books.take().unwrap();
        books.on_resumed(Some(n(3)));
        assert_eq!(books.on_notice(n(3)), Ok(Arrived::Flushed), "that ack was lost, too");
        books.on_resumed(None);
        assert_eq!(books.through(), Some(n(3)), "4 is in flight, all else is acked");
        assert_eq!(books.on_notice(n(8)), Ok(Arrived::New));
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
