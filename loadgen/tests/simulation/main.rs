//! Host agent, source and devices, the real code of all of them, on a simulated network in virtual time.
//!
//! ```text
//!   seed -> plan -> world (turmoil: one machine of the host agent, 2 to 4 of devices) -> trace -> oracle
//! ```
//!
//! Whatever is drawn, is drawn from the seed; the same seed takes the same course. Of a seed that fails
//! the trace's end is shown, with the command that repeats it. `SHOOTDOWN_SEEDS=0..5000` runs others than
//! the ones of every day.
#![allow(missing_docs, unreachable_pub, reason = "a test is read, not linked")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod plan;
mod faults;
mod clock;
mod world;
mod level;
mod process;
mod disk;
mod shared;
mod sockets;
mod agent;
mod administrator;
mod memory;
mod calls;
mod source;
mod link;
mod remote;
mod observer;
mod device;
mod cuttable;
mod fabric;
mod fencer;
mod content;
mod tlb;
mod trace;
mod oracle;
mod checks;
mod seeds;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use crate::oracle::{Bounds, History};
use crate::plan::{Broken, Plan, millis};
use crate::trace::{Event, Patience, Reply, Verdict, What, fingerprint};

/// The seeds of every day, in four parts: a test is ended when it takes minutes, as all of them may on a
/// machine that is busy with other things.
const SEEDS: [Range<u64>; 4] = [0..50, 50..100, 100..150, 150..200];

/// Looked at where one of [`KINDS`] did not happen in the first part: some are rare, and none may be missing.
const TO_SEE: Range<u64> = 200..300;

/// The most seeds until a break must be found, and the ones that repeat a course.
const TO_FIND: Range<u64> = 0..60;
const TO_REPEAT: Range<u64> = 0..5;

#[test]
fn no_invariant_is_broken_whatever_goes_wrong() {
    let asked_for = seeds::asked_for();
    let look = |seed| {
        let run = world::run(Plan::draw(seed, Broken::Nothing));
        let mut kinds: BTreeSet<_> = run.events.iter().flat_map(kinds).collect();
        kinds.extend(of_quarantine(&run.events));
        kinds.extend(seen(&run).map(str::to_owned));
        kinds.extend(goes_on_with_successor(&run.events).then(|| "Resumed by a successor".to_owned()));
        (seeds::failure(&run), kinds)
    };
    let runs = seeds::on_all_cores(asked_for.clone().unwrap_or(SEEDS[0].clone()), |seed| Some(look(seed)));
    let failures: Vec<_> = runs.iter().filter_map(|(failure, _)| failure.clone()).collect();
    assert!(failures.is_empty(), "{}", failures.concat());
    if asked_for.is_some() {
        return;
    }
    // A world in which nothing happens breaks nothing.
    let mut seen: BTreeSet<_> = runs.into_iter().flat_map(|(_, kinds)| kinds).collect();
    let mut further = TO_SEE;
    loop {
        let missing: Vec<_> = KINDS.iter().filter(|kind| !seen.contains(**kind)).collect();
        if missing.is_empty() {
            return;
        }
        let Some(seed) = further.next() else { panic!("{missing:?} never happens; there are {seen:?}") };
        let (failure, kinds) = look(seed);
        assert_eq!(failure, None);
        seen.extend(kinds);
    }
}

#[test]
fn further_worlds_break_nothing_either() {
    further(SEEDS[1].clone());
}

#[test]
fn further_worlds_break_nothing_either_2() {
    further(SEEDS[2].clone());
}

#[test]
fn further_worlds_break_nothing_either_3() {
    further(SEEDS[3].clone());
}

fn further(seeds: Range<u64>) {
    // Whoever asks for seeds gets those, once.
    if seeds::asked_for().is_some() {
        return;
    }
    let failures =
        seeds::on_all_cores(seeds, |seed| seeds::failure(&world::run(Plan::draw(seed, Broken::Nothing))));
    assert!(failures.is_empty(), "{}", failures.concat());
}

#[test]
fn the_same_seed_takes_the_same_course() {
    let differ = seeds::on_all_cores(TO_REPEAT, |seed| {
        let course = || world::run(Plan::draw(seed, Broken::Nothing)).events;
        let (first, second) = (course(), course());
        let at = first.iter().zip(&second).position(|(one, other)| one != other);
        (fingerprint(&first) != fingerprint(&second)).then(|| {
            let of = |events: &[Event]| at.map(|at| events[at].to_string());
            format!("seed {seed}: {:?} or {:?}\n", of(&first), of(&second))
        })
    });
    assert!(differ.is_empty(), "{}", differ.concat());
}

