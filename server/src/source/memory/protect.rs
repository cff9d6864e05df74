//! What a mapping allows changes: mprotect (`mprotect_fixup`, `change_protection`); and mlock.
//!
//! ```text
//!   claim the range; all of it must be mapped; what allows as much already is left out
//!   layout's write lock: no page there? the mappings change, and nobody is told; done
//!   unlock; invalidate_range_start, PROTECTION_VMA     --refused--> nothing has changed
//!   layout's write lock: the mappings change                                       (vma->vm_flags)
//!   unlock
//!   for each table:
//!       page-table lock: entries allow no more than that                           (change_pte_range)
//!       unlock; yield
//!   invalidate_range_end
//! ```
//!
//! The mail has no hunk for it: its range_start and range_end were outside of the page-table lock before.
//!
//! Why nobody writes after it has returned. Each touch, and each path that fills an entry (zero fill, copy on
//! write, swap-in), looks at the mapping and changes the entry under one read lock of the layout. So
//! whichever came first is seen by the walk, and whichever comes later allows what the mapping allows by then.
//! An entry that is moving is lowered where it stands: what puts another in its place (`Unmapped::replace`),
//! or puts it back, does so under the page-table lock, and takes over what it allows. A device's write fault
//! that was answered before the mapping changed is not granted, for the bracket began earlier; one that is
//! answered later is refused.
//!
//! An entry is never raised. When a mapping allows writes again, the next write raises the entry if its frame
//! is not shared, and copies it if it is: a page that a fork shares stays copy-on-write through any number of
//! changes. Devices are told of both directions, as in the kernel: one that was refused may ask again.

use std::sync::Arc;

use shootdown_core::{Access, AddrRange, AddressSpaceId, Cause};

use super::address_space::AddressSpace;
use super::error::MemoryError;
use super::gather::Bracket;
use super::page_table::{Table, page_after, rest_after};
use super::twin::Twin;
use super::vma::{Flags, Vma, Vmas};
use super::{Inner, MemorySource, whole_pages};
use crate::source::Notifier;

impl<N: Notifier> MemorySource<N> {
    /// Changes what whole pages allow (`mprotect`); all of them must be mapped. How many page table entries
    /// allow less than before: when it returns, neither the CPU nor a device writes to what is read-only now.
    ///
    /// A mapping that allows as much already is left out; where nothing changes, nobody is told.
    ///
    /// # Errors
    /// [`MemoryError::Unmapped`] if a page is not mapped, [`MemoryError::ReadOnly`] if writes are asked for and a
    /// file there was opened for reading only, [`MemoryError::TooManyMappings`], [`MemoryError::Notify`], [`MemoryError::NotQuiesced`]: everything is as it was.
    /// [`MemoryError::Range`], [`MemoryError::AddressSpaceUnknown`], [`MemoryError::Exiting`],
    /// [`MemoryError::TaskEnded`].
    ///
    /// # Cancel safety
    /// Dropped after it was polled, it goes on.
    pub async fn protect(
        &self,
        id: AddressSpaceId,
        range: AddrRange,
        access: Access,
    ) -> Result<usize, MemoryError> {
        let user = self.space(id)?.enter()?;
        let inner = Arc::clone(&self.inner);
        self.owned(Twin::Protect, async move { mprotect(&inner, &user.space, range, access).await }).await
    }

    /// Keeps whole pages from being swapped out, or dropped by [`MemorySource::dont_need`] (`mlock`). They may
    /// still be moved to other frames, and unmapped. A child does not inherit it.
    ///
    /// Unlike the kernel's it brings no page in: one that was not present is fetched, and stays, when it is
    /// touched. Nobody is told, for no entry changes. What began before it, a dont_need whose devices are
    /// being waited for, say, goes on.
    ///
    /// # Errors
    /// [`MemoryError::Unmapped`] if a page is not mapped, [`MemoryError::TooManyMappings`]: nothing is locked
    /// then. [`MemoryError::Range`], [`MemoryError::AddressSpaceUnknown`], [`MemoryError::Exiting`].
    pub fn lock(&self, id: AddressSpaceId, range: AddrRange) -> Result<(), MemoryError> {
        self.change_flags(id, range, |flags| flags.locked = true)
    }

    /// The pages may be swapped out and dropped again (`munlock`).
    ///
    /// # Errors
    /// As [`MemorySource::lock`].
    pub fn unlock(&self, id: AddressSpaceId, range: AddrRange) -> Result<(), MemoryError> {
        self.change_flags(id, range, |flags| flags.locked = false)
    }

    /// `mlock_fixup`.
    fn change_flags(
        &self,
        id: AddressSpaceId,
        range: AddrRange,
        change: impl Fn(&mut Flags),
    ) -> Result<(), MemoryError> {
        whole_pages(range)?;
        let space = self.space(id)?;
        let mut layout = space.layout.write();
        layout.check_door(id)?;
        layout.vmas.all_allowing(range, Access::Read)?;
        layout.vmas.change(range, |vma| change(&mut vma.flags))
    }
}

