//! [4 of 9] A session's notices between dispatch and ack.
//!
//! ```text
//!   push ----> pending ----> sent ----> acked: its tokens are handed back, once
//!              (merges)  take    on_ack
//!                 |            |  ^
//!                 |            +--+ on_resumed: those that are not acked are taken again
//!                 |               |
//!                 +---- abandon --+---> all tokens are handed back: the session is fenced, or left
//! ```

mod pending;

use std::collections::BTreeMap;

use self::pending::{Pending, Waiter};
use crate::ack::{Ack, FlushReport, FlushTiming};
use crate::event::Event;
use crate::id::NoticeNumber;
use crate::moment::Moment;
use crate::notice::{Notice, Scope};
use crate::range::AddrRange;

/// Notices that are sent and not acked. It must cover what a device can flush in one round trip: at
/// 20 us a round trip and 1 us a flush that is 20. And it must stay well below the 136 unread small
/// frames at which h2 ends a connection, should each notice get a frame of its own.
const DEFAULT_WINDOW: u32 = 64;

/// Ranges that are kept apart. A device refaults everything after a FlushAll, so the bound is where
/// about as much would be flushed one by one; 1,024 entries are at most 320 KiB a session.
const DEFAULT_MAX_PENDING: usize = 1024;

/// The bounds of an outbox.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OutboxLimits {
    /// Notices sent and not acked, at least 1.
    pub window: u32,
    /// Ranges kept apart while they are not sent, at least 1. Beyond it they become one FlushAll.
    pub max_pending: usize,
}

impl Default for OutboxLimits {
    fn default() -> Self {
        Self { window: DEFAULT_WINDOW, max_pending: DEFAULT_MAX_PENDING }
    }
}

/// What became of a pushed event.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Pushed {
    /// It is a notice of its own.
    Queued,
    /// It is part of a notice that was pending.
    Merged,
    /// It is part of a FlushAll.
    Widened,
}

/// A token whose notice was acked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Resolved<T> {
    /// The caller's token, as it was pushed.
    pub token: T,
    /// The notice that carried it.
    pub notice: NoticeNumber,
    /// The device used pages of the token's event since its last report. After a FlushAll it may be
    /// pages at the same addresses of another address space: too much, never too little.
    pub young: bool,
    /// The same for pages that the device wrote. A FlushAll's token is always dirty: no report would say of
    /// which address space its ranges are, and no later notice tells what the flush wrote back.
    pub dirty: bool,
    /// When the device received and flushed it, if it said so.
    pub timing: Option<FlushTiming>,
    /// When the notice was taken for the stream.
    pub sent: Moment,
}

/// Why an ack was refused. A refused ack changes nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AckError {
    /// A notice that was never sent is acked: the device's books are wrong, nothing it says can be
    /// relied on.
    #[error("notice {notice} is acked, but was never sent (last sent: {})", Number(*last_sent))]
    NeverSent {
        /// The number that was acked.
        notice: NoticeNumber,
        /// The last number that was sent; `None`: none yet.
        last_sent: Option<NoticeNumber>,
    },
    /// A notice is acked a second time, or the ack names nothing that was not acked before.
    #[error("notice {notice} is already acked")]
    Twice {
        /// The number that was acked again.
        notice: NoticeNumber,
    },
    /// The cumulative ack is lower than what is already acked.
    #[error("the ack goes through notice {through}, but all through {acked_through} are already acked")]
    Regressed {
        /// What the ack says.
        through: NoticeNumber,
        /// What was acked before it.
        acked_through: NoticeNumber,
    },
    /// A report belongs to a notice that this ack does not newly ack.
    #[error("a report belongs to notice {notice}, which this ack does not newly ack")]
    ReportForUnacked {
        /// The number in the report.
        notice: NoticeNumber,
    },
    /// The ack names no notice at all.
    #[error("the ack names no notice")]
    Empty,
}

/// Why a device cannot go on where it says that it stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotRetained {
    /// It says that it received what was never sent: its books are wrong.
    #[error("all through notice {} is said to be received, but the last one that was sent is {}", Number(*received_through), Number(*last_sent))]
    NeverSent {
        /// What the device says.
        received_through: Option<NoticeNumber>,
        /// The last number that was sent.
        last_sent: Option<NoticeNumber>,
    },
    /// A notice above what it says it received is acked, and not kept any more.
    #[error("all through notice {} is said to be received, but notice {acked} is acked already", Number(*received_through))]
    BelowFloor {
        /// What the device says.
        received_through: Option<NoticeNumber>,
        /// The highest notice that was acked.
        acked: NoticeNumber,
    },
}

