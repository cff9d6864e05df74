//! A page moves to another frame: `migrate_pages`, `unmap_and_move`, on top of `try_to_unmap`.
//!
//! ```text
//!   take another frame; try_to_unmap: entries move, devices stop and hand over what they wrote
//!   copy the bytes
//!   every entry names the new frame, and the page cache of a file too     (remove_migration_ptes)
//!   only now the references to the old frame go
//! ```
//!
//! The copy comes after the notifier: what a device wrote under its translation is in the old frame when
//! its ack is there, and not before.

use std::sync::Arc;

use shootdown_core::{AddrRange, Cause};

use super::address_space::AddressSpace;
use super::error::MemoryError;
use super::frame::{FrameError, FrameRef};
use super::lru::Isolated;
use super::outcome::Migrated;
use super::page_cache::{self, Hold, Part};
use super::page_table::{Entry, Slot, page_after};
use super::rmap::{Locked, try_to_unmap};
use super::{Inner, whole_pages};
use crate::source::Notifier;

/// `migrate_pages` for what is present in `range`.
pub(super) async fn migrate<N: Notifier>(
    inner: &Inner<N>,
    space: &Arc<AddressSpace>,
    range: AddrRange,
) -> Result<Migrated, MemoryError> {
    whole_pages(range)?;
    let mut done = Migrated::default();
    let mut from = Some(range.start());
    while let Some(first) = from {
        let Some((address, page)) = space.isolate_next(first, range.last()) else { break };
        let moved = match page {
            Some(page) => move_page(inner, page).await?,
            None => false,
        };
        if moved {
            done.moved += 1;
        } else {
            done.stayed += 1;
        }
        from = page_after(address, range.last());
    }
    Ok(done)
}

/// `unmap_and_move`. Whether it was moved.
async fn move_page<N: Notifier>(inner: &Inner<N>, page: Isolated) -> Result<bool, MemoryError> {
    let pool = &*inner.pool;
    let file = page_cache::of_page(&page).map(|(_, backing, index)| (Arc::clone(backing), index));
    // A file's page is found by its index as well as by its entries: a fault waits until it has moved.
    let _held = match &file {
        Some((backing, index)) => match backing.try_hold(Part::Page(*index), Hold::Alone) {
            Some(held) => Some(held),
            None => return Ok(false),
        },
        None => None,
    };
    let old = page.life();
    let Ok(unmapped) = try_to_unmap(inner, page, Cause::Migrate, Locked::May).await else { return Ok(false) };
    let copy = match pool.frames.take_copy(unmapped.page().pin()) {
        Err(FrameError::OutOfMemory { .. }) => return Ok(false),
        taken => taken?,
    };
    let mut shares: Vec<FrameRef> = Vec::with_capacity(unmapped.places());
    for _ in 0..unmapped.places() {
        match pool.frames.share(&copy) {
            Ok(share) => shares.push(share),
            Err(error) => {
                // Nobody has seen the copy.
                pool.frames.put(shares.into_iter().chain([copy]));
                return Err(error.into());
            }
        }
    }
    if let Some((backing, index)) = file.as_ref().filter(|_| unmapped.is_dirty()) {
        backing.set_dirty(*index, old);
    }
    let page = unmapped.replace(|was| match shares.pop() {
        Some(share) => Slot::Present(Entry { dirty: was.dirty, ..Entry::new(share, was.allows) }),
        None => Slot::Absent,
    });
    page.replaced_by(copy.life());
    // Every device has stopped using the old frame, whose reference the page cache gives for the new one's.
    let left = match file {
        Some((backing, index)) => backing.replace(index, old, copy),
        None => copy,
    };
    // What is left beside is of entries that were zapped meanwhile.
    pool.frames.put(shares.into_iter().chain([left]));
    Ok(true)
}
