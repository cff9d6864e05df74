//! One task of the workload: a thread of the host that works on an address space and its child. What it does
//! is drawn from its seed and from nothing else, so that a run can be repeated.
//!
//! Threads of one slot work at the same time, each on pages of its own; what concerns all pages, a fork, a
//! snapshot, a truncation or an exit, one does alone.

use std::ops::Range;
use std::sync::Arc;

use rand::rngs::SmallRng;
use rand::seq::SliceRandom as _;
use rand::{RngExt as _, SeedableRng as _};
use tokio::sync::RwLock;

use super::cells::Content;
use super::family::Family;
use super::keep::User;
use super::space::Space;
use super::world::{WorkloadError, World};
use crate::check::layout::{HUGE_PAGES, Use};
use crate::path::Path;

/// The most pages of one operation on a range.
const MOST_PAGES: usize = 8;

/// A thread that works on an address space and its child.
#[derive(Debug)]
pub(super) struct Slot {
    world: Arc<World>,
    family: Arc<RwLock<Family>>,
    thread: usize,
    random: SmallRng,
    /// Paths that were not taken yet: each is, once, before chance decides.
    first: Vec<Path>,
}

/// What a step could not do beside others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Alone {
    Fork,
    Snapshot,
    Truncate,
    Exit,
}

/// How often a path is taken, in relation to the others.
const fn weight(path: Path) -> u32 {
    match path {
        Path::Read | Path::Write | Path::Cow => 60,
        Path::Dontneed | Path::Placeholder | Path::Swapout | Path::Migrate | Path::Mprotect => 40,
        Path::Map | Path::Munmap | Path::Mremap | Path::Ksm | Path::Collapse | Path::Cluster => 30,
        Path::Aging | Path::Writeback => 20,
        Path::Fork | Path::Snapshot | Path::Truncate => 10,
        Path::Exit => 5,
    }
}

