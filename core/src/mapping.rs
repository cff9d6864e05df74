//! [5 of 9] What a device holds: the table that the SDK asks before every use of a translation.
//!
//! ```text
//!   grant arrives                                      begin_use / end_use
//!   on_grant() --> commit ticket --- commit() -------> Live (uses: 0, 1, 2 ...)
//!                     |    |                            |
//!    notice overlaps  |    | cancel()    remove(), or   | notice overlaps, or close()
//!                     v    |                            v
//!                  spoiled |              uses > 0: Draining --- last end_use ---> forgotten
//!                     |    |              uses = 0: -------------------------------> forgotten
//!                     v    v
//!                    forgotten
//! ```
//!
//! The kernel's twin is a driver's page table under its own lock: `mmu_interval_read_retry` refuses a
//! commit, `mmu_interval_notifier_ops.invalidate` takes mappings away and waits for the device.

use crate::event::Translation;
use crate::id::AddressSpaceId;
use crate::interval::IntervalMap;
use crate::notice::Scope;
use crate::range::AddrRange;
use crate::ticket::{self, TicketNumbers, Tickets};
use std::collections::BTreeMap;
use std::num::NonZeroU64;

/// The translations that a device holds, and the uses that are open on them.
///
/// The SDK keeps it under one mutex, hands it grants and notices in the order of the stream, and acks a
/// notice when its revocation is quiesced: no use of anything that it overlaps is open any more
/// (AckMeansStopped). A device that works out of order is right because its commit, under that mutex,
/// fails when an overlapping notice has overtaken it.
///
/// The price: every use is two calls, O(log n) each. State is proportional to live mappings, open
/// tickets, open uses, and revocations that wait for open uses, whose number the session's window
/// bounds; besides that, at most 64 ranges an address space that were used and not reported yet.
#[derive(Default, Debug)]
pub struct Mappings {
    door: Door,
    spaces: BTreeMap<AddressSpaceId, Space>,
    /// Live and draining.
    mappings: BTreeMap<MappingId, Mapping>,
    /// For each revocation that is not quiesced, how many draining mappings it waits for.
    waiting: BTreeMap<RevocationId, usize>,
    live: usize,
    uses: usize,
    last_mapping: u64,
    last_revocation: u64,
    /// One row for all address spaces: a space that is forgotten and comes back must not use a number
    /// twice.
    numbers: TicketNumbers,
}

/// Whether anything new may begin.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
enum Door {
    #[default]
    Open,
    Closed,
}

/// What is held of one address space.
#[derive(Default, Debug)]
struct Space {
    /// Live and draining mappings.
    held: IntervalMap<MappingId, ()>,
    tickets: Tickets,
    unreported: Unreported,
}

#[derive(Debug)]
struct Mapping {
    address_space: AddressSpaceId,
    translation: Translation,
    stage: Stage,
    uses: usize,
    /// Used since the last report.
    young: bool,
    /// The revocations that wait for its last use to end.
    blocks: Vec<RevocationId>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    /// Uses may begin.
    Live,
    /// Withdrawn while a use was open: none begins any more, and the last to end forgets it.
    Draining,
}

/// A translation that a device holds. Never used twice, over a [`Mappings::reopen`] neither.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct MappingId(NonZeroU64);

/// What one notice took away. Never used twice.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RevocationId(NonZeroU64);

/// A notice has been applied: no use of what it overlaps begins any more.
#[must_use = "the notice may be acked when no use is outstanding, not before"]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Revocation {
    /// What [`Mappings::end_use`] calls it when the last of its uses has ended.
    pub id: RevocationId,
    /// Uses that were open when the notice came. 0: it is quiesced already, and no call will name it.
    pub outstanding_uses: usize,
}

/// Leave to install a translation that was granted, unless an overlapping notice comes first. Give it
/// back by [`Mappings::commit`] or [`Mappings::cancel`]; one that is lost occupies a node until a
/// notice overlaps it.
#[must_use = "a ticket is committed or cancelled"]
#[derive(Debug)]
pub struct CommitTicket {
    ticket: ticket::Ticket,
    address_space: AddressSpaceId,
    translation: Translation,
}

