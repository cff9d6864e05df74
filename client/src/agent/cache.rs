//! The accelerator's cache of page bytes: a level that remembers what a translation led to, and what was
//! written through it and is not with the host yet.
//!
//! ```text
//!                     write                    clean: its set or the cache is full
//!   absent -- put --> clean ---------> dirty ------------------------------------+
//!     ^                 ^                | take: its page is flushed             v
//!     |                 |                v                              in flight, still here
//!     +-- evicted ------+            in flight                                   |
//!                       +------------------------------- delivered --------------+
//! ```
//!
//! A page is known by its frame as well: one that is reached through another frame than it came from is
//! taken out first, so nothing of an old translation is seen through a new one.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use shootdown_core::FrameNumber;
use tokio::sync::Notify;

use super::tlb::{Key, Reach};
use super::writeback::{Dirty, WriteBack};
use crate::page::PageClient;

/// Least recently used pages go first. One lock, which is taken under that of a set of the TLB and never
/// around one; it is not held across an await, so what must wait is told what for ([`Step::Wait`]).
#[derive(Debug)]
pub(super) struct Cache {
    capacity: usize,
    pub(super) state: Mutex<State>,
    /// The write-backs of a page have ended.
    pub(super) settled: Notify,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pages: HashMap<Key, Page>,
    by_age: BTreeMap<u64, Key>,
    age: u64,
    /// Fetches from the host that go on: whether what they bring is still what is to be remembered.
    fetches: HashMap<u64, (Key, Fetched)>,
    /// Write-backs that are not delivered, those of a page in the order of its writes. Each page that is here
    /// has one task.
    pub(super) in_flight: HashMap<Key, VecDeque<Arc<WriteBack>>>,
    /// Pages whose write-backs want a task.
    pub(super) begun: Vec<Key>,
    /// Pages that were written and cannot be delivered any more.
    pub(super) lost: HashSet<Key>,
    pub(super) counts: WriteBackCounts,
}

/// What became of pages that were written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct WriteBackCounts {
    pub(super) delivered: u64,
    pub(super) lost: u64,
}

#[derive(Debug)]
struct Page {
    bytes: Vec<u8>,
    frame: FrameNumber,
    age: u64,
    dirty: Option<Dirty>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fetched {
    Current,
    /// The page was written meanwhile.
    Stale,
}

/// A page, and where its bytes are for the translation that it is reached through.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) key: Key,
    pub(super) frame: FrameNumber,
}

/// What one look at the cache came to.
#[derive(Debug)]
pub(super) enum Step<T> {
    Done(T),
    /// Fetch the page from the host, and come back with it.
    Miss(Fetch),
    /// Await [`Cache::settled`] of that page, and come back.
    Wait(Key),
    /// What was written to the page cannot be delivered: nobody may see what the host has instead.
    Lost,
}

/// A fetch that goes on.
#[derive(Debug)]
pub(super) struct Fetch {
    cache: Arc<Cache>,
    id: u64,
}

/// What happens to dirty pages that are taken out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    WriteBack,
    /// Their session is gone.
    Lose,
}

impl Cache {
    pub(super) fn new(capacity: usize) -> Arc<Self> {
        Arc::new(Self { capacity, state: Mutex::default(), settled: Notify::new() })
    }

    /// The bytes of `part` of the page.
    pub(super) fn read(self: &Arc<Self>, place: Place, part: Range<usize>) -> Step<Bytes> {
        self.locked(|state| {
            if let Err(step) = state.reach(place) {
                return step;
            }
            match state.touch(place.key) {
                Some(page) => Step::Done(Bytes::copy_from_slice(&page.bytes[part])),
                None => Step::Miss(self.fetch(state, place.key)),
            }
        })
    }

    /// Remembers what was fetched, unless the page was written meanwhile or is there.
    pub(super) fn keep(self: &Arc<Self>, place: Place, fetch: &Fetch, page: &Bytes) -> Step<()> {
        self.locked(|state| {
            let is_current = state.is_current(fetch) && !state.pages.contains_key(&place.key);
            if self.capacity == 0 || !is_current || state.in_flight.contains_key(&place.key) {
                return Step::Done(());
            }
            if let Some(victim) = state.make_room(self.capacity) {
                return Step::Wait(victim);
            }
            state.put(place, page.to_vec());
            Step::Done(())
        })
    }

