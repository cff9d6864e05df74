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

mod unreported;

use self::unreported::Unreported;
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
        self.held.is_empty() && self.tickets.is_empty() && self.unreported.is_empty()
    }
}

fn next_number(last: &mut u64) -> NonZeroU64 {
    *last += 1;
    NonZeroU64::new(*last).expect("a number after 0 is not 0")
}

#[cfg(test)]
mod tests;
