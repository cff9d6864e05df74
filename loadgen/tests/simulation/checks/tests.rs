//! Each check on a trace made by hand in which its invariant is broken, and nothing else is different from
//! one in which it holds.

mod stopping;
mod granting;
mod delivery;
mod calling;
mod answers;
mod sessions;

use std::time::Duration;

use super::ALL;
use crate::oracle::{Bounds, History, check};
use crate::trace::{
    Answer, Asks, Called, CutOffBy, Event, Frame, Life, Op, Outcome, Pages, Patience, Scope, Span, Target,
    Told, Verdict, What,
};

const BOUNDS: Bounds = Bounds {
    resolution: Duration::from_millis(100),
    answer: Duration::from_millis(60),
    cut_off: (Duration::from_millis(50), Duration::from_millis(30)),
    quarantine_pages: 2,
    turn: Duration::from_millis(10),
    window: 64,
    on_its_way: Duration::from_millis(8),
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
    Answer { verdict, seq: Some(1), targets: vec![target], young: true, dispatched, resolved }
}

fn answered(millis: u64, verdict: Verdict, outcome: Outcome) -> Event {
    at(millis, What::Answered { op: OP, answer: answer(verdict, outcome) })
}

/// A notice whose event has its number.
fn told(scope: &Scope, notice: Option<u64>) -> Option<Told> {
    let Scope::Pages(pages) = scope else { return None };
    notice.map(|notice| Told { notice, seq: notice, bytes: pages.bytes(), asks: Asks::Stop })
}

fn flush(began: u64, ended: u64, span: usize, scope: Scope, notice: Option<u64>) -> [Event; 2] {
    let span = Span(span);
    [
        at(began, What::FlushBegan { life: LIFE, span, told: told(&scope, notice), scope }),
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
        at(2, What::Subscribed { life, space, seq: None }),
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

/// The good trace, in which the device enforces no lease.
fn unstoppable(cut_off_by: CutOffBy) -> Event {
    at(0, What::EnforcesNoLease { life: LIFE, cut_off_by })
}

fn cut_off(millis: u64, start: u64) -> Event {
    at(millis, What::CutOff { device: 0, start, by: CutOffBy::Fencer })
}

#[test]
fn a_trace_in_which_all_is_well_breaks_nothing() {
    assert_eq!(check(&good(), BOUNDS), vec![]);
}
