//! The device's table against its definition: a list of every mapping there ever was, and of each use.
#![allow(clippy::unwrap_used, reason = "a test's helpers are tests, which clippy sees in a mod tests only")]

use proptest::prelude::*;
use shootdown_core::mapping::{CommitError, CommitTicket, MappingId, Mappings, RevocationId, UseError};
use shootdown_core::{Access, AddrRange, AddressSpaceId, FrameNumber, Scope, Translation};
use std::collections::BTreeSet;

const PAGES: u64 = 20;

#[derive(Clone, Copy, Debug)]
enum Step {
    Grant(u64, AddrRange),
    // The numbers below choose one of those that there are.
    Commit(usize),
    Cancel(usize),
    BeginUse(usize),
    EndUse(usize),
    Remove(usize),
    Notice(Scope),
    TakeYoung(Scope),
    Close,
    Reopen,
}

fn space(number: u64) -> AddressSpaceId {
    AddressSpaceId::new(number).unwrap()
}

fn any_range() -> impl Strategy<Value = AddrRange> {
    let range = |(first, count): (u64, u64)| AddrRange::new(first << 12, (first + count) << 12).unwrap();
    (0..PAGES - 4, 1..5_u64).prop_map(range)
}

fn any_scope() -> impl Strategy<Value = Scope> {
    prop_oneof![
        10 => (1..3_u64, any_range()).prop_map(|(number, range)| Scope::Range(space(number), range)),
        1 => (1..3_u64).prop_map(|number| Scope::Range(space(number), AddrRange::ALL)),
        1 => Just(Scope::FlushAll),
    ]
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (1..3_u64, any_range()).prop_map(|(number, range)| Step::Grant(number, range)),
        6 => any::<usize>().prop_map(Step::Commit),
        1 => any::<usize>().prop_map(Step::Cancel),
        8 => any::<usize>().prop_map(Step::BeginUse),
        6 => any::<usize>().prop_map(Step::EndUse),
        1 => any::<usize>().prop_map(Step::Remove),
        3 => any_scope().prop_map(Step::Notice),
        3 => any_scope().prop_map(Step::TakeYoung),
        1 => prop_oneof![Just(Step::Close), Just(Step::Reopen), Just(Step::Reopen)],
    ]
}

struct Held {
    id: MappingId,
    space: AddressSpaceId,
    translation: Translation,
    live: bool,
}

struct Granted {
    ticket: CommitTicket,
    space: AddressSpaceId,
    translation: Translation,
    spoiled: bool,
}

#[derive(Default)]
struct World {
    table: Mappings,
    closed: bool,
    granted: Vec<Granted>,
    /// Every mapping there ever was.
    held: Vec<Held>,
    /// Each open use: its own number, and the place of its mapping.
    uses: Vec<(usize, usize)>,
    next_use: usize,
    /// Each revocation with the numbers of the uses that it waits for, oldest first.
    waiting: Vec<(RevocationId, BTreeSet<usize>)>,
    /// Pages that were used and not reported: what a report must name.
    unreported: BTreeSet<(AddressSpaceId, u64)>,
    /// Places of mappings that were used and not asked for since: all that a report may name.
    young: BTreeSet<usize>,
}

fn pages_of(space: AddressSpaceId, range: AddrRange) -> impl Iterator<Item = (AddressSpaceId, u64)> {
    (range.start() >> 12..=range.last() >> 12).map(move |page| (space, page))
}

impl World {
    fn apply(&mut self, step: Step) {
        match step {
            Step::Grant(number, range) => self.grant(space(number), range),
            Step::Commit(at) if !self.granted.is_empty() => self.commit(at % self.granted.len()),
            Step::Cancel(at) if !self.granted.is_empty() => {
                let granted = self.granted.swap_remove(at % self.granted.len());
                self.table.cancel(granted.ticket);
            }
            Step::BeginUse(at) if !self.held.is_empty() => self.begin_use(at % self.held.len()),
            Step::EndUse(at) if !self.uses.is_empty() => self.end_use(at % self.uses.len()),
            Step::Remove(at) if !self.held.is_empty() => {
                let at = at % self.held.len();
                self.held[at].live = false;
                self.table.remove(self.held[at].id);
            }
            Step::Notice(scope) => self.notice(scope),
            Step::TakeYoung(scope) => self.take_young(scope),
            Step::Close => {
                let live: Vec<MappingId> =
                    self.held.iter().filter(|held| held.live).map(|held| held.id).collect();
                self.withdraw(Scope::FlushAll);
                self.closed = true;
                assert_eq!(self.table.close(), live);
            }
            Step::Reopen => {
                self.table.reopen();
                self.closed = false;
            }
            _ => {}
        }
        self.check();
    }

    fn grant(&mut self, space: AddressSpaceId, range: AddrRange) {
        let translation = Translation { range, frame: FrameNumber(0), access: Access::Read };
        match self.table.on_grant(space, translation) {
            Ok(ticket) => self.granted.push(Granted { ticket, space, translation, spoiled: false }),
            Err(_) => assert!(self.closed),
        }
    }

