//! What a caller is told beside the verdict, and what its own call must not wait for.

use std::time::Duration;

use crate::oracle::{History, Round, Violation};
use crate::trace::{Called, Outcome, Scope, Verdict};

/// What a device used since it was last asked is young, whoever else has been told nothing of it.
pub fn young_is_conservative(history: &History) -> Vec<Violation> {
    let asked = |round: &&Round| matches!(round.called, Called::ClearFlushYoung | Called::ClearYoung);
    let old = history.rounds.values().filter(asked).filter_map(|round| {
        let (answered, _) = round.quiesced()?;
        if round.answers.iter().any(|(_, answer)| answer.young) {
            return None;
        }
        let of_a_target = |session: Option<u64>| {
            let mut targets = round.last_targets().iter();
            targets.any(|target| Some(target.session) == session && target.outcome == Outcome::Acked)
        };
        let used = history.uses.values().find(|used| {
            // At the same moment of virtual time the answer may have been first.
            let before = used.ended.min(round.at);
            used.began < round.at
                && round.pages.holds(used.space, used.page)
                && of_a_target(history.lives[&used.life].session)
                && !told_since(history, round, used.page, before, answered)
        })?;
        Some(Violation {
            invariant: "YoungIsConservative",
            at: answered,
            what: format!(
                "{:?} says that nothing was used, and {:?} used page {} from {:?} to {:?}",
                round.op, used.life, used.page, used.began, used.ended
            ),
        })
    });
    old.collect()
}

/// Whether another call may have been told of a use of the page that ended, or went on, at that time.
fn told_since(history: &History, round: &Round, page: u64, used: Duration, answered: Duration) -> bool {
    history.rounds.values().any(|other| {
        let over = other.quiesced().map_or(history.end, |(answered, resolved)| answered.max(resolved));
        other.op != round.op
            && other.pages.holds(round.pages.space, page)
            && other.at <= answered
            && over >= used
    })
}

/// A device whose fault waits for a round is not waited for in vain: its ack is taken while its fault is served.
pub fn no_self_wait(history: &History) -> Vec<Violation> {
    let waited = history.resolved().filter(|(round, ..)| round.in_fault).filter_map(|(round, target, at, life)| {
        let life = life.filter(|_| target.outcome == Outcome::Fenced)?;
        let its_fault = history.faults.values().find(|fault| {
            let pending = fault.began <= round.at && fault.ended.is_none_or(|ended| ended >= at);
            fault.life == life && fault.pages.overlaps(&round.pages) && pending
        })?;
        // It has flushed and stopped long ago, and nothing kept its ack from arriving.
        let flushed = history.flushes.values().find_map(|flush| {
            let of_it = flush.told.as_ref().is_some_and(|told| Some(told.seq) == round.seq())
                && matches!(&flush.scope, Scope::Pages(pages) if pages.space == round.pages.space);
            flush.ended.filter(|_| flush.life == life && of_it)
        })?;
        let uses = history.uses.values().filter(|used| {
            used.life == life && round.pages.holds(used.space, used.page) && used.began <= flushed
        });
        let stopped = uses.map(|used| used.ended).max().unwrap_or_default().max(flushed);
        let in_time = stopped + history.bounds.on_its_way < at;
        let well = history.is_quiet(round.at.saturating_sub(history.bounds.resolution), at);
        (in_time && well).then(|| Violation {
            invariant: "NoSelfWait",
            at,
            what: format!(
                "{life:?} flushed for {:?} at {flushed:?} and was fenced; its fault since {:?} waits for that",
                round.op, its_fault.began
            ),
        })
    });
    waited.collect()
}

/// Whether a call that a fault waits for was acked by a device with such a fault: what a world must have seen.
pub fn acks_during_its_fault(history: &History) -> bool {
    history.resolved().any(|(round, target, at, life)| {
        let pending = history.faults.values().any(|fault| {
            Some(fault.life) == life
                && fault.pages.overlaps(&round.pages)
                && fault.began <= round.at
                && fault.ended.is_some_and(|ended| ended >= at)
        });
        round.in_fault && target.outcome == Outcome::Acked && pending
    })
}

/// Whether a query was answered that nothing was used.
pub fn answers_that_nothing_was_used(history: &History) -> bool {
    history.rounds.values().any(|round| {
        let asked = matches!(round.called, Called::ClearFlushYoung | Called::ClearYoung);
        let old = |(_, answer): &(Duration, crate::trace::Answer)| {
            answer.verdict == Verdict::Quiesced && !answer.young && !answer.targets.is_empty()
        };
        asked && round.answers.iter().any(old)
    })
}
