//! Taking pages out of an address space, and freeing them: `unmap_vmas`, and `zap_page_range` for
//! MADV_DONTNEED, after the patches of 2012 ("unmap vmas tlb flushing").
//!
//! ```text
//!   invalidate_range_start  over the whole range, no lock held, before any entry is cleared
//!   for each block of ZAP_BLOCK pages:
//!       page-table lock
//!           clear entries into the gather
//!       unlock
//!       flush the gather: the frames are freed here
//!       yield
//!   invalidate_range_end
//! ```
//!
//! Why a device cannot come between. When the start returns no device uses the range. A device that
//! faults inside the bracket may be answered from an entry that is cleared a moment later, but the host
//! agent grants nothing that overlaps an open bracket, and throws away an answer that was computed before
//! a bracket began (NoGrantInWindow): it asks again after the end, and finds the page gone, or a new one.

use std::sync::Arc;

use shootdown_core::{Access, AddrRange, Cause, Moment};

use super::address_space::AddressSpace;
use super::error::MemoryError;
use super::gather::{Bracket, Gather, Quiesced, Tally};
use super::outcome::Released;
use super::page_cache::set_page_dirty;
use super::page_table::{Slot, Table, page_after, rest_after};
use super::{Inner, whole_pages};
use crate::source::{Notifier, RoundResult};

/// `madvise(MADV_DONTNEED)`: the pages go, the mapping stays.
pub(super) async fn dont_need<N: Notifier>(
    inner: &Inner<N>,
    space: &Arc<AddressSpace>,
    range: AddrRange,
) -> Result<Released, MemoryError> {
    whole_pages(range)?;
    let _claim = space.claim(range).await;
    {
        let layout = space.layout.read();
        layout.vmas.all_allowing(range, Access::Read)?;
        // can_madv_lru_vma(): what is locked in memory is not dropped from under its owner.
        if let Some(locked) = layout.vmas.overlapping(range).find(|vma| vma.flags.locked) {
            return Err(MemoryError::Locked { address: locked.range.start().max(range.start()) });
        }
    }
    unmap_vmas(inner, space, range, &[range], Cause::Clear).await
}

/// `unmap_vmas`: takes out and frees the pages of `parts`, all within `range`, inside one bracket.
pub(super) async fn unmap_vmas<N: Notifier>(
    inner: &Inner<N>,
    space: &Arc<AddressSpace>,
    range: AddrRange,
    parts: &[AddrRange],
    cause: Cause,
) -> Result<Released, MemoryError> {
    let (bracket, proof, round) = Bracket::open(&*inner.notifier, space.id, range, cause).await?;
    let mut gather = Gather::new(Arc::clone(space), inner.config.zap_block_pages);
    for part in parts {
        zap_range(space, *part, &mut gather, &proof).await;
    }
    gather.flush(&proof);
    let freed = (inner.config.now)();
    bracket.close();
    Ok(Released::new(gather.tally(), round, freed))
}

/// `unmap_page_range`: clears every entry of `range`, block by block. What the last block gathered is
/// left to the caller's flush.
pub(super) async fn zap_range(space: &AddressSpace, range: AddrRange, gather: &mut Gather, proof: &Quiesced) {
    let mut left = Some(range);
    while let Some((part, table)) = left.and_then(|range| space.tables.first_in(range)) {
        let mut from = Some(part.start());
        while let Some(first) = from {
            from = clear_block(space, &table, first, part.last(), gather);
            if gather.is_full() {
                gather.flush(proof);
            }
            // cond_resched(), at least once a table, with nothing held but the claim.
            tokio::task::yield_now().await;
        }
        left = rest_after(range, part);
    }
}

/// `zap_pte_range`: clears entries under the page-table lock until the gather is full; where it stopped. A dirty
/// bit goes to the page, if it is a file's.
fn clear_block(
    space: &AddressSpace,
    table: &Table,
    first: u64,
    last: u64,
    gather: &mut Gather,
) -> Option<u64> {
    let layout = space.layout.read();
    let mut entries = table.lock();
    let mut from = first;
    while !gather.is_full() {
        let next = entries.next_occupied(from, last)?;
        if let Slot::Present(entry) | Slot::Moving(entry) = entries.slot(next)
            && entry.dirty
        {
            set_page_dirty(&layout.vmas, next, entry.frame.life());
        }
        let (address, cleared) = entries.clear_first(next, last)?;
        gather.add(cleared);
        from = page_after(address, last)?;
    }
    Some(from)
}

impl Released {
    pub(super) fn new(tally: Tally, round: RoundResult, freed: Moment) -> Self {
        let release = freed.since(round.times.answered);
        let Tally { pages, frames, blocks } = tally;
        Self { pages, frames, blocks, tables: 0, rounds: vec![round], release }
    }
}
