//! The accelerator's TLB: raw frames in sets and ways, and the DMAs that go through them.
//!
//! ```text
//!   fill (under the set's lock, ticket committed there) --> in the set --- begin, DmaGuard dropped ---+
//!                                                            |    ^                                   |
//!                                     flushed, or evicted    |    +-----------------------------------+
//!                                                            v
//!                          DMAs in flight: draining --- last DmaGuard dropped ---> gone
//! ```
//!
//! A write into the device's own copy of a page is a DMA here as well. Where copies are written, an entry is
//! not evicted before what was written through it is with the host ([`NotFilled::Full`]).

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use shootdown_core::mapping::CommitError;
use shootdown_core::{Access, AddrRange, AddressSpaceId, FrameNumber, PageSize, Translation};
use tokio::sync::Notify;

use super::cache::Place;
use crate::ranges::at_most;
use crate::ticket::CommitTicket;
use crate::tlb::Flushed;

/// Ranges a set and address space whose entries were evicted before their bits were asked for.
const EVICTED_RANGES: usize = 16;

/// A page of 4 KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) address_space: AddressSpaceId,
    /// Its address divided by its size.
    pub(super) page: u64,
}

/// What a flush reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    Range(AddressSpaceId, AddrRange),
    All,
}

/// Each set has a lock of its own: fills, DMAs and flushes of different sets do not meet.
#[derive(Debug)]
pub(super) struct Tlb {
    sets: Box<[Set]>,
    ways: usize,
}

#[derive(Debug, Default)]
struct Set {
    state: Mutex<State>,
    /// A draining entry is gone, or a write has ended.
    ended: Notify,
}

#[derive(Debug, Default)]
struct State {
    entries: Vec<Entry>,
    draining: Vec<Entry>,
    evicted: BTreeMap<AddressSpaceId, Flushed>,
    age: u64,
}

#[derive(Debug, Clone)]
struct Entry {
    key: Key,
    /// Tells it from an earlier and a later entry of its page.
    id: u64,
    frame: FrameNumber,
    access: Access,
    last_use: u64,
    young: bool,
    dirty: bool,
    dmas: usize,
    writes: usize,
}

/// Why an entry was not filled.
#[derive(Debug)]
pub(super) enum NotFilled {
    Refused(CommitError),
    /// Each entry of the set was written through, and the host does not have it all. The page of the one that
    /// goes first: write it back, await [`Tlb::unwritten`], and come back.
    Full {
        ticket: Box<CommitTicket>,
        victim: Key,
    },
}

/// Whether the entries of a full set may go as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Evictable {
    Yes,
    /// Their pages are not with the host.
    No,
}

/// A DMA in flight. A flush of its page is not complete before it is dropped.
#[derive(Debug)]
pub(super) struct DmaGuard {
    tlb: Arc<Tlb>,
    key: Key,
    id: u64,
    access: Access,
    pub(super) frame: FrameNumber,
}

impl Key {
    pub(super) fn of(address_space: AddressSpaceId, address: u64) -> Self {
        Self { address_space, page: address / PageSize::BASE.bytes() }
    }

    pub(super) fn range(self) -> AddrRange {
        AddrRange::page_of(self.page * PageSize::BASE.bytes(), PageSize::BASE)
    }
}

impl Reach {
    pub(super) fn covers(self, key: Key) -> bool {
        match self {
            Self::Range(address_space, range) => {
                address_space == key.address_space && range.overlaps(key.range())
            }
            Self::All => true,
        }
    }
}

impl Tlb {
    pub(super) fn new(sets: usize, ways: usize) -> Arc<Self> {
        Arc::new(Self { sets: (0..sets.max(1)).map(|_| Set::default()).collect(), ways: ways.max(1) })
    }

    /// Begins a DMA where the page has an entry that allows it.
    pub(super) fn begin(self: &Arc<Self>, key: Key, access: Access) -> Option<DmaGuard> {
        let state = &mut *self.set_of(key).state.lock();
        let entry = state.entries.iter_mut().find(|entry| entry.key == key && entry.access >= access)?;
        state.age += 1;
        entry.last_use = state.age;
        Some(self.start(entry, access))
    }

