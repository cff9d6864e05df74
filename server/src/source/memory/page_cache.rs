//! A file and the pages of it that are in memory: `struct address_space`, its `i_pages`, and the page lock.
//!
//! ```text
//!               missed: held, read from disk                page_mkwrite
//!   (absent) ------------------------------> clean <-----------------------------> dirty
//!      ^                                      |        written back, after the acks   |
//!      +---------- evicted, cut off ----------+---------- cut off, forgotten ---------+
//! ```
//!
//! The cache has one reference to each frame, and every entry that shows it another: an index has one frame, and
//! every mapping the same. A page is dirty here from when an entry is made writable (`page_mkwrite`), before
//! the first byte is stored, and an entry's dirty bit comes here when the entry goes.
//!
//! Who has to be alone with a page for longer than a lock may be held, holds its index (`lock_page`): see
//! [`Hold`].

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Weak};

use parking_lot::{Mutex, MutexGuard};
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use shootdown_core::{AddrRange, PageSize};
use tokio::sync::{Notify, OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock};

use super::error::MemoryError;
use super::file::OpenFile;
use super::frame::{FRAME_BYTES, FrameError, FrameLife, FrameRef, FrameStore};
use super::lru::{Isolated, List, Lru, Owner};
use super::object::Object;
use super::vma::Vmas;

/// A file whose pages are mapped.
#[derive(Debug)]
pub(super) struct Backing {
    pub(super) frames: Arc<FrameStore>,
    /// Who keeps the cache: a handle or a mapping.
    file: Weak<OpenFile>,
    disk: File,
    /// `i_pages`. Taken under a page-table lock or alone; the LRU's and the ledger's under it.
    cache: Mutex<Cache>,
    /// Nobody holds an index any more that somebody held.
    changed: Notify,
    /// Held for writing by whoever moves entries that show the file to other addresses, for reading by whoever
    /// must meet every one of them (`need_rmap_locks` of `move_ptes`).
    places: Arc<RwLock<()>>,
}

/// What is in memory.
#[derive(Debug)]
pub(super) struct Cache {
    /// `i_size`: touching a page that begins at it or beyond is refused.
    pub(super) length: u64,
    pages: BTreeMap<u64, Cached>,
    held: BTreeMap<Part, Hold>,
    /// What every hole shows that was read and never written; a frame of zeros that is on no list.
    placeholder: Option<FrameRef>,
}

/// A page of the file that is in memory.
#[derive(Debug)]
pub(super) struct Cached {
    pub(super) frame: FrameRef,
    pub(super) dirty: bool,
}

/// What can be held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    /// A page, by its index in the file.
    Page(u64),
    /// The file's length: who holds it changes it.
    Length,
}

/// What an index is held for; it has one holder at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hold {
    /// Its page comes, goes or is replaced: faults wait.
    Alone,
    /// Its page is written back: faults go on.
    WriteBack,
}

/// An index that is held; dropped, it is free again, and who waits for it looks again.
#[derive(Debug)]
pub(super) struct Held {
    backing: Arc<Backing>,
    part: Part,
}

impl Backing {
    pub(super) fn new(frames: Arc<FrameStore>, file: Weak<OpenFile>, disk: File, length: u64) -> Arc<Self> {
        let cache = Cache { length, pages: BTreeMap::new(), held: BTreeMap::new(), placeholder: None };
        Arc::new(Self {
            frames,
            file,
            disk,
            cache: Mutex::new(cache),
            changed: Notify::new(),
            places: Arc::default(),
        })
    }

    /// A reference that keeps the cache; none when nobody has one.
    pub(super) fn file(&self) -> Option<Arc<OpenFile>> {
        self.file.upgrade()
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock()
    }

    /// No entry that shows the file is on its way from one address to another while this is held: a walk meets
    /// them all.
    pub(super) async fn places_stay(&self) -> OwnedRwLockReadGuard<()> {
        Arc::clone(&self.places).read_owned().await
    }

    /// Entries that show the file may be moved while this is held. It is taken when devices have stopped at both
    /// places; a move that waits for an entry which is on its way elsewhere keeps walks of the same file waiting.
    pub(super) async fn places_move(&self) -> OwnedRwLockWriteGuard<()> {
        Arc::clone(&self.places).write_owned().await
    }

    /// Holds `part`, if nobody does (`trylock_page`).
    pub(super) fn try_hold(self: &Arc<Self>, part: Part, hold: Hold) -> Option<Held> {
        let mut cache = self.lock();
        if cache.held.contains_key(&part) {
            return None;
        }
        cache.held.insert(part, hold);
        Some(Held { backing: Arc::clone(self), part })
    }