impl AckError {
    /// Whether the session must end: the device acked what it cannot have flushed. The others can be
    /// answered with an error message; the device may go on.
    #[must_use]
    pub const fn is_fatal(self) -> bool {
        matches!(self, Self::NeverSent { .. })
    }
}

/// One session's notices between dispatch and ack.
///
/// Every pushed event becomes part of a later notice (NeverDrop). While the stream keeps up, each
/// event is a notice of its own; events that find others pending merge with those they overlap
/// (MergeIsUnion), and beyond `max_pending` ranges all of them become one FlushAll, which takes in
/// everything until it is taken itself. So the memory is bounded by `max_pending` + `window` entries,
/// and the busier the stream the more one notice says. A push costs O(log max_pending), amortised.
///
/// `T` is the caller's handle on what waits. Each token is handed back exactly once, by
/// [`Outbox::on_ack`] or by [`Outbox::abandon`]. Tokens are not bounded here: each belongs to an open
/// round, and the rounds are bounded where they are opened.
///
/// The price: a token in a widened notice waits for a longer flush than its own; a Release in a
/// FlushAll reaches the device as a flush only (cause RELEASE, but not whose), which withdraws all it
/// holds; that the address space is gone it learns from its next request; and a RangeEnd that a
/// FlushAll took in is not heard of: a device that waits for one asks again after a FlushAll.
#[derive(Debug)]
pub struct Outbox<T> {
    limits: OutboxLimits,
    pending: Pending<T>,
    /// Sent and not acked. A notice that is acked out of turn leaves at once, so that a slow flush
    /// holds one place of the window and not the window.
    sent: BTreeMap<NoticeNumber, Sent<T>>,
    last_sent: Option<NoticeNumber>,
    /// The highest notice that was acked, in turn or not: nothing above it is missing in `sent`.
    highest_acked: Option<NoticeNumber>,
    /// What is to be sent again.
    again: Option<Again>,
    /// Acks of notices up to this one may have been lost on their way, or come a second time.
    resumed_at: Option<NoticeNumber>,
}

/// Notices that were sent on a stream that is lost: those of them that are not acked go out once more.
#[derive(Clone, Copy, Debug)]
struct Again {
    next: NoticeNumber,
    through: NoticeNumber,
}

#[derive(Debug)]
struct Sent<T> {
    notice: Notice,
    /// When it was taken for the first time: to be sent again is no excuse for a late ack.
    at: Moment,
    waiters: Vec<Waiter<T>>,
}

impl<T> Outbox<T> {
    /// # Panics
    /// When a limit is 0.
    #[must_use]
    pub fn new(limits: OutboxLimits) -> Self {
        assert!(limits.window >= 1, "a window of 0 sends nothing");
        assert!(limits.max_pending >= 1, "a FlushAll is an entry, too");
        let pending = Pending::new(limits.max_pending);
        Self {
            limits,
            pending,
            sent: BTreeMap::new(),
            last_sent: None,
            highest_acked: None,
            again: None,
            resumed_at: None,
        }
    }

    /// An outbox that goes on after `acked_through`: every notice up to it was sent and acked.
    ///
    /// # Panics
    /// When a limit is 0.
    #[must_use]
    pub fn after(limits: OutboxLimits, acked_through: Option<NoticeNumber>) -> Self {
        Self { last_sent: acked_through, highest_acked: acked_through, ..Self::new(limits) }
    }

    /// Makes the event part of a later notice.
    pub fn push(&mut self, event: &Event, token: Option<T>) -> Pushed {
        self.pending.push(event, token)
    }

    /// What is to be sent again, with the numbers that it has; behind it numbers pending notices, as far as
    /// the window goes. At most `max` in all.
    pub fn take_notices(&mut self, max: usize, now: Moment) -> Vec<Notice> {
        let mut notices = self.take_again(max);
        notices.reserve((max - notices.len()).min(self.pending.len()).min(self.window_left()));
        while notices.len() < max && self.window_left() > 0 {
            let Some(draft) = self.pending.pop() else { break };
            let number = self.last_sent.map_or(NoticeNumber::FIRST, NoticeNumber::next);
            self.last_sent = Some(number);
            let notice = Notice {
                number,
                kind: draft.kind,
                scope: draft.scope,
                seq: draft.seq,
                cause: draft.cause,
                owner: draft.owner,
                flush_reason: draft.flush_reason,
            };
            self.sent.insert(number, Sent { notice, at: now, waiters: draft.waiters });
            notices.push(notice);
        }
        notices
    }