    /// Writes into the page's copy. A page that is not there is made of `fetched`, or of `bytes` alone where
    /// they are all of it.
    pub(super) fn write(
        self: &Arc<Self>,
        place: Place,
        offset: usize,
        bytes: &[u8],
        fetched: Option<&(Fetch, Bytes)>,
        host: &PageClient,
    ) -> Step<()> {
        self.locked(|state| {
            let reached = state.reach(place);
            let is_whole = bytes.len() as u64 == shootdown_core::PageSize::BASE.bytes();
            match reached {
                Ok(()) => {}
                // Its write-backs are delivered in order: this one will come after them.
                Err(Step::Wait(_)) if is_whole => {}
                Err(step) => return step,
            }
            if !state.pages.contains_key(&place.key) {
                let whole = match fetched {
                    _ if is_whole => bytes.to_vec(),
                    Some((fetch, page)) if state.is_current(fetch) => page.to_vec(),
                    _ => return Step::Miss(self.fetch(state, place.key)),
                };
                if let Some(victim) = state.make_room(self.capacity) {
                    return Step::Wait(victim);
                }
                state.put(place, whole);
            }
            state.make_stale(place.key);
            let page = state.touch(place.key).expect("it is there, or was just put there");
            page.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
            page.dirty.get_or_insert_with(|| Dirty::new(host.clone())).mark(offset, bytes.len());
            Step::Done(())
        })
    }

    /// Begins to write the page back if it is dirty. It stays.
    pub(super) fn clean(self: &Arc<Self>, key: Key) {
        self.locked(|state| state.clean(key));
    }

    /// Drops the page's copy, which is clean, because the page is written beside the cache: before and after,
    /// so that nothing that is fetched meanwhile is kept.
    pub(super) fn drop_page(&self, key: Key) {
        let state = &mut *self.state.lock();
        state.make_stale(key);
        state.remove(key);
    }

    /// Takes out all that is reached, and begins to write back what is dirty of it.
    pub(super) fn take(self: &Arc<Self>, reach: Reach, fate: Fate) {
        self.locked(|state| {
            let reached: Vec<Key> = state.pages.keys().copied().filter(|key| reach.covers(*key)).collect();
            for key in reached {
                if fate == Fate::WriteBack {
                    state.clean(key);
                }
                let dropped = state.remove(key);
                state.counts.lost += u64::from(dropped.is_some_and(|page| page.dirty.is_some()));
            }
        });
    }

    /// Whether the host does not have all that was written to the page.
    pub(super) fn owes(&self, key: Key) -> bool {
        let state = self.state.lock();
        state.in_flight.contains_key(&key) || state.pages.get(&key).is_some_and(|page| page.dirty.is_some())
    }

    pub(super) fn len(&self) -> usize {
        self.state.lock().pages.len()
    }

    pub(super) fn dirty(&self) -> usize {
        self.state.lock().pages.values().filter(|page| page.dirty.is_some()).count()
    }

    fn fetch(self: &Arc<Self>, state: &mut State, key: Key) -> Fetch {
        state.age += 1;
        state.fetches.insert(state.age, (key, Fetched::Current));
        Fetch { cache: Arc::clone(self), id: state.age }
    }
}

impl State {
    /// Prepares an access: what is there afterwards is of the place's frame, and all that the host has not.
    fn reach<T>(&mut self, place: Place) -> Result<(), Step<T>> {
        if self.lost.contains(&place.key) {
            return Err(Step::Lost);
        }
        if self.pages.get(&place.key).is_some_and(|page| page.frame != place.frame) {
            self.clean(place.key);
            self.make_stale(place.key);
            self.remove(place.key);
        }
        match self.in_flight.contains_key(&place.key) && !self.pages.contains_key(&place.key) {
            true => Err(Step::Wait(place.key)),
            false => Ok(()),
        }
    }

    fn touch(&mut self, key: Key) -> Option<&mut Page> {
        let page = self.pages.get_mut(&key)?;
        self.by_age.remove(&page.age);
        self.age += 1;
        page.age = self.age;
        self.by_age.insert(self.age, key);
        Some(page)
    }

    fn put(&mut self, Place { key, frame }: Place, bytes: Vec<u8>) {
        self.age += 1;
        self.by_age.insert(self.age, key);
        let old = self.pages.insert(key, Page { bytes, frame, age: self.age, dirty: None });
        debug_assert!(old.is_none(), "a page is put where none is");
    }

    fn remove(&mut self, key: Key) -> Option<Page> {
        let page = self.pages.remove(&key)?;
        self.by_age.remove(&page.age);
        Some(page)
    }