    /// Waits until nobody holds `part`, and holds it (`lock_page`).
    pub(super) async fn hold(self: &Arc<Self>, part: Part, hold: Hold) -> Held {
        self.wait_for(|| self.try_hold(part, hold)).await
    }

    /// Waits until `look` finds something, which the end of a hold may bring about.
    pub(super) async fn wait_for<T>(&self, mut look: impl FnMut() -> Option<T>) -> T {
        let mut changed = std::pin::pin!(self.changed.notified());
        loop {
            // Enlisted before it looks: a hold that ends after the look wakes it.
            changed.as_mut().enable();
            if let Some(found) = look() {
                return found;
            }
            changed.as_mut().await;
            changed.set(self.changed.notified());
        }
    }

    /// A page comes into the cache, clean, and onto the active list (`add_to_page_cache_lru`). The caller holds its
    /// index. One that is beyond the end by now, or is there, comes back.
    pub(super) fn insert(
        &self,
        lru: &Lru,
        object: &Arc<Object>,
        index: u64,
        frame: FrameRef,
    ) -> Result<(), FrameRef> {
        let mut cache = self.lock();
        if cache.is_beyond(index) || cache.pages.contains_key(&index) {
            return Err(frame);
        }
        let life = frame.life();
        cache.pages.insert(index, Cached { frame, dirty: false });
        lru.add(life, Owner { object: Arc::clone(object), position: position_of(index) }, List::Active);
        Ok(())
    }

    /// The page's frame is another from now on (`replace_page_cache_page`); what is left over comes back: the
    /// old reference, or the new one where the page has gone.
    pub(super) fn replace(&self, index: u64, life: FrameLife, frame: FrameRef) -> FrameRef {
        match self.lock().get_mut(index).filter(|cached| cached.frame.life() == life) {
            Some(cached) => std::mem::replace(&mut cached.frame, frame),
            None => frame,
        }
    }

    /// The page goes (`delete_from_page_cache`), if its frame is still that one. The caller holds its index.
    pub(super) fn remove(&self, index: u64, life: FrameLife) -> Option<FrameRef> {
        let mut cache = self.lock();
        cache.get(index).filter(|cached| cached.frame.life() == life)?;
        cache.pages.remove(&index).map(|cached| cached.frame)
    }

    /// `set_page_dirty`, if the page's frame is still that one.
    pub(super) fn set_dirty(&self, index: u64, life: FrameLife) {
        if let Some(cached) = self.lock().get_mut(index).filter(|cached| cached.frame.life() == life) {
            cached.dirty = true;
        }
    }

    /// `clear_page_dirty`; whether it was.
    pub(super) fn clear_dirty(&self, index: u64, life: FrameLife) -> bool {
        let mut cache = self.lock();
        let cached = cache.get_mut(index).filter(|cached| cached.frame.life() == life);
        cached.is_some_and(|cached| std::mem::take(&mut cached.dirty))
    }

    /// Whether nothing was ever written to the page, on disk: the file system knows (`SEEK_DATA`). Where it does
    /// not, all of the file up to its end on disk is data.
    pub(super) fn is_hole(&self, index: u64) -> bool {
        let position = position_of(index);
        match rustix::fs::seek(&self.disk, SeekFrom::Data(position)) {
            Ok(data) => data >= position + FRAME_BYTES as u64,
            Err(error) => error == Errno::NXIO,
        }
    }

