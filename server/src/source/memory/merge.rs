//! Equal pages become one: ksmd, `scan_get_next_rmap_item` and `cmp_and_merge_page`.
//!
//! ```text
//!   the cursor goes from page to page through every mapping that asked for it, and begins again at the end
//!       checksum --> is a merged page known with it? (stable)  or another page of this round? (unstable)
//!           no:  the page is known by it from now on                                  (unstable_tree_insert)
//!           yes: isolate that one; are the bytes equal?  --no--> the page takes its place in the table
//!                try_to_merge (see `share`): write-protect both, wait, compare again, replace
//!                    done: what is kept is known as merged
//! ```
//!
//! Both tables are hints: they name lives of frames, hold no reference, and nothing is merged that was not
//! compared byte by byte while nobody could write to it. The kernel has trees ordered by content where tables
//! of checksums are here. It also waits until a page kept its checksum for one round of the cursor; here a
//! page that changes often finds a partner only if both are equal at that moment, and then costs the rounds
//! of one attempt.
//!
//! A merged page has its reference in each page table, read-only, and a write to one copies it
//! (`do_wp_page`). Where the other places have gone, the last one is made writable in place: the kernel would
//! copy there too, for its tree needs the content to stay; the table here does not, for it is only a hint.

use std::collections::HashMap;
use std::hash::{BuildHasher as _, RandomState};
use std::ops::Bound;
use std::sync::Arc;

use shootdown_core::{Access, AddrRange, AddressSpaceId};

use super::address_space::AddressSpace;
use super::error::MemoryError;
use super::frame::{FrameLife, FrameStore};
use super::lru::Isolated;
use super::page_table::page_after;
use super::share::try_to_merge;
use super::twin::Twin;
use super::vma::Stay;
use super::{Inner, MemorySource, whole_pages};
use crate::source::Notifier;

/// What [`MemorySource::merge`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Merged {
    /// Pages that were looked at.
    pub looked_at: usize,
    /// Those that show another page's frame now, because it has the same bytes. Their own was given back,
    /// unless something shares it still.
    pub merged: usize,
}

impl<N: Notifier> MemorySource<N> {
    /// Pages of the range may be merged with equal ones from now on (`MADV_MERGEABLE`). Of a file's mapping
    /// this says nothing: its pages are not merged.
    ///
    /// # Errors
    /// [`MemoryError::Unmapped`] if a part of it is not mapped, [`MemoryError::TooManyMappings`],
    /// [`MemoryError::Range`], [`MemoryError::AddressSpaceUnknown`], [`MemoryError::Exiting`].
    pub fn advise_merge(&self, id: AddressSpaceId, range: AddrRange) -> Result<(), MemoryError> {
        whole_pages(range)?;
        let space = self.space(id)?;
        let mut layout = space.layout.write();
        layout.check_door(id)?;
        layout.vmas.all_allowing(range, Access::Read)?;
        layout.vmas.change(range, |vma| vma.flags.mergeable = vma.object.backing().is_none())
    }

    /// One pass of ksmd: looks at up to `pages` pages, of all address spaces, from where the last pass
    /// stopped. It ends early when it has come to the last page; the next one begins again (`ksm_do_scan`).
    ///
    /// Pages that are locked in memory, of a file, or in another's hands stay as they are.
    ///
    /// # Errors
    /// [`MemoryError::Notify`], [`MemoryError::NotQuiesced`]: wherever devices could not be told of a page it
    /// is as it was; those before it are merged. After a NotQuiesced of the replacement, a device may read
    /// the other page's frame there: both frames are kept until the address space exits, and the next write
    /// copies. [`MemoryError::Frame`], [`MemoryError::TaskEnded`].
    ///
    /// # Cancel safety
    /// Dropped after it was polled, it goes on.
    pub async fn merge(&self, pages: usize) -> Result<Merged, MemoryError> {
        let inner = Arc::clone(&self.inner);
        self.owned(Twin::Merge, async move { scan(&inner, pages).await }).await
    }
}

/// Where ksmd is, and what it knows (`ksm_scan`, `root_stable_tree`, `root_unstable_tree`).
///
/// The lock around it is taken before any other, and is not held while pages are compared.
#[derive(Debug)]
pub(super) struct Scan {
    checksum: RandomState,
    /// The next page of an address space; `None` where it has no further one.
    at: (AddressSpaceId, Option<u64>),
    /// Merged pages.
    stable: HashMap<u64, FrameLife>,
    /// Pages of this round of the cursor that were met alone.
    unstable: HashMap<u64, FrameLife>,
}

impl Default for Scan {
    fn default() -> Self {
        let at = (AddressSpaceId::FIRST, Some(0));
        Self { checksum: RandomState::new(), at, stable: HashMap::new(), unstable: HashMap::new() }
    }
}

impl Scan {
    /// The page that may be equal to this one; where none is known, this one is from now on.
    fn partner(&mut self, sum: u64, life: FrameLife) -> Option<FrameLife> {
        let known = self.stable.get(&sum).or_else(|| self.unstable.get(&sum)).copied();
        if known.is_none() {
            self.unstable.insert(sum, life);
        }
        known.filter(|known| *known != life)
    }

