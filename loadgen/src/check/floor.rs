//! The floor file: what each page must hold at least, as the host knows it and every device reads it.
//!
//! A record for each page of each slot; a slot is a place that address spaces take in turn.

use crate::check::stamp::Stamp;
use crate::check::table::{Row, Table};
use crate::path::Path;

pub use crate::check::table::TableError as FloorError;

/// The floor file.
pub type FloorFile = Table<Record>;

/// Whether a page may read as zeros.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Zeros {
    /// It is fresh, and its first stamp is not stored yet.
    Allowed,
    /// It was stamped, and will be as long as this record stands.
    Forbidden,
}

/// What a page must hold at least.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Record {
    /// The address space that lives in the slot; 0: none, so nothing can be read.
    pub address_space: u64,
    /// The lowest version that a read through a translation may find.
    pub floor: u64,
    /// The lowest version that a device's own copy of the bytes may be. It is not raised by a store in
    /// place, of which no device is told: it rises with releases only.
    pub copy_floor: u64,
    /// The parent whose stamps a forked child may bear; 0: none.
    pub inherited_from: u64,
    /// The highest version that was inherited.
    pub inherited_through: u64,
    /// Whether a read through a translation may find zeros.
    pub zeros: Zeros,
    /// Whether a device's own copy may be zeros: it may have been made between the release and the first
    /// stamp, of which no device is told.
    pub copy_zeros: Zeros,
    /// Another address whose stamps the page may bear; 0: none. A page that was moved here was stamped
    /// there, and one that has the bytes of another bears its stamp.
    pub also_at: u64,
    /// Their version.
    pub also_version: u64,
    /// Whether a read through a translation may find them.
    pub also_in_frame: bool,
    /// Whether a device's own copy may be of them: until the next round that takes the page from devices.
    pub also_in_copies: bool,
    /// Rises before the page is dropped, and again afterwards: what a device writes while it is odd, or
    /// wrote before it rose, may be gone.
    pub zaps: u64,
    /// What last took the page from devices.
    pub path: Path,
    /// Rises with every change.
    pub change: u64,
}

impl Record {
    /// A page of nobody.
    pub const VACANT: Self = Self {
        address_space: 0,
        floor: 0,
        copy_floor: 0,
        inherited_from: 0,
        inherited_through: 0,
        zeros: Zeros::Forbidden,
        copy_zeros: Zeros::Forbidden,
        also_at: 0,
        also_version: 0,
        also_in_frame: false,
        also_in_copies: false,
        zaps: 0,
        path: Path::Map,
        change: 0,
    };

    /// Whether the page at `address` bears `stamp` because it was stored there, and not because it was moved.
    #[must_use]
    pub const fn is_own(&self, stamp: &Stamp, address: u64) -> bool {
        stamp.address == address && stamp.version >= self.floor
    }

    /// Whether nothing was dropped since `zaps`, nor is being dropped.
    #[must_use]
    pub const fn keeps_since(&self, zaps: u64) -> bool {
        self.zaps == zaps && zaps.is_multiple_of(2)
    }
}

impl Default for Record {
    fn default() -> Self {
        Self::VACANT
    }
}

impl Row for Record {
    const WORDS: usize = 9;

    fn to_words(&self) -> Vec<u64> {
        let bit = |zeros: Zeros| u64::from(zeros == Zeros::Allowed);
        let zeros = bit(self.copy_zeros) << 1 | bit(self.zeros);
        let also = u64::from(self.also_in_copies) << 3 | u64::from(self.also_in_frame) << 2;
        vec![
            self.address_space,
            self.floor,
            self.copy_floor,
            self.inherited_from,
            self.inherited_through,
            self.also_at,
            self.also_version,
            self.zaps,
            self.change << 16 | (self.path.index() as u64) << 8 | also | zeros,
        ]
    }

    fn from_words(words: &[u64]) -> Option<Self> {
        let [
            address_space,
            floor,
            copy_floor,
            inherited_from,
            inherited_through,
            also_at,
            also_version,
            zaps,
            packed,
        ] = *words
        else {
            return None;
        };
        let bit = |bit: u64| if packed >> bit & 1 == 1 { Zeros::Allowed } else { Zeros::Forbidden };
        Some(Self {
            address_space,
            floor,
            copy_floor,
            inherited_from,
            inherited_through,
            zeros: bit(0),
            copy_zeros: bit(1),
            also_at,
            also_version,
            also_in_frame: packed >> 2 & 1 == 1,
            also_in_copies: packed >> 3 & 1 == 1,
            zaps,
            path: Path::at(usize::from((packed >> 8) as u8))?,
            change: packed >> 16,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_back_as_it_was_written() {
        let record = Record {
            address_space: 7,
            floor: 40,
            copy_floor: 30,
            inherited_from: 5,
            inherited_through: 35,
            zeros: Zeros::Allowed,
            copy_zeros: Zeros::Forbidden,
            also_at: 0x4000,
            also_version: 33,
            also_in_frame: true,
            also_in_copies: false,
            zaps: 6,
            path: Path::Ksm,
            change: 12,
        };
        assert_eq!(Record::from_words(&record.to_words()), Some(record));
        assert_eq!(Record::VACANT.to_words().len(), Record::WORDS);
    }

    #[test]
    fn what_was_written_before_or_during_a_zap_may_be_gone() {
        let record = Record { zaps: 6, ..Record::VACANT };
        assert!(record.keeps_since(6) && !record.keeps_since(4));
        assert!(!Record { zaps: 7, ..record }.keeps_since(7));
    }
}
