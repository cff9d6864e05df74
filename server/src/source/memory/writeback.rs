//! Write-back: `clear_page_dirty_for_io`, `page_mkclean` and `page_mkclean_one`, after the patch of 2012
//! ("invalidate_page outside PT lock").
//!
//! ```text
//!   for each page: hold its index, and if it is dirty isolate it
//!       the page is clean                                                        (a store from here on dirties it)
//!       for each place:
//!           page-table lock: is the entry clean and read-only?  --yes--> nobody is told
//!               it is clean and read-only now
//!           unlock
//!       invalidate_page, PROTECTION_PAGE, for each that changed, all at once
//!           --refused--> the page is dirty, and so are the entries that changed
//!       only now are the bytes read, and written to disk     --failed--> the page is dirty
//! ```
//!
//! Why nothing is lost. Devices hand over what they wrote with their acks, so the bytes are read after them. A
//! store of the CPU that comes while devices are waited for faults, for its entry is read-only, and makes the page
//! dirty before it writes: its bytes are in the file now or the next time. A device that faults so gets no
//! leave to write before the round is over.
//!
//! An entry whose round was refused stays dirty, or the next write-back would find it clean and not tell the
//! devices that may still write through it.

use std::sync::Arc;

use futures_util::future::join_all;
use shootdown_core::{Access, AddrRange, Cause, PageSize};

use super::address_space::{AddressSpace, User};
use super::error::MemoryError;
use super::file::{MemoryFile, OpenFile};
use super::frame::FrameLife;
use super::gather::Quiesced;
use super::lru::Isolated;
use super::object::Object;
use super::page_cache::{Backing, Hold, Part, position_of};
use super::twin::Twin;
use super::{Inner, MemorySource};
use crate::source::{Notifier, Wait};

/// What [`MemorySource::write_back`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WrittenBack {
    /// Pages that were dirty, and are in the file now.
    pub written: usize,
    /// Pages that were clean: nobody was told.
    pub clean: usize,
    /// Pages that reclaim was looking at; they are as dirty as they were. Try again.
    pub skipped: usize,
}

impl<N: Notifier> MemorySource<N> {
    /// Writes the dirty pages of a file to it (`filemap_fdatawrite`). Devices lose their leave to write them, and what they
    /// wrote is written too. What is stored while it goes on is in the file afterwards, or its page is dirty.
    ///
    /// # Errors
    /// The first failure, after every page was tried: [`MemoryError::Notify`], [`MemoryError::NotQuiesced`] if devices
    /// could not be told, [`MemoryError::File`] if the disk failed, [`MemoryError::Frame`]. Pages that are not in the
    /// file are dirty, and their content is kept. [`MemoryError::TaskEnded`].
    ///
    /// # Cancel safety
    /// Dropped after it was polled, it goes on.
    pub async fn write_back(&self, file: &MemoryFile) -> Result<WrittenBack, MemoryError> {
        let (inner, open) = (Arc::clone(&self.inner), Arc::clone(&file.open));
        self.owned(Twin::WriteBack, async move { write_back(&inner, &open).await }).await
    }
}

