//! Collapse to a huge page: khugepaged's `khugepaged_scan_pmd` and `collapse_huge_page`, with the method of
//! which the patches of 2012 say it may stay one that does not sleep (`test_young`).
//!
//! ```text
//!   page-table lock: is every page there fit for it, and did the CPU use one?   (khugepaged_scan_pmd)
//!   unlock; if not: did a device?  test_young, answered on the host   --no--> NotYoung, and nobody is told
//!   take a run of frames; claim the range; look again at what is mapped         (hugepage_vma_revalidate)
//!   invalidate_range_start                  --refused--> the run goes back
//!       page-table lock: isolate every page  --one is busy--> all go back     (__collapse_huge_page_isolate)
//!           every entry is moving now: whoever touches it waits
//!       unlock; copy frame by frame; yield                                      (__collapse_huge_page_copy)
//!       page-table lock: every entry names its frame of the run; unlock
//!       only now the references to the old frames go
//!   invalidate_range_end
//! ```
//!
//! The copy comes after the entries are out and the bracket's round is over: no CPU can write then, and what
//! devices wrote under their translations is in the old frames.
//!
//! What a *huge page* is here, and what it is not. It is a run of frames in a row, aligned to its length,
//! under one page table. It has no entry of its own in a table above: its 512 entries stay single, each of
//! its frames has references of its own, and what devices are granted are 4 KiB as before. So nothing has to
//! be split: a copy on write, an unmap or a migration of one page takes that page out, and the rest stays as
//! it is. What is gained is what a device behind an IOMMU gains by contiguous memory, and the kernel's order
//! of steps; there is no shorter page walk.
//!
//! Pages of the range that are absent become pages of zeros, as long as one is present (`max_ptes_none` at
//! its default, 511). A page that is in the swap file, shared, settling, or in another's hands gives `Busy`.

use std::sync::Arc;

use shootdown_core::{AddrRange, AddressSpaceId, Cause, FrameNumber, PageSize};

use super::address_space::{AddressSpace, Layout};
use super::error::MemoryError;
use super::frame::{FRAME_BYTES, FrameRef};
use super::gather::{Bracket, Quiesced};
use super::lru::{Isolated, List};
use super::page_table::{ENTRIES, Entries, Entry, Slot, Stage, Table};
use super::pool::Pool;
use super::twin::Twin;
use super::vma::{Stay, Vma};
use super::{Inner, MemoryConfig, MemorySource};
use crate::source::Notifier;

/// Pages that are copied before others have their turn (`cond_resched`): each is two system calls.
const PAGES_A_TURN: usize = 16;

/// What [`MemorySource::collapse`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Collapsed {
    /// The pages are one run of frames now.
    Yes,
    /// Nobody used them since they were last looked at: it was not worth it.
    NotYoung,
    /// Something else was at work on one of them, one is shared or in the swap file, or none is present.
    Busy,
    /// The range is not within one anonymous mapping (`SCAN_VMA_CHECK`).
    Unsuited,
}

impl<N: Notifier> MemorySource<N> {
    /// Moves the pages of one huge page, [`MemoryConfig::huge_page_pages`] of them, into frames that are in a
    /// row, if somebody used one of them (`collapse_huge_page`). Every outcome but [`Collapsed::Yes`], and
    /// every error, leaves the pages where they were.
    ///
    /// # Errors
    /// [`MemoryError::NotAHugePage`], [`MemoryError::Unmapped`]; [`MemoryError::Frame`] if no run of frames
    /// is free, or one could not be copied; [`MemoryError::Notify`], [`MemoryError::NotQuiesced`].
    /// [`MemoryError::AddressSpaceUnknown`], [`MemoryError::Exiting`], [`MemoryError::TaskEnded`].
    ///
    /// # Cancel safety
    /// Dropped after it was polled, it goes on.
    pub async fn collapse(&self, id: AddressSpaceId, range: AddrRange) -> Result<Collapsed, MemoryError> {
        let user = self.space(id)?.enter()?;
        let inner = Arc::clone(&self.inner);
        let work = async move { collapse_huge_page(&inner, &user.space, range).await };
        self.owned(Twin::Collapse, work).await
    }

