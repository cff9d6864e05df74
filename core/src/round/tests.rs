use proptest::prelude::*;

use super::*;
use crate::event::Cause;
use crate::id::{AddressSpaceId, Seq};
use crate::range::{AddrRange, PageSize};

fn at(nanos: u64) -> Moment {
    Moment::from_nanos(nanos)
}

fn event(method: Method) -> Event {
    Event {
        address_space: AddressSpaceId::FIRST,
        seq: Seq::FIRST,
        range: AddrRange::page_of(0, PageSize::BASE),
        method,
        cause: Cause::Clear,
        owner: None,
    }
}

fn targets(count: usize) -> Vec<(SessionId, DeviceId)> {
    let id = |index: usize| SessionId::new(index as u64 + 1).unwrap();
    (0..count).map(|index| (id(index), DeviceId::new(&format!("gpu{index}")).unwrap())).collect()
}

fn round(method: Method, count: usize) -> Round {
    Round::new(event(method), targets(count), at(100))
}

fn acked(young: bool) -> Resolution {
    Resolution::Acked { young, dirty: false, timing: None, sent: Some(at(110)) }
}

const RESOLUTIONS: [Resolution; 5] = [
    Resolution::Acked { young: false, dirty: false, timing: None, sent: None },
    Resolution::Acked { young: true, dirty: false, timing: None, sent: None },
    Resolution::Acked { young: false, dirty: true, timing: None, sent: None },
    Resolution::Left,
    Resolution::Fenced,
];

fn describe(how: Resolution) -> String {
    match how {
        Resolution::Acked { young: false, dirty: false, .. } => "Acked".to_owned(),
        Resolution::Acked { young: true, dirty: false, .. } => "Acked(young)".to_owned(),
        Resolution::Acked { young: false, dirty: true, .. } => "Acked(dirty)".to_owned(),
        Resolution::Acked { .. } => "Acked(young, dirty)".to_owned(),
        other => format!("{other:?}"),
    }
}

/// Every (state, input) of a round of one and of two targets.
#[test]
fn transitions() {
    let mut table = String::new();
    for method in [Method::Invalidate, Method::ClearFlushYoung, Method::ClearYoung] {
        for count in [1, 2] {
            let before = RESOLUTIONS.iter().map(|how| Some(*how)).chain([None]);
            for (first, input) in before.flat_map(|first| RESOLUTIONS.map(|input| (first, input))) {
                let mut round = round(method, count);
                let state = match first {
                    Some(how) => {
                        round.on_resolved(0, how, at(120));
                        describe(how)
                    }
                    None => "Waiting".to_owned(),
                };
                let progress = round.on_resolved(0, input, at(150));
                let outcomes: Vec<_> = round.reports().iter().map(|report| report.outcome.name()).collect();
                table += &format!(
                    "{} {count} targets | {state:12} + {:12} -> {progress:15} [{}] young {} dirty {} completed {}\n",
                    method.name(),
                    describe(input),
                    outcomes.join(" "),
                    round.young(),
                    round.dirty(),
                    round.completed().map_or("-".to_owned(), |moment| format!("{moment:?}")),
                    progress = format!("{progress:?}"),
                );
            }
        }
    }
    insta::assert_snapshot!("transitions", table);
}

#[test]
fn a_round_without_targets_is_complete_from_the_start() {
    let round = round(Method::ClearYoung, 0);
    assert!(round.is_complete() && !round.young() && !round.dirty());
    assert_eq!(round.completed(), Some(at(100)));
    assert_eq!(round.missing().count(), 0);
}

#[test]
fn a_report_tells_when_its_notice_was_sent_and_when_it_was_resolved() {
    let mut round = round(Method::Invalidate, 2);
    let timing = Some(FlushTiming { received: at(7), flushed: at(9) });
    round.on_resolved(
        1,
        Resolution::Acked { young: false, dirty: false, timing, sent: Some(at(130)) },
        at(190),
    );
    let report = &round.reports()[1];
    assert_eq!(report.sent_after, Some(Duration::from_nanos(30)));
    assert_eq!(report.elapsed, Some(Duration::from_nanos(90)));
    assert_eq!((report.resolved_at, report.timing), (Some(at(190)), timing));
    assert_eq!(round.missing().map(|report| report.device.as_str()).collect::<Vec<_>>(), ["gpu0"]);
}

#[test]
#[should_panic(expected = "named by the index")]
fn a_target_that_is_not_one_is_a_bug() {
    round(Method::Invalidate, 2).on_resolved(2, Resolution::Left, at(200));
}

/// Invariant 13, as far as a round goes: no input is made of time alone, so whatever time is given
/// with the others' resolutions, the one that says nothing is waited for (trap 1, trap 5).
#[test]
fn timeout_is_not_ack() {
    let mut round = round(Method::Invalidate, 3);
    assert_eq!(round.on_resolved(0, acked(false), at(u64::MAX)), Progress::Waiting);
    assert_eq!(round.on_resolved(2, Resolution::Fenced, at(u64::MAX)), Progress::Waiting);
    for _ in 0..2 {
        assert!(!round.is_complete());
        assert_eq!(round.completed(), None);
        assert_eq!(round.missing().map(|report| report.session.get()).collect::<Vec<_>>(), [2]);
    }
    assert_eq!(
        round.on_resolved(0, acked(false), at(u64::MAX)),
        Progress::AlreadyResolved,
        "not for another"
    );
    assert!(!round.is_complete());
}

