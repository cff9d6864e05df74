//! A parent, its child, and a picture of the parent: what one slot of the workload holds, and the operations
//! that nobody else may be at work beside.

use std::sync::Arc;

use rand::RngExt as _;
use rand::rngs::SmallRng;
use shootdown_server::source::memory::Snapshot;

use super::cells::{Cells, Content};
use super::file::MappedFile;
use super::space::{Marked, Space, may_also};
use super::world::{WorkloadError, World};
use crate::check::floor::Record;
use crate::check::stamp::{Block, PAGE_BYTES, Stamp};
use crate::path::Path;

/// An address space that is used, perhaps its child, and perhaps a picture of it.
#[derive(Debug)]
pub(super) struct Family {
    pub(super) world: Arc<World>,
    pub(super) file: Arc<MappedFile>,
    parent: Option<Space>,
    child: Result<Space, Option<Cells>>,
    picture: Option<Picture>,
    /// Pages that parent and child still share.
    shared: parking_lot::Mutex<Vec<bool>>,
}

/// An address space as it was.
#[derive(Debug)]
struct Picture {
    snapshot: Snapshot,
    stamps: Vec<Option<Stamp>>,
}

impl Family {
    pub(super) async fn create(world: &Arc<World>, index: usize) -> Result<Self, WorkloadError> {
        let file = Arc::new(MappedFile::create(world, index)?);
        let cells = |slot| Cells::new(slot, 0, world.layout.anonymous());
        let parent = Space::create(world, cells(index), &file, Path::Map).await?;
        Ok(Self {
            world: Arc::clone(world),
            file,
            parent: Some(parent),
            child: Err(Some(cells(world.plan.address_spaces + index))),
            picture: None,
            shared: parking_lot::Mutex::new(vec![false; world.layout.pages()]),
        })
    }

    pub(super) fn parent(&self) -> &Space {
        self.parent.as_ref().expect("there is a parent between two operations")
    }

    pub(super) fn child(&self) -> Option<&Space> {
        self.child.as_ref().ok()
    }

    /// Pages are not shared any more.
    pub(super) fn unshare(&self, pages: impl IntoIterator<Item = usize>) {
        let mut shared = self.shared.lock();
        for page in pages {
            shared[page] = false;
        }
    }

    /// Those of `pages` that are shared.
    pub(super) fn shared(&self, pages: impl IntoIterator<Item = usize>) -> Vec<usize> {
        let shared = self.shared.lock();
        pages.into_iter().filter(|page| shared[*page]).collect()
    }

    /// A new child; the one before ends.
    pub(super) async fn fork(&mut self) -> Result<(), WorkloadError> {
        let cells = match std::mem::replace(&mut self.child, Err(None)) {
            Ok(child) => child.exit().await?,
            Err(cells) => cells.expect("the slot of the child is there while there is no child"),
        };
        let child = self.parent().fork(cells).await?;
        let mut shared = self.shared.lock();
        for page in child.cells.pages() {
            shared[page] = child.is_stamped(page);
        }
        drop(shared);
        self.child = Ok(child);
        Ok(())
    }

    /// A new picture; the one before is given back.
    pub(super) async fn snapshot(&mut self) -> Result<(), WorkloadError> {
        self.picture = None;
        let (world, parent) = (Arc::clone(&self.world), self.parent());
        let marked = parent.marked(parent.cells.pages())?;
        let taken = world.patiently(|| world.source.snapshot(parent.id)).await;
        let snapshot = taken.map_err(parent.failed(Path::Snapshot))?;
        let mut stamps = Vec::new();
        for page in parent.cells.pages() {
            parent.on_shared(page, Path::Snapshot)?;
            stamps.push(match parent.cell(page).content {
                Content::Stamped(stamp) => Some(stamp),
                Content::Hole | Content::Zeros | Content::Scratch => None,
            });
        }
        world.ledger.on_operation(Path::Snapshot);
        for Marked { page, version } in &marked {
            let loaded = snapshot.load(world.layout.address_of(*page), PAGE_BYTES);
            let loaded = loaded.map_err(parent.failed(Path::Snapshot))?;
            parent.check_left(*page, *version, &loaded, Path::Snapshot);
        }
        parent.check_marked(&marked, Path::Snapshot).await?;
        self.picture = Some(Picture { snapshot, stamps });
        Ok(())
    }

