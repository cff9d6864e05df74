//! A cluster of a file's entries is unmapped: `try_to_unmap_cluster`, after the patch of 2012 ("invalidate_page
//! outside PT lock").
//!
//! ```text
//!   claim the cluster; invalidate_range_start over what is mapped of it
//!   page-table lock
//!       for each entry: is it young?  --yes--> it is not any more, and stays     (ptep_clear_flush_young)
//!           clear it; its dirty bit goes to the page
//!   unlock; the entries' references go; invalidate_range_end
//! ```
//!
//! The pages stay in the page cache: the next touch maps them again without reading the disk.

use std::sync::Arc;

use shootdown_core::{AddrRange, AddressSpaceId, Cause};

use super::address_space::AddressSpace;
use super::error::MemoryError;
use super::fork::has_pages;
use super::frame::FRAME_BYTES;
use super::gather::{Bracket, Gather};
use super::page_cache::set_page_dirty;
use super::page_table::{Cleared, Slot, page_after};
use super::twin::Twin;
use super::vma::Stay;
use super::{Inner, MemorySource};
use crate::source::Notifier;

/// `CLUSTER_SIZE`: entries that are looked at together. Aligned, they are in one page table.
const CLUSTER_BYTES: u64 = 32 * FRAME_BYTES as u64;

/// What [`MemorySource::unmap_cluster`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ClusterUnmapped {
    /// Entries that were cleared.
    pub unmapped: usize,
    /// Entries that were young, and stayed.
    pub kept: usize,
}

impl<N: Notifier> MemorySource<N> {
    /// Unmaps the entries of a file's mapping in the 32 pages around `address`, but those that were used since
    /// they were asked last. Memory that no file backs, or that is locked, is left alone.
    ///
    /// # Errors
    /// [`MemoryError::Notify`], [`MemoryError::NotQuiesced`]: everything is mapped as it was.
    /// [`MemoryError::AddressSpaceUnknown`], [`MemoryError::Exiting`], [`MemoryError::TaskEnded`].
    ///
    /// # Cancel safety
    /// Dropped after it was polled, it goes on.
    pub async fn unmap_cluster(
        &self,
        id: AddressSpaceId,
        address: u64,
    ) -> Result<ClusterUnmapped, MemoryError> {
        let user = self.space(id)?.enter()?;
        let inner = Arc::clone(&self.inner);
        self.owned(Twin::Cluster, async move { unmap_cluster(&inner, &user.space, address).await }).await
    }
}

async fn unmap_cluster<N: Notifier>(
    inner: &Inner<N>,
    space: &Arc<AddressSpace>,
    address: u64,
) -> Result<ClusterUnmapped, MemoryError> {
    let start = address & !(CLUSTER_BYTES - 1);
    let cluster = AddrRange::new(start, start.wrapping_add(CLUSTER_BYTES))?;
    let _claim = space.claim(cluster).await;
    let page = AddrRange::new(address & !(FRAME_BYTES as u64 - 1), start.wrapping_add(CLUSTER_BYTES))?;
    let vma = space.layout.read().vmas.overlapping(page).next();
    let shows = |range: &AddrRange| range.contains_address(address);
    let Some(vma) = vma.filter(|vma| shows(&vma.range) && vma.stay == Stay::Mapped && !vma.flags.locked)
    else {
        return Ok(ClusterUnmapped::default());
    };
    let Some(range) = vma.range.intersection(cluster).filter(|_| vma.object.backing().is_some()) else {
        return Ok(ClusterUnmapped::default());
    };
    if !has_pages(&space.tables, range) {
        return Ok(ClusterUnmapped::default());
    }
    let (bracket, proof, _) = Bracket::open(&*inner.notifier, space.id, range, Cause::Clear).await?;
    let mut gather = Gather::new(Arc::clone(space), inner.config.zap_block_pages);
    let done = clear_cluster(space, range, &mut gather);
    gather.flush(&proof);
    bracket.close();
    Ok(done)
}

/// The loop of `try_to_unmap_cluster`, under the page-table lock.
fn clear_cluster(space: &AddressSpace, range: AddrRange, gather: &mut Gather) -> ClusterUnmapped {
    let mut done = ClusterUnmapped::default();
    let layout = space.layout.read();
    let Some(table) = space.tables.get(range.start()) else { return done };
    let mut entries = table.lock();
    let mut from = Some(range.start());
    while let Some(address) = from.and_then(|from| entries.next_occupied(from, range.last())) {
        from = page_after(address, range.last());
        // One that is moving has a holder already.
        let Some(entry) = entries.get_mut(address) else { continue };
        if std::mem::take(&mut entry.young) {
            done.kept += 1;
            continue;
        }
        if entry.dirty {
            set_page_dirty(&layout.vmas, address, entry.frame.life());
        }
        if let Slot::Present(entry) = entries.replace(address, Slot::Absent) {
            gather.add(Cleared::Frame(entry.frame));
            done.unmapped += 1;
        }
    }
    done
}
