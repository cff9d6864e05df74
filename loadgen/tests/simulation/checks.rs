//! One function an invariant, of its name. What a trace cannot show is left to the tests of
//! docs/architecture.md.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::oracle::{Flush, Heard, History, Install, Round, Use, Violation};
use crate::trace::{Called, Life, Outcome, Patience, Scope, Target, Verdict, What};

/// A check, and the name of its invariant.
pub type Check = (&'static str, fn(&History) -> Vec<Violation>);

/// What is looked at. `NoStaleUse` is what all the others are for.
pub const ALL: &[Check] = &[
    ("NoStaleUse", no_stale_use),
    ("NoFreeBeforeQuiesce", no_free_before_quiesce),
    ("AckMeansStopped", ack_means_stopped),
    ("NoGrantInWindow", no_grant_in_window),
    ("JoinCovers", join_covers),
    ("StableTargets", stable_targets),
    ("UnsubscribeBarrier", unsubscribe_barrier),
    ("Pairing", pairing),
    ("NonBlockAtomic", non_block_atomic),
    ("Contiguity", contiguity),
    ("TimeoutIsNotAck", timeout_is_not_ack),
    ("FenceIsPositive", fence_is_positive),
    ("FenceReachesReuse", fence_reaches_reuse),
    ("Isolation", isolation),
    ("BoundedResolution", bounded_resolution),
    ("QuarantineHasABudget", quarantine_has_a_budget),
    ("ResumeOrFlush", resume_or_flush),
    ("RestartGrace", restart_grace),
    ("NothingIsLeft", nothing_is_left),
    ("OneOutcome", one_outcome),
];

/// A caller is answered in the step in which its round is complete.
const STEP: Duration = Duration::from_millis(2);

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

/// Between a device's ack and the end of the bracket it is granted nothing that overlaps.
pub fn no_grant_in_window(history: &History) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (round, target, acked, life) in history.resolved() {
        let Some(ends) = round.window_ends().filter(|_| target.outcome == Outcome::Acked) else { continue };
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
                    matches!(&flush.scope, Scope::Pages(pages) if pages.space == *space && flush.notice.is_some());
                flush.life == *name && of_space && *left < flush.began && flush.began < again
            });
            violations.extend(late.map(|flush| Violation {
                invariant: "UnsubscribeBarrier",
                at: flush.began,
                what: format!("{name:?} left address space {space} and got notice {:?}", flush.notice),
            }));
        }
    }
    violations
}

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

/// A device flushes each notice once; where it misses one, it has flushed everything.
pub fn contiguity(history: &History) -> Vec<Violation> {
    let mut violations = Vec::new();
    for life in history.lives.keys() {
        let of_life: Vec<&Flush> = history.flushes.values().filter(|flush| flush.life == *life).collect();
        let mut numbers: Vec<_> = of_life.iter().filter_map(|f| f.notice.map(|n| (n, f.began))).collect();
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

/// An ack is a device's word, after it has flushed; whoever is waited for makes no verdict.
pub fn timeout_is_not_ack(history: &History) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (round, target, resolved, life) in history.resolved() {
        let flushed = |flush: &Flush| flush.ended.is_some_and(|ended| ended <= resolved && ended >= round.at);
        let said_so = match target.outcome {
            Outcome::Waiting => false,
            Outcome::Fenced => true,
            Outcome::Acked => history.flushes.values().any(|flush| {
                let newer = flush.seq.is_none_or(|of| round.answers[0].1.seq.is_none_or(|seq| of >= seq));
                let covers = match &flush.scope {
                    Scope::Pages(pages) => pages.overlaps(&round.pages) && newer && flush.notice.is_some(),
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
        let unstoppable = |target: &&Target| history.cut_off_by(target.session).is_some();
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
        let has_unstoppable =
            answer.targets.iter().any(|target| history.cut_off_by(target.session).is_some());
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

#[cfg(test)]
mod tests;
