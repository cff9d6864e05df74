//! One address space of the workload: how it begins and ends, and what the CPU does to single pages.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use shootdown_client::{Access, AddrRange, AddressSpaceId, RangeError};
use shootdown_server::source::memory::{MemoryError, StoreBranch};

use super::cells::{Cell, Cells, Content};
use super::file::MappedFile;
use super::world::{Where, WorkloadError, World};
use crate::check::floor::{Record, Zeros};
use crate::check::history::PageName;
use crate::check::layout::Use;
use crate::check::lost::{Left, what_is_left};
use crate::check::stamp::{Block, PAGE_BYTES, Stamp, Writer};
use crate::check::verdict::Found;
use crate::control::{FromAgent, say};
use crate::path::Path;

/// An address space that lives in a slot.
#[derive(Debug)]
pub(super) struct Space {
    pub(super) world: Arc<World>,
    pub(super) id: AddressSpaceId,
    pub(super) cells: Cells,
    pub(super) file: Arc<MappedFile>,
}

/// A page with a write by a device that has returned.
#[derive(Debug, Clone, Copy)]
pub(super) struct Marked {
    pub(super) page: usize,
    pub(super) version: u64,
}

impl Space {
    /// A new address space, mapped and stamped; devices are told of it once its floors are right.
    pub(super) async fn create(
        world: &Arc<World>,
        cells: Cells,
        file: &Arc<MappedFile>,
        path: Path,
    ) -> Result<Self, WorkloadError> {
        let id = world.source.create("loadgen").map_err(WorkloadError::Create)?;
        let space = Self { world: Arc::clone(world), id, cells, file: Arc::clone(file) };
        let floor = world.next_version();
        for page in space.cells.pages() {
            space.cells.set(page, Content::Hole);
            space.cells.publish(world, page, |record| {
                *record =
                    Record { address_space: id.get(), floor, copy_floor: floor, path, ..Record::VACANT };
            })?;
        }
        let range = space.range_of(space.file.cells.pages())?;
        let mapped = world.source.map_file(id, range, Access::Write, &space.file.file, 0);
        mapped.map_err(space.failed(Path::Map))?;
        space.announce()?;
        space.fill_holes(space.cells.pages()).await?;
        Ok(space)
    }

    pub(super) fn announce(&self) -> Result<(), WorkloadError> {
        self.world.watch.on_lives(self.id, self.cells.slot);
        let (slot, address_space) = (self.cells.slot, self.id.get());
        say(&FromAgent::Lives { slot, address_space }).map_err(WorkloadError::Parent)
    }

    /// exit: the address space ends, and its slot is free.
    pub(super) async fn exit(self) -> Result<Cells, WorkloadError> {
        for page in self.cells.pages() {
            self.cells.publish(&self.world, page, |record| record.zaps += 1)?;
        }
        let released = self.world.source.exit(self.id).await.map_err(self.failed(Path::Exit))?;
        let floor = self.world.next_version();
        for page in self.cells.pages() {
            self.cells.publish(&self.world, page, |record| {
                let zaps = record.zaps + 1;
                *record = Record { floor, path: Path::Exit, zaps, ..Record::VACANT };
            })?;
            self.world.on_done(self.at(page), "exit", released.rounds.first(), Some(floor));
        }
        for page in self.file.cells.pages() {
            self.file.cells.on_touched(&self.world, page, Path::Exit)?;
        }
        self.world.on_released(Path::Exit, &released);
        self.world.watch.on_ended(self.id);
        let (slot, address_space) = (self.cells.slot, self.id.get());
        say(&FromAgent::Ended { slot, address_space }).map_err(WorkloadError::Parent)?;
        Ok(self.cells)
    }

