//! What a caller may expect: one outcome of each call, in time.

use std::collections::BTreeMap;
use std::time::Duration;

use super::STEP;
use crate::oracle::{Heard, History, Round, Violation};
use crate::trace::{Called, Patience, Target, Verdict};

/// Each start that succeeded has exactly one end or abort.
pub fn pairing(history: &History) -> Vec<Violation> {
    let unpaired = history.rounds.values().filter_map(|round| {
        let ends = round.ended.len() + round.abandoned.len();
        // Nobody knows whether one that was abandoned had started; it has one end either way.
        let started = round.dispatched().is_some() || !round.abandoned.is_empty();
        let due = usize::from(round.called == Called::RangeStart && started);
        // With the host agent all its brackets are gone.
        let is_gone = round.outlived_host && ends == 0;
        (ends != due && !is_gone).then(|| Violation {
            invariant: "Pairing",
            at: round.at,
            what: format!("{:?} has {ends} ends; {:?}", round.op, round.refused),
        })
    });
    unpaired.collect()
}

/// Who cannot wait never leaves anybody waiting.
pub fn non_block_atomic(history: &History) -> Vec<Violation> {
    let waits =
        history.rounds.values().filter(|round| round.patience == Patience::None).filter_map(|round| {
            let (at, answer) = round.answers.iter().find(|(_, answer)| {
                let blocked = answer.verdict == Verdict::WouldBlock;
                blocked == answer.targets.is_empty() || blocked == answer.seq.is_some()
            })?;
            let what = format!("{:?} could not wait and was answered {:?}", round.op, answer);
            Some(Violation { invariant: "NonBlockAtomic", at: *at, what })
        });
    waits.collect()
}

/// A round is over when the last of its own targets is, whatever others wait for.
pub fn isolation(history: &History) -> Vec<Violation> {
    let late = history.rounds.values().filter_map(|round| {
        let (answered, answer) = round.answers.first()?;
        let unlimited = round.patience == Patience::Unlimited && answer.verdict == Verdict::Quiesced;
        // The release of an address space also waits for those who leave it.
        let unlimited = unlimited && round.called != Called::Release;
        let last = answer.targets.iter().filter_map(|target| target.resolved).max();
        let due = last.unwrap_or(answer.dispatched) + STEP;
        // Over the wire an answer may come late; and what was tried again is answered then.
        let unlimited = unlimited && round.sent.len() <= 1;
        let answered = &round.took.map_or(*answered, |took| answer.dispatched + took);
        (unlimited && *answered > due).then(|| Violation {
            invariant: "Isolation",
            at: *answered,
            what: format!("{:?} was answered at {answered:?}; its last target stopped at {last:?}", round.op),
        })
    });
    late.collect()
}

/// Every round ends within T_ack and a lease, as the host agent counts it. For a device that enforces none it ends
/// when somebody has cut it off, and its caller is answered within T_ack + T_fence.
pub fn bounded_resolution(history: &History) -> Vec<Violation> {
    let bounds = history.bounds;
    let mut violations = Vec::new();
    for round in history.rounds.values() {
        let Some(dispatched) = round.dispatched() else { continue };
        let (resolved, unresolved) = match round.quiesced() {
            Some((_, resolved)) => (resolved, ""),
            None if round.refused.is_empty() && !round.outlived_host => (history.end, "not "),
            None => continue,
        };
        // Those that were before it and wait as well: behind a window that is full, each has its own turn.
        let ahead = history.rounds.values().filter(|other| {
            let went_on = other.quiesced().is_none_or(|(_, resolved)| resolved > dispatched);
            other.dispatched().is_some_and(|at| at <= dispatched) && went_on
        });
        let turns = u32::try_from(ahead.count() / bounds.window).unwrap();
        let bound = bounds.resolution + bounds.turn * turns;
        let mut late = |whom: &str, resolved: Duration, due: Duration| {
            if resolved > due {
                let (took, bound) = (resolved - dispatched, due - dispatched);
                let what = format!(
                    "{:?}{whom} was {unresolved}resolved after {took:?}, the bound being {bound:?}",
                    round.op
                );
                violations.push(Violation { invariant: "BoundedResolution", at: resolved, what });
            }
        };
        let targets = || round.last_targets().iter();
        let unstoppable = |target: &&Target| history.is_unstoppable(target.session);
        if !targets().any(|target| unstoppable(&target)) {
            late("", resolved, dispatched + bound);
            continue;
        }
        // Who was still waited for when the targets were named last: for how long is only known of the round.
        let when = |target: &Target| target.resolved.or((!unresolved.is_empty()).then_some(resolved));
        let others = targets().filter(|target| !unstoppable(target)).filter_map(when).max();
        late(", as to those that enforce their lease,", others.unwrap_or(dispatched), dispatched + bound);
        let (healed, cut_off) = bounds.cut_off;
        late("", resolved, dispatched.max(healed) + bound + cut_off);
    }
    violations.extend(answered_late(history));
    violations
}

