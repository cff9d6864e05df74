//! What a device has written: to each of its pages one write at a time, each with a later version.

use std::collections::{HashMap, HashSet};

use parking_lot::Mutex;

use crate::check::history::PageName;
use crate::check::layout::Layout;
use crate::check::lost::Mark;
use crate::check::stamp::{Stamp, Writer};

/// The writes of a device.
#[derive(Debug)]
pub(super) struct Writes {
    anonymous: Vec<usize>,
    all: Vec<usize>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    version: u64,
    under_way: HashSet<PageName>,
    last: HashMap<PageName, Mark>,
}

/// A write that is under way. Dropped, it may have happened, or not.
#[derive(Debug)]
pub(super) struct Write<'a> {
    writes: &'a Writes,
    page: PageName,
    version: u64,
}

impl Writes {
    pub(super) fn new(layout: &Layout, device: usize) -> Self {
        let all = layout.scratch_of(device);
        let anonymous = all.iter().copied().filter(|page| !layout.is_file(*page)).collect();
        Self { anonymous, all, state: Mutex::default() }
    }

    /// The pages of this device, those of the file only `with_file`.
    pub(super) fn pages(&self, with_file: bool) -> &[usize] {
        if with_file { &self.all } else { &self.anonymous }
    }

    /// `None`: a write to the page is under way.
    pub(super) fn try_begin(&self, page: PageName) -> Option<Write<'_>> {
        let mut state = self.state.lock();
        if !state.under_way.insert(page) {
            return None;
        }
        state.version += 1;
        Some(Write { writes: self, page, version: state.version })
    }

    /// The last write to a page that has returned.
    pub(super) fn last(&self, page: PageName) -> Option<Mark> {
        self.state.lock().last.get(&page).copied()
    }
}

impl Write<'_> {
    pub(super) fn stamp(&self, address_space: u64, address: u64) -> Stamp {
        Stamp { writer: Writer::Device, address_space, address, version: self.version }
    }

    /// It has returned.
    pub(super) fn done(self, mark: Mark) {
        self.writes.state.lock().last.insert(self.page, mark);
    }
}

impl Drop for Write<'_> {
    fn drop(&mut self) {
        self.writes.state.lock().under_way.remove(&self.page);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: PageName = PageName { slot: 0, page: 7 };

    #[test]
    fn one_write_at_a_time_and_only_one_that_returned_is_the_last() {
        let writes = Writes::new(&Layout::new(1, 4, 1, 1), 0);
        let first = writes.try_begin(PAGE).unwrap();
        assert!(writes.try_begin(PAGE).is_none());
        let mark = Mark { address_space: 1, zaps: 0, version: first.stamp(1, 0).version };
        first.done(mark);
        let second = writes.try_begin(PAGE).unwrap();
        assert!(second.stamp(1, 0).version > mark.version);
        drop(second);
        assert_eq!(writes.last(PAGE), Some(mark));
        assert!(writes.try_begin(PAGE).is_some());
    }
}
