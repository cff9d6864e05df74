//! Each check on a trace made by hand in which its invariant is broken, and nothing else is different from
//! one in which it holds.

use super::*;
use crate::oracle::{Bounds, check};
use crate::trace::{Answer, CutOffBy, Event, Frame, Op, Pages, Span};

const BOUNDS: Bounds = Bounds {
    resolution: Duration::from_millis(100),
    answer: Duration::from_millis(60),
    cut_off: (Duration::from_millis(50), Duration::from_millis(30)),
    quarantine_pages: 2,
    turn: Duration::from_millis(10),
    window: 64,
};
const FRAME: Frame = Frame { index: 3, generation: 0 };
const OP: Op = Op(1);
const LIFE: Life = Life(1);

fn at(millis: u64, what: What) -> Event {
    Event { at: Duration::from_millis(millis), what }
}

fn page(number: u64) -> Pages {
    Pages { space: 1, pages: number..number + 1 }
}

fn answer(verdict: Verdict, outcome: Outcome) -> Answer {
    let resolved = (outcome != Outcome::Waiting).then_some(Duration::from_millis(15));
    let target = Target { session: 1, outcome, resolved };
    let dispatched = Duration::from_millis(10);
    Answer { verdict, seq: Some(1), targets: vec![target], dispatched, resolved }
}

fn answered(millis: u64, verdict: Verdict, outcome: Outcome) -> Event {
    at(millis, What::Answered { op: OP, answer: answer(verdict, outcome) })
}

fn flush(began: u64, ended: u64, span: usize, scope: Scope, notice: Option<u64>) -> [Event; 2] {
    let span = Span(span);
    [
        at(began, What::FlushBegan { life: LIFE, span, scope, notice, seq: notice }),
        at(ended, What::FlushEnded { span }),
    ]
}

/// A device uses a page; the page is unmapped; the device flushes and acks; the page is freed.
fn good() -> Vec<Event> {
    let (life, op, frame, space) = (LIFE, OP, FRAME, 1);
    let pages = page(0);
    let mut events = vec![
        at(0, What::AgentStarted { incarnation: 1 }),
        at(0, What::Connecting { life, device: 0, start: 1 }),
        at(1, What::Opened { life, session: 1, host: 1 }),
        at(1, What::Lease { life, until: Some(Duration::from_millis(500)) }),
        at(1, What::Subscribing { life, space }),
        at(2, What::Subscribed { life, space }),
        at(3, What::Mapped { space, page: 0, frame }),
        at(4, What::Installed { life, space, page: 0, frame }),
        at(5, What::UseBegan { life, span: Span(1), space, page: 0, frame }),
        at(6, What::UseEnded { span: Span(1) }),
        at(10, What::Call { op, called: Called::RangeStart, pages, patience: Patience::Unlimited }),
    ];
    events.extend(flush(12, 13, 2, Scope::Pages(page(0)), Some(1)));
    events.extend([
        answered(15, Verdict::Quiesced, Outcome::Acked),
        at(16, What::Ended { op }),
        at(17, What::Freed { op, frame }),
        at(30, What::NOTHING_LEFT),
    ]);
    events
}

/// The good trace with one kind of event replaced by others.
fn with(is: impl Fn(&What) -> bool, others: Vec<Event>) -> Vec<Event> {
    let mut events = good();
    let before = events.len();
    events.retain(|event| !is(&event.what));
    assert!(events.len() < before, "nothing was replaced");
    plus(events, others)
}

fn plus(mut events: Vec<Event>, more: impl IntoIterator<Item = Event>) -> Vec<Event> {
    events.extend(more);
    events.sort_by_key(|event| event.at);
    events
}

/// What the named check, and the list of all, find in a trace.
fn finds(name: &str, events: &[Event]) -> usize {
    let history = History::of(events, BOUNDS);
    let (_, one) = ALL.iter().find(|(other, _)| *other == name).unwrap();
    let found = one(&history);
    assert!(found.iter().all(|violation| violation.invariant == name));
    assert_eq!(
        check(events, BOUNDS).iter().filter(|violation| violation.invariant == name).count(),
        found.len()
    );
    found.len()
}

