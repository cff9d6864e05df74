//! An interval map: which ranges overlap this one?
//!
//! Subscriptions ([2 of 9], [`crate::interest`]), open brackets ([3 of 9], [`crate::gate`]) and the
//! translations that a device holds ([5 of 9], [`crate::mapping`]) all ask this one question.

use crate::range::AddrRange;
use std::cmp::Ordering;
use std::fmt;
use std::mem;
use std::sync::Arc;

/// A persistent map from (range, key) to a value, which finds every entry that overlaps a range.
///
/// A height-balanced (AVL) search tree in the order of (start, last, key), in which each node also
/// knows the highest last address of its subtree: the kernel's `interval_tree_generic.h`, with AVL in
/// the place of red-black. Nodes are shared between versions: an update copies the nodes on one path
/// and leaves the version that it came from as it was, so a publisher that swaps a pointer (SRCU)
/// lets its readers keep the old version for as long as they like.
///
/// The price:
/// * `insert` and `remove` copy O(log n) nodes; `set` and `take` copy only those that another version
///   shares, and change the others in place.
/// * Whether anything overlaps is O(log n). Listing the k entries that do visits the nodes on the way
///   to each: O(log n + k) where they lie side by side, as disjoint ranges do, O(log n + k log(n/k))
///   where long ranges are strewn among short ones.
/// * Height is at most 1.44 log2(n + 2). It is AVL and not a treap with hashed priorities, because
///   that bound holds for every choice of ids and addresses: a device chooses which ranges it
///   subscribes to, so a chance of balance would be a chance that somebody else can spoil.
///
/// A range is a part of the key: two ranges of one subscription that start together are two entries,
/// and neither narrows the other.
pub struct IntervalMap<K, V> {
    root: Link<K, V>,
    len: usize,
}

type Link<K, V> = Option<Arc<Node<K, V>>>;

#[derive(Clone)]
struct Node<K, V> {
    left: Link<K, V>,
    right: Link<K, V>,
    /// The highest last address in the subtree.
    highest: u64,
    /// Nodes on the longest way down, this one included.
    height: u8,
    range: AddrRange,
    key: K,
    value: V,
}

impl<K: Ord + Copy, V: Clone> IntervalMap<K, V> {
    /// The map without an entry.
    #[must_use]
    pub const fn new() -> Self {
        Self { root: None, len: 0 }
    }

    /// How many entries there are.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no entry.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The value of the entry with exactly this range and key. O(log n).
    #[must_use]
    pub fn get(&self, range: AddrRange, key: &K) -> Option<&V> {
        let mut link = &self.root;
        while let Some(node) = link {
            match node.place(range, key) {
                Ordering::Less => link = &node.left,
                Ordering::Greater => link = &node.right,
                Ordering::Equal => return Some(&node.value),
            }
        }
        None
    }

    /// Every entry that shares an address with `range`, in the order of (start, last, key).
    pub fn overlapping(&self, range: AddrRange) -> impl Iterator<Item = (AddrRange, &K, &V)> {
        Overlapping::new(self, range)
    }

    /// Whether an entry shares an address with `range`. O(log n).
    #[must_use]
    pub fn overlaps(&self, range: AddrRange) -> bool {
        self.overlapping(range).next().is_some()
    }

    /// Every entry, in the order of (start, last, key).
    pub fn iter(&self) -> impl Iterator<Item = (AddrRange, &K, &V)> {
        self.overlapping(AddrRange::ALL)
    }

    /// This map with the entry added; one with the same range and key is replaced. Copies O(log n)
    /// nodes, and shares the others with `self`.
    #[must_use = "the map itself does not change"]
    pub fn insert(&self, range: AddrRange, key: K, value: V) -> Self {
        let mut with = self.clone();
        with.set(range, key, value);
        with
    }

    /// This map without the entry of exactly this range and key; `None` if there is none. Copies
    /// O(log n) nodes, and shares the others with `self`.
    #[must_use = "the map itself does not change"]
    pub fn remove(&self, range: AddrRange, key: &K) -> Option<Self> {
        self.get(range, key)?;
        let mut without = self.clone();
        without.take(range, key);
        Some(without)
    }

    /// [`IntervalMap::insert`] for an owner: other versions stay as they are, but a node that no other
    /// version shares is changed in place. Hands back the value that it replaced.
    pub fn set(&mut self, range: AddrRange, key: K, value: V) -> Option<V> {
        let replaced = set(&mut self.root, range, key, value);
        self.len += usize::from(replaced.is_none());
        replaced
    }

