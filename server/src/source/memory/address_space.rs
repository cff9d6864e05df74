//! One address space (`mm_struct`): its layout, its page tables, and who is at work on it.
//!
//! Locks, in the order in which they are taken; none is held over an await:
//!
//! ```text
//!   layout (mmap_lock) -> directory of tables -> page table (pte_lockptr) -> ledger of the frame store
//!   turns, quarantine: taken alone
//! ```
//!
//! What the kernel's `mmap_lock` excludes while it is held over a wait, a [`Claim`] on the range excludes
//! here: unmap, dont_need and fork wait for those before them whose ranges overlap. Access and faults
//! take no claim, for a device may have to fault on while it is waited for.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use shootdown_core::{Access, AddrRange, AddressSpaceId};
use tokio::sync::Notify;

use super::error::MemoryError;
use super::frame::{FrameRef, FrameStore};
use super::gather::Quiesced;
use super::outcome::AddressSpaceStats;
use super::page_table::Tables;
use super::vma::Vmas;

#[derive(Debug)]
pub(super) struct AddressSpace {
    pub(super) id: AddressSpaceId,
    pub(super) frames: Arc<FrameStore>,
    pub(super) layout: RwLock<Layout>,
    pub(super) tables: Tables,
    turns: Mutex<Turns>,
    /// Kept because it is not known that devices have stopped using them.
    quarantine: Mutex<Vec<FrameRef>>,
    /// A turn ended, or an entry settled.
    pub(super) changed: Notify,
}

/// What is mapped, and whether anything may begin.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) vmas: Vmas,
    pub(super) door: Door,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Door {
    Open,
    /// Exit has begun: nothing else does.
    Closed,
}

/// Who is at work.
#[derive(Debug, Default)]
struct Turns {
    /// `mm_users`: operations that exit waits for.
    users: usize,
    last_ticket: u64,
    /// Claims that are held or waited for; the lower ticket goes first.
    claims: BTreeMap<u64, AddrRange>,
}

/// An operation in progress (`mmget`).
#[derive(Debug)]
pub(super) struct User {
    pub(super) space: Arc<AddressSpace>,
}

/// The sole right to change what is mapped in a range. Ends when dropped, as does the wait for it.
#[derive(Debug)]
pub(super) struct Claim<'a> {
    space: &'a AddressSpace,
    ticket: u64,
}

impl AddressSpace {
    pub(super) fn new(id: AddressSpaceId, frames: Arc<FrameStore>, vmas: Vmas, tables: Tables) -> Self {
        Self {
            id,
            frames,
            layout: RwLock::new(Layout { vmas, door: Door::Open }),
            tables,
            turns: Mutex::default(),
            quarantine: Mutex::default(),
            changed: Notify::new(),
        }
    }

    /// Begins an operation that exit has to wait for.
    pub(super) fn enter(self: &Arc<Self>) -> Result<User, MemoryError> {
        let layout = self.layout.read();
        layout.check_door(self.id)?;
        // Under the layout's lock: exit closes the door under it, and counts the users after that.
        self.turns.lock().users += 1;
        Ok(User { space: Arc::clone(self) })
    }

    /// Whether all of `range` may be touched so.
    pub(super) fn check_mapped(&self, range: AddrRange, access: Access) -> Result<(), MemoryError> {
        let layout = self.layout.read();
        layout.check_door(self.id)?;
        layout.vmas.all_allowing(range, access)
    }

    /// Waits for its turn on `range`: first come, first served among those that overlap.
    ///
    /// # Cancel safety
    /// A wait that is dropped gives up its place.
    pub(super) async fn claim(&self, range: AddrRange) -> Claim<'_> {
        let claim = {
            let mut turns = self.turns.lock();
            turns.last_ticket += 1;
            let ticket = turns.last_ticket;
            turns.claims.insert(ticket, range);
            Claim { space: self, ticket }
        };
        self.wait_until(|| {
            let turns = self.turns.lock();
            !turns.claims.range(..claim.ticket).any(|(_, earlier)| earlier.overlaps(range))
        })
        .await;
        claim
    }

    /// Waits until no operation is in progress.
    pub(super) async fn users_gone(&self) {
        self.wait_until(|| self.turns.lock().users == 0).await;
    }

    /// Waits for a state that somebody announces on `changed`.
    pub(super) async fn wait_until(&self, reached: impl Fn() -> bool) {
        let mut changed = std::pin::pin!(self.changed.notified());
        loop {
            // Enlisted before it looks: a change after the look wakes it.
            changed.as_mut().enable();
            if reached() {
                return;
            }
            changed.as_mut().await;
            changed.set(self.changed.notified());
        }
    }

    /// Keeps references whose frames must not be freed.
    pub(super) fn park(&self, frames: impl IntoIterator<Item = FrameRef>) {
        self.quarantine.lock().extend(frames);
    }

    /// Frees what is parked, for every device has stopped using any page of this address space.
    pub(super) fn free_quarantine(&self, _proof: &Quiesced) -> usize {
        let parked = std::mem::take(&mut *self.quarantine.lock());
        self.frames.put(parked)
    }

    pub(super) fn stats(&self) -> AddressSpaceStats {
        let mappings = self.layout.read().vmas.len();
        let (page_tables, mapped_pages) = self.tables.count();
        let quarantined = self.quarantine.lock().len();
        let operations = self.turns.lock().users;
        AddressSpaceStats { mappings, mapped_pages, page_tables, quarantined, operations }
    }
}

impl Layout {
    pub(super) fn check_door(&self, id: AddressSpaceId) -> Result<(), MemoryError> {
        match self.door {
            Door::Open => Ok(()),
            Door::Closed => Err(MemoryError::Exiting(id)),
        }
    }
}

impl Drop for User {
    fn drop(&mut self) {
        self.space.turns.lock().users -= 1;
        self.space.changed.notify_waiters();
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.space.turns.lock().claims.remove(&self.ticket);
        self.space.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::*;

    fn space() -> Arc<AddressSpace> {
        let frames = FrameStore::new(1).unwrap();
        Arc::new(AddressSpace::new(AddressSpaceId::FIRST, frames, Vmas::new(1), Tables::default()))
    }

    fn pages(first: u64, end: u64) -> AddrRange {
        AddrRange::new(first << 12, end << 12).unwrap()
    }

    #[test]
    fn a_claim_waits_for_those_before_it_that_overlap_and_for_no_other() {
        let space = space();
        let mut context = Context::from_waker(Waker::noop());
        let Poll::Ready(first) = pin!(space.claim(pages(0, 4))).poll(&mut context) else {
            panic!("nobody is before it")
        };
        let Poll::Ready(_apart) = pin!(space.claim(pages(4, 8))).poll(&mut context) else {
            panic!("it is apart")
        };
        let mut second = pin!(space.claim(pages(3, 4)));
        assert!(second.as_mut().poll(&mut context).is_pending());
        {
            let mut gives_up = pin!(space.claim(pages(0, 4)));
            assert!(gives_up.as_mut().poll(&mut context).is_pending());
        }
        drop(first);
        assert!(second.as_mut().poll(&mut context).is_ready());
        assert_eq!(space.turns.lock().claims.len(), 1, "a wait that was dropped left no place behind");
    }
}
