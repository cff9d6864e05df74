//! The file that a parent and its children map, and what is done to it: write-back, truncation, and the first
//! store to a hole.

use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::Duration;

use shootdown_server::source::memory::{MemoryError, MemoryFile};

use super::cells::{Cells, Content};
use super::space::{Marked, Space};
use super::world::{WorkloadError, World};
use crate::check::floor::{Record, Zeros};
use crate::check::layout::Use;
use crate::check::lost::{Left, what_is_left};
use crate::check::stamp::{Block, PAGE_BYTES};
use crate::check::verdict::Found;
use crate::path::Path;

/// A file in the run's directory. It outlives the address spaces that map it.
#[derive(Debug)]
pub(super) struct MappedFile {
    pub(super) file: MemoryFile,
    /// The same file, as any other program reads it.
    disk: File,
    pub(super) cells: Cells,
    /// Held by who writes it back.
    writing: tokio::sync::Mutex<()>,
}

/// A page that is not on disk as it should be.
#[derive(Debug, Clone, Copy)]
enum Missing {
    /// What a device wrote.
    Write { page: usize, version: u64, found: Option<u64> },
    /// What the CPU stored.
    Store { page: usize, version: u64, found: Block },
}

/// How often a file is written back until it must be on disk.
const MOST_WRITE_BACKS: usize = 10;

/// Between two of them.
const BETWEEN_WRITE_BACKS: Duration = Duration::from_millis(5);

impl MappedFile {
    /// A file of holes, whose pages nobody maps yet.
    pub(super) fn create(world: &Arc<World>, slot: usize) -> Result<Self, WorkloadError> {
        let (layout, slot) = (&world.layout, world.layout.file_slot(slot));
        let path = world.plan.directory.join(format!("file-{slot}"));
        let disk = OpenOptions::new().read(true).write(true).create_new(true).open(path);
        let disk = disk.map_err(WorkloadError::File)?;
        disk.set_len(layout.file_bytes()).map_err(WorkloadError::File)?;
        let handle = disk.try_clone().map_err(WorkloadError::File)?;
        let file = world.source.open_file(handle, layout.file_bytes()).map_err(WorkloadError::Create)?;
        let first = layout.anonymous();
        let cells = Cells::new(slot, first, layout.pages() - first);
        let floor = world.next_version();
        for page in cells.pages() {
            cells.publish(world, page, |record| {
                *record = Record {
                    address_space: layout.owner(slot, page, 0),
                    floor,
                    copy_floor: floor,
                    zeros: Zeros::Allowed,
                    copy_zeros: Zeros::Allowed,
                    ..Record::VACANT
                };
            })?;
            cells.set(page, unwritten(world, page));
        }
        Ok(Self { file, disk, cells, writing: tokio::sync::Mutex::default() })
    }

    /// A page that is in no file yet, and that the CPU stamps.
    pub(super) fn hole_of_thread(&self, world: &World, thread: usize) -> Option<usize> {
        world.layout.file_of_thread(thread).find(|page| self.cells.get(*page).content == Content::Zeros)
    }
}

fn unwritten(world: &World, page: usize) -> Content {
    match world.layout.use_of(page) {
        Use::Scratch { .. } => Content::Scratch,
        Use::Stamped | Use::Twin => Content::Zeros,
    }
}

impl Space {
    /// The first store to a hole of the file: what was read there was a placeholder.
    pub(super) async fn fill_file_hole(&self, page: usize) -> Result<(), WorkloadError> {
        // So that there is a placeholder to replace.
        self.read(page).await?;
        self.stamp(page).await?;
        self.file.cells.on_touched(&self.world, page, Path::Placeholder)?;
        self.world.ledger.on_operation(Path::Placeholder);
        Ok(())
    }

