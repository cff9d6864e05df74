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
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard, RwLock};
use shootdown_core::{Access, AddrRange, PageSize};

use super::frame::{FrameLife, FrameRef};

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
    slots: Box<[Option<Entry>]>,
    present: usize,
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
    pub(super) fn is_life(&self, life: FrameLife) -> bool {
        self.frame.life() == life
    }
}

impl Table {
    pub(super) fn new() -> Self {
        let slots = std::iter::repeat_with(|| None).take(ENTRIES).collect();
        Self { entries: Mutex::new(Entries { slots, present: 0 }) }
    }

    /// Takes the page-table lock. Its guard is not `Send`: a future that kept it over an await would not
    /// be `Send` either, and every operation asserts that its future is.
    pub(super) fn lock(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock()
    }
}

impl Entries {
    pub(super) fn get(&self, address: u64) -> Option<&Entry> {
        self.slots[slot_of(address)].as_ref()
    }

    pub(super) fn get_mut(&mut self, address: u64) -> Option<&mut Entry> {
        self.slots[slot_of(address)].as_mut()
    }

    /// Fills an entry that is absent.
    pub(super) fn install(&mut self, address: u64, entry: Entry) -> &Entry {
        let slot = &mut self.slots[slot_of(address)];
        debug_assert!(slot.is_none(), "a present entry is replaced or cleared, never overwritten");
        self.present += 1;
        slot.insert(entry)
    }

    /// Clears the first entry from `from` to `last` that is present; where it was.
    pub(super) fn clear_first(&mut self, from: u64, last: u64) -> Option<(u64, Entry)> {
        let address = self.next_present(from, last)?;
        self.present -= 1;
        self.slots[slot_of(address)].take().map(|entry| (address, entry))
    }

    /// The page of the first entry from `from` to `last`, both in this table, that is present.
    pub(super) fn next_present(&self, from: u64, last: u64) -> Option<u64> {
        let slots = slot_of(from)..=slot_of(last);
        let found = slots.into_iter().find(|slot| self.slots[*slot].is_some())?;
        Some(table_range(index_of(from)).start() + ((found as u64) << PAGE_SHIFT))
    }

    pub(super) fn present(&self) -> usize {
        self.present
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
        debug_assert!(freed.is_none_or(|table| table.lock().present() == 0), "a freed table has no entry");
    }

    /// How many tables there are, and how many of their entries are present.
    pub(super) fn count(&self) -> (usize, usize) {
        let tables = self.by_index.read();
        (tables.len(), tables.values().map(|table| table.lock().present()).sum())
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
            entries.install(address, Entry { frame, allows: Access::Write, stage: Stage::Settled });
        }
        assert_eq!(entries.present(), 2);
        let (first, entry) = entries.clear_first(top - 8192, u64::MAX).unwrap();
        assert_eq!(first, top - 8192);
        store.put([entry.frame]);
        assert!(entries.clear_first(top - 8192, top - 1).is_none());
        assert_eq!(
            entries.clear_first(top, u64::MAX).map(|(at, entry)| (at, store.put([entry.frame]))),
            Some((top, 1))
        );
        assert_eq!((entries.present(), store.in_use()), (0, 0));
    }
}