    /// Evicts the oldest page where there is no room; or says whose write-back must end first.
    fn make_room(&mut self, capacity: usize) -> Option<Key> {
        while self.pages.len() >= capacity {
            let (_, &oldest) = self.by_age.first_key_value()?;
            self.clean(oldest);
            if self.in_flight.contains_key(&oldest) {
                return Some(oldest);
            }
            self.remove(oldest);
        }
        None
    }

    fn clean(&mut self, key: Key) {
        let Some(page) = self.pages.get_mut(&key) else { return };
        let Some(dirty) = page.dirty.take() else { return };
        let write_back = Arc::new(dirty.write_back(page.frame, &page.bytes));
        // A queue that is there has its task, also one that is empty: the task has not looked since.
        let begun = &mut self.begun;
        let queue = self.in_flight.entry(key).or_insert_with(|| {
            begun.push(key);
            VecDeque::new()
        });
        queue.push_back(write_back);
    }

    fn make_stale(&mut self, key: Key) {
        self.fetches.values_mut().filter(|(of, _)| *of == key).for_each(|(_, is)| *is = Fetched::Stale);
    }

    fn is_current(&self, fetch: &Fetch) -> bool {
        self.fetches.get(&fetch.id).is_some_and(|(_, is)| *is == Fetched::Current)
    }

    /// The page's write-backs cannot be delivered, so what was written is lost.
    pub(super) fn lose(&mut self, key: Key) {
        self.in_flight.remove(&key);
        self.remove(key);
        self.lost.insert(key);
        self.counts.lost += 1;
    }
}

impl Drop for Fetch {
    fn drop(&mut self) {
        self.cache.state.lock().fetches.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shootdown_core::{AddrRange, AddressSpaceId};

    fn place(page: u64) -> Place {
        in_frame(page, page)
    }

    fn in_frame(page: u64, frame: u64) -> Place {
        Place { key: Key { address_space: AddressSpaceId::FIRST, page }, frame: FrameNumber(frame) }
    }

    fn fetch(cache: &Arc<Cache>, place: Place) -> Fetch {
        match cache.read(place, 0..1) {
            Step::Miss(fetch) => fetch,
            other => panic!("{other:?}"),
        }
    }

    fn put(cache: &Arc<Cache>, place: Place) {
        let fetch = fetch(cache, place);
        assert!(matches!(cache.keep(place, &fetch, &Bytes::from_static(b"x")), Step::Done(())));
    }

    fn has(cache: &Arc<Cache>, page: u64) -> bool {
        matches!(cache.read(place(page), 0..1), Step::Done(_))
    }

    #[test]
    fn the_page_that_was_not_used_for_longest_goes_first() {
        let cache = Cache::new(2);
        put(&cache, place(1));
        put(&cache, place(2));
        assert!(has(&cache, 1));
        put(&cache, place(3));
        assert_eq!((has(&cache, 1), has(&cache, 2), has(&cache, 3), cache.len()), (true, false, true, 2));
    }

    #[test]
    fn a_flush_drops_what_it_reaches_and_nothing_else() {
        let cache = Cache::new(10);
        for page in 0..6 {
            put(&cache, place(page));
        }
        cache.drop_page(place(0).key);
        let range = AddrRange::new(2 << 12, 4 << 12).unwrap();
        cache.take(Reach::Range(AddressSpaceId::FIRST, range), Fate::WriteBack);
        assert_eq!((0..6).filter(|page| has(&cache, *page)).collect::<Vec<_>>(), [1, 4, 5]);
        cache.take(Reach::All, Fate::WriteBack);
        assert_eq!(cache.len(), 0);
        let state = cache.state.lock();
        assert!(state.by_age.is_empty() && state.fetches.is_empty());
    }

    #[test]
    fn what_was_fetched_beside_a_write_is_not_kept() {
        let cache = Cache::new(10);
        let fetch = fetch(&cache, place(1));
        cache.drop_page(place(1).key);
        assert!(matches!(cache.keep(place(1), &fetch, &Bytes::from_static(b"old")), Step::Done(())));
        assert_eq!(cache.len(), 0);
    }

    #[test]
    fn a_page_is_not_seen_through_another_frame() {
        let cache = Cache::new(10);
        put(&cache, place(1));
        assert!(matches!(cache.read(in_frame(1, 7), 0..1), Step::Miss(_)));
        assert_eq!(cache.len(), 0);
    }
}