/// `write_cache_pages`.
async fn write_back<N: Notifier>(inner: &Inner<N>, open: &OpenFile) -> Result<WrittenBack, MemoryError> {
    let backing = &open.backing;
    let pages: Vec<u64> = backing.lock().pages().map(|(index, _)| index).collect();
    let mut done = WrittenBack::default();
    let mut failed = None;
    for index in pages {
        // A page that another is writing back, or evicting, counts as clean and is not in the file yet: it is
        // waited for (`wait_on_page_writeback`).
        let _held = backing.hold(Part::Page(index), Hold::WriteBack).await;
        let cached = backing.lock().get(index).map(|cached| (cached.frame.life(), cached.dirty));
        let Some((life, dirty)) = cached else {
            done.clean += 1;
            continue;
        };
        if !dirty && !is_shown_dirty(&open.object, index, life) {
            done.clean += 1;
            continue;
        }
        let Some(page) = inner.pool.lru.isolate(life) else {
            done.skipped += 1;
            continue;
        };
        match write_page(inner, open, index, &page).await {
            Ok(()) => done.written += 1,
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    failed.map_or(Ok(done), Err)
}

/// One page, which is isolated and whose index is held.
async fn write_page<N: Notifier>(
    inner: &Inner<N>,
    open: &OpenFile,
    index: u64,
    page: &Isolated,
) -> Result<(), MemoryError> {
    let backing = &*open.backing;
    backing.clear_dirty(index, page.life());
    let mut cleaning =
        Cleaning { backing, index, life: page.life(), changed: Vec::new(), outcome: Outcome::Unknown };
    let places = backing.places_stay().await;
    for (space, address) in open.object.shown_at(position_of(index)) {
        // One that is coming to its end has devices too. Not looked at, its entry stays dirty.
        if let Some(user) = space.visit().await
            && mkclean_one(&user.space, address, page.life())
        {
            cleaning.changed.push((user, address));
        }
    }
    // Devices may take their time, and a move of what is clean by now does no harm.
    drop(places);
    tell(inner, &cleaning.changed).await?;
    backing.write(index, &inner.pool.frames.bytes(page.pin())?)?;
    cleaning.outcome = Outcome::InFile;
    Ok(())
}

/// `page_mkclean_one`, up to the notifier. Whether something changed.
fn mkclean_one(space: &AddressSpace, address: u64, life: FrameLife) -> bool {
    let Some(table) = space.tables.get(address) else { return false };
    let mut entries = table.lock();
    let Some(entry) = entries.get_mut(address).filter(|entry| entry.is_life(life)) else { return false };
    if entry.allows == Access::Read && !entry.dirty {
        return false;
    }
    entry.allows = Access::Read;
    entry.dirty = false;
    true
}

/// One round for each place, all at once.
async fn tell<N: Notifier>(inner: &Inner<N>, changed: &[(User, u64)]) -> Result<Quiesced, MemoryError> {
    let rounds = changed.iter().map(|(user, address)| async move {
        let page = AddrRange::page_of(*address, PageSize::BASE);
        let (cause, wait) = (Cause::ProtectionPage, Wait::ForTargets);
        let round = inner.notifier.invalidate_page(user.space.id, page.start(), cause, wait).await;
        Quiesced::judge(page, &round.map_err(MemoryError::Notify)?)
    });
    let proofs: Result<Vec<Quiesced>, MemoryError> = join_all(rounds).await.into_iter().collect();
    Ok(Quiesced::all(proofs?))
}

/// Whether an entry shows the page that was written, which the page does not know of.
fn is_shown_dirty(object: &Object, index: u64, life: FrameLife) -> bool {
    object.shown_at(position_of(index)).iter().any(|(space, address)| {
        let table = space.tables.get(*address);
        table.is_some_and(|table| {
            table.lock().get(*address).is_some_and(|entry| entry.is_life(life) && entry.dirty)
        })
    })
}

/// A page that counts as clean and is not in the file yet. Dropped, it is dirty again.
struct Cleaning<'a> {
    backing: &'a Backing,
    index: u64,
    life: FrameLife,
    /// Places whose entries were dirty or writable.
    changed: Vec<(User, u64)>,
    outcome: Outcome,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Outcome {
    InFile,
    Unknown,
}

impl Drop for Cleaning<'_> {
    fn drop(&mut self) {
        if self.outcome == Outcome::InFile {
            return;
        }
        self.backing.set_dirty(self.index, self.life);
        for (user, address) in &self.changed {
            if let Some(table) = user.space.tables.get(*address)
                && let Some(entry) = table.lock().get_mut(*address).filter(|entry| entry.is_life(self.life))
            {
                entry.dirty = true;
            }
        }
    }
}
