//! What a frame holds: whose page it is, in its first and last block, and between them a counter for each
//! worker of each device.
//!
//! ```text
//!   0          64                                               4032       4096
//!   +----------+------------------------------------------------+----------+
//!   |  stamp   |  counter of slot 0, slot 1, …  (8 bytes each)  |  stamp   |
//!   +----------+------------------------------------------------+----------+
//! ```
//!
//! The stamp's version is the generation: each time that a page comes to a frame it is a new one. A frame
//! that was given away is poison from end to end until it is used again.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use shootdown_server::source::memory::POISON;

use crate::check::stamp::{BLOCK_BYTES, Block, PAGE_BYTES, Stamp, Writer};

/// Where the pages are, for people who read a log.
const REGION: u64 = 0x10_0000_0000;

/// Counters of a page.
pub(crate) const MOST_SLOTS: usize = (PAGE_BYTES - 2 * BLOCK_BYTES) / 8;

/// The first address of a page.
pub(crate) const fn address_of(page: usize) -> u64 {
    REGION + (page * PAGE_BYTES) as u64
}

/// Which page an address is in.
pub(crate) fn page_of(address: u64) -> Option<usize> {
    usize::try_from(address.checked_sub(REGION)? / PAGE_BYTES as u64).ok()
}

/// The bytes of one frame.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Content(Vec<u8>);

impl Content {
    /// A page that nobody wrote to.
    pub(crate) fn new(page: usize, generation: u64) -> Self {
        let mut content = Self(vec![0; PAGE_BYTES]);
        content.stamp(page, generation);
        content
    }

    /// Makes it the content of `page`; counters stay.
    pub(crate) fn stamp(&mut self, page: usize, generation: u64) {
        let stamp =
            Stamp { writer: Writer::Cpu, address_space: 1, address: address_of(page), version: generation };
        let block = &stamp.to_page()[..BLOCK_BYTES];
        self.0[..BLOCK_BYTES].copy_from_slice(block);
        self.0[PAGE_BYTES - BLOCK_BYTES..].copy_from_slice(block);
    }

    /// The generation, if this is a content of `page`; else what it is instead.
    pub(crate) fn generation(&self, page: usize) -> Result<u64, String> {
        let of = |bytes| Block::read(bytes);
        let (first, last) = (of(&self.0[..BLOCK_BYTES]), of(&self.0[PAGE_BYTES - BLOCK_BYTES..]));
        match first {
            Block::Stamp(stamp) if first == last && stamp.address == address_of(page) => Ok(stamp.version),
            Block::Stamp(stamp) if first == last => {
                let other =
                    page_of(stamp.address).map_or_else(|| "no page".to_owned(), |page| page.to_string());
                Err(format!("page {other}, generation {}", stamp.version))
            }
            Block::Poison if first == last => Err("a frame that was given away".to_owned()),
            _ => Err("half of one page and half of another".to_owned()),
        }
    }

    /// What a slot has counted.
    pub(crate) fn counter(&self, slot: usize) -> u64 {
        let at = BLOCK_BYTES + 8 * slot;
        self.0[at..at + 8].try_into().map_or(0, u64::from_le_bytes)
    }

    /// Whether nobody has written to it since it was given away.
    pub(crate) fn is_poison(&self) -> bool {
        self.0.iter().all(|byte| *byte == POISON)
    }
}

impl std::fmt::Debug for Content {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Content").field(&Block::of_page(&self.0)).finish()
    }
}

/// The file of the frames.
#[derive(Debug)]
pub(crate) struct Frames(File);

impl Frames {
    pub(crate) fn create(path: &Path, frames: usize) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
        file.set_len((frames * PAGE_BYTES) as u64)?;
        Ok(Self(file))
    }

    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        OpenOptions::new().read(true).write(true).open(path).map(Self)
    }

    pub(crate) fn read(&self, frame: u64) -> io::Result<Content> {
        let mut bytes = vec![0; PAGE_BYTES];
        self.0.read_exact_at(&mut bytes, frame * PAGE_BYTES as u64)?;
        Ok(Content(bytes))
    }

    pub(crate) fn write(&self, frame: u64, content: &Content) -> io::Result<()> {
        self.0.write_all_at(&content.0, frame * PAGE_BYTES as u64)
    }

    pub(crate) fn poison(&self, frame: u64) -> io::Result<()> {
        self.write(frame, &Content(vec![POISON; PAGE_BYTES]))
    }

    /// Writes the one counter, and nothing beside it.
    pub(crate) fn count(&self, frame: u64, slot: usize, value: u64) -> io::Result<()> {
        let at = frame * PAGE_BYTES as u64 + (BLOCK_BYTES + 8 * slot) as u64;
        self.0.write_all_at(&value.to_le_bytes(), at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_knows_itself_from_others_and_from_poison() {
        let dir = tempfile::tempdir().unwrap();
        let frames = Frames::create(&dir.path().join("frames"), 2).unwrap();
        frames.write(1, &Content::new(7, 3)).unwrap();
        assert_eq!(frames.read(1).unwrap().generation(7), Ok(3));
        assert_eq!(frames.read(1).unwrap().generation(8), Err("page 7, generation 3".to_owned()));
        frames.poison(1).unwrap();
        assert!(frames.read(1).unwrap().is_poison());
        assert!(frames.read(1).unwrap().generation(7).unwrap_err().contains("given away"));
        assert!(frames.read(0).unwrap().generation(7).is_err(), "zeros are no page");
    }

    #[test]
    fn half_a_page_is_seen() {
        let mut content = Content::new(7, 3);
        let other = Content::new(7, 4);
        content.0[PAGE_BYTES - 8..].copy_from_slice(&other.0[PAGE_BYTES - 8..]);
        assert!(content.generation(7).is_err() || content == Content::new(7, 3));
        content.0[PAGE_BYTES - BLOCK_BYTES..].copy_from_slice(&other.0[PAGE_BYTES - BLOCK_BYTES..]);
        assert!(content.generation(7).unwrap_err().contains("half"));
    }

    #[test]
    fn counters_stay_when_a_page_moves_and_one_write_to_a_poisoned_frame_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let frames = Frames::create(&dir.path().join("frames"), 1).unwrap();
        frames.write(0, &Content::new(7, 3)).unwrap();
        for slot in [0, MOST_SLOTS - 1] {
            frames.count(0, slot, 5 + slot as u64).unwrap();
        }
        let mut moved = frames.read(0).unwrap();
        moved.stamp(7, 4);
        assert_eq!(moved.generation(7), Ok(4));
        assert_eq!((moved.counter(0), moved.counter(MOST_SLOTS - 1)), (5, 5 + MOST_SLOTS as u64 - 1));
        frames.poison(0).unwrap();
        frames.count(0, 9, 1).unwrap();
        assert!(!frames.read(0).unwrap().is_poison());
    }
}
