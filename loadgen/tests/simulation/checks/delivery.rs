//! What becomes of an event on its way to a device: it is not lost, merged with others, widened, numbered.

use std::time::Duration;

use crate::memory::PAGE;
use crate::oracle::{Flush, History, Round, Violation};
use crate::trace::{Asks, Life, Outcome, Scope};

/// Who has acked a round was told of every page of it: by notices of it or of later events, or by a flush of
/// everything.
pub fn never_drop(history: &History) -> Vec<Violation> {
    let dropped = acked(history).filter_map(|(round, acked, life)| {
        let told: Vec<&Flush> = told(history, round, acked, life).collect();
        let reached = |page| told.iter().any(|flush| reaches(flush, round.pages.space, page));
        let page = round.pages.pages.clone().find(|page| !reached(*page))?;
        Some(Violation {
            invariant: "NeverDrop",
            at: acked,
            what: format!("{life:?} acked {:?}, and nobody had told it of page {page}", round.op),
        })
    });
    dropped.collect()
}

/// An event goes into one notice, which names all of it, is of its sequence or a later one, and asks for as much.
pub fn merge_is_union(history: &History) -> Vec<Violation> {
    let lessened = acked(history).filter_map(|(round, acked, life)| {
        let whole = told(history, round, acked, life).any(|flush| {
            let asks_enough =
                !round.withdraws() || flush.told.as_ref().is_none_or(|it| it.asks == Asks::Stop);
            asks_enough && round.pages.pages.clone().all(|page| reaches(flush, round.pages.space, page))
        });
        (!whole).then(|| Violation {
            invariant: "MergeIsUnion",
            at: acked,
            what: format!("{life:?} acked {:?}, and no notice of it says all that it says", round.op),
        })
    });
    lessened.collect()
}

/// What a device is told are whole pages, and the notice of an event names no byte less than the event.
pub fn range_over_approximates(history: &History) -> Vec<Violation> {
    let narrow = history.flushes.values().filter_map(|flush| {
        let (Scope::Pages(pages), Some(told)) = (&flush.scope, &flush.told) else { return None };
        let of_it = history.rounds.values().find(|round| {
            let session = history.lives[&flush.life].session;
            let is_target = round.last_targets().iter().any(|target| Some(target.session) == session);
            (round.pages.space, round.seq()) == (pages.space, Some(told.seq)) && is_target
        });
        let named = of_it.map(|round| &round.bytes);
        let whole = |edge: u64| edge.is_multiple_of(PAGE) || edge == u64::MAX;
        let holds =
            |bytes: &std::ops::Range<u64>| told.bytes.start <= bytes.start && bytes.end <= told.bytes.end;
        let is_wide = told.bytes.start < told.bytes.end
            && whole(told.bytes.start)
            && whole(told.bytes.end)
            && named.is_none_or(holds);
        (!is_wide).then(|| Violation {
            invariant: "RangeOverApproximates",
            at: flush.began,
            what: format!("notice {} is of {:?}; its event named {named:?}", told.notice, told.bytes),
        })
    });
    narrow.collect()
}

/// Of two events of an address space the later has the greater sequence, and who subscribes is told of one between
/// those before and those after.
pub fn seq_compare(history: &History) -> Vec<Violation> {
    let numbered: Vec<_> = history
        .rounds
        .values()
        .filter_map(|round| Some((round, round.dispatched()?, round.seq()?)))
        .collect();
    let mut violations = Vec::new();
    for (earlier, dispatched, seq) in &numbered {
        let later = numbered.iter().find(|(later, _, other)| {
            let same = later.pages.space == earlier.pages.space;
            same && later.at > *dispatched && other <= seq
        });
        violations.extend(later.map(|(later, _, other)| Violation {
            invariant: "SeqCompare",
            at: later.at,
            what: format!("{:?} is event {seq}, and the later {:?} is {other}", earlier.op, later.op),
        }));
    }
    for (name, life) in &history.lives {
        for (got, space, newest) in &life.subscribed {
            let asked = life.subscribing.iter().filter(|(at, of)| of == space && at <= got);
            let Some(asked) = asked.map(|(at, _)| *at).max() else { continue };
            let wrong = numbered.iter().find(|(round, dispatched, seq)| {
                let same = (round.pages.space, round.host) == (*space, life.host);
                let before = *dispatched < asked && Some(*seq) > *newest;
                let after = round.at > *got && Some(*seq) <= *newest;
                same && (before || after)
            });
            violations.extend(wrong.map(|(round, _, seq)| Violation {
                invariant: "SeqCompare",
                at: *got,
                what: format!("{name:?} subscribed at event {newest:?}, and {:?} is {seq}", round.op),
            }));
        }
    }
    violations
}

/// Each ack of a round by a device that is known.
fn acked(history: &History) -> impl Iterator<Item = (&Round, Duration, Life)> {
    let acked = history.resolved().filter(|(_, target, ..)| target.outcome == Outcome::Acked);
    acked.filter_map(|(round, _, acked, life)| Some((round, acked, life?)))
}

/// What a device had been told, and had done, of a round or what came after it when it acked.
fn told<'a>(
    history: &'a History,
    round: &'a Round,
    acked: Duration,
    life: Life,
) -> impl Iterator<Item = &'a Flush> {
    history.flushes.values().filter(move |flush| {
        let newer = match &flush.told {
            Some(told) => round.seq().is_none_or(|seq| told.seq >= seq),
            None => flush.scope == Scope::Everything && flush.began >= round.at,
        };
        flush.life == life && newer && flush.ended.is_some_and(|ended| ended <= acked)
    })
}

fn reaches(flush: &Flush, space: u64, page: u64) -> bool {
    match &flush.scope {
        Scope::Pages(pages) => pages.holds(space, page),
        Scope::Everything | Scope::EverythingOfTheSession => true,
    }
}
