//! Two pages become one frame: `try_to_merge_one_page`, `write_protect_page` and `replace_page`, with the
//! mail's rule for every method: with no page-table lock held.
//!
//! ```text
//!   both pages are isolated: P, which goes, and K, which is kept
//!   for each place of both that is writable:
//!       page-table lock: it allows reads alone now, and is settling                     (write_protect_page)
//!       unlock
//!   are there references beside those of the places?  --yes--> they are writable again
//!   invalidate_page for each, all at once             --refused--> they are writable again
//!   settled; only now compare the bytes: what devices wrote is in the frames           (pages_identical)
//!   for each place of P:
//!       page-table lock: is it P's entry still?  --no--> it is left out                     (orig_pte)
//!           it names K now, and is settling
//!       unlock
//!   change_pte for each, all at once: devices may take K and forget P                  (set_pte_at_notify)
//!       quiesced: the entry has settled, its reference to P goes
//!       refused:  P comes back
//! ```
//!
//! Why an entry is settling while it is write-protected. A device may still write to the page until its ack.
//! A store of the CPU would find the page read-only and in two hands, copy it (`do_wp_page`), and so lose
//! what the device writes after the copy. It waits instead. From the acks on nobody writes to either frame:
//! no device has leave to, and a store or a device's write fault finds the page in two hands and copies it.
//!
//! Why an entry is settling while it is replaced. Both frames have the same bytes, so reading is safe through
//! either. A store before every device has switched would leave one reading the old bytes in P.
//!
//! What a refusal leaves. A notifier that refuses `change_pte` has told nobody: P comes back, and that is
//! all. One whose round is not quiesced has told devices, and some may read K at this place and some P. P
//! comes back, and a reference to each of the two is parked in quarantine: neither is freed, and as each is
//! in two hands the next store copies it and tells this place's devices, whichever they read. It is never
//! made writable in place.

use std::sync::Arc;

use futures_util::future::join_all;
use shootdown_core::{Access, AddrRange, Cause, PageSize, Translation};

use super::Inner;
use super::address_space::{AddressSpace, User};
use super::error::MemoryError;
use super::frame::{FrameLife, FrameRef};
use super::gather::Quiesced;
use super::lru::Isolated;
use super::page_table::{Entry, Stage};
use super::rmap::places_of;
use crate::source::{Notifier, Wait};

/// Puts `kept` in the place of `page` wherever that is shown, if their bytes are equal while nobody can write
/// to them. Whether it was done at one place at least.
pub(super) async fn try_to_merge<N: Notifier>(
    inner: &Inner<N>,
    page: &Isolated,
    kept: &mut Isolated,
) -> Result<bool, MemoryError> {
    let Some([places, _places_of_kept]) = write_protect(inner, [page, kept]).await? else { return Ok(false) };
    let frames = &inner.pool.frames;
    if frames.bytes(page.pin())? != frames.bytes(kept.pin())? {
        return Ok(false);
    }
    replace_page(inner, page, kept, places).await
}

/// Where a page is shown. Each keeps its address space from ending meanwhile.
type Places = Vec<(User, u64)>;

/// `write_protect_page` for both. The places of each; `None` where something else holds one of them.
async fn write_protect<N: Notifier>(
    inner: &Inner<N>,
    pages: [&Isolated; 2],
) -> Result<Option<[Places; 2]>, MemoryError> {
    let mut places: [Places; 2] = Default::default();
    // Dropped before the places are, so that an address space is not gone when its entries come back.
    let mut protections = Vec::new();
    for (page, places) in pages.into_iter().zip(&mut places) {
        for (user, address) in places_of(page) {
            match protect(&user.space, address, page.life()) {
                Found::Elsewhere => continue,
                Found::Busy => return Ok(None),
                Found::ReadOnly => {}
                Found::Protected => {
                    protections.push(Protection {
                        space: Arc::clone(&user.space),
                        address,
                        page,
                        stopped: Stopped::Unknown,
                    });
                }
            }
            places.push((user, address));
        }
        // A place that the walk missed, or somebody who copies: it is not for us alone.
        let expected = page.own_references() + u32::try_from(places.len()).unwrap_or(u32::MAX);
        if places.is_empty() || inner.pool.frames.references(page.pin()) != expected {
            return Ok(None);
        }
    }
    let rounds = protections.iter().map(|protection| async move {
        let page = AddrRange::page_of(protection.address, PageSize::BASE);
        let (id, wait) = (protection.space.id, Wait::ForTargets);
        let round = inner.notifier.invalidate_page(id, page.start(), Cause::Clear, wait).await;
        Quiesced::judge(page, &round.map_err(MemoryError::Notify)?)
    });
    let proofs: Result<Vec<Quiesced>, MemoryError> = join_all(rounds).await.into_iter().collect();
    let proof = Quiesced::all(proofs?);
    for protection in protections {
        protection.settle(&proof);
    }
    Ok(Some(places))
}