/// `mprotect`.
async fn mprotect<N: Notifier>(
    inner: &Inner<N>,
    space: &Arc<AddressSpace>,
    range: AddrRange,
    access: Access,
) -> Result<usize, MemoryError> {
    whole_pages(range)?;
    let _claim = space.claim(range).await;
    let changes = {
        let mut layout = space.layout.write();
        let Some(changes) = what_changes(&layout.vmas, range, access)? else { return Ok(0) };
        // Looked at and changed under one lock, or a device could be given a page in between.
        if !has_frames(space, changes) {
            layout.vmas.change(changes, |vma| vma.access = access)?;
            return Ok(0);
        }
        changes
    };
    let (bracket, ..) = Bracket::open(&*inner.notifier, space.id, changes, Cause::ProtectionVma).await?;
    space.layout.write().vmas.change(changes, |vma| vma.access = access)?;
    let changed = change_protection(space, changes, access).await;
    bracket.close();
    Ok(changed)
}

/// From the first page of `range` that does not allow the same to the last.
fn what_changes(vmas: &Vmas, range: AddrRange, access: Access) -> Result<Option<AddrRange>, MemoryError> {
    vmas.all_allowing(range, Access::Read)?;
    // VM_MAYWRITE: what was opened for reading is not written through a mapping of it.
    let may_not =
        |vma: &Vma| access == Access::Write && vma.file.as_ref().is_some_and(|file| !file.may_write());
    if let Some(vma) = vmas.overlapping(range).find(may_not) {
        return Err(MemoryError::ReadOnly { address: vma.range.start().max(range.start()) });
    }
    let others = vmas.overlapping(range).filter(|vma| vma.access != access);
    Ok(others.filter_map(|vma| vma.range.intersection(range)).reduce(AddrRange::hull))
}

/// `change_protection`: how many entries allowed more.
async fn change_protection(space: &AddressSpace, range: AddrRange, access: Access) -> usize {
    let mut changed = 0;
    let mut left = Some(range);
    while let Some((part, table)) = left.and_then(|range| space.tables.first_in(range)) {
        changed += change_table(&table, part, access);
        tokio::task::yield_now().await;
        left = rest_after(range, part);
    }
    changed
}

/// `change_pte_range`.
fn change_table(table: &Table, part: AddrRange, access: Access) -> usize {
    let mut entries = table.lock();
    let mut changed = 0;
    let mut at = entries.next_occupied(part.start(), part.last());
    while let Some(address) = at {
        if let Some(entry) = entries.framed_mut(address).filter(|entry| entry.allows > access) {
            entry.allows = access;
            changed += 1;
        }
        at = page_after(address, part.last()).and_then(|next| entries.next_occupied(next, part.last()));
    }
    changed
}

/// Whether a device may hold a page of `range`: one that is in the swap file it does not.
fn has_frames(space: &AddressSpace, range: AddrRange) -> bool {
    let mut left = Some(range);
    while let Some((part, table)) = left.and_then(|range| space.tables.first_in(range)) {
        let mut entries = table.lock();
        let mut at = entries.next_occupied(part.start(), part.last());
        while let Some(address) = at {
            if entries.framed_mut(address).is_some() {
                return true;
            }
            at = page_after(address, part.last()).and_then(|next| entries.next_occupied(next, part.last()));
        }
        left = rest_after(range, part);
    }
    false
}

#[cfg(test)]
mod tests {
    use super::super::frame::FrameStore;
    use super::super::page_table::{Entry, Slot, Tables};
    use super::super::pool::Pool;
    use super::super::swap::SwapFile;
    use super::*;

    #[tokio::test]
    async fn an_entry_that_is_moving_is_lowered_and_one_in_the_swap_file_is_no_devices() {
        let frames = FrameStore::new(4).unwrap();
        let swap = SwapFile::on(tempfile::tempfile().unwrap(), 1).unwrap();
        let pool = Pool::new(Arc::clone(&frames), None, 4);
        let space = AddressSpace::new(AddressSpaceId::FIRST, pool, Vmas::new(1), Tables::default());
        let table = space.tables.get_or_make(0);
        let range = AddrRange::new(0, 1 << 22).unwrap();
        table.lock().replace(0, Slot::Swapped(swap.filled(&[1; 4096])));
        assert!(!has_frames(&space, range));
        for (address, allows) in [(0x1000, Access::Write), (0x2000, Access::Write), (0x3000, Access::Read)] {
            table.lock().install(address, Entry::new(frames.take_zeroed().unwrap(), allows));
        }
        let Slot::Present(entry) = table.lock().replace(0x2000, Slot::Absent) else { panic!() };
        table.lock().replace(0x2000, Slot::Moving(entry));
        assert!(has_frames(&space, range));
        assert_eq!(change_protection(&space, range, Access::Write).await, 0, "nothing is raised");
        assert_eq!(change_protection(&space, range, Access::Read).await, 2);
        for address in [0x1000, 0x2000, 0x3000] {
            assert_eq!(table.lock().framed_mut(address).unwrap().allows, Access::Read);
        }
        assert!(matches!(table.lock().slot(0x2000), Slot::Moving(_)));
    }
}