#[test]
fn a_trace_in_which_all_is_well_breaks_nothing() {
    assert_eq!(check(&good(), BOUNDS), vec![]);
}

#[test]
fn no_stale_use_finds_a_use_of_a_freed_frame() {
    let late = |millis| {
        with(|what| matches!(what, What::UseEnded { .. }), vec![at(millis, What::UseEnded { span: Span(1) })])
    };
    assert_eq!(finds("NoStaleUse", &late(18)), 1);
    assert_eq!(finds("NoStaleUse", &late(17)), 0);
    let never = with(|what| matches!(what, What::UseEnded { .. }), vec![]);
    assert_eq!(finds("NoStaleUse", &never), 1, "a use that does not end");
}

#[test]
fn no_free_before_quiesce_finds_a_release_without_a_verdict() {
    let is_freed = |what: &What| matches!(what, What::Freed { .. });
    let early = with(is_freed, vec![at(14, What::Freed { op: OP, frame: FRAME })]);
    assert_eq!(finds("NoFreeBeforeQuiesce", &early), 1);
    let is_answer = |what: &What| matches!(what, What::Answered { .. });
    let timed_out = with(is_answer, vec![answered(15, Verdict::NotQuiesced, Outcome::Waiting)]);
    assert_eq!(finds("NoFreeBeforeQuiesce", &timed_out), 1);
}

#[test]
fn ack_means_stopped_finds_a_use_that_outlasts_the_ack() {
    let late =
        with(|what| matches!(what, What::UseEnded { .. }), vec![at(16, What::UseEnded { span: Span(1) })]);
    assert_eq!(finds("AckMeansStopped", &late), 1);
    // Of another page it may.
    let (life, span, frame) = (LIFE, Span(9), Frame { index: 4, generation: 0 });
    let other =
        [at(7, What::UseBegan { life, span, space: 1, page: 1, frame }), at(19, What::UseEnded { span })];
    assert_eq!(finds("AckMeansStopped", &plus(good(), other)), 0);
}

#[test]
fn no_grant_in_window_finds_what_is_installed_between_ack_and_end() {
    let frame = Frame { index: 5, generation: 0 };
    // The bracket of a caller that takes its time lasts until 25.
    let long = |install: u64| {
        let is_end = |what: &What| matches!(what, What::Ended { .. });
        let installed = What::Installed { life: LIFE, space: 1, page: 0, frame };
        with(is_end, vec![at(25, What::Ended { op: OP }), at(install, installed)])
    };
    assert_eq!(finds("NoGrantInWindow", &long(20)), 1);
    assert_eq!(finds("NoGrantInWindow", &long(26)), 0);
    assert_eq!(finds("NoGrantInWindow", &long(14)), 0, "its notice is on the way");
}

#[test]
fn join_covers_finds_a_grant_to_who_joined_meanwhile() {
    let life = Life(2);
    let joins = |subscribing: u64| {
        plus(
            good(),
            [
                at(0, What::Connecting { life, device: 1, start: 1 }),
                at(1, What::Opened { life, session: 2, host: 1 }),
                at(subscribing, What::Subscribing { life, space: 1 }),
                at(14, What::Installed { life, space: 1, page: 0, frame: FRAME }),
            ],
        )
    };
    assert_eq!(finds("JoinCovers", &joins(11)), 1);
    assert_eq!(finds("JoinCovers", &plus(good(), [])), 0);
}

#[test]
fn stable_targets_finds_an_answer_that_names_others() {
    let mut second = answer(Verdict::Quiesced, Outcome::Acked);
    let again = |answer: &Answer| plus(good(), [at(15, What::Answered { op: OP, answer: answer.clone() })]);
    assert_eq!(finds("StableTargets", &again(&second)), 0);
    second.targets[0].session = 2;
    assert_eq!(finds("StableTargets", &again(&second)), 1);
}