/// The session is lost: nothing may be installed or used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the session is closed")]
pub struct Closed;

/// Why a granted translation was not installed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CommitError {
    /// Ask for a new grant.
    #[error("an overlapping notice came after the grant")]
    Spoiled,
    /// The session is lost.
    #[error("the session is closed")]
    Closed,
}

/// Why a use was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UseError {
    /// A notice withdrew the mapping, or the device removed it. Ask for a new grant.
    #[error("the mapping was withdrawn")]
    Revoked,
    /// The session is lost.
    #[error("the session is closed")]
    Closed,
    /// This table never issued the id.
    #[error("there never was such a mapping")]
    Unknown,
}

impl Mappings {
    /// The table of a device that holds nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A grant arrives: called where the stream is read, before the next message is, so that the order
    /// of grants and notices is the stream's.
    ///
    /// # Errors
    /// [`Closed`] when the session is lost.
    pub fn on_grant(
        &mut self,
        address_space: AddressSpaceId,
        translation: Translation,
    ) -> Result<CommitTicket, Closed> {
        if self.door == Door::Closed {
            return Err(Closed);
        }
        let space = self.spaces.entry(address_space).or_default();
        let ticket = space.tickets.open(&mut self.numbers, translation.range);
        Ok(CommitTicket { ticket, address_space, translation })
    }

    /// The device installs what was granted: called under the lock that its TLB is filled under.
    /// Follows `mmu_interval_read_retry`.
    ///
    /// # Errors
    /// [`CommitError::Spoiled`] when an overlapping notice came after the grant, [`CommitError::Closed`]
    /// when the session is lost. Nothing is installed then.
    pub fn commit(&mut self, ticket: CommitTicket) -> Result<MappingId, CommitError> {
        let CommitTicket { ticket, address_space, translation } = ticket;
        if self.door == Door::Closed {
            return Err(CommitError::Closed);
        }
        // No space, no ticket: whatever took the last of its tickets out forgot the space.
        let space = self.spaces.get_mut(&address_space).ok_or(CommitError::Spoiled)?;
        if !space.tickets.end(ticket) {
            return Err(CommitError::Spoiled);
        }
        let id = MappingId(next_number(&mut self.last_mapping));
        space.held.set(translation.range, id, ());
        let (stage, uses, young, blocks) = (Stage::Live, 0, false, Vec::new());
        self.mappings.insert(id, Mapping { address_space, translation, stage, uses, young, blocks });
        self.live += 1;
        Ok(id)
    }

    /// The device does not want what was granted.
    pub fn cancel(&mut self, ticket: CommitTicket) {
        if let Some(space) = self.spaces.get_mut(&ticket.address_space) {
            space.tickets.end(ticket.ticket);
            self.forget_space_if_empty(ticket.address_space);
        }
    }

    /// A use begins: a DMA, a kernel launch, whatever reads or writes through the translation. It makes
    /// the mapping young. Exactly one [`Mappings::end_use`] must follow.
    ///
    /// # Errors
    /// [`UseError`] when the translation must not be used. No use has begun then.
    pub fn begin_use(&mut self, id: MappingId) -> Result<Translation, UseError> {
        if self.door == Door::Closed {
            return Err(UseError::Closed);
        }
        match self.mappings.get_mut(&id) {
            Some(mapping) if mapping.stage == Stage::Live => {
                mapping.uses += 1;
                mapping.young = true;
                self.uses += 1;
                Ok(mapping.translation)
            }
            None if id.0.get() > self.last_mapping => Err(UseError::Unknown),
            Some(_) | None => Err(UseError::Revoked),
        }
    }

