//! Whoever is told that a device has stopped may rely on it.

use crate::oracle::{Flush, History, Violation};
use crate::trace::{Life, Outcome, Scope, Target, Verdict};

/// No device reaches into a frame that was freed.
pub fn no_stale_use(history: &History) -> Vec<Violation> {
    let stale = history.uses.values().filter_map(|used| {
        let (freed, op) = history.freed.get(&used.frame)?;
        // At the same moment of virtual time the device may have been first.
        (used.ended > *freed).then(|| Violation {
            invariant: "NoStaleUse",
            at: *freed,
            what: format!(
                "{:?} was freed by {op:?} and used from {:?} to {:?} in {:?}",
                used.frame, used.began, used.ended, used.life
            ),
        })
    });
    stale.collect()
}

/// Pages are released on a verdict only; what a verdict rests on, TimeoutIsNotAck looks at.
pub fn no_free_before_quiesce(history: &History) -> Vec<Violation> {
    let too_early = history.freed.iter().filter_map(|(frame, (at, op))| {
        let round = history.rounds.get(op)?;
        let may = round.quiesced().is_some_and(|(answered, resolved)| answered.max(resolved) <= *at);
        (!may).then(|| Violation {
            invariant: "NoFreeBeforeQuiesce",
            at: *at,
            what: format!("{frame:?} was freed by {op:?} before it was quiesced"),
        })
    });
    too_early.collect()
}

/// When an ack has arrived nothing of what was there before is used any more.
pub fn ack_means_stopped(history: &History) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (round, target, acked, life) in history.resolved() {
        if !matches!(target.outcome, Outcome::Acked | Outcome::Left) || !round.withdraws() {
            continue;
        }
        let going_on = history.uses.values().filter(|used| {
            Some(used.life) == life
                && round.pages.holds(used.space, used.page)
                && !round.installs(used.frame)
                && used.began < acked
                && used.ended > acked
        });
        violations.extend(going_on.map(|used| Violation {
            invariant: "AckMeansStopped",
            at: acked,
            what: format!(
                "{:?} acked {:?} during a use of page {} of {:?}",
                used.life, round.op, used.page, used.frame
            ),
        }));
    }
    violations
}

/// An ack is a device's word, after it has flushed; whoever is waited for makes no verdict.
pub fn timeout_is_not_ack(history: &History) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (round, target, resolved, life) in history.resolved() {
        let flushed = |flush: &Flush| flush.ended.is_some_and(|ended| ended <= resolved && ended >= round.at);
        let said_so = match target.outcome {
            Outcome::Waiting => false,
            Outcome::Fenced => true,
            Outcome::Acked => history.flushes.values().any(|flush| {
                let newer =
                    flush.told.as_ref().is_some_and(|told| round.seq().is_none_or(|seq| told.seq >= seq));
                let covers = match &flush.scope {
                    Scope::Pages(pages) => pages.overlaps(&round.pages) && newer,
                    Scope::Everything => true,
                    Scope::EverythingOfTheSession => false,
                };
                Some(flush.life) == life && covers && flushed(flush)
            }),
            // Whichever life of the device said that it holds nothing.
            Outcome::Left => history.flushes.values().any(|flush| {
                let device = |life: &Life| history.lives.get(life).map(|life| life.device);
                let same = life.as_ref().is_none_or(|left| device(&flush.life) == device(left));
                // It need not have begun after the call.
                let ended = flush.ended.is_some_and(|ended| ended <= resolved);
                same && flush.scope == Scope::EverythingOfTheSession && ended
            }),
        };
        if !said_so {
            let what = format!("{:?} counts session {} as {:?}", round.op, target.session, target.outcome);
            violations.push(Violation { invariant: "TimeoutIsNotAck", at: resolved, what });
        }
    }
    for round in history.rounds.values() {
        let wrong = round.answers.iter().find(|(_, answer)| {
            let waiting = |target: &Target| target.outcome == Outcome::Waiting;
            answer.verdict == Verdict::Quiesced && answer.targets.iter().any(waiting)
        });
        violations.extend(wrong.map(|(at, answer)| Violation {
            invariant: "TimeoutIsNotAck",
            at: *at,
            what: format!("{:?} is quiesced, and waits for one of {:?}", round.op, answer.targets),
        }));
    }
    violations
}

/// A session is fenced only when its device is cut off, or, if it enforces its lease, when that has ended on the
/// device's own clock.
pub fn fence_is_positive(history: &History) -> Vec<Violation> {
    let early = history.resolved().filter(|(_, target, ..)| target.outcome == Outcome::Fenced);
    let early = early.filter_map(|(round, target, fenced, life)| {
        let life = life.filter(|life| !history.is_cut_off(*life, fenced))?;
        let may = match history.lives[&life].cut_off_by {
            None => history.lease_at(life, fenced).filter(|until| *until > fenced).map(Some)?,
            Some(_) => None,
        };
        let session = target.session;
        let why = match may {
            Some(until) => format!("its lease lasts until {until:?}"),
            None => "it enforces no lease, and nobody had cut it off".to_owned(),
        };
        let what = format!("session {session} was fenced in {:?}; {why}", round.op);
        Some(Violation { invariant: "FenceIsPositive", at: fenced, what })
    });
    early.collect()
}

/// Nobody is served the bytes of a frame that was freed. Who holds one does not ack, so it can only be somebody whose
/// session is over.
pub fn fence_reaches_reuse(history: &History) -> Vec<Violation> {
    let stale = history.reads.iter().filter(|read| read.times_freed != read.frame.generation);
    let violations = stale.map(|read| Violation {
        invariant: "FenceReachesReuse",
        at: read.at,
        what: format!(
            "{:?} was served {:?}, which by then had been freed {} times",
            read.life, read.frame, read.times_freed
        ),
    });
    violations.collect()
}
