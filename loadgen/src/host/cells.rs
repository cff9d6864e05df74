//! The pages of a slot, as the workload knows them: what is in each, and its floor.
//!
//! The order of each operation is the checker's: what devices *may* find is widened before the operation
//! begins, what they *must* find is raised after it has returned.

use parking_lot::Mutex;

use super::world::World;
use crate::check::floor::{FloorError, Record, Zeros};
use crate::check::stamp::Stamp;
use crate::path::Path;

/// What is in a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Content {
    /// Not mapped.
    Hole,
    /// Mapped, of the file, and never written since the file ends behind it.
    Zeros,
    /// Stamped: at this address or another, by this address space, or by the parent it was forked from.
    Stamped(Stamp),
    /// Mapped and not stamped: a device's scratch page.
    Scratch,
}

/// A page.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cell {
    pub(super) content: Content,
    pub(super) record: Record,
}

/// The pages of a slot from `first` on. They outlive the address spaces that take the slot in turn. Each page
/// has one task that changes it; the locks are for what only looks.
#[derive(Debug)]
pub(super) struct Cells {
    pub(super) slot: usize,
    first: usize,
    cells: Vec<Mutex<Cell>>,
}

impl Cells {
    pub(super) fn new(slot: usize, first: usize, pages: usize) -> Self {
        let cell = Cell { content: Content::Hole, record: Record::VACANT };
        Self { slot, first, cells: (0..pages).map(|_| Mutex::new(cell)).collect() }
    }

    pub(super) fn pages(&self) -> std::ops::Range<usize> {
        self.first..self.first + self.cells.len()
    }

    pub(super) fn get(&self, page: usize) -> Cell {
        *self.cells[page - self.first].lock()
    }

    pub(super) fn set(&self, page: usize, content: Content) {
        self.cells[page - self.first].lock().content = content;
    }

    /// Changes a record, for devices to see.
    pub(super) fn publish(
        &self,
        world: &World,
        page: usize,
        change: impl FnOnce(&mut Record),
    ) -> Result<(), FloorError> {
        let mut cell = self.cells[page - self.first].lock();
        let (number, zaps) = (cell.record.change + 1, cell.record.zaps);
        change(&mut cell.record);
        cell.record.change = number;
        // A record of somebody new is given whole, and neither number may fall.
        cell.record.zaps = cell.record.zaps.max(zaps);
        world.shared.floors.write(self.slot, page, &cell.record)
    }

    /// The page is about to be dropped.
    pub(super) fn on_zap(&self, world: &World, page: usize) -> Result<(), FloorError> {
        self.publish(world, page, |record| {
            record.zeros = Zeros::Allowed;
            record.copy_zeros = Zeros::Allowed;
            record.zaps += 1;
        })
    }

    /// It was dropped: nothing of before `floor` may be found.
    pub(super) fn on_zapped(
        &self,
        world: &World,
        page: usize,
        floor: u64,
        path: Path,
    ) -> Result<(), FloorError> {
        self.publish(world, page, |record| {
            record.floor = floor;
            record.copy_floor = floor;
            record.also_in_frame = false;
            record.also_in_copies = false;
            record.zaps += 1;
            record.path = path;
        })
    }

    /// Nothing was changed that a device could see.
    pub(super) fn on_touched(&self, world: &World, page: usize, path: Path) -> Result<(), FloorError> {
        self.publish(world, page, |record| record.path = path)
    }

    /// Every device has dropped its copy, and the content has not changed: a copy that is younger is of what
    /// is there now.
    pub(super) fn on_withdrawn(
        &self,
        world: &World,
        page: usize,
        address: u64,
        path: Path,
    ) -> Result<(), FloorError> {
        let content = self.get(page).content;
        let later = world.next_version();
        self.publish(world, page, |record| {
            record.path = path;
            match content {
                Content::Stamped(stamp) => {
                    let own = record.is_own(&stamp, address);
                    record.copy_floor = if own { stamp.version } else { later };
                    record.also_in_copies = !own;
                    record.copy_zeros = Zeros::Forbidden;
                }
                Content::Hole | Content::Zeros | Content::Scratch => {}
            }
        })
    }
}
