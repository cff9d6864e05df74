//! Which pages are used and which are not: the two LRU lists of reclaim, and what a page belongs to.
//!
//! ```text
//!             fault                       not used                      not used
//!   (nothing) -----> active (new first) ------------> inactive --------------------> isolated: taken out
//!                        ^                                |                              |
//!                        +----------- used ---------------+------- could not be ---------+
//! ```
//!
//! A page that is *isolated* is on no list and has one holder, an [`Isolated`]: reclaim, migration, write-back,
//! merging and collapse exclude one another by it (`isolate_lru_page`). Faults, forks and unmaps are not
//! excluded; who holds the page finds out by its references.
//!
//! Frames that were freed stay on the lists until they are met: a life that is over is known by its
//! generation.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use parking_lot::Mutex;
use shootdown_core::FrameNumber;

use super::frame::{FrameLife, FrameRef, FrameStore};
use super::object::Object;

/// The lists. The lock (`lru_lock`) is taken under a page-table lock, and only the frame store's under it.
#[derive(Debug)]
pub(super) struct Lru {
    frames: Arc<FrameStore>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    pages: HashMap<FrameLife, Page>,
    /// The page that came last is at the back. A turn that is not its page's last is out of date.
    active: VecDeque<Turn>,
    inactive: VecDeque<Turn>,
    last_turn: u64,
}

/// A page's place in a list.
#[derive(Debug, Clone, Copy)]
struct Turn {
    life: FrameLife,
    number: u64,
}

/// What is known of a page beside its bytes (`struct page`).
#[derive(Debug)]
struct Page {
    owners: Vec<Owner>,
    place: Place,
    turn: u64,
}

/// What a page belongs to: where its mappings are looked for. A page that was merged has several.
#[derive(Debug, Clone)]
pub(super) struct Owner {
    pub(super) object: Arc<Object>,
    /// Its first byte in the object.
    pub(super) position: u64,
}

/// Where a page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    On(List),
    Isolated,
}

/// One of the two lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum List {
    Active,
    Inactive,
}

/// How many pages are on each list, and on none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Counts {
    pub(super) active: usize,
    pub(super) inactive: usize,
    pub(super) isolated: usize,
}

/// A page that its holder has to itself, with a reference of its own. Dropped, it goes back to its list.
#[derive(Debug)]
pub(super) struct Isolated {
    lru: Arc<Lru>,
    pin: Option<FrameRef>,
    owners: Vec<Owner>,
    /// Where it goes when it is put back.
    pub(super) back_to: List,
}

impl Owner {
    fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.object, &other.object) && self.position == other.position
    }
}

impl Lru {
    pub(super) fn new(frames: Arc<FrameStore>) -> Arc<Self> {
        Arc::new(Self { frames, state: Mutex::default() })
    }

    /// A page is mapped for the first time (`lru_cache_add`).
    pub(super) fn add(&self, life: FrameLife, owner: Owner, list: List) {
        self.state.lock().put(life, vec![owner], list, &self.frames);
    }

    /// Whether more pages are on the active list than on the inactive one (`inactive_is_low`). Turns that are out
    /// of date count: they go as the list is looked through.
    pub(super) fn inactive_is_low(&self) -> bool {
        let state = self.state.lock();
        state.inactive.len() < state.active.len()
    }

    /// How many pages are on the lists, or more: turns that are out of date count.
    pub(super) fn turns(&self) -> usize {
        self.state.lock().turns()
    }

    /// Takes up to `most` of the pages that were longest on a list, for its holder alone.
    pub(super) fn isolate_oldest(self: &Arc<Self>, list: List, most: usize) -> Vec<Isolated> {
        let mut taken = Vec::new();
        let state = &mut *self.state.lock();
        while taken.len() < most {
            let Some(turn) = state.list(list).pop_front() else { break };
            if !state.is_current(list, turn) {
                continue;
            }
            match self.pin(state, turn.life) {
                Some(isolated) => taken.push(isolated),
                None => drop(state.pages.remove(&turn.life)),
            }
        }
        taken
    }

    /// Takes one page; `None` where another holds it, or it is not on a list.
    pub(super) fn isolate(self: &Arc<Self>, life: FrameLife) -> Option<Isolated> {
        let state = &mut *self.state.lock();
        match state.pages.get(&life)?.place {
            Place::On(_) => self.pin(state, life),
            Place::Isolated => None,
        }
    }

    fn pin(self: &Arc<Self>, state: &mut State, life: FrameLife) -> Option<Isolated> {
        let pin = self.frames.pin(life)?;
        let page = state.pages.get_mut(&life)?;
        let back_to = match page.place {
            Place::On(list) => list,
            Place::Isolated => List::Inactive,
        };
        page.place = Place::Isolated;
        Some(Isolated { lru: Arc::clone(self), pin: Some(pin), owners: page.owners.clone(), back_to })
    }

    pub(super) fn counts(&self) -> Counts {
        let state = &mut *self.state.lock();
        state.sweep(&self.frames);
        let count = |place| state.pages.values().filter(|page| page.place == place).count();
        Counts {
            active: count(Place::On(List::Active)),
            inactive: count(Place::On(List::Inactive)),
            isolated: count(Place::Isolated),
        }
    }
}

/// Owners of a merged page before those are looked for that have gone.
const MOST_OWNERS: usize = 32;

/// Entries of the lists that may be out of date, beside as many as there are frames, before they are looked
/// through.
const SLACK: usize = 64;