/// What the seeds of every day must have seen.
const KINDS: &[&str] = &[
    "Acked",
    "Left",
    "Fenced",
    "Waiting",
    "Quiesced",
    "NotQuiesced",
    "WouldBlock",
    "Abandoned",
    "Refused",
    "Ended",
    "Unsubscribed",
    "Everything",
    "RangeStart",
    "Page",
    "ChangePte",
    "ClearFlushYoung",
    "ClearYoung",
    "Release",
    "replaced",
    "Barred",
    "Read",
    "refused SESSION_UNKNOWN",
    "Confirmed by the fencer",
    "ConfirmedLate by the fencer",
    "WordLost by the fencer",
    "not confirmed by the fencer",
    "cut off by Fencer",
    "cut off by Administrator",
    "QuarantineFull",
    "QuarantineFull to who cannot wait",
    "held up by the quarantine",
    "begin FencerLost",
    "begin Partition",
    "begin DeafDevice",
    "begin MuteDevice",
    "begin Hold",
    "begin Crash",
    "begin PowerLoss",
    "begin Hang",
    "begin Loss",
    "begin Cut",
    "begin AgentCrash",
    "begin AgentPowerLoss",
    "begin Handover",
    "HandedOver",
    "Resumed",
    "Resumed by a successor",
    "begin CutSource",
    "begin PartitionSource",
    "begin HoldSource",
    "begin TakeOver",
    "Superseded",
    "Registered",
    "Taken",
    "Announced",
    "PowerInWrite lost by a disk",
    "Name lost by a disk",
    "Removal lost by a disk",
    "Tail lost by a disk",
    "an ack during the fault that waits for it",
    "nothing was used",
];

/// Words for what is only seen in all of a trace.
fn seen(run: &world::Run) -> impl Iterator<Item = &'static str> {
    let history = History::of(&run.events, Bounds::of(&run.plan));
    let acks = checks::acks_during_its_fault(&history).then_some("an ack during the fault that waits for it");
    let old = checks::answers_that_nothing_was_used(&history).then_some("nothing was used");
    acks.into_iter().chain(old)
}

/// Whether a device resumed its session in the run after a planned end.
fn goes_on_with_successor(events: &[Event]) -> bool {
    let is = |which: fn(&What) -> bool| move |event: &Event| which(&event.what);
    let handed_over = events.iter().position(is(|what| *what == What::HandedOver));
    let after = handed_over.map_or(&[][..], |at| &events[at..]);
    let started = after.iter().position(is(|what| matches!(what, What::AgentStarted { .. })));
    let run = started.map_or(&[][..], |at| &after[at..]);
    run.iter()
        .take_while(|event| event.what != What::AgentCrashed)
        .any(is(|what| matches!(what, What::Resumed { .. })))
}

/// Words for what the budget of the quarantine did to callers.
fn of_quarantine(events: &[Event]) -> BTreeSet<String> {
    let mut called = BTreeMap::new();
    let words = events.iter().filter_map(|Event { at, what }| match what {
        What::Call { op, patience, .. } => {
            called.insert(*op, (*at, *patience));
            None
        }
        What::Refused { op, error } if error.contains("are quarantined") => match called[op] {
            (_, Patience::None) => Some("QuarantineFull to who cannot wait"),
            _ => Some("QuarantineFull"),
        },
        // Nothing else keeps a call waiting before it opens its round: there are always places.
        What::Answered { op, answer } if answer.dispatched > called[op].0 + millis(1) => {
            (answer.seq.is_some() && answer.verdict != Verdict::WouldBlock)
                .then_some("held up by the quarantine")
        }
        _ => None,
    });
    words.map(str::to_owned).collect()
}