    /// Looks at a page of the picture: it is as it was, whatever was stored since.
    pub(super) fn look(&self, random: &mut SmallRng) -> Result<(), WorkloadError> {
        let Some(Picture { snapshot, stamps }) = &self.picture else { return Ok(()) };
        let (page, parent) = (random.random_range(0..stamps.len()), self.parent());
        let Some(stamp) = stamps[page] else { return Ok(()) };
        let loaded = snapshot.load(self.world.layout.address_of(page), PAGE_BYTES);
        let loaded = loaded.map_err(parent.failed(Path::Snapshot))?;
        let found = Block::of_page(&loaded);
        self.world.checks.lock().loads += 1;
        if found != [Block::Stamp(stamp)] {
            let found = found.first().copied().unwrap_or(Block::Mangled);
            self.world.on_stale(parent.at(page), stamp.version, parent.what_it_is(page, found));
        }
        Ok(())
    }

    /// The address space ends and another takes its slot. Its child and its picture live on.
    pub(super) async fn exit(&mut self) -> Result<(), WorkloadError> {
        let parent = self.parent.take().expect("there is a parent between two operations");
        // What was written to the file is in the next one's too.
        let marked = parent.marked(self.file.cells.pages())?;
        let cells = parent.exit().await?;
        let parent = self.parent.insert(Space::create(&self.world, cells, &self.file, Path::Exit).await?);
        self.shared.lock().fill(false);
        parent.check_marked(&marked, Path::Exit).await
    }
}

impl Space {
    /// fork. The child takes `cells`; devices are told of it once its floors are right.
    async fn fork(&self, cells: Cells) -> Result<Self, WorkloadError> {
        let world = &self.world;
        let marked = self.marked(self.cells.pages())?;
        let forked = world.patiently(|| world.source.fork(self.id, "loadgen-child")).await;
        let id = forked.map_err(self.failed(Path::Fork))?;
        let inherited_through = world.next_version();
        let child = Self { world: Arc::clone(world), id, cells, file: Arc::clone(&self.file) };
        for page in self.cells.pages() {
            let (cell, address) = (self.cells.get(page), world.layout.address_of(page));
            child.cells.set(page, cell.content);
            let mut record = Record {
                address_space: id.get(),
                floor: inherited_through,
                copy_floor: inherited_through,
                inherited_from: self.id.get(),
                inherited_through,
                path: Path::Fork,
                ..Record::VACANT
            };
            match cell.content {
                Content::Stamped(stamp) if cell.record.is_own(&stamp, address) => {
                    record.floor = stamp.version;
                    record.copy_floor = stamp.version;
                }
                Content::Stamped(stamp) => may_also(&mut record, stamp),
                Content::Hole | Content::Zeros | Content::Scratch => {}
            }
            child.cells.publish(world, page, |new| *new = record)?;
            world.histories.inherit(self.at(page).name, child.at(page).name);
            self.on_shared(page, Path::Fork)?;
            world.on_done(child.at(page), "fork", None, Some(record.floor));
        }
        world.ledger.on_operation(Path::Fork);
        // Before a device may write to the child's.
        child.check_marked(&marked, Path::Fork).await?;
        self.check_marked(&marked, Path::Fork).await?;
        child.announce()?;
        Ok(child)
    }

    /// Every page that is there lost the leave to be written, and devices dropped it.
    fn on_shared(&self, page: usize, path: Path) -> Result<(), WorkloadError> {
        if self.is_stamped(page) {
            let address = self.world.layout.address_of(page);
            self.cells.on_withdrawn(&self.world, page, address, path)?;
        }
        self.world.on_done(self.at(page), path.name(), None, None);
        Ok(())
    }
}
