//! One address space (`mm_struct`): its layout, its page tables, and who is at work on it.
//!
//! Locks, in the order in which they are taken; none is held over an await:
//!
//! ```text
//!   layout (mmap_lock) -> directory of tables -> page table (pte_lockptr)
//!       -> page cache of a file (i_pages) -> LRU (lru_lock) -> ledger of the frame store
//!   layout -> places of an object (rmap lock)
//!   layout -> page cache, when the last mapping of a file goes
//!   turns, quarantine: taken alone
//! ```
//!
//! What the kernel's `mmap_lock` excludes while it is held over a wait, a [`Claim`] on the range excludes
//! here: unmap, dont_need, protect, remap, fork and snapshot wait for those before them whose ranges overlap.
//! Access and faults take no claim, for a device may have to fault on while it is waited for.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use parking_lot::{Mutex, RwLock};
use shootdown_core::{Access, AddrRange, AddressSpaceId};
use tokio::sync::Notify;

use super::error::MemoryError;
use super::frame::{FrameRef, FrameStore};
use super::gather::Quiesced;
use super::outcome::AddressSpaceStats;
use super::page_table::Tables;
use super::pool::Pool;
use super::vma::Vmas;

#[derive(Debug)]
pub(super) struct AddressSpace {
    pub(super) id: AddressSpaceId,
    pub(super) frames: Arc<FrameStore>,
    pub(super) pool: Arc<Pool>,
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
    /// Nothing is in progress any more, and the notifier's release is.
    Releasing,
}

/// Who is at work.
#[derive(Debug, Default)]
struct Turns {
    /// `mm_users`: operations that exit waits for.
    users: usize,
    last_ticket: u64,
    /// Claims that are held or waited for; the lower ticket goes first.
    claims: BTreeMap<u64, [AddrRange; 2]>,
}

/// An operation in progress (`mmget`).
#[derive(Debug)]
pub(super) struct User {
    pub(super) space: Arc<AddressSpace>,
}

/// The sole right to change what is mapped in a range, or in two. Ends when dropped, as does the wait for it.
#[derive(Debug)]
pub(super) struct Claim<'a> {
    space: &'a AddressSpace,
    ticket: u64,
}

impl AddressSpace {
    pub(super) fn new(id: AddressSpaceId, pool: Arc<Pool>, mut vmas: Vmas, tables: Tables) -> Arc<Self> {
        Arc::new_cyclic(|space| {
            vmas.belong_to(Weak::clone(space), id);
            Self {
                id,
                frames: Arc::clone(&pool.frames),
                pool,
                layout: RwLock::new(Layout { vmas, door: Door::Open }),
                tables,
                turns: Mutex::default(),
                quarantine: Mutex::default(),
                changed: Notify::new(),
            }
        })
    }

    /// Begins an operation that exit has to wait for.
    pub(super) fn enter(self: &Arc<Self>) -> Result<User, MemoryError> {
        let layout = self.layout.read();
        layout.check_door(self.id)?;
        // Under the layout's lock: exit closes the door under it, and counts the users after that.
        self.turns.lock().users += 1;
        Ok(User { space: Arc::clone(self) })
    }

    /// Begins an operation on the address space for the sake of another, in one that is coming to its end too:
    /// its devices can be told until its release begins, and are waited for after that. `None` when it has ended.
    ///
    /// # Cancel safety
    /// It may be dropped at any time.
    pub(super) async fn visit(self: &Arc<Self>) -> Option<User> {
        let entered = Mutex::new(None);
        self.wait_until(|| {
            let layout = self.layout.read();
            match layout.door {
                Door::Releasing => layout.vmas.len() == 0,
                Door::Open | Door::Closed => {
                    self.turns.lock().users += 1;
                    *entered.lock() = Some(User { space: Arc::clone(self) });
                    true
                }
            }
        })
        .await;
        entered.into_inner()
    }

    /// Shuts the door behind the last user: no operation is in progress, and none begins.
    pub(super) async fn shut(&self) {
        self.wait_until(|| {
            let mut layout = self.layout.write();
            let gone = self.turns.lock().users == 0;
            if gone {
                layout.door = Door::Releasing;
            }
            gone
        })
        .await;
    }

    /// The door is so from now on; who waits for it looks again.
    pub(super) fn set_door(&self, door: Door) {
        self.layout.write().door = door;
        self.changed.notify_waiters();
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
        self.claim_both(range, range).await
    }

    /// As [`AddressSpace::claim`], on two ranges with one place in the queue. Nobody holds one of them while
    /// it waits for the other, and waits go to lower tickets only: they make no circle.
    ///
    /// # Cancel safety
    /// A wait that is dropped gives up its place.
    pub(super) async fn claim_both(&self, first: AddrRange, second: AddrRange) -> Claim<'_> {
        let ranges = [first, second];
        let overlaps = |earlier: &[AddrRange; 2]| {
            earlier.iter().any(|earlier| ranges.iter().any(|range| earlier.overlaps(*range)))
        };
        let claim = {
            let mut turns = self.turns.lock();
            turns.last_ticket += 1;
            let ticket = turns.last_ticket;
            turns.claims.insert(ticket, ranges);
            Claim { space: self, ticket }
        };
        self.wait_until(|| {
            let turns = self.turns.lock();
            !turns.claims.range(..claim.ticket).any(|(_, earlier)| overlaps(earlier))
        })
        .await;
        claim
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
        let count = self.tables.count();
        let quarantined = self.quarantine.lock().len();
        let operations = self.turns.lock().users;
        AddressSpaceStats {
            mappings,
            mapped_pages: count.present,
            swapped_pages: count.swapped,
            page_tables: count.tables,
            quarantined,
            operations,
        }
    }
}

impl Layout {
    pub(super) fn check_door(&self, id: AddressSpaceId) -> Result<(), MemoryError> {
        match self.door {
            Door::Open => Ok(()),
            Door::Closed | Door::Releasing => Err(MemoryError::Exiting(id)),
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
        let pool = Pool::new(FrameStore::new(1).unwrap(), None, 1);
        AddressSpace::new(AddressSpaceId::FIRST, pool, Vmas::new(1), Tables::default())
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

    #[test]
    fn a_claim_on_two_ranges_waits_for_both_and_holds_neither_meanwhile() {
        let space = space();
        let mut context = Context::from_waker(Waker::noop());
        let Poll::Ready(low) = pin!(space.claim(pages(0, 1))).poll(&mut context) else { panic!() };
        let Poll::Ready(high) = pin!(space.claim(pages(8, 9))).poll(&mut context) else { panic!() };
        let mut both = pin!(space.claim_both(pages(8, 9), pages(0, 1)));
        assert!(both.as_mut().poll(&mut context).is_pending());
        let mut other_way = pin!(space.claim_both(pages(0, 1), pages(8, 9)));
        assert!(other_way.as_mut().poll(&mut context).is_pending());
        let Poll::Ready(_between) = pin!(space.claim(pages(4, 5))).poll(&mut context) else { panic!() };
        drop(low);
        assert!(both.as_mut().poll(&mut context).is_pending());
        drop(high);
        let Poll::Ready(first) = both.as_mut().poll(&mut context) else { panic!("both are free") };
        assert!(other_way.as_mut().poll(&mut context).is_pending());
        drop(first);
        assert!(other_way.as_mut().poll(&mut context).is_ready());
    }
}
