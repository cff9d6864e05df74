//! The paths of the memory source that a run exercises.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use shootdown_server::source::memory::Twin;

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
    /// A picture of an address space is taken, and looked at later.
    Snapshot,
    /// A shared page is stored to: one of the two copies it, the other uses it again (`do_wp_page`).
    Cow,
    /// A hole of a file is stored to: its read-only placeholder goes (`__xip_unmap`).
    Placeholder,
    /// The oldest pages in use are asked whether they still are (`page_referenced_one`).
    Aging,
    /// Dirty pages of a file are written to it (`page_mkclean_one`).
    Writeback,
    /// Pages go to the swap file, or back to theirs (`try_to_unmap_one`).
    Swapout,
    /// Pages move to other frames (`try_to_unmap_one`).
    Migrate,
    /// A cluster of a file's entries that nobody uses is cleared (`try_to_unmap_cluster`).
    Cluster,
    /// Pages leave an address space (`munmap`).
    Munmap,
    /// Pages are dropped, their mapping stays (`MADV_DONTNEED`).
    Dontneed,
    /// A file is cut, and what shows the part that went is unmapped (`unmap_mapping_range`).
    Truncate,
    /// A whole address space ends (`exit_mmap`), and devices are told of a new one.
    Exit,
    /// Pages move to another address (`move_page_tables`).
    Mremap,
    /// Pages cannot be written for a while (`change_protection`).
    Mprotect,
    /// Pages become one huge one (`collapse_huge_page`).
    Collapse,
    /// Pages of equal bytes become one (`try_to_merge_one_page`, `replace_page`).
    Ksm,
}

/// A word that names no path.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{given}` is no path; choose from {}", Path::EVERY.map(Path::name).join(", "))]
pub struct PathError {
    given: String,
}

impl Path {
    /// Every path, in the order of reports.
    pub const EVERY: [Self; 20] = [
        Self::Map,
        Self::Read,
        Self::Write,
        Self::Fork,
        Self::Snapshot,
        Self::Cow,
        Self::Placeholder,
        Self::Aging,
        Self::Writeback,
        Self::Swapout,
        Self::Migrate,
        Self::Cluster,
        Self::Munmap,
        Self::Dontneed,
        Self::Truncate,
        Self::Exit,
        Self::Mremap,
        Self::Mprotect,
        Self::Collapse,
        Self::Ksm,
    ];

    /// The word that reports and `--paths` use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Map => "map",
            Self::Read => "read",
            Self::Write => "write",
            Self::Fork => "fork",
            Self::Snapshot => "snapshot",
            Self::Cow => "cow",
            Self::Placeholder => "placeholder",
            Self::Aging => "aging",
            Self::Writeback => "writeback",
            Self::Swapout => "swapout",
            Self::Migrate => "migrate",
            Self::Cluster => "cluster",
            Self::Munmap => "munmap",
            Self::Dontneed => "dontneed",
            Self::Truncate => "truncate",
            Self::Exit => "exit",
            Self::Mremap => "mremap",
            Self::Mprotect => "mprotect",
            Self::Collapse => "collapse",
            Self::Ksm => "ksm",
        }
    }

    /// Whose notifier calls are counted as the path's.
    #[must_use]
    pub const fn of_twin(twin: Twin) -> Self {
        match twin {
            Twin::Fork => Self::Fork,
            Twin::Snapshot => Self::Snapshot,
            Twin::CopyOnWrite => Self::Cow,
            Twin::Placeholder => Self::Placeholder,
            Twin::Aging => Self::Aging,
            Twin::WriteBack => Self::Writeback,
            Twin::SwapOut => Self::Swapout,
            Twin::Migrate => Self::Migrate,
            Twin::Cluster => Self::Cluster,
            Twin::Unmap => Self::Munmap,
            Twin::DontNeed => Self::Dontneed,
            Twin::Truncate => Self::Truncate,
            Twin::Exit => Self::Exit,
            Twin::Remap => Self::Mremap,
            Twin::Protect => Self::Mprotect,
            Twin::Collapse => Self::Collapse,
            Twin::Merge => Self::Ksm,
        }
    }

    /// Whether the path takes something away from devices, so that a run without a round of it has shown
    /// nothing.
    #[must_use]
    pub const fn has_rounds(self) -> bool {
        !matches!(self, Self::Map | Self::Read | Self::Write)
    }

    /// Whether devices' reads are counted by it. Aging takes pages of any address space, and does not say
    /// which.
    #[must_use]
    pub const fn has_reads(self) -> bool {
        self.has_rounds() && !matches!(self, Self::Aging)
    }

    /// Whether it asks for young bits without waiting for a device (`test_young`).
    #[must_use]
    pub const fn asks_young(self) -> bool {
        matches!(self, Self::Collapse)
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
    #[test]
    fn every_twin_is_a_path_of_its_own_name() {
        for twin in Twin::EVERY {
            let path = Path::of_twin(twin);
            assert!(path.has_rounds());
            assert_eq!(path.name(), twin.name());
        }
    }
}