    /// A use ends; the revocations that are quiesced by it, oldest first. An id without an open use
    /// changes nothing.
    pub fn end_use(&mut self, id: MappingId) -> Vec<RevocationId> {
        let Some(mapping) = self.mappings.get_mut(&id) else { return Vec::new() };
        if mapping.uses == 0 {
            return Vec::new();
        }
        mapping.uses -= 1;
        self.uses -= 1;
        if mapping.stage == Stage::Live || mapping.uses > 0 {
            return Vec::new();
        }
        let mut quiesced = self.forget(id);
        quiesced.retain(|revocation| {
            let left =
                self.waiting.get_mut(revocation).expect("a revocation waits for each mapping that blocks it");
            *left -= 1;
            *left == 0
        });
        for revocation in &quiesced {
            self.waiting.remove(revocation);
        }
        quiesced
    }

    /// The device drops its translation. No use begins any more; a notice that overlaps still waits for
    /// those that are open.
    pub fn remove(&mut self, id: MappingId) {
        self.withdraw(id);
    }

    /// A notice arrives that asks for a flush. Every mapping that it overlaps is withdrawn and every
    /// ticket spoiled; uses that are open are waited for, of mappings too that were withdrawn before.
    /// Follows `mmu_interval_notifier_ops.invalidate`.
    ///
    /// Report the young ranges ([`Mappings::take_young`]) and ack the notice once it is quiesced. A notice
    /// that asks for no flush (ClearYoung, RangeEnd) takes nothing away and does not come here.
    pub fn on_notice(&mut self, scope: Scope) -> Revocation {
        let id = RevocationId(next_number(&mut self.last_revocation));
        let draining = self.withdraw_scope(scope);
        let mut outstanding_uses = 0;
        for blocker in &draining {
            let mapping =
                self.mappings.get_mut(blocker).expect("a draining mapping is kept until its last use");
            mapping.blocks.push(id);
            outstanding_uses += mapping.uses;
        }
        if !draining.is_empty() {
            self.waiting.insert(id, draining.len());
        }
        Revocation { id, outstanding_uses }
    }

    /// What was used since it was last reported, in the order of address spaces and addresses, with
    /// neighbours in one range; from now on it counts as reported. Follows `clear_young`.
    ///
    /// Each range is told whole, beyond the ends of `scope` too, because it is told only once: a
    /// receiver that kept no more than `scope` would lose the rest. A mapping with an open use stays
    /// young, for nobody knows when that use touches memory. Ranges of mappings that are forgotten may
    /// come with the gaps between them, never without a part of them (YoungIsConservative).
    #[must_use = "what is not reported is lost"]
    pub fn take_young(&mut self, scope: Scope) -> Vec<(AddressSpaceId, AddrRange)> {
        let mut young = Vec::new();
        for (address_space, range) in self.parts(scope) {
            let Some(space) = self.spaces.get_mut(&address_space) else { continue };
            let mut ranges = space.unreported.take(range);
            for (held, id, ()) in space.held.overlapping(range) {
                let mapping = self.mappings.get_mut(id).expect("what a space holds is a mapping");
                if mapping.young {
                    mapping.young = mapping.uses > 0;
                    ranges.push(held);
                }
            }
            ranges.sort_unstable();
            ranges.dedup_by(|next, so_far| {
                let touches = so_far.touches(*next);
                if touches {
                    *so_far = so_far.hull(*next);
                }
                touches
            });
            young.extend(ranges.into_iter().map(|range| (address_space, range)));
            self.forget_space_if_empty(address_space);
        }
        young
    }

    /// The session is lost. Fail closed: every mapping is withdrawn, every ticket spoiled, and nothing
    /// begins until [`Mappings::reopen`]. Open uses may still end; [`Mappings::uses`] says when the last
    /// has. The mappings that were live, oldest first.
    pub fn close(&mut self) -> Vec<MappingId> {
        self.door = Door::Closed;
        let live = |(id, mapping): (&MappingId, &Mapping)| (mapping.stage == Stage::Live).then_some(*id);
        let live: Vec<MappingId> = self.mappings.iter().filter_map(live).collect();
        self.withdraw_scope(Scope::FlushAll);
        live
    }