    /// [`IntervalMap::remove`] for an owner: other versions stay as they are, but a node that no other
    /// version shares is changed in place. Hands back the value that was there.
    pub fn take(&mut self, range: AddrRange, key: &K) -> Option<V> {
        let taken = take(&mut self.root, range, key);
        self.len -= usize::from(taken.is_some());
        taken
    }
}

fn set<K: Ord + Copy, V: Clone>(link: &mut Link<K, V>, range: AddrRange, key: K, value: V) -> Option<V> {
    let Some(root) = link else {
        let (left, right, highest, height) = (None, None, range.last(), 1);
        *link = Some(Arc::new(Node { left, right, highest, height, range, key, value }));
        return None;
    };
    let node = Arc::make_mut(root);
    let replaced = match node.place(range, &key) {
        Ordering::Less => set(&mut node.left, range, key, value),
        Ordering::Greater => set(&mut node.right, range, key, value),
        Ordering::Equal => return Some(mem::replace(&mut node.value, value)),
    };
    rebalance(root);
    replaced
}

fn take<K: Ord + Copy, V: Clone>(link: &mut Link<K, V>, range: AddrRange, key: &K) -> Option<V> {
    let root = link.as_mut()?;
    let taken = match root.place(range, key) {
        Ordering::Less => take(&mut Arc::make_mut(root).left, range, key)?,
        Ordering::Greater => take(&mut Arc::make_mut(root).right, range, key)?,
        Ordering::Equal => {
            let node = Arc::unwrap_or_clone(link.take()?);
            *link = join(node.left, node.right);
            return Some(node.value);
        }
    };
    rebalance(root);
    Some(taken)
}

/// One tree of two whose heights differ by at most 1, all of `left` before all of `right`.
fn join<K: Ord + Copy, V: Clone>(left: Link<K, V>, mut right: Link<K, V>) -> Link<K, V> {
    let Some(mut root) = take_first(&mut right) else { return left };
    let node = Arc::make_mut(&mut root);
    node.left = left;
    node.right = right;
    rebalance(&mut root);
    Some(root)
}

/// Takes the first node out, with no children.
fn take_first<K: Ord + Copy, V: Clone>(link: &mut Link<K, V>) -> Link<K, V> {
    let root = link.as_mut()?;
    if root.left.is_none() {
        let mut first = link.take()?;
        *link = Arc::make_mut(&mut first).right.take();
        return Some(first);
    }
    let first = take_first(&mut Arc::make_mut(root).left);
    rebalance(root);
    first
}

/// Restores a node's height and highest address, and its balance, after one of its subtrees grew or
/// shrank by one level.
fn rebalance<K: Ord + Copy, V: Clone>(root: &mut Arc<Node<K, V>>) {
    let node = Arc::make_mut(root);
    match (height(&node.left), height(&node.right)) {
        (left, right) if left > right + 1 => {
            if let Some(left) = &mut node.left
                && height(&left.right) > height(&left.left)
            {
                rotate_left(left);
            }
            rotate_right(root);
        }
        (left, right) if right > left + 1 => {
            if let Some(right) = &mut node.right
                && height(&right.left) > height(&right.right)
            {
                rotate_right(right);
            }
            rotate_left(root);
        }
        _ => node.refresh(),
    }
}

/// The left child becomes the root.
fn rotate_right<K: Ord + Copy, V: Clone>(root: &mut Arc<Node<K, V>>) {
    let node = Arc::make_mut(root);
    let mut risen = node.left.take().expect("the heavy side of a node is not empty");
    node.left = Arc::make_mut(&mut risen).right.take();
    node.refresh();
    let sunk = mem::replace(root, risen);
    let node = Arc::make_mut(root);
    node.right = Some(sunk);
    node.refresh();
}

/// The right child becomes the root.
fn rotate_left<K: Ord + Copy, V: Clone>(root: &mut Arc<Node<K, V>>) {
    let node = Arc::make_mut(root);
    let mut risen = node.right.take().expect("the heavy side of a node is not empty");
    node.right = Arc::make_mut(&mut risen).left.take();
    node.refresh();
    let sunk = mem::replace(root, risen);
    let node = Arc::make_mut(root);
    node.left = Some(sunk);
    node.refresh();
}

fn height<K, V>(link: &Link<K, V>) -> u8 {
    link.as_ref().map_or(0, |node| node.height)
}

