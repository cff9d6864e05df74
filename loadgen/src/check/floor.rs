//! The floor file: what each page must hold at least, as the host knows it and every device reads it.
//!
//! One record of 64 bytes for each page of each slot; a slot is a place that address spaces take in turn.
//! It is written and read by `pwrite` and `pread`. Neither is atomic, so a record carries a checksum, and a
//! reader that meets half of one reads again.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path as FilePath, PathBuf};

use crate::check::stamp::checksum;
use crate::path::Path;

const RECORD_BYTES: usize = 64;

/// How often a record is read that is being written. A write takes microseconds.
const MOST_READS: usize = 10_000;

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
        path: Path::Map,
        change: 0,
    };

    fn to_bytes(self) -> [u8; RECORD_BYTES] {
        let bit = |zeros: Zeros| u64::from(zeros == Zeros::Allowed);
        let zeros = bit(self.copy_zeros) << 1 | bit(self.zeros);
        let packed = self.change << 16 | (self.path.index() as u64) << 8 | zeros;
        let said = [
            self.address_space,
            self.floor,
            self.copy_floor,
            self.inherited_from,
            self.inherited_through,
            packed,
            !packed,
        ];
        let mut bytes = [0; RECORD_BYTES];
        let words = said.into_iter().chain([checksum(&said)]);
        for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// `None`: it was being written.
    fn from_bytes(bytes: &[u8; RECORD_BYTES]) -> Option<Self> {
        let mut words = [0; RECORD_BYTES / 8];
        for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_le_bytes(bytes.try_into().ok()?);
        }
        let [address_space, floor, copy_floor, inherited_from, inherited_through, packed, _, sum] = words;
        if sum != checksum(&words[..7]) {
            return None;
        }
        let zeros = |bit: u64| if packed >> bit & 1 == 1 { Zeros::Allowed } else { Zeros::Forbidden };
        Some(Self {
            address_space,
            floor,
            copy_floor,
            inherited_from,
            inherited_through,
            zeros: zeros(0),
            copy_zeros: zeros(1),
            path: Path::at(usize::from((packed >> 8) as u8))?,
            change: packed >> 16,
        })
    }
}

/// Why a floor could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum FloorError {
    /// The file failed.
    #[error("the floor file {path} cannot be used")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// Every reading found half a record.
    #[error("the floor of page {page} of slot {slot} was never whole")]
    Torn {
        /// The slot.
        slot: usize,
        /// The page.
        page: usize,
    },
}

/// The file.
#[derive(Debug)]
pub struct FloorFile {
    file: File,
    path: PathBuf,
    pages: usize,
}

impl FloorFile {
    /// Makes the file, with a vacant record for each of `pages` pages of each of `slots` slots.
    ///
    /// # Errors
    /// [`FloorError::File`].
    pub fn create(path: &FilePath, slots: usize, pages: usize) -> Result<Self, FloorError> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path);
        let floors = Self { file: file.map_err(|error| failed(path, error))?, path: path.into(), pages };
        for slot in 0..slots {
            for page in 0..pages {
                floors.write(slot, page, &Record::VACANT)?;
            }
        }
        Ok(floors)
    }

    /// Opens the file of another process.
    ///
    /// # Errors
    /// [`FloorError::File`].
    pub fn open(path: &FilePath, pages: usize) -> Result<Self, FloorError> {
        let file = OpenOptions::new().read(true).write(true).open(path);
        Ok(Self { file: file.map_err(|error| failed(path, error))?, path: path.into(), pages })
    }

    /// Writes a record. Only the host does, and for each page only one of its tasks.
    ///
    /// # Errors
    /// [`FloorError::File`].
    pub fn write(&self, slot: usize, page: usize, record: &Record) -> Result<(), FloorError> {
        let written = self.file.write_all_at(&record.to_bytes(), self.position(slot, page));
        written.map_err(|error| failed(&self.path, error))
    }

    /// Reads a record, again until it is whole.
    ///
    /// # Errors
    /// [`FloorError::File`], [`FloorError::Torn`].
    pub fn read(&self, slot: usize, page: usize) -> Result<Record, FloorError> {
        let mut bytes = [0; RECORD_BYTES];
        for _ in 0..MOST_READS {
            let read = self.file.read_exact_at(&mut bytes, self.position(slot, page));
            read.map_err(|error| failed(&self.path, error))?;
            if let Some(record) = Record::from_bytes(&bytes) {
                return Ok(record);
            }
        }
        Err(FloorError::Torn { slot, page })
    }

    fn position(&self, slot: usize, page: usize) -> u64 {
        ((slot * self.pages + page) * RECORD_BYTES) as u64
    }
}

fn failed(path: &FilePath, error: io::Error) -> FloorError {
    FloorError::File { path: path.into(), error }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORD: Record = Record {
        address_space: 7,
        floor: 40,
        copy_floor: 30,
        inherited_from: 5,
        inherited_through: 35,
        zeros: Zeros::Allowed,
        copy_zeros: Zeros::Forbidden,
        path: Path::Dontneed,
        change: 12,
    };

    #[test]
    fn a_record_is_read_back_by_another_who_opened_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("floor");
        let floors = FloorFile::create(&path, 2, 3).unwrap();
        floors.write(1, 2, &RECORD).unwrap();
        let other = FloorFile::open(&path, 3).unwrap();
        assert_eq!(other.read(1, 2).unwrap(), RECORD);
        assert_eq!(other.read(0, 2).unwrap(), Record::VACANT);
        assert!(matches!(other.read(2, 0), Err(FloorError::File { .. })), "there is no third slot");
    }

    #[test]
    fn half_a_record_is_never_taken_for_a_whole_one() {
        let (old, new) = (RECORD.to_bytes(), Record { floor: 41, change: 13, ..RECORD }.to_bytes());
        for cut in 1..RECORD_BYTES {
            let mut torn = new;
            torn[cut..].copy_from_slice(&old[cut..]);
            if torn != old && torn != new {
                assert_eq!(Record::from_bytes(&torn), None, "cut at {cut}");
            }
        }
    }

    #[test]
    fn a_record_that_stays_half_is_an_error_and_not_a_floor() {
        let dir = tempfile::tempdir().unwrap();
        let floors = FloorFile::create(&dir.path().join("floor"), 1, 1).unwrap();
        floors.file.write_all_at(&[1; 8], 16).unwrap();
        assert!(matches!(floors.read(0, 0), Err(FloorError::Torn { slot: 0, page: 0 })));
    }
}
