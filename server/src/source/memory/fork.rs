//! fork: `dup_mmap` and `copy_page_range`.
//!
//! ```text
//!   claim the whole address space
//!   for each VMA that has pages:
//!       invalidate_range_start, PROTECTION_PAGE: devices lose the leave to write     (is_cow_mapping)
//!       for each table:
//!           parent's page-table lock -> child's page-table lock                      (SINGLE_DEPTH_NESTING)
//!               write-protect the entry; the child's shares its frame
//!           unlock; yield
//!       invalidate_range_end
//!   register the child
//! ```
//!
//! The child is registered last: until then no device can know it, so a fork that fails gives back what
//! the child has without telling anybody. Entries of the parent that are write-protected by then stay so;
//! its next write finds the page unshared and reuses it.
//!
//! A store that runs meanwhile is in the child or not, page by page, as with threads in the kernel.

use std::sync::Arc;

use shootdown_core::{Access, AddrRange, AddressSpaceId, Cause};

use super::Inner;
use super::address_space::AddressSpace;
use super::error::MemoryError;
use super::gather::Bracket;
use super::page_table::{Cleared, Entry, Slot, Table, Tables, page_after, rest_after};
use super::pool::Pool;
use super::vma::{Flags, Stay, Vma, Vmas};
use crate::source::{Notifier, Translate};

/// `dup_mm`.
pub(super) async fn fork<N: Notifier>(
    inner: &Inner<N>,
    source: Arc<dyn Translate>,
    space: &Arc<AddressSpace>,
    name: &str,
) -> Result<AddressSpaceId, MemoryError> {
    let _claim = space.claim(AddrRange::ALL).await;
    let mut child = dup_mmap(inner, space, |_| true).await?;
    let id = inner.notifier.register(name, source).map_err(MemoryError::Notify)?;
    inner.add(id, child.vmas.take(), std::mem::take(&mut child.tables));
    Ok(id)
}

/// `dup_mmap`, of the mappings that `which` asks for. Whoever calls has claimed the whole address space.
pub(super) async fn dup_mmap<N: Notifier>(
    inner: &Inner<N>,
    space: &AddressSpace,
    which: impl Fn(&Vma) -> bool,
) -> Result<Child, MemoryError> {
    let copied = |vma: &Vma| vma.stay == Stay::Mapped && which(vma);
    let vmas: Vec<Vma> = space.layout.read().vmas.overlapping(AddrRange::ALL).filter(copied).collect();
    let mut child = Child::new(Arc::clone(&inner.pool), Vmas::new(inner.config.most_mappings));
    for vma in vmas {
        // What is locked in memory is locked for its owner.
        child.vmas.add(Vma { flags: Flags { locked: false, ..vma.flags }, ..vma.clone() })?;
        copy_page_range(&*inner.notifier, space, &vma, &mut child).await?;
    }
    Ok(child)
}

/// `copy_page_range`. A VMA without a page needs no round, and neither does one whose pages nobody may
/// write.
async fn copy_page_range<N: Notifier>(
    notifier: &N,
    space: &AddressSpace,
    vma: &Vma,
    child: &mut Child,
) -> Result<(), MemoryError> {
    // A file's pages are found again by a fault, and written by whoever may.
    if vma.object.backing().is_some() {
        return Ok(());
    }
    if !has_pages(&space.tables, vma.range) {
        return Ok(());
    }
    let bracket = match vma.access {
        Access::Write => Some(Bracket::open(notifier, space.id, vma.range, Cause::ProtectionPage).await?.0),
        Access::Read => None,
    };
    let mut left = Some(vma.range);
    while let Some((part, table)) = left.and_then(|range| space.tables.first_in(range)) {
        match copy_table(&space.pool, &table, &child.tables, part)? {
            Copied::Whole => left = rest_after(vma.range, part),
            Copied::UpTo(moving) => {
                space.settled(moving).await;
                left = AddrRange::new(moving, vma.range.wire_end()).ok();
            }
        }
        tokio::task::yield_now().await;
    }
    if let Some(bracket) = bracket {
        bracket.close();
    }
    Ok(())
}

/// How far a table was copied.
enum Copied {
    Whole,
    /// A page there is on its way elsewhere: it is copied when it has arrived.
    UpTo(u64),
}

/// `copy_pte_range`.
fn copy_table(pool: &Pool, parent: &Table, child: &Tables, part: AddrRange) -> Result<Copied, MemoryError> {
    let mut entries = parent.lock();
    let mut at = entries.next_occupied(part.start(), part.last());
    if at.is_none() {
        return Ok(Copied::Whole);
    }
    let table = child.get_or_make(part.start());
    let mut copies = table.lock();
    while let Some(address) = at {
        let copy = match entries.slot(address) {
            Slot::Absent => Slot::Absent,
            Slot::Moving(_) => return Ok(Copied::UpTo(address)),
            Slot::Swapped(slot) => Slot::Swapped(pool.swap()?.share(slot)?),
            Slot::Present(entry) => {
                let mut copy = Entry::new(pool.frames.share(&entry.frame)?, Access::Read);
                copy.dirty = entry.dirty;
                Slot::Present(copy)
            }
        };
        if let Some(entry) = entries.get_mut(address) {
            entry.allows = Access::Read;
        }
        copies.replace(address, copy);
        at = page_after(address, part.last()).and_then(|next| entries.next_occupied(next, part.last()));
    }
    Ok(Copied::Whole)
}

pub(super) fn has_pages(tables: &Tables, range: AddrRange) -> bool {
    let mut left = Some(range);
    while let Some((part, table)) = left.and_then(|range| tables.first_in(range)) {
        if table.lock().next_occupied(part.start(), part.last()).is_some() {
            return true;
        }
        left = rest_after(range, part);
    }
    false
}

/// A child that no device knows yet. Dropped, it gives back what it shares.
#[derive(Debug)]
pub(super) struct Child {
    pub(super) pool: Arc<Pool>,
    pub(super) vmas: Vmas,
    pub(super) tables: Tables,
}

impl Child {
    fn new(pool: Arc<Pool>, vmas: Vmas) -> Self {
        Self { pool, vmas, tables: Tables::default() }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let mut left = Some(AddrRange::ALL);
        while let Some((part, table)) = left.and_then(|range| self.tables.first_in(range)) {
            let mut entries = table.lock();
            while let Some((_, cleared)) = entries.clear_first(part.start(), part.last()) {
                match cleared {
                    // Without a proof, for no device reached the frame through the child. One that reached
                    // it through the parent reaches it still, by the parent's own reference, or the parent
                    // gave that up with a proof.
                    Cleared::Frame(frame) => drop(self.pool.frames.put([frame])),
                    Cleared::Swapped(slot) => self.pool.put_slot(slot),
                }
            }
            left = rest_after(AddrRange::ALL, part);
        }
    }
}
