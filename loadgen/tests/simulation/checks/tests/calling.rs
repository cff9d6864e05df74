use crate::observer::NUMBERS_OF_A_RUN;

use super::*;

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

/// Whose session it was nobody knows, so somebody has to say of each device that it may be of that it has stopped.
#[test]
fn bounded_resolution_finds_a_torn_record_that_nobody_speaks_for_when_all_is_well() {
    let is_answer = |what: &What| matches!(what, What::Answered { .. });
    let resolved = |session, millis: u64| {
        let moment = Some(Duration::from_millis(millis));
        let target = Target { session, outcome: Outcome::Fenced, resolved: moment };
        let answer =
            Answer { targets: vec![target], resolved: moment, ..answer(Verdict::Quiesced, Outcome::Fenced) };
        let first = answered(60, Verdict::NotQuiesced, Outcome::Waiting);
        with(is_answer, vec![first, at(millis, What::Answered { op: OP, answer })])
    };
    assert_eq!(finds("BoundedResolution", &resolved(NUMBERS_OF_A_RUN, 180)), 0);
    assert_eq!(finds("BoundedResolution", &resolved(NUMBERS_OF_A_RUN, 181)), 1);
    assert_eq!(
        finds("BoundedResolution", &resolved(NUMBERS_OF_A_RUN + 1, 180)),
        1,
        "a session like any other"
    );
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
fn a_crash_of_the_host_agent_excuses_a_bracket_that_did_not_end() {
    let crashed = with(|what| matches!(what, What::Ended { .. }), vec![at(16, What::AgentCrashed)]);
    assert_eq!(finds("Pairing", &crashed), 0);
}