enum Found {
    /// The entry was writable, and is settling now.
    Protected,
    ReadOnly,
    /// The entry is of another page.
    Elsewhere,
    Busy,
}

/// `write_protect_page`, up to the notifier.
fn protect(space: &AddressSpace, address: u64, life: FrameLife) -> Found {
    let layout = space.layout.read();
    let Some(table) = space.tables.get(address) else { return Found::Elsewhere };
    let mut entries = table.lock();
    let Some(entry) = entries.get_mut(address).filter(|entry| entry.is_life(life)) else {
        return Found::Elsewhere;
    };
    let page = AddrRange::page_of(address, PageSize::BASE);
    let vma = layout.vmas.overlapping(page).next();
    let may = |flags: super::vma::Flags| flags.mergeable && !flags.locked;
    if entry.stage == Stage::Settling || !vma.is_some_and(|vma| may(vma.flags)) {
        return Found::Busy;
    }
    if entry.allows == Access::Read {
        return Found::ReadOnly;
    }
    entry.allows = Access::Read;
    entry.stage = Stage::Settling;
    Found::Protected
}

/// An entry that was writable. Dropped before it has settled, it is writable again: a device may have leave
/// to write still, and the next who wants it read-only has to tell it.
#[derive(Debug)]
struct Protection<'a> {
    space: Arc<AddressSpace>,
    address: u64,
    page: &'a Isolated,
    stopped: Stopped,
}

/// Whether devices have stopped writing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stopped {
    Unknown,
    Yes,
}

impl Protection<'_> {
    /// No device writes to the page any more.
    fn settle(mut self, _proof: &Quiesced) {
        self.stopped = Stopped::Yes;
    }
}

impl Drop for Protection<'_> {
    fn drop(&mut self) {
        {
            let layout = self.space.layout.read();
            let Some(table) = self.space.tables.get(self.address) else { return };
            let mut entries = table.lock();
            let ours = |entry: &&mut Entry| entry.is_life(self.page.life()) && entry.stage == Stage::Settling;
            if let Some(entry) = entries.get_mut(self.address).filter(ours) {
                entry.stage = Stage::Settled;
                // A fork that shared it meanwhile took the leave from devices itself, and wants it read-only.
                let references = self.space.frames.references(self.page.pin());
                let shared = references > self.page.own_references() + 1;
                // Whether it is leaving or not: an unmap that is refused brings it back.
                let page = AddrRange::page_of(self.address, PageSize::BASE);
                let writable = layout.vmas.overlapping(page).any(|vma| vma.access == Access::Write);
                if self.stopped == Stopped::Unknown && !shared && writable {
                    entry.allows = Access::Write;
                }
            }
        }
        self.space.changed.notify_waiters();
    }
}

/// `replace_page`, everywhere. Whether an entry names `kept` now.
async fn replace_page<N: Notifier>(
    inner: &Inner<N>,
    page: &Isolated,
    kept: &mut Isolated,
    places: Places,
) -> Result<bool, MemoryError> {
    // Before anybody else can isolate it: a fork may share it from here on, even if P comes back.
    for owner in page.owners() {
        kept.add_owner(owner.clone());
    }
    let kept = &*kept;
    let replaced = places.into_iter().map(|(user, address)| replace_one(inner, page, kept, user, address));
    let ended: Result<Vec<bool>, MemoryError> = join_all(replaced).await.into_iter().collect();
    ended.map(|replaced| replaced.contains(&true))
}

/// `replace_page` at one place. Whether its entry names `kept` now.
///
/// With a claim on the page until the round is over: were the entry zapped in between, and its bracket over, the
/// hint would come late, and a device would take K for whatever is there by then. It waits for the claim with
/// nothing in its hands that anybody who has one waits for.
async fn replace_one<N: Notifier>(
    inner: &Inner<N>,
    page: &Isolated,
    kept: &Isolated,
    user: User,
    address: u64,
) -> Result<bool, MemoryError> {
    let range = AddrRange::page_of(address, PageSize::BASE);
    let space = Arc::clone(&user.space);
    let _claim = space.claim(range).await;
    let Some(mut replacement) = Replacement::make(user, address, page, kept) else { return Ok(false) };
    let translation = Translation { range, frame: kept.number(), access: Access::Read };
    replacement.told = Told::Perhaps;
    let round = match inner.notifier.change_pte(space.id, translation, Wait::ForTargets).await {
        Ok(round) => round,
        Err(error) => {
            replacement.nobody_was_told();
            return Err(MemoryError::Notify(error));
        }
    };
    let proof = Quiesced::judge(range, &round)?;
    replacement.settle(&proof);
    Ok(true)
}

/// Whether a device may have been told of the page that is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    Nobody,
    Perhaps,
}

