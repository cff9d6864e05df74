//! Memory that a file backs: how it is mapped, `filemap_fault`, `page_mkwrite`, and a page's way out for reclaim.
//!
//! ```text
//!   fault:
//!       page-table lock -> cache: is the page there, and nobody alone with it?
//!           --yes--> map it: for a read read-only, for a write writable, and the page is dirty     (page_mkwrite)
//!       unlock; hold its index: other faults at it wait
//!       a hole that is read --> the placeholder is mapped, read-only                 (see placeholder)
//!       no lock: read it from disk; it comes into the cache; placeholders in its place go
//!       let go, and look again
//!   evict:
//!       the page is isolated; hold its index; try_to_unmap: devices stop and hand over what they wrote
//!       is it dirty?  --yes--> write it to disk           --failed--> everything comes back
//!       it leaves the cache, and is freed; let go: a fault reads it from disk
//! ```
//!
//! Every mapping is shared (`MAP_SHARED`). A clean page is mapped read-only even where the mapping may be
//! written, so that the first store is seen: from then on it is dirty, until it is written back.

use std::fs::File;
use std::io;
use std::sync::Arc;

use rustix::fs::OFlags;
use shootdown_core::{Access, AddrRange, AddressSpaceId, Cause, PageSize, RangeError};

use super::address_space::AddressSpace;
use super::error::MemoryError;
use super::frame::{FRAME_BYTES, FrameLife};
use super::lru::Isolated;
use super::object::Object;
use super::page_cache::{self, Backing, Hold, Part, failed, index_of};
use super::page_table::{Entry, Slot};
use super::placeholder;
use super::rmap::{Kept, Locked, try_to_unmap};
use super::vma::{Flags, Stay, Vma};
use super::{Inner, MemorySource, whole_pages};
use crate::source::Notifier;

/// A file whose pages can be mapped. A clone is the same file.
///
/// A page that was written is in the file when [`MemorySource::write_back`] has returned, and not before. When
/// the last handle is dropped and nothing maps the file any more, its pages are given back; bytes that were not
/// written back by then are lost, and a warning says how many pages.
#[derive(Debug, Clone)]
pub struct MemoryFile {
    pub(super) open: Arc<OpenFile>,
}

/// What keeps a file's pages in memory (`struct file`): handles and mappings have it. Dropped, they go.
///
/// The pages themselves, which know their file by the LRU, do not: else they would keep themselves.
#[derive(Debug)]
pub(super) struct OpenFile {
    pub(super) object: Arc<Object>,
    pub(super) backing: Arc<Backing>,
    writable: Access,
}

/// What became of a page that was to be evicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Evicted {
    /// No frame holds it any more; what was written to it is in the file.
    Freed,
    /// Something else is at work on it, or it is locked in memory.
    Kept,
}

