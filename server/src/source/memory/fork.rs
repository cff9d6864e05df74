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
use super::frame::FrameStore;
use super::gather::Bracket;
use super::page_table::{Entry, Stage, Table, Tables, page_after, rest_after};
use super::vma::{Stay, Vma, Vmas};
use crate::source::{Notifier, Translate};

/// `dup_mm`.
pub(super) async fn fork<N: Notifier>(
    inner: &Inner<N>,
    source: Arc<dyn Translate>,
    space: &Arc<AddressSpace>,
    name: &str,
) -> Result<AddressSpaceId, MemoryError> {
    let _claim = space.claim(AddrRange::ALL).await;
    let mapped = |vma: &Vma| vma.stay == Stay::Mapped;
    let vmas: Vec<Vma> = space.layout.read().vmas.overlapping(AddrRange::ALL).filter(mapped).collect();
    let mut child = Child::new(&inner.frames, Vmas::new(inner.config.most_mappings));
    for vma in vmas {
        child.vmas.map(vma.range, vma.access)?;
        copy_page_range(&*inner.notifier, space, vma, &child.tables).await?;
    }
    let id = inner.notifier.register(name, source).map_err(MemoryError::Notify)?;
    inner.add(id, child.vmas.take(), std::mem::take(&mut child.tables));
    Ok(id)
}

/// `copy_page_range`. A VMA without a page needs no round, and neither does one whose pages nobody may
/// write.
async fn copy_page_range<N: Notifier>(
    notifier: &N,
    space: &AddressSpace,
    vma: Vma,
    child: &Tables,
) -> Result<(), MemoryError> {
    if !has_pages(&space.tables, vma.range) {
        return Ok(());
    }
    let bracket = match vma.access {
        Access::Write => Some(Bracket::open(notifier, space.id, vma.range, Cause::ProtectionPage).await?.0),
        Access::Read => None,
    };
    let mut left = Some(vma.range);
    while let Some((part, table)) = left.and_then(|range| space.tables.first_in(range)) {
        copy_table(&space.frames, &table, child, part)?;
        tokio::task::yield_now().await;
        left = rest_after(vma.range, part);
    }
    if let Some(bracket) = bracket {
        bracket.close();
    }
    Ok(())
}

/// `copy_pte_range`.
fn copy_table(
    frames: &FrameStore,
    parent: &Table,
    child: &Tables,
    part: AddrRange,
) -> Result<(), MemoryError> {
    let mut entries = parent.lock();
    let mut at = entries.next_present(part.start(), part.last());
    if at.is_none() {
        return Ok(());
    }
    let table = child.get_or_make(part.start());
    let mut copies = table.lock();
    while let Some(address) = at {
        if let Some(entry) = entries.get_mut(address) {
            let frame = frames.share(&entry.frame)?;
            entry.allows = Access::Read;
            copies.install(address, Entry { frame, allows: Access::Read, stage: Stage::Settled });
        }
        at = page_after(address, part.last()).and_then(|next| entries.next_present(next, part.last()));
    }
    Ok(())
}

fn has_pages(tables: &Tables, range: AddrRange) -> bool {
    let mut left = Some(range);
    while let Some((part, table)) = left.and_then(|range| tables.first_in(range)) {
        if table.lock().next_present(part.start(), part.last()).is_some() {
            return true;
        }
        left = rest_after(range, part);
    }
    false
}

/// A child that no device knows yet. Dropped, it gives back what it shares.
#[derive(Debug)]
struct Child<'a> {
    frames: &'a FrameStore,
    vmas: Vmas,
    tables: Tables,
}

impl<'a> Child<'a> {
    fn new(frames: &'a FrameStore, vmas: Vmas) -> Self {
        Self { frames, vmas, tables: Tables::default() }
    }
}

impl Drop for Child<'_> {
    fn drop(&mut self) {
        let mut left = Some(AddrRange::ALL);
        while let Some((part, table)) = left.and_then(|range| self.tables.first_in(range)) {
            let mut entries = table.lock();
            while let Some((_, entry)) = entries.clear_first(part.start(), part.last()) {
                // Without a proof, for no device reached the frame through the child.
                self.frames.put([entry.frame]);
            }
            left = rest_after(AddrRange::ALL, part);
        }
    }
}