    /// Whether every page of `range` is present, in frames that are in a row from a multiple of their number
    /// on.
    #[must_use]
    pub fn is_collapsed(&self, id: AddressSpaceId, range: AddrRange) -> bool {
        let Ok(space) = self.space(id) else { return false };
        let number = |page: u64| {
            let table = space.tables.get(page)?;
            let entries = table.lock();
            entries.get(page).map(|entry| entry.frame.number().0)
        };
        let Some(first) = number(range.start()) else { return false };
        let in_a_row =
            range.pages(PageSize::BASE).zip(first..).all(|(page, frame)| number(page) == Some(frame));
        in_a_row && first.is_multiple_of((range.last() - range.start()) / PageSize::BASE.bytes() + 1)
    }
}

impl MemoryConfig {
    fn pages_of_a_huge_page(&self) -> usize {
        1 << self.huge_page_pages.clamp(1, ENTRIES).ilog2()
    }
}

/// `collapse_huge_page`.
async fn collapse_huge_page<N: Notifier>(
    inner: &Inner<N>,
    space: &Arc<AddressSpace>,
    range: AddrRange,
) -> Result<Collapsed, MemoryError> {
    let pages = inner.config.pages_of_a_huge_page();
    let bytes = pages as u64 * PageSize::BASE.bytes();
    if !range.start().is_multiple_of(bytes) || range.last() - range.start() != bytes - 1 {
        return Err(MemoryError::NotAHugePage { range, pages });
    }
    match scan(space, range)? {
        Scanned::Used => {}
        Scanned::Idle => {
            // With no lock held, though it could be called with one: it does not sleep.
            if !inner.notifier.test_young(space.id, range).map_err(MemoryError::Notify)? {
                return Ok(Collapsed::NotYoung);
            }
        }
        Scanned::Unfit(why) => return Ok(why),
    }
    let run = Run::take(&inner.pool, pages)?;
    let _claim = space.claim(range).await;
    if vma_of(&space.layout.read(), range)?.is_none() {
        return Ok(Collapsed::Unsuited);
    }
    let (bracket, proof, _) = Bracket::open(&*inner.notifier, space.id, range, Cause::Clear).await?;
    let Some(mut taken) = TakenOut::take(space, range, run)? else { return Ok(Collapsed::Busy) };
    taken.copy().await?;
    taken.install(&proof);
    bracket.close();
    Ok(Collapsed::Yes)
}

/// What a first look found.
enum Scanned {
    /// The CPU used a page.
    Used,
    /// It used none.
    Idle,
    Unfit(Collapsed),
}

/// `khugepaged_scan_pmd`: what is hopeless costs no round.
fn scan(space: &AddressSpace, range: AddrRange) -> Result<Scanned, MemoryError> {
    let layout = space.layout.read();
    if vma_of(&layout, range)?.is_none() {
        return Ok(Scanned::Unfit(Collapsed::Unsuited));
    }
    let Some(table) = space.tables.get(range.start()) else { return Ok(Scanned::Unfit(Collapsed::Busy)) };
    let entries = table.lock();
    let (mut present, mut young) = (0, false);
    for page in range.pages(PageSize::BASE) {
        match entries.slot(page) {
            Slot::Absent => {}
            Slot::Present(entry)
                if entry.stage == Stage::Settled && space.frames.is_only_reference(&entry.frame) =>
            {
                present += 1;
                young |= entry.young;
            }
            Slot::Present(_) | Slot::Moving(_) | Slot::Swapped(_) => {
                return Ok(Scanned::Unfit(Collapsed::Busy));
            }
        }
    }
    Ok(match (present, young) {
        (0, _) => Scanned::Unfit(Collapsed::Busy),
        (_, true) => Scanned::Used,
        (_, false) => Scanned::Idle,
    })
}

/// The anonymous mapping that all of `range` is in.
fn vma_of(layout: &Layout, range: AddrRange) -> Result<Option<Vma>, MemoryError> {
    let first = layout.vmas.overlapping(range).next();
    match first.filter(|vma| vma.stay == Stay::Mapped) {
        None => Err(MemoryError::Unmapped { address: range.start() }),
        Some(vma) => Ok((vma.range.contains(range) && vma.object.backing().is_none()).then_some(vma)),
    }
}

