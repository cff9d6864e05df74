//! A page goes to the swap file: `try_to_unmap` and `pageout` of `shrink_page_list`, on top of
//! [`try_to_unmap`], which follows the patch of 2012.
//!
//! ```text
//!   a slot is reserved   --full--> the page stays, and nobody is told                   (add_to_swap)
//!   try_to_unmap: entries move, devices stop and hand over what they wrote
//!                        --SWAP_FAIL, SWAP_AGAIN, refused--> the entries come back
//!   the frame's bytes are written to the slot   --failed--> the entries come back
//!   every entry names the slot; their references to the frame go; the frame is freed
//! ```
//!
//! The bytes are read after the round: what a device wrote under its translation is in the frame when its ack is
//! there, and not before. A touch meanwhile waits, and finds the page in the frame or in the slot.
//!
//! The price: the slot is written by the thread that runs the task, and a disk that blocks blocks it.

use shootdown_core::Cause;

use super::Inner;
use super::error::MemoryError;
use super::file::{self, Evicted};
use super::lru::{Isolated, List};
use super::page_table::Slot;
use super::pool::Pool;
use super::rmap::{Kept, Locked, Unmapped, try_to_unmap};
use super::swap::{SwapError, SwapRef};
use super::twin::Twin;
use crate::source::Notifier;

/// Why a page was not freed. It is on a list again, and its entries and bytes are as they were.
#[derive(Debug)]
pub(super) enum Stays {
    /// Something else is at work on it.
    Busy,
    /// It is locked in memory.
    Locked,
    Failed(MemoryError),
}

/// Whether `page` could go at all (`get_scan_count`: with no swap space left, anonymous pages are not looked at).
pub(super) fn could_go(pool: &Pool, page: &Isolated) -> Result<(), SwapError> {
    if page.own_references() > 1 { Ok(()) } else { pool.swap()?.check_room() }
}

/// Takes a page out of memory. When this is `Ok` its frame is free.
pub(super) async fn swap_out<N: Notifier>(inner: &Inner<N>, page: Isolated) -> Result<(), Stays> {
    if inner.pool.frames.is_only_reference(page.pin()) {
        // Whoever mapped it has let it go.
        return Ok(());
    }
    if page.own_references() > 1 {
        return match Twin::SwapOut.run(file::evict(inner, page)).await {
            Ok(Evicted::Freed) => Ok(()),
            Ok(Evicted::Kept) => Err(Stays::Busy),
            Err(error) => Err(Stays::Failed(error)),
        };
    }
    Twin::SwapOut.run(swap_out_anonymous(inner, page)).await
}

async fn swap_out_anonymous<N: Notifier>(inner: &Inner<N>, mut page: Isolated) -> Result<(), Stays> {
    let before = page.back_to;
    // What cannot go is not soon looked at again (activate_locked).
    page.back_to = List::Active;
    let slots = Slots::reserve(&inner.pool).map_err(|error| Stays::Failed(error.into()))?;
    match try_to_unmap(inner, page, Cause::Clear, Locked::Stay).await {
        Ok(unmapped) => pageout(&inner.pool, unmapped, slots).map_err(Stays::Failed),
        Err((page, Kept::Busy)) => {
            page.put_back(before);
            Err(Stays::Busy)
        }
        Err((_, Kept::Locked)) => Err(Stays::Locked),
        Err((_, Kept::Refused(error))) => Err(Stays::Failed(error)),
    }
}

/// `pageout`, and the entries name the slot.
fn pageout(pool: &Pool, unmapped: Unmapped<'_>, mut slots: Slots<'_>) -> Result<(), MemoryError> {
    if unmapped.places() == 0 {
        return Ok(());
    }
    let bytes = pool.frames.bytes(unmapped.page().pin())?;
    slots.write(&bytes).inspect_err(|error| {
        tracing::error!(%error, source = ?error, "a page stays in memory: the swap file cannot be written");
    })?;
    slots.share_among(unmapped.places())?;
    let page = unmapped.replace(|_| slots.next());
    // The last reference: the frame is freed here. Slots whose entry was zapped meanwhile go back.
    drop((page, slots));
    Ok(())
}

/// References to one slot that no entry has yet. Dropped, they go back.
#[derive(Debug)]
struct Slots<'a> {
    pool: &'a Pool,
    references: Vec<SwapRef>,
}

impl<'a> Slots<'a> {
    fn reserve(pool: &'a Pool) -> Result<Self, SwapError> {
        let slot = pool.swap()?.reserve()?;
        Ok(Self { pool, references: vec![slot] })
    }

    fn first(&self) -> &SwapRef {
        self.references.first().expect("one was reserved, and none has been given out")
    }

    fn write(&self, bytes: &[u8; super::frame::FRAME_BYTES]) -> Result<(), SwapError> {
        self.pool.swap()?.write(self.first(), bytes)
    }

    /// A reference for each of so many entries (`swap_duplicate`).
    fn share_among(&mut self, places: usize) -> Result<(), SwapError> {
        while self.references.len() < places {
            let share = self.pool.swap()?.share(self.first())?;
            self.references.push(share);
        }
        Ok(())
    }

    fn next(&mut self) -> Slot {
        Slot::Swapped(self.references.pop().expect("there is one for each entry"))
    }
}

impl Drop for Slots<'_> {
    fn drop(&mut self) {
        for slot in self.references.drain(..) {
            self.pool.put_slot(slot);
        }
    }
}
