//! The page table and the frames that nobody has.

use std::collections::VecDeque;
use std::io;

use crate::chaos::content::{Content, Frames};

/// Where each page is.
#[derive(Debug)]
pub(super) struct Memory {
    table: Vec<Place>,
    /// In the order in which they were given away.
    free: VecDeque<u64>,
    generation: u64,
}

/// Where a page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    In(Held),
    /// Its entry is cleared.
    Moving,
}

/// A page in a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) page: usize,
    pub(super) frame: u64,
    pub(super) generation: u64,
}

impl Memory {
    /// Every page in a frame, and poison in those that are free.
    pub(super) fn new(frames: &Frames, pages: usize) -> io::Result<Self> {
        let mut memory = Self { table: Vec::new(), free: VecDeque::new(), generation: 0 };
        for page in 0..pages {
            let held = Held { page, frame: page as u64, generation: memory.next_generation() };
            frames.write(held.frame, &Content::new(page, held.generation))?;
            memory.table.push(Place::In(held));
        }
        for frame in pages..2 * pages {
            frames.poison(frame as u64)?;
            memory.free.push_back(frame as u64);
        }
        Ok(memory)
    }

    fn next_generation(&mut self) -> u64 {
        self.generation += 1;
        self.generation
    }

    /// Where a page is, if it is anywhere.
    pub(super) fn find(&self, page: usize) -> Option<Held> {
        match self.table.get(page)? {
            Place::In(held) => Some(*held),
            Place::Moving => None,
        }
    }

    /// Clears the entries of some pages; `None` where one of them is being moved.
    pub(super) fn clear(&mut self, pages: std::ops::Range<usize>) -> Option<Vec<Held>> {
        let held: Option<Vec<Held>> = pages.clone().map(|page| self.find(page)).collect();
        let held = held?;
        self.table[pages].fill(Place::Moving);
        Some(held)
    }

    /// A frame that nobody has, the one that has been free for longest, for a page.
    pub(super) fn take_frame(&mut self, page: usize) -> Option<Held> {
        let frame = self.free.pop_front()?;
        Some(Held { page, frame, generation: self.next_generation() })
    }

    /// Sets an entry.
    pub(super) fn set(&mut self, held: Held) {
        self.table[held.page] = Place::In(held);
    }

    /// Gives a frame away.
    pub(super) fn free(&mut self, frame: u64) {
        self.free.push_back(frame);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_moves_is_nowhere_and_then_elsewhere_in_a_new_generation() {
        let dir = tempfile::tempdir().unwrap();
        let frames = Frames::create(&dir.path().join("frames"), 8).unwrap();
        let mut memory = Memory::new(&frames, 4).unwrap();
        let old = memory.clear(1..3).unwrap();
        assert_eq!(old.len(), 2);
        assert_eq!(memory.find(1), None);
        assert_eq!(memory.clear(2..4), None, "page 2 is being moved");
        assert!(memory.find(3).is_some(), "and page 3 stays");
        let new = memory.take_frame(1).unwrap();
        assert!(new.frame != old[0].frame && new.generation > old[0].generation);
        assert!(frames.read(new.frame).unwrap().is_poison());
        memory.free(old[0].frame);
        memory.set(new);
        assert_eq!(memory.find(1), Some(new));
        assert_eq!(frames.read(0).unwrap().generation(0), Ok(1));
    }
}
