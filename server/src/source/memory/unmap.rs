//! munmap: `do_munmap`, `unmap_region` and `free_pgtables`, after the patches of 2012 ("free-pgtables").
//!
//! ```text
//!   claim the range; its VMAs are split at the ends and marked leaving   (detach_vmas_to_be_unmapped)
//!   unmap_vmas: bracket, zap, flush                                      (see zap)
//!   for each VMA: unlink it, then free the page tables that served it alone; yield
//! ```
//!
//! The range stays taken until the last page table is freed: mapping it earlier is refused as busy. A
//! notifier that refuses leaves everything as it was.

use std::sync::Arc;

use shootdown_core::{AddrRange, Cause};

use super::Inner;
use super::address_space::{AddressSpace, Layout};
use super::error::MemoryError;
use super::outcome::Released;
use super::page_table::{rest_after, table_span};
use super::whole_pages;
use super::zap::unmap_vmas;
use crate::source::Notifier;

/// `munmap`. Holes are allowed; where nothing is mapped nobody is notified.
pub(super) async fn unmap<N: Notifier>(
    inner: &Inner<N>,
    space: &Arc<AddressSpace>,
    range: AddrRange,
) -> Result<Released, MemoryError> {
    whole_pages(range)?;
    let _claim = space.claim(range).await;
    let leaving = space.layout.write().vmas.leave(range)?;
    if leaving.is_empty() {
        return Ok(Released::default());
    }
    match unmap_vmas(inner, space, range, &leaving, Cause::Unmap).await {
        Ok(released) => Ok(Released { tables: free_pgtables(space, &leaving).await, ..released }),
        Err(error) => {
            // It failed at the start of the bracket: no entry was cleared.
            space.layout.write().vmas.restore(&leaving);
            Err(error)
        }
    }
}

/// `free_pgtables`: VMA by VMA, after each is unlinked. How many tables were freed.
pub(super) async fn free_pgtables(space: &AddressSpace, leaving: &[AddrRange]) -> usize {
    let mut freed = 0;
    for range in leaving {
        {
            let mut layout = space.layout.write();
            layout.vmas.unlink(*range);
            freed += free_tables(space, &layout, *range);
        }
        tokio::task::yield_now().await;
    }
    freed
}

/// `free_pgd_range`: the tables over `range` that nobody needs any more; how many. The layout is locked for
/// writing: every walk of a table holds it for reading, so none is in one that goes.
pub(super) fn free_tables(space: &AddressSpace, layout: &Layout, range: AddrRange) -> usize {
    let mut freed = 0;
    let mut left = Some(range);
    while let Some((part, _)) = left.and_then(|range| space.tables.first_in(range)) {
        // It has a floor and a ceiling: a table that a neighbour uses too stays.
        if !layout.vmas.has_use_for(table_span(part.start())) {
            space.tables.free(part);
            freed += 1;
        }
        left = rest_after(range, part);
    }
    freed
}
