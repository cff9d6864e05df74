//! Reclaim: room is made by taking out the pages that are used least. `try_to_free_pages`, `shrink_zone`,
//! `shrink_active_list`, `shrink_inactive_list`, and `MADV_PAGEOUT`.
//!
//! ```text
//!   active list, its old end  --age: used--> active, its new end
//!                             --not used---> inactive, its new end
//!   inactive list, its old end, up to 32 pages at once:
//!       page_referenced with clear_flush_young  --used--> active
//!       swap_out                                --stays--> a list
//! ```
//!
//! The pages of a batch go all at once: a device that is slow delays a batch by its rounds, not every page by
//! them.
//!
//! Who finds no room ([`Inner::make_room`]) is one of many; one reclaims, the others wait for it. It looks at
//! more pages from pass to pass, in the end without regard to young bits, and when a whole try has freed
//! nothing it waits for the operations that are under way, for they may hold the pages, or give some back. Out
//! of memory is what is left when nothing is under way that could help.

use std::sync::Arc;

use futures_util::future::join_all;
use shootdown_core::{Access, AddrRange, AddressSpaceId};

use super::address_space::AddressSpace;
use super::aging::{Ask, Used, age, page_referenced};
use super::error::MemoryError;
use super::lru::{Isolated, List};
use super::page_table::page_after;
use super::swap_out::{Stays, could_go, swap_out};
use super::twin::Twin;
use super::{Inner, MemorySource, whole_pages};
use crate::source::Notifier;

/// What [`MemorySource::page_out`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PagedOut {
    /// Pages that no frame holds any more.
    pub out: usize,
    /// Pages that stayed: locked, or something else was at work on them.
    pub kept: usize,
}

/// What [`MemorySource::age`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Aged {
    /// Pages of the active list that were looked at.
    pub looked_at: usize,
    /// Those that were used, by the CPU or by a device.
    pub young: usize,
}

/// What [`MemorySource::reclaim`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reclaimed {
    /// Frames that were freed.
    pub freed: usize,
    /// Pages of the inactive list that were used, and went back to the active one.
    pub activated: usize,
    /// How often a page could not be taken: locked, something else was at work on it, or there was nowhere to
    /// put it.
    pub kept: usize,
}

/// The most pages that are on their way out together (`SWAP_CLUSTER_MAX`).
const CLUSTER: usize = 32;

/// Of the frames that there may be, the part that one call of reclaim makes free, up to a cluster: a small memory
/// is not emptied for one page.
const PART_MADE_FREE: usize = 8;

/// How often reclaim tries before it is out of memory, if something is under way each time
/// (`MAX_RECLAIM_RETRIES`).
const TRIES: usize = 16;

/// Whether pages that were used stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bits {
    Regarded,
    Ignored,
}

/// How many of the pages a pass looks at, as a shift (`scan_control.priority`); at least a cluster.
const PASSES: [(u32, Bits); 5] =
    [(2, Bits::Regarded), (1, Bits::Regarded), (0, Bits::Regarded), (0, Bits::Regarded), (0, Bits::Ignored)];

/// What passes came to.
#[derive(Debug, Default)]
struct Tally {
    done: Reclaimed,
    /// The first error that kept a page.
    failed: Option<MemoryError>,
}

impl<N: Notifier> MemorySource<N> {
    /// Takes the pages of a range out of memory, used or not (`MADV_PAGEOUT`). A page that others map too goes
    /// for all of them.
    ///
    /// # Errors
    /// [`MemoryError::Locked`] if a part of the range is locked in memory, [`MemoryError::Unmapped`] if a part
    /// of it is not mapped: nothing was done then. [`MemoryError::Swap`], [`MemoryError::Notify`],
    /// [`MemoryError::NotQuiesced`], [`MemoryError::Frame`] if that kept a page and none could be taken out.
    /// [`MemoryError::Range`], [`MemoryError::AddressSpaceUnknown`], [`MemoryError::Exiting`],
    /// [`MemoryError::TaskEnded`].
    ///
    /// # Cancel safety
    /// Dropped after it was polled, it goes on.
    pub async fn page_out(&self, id: AddressSpaceId, range: AddrRange) -> Result<PagedOut, MemoryError> {
        whole_pages(range)?;
        let user = self.space(id)?.enter()?;
        let inner = Arc::clone(&self.inner);
        self.owned(Twin::SwapOut, async move { page_out(&inner, &user.space, range).await }).await
    }