#[test]
fn unsubscribe_barrier_finds_a_notice_after_the_end() {
    let left = at(8, What::Unsubscribed { life: LIFE, space: 1 });
    assert_eq!(finds("UnsubscribeBarrier", &plus(good(), [left.clone()])), 1);
    let again = at(9, What::Subscribing { life: LIFE, space: 1 });
    assert_eq!(finds("UnsubscribeBarrier", &plus(good(), [left, again])), 0);
}

#[test]
fn pairing_finds_a_start_without_an_end_and_one_with_two() {
    let none = with(|what| matches!(what, What::Ended { .. }), vec![]);
    assert_eq!(finds("Pairing", &none), 1);
    assert_eq!(finds("Pairing", &plus(good(), [at(18, What::Ended { op: OP })])), 1);
}

#[test]
fn non_block_atomic_finds_a_caller_that_could_not_wait_and_left_something() {
    let call = |answer: Answer| {
        let (op, called, pages) = (Op(2), Called::RangeStart, page(0));
        plus(
            good(),
            [
                at(20, What::Call { op, called, pages, patience: Patience::None }),
                at(20, What::Answered { op, answer }),
            ],
        )
    };
    let would_block = Answer { seq: None, ..answer(Verdict::WouldBlock, Outcome::Waiting) };
    assert_eq!(finds("NonBlockAtomic", &call(would_block.clone())), 0);
    assert_eq!(finds("NonBlockAtomic", &call(Answer { seq: Some(2), ..would_block })), 1);
    assert_eq!(finds("NonBlockAtomic", &call(answer(Verdict::Quiesced, Outcome::Acked))), 1, "it waited");
}

#[test]
fn contiguity_finds_a_notice_that_was_missed_or_came_twice() {
    let next = |notice| flush(21, 22, 3, Scope::Pages(page(1)), Some(notice));
    assert_eq!(finds("Contiguity", &plus(good(), next(2))), 0);
    assert_eq!(finds("Contiguity", &plus(good(), next(3))), 1);
    assert_eq!(finds("Contiguity", &plus(good(), next(1))), 1);
    let everything = flush(20, 20, 4, Scope::Everything, None);
    assert_eq!(finds("Contiguity", &plus(plus(good(), next(3)), everything)), 0);
}

#[test]
fn timeout_is_not_ack_finds_an_ack_that_nobody_gave() {
    let is_flush = |what: &What| matches!(what, What::FlushBegan { .. } | What::FlushEnded { .. });
    assert_eq!(finds("TimeoutIsNotAck", &with(is_flush, vec![])), 1);
    let late = flush(12, 16, 2, Scope::Pages(page(0)), Some(1));
    assert_eq!(finds("TimeoutIsNotAck", &with(is_flush, late.to_vec())), 1);
    let elsewhere = flush(12, 13, 2, Scope::Pages(page(5)), Some(1));
    assert_eq!(finds("TimeoutIsNotAck", &with(is_flush, elsewhere.to_vec())), 1);
    let is_answer = |what: &What| matches!(what, What::Answered { .. });
    let waiting = with(is_answer, vec![answered(15, Verdict::Quiesced, Outcome::Waiting)]);
    assert_eq!(finds("TimeoutIsNotAck", &waiting), 1, "a verdict over a target that is waited for");
    let left = with(is_answer, vec![answered(15, Verdict::Quiesced, Outcome::Left)]);
    assert_eq!(finds("TimeoutIsNotAck", &left), 1, "it never flushed everything");
}

#[test]
fn fence_is_positive_finds_a_fence_within_the_lease() {
    let is_answer = |what: &What| matches!(what, What::Answered { .. });
    let fenced = with(is_answer, vec![answered(15, Verdict::Quiesced, Outcome::Fenced)]);
    assert_eq!(finds("FenceIsPositive", &fenced), 1);
    let over = at(9, What::Lease { life: LIFE, until: Some(Duration::from_millis(15)) });
    assert_eq!(finds("FenceIsPositive", &plus(fenced, [over])), 0);
}