    /// A new session begins, on the same device: grants may arrive again. Ids and tickets of the lost
    /// session stay refused, and its open uses are waited for by the notices of the new one.
    pub fn reopen(&mut self) {
        self.door = Door::Open;
    }

    /// How many mappings may be used.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.live
    }

    /// Whether no mapping may be used.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.live == 0
    }

    /// How many mappings are withdrawn and wait for an open use to end.
    #[must_use]
    pub fn draining(&self) -> usize {
        self.mappings.len() - self.live
    }

    /// How many tickets could still be committed; a spoiled one is not counted.
    #[must_use]
    pub fn tickets(&self) -> usize {
        self.spaces.values().map(|space| space.tickets.len()).sum()
    }

    /// How many uses are open.
    #[must_use]
    pub const fn uses(&self) -> usize {
        self.uses
    }

    /// How many revocations wait for an open use to end.
    #[must_use]
    pub fn unquiesced(&self) -> usize {
        self.waiting.len()
    }

    /// Spoils the tickets and withdraws the mappings; those that overlap and have an open use.
    fn withdraw_scope(&mut self, scope: Scope) -> Vec<MappingId> {
        let mut overlapping = Vec::new();
        for (address_space, range) in self.parts(scope) {
            let Some(space) = self.spaces.get_mut(&address_space) else { continue };
            space.tickets.spoil(range);
            overlapping.extend(space.held.overlapping(range).map(|(_, id, ())| *id));
            self.forget_space_if_empty(address_space);
        }
        overlapping.retain(|id| {
            self.withdraw(*id);
            self.mappings.contains_key(id)
        });
        overlapping
    }

    fn withdraw(&mut self, id: MappingId) {
        let Some(mapping) = self.mappings.get_mut(&id) else { return };
        if mapping.stage == Stage::Draining {
            return;
        }
        mapping.stage = Stage::Draining;
        self.live -= 1;
        if mapping.uses == 0 {
            self.forget(id);
        }
    }

    /// Forgets a withdrawn mapping without an open use; the revocations that waited for it.
    fn forget(&mut self, id: MappingId) -> Vec<RevocationId> {
        let mapping = self.mappings.remove(&id).expect("a mapping is forgotten once");
        let space =
            self.spaces.get_mut(&mapping.address_space).expect("a space that holds something is kept");
        space.held.take(mapping.translation.range, &id);
        if mapping.young {
            space.unreported.add(mapping.translation.range);
        }
        self.forget_space_if_empty(mapping.address_space);
        mapping.blocks
    }

    fn forget_space_if_empty(&mut self, address_space: AddressSpaceId) {
        if self.spaces.get(&address_space).is_some_and(Space::is_empty) {
            self.spaces.remove(&address_space);
        }
    }

    /// What a scope means here: of each address space a range.
    fn parts(&self, scope: Scope) -> Vec<(AddressSpaceId, AddrRange)> {
        match scope {
            Scope::Range(address_space, range) => vec![(address_space, range)],
            Scope::FlushAll => self.spaces.keys().map(|id| (*id, AddrRange::ALL)).collect(),
        }
    }
}

impl Space {
    fn is_empty(&self) -> bool {
        self.held.is_empty() && self.tickets.is_empty() && self.unreported.ranges.is_empty()
    }
}

fn next_number(last: &mut u64) -> NonZeroU64 {
    *last += 1;
    NonZeroU64::new(*last).expect("a number after 0 is not 0")
}

/// What was used through mappings that are forgotten, and is not reported yet: ascending, disjoint,
/// no two side by side. Bounded: beyond [`UNREPORTED_MAX`] the two that lie closest become one with
/// the gap between them, which over-reports.
#[derive(Default, Debug)]
struct Unreported {
    ranges: Vec<AddrRange>,
}

/// Ranges an address space. Every ack takes what it overlaps, so more gather only where a device acks
/// nothing for long; 64 of them are one KiB.
const UNREPORTED_MAX: usize = 64;

