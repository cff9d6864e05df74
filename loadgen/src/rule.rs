//! The rules that a run can break on purpose. A checker that has never failed has shown nothing.
//!
//! Nothing in `shootdownd` or `shootdown-agent` knows of them: they are filled in where a program of ours
//! stands between a source and the host agent ([`Notifier`](shootdown_server::source::Notifier)), or between
//! the SDK and the device ([`DeviceTlb`](shootdown_client::DeviceTlb)).
//!
//! There is at least one for each row of the memory source's table of paths. `free_pgtables` calls no notifier, so
//! its break is on the other side: what the host agent asks a source when a device faults
//! ([`Translate`](shootdown_server::source::Translate)).

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::path::Path;

/// A rule to break.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[value(rename_all = "kebab-case")]
pub enum Rule {
    /// NoFreeBeforeQuiesce: pages are released before the devices' acks (host side)
    ReleaseBeforeAck,
    /// StableTargets: one device skips its flushes, because every event comes with its owner tag (host side)
    SkipOneTarget,
    /// AckMeansStopped: devices ack first and flush afterwards (device side)
    FlushAfterAck,
    /// NoGrantInWindow: brackets end as soon as they have begun (host side)
    GrantInWindow,
    /// dup_mmap: devices keep the leave to write to what a fork shares, and what they wrote (host side)
    ForkWriteKept,
    /// copy_page_range: devices keep the leave to write to what a snapshot shows, and what they wrote (host side)
    SnapshotWriteKept,
    /// do_wp_page: the old page is released before devices hear of the copy (host side)
    CowFreeBeforeNotify,
    /// __xip_unmap: devices keep the placeholder that a real page replaces (host side)
    PlaceholderNotInvalidated,
    /// page_referenced_one: what devices used counts as not used (host side)
    YoungBitsDropped,
    /// page_mkclean_one: devices keep the leave to write, and what they wrote (host side)
    WriteKeptAfterMkclean,
    /// try_to_unmap_one: a page that is swapped out is mistaken for one that stays, and nobody is told (host side)
    SwapFailMistaken,
    /// try_to_unmap_one: nobody is told of a migration (host side)
    MigrateNotNotified,
    /// try_to_unmap_cluster: devices hear of it after the bracket (host side)
    ClusterOutsideBracket,
    /// unmap_vmas, zap_page_range: what was gathered is freed before devices have flushed (host side)
    GatherFreedBeforeFlush,
    /// free_pgtables: a fault is answered from page tables that were freed (host side)
    PgtablesFreedUnderWalk,
    /// exit_mmap: the release comes after the unmap (host side)
    ReleaseAfterUnmap,
    /// khugepaged: the pages are collapsed outside of a bracket (host side)
    CollapseNotBracketed,
    /// KSM: the hint of change_pte is delivered after its bracket (host side)
    ChangePteOutsideBracket,
    /// mremap: devices keep what they held at the new place (host side)
    MremapNewPlaceKept,
    /// mremap: devices keep what they held at the old place (host side)
    MremapOldPlaceKept,
    /// mprotect: devices keep the leave to write, and what they wrote (host side)
    MprotectWriteKept,
}

impl Rule {
    /// The word that `--break` takes.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::ReleaseBeforeAck => "release-before-ack",
            Self::SkipOneTarget => "skip-one-target",
            Self::FlushAfterAck => "flush-after-ack",
            Self::GrantInWindow => "grant-in-window",
            Self::ForkWriteKept => "fork-write-kept",
            Self::SnapshotWriteKept => "snapshot-write-kept",
            Self::CowFreeBeforeNotify => "cow-free-before-notify",
            Self::PlaceholderNotInvalidated => "placeholder-not-invalidated",
            Self::YoungBitsDropped => "young-bits-dropped",
            Self::WriteKeptAfterMkclean => "write-kept-after-mkclean",
            Self::SwapFailMistaken => "swap-fail-mistaken",
            Self::MigrateNotNotified => "migrate-not-notified",
            Self::ClusterOutsideBracket => "cluster-outside-bracket",
            Self::GatherFreedBeforeFlush => "gather-freed-before-flush",
            Self::PgtablesFreedUnderWalk => "pgtables-freed-under-walk",
            Self::ReleaseAfterUnmap => "release-after-unmap",
            Self::CollapseNotBracketed => "collapse-not-bracketed",
            Self::ChangePteOutsideBracket => "change-pte-outside-bracket",
            Self::MremapNewPlaceKept => "mremap-new-place-kept",
            Self::MremapOldPlaceKept => "mremap-old-place-kept",
            Self::MprotectWriteKept => "mprotect-write-kept",
        }
    }

    /// The paths that show it, which a run exercises where none are named.
    #[must_use]
    pub fn paths(self) -> Vec<Path> {
        let shown: &[Path] = match self {
            // As they were before there were the others: whoever breaks every round is found by any of them.
            Self::ReleaseBeforeAck | Self::SkipOneTarget | Self::FlushAfterAck | Self::GrantInWindow => {
                &[Path::Map, Path::Fork, Path::Cow, Path::Munmap, Path::Dontneed, Path::Exit]
            }
            Self::ForkWriteKept => &[Path::Fork],
            Self::SnapshotWriteKept => &[Path::Snapshot],
            Self::CowFreeBeforeNotify => &[Path::Fork, Path::Cow],
            Self::PlaceholderNotInvalidated => &[Path::Placeholder, Path::Truncate],
            Self::YoungBitsDropped => &[Path::Aging],
            Self::WriteKeptAfterMkclean => &[Path::Writeback],
            Self::SwapFailMistaken => &[Path::Swapout],
            Self::MigrateNotNotified => &[Path::Migrate],
            Self::ClusterOutsideBracket => &[Path::Cluster, Path::Swapout],
            Self::GatherFreedBeforeFlush => &[Path::Map, Path::Munmap, Path::Dontneed, Path::Truncate],
            Self::PgtablesFreedUnderWalk => &[Path::Map, Path::Munmap],
            Self::ReleaseAfterUnmap => &[Path::Exit],
            Self::CollapseNotBracketed => &[Path::Collapse],
            Self::ChangePteOutsideBracket => &[Path::Ksm],
            Self::MremapNewPlaceKept | Self::MremapOldPlaceKept => &[Path::Map, Path::Mremap],
            Self::MprotectWriteKept => &[Path::Mprotect],
        };
        let mut paths = vec![Path::Read, Path::Write];
        paths.extend(shown);
        paths.sort_unstable();
        paths
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_is_named_as_the_command_line_takes_it() {
        for rule in Rule::value_variants() {
            let taken = rule.to_possible_value().map(|value| value.get_name().to_owned());
            assert_eq!(taken.as_deref(), Some(rule.name()));
            assert!(rule.paths().iter().any(|path| path.has_rounds()), "{rule:?}");
        }
    }
}