    fn take_again(&mut self, max: usize) -> Vec<Notice> {
        let Some(again) = self.again else { return Vec::new() };
        let left = self.sent.range(again.next..=again.through);
        let notices: Vec<Notice> = left.take(max).map(|(_, sent)| sent.notice).collect();
        let next = notices.last().map_or(again.next, |last| last.number.next());
        let is_left = next <= again.through && self.sent.range(next..=again.through).next().is_some();
        self.again = is_left.then_some(Again { next, ..again });
        notices
    }

    /// Whether a device that has received every notice up to `received_through`, and nothing above it, can go
    /// on from there: whatever is above is retained (ResumeOrFlush).
    ///
    /// # Errors
    /// [`NotRetained`].
    pub fn can_resume(&self, received_through: Option<NoticeNumber>) -> Result<(), NotRetained> {
        let last_sent = self.last_sent;
        if received_through > last_sent {
            return Err(NotRetained::NeverSent { received_through, last_sent });
        }
        match self.highest_acked.filter(|acked| Some(*acked) > received_through) {
            Some(acked) => Err(NotRetained::BelowFloor { received_through, acked }),
            None => Ok(()),
        }
    }

    /// The device goes on on another stream: all that was sent and not acked is to be sent again. From here on an ack
    /// of a notice that was acked before is passed over, if it was sent on an earlier stream.
    pub fn on_resumed(&mut self) {
        self.resumed_at = self.last_sent;
        let ends = self.sent.first_key_value().zip(self.sent.last_key_value());
        self.again = ends.map(|((next, _), (through, _))| Again { next: *next, through: *through });
    }

    /// Applies an ack and hands back the tokens of what it newly acks, lowest notice first.
    ///
    /// A `through` of `None` says nothing; one that equals what is acked already is fine if something
    /// else in the ack is new.
    ///
    /// # Errors
    /// [`AckError`], and then nothing has changed. [`AckError::NeverSent`] wins over the others.
    pub fn on_ack(&mut self, ack: &Ack) -> Result<Vec<Resolved<T>>, AckError> {
        let selective = self.check(ack)?;
        let mut acked = match ack.through {
            Some(through) => {
                let above = self.sent.split_off(&through.next());
                std::mem::replace(&mut self.sent, above)
            }
            None => BTreeMap::new(),
        };
        for notice in selective {
            acked.extend(self.sent.remove(&notice).map(|sent| (notice, sent)));
        }
        self.highest_acked = self.highest_acked.max(acked.last_key_value().map(|(notice, _)| *notice));
        let mut reports: Vec<&FlushReport> = ack.reports.iter().collect();
        reports.sort_by_key(|report| report.notice);
        let mut resolved = Vec::new();
        for (notice, sent) in acked {
            let from = reports.partition_point(|report| report.notice < notice);
            let to = reports.partition_point(|report| report.notice <= notice);
            resolve(notice, sent, &reports[from..to], &mut resolved);
        }
        Ok(resolved)
    }

    /// Hands back every token, sent or not, and forgets what was pending: the session is fenced, or
    /// its device left. What was sent stays unacked, for nobody acked it.
    pub fn abandon(&mut self) -> Vec<T> {
        let mut tokens = Vec::new();
        for sent in self.sent.values_mut() {
            tokens.extend(std::mem::take(&mut sent.waiters).into_iter().map(|waiter| waiter.token));
        }
        while let Some(draft) = self.pending.pop() {
            tokens.extend(draft.waiters.into_iter().map(|waiter| waiter.token));
        }
        tokens
    }

    /// Whether [`Outbox::take_notices`] would hand out one.
    #[must_use]
    pub fn has_sendable(&self) -> bool {
        self.is_sending_again() || (self.pending() > 0 && self.window_left() > 0)
    }

    /// Whether a notice is left that is to be sent again.
    #[must_use]
    pub fn is_sending_again(&self) -> bool {
        self.again.is_some_and(|again| self.sent.range(again.next..=again.through).next().is_some())
    }

    /// Notices to be: not sent, not numbered. At most `max_pending`.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Notices that are sent and not acked. At most `window`.
    #[must_use]
    pub fn unacked(&self) -> usize {
        self.sent.len()
    }

    /// The highest notice such that all up to it are acked (Contiguity).
    #[must_use]
    pub fn acked_through(&self) -> Option<NoticeNumber> {
        match self.sent.first_key_value() {
            Some((oldest, _)) => NoticeNumber::new(oldest.get() - 1),
            None => self.last_sent,
        }
    }

    /// When the oldest notice that is not acked was taken for the stream.
    #[must_use]
    pub fn oldest_unacked_sent(&self) -> Option<Moment> {
        self.sent.first_key_value().map(|(_, sent)| sent.at)
    }