/// The good trace, in which the device enforces no lease.
fn unstoppable(cut_off_by: CutOffBy) -> Event {
    at(0, What::EnforcesNoLease { life: LIFE, cut_off_by })
}

fn cut_off(millis: u64, start: u64) -> Event {
    at(millis, What::CutOff { device: 0, start, by: CutOffBy::Fencer })
}

#[test]
fn fence_is_positive_finds_a_fence_of_who_enforces_no_lease_and_was_not_cut_off() {
    let is_answer = |what: &What| matches!(what, What::Answered { .. });
    let fenced = || with(is_answer, vec![answered(15, Verdict::Quiesced, Outcome::Fenced)]);
    let over = || at(9, What::Lease { life: LIFE, until: Some(Duration::from_millis(10)) });
    let unenforced = || plus(fenced(), [unstoppable(CutOffBy::Fencer), over()]);
    assert_eq!(finds("FenceIsPositive", &unenforced()), 1, "its lease says nothing");
    assert_eq!(finds("FenceIsPositive", &plus(unenforced(), [cut_off(15, 1)])), 0);
    assert_eq!(finds("FenceIsPositive", &plus(unenforced(), [cut_off(16, 1)])), 1, "that was too late");
    assert_eq!(finds("FenceIsPositive", &plus(unenforced(), [cut_off(9, 2)])), 1, "another run was");
    assert_eq!(
        finds("FenceIsPositive", &plus(fenced(), [cut_off(15, 1)])),
        0,
        "within its lease, by a fencer"
    );
}

#[test]
fn fence_reaches_reuse_finds_bytes_of_a_frame_that_was_freed() {
    let read = |times_freed| plus(good(), [at(20, What::Read { life: LIFE, frame: FRAME, times_freed })]);
    assert_eq!(finds("FenceReachesReuse", &read(1)), 1);
    assert_eq!(finds("FenceReachesReuse", &read(0)), 0, "it was read before, and came late");
}

#[test]
fn isolation_finds_an_answer_that_waited_for_others() {
    let is_answer = |what: &What| matches!(what, What::Answered { .. });
    let late = |millis| with(is_answer, vec![answered(millis, Verdict::Quiesced, Outcome::Acked)]);
    assert_eq!(finds("Isolation", &late(18)), 1);
    assert_eq!(finds("Isolation", &late(16)), 0);
}

#[test]
fn isolation_finds_an_answer_over_the_wire_that_took_longer_than_its_targets() {
    let took = |millis| What::Taken { op: OP, host: 1, took: Duration::from_millis(millis) };
    let is_answer = |what: &What| matches!(what, What::Answered { .. });
    let late =
        |millis| with(is_answer, vec![at(30, took(millis)), answered(30, Verdict::Quiesced, Outcome::Acked)]);
    assert_eq!(finds("Isolation", &late(8)), 1);
    assert_eq!(finds("Isolation", &late(6)), 0, "it was on its way");
    let again = [at(11, What::Sent { op: OP }), at(12, What::Sent { op: OP })];
    assert_eq!(finds("Isolation", &plus(late(8), again)), 0, "it was tried again");
}

/// The good trace over the wire, with what the host agent opened and the source heard of it.
fn over_the_wire(more: impl IntoIterator<Item = Event>) -> Vec<Event> {
    let heard = What::Heard { op: OP, host: 1, registered: 1, seq: Some(1) };
    let wire = [
        at(2, What::Registered { space: 1 }),
        at(10, What::Sent { op: OP }),
        at(10, What::RoundSeen { host: 1, space: 1, seq: 1 }),
        at(15, heard),
        at(15, What::Taken { op: OP, host: 1, took: Duration::from_millis(5) }),
    ];
    plus(plus(good(), wire), more)
}

