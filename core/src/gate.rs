//! [3 of 9] What may be granted, and when: the brackets and the tickets of one address space.
//!
//! ```text
//!   event       start ------------------ round, release of the pages ------------------ end
//!   over the    |<----------------------------- bracket ------------------------------->|
//!   range       |                                                                       |
//!   ticket A  o-x  spoiled: commit is refused                                           |
//!   ticket B    |          o Held: not opened                                           |
//!   ticket C    |                                                                       |  o----- commit
//! ```
//!
//! The kernel's twin is a pair: `invalidate_range_start` and `_end` move `invalidate_seq`
//! (`mn_itree_inv_start_range`, `mn_itree_inv_end`), and a driver that faults calls
//! `mmu_interval_read_begin` first and `mmu_interval_read_retry` under its lock last. Here the source's
//! answer takes the driver's place: [`GrantGate::open_ticket`], ask the source, [`GrantGate::commit`].

use crate::id::Seq;
use crate::interval::IntervalMap;
use crate::range::AddrRange;
use crate::ticket::{self, TicketNumbers, Tickets};
use std::collections::BTreeMap;

/// The order of one address space: it numbers events, keeps their brackets, and lets no grant into an
/// overlapping one (NoGrantInWindow).
///
/// It does not wait. Whoever gets [`Held`] waits for the end of a bracket in whatever way suits them,
/// and opens a ticket anew. It lives under one lock per address space, and every call is O(log n) in
/// brackets and tickets, save that a start also takes out each ticket that it spoils.
///
/// The price: a bracket costs a node in each of two trees, by range and by sequence.
#[derive(Default, Debug)]
pub struct GrantGate {
    last: Option<Seq>,
    by_range: IntervalMap<Seq, ()>,
    by_seq: BTreeMap<Seq, AddrRange>,
    numbers: TicketNumbers,
    tickets: Tickets,
}

/// Leave to ask the source for translations of a range, and to grant the answer if nothing happened
/// meanwhile. Give it back to the gate that issued it, by [`GrantGate::commit`] or
/// [`GrantGate::cancel`]; one that is lost occupies a node until an event overlaps it.
#[must_use = "a ticket is committed or cancelled"]
#[derive(Debug)]
pub struct Ticket(ticket::Ticket);

/// No ticket was opened: a bracket overlaps the range. Try again after its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the range is held by event {seq}, whose bracket over {bracket} is open")]
pub struct Held {
    /// The event whose bracket it is; the one with the lowest start, where there are several.
    pub seq: Seq,
    /// What the bracket covers.
    pub bracket: AddrRange,
}

/// The ticket was not committed: an event that overlaps it started after it was opened, so what the
/// source said may be out of date. Ask again with a new ticket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an overlapping event started after the ticket was opened")]
pub struct Spoiled;

/// The bracket is not open: the event never started, or has ended already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("event {seq} has no open bracket")]
pub struct UnknownBracket {
    /// The event that was to be ended.
    pub seq: Seq,
}

impl GrantGate {
    /// The gate as an earlier run of the host agent left it: the sequence of its last event, and the brackets
    /// that were open. Their events are numbered no higher than the last.
    #[must_use]
    pub fn restored(last: Option<Seq>, brackets: impl IntoIterator<Item = (Seq, AddrRange)>) -> Self {
        let mut gate = Self { last, ..Self::default() };
        for (seq, range) in brackets {
            gate.last = gate.last.max(Some(seq));
            gate.by_range.set(range, seq, ());
            gate.by_seq.insert(seq, range);
        }
        gate
    }

    /// An event starts: it gets the next sequence, its bracket opens, and every open ticket that
    /// overlaps is spoiled. Follows `mn_itree_inv_start_range`.
    ///
    /// Exactly one [`GrantGate::end`] must follow, for an aborted event too (Pairing). An event that
    /// is refused with WOULD_BLOCK must be refused before it starts here: a sequence is not given back.
    #[must_use = "the bracket stays open until its sequence is ended"]
    pub fn start(&mut self, range: AddrRange) -> Seq {
        let seq = self.last.map_or(Seq::FIRST, Seq::next);
        self.last = Some(seq);
        self.by_range.set(range, seq, ());
        self.by_seq.insert(seq, range);
        self.tickets.spoil(range);
        seq
    }

