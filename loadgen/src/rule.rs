//! The rules that a run can break on purpose. A checker that has never failed has shown nothing.
//!
//! Nothing in `shootdownd` or `shootdown-agent` knows of them: they are filled in where a program of ours
//! stands between a source and the host agent ([`Notifier`](shootdown_server::source::Notifier)), or between
//! the SDK and the device ([`DeviceTlb`](shootdown_client::DeviceTlb)).

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

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
        }
    }
}