impl<K: Ord, V> Node<K, V> {
    /// Where an entry belongs, seen from this node.
    fn place(&self, range: AddrRange, key: &K) -> Ordering {
        (range, key).cmp(&(self.range, &self.key))
    }

    fn refresh(&mut self) {
        self.height = 1 + height(&self.left).max(height(&self.right));
        let below = [&self.left, &self.right].into_iter().flatten().map(|child| child.highest);
        self.highest = below.fold(self.range.last(), u64::max);
    }
}

/// Walks in order, past the subtrees that end before the range and the nodes that start after it.
struct Overlapping<'a, K, V> {
    range: AddrRange,
    /// Nodes whose left side is done, the next one on top.
    due: Vec<&'a Node<K, V>>,
    #[cfg(test)]
    visited: usize,
}

impl<'a, K, V> Overlapping<'a, K, V> {
    fn new(map: &'a IntervalMap<K, V>, range: AddrRange) -> Self {
        let mut walk = Self {
            range,
            due: Vec::with_capacity(usize::from(height(&map.root))),
            #[cfg(test)]
            visited: 0,
        };
        walk.descend(&map.root);
        walk
    }

    fn descend(&mut self, mut link: &'a Link<K, V>) {
        while let Some(node) = link {
            #[cfg(test)]
            {
                self.visited += 1;
            }
            if node.highest < self.range.start() {
                return;
            }
            // A node past the range hides all to its right, but not what is to its left.
            if node.range.start() <= self.range.last() {
                self.due.push(node);
            }
            link = &node.left;
        }
    }
}

impl<'a, K, V> Iterator for Overlapping<'a, K, V> {
    type Item = (AddrRange, &'a K, &'a V);

    fn next(&mut self) -> Option<Self::Item> {
        while let Some(node) = self.due.pop() {
            self.descend(&node.right);
            if node.range.overlaps(self.range) {
                return Some((node.range, &node.key, &node.value));
            }
        }
        None
    }
}

impl<K, V> Clone for IntervalMap<K, V> {
    /// O(1): the two share every node until one of them changes.
    fn clone(&self) -> Self {
        Self { root: self.root.clone(), len: self.len }
    }
}

impl<K, V> Default for IntervalMap<K, V> {
    fn default() -> Self {
        Self { root: None, len: 0 }
    }
}