    /// Fills an entry with what was granted and begins a DMA through it, all under the lock that a flush
    /// takes: a notice that overtook the grant has spoiled its ticket, or its flush comes after this.
    ///
    /// `evictable` is asked under that lock of a page and of how many writes to it go on.
    pub(super) fn fill(
        self: &Arc<Self>,
        key: Key,
        ticket: CommitTicket,
        access: Access,
        evictable: impl Fn(Key, usize) -> Evictable,
    ) -> Result<DmaGuard, NotFilled> {
        let state = &mut *self.set_of(key).state.lock();
        let age = state.age + 1;
        // Somebody else was faster. What was written through that entry stays reachable through it.
        if let Some(entry) = state.entries.iter_mut().find(|entry| entry.key == key && entry.access >= access)
        {
            entry.last_use = age;
            state.age = age;
            return Ok(self.start(entry, access));
        }
        let is_there = state.entries.iter().any(|entry| entry.key == key);
        let mut evicted = None;
        if !is_there && state.entries.len() >= self.ways {
            let may_go = |entry: &&Entry| evictable(entry.key, entry.writes) == Evictable::Yes;
            let oldest = state.entries.iter().filter(may_go).min_by_key(|entry| entry.last_use);
            let Some(oldest) = oldest else {
                let victim = state.entries.iter().min_by_key(|entry| entry.last_use);
                let victim = victim.expect("a set that is full has an entry").key;
                return Err(NotFilled::Full { ticket: Box::new(ticket), victim });
            };
            evicted = Some(oldest.id);
        }
        let granted = ticket.commit_raw().map_err(NotFilled::Refused)?;
        state.evict(|entry| entry.key == key || Some(entry.id) == evicted);
        let mut entry = state.entry(key, granted);
        let dma = self.start(&mut entry, access);
        state.entries.push(entry);
        Ok(dma)
    }

    fn start(self: &Arc<Self>, entry: &mut Entry, access: Access) -> DmaGuard {
        entry.young = true;
        entry.dmas += 1;
        if access == Access::Write {
            entry.dirty = true;
            entry.writes += 1;
        }
        let Entry { key, id, frame, .. } = *entry;
        DmaGuard { tlb: Arc::clone(self), key, id, access, frame }
    }

    /// Drops every entry that is reached; what was used and written through them. Their DMAs go on.
    ///
    /// `replacement` is committed in the place of its page's entry, if there was one, and under the same lock:
    /// nobody sees the page without an entry, and a later flush finds the new one or has spoiled the ticket.
    pub(super) fn flush(&self, reach: Reach, mut replacement: Option<CommitTicket>) -> Flushed {
        let mut told = Flushed::default();
        for set in self.sets_of(reach) {
            let state = &mut *set.state.lock();
            let taken: Vec<Entry> = state.entries.extract_if(.., |entry| reach.covers(entry.key)).collect();
            for entry in taken {
                entry.tell(&mut told);
                let key = entry.key;
                if entry.dmas > 0 {
                    state.draining.push(entry);
                }
                let replaces = |ticket: &mut CommitTicket| {
                    ticket.address_space() == key.address_space && ticket.range() == key.range()
                };
                // Refused: a later notice has overtaken this one, and the page is dropped.
                if let Some(ticket) = replacement.take_if(replaces)
                    && let Ok(granted) = ticket.commit_raw()
                {
                    let entry = state.entry(key, granted);
                    state.entries.push(entry);
                }
            }
            state.take_evicted(reach, &mut told);
        }
        told
    }

    /// Resolves when no write goes on through the page's entry.
    pub(super) async fn unwritten(&self, key: Key) {
        let writes = |entry: &Entry| entry.key == key && entry.writes > 0;
        self.set_of(key).until(|state| !state.entries.iter().any(writes)).await;
    }

    /// Resolves when no DMA goes through an entry that was dropped and is reached.
    pub(super) async fn drained(&self, reach: Reach) {
        for set in self.sets_of(reach) {
            set.until(|state| !state.draining.iter().any(|entry| reach.covers(entry.key))).await;
        }
    }

    /// What was used since it was last asked; the entries stay.
    pub(super) fn take_young(&self, reach: Reach) -> Vec<AddrRange> {
        let mut young = Vec::new();
        for set in self.sets_of(reach) {
            let state = &mut *set.state.lock();
            for entry in state.entries.iter_mut().filter(|entry| entry.young && reach.covers(entry.key)) {
                // Nobody knows when a DMA in flight touches the page.
                entry.young = entry.dmas > 0;
                young.push(entry.key.range());
            }
            let draining = state.draining.iter().filter(|entry| reach.covers(entry.key));
            young.extend(draining.map(|entry| entry.key.range()));
            for (address_space, evicted) in &mut state.evicted {
                let taken = evicted.young.extract_if(.., |range| match reach {
                    Reach::Range(id, wide) => id == *address_space && wide.overlaps(*range),
                    Reach::All => true,
                });
                young.extend(taken);
            }
        }
        young
    }