#[test]
fn one_outcome_finds_a_call_that_is_two_rounds() {
    let heard = |host, registered, seq| at(16, What::Heard { op: OP, host, registered, seq });
    assert_eq!(finds("OneOutcome", &over_the_wire([])), 0);
    assert_eq!(finds("OneOutcome", &over_the_wire([heard(1, 1, Some(1))])), 0);
    assert_eq!(finds("OneOutcome", &over_the_wire([heard(1, 1, Some(2))])), 1);
    assert_eq!(finds("OneOutcome", &over_the_wire([heard(1, 1, None)])), 0, "it had no effect");
    assert_eq!(finds("OneOutcome", &over_the_wire([heard(2, 1, Some(2))])), 0, "of a run that knew nothing");
    assert_eq!(finds("OneOutcome", &over_the_wire([heard(1, 2, Some(2))])), 0, "it was registered again");
}

#[test]
fn one_outcome_finds_a_round_of_two_calls() {
    let (op, called, patience) = (Op(2), Called::Page, Patience::Unlimited);
    let another = [
        at(16, What::Call { op, called, pages: page(3), patience }),
        at(17, What::Heard { op, host: 1, registered: 1, seq: Some(1) }),
    ];
    assert_eq!(finds("OneOutcome", &over_the_wire(another)), 1);
}

#[test]
fn one_outcome_finds_a_round_that_nobody_was_told_of() {
    let unheard = || at(12, What::RoundSeen { host: 1, space: 1, seq: 2 });
    assert_eq!(finds("OneOutcome", &over_the_wire([unheard()])), 1);
    let (op, called, patience) = (Op(2), Called::Page, Patience::Unlimited);
    let called = [at(11, What::Call { op, called, pages: page(3), patience }), at(11, What::Sent { op })];
    let called = plus(over_the_wire([unheard()]), called);
    assert_eq!(finds("OneOutcome", &called), 0, "its caller never heard");
    let page_after = |called| {
        let tries = [
            at(11, What::Call { op, called, pages: page(3), patience }),
            at(11, What::Sent { op }),
            at(18, What::HandedOver),
            at(19, What::AgentStarted { incarnation: 1 }),
            at(20, What::Heard { op, host: 1, registered: 1, seq: Some(3) }),
        ];
        plus(over_the_wire([unheard()]), tries)
    };
    assert_eq!(finds("OneOutcome", &page_after(Called::Page)), 0, "it is not handed over");
    assert_eq!(finds("OneOutcome", &page_after(Called::RangeStart)), 1);
    let crashed = [at(18, What::AgentCrashed), at(19, What::AgentStarted { incarnation: 2 })];
    assert_eq!(finds("OneOutcome", &plus(over_the_wire([unheard()]), crashed)), 0, "it went with its run");
}

#[test]
fn bounded_resolution_finds_a_round_that_lasts_too_long_or_for_ever() {
    let is_answer = |what: &What| matches!(what, What::Answered { .. });
    let mut late = answer(Verdict::Quiesced, Outcome::Acked);
    late.resolved = Some(Duration::from_millis(111));
    let late = with(is_answer, vec![at(111, What::Answered { op: OP, answer: late })]);
    assert_eq!(finds("BoundedResolution", &late), 1);
    let timed_out =
        vec![answered(15, Verdict::NotQuiesced, Outcome::Waiting), at(200, What::Fault(String::new()))];
    assert_eq!(finds("BoundedResolution", &with(is_answer, timed_out)), 1, "nobody heard of it again");
}

