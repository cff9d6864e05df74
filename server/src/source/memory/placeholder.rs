//! Holes of a file: one read-only frame of zeros in the place of all, and its end: `__xip_unmap`, after the
//! mail's patch ("invalidate_page outside PT lock").
//!
//! ```text
//!   a hole is read:     page-table lock -> cache: map the placeholder, read-only; unlock      (xip_sparse_page)
//!   it is written first, and its index is held: no fault finds the hole or the page
//!       the real page comes into the cache
//!       for each place that shows the placeholder there:
//!           page-table lock: is the entry the placeholder?  it is moving now: whoever touches it waits; unlock
//!       invalidate_page for each place, all at once   --refused--> the entries come back; the page goes
//!       only now do the entries' references go, and the page may be mapped and written
//! ```
//!
//! A device that read the placeholder after the store had returned would miss the store, so the store waits for
//! the round. The placeholder itself stays: other holes show it. It is on no list, and never dirty.

use std::sync::Arc;

use shootdown_core::{Access, Cause};

use super::Inner;
use super::address_space::{AddressSpace, User};
use super::error::MemoryError;
use super::object::Object;
use super::page_cache::{Backing, index_of, position_of};
use super::page_table::{Entry, Slot};
use super::rmap::take_away;
use crate::source::Notifier;

/// Shows the hole at `index` of a file at `address`. The caller holds the index, and its page is not in the cache.
pub(super) fn map(
    space: &AddressSpace,
    address: u64,
    object: &Arc<Object>,
    index: u64,
) -> Result<(), MemoryError> {
    let layout = space.layout.read();
    layout.check_door(space.id)?;
    let vma = layout.vmas.allowing(address, Access::Read)?;
    let Some(backing) = vma.object.backing() else { return Ok(()) };
    // Something else may be mapped there by now, whose index nobody holds: the fault looks again.
    if !Arc::ptr_eq(&vma.object, object) || index_of(vma.position_of(address)) != index {
        return Ok(());
    }
    let table = space.tables.get_or_make(address);
    let mut entries = table.lock();
    let mut cache = backing.lock();
    if !matches!(entries.slot(address), Slot::Absent) || cache.is_beyond(index) {
        return Ok(());
    }
    let shown = space.frames.share(cache.placeholder(&space.frames)?)?;
    entries.install(address, Entry::new(shown, Access::Read));
    Ok(())
}

/// `__xip_unmap`: takes the placeholder away wherever it is shown for the page at `index`, which the caller
/// holds.
pub(super) async fn unmap<N: Notifier>(
    inner: &Inner<N>,
    object: &Object,
    backing: &Backing,
    index: u64,
) -> Result<(), MemoryError> {
    let Some(life) = backing.lock().placeholder_life() else { return Ok(()) };
    // Until the entries are taken: one that moves is met at neither of its addresses.
    let stay = backing.places_stay().await;
    let mut places: Vec<(User, u64)> = Vec::new();
    for (space, address) in object.shown_at(position_of(index)) {
        let table = space.tables.get(address);
        let shows =
            table.is_some_and(|table| table.lock().get(address).is_some_and(|entry| entry.is_life(life)));
        // One whose release has begun is waited for: it may be refused, and the entry stay.
        if shows && let Some(user) = space.visit().await {
            places.push((user, address));
        }
    }
    take_away(inner, places, life, Cause::Clear, stay).await
}
