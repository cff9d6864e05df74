//! [1, 9 of 9] The memory source: a software MM in user space, on real memory.
//!
//! Each path of the kernel that needs a notifier has its twin here, in a file of its own, in the kernel's
//! order: clear the entry, drop the page-table lock, notify, and only then free.
//!
//! That order, in which a notifier may sleep, is the one of the patches of 2012 to linux-mm by Andrea Arcangeli
//! ("invalidate_page outside PT lock") and Christoph Lameter ("free-pgtables", "unmap vmas tlb flushing"). The heads
//! of the files say which of them a twin follows, docs/memory-source.md has them all.
//!
//! | file | kernel |
//! |---|---|
//! | `frame` | `struct page`: references, poison |
//! | `page_table`, `vma`, `address_space` | `pte_t` and its lock, `vm_area_struct`, `mm_struct` |
//! | `fault`, `translate` | `handle_pte_fault`, `get_user_pages` |
//! | `cow` | `do_wp_page` |
//! | `reclaim`, `aging`, `swap_out`, `swap_in` | `try_to_free_pages`, `page_referenced`, `pageout`, `do_swap_page` |
//! | `fork` | `dup_mmap`, `copy_page_range` |
//! | `gather` | `mmu_gather`, and the proof that devices have stopped |
//! | `zap` | `unmap_vmas`, `zap_page_range` |
//! | `page_cache`, `file` | `struct address_space`, `filemap_fault`, `page_mkwrite` |
//! | `placeholder` | `__xip_unmap` |
//! | `writeback` | `page_mkclean` |
//! | `cluster` | `try_to_unmap_cluster` |
//! | `truncate` | `truncate_pagecache`, `unmap_mapping_range` |
//! | `unmap` | `do_munmap`, `free_pgtables` |
//! | `protect` | `mprotect_fixup`, `change_protection`, `mlock` |
//! | `remap` | `mremap_to`, `move_page_tables` |
//! | `snapshot` | `copy_page_range`, for a child that never runs |
//! | `exit` | `exit_mmap` |
//! | `collapse` | `collapse_huge_page` |
//! | `merge`, `share` | ksmd, `try_to_merge_one_page`, `replace_page` |
//!
//! What it can hold, and for how long: every page, until the notifier says that devices have stopped.

mod twin;
mod frame;
mod swap;
mod object;
mod lru;
mod pool;
mod page_table;
mod vma;
mod address_space;
mod fault;
mod translate;
mod gather;
mod rmap;
mod under_way;
mod reclaim;
mod aging;
mod swap_out;
mod swap_in;
mod page_cache;
mod file;
mod placeholder;
mod writeback;
mod cluster;
mod truncate;
mod migrate;
mod protect;
mod remap;
mod snapshot;
mod collapse;
mod merge;
mod share;
mod cow;
mod fork;
mod zap;
mod unmap;
mod exit;
mod error;
mod outcome;

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use parking_lot::{Mutex, RwLock};
use shootdown_core::{Access, AddrRange, AddressSpaceId, FrameNumber, Moment, PageSize, RangeError};
use shootdown_proto::message::FrameSpan;
use tokio::runtime::Handle;
use tokio_util::task::TaskTracker;

pub use self::cluster::ClusterUnmapped;
pub use self::collapse::Collapsed;
pub use self::error::MemoryError;
pub use self::file::MemoryFile;
pub use self::frame::{FrameError, FrameStore, POISON};
pub use self::merge::Merged;
pub use self::outcome::{
    AddressSpaceStats, CopiedPage, MemoryEvents, MemoryStats, Migrated, Released, StoreBranch, StoreOutcome,
    StoredPage,
};
pub use self::reclaim::{Aged, PagedOut, Reclaimed};
pub use self::snapshot::Snapshot;
pub use self::swap::{SwapError, SwapFile};
pub use self::twin::Twin;
pub use self::writeback::WrittenBack;

use self::address_space::AddressSpace;
use self::cow::Broken;
use self::fault::{By, Obstacle, Touch};
use self::lru::Counts;
use self::page_table::Tables;
use self::pool::Pool;
use self::under_way::UnderWay;
use self::vma::Vmas;
use super::Notifier;

/// Reads the clock that the notifier's [`super::RoundTimes`] are on.
pub type Clock = Arc<dyn Fn() -> Moment + Send + Sync>;

