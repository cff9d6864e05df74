//! A picture of an address space: a child that nobody runs in and no device can subscribe to.
//!
//! ```text
//!   claim the whole address space
//!   for each VMA of anonymous memory that has pages: as fork does
//!       invalidate_range_start, PROTECTION_PAGE: devices lose the leave to write
//!           write-protect the entries; the picture's share their frames
//!       invalidate_range_end
//!   the picture is not registered: no notifier knows it, and dropping it tells nobody
//!
//!       store --- shared with a picture ---> do_wp_page copies, tells devices, and gives the old frame up
//!                 the picture was dropped -> do_wp_page reuses the frame, and tells nobody
//! ```
//!
//! It is of the same moment as a child is: each page is as it was at one moment of the call, for the CPU and for
//! devices. Who stores in several pages meanwhile may find one of them before its store, and a later one
//! after it. A file's pages are left out, as fork leaves them out: whoever maps the file changes them.
//!
//! A page that a picture shares cannot be moved or reclaimed: it has a reference that no place accounts for.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use shootdown_core::{Access, AddrRange, AddressSpaceId};

use super::address_space::AddressSpace;
use super::error::MemoryError;
use super::fork::{Child, dup_mmap};
use super::frame::FRAME_BYTES;
use super::page_table::Slot;
use super::twin::Twin;
use super::{Inner, MemorySource, parts_of, span_of, within_page};
use crate::source::Notifier;

/// An address space as it was: what its anonymous mappings held. Dropped, it gives back the frames and the
/// slots of the swap file that it shares, without telling anybody. It may outlive its address space.
///
/// The price is a frame for each page that is written to while it lives.
#[derive(Debug)]
pub struct Snapshot {
    picture: Child,
}

impl<N: Notifier> MemorySource<N> {
    /// Takes a picture of an address space, which goes on. Each page is as it was at one moment of the call,
    /// not all of them at the same one, if somebody stores meanwhile. Mappings of files are left out.
    ///
    /// # Errors
    /// [`MemoryError::Notify`], [`MemoryError::NotQuiesced`], [`MemoryError::Frame`] if a frame is shared as
    /// often as it may be: there is no picture then. [`MemoryError::AddressSpaceUnknown`],
    /// [`MemoryError::Exiting`], [`MemoryError::TaskEnded`].
    ///
    /// # Cancel safety
    /// Dropped after it was polled, it goes on, and gives its picture back.
    pub async fn snapshot(&self, id: AddressSpaceId) -> Result<Snapshot, MemoryError> {
        let user = self.space(id)?.enter()?;
        let inner = Arc::clone(&self.inner);
        self.owned(Twin::Snapshot, async move { take(&inner, &user.space).await }).await
    }
}

async fn take<N: Notifier>(inner: &Inner<N>, space: &Arc<AddressSpace>) -> Result<Snapshot, MemoryError> {
    let _claim = space.claim(AddrRange::ALL).await;
    let picture = dup_mmap(inner, space, |vma| vma.object.backing().is_none()).await?;
    Ok(Snapshot { picture })
}

impl Snapshot {
    /// What is mapped in it, lowest first. Neighbours that differ in what they allow, or were mapped apart,
    /// are ranges of their own.
    #[must_use]
    pub fn ranges(&self) -> Vec<AddrRange> {
        self.picture.vmas.overlapping(AddrRange::ALL).map(|vma| vma.range).collect()
    }

    /// The bytes as they were: any alignment, across pages. A page that had never been touched is of zeros.
    ///
    /// # Errors
    /// [`MemoryError::Unmapped`] if a byte is not in the picture, [`MemoryError::Frame`] or
    /// [`MemoryError::Swap`] if the memory or the swap file failed, [`MemoryError::Range`].
    pub fn load(&self, address: u64, length: usize) -> Result<Bytes, MemoryError> {
        let Some(range) = span_of(address, length)? else { return Ok(Bytes::new()) };
        self.picture.vmas.all_allowing(range, Access::Read)?;
        let mut out = BytesMut::new();
        for part in parts_of(range) {
            let (offset, length) = within_page(part);
            let page = self.page(part.start())?;
            out.extend_from_slice(&page[offset as usize..][..length as usize]);
        }
        Ok(out.freeze())
    }

    fn page(&self, address: u64) -> Result<[u8; FRAME_BYTES], MemoryError> {
        let Child { pool, tables, .. } = &self.picture;
        let Some(table) = tables.get(address) else { return Ok([0; FRAME_BYTES]) };
        // Nobody else has this lock for longer: the table is the picture's own.
        let entries = table.lock();
        Ok(match entries.slot(address) {
            Slot::Absent => [0; FRAME_BYTES],
            Slot::Present(entry) | Slot::Moving(entry) => pool.frames.bytes(&entry.frame)?,
            Slot::Swapped(slot) => pool.swap()?.read(slot)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::frame::FrameStore;
    use super::super::page_table::Tables;
    use super::super::pool::Pool;
    use super::super::swap::SwapFile;
    use super::super::vma::Vmas;
    use super::*;

    #[test]
    fn pages_in_the_swap_file_are_read_from_there_and_given_back() {
        let swap = Arc::new(SwapFile::on(tempfile::tempfile().unwrap(), 4).unwrap());
        let pool = Pool::new(FrameStore::new(1).unwrap(), Some(Arc::clone(&swap)), 1);
        let mut vmas = Vmas::new(1);
        vmas.map(AddrRange::new(0, 8192).unwrap(), Access::Write).unwrap();
        let tables = Tables::default();
        let slot = swap.filled(&[5; FRAME_BYTES]);
        let shared = swap.share(&slot).unwrap();
        tables.get_or_make(0).lock().replace(4096, Slot::Swapped(shared));
        let snapshot = Snapshot { picture: Child { pool, vmas, tables } };
        swap.put(slot);
        assert_eq!(snapshot.load(4094, 4).unwrap()[..], [0, 0, 5, 5]);
        drop(snapshot);
        assert_eq!(swap.in_use(), 0);
    }
}
