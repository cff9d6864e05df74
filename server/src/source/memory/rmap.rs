//! A page is taken out of every page table that shows it: `rmap_walk`, `try_to_unmap_one`, after the
//! patch of 2012 ("invalidate_page outside PT lock").
//!
//! ```text
//!   the page is isolated; its places are copied out under the rmap lock; unlock
//!   for each place:
//!       page-table lock: is it this page's entry, settled, and not locked in memory?
//!           --no--> the others come back                                             (SWAP_FAIL: nobody is told)
//!           it is moving now: whoever touches it waits
//!       unlock
//!   are there references beside those?  --yes--> they come back                      (SWAP_AGAIN)
//!   invalidate_page for each place, all at once    --refused--> they come back
//!   only now is the page [`Unmapped`]: no CPU and no device uses it, and what devices wrote is in the frame
//! ```
//!
//! The kernel clears the entry and lets a fault find the page again by its swap or migration entry; so does
//! this. What waits, waits for the round of its own page.

use futures_util::future::join_all;
use shootdown_core::{Access, AddrRange, Cause, PageSize};

use tokio::sync::OwnedRwLockReadGuard;

use super::Inner;
use super::address_space::{AddressSpace, User};
use super::error::MemoryError;
use super::frame::{FrameLife, FrameRef};
use super::gather::Quiesced;
use super::lru::Isolated;
use super::page_table::{Entry, Slot, Stage, page_after, rest_after};
use super::pool::Pool;
use crate::source::{Notifier, Wait};

/// Whether pages that are locked in memory may be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Locked {
    /// Reclaim: they stay.
    Stay,
    /// Migration: they are in memory afterwards too.
    May,
}

/// Why a page stays where it is.
#[derive(Debug)]
pub(super) enum Kept {
    /// It is locked in memory (`SWAP_FAIL`). No entry was changed for it that a device could have seen.
    Locked,
    /// Something else holds it (`SWAP_AGAIN`).
    Busy,
    /// Devices could not be told, or have not stopped.
    Refused(MemoryError),
}

/// A page that no page table shows and no device uses. Dropped, its entries come back as they were.
#[derive(Debug)]
pub(super) struct Unmapped<'a> {
    pool: &'a Pool,
    page: Isolated,
    takings: Takings,
    proof: Quiesced,
}

/// An entry that is moving.
#[derive(Debug)]
struct Taken {
    /// Keeps the address space from ending meanwhile.
    user: User,
    address: u64,
    /// By which it is known from another's of the same frame.
    ticket: u64,
}

/// What an entry is replaced by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct WasEntry {
    pub(super) allows: Access,
    pub(super) dirty: bool,
}

impl Kept {
    fn counted(self, pool: &Pool) -> Self {
        pool.count(|events| match self {
            Self::Locked => events.unmaps_failed += 1,
            Self::Busy => events.unmaps_busy += 1,
            Self::Refused(_) => {}
        });
        self
    }
}

impl AddressSpace {
    /// The first page from `first` to `last` that is present, for its holder alone; none where another holds
    /// it.
    pub(super) fn isolate_next(&self, first: u64, last: u64) -> Option<(u64, Option<Isolated>)> {
        let mut left = AddrRange::new(first, last.wrapping_add(1)).ok();
        while let Some((part, table)) = left.and_then(|range| self.tables.first_in(range)) {
            let entries = table.lock();
            let mut at = Some(part.start());
            while let Some(address) = at.and_then(|from| entries.next_occupied(from, part.last())) {
                if let Some(entry) = entries.get(address) {
                    return Some((address, self.pool.lru.isolate(entry.frame.life())));
                }
                at = page_after(address, part.last());
            }
            left = left.and_then(|range| rest_after(range, part));
        }
        None
    }
}

/// Every address where `page` is shown. An address space that is ending is left out: it ends without us.
pub(super) fn places_of(page: &Isolated) -> Vec<(User, u64)> {
    let shown = page.owners().iter().flat_map(|owner| owner.object.shown_at(owner.position));
    shown.filter_map(|(space, address)| Some((space.enter().ok()?, address))).collect()
}

/// `try_to_unmap`.
pub(super) async fn try_to_unmap<'a, N: Notifier>(
    inner: &'a Inner<N>,
    page: Isolated,
    cause: Cause,
    locked: Locked,
) -> Result<Unmapped<'a>, (Isolated, Kept)> {
    let pool = &*inner.pool;
    let ticket = pool.next_ticket();
    let mut takings = Takings { life: page.life(), taken: Vec::new() };
    for (user, address) in places_of(&page) {
        match take(&user.space, address, page.life(), ticket, locked) {
            Ok(Found::Taken) => takings.taken.push(Taken { user, address, ticket }),
            Ok(Found::Elsewhere) => {}
            Err(kept) => return Err((page, kept.counted(pool))),
        }
    }
    let expected = page.own_references() + u32::try_from(takings.taken.len()).unwrap_or(u32::MAX);
    if pool.frames.references(page.pin()) != expected {
        return Err((page, Kept::Busy.counted(pool)));
    }
    match tell(inner, &takings.taken, cause).await {
        Ok(proof) => Ok(Unmapped { pool, page, takings, proof }),
        Err(error) => Err((page, Kept::Refused(error))),
    }
}