/// Frames in a row that nobody has seen. Dropped, those that were not used go back.
#[derive(Debug)]
struct Run<'a> {
    pool: &'a Pool,
    first: u64,
    frames: Vec<Option<FrameRef>>,
}

impl<'a> Run<'a> {
    fn take(pool: &'a Pool, pages: usize) -> Result<Self, MemoryError> {
        let frames = pool.take_run(pages)?;
        let first = frames.first().map_or(0, |frame| frame.number().0);
        Ok(Self { pool, first, frames: frames.into_iter().map(Some).collect() })
    }
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        // Without a proof: no device has seen them.
        self.pool.frames.put(self.frames.drain(..).flatten());
    }
}

/// The pages of a range whose entries are all moving. Dropped, every entry is as it was.
#[derive(Debug)]
struct TakenOut<'a> {
    space: &'a AddressSpace,
    table: Arc<Table>,
    vma: Vma,
    run: Run<'a>,
    /// Lowest first.
    pages: Vec<Page>,
}

#[derive(Debug)]
struct Page {
    address: u64,
    /// `None` where the page was absent: its entry is moving with the frame of the run, so that a touch waits
    /// for that one and does not put another there.
    old: Option<Isolated>,
}

impl<'a> TakenOut<'a> {
    /// `__collapse_huge_page_isolate`, and `pmdp_collapse_flush`: all entries or none.
    fn take(space: &'a AddressSpace, range: AddrRange, run: Run<'a>) -> Result<Option<Self>, MemoryError> {
        let layout = space.layout.read();
        let Some(vma) = vma_of(&layout, range)? else { return Ok(None) };
        let Some(table) = space.tables.get(range.start()) else { return Ok(None) };
        let mut entries = table.lock();
        let isolate = |address| Some(Page { address, old: isolate(space, entries.slot(address))? });
        let Some(pages) = range.pages(PageSize::BASE).map(isolate).collect::<Option<Vec<Page>>>() else {
            return Ok(None);
        };
        if pages.iter().all(|page| page.old.is_none()) {
            return Ok(None);
        }
        let mut run = run;
        for (page, frame) in pages.iter().zip(&mut run.frames) {
            match entries.replace(page.address, Slot::Absent) {
                Slot::Present(entry) => drop(entries.replace(page.address, Slot::Moving(entry))),
                _ => {
                    let entry = frame.take().map(|frame| Entry::new(frame, vma.access));
                    entries.replace(page.address, entry.map_or(Slot::Absent, Slot::Moving));
                }
            }
        }
        drop(entries);
        Ok(Some(Self { space, table, vma, run, pages }))
    }

    /// `__collapse_huge_page_copy`. Nobody reaches either frame meanwhile.
    async fn copy(&mut self) -> Result<(), MemoryError> {
        for (index, page) in self.pages.iter().enumerate() {
            if index % PAGES_A_TURN == 0 {
                tokio::task::yield_now().await;
            }
            let frames = &self.space.frames;
            let bytes = match &page.old {
                Some(old) => frames.bytes(old.pin())?,
                None => [0; FRAME_BYTES],
            };
            frames.write(FrameNumber(self.run.first + index as u64), 0, &bytes)?;
        }
        Ok(())
    }

    /// The entries name the frames of the run, and the old ones go.
    fn install(mut self, proof: &Quiesced) {
        let pages = std::mem::take(&mut self.pages);
        let mut came_out = Vec::with_capacity(pages.len());
        {
            let mut entries = self.table.lock();
            for (page, frame) in pages.iter().zip(&mut self.run.frames) {
                let Some(was) = take_moving(&mut entries, page.address) else { continue };
                let (frame, old) = match frame.take() {
                    Some(frame) => (frame, Some(was.frame)),
                    None => (was.frame, None),
                };
                let life = frame.life();
                let mut entry = Entry::new(frame, self.vma.access);
                (entry.young, entry.dirty) = (was.young, true);
                entries.install(page.address, entry);
                came_out.extend(old);
                self.space.pool.lru.add(life, self.vma.owner_of(page.address), List::Active);
            }
        }
        self.space.changed.notify_waiters();
        // The pins first, so that the last references are those that go with the proof.
        drop(pages);
        self.space.pool.free(came_out, proof);
    }
}