    /// Looks at up to so many pages of the active list, those first that were longest there, and moves those
    /// that neither the CPU nor a device used since they were last looked at to the inactive list
    /// (`shrink_active_list`).
    ///
    /// # Errors
    /// [`MemoryError::TaskEnded`].
    ///
    /// # Cancel safety
    /// Dropped after it was polled, it goes on.
    pub async fn age(&self, pages: usize) -> Result<Aged, MemoryError> {
        let inner = Arc::clone(&self.inner);
        let work = async move {
            let mut aged = Aged::default();
            // No page twice, though those that were used come to the list's end.
            let mut left = pages.min(inner.pool.lru.counts().active);
            while left > 0 {
                let batch = inner.pool.lru.isolate_oldest(List::Active, CLUSTER.min(left));
                left -= batch.len().max(1);
                let Aged { looked_at, young } = age(&inner, batch).await;
                aged.looked_at += looked_at;
                aged.young += young;
            }
            Ok(aged)
        };
        self.owned(Twin::Aging, work).await
    }

    /// Frees up to so many frames whose pages are used least, as reclaim does when no room is left, but takes no
    /// page that is in use.
    ///
    /// # Errors
    /// [`MemoryError::Swap`], [`MemoryError::Notify`], [`MemoryError::NotQuiesced`], [`MemoryError::Frame`] if
    /// that kept a page and no frame was freed. [`MemoryError::TaskEnded`].
    ///
    /// # Cancel safety
    /// Dropped after it was polled, it goes on.
    pub async fn reclaim(&self, pages: usize) -> Result<Reclaimed, MemoryError> {
        let inner = Arc::clone(&self.inner);
        let work = async move {
            let mut tally = Tally::default();
            for (shift, bits) in PASSES {
                if bits == Bits::Regarded {
                    shrink(&inner, pages, shift, bits, &mut tally).await;
                }
            }
            match tally.failed {
                Some(error) if tally.done.freed == 0 => Err(error),
                _ => Ok(tally.done),
            }
        };
        self.owned(Twin::SwapOut, work).await
    }
}

impl<N: Notifier> Inner<N> {
    /// Makes room for a page, if there is none. Others may take it before the caller does, who then asks again.
    ///
    /// Of all callers one reclaims at a time, in a task that goes on when its caller gives up. The others wait for
    /// the lock `reclaiming`. It is an async one, and held while devices are waited for: nothing that a round
    /// needs takes it, for rounds wait for acks only, acks never for a fault, and reclaim itself takes no frames.
    /// So whoever calls this may hold what a touch holds, which is nothing: no claim, no bracket, no isolated
    /// page (`GFP_NOFS` has the same reason).
    ///
    /// # Errors
    /// [`super::FrameError::OutOfMemory`] if nothing can be freed, [`MemoryError::TaskEnded`].
    ///
    /// # Cancel safety
    /// It may be dropped at any time. Reclaim that has begun goes on to its end.
    pub(super) async fn make_room(&self, source: &MemorySource<N>) -> Result<(), MemoryError> {
        if self.pool.has_room() {
            return Ok(());
        }
        let _needs_room = self.under_way.needs_room();
        let reclaiming = Arc::clone(&self.reclaiming).lock_owned().await;
        if self.pool.has_room() {
            return Ok(());
        }
        let inner = Arc::clone(&source.inner);
        let work = async move {
            let _reclaiming = reclaiming;
            try_to_free_pages(&inner).await
        };
        // Not an operation: it would wait for itself.
        let task = self.tasks.spawn_on(work, &self.config.runtime);
        task.await.unwrap_or(Err(MemoryError::TaskEnded))
    }
}

/// `try_to_free_pages`.
async fn try_to_free_pages<N: Notifier>(inner: &Inner<N>) -> Result<(), MemoryError> {
    let pool = &inner.pool;
    let pages = (pool.limit / PART_MADE_FREE).clamp(1, CLUSTER);
    for _ in 0..TRIES {
        let before = inner.under_way.mark();
        for (shift, bits) in PASSES {
            let mut tally = Tally::default();
            shrink(inner, pages, shift, bits, &mut tally).await;
            // If others took what was freed there was progress, and the caller asks again.
            if tally.done.freed > 0 || pool.has_room() {
                return Ok(());
            }
        }
        if inner.under_way.none_since(before) {
            break;
        }
        // Pages may be on their way elsewhere, shared by a fork that is not complete, or about to be freed:
        // that ends with the rounds of those operations, which end.
        inner.under_way.ended(|| pool.has_room()).await;
        if pool.has_room() {
            return Ok(());
        }
    }
    Err(pool.out_of_memory().into())
}

