//! Page tables: 512 entries each, 2 MiB of an address space, under a lock of their own (`pte_lockptr`).
//!
//! An entry holds a reference to its frame. What the CPU does through an entry it does under the lock, so
//! an entry that was cleared under the lock is out of the CPU's reach: the twin of `ptep_clear_flush`.
//! Devices are what the notifier is for.
//!
//! ```text
//!             zero fill                       fork                          do_wp_page, reuse
//!   absent ---------------> Write, settled -------> Read, settled ----------------------------> Write, settled
//!     ^                            |                     | do_wp_page, copy                        ^
//!     |          zap               |                     v                    devices have stopped |
//!     +------- (any state) --------+            Write, settling (new frame) -----------------------+
//!
//!            try_to_unmap               devices have stopped
//!   present --------------> moving ---+-- migration ---> present, of another frame
//!      ^                      |       +-- swap-out ----> swapped ---- touched ----> present, of a new frame
//!      +------ given up ------+       +-- of a file ---> absent
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard, RwLock};
use shootdown_core::{Access, AddrRange, PageSize};

use super::frame::{FrameLife, FrameRef};
use super::swap::SwapRef;

/// Entries of one table.
pub(super) const ENTRIES: usize = 512;

const PAGE_SHIFT: u32 = 12;
const TABLE_SHIFT: u32 = 21;

/// A page table entry that is present.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) frame: FrameRef,
    /// What the entry allows; the VMA may allow more (copy on write).
    pub(super) allows: Access,
    pub(super) stage: Stage,
    /// The CPU touched it since this was cleared (`_PAGE_ACCESSED`), or a device was given it.
    pub(super) young: bool,
    /// Whose it is while it is moving: one frame, the placeholder of a file, is taken by several at once.
    pub(super) ticket: u64,
    /// The CPU wrote to it since this was cleared (`_PAGE_DIRTY`), or a device was given leave to.
    pub(super) dirty: bool,
}

/// A page table entry.
#[derive(Debug, Default)]
pub(super) enum Slot {
    #[default]
    Absent,
    Present(Entry),
    /// The page is on its way elsewhere: whoever touches it waits (`migration_entry_wait`). The entry is
    /// what comes back if it does not go.
    Moving(Entry),
    /// The page is in the swap file.
    Swapped(SwapRef),
}

/// What was in an entry that was cleared.
#[derive(Debug)]
pub(super) enum Cleared {
    /// Its reference, to be gathered.
    Frame(FrameRef),
    Swapped(SwapRef),
}

/// Whether devices may still use what the entry replaced.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stage {
    Settled,
    /// The entry replaced another and its round is not over: nobody writes through it yet, for a device
    /// could still read the old frame and miss the write.
    Settling,
}

/// One table.
#[derive(Debug)]
pub(super) struct Table {
    entries: Mutex<Entries>,
}

#[derive(Debug)]
pub(super) struct Entries {
    slots: Box<[Slot]>,
    present: usize,
    swapped: usize,
    /// Those that are not absent.
    occupied: usize,
}

/// How many tables there are, and how many of their entries are what.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Count {
    pub(super) tables: usize,
    pub(super) present: usize,
    pub(super) swapped: usize,
}

/// The tables of an address space, by their place in it (`pgd`, `pud` and `pmd` in one).
///
/// A table is made under a read lock of the layout and freed under its write lock, so whoever holds
/// either holds the tables still.
#[derive(Debug, Default)]
pub(super) struct Tables {
    by_index: RwLock<BTreeMap<u64, Arc<Table>>>,
}

impl Entry {
    /// An entry that nobody has used yet.
    pub(super) fn new(frame: FrameRef, allows: Access) -> Self {
        Self { frame, allows, stage: Stage::Settled, young: false, ticket: 0, dirty: false }
    }

    /// What a touch leaves behind.
    pub(super) fn mark(&mut self, access: Access) {
        self.young = true;
        self.dirty |= access == Access::Write;
    }

    pub(super) fn is_life(&self, life: FrameLife) -> bool {
        self.frame.life() == life
    }
}