    /// mmap of every hole of `pages`, and the first stamps.
    pub(super) async fn fill_holes(&self, pages: Range<usize>) -> Result<(), WorkloadError> {
        let is_hole = |page: &usize| self.cells.get(*page).content == Content::Hole;
        while let Some(first) = pages.clone().find(is_hole) {
            // Up to the next thread's: what lies between is mapped by nobody.
            let end = pages.end.min(self.world.layout.part_of(first).end);
            let length = (first..end).take_while(is_hole).count();
            let holes = first..first + length;
            for page in holes.clone() {
                self.cells.publish(&self.world, page, |record| {
                    record.zeros = Zeros::Allowed;
                    record.copy_zeros = Zeros::Allowed;
                })?;
            }
            let range = self.range_of(holes.clone())?;
            self.world.source.map(self.id, range, Access::Write).map_err(self.failed(Path::Map))?;
            for page in holes {
                self.refill(page).await?;
            }
            self.world.ledger.on_operation(Path::Map);
        }
        Ok(())
    }

    /// A load by the CPU of a page that it knows: it must be exactly what was stored.
    pub(super) async fn read(&self, page: usize) -> Result<(), WorkloadError> {
        let (expected, version) = match self.cell(page).content {
            Content::Hole | Content::Scratch => return Ok(()),
            Content::Zeros => (Block::Zeros, self.cell(page).record.floor),
            Content::Stamped(stamp) => (Block::Stamp(stamp), stamp.version),
        };
        let loaded = self.load(page, Path::Read).await?;
        let found = Block::of_page(&loaded);
        self.world.checks.lock().loads += 1;
        if found != [expected] {
            let found = found.first().copied().unwrap_or(Block::Mangled);
            self.world.on_stale(self.at(page), version, self.what_it_is(page, found));
        }
        self.world.ledger.on_operation(Path::Read);
        Ok(())
    }

    /// A store by the CPU: the whole page at once. What branch it takes is the page's affair. Zeros of the
    /// file are left to [`Space::fill_file_hole`].
    pub(super) async fn write(&self, page: usize) -> Result<(), WorkloadError> {
        if let Content::Stamped(_) = self.cell(page).content {
            self.stamp(page).await?;
            self.world.ledger.on_operation(Path::Write);
        }
        Ok(())
    }

    pub(super) async fn refill(&self, page: usize) -> Result<(), WorkloadError> {
        if let Use::Scratch { .. } = self.world.layout.use_of(page) {
            self.cells_of(page).set(page, Content::Scratch);
            return Ok(());
        }
        self.stamp(page).await
    }

    /// Stores a stamp of its own in a page.
    pub(super) async fn stamp(&self, page: usize) -> Result<(), WorkloadError> {
        let stamp = self.new_stamp(page);
        self.store(page, stamp).await
    }

    pub(super) fn new_stamp(&self, page: usize) -> Stamp {
        let layout = &self.world.layout;
        Stamp {
            writer: Writer::Cpu,
            address_space: layout.owner(self.cells.slot, page, self.id.get()),
            address: layout.address_of(page),
            version: self.world.next_version(),
        }
    }

    /// Stores a stamp in a page: its own, or that of another place, whose version must be a new one too.
    pub(super) async fn store(&self, page: usize, stamp: Stamp) -> Result<(), WorkloadError> {
        let (world, cells, address) = (&self.world, self.cells_of(page), self.world.layout.address_of(page));
        let own = stamp.address == address;
        if !own {
            cells.publish(world, page, |record| may_also(record, stamp))?;
        }
        let bytes = stamp.to_page();
        let stored = world.patiently(|| world.source.store(self.id, address, &bytes)).await;
        let stored = stored.map_err(self.failed(Path::Write))?;
        let copied = stored.pages.iter().find_map(|page| match &page.branch {
            StoreBranch::Copied(copied) => Some(copied),
            _ => None,
        });
        let before = cells.get(page).content;
        cells.publish(world, page, |record| {
            let was_own = matches!(before, Content::Stamped(before) if record.is_own(&before, address));
            record.floor = stamp.version;
            record.zeros = Zeros::Forbidden;
            record.also_in_frame = !own;
            if copied.is_some() {
                record.path = Path::Cow;
                record.copy_zeros = Zeros::Forbidden;
                // A device may have copied the page between the round and the store: what was there then.
                match before {
                    Content::Stamped(before) if was_own => record.copy_floor = before.version,
                    _ => record.copy_floor = stamp.version,
                }
            }
        })?;
        cells.set(page, Content::Stamped(stamp));
        world.on_done(self.at(page), "store", copied.map(|copied| &copied.round), Some(stamp.version));
        if let Some(copied) = copied {
            world.ledger.on_operation(Path::Cow);
            if let Some(took) = copied.release {
                world.ledger.on_release([&copied.round], took);
            }
        }
        Ok(())
    }

