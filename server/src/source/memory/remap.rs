//! Memory moves to another place of its address space: mremap (`mremap_to`, `move_vma`,
//! `move_page_tables`).
//!
//! ```text
//!   claim both places at once; what is mapped at either is leaving, and the new one is reserved
//!   invalidate_range_start, UNMAP, over the new place
//!   invalidate_range_start, UNMAP, over the old place     --either refused--> both are as they were
//!   what was mapped at the new place is zapped, flushed and unlinked                        (do_munmap)
//!   for each table of the old place, and each that its pages go to:
//!       layout's read lock -> both page-table locks, the lower address first
//!           entry by entry; one that settles or moves is waited for, without a lock          (move_ptes)
//!       unlock; yield
//!   layout's write lock: the mappings are at the new place, with the same objects and positions
//!   unlock; the old place's page tables are freed; invalidate_range_end, twice
//! ```
//!
//! The mail has no hunk for it. The trap is that of CVE-2018-18281: the kernel moved entries, dropped the
//! page-table locks and flushed the old place's TLB entries after that, so that somebody could free a page
//! by its new address while it was still used by its old one. Here no device uses the old place before the
//! first entry leaves it, and the claim on both places outlives both brackets.
//!
//! The kernel unmaps the new place first, and a move that fails later has lost what was there. Here both
//! brackets are open before anything changes, so a move that fails has changed nothing.
//!
//! A reverse map walk that runs meanwhile may look at the new place before a page is there, and at the old one
//! after it has gone. It finds one reference more than it has places for, and lets the page be
//! (`Kept::Busy`). Walks that must meet every place of a file's page (write-back, placeholder, truncate) wait
//! until the entries have arrived (`Backing::places_stay`).

use std::sync::Arc;

use parking_lot::MutexGuard;
use shootdown_core::{Access, AddrRange, AddressSpaceId, Cause};

use super::address_space::AddressSpace;
use super::error::MemoryError;
use super::gather::{Bracket, Gather};
use super::outcome::Released;
use super::page_cache::Backing;
use super::page_table::{Entries, Slot, Stage, Table, page_after, rest_after, table_span};
use super::twin::Twin;
use super::unmap::{free_pgtables, free_tables};
use super::vma::{Stay, Vma, Vmas};
use super::zap::zap_range;
use super::{Inner, MemorySource, whole_pages};
use crate::source::Notifier;

impl<N: Notifier> MemorySource<N> {
    /// Moves whole pages to `new_start` (`mremap` with `MREMAP_FIXED` and the same length), whatever mappings
    /// they are of; all of them must be mapped. What is mapped at the new place is unmapped. What that
    /// released is answered, with the rounds of the new place and of the old one; the move itself frees
    /// nothing, and the pages stay in their frames.
    ///
    /// From its first poll neither place can be accessed. When it returns the new one can, and the old one
    /// can be mapped.
    ///
    /// # Errors
    /// [`MemoryError::Unmapped`] if a page of the old place is not mapped, [`MemoryError::Overlap`],
    /// [`MemoryError::TooManyMappings`], [`MemoryError::Notify`], [`MemoryError::NotQuiesced`]: both places are
    /// as they were. [`MemoryError::Range`], [`MemoryError::AddressSpaceUnknown`], [`MemoryError::Exiting`],
    /// [`MemoryError::TaskEnded`].
    ///
    /// # Cancel safety
    /// Dropped after it was polled, it goes on.
    pub async fn remap(
        &self,
        id: AddressSpaceId,
        old: AddrRange,
        new_start: u64,
    ) -> Result<Released, MemoryError> {
        let user = self.space(id)?.enter()?;
        let inner = Arc::clone(&self.inner);
        self.owned(Twin::Remap, async move { mremap(&inner, &user.space, old, new_start).await }).await
    }
}

/// From where to where.
#[derive(Debug, Clone, Copy)]
struct Move {
    old: AddrRange,
    new: AddrRange,
}

/// What is leaving both places.
struct Leaving {
    old: Vec<AddrRange>,
    new: Vec<AddrRange>,
}