/// `shrink_zone`: looks at a part of the pages, until `pages` frames are freed.
async fn shrink<N: Notifier>(inner: &Inner<N>, pages: usize, shift: u32, bits: Bits, tally: &mut Tally) {
    let lru = &inner.pool.lru;
    let mut left = (lru.turns() >> shift).max(CLUSTER);
    let mut whole = shift == 0;
    while left > 0 && tally.done.freed < pages {
        // No more are asked about at once than are wanted; what counts is how many were looked at.
        let batch = CLUSTER.min(left).min(pages - tally.done.freed);
        left -= batch;
        // Once a whole pass in any case: all that is inactive may be pages that cannot go.
        if lru.inactive_is_low() || std::mem::take(&mut whole) {
            shrink_active_list(inner, CLUSTER, bits, tally).await;
        }
        shrink_inactive_list(inner, batch, bits, tally).await;
        // cond_resched(): where nobody has to be asked nothing above waits.
        tokio::task::yield_now().await;
    }
}

async fn shrink_active_list<N: Notifier>(inner: &Inner<N>, most: usize, bits: Bits, tally: &mut Tally) {
    let oldest = tally.candidates(inner, inner.pool.lru.isolate_oldest(List::Active, most));
    match bits {
        Bits::Regarded => drop(age(inner, oldest).await),
        Bits::Ignored => oldest.into_iter().for_each(|page| page.put_back(List::Inactive)),
    }
}

async fn shrink_inactive_list<N: Notifier>(inner: &Inner<N>, most: usize, bits: Bits, tally: &mut Tally) {
    let oldest = tally.candidates(inner, inner.pool.lru.isolate_oldest(List::Inactive, most));
    for fate in join_all(oldest.into_iter().map(|page| shrink_page(inner, page, bits))).await {
        match fate {
            Fate::Freed => tally.done.freed += 1,
            Fate::Activated => tally.done.activated += 1,
            Fate::Stayed(why) => {
                tally.done.kept += 1;
                if let Stays::Failed(error) = why {
                    tally.failed.get_or_insert(error);
                }
            }
        }
    }
}

/// What became of a page of the inactive list.
enum Fate {
    Freed,
    Activated,
    Stayed(Stays),
}

/// `shrink_page_list`, for one page.
async fn shrink_page<N: Notifier>(inner: &Inner<N>, page: Isolated, bits: Bits) -> Fate {
    if bits == Bits::Regarded && page_referenced(inner, &page, Ask::Flush).await == Used::Yes {
        page.put_back(List::Active);
        return Fate::Activated;
    }
    match swap_out(inner, page).await {
        Ok(()) => Fate::Freed,
        Err(why) => Fate::Stayed(why),
    }
}

impl Tally {
    /// Those that could go; the others go back to the active list, and no device is asked about them.
    fn candidates<N: Notifier>(&mut self, inner: &Inner<N>, pages: Vec<Isolated>) -> Vec<Isolated> {
        let could_go = |page: Isolated| match could_go(&inner.pool, &page) {
            Ok(()) => Some(page),
            Err(error) => {
                page.put_back(List::Active);
                self.done.kept += 1;
                self.failed.get_or_insert(error.into());
                None
            }
        };
        pages.into_iter().filter_map(could_go).collect()
    }
}

/// `MADV_PAGEOUT`.
async fn page_out<N: Notifier>(
    inner: &Inner<N>,
    space: &Arc<AddressSpace>,
    range: AddrRange,
) -> Result<PagedOut, MemoryError> {
    {
        let layout = space.layout.read();
        layout.vmas.all_allowing(range, Access::Read)?;
        if let Some(vma) = layout.vmas.overlapping(range).find(|vma| vma.flags.locked) {
            return Err(MemoryError::Locked { address: vma.range.start().max(range.start()) });
        }
    }
    let (mut done, mut failed) = (PagedOut::default(), None);
    let mut from = Some(range.start());
    while let Some(first) = from {
        let (batch, busy, next) = isolate_batch(space, first, range.last());
        from = next;
        done.kept += busy;
        for result in join_all(batch.into_iter().map(|page| swap_out(inner, page))).await {
            match result {
                Ok(()) => done.out += 1,
                Err(why) => {
                    done.kept += 1;
                    if let Stays::Failed(error) = why {
                        failed.get_or_insert(error);
                    }
                }
            }
        }
    }
    match failed {
        Some(error) if done.out == 0 => Err(error),
        _ => Ok(done),
    }
}

/// Up to a cluster of the pages from `first` to `last`, how many others have, and where to go on.
fn isolate_batch(space: &AddressSpace, first: u64, last: u64) -> (Vec<Isolated>, usize, Option<u64>) {
    let (mut batch, mut busy) = (Vec::new(), 0);
    let mut from = Some(first);
    while let Some(first) = from
        && batch.len() < CLUSTER
    {
        let Some((address, page)) = space.isolate_next(first, last) else { return (batch, busy, None) };
        match page {
            Some(page) => batch.push(page),
            None => busy += 1,
        }
        from = page_after(address, last);
    }
    (batch, busy, from)
}