/// Takes a frame that is on no list away from the entries at `places` that show it, and gives their references
/// back when devices have stopped; refused, the entries come back. `stay` is held until they are taken: a move
/// waits for one that is taken by itself.
pub(super) async fn take_away<N: Notifier>(
    inner: &Inner<N>,
    places: Vec<(User, u64)>,
    life: FrameLife,
    cause: Cause,
    stay: OwnedRwLockReadGuard<()>,
) -> Result<(), MemoryError> {
    let ticket = inner.pool.next_ticket();
    let mut takings = Takings { life, taken: Vec::new() };
    for (user, address) in places {
        if let Ok(Found::Taken) = take(&user.space, address, life, ticket, Locked::May) {
            takings.taken.push(Taken { user, address, ticket });
        }
    }
    drop(stay);
    let proof = tell(inner, &takings.taken, cause).await?;
    let taken = std::mem::take(&mut takings.taken);
    let came_out = taken.iter().filter_map(|taken| taken.settle(life, |_| Slot::Absent));
    inner.pool.free(came_out.collect::<Vec<_>>(), &proof);
    Ok(())
}

/// Entries that were taken; dropped, they come back.
#[derive(Debug)]
struct Takings {
    life: FrameLife,
    taken: Vec<Taken>,
}

impl Drop for Takings {
    fn drop(&mut self) {
        self.taken.iter().for_each(|taken| taken.restore(self.life));
    }
}

enum Found {
    Taken,
    /// The entry is of another page.
    Elsewhere,
}

/// `try_to_unmap_one`, up to the notifier.
fn take(
    space: &AddressSpace,
    address: u64,
    life: FrameLife,
    ticket: u64,
    locked: Locked,
) -> Result<Found, Kept> {
    let layout = space.layout.read();
    let Some(table) = space.tables.get(address) else { return Ok(Found::Elsewhere) };
    let mut entries = table.lock();
    let Some(entry) = entries.get(address).filter(|entry| entry.is_life(life)) else {
        return Ok(Found::Elsewhere);
    };
    if entry.stage == Stage::Settling {
        return Err(Kept::Busy);
    }
    let page = AddrRange::page_of(address, PageSize::BASE);
    if locked == Locked::Stay && layout.vmas.overlapping(page).any(|vma| vma.flags.locked) {
        return Err(Kept::Locked);
    }
    if let Slot::Present(entry) = entries.replace(address, Slot::Absent) {
        entries.replace(address, Slot::Moving(Entry { ticket, ..entry }));
    }
    Ok(Found::Taken)
}

/// One round for each place, all at once: a page takes as long as its slowest device.
async fn tell<N: Notifier>(inner: &Inner<N>, taken: &[Taken], cause: Cause) -> Result<Quiesced, MemoryError> {
    let rounds = taken.iter().map(|taken| async move {
        let page = AddrRange::page_of(taken.address, PageSize::BASE);
        let (id, wait) = (taken.user.space.id, Wait::ForTargets);
        let round = inner.notifier.invalidate_page(id, page.start(), cause, wait).await;
        Quiesced::judge(page, &round.map_err(MemoryError::Notify)?)
    });
    let proofs: Result<Vec<Quiesced>, MemoryError> = join_all(rounds).await.into_iter().collect();
    Ok(Quiesced::all(proofs?))
}

impl Taken {
    fn is_mine(&self, entry: &Entry, life: FrameLife) -> bool {
        entry.is_life(life) && entry.ticket == self.ticket
    }

    /// Puts `slot` in the place of the moving entry; what came out, if it was still there.
    fn settle(&self, life: FrameLife, slot: impl FnOnce(&Entry) -> Slot) -> Option<FrameRef> {
        let space = &self.user.space;
        let table = space.tables.get(self.address)?;
        let came_out = {
            let mut entries = table.lock();
            let slot = match entries.slot(self.address) {
                Slot::Moving(entry) if self.is_mine(entry, life) => slot(entry),
                // It was zapped meanwhile.
                _ => return None,
            };
            match entries.replace(self.address, slot) {
                Slot::Moving(entry) => Some(entry.frame),
                _ => None,
            }
        };
        space.changed.notify_waiters();
        came_out
    }

    fn restore(&self, life: FrameLife) {
        let space = &self.user.space;
        let Some(table) = space.tables.get(self.address) else { return };
        {
            let mut entries = table.lock();
            if matches!(entries.slot(self.address), Slot::Moving(entry) if self.is_mine(entry, life))
                && let Slot::Moving(entry) = entries.replace(self.address, Slot::Absent)
            {
                entries.replace(self.address, Slot::Present(entry));
            }
        }
        space.changed.notify_waiters();
    }
}

impl Unmapped<'_> {
    pub(super) fn page(&self) -> &Isolated {
        &self.page
    }

    /// How many entries show the page.
    pub(super) fn places(&self) -> usize {
        self.takings.taken.len()
    }

    /// Whether it was written since it was last clean, by the CPU or by a device.
    pub(super) fn is_dirty(&self) -> bool {
        let dirty = |taken: &Taken| {
            let Some(table) = taken.user.space.tables.get(taken.address) else { return false };
            let entries = table.lock();
            matches!(entries.slot(taken.address), Slot::Moving(entry) if entry.ticket == taken.ticket && entry.dirty)
        };
        self.takings.taken.iter().any(dirty)
    }

    /// Puts something else in every entry's place, and gives the entries' references back. `slot` is called
    /// for each entry that is still there, under its page-table lock.
    pub(super) fn replace(self, mut slot: impl FnMut(WasEntry) -> Slot) -> Isolated {
        let Self { pool, page, mut takings, proof } = self;
        let life = page.life();
        let taken = std::mem::take(&mut takings.taken);
        let came_out = taken.iter().filter_map(|taken| {
            taken.settle(life, |entry| slot(WasEntry { allows: entry.allows, dirty: entry.dirty }))
        });
        pool.free(came_out.collect::<Vec<_>>(), &proof);
        page
    }
}