/// How a memory source works.
#[derive(Clone)]
pub struct MemoryConfig {
    /// Pages in a block (`ZAP_BLOCK_SIZE`): as many are freed together, and as long is a page-table lock
    /// held at most. At least 1.
    pub zap_block_pages: usize,
    /// The most mappings of an address space (`sysctl_max_map_count`).
    pub most_mappings: usize,
    /// The most frames that are in use for pages; beyond it reclaim makes room. The store's capacity if that
    /// is less.
    pub limit_frames: usize,
    /// Where pages go that are used least; without one, only a file's pages can be reclaimed.
    pub swap: Option<Arc<SwapFile>>,
    /// Pages in a huge page (`HPAGE_PMD_NR`): a power of two from 1 to 512, the entries of a page table; else
    /// the next below that is one.
    pub huge_page_pages: usize,
    /// The clock of the host agent.
    pub now: Clock,
    /// Where operations run, so that they outlive a caller that gives up.
    pub runtime: Handle,
}

/// Address spaces on real memory. A clone is the same source.
///
/// Operations that notify run in tasks of the source: a caller that drops its future does not stop them,
/// and no page is freed early or leaked by it. The price is a task for each copy on write, fork, snapshot,
/// unmap, dont_need, protect, remap and exit. [`MemorySource::drain`] awaits them.
///
/// No lock is held while devices are waited for. The locks are parking_lot's, whose guards are not `Send`:
/// a future that kept one over an await would not be `Send`, and each operation's future is asserted to be
/// so in this file.
///
/// The notifier holds the source for each registered address space, and the source holds the notifier:
/// both live until the last address space has exited.
pub struct MemorySource<N: Notifier> {
    inner: Arc<Inner<N>>,
}

struct Inner<N: Notifier> {
    notifier: Arc<N>,
    pool: Arc<Pool>,
    config: MemoryConfig,
    spaces: RwLock<BTreeMap<AddressSpaceId, Arc<AddressSpace>>>,
    merging: Mutex<merge::Scan>,
    tasks: TaskTracker,
    under_way: Arc<UnderWay>,
    /// Held by who makes room; see [`Inner::make_room`].
    reclaiming: Arc<tokio::sync::Mutex<()>>,
}

impl<N: Notifier> MemorySource<N> {
    /// A source without address spaces.
    pub fn new(notifier: Arc<N>, frames: Arc<FrameStore>, config: MemoryConfig) -> Self {
        let pool = Pool::new(frames, config.swap.clone(), config.limit_frames);
        let (spaces, merging, tasks) = (RwLock::default(), Mutex::default(), TaskTracker::new());
        let (under_way, reclaiming) = (Arc::default(), Arc::default());
        let inner = Inner { notifier, pool, config, spaces, merging, tasks, under_way, reclaiming };
        Self { inner: Arc::new(inner) }
    }

    /// The frames, as a device's DMA reaches them.
    #[must_use]
    pub fn frames(&self) -> &Arc<FrameStore> {
        &self.inner.pool.frames
    }

    /// Makes an empty address space and registers it with the notifier.
    ///
    /// # Errors
    /// [`MemoryError::Notify`].
    pub fn create(&self, name: &str) -> Result<AddressSpaceId, MemoryError> {
        let registered = self.inner.notifier.register(name, Arc::new(self.clone()));
        let id = registered.map_err(MemoryError::Notify)?;
        self.inner.add(id, Vmas::new(self.inner.config.most_mappings), Tables::default());
        Ok(id)
    }

    /// Maps anonymous memory in whole pages, zero-filled at the first touch (`mmap`).
    ///
    /// # Errors
    /// [`MemoryError::Busy`] while a part of the range is being unmapped: its pages are not released, and
    /// it can be mapped once the unmap has returned; or while memory is moving there. [`MemoryError::AlreadyMapped`],
    /// [`MemoryError::Range`], [`MemoryError::TooManyMappings`], [`MemoryError::AddressSpaceUnknown`],
    /// [`MemoryError::Exiting`].
    pub fn map(&self, id: AddressSpaceId, range: AddrRange, access: Access) -> Result<(), MemoryError> {
        whole_pages(range)?;
        let space = self.space(id)?;
        let mut layout = space.layout.write();
        layout.check_door(id)?;
        layout.vmas.map(range, access)
    }

