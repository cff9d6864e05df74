//! One task of the workload: an address space, and the children that it forks. What it does is drawn from
//! its seed and from nothing else, so that a run can be repeated.

use std::sync::Arc;

use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};

use super::space::{Place, Space, WorkloadError, World};
use crate::path::Path;

/// The most pages of one munmap or MADV_DONTNEED.
const MOST_PAGES: usize = 8;

/// An address space that is used, and perhaps its child.
#[derive(Debug)]
pub(super) struct Slot {
    world: Arc<World>,
    random: SmallRng,
    parent: Option<Space>,
    child: Result<Space, Option<Place>>,
    /// Pages that parent and child still share.
    shared: Vec<bool>,
}

/// How often a path is taken, in relation to the others.
const fn weight(path: Path) -> u32 {
    match path {
        Path::Read | Path::Write | Path::Cow => 60,
        Path::Dontneed => 40,
        Path::Map | Path::Munmap => 30,
        Path::Fork => 10,
        Path::Exit => 5,
    }
}

impl Slot {
    pub(super) async fn create(world: &Arc<World>, index: usize) -> Result<Self, WorkloadError> {
        let pages = world.pages();
        let random = SmallRng::seed_from_u64(world.plan.seed.wrapping_add(index as u64));
        let parent = Space::create(world, Place::new(index, pages), Path::Map).await?;
        let spare = Place::new(world.plan.address_spaces + index, pages);
        let shared = vec![false; pages];
        Ok(Self { world: Arc::clone(world), random, parent: Some(parent), child: Err(Some(spare)), shared })
    }

    /// One operation.
    pub(super) async fn step(&mut self) -> Result<(), WorkloadError> {
        match self.choose() {
            Path::Map => self.target().fill_holes().await,
            Path::Read => {
                let page = self.stamped_page();
                self.target().read(page).await
            }
            Path::Write => {
                let page = self.stamped_page();
                self.shared[page] = false;
                self.target().write(page).await
            }
            Path::Fork => self.fork().await,
            Path::Cow => self.copy_on_write().await,
            Path::Munmap => {
                let (first, most) = self.pages();
                let target = self.target();
                if target.has_holes() { target.fill_holes().await } else { target.unmap(first, most).await }
            }
            Path::Dontneed => {
                let (first, most) = self.pages();
                self.target().dont_need(first, most).await
            }
            Path::Exit => self.exit().await,
        }
    }

    fn choose(&mut self) -> Path {
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
    fn target(&mut self) -> &mut Space {
        let parent = self.parent.as_mut().expect("a slot has an address space between two steps");
        match &mut self.child {
            Ok(child) if self.random.random_bool(0.4) => child,
            _ => parent,
        }
    }

    fn stamped_page(&mut self) -> usize {
        self.random.random_range(0..self.world.plan.pages)
    }

    /// Where a range begins, and how many pages it has at most. What is dropped is not shared any more.
    fn pages(&mut self) -> (usize, usize) {
        let first = self.random.random_range(0..self.world.pages());
        let most = self.random.random_range(1..=MOST_PAGES);
        let end = (first + most).min(self.shared.len());
        self.shared[first..end].fill(false);
        (first, most)
    }

    /// A new child; the one before ends.
    async fn fork(&mut self) -> Result<(), WorkloadError> {
        let place = match std::mem::replace(&mut self.child, Err(None)) {
            Ok(child) => child.exit().await?,
            Err(place) => place.expect("the place of the child is there while there is no child"),
        };
        let parent = self.parent.as_mut().expect("a slot has an address space between two steps");
        let child = parent.fork(place).await?;
        for (page, shared) in self.shared.iter_mut().enumerate() {
            *shared = child.is_stamped(page);
        }
        self.child = Ok(child);
        Ok(())
    }

    /// A shared page is stored to on both sides: who is first copies it, who is second uses it again.
    async fn copy_on_write(&mut self) -> Result<(), WorkloadError> {
        let still_shared = self.shared.iter().filter(|shared| **shared).count();
        if self.child.is_err() || still_shared * 4 < self.shared.len() {
            self.fork().await?;
        }
        let candidates: Vec<usize> = (0..self.shared.len()).filter(|page| self.shared[*page]).collect();
        if candidates.is_empty() {
            return Ok(());
        }
        let page = candidates[self.random.random_range(0..candidates.len())];
        self.shared[page] = false;
        let parent = self.parent.as_mut().expect("a slot has an address space between two steps");
        let Ok(child) = &mut self.child else { return Ok(()) };
        match self.random.random_range(0..3) {
            0 => {
                parent.write(page).await?;
                child.write(page).await
            }
            1 => {
                child.write(page).await?;
                parent.write(page).await
            }
            // Both at once: both may copy, and neither may free what the other still uses.
            _ => tokio::try_join!(parent.write(page), child.write(page)).map(|_| ()),
        }
    }

    /// The address space ends and another takes its place. Its child lives on.
    async fn exit(&mut self) -> Result<(), WorkloadError> {
        let parent = self.parent.take().expect("a slot has an address space between two steps");
        let place = parent.exit().await?;
        self.parent = Some(Space::create(&self.world, place, Path::Exit).await?);
        self.shared.fill(false);
        Ok(())
    }
}