impl Unreported {
    fn add(&mut self, range: AddrRange) {
        let mut wide = range;
        // In one pass: what one of them adds at the low end touches none of those before it.
        self.ranges.retain(|known| {
            let apart = !known.touches(wide);
            if !apart {
                wide = wide.hull(*known);
            }
            apart
        });
        let at = self.ranges.partition_point(|known| known.start() < wide.start());
        self.ranges.insert(at, wide);
        if self.ranges.len() > UNREPORTED_MAX {
            self.merge_closest();
        }
    }

    fn merge_closest(&mut self) {
        let gap = |at: &usize| self.ranges[*at].start() - self.ranges[*at - 1].last();
        if let Some(closest) = (1..self.ranges.len()).min_by_key(gap) {
            let high = self.ranges.remove(closest);
            self.ranges[closest - 1] = self.ranges[closest - 1].hull(high);
        }
    }

    /// Takes those that overlap, whole.
    fn take(&mut self, range: AddrRange) -> Vec<AddrRange> {
        self.ranges.extract_if(.., |known| known.overlaps(range)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Access;
    use crate::id::FrameNumber;
    use std::fmt::Write as _;

    fn space(number: u64) -> AddressSpaceId {
        AddressSpaceId::new(number).unwrap()
    }

    fn pages(first: u64, end: u64) -> AddrRange {
        AddrRange::new(first << 12, end << 12).unwrap()
    }

    fn translation(range: AddrRange) -> Translation {
        Translation { range, frame: FrameNumber(range.start() >> 12), access: Access::Write }
    }

    fn over(first: u64, end: u64) -> Scope {
        Scope::Range(AddressSpaceId::FIRST, pages(first, end))
    }

    fn grant(table: &mut Mappings, first: u64, end: u64) -> CommitTicket {
        table.on_grant(AddressSpaceId::FIRST, translation(pages(first, end))).unwrap()
    }

    fn hold(table: &mut Mappings, first: u64, end: u64) -> MappingId {
        let ticket = grant(table, first, end);
        table.commit(ticket).unwrap()
    }

    /// Whether everything but the counters is gone.
    fn is_bare(table: &Mappings) -> bool {
        let Mappings { spaces, mappings, waiting, live, uses, .. } = table;
        spaces.is_empty() && mappings.is_empty() && waiting.is_empty() && (*live, *uses) == (0, 0)
    }

    /// Invariant 2, as far as the table goes: a notice is not quiesced before the last use has ended.
    #[test]
    fn ack_means_stopped() {
        let mut table = Mappings::new();
        let (wide, near, far) = (hold(&mut table, 0, 8), hold(&mut table, 2, 3), hold(&mut table, 20, 21));
        for id in [wide, wide, near, far] {
            table.begin_use(id).unwrap();
        }
        let notice = table.on_notice(over(2, 3));
        assert_eq!(notice.outstanding_uses, 3);
        assert_eq!(table.begin_use(wide), Err(UseError::Revoked), "no use begins after the notice");
        assert_eq!(table.end_use(wide), []);
        assert_eq!(table.end_use(far), [], "what it does not overlap does not count");
        assert_eq!(table.end_use(near), []);
        assert_eq!(table.end_use(wide), [notice.id]);
        assert_eq!((table.len(), table.draining(), table.unquiesced()), (1, 0, 0));
    }

    #[test]
    fn a_second_notice_waits_for_the_uses_that_the_first_one_found() {
        let mut table = Mappings::new();
        let id = hold(&mut table, 0, 4);
        table.begin_use(id).unwrap();
        let (first, second) = (table.on_notice(over(0, 1)), table.on_notice(over(3, 4)));
        assert_eq!((first.outstanding_uses, second.outstanding_uses), (1, 1));
        assert_eq!(table.on_notice(over(8, 9)).outstanding_uses, 0);
        assert_eq!(table.end_use(id), [first.id, second.id]);
    }

    #[test]
    fn a_notice_waits_for_the_open_uses_of_what_the_device_has_removed() {
        let mut table = Mappings::new();
        let id = hold(&mut table, 0, 1);
        table.begin_use(id).unwrap();
        table.remove(id);
        table.remove(id);
        assert_eq!((table.len(), table.begin_use(id)), (0, Err(UseError::Revoked)));
        let notice = table.on_notice(over(0, 1));
        assert_eq!(notice.outstanding_uses, 1);
        assert_eq!(table.end_use(id), [notice.id]);
    }

    /// Invariant 3 at the device: a grant that a notice has overtaken is not installed.
    #[test]
    fn no_grant_in_window() {
        let mut table = Mappings::new();
        let (hit, beside) = (grant(&mut table, 0, 4), grant(&mut table, 4, 5));
        let elsewhere = table.on_grant(space(2), translation(pages(0, 4))).unwrap();
        let _ = table.on_notice(over(3, 4));
        assert_eq!(table.commit(hit), Err(CommitError::Spoiled));
        assert!(table.commit(beside).is_ok());
        assert!(table.commit(elsewhere).is_ok(), "another address space");
        let after = grant(&mut table, 0, 4);
        assert!(table.commit(after).is_ok(), "a grant that came after the notice");
    }

    /// Trap 10: the making and the unmaking of a mapping, with a notice at each step.
    #[test]
    fn a_notice_at_each_step_of_create_and_destroy_leaves_nothing_usable() {
        for notice_at in 0..6 {
            let mut table = Mappings::new();
            let mut notices = Vec::new();
            let mut notice_if = |step, table: &mut Mappings| {
                if step == notice_at {
                    notices.push(table.on_notice(over(0, 1)));
                }
            };
            notice_if(0, &mut table);
            let ticket = grant(&mut table, 0, 1);
            notice_if(1, &mut table);
            let mapping = table.commit(ticket);
            assert_eq!(mapping.is_err(), notice_at == 1);
            notice_if(2, &mut table);
            let mut quiesced = Vec::new();
            if let Ok(id) = mapping {
                assert_eq!(table.begin_use(id).is_err(), notice_at == 2);
                notice_if(3, &mut table);
                table.remove(id);
                notice_if(4, &mut table);
                quiesced = table.end_use(id);
                assert_eq!(table.begin_use(id), Err(UseError::Revoked));
            }
            notice_if(5, &mut table);
            let waited: Vec<_> = notices.iter().filter(|n| n.outstanding_uses > 0).map(|n| n.id).collect();
            assert_eq!(waited.len(), usize::from(matches!(notice_at, 3 | 4)), "step {notice_at}");
            assert_eq!(quiesced, waited, "step {notice_at}");
            let _ = table.take_young(Scope::FlushAll);
            assert!(is_bare(&table), "step {notice_at}: {table:?}");
        }
    }

    /// Trap 12: what the device held before a session was lost is refused in the next one.
    #[test]
    fn ids_and_tickets_of_a_lost_session_stay_refused_after_reopening() {
        let mut table = Mappings::new();
        let (idle, busy) = (hold(&mut table, 0, 1), hold(&mut table, 1, 2));
        let pending = grant(&mut table, 0, 1);
        table.begin_use(busy).unwrap();
        assert_eq!(table.close(), [idle, busy]);
        assert_eq!(table.close(), [], "once");
        assert_eq!(table.begin_use(idle), Err(UseError::Closed));
        assert_eq!(table.on_grant(space(1), translation(pages(0, 1))).unwrap_err(), Closed);
        table.reopen();
        assert_eq!(
            (table.begin_use(idle), table.begin_use(busy)),
            (Err(UseError::Revoked), Err(UseError::Revoked))
        );
        let fresh = grant(&mut table, 0, 1);
        assert_eq!(table.commit(pending), Err(CommitError::Spoiled));
        assert!(table.commit(fresh).is_ok_and(|id| id > busy));
        let notice = table.on_notice(Scope::FlushAll);
        assert_eq!(notice.outstanding_uses, 1, "the old session's use is still waited for");
        assert_eq!(table.end_use(busy), [notice.id]);
    }

    #[test]
    fn a_spoiled_ticket_does_not_come_back_to_life_when_its_address_space_is_forgotten() {
        let mut table = Mappings::new();
        let old = grant(&mut table, 0, 1);
        let _ = table.on_notice(over(0, 1));
        assert!(is_bare(&table));
        let new = grant(&mut table, 0, 1);
        assert_eq!(table.commit(old), Err(CommitError::Spoiled));
        assert!(table.commit(new).is_ok());
    }

    /// Invariant 20.
    #[test]
    fn young_is_conservative() {
        let mut table = Mappings::new();
        let (used, unused) = (hold(&mut table, 0, 1), hold(&mut table, 4, 5));
        table.begin_use(used).unwrap();
        let young = [(space(1), pages(0, 1))];
        assert_eq!(table.take_young(Scope::FlushAll), young);
        assert_eq!(table.take_young(Scope::FlushAll), young, "an open use may touch memory at any time");
        assert_eq!(table.end_use(used), []);
        assert_eq!(table.take_young(over(1, 9)), [], "elsewhere");
        assert_eq!(table.take_young(over(0, 1)), young, "once more, for what it did since");
        assert_eq!(table.take_young(Scope::FlushAll), [], "and then no more");
        assert_eq!(table.begin_use(unused).map(|t| t.range), Ok(pages(4, 5)));
    }

    #[test]
    fn what_was_revoked_or_removed_while_young_is_reported_once() {
        let mut table = Mappings::new();
        let (revoked, removed) = (hold(&mut table, 0, 1), hold(&mut table, 8, 9));
        for id in [revoked, removed] {
            table.begin_use(id).unwrap();
            table.end_use(id);
        }
        table.remove(removed);
        let _ = table.on_notice(over(0, 1));
        assert_eq!(table.take_young(Scope::FlushAll), [(space(1), pages(0, 1)), (space(1), pages(8, 9))]);
        assert_eq!(table.take_young(Scope::FlushAll), []);
        assert!(is_bare(&table));
    }

    #[test]
    fn a_huge_mapping_is_reported_whole_for_any_of_its_pages() {
        let mut table = Mappings::new();
        let huge = hold(&mut table, 512, 1024);
        table.begin_use(huge).unwrap();
        table.end_use(huge);
        assert_eq!(table.take_young(over(700, 701)), [(space(1), pages(512, 1024))]);
    }

    #[test]
    fn unreported_ranges_beyond_the_bound_are_merged_and_never_lost() {
        let mut unreported = Unreported::default();
        let scattered: Vec<AddrRange> =
            (0..1_000_u64).map(|at| (at * 7919) % 1_000 * 5).map(|at| pages(at, at + 2)).collect();
        for range in &scattered {
            unreported.add(*range);
            assert!(unreported.ranges.len() <= UNREPORTED_MAX);
            assert!(unreported.ranges.is_sorted_by(|low, high| low.last() + 1 < high.start()));
        }
        let kept = unreported.take(AddrRange::ALL);
        assert!(scattered.iter().all(|range| kept.iter().any(|wide| wide.contains(*range))));
        assert!(unreported.ranges.is_empty());
    }

    #[test]
    fn unreported_ranges_that_lie_closest_are_merged_first() {
        let mut unreported = Unreported::default();
        for at in 0..UNREPORTED_MAX as u64 {
            unreported.add(pages(at * 100, at * 100 + 1));
        }
        unreported.add(pages(3_003, 3_004));
        assert_eq!(unreported.take(pages(3_000, 3_001)), [pages(3_000, 3_004)]);
    }

    #[test]
    fn the_table_is_bare_after_many_mappings_came_and_went() {
        let mut table = Mappings::new();
        for at in 0..1_000 {
            let id = hold(&mut table, at, at + 1);
            table.begin_use(id).unwrap();
            let _ = table.on_notice(over(at, at + 1));
            assert_eq!(table.end_use(id).len(), 1);
            assert_eq!(table.end_use(id), [], "an end too many changes nothing");
            assert_eq!(table.take_young(over(at, at + 1)).len(), 1);
            assert!(is_bare(&table));
        }
        assert_eq!(table.begin_use(MappingId(NonZeroU64::new(1_001).unwrap())), Err(UseError::Unknown));
    }

    #[test]
    fn a_cancelled_ticket_leaves_nothing_behind() {
        let mut table = Mappings::new();
        let (kept, given_up) = (grant(&mut table, 0, 1), grant(&mut table, 0, 1));
        table.cancel(given_up);
        assert_eq!(table.tickets(), 1);
        table.cancel(kept);
        assert!(is_bare(&table));
    }

    /// How page 0 stands, with its ticket or its mapping.
    struct Scene {
        table: Mappings,
        ticket: Option<CommitTicket>,
        id: MappingId,
    }

    fn scene(state: &str) -> Scene {
        let mut scene = Scene { table: Mappings::new(), ticket: None, id: MappingId(NonZeroU64::MIN) };
        for event in state.split(", ").filter(|event| *event != "nothing") {
            apply(event, &mut scene);
        }
        scene
    }

    fn apply(event: &str, Scene { table, ticket, id }: &mut Scene) -> String {
        let page = translation(pages(0, 1));
        let noticed =
            |Revocation { id, outstanding_uses }| format!("revocation {}: {outstanding_uses} uses", id.0);
        match event {
            "on_grant" => match table.on_grant(space(1), page) {
                Ok(granted) => {
                    *ticket = Some(granted);
                    "ticket".into()
                }
                Err(closed) => format!("{closed:?}"),
            },
            "commit" => ticket.take().map_or("-".into(), |ticket| format!("{:?}", table.commit(ticket))),
            "cancel" => ticket.take().map_or("-".into(), |ticket| format!("{:?}", table.cancel(ticket))),
            "begin_use" => table.begin_use(*id).map_or_else(|e| format!("{e:?}"), |t| t.range.to_string()),
            "end_use" => format!("{:?}", table.end_use(*id)),
            "remove" => format!("{:?}", table.remove(*id)),
            "on_notice" => noticed(table.on_notice(over(0, 2))),
            "on_notice elsewhere" => noticed(table.on_notice(Scope::Range(space(2), pages(0, 2)))),
            "on_notice all" => noticed(table.on_notice(Scope::FlushAll)),
            "take_young" => format!("{:?}", table.take_young(over(0, 2))),
            "close" => format!("{:?}", table.close()),
            "reopen" => format!("{:?}", table.reopen()),
            other => panic!("{other} is not an event"),
        }
    }

    const STATES: [&str; 13] = [
        "nothing",
        "on_grant",
        "on_grant, on_notice",
        "on_grant, commit",
        "on_grant, commit, begin_use",
        "on_grant, commit, begin_use, end_use",
        "on_grant, commit, begin_use, take_young, end_use",
        "on_grant, commit, begin_use, on_notice",
        "on_grant, commit, begin_use, on_notice, end_use",
        "on_grant, commit, begin_use, remove",
        "on_grant, commit, remove",
        "on_grant, commit, begin_use, on_grant, close",
        "on_grant, commit, begin_use, on_grant, close, reopen",
    ];

    const EVENTS: [&str; 12] = [
        "on_grant",
        "commit",
        "cancel",
        "begin_use",
        "end_use",
        "remove",
        "on_notice",
        "on_notice elsewhere",
        "on_notice all",
        "take_young",
        "close",
        "reopen",
    ];

    #[test]
    fn every_event_in_every_state() {
        let mut table =
            String::from("state -> event: outcome (live, draining, tickets, uses, unquiesced after it)\n");
        for state in STATES {
            writeln!(table, "\n{state}").unwrap();
            for event in EVENTS {
                let mut scene = scene(state);
                let outcome = apply(event, &mut scene);
                let after = &scene.table;
                let counts =
                    [after.len(), after.draining(), after.tickets(), after.uses(), after.unquiesced()];
                writeln!(table, "  -> {event:<20}{outcome:<48}{counts:?}").unwrap();
            }
        }
        insta::assert_snapshot!("mapping_transitions", table);
    }
}
