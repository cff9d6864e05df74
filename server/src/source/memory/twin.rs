//! The twins of the kernel's paths, by name: which one a notifier call comes from.
//!
//! A source's calls look alike: `invalidate_page` with the cause CLEAR is what copy on write sends, and
//! reclaim too. Who stands between the source and the host agent, to count or to trace, asks
//! [`Twin::current`] whose call it is.

use std::fmt;
use std::future::Future;

/// The twin of a kernel path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Twin {
    /// `dup_mmap`, `copy_page_range`.
    Fork,
    /// `copy_page_range` for a picture of an address space that nobody runs in.
    Snapshot,
    /// `do_wp_page`.
    CopyOnWrite,
    /// `__xip_unmap`.
    Placeholder,
    /// `page_referenced_one`.
    Aging,
    /// `page_mkclean_one`.
    WriteBack,
    /// `try_to_unmap_one`, for reclaim.
    SwapOut,
    /// `try_to_unmap_one`, for migration.
    Migrate,
    /// `try_to_unmap_cluster`.
    Cluster,
    /// `unmap_vmas` and `free_pgtables`, for munmap.
    Unmap,
    /// `zap_page_range`, for `MADV_DONTNEED`.
    DontNeed,
    /// `unmap_mapping_range`.
    Truncate,
    /// `exit_mmap`.
    Exit,
    /// `move_page_tables`.
    Remap,
    /// `change_protection`.
    Protect,
    /// `collapse_huge_page`.
    Collapse,
    /// `try_to_merge_one_page`, `replace_page`.
    Merge,
}

tokio::task_local! {
    static CURRENT: Twin;
}

impl Twin {
    /// Every twin, in the order of reports.
    pub const EVERY: [Self; 17] = [
        Self::Fork,
        Self::Snapshot,
        Self::CopyOnWrite,
        Self::Placeholder,
        Self::Aging,
        Self::WriteBack,
        Self::SwapOut,
        Self::Migrate,
        Self::Cluster,
        Self::Unmap,
        Self::DontNeed,
        Self::Truncate,
        Self::Exit,
        Self::Remap,
        Self::Protect,
        Self::Collapse,
        Self::Merge,
    ];

    /// The twin whose notifier call this is; `None` outside of the memory source.
    #[must_use]
    pub fn current() -> Option<Self> {
        CURRENT.try_with(|twin| *twin).ok()
    }

    /// The word that reports use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fork => "fork",
            Self::Snapshot => "snapshot",
            Self::CopyOnWrite => "cow",
            Self::Placeholder => "placeholder",
            Self::Aging => "aging",
            Self::WriteBack => "writeback",
            Self::SwapOut => "swapout",
            Self::Migrate => "migrate",
            Self::Cluster => "cluster",
            Self::Unmap => "munmap",
            Self::DontNeed => "dontneed",
            Self::Truncate => "truncate",
            Self::Exit => "exit",
            Self::Remap => "mremap",
            Self::Protect => "mprotect",
            Self::Collapse => "collapse",
            Self::Merge => "ksm",
        }
    }

    /// Runs `work` as this twin; a twin that it runs inside is that one's.
    pub(super) async fn run<T>(self, work: impl Future<Output = T>) -> T {
        CURRENT.scope(self, work).await
    }
}

impl fmt::Display for Twin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