/// An entry that names K where it named P. Dropped before it has settled, it names P again.
#[derive(Debug)]
struct Replacement {
    user: User,
    address: u64,
    kept: FrameLife,
    /// The entry's own reference to P.
    replaced: Option<FrameRef>,
    /// Another reference to P, for the quarantine.
    spare: Option<FrameRef>,
    told: Told,
}

impl Replacement {
    /// `replace_page`, up to the notifier. `None` where the entry is not the page's any more, or one of the
    /// two frames is shared as often as it may be.
    fn make(user: User, address: u64, page: &Isolated, kept: &Isolated) -> Option<Self> {
        let replaced = {
            let frames = &user.space.frames;
            let _layout = user.space.layout.read();
            let table = user.space.tables.get(address)?;
            let mut entries = table.lock();
            let orig_pte = |entry: &&mut Entry| {
                entry.is_life(page.life()) && entry.stage == Stage::Settled && entry.allows == Access::Read
            };
            let entry = entries.get_mut(address).filter(orig_pte)?;
            let spare = frames.share(page.pin()).ok()?;
            match frames.share(kept.pin()) {
                Ok(share) => {
                    entry.stage = Stage::Settling;
                    (std::mem::replace(&mut entry.frame, share), spare)
                }
                Err(_) => {
                    frames.put([spare]);
                    return None;
                }
            }
        };
        let (replaced, spare) = (Some(replaced.0), Some(replaced.1));
        Some(Self { user, address, kept: kept.life(), replaced, spare, told: Told::Nobody })
    }

    /// A call that is refused has no effect.
    fn nobody_was_told(mut self) {
        self.told = Told::Nobody;
    }

    /// Devices have stopped using P here: whoever waited may go on, and its references go.
    fn settle(mut self, proof: &Quiesced) {
        let space = &self.user.space;
        if let Some(table) = space.tables.get(self.address)
            && let Some(entry) = table.lock().get_mut(self.address).filter(|entry| entry.is_life(self.kept))
        {
            entry.stage = Stage::Settled;
        }
        space.changed.notify_waiters();
        let pool = Arc::clone(&space.pool);
        pool.free(self.replaced.take().into_iter().chain(self.spare.take()), proof);
    }
}

impl Drop for Replacement {
    fn drop(&mut self) {
        let (Some(replaced), Some(spare)) = (self.replaced.take(), self.spare.take()) else { return };
        let space = &self.user.space;
        let mut replaced = Some(replaced);
        let share = space.tables.get(self.address).and_then(|table| {
            let mut entries = table.lock();
            let ours = |entry: &&mut Entry| entry.is_life(self.kept) && entry.stage == Stage::Settling;
            let entry = entries.get_mut(self.address).filter(ours)?;
            entry.stage = Stage::Settled;
            Some(std::mem::replace(&mut entry.frame, replaced.take()?))
        });
        space.changed.notify_waiters();
        // Its place was taken meanwhile: whether devices have stopped using P is not known.
        space.park(replaced);
        match self.told {
            Told::Perhaps => space.park(share.into_iter().chain([spare])),
            // No device has K through this place, and P has its entry's reference again, or is parked.
            Told::Nobody => drop(space.frames.put(share.into_iter().chain([spare]))),
        }
    }
}

#[cfg(test)]
mod tests {
    use shootdown_core::AddressSpaceId;

    use super::super::fault::{By, Touch};
    use super::super::frame::FrameStore;
    use super::super::page_table::Tables;
    use super::super::pool::Pool;
    use super::super::vma::{Flags, Vmas};
    use super::*;

    #[test]
    fn only_a_page_that_may_be_merged_and_is_not_locked_in_memory_is_write_protected() {
        let pool = Pool::new(FrameStore::new(1).unwrap(), None, 1);
        let space =
            AddressSpace::new(AddressSpaceId::FIRST, Arc::clone(&pool), Vmas::new(1), Tables::default());
        let range = AddrRange::new(0, 4096).unwrap();
        space.layout.write().vmas.map(range, Access::Write).unwrap();
        assert!(matches!(space.touch(0, By::Cpu, Access::Write, Ok), Ok(Touch::Done(..))));
        let life = space.tables.get(0).unwrap().lock().get(0).unwrap().frame.life();
        let with = |locked, mergeable| {
            let flags = Flags { locked, mergeable };
            space.layout.write().vmas.change(range, |vma| vma.flags = flags).unwrap();
            protect(&space, 0, life)
        };
        assert!(matches!(with(false, false), Found::Busy));
        assert!(matches!(with(true, true), Found::Busy));
        assert_eq!(space.tables.get(0).unwrap().lock().get(0).unwrap().allows, Access::Write);
        assert!(matches!(with(false, true), Found::Protected));
        assert!(matches!(with(false, true), Found::Busy), "it is settling");
        let entry = |check: fn(&Entry) -> bool| space.tables.get(0).unwrap().lock().get(0).is_some_and(check);
        assert!(entry(|entry| entry.allows == Access::Read && entry.stage == Stage::Settling));
    }
}