#[test]
fn bounded_resolution_finds_who_is_not_cut_off_when_all_is_well() {
    let is_answer = |what: &What| matches!(what, What::Answered { .. });
    let resolved = |millis: u64| {
        let moment = Some(Duration::from_millis(millis));
        let target = Target { session: 1, outcome: Outcome::Fenced, resolved: moment };
        let answer =
            Answer { targets: vec![target], resolved: moment, ..answer(Verdict::Quiesced, Outcome::Fenced) };
        let first = answered(60, Verdict::NotQuiesced, Outcome::Waiting);
        let waits = with(is_answer, vec![first, at(millis, What::Answered { op: OP, answer })]);
        plus(waits, [unstoppable(CutOffBy::Fencer)])
    };
    // The faults are over at 50, the round may take 100, and to cut the device off 30.
    assert_eq!(finds("BoundedResolution", &resolved(180)), 0);
    assert_eq!(finds("BoundedResolution", &resolved(181)), 1);
}

#[test]
fn bounded_resolution_finds_who_enforces_its_lease_and_took_as_long_as_who_does_not() {
    let is_answer = |what: &What| matches!(what, What::Answered { .. });
    let other = Life(2);
    let resolved = |millis: u64| {
        let target = |session, millis| Target {
            session,
            outcome: Outcome::Fenced,
            resolved: Some(Duration::from_millis(millis)),
        };
        let answer = Answer {
            targets: vec![target(1, 170), target(2, millis)],
            resolved: Some(Duration::from_millis(170)),
            ..answer(Verdict::Quiesced, Outcome::Fenced)
        };
        let first = answered(60, Verdict::NotQuiesced, Outcome::Waiting);
        let waits = with(is_answer, vec![first, at(170, What::Answered { op: OP, answer })]);
        plus(
            waits,
            [
                unstoppable(CutOffBy::Fencer),
                at(0, What::Connecting { life: other, device: 1, start: 1 }),
                at(1, What::Opened { life: other, session: 2, host: 1 }),
            ],
        )
    };
    assert_eq!(finds("BoundedResolution", &resolved(110)), 0);
    assert_eq!(finds("BoundedResolution", &resolved(111)), 1);
}

#[test]
fn bounded_resolution_finds_a_caller_who_waits_for_ever_for_who_enforces_no_lease() {
    let is_answer = |what: &What| matches!(what, What::Answered { .. });
    let first = |millis| {
        let answers = [
            answered(millis, Verdict::NotQuiesced, Outcome::Waiting),
            answered(90, Verdict::Quiesced, Outcome::Acked),
        ];
        plus(with(is_answer, answers.to_vec()), [unstoppable(CutOffBy::Administrator)])
    };
    assert_eq!(finds("BoundedResolution", &first(72)), 0);
    assert_eq!(finds("BoundedResolution", &first(73)), 1);
}

/// The good trace, and a second caller whose call at 12 is not quiesced either before 40, with `called` for the first.
fn two_parked(called: Called, opened: u64) -> Vec<Event> {
    let is_first = |what: &What| matches!(what, What::Answered { .. } | What::Call { .. });
    let pages = |start| Pages { space: 1, pages: start..start + 2 };
    let patience = Patience::AtMost(Duration::from_millis(1));
    let later = |op, dispatched: u64, answered: u64| {
        let parked = Answer {
            dispatched: Duration::from_millis(dispatched),
            ..answer(Verdict::NotQuiesced, Outcome::Waiting)
        };
        let moment = Some(Duration::from_millis(40));
        let target = Target { session: 1, outcome: Outcome::Acked, resolved: moment };
        let over =
            Answer { verdict: Verdict::Quiesced, targets: vec![target], resolved: moment, ..parked.clone() };
        [at(answered, What::Answered { op, answer: parked }), at(40, What::Answered { op, answer: over })]
    };
    let op = Op(2);
    let events = with(is_first, vec![at(10, What::Call { op: OP, called, pages: pages(0), patience })]);
    let second = at(12, What::Call { op, called: Called::Page, pages: pages(2), patience });
    plus(plus(plus(events, [second]), later(OP, 10, 14)), later(op, opened, opened + 1))
}

