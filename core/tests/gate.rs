//! The grant gate against its definition: a history of events that is scanned from end to end.
#![allow(clippy::unwrap_used, reason = "a test's helpers are tests, which clippy sees in a mod tests only")]

use proptest::prelude::*;
use shootdown_core::AddrRange;
use shootdown_core::gate::{GrantGate, Ticket};

/// An event that started, and whether it has ended.
#[derive(Clone, Copy, Debug)]
struct Started {
    range: AddrRange,
    ended: bool,
}

/// A ticket, and how many events had started when it was opened.
struct Asked {
    ticket: Ticket,
    range: AddrRange,
    events_before: usize,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Start(AddrRange),
    /// The event at this place among all that ever started, modulo their number.
    End(usize),
    OpenTicket(AddrRange),
    /// The ticket at this place among those that are open, modulo their number.
    Commit(usize),
    Cancel(usize),
    /// Of the event at this place.
    SoleOver(usize, AddrRange),
}

fn any_range() -> impl Strategy<Value = AddrRange> {
    let at = |first: u64, count: u64, top: bool| {
        let base = if top { 0_u64.wrapping_sub(28 << 12) } else { 0 };
        AddrRange::new(base + (first << 12), (base + (first << 12)).wrapping_add(count << 12))
    };
    let range = (0..24_u64, 1..5_u64, any::<bool>())
        .prop_map(move |(first, count, top)| at(first, count, top).unwrap());
    prop_oneof![15 => range, 1 => Just(AddrRange::ALL)]
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => any_range().prop_map(Step::Start),
        4 => any::<usize>().prop_map(Step::End),
        4 => any_range().prop_map(Step::OpenTicket),
        2 => any::<usize>().prop_map(Step::Commit),
        1 => any::<usize>().prop_map(Step::Cancel),
        2 => (any::<usize>(), any_range()).prop_map(|(at, range)| Step::SoleOver(at, range)),
    ]
}

#[derive(Default)]
struct World {
    gate: GrantGate,
    /// The event of sequence n is at n - 1.
    history: Vec<Started>,
    asked: Vec<Asked>,
}

impl World {
    fn open_over(&self, range: AddrRange) -> impl Iterator<Item = usize> {
        let open = move |(_, event): &(usize, &Started)| !event.ended && event.range.overlaps(range);
        self.history.iter().enumerate().filter(open).map(|(at, _)| at)
    }

    fn is_fresh(&self, asked: &Asked) -> bool {
        !self.history[asked.events_before..].iter().any(|event| event.range.overlaps(asked.range))
    }

    fn apply(&mut self, step: Step) {
        match step {
            Step::Start(range) => {
                let seq = self.gate.start(range);
                self.history.push(Started { range, ended: false });
                assert_eq!(seq.get(), self.history.len() as u64);
            }
            Step::End(at) if !self.history.is_empty() => {
                let at = at % self.history.len();
                let seq = shootdown_core::Seq::new(at as u64 + 1).unwrap();
                let event = &mut self.history[at];
                let expected = (!event.ended).then_some(event.range);
                event.ended = true;
                assert_eq!(self.gate.end(seq).ok(), expected, "one end a start");
            }
            Step::OpenTicket(range) => match self.gate.open_ticket(range) {
                Ok(ticket) => {
                    assert_eq!(self.open_over(range).count(), 0, "opened in a window");
                    self.asked.push(Asked { ticket, range, events_before: self.history.len() });
                }
                Err(held) => {
                    assert!(
                        self.open_over(range).any(|at| at as u64 + 1 == held.seq.get()),
                        "held by nobody"
                    );
                    assert!(held.bracket.overlaps(range));
                }
            },
            Step::Commit(at) if !self.asked.is_empty() => {
                let asked = self.asked.swap_remove(at % self.asked.len());
                let fresh = self.is_fresh(&asked);
                let in_window = self.open_over(asked.range).count() > 0;
                let committed = self.gate.commit(asked.ticket).is_ok();
                assert_eq!(committed, fresh);
                assert!(!(committed && in_window), "granted in a window");
            }
            Step::Cancel(at) if !self.asked.is_empty() => {
                let asked = self.asked.swap_remove(at % self.asked.len());
                self.gate.cancel(asked.ticket);
            }
            Step::SoleOver(at, range) if !self.history.is_empty() => {
                let at = at % self.history.len();
                let seq = shootdown_core::Seq::new(at as u64 + 1).unwrap();
                let alone = self.open_over(range).collect::<Vec<_>>() == [at]
                    && self.history[at].range.contains(range);
                assert_eq!(self.gate.sole_over(seq, range), alone);
            }
            Step::End(_) | Step::Commit(_) | Step::Cancel(_) | Step::SoleOver(..) => {}
        }
        self.check();
    }

    fn check(&self) {
        let open = self.history.iter().enumerate().filter(|(_, event)| !event.ended);
        let open: Vec<(u64, AddrRange)> = open.map(|(at, event)| (at as u64 + 1, event.range)).collect();
        let brackets: Vec<(u64, AddrRange)> =
            self.gate.brackets().map(|(seq, range)| (seq.get(), range)).collect();
        assert_eq!(brackets, open);
        assert_eq!(self.gate.open_brackets(), open.len());
        assert_eq!(self.gate.open_tickets(), self.asked.iter().filter(|asked| self.is_fresh(asked)).count());
        assert_eq!(self.gate.last_seq().map_or(0, |seq| seq.get()), self.history.len() as u64);
        for page in 0..28 {
            let range = AddrRange::new(page << 12, (page + 1) << 12).unwrap();
            assert_eq!(self.gate.is_held(range), self.open_over(range).count() > 0);
        }
    }
}

proptest! {
    /// Invariants 3 and 7, on random histories.
    #[test]
    fn no_grant_in_window_and_pairing_on_every_history(steps in prop::collection::vec(any_step(), 0..120)) {
        let mut world = World::default();
        for step in steps {
            world.apply(step);
        }
        for at in 0..world.history.len() {
            world.apply(Step::End(at));
        }
        while !world.asked.is_empty() {
            world.apply(Step::Commit(0));
        }
        prop_assert_eq!((world.gate.open_brackets(), world.gate.open_tickets()), (0, 0), "all counters return to zero");
    }
}