impl<N: Notifier> MemorySource<N> {
    /// Opens a file for mapping: its first `length` bytes. One that is open for writing and shorter is made so
    /// long, with a hole.
    ///
    /// # Errors
    /// [`MemoryError::File`]: `length` is beyond 2^63 - 1, or the system refused.
    pub fn open_file(&self, file: File, length: u64) -> Result<MemoryFile, MemoryError> {
        if i64::try_from(length).is_err() {
            let text = "a file has at most 2^63 - 1 bytes";
            return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, text)));
        }
        let flags = rustix::fs::fcntl_getfl(&file).map_err(|error| failed(error.into()))?;
        let writable = if flags & OFlags::RWMODE == OFlags::RDONLY { Access::Read } else { Access::Write };
        let metadata = file.metadata().map_err(failed)?;
        if metadata.is_file() && metadata.len() < length && writable == Access::Write {
            file.set_len(length).map_err(failed)?;
        }
        let frames = Arc::clone(self.frames());
        let open = Arc::new_cyclic(|open| {
            let backing = Backing::new(frames, open.clone(), file, length);
            OpenFile { object: Object::of_file(Arc::clone(&backing)), backing, writable }
        });
        Ok(MemoryFile { open })
    }

    /// Maps a part of a file from its byte `offset` on, in whole pages (`mmap` with `MAP_SHARED`): every mapping
    /// shows the same pages.
    ///
    /// # Errors
    /// [`MemoryError::BeyondEnd`] if a page of it begins at the file's end or beyond, [`MemoryError::ReadOnly`] if it
    /// is to be written and the file was not opened so, [`MemoryError::Range`] also for an offset that is no
    /// page's, [`MemoryError::File`] for a file that another source opened; else as [`MemorySource::map`].
    pub fn map_file(
        &self,
        id: AddressSpaceId,
        range: AddrRange,
        access: Access,
        file: &MemoryFile,
        offset: u64,
    ) -> Result<(), MemoryError> {
        whole_pages(range)?;
        let open = &file.open;
        if !Arc::ptr_eq(&open.backing.frames, self.frames()) {
            let text = "the file was opened by another memory source";
            return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, text)));
        }
        if offset & PageSize::BASE.offset_mask() != 0 {
            let (start, end, page_bytes) = (offset, range.wire_end(), PageSize::BASE.bytes());
            return Err(RangeError::Unaligned { start, end, page_bytes }.into());
        }
        if access > open.writable {
            return Err(MemoryError::ReadOnly { address: range.start() });
        }
        let space = self.space(id)?;
        let mut layout = space.layout.write();
        layout.check_door(id)?;
        let length = open.backing.lock().length.next_multiple_of(FRAME_BYTES as u64);
        let shown = length.saturating_sub(offset);
        if range.last() - range.start() >= shown {
            return Err(MemoryError::BeyondEnd { address: range.start() + shown });
        }
        let object = Arc::clone(&open.object);
        let (stay, flags, file) = (Stay::Mapped, Flags::default(), Some(Arc::clone(open)));
        layout.vmas.add(Vma { range, access, stay, flags, object, offset, file })
    }
}

impl MemoryFile {
    /// How long it is, in bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.open.backing.lock().length
    }

    /// How many of its pages are in memory. The placeholder, which holes show, is none of them.
    #[must_use]
    pub fn cached_pages(&self) -> usize {
        self.open.backing.lock().pages().count()
    }

    /// How many of its pages were made writable since they were written back last.
    #[must_use]
    pub fn dirty_pages(&self) -> usize {
        self.open.backing.lock().pages().filter(|(_, cached)| cached.dirty).count()
    }
}

impl OpenFile {
    /// Whether it was opened for writing.
    pub(super) fn may_write(&self) -> bool {
        self.writable == Access::Write
    }
}

impl Drop for OpenFile {
    fn drop(&mut self) {
        self.backing.forget();
    }
}

/// Makes the page at `address`, which a file backs, present for `access` (`do_fault`, `page_mkwrite`). Where
/// something else is in the way, it returns, for the touch to find out.
pub(super) async fn fault<N: Notifier>(
    inner: &Inner<N>,
    space: &Arc<AddressSpace>,
    address: u64,
    access: Access,
) -> Result<(), MemoryError> {
    while let Some(vma) = map_cached(space, address, access)? {
        let Some(backing) = vma.object.backing() else { return Ok(()) };
        let index = index_of(vma.position_of(address));
        let _held = backing.hold(Part::Page(index), Hold::Alone).await;
        let is_cached = backing.lock().get(index).is_some();
        if !is_cached {
            bring_in(inner, space, &vma, address, access).await?;
        } else if access == Access::Write {
            // A page that is there while an entry shows the placeholder: its round had been refused.
            placeholder::unmap(inner, &vma.object, backing, index).await?;
        }
    }
    Ok(())
}

/// Maps the page if it is in the cache and nobody is alone with it, or leave to write is all that is missing.
/// What is mapped there, if the page is not to be had so.
fn map_cached(space: &AddressSpace, address: u64, access: Access) -> Result<Option<Vma>, MemoryError> {
    let layout = space.layout.read();
    layout.check_door(space.id)?;
    let vma = layout.vmas.allowing(address, access)?;
    let Some(backing) = vma.object.backing().cloned() else { return Ok(None) };
    let index = index_of(vma.position_of(address));
    let table = space.tables.get_or_make(address);
    let mut entries = table.lock();
    match entries.slot(address) {
        Slot::Present(entry) if access <= entry.allows => return Ok(None),
        Slot::Moving(_) | Slot::Swapped(_) => return Ok(None),
        Slot::Absent | Slot::Present(_) => {}
    }
    let mut cache = backing.lock();
    if cache.is_beyond(index) {
        return Err(MemoryError::BeyondEnd { address });
    }
    let alone = cache.is_held(index, Hold::Alone);
    let Some(cached) = cache.get_mut(index).filter(|_| !alone) else { return Ok(Some(vma)) };
    match entries.get_mut(address) {
        Some(entry) if entry.is_life(cached.frame.life()) => entry.allows = access,
        Some(_) => return Ok(Some(vma)),
        None => {
            let entry = Entry::new(space.frames.share(&cached.frame)?, access);
            entries.install(address, entry);
        }
    }
    // Before the first byte is stored: a write-back that clears it afterwards write-protects the entry.
    cached.dirty |= access == Access::Write;
    Ok(None)
}