#[test]
fn quarantine_has_a_budget_finds_a_round_that_opens_when_it_is_spent() {
    let check = "QuarantineHasABudget";
    assert_eq!(finds(check, &good()), 0);
    assert_eq!(finds(check, &two_parked(Called::RangeStart, 20)), 1);
    assert_eq!(finds(check, &two_parked(Called::RangeStart, 13)), 0, "the first was not parked yet");
    assert_eq!(finds(check, &two_parked(Called::RangeStart, 41)), 0, "the first is not parked any more");
    assert_eq!(finds(check, &two_parked(Called::Release, 20)), 0, "a release is not charged");
    let crashed = [at(17, What::AgentCrashed), at(18, What::AgentStarted { incarnation: 2 })];
    let (op, called, patience) = (Op(2), Called::Page, Patience::Unlimited);
    let mut events = plus(two_parked(Called::RangeStart, 20), crashed);
    events.retain(|event| !matches!(event.what, What::Call { op: Op(2), .. }));
    let pages = Pages { space: 1, pages: 2..4 };
    let events = plus(events, [at(19, What::Call { op, called, pages, patience })]);
    assert_eq!(finds(check, &events), 0, "what was parked before the crash is not counted");
}

#[test]
fn resume_or_flush_finds_a_use_of_what_was_withdrawn_after_a_resume() {
    let (life, frame, span) = (LIFE, FRAME, Span(9));
    let uses = |began, installed| {
        // Its bracket's pages stay: nothing else is wrong.
        let mut events = with(|what| matches!(what, What::Freed { .. }), vec![]);
        if let Some(millis) = installed {
            events = plus(events, [at(millis, What::Installed { life, space: 1, page: 0, frame })]);
        }
        plus(
            events,
            [
                at(14, What::Resumed { life }),
                at(began, What::UseBegan { life, span, space: 1, page: 0, frame }),
                at(began + 1, What::UseEnded { span }),
            ],
        )
    };
    assert_eq!(finds("ResumeOrFlush", &uses(20, None)), 1);
    assert_eq!(finds("ResumeOrFlush", &uses(20, Some(19))), 0, "it was granted again");
    assert_eq!(finds("ResumeOrFlush", &uses(14, None)), 0, "it has not acked yet");
}

#[test]
fn resume_or_flush_finds_a_use_of_what_another_session_was_granted() {
    let (frame, span) = (Frame { index: 5, generation: 0 }, Span(9));
    let uses = [
        at(20, What::UseBegan { life: LIFE, span, space: 1, page: 1, frame }),
        at(21, What::UseEnded { span }),
    ];
    assert_eq!(finds("ResumeOrFlush", &plus(good(), uses)), 1);
}

/// The same device begins another session, of the host agent's run `host`, and is granted a page at 25.
fn and_another_session(host: u64) -> Vec<Event> {
    let (life, frame) = (Life(2), Frame { index: 5, generation: 0 });
    let events = plus(
        good(),
        [
            at(20, What::Connecting { life, device: 0, start: 1 }),
            at(22, What::Opened { life, session: 2, host }),
            at(22, What::Subscribing { life, space: 1 }),
            at(25, What::Installed { life, space: 1, page: 2, frame }),
        ],
    );
    match host {
        1 => events,
        _ => plus(events, [at(18, What::AgentCrashed), at(19, What::AgentStarted { incarnation: host })]),
    }
}

#[test]
fn resume_or_flush_finds_a_grant_before_the_session_before_has_flushed() {
    let flushed = |began, ended| flush(began, ended, 8, Scope::EverythingOfTheSession, None);
    let another = || and_another_session(1);
    assert_eq!(finds("ResumeOrFlush", &another()), 1);
    assert_eq!(finds("ResumeOrFlush", &plus(another(), flushed(18, 19))), 0);
    assert_eq!(finds("ResumeOrFlush", &plus(another(), flushed(18, 26))), 1, "it has only begun to");
    assert_eq!(finds("ResumeOrFlush", &plus(another(), flushed(0, 0))), 1, "that was before the session");
}