    /// The event's bracket closes; what it covered. Follows `mn_itree_inv_end`.
    ///
    /// # Errors
    /// [`UnknownBracket`] when the event did not start or has ended before: an event has one end
    /// (Pairing). Nothing changes then.
    pub fn end(&mut self, seq: Seq) -> Result<AddrRange, UnknownBracket> {
        let range = self.by_seq.remove(&seq).ok_or(UnknownBracket { seq })?;
        self.by_range.take(range, &seq);
        Ok(range)
    }

    /// Whether the event's bracket is open, covers all of `range`, and no other bracket overlaps
    /// `range`. Only then is the new translation of a `change_pte` worth more than a flush.
    #[must_use]
    pub fn sole_over(&self, seq: Seq, range: AddrRange) -> bool {
        self.by_seq.get(&seq).is_some_and(|own| own.contains(range))
            && self.by_range.overlapping(range).all(|(_, other, ())| *other == seq)
    }

    /// Whether a bracket that overlaps `range` is open.
    #[must_use]
    pub fn is_held(&self, range: AddrRange) -> bool {
        self.by_range.overlaps(range)
    }

    /// A fault begins: called before the source is asked for translations of `range`. Follows
    /// `mmu_interval_read_begin`, which sleeps where this one is [`Held`].
    ///
    /// # Errors
    /// [`Held`] when a bracket that overlaps is open.
    pub fn open_ticket(&mut self, range: AddrRange) -> Result<Ticket, Held> {
        if let Some((bracket, seq, ())) = self.by_range.overlapping(range).next() {
            return Err(Held { seq: *seq, bracket });
        }
        Ok(Ticket(self.tickets.open(&mut self.numbers, range)))
    }

    /// A fault ends: if this is `Ok`, what the source said may be granted. Follows
    /// `mmu_interval_read_retry`; call it, and put the grant on the session's stream, under the one
    /// lock that the events of this address space take to start.
    ///
    /// # Errors
    /// [`Spoiled`] when an overlapping event has started since the ticket was opened, whether or not
    /// it has ended.
    pub fn commit(&mut self, ticket: Ticket) -> Result<(), Spoiled> {
        if self.tickets.end(ticket.0) { Ok(()) } else { Err(Spoiled) }
    }

    /// A fault is given up: the device went away, or the source had nothing to grant.
    pub fn cancel(&mut self, ticket: Ticket) {
        self.tickets.end(ticket.0);
    }

    /// The sequence of the last event that started. A subscriber that joins reads it after it is
    /// published (JoinCovers).
    #[must_use]
    pub const fn last_seq(&self) -> Option<Seq> {
        self.last
    }

    /// How many brackets are open.
    #[must_use]
    pub fn open_brackets(&self) -> usize {
        self.by_seq.len()
    }

    /// How many tickets could still be committed; a spoiled one is not counted.
    #[must_use]
    pub const fn open_tickets(&self) -> usize {
        self.tickets.len()
    }

