//! What takes pages from devices and leaves their content: reclaim, migration, aging, protection, collapse,
//! merging.
//!
//! No floor of a frame rises by it. A device's copy must be of what is there now, where every page was taken;
//! and what devices wrote before must be there after it.

use std::ops::Range;
use std::time::Duration;

use shootdown_client::Access;
use shootdown_server::source::memory::{Collapsed, MemoryError};

use super::cells::Content;
use super::recorder::Used;
use super::space::{Marked, Space};
use super::world::WorkloadError;
use crate::check::verdict::Found;
use crate::path::Path;

/// How many pages are looked at where an operation does not say which: each is a round.
const LOOKED_AT: usize = 8;

/// How many pages of each address space are looked at for equal ones: no round is needed to look.
const COMPARED: usize = 32;

/// How long pages cannot be written: devices must have the time to try.
const PROTECTED: Duration = Duration::from_millis(1);

/// Who used the pages that are to become a huge one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum User {
    /// The CPU stored to them just now.
    Cpu,
    /// Devices alone, if they did since they were last asked: theirs is the bit that decides.
    Devices,
    /// They are new: most often nobody.
    Nobody,
}

/// Whether an operation took every page that it was asked to take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Took {
    All,
    Some,
}

impl Took {
    const fn of(kept: usize) -> Self {
        if kept == 0 { Self::All } else { Self::Some }
    }
}

impl Space {
    /// Reclaim of `pages`, of anonymous memory or of the file.
    pub(super) async fn page_out(&self, pages: Range<usize>) -> Result<(), WorkloadError> {
        let pages = self.mapped_part(pages);
        if pages.is_empty() {
            return Ok(());
        }
        let (marked, range) = (self.marked(pages.clone())?, self.range_of(pages.clone())?);
        let done = self.world.source.page_out(self.id, range).await;
        let Some(done) = self.unless_short(done, Path::Swapout)? else { return Ok(()) };
        self.on_kept(pages, Path::Swapout, Took::of(done.kept), &marked).await
    }

    /// mlock.
    pub(super) fn lock(&self, pages: Range<usize>) -> Result<(), WorkloadError> {
        self.world.source.lock(self.id, self.range_of(pages)?).map_err(self.failed(Path::Swapout))
    }

    /// munlock.
    pub(super) fn unlock(&self, pages: Range<usize>) -> Result<(), WorkloadError> {
        self.world.source.unlock(self.id, self.range_of(pages)?).map_err(self.failed(Path::Swapout))
    }

    /// Reclaim of pages that nobody uses, whose ever they are.
    pub(super) async fn reclaim(&self) -> Result<(), WorkloadError> {
        let done = self.world.source.reclaim(LOOKED_AT).await;
        if self.unless_short(done, Path::Swapout)?.is_some() {
            self.world.ledger.on_operation(Path::Swapout);
        }
        Ok(())
    }

    pub(super) async fn migrate(&self, pages: Range<usize>) -> Result<(), WorkloadError> {
        let (marked, range) = (self.marked(pages.clone())?, self.range_of(pages.clone())?);
        let done = self.world.source.migrate(self.id, range).await;
        let Some(done) = self.unless_short(done, Path::Migrate)? else { return Ok(()) };
        self.on_kept(pages, Path::Migrate, Took::of(done.stayed), &marked).await
    }

    pub(super) async fn age(&self) -> Result<(), WorkloadError> {
        let aged = self.world.source.age(LOOKED_AT).await;
        if self.unless_short(aged, Path::Aging)?.is_some() {
            self.world.ledger.on_operation(Path::Aging);
        }
        Ok(())
    }

    /// Clears the entries around a page of the file that nobody uses. Who used them last is forgotten first.
    pub(super) async fn unmap_cluster(&self, page: usize) -> Result<(), WorkloadError> {
        let (world, address) = (&self.world, self.world.layout.address_of(page));
        for round in 0..2 {
            let marked = self.marked([page])?;
            let done = world.source.unmap_cluster(self.id, address).await;
            let Some(done) = self.unless_short(done, Path::Cluster)? else { return Ok(()) };
            if round == 1 {
                return self.on_kept(page..page + 1, Path::Cluster, Took::of(done.kept), &marked).await;
            }
        }
        Ok(())
    }

