//! One address space of the workload, and the floors of its pages.
//!
//! The order of each operation is the checker's: what devices *may* find is widened before the operation
//! begins, what they *must* find is raised after it has returned.

use std::sync::Arc;

use parking_lot::Mutex;
use shootdown_client::{Access, AddrRange, AddressSpaceId, PageSize, RangeError};
use shootdown_server::Host;
use shootdown_server::source::memory::{MemoryError, MemorySource, Released, StoreBranch};

use super::recorder::{Ledger, Recorder};
use crate::check::floor::{FloorError, FloorFile, Record, Zeros};
use crate::check::stamp::{Block, PAGE_BYTES, Stamp, Writer};
use crate::check::verdict::{Found, Origin, StaleRead};
use crate::control::{FromAgent, Plan, say};
use crate::path::Path;

/// How many stale loads are told in full.
const MOST_TOLD: usize = 8;

/// Where the region of every address space begins: the same in all, so that only the address space tells
/// them apart.
pub(crate) const REGION: u64 = 0x10_0000_0000;

/// Why the workload came to an end before it was told to.
#[derive(Debug, thiserror::Error)]
pub enum WorkloadError {
    /// An operation failed that must not.
    #[error("{path} of address space {address_space} failed")]
    Operation {
        /// Which.
        path: Path,
        /// Whose.
        address_space: u64,
        /// Why.
        #[source]
        error: MemoryError,
    },
    /// No address space could be made.
    #[error("no address space could be made")]
    Create(#[source] MemoryError),
    /// The region has no pages.
    #[error("the region of an address space is no range")]
    Region(#[from] RangeError),
    /// A floor could not be written.
    #[error(transparent)]
    Floor(#[from] FloorError),
    /// The parent is gone.
    #[error("the parent does not listen")]
    Parent(#[source] std::io::Error),
    /// A task of the workload was stopped.
    #[error("a task of the workload ended by itself")]
    Task,
}

/// What all address spaces share.
#[derive(Debug)]
pub(super) struct World {
    pub(super) source: MemorySource<Recorder<Host>>,
    pub(super) floors: FloorFile,
    pub(super) ledger: Ledger,
    pub(super) plan: Plan,
    pub(super) checks: Mutex<Checks>,
    /// The last version. One counter for all: a stamp of another address space is never mistaken for a
    /// later one of this.
    pub(super) version: Mutex<u64>,
}

/// What the CPU's own loads found.
#[derive(Debug, Default)]
pub(super) struct Checks {
    pub(super) loads: u64,
    pub(super) stale_reads: u64,
    pub(super) stale: Vec<StaleRead>,
}

impl World {
    fn next_version(&self) -> u64 {
        let mut version = self.version.lock();
        *version += 1;
        *version
    }

    /// Pages of an address space: those that the CPU stamps, and a scratch page for each device.
    pub(super) fn pages(&self) -> usize {
        self.plan.pages + self.plan.devices
    }

    fn is_scratch(&self, page: usize) -> bool {
        page >= self.plan.pages
    }
}

/// The floors of a slot: they outlive the address spaces that take it in turn.
#[derive(Debug)]
pub(super) struct Place {
    slot: usize,
    records: Vec<Record>,
}

impl Place {
    pub(super) fn new(slot: usize, pages: usize) -> Self {
        Self { slot, records: vec![Record::VACANT; pages] }
    }
}

/// An address space that lives in a slot.
#[derive(Debug)]
pub(super) struct Space {
    world: Arc<World>,
    id: AddressSpaceId,
    place: Place,
    pages: Vec<Page>,
}

/// A page, as the workload knows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Page {
    /// Not mapped.
    Hole,
    /// Stamped, by this address space or by the parent it was forked from.
    Stamped { by: u64, version: u64 },
    /// Mapped and not stamped: a device's scratch page.
    Scratch,
}

impl Space {
    /// A new address space, mapped and stamped; devices are told of it once it is mapped.
    pub(super) async fn create(world: &Arc<World>, place: Place, path: Path) -> Result<Self, WorkloadError> {
        let id = world.source.create("loadgen").map_err(WorkloadError::Create)?;
        let pages = vec![Page::Hole; world.pages()];
        let mut space = Self { world: Arc::clone(world), id, place, pages };
        let floor = world.next_version();
        for page in 0..space.pages.len() {
            space.publish(page, |record| {
                *record =
                    Record { address_space: id.get(), floor, copy_floor: floor, path, ..Record::VACANT };
            })?;
        }
        space.announce()?;
        space.fill_holes().await?;
        Ok(space)
    }

    fn announce(&self) -> Result<(), WorkloadError> {
        let (slot, address_space) = (self.place.slot, self.id.get());
        say(&FromAgent::Lives { slot, address_space }).map_err(WorkloadError::Parent)
    }

    /// mmap of every hole, and the first stamps.
    pub(super) async fn fill_holes(&mut self) -> Result<(), WorkloadError> {
        while let Some(first) = self.pages.iter().position(|page| *page == Page::Hole) {
            let length = self.pages[first..].iter().take_while(|page| **page == Page::Hole).count();
            let pages = first..first + length;
            for page in pages.clone() {
                self.publish(page, |record| {
                    record.zeros = Zeros::Allowed;
                    record.copy_zeros = Zeros::Allowed;
                })?;
            }
            let range = range_of(first, length)?;
            self.world.source.map(self.id, range, Access::Write).map_err(self.failed(Path::Map))?;
            for page in pages {
                self.refill(page).await?;
            }
            self.world.ledger.on_operation(Path::Map);
        }
        Ok(())
    }

    /// A load by the CPU of a stamped page: it must be exactly what was stored.
    pub(super) async fn read(&mut self, page: usize) -> Result<(), WorkloadError> {
        let Page::Stamped { by, version } = self.pages[page] else { return Ok(()) };
        let address = address_of(page);
        let loaded = self.world.source.load(self.id, address, PAGE_BYTES).await;
        let loaded = loaded.map_err(self.failed(Path::Read))?;
        let expected = Stamp { writer: Writer::Cpu, address_space: by, address, version };
        let found = Block::of_page(&loaded);
        let mut checks = self.world.checks.lock();
        checks.loads += 1;
        if found != [Block::Stamp(expected)] {
            checks.stale_reads += 1;
            if checks.stale.len() < MOST_TOLD {
                let stale = self.stale_load(page, version, found.first().copied().unwrap_or(Block::Mangled));
                checks.stale.push(stale);
            }
        }
        drop(checks);
        self.world.ledger.on_operation(Path::Read);
        Ok(())
    }

    /// A store by the CPU: the whole page at once. What branch it takes is the page's affair.
    pub(super) async fn write(&mut self, page: usize) -> Result<(), WorkloadError> {
        if let Page::Stamped { .. } = self.pages[page] {
            self.stamp(page).await?;
            self.world.ledger.on_operation(Path::Write);
        }
        Ok(())
    }

    async fn refill(&mut self, page: usize) -> Result<(), WorkloadError> {
        if self.world.is_scratch(page) {
            self.pages[page] = Page::Scratch;
            return Ok(());
        }
        self.stamp(page).await
    }

    async fn stamp(&mut self, page: usize) -> Result<(), WorkloadError> {
        let version = self.world.next_version();
        let (by, address) = (self.id.get(), address_of(page));
        let stamp = Stamp { writer: Writer::Cpu, address_space: by, address, version };
        let stored = self.world.source.store(self.id, address, &stamp.to_page()).await;
        let stored = stored.map_err(self.failed(Path::Write))?;
        let copied = stored.pages.iter().find_map(|page| match &page.branch {
            StoreBranch::Copied(copied) => Some(copied),
            _ => None,
        });
        let before = self.pages[page];
        self.publish(page, |record| {
            record.floor = version;
            record.zeros = Zeros::Forbidden;
            if copied.is_some() {
                record.path = Path::Cow;
                record.copy_zeros = Zeros::Forbidden;
                // A device may have copied the page between the round and the store: what was there then.
                if let Page::Stamped { version, .. } = before {
                    record.copy_floor = version;
                }
            }
        })?;
        if let Some(copied) = copied {
            self.world.ledger.on_operation(Path::Cow);
            if let Some(took) = copied.release {
                self.world.ledger.on_release([&copied.round], took);
            }
        }
        self.pages[page] = Page::Stamped { by, version };
        Ok(())
    }

    /// MADV_DONTNEED from `first`, up to the first hole, and new stamps.
    pub(super) async fn dont_need(&mut self, first: usize, most: usize) -> Result<(), WorkloadError> {
        let mapped = |page: &&Page| **page != Page::Hole;
        let length = self.pages[first..].iter().take(most).take_while(mapped).count();
        if length == 0 {
            return Ok(());
        }
        for page in first..first + length {
            self.publish(page, |record| {
                record.zeros = Zeros::Allowed;
                record.copy_zeros = Zeros::Allowed;
            })?;
        }
        let released = self.world.source.dont_need(self.id, range_of(first, length)?).await;
        let released = released.map_err(self.failed(Path::Dontneed))?;
        let floor = self.world.next_version();
        for page in first..first + length {
            self.publish(page, |record| {
                record.floor = floor;
                record.copy_floor = floor;
                record.path = Path::Dontneed;
            })?;
        }
        self.on_released(Path::Dontneed, &released);
        for page in first..first + length {
            self.refill(page).await?;
        }
        Ok(())
    }

    /// munmap. The hole is filled by a later operation.
    pub(super) async fn unmap(&mut self, first: usize, most: usize) -> Result<(), WorkloadError> {
        let length = most.min(self.pages.len() - first);
        let released = self.world.source.unmap(self.id, range_of(first, length)?).await;
        let released = released.map_err(self.failed(Path::Munmap))?;
        let floor = self.world.next_version();
        for page in first..first + length {
            self.publish(page, |record| {
                record.floor = floor;
                record.copy_floor = floor;
                record.path = Path::Munmap;
            })?;
            self.pages[page] = Page::Hole;
        }
        self.on_released(Path::Munmap, &released);
        Ok(())
    }

    /// fork. The child takes `place`; devices are told of it once its floors are right.
    pub(super) async fn fork(&mut self, place: Place) -> Result<Self, WorkloadError> {
        let forked = self.world.source.fork(self.id, "loadgen-child").await;
        let id = forked.map_err(self.failed(Path::Fork))?;
        let inherited_through = self.world.next_version();
        let mut child = Self { world: Arc::clone(&self.world), id, place, pages: self.pages.clone() };
        for page in 0..self.pages.len() {
            let floor = match self.pages[page] {
                Page::Stamped { version, .. } => version,
                Page::Hole | Page::Scratch => inherited_through,
            };
            let inherited_from = self.id.get();
            child.publish(page, |record| {
                *record = Record {
                    address_space: id.get(),
                    floor,
                    copy_floor: floor,
                    inherited_from,
                    inherited_through,
                    path: Path::Fork,
                    ..Record::VACANT
                };
            })?;
            // The round took every copy away, and every page was stamped before it.
            if let Page::Stamped { .. } = self.pages[page] {
                self.publish(page, |record| {
                    record.copy_floor = floor;
                    record.copy_zeros = Zeros::Forbidden;
                    record.path = Path::Fork;
                })?;
            }
        }
        self.world.ledger.on_operation(Path::Fork);
        child.announce()?;
        Ok(child)
    }

    /// exit: the address space ends, and its place is free.
    pub(super) async fn exit(mut self) -> Result<Place, WorkloadError> {
        let released = self.world.source.exit(self.id).await.map_err(self.failed(Path::Exit))?;
        let floor = self.world.next_version();
        for page in 0..self.pages.len() {
            self.publish(page, |record| *record = Record { floor, path: Path::Exit, ..Record::VACANT })?;
        }
        self.on_released(Path::Exit, &released);
        let (slot, address_space) = (self.place.slot, self.id.get());
        say(&FromAgent::Ended { slot, address_space }).map_err(WorkloadError::Parent)?;
        Ok(self.place)
    }

    /// Whether the page is mapped and stamped.
    pub(super) fn is_stamped(&self, page: usize) -> bool {
        matches!(self.pages[page], Page::Stamped { .. })
    }

    pub(super) fn has_holes(&self) -> bool {
        self.pages.contains(&Page::Hole)
    }

    fn on_released(&self, path: Path, released: &Released) {
        self.world.ledger.on_operation(path);
        self.world.ledger.on_release(&released.rounds, released.release);
    }

    fn publish(&mut self, page: usize, change: impl FnOnce(&mut Record)) -> Result<(), WorkloadError> {
        let record = &mut self.place.records[page];
        let number = record.change + 1;
        change(record);
        record.change = number;
        Ok(self.world.floors.write(self.place.slot, page, record)?)
    }

    fn failed(&self, path: Path) -> impl Fn(MemoryError) -> WorkloadError + use<> {
        let address_space = self.id.get();
        move |error| WorkloadError::Operation { path, address_space, error }
    }

    fn stale_load(&self, page: usize, version: u64, block: Block) -> StaleRead {
        let found = match block {
            Block::Stamp(stamp)
                if stamp.address == address_of(page) && stamp.address_space == self.id.get() =>
            {
                Found::Older { version: stamp.version }
            }
            Block::Stamp(stamp) => {
                Found::Elsewhere { address_space: stamp.address_space, address: stamp.address }
            }
            Block::Zeros => Found::Zeros,
            Block::Poison => Found::Freed,
            Block::Mangled => Found::Mangled,
        };
        StaleRead {
            device: "cpu".to_owned(),
            address_space: self.id.get(),
            address: address_of(page),
            expected_at_least: version,
            found,
            origin: Origin::Frame,
            released_by: self.place.records[page].path,
        }
    }
}

/// The address of a page of the region.
pub(crate) fn address_of(page: usize) -> u64 {
    REGION + page as u64 * PageSize::BASE.bytes()
}

fn range_of(first: usize, length: usize) -> Result<AddrRange, RangeError> {
    AddrRange::new(address_of(first), address_of(first + length))
}