/// `mremap_to`.
async fn mremap<N: Notifier>(
    inner: &Inner<N>,
    space: &Arc<AddressSpace>,
    old: AddrRange,
    new_start: u64,
) -> Result<Released, MemoryError> {
    let way = Move::new(old, new_start)?;
    let Move { old, new } = way;
    let _claim = space.claim_both(old, new).await;
    let leaving = way.leave(&mut space.layout.write().vmas)?;
    let opened = async {
        let notifier = &*inner.notifier;
        let at_new = Bracket::open(notifier, space.id, new, Cause::Unmap).await?;
        let at_old = Bracket::open(notifier, space.id, old, Cause::Unmap).await?;
        Ok::<_, MemoryError>((at_new, at_old))
    };
    let (at_new, at_old) = match opened.await {
        Ok(both) => both,
        Err(error) => {
            way.restore(&mut space.layout.write().vmas, &leaving);
            return Err(error);
        }
    };
    let (at_new, proof, round_of_new) = at_new;
    let (at_old, _, round_of_old) = at_old;

    let mut gather = Gather::new(Arc::clone(space), inner.config.zap_block_pages);
    for part in &leaving.new {
        zap_range(space, *part, &mut gather, &proof).await;
    }
    gather.flush(&proof);
    let freed = (inner.config.now)();
    // Its page tables stay, for the place is reserved.
    let mut tables = free_pgtables(space, &leaving.new).await;

    let files = files_of(&space.layout.read().vmas, old);
    let mut moving = Vec::with_capacity(files.len());
    for file in &files {
        moving.push(file.places_move().await);
    }
    move_page_tables(space, way).await;
    way.relink(&mut space.layout.write().vmas, &leaving.old);
    drop(moving);
    for part in &leaving.old {
        tables += free_tables(space, &space.layout.write(), *part);
        tokio::task::yield_now().await;
    }
    at_old.close();
    at_new.close();
    let mut released = Released { tables, ..Released::new(gather.tally(), round_of_old, freed) };
    released.rounds.insert(0, round_of_new);
    Ok(released)
}

impl Move {
    fn new(old: AddrRange, new_start: u64) -> Result<Self, MemoryError> {
        let new_end = new_start.wrapping_add(old.wire_end().wrapping_sub(old.start()));
        let new = AddrRange::new(new_start, new_end)?;
        whole_pages(old)?;
        whole_pages(new)?;
        if old.overlaps(new) {
            return Err(MemoryError::Overlap { old, new });
        }
        Ok(Self { old, new })
    }

    /// Where what is at `address` goes.
    fn target(self, address: u64) -> u64 {
        self.new.start() + (address - self.old.start())
    }

    /// Where what is in `part` goes.
    fn target_of(self, part: AddrRange) -> AddrRange {
        let (first, last) = (self.target(part.start()), self.target(part.last()));
        AddrRange::new(first, last.wrapping_add(1)).expect("the new place is as long as the old one")
    }

    /// Nobody accesses either place, and nothing is mapped there, until it is relinked or restored.
    fn leave(self, vmas: &mut Vmas) -> Result<Leaving, MemoryError> {
        vmas.all_allowing(self.old, Access::Read)?;
        let old = vmas.leave(self.old)?;
        match vmas.leave(self.new) {
            Ok(new) => {
                vmas.reserve(self.new);
                Ok(Leaving { old, new })
            }
            Err(error) => {
                vmas.restore(&old);
                Err(error)
            }
        }
    }

    /// It did not take place.
    fn restore(self, vmas: &mut Vmas, leaving: &Leaving) {
        vmas.unreserve(self.new);
        vmas.restore(&leaving.new);
        vmas.restore(&leaving.old);
    }

    /// The mappings are at the new place (`copy_vma`): their objects find the pages there from now on.
    fn relink(self, vmas: &mut Vmas, leaving: &[AddrRange]) {
        let moved: Vec<Vma> = leaving.iter().filter_map(|part| vmas.unlink(*part)).collect();
        vmas.unreserve(self.new);
        for vma in moved {
            let there = Vma { range: self.target_of(vma.range), stay: Stay::Mapped, ..vma };
            vmas.add(there).expect("its place was reserved, and as many mappings have left");
        }
    }
}

/// The files that are mapped in `range`, each once, in one order for all: two that move both wait for each other
/// in turn.
fn files_of(vmas: &Vmas, range: AddrRange) -> Vec<Arc<Backing>> {
    let mut files: Vec<_> = vmas.overlapping(range).filter_map(|vma| vma.object.backing().cloned()).collect();
    files.sort_unstable_by_key(Arc::as_ptr);
    files.dedup_by(|one, other| Arc::ptr_eq(one, other));
    files
}

/// `move_page_tables`. Both places have been left: nobody fills an entry there.
async fn move_page_tables(space: &AddressSpace, way: Move) {
    let mut left = Some(way.old);
    while let Some((part, table)) = left.and_then(|range| space.tables.first_in(range)) {
        left = match move_ptes(space, &table, part, way) {
            None => rest_after(way.old, part),
            Some(next) => {
                space.settled(next).await;
                AddrRange::new(next, way.old.wire_end()).ok()
            }
        };
        tokio::task::yield_now().await;
    }
}

/// `move_ptes`: moves what is in `part`, which is in `table`, up to the end of the table that it goes to, or
/// up to an entry that has to be waited for; where it stopped.
fn move_ptes(space: &AddressSpace, table: &Table, part: AddrRange, way: Move) -> Option<u64> {
    // Tables are neither made nor freed without it.
    let _layout = space.layout.read();
    let first = table.lock().next_occupied(part.start(), part.last())?;
    let goes_to = space.tables.get_or_make(way.target(first));
    let reach = table_span(way.target(first));
    let mut pair = Pair::lock((first, table), (way.target(first), &goes_to));
    let mut at = Some(first);
    while let Some(address) = at {
        let target = way.target(address);
        if !reach.contains_address(target) || is_on_its_way(pair.from.slot(address)) {
            return Some(address);
        }
        let mut slot = pair.from.replace(address, Slot::Absent);
        if let Slot::Present(entry) = &mut slot {
            // Devices have lost it, and with it what they would have told of its use.
            entry.young = true;
        }
        let there = pair.to().replace(target, slot);
        debug_assert!(matches!(there, Slot::Absent), "the new place was zapped, and nobody fills it");
        at = page_after(address, part.last()).and_then(|next| pair.from.next_occupied(next, part.last()));
    }
    None
}