    /// Reads as the CPU does: any alignment, across pages.
    ///
    /// # Errors
    /// [`MemoryError::Unmapped`] if a byte is not mapped, [`MemoryError::Frame`] if a page that was never
    /// touched finds no frame, [`MemoryError::Range`], [`MemoryError::AddressSpaceUnknown`],
    /// [`MemoryError::Exiting`].
    ///
    /// # Cancel safety
    /// It may be dropped at any time.
    pub async fn load(&self, id: AddressSpaceId, address: u64, length: usize) -> Result<Bytes, MemoryError> {
        let space = self.space(id)?;
        let Some(range) = span_of(address, length)? else { return Ok(Bytes::new()) };
        space.check_mapped(range, Access::Read)?;
        let mut out = BytesMut::new();
        for part in parts_of(range) {
            let (offset, length) = within_page(part);
            let mut read =
                |frame: FrameNumber| space.frames.read(&[FrameSpan { frame, offset, length }], &mut out);
            while let Touch::Obstacle(obstacle) =
                space.touch(part.start(), By::Cpu, Access::Read, &mut read)?
            {
                self.clear_way(&space, part.start(), Access::Read, obstacle).await?;
            }
        }
        Ok(out.freeze())
    }

    /// Writes as the CPU does; pages that are shared are copied first, and their devices told.
    ///
    /// Every page is made writable before the first byte is written, so a store that fails has written
    /// nothing, unless the address space changed under it meanwhile.
    ///
    /// # Errors
    /// [`MemoryError::Unmapped`], [`MemoryError::ReadOnly`], [`MemoryError::Frame`] if no frame is left,
    /// [`MemoryError::Notify`] or [`MemoryError::NotQuiesced`] if devices could not be told: the page is
    /// as it was then. [`MemoryError::Range`], [`MemoryError::AddressSpaceUnknown`],
    /// [`MemoryError::Exiting`], [`MemoryError::TaskEnded`].
    ///
    /// # Cancel safety
    /// Dropped, it leaves the data unwritten, or written up to a page's end. A copy that has begun goes on,
    /// and frees the old frame when devices have stopped.
    pub async fn store(
        &self,
        id: AddressSpaceId,
        address: u64,
        data: &[u8],
    ) -> Result<StoreOutcome, MemoryError> {
        let space = self.space(id)?;
        let mut pages = Vec::new();
        let Some(range) = span_of(address, data.len())? else { return Ok(StoreOutcome { pages }) };
        space.check_mapped(range, Access::Write)?;
        let parts: Vec<AddrRange> = parts_of(range).collect();
        if parts.len() > 1 {
            for part in &parts {
                let branch = self.write_page(&space, part.start(), &[]).await?;
                pages.push(StoredPage { page: page_of(*part), branch });
            }
        }
        let mut rest = data;
        for (index, part) in parts.iter().enumerate() {
            let (now, later) = rest.split_at(within_page(*part).1 as usize);
            rest = later;
            let branch = self.write_page(&space, part.start(), now).await?;
            match (pages.get_mut(index), branch) {
                (Some(_), StoreBranch::InPlace) => {}
                (Some(page), branch) => page.branch = branch,
                (None, branch) => pages.push(StoredPage { page: page_of(*part), branch }),
            }
        }
        Ok(StoreOutcome { pages })
    }

    /// Makes a child that shares every page until one of the two writes (`fork`).
    ///
    /// # Errors
    /// [`MemoryError::Notify`], [`MemoryError::NotQuiesced`], [`MemoryError::Frame`] if a frame is shared
    /// as often as it may be: there is no child then. [`MemoryError::AddressSpaceUnknown`],
    /// [`MemoryError::Exiting`], [`MemoryError::TaskEnded`].
    ///
    /// # Cancel safety
    /// Dropped after it was polled, it goes on: there may be a child that nobody knows the name of but the
    /// notifier.
    pub async fn fork(&self, id: AddressSpaceId, name: &str) -> Result<AddressSpaceId, MemoryError> {
        let user = self.space(id)?.enter()?;
        let (source, name) = (self.clone(), name.to_owned());
        let work =
            async move { fork::fork(&source.inner, Arc::new(source.clone()), &user.space, &name).await };
        self.owned(Twin::Fork, work).await
    }

