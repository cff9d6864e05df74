//! A file of records that one process writes and others read: one for each page of each slot.
//!
//! It is written and read by `pwrite` and `pread`. Neither is atomic, so a record carries a checksum, and a
//! reader that meets half of one reads again. A record that was never written is the default one.

use std::fs::{File, OpenOptions};
use std::io;
use std::marker::PhantomData;
use std::os::unix::fs::FileExt as _;
use std::path::{Path as FilePath, PathBuf};

use crate::check::stamp::checksum;

/// Of one record, its checksum included: two cache lines.
const ROW_BYTES: usize = 128;

/// How often a record is read that is being written. A write takes microseconds.
const MOST_READS: usize = 10_000;

/// What a table consists of.
pub trait Row: Copy + Default {
    /// How many words it has; at most 15.
    const WORDS: usize;

    /// Its words.
    fn to_words(&self) -> Vec<u64>;

    /// Reads it back.
    fn from_words(words: &[u64]) -> Option<Self>;
}

/// Why a record could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// The file failed.
    #[error("the file {path} cannot be used")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// Every reading found half a record.
    #[error("the record of page {page} of slot {slot} was never whole")]
    Torn {
        /// The slot.
        slot: usize,
        /// The page.
        page: usize,
    },
}

/// The file.
#[derive(Debug)]
pub struct Table<R> {
    file: File,
    path: PathBuf,
    pages: usize,
    row: PhantomData<fn() -> R>,
}

impl<R: Row> Table<R> {
    /// Makes the file, for `pages` pages of each of `slots` slots.
    ///
    /// # Errors
    /// [`TableError::File`].
    pub fn create(path: &FilePath, slots: usize, pages: usize) -> Result<Self, TableError> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path);
        let table = Self::of(file.map_err(|error| failed(path, error))?, path, pages);
        let length = table.position(slots, 0);
        table.file.set_len(length).map_err(|error| failed(path, error))?;
        Ok(table)
    }

    /// Opens the file of another process.
    ///
    /// # Errors
    /// [`TableError::File`].
    pub fn open(path: &FilePath, pages: usize) -> Result<Self, TableError> {
        let file = OpenOptions::new().read(true).write(true).open(path);
        Ok(Self::of(file.map_err(|error| failed(path, error))?, path, pages))
    }

    fn of(file: File, path: &FilePath, pages: usize) -> Self {
        Self { file, path: path.into(), pages, row: PhantomData }
    }

    /// Writes a record.
    ///
    /// # Errors
    /// [`TableError::File`].
    pub fn write(&self, slot: usize, page: usize, row: &R) -> Result<(), TableError> {
        let written = self.file.write_all_at(&to_bytes(row), self.position(slot, page));
        written.map_err(|error| failed(&self.path, error))
    }

    /// Reads a record, again until it is whole.
    ///
    /// # Errors
    /// [`TableError::File`], [`TableError::Torn`].
    pub fn read(&self, slot: usize, page: usize) -> Result<R, TableError> {
        let mut bytes = [0; ROW_BYTES];
        for _ in 0..MOST_READS {
            let read = self.file.read_exact_at(&mut bytes, self.position(slot, page));
            read.map_err(|error| failed(&self.path, error))?;
            if let Some(row) = from_bytes(&bytes) {
                return Ok(row);
            }
        }
        Err(TableError::Torn { slot, page })
    }

    fn position(&self, slot: usize, page: usize) -> u64 {
        ((slot * self.pages + page) * ROW_BYTES) as u64
    }
}

fn to_bytes<R: Row>(row: &R) -> [u8; ROW_BYTES] {
    let mut words = row.to_words();
    words.push(checksum(&words));
    let mut bytes = [0; ROW_BYTES];
    for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// `None`: it was being written.
fn from_bytes<R: Row>(bytes: &[u8; ROW_BYTES]) -> Option<R> {
    if bytes.iter().all(|byte| *byte == 0) {
        return Some(R::default());
    }
    let words: Vec<u64> =
        bytes.chunks_exact(8).filter_map(|word| word.try_into().ok().map(u64::from_le_bytes)).collect();
    let (said, sum) = (words.get(..R::WORDS)?, words.get(R::WORDS)?);
    if *sum == checksum(said) { R::from_words(said) } else { None }
}

fn failed(path: &FilePath, error: io::Error) -> TableError {
    TableError::File { path: path.into(), error }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    struct Three([u64; 3]);

    impl Row for Three {
        const WORDS: usize = 3;

        fn to_words(&self) -> Vec<u64> {
            self.0.to_vec()
        }

        fn from_words(words: &[u64]) -> Option<Self> {
            words.try_into().ok().map(Self)
        }
    }

    #[test]
    fn a_record_is_read_back_by_another_who_opened_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("table");
        let table = Table::create(&path, 2, 3).unwrap();
        table.write(1, 2, &Three([4, 5, 6])).unwrap();
        let other = Table::<Three>::open(&path, 3).unwrap();
        assert_eq!(other.read(1, 2).unwrap(), Three([4, 5, 6]));
        assert_eq!(other.read(0, 2).unwrap(), Three::default());
        assert!(matches!(other.read(2, 0), Err(TableError::File { .. })), "there is no third slot");
    }

    #[test]
    fn half_a_record_is_never_taken_for_a_whole_one() {
        let (old, new) = (to_bytes(&Three([1, 2, 3])), to_bytes(&Three([9, 2, 8])));
        for cut in 1..ROW_BYTES {
            let mut torn = new;
            torn[cut..].copy_from_slice(&old[cut..]);
            if torn != old && torn != new {
                assert_eq!(from_bytes::<Three>(&torn), None, "cut at {cut}");
            }
        }
    }

    #[test]
    fn a_record_that_stays_half_is_an_error_and_not_a_floor() {
        let dir = tempfile::tempdir().unwrap();
        let table = Table::<Three>::create(&dir.path().join("table"), 1, 1).unwrap();
        table.file.write_all_at(&[1; 8], 16).unwrap();
        assert!(matches!(table.read(0, 0), Err(TableError::Torn { slot: 0, page: 0 })));
    }
}
