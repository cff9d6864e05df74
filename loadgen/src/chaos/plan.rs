//! What a run does: its command line, the faults and the rules that it can break.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use shootdown_core::lease::LeaseTerms;
use shootdown_server::ListenAddr;
use shootdown_server::config::{ConfigError, Settings, Span};

use crate::cli::Output;

/// Two moves of the most pages: as few as leave half of the movers something to do.
const QUARANTINE_PAGES: usize = 8;

/// Faults into processes that run; every read of every device is checked
#[derive(Debug, Clone, Args)]
pub struct ChaosArgs {
    /// How long, in seconds [default: 60; with --count until so many faults were injected]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub seconds: Option<u32>,
    /// Device agents
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=8))]
    pub devices: u16,
    /// Tasks of each device that read and write
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=8))]
    pub workers: u16,
    /// Pages of the memory
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(8..=4096))]
    pub pages: u16,
    /// Tasks that move pages to other frames
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=16))]
    pub movers: u16,
    /// The devices' lease
    #[arg(long, default_value = "400ms", value_parser = humantime::parse_duration)]
    pub lease: Duration,
    /// The margin of the lease, on either side [default: as shootdownd's, 100ms or a tenth of a shorter lease]
    #[arg(long, value_parser = humantime::parse_duration)]
    pub lease_margin: Option<Duration>,
    /// T_ack: how long a device may owe an ack before it is suspect
    #[arg(long, default_value = "200ms", value_parser = humantime::parse_duration)]
    pub ack_timeout: Duration,
    /// How long a move waits before it keeps its frames and goes on waiting
    #[arg(long, default_value = "100ms", value_parser = humantime::parse_duration)]
    pub deadline: Duration,
    /// The faults [default: all; of a run that breaks a rule those that show it]
    #[arg(long, value_enum, value_delimiter = ',', value_name = "FAULT")]
    pub only: Vec<FaultKind>,
    /// End after so many faults
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub count: Option<u32>,
    /// Of every random choice [default: one from the clock]
    #[arg(long)]
    pub seed: Option<u64>,
    /// Break a rule on purpose: the run must fail, and ends when the checker has found it
    #[arg(long = "break", value_enum, value_name = "RULE")]
    pub rule: Option<Broken>,
    /// How the report is written
    #[arg(long, value_enum, default_value_t = Output::Text)]
    pub output: Output,
    /// Pass the agents' logs through
    #[arg(short, long)]
    pub verbose: bool,
}

/// A fault.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FaultKind {
    /// A device agent is killed (-9) and started again
    DeviceKill,
    /// A device agent is stopped for less than its lease
    DeviceStop,
    /// A device agent is stopped past its lease
    DeviceStopPastLease,
    /// A device's flushes take long
    DeviceSlow,
    /// A device's connection is reset
    ConnectionReset,
    /// A device is cut off for less than its lease (needs root and nft)
    Partition,
    /// A device is cut off past its lease (needs root and nft)
    PartitionPastLease,
    /// The host agent is killed (-9) and started again
    HostKill,
    /// The host agent is stopped for a moment
    HostStop,
    /// The host agent is stopped past all leases, a successor takes over, and then it goes on
    HostTakeOver,
    /// The host agent is asked to stop, and its successor goes on with its sessions
    HostRestart,
}

/// A rule to break.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Broken {
    /// The clock of a device stands still while it is stopped or cut off
    Lease,
    /// Devices go on with what they held before they flushed
    ResumeSkipsFlush,
    /// The host agent's journal is removed before it starts again
    NoGrace,
    /// Frames are given away when the deadline passes
    TimeoutIsAck,
}

impl FaultKind {
    /// Every one.
    #[must_use]
    pub fn every() -> &'static [Self] {
        Self::value_variants()
    }

    /// The word that `--only` takes.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::DeviceKill => "device-kill",
            Self::DeviceStop => "device-stop",
            Self::DeviceStopPastLease => "device-stop-past-lease",
            Self::DeviceSlow => "device-slow",
            Self::ConnectionReset => "connection-reset",
            Self::Partition => "partition",
            Self::PartitionPastLease => "partition-past-lease",
            Self::HostKill => "host-kill",
            Self::HostStop => "host-stop",
            Self::HostTakeOver => "host-take-over",
            Self::HostRestart => "host-restart",
        }
    }

    /// Whether it happens to the host agent.
    #[must_use]
    pub const fn is_of_the_host_agent(self) -> bool {
        matches!(self, Self::HostKill | Self::HostStop | Self::HostTakeOver | Self::HostRestart)
    }

    /// Whether it needs a network of its own for each device.
    #[must_use]
    pub const fn needs_a_network(self) -> bool {
        matches!(self, Self::Partition | Self::PartitionPastLease)
    }
}

impl Broken {
    /// The word that `--break` takes.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Lease => "lease",
            Self::ResumeSkipsFlush => "resume-skips-flush",
            Self::NoGrace => "no-grace",
            Self::TimeoutIsAck => "timeout-is-ack",
        }
    }

    /// The faults that show it.
    #[must_use]
    pub const fn shown_by(self) -> &'static [FaultKind] {
        match self {
            Self::Lease => &[FaultKind::DeviceStopPastLease, FaultKind::PartitionPastLease],
            Self::ResumeSkipsFlush => &[FaultKind::DeviceStopPastLease, FaultKind::HostKill],
            Self::NoGrace => &[FaultKind::HostKill],
            Self::TimeoutIsAck => &[FaultKind::DeviceStop, FaultKind::Partition],
        }
    }
}

