//! What memory belongs to, whoever maps it: `struct anon_vma`, and `i_mmap` of `struct address_space`.
//!
//! ```text
//!   frame --owner--> (object, position) --places--> (address space, address) ... --page table--> the frame?
//! ```
//!
//! An object knows every VMA that shows a part of it. A walk copies out the places of a position under the
//! object's lock (the rmap lock), drops it, and looks into each page table for itself: an entry that names
//! another frame by then is not one of the frame's. A place that the walk missed, because a fork was copying,
//! is no danger: its entry holds a reference, and a frame with a reference too many is let be.

use std::fmt;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use shootdown_core::interest::IntervalMap;
use shootdown_core::{AddrRange, AddressSpaceId};

use super::address_space::AddressSpace;
use super::page_cache::Backing;

/// Memory that VMAs show. Positions in it are bytes, as are addresses.
pub(super) struct Object {
    pub(super) kind: Kind,
    /// The rmap lock. Taken under the layout's, alone else, and never with a page-table lock.
    places: Mutex<IntervalMap<(AddressSpaceId, u64), Place>>,
}

/// Where the bytes of an object come from.
#[derive(Debug)]
pub(super) enum Kind {
    /// From nowhere: zeros at first. Positions are the addresses that the memory was mapped at first.
    Anonymous,
    /// From a file, whose pages every mapping shares.
    File(Arc<Backing>),
}

/// A VMA that shows a part of an object.
#[derive(Clone)]
struct Place {
    space: Weak<AddressSpace>,
    start: u64,
    shown: AddrRange,
}

impl Object {
    pub(super) fn anonymous() -> Arc<Self> {
        Arc::new(Self { kind: Kind::Anonymous, places: Mutex::default() })
    }

    pub(super) fn of_file(backing: Arc<Backing>) -> Arc<Self> {
        Arc::new(Self { kind: Kind::File(backing), places: Mutex::default() })
    }

    /// A VMA shows `shown` of this object from `start` on (`anon_vma_link`, `vma_link_file`).
    pub(super) fn link(&self, space: &Weak<AddressSpace>, id: AddressSpaceId, start: u64, shown: AddrRange) {
        self.places.lock().set(shown, (id, start), Place { space: Weak::clone(space), start, shown });
    }

    /// It does not any more (`unlink_anon_vmas`, `unlink_file_vma`).
    pub(super) fn unlink(&self, id: AddressSpaceId, start: u64, shown: AddrRange) {
        self.places.lock().take(shown, &(id, start));
    }

    /// Where the page at `position` is shown. An entry there need not be present, nor of this object's frame.
    pub(super) fn shown_at(&self, position: u64) -> Vec<(Arc<AddressSpace>, u64)> {
        let Ok(page) = AddrRange::new(position, position.wrapping_add(4096)) else { return Vec::new() };
        self.shown_in(page).into_iter().map(|(space, range)| (space, range.start())).collect()
    }

    /// Every range of addresses that shows a part of `part` (`vma_interval_tree_foreach`).
    pub(super) fn shown_in(&self, part: AddrRange) -> Vec<(Arc<AddressSpace>, AddrRange)> {
        let places = self.places.lock();
        let shown = |(_, _, place): (AddrRange, &_, &Place)| {
            let common = place.shown.intersection(part)?;
            let start = place.start + (common.start() - place.shown.start());
            let range = AddrRange::new(start, start.wrapping_add(common.last() - common.start() + 1)).ok()?;
            Some((place.space.upgrade()?, range))
        };
        places.overlapping(part).filter_map(shown).collect()
    }

    /// Whether anything shows a part of it.
    pub(super) fn is_shown(&self) -> bool {
        self.places.lock().overlaps(AddrRange::ALL)
    }

    /// The file, if it is one.
    pub(super) fn backing(&self) -> Option<&Arc<Backing>> {
        match &self.kind {
            Kind::Anonymous => None,
            Kind::File(backing) => Some(backing),
        }
    }
}

impl fmt::Debug for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Object").field("kind", &self.kind).finish_non_exhaustive()
    }
}