impl Slot {
    /// The threads of one address space.
    pub(super) async fn create(world: &Arc<World>, index: usize) -> Result<Vec<Self>, WorkloadError> {
        let family = Arc::new(RwLock::new(Family::create(world, index).await?));
        let slot = |thread: usize| {
            let number = (thread as u64) << 32 | index as u64;
            let seed = world.plan.seed.wrapping_add(number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let (world, family) = (Arc::clone(world), Arc::clone(&family));
            let mut random = SmallRng::seed_from_u64(seed);
            let mut first = world.plan.paths.clone();
            first.shuffle(&mut random);
            Self { world, family, thread, random, first }
        };
        Ok((0..world.plan.threads).map(slot).collect())
    }

    /// One operation.
    pub(super) async fn step(&mut self) -> Result<(), WorkloadError> {
        let path = self.choose();
        let family = Arc::clone(&self.family);
        let alone = {
            let family = family.read().await;
            Box::pin(self.beside_others(&family, path)).await?
        };
        let Some(alone) = alone else { return Ok(()) };
        let mut family = family.write().await;
        match alone {
            Alone::Fork => family.fork().await,
            Alone::Snapshot => family.snapshot().await,
            Alone::Truncate => {
                let pages = family.file.cells.pages();
                let first = self.random.random_range(pages);
                family.parent().truncate(first).await
            }
            Alone::Exit => family.exit().await,
        }
    }

    /// What one thread may do while others are at work; else what it has to do alone.
    async fn beside_others(&mut self, family: &Family, path: Path) -> Result<Option<Alone>, WorkloadError> {
        let space = self.target(family);
        let (own, file) =
            (self.world.layout.of_thread(self.thread), self.world.layout.file_of_thread(self.thread));
        match path {
            Path::Fork => return Ok(Some(Alone::Fork)),
            Path::Snapshot => return Ok(Some(Alone::Snapshot)),
            Path::Truncate => return Ok(Some(Alone::Truncate)),
            Path::Exit => return Ok(Some(Alone::Exit)),
            Path::Cow => return Box::pin(self.copy_on_write(family)).await,
            Path::Placeholder => match family.file.hole_of_thread(&self.world, self.thread) {
                Some(page) => space.fill_file_hole(page).await?,
                None => return Ok(Some(Alone::Truncate)),
            },
            Path::Map => space.fill_holes(own).await?,
            Path::Read => {
                let page = self.any_page(&own, &file);
                space.read(page).await?;
                family.look(&mut self.random)?;
            }
            Path::Write => {
                let page = self.any_page(&own, &file);
                family.unshare([page]);
                space.write(page).await?;
            }
            Path::Munmap if has_holes(space, &own) => space.fill_holes(own).await?,
            Path::Munmap => {
                // Now and then all of them, so that their page table goes too.
                let pages = if self.random.random_bool(0.2) { own } else { self.some_of(own) };
                family.unshare(pages.clone());
                space.unmap(pages).await?;
            }
            Path::Dontneed if self.random.random_bool(0.25) => {
                let pages = self.some_of(file);
                space.dont_need_file(pages).await?;
            }
            Path::Dontneed => {
                let pages = self.some_of(own);
                family.unshare(pages.clone());
                space.dont_need(pages).await?;
            }
            Path::Mremap if has_holes(space, &own) => space.fill_holes(own).await?,
            Path::Mremap => self.remap(family, space).await?,
            Path::Aging => space.age().await?,
            Path::Writeback => family.parent().write_back(self.thread).await?,
            Path::Swapout => match self.random.random_range(0..12) {
                0..6 => space.page_out(self.some_of(own)).await?,
                6..8 => self.page_out_locked(family, own).await?,
                8..10 => space.page_out(self.some_of(file)).await?,
                _ => space.reclaim().await?,
            },
            Path::Migrate => space.migrate(self.some_of(own)).await?,
            Path::Cluster => {
                let page = self.random.random_range(file);
                space.unmap_cluster(page).await?;
                // What no entry shows any more can be dropped without another round.
                if self.random.random_bool(0.5) {
                    space.reclaim().await?;
                }
            }
            Path::Mprotect => {
                let pages = self.some_of(own);
                space.protect(pages).await?;
            }
            Path::Collapse => {
                let stamped = self.world.layout.stamped_of_thread(self.thread);
                let places = stamped.len() / HUGE_PAGES;
                let first = stamped.start + self.random.random_range(0..places) * HUGE_PAGES;
                let user = [User::Cpu, User::Devices, User::Nobody][self.random.random_range(0..3)];
                let pages = first..first + HUGE_PAGES;
                family.unshare(pages.clone());
                space.collapse(pages, user).await?;
            }
            Path::Ksm => {
                let twins = self.world.layout.twins_of_thread(self.thread);
                family.unshare(twins);
                let stored = [Some(twins[0]), Some(twins[1]), None][self.random.random_range(0..3)];
                space.merge(twins, stored).await?;
            }
        }
        Ok(None)
    }

    fn choose(&mut self) -> Path {
        if let Some(path) = self.first.pop() {
            return path;
        }
        let paths = &self.world.plan.paths;
        let mut left = self.random.random_range(0..paths.iter().copied().map(weight).sum::<u32>().max(1));
        for path in paths {
            if left < weight(*path) {
                return *path;
            }
            left -= weight(*path);
        }
        Path::Read
    }

    /// Parent or child.
    fn target<'a>(&mut self, family: &'a Family) -> &'a Space {
        match family.child() {
            Some(child) if self.random.random_bool(0.4) => child,
            _ => family.parent(),
        }
    }

    /// Any page of this thread.
    fn any_page(&mut self, own: &Range<usize>, file: &Range<usize>) -> usize {
        let at = self.random.random_range(0..own.len() + file.len());
        if at < own.len() { own.start + at } else { file.start + at - own.len() }
    }

    /// Some pages in a row.
    fn some_of(&mut self, pages: Range<usize>) -> Range<usize> {
        let first = self.random.random_range(pages.clone());
        let most = self.random.random_range(1..=MOST_PAGES);
        first..(first + most).min(pages.end)
    }

    /// A page that parent and child share is locked in memory by the child: it stays, whoever wants it to go.
    async fn page_out_locked(&mut self, family: &Family, own: Range<usize>) -> Result<(), WorkloadError> {
        let shared = family.shared(own.clone());
        match family.child() {
            Some(child) if !shared.is_empty() => {
                let page = shared[self.random.random_range(0..shared.len())];
                child.lock(page..page + 1)?;
                family.parent().page_out(page..page + 1).await?;
                child.unlock(page..page + 1)
            }
            _ => family.parent().page_out(self.some_of(own)).await,
        }
    }

    /// Stamped pages go to another place, which the pages of that place leave.
    async fn remap(&mut self, family: &Family, space: &Space) -> Result<(), WorkloadError> {
        let stamped = self.world.layout.stamped_of_thread(self.thread);
        let length = self.random.random_range(1..=MOST_PAGES.min(stamped.len() / 2));
        let half = stamped.start + stamped.len() / 2;
        let low = self.random.random_range(stamped.start..=half - length);
        let high = self.random.random_range(half..=stamped.end - length);
        let (low, high) = (low..low + length, high..high + length);
        let (old, new) = if self.random.random_bool(0.5) { (low, high) } else { (high, low) };
        if old.clone().all(|page| space.is_stamped(page)) {
            family.unshare(old.clone().chain(new.clone()));
            space.remap(old, new).await?;
        }
        Ok(())
    }

    /// A shared page is stored to on both sides: who is first copies it, who is second uses it again.
    async fn copy_on_write(&mut self, family: &Family) -> Result<Option<Alone>, WorkloadError> {
        let own = self.world.layout.of_thread(self.thread);
        let stamped =
            own.clone().filter(|page| !matches!(self.world.layout.use_of(*page), Use::Scratch { .. }));
        let candidates = family.shared(own);
        let (Some(child), parent) = (family.child(), family.parent()) else { return Ok(Some(Alone::Fork)) };
        if candidates.len() * 4 < stamped.count() {
            return Ok(Some(Alone::Fork));
        }
        let page = candidates[self.random.random_range(0..candidates.len())];
        family.unshare([page]);
        match self.random.random_range(0..3) {
            0 => {
                parent.write(page).await?;
                child.write(page).await?;
            }
            1 => {
                child.write(page).await?;
                parent.write(page).await?;
            }
            // Both at once: both may copy, and neither may free what the other still uses.
            _ => tokio::try_join!(parent.write(page), child.write(page)).map(|_| ())?,
        }
        Ok(None)
    }
}

fn has_holes(space: &Space, pages: &Range<usize>) -> bool {
    pages.clone().any(|page| space.cell(page).content == Content::Hole)
}