impl Table {
    pub(super) fn new() -> Self {
        let slots = std::iter::repeat_with(Slot::default).take(ENTRIES).collect();
        Self { entries: Mutex::new(Entries { slots, present: 0, swapped: 0, occupied: 0 }) }
    }

    /// Takes the page-table lock. Its guard is not `Send`: a future that kept it over an await would not
    /// be `Send` either, and every operation asserts that its future is.
    pub(super) fn lock(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock()
    }
}

impl Entries {
    pub(super) fn slot(&self, address: u64) -> &Slot {
        &self.slots[slot_of(address)]
    }

    /// The entry, if it is present.
    pub(super) fn get(&self, address: u64) -> Option<&Entry> {
        match self.slot(address) {
            Slot::Present(entry) => Some(entry),
            Slot::Absent | Slot::Moving(_) | Slot::Swapped(_) => None,
        }
    }

    /// The entry, if it is present.
    pub(super) fn get_mut(&mut self, address: u64) -> Option<&mut Entry> {
        match &mut self.slots[slot_of(address)] {
            Slot::Present(entry) => Some(entry),
            Slot::Absent | Slot::Moving(_) | Slot::Swapped(_) => None,
        }
    }

    /// The entry, if it has a frame: one that is moving may come back as it is.
    pub(super) fn framed_mut(&mut self, address: u64) -> Option<&mut Entry> {
        match &mut self.slots[slot_of(address)] {
            Slot::Present(entry) | Slot::Moving(entry) => Some(entry),
            Slot::Absent | Slot::Swapped(_) => None,
        }
    }

    /// Fills an entry that is absent.
    pub(super) fn install(&mut self, address: u64, entry: Entry) -> &Entry {
        let before = self.replace(address, Slot::Present(entry));
        debug_assert!(
            matches!(before, Slot::Absent),
            "a present entry is replaced or cleared, never overwritten"
        );
        self.get(address).expect("it was installed just now")
    }

    /// Puts something else in an entry's place; what was there.
    pub(super) fn replace(&mut self, address: u64, slot: Slot) -> Slot {
        let before = std::mem::replace(&mut self.slots[slot_of(address)], slot);
        let after = self.slot(address);
        let change = |is: fn(&Slot) -> bool| isize::from(is(after)) - isize::from(is(&before));
        let present = change(|slot| matches!(slot, Slot::Present(_)));
        let swapped = change(|slot| matches!(slot, Slot::Swapped(_)));
        let occupied = change(|slot| !matches!(slot, Slot::Absent));
        self.present = self.present.strict_add_signed(present);
        self.swapped = self.swapped.strict_add_signed(swapped);
        self.occupied = self.occupied.strict_add_signed(occupied);
        before
    }

    /// Clears the first entry from `from` to `last` that is not absent; where it was.
    pub(super) fn clear_first(&mut self, from: u64, last: u64) -> Option<(u64, Cleared)> {
        let address = self.next_occupied(from, last)?;
        let cleared = match self.replace(address, Slot::Absent) {
            Slot::Present(entry) | Slot::Moving(entry) => Cleared::Frame(entry.frame),
            Slot::Swapped(slot) => Cleared::Swapped(slot),
            Slot::Absent => return None,
        };
        Some((address, cleared))
    }

    /// The page of the first entry from `from` to `last`, both in this table, that is not absent.
    pub(super) fn next_occupied(&self, from: u64, last: u64) -> Option<u64> {
        let slots = slot_of(from)..=slot_of(last);
        let found = slots.into_iter().find(|slot| !matches!(self.slots[*slot], Slot::Absent))?;
        Some(table_range(index_of(from)).start() + ((found as u64) << PAGE_SHIFT))
    }

    /// How many are not absent.
    pub(super) fn occupied(&self) -> usize {
        self.occupied
    }
}

impl Tables {
    pub(super) fn get(&self, address: u64) -> Option<Arc<Table>> {
        self.by_index.read().get(&index_of(address)).cloned()
    }

    /// The table that `address` falls in; made where there is none (`pte_alloc`).
    pub(super) fn get_or_make(&self, address: u64) -> Arc<Table> {
        if let Some(table) = self.get(address) {
            return table;
        }
        Arc::clone(self.by_index.write().entry(index_of(address)).or_insert_with(|| Arc::new(Table::new())))
    }