impl<K: fmt::Debug, V: fmt::Debug> fmt::Debug for IntervalMap<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(Overlapping::new(self, AddrRange::ALL)).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    type Map = IntervalMap<u8, u32>;
    type Entry = (AddrRange, u8, u32);

    /// The first address of page `page`; those from 32 on lie at the top of the address space.
    fn page(page: u64) -> u64 {
        if page < 32 { page << 12 } else { page.wrapping_sub(64) << 12 }
    }

    fn any_range() -> impl Strategy<Value = AddrRange> {
        let range = (0..64_u64, 0..64_u64).prop_map(|(a, b)| {
            let last = page(a.max(b)) | 0xfff;
            AddrRange::new(page(a.min(b)), last.wrapping_add(1)).unwrap_or(AddrRange::ALL)
        });
        let byte = (0..4_u64).prop_map(|at| AddrRange::new(at, at + 1).expect("not empty"));
        let top = (0..4_u64).prop_map(|at| {
            AddrRange::new(u64::MAX - at, (u64::MAX - at).wrapping_add(1)).expect("not empty")
        });
        prop_oneof![20 => range, 2 => byte, 2 => top, 1 => Just(AddrRange::ALL)]
    }

    #[derive(Clone, Debug)]
    enum Step {
        Insert(AddrRange, u8, u32),
        /// The entry at this place, modulo the number of entries.
        Remove(usize),
        RemoveMissing(AddrRange, u8),
        Lookup(AddrRange),
    }

    fn any_step() -> impl Strategy<Value = Step> {
        prop_oneof![
            5 => (any_range(), 0..6_u8, any::<u32>()).prop_map(|(range, key, value)| Step::Insert(range, key, value)),
            3 => any::<usize>().prop_map(Step::Remove),
            1 => (any_range(), 0..6_u8).prop_map(|(range, key)| Step::RemoveMissing(range, key)),
            3 => any_range().prop_map(Step::Lookup),
        ]
    }

    fn entries(map: &Map) -> Vec<Entry> {
        map.iter().map(|(range, key, value)| (range, *key, *value)).collect()
    }

    /// Checks order, balance, heights and highest addresses; how many nodes there are.
    fn check<V>(link: &Link<u8, V>) -> usize {
        let Some(node) = link else { return 0 };
        let below = [&node.left, &node.right];
        assert!(height(below[0]).abs_diff(height(below[1])) <= 1, "balanced");
        assert_eq!(node.height, 1 + height(below[0]).max(height(below[1])));
        let highest = below.iter().filter_map(|link| link.as_ref()).map(|child| child.highest).max();
        assert_eq!(node.highest, node.range.last().max(highest.unwrap_or(0)), "augmented");
        1 + check(below[0]) + check(below[1])
    }

    fn height_bound(len: usize) -> f64 {
        1.4405 * (len as f64 + 2.0).log2()
    }

    proptest! {
        #[test]
        fn every_version_answers_as_a_list_that_is_scanned(steps in prop::collection::vec(any_step(), 0..200)) {
            let mut versions: Vec<(Map, Vec<Entry>)> = vec![(Map::new(), Vec::new())];
            let mut owned = Map::new();
            for step in steps {
                let (mut map, mut list) = versions.last().cloned().unwrap();
                match step {
                    Step::Insert(range, key, value) => {
                        map = map.insert(range, key, value);
                        let known = list.iter().position(|(r, k, _)| (*r, *k) == (range, key));
                        let replaced = known.map(|at| list.swap_remove(at).2);
                        prop_assert_eq!(owned.set(range, key, value), replaced);
                        list.push((range, key, value));
                        list.sort();
                    }
                    Step::Remove(at) if !list.is_empty() => {
                        let (range, key, value) = list.remove(at % list.len());
                        prop_assert_eq!(map.get(range, &key), Some(&value));
                        map = map.remove(range, &key).unwrap();
                        prop_assert_eq!(owned.take(range, &key), Some(value));
                    }
                    Step::Remove(_) => prop_assert!(map.is_empty()),
                    Step::RemoveMissing(range, key) => {
                        if !list.iter().any(|(r, k, _)| (*r, *k) == (range, key)) {
                            prop_assert!(map.remove(range, &key).is_none());
                            prop_assert_eq!(owned.take(range, &key), None);
                        }
                    }
                    Step::Lookup(range) => {
                        let found: Vec<Entry> = map.overlapping(range).map(|(r, k, v)| (r, *k, *v)).collect();
                        let scanned: Vec<Entry> = list.iter().filter(|(r, ..)| r.overlaps(range)).copied().collect();
                        prop_assert_eq!(map.overlaps(range), !scanned.is_empty());
                        prop_assert_eq!(found, scanned);
                    }
                }
                prop_assert_eq!(check(&map.root), list.len());
                prop_assert_eq!(check(&owned.root), list.len());
                prop_assert_eq!((map.len(), owned.len()), (list.len(), list.len()));
                prop_assert!(f64::from(height(&map.root)) <= height_bound(list.len()));
                prop_assert_eq!(entries(&owned), entries(&map));
                versions.push((map, list));
            }
            for (map, list) in &versions {
                prop_assert_eq!(&entries(map), list, "an older version changed");
            }
        }
    }

    const MANY: u64 = 100_000;

    /// MANY disjoint ranges, four pages apart, each `pages` long.
    fn many(pages: u64) -> IntervalMap<u8, ()> {
        let mut map = IntervalMap::new();
        for index in 0..MANY {
            let start = index << 14;
            map.set(AddrRange::new(start, start + (pages << 12)).unwrap(), 0, ());
        }
        map
    }

    /// Nodes visited, and entries found.
    fn walk<K, V>(map: &IntervalMap<K, V>, range: AddrRange) -> (usize, usize) {
        let mut walk = Overlapping::new(map, range);
        let found = walk.by_ref().count();
        (walk.visited, found)
    }

    #[test]
    fn among_a_hundred_thousand_ranges_a_lookup_visits_a_path_and_what_it_finds() {
        let map = many(2);
        assert_eq!(check(&map.root), MANY as usize);
        let path = usize::from(height(&map.root));
        assert!((path as f64) <= height_bound(MANY as usize));
        for first in (0..MANY - 1_000).step_by(997) {
            for expected in [0, 1, 10, 1_000] {
                let start = (first << 14) + 0x2000;
                let range = AddrRange::new(start, start + 0x1000 + (expected << 14)).unwrap();
                let (visited, found) = walk(&map, range);
                assert_eq!(found as u64, expected);
                assert!(visited <= 4 * path + 2 * found, "{visited} nodes visited for {found} of {MANY}");
            }
        }
    }

    #[test]
    fn a_lookup_past_every_range_visits_one_node() {
        let map = many(1);
        assert_eq!(walk(&map, AddrRange::new(MANY << 14, 0).unwrap()), (1, 0));
    }

    #[test]
    fn long_ranges_strewn_among_short_ones_cost_a_path_each_and_no_more() {
        let mut map = many(1);
        let long = 32;
        for index in 0..long {
            let start = (index * (MANY / long)) << 14;
            map.set(AddrRange::new(start + 0x1000, 0).unwrap(), 1, ());
        }
        let (visited, found) = walk(&map, AddrRange::new(u64::MAX - 4095, 0).unwrap());
        assert_eq!(found as u64, long);
        let path = usize::from(height(&map.root));
        assert!(visited <= (found + 2) * 2 * path, "{visited} nodes visited for {found} of {}", map.len());
    }

    #[test]
    fn whether_anything_overlaps_visits_paths_only_even_where_everything_does() {
        let map = many(4);
        let mut first = Overlapping::new(&map, AddrRange::ALL);
        assert!(first.next().is_some());
        assert!(first.visited <= 2 * usize::from(height(&map.root)));
    }

    fn nodes<K, V>(link: &Link<K, V>, into: &mut HashSet<*const Node<K, V>>) {
        let Some(node) = link else { return };
        into.insert(Arc::as_ptr(node));
        nodes(&node.left, into);
        nodes(&node.right, into);
    }

    fn nodes_of<K, V>(map: &IntervalMap<K, V>) -> HashSet<*const Node<K, V>> {
        let mut found = HashSet::new();
        nodes(&map.root, &mut found);
        found
    }

    #[test]
    fn an_update_copies_a_path_and_shares_the_rest() {
        let mut map: IntervalMap<u8, ()> = IntervalMap::new();
        for index in 0..2_000_u64 {
            map.set(AddrRange::new(index << 12, (index + 1) << 12).unwrap(), 0, ());
        }
        let old = nodes_of(&map);
        let copied = |new: &IntervalMap<u8, ()>| nodes_of(new).difference(&old).count();
        let most = 3 * usize::from(height(&map.root));
        for index in (0..2_000_u64).step_by(37) {
            let range = AddrRange::new(index << 12, (index + 1) << 12).unwrap();
            assert!(copied(&map.insert(range, 1, ())) <= most);
            assert!(copied(&map.remove(range, &0).unwrap()) <= most);
        }
        assert_eq!(map.len(), 2_000);
    }

    #[test]
    fn an_owner_updates_in_place_what_nobody_shares() {
        let mut map: IntervalMap<u8, ()> = IntervalMap::new();
        for index in 0..100_u64 {
            map.set(AddrRange::new(index << 12, (index + 1) << 12).unwrap(), 0, ());
        }
        let old = nodes_of(&map);
        map.set(AddrRange::ALL, 9, ());
        assert_eq!(nodes_of(&map).difference(&old).count(), 1, "only the new node is new");
    }

    #[test]
    fn two_ranges_that_start_together_are_two_entries_even_of_one_key() {
        let (short, long) = (AddrRange::new(0, 0x1000).unwrap(), AddrRange::new(0, 0x9000).unwrap());
        let map = Map::new().insert(long, 1, 10).insert(short, 1, 20);
        assert_eq!(entries(&map), [(short, 1, 20), (long, 1, 10)]);
        assert!(map.overlaps(AddrRange::new(0x8000, 0x9000).unwrap()), "the short one narrows nothing");
    }

    #[test]
    fn the_last_page_of_the_address_space_is_found() {
        let top = AddrRange::new(u64::MAX - 4095, 0).unwrap();
        let map = Map::new().insert(top, 1, 0).insert(AddrRange::ALL, 2, 0);
        assert_eq!(map.overlapping(top).count(), 2);
        assert_eq!(map.overlapping(AddrRange::new(0, u64::MAX - 4095).unwrap()).count(), 1);
    }

    #[test]
    fn readers_on_other_threads_may_keep_an_old_version() {
        fn shared<T: Send + Sync + 'static>(_: &T) {}
        let map = Map::new().insert(AddrRange::ALL, 1, 1);
        shared(&map);
        let reader = std::thread::spawn({
            let old = map.clone();
            move || entries(&old)
        });
        let newer = map.remove(AddrRange::ALL, &1).unwrap();
        assert_eq!(reader.join().unwrap(), [(AddrRange::ALL, 1, 1)]);
        assert!(newer.is_empty());
    }
}