    /// Moves the pages of a range that are present to other frames (`migrate_pages`). Pages that are in use
    /// elsewhere at the moment stay where they are, and are counted.
    ///
    /// # Errors
    /// [`MemoryError::Range`], [`MemoryError::AddressSpaceUnknown`], [`MemoryError::Exiting`],
    /// [`MemoryError::TaskEnded`].
    ///
    /// # Cancel safety
    /// Dropped after it was polled, it goes on.
    pub async fn migrate(&self, id: AddressSpaceId, range: AddrRange) -> Result<Migrated, MemoryError> {
        let user = self.space(id)?.enter()?;
        let inner = Arc::clone(&self.inner);
        self.owned(Twin::Migrate, async move { migrate::migrate(&inner, &user.space, range).await }).await
    }

    /// Unmaps whole pages (`munmap`), and returns when they are released. Holes are allowed. From its first
    /// poll the range cannot be accessed, and until it has returned it cannot be mapped.
    ///
    /// # Errors
    /// [`MemoryError::Notify`], [`MemoryError::NotQuiesced`]: everything is mapped as it was.
    /// [`MemoryError::Range`], [`MemoryError::TooManyMappings`], [`MemoryError::AddressSpaceUnknown`],
    /// [`MemoryError::Exiting`], [`MemoryError::TaskEnded`].
    ///
    /// # Cancel safety
    /// Dropped after it was polled, it goes on.
    pub async fn unmap(&self, id: AddressSpaceId, range: AddrRange) -> Result<Released, MemoryError> {
        let user = self.space(id)?.enter()?;
        let inner = Arc::clone(&self.inner);
        self.owned(Twin::Unmap, async move { unmap::unmap(&inner, &user.space, range).await }).await
    }

    /// Drops the pages of a range that is mapped, and keeps the mapping: the next touch finds zeros
    /// (`MADV_DONTNEED`). Returns when they are released.
    ///
    /// # Errors
    /// [`MemoryError::Unmapped`] if a part of it is not mapped, [`MemoryError::Locked`] if a part is locked in
    /// memory; else as [`MemorySource::unmap`].
    ///
    /// # Cancel safety
    /// Dropped after it was polled, it goes on.
    pub async fn dont_need(&self, id: AddressSpaceId, range: AddrRange) -> Result<Released, MemoryError> {
        let user = self.space(id)?.enter()?;
        let inner = Arc::clone(&self.inner);
        self.owned(Twin::DontNeed, async move { zap::dont_need(&inner, &user.space, range).await }).await
    }

    /// Ends an address space (`exit_mmap`): the notifier's release first, then its pages. Operations in
    /// progress are waited for.
    ///
    /// # Errors
    /// [`MemoryError::Notify`]: the address space is as it was. [`MemoryError::NotQuiesced`]: it is lost,
    /// and its pages are kept for ever. [`MemoryError::AddressSpaceUnknown`], [`MemoryError::Exiting`] if
    /// another exit is at it, [`MemoryError::TaskEnded`].
    ///
    /// # Cancel safety
    /// Dropped after it was polled, it goes on.
    pub async fn exit(&self, id: AddressSpaceId) -> Result<Released, MemoryError> {
        let space = self.space(id)?;
        let inner = Arc::clone(&self.inner);
        self.owned(Twin::Exit, async move { exit::exit(&inner, &space).await }).await
    }

    /// The generation of the frame that is mapped at `address`; `None` where no page is present.
    #[must_use]
    pub fn generation(&self, id: AddressSpaceId, address: u64) -> Option<u64> {
        let table = self.space(id).ok()?.tables.get(address)?;
        let entries = table.lock();
        entries.get(address).map(|entry| entry.frame.life().generation())
    }

    /// What the source holds. Each figure is exact, all together are not one moment's.
    #[must_use]
    pub fn stats(&self) -> MemoryStats {
        let spaces: Vec<_> = self.inner.spaces.read().values().cloned().collect();
        let mut stats = MemoryStats { address_spaces: spaces.len(), ..MemoryStats::default() };
        for space in spaces.iter().map(|space| space.stats()) {
            stats.mappings += space.mappings;
            stats.mapped_pages += space.mapped_pages;
            stats.page_tables += space.page_tables;
            stats.quarantined += space.quarantined;
            stats.operations += space.operations;
        }
        stats.frames_in_use = self.inner.pool.frames.in_use();
        stats.swapped_pages = self.inner.pool.swapped();
        let Counts { active, inactive, isolated } = self.inner.pool.lru.counts();
        (stats.active, stats.inactive, stats.isolated) = (active, inactive, isolated);
        stats
    }

