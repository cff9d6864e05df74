//! The swap file: pages of anonymous memory that no frame holds.
//!
//! ```text
//!   free --- reserve() ---> held (references: 1, 2 ...) --- last put() ---> free
//! ```
//!
//! A reference is a [`SwapRef`], a token as [`super::frame::FrameRef`] is: an entry of a page table holds
//! it, and a fork shares it (`swap_duplicate`). There is no swap cache: a page that is brought in is the
//! entry's own, and its reference to the slot goes.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;

use super::frame::FRAME_BYTES;

/// Pages on disk.
#[derive(Debug)]
pub struct SwapFile {
    file: File,
    slots: usize,
    ledger: Mutex<Ledger>,
}

#[derive(Debug, Default)]
struct Ledger {
    /// References of every slot that was ever taken.
    references: Vec<u32>,
    free: Vec<u32>,
    in_use: usize,
}

/// One reference to a slot. Not `Clone`: each is given back once.
#[must_use = "a reference that is lost leaks its slot"]
#[derive(Debug, PartialEq, Eq)]
pub(super) struct SwapRef {
    slot: u32,
}

/// Why a page was not swapped out or in.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SwapError {
    /// Every slot holds a page.
    #[error("the swap file is full: {slots} pages")]
    Full {
        /// How many there are.
        slots: usize,
    },
    /// The page of a slot is shared as often as it may be.
    #[error("a page in the swap file has as many references as it may")]
    TooManyReferences,
    /// There is no swap file.
    #[error("there is no swap file")]
    None,
    /// The file could not be read or written.
    #[error("the swap file could not be read or written")]
    File(#[source] Arc<io::Error>),
}

impl SwapFile {
    /// Makes, or empties, a file with room for `slots` pages; it grows as they are used.
    ///
    /// # Errors
    /// What the system says; `slots` beyond 2^32 - 1.
    pub fn create(path: &Path, slots: usize) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true);
        // It holds what was in memory, which is nobody else's business.
        let file = options.mode(0o600).open(path)?;
        Self::on(file, slots)
    }

    /// Uses a file that is open for reading and writing; whatever it holds is lost.
    ///
    /// # Errors
    /// `slots` beyond 2^32 - 1.
    pub fn on(file: File, slots: usize) -> io::Result<Self> {
        if u32::try_from(slots).is_err() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a swap file has at most 2^32 - 1 pages",
            ));
        }
        Ok(Self { file, slots, ledger: Mutex::default() })
    }

    /// How many pages it holds now.
    #[must_use]
    pub fn in_use(&self) -> usize {
        self.ledger.lock().in_use
    }

    /// How many pages it has room for.
    #[must_use]
    pub const fn slots(&self) -> usize {
        self.slots
    }

    /// Whether a slot is free now.
    pub(super) fn check_room(&self) -> Result<(), SwapError> {
        if self.in_use() < self.slots { Ok(()) } else { Err(SwapError::Full { slots: self.slots }) }
    }

    /// A slot that nothing was written to yet, with one reference (`get_swap_page`).
    pub(super) fn reserve(&self) -> Result<SwapRef, SwapError> {
        let mut ledger = self.ledger.lock();
        let slot = match ledger.free.pop() {
            Some(slot) => slot,
            None if ledger.references.len() < self.slots => {
                ledger.references.push(0);
                u32::try_from(ledger.references.len() - 1).expect("the slots fit in 32 bits")
            }
            None => return Err(SwapError::Full { slots: self.slots }),
        };
        ledger.references[slot as usize] = 1;
        ledger.in_use += 1;
        Ok(SwapRef { slot })
    }

    /// A slot with these bytes.
    #[cfg(test)]
    pub(super) fn filled(&self, bytes: &[u8; FRAME_BYTES]) -> SwapRef {
        let slot = self.reserve().expect("the test has a slot for it");
        self.write(&slot, bytes).expect("the test has a file for it");
        slot
    }

    /// Writes the page of a slot that nobody else knows yet (`swap_writepage`).
    pub(super) fn write(&self, slot: &SwapRef, bytes: &[u8; FRAME_BYTES]) -> Result<(), SwapError> {
        let written = self.file.write_all_at(bytes, position_of(slot.slot));
        written.map_err(|error| SwapError::File(Arc::new(error)))
    }

    /// One more reference (`swap_duplicate`).
    pub(super) fn share(&self, slot: &SwapRef) -> Result<SwapRef, SwapError> {
        let mut ledger = self.ledger.lock();
        let references = &mut ledger.references[slot.slot as usize];
        *references = references.checked_add(1).ok_or(SwapError::TooManyReferences)?;
        Ok(SwapRef { slot: slot.slot })
    }

    /// Reads the page of a slot (`swap_readpage`).
    pub(super) fn read(&self, slot: &SwapRef) -> Result<[u8; FRAME_BYTES], SwapError> {
        let mut bytes = [0; FRAME_BYTES];
        let read = self.file.read_exact_at(&mut bytes, position_of(slot.slot));
        read.map(|()| bytes).map_err(|error| SwapError::File(Arc::new(error)))
    }

    /// Gives a reference back (`swap_free`).
    #[expect(clippy::needless_pass_by_value, reason = "a token that was given back is gone")]
    pub(super) fn put(&self, slot: SwapRef) {
        let mut ledger = self.ledger.lock();
        let references = &mut ledger.references[slot.slot as usize];
        *references -= 1;
        if *references == 0 {
            ledger.free.push(slot.slot);
            ledger.in_use -= 1;
        }
    }
}

fn position_of(slot: u32) -> u64 {
    u64::from(slot) * FRAME_BYTES as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(swap: &SwapFile, byte: u8) -> SwapRef {
        let slot = swap.reserve().unwrap();
        swap.write(&slot, &[byte; FRAME_BYTES]).unwrap();
        slot
    }

    #[test]
    fn a_slot_is_free_when_its_last_reference_goes_and_no_page_is_lost_when_it_is_full() {
        let swap = SwapFile::on(tempfile::tempfile().unwrap(), 2).unwrap();
        let first = write(&swap, 1);
        let second = write(&swap, 2);
        assert!(matches!(swap.reserve(), Err(SwapError::Full { slots: 2 })));
        assert!(matches!(swap.check_room(), Err(SwapError::Full { slots: 2 })));
        let shared = swap.share(&first).unwrap();
        swap.put(first);
        assert_eq!(swap.read(&shared).unwrap(), [1; FRAME_BYTES]);
        assert_eq!(swap.in_use(), 2);
        swap.put(shared);
        let third = write(&swap, 3);
        assert_eq!(swap.read(&third).unwrap(), [3; FRAME_BYTES]);
        assert_eq!(swap.read(&second).unwrap(), [2; FRAME_BYTES]);
        swap.put(second);
        swap.put(third);
        assert_eq!(swap.in_use(), 0);
    }

    #[test]
    fn a_write_that_fails_is_an_error_and_the_slot_can_be_given_back() {
        let full = OpenOptions::new().read(true).write(true).open("/dev/full").unwrap();
        let swap = SwapFile::on(full, 4).unwrap();
        let slot = swap.reserve().unwrap();
        assert!(matches!(swap.write(&slot, &[1; FRAME_BYTES]), Err(SwapError::File(_))));
        swap.put(slot);
        assert_eq!(swap.in_use(), 0);
    }
}