/// Words for what an event shows.
fn kinds(event: &Event) -> Vec<String> {
    let first_word = |text: String| text.split([' ', '(', '{']).next().unwrap().to_owned();
    match &event.what {
        What::Answered { answer, .. } => {
            let outcomes = answer.targets.iter().map(|target| format!("{:?}", target.outcome));
            outcomes.chain([format!("{:?}", answer.verdict)]).collect()
        }
        What::Call { called, .. } => vec![first_word(format!("{called:?}"))],
        What::FlushBegan { scope, .. } => vec![first_word(format!("{scope:?}"))],
        What::Fault(text) => vec![text.split('(').next().unwrap().replace(" of", "")],
        What::FencerAsked { reply: Reply::NotConfirmed | Reply::Unspecified | Reply::Failed, .. } => {
            vec!["not confirmed by the fencer".to_owned()]
        }
        What::FencerAsked { reply, .. } => vec![format!("{reply:?} by the fencer")],
        What::DiskLost(lost) => vec![format!("{lost:?} lost by a disk")],
        What::ReadRefused { reason, .. } => vec![format!("refused {reason}")],
        What::CutOff { by, .. } => vec![format!("cut off by {by:?}")],
        What::Mapped { frame, .. } if frame.generation > 0 => vec!["replaced".to_owned()],
        other => vec![first_word(format!("{other:?}"))],
    }
}

#[test]
fn a_device_whose_clock_stands_still_is_found() {
    assert_eq!(found(Broken::DeviceClock, "NoStaleUse"), Ok(()));
}

#[test]
fn clocks_that_drift_further_than_was_agreed_are_found() {
    assert_eq!(found(Broken::DriftBeyondBound, "FenceIsPositive"), Ok(()));
}

#[test]
fn a_source_that_takes_a_time_out_for_an_ack_is_found() {
    assert_eq!(found(Broken::ReleaseOnTimeout, "NoFreeBeforeQuiesce"), Ok(()));
    assert_eq!(found(Broken::ReleaseOnTimeout, "NoStaleUse"), Ok(()));
}

#[test]
fn a_fencer_that_confirms_and_cuts_nobody_off_is_found() {
    assert_eq!(found(Broken::FencerLies, "FenceIsPositive"), Ok(()));
    assert_eq!(found(Broken::FencerLies, "NoStaleUse"), Ok(()));
}

#[test]
fn a_host_agent_that_knows_no_budget_is_found() {
    assert_eq!(found(Broken::NoBudget, "QuarantineHasABudget"), Ok(()));
}

#[test]
fn a_device_that_acks_before_its_uses_have_ended_is_found() {
    assert_eq!(found(Broken::AckBeforeUsesEnded, "AckMeansStopped"), Ok(()));
    assert_eq!(found(Broken::AckBeforeUsesEnded, "NoStaleUse"), Ok(()));
}

#[test]
fn a_use_that_goes_on_past_its_lease_is_found() {
    assert_eq!(found(Broken::UseOutlastsLease, "NoStaleUse"), Ok(()));
}

#[test]
fn a_host_agent_that_has_forgotten_its_devices_is_found() {
    assert_eq!(found(Broken::JournalLost, "RestartGrace"), Ok(()));
}

#[test]
fn a_welcome_before_its_session_is_synced_is_found() {
    assert_eq!(found(Broken::SessionsNotSynced, "RestartGrace"), Ok(()));
}

#[test]
fn a_device_that_resumes_and_does_not_flush_what_it_missed_is_found() {
    assert_eq!(found(Broken::ResumeSkipsFlush, "ResumeOrFlush"), Ok(()));
}

#[test]
fn a_device_that_keeps_what_a_lost_session_was_granted_is_found() {
    assert_eq!(found(Broken::TableOutlivesSession, "ResumeOrFlush"), Ok(()));
}

#[test]
fn a_source_that_tries_again_with_another_id_is_found() {
    assert_eq!(found(Broken::RetryWithNewId, "OneOutcome"), Ok(()));
}

#[test]
fn a_source_that_takes_the_answer_of_a_host_agent_with_a_successor_is_found() {
    // Of a device that has come to the successor the old one knows nothing, and waits for it in vain.
    assert_eq!(found(Broken::OldAnswerTaken, "JoinCovers"), Ok(()));
}

#[test]
fn a_host_agent_that_never_learns_of_its_successor_is_found() {
    assert_eq!(found(Broken::StateCopied, "RestartGrace"), Ok(()));
}

/// Whether the oracle finds that the invariant is broken, in one of the seeds.
fn found(broken: Broken, invariant: &str) -> Result<(), String> {
    let mut others = BTreeSet::new();
    for seed in TO_FIND {
        let run = world::run(Plan::draw(seed, broken));
        let violations = oracle::check(&run.events, Bounds::of(&run.plan));
        if violations.iter().any(|violation| violation.invariant == invariant) {
            return Ok(());
        }
        others.extend(violations.into_iter().map(|violation| violation.invariant));
    }
    Err(format!("{invariant} holds in all of {TO_FIND:?}; found: {others:?}"))
}