impl ChaosArgs {
    /// The faults that are asked for.
    #[must_use]
    pub fn faults(&self) -> Vec<FaultKind> {
        let mut faults = match (self.only.as_slice(), self.rule) {
            ([], Some(rule)) => rule.shown_by().to_vec(),
            ([], None) => FaultKind::every().to_vec(),
            (only, _) => only.to_vec(),
        };
        faults.sort_unstable();
        faults.dedup();
        faults
    }

    /// The lease with its corrections, as host agent and devices are told.
    #[must_use]
    pub fn lease_terms(&self) -> LeaseTerms {
        LeaseTerms {
            duration: self.lease,
            margin: self.lease_margin.unwrap_or_else(|| LeaseTerms::default_margin(self.lease)),
            ..LeaseTerms::default()
        }
    }

    /// What the host agent has room for: so little that calls are refused for want of it now and then, where devices
    /// are slow or gone. A run that breaks a rule is to find that, and has all the room that there is.
    pub(crate) fn limits(&self) -> Option<Limits> {
        let rounds = usize::from(self.movers).saturating_sub(1).max(1);
        self.rule.is_none().then_some(Limits { rounds, pages: QUARANTINE_PAGES })
    }

    /// Whether a host agent takes these times.
    ///
    /// # Errors
    /// [`ConfigError`]: the host agent's own.
    pub fn check(&self) -> Result<(), ConfigError> {
        let settings = Settings {
            listen: vec![ListenAddr::Tcp((Ipv4Addr::LOCALHOST, 0).into())],
            lease: Some(Span(self.lease)),
            lease_margin: self.lease_margin.map(Span),
            ack_timeout: Some(Span(self.ack_timeout)),
            ..Settings::default()
        };
        settings.resolve().map(drop)
    }

    /// The command that repeats the run.
    #[must_use]
    pub fn repeat(&self, seed: u64) -> String {
        let time = humantime::format_duration;
        let mut command = format!(
            "shootdown-loadgen chaos --seed {seed} --devices {} --workers {} --pages {} --movers {} --lease {} \
             --lease-margin {} --ack-timeout {} --deadline {}",
            self.devices,
            self.workers,
            self.pages,
            self.movers,
            time(self.lease),
            time(self.lease_terms().margin),
            time(self.ack_timeout),
            time(self.deadline),
        );
        let only: Vec<&str> = self.only.iter().map(|fault| fault.name()).collect();
        let options = [
            ("--seconds", self.seconds.map(|seconds| seconds.to_string())),
            ("--count", self.count.map(|count| count.to_string())),
            ("--only", (!only.is_empty()).then(|| only.join(","))),
            ("--break", self.rule.map(|rule| rule.name().to_owned())),
        ];
        for (option, value) in options {
            if let Some(value) = value {
                command.push_str(&format!(" {option} {value}"));
            }
        }
        command
    }
}

/// What the host agent has room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Rounds that wait at once.
    pub(crate) rounds: usize,
    /// Pages in quarantine.
    pub(crate) pages: usize,
}

/// The places of a run's files.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Places {
    pub(crate) directory: PathBuf,
}

impl Places {
    pub(crate) fn source_socket(&self) -> PathBuf {
        self.directory.join("source.sock")
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.directory.join("state")
    }

    pub(crate) fn frames(&self) -> PathBuf {
        self.directory.join("frames")
    }

    pub(crate) fn findings(&self) -> PathBuf {
        self.directory.join("findings")
    }
}

/// What a device's process is told, as an argument.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct DevicePlan {
    pub(crate) places: Places,
    /// Which device this is.
    pub(crate) index: usize,
    pub(crate) devices: usize,
    pub(crate) workers: usize,
    pub(crate) pages: usize,
    /// Where the host agent listens for it.
    pub(crate) host_agent: SocketAddr,
    pub(crate) address_space: u64,
    pub(crate) lease: Duration,
    pub(crate) lease_margin: Duration,
    pub(crate) seed: u64,
    pub(crate) rule: Option<Broken>,
}

/// The settings of the host agent, as a program that was started with sockets has them.
pub(crate) type HostSettings = Settings;

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Program {
        #[command(flatten)]
        chaos: ChaosArgs,
    }

    #[test]
    fn names_are_those_of_the_command_line() {
        for fault in FaultKind::every() {
            let taken = fault.to_possible_value().map(|value| value.get_name().to_owned());
            assert_eq!(taken.as_deref(), Some(fault.name()));
        }
        for rule in Broken::value_variants() {
            let taken = rule.to_possible_value().map(|value| value.get_name().to_owned());
            assert_eq!(taken.as_deref(), Some(rule.name()));
            assert!(rule.shown_by().iter().any(|fault| !fault.needs_a_network()), "{rule:?} without root");
        }
    }

    #[test]
    fn the_command_that_repeats_a_run_is_the_same_run() {
        let given = [
            "chaos",
            "--only",
            "host-kill,partition",
            "--count",
            "7",
            "--break",
            "no-grace",
            "--devices",
            "2",
            "--lease",
            "350ms",
        ];
        let chaos = Program::try_parse_from(given).unwrap().chaos;
        let repeat = chaos.repeat(9);
        let words: Vec<&str> = repeat.split_whitespace().skip(1).collect();
        let again = Program::try_parse_from(words).unwrap().chaos;
        assert_eq!(again.seed, Some(9));
        assert_eq!(again.faults(), [FaultKind::Partition, FaultKind::HostKill]);
        assert_eq!((again.count, again.rule, again.devices), (Some(7), Some(Broken::NoGrace), 2));
        assert_eq!(again.lease, Duration::from_millis(350));
        assert_eq!(again.repeat(9), repeat);
    }
}