/// The page of an entry, for us alone, if nothing else holds it; `Some(None)` where there is none.
#[expect(clippy::option_option, reason = "no page, and no leave to take it, are two things")]
fn isolate(space: &AddressSpace, slot: &Slot) -> Option<Option<Isolated>> {
    match slot {
        Slot::Absent => Some(None),
        Slot::Present(entry) if entry.stage == Stage::Settled => {
            let page = space.pool.lru.isolate(entry.frame.life())?;
            let alone = space.frames.references(page.pin()) == page.own_references() + 1;
            alone.then_some(Some(page))
        }
        Slot::Present(_) | Slot::Moving(_) | Slot::Swapped(_) => None,
    }
}

/// Takes a moving entry out. Nothing else is there: whoever zaps or moves entries waits for our claim.
fn take_moving(entries: &mut Entries, address: u64) -> Option<Entry> {
    match entries.replace(address, Slot::Absent) {
        Slot::Moving(entry) => Some(entry),
        other => {
            debug_assert!(false, "the claim keeps others from a page that is moving");
            entries.replace(address, other);
            None
        }
    }
}

impl Drop for TakenOut<'_> {
    fn drop(&mut self) {
        let pages = std::mem::take(&mut self.pages);
        if pages.is_empty() {
            return;
        }
        {
            let mut entries = self.table.lock();
            for (page, frame) in pages.iter().zip(&mut self.run.frames) {
                let Some(entry) = take_moving(&mut entries, page.address) else { continue };
                match page.old {
                    Some(_) => drop(entries.install(page.address, entry)),
                    None => *frame = Some(entry.frame),
                }
            }
        }
        self.space.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use shootdown_core::Access;

    use super::super::fault::{By, Touch};
    use super::super::frame::FrameStore;
    use super::super::page_table::Tables;
    use super::super::vma::Vmas;
    use super::*;

    #[test]
    fn entries_that_were_taken_out_come_back_as_they_were_and_the_run_is_free_again() {
        let pool = Pool::new(FrameStore::new(16).unwrap(), None, 16);
        let space =
            AddressSpace::new(AddressSpaceId::FIRST, Arc::clone(&pool), Vmas::new(1), Tables::default());
        let range = AddrRange::new(0, 4 << 12).unwrap();
        space.layout.write().vmas.map(range, Access::Write).unwrap();
        let mut frames = Vec::new();
        for page in [2, 0] {
            let Touch::Done(_, frame) = space.touch(page << 12, By::Cpu, Access::Write, Ok).unwrap() else {
                panic!("it is absent")
            };
            frames.push(frame);
        }
        let taken = TakenOut::take(&space, range, Run::take(&pool, 4).unwrap()).unwrap().unwrap();
        let touched =
            |page: u64| matches!(space.touch(page << 12, By::Cpu, Access::Read, Ok), Ok(Touch::Done(..)));
        assert!((0..4).all(|page| !touched(page)), "the absent ones too are out of reach");
        assert_eq!(pool.frames.in_use(), 6);
        drop(taken);
        assert_eq!(pool.frames.in_use(), 2);
        let table = space.tables.get(0).unwrap();
        let entries = table.lock();
        let there =
            |page: u64| entries.get(page << 12).map(|entry| (entry.frame.number(), entry.young, entry.dirty));
        let kept = |frame: &FrameNumber| Some((*frame, true, true));
        assert_eq!([0, 1, 2, 3].map(there), [kept(&frames[1]), None, kept(&frames[0]), None]);
        assert!(matches!(entries.slot(1 << 12), Slot::Absent));
        let life = entries.get(0).unwrap().frame.life();
        assert!(pool.lru.isolate(life).is_some(), "it is on its list again");
    }

    #[test]
    fn a_huge_page_is_a_power_of_two_that_one_table_has_room_for() {
        let frames = |huge_page_pages: usize| {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let now: super::super::Clock = Arc::new(|| shootdown_core::Moment::from_nanos(0));
            let config = MemoryConfig { huge_page_pages, ..MemoryConfig::new(now, runtime.handle().clone()) };
            config.pages_of_a_huge_page()
        };
        assert_eq!([0, 1, 7, 8, 512, 513, usize::MAX].map(frames), [1, 1, 4, 8, 512, 512, 512]);
    }
}