    /// msync. What was written before is in the file then, by whom ever.
    pub(super) async fn write_back(&self, thread: usize) -> Result<(), WorkloadError> {
        let (world, pages) = (&self.world, self.world.layout.file_of_thread(thread));
        // One at a time: a page that another is writing is clean already, and not in the file yet.
        let _alone = self.file.writing.lock().await;
        let marked = self.marked(pages.clone())?;
        for attempt in 1..=MOST_WRITE_BACKS {
            let written = match world.source.write_back(&self.file.file).await {
                Err(error) if world.is_shortage(&error) => return Ok(()),
                written => written.map_err(self.failed(Path::Writeback))?,
            };
            world.ledger.on_operation(Path::Writeback);
            for page in pages.clone() {
                self.file.cells.on_touched(world, page, Path::Writeback)?;
                world.on_done(self.at(page), "writeback", None, None);
            }
            if written.skipped > 0 {
                return Ok(());
            }
            self.check_marked(&marked, Path::Writeback).await?;
            let missing = self.not_on_disk(pages.clone(), &marked)?;
            if missing.is_empty() || attempt == MOST_WRITE_BACKS {
                missing.into_iter().for_each(|missing| self.on_missing(missing));
                return Ok(());
            }
            // Reclaim may be writing it: it is in the file soon, or never.
            tokio::time::sleep(BETWEEN_WRITE_BACKS).await;
        }
        Ok(())
    }

    /// The pages that are older on disk than they were when the write-back began.
    fn not_on_disk(&self, pages: Range<usize>, marked: &[Marked]) -> Result<Vec<Missing>, WorkloadError> {
        let mut missing = Vec::new();
        for Marked { page, version } in marked {
            if let Left::Lost(found) = what_is_left(&self.on_disk(*page)?, *version) {
                missing.push(Missing::Write { page: *page, version: *version, found });
            }
        }
        for page in pages {
            let Content::Stamped(stamp) = self.cell(page).content else { continue };
            let found = Block::of_page(&self.on_disk(page)?);
            if found != [Block::Stamp(stamp)] {
                let found = found.first().copied().unwrap_or(Block::Mangled);
                missing.push(Missing::Store { page, version: stamp.version, found });
            }
        }
        Ok(missing)
    }

    fn on_missing(&self, missing: Missing) {
        match missing {
            Missing::Write { page, version, found } => self.world.on_lost(self.at(page), version, found),
            Missing::Store { page, version, found } => {
                self.world.on_stale(self.at(page), version, self.what_it_is(page, found));
            }
        }
    }

    fn on_disk(&self, page: usize) -> Result<Vec<u8>, WorkloadError> {
        let mut bytes = vec![0; PAGE_BYTES];
        let read = self.file.disk.read_exact_at(&mut bytes, self.world.layout.offset_in_file(page));
        read.map_err(WorkloadError::File).map(|()| bytes)
    }

    /// The file is cut at `first`, and grows again: its end is holes then. With nobody else at work on it.
    pub(super) async fn truncate(&self, first: usize) -> Result<(), WorkloadError> {
        let (world, cells) = (&self.world, &self.file.cells);
        let gone = first..cells.pages().end;
        for page in gone.clone() {
            cells.on_zap(world, page)?;
        }
        let cut = world.source.truncate(&self.file.file, world.layout.offset_in_file(first)).await;
        let released = cut.map_err(self.failed(Path::Truncate))?;
        let floor = world.next_version();
        for page in gone.clone() {
            cells.on_zapped(world, page, floor, Path::Truncate)?;
            cells.set(page, unwritten(world, page));
            world.on_done(self.at(page), "truncate", released.rounds.first(), Some(floor));
        }
        world.on_released(Path::Truncate, &released);
        // Nothing is behind the end, whoever asks.
        match world.source.load(self.id, world.layout.address_of(first), PAGE_BYTES).await {
            Ok(_) => world.on_stale(self.at(first), floor, Found::BehindTheEnd),
            Err(MemoryError::TaskEnded) => return Err(self.failed(Path::Truncate)(MemoryError::TaskEnded)),
            Err(_) => {}
        }
        let grown = world.source.truncate(&self.file.file, world.layout.file_bytes()).await;
        grown.map_err(self.failed(Path::Truncate))?;
        // Some stay holes where somebody wants holes.
        let keep = if world.plan.paths.contains(&Path::Placeholder) { 2 } else { usize::MAX };
        for (index, page) in gone.enumerate() {
            if cells.get(page).content == Content::Zeros && (index + 1) % keep != 0 {
                self.stamp(page).await?;
            }
        }
        Ok(())
    }
}