    /// How often each branch was taken so far.
    #[must_use]
    pub fn events(&self) -> MemoryEvents {
        self.inner.pool.events()
    }

    /// The address spaces that there are, in the order of their making.
    #[must_use]
    pub fn address_spaces(&self) -> Vec<AddressSpaceId> {
        self.inner.spaces.read().keys().copied().collect()
    }

    /// What one address space holds; `None` where there is none.
    #[must_use]
    pub fn address_space_stats(&self, id: AddressSpaceId) -> Option<AddressSpaceStats> {
        self.space(id).ok().map(|space| space.stats())
    }

    /// Waits until the operations in progress are over, those too whose callers have gone.
    ///
    /// # Cancel safety
    /// It may be dropped at any time.
    pub async fn drain(&self) {
        // A tracker is waited for when it is closed; closed, it still takes tasks.
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }

    fn space(&self, id: AddressSpaceId) -> Result<Arc<AddressSpace>, MemoryError> {
        self.inner.spaces.read().get(&id).cloned().ok_or(MemoryError::AddressSpaceUnknown(id))
    }

    /// Makes one page writable and writes `data` there, which may be nothing.
    async fn write_page(
        &self,
        space: &Arc<AddressSpace>,
        address: u64,
        data: &[u8],
    ) -> Result<StoreBranch, MemoryError> {
        let offset = offset_of(address);
        let mut broken = None;
        loop {
            match space
                .touch(address, By::Cpu, Access::Write, |frame| space.frames.write(frame, offset, data))?
            {
                Touch::Done(StoreBranch::InPlace, ()) => return Ok(broken.unwrap_or(StoreBranch::InPlace)),
                Touch::Done(branch, ()) => return Ok(branch),
                Touch::Obstacle(obstacle) => {
                    match self.clear_way(space, address, Access::Write, obstacle).await? {
                        Broken::Copied(page) => broken = Some(StoreBranch::Copied(page)),
                        Broken::LostRace => broken = Some(broken.unwrap_or(StoreBranch::LostRace)),
                        Broken::NotNeeded => {}
                    }
                }
            }
        }
    }

    /// Removes what stood in the way of a touch of the page at `address`; there may be something else after
    /// it.
    async fn clear_way(
        &self,
        space: &Arc<AddressSpace>,
        address: u64,
        access: Access,
        obstacle: Obstacle,
    ) -> Result<Broken, MemoryError> {
        let inner = Arc::clone(&self.inner);
        match obstacle {
            Obstacle::Settling => space.settled(address).await,
            Obstacle::Shared => {
                inner.make_room(self).await?;
                let user = space.enter()?;
                let work = async move { cow::do_wp_page(&inner, &user.space, address).await };
                return or_touch_again(self.owned(Twin::CopyOnWrite, work).await);
            }
            Obstacle::NoRoom => inner.make_room(self).await?,
            Obstacle::Swapped => {
                inner.make_room(self).await?;
                let user = space.enter()?;
                // Not here: it reads the disk, and a shard that waits for a disk keeps all its sessions waiting.
                let work = async move { swap_in::do_swap_page(&inner, &user.space, address) };
                or_touch_again(self.owned(Twin::SwapOut, work).await)?;
            }
            Obstacle::File => {
                inner.make_room(self).await?;
                let user = space.enter()?;
                let work = async move { file::fault(&inner, &user.space, address, access).await };
                or_touch_again(self.owned(Twin::Placeholder, work).await)?;
            }
        }
        Ok(Broken::NotNeeded)
    }

    /// Runs `work` in a task of the source, as the twin that it is: it goes on when the caller's future is
    /// dropped.
    async fn owned<T: Send + 'static>(
        &self,
        twin: Twin,
        work: impl Future<Output = Result<T, MemoryError>> + Send + 'static,
    ) -> Result<T, MemoryError> {
        let operation = self.inner.under_way.begin();
        let work = async move {
            let _operation = operation;
            twin.run(work).await
        };
        let task = self.inner.tasks.spawn_on(work, &self.inner.config.runtime);
        task.await.unwrap_or(Err(MemoryError::TaskEnded))
    }
}

/// Room that was made may be gone when it is needed, because another took it: then the touch finds its obstacle
/// again, and room is made again. Where none can be made, [`Inner::make_room`] says so.
fn or_touch_again<T: Default>(result: Result<T, MemoryError>) -> Result<T, MemoryError> {
    match result {
        Err(MemoryError::Frame(FrameError::OutOfMemory { .. })) => Ok(T::default()),
        other => other,
    }
}