/// Invariant 20: until a target says that it did not use the range, it counts as one that did.
#[test]
fn young_is_conservative() {
    for method in [Method::ClearYoung, Method::ClearFlushYoung] {
        let mut waiting = round(method, 2);
        waiting.on_resolved(0, acked(false), at(200));
        assert!(waiting.young(), "one has not said");
        waiting.on_resolved(1, acked(false), at(200));
        assert!(!waiting.young(), "both said no");
        for silent in [Resolution::Left, Resolution::Fenced] {
            let mut round = round(method, 2);
            round.on_resolved(0, acked(false), at(200));
            round.on_resolved(1, silent, at(200));
            assert!(round.young(), "{silent:?} without its bits");
        }
    }
    let mut round = round(Method::Invalidate, 2);
    round.on_resolved(0, Resolution::Fenced, at(200));
    assert!(!round.young(), "nobody asked");
    round.on_resolved(1, acked(true), at(200));
    assert!(round.young(), "but what is told is kept");
}

/// Until a target that is asked to flush says that it wrote nothing, it counts as one that wrote.
#[test]
fn dirty_is_never_under_reported() {
    let wrote = Resolution::Acked { young: false, dirty: true, timing: None, sent: None };
    for method in [Method::Invalidate, Method::ClearFlushYoung, Method::Release] {
        let mut waiting = round(method, 2);
        waiting.on_resolved(0, acked(true), at(200));
        assert!(waiting.dirty(), "one has not said");
        waiting.on_resolved(1, acked(true), at(200));
        assert!(!waiting.dirty(), "both said no");
        for word in [Resolution::Left, Resolution::Fenced, wrote] {
            let mut round = round(method, 2);
            round.on_resolved(0, acked(false), at(200));
            round.on_resolved(1, word, at(200));
            assert!(round.dirty(), "{word:?}");
            assert_eq!(round.reports().iter().map(|report| report.dirty).collect::<Vec<_>>(), [false, true]);
        }
    }
    let mut asking = round(Method::ClearYoung, 2);
    asking.on_resolved(0, Resolution::Fenced, at(200));
    assert!(!asking.dirty(), "nothing was flushed, so nobody asked");
    asking.on_resolved(1, wrote, at(200));
    assert!(asking.dirty(), "but what is told is kept");
}

fn any_resolution() -> impl Strategy<Value = Resolution> {
    (0..RESOLUTIONS.len()).prop_map(|index| RESOLUTIONS[index])
}

proptest! {
    /// Invariant 5, and the oracle of the whole machine: a slot per target, the first word counts.
    #[test]
    fn stable_targets(
        count in 1..8_usize,
        asks_young in any::<bool>(),
        inputs in prop::collection::vec((any::<prop::sample::Index>(), any_resolution()), 0..40),
    ) {
        let method = if asks_young { Method::ClearYoung } else { Method::Invalidate };
        let mut round = round(method, count);
        let mut oracle: Vec<Option<Resolution>> = vec![None; count];
        let mut completed = None;
        for (step, (index, how)) in inputs.into_iter().enumerate() {
            let target = index.index(count);
            let now = at(200 + step as u64);
            let progress = round.on_resolved(target, how, now);
            let expected = if oracle[target].is_some() {
                Progress::AlreadyResolved
            } else {
                oracle[target] = Some(how);
                match oracle.iter().all(Option::is_some) {
                    true => {
                        completed = Some(now);
                        Progress::Complete
                    }
                    false => Progress::Waiting,
                }
            };
            prop_assert_eq!(progress, expected);
            prop_assert_eq!(round.completed(), completed);
            prop_assert_eq!(round.is_complete(), completed.is_some());
            prop_assert_eq!(round.missing().count(), oracle.iter().filter(|slot| slot.is_none()).count());
            let young = oracle.iter().any(|slot| match slot {
                Some(Resolution::Acked { young, .. }) => *young,
                _ => asks_young,
            });
            prop_assert_eq!(round.young(), young);
            let dirty = oracle.iter().any(|slot| match slot {
                Some(Resolution::Acked { dirty, .. }) => *dirty,
                _ => !asks_young,
            });
            prop_assert_eq!(round.dirty(), dirty);
        }
        let named: Vec<_> = round.reports().iter().map(|report| (report.session, report.device.clone())).collect();
        prop_assert_eq!(named, targets(count), "fixed at the start, in order");
        for (report, slot) in round.reports().iter().zip(oracle) {
            let expected = match slot {
                None => Outcome::Waiting,
                Some(Resolution::Acked { .. }) => Outcome::Acked,
                Some(Resolution::Left) => Outcome::Left,
                Some(Resolution::Fenced) => Outcome::Fenced,
            };
            prop_assert_eq!(report.outcome, expected);
            prop_assert_eq!(report.resolved_at.is_some(), slot.is_some());
        }
    }
}