/// Whoever replaces the entry, or has replaced it, looks for it where it is.
fn is_on_its_way(slot: &Slot) -> bool {
    match slot {
        Slot::Moving(_) => true,
        Slot::Present(entry) => entry.stage == Stage::Settling,
        Slot::Absent | Slot::Swapped(_) => false,
    }
}

/// Two tables, or one that is both, under their locks.
struct Pair<'a> {
    from: MutexGuard<'a, Entries>,
    /// `None` where it is the same.
    to: Option<MutexGuard<'a, Entries>>,
}

impl<'a> Pair<'a> {
    /// The lower address first: two moves that pass each other do not wait for each other.
    fn lock(from: (u64, &'a Table), to: (u64, &'a Table)) -> Self {
        if std::ptr::eq(from.1, to.1) {
            return Self { from: from.1.lock(), to: None };
        }
        if from.0 < to.0 {
            let from = from.1.lock();
            return Self { from, to: Some(to.1.lock()) };
        }
        let to = to.1.lock();
        Self { from: from.1.lock(), to: Some(to) }
    }

    fn to(&mut self) -> &mut Entries {
        self.to.as_mut().unwrap_or(&mut self.from)
    }
}

#[cfg(test)]
mod tests {
    use super::super::frame::FrameStore;
    use super::super::page_table::{Entry, Tables};
    use super::super::pool::Pool;
    use super::super::swap::SwapFile;
    use super::*;

    fn pages(first: u64, end: u64) -> AddrRange {
        AddrRange::new(first << 12, end << 12).unwrap()
    }

    #[tokio::test]
    async fn entries_move_as_they_are_and_pages_in_the_swap_file_with_them() {
        let frames = FrameStore::new(4).unwrap();
        let swap = Arc::new(SwapFile::on(tempfile::tempfile().unwrap(), 4).unwrap());
        let pool = Pool::new(Arc::clone(&frames), Some(Arc::clone(&swap)), 4);
        let mut vmas = Vmas::new(8);
        vmas.map(pages(0, 600), Access::Write).unwrap();
        let space = AddressSpace::new(AddressSpaceId::FIRST, pool, vmas, Tables::default());
        for (page, byte) in [(1u64, 7), (511, 8), (512, 9)] {
            let slot = swap.filled(&[byte; 4096]);
            space.tables.get_or_make(page << 12).lock().replace(page << 12, Slot::Swapped(slot));
        }
        let frame = frames.take_zeroed().unwrap();
        let life = frame.life();
        let entry = Entry { dirty: true, ..Entry::new(frame, Access::Read) };
        space.tables.get_or_make(0).lock().install(2 << 12, entry);

        // Over borders of tables, to other slots of one table, and one at a time.
        for (old, to) in [(pages(0, 600), 1000), (pages(1000, 1600), 300), (pages(300, 310), 290)] {
            let way = Move::new(old, to << 12).unwrap();
            let leaving = way.leave(&mut space.layout.write().vmas).unwrap();
            assert!(leaving.new.is_empty());
            let early = space.layout.write().vmas.map(way.new, Access::Read);
            assert!(matches!(early, Err(MemoryError::Busy { .. })), "the place is reserved");
            move_page_tables(&space, way).await;
            // As a neighbour's munmap would: what is on its way keeps its tables.
            free_tables(&space, &space.layout.write(), way.new);
            way.relink(&mut space.layout.write().vmas, &leaving.old);
            for part in &leaving.old {
                free_tables(&space, &space.layout.write(), *part);
            }
        }
        for (page, byte) in [(291u64, 7), (811, 8), (812, 9)] {
            let table = space.tables.get(page << 12).unwrap();
            let Slot::Swapped(slot) = table.lock().replace(page << 12, Slot::Absent) else {
                panic!("{page}")
            };
            assert_eq!(swap.read(&slot).unwrap(), [byte; 4096]);
            swap.put(slot);
        }
        let table = space.tables.get(292 << 12).unwrap();
        let Slot::Present(entry) = table.lock().replace(292 << 12, Slot::Absent) else { panic!() };
        assert_eq!((entry.frame.life(), entry.allows, entry.dirty), (life, Access::Read, true));
        assert!(entry.young, "devices had it, maybe, and cannot tell any more");
        frames.put([entry.frame]);
        assert_eq!((swap.in_use(), frames.in_use(), space.tables.count().tables), (0, 0, 2));
    }
}
