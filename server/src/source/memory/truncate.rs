//! A file gets another length: `truncate_setsize`, `truncate_pagecache`, `unmap_mapping_range`.
//!
//! ```text
//!   the file ends at the new length: no fault finds a page beyond it          (i_size_write)
//!   the index of the last page is held, if a part of it is cut
//!   for each VMA that shows a part of the cut, until none has an entry there:
//!       claim it; invalidate_range_start, CLEAR; zap and flush block by block; invalidate_range_end     (see zap)
//!           --refused--> the file is as long as it was; pages that were unmapped are mapped by the next touch
//!   the tail of the last page is zeroed: no CPU and no device writes there any more
//!   its pages leave the cache, those last that something is at work on; they are freed
//!   the file is cut on disk
//! ```
//!
//! A file that grows has a hole at its end. Where its last page has a tail, the same is done with that page
//! first: what was stored there beyond the end must not come into the file.
//!
//! An address space that is coming to its end is waited for, where its release has begun: its devices may use the
//! pages until then.

use std::sync::Arc;

use shootdown_core::{AddrRange, Cause};

use super::address_space::AddressSpace;
use super::error::MemoryError;
use super::file::{MemoryFile, OpenFile};
use super::fork::has_pages;
use super::frame::FRAME_BYTES;
use super::object::Object;
use super::outcome::Released;
use super::page_cache::{Backing, Hold, Left, Part, index_of, position_of};
use super::twin::Twin;
use super::vma::Stay;
use super::zap::unmap_vmas;
use super::{Inner, MemorySource};
use crate::source::Notifier;

impl<N: Notifier> MemorySource<N> {
    /// Gives a file another length (`ftruncate`), and returns when the pages beyond it are released. From its first
    /// poll a page beyond it that is not mapped yet cannot be touched any more. What a file gains is a hole.
    ///
    /// # Errors
    /// [`MemoryError::Notify`], [`MemoryError::NotQuiesced`]: the file is as long as it was, with its content.
    /// [`MemoryError::File`]: the disk refused; in memory the pages beyond a shorter length have gone.
    /// [`MemoryError::Frame`], [`MemoryError::TaskEnded`].
    ///
    /// # Cancel safety
    /// Dropped after it was polled, it goes on.
    pub async fn truncate(&self, file: &MemoryFile, length: u64) -> Result<Released, MemoryError> {
        let (inner, open) = (Arc::clone(&self.inner), Arc::clone(&file.open));
        self.owned(Twin::Truncate, async move { truncate(&inner, &open, length).await }).await
    }
}

async fn truncate<N: Notifier>(
    inner: &Inner<N>,
    open: &OpenFile,
    length: u64,
) -> Result<Released, MemoryError> {
    let backing = &open.backing;
    if i64::try_from(length).is_err() {
        return Err(super::page_cache::failed(std::io::ErrorKind::FileTooLarge.into()));
    }
    let _length = backing.hold(Part::Length, Hold::Alone).await;
    let old = backing.lock().length;
    let kept = old.min(length);
    let mut shrinking = Shrinking { backing, old, begun: length < old };
    backing.lock().length = kept;

    let last = index_of(kept);
    let tail = usize::try_from(kept - position_of(last)).unwrap_or(0);
    let _held = if tail > 0 { Some(backing.hold(Part::Page(last), Hold::Alone).await) } else { None };
    let mut released = Released::default();
    if let Some(cut) = cut_of(last, tail, length < old) {
        unmap_mapping_range(inner, &open.object, cut, &mut released).await?;
    }
    let cached = backing.lock().get(last).map(|cached| cached.frame.number());
    if let (Some(frame), 1..) = (cached, tail) {
        let zeros = [0; FRAME_BYTES];
        inner.pool.frames.write(frame, u32::try_from(tail).unwrap_or(0), &zeros[tail..])?;
    }
    // From here on it does not come back.
    shrinking.begun = false;
    if length < old {
        released.frames += drop_pages(inner, backing, last + u64::from(tail > 0)).await;
    }
    backing.set_disk_length(kept, length)?;
    backing.lock().length = length;
    Ok(released)
}

/// The positions that are unmapped: from the last page on that keeps a part, or that page alone.
fn cut_of(last: u64, tail: usize, shrinks: bool) -> Option<AddrRange> {
    let start = position_of(last);
    match (shrinks, tail) {
        (true, _) if start == 0 => Some(AddrRange::ALL),
        (true, _) => AddrRange::new(start, 0).ok(),
        (false, 0) => None,
        (false, _) => AddrRange::new(start, start + FRAME_BYTES as u64).ok(),
    }
}

/// `unmap_mapping_range`: until a walk finds nothing, for what is moved to another address meanwhile is met at
/// neither.
async fn unmap_mapping_range<N: Notifier>(
    inner: &Inner<N>,
    object: &Arc<Object>,
    cut: AddrRange,
    released: &mut Released,
) -> Result<(), MemoryError> {
    loop {
        let mut met = false;
        let shown = {
            let Some(backing) = object.backing() else { return Ok(()) };
            let _stay = backing.places_stay().await;
            object.shown_in(cut)
        };
        for (space, range) in shown {
            let Some(user) = space.visit().await else { continue };
            let space = &user.space;
            let _claim = space.claim(range).await;
            let parts = still_shown(space, object, cut, range);
            // It was moved before its turn came: the next walk meets it.
            met |= parts.is_empty();
            for part in parts {
                if has_pages(&space.tables, part) {
                    met = true;
                    released.add(unmap_vmas(inner, space, part, &[part], Cause::Clear).await?);
                }
            }
        }
        if !met {
            return Ok(());
        }
    }
}

/// Which parts of `range` show a part of `cut`, now that nothing can change there.
fn still_shown(
    space: &AddressSpace,
    object: &Arc<Object>,
    cut: AddrRange,
    range: AddrRange,
) -> Vec<AddrRange> {
    let layout = space.layout.read();
    let of_file = layout.vmas.overlapping(range).filter(|vma| Arc::ptr_eq(&vma.object, object));
    let shown = of_file.filter(|vma| vma.stay == Stay::Mapped).filter_map(|vma| {
        let part = vma.range.intersection(range)?;
        let (first, last) = (vma.position_of(part.start()), vma.position_of(part.last()));
        let shown = AddrRange::new(first, last.wrapping_add(1)).ok()?.intersection(cut)?;
        let start = part.start() + (shown.start() - first);
        AddrRange::new(start, start.wrapping_add(shown.last() - shown.start() + 1)).ok()
    });
    shown.collect()
}

/// `truncate_inode_pages`. How many frames were freed. No entry shows them, each having gone with its round; and
/// what is at work on one is waited for.
async fn drop_pages<N: Notifier>(inner: &Inner<N>, backing: &Backing, first: u64) -> usize {
    let mut freed = 0;
    backing
        .wait_for(|| {
            let (frames, left) = backing.lock().cut(first);
            freed += inner.pool.frames.put(frames);
            (left == Left::Nothing).then_some(())
        })
        .await;
    freed
}

/// A file that is to be shorter. Dropped while it is, it is as long as it was.
struct Shrinking<'a> {
    backing: &'a Backing,
    old: u64,
    begun: bool,
}

impl Drop for Shrinking<'_> {
    fn drop(&mut self) {
        if self.begun {
            self.backing.lock().length = self.old;
        }
    }
}

impl Released {
    /// What was released besides.
    fn add(&mut self, more: Self) {
        self.pages += more.pages;
        self.frames += more.frames;
        self.blocks += more.blocks;
        self.tables += more.tables;
        self.rounds.extend(more.rounds);
        self.release += more.release;
    }
}