    /// Reads a page from disk; what is beyond the end is zeros. Called with no lock held.
    pub(super) fn read(&self, index: u64) -> Result<[u8; FRAME_BYTES], MemoryError> {
        let within = self.within(index);
        let mut bytes = [0; FRAME_BYTES];
        let mut done = 0;
        while done < within {
            match self.disk.read_at(&mut bytes[done..within], position_of(index) + done as u64) {
                // The file ends earlier on disk: the rest is a hole.
                Ok(0) => break,
                Ok(read) => done += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed(error)),
            }
        }
        Ok(bytes)
    }

    /// Writes a page to disk, up to the file's end. The caller holds its index, so that the file is not cut
    /// meanwhile. Called with no lock held.
    pub(super) fn write(&self, index: u64, bytes: &[u8; FRAME_BYTES]) -> Result<(), MemoryError> {
        let within = self.within(index);
        self.disk.write_all_at(&bytes[..within], position_of(index)).map_err(failed)
    }

    /// The file ends at `kept` on disk, and is a hole from there to `length`.
    pub(super) fn set_disk_length(&self, kept: u64, length: u64) -> Result<(), MemoryError> {
        self.disk.set_len(kept).and_then(|()| self.disk.set_len(length)).map_err(failed)
    }

    /// How many bytes of a page are within the file.
    fn within(&self, index: u64) -> usize {
        let rest = self.lock().length.saturating_sub(position_of(index));
        usize::try_from(rest).unwrap_or(usize::MAX).min(FRAME_BYTES)
    }

    /// Every page goes: nobody has the file any more (`truncate_inode_pages_final`). Without a proof, for each
    /// mapping that showed a page went with one.
    pub(super) fn forget(&self) {
        let (pages, placeholder) = {
            let mut cache = self.lock();
            (std::mem::take(&mut cache.pages), cache.placeholder.take())
        };
        let dirty = pages.values().filter(|cached| cached.dirty).count();
        if dirty > 0 {
            tracing::warn!(pages = dirty, "a file was dropped before its dirty pages were written back");
        }
        self.frames.put(pages.into_values().map(|cached| cached.frame).chain(placeholder));
    }
}

impl Cache {
    /// Whether the page at `index` begins at the file's end or beyond.
    pub(super) fn is_beyond(&self, index: u64) -> bool {
        position_of(index) >= self.length
    }

    pub(super) fn is_held(&self, index: u64, hold: Hold) -> bool {
        self.held.get(&Part::Page(index)) == Some(&hold)
    }

    pub(super) fn get(&self, index: u64) -> Option<&Cached> {
        self.pages.get(&index)
    }

    pub(super) fn get_mut(&mut self, index: u64) -> Option<&mut Cached> {
        self.pages.get_mut(&index)
    }

    /// Every page, by its index.
    pub(super) fn pages(&self) -> impl Iterator<Item = (u64, &Cached)> {
        self.pages.iter().map(|(index, cached)| (*index, cached))
    }

    /// Takes the pages from `first` on that nobody holds; whether there are others.
    pub(super) fn cut(&mut self, first: u64) -> (Vec<FrameRef>, Left) {
        let all: Vec<u64> = self.pages.range(first..).map(|(index, _)| *index).collect();
        let free = all.iter().filter(|index| !self.held.contains_key(&Part::Page(**index)));
        let free: Vec<u64> = free.copied().collect();
        let left = if free.len() == all.len() { Left::Nothing } else { Left::Held };
        let cut = free.iter().filter_map(|index| self.pages.remove(index));
        (cut.map(|cached| cached.frame).collect(), left)
    }

    /// What holes show; made at its first use.
    pub(super) fn placeholder(&mut self, frames: &FrameStore) -> Result<&FrameRef, FrameError> {
        match &mut self.placeholder {
            Some(frame) => Ok(frame),
            none => Ok(none.insert(frames.take_zeroed()?)),
        }
    }

    /// The placeholder, if there is one yet.
    pub(super) fn placeholder_life(&self) -> Option<FrameLife> {
        self.placeholder.as_ref().map(FrameRef::life)
    }
}

/// Whether a cut left pages behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Left {
    Nothing,
    /// Something is at work on them.
    Held,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.backing.lock().held.remove(&self.part);
        self.backing.changed.notify_waiters();
    }
}

/// The file that a page belongs to, and its index there; none for anonymous memory (`page_mapping`).
pub(super) fn of_page(page: &Isolated) -> Option<(&Arc<Object>, &Arc<Backing>, u64)> {
    let [owner] = page.owners() else { return None };
    Some((&owner.object, owner.object.backing()?, index_of(owner.position)))
}

/// The dirty bit of an entry that goes comes to the page (`set_page_dirty` in `zap_pte_range`). Called under its
/// page-table lock.
pub(super) fn set_page_dirty(vmas: &Vmas, address: u64, life: FrameLife) {
    let Some(vma) = vmas.overlapping(AddrRange::page_of(address, PageSize::BASE)).next() else { return };
    if let Some(backing) = vma.object.backing() {
        backing.set_dirty(index_of(vma.position_of(address)), life);
    }
}

pub(super) fn index_of(position: u64) -> u64 {
    position / FRAME_BYTES as u64
}

pub(super) fn position_of(index: u64) -> u64 {
    index * FRAME_BYTES as u64
}

/// What a failure of the disk is to the caller.
pub(super) fn failed(error: io::Error) -> MemoryError {
    MemoryError::File(Arc::new(error))
}