    /// The number of the last notice that was sent.
    #[must_use]
    pub fn last_sent(&self) -> Option<NoticeNumber> {
        self.last_sent
    }

    /// Where a notice applies that is sent and not acked: a report names ranges, the notice says of
    /// which address space.
    #[must_use]
    pub fn unacked_scope(&self, notice: NoticeNumber) -> Option<Scope> {
        self.sent.get(&notice).map(|sent| sent.notice.scope)
    }

    /// The lowest notice that is sent and not acked; `None`: all that was sent is acked.
    #[must_use]
    pub fn retained_floor(&self) -> Option<NoticeNumber> {
        self.sent.first_key_value().map(|(oldest, _)| *oldest)
    }

    fn window_left(&self) -> usize {
        (self.limits.window as usize).saturating_sub(self.sent.len())
    }

    /// Whether it was acked already, and its device may not know: it was sent before a resume.
    fn may_come_again(&self, notice: NoticeNumber) -> bool {
        Some(notice) <= self.resumed_at && !self.sent.contains_key(&notice)
    }

    /// The whole ack, before any of it is applied. Returns the selective numbers, lowest first.
    fn check(&self, ack: &Ack) -> Result<Vec<NoticeNumber>, AckError> {
        let mut named = ack.through.iter().chain(&ack.selective);
        if let Some(&notice) = named.find(|&&notice| Some(notice) > self.last_sent) {
            return Err(AckError::NeverSent { notice, last_sent: self.last_sent });
        }
        if let (Some(through), Some(acked_through)) = (ack.through, self.acked_through())
            && through < acked_through
            && !self.may_come_again(through)
        {
            return Err(AckError::Regressed { through, acked_through });
        }
        let mut selective = ack.selective.clone();
        selective.sort_unstable();
        let repeated = selective.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| pair[0]);
        selective.retain(|notice| !self.may_come_again(*notice));
        let stale = |notice: &&NoticeNumber| Some(**notice) <= ack.through || !self.sent.contains_key(notice);
        if let Some(notice) = repeated.or_else(|| selective.iter().find(stale).copied()) {
            return Err(AckError::Twice { notice });
        }
        if selective.is_empty() {
            let Some(through) = ack.through.or(ack.selective.last().copied()) else {
                return Err(AckError::Empty);
            };
            if Some(through) == self.acked_through() && !self.may_come_again(through) {
                return Err(AckError::Twice { notice: through });
            }
        }
        let newly = |notice: NoticeNumber| {
            let named = Some(notice) <= ack.through || selective.binary_search(&notice).is_ok();
            named && self.sent.contains_key(&notice)
        };
        let misplaced = |notice| !newly(notice) && !self.may_come_again(notice);
        match ack.reports.iter().find(|report| misplaced(report.notice)) {
            Some(report) => Err(AckError::ReportForUnacked { notice: report.notice }),
            None => Ok(selective),
        }
    }
}

fn resolve<T>(
    number: NoticeNumber,
    sent: Sent<T>,
    reports: &[&FlushReport],
    resolved: &mut Vec<Resolved<T>>,
) {
    if sent.waiters.is_empty() {
        return;
    }
    let young = RangeSet::of(reports.iter().flat_map(|report| &report.young));
    let dirty = RangeSet::of(reports.iter().flat_map(|report| &report.dirty));
    let timing = reports.iter().find_map(|report| report.timing);
    resolved.extend(sent.waiters.into_iter().map(|Waiter { token, range }| Resolved {
        token,
        notice: number,
        young: young.overlaps(range),
        dirty: sent.notice.scope == Scope::FlushAll || dirty.overlaps(range),
        timing,
        sent: sent.at,
    }));
}

/// Ranges in order, none of which touch: a wide notice may carry as many tokens as its report has ranges.
struct RangeSet(Vec<AddrRange>);

impl RangeSet {
    fn of<'a>(ranges: impl Iterator<Item = &'a AddrRange>) -> Self {
        let mut sorted: Vec<AddrRange> = ranges.copied().collect();
        sorted.sort_unstable();
        sorted.dedup_by(|next, kept| {
            let joins = kept.touches(*next);
            if joins {
                *kept = kept.hull(*next);
            }
            joins
        });
        Self(sorted)
    }

    fn overlaps(&self, range: AddrRange) -> bool {
        let at = self.0.partition_point(|own| own.last() < range.start());
        self.0.get(at).is_some_and(|own| own.overlaps(range))
    }
}

/// A number, or "none".
struct Number(Option<NoticeNumber>);

impl std::fmt::Display for Number {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(number) => number.fmt(f),
            None => f.write_str("none"),
        }
    }
}

#[cfg(test)]
mod tests;
