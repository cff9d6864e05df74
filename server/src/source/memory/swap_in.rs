//! A page comes back from the swap file: `do_swap_page`.

use std::sync::Arc;

use super::Inner;
use super::address_space::AddressSpace;
use super::error::MemoryError;
use super::lru::List;
use super::page_table::{Entry, Slot};
use crate::source::Notifier;

/// Brings the page at `address` in, if it is in the swap file. The entry's reference to the slot goes: the page
/// is the entry's own then, and dirty.
///
/// Nothing in it waits, so a caller that gives up leaves nothing behind.
pub(super) fn do_swap_page<N: Notifier>(
    inner: &Inner<N>,
    space: &Arc<AddressSpace>,
    address: u64,
) -> Result<(), MemoryError> {
    let pool = &inner.pool;
    let page = address & !shootdown_core::PageSize::BASE.offset_mask();
    let Some(table) = space.tables.get(page) else { return Ok(()) };
    // A reference of our own, so that the slot cannot be freed and taken again while it is read without a lock.
    let slot = match table.lock().slot(page) {
        Slot::Swapped(slot) => pool.swap()?.share(slot)?,
        Slot::Absent | Slot::Present(_) | Slot::Moving(_) => return Ok(()),
    };
    let read = pool.swap()?.read(&slot).map_err(MemoryError::from);
    let frame = read.and_then(|bytes| Ok(pool.frames.take_filled(&bytes)?));
    let frame = match frame {
        Ok(frame) => frame,
        Err(error) => {
            pool.put_slot(slot);
            return Err(error);
        }
    };
    {
        let layout = space.layout.read();
        let vma = layout
            .vmas
            .overlapping(shootdown_core::AddrRange::page_of(page, shootdown_core::PageSize::BASE))
            .next();
        let mut entries = table.lock();
        // pte_same: a slot that has our reference was not taken again, so the same slot is the same page.
        match (entries.slot(page), vma) {
            (Slot::Swapped(there), Some(vma)) if *there == slot => {
                let life = frame.life();
                let mut entry = Entry::new(frame, vma.access);
                entry.young = true;
                entry.dirty = true;
                if let Slot::Swapped(there) = entries.replace(page, Slot::Present(entry)) {
                    pool.put_slot(there);
                }
                pool.lru.add(life, vma.owner_of(page), List::Active);
                pool.count(|events| events.swapped_in += 1);
            }
            // It was brought in, or zapped, meanwhile. No device has seen this frame.
            _ => drop(pool.frames.put([frame])),
        }
    }
    pool.put_slot(slot);
    Ok(())
}