    /// mprotect: for a while nobody may write.
    pub(super) async fn protect(&self, pages: Range<usize>) -> Result<(), WorkloadError> {
        let pages = self.mapped_part(pages);
        if pages.is_empty() {
            return Ok(());
        }
        let (world, range) = (&self.world, self.range_of(pages.clone())?);
        let marked = self.marked(pages.clone())?;
        let changed = world.source.protect(self.id, range, Access::Read).await;
        let changed = changed.map_err(self.failed(Path::Mprotect))?;
        let took = if changed == pages.len() { Took::All } else { Took::Some };
        self.on_kept(pages.clone(), Path::Mprotect, took, &[]).await?;
        // An entry that was not changed did not allow writes, so nothing was written since it was.
        self.check_marked(&marked, Path::Mprotect).await?;
        let mut before = Vec::new();
        for page in self.scratch_of(&pages) {
            before.push((page, self.load(page, Path::Mprotect).await?));
        }
        tokio::time::sleep(PROTECTED).await;
        for (page, was) in before {
            if self.load(page, Path::Mprotect).await? != was {
                world.on_stale(self.at(page), 0, Found::WrittenWithoutLeave);
            }
        }
        let restored = world.source.protect(self.id, range, Access::Write).await;
        restored.map_err(self.failed(Path::Mprotect)).map(drop)
    }

    /// khugepaged, at one place: the pages are present and shared with nobody, or they would not be fit for it.
    /// Whether they are worth it depends on `user`.
    pub(super) async fn collapse(&self, pages: Range<usize>, user: User) -> Result<(), WorkloadError> {
        if self.mapped_part(pages.clone()) != pages {
            return Ok(());
        }
        let (world, range) = (&self.world, self.range_of(pages.clone())?);
        if user == User::Nobody {
            self.unmap(pages.clone()).await?;
            self.fill_holes(pages.clone()).await?;
        }
        for page in pages.clone() {
            self.write(page).await?;
        }
        if user != User::Cpu {
            // The CPU has not used the new frames. What devices used of the old ones they have told with their acks.
            let moved = world.source.migrate(self.id, range).await;
            if self.unless_short(moved, Path::Collapse)?.is_none() {
                return Ok(());
            }
        }
        let marked = self.marked(pages.clone())?;
        let done = world.source.collapse(self.id, range).await;
        let Some(done) = self.unless_short(done, Path::Collapse)? else { return Ok(()) };
        let may = match world.ledger.take_answer(self.id, range) {
            // Nobody need be asked where the CPU used one, or they were not fit for it.
            None | Some(Used::Yes) => done != Collapsed::NotYoung,
            Some(Used::No) => done == Collapsed::NotYoung,
        };
        world.checks.lock().against_young += u64::from(!may);
        if done == Collapsed::Yes {
            return self.on_kept(pages, Path::Collapse, Took::All, &marked).await;
        }
        world.ledger.on_operation(Path::Collapse);
        Ok(())
    }

    /// Two pages get the same bytes and are merged; then perhaps one of them is stored to, which must not
    /// change the other.
    pub(super) async fn merge(&self, twins: [usize; 2], stored: Option<usize>) -> Result<(), WorkloadError> {
        let world = &self.world;
        let [first, second] = twins;
        if !twins.iter().all(|page| self.is_mapped(*page)) {
            return Ok(());
        }
        // No device keeps a copy of the bytes that it had in common with the other before.
        self.drop_pages(second..second + 1).await?;
        let stamp = self.new_stamp(first);
        self.store(first, stamp).await?;
        self.store(second, stamp).await?;
        let advised = world.source.advise_merge(self.id, self.range_of(first..second + 1)?);
        advised.map_err(self.failed(Path::Ksm))?;
        // A page that changes is not merged: it is looked at twice.
        for _ in 0..2 {
            let merged = world.source.merge(COMPARED * world.plan.address_spaces).await;
            if self.unless_short(merged, Path::Ksm)?.is_none() {
                return Ok(());
            }
        }
        self.on_kept(first..second + 1, Path::Ksm, Took::Some, &[]).await?;
        if let Some(stored) = stored {
            self.stamp(stored).await?;
        }
        self.read(first).await?;
        self.read(second).await
    }

    fn scratch_of(&self, pages: &Range<usize>) -> Vec<usize> {
        pages.clone().filter(|page| self.cell(*page).content == Content::Scratch).collect()
    }

    async fn on_kept(
        &self,
        pages: Range<usize>,
        path: Path,
        took: Took,
        marked: &[Marked],
    ) -> Result<(), WorkloadError> {
        for page in pages {
            match took {
                // A page of the file may be mapped in another address space too, which was not asked.
                Took::All if !self.world.layout.is_file(page) => {
                    let address = self.world.layout.address_of(page);
                    self.cells.on_withdrawn(&self.world, page, address, path)?;
                }
                Took::All | Took::Some => self.cells_of(page).on_touched(&self.world, page, path)?,
            }
            self.world.on_done(self.at(page), path.name(), None, None);
        }
        self.world.ledger.on_operation(path);
        match took {
            Took::All => self.check_marked(marked, path).await,
            Took::Some => Ok(()),
        }
    }

    /// `None`: there was no frame for it, under a limit, and it was not done.
    fn unless_short<T>(&self, done: Result<T, MemoryError>, path: Path) -> Result<Option<T>, WorkloadError> {
        match done {
            Err(error) if self.world.is_shortage(&error) => Ok(None),
            done => done.map(Some).map_err(self.failed(path)),
        }
    }
}