impl State {
    fn list(&mut self, list: List) -> &mut VecDeque<Turn> {
        match list {
            List::Active => &mut self.active,
            List::Inactive => &mut self.inactive,
        }
    }

    fn turns(&self) -> usize {
        self.active.len() + self.inactive.len()
    }

    /// A page comes to the end of a list.
    fn put(&mut self, life: FrameLife, owners: Vec<Owner>, list: List, frames: &FrameStore) {
        self.last_turn += 1;
        let number = self.last_turn;
        self.pages.insert(life, Page { owners, place: Place::On(list), turn: number });
        self.list(list).push_back(Turn { life, number });
        // Each frame in use is a page at most. What is more than that was freed, or has a later turn.
        if self.turns() > 2 * frames.in_use() + SLACK {
            self.sweep(frames);
        }
    }

    fn is_current(&self, list: List, turn: Turn) -> bool {
        let page = self.pages.get(&turn.life);
        page.is_some_and(|page| page.place == Place::On(list) && page.turn == turn.number)
    }

    /// Forgets the frames that were freed.
    fn sweep(&mut self, frames: &FrameStore) {
        // One that is isolated has a reference, and its holder puts it back.
        self.pages.retain(|life, page| page.place == Place::Isolated || frames.lives(*life));
        for list in [List::Active, List::Inactive] {
            let mut kept = std::mem::take(self.list(list));
            kept.retain(|turn| self.is_current(list, *turn));
            *self.list(list) = kept;
        }
    }
}

impl Isolated {
    pub(super) fn life(&self) -> FrameLife {
        self.pin().life()
    }

    pub(super) fn number(&self) -> FrameNumber {
        self.pin().number()
    }

    /// The holder's own reference.
    pub(super) fn pin(&self) -> &FrameRef {
        self.pin.as_ref().expect("it is given back when the page is")
    }

    pub(super) fn owners(&self) -> &[Owner] {
        &self.owners
    }

    /// The page belongs to another object too: it was merged. Once for each place of an object, or a walk
    /// would come to the place twice.
    pub(super) fn add_owner(&mut self, owner: Owner) {
        if self.owners.len() >= MOST_OWNERS {
            // Objects that nothing shows any more: without them the page is at worst not reclaimed.
            self.owners.retain(|owner| owner.object.is_shown());
        }
        if !self.owners.iter().any(|known| known.is(&owner)) {
            self.owners.push(owner);
        }
    }

    /// References to the frame, this one among them, that are not of page table entries: the page cache
    /// has one.
    pub(super) fn own_references(&self) -> u32 {
        1 + u32::from(self.owners.iter().any(|owner| owner.object.backing().is_some()))
    }

    /// To the new end of a list (`putback_lru_page`).
    pub(super) fn put_back(mut self, to: List) {
        self.back_to = to;
    }

    /// Another frame takes this one's place, on this one's list and with its owners.
    pub(super) fn replaced_by(&self, life: FrameLife) {
        self.lru.state.lock().put(life, self.owners.clone(), self.back_to, &self.lru.frames);
    }
}

impl Drop for Isolated {
    /// `putback_lru_page`. The reference goes without a proof: a page that a device may use has, beside this
    /// one, the reference of an entry, of a gather, or of the quarantine.
    fn drop(&mut self) {
        let Some(pin) = self.pin.take() else { return };
        let (life, owners, frames) = (pin.life(), std::mem::take(&mut self.owners), &self.lru.frames);
        {
            let state = &mut *self.lru.state.lock();
            if frames.is_only_reference(&pin) {
                // It is freed below, and has no place on a list.
                state.pages.remove(&life);
            } else {
                state.put(life, owners, self.back_to, frames);
            }
        }
        frames.put([pin]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(lru: &Lru, list: List) -> FrameRef {
        let frame = lru.frames.take_zeroed().unwrap();
        lru.add(frame.life(), Owner { object: Object::anonymous(), position: 0 }, list);
        frame
    }

    #[test]
    fn the_lists_do_not_grow_with_pages_that_come_and_go() {
        let lru = Lru::new(FrameStore::new(4).unwrap());
        let stays = page(&lru, List::Inactive);
        for _ in 0..1000 {
            let frame = page(&lru, List::Active);
            lru.frames.put([frame]);
            drop(lru.isolate(stays.life()));
        }
        assert!(lru.turns() <= 4 + SLACK && lru.state.lock().pages.len() <= 4 + SLACK);
        assert_eq!(lru.counts(), Counts { active: 0, inactive: 1, isolated: 0 });
        lru.frames.put([stays]);
    }

    #[test]
    fn a_page_that_its_holder_was_the_last_to_know_is_on_no_list_and_freed() {
        let lru = Lru::new(FrameStore::new(4).unwrap());
        let frame = page(&lru, List::Active);
        let isolated = lru.isolate(frame.life()).unwrap();
        assert!(lru.isolate(frame.life()).is_none(), "it has one holder");
        lru.frames.put([frame]);
        drop(isolated);
        assert_eq!((lru.state.lock().pages.len(), lru.frames.in_use()), (0, 0));
    }

    #[test]
    fn a_page_that_is_merged_for_ever_does_not_remember_what_nothing_shows_any_more() {
        let lru = Lru::new(FrameStore::new(4).unwrap());
        let frame = page(&lru, List::Active);
        let mut isolated = lru.isolate(frame.life()).unwrap();
        for position in 0..1000 {
            isolated.add_owner(Owner { object: Object::anonymous(), position });
        }
        assert!(isolated.owners().len() <= MOST_OWNERS);
        drop(isolated);
        lru.frames.put([frame]);
    }
}
