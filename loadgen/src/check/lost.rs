//! What devices wrote must not be lost, and what they used must not be taken for unused.
//!
//! ```text
//!   device                                    host
//!   ------                                    ----
//!   write the scratch page; it returned Ok
//!   publish its version in the mark --------> read the mark          (before the operation begins)
//!                                             take the leave to write away; it returned
//!                                             load the page: is it older than the mark? then it is lost
//!
//!   publish when a use began and ended -----> called to ask whether the page is young
//!                                             it is not: did a use begin after the last answer, and end
//!                                             before this call? then the bit is lost
//! ```
//!
//! A page that is dropped meanwhile may lose what was written: its record tells of that before and after
//! ([`Record::zaps`](crate::check::floor::Record::zaps)), and a mark says which of these times it is of.
//!
//! A device looks at its own writes in the same way, whenever it reads a page that it writes.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::check::history::PageName;
use crate::check::stamp::{Block, Writer};
use crate::check::table::{Row, Table};
use crate::path::Path;

/// The last write to a page that is known to have returned.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Mark {
    /// Through which address space; 0: there was none.
    pub address_space: u64,
    /// The page's zaps when it began.
    pub zaps: u64,
    /// Its version.
    pub version: u64,
}

/// The file of marks. Each page has one device that writes it.
pub type MarkFile = Table<Mark>;

/// The last use of a page by a device.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Used {
    /// In which address space; 0: there was none.
    pub address_space: u64,
    /// When it began, on the machine's clock, in nanoseconds.
    pub began: u64,
    /// When it was over.
    pub ended: u64,
}

/// The file of uses: a row for each device where others have one for each page.
pub type UseFile = Table<Used>;

/// A write that is not there any more.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LostWrite {
    /// Who found it: a device, or `cpu`.
    pub found_by: String,
    /// The address space that was read.
    pub address_space: u64,
    /// The page's first address.
    pub address: u64,
    /// The version of the write.
    pub written: u64,
    /// What was there: an older version, or none.
    pub found: Option<u64>,
    /// What had taken the page from devices last.
    pub after: Path,
    /// Where its history is.
    pub page: PageName,
    /// When it was found, on the machine's clock, in nanoseconds.
    pub at: u64,
}

/// A use that a young query did not know of.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LostYoung {
    /// The device whose use it was.
    pub device: String,
    /// The address space.
    pub address_space: u64,
    /// The page's first address.
    pub address: u64,
    /// Where its history is.
    pub page: PageName,
    /// When the query was called, on the machine's clock, in nanoseconds.
    pub at: u64,
}

impl Row for Mark {
    const WORDS: usize = 3;

    fn to_words(&self) -> Vec<u64> {
        vec![self.address_space, self.zaps, self.version]
    }

    fn from_words(words: &[u64]) -> Option<Self> {
        let [address_space, zaps, version] = *words else { return None };
        Some(Self { address_space, zaps, version })
    }
}

impl Row for Used {
    const WORDS: usize = 3;

    fn to_words(&self) -> Vec<u64> {
        vec![self.address_space, self.began, self.ended]
    }

    fn from_words(words: &[u64]) -> Option<Self> {
        let [address_space, began, ended] = *words else { return None };
        Some(Self { address_space, began, ended })
    }
}

/// What is left of a write that has returned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Left {
    /// It, or a later one.
    AllOfIt,
    /// An older one, or none.
    Lost(Option<u64>),
    /// It cannot be told: a write is under way, or what is there is no device's, which is another's verdict.
    Unknown,
}

/// Looks for the write of `version` in a page. The stamp may be a parent's: it is not asked whose it is.
#[must_use]
pub fn what_is_left(page: &[u8], version: u64) -> Left {
    let mut left = Left::AllOfIt;
    for block in Block::of_page(page) {
        match block {
            Block::Stamp(stamp) if stamp.writer == Writer::Device && stamp.version >= version => {}
            Block::Stamp(stamp) if stamp.writer == Writer::Device => left = Left::Lost(Some(stamp.version)),
            Block::Zeros => left = Left::Lost(None),
            Block::Stamp(_) | Block::Poison | Block::Mangled => return Left::Unknown,
        }
    }
    left
}

impl fmt::Display for LostWrite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { found_by, address_space, address, written, found, after, .. } = self;
        write!(
            f,
            "{found_by} read address space {address_space} at {address:#x}: version {written} was written, found "
        )?;
        match found {
            Some(version) => write!(f, "version {version}")?,
            None => f.write_str("zeros")?,
        }
        write!(f, "; last taken by {after}")
    }
}

impl fmt::Display for LostYoung {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { device, address_space, address, .. } = self;
        write!(
            f,
            "{device} used address space {address_space} at {address:#x}, and the page counted as not used"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::stamp::{PAGE_BYTES, Stamp};

    fn page(writer: Writer, version: u64) -> Vec<u8> {
        Stamp { writer, address_space: 1, address: 0x1000, version }.to_page()
    }

    #[test]
    fn a_write_is_there_if_it_or_a_later_one_is() {
        assert_eq!(what_is_left(&page(Writer::Device, 5), 5), Left::AllOfIt);
        assert_eq!(what_is_left(&page(Writer::Device, 6), 5), Left::AllOfIt);
        assert_eq!(what_is_left(&page(Writer::Device, 4), 5), Left::Lost(Some(4)));
        assert_eq!(what_is_left(&[0; PAGE_BYTES], 5), Left::Lost(None));
    }

    #[test]
    fn half_of_a_later_write_is_enough_and_half_of_an_older_one_is_not() {
        let mut torn = page(Writer::Device, 6);
        torn[2048..].copy_from_slice(&page(Writer::Device, 5)[2048..]);
        assert_eq!(what_is_left(&torn, 5), Left::AllOfIt);
        assert_eq!(what_is_left(&torn, 6), Left::Lost(Some(5)));
    }

    #[test]
    fn what_no_device_wrote_is_left_to_others() {
        assert_eq!(what_is_left(&page(Writer::Cpu, 6), 5), Left::Unknown);
    }

    #[test]
    fn marks_and_uses_are_read_back() {
        let mark = Mark { address_space: 1, zaps: 2, version: 3 };
        assert_eq!(Mark::from_words(&mark.to_words()), Some(mark));
        let used = Used { address_space: 1, began: 2, ended: 3 };
        assert_eq!(Used::from_words(&used.to_words()), Some(used));
    }
}
