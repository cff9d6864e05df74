//! The paths of the memory source that a run exercises.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// One way through the memory source, by the word that reports use.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Path {
    /// A hole of an address space is mapped again (`mmap`).
    Map,
    /// The CPU loads a page.
    Read,
    /// The CPU stores a page.
    Write,
    /// An address space is duplicated (`fork`): its pages lose the leave to be written.
    Fork,
    /// A shared page is stored to: one of the two copies it, the other uses it again (`do_wp_page`).
    Cow,
    /// Pages leave an address space (`munmap`).
    Munmap,
    /// Pages are dropped, their mapping stays (`MADV_DONTNEED`).
    Dontneed,
    /// A whole address space ends (`exit_mmap`), and devices are told of a new one.
    Exit,
}

/// A word that names no path.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{given}` is no path; choose from map, read, write, fork, cow, munmap, dontneed, exit")]
pub struct PathError {
    given: String,
}

impl Path {
    /// Every path, in the order of reports.
    pub const EVERY: [Self; 8] =
        [Self::Map, Self::Read, Self::Write, Self::Fork, Self::Cow, Self::Munmap, Self::Dontneed, Self::Exit];

    /// The word that reports and `--paths` use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Map => "map",
            Self::Read => "read",
            Self::Write => "write",
            Self::Fork => "fork",
            Self::Cow => "cow",
            Self::Munmap => "munmap",
            Self::Dontneed => "dontneed",
            Self::Exit => "exit",
        }
    }

    /// Whether the path takes something away from devices, so that a run without a round of it has shown
    /// nothing.
    #[must_use]
    pub const fn has_rounds(self) -> bool {
        matches!(self, Self::Fork | Self::Cow | Self::Munmap | Self::Dontneed | Self::Exit)
    }

    /// Its place in [`Path::EVERY`], for tables and for the floor file.
    #[must_use]
    pub const fn index(self) -> usize {
        self as usize
    }

    /// The path at a place of [`Path::EVERY`].
    #[must_use]
    pub fn at(index: usize) -> Option<Self> {
        Self::EVERY.get(index).copied()
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Path {
    type Err = PathError;

    fn from_str(given: &str) -> Result<Self, Self::Err> {
        Self::EVERY
            .into_iter()
            .find(|path| path.name() == given)
            .ok_or_else(|| PathError { given: given.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_read_back_as_it_is_written() {
        for (index, path) in Path::EVERY.into_iter().enumerate() {
            assert_eq!(path.name().parse(), Ok(path));
            assert_eq!((path.index(), Path::at(index)), (index, Some(path)));
        }
        assert!("mumap".parse::<Path>().unwrap_err().to_string().contains("munmap"));
    }
}