    fn commit(&mut self, at: usize) {
        let Granted { ticket, space, translation, spoiled } = self.granted.swap_remove(at);
        match self.table.commit(ticket) {
            Ok(id) => {
                assert!(!spoiled && !self.closed);
                assert!(self.held.last().is_none_or(|held| held.id < id), "ids ascend");
                self.held.push(Held { id, space, translation, live: true });
            }
            Err(CommitError::Closed) => assert!(self.closed),
            Err(CommitError::Spoiled) => assert!(spoiled && !self.closed),
        }
    }

    fn begin_use(&mut self, at: usize) {
        let held = &self.held[at];
        let expected = match (self.closed, held.live) {
            (true, _) => Err(UseError::Closed),
            (false, false) => Err(UseError::Revoked),
            (false, true) => Ok(held.translation),
        };
        assert_eq!(self.table.begin_use(held.id), expected);
        if expected.is_ok() {
            self.uses.push((self.next_use, at));
            self.next_use += 1;
            self.unreported.extend(pages_of(held.space, held.translation.range));
            self.young.insert(at);
        }
    }

    fn end_use(&mut self, at: usize) {
        let (number, mapping) = self.uses.swap_remove(at);
        let mut quiesced = Vec::new();
        self.waiting.retain_mut(|(id, waits_for)| {
            if waits_for.remove(&number) && waits_for.is_empty() {
                quiesced.push(*id);
            }
            !waits_for.is_empty()
        });
        assert_eq!(self.table.end_use(self.held[mapping].id), quiesced);
    }

    fn withdraw(&mut self, scope: Scope) {
        for granted in &mut self.granted {
            granted.spoiled |= scope.covers(granted.space, granted.translation.range);
        }
        for held in &mut self.held {
            held.live &= !scope.covers(held.space, held.translation.range);
        }
    }

    fn notice(&mut self, scope: Scope) {
        self.withdraw(scope);
        let covered = |at: usize| scope.covers(self.held[at].space, self.held[at].translation.range);
        let waits_for: BTreeSet<usize> =
            self.uses.iter().filter(|(_, at)| covered(*at)).map(|(number, _)| *number).collect();
        let revocation = self.table.on_notice(scope);
        assert_eq!(revocation.outstanding_uses, waits_for.len());
        if !waits_for.is_empty() {
            self.waiting.push((revocation.id, waits_for));
        }
    }

    fn take_young(&mut self, scope: Scope) {
        let reported: Vec<(AddressSpaceId, AddrRange)> = self.table.take_young(scope);
        assert!(reported.is_sorted(), "in order");
        let reported: BTreeSet<_> =
            reported.into_iter().flat_map(|(space, range)| pages_of(space, range)).collect();
        let asked = |(space, page): &(AddressSpaceId, u64)| {
            scope.covers(*space, AddrRange::new(page << 12, (page + 1) << 12).unwrap())
        };
        let missing: Vec<_> =
            self.unreported.iter().filter(|page| asked(page) && !reported.contains(page)).collect();
        assert_eq!(missing, [] as [&(AddressSpaceId, u64); 0], "under-reported");
        let of = |at: &usize| pages_of(self.held[*at].space, self.held[*at].translation.range);
        let may: BTreeSet<_> = self.young.iter().flat_map(of).collect();
        assert!(reported.is_subset(&may), "reported what nobody used, without need");
        self.unreported.retain(|page| !reported.contains(page));
        self.young.retain(|at| !scope.covers(self.held[*at].space, self.held[*at].translation.range));
        for (_, at) in &self.uses {
            self.unreported.extend(pages_of(self.held[*at].space, self.held[*at].translation.range));
            self.young.insert(*at);
        }
    }

    fn check(&self) {
        let live = self.held.iter().filter(|held| held.live).count();
        let draining: BTreeSet<usize> =
            self.uses.iter().map(|(_, at)| *at).filter(|at| !self.held[*at].live).collect();
        assert_eq!((self.table.len(), self.table.is_empty()), (live, live == 0));
        assert_eq!(self.table.draining(), draining.len());
        assert_eq!(self.table.tickets(), self.granted.iter().filter(|granted| !granted.spoiled).count());
        assert_eq!((self.table.uses(), self.table.unquiesced()), (self.uses.len(), self.waiting.len()));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Invariants 2, 3 and 20 at the device, on random histories.
    #[test]
    fn the_table_answers_as_a_list_of_all_mappings_and_uses(steps in prop::collection::vec(any_step(), 0..160)) {
        let mut world = World::default();
        for step in steps {
            world.apply(step);
        }
        while !world.granted.is_empty() {
            world.apply(Step::Cancel(0));
        }
        while !world.uses.is_empty() {
            world.apply(Step::EndUse(0));
        }
        world.apply(Step::Notice(Scope::FlushAll));
        world.apply(Step::TakeYoung(Scope::FlushAll));
        prop_assert!(world.unreported.is_empty());
        prop_assert!(world.waiting.is_empty());
        prop_assert_eq!(world.table.draining() + world.table.len(), 0);
    }
}
