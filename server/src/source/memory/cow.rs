//! Copy on write: the branch of `do_wp_page` that copies, after the patch of 2012 ("invalidate_page outside
//! PT lock").
//!
//! ```text
//!   page-table lock: the entry is read-only and shared; take a reference to the old frame     (orig_pte)
//!   unlock; take a frame; copy
//!   page-table lock: is it the same entry?  --no--> unlock; free the copy alone               (pte_same)
//!       it names the copy now, and is settling
//!   unlock; invalidate_page                 --refused--> the old entry comes back; free the copy
//!   page-table lock: it has settled; unlock
//!   only now the references to the old frame go
//! ```
//!
//! The kernel lets other CPUs write to the new page before `invalidate_page` has returned. On one machine
//! that is a window of microseconds; across a network a device would read the old frame for a round trip
//! after a store had returned. So the entry is *settling* until the round is over: writers and devices
//! wait for it, and readers on the CPU need not, for both frames have the same bytes until then. It also
//! means that no device has seen the copy when the notifier refuses, and nothing has to be quarantined.

use std::sync::Arc;

use shootdown_core::{Access, AddrRange, Cause, PageSize};

use super::Inner;
use super::address_space::AddressSpace;
use super::error::MemoryError;
use super::frame::{FrameLife, FrameRef};
use super::gather::Quiesced;
use super::lru::List;
use super::outcome::CopiedPage;
use super::page_table::{Entry, Stage};
use crate::source::{Notifier, Wait};

/// How a copy on write ended.
#[derive(Debug, Default)]
pub(super) enum Broken {
    Copied(CopiedPage),
    LostRace,
    /// The entry is not shared any more.
    #[default]
    NotNeeded,
}

/// `do_wp_page` on the page at `address`.
pub(super) async fn do_wp_page<N: Notifier>(
    inner: &Inner<N>,
    space: &Arc<AddressSpace>,
    address: u64,
) -> Result<Broken, MemoryError> {
    let page = AddrRange::page_of(address, PageSize::BASE);
    let Some(mut replacement) = Replacement::begin(space, page.start())? else {
        return Ok(Broken::NotNeeded);
    };
    // Where the kernel may sleep until it has memory for the copy.
    tokio::task::yield_now().await;
    if !replacement.install() {
        space.pool.count(|events| events.lost_races += 1);
        return Ok(Broken::LostRace);
    }
    let (wait, cause) = (Wait::ForTargets, Cause::Clear);
    let told = inner.notifier.invalidate_page(space.id, page.start(), cause, wait).await;
    let round = told.map_err(MemoryError::Notify)?;
    let proof = Quiesced::judge(page, &round)?;
    let old_generation = replacement.old.generation();
    let freed = replacement.settle(&proof);
    space.pool.count(|events| events.copied += 1);
    let release = (freed > 0).then(|| (inner.config.now)().since(round.times.answered));
    Ok(Broken::Copied(CopiedPage { old_generation, round, release }))
}

/// A copy on its way into the page table. Dropped before it has settled, the entry is as it was.
#[derive(Debug)]
struct Replacement<'a> {
    space: &'a AddressSpace,
    page: u64,
    old: FrameLife,
    new: FrameLife,
    /// The reference that keeps the old frame while it is copied (`page_cache_get(old_page)`).
    pin: Option<FrameRef>,
    /// The copy, until it is installed.
    copy: Option<FrameRef>,
    /// The entry's own reference to the old frame, once the copy is installed.
    replaced: Option<FrameRef>,
}

impl<'a> Replacement<'a> {
    /// Pins the old frame under the page-table lock, and copies it after. `None` when there is nothing
    /// shared to copy.
    fn begin(space: &'a AddressSpace, page: u64) -> Result<Option<Self>, MemoryError> {
        let Some(pin) = Self::pin(space, page)? else { return Ok(None) };
        match space.frames.take_copy(&pin) {
            Ok(copy) => {
                let (old, new) = (pin.life(), copy.life());
                let (pin, copy, replaced) = (Some(pin), Some(copy), None);
                Ok(Some(Self { space, page, old, new, pin, copy, replaced }))
            }
            Err(error) => {
                space.frames.put([pin]);
                Err(error.into())
            }
        }
    }

    fn pin(space: &AddressSpace, page: u64) -> Result<Option<FrameRef>, MemoryError> {
        let layout = space.layout.read();
        layout.vmas.allowing(page, Access::Write)?;
        let Some(table) = space.tables.get(page) else { return Ok(None) };
        let entries = table.lock();
        let Some(entry) = entries.get(page) else { return Ok(None) };
        if entry.stage == Stage::Settling
            || entry.allows == Access::Write
            || space.frames.is_only_reference(&entry.frame)
        {
            return Ok(None);
        }
        Ok(Some(space.frames.share(&entry.frame)?))
    }

    /// Puts the copy in the entry's place if that is still the entry that was copied.
    fn install(&mut self) -> bool {
        let layout = self.space.layout.read();
        let Ok(vma) = layout.vmas.allowing(self.page, Access::Write) else { return false };
        let Some(table) = self.space.tables.get(self.page) else { return false };
        let mut entries = table.lock();
        let orig_pte = |entry: &&mut Entry| entry.is_life(self.old) && entry.allows == Access::Read;
        let Some(entry) = entries.get_mut(self.page).filter(orig_pte) else { return false };
        let Some(copy) = self.copy.take() else { return false };
        self.replaced = Some(std::mem::replace(&mut entry.frame, copy));
        entry.allows = Access::Write;
        entry.stage = Stage::Settling;
        entry.mark(Access::Write);
        self.space.pool.lru.add(self.new, vma.owner_of(self.page), List::Active);
        true
    }

    /// Devices have stopped using the old frame: writers may go on, and the old references go. How many
    /// frames were freed.
    fn settle(mut self, _proof: &Quiesced) -> usize {
        if let Some(table) = self.space.tables.get(self.page)
            && let Some(entry) = table.lock().get_mut(self.page).filter(|entry| entry.is_life(self.new))
        {
            entry.stage = Stage::Settled;
        }
        self.space.changed.notify_waiters();
        self.space.frames.put(self.replaced.take().into_iter().chain(self.pin.take()))
    }

    /// The old frame comes back, unless its place was taken meanwhile: then it is kept in quarantine.
    fn undo(&mut self, replaced: FrameRef) {
        let table = self.space.tables.get(self.page);
        let mut entries = table.as_ref().map(|table| table.lock());
        let entry = entries.as_mut().and_then(|entries| entries.get_mut(self.page));
        match entry.filter(|entry| entry.is_life(self.new)) {
            Some(entry) => {
                self.copy = Some(std::mem::replace(&mut entry.frame, replaced));
                entry.allows = Access::Read;
                entry.stage = Stage::Settled;
            }
            None => {
                drop(entries);
                self.space.park([replaced]);
            }
        }
    }
}

impl Drop for Replacement<'_> {
    fn drop(&mut self) {
        if let Some(replaced) = self.replaced.take() {
            self.undo(replaced);
            self.space.changed.notify_waiters();
        }
        // Neither needs a proof. No device has seen the copy. And a page that a device may use has, beside
        // this pin, the reference of an entry, of a gather, or of the quarantine.
        self.space.frames.put(self.copy.take().into_iter().chain(self.pin.take()));
    }
}