/// Brings a page in that is not in the cache. The caller holds its index.
async fn bring_in<N: Notifier>(
    inner: &Inner<N>,
    space: &Arc<AddressSpace>,
    vma: &Vma,
    address: u64,
    access: Access,
) -> Result<(), MemoryError> {
    let Some(backing) = vma.object.backing() else { return Ok(()) };
    let index = index_of(vma.position_of(address));
    let hole = backing.is_hole(index);
    if hole && access == Access::Read {
        return placeholder::map(space, address, &vma.object, index);
    }
    let frame = if hole {
        inner.pool.frames.take_zeroed()?
    } else {
        inner.pool.frames.take_filled(&backing.read(index)?)?
    };
    let life = frame.life();
    if let Err(frame) = backing.insert(&inner.pool.lru, &vma.object, index, frame) {
        // It is beyond the end by now, and nobody has seen the frame.
        inner.pool.frames.put([frame]);
        return Ok(());
    }
    let mut arrival = Arrival { backing, index, life: Some(life) };
    placeholder::unmap(inner, &vma.object, backing, index).await?;
    arrival.life = None;
    Ok(())
}

/// A page that is in the cache and must not be found there yet. Dropped, it goes again: a device may still read
/// zeros in its place.
struct Arrival<'a> {
    backing: &'a Backing,
    index: u64,
    life: Option<FrameLife>,
}

impl Drop for Arrival<'_> {
    fn drop(&mut self) {
        let frame = self.life.and_then(|life| self.backing.remove(self.index, life));
        // The index was held all the time: nobody has mapped the frame.
        self.backing.frames.put(frame);
    }
}

/// Frees a page of a file (`shrink_page_list` for a page that has a mapping): takes it out of every page table,
/// writes it to the file if it is dirty, and takes it out of the cache.
///
/// # Errors
/// [`MemoryError::Notify`], [`MemoryError::NotQuiesced`], [`MemoryError::File`], [`MemoryError::Frame`]: everything is as
/// it was.
pub(super) async fn evict<N: Notifier>(inner: &Inner<N>, page: Isolated) -> Result<Evicted, MemoryError> {
    let Some((_, backing, index)) = page_cache::of_page(&page) else { return Ok(Evicted::Kept) };
    let (backing, life) = (Arc::clone(backing), page.life());
    let Some(_held) = backing.try_hold(Part::Page(index), Hold::Alone) else { return Ok(Evicted::Kept) };
    if backing.lock().get(index).is_none_or(|cached| cached.frame.life() != life) {
        return Ok(Evicted::Kept);
    }
    let unmapped = match try_to_unmap(inner, page, Cause::Clear, Locked::Stay).await {
        Ok(unmapped) => unmapped,
        Err((_, Kept::Refused(error))) => return Err(error),
        Err((_, Kept::Busy | Kept::Locked)) => return Ok(Evicted::Kept),
    };
    // The entries first: one that is zapped between the two looks has left its dirty bit with the page.
    let dirty = unmapped.is_dirty();
    if backing.lock().get(index).is_some_and(|cached| cached.dirty) || dirty {
        // Devices have handed over what they wrote, and nobody else can write: the bytes are the last ones.
        backing.write(index, &inner.pool.frames.bytes(unmapped.page().pin())?)?;
    }
    let page = unmapped.replace(|_| Slot::Absent);
    // Every entry has gone with its round; the page's own pin is the last reference.
    inner.pool.frames.put(backing.remove(index, life));
    drop(page);
    Ok(Evicted::Freed)
}

#[cfg(test)]
mod tests;