    pub(super) async fn load(&self, page: usize, path: Path) -> Result<Bytes, WorkloadError> {
        let address = self.world.layout.address_of(page);
        let loaded = self.world.patiently(|| self.world.source.load(self.id, address, PAGE_BYTES)).await;
        loaded.map_err(self.failed(path))
    }

    /// The scratch pages of `pages` with what devices have written to them: before an operation begins.
    pub(super) fn marked(
        &self,
        pages: impl IntoIterator<Item = usize>,
    ) -> Result<Vec<Marked>, WorkloadError> {
        let mut marked = Vec::new();
        for page in pages {
            let Content::Scratch = self.cell(page).content else { continue };
            let slot = self.world.layout.record_slot(self.cells.slot, page);
            let mark = self.world.shared.marks.read(slot, page)?;
            let (own, zaps) = (mark.address_space == self.id.get(), mark.zaps);
            if own && self.cell(page).record.keeps_since(zaps) {
                marked.push(Marked { page, version: mark.version });
            }
        }
        Ok(marked)
    }

    /// After an operation that took devices' leave to write away: what they had written is there.
    pub(super) async fn check_marked(&self, marked: &[Marked], path: Path) -> Result<(), WorkloadError> {
        for Marked { page, version } in marked {
            let loaded = self.load(*page, path).await?;
            self.check_left(*page, *version, &loaded, path);
        }
        Ok(())
    }

    pub(super) fn check_left(&self, page: usize, version: u64, bytes: &[u8], path: Path) {
        self.world.checks.lock().loads += 1;
        if let Left::Lost(found) = what_is_left(bytes, version) {
            self.world.on_lost(Where { path, ..self.at(page) }, version, found);
        }
    }

    pub(super) fn cells_of(&self, page: usize) -> &Cells {
        if self.world.layout.is_file(page) { &self.file.cells } else { &self.cells }
    }

    pub(super) fn cell(&self, page: usize) -> Cell {
        self.cells_of(page).get(page)
    }

    pub(super) fn is_mapped(&self, page: usize) -> bool {
        self.cell(page).content != Content::Hole
    }

    pub(super) fn is_stamped(&self, page: usize) -> bool {
        matches!(self.cell(page).content, Content::Stamped(_))
    }

    pub(super) fn range_of(&self, pages: Range<usize>) -> Result<AddrRange, WorkloadError> {
        let (start, end) = (pages.start as u64, pages.end as u64);
        Ok(self.world.layout.range_of(pages).ok_or(RangeError::Empty { start, end })?)
    }

    pub(super) fn at(&self, page: usize) -> Where {
        let slot = self.world.layout.record_slot(self.cells.slot, page);
        Where {
            address_space: self.id,
            address: self.world.layout.address_of(page),
            name: PageName { slot, page },
            path: self.cell(page).record.path,
        }
    }

    pub(super) fn failed(&self, path: Path) -> impl Fn(MemoryError) -> WorkloadError + use<> {
        let address_space = self.id.get();
        move |error| WorkloadError::Operation { path, address_space, error }
    }

    pub(super) fn what_it_is(&self, page: usize, block: Block) -> Found {
        let layout = &self.world.layout;
        let owner = layout.owner(self.cells.slot, page, self.id.get());
        match block {
            Block::Stamp(stamp)
                if stamp.address == layout.address_of(page) && stamp.address_space == owner =>
            {
                Found::Older { version: stamp.version }
            }
            Block::Stamp(stamp) => {
                Found::Elsewhere { address_space: stamp.address_space, address: stamp.address }
            }
            Block::Zeros => Found::Zeros,
            Block::Poison => Found::Freed,
            Block::Mangled => Found::Mangled,
        }
    }
}

/// The page is about to bear a stamp of another place.
pub(super) fn may_also(record: &mut Record, stamp: Stamp) {
    record.also_at = stamp.address;
    record.also_version = stamp.version;
    record.also_in_frame = true;
    record.also_in_copies = true;
}