    /// What was known by `sum` has changed, or is gone.
    fn superseded(&mut self, sum: u64, was: FrameLife, is: FrameLife) {
        self.stable.retain(|key, life| (*key, *life) != (sum, was));
        self.unstable.insert(sum, is);
    }

    fn merged(&mut self, sum: u64, kept: FrameLife) {
        self.unstable.remove(&sum);
        // A page that was written in place meanwhile is known by what it holds now, and by nothing else.
        self.stable.retain(|_, life| *life != kept);
        self.stable.insert(sum, kept);
    }

    fn begin_again(&mut self, frames: &FrameStore) {
        self.at = (AddressSpaceId::FIRST, Some(0));
        self.unstable.clear();
        self.stable.retain(|_, life| frames.lives(*life));
    }
}

/// `ksm_do_scan`.
async fn scan<N: Notifier>(inner: &Inner<N>, pages: usize) -> Result<Merged, MemoryError> {
    let mut done = Merged::default();
    while done.looked_at < pages {
        let Some(page) = next_page(inner) else { break };
        done.looked_at += 1;
        if let Some(page) = page {
            done.merged += usize::from(cmp_and_merge_page(inner, page).await?);
        }
        tokio::task::yield_now().await;
    }
    Ok(done)
}

/// `scan_get_next_rmap_item`: the next page, for us alone if it can be had so. `None` at the end of the last
/// address space, where the cursor begins again.
#[expect(clippy::option_option, reason = "no page, and a page in another's hands, are two things")]
fn next_page<N: Notifier>(inner: &Inner<N>) -> Option<Option<Isolated>> {
    let scan = &mut *inner.merging.lock();
    let (mut id, mut from) = scan.at;
    let mut bound = Bound::Included(id);
    loop {
        let space =
            inner.spaces.read().range((bound, Bound::Unbounded)).next().map(|(_, space)| Arc::clone(space));
        let Some(space) = space else {
            scan.begin_again(&inner.pool.frames);
            return None;
        };
        if space.id != id {
            (id, from) = (space.id, Some(0));
        }
        if let Some((address, page)) = from.and_then(|from| next_mergeable(&space, from)) {
            scan.at = (id, page_after(address, u64::MAX));
            return Some(page);
        }
        bound = Bound::Excluded(id);
    }
}

/// The first page from `from` on that is present in a mapping that asked for merging.
fn next_mergeable(space: &AddressSpace, from: u64) -> Option<(u64, Option<Isolated>)> {
    let layout = space.layout.read();
    layout.check_door(space.id).ok()?;
    let rest = if from == 0 { AddrRange::ALL } else { AddrRange::new(from, 0).ok()? };
    layout
        .vmas
        .overlapping(rest)
        .filter(|vma| vma.stay == Stay::Mapped && vma.flags.mergeable && !vma.flags.locked)
        .filter_map(|vma| vma.range.intersection(rest))
        .find_map(|part| space.isolate_next(part.start(), part.last()))
}

/// `cmp_and_merge_page`. Whether the page was merged.
async fn cmp_and_merge_page<N: Notifier>(inner: &Inner<N>, page: Isolated) -> Result<bool, MemoryError> {
    let pool = &inner.pool;
    let bytes = pool.frames.bytes(page.pin())?;
    let (sum, partner) = {
        let scan = &mut *inner.merging.lock();
        let sum = scan.checksum.hash_one(bytes);
        (sum, scan.partner(sum, page.life()))
    };
    let Some(partner) = partner else { return Ok(false) };
    let Some(mut kept) = pool.lru.isolate(partner) else {
        if !pool.frames.lives(partner) {
            inner.merging.lock().superseded(sum, partner, page.life());
        }
        return Ok(false);
    };
    // Before anybody is told: what has changed since it was looked at costs no round.
    if pool.frames.bytes(kept.pin())? != bytes {
        inner.merging.lock().superseded(sum, partner, page.life());
        return Ok(false);
    }
    let merged = try_to_merge(inner, &page, &mut kept).await?;
    if merged {
        inner.merging.lock().merged(sum, partner);
    }
    Ok(merged)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_merged_page_is_known_by_what_it_holds_now_and_by_nothing_else() {
        let frames = FrameStore::new(3).unwrap();
        let taken = [(); 3].map(|()| frames.take_zeroed().unwrap());
        let [kept, other, third] = [0, 1, 2].map(|index: usize| taken[index].life());
        let mut scan = Scan::default();
        assert_eq!(scan.partner(70, kept), None, "it is met alone");
        assert_eq!(scan.partner(70, other), Some(kept));
        scan.merged(70, kept);
        // The other place has gone, it was written in place, and is equal to a third one now.
        assert_eq!(scan.partner(80, kept), None);
        assert_eq!(scan.partner(80, third), Some(kept));
        scan.merged(80, kept);
        assert_eq!((scan.stable.len(), scan.unstable.len()), (1, 0));
        assert_eq!(scan.partner(70, other), None, "nobody holds what it held");
        assert_eq!(scan.partner(80, other), Some(kept));
        frames.put(taken);
        scan.begin_again(&frames);
        assert!(scan.stable.is_empty(), "its frame was freed");
    }
}