    /// Entries in the sets.
    pub(super) fn len(&self) -> usize {
        self.sets.iter().map(|set| set.state.lock().entries.len()).sum()
    }

    /// DMAs in flight.
    pub(super) fn dmas(&self) -> usize {
        let dmas = |entries: &[Entry]| entries.iter().map(|entry| entry.dmas).sum::<usize>();
        let set_dmas = |set: &Set| {
            let state = set.state.lock();
            dmas(&state.entries) + dmas(&state.draining)
        };
        self.sets.iter().map(set_dmas).sum()
    }

    fn set_of(&self, key: Key) -> &Set {
        // Multiplied, so that address spaces do not all begin in the same set.
        let spread = key.page.wrapping_add(key.address_space.get().wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32);
        &self.sets[(spread % self.sets.len() as u64) as usize]
    }

    /// The sets that an entry of `reach` can be in.
    fn sets_of(&self, reach: Reach) -> Vec<&Set> {
        if let Reach::Range(address_space, range) = reach
            && (range.last() - range.start()) / PageSize::BASE.bytes() < self.sets.len() as u64
        {
            // Fewer pages than sets: no two of them are in one set.
            return range
                .pages(PageSize::BASE)
                .map(|address| self.set_of(Key::of(address_space, address)))
                .collect();
        }
        self.sets.iter().collect()
    }
}

impl Set {
    async fn until(&self, reached: impl Fn(&State) -> bool) {
        loop {
            let mut ended = std::pin::pin!(self.ended.notified());
            // Before the look: a DMA that ends between the two is heard.
            ended.as_mut().enable();
            if reached(&self.state.lock()) {
                return;
            }
            ended.await;
        }
    }
}

impl State {
    /// A new entry, not in the set yet.
    fn entry(&mut self, key: Key, granted: Translation) -> Entry {
        self.age += 1;
        // A larger page's frame is that of its first base page.
        let first_page = granted.range.start() / PageSize::BASE.bytes();
        Entry {
            key,
            id: self.age,
            frame: FrameNumber(granted.frame.0 + (key.page - first_page)),
            access: granted.access,
            last_use: self.age,
            young: false,
            dirty: false,
            dmas: 0,
            writes: 0,
        }
    }

    /// Takes entries out without being asked to; their bits are kept until they are.
    fn evict(&mut self, which: impl Fn(&Entry) -> bool) {
        let taken: Vec<Entry> = self.entries.extract_if(.., |entry| which(entry)).collect();
        for entry in taken {
            let evicted = self.evicted.entry(entry.key.address_space).or_default();
            entry.tell(evicted);
            at_most(&mut evicted.young, EVICTED_RANGES);
            at_most(&mut evicted.dirty, EVICTED_RANGES);
            if entry.dmas > 0 {
                self.draining.push(entry);
            }
        }
    }

    fn take_evicted(&mut self, reach: Reach, told: &mut Flushed) {
        self.evicted.retain(|address_space, evicted| {
            let (id, wide) = match reach {
                Reach::Range(id, wide) => (id, wide),
                Reach::All => (*address_space, AddrRange::ALL),
            };
            if id == *address_space {
                told.young.extend(evicted.young.extract_if(.., |range| range.overlaps(wide)));
                told.dirty.extend(evicted.dirty.extract_if(.., |range| range.overlaps(wide)));
            }
            !evicted.young.is_empty() || !evicted.dirty.is_empty()
        });
    }
}

impl Entry {
    fn tell(&self, told: &mut Flushed) {
        if self.young {
            told.young.push(self.key.range());
        }
        if self.dirty {
            told.dirty.push(self.key.range());
        }
    }
}

impl DmaGuard {
    pub(super) fn place(&self) -> Place {
        Place { key: self.key, frame: self.frame }
    }
}

impl Drop for DmaGuard {
    fn drop(&mut self) {
        let set = self.tlb.set_of(self.key);
        let state = &mut *set.state.lock();
        let mine = |entry: &Entry| entry.id == self.id && entry.key == self.key;
        let (access, end) = (self.access, |entry: &mut Entry| entry.dmas -= 1);
        if let Some(entry) = state.entries.iter_mut().find(|entry| mine(entry)) {
            end(entry);
            if access == Access::Write {
                entry.writes -= 1;
                set.ended.notify_waiters();
            }
        } else if let Some(at) = state.draining.iter().position(mine) {
            end(&mut state.draining[at]);
            if state.draining[at].dmas == 0 {
                state.draining.swap_remove(at);
                set.ended.notify_waiters();
            }
        }
    }
}