    /// The open brackets, oldest first.
    pub fn brackets(&self) -> impl Iterator<Item = (Seq, AddrRange)> {
        self.by_seq.iter().map(|(seq, range)| (*seq, *range))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt::Write as _;

    fn pages(first: u64, end: u64) -> AddrRange {
        AddrRange::new(first << 12, end << 12).unwrap()
    }

    #[test]
    fn a_restored_gate_goes_on_with_the_brackets_and_the_numbers_that_it_had() {
        let mut before = GrantGate::default();
        let open = before.start(pages(0, 4));
        let ended = before.start(pages(8, 9));
        before.end(ended).unwrap();
        let mut gate = GrantGate::restored(before.last_seq(), before.brackets());
        assert!(gate.open_ticket(pages(3, 4)).is_err(), "its bracket is still open");
        assert_eq!(gate.start(pages(20, 21)), ended.next());
        assert_eq!(gate.end(ended), Err(UnknownBracket { seq: ended }));
        assert_eq!(gate.end(open), Ok(pages(0, 4)));
        assert!(gate.open_ticket(pages(3, 4)).is_ok());
    }

    /// Invariant 3, first half: nothing is granted between a start and its end.
    #[test]
    fn no_grant_in_window() {
        let mut gate = GrantGate::default();
        let seq = gate.start(pages(4, 8));
        let bracket = pages(4, 8);
        assert_eq!(gate.open_ticket(pages(7, 9)).unwrap_err(), Held { seq, bracket });
        let beside = gate.open_ticket(pages(8, 9)).unwrap();
        assert_eq!(gate.commit(beside), Ok(()), "what does not overlap is not held");
        gate.end(seq).unwrap();
        let after = gate.open_ticket(pages(7, 9)).unwrap();
        assert_eq!(gate.commit(after), Ok(()));
    }

    /// Invariant 3, second half: what was computed before a start is not granted after it.
    #[test]
    fn a_grant_computed_before_a_start_is_refused_during_the_bracket_and_after_it() {
        for ended_first in [false, true] {
            let mut gate = GrantGate::default();
            let ticket = gate.open_ticket(pages(0, 1)).unwrap();
            let seq = gate.start(pages(0, 1));
            if ended_first {
                gate.end(seq).unwrap();
            }
            assert_eq!(gate.commit(ticket), Err(Spoiled));
        }
    }

    /// Trap 11: the device is flushed and faults again before the source has unmapped.
    #[test]
    fn a_fault_between_flush_and_unmap_is_held() {
        let mut gate = GrantGate::default();
        let unmap = gate.start(pages(0, 4));
        // Every device has flushed and acked by now; the source still shows the old translation.
        assert!(gate.open_ticket(pages(2, 3)).is_err());
        gate.end(unmap).unwrap();
        assert!(gate.open_ticket(pages(2, 3)).is_ok());
    }

    /// Trap 14: a move invalidates the old and the new place, and neither may be granted meanwhile.
    #[test]
    fn a_move_holds_the_old_and_the_new_place_until_both_have_ended() {
        let mut gate = GrantGate::default();
        let at_new = gate.open_ticket(pages(100, 104)).unwrap();
        let (old, new) = (gate.start(pages(0, 4)), gate.start(pages(100, 104)));
        assert_eq!(gate.commit(at_new), Err(Spoiled));
        assert!(gate.is_held(pages(0, 1)) && gate.is_held(pages(103, 105)));
        gate.end(old).unwrap();
        assert!(!gate.is_held(pages(0, 1)) && gate.is_held(pages(103, 105)));
        gate.end(new).unwrap();
        assert!(!gate.is_held(AddrRange::ALL));
    }

    /// Invariant 7.
    #[test]
    fn pairing() {
        let mut gate = GrantGate::default();
        let (outer, inner, same) =
            (gate.start(pages(0, 9)), gate.start(pages(2, 3)), gate.start(pages(2, 3)));
        assert_eq!(
            gate.brackets().collect::<Vec<_>>(),
            [(outer, pages(0, 9)), (inner, pages(2, 3)), (same, pages(2, 3))]
        );
        assert_eq!(gate.end(outer), Ok(pages(0, 9)), "in any order");
        assert_eq!(gate.end(outer), Err(UnknownBracket { seq: outer }), "one end a start");
        assert_eq!(gate.end(same), Ok(pages(2, 3)));
        assert!(gate.is_held(pages(2, 3)), "each start has an end of its own");
        assert_eq!(gate.end(inner), Ok(pages(2, 3)));
        let never = same.next();
        assert_eq!(gate.end(never), Err(UnknownBracket { seq: never }));
        assert_eq!((gate.open_brackets(), gate.last_seq()), (0, Some(same)));
    }

    #[test]
    fn sequences_count_from_the_first_without_a_gap_and_nothing_yet_is_none() {
        let mut gate = GrantGate::default();
        assert_eq!(gate.last_seq(), None);
        let seqs: Vec<u64> = (0..4).map(|at| gate.start(pages(at, at + 1)).get()).collect();
        assert_eq!(seqs, [1, 2, 3, 4]);
    }

    #[test]
    fn change_pte_holds_only_while_its_bracket_is_alone_over_the_whole_page() {
        let mut gate = GrantGate::default();
        let own = gate.start(pages(0, 4));
        assert!(gate.sole_over(own, pages(1, 2)));
        assert!(!gate.sole_over(own, pages(3, 5)), "its bracket covers a part of the page only");
        assert!(!gate.sole_over(own.next(), pages(1, 2)), "an event that never started");
        let other = gate.start(pages(1, 2));
        assert!(!gate.sole_over(own, pages(1, 2)) && !gate.sole_over(other, pages(1, 2)));
        assert!(gate.sole_over(own, pages(2, 3)), "the other one is elsewhere");
        gate.end(own).unwrap();
        assert!(gate.sole_over(other, pages(1, 2)) && !gate.sole_over(own, pages(2, 3)));
    }

    #[test]
    fn the_top_of_the_address_space_is_held_like_any_other_page() {
        let top = AddrRange::new(u64::MAX - 4095, 0).unwrap();
        let mut gate = GrantGate::default();
        let ticket = gate.open_ticket(top).unwrap();
        let release = gate.start(AddrRange::ALL);
        assert!(gate.is_held(top) && gate.sole_over(release, top));
        assert_eq!(gate.commit(ticket), Err(Spoiled));
    }

    #[test]
    fn a_spoiled_ticket_costs_nothing_and_a_lost_one_ends_with_the_next_event_over_it() {
        let mut gate = GrantGate::default();
        let lost = gate.open_ticket(pages(0, 1)).unwrap();
        let kept = gate.open_ticket(pages(1, 2)).unwrap();
        drop(lost);
        assert_eq!(gate.open_tickets(), 2);
        let _ = gate.start(pages(0, 1));
        assert_eq!(gate.open_tickets(), 1);
        gate.cancel(kept);
        assert_eq!(gate.open_tickets(), 0);
    }

    #[test]
    fn a_hundred_thousand_brackets_are_open_at_once_and_all_end() {
        let mut gate = GrantGate::default();
        let seqs: Vec<Seq> = (0..100_000).map(|at| gate.start(pages(2 * at, 2 * at + 1))).collect();
        assert_eq!(gate.open_brackets(), 100_000);
        assert!(gate.is_held(pages(199_998, 199_999)) && !gate.is_held(pages(199_997, 199_998)));
        let granted = gate.open_ticket(pages(99_999, 100_000)).unwrap();
        assert_eq!(gate.commit(granted), Ok(()));
        for seq in seqs {
            gate.end(seq).unwrap();
        }
        assert!(!gate.is_held(AddrRange::ALL));
    }

    /// How page 0 stands, with a ticket and an event over it.
    struct Scene {
        gate: GrantGate,
        ticket: Option<Ticket>,
        seq: Option<Seq>,
    }

    fn scene(state: &str) -> Scene {
        let mut gate = GrantGate::default();
        let (mut ticket, mut seq) = (None, None);
        for step in state.split(", ") {
            match step {
                "nothing" => {}
                "ticket" => ticket = gate.open_ticket(pages(0, 1)).ok(),
                "start" => seq = Some(gate.start(pages(0, 1))),
                "start elsewhere" => seq = Some(gate.start(pages(5, 6))),
                "second start" => _ = gate.start(AddrRange::ALL),
                "end" => _ = gate.end(seq.unwrap()).unwrap(),
                other => panic!("{other} is not a step"),
            }
        }
        Scene { gate, ticket, seq }
    }

    fn apply(event: &str, Scene { gate, ticket, seq }: &mut Scene) -> String {
        let name = |seq: Option<Seq>| seq.unwrap_or(Seq::FIRST);
        match event {
            "start" => format!("seq {}", gate.start(pages(0, 1))),
            "start elsewhere" => format!("seq {}", gate.start(pages(5, 6))),
            "end" => gate.end(name(*seq)).map_or_else(|e| e.to_string(), |range| format!("ended {range}")),
            "sole_over" => gate.sole_over(name(*seq), pages(0, 1)).to_string(),
            "is_held" => gate.is_held(pages(0, 1)).to_string(),
            "open_ticket" => match gate.open_ticket(pages(0, 1)) {
                Ok(_) => "opened".into(),
                Err(held) => format!("Held by {}", held.seq),
            },
            "commit" => ticket.take().map_or("-".into(), |ticket| format!("{:?}", gate.commit(ticket))),
            "cancel" => ticket.take().map_or("-".into(), |ticket| format!("{:?}", gate.cancel(ticket))),
            other => panic!("{other} is not an event"),
        }
    }

    const STATES: [&str; 9] = [
        "nothing",
        "ticket",
        "start",
        "start elsewhere",
        "start, second start",
        "ticket, start",
        "ticket, start elsewhere",
        "ticket, start, end",
        "start, end, ticket",
    ];

    const EVENTS: [&str; 8] =
        ["start", "start elsewhere", "end", "sole_over", "is_held", "open_ticket", "commit", "cancel"];

    #[test]
    fn every_event_in_every_state() {
        let mut table = String::from("state -> event: outcome (brackets, tickets, last sequence after it)\n");
        for state in STATES {
            writeln!(table, "\n{state}").unwrap();
            for event in EVENTS {
                let mut scene = scene(state);
                let outcome = apply(event, &mut scene);
                let gate = &scene.gate;
                let last = gate.last_seq().map_or("none".into(), |seq| seq.to_string());
                let after = format!("{} {} {last}", gate.open_brackets(), gate.open_tickets());
                writeln!(table, "  -> {event:<16}{outcome:<42}({after})").unwrap();
            }
        }
        insta::assert_snapshot!("gate_transitions", table);
    }
}
