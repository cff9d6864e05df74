//! What a session owes when it goes on, ends, or is left behind by a host agent.

use std::time::Duration;

use crate::oracle::{Flush, History, Install, Use, Violation};
use crate::trace::{Scope, What};

/// A device flushes each notice once; where it misses one, it has flushed everything.
pub fn contiguity(history: &History) -> Vec<Violation> {
    let mut violations = Vec::new();
    for life in history.lives.keys() {
        let of_life: Vec<&Flush> = history.flushes.values().filter(|flush| flush.life == *life).collect();
        let mut numbers: Vec<_> =
            of_life.iter().filter_map(|f| f.told.as_ref().map(|told| (told.notice, f.began))).collect();
        numbers.sort_unstable();
        // A flush of everything has a number as well, which the device is not told.
        let everything = of_life.iter().filter(|flush| flush.scope == Scope::Everything).count() as u64;
        let twice = numbers.windows(2).find(|pair| pair[0].0 == pair[1].0).map(|pair| pair[1]);
        let missing = numbers.last().filter(|(last, _)| *last > numbers.len() as u64 + everything).copied();
        violations.extend(twice.or(missing).map(|(notice, at)| Violation {
            invariant: "Contiguity",
            at,
            what: format!(
                "{life:?} had {} notices and {everything} for everything, up to {notice}",
                numbers.len()
            ),
        }));
    }
    violations
}

/// A session that goes on has missed nothing; one that does not has flushed everything before its device is
/// granted anything again.
pub fn resume_or_flush(history: &History) -> Vec<Violation> {
    let mut violations = Vec::new();
    let resumed = history.uses.values().filter_map(|used| {
        let life = &history.lives[&used.life];
        let before = life.resumed.iter().filter(|resumed| **resumed <= used.began);
        before.max().map(|resumed| (used, life, *resumed))
    });
    for (used, life, resumed) in resumed {
        let Some(installed) = installed_before(history, used) else { continue };
        // Withdrawn while it had no connection, or at any other time since.
        let missed = history.rounds.values().find(|round| {
            let is_newer = round.dispatched().is_some_and(|at| installed < at);
            let stopped = round.last_targets().iter().any(|target| {
                Some(target.session) == life.session && target.resolved.is_some_and(|at| at < used.began)
            });
            let holds = round.pages.holds(used.space, used.page);
            is_newer && stopped && holds && round.withdraws() && !round.installs(used.frame)
        });
        violations.extend(missed.map(|round| Violation {
            invariant: "ResumeOrFlush",
            at: used.began,
            what: format!(
                "{:?}, resumed at {resumed:?}, uses {:?}, which {:?} had withdrawn",
                used.life, used.frame, round.op
            ),
        }));
    }
    let unknown = history.uses.values().filter(|used| installed_before(history, used).is_none());
    violations.extend(unknown.map(|used| Violation {
        invariant: "ResumeOrFlush",
        at: used.began,
        what: format!("{:?} uses {:?}, which it was never granted", used.life, used.frame),
    }));
    for (name, life) in &history.lives {
        let granted = history.installs.iter().filter(|install| install.life == *name);
        let Some(first) = granted.map(|install| install.at).min() else { continue };
        let unflushed = history.lives.iter().filter(|(earlier, other)| {
            let same = (other.device, other.start) == (life.device, life.start);
            same && *earlier < name && other.opened.is_some() && !history.has_ended(**earlier, first)
        });
        violations.extend(unflushed.map(|(earlier, _)| Violation {
            invariant: "ResumeOrFlush",
            at: first,
            what: format!("{name:?} is granted something, and {earlier:?} has not flushed everything"),
        }));
    }
    violations
}

/// When what is used was granted.
fn installed_before(history: &History, used: &Use) -> Option<Duration> {
    let granted = history.installs.iter().filter(|install| {
        let same = (install.life, install.space, install.page, install.frame)
            == (used.life, used.space, used.page, used.frame);
        same && install.at <= used.began
    });
    granted.map(|install| install.at).max()
}

/// After a crash nothing is released and nothing granted while a device may use what a run before granted.
pub fn restart_grace(history: &History) -> Vec<Violation> {
    // The sessions of earlier runs whose devices may go on at the time.
    let holds = |host: u64, at: Duration| {
        history.lives.iter().find(move |(name, life)| {
            life.opened.is_some() && life.host < host && history.may_use(**name, at)
        })
    };
    let mut violations = Vec::new();
    for round in history.rounds.values().filter(|round| round.withdraws()) {
        let Some((_, resolved)) = round.quiesced() else { continue };
        violations.extend(holds(round.host, resolved).map(|(holder, _)| Violation {
            invariant: "RestartGrace",
            at: resolved,
            what: format!("{:?} is quiesced, and {holder:?} of a run before may go on", round.op),
        }));
    }
    // What a notice replaces is no grant: as in any round, others may still have the page that was there.
    let replacement = |install: &Install| history.rounds.values().any(|round| round.installs(install.frame));
    for install in history.installs.iter().filter(|install| !replacement(install)) {
        let host = history.lives[&install.life].host;
        violations.extend(holds(host, install.at).map(|(holder, _)| Violation {
            invariant: "RestartGrace",
            at: install.at,
            what: format!("{:?} is granted a page, and {holder:?} of a run before may go on", install.life),
        }));
    }
    violations
}

/// When every fault is healed and every device has left, the host agent has nothing left.
pub fn nothing_is_left(history: &History) -> Vec<Violation> {
    match &history.left {
        Some((_, left)) if *left == What::NOTHING_LEFT => Vec::new(),
        left => {
            let what = format!("{left:?}");
            vec![Violation { invariant: "NothingIsLeft", at: history.end, what }]
        }
    }
}
