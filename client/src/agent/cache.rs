//! The accelerator's cache of page bytes: a level that remembers what a translation led to.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use parking_lot::Mutex;

use super::tlb::{Key, Reach};

/// Least recently used pages go first. One lock; the TLB in front of it has one a set.
#[derive(Debug)]
pub(super) struct Cache {
    capacity: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    pages: HashMap<Key, (Bytes, u64)>,
    by_age: BTreeMap<u64, Key>,
    age: u64,
}

impl Cache {
    pub(super) fn new(capacity: usize) -> Self {
        Self { capacity, state: Mutex::default() }
    }

    pub(super) fn get(&self, key: Key) -> Option<Bytes> {
        let state = &mut *self.state.lock();
        let (bytes, age) = state.pages.get_mut(&key)?;
        state.by_age.remove(age);
        state.age += 1;
        *age = state.age;
        state.by_age.insert(state.age, key);
        Some(bytes.clone())
    }

    pub(super) fn put(&self, key: Key, bytes: Bytes) {
        if self.capacity == 0 {
            return;
        }
        let state = &mut *self.state.lock();
        state.age += 1;
        let age = state.age;
        if let Some((_, old)) = state.pages.insert(key, (bytes, age)) {
            state.by_age.remove(&old);
        }
        state.by_age.insert(age, key);
        if state.pages.len() > self.capacity
            && let Some((_, oldest)) = state.by_age.pop_first()
        {
            state.pages.remove(&oldest);
        }
    }

    pub(super) fn drop_page(&self, key: Key) {
        let state = &mut *self.state.lock();
        if let Some((_, age)) = state.pages.remove(&key) {
            state.by_age.remove(&age);
        }
    }

    pub(super) fn drop_reached(&self, reach: Reach) {
        let state = &mut *self.state.lock();
        let by_age = &mut state.by_age;
        state.pages.retain(|key, (_, age)| {
            let kept = !reach.covers(*key);
            if !kept {
                by_age.remove(age);
            }
            kept
        });
    }

    pub(super) fn len(&self) -> usize {
        self.state.lock().pages.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shootdown_core::{AddrRange, AddressSpaceId};

    fn key(page: u64) -> Key {
        Key { address_space: AddressSpaceId::FIRST, page }
    }

    #[test]
    fn the_page_that_was_not_used_for_longest_goes_first() {
        let cache = Cache::new(2);
        cache.put(key(1), Bytes::from_static(b"1"));
        cache.put(key(2), Bytes::from_static(b"2"));
        cache.get(key(1)).unwrap();
        cache.put(key(3), Bytes::from_static(b"3"));
        assert_eq!((cache.get(key(1)).is_some(), cache.get(key(2)), cache.len()), (true, None, 2));
    }

    #[test]
    fn a_flush_drops_what_it_reaches_and_nothing_else() {
        let cache = Cache::new(10);
        for page in 0..6 {
            cache.put(key(page), Bytes::from_static(b"x"));
        }
        cache.drop_page(key(0));
        let range = AddrRange::new(2 << 12, 4 << 12).unwrap();
        cache.drop_reached(Reach::Range(AddressSpaceId::FIRST, range));
        assert_eq!((0..6).filter(|page| cache.get(key(*page)).is_some()).collect::<Vec<_>>(), [1, 4, 5]);
        cache.drop_reached(Reach::All);
        assert_eq!(cache.len(), 0);
        assert!(cache.state.lock().by_age.is_empty());
    }
}