/// A caller with no deadline of its own that waits for a device which nobody is certain to stop.
fn answered_late(history: &History) -> impl Iterator<Item = Violation> {
    let unlimited = history.rounds.values().filter(|round| round.patience == Patience::Unlimited);
    unlimited.filter_map(|round| {
        let (answered, answer) = round.answers.first()?;
        let has_unstoppable = answer.targets.iter().any(|target| history.is_unstoppable(target.session));
        // The release of an address space also waits for those who leave it.
        let is_release = round.called == Called::Release && answer.verdict == Verdict::Quiesced;
        let due = answer.dispatched + history.bounds.answer + STEP;
        (has_unstoppable && !is_release && *answered > due).then(|| Violation {
            invariant: "BoundedResolution",
            at: *answered,
            what: format!(
                "the caller of {:?} was answered after {:?}",
                round.op,
                *answered - answer.dispatched
            ),
        })
    })
}

/// While the budget is spent, no round opens whose pages come to the quarantine as well.
pub fn quarantine_has_a_budget(history: &History) -> Vec<Violation> {
    // From the answer that it is not quiesced until it is.
    let parked = |round: &Round| {
        let (at, answer) = round.answers.first()?;
        let charged = matches!(round.called, Called::RangeStart | Called::Page | Called::ChangePte(_));
        let until = round.quiesced().map_or(Duration::MAX, |(_, resolved)| resolved);
        (charged && answer.verdict == Verdict::NotQuiesced).then_some((*at, until))
    };
    let pages = |round: &Round| round.pages.pages.end - round.pages.pages.start;
    let too_many = history.rounds.values().filter_map(|round| {
        let (at, _) = parked(round)?;
        let opened = round.dispatched()?;
        let before = history.rounds.values().filter(|other| {
            other.host == round.host
                && parked(other).is_some_and(|(from, until)| from < opened && opened < until)
        });
        let spent: u64 = before.map(pages).sum();
        (spent >= history.bounds.quarantine_pages).then(|| Violation {
            invariant: "QuarantineHasABudget",
            at,
            what: format!("{:?} was opened at {opened:?} and parked, when {spent} pages were", round.op),
        })
    });
    too_many.collect()
}

/// However often a call is tried, it has one outcome: its tries are answered with one round, and of none of
/// them there is a round that nobody hears of.
pub fn one_outcome(history: &History) -> Vec<Violation> {
    let mut violations = Vec::new();
    let mut calls = BTreeMap::new();
    for round in history.rounds.values() {
        for heard in &round.heard {
            let Some(seq) = heard.seq else { continue };
            // As long as the run knows of the call: also the next run, if the end was planned.
            let same = |other: &&Heard| (other.host, other.registered) == (heard.host, heard.registered);
            let first = round.heard.iter().filter(same).find_map(|other| other.seq);
            let other = calls.insert((heard.host, round.pages.space, seq), round.op);
            let what = match (first, other) {
                (Some(first), _) if first != seq => format!("{:?} is round {first} and {seq}", round.op),
                (_, Some(other)) if other != round.op => format!("{:?} and {other:?} are {seq}", round.op),
                _ => continue,
            };
            violations.push(Violation { invariant: "OneOutcome", at: heard.at, what });
        }
    }
    for (space, since) in &history.registered {
        // Rounds of a run that has crashed went with those who called for them; the last has not.
        let of_last = |at: Duration, host: u64| host == history.host && at >= *since;
        let unheard = history.seen.iter().filter(|(at, host, of, seq)| {
            of == space && of_last(*at, *host) && !calls.contains_key(&(*host, *space, *seq))
        });
        let unheard: Vec<_> = unheard.collect();
        // Whose answers never came may have one each.
        let called = history.rounds.values().filter(|round| round.pages.space == *space);
        let unanswered = called.filter(|round| {
            let sent = round.sent.iter().any(|at| *at >= history.host_began);
            let mut heard = round.heard.iter().filter(|heard| of_last(heard.at, heard.host));
            let first = heard.next().map(|heard| heard.at);
            // A planned end hands over what may be tried again of those whose brackets their callers end, and of
            // no others: these are done once more.
            let again = history.handed_over.iter().any(|end| {
                round.called != Called::RangeStart
                    && round.sent.first().is_some_and(|sent| sent < end)
                    && first.is_some_and(|first| first > *end)
            });
            sent && (first.is_none() || again)
        });
        if unheard.len() > unanswered.count() {
            let (at, ..) = unheard[0];
            let what = format!("nobody was told of {unheard:?}, each of which is a call done twice");
            violations.push(Violation { invariant: "OneOutcome", at: *at, what });
        }
    }
    violations
}
