//! Who is granted what, and who is told of it.

use std::time::Duration;

use crate::oracle::{History, Round, Violation};
use crate::trace::{Life, Outcome, Scope};

/// Between a device's ack and the end of the bracket it is granted nothing that overlaps.
pub fn no_grant_in_window(history: &History) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (round, target, acked, life) in history.resolved() {
        // What is only asked for young bits goes on, and may install what it was granted before.
        let withdraws = target.outcome == Outcome::Acked && round.withdraws();
        let Some(ends) = round.window_ends().filter(|_| withdraws) else { continue };
        violations.extend(granted(history, round, acked, ends, |who| Some(who) == life).map(|at| {
            Violation {
                invariant: "NoGrantInWindow",
                at,
                what: format!("{life:?} was granted a page of {:?}, which it acked at {acked:?}", round.op),
            }
        }));
    }
    violations
}

/// A subscriber that joins while an event is going on is no target of it, and is granted nothing either.
pub fn join_covers(history: &History) -> Vec<Violation> {
    let mut violations = Vec::new();
    for round in history.rounds.values() {
        let (Some(dispatched), Some(ends)) = (round.dispatched(), round.window_ends()) else { continue };
        // Who asked for a subscription only after it had begun.
        let joined = |who: Life| {
            let life = &history.lives[&who];
            let is_target = round.last_targets().iter().any(|target| Some(target.session) == life.session);
            let subscribing = life.subscribing.iter().filter(|(_, space)| *space == round.pages.space);
            !is_target && subscribing.map(|(at, _)| *at).min().is_some_and(|first| first > dispatched)
        };
        violations.extend(granted(history, round, dispatched, ends, joined).map(|at| Violation {
            invariant: "JoinCovers",
            at,
            what: format!("a device that joined during {:?} was granted a page of it", round.op),
        }));
    }
    violations
}

/// When pages of a round were installed in between, by devices of that kind.
fn granted<'a>(
    history: &'a History,
    round: &'a Round,
    after: Duration,
    before: Duration,
    of: impl Fn(Life) -> bool + 'a,
) -> impl Iterator<Item = Duration> + 'a {
    let installs = history.installs.iter().filter(move |install| {
        round.pages.holds(install.space, install.page)
            && !round.installs(install.frame)
            && after < install.at
            && install.at < before
            && of(install.life)
    });
    installs.map(|install| install.at)
}

/// Every answer about a round names the same targets.
pub fn stable_targets(history: &History) -> Vec<Violation> {
    let unstable = history.rounds.values().filter_map(|round| {
        let named = round.answers.iter().filter(|(_, answer)| !answer.targets.is_empty());
        let sessions = named
            .map(|(at, answer)| (at, answer.targets.iter().map(|target| target.session).collect::<Vec<_>>()));
        let all: Vec<_> = sessions.collect();
        let other = all.windows(2).find(|pair| pair[0].1 != pair[1].1)?;
        Some(Violation {
            invariant: "StableTargets",
            at: *other[1].0,
            what: format!("the targets of {:?} were {:?} and then {:?}", round.op, other[0].1, other[1].1),
        })
    });
    unstable.collect()
}

/// After an unsubscription has returned no notice of the address space comes, before the device asks again.
pub fn unsubscribe_barrier(history: &History) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (name, life) in &history.lives {
        for (left, space) in &life.unsubscribed {
            let again = life.subscribing.iter().filter(|(at, other)| other == space && at >= left);
            let again = again.map(|(at, _)| *at).min().unwrap_or(Duration::MAX);
            let late = history.flushes.values().filter(|flush| {
                let of_space =
                    matches!(&flush.scope, Scope::Pages(pages) if pages.space == *space && flush.told.is_some());
                flush.life == *name && of_space && *left < flush.began && flush.began < again
            });
            violations.extend(late.map(|flush| Violation {
                invariant: "UnsubscribeBarrier",
                at: flush.began,
                what: format!("{name:?} left address space {space} and got {:?}", flush.told),
            }));
        }
    }
    violations
}