    /// The first table that shares an address with `range`, and what they share.
    pub(super) fn first_in(&self, range: AddrRange) -> Option<(AddrRange, Arc<Table>)> {
        let tables = self.by_index.read();
        let (index, table) = tables.range(index_of(range.start())..=index_of(range.last())).next()?;
        Some((table_range(*index).intersection(range)?, Arc::clone(table)))
    }

    /// Frees the table over `part`, which is within it. It must be empty: an entry holds a reference.
    pub(super) fn free(&self, part: AddrRange) {
        let freed = self.by_index.write().remove(&index_of(part.start()));
        debug_assert!(freed.is_none_or(|table| table.lock().occupied() == 0), "a freed table has no entry");
    }

    pub(super) fn count(&self) -> Count {
        let tables = self.by_index.read();
        let mut count = Count { tables: tables.len(), ..Count::default() };
        for table in tables.values() {
            let entries = table.lock();
            count.present += entries.present;
            count.swapped += entries.swapped;
        }
        count
    }
}

/// What is left of `range` after its part `done`.
pub(super) fn rest_after(range: AddrRange, done: AddrRange) -> Option<AddrRange> {
    if done.last() >= range.last() {
        return None;
    }
    AddrRange::new(done.last() + 1, range.wire_end()).ok()
}

/// The page after that of `address`, if one begins up to `last`.
pub(super) fn page_after(address: u64, last: u64) -> Option<u64> {
    let end = AddrRange::page_of(address, PageSize::BASE).last();
    (end < last).then(|| end + 1)
}

/// The whole span of the table that `address` falls in.
pub(super) fn table_span(address: u64) -> AddrRange {
    table_range(index_of(address))
}

fn table_range(index: u64) -> AddrRange {
    let start = index << TABLE_SHIFT;
    AddrRange::new(start, start.wrapping_add(1 << TABLE_SHIFT)).expect("a table spans 2 MiB")
}

fn index_of(address: u64) -> u64 {
    address >> TABLE_SHIFT
}

fn slot_of(address: u64) -> usize {
    (address >> PAGE_SHIFT) as usize % ENTRIES
}

#[cfg(test)]
mod tests {
    use super::super::frame::FrameStore;
    use super::*;

    fn range(start: u64, end: u64) -> AddrRange {
        AddrRange::new(start, end).unwrap()
    }

    #[test]
    fn the_tables_of_a_range_are_met_in_order_up_to_the_top() {
        let tables = Tables::default();
        for address in [0, 5 << 21, u64::MAX - 4095] {
            tables.get_or_make(address);
        }
        let mut left = Some(AddrRange::ALL);
        let mut met = Vec::new();
        while let Some((part, _)) = left.and_then(|range| tables.first_in(range)) {
            met.push(part.start() >> TABLE_SHIFT);
            left = left.and_then(|range| rest_after(range, part));
        }
        assert_eq!(met, [0, 5, u64::MAX >> 21]);
        let narrow = range((5 << 21) + 4096, (5 << 21) + 8192);
        assert_eq!(tables.first_in(narrow).unwrap().0, narrow);
        assert!(tables.first_in(range(1 << 21, 5 << 21)).is_none());
    }

    #[test]
    fn entries_are_cleared_once_and_counted() {
        let store = FrameStore::new(4).unwrap();
        let table = Table::new();
        let mut entries = table.lock();
        let top = u64::MAX - 4095;
        for address in [top - 8192, top] {
            let frame = store.take_zeroed().unwrap();
            entries.install(address, Entry::new(frame, Access::Write));
        }
        assert_eq!(entries.present, 2);
        let Some((first, Cleared::Frame(frame))) = entries.clear_first(top - 8192, u64::MAX) else {
            panic!()
        };
        assert_eq!(first, top - 8192);
        store.put([frame]);
        assert!(entries.clear_first(top - 8192, top - 1).is_none());
        let Some((second, Cleared::Frame(frame))) = entries.clear_first(top, u64::MAX) else { panic!() };
        assert_eq!((second, store.put([frame])), (top, 1));
        assert_eq!((entries.present, store.in_use()), (0, 0));
    }
}
