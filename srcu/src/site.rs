//! Call sites as numbers: where a section began, in a form that fits an atomic.
//!
//! A record is read by the watchdog while its owner writes it, so it holds the address of the `Location`, and this
//! table, which only grows with the call sites of the program, gives the `Location` back without unsafe code.

use crate::sync::lock_plain;
use std::{cell::Cell, collections::BTreeMap, panic::Location, sync::Mutex};

/// The address of a `Location` that is in the table. Never zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Site(usize);

static SITES: Mutex<BTreeMap<usize, &'static Location<'static>>> = Mutex::new(BTreeMap::new());

/// Slots of a thread's memory of what it has entered into the table; a power of two. Two sites that share one cost
/// a lock each time they alternate, so there are more slots than a program has hot call sites.
const SEEN: usize = 64;

impl Site {
    /// Enters the location, once a thread and call site; after that it is a compare.
    #[inline]
    pub(crate) fn of(location: &'static Location<'static>) -> Self {
        std::thread_local! { static ENTERED: [Cell<usize>; SEEN] = const { [const { Cell::new(0) }; SEEN] } }

        let address = std::ptr::from_ref(location).addr();
        ENTERED.with(|entered| {
            let slot = &entered[(address / align_of::<Location<'static>>()) % SEEN];
            if slot.get() != address {
                enter(address, location);
                slot.set(address);
            }
        });
        Self(address)
    }

    pub(crate) fn number(self) -> usize {
        self.0
    }

    /// What [`Site::number`] stood for.
    pub(crate) fn resolve(number: usize) -> Option<&'static Location<'static>> {
        lock_plain(&SITES).get(&number).copied()
    }
}

#[cold]
fn enter(address: usize, location: &'static Location<'static>) {
    lock_plain(&SITES).insert(address, location);
}