impl<N: Notifier> Inner<N> {
    fn add(&self, id: AddressSpaceId, vmas: Vmas, tables: Tables) {
        let space = AddressSpace::new(id, Arc::clone(&self.pool), vmas, tables);
        self.spaces.write().insert(id, space);
    }
}

impl<N: Notifier> Clone for MemorySource<N> {
    fn clone(&self) -> Self {
        Self { inner: Arc::clone(&self.inner) }
    }
}

impl<N: Notifier> fmt::Debug for MemorySource<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemorySource").field("stats", &self.stats()).finish_non_exhaustive()
    }
}

impl MemoryConfig {
    /// As the kernel has it: blocks of 512 pages, 65,530 mappings, huge pages of 2 MiB.
    #[must_use]
    pub fn new(now: Clock, runtime: Handle) -> Self {
        Self {
            zap_block_pages: 512,
            most_mappings: 65_530,
            limit_frames: usize::MAX,
            swap: None,
            huge_page_pages: 512,
            now,
            runtime,
        }
    }
}

impl fmt::Debug for MemoryConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryConfig")
            .field("zap_block_pages", &self.zap_block_pages)
            .field("most_mappings", &self.most_mappings)
            .field("limit_frames", &self.limit_frames)
            .field("swap", &self.swap)
            .field("huge_page_pages", &self.huge_page_pages)
            .finish_non_exhaustive()
    }
}

/// Only the compiler reads it: no operation keeps a lock over an await, for none would be `Send` then.
#[expect(dead_code, reason = "it is checked, not called")]
fn no_lock_is_held_over_an_await<N: Notifier>(
    source: &MemorySource<N>,
    id: AddressSpaceId,
    file: &MemoryFile,
) {
    fn assert_send<T: Send>(_: &T) {}
    assert_send(&source.load(id, 0, 0));
    assert_send(&source.store(id, 0, &[]));
    assert_send(&source.fork(id, ""));
    assert_send(&source.unmap(id, AddrRange::ALL));
    assert_send(&source.dont_need(id, AddrRange::ALL));
    assert_send(&source.exit(id));
    assert_send(&source.migrate(id, AddrRange::ALL));
    assert_send(&source.page_out(id, AddrRange::ALL));
    assert_send(&source.age(0));
    assert_send(&source.reclaim(0));
    assert_send(&source.inner.make_room(source));
    assert_send(&source.protect(id, AddrRange::ALL, Access::Read));
    assert_send(&source.remap(id, AddrRange::ALL, 0));
    assert_send(&source.snapshot(id));
    assert_send(&source.collapse(id, AddrRange::ALL));
    assert_send(&source.merge(0));
    assert_send(&source.write_back(file));
    assert_send(&source.truncate(file, 0));
    assert_send(&source.unmap_cluster(id, 0));
    assert_send(&source.drain());
}

/// The range of `length` bytes from `address`; `None` for no bytes.
fn span_of(address: u64, length: usize) -> Result<Option<AddrRange>, RangeError> {
    if length == 0 {
        return Ok(None);
    }
    AddrRange::new(address, address.wrapping_add(length as u64)).map(Some)
}

/// What is left of `range` on each of its pages, lowest first.
fn parts_of(range: AddrRange) -> impl Iterator<Item = AddrRange> {
    range
        .pages(PageSize::BASE)
        .filter_map(move |page| AddrRange::page_of(page, PageSize::BASE).intersection(range))
}

/// Offset and length, within its page, of a range on one page.
fn within_page(part: AddrRange) -> (u32, u32) {
    let length = u32::try_from(part.last() - part.start() + 1).expect("a part of a page");
    (offset_of(part.start()), length)
}

fn offset_of(address: u64) -> u32 {
    u32::try_from(address & PageSize::BASE.offset_mask()).expect("less than a page")
}

fn page_of(part: AddrRange) -> u64 {
    AddrRange::page_of(part.start(), PageSize::BASE).start()
}

fn whole_pages(range: AddrRange) -> Result<(), RangeError> {
    if range == range.widen_to(PageSize::BASE) {
        return Ok(());
    }
    let (start, end) = (range.start(), range.wire_end());
    Err(RangeError::Unaligned { start, end, page_bytes: PageSize::BASE.bytes() })
}
