//! What a page holds: who wrote it, for which address, and when.
//!
//! A stamp is 64 bytes and is repeated over the whole page, so that a page that is half one thing and half
//! another is seen. Each copy has a checksum of its own.
//!
//! Versions come from one counter of the host and rise with every store and every release. They stand for
//! the frame's generation, which a store cannot know before it returns: a frame's contents are a later
//! version in each of its lives.

use shootdown_server::source::memory::POISON;

/// Bytes of a page.
pub const PAGE_BYTES: usize = 4096;

/// Bytes of one copy of the stamp.
pub const BLOCK_BYTES: usize = 64;

const MAGIC: u64 = 0x5348_4f4f_5444_4f57;

/// Who wrote a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Writer {
    /// The host's CPU, by a store.
    Cpu,
    /// A device, by its DMA.
    Device,
}

/// What a page says of itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stamp {
    /// Who wrote it.
    pub writer: Writer,
    /// The address space that it was written in. A forked child's page bears its parent's until it is
    /// written.
    pub address_space: u64,
    /// The page's first address.
    pub address: u64,
    /// When: a later store has a higher one.
    pub version: u64,
}

/// One block of a page that was read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Block {
    /// A whole stamp.
    Stamp(Stamp),
    /// Nothing but zeros: a page that was never written.
    Zeros,
    /// The poison of a freed frame.
    Poison,
    /// Anything else: half of one thing and half of another.
    Mangled,
}

impl Stamp {
    /// The page that bears this stamp.
    #[must_use]
    pub fn to_page(self) -> Vec<u8> {
        let mut block = [0; BLOCK_BYTES];
        for (place, word) in block.chunks_exact_mut(8).zip(self.words()) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        block.repeat(PAGE_BYTES / BLOCK_BYTES)
    }

    fn words(self) -> [u64; BLOCK_BYTES / 8] {
        let writer = match self.writer {
            Writer::Cpu => 1,
            Writer::Device => 2,
        };
        let said = [MAGIC, writer, self.address_space, self.address, self.version];
        [said[0], said[1], said[2], said[3], said[4], !self.version, checksum(&said), MAGIC]
    }
}

impl Block {
    /// Reads one block.
    #[must_use]
    pub fn read(bytes: &[u8]) -> Self {
        let word = |at: usize| {
            let bytes = bytes.get(8 * at..8 * at + 8).and_then(|word| word.try_into().ok());
            bytes.map_or(0, u64::from_le_bytes)
        };
        let writer = match word(1) {
            1 => Some(Writer::Cpu),
            2 => Some(Writer::Device),
            _ => None,
        };
        if let Some(writer) = writer {
            let stamp = Stamp { writer, address_space: word(2), address: word(3), version: word(4) };
            let whole = bytes.len() == BLOCK_BYTES && (0..8).map(word).eq(stamp.words());
            return if whole { Self::Stamp(stamp) } else { Self::Mangled };
        }
        if bytes.iter().all(|byte| *byte == 0) {
            Self::Zeros
        } else if bytes.iter().all(|byte| *byte == POISON) {
            Self::Poison
        } else {
            Self::Mangled
        }
    }

    /// The blocks of a page, neighbours that are equal told once. A page that is one thing is one block.
    #[must_use]
    pub fn of_page(page: &[u8]) -> Vec<Self> {
        // Almost every page is: one comparison instead of 64 readings.
        if page.len() == PAGE_BYTES && page[BLOCK_BYTES..] == page[..PAGE_BYTES - BLOCK_BYTES] {
            return vec![Self::read(&page[..BLOCK_BYTES])];
        }
        let mut blocks: Vec<Self> = page.chunks(BLOCK_BYTES).map(Self::read).collect();
        blocks.dedup();
        if page.len() != PAGE_BYTES {
            blocks.push(Self::Mangled);
        }
        blocks
    }
}

/// Tells what was not written as it is read; no defence against anybody (splitmix64's finalizer).
pub(crate) fn checksum(words: &[u64]) -> u64 {
    words.iter().fold(0x9e37_79b9_7f4a_7c15, |sum, word| {
        let mixed = (sum ^ word).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAMP: Stamp = Stamp { writer: Writer::Cpu, address_space: 3, address: 0x7000, version: 9 };

    #[test]
    fn a_page_is_read_back_as_it_was_written() {
        assert_eq!(Block::of_page(&STAMP.to_page()), [Block::Stamp(STAMP)]);
        let device = Stamp { writer: Writer::Device, ..STAMP };
        assert_eq!(Block::of_page(&device.to_page()), [Block::Stamp(device)]);
    }

    #[test]
    fn zeros_and_poison_are_told_apart() {
        assert_eq!(Block::of_page(&[0; PAGE_BYTES]), [Block::Zeros]);
        assert_eq!(Block::of_page(&[POISON; PAGE_BYTES]), [Block::Poison]);
    }

    #[test]
    fn every_changed_byte_of_a_stamp_is_seen() {
        let page = STAMP.to_page();
        for at in 0..BLOCK_BYTES {
            let mut block = page[..BLOCK_BYTES].to_vec();
            block[at] ^= 0x10;
            assert_ne!(Block::read(&block), Block::Stamp(STAMP), "byte {at}");
            assert!(!matches!(Block::read(&block), Block::Stamp(_)), "byte {at}");
        }
    }

    #[test]
    fn a_page_of_two_halves_is_told_as_both() {
        let newer = Stamp { version: 10, ..STAMP };
        let mut page = newer.to_page();
        page[2048..].copy_from_slice(&STAMP.to_page()[2048..]);
        assert_eq!(Block::of_page(&page), [Block::Stamp(newer), Block::Stamp(STAMP)]);
        page[100] = 1;
        assert!(Block::of_page(&page).contains(&Block::Mangled));
    }

    #[test]
    fn a_short_page_is_mangled() {
        assert!(Block::of_page(&STAMP.to_page()[..4032]).contains(&Block::Mangled));
        assert!(Block::of_page(&[]).contains(&Block::Mangled));
    }
}