#[test]
fn restart_grace_finds_a_grant_while_a_device_of_the_run_before_has_a_lease() {
    let another = || and_another_session(2);
    assert_eq!(finds("RestartGrace", &and_another_session(1)), 0, "nobody crashed");
    assert_eq!(finds("RestartGrace", &another()), 1);
    let over = at(18, What::Lease { life: LIFE, until: Some(Duration::from_millis(25)) });
    assert_eq!(finds("RestartGrace", &plus(another(), [over])), 0);
    let flushed = flush(20, 21, 8, Scope::EverythingOfTheSession, None);
    assert_eq!(finds("RestartGrace", &plus(another(), flushed)), 0);
}

#[test]
fn restart_grace_finds_a_grant_while_a_device_of_the_run_before_goes_on_without_a_lease() {
    let over = at(18, What::Lease { life: LIFE, until: Some(Duration::from_millis(25)) });
    let another = || plus(and_another_session(2), [unstoppable(CutOffBy::Administrator), over.clone()]);
    assert_eq!(finds("RestartGrace", &another()), 1);
    assert_eq!(finds("RestartGrace", &plus(another(), [cut_off(24, 1)])), 0);
    assert_eq!(finds("RestartGrace", &plus(another(), [cut_off(26, 1)])), 1);
    let mut holds_nothing = another();
    holds_nothing.retain(|event| !matches!(event.what, What::Installed { life: LIFE, .. }));
    assert_eq!(finds("RestartGrace", &holds_nothing), 0, "it was granted nothing");
}

#[test]
fn restart_grace_finds_a_verdict_while_a_device_of_the_run_before_has_a_lease() {
    let (op, called, patience) = (Op(2), Called::Page, Patience::Unlimited);
    let asks = |host, lease: u64| {
        let answer = Answer { targets: vec![], ..answer(Verdict::Quiesced, Outcome::Acked) };
        let mut events = with(|what| matches!(what, What::Lease { .. }), vec![]);
        events = plus(
            events,
            [
                at(2, What::Lease { life: LIFE, until: Some(Duration::from_millis(lease)) }),
                at(19, What::AgentStarted { incarnation: host }),
                at(20, What::Call { op, called, pages: page(3), patience }),
            ],
        );
        let resolved = Some(Duration::from_millis(30));
        let dispatched = Duration::from_millis(20);
        plus(events, [at(30, What::Answered { op, answer: Answer { resolved, dispatched, ..answer } })])
    };
    assert_eq!(finds("RestartGrace", &asks(2, 31)), 1);
    assert_eq!(finds("RestartGrace", &asks(2, 30)), 0);
    assert_eq!(finds("RestartGrace", &asks(1, 31)), 0, "a planned end, and its successor goes on");
}

#[test]
fn a_crash_of_the_host_agent_excuses_a_bracket_that_did_not_end() {
    let crashed = with(|what| matches!(what, What::Ended { .. }), vec![at(16, What::AgentCrashed)]);
    assert_eq!(finds("Pairing", &crashed), 0);
}

#[test]
fn nothing_is_left_finds_pages_that_stay_in_quarantine() {
    let is_left = |what: &What| matches!(what, What::Left { .. });
    let parked = What::Left { sessions: 0, rounds: 0, brackets: 0, subscriptions: 0, quarantined: (4096, 1) };
    assert_eq!(finds("NothingIsLeft", &with(is_left, vec![at(30, parked)])), 1);
}

#[test]
fn nothing_is_left_finds_a_session_that_nobody_has() {
    let is_left = |what: &What| matches!(what, What::Left { .. });
    let one = What::Left { sessions: 1, rounds: 0, brackets: 0, subscriptions: 0, quarantined: (0, 0) };
    assert_eq!(finds("NothingIsLeft", &with(is_left, vec![at(30, one)])), 1);
    assert_eq!(finds("NothingIsLeft", &with(is_left, vec![])), 1, "nobody looked");
}
