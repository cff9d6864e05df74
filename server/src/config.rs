//! Settings of the daemon: flags over environment over file over defaults.

mod resolve;
mod fencers;
mod error;

use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use clap::Args;
use serde::{Deserialize, Deserializer};
use shootdown_proto::endpoint::Endpoint;

pub use self::error::ConfigError;
pub use self::resolve::{Config, StateConfig};
pub use crate::journal::Takeover;
use crate::listen::ListenAddr;

/// A time as people write it: `250ms`, `10s`, `2m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span(pub Duration);

impl FromStr for Span {
    type Err = humantime::DurationError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        humantime::parse_duration(text).map(Self)
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl<'de> Deserialize<'de> for ListenAddr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// The settings, each as it may be given: by flag, by environment, or in the file, where the name has
/// underscores.
#[derive(Debug, Clone, Default, Args, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Listen for devices here: IP:PORT, tcp://IP:PORT, unix:/PATH or fd://NAME (passed, as by systemd). Repeatable
    #[arg(long, env = "SHOOTDOWND_LISTEN", value_delimiter = ',')]
    #[serde(default)]
    pub listen: Vec<ListenAddr>,
    /// Listen for sources (NotifierService, MemoryService) here: unix:/PATH or fd://NAME. Repeatable
    #[arg(long, env = "SHOOTDOWND_SOURCE_LISTEN", value_delimiter = ',')]
    #[serde(default)]
    pub source_listen: Vec<ListenAddr>,
    /// Listen for administrators (AdminService) here: unix:/PATH or fd://NAME. Repeatable
    #[arg(long, env = "SHOOTDOWND_ADMIN_LISTEN", value_delimiter = ',')]
    #[serde(default)]
    pub admin_listen: Vec<ListenAddr>,
    /// Users that may call the source and administrator services, beside root and the daemon's own. Repeatable
    #[arg(long, env = "SHOOTDOWND_ALLOW_UID", value_delimiter = ',')]
    #[serde(default)]
    pub allow_uid: Vec<u32>,
    /// Listen in plaintext on addresses that other machines can reach
    #[arg(long, env = "SHOOTDOWND_INSECURE")]
    #[serde(default)]
    pub insecure: bool,
    /// Threads for sessions, each with a runtime of its own [default: one a core]
    #[arg(long, env = "SHOOTDOWND_SHARDS")]
    pub shards: Option<usize>,
    /// The longest that a shard polls before it sleeps while a round waits; 0s: not at all [default: 100us]
    #[arg(long, env = "SHOOTDOWND_BUSY_POLL")]
    pub busy_poll: Option<Span>,
    /// How long a device may use its translations after it last asked [default: 5s]
    #[arg(long, env = "SHOOTDOWND_LEASE")]
    pub lease: Option<Span>,
    /// The most by which a device's clock and the host's differ, in parts per million [default: 600]
    #[arg(long, env = "SHOOTDOWND_LEASE_DRIFT_PPM")]
    pub lease_drift_ppm: Option<u32>,
    /// Added to a lease on the host, taken away from it on the device [default: 100ms, a tenth of a shorter lease]
    #[arg(long, env = "SHOOTDOWND_LEASE_MARGIN")]
    pub lease_margin: Option<Span>,
    /// How long a device may owe an ack before it is suspect and its lease not renewed [default: 1s]
    #[arg(long, env = "SHOOTDOWND_ACK_TIMEOUT")]
    pub ack_timeout: Option<Span>,
    /// A program that cuts a device off which owes an ack for too long; exit status 0 confirms it [default: none]
    #[arg(long, env = "SHOOTDOWND_FENCE_COMMAND", conflicts_with = "fence_endpoint")]
    pub fence_command: Option<PathBuf>,
    /// A FencerService that does: HOST:PORT, tcp://HOST:PORT or unix:/PATH [default: none]
    #[arg(long, env = "SHOOTDOWND_FENCE_ENDPOINT")]
    pub fence_endpoint: Option<Endpoint>,
    /// How long one attempt to cut a device off may take [default: 5s]
    #[arg(long, env = "SHOOTDOWND_FENCE_TIMEOUT")]
    pub fence_timeout: Option<Span>,
    /// Fencers of certain devices, before the two above; in the file only.
    #[arg(skip)]
    #[serde(default)]
    pub fencer: Vec<FencerSettings>,
    /// The most bytes of ranges that may be quarantined before callers have to wait [default: 17179869184]
    #[arg(long, env = "SHOOTDOWND_QUARANTINE_BYTES")]
    pub quarantine_bytes: Option<u64>,
    /// The most pages that may be [default: 262144]
    #[arg(long, env = "SHOOTDOWND_QUARANTINE_PAGES")]
    pub quarantine_pages: Option<u64>,
    /// The most notices of a session that are sent and not acked [default: 64]
    #[arg(long, env = "SHOOTDOWND_WINDOW")]
    pub window: Option<u32>,
    /// The most ranges of a session that are kept apart while they are not sent [default: 1024]
    #[arg(long, env = "SHOOTDOWND_MAX_PENDING")]
    pub max_pending: Option<usize>,
    /// The most sessions [default: 4096]
    #[arg(long, env = "SHOOTDOWND_MAX_SESSIONS")]
    pub max_sessions: Option<usize>,
    /// The most connections of devices [default: four for each of the sessions, as far as the limit of open files goes]
    #[arg(long, env = "SHOOTDOWND_MAX_CONNECTIONS")]
    pub max_connections: Option<usize>,
    /// The most subscriptions of a session [default: 1024]
    #[arg(long, env = "SHOOTDOWND_MAX_SUBSCRIPTIONS")]
    pub max_subscriptions: Option<usize>,
    /// The most faults of a session that wait [default: 256]
    #[arg(long, env = "SHOOTDOWND_MAX_FAULTS_IN_FLIGHT")]
    pub max_faults_in_flight: Option<usize>,
    /// The most address spaces [default: 4096]
    #[arg(long, env = "SHOOTDOWND_MAX_ADDRESS_SPACES")]
    pub max_address_spaces: Option<usize>,
    /// The most rounds in flight of an address space [default: 16384]
    #[arg(long, env = "SHOOTDOWND_MAX_ROUNDS_IN_FLIGHT")]
    pub max_rounds_in_flight: Option<usize>,
    /// Frames of 4 KiB of the memory source [default: 16384]
    #[arg(long, env = "SHOOTDOWND_MEMORY_FRAMES")]
    pub memory_frames: Option<usize>,
    /// The most bytes of pages that the memory source keeps in frames; beyond it pages are swapped out [default: all frames]
    #[arg(long, env = "SHOOTDOWND_MEMORY_LIMIT_BYTES")]
    pub memory_limit_bytes: Option<usize>,
    /// The file that the memory source swaps to, made or emptied at the start [default: none]
    #[arg(long, env = "SHOOTDOWND_SWAP_FILE")]
    pub swap_file: Option<PathBuf>,
    /// The most bytes of it [default: four times the frames]
    #[arg(long, env = "SHOOTDOWND_SWAP_BYTES")]
    pub swap_bytes: Option<usize>,
    /// Ask devices when they received and flushed each notice
    #[arg(long, env = "SHOOTDOWND_STAGE_TIMING")]
    #[serde(default)]
    pub stage_timing: bool,
    /// Keep here which devices may hold leases, so that a restart waits for them
    #[arg(long, env = "SHOOTDOWND_STATE_DIR")]
    pub state_dir: Option<PathBuf>,
    /// Take the state directory and the Unix sockets over from a host agent that is stopped or hangs
    #[arg(long, env = "SHOOTDOWND_TAKE_OVER")]
    #[serde(default)]
    pub take_over: bool,
    /// How long devices have to leave when the daemon stops [default: 10s]
    #[arg(long, env = "SHOOTDOWND_DRAIN_TIMEOUT")]
    pub drain_timeout: Option<Span>,
    /// How long a source may take to answer a fault over ServeFaults [default: 10s]
    #[arg(long, env = "SHOOTDOWND_SOURCE_FAULT_TIMEOUT")]
    pub source_fault_timeout: Option<Span>,
}

/// The fencer of certain devices: a `[[fencer]]` of the file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FencerSettings {
    /// Their names; `*` stands for any text.
    pub devices: Vec<String>,
    /// As `fence_command`.
    pub command: Option<PathBuf>,
    /// As `fence_endpoint`.
    pub endpoint: Option<Endpoint>,
    /// As `fence_timeout`, which is its default.
    pub timeout: Option<Span>,
}

impl Settings {
    /// Reads settings from a file.
    ///
    /// # Errors
    /// [`ConfigError::Read`], [`ConfigError::Parse`].
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let text =
            fs::read_to_string(path).map_err(|error| ConfigError::Read { path: path.into(), error })?;
        toml::from_str(&text)
            .map_err(|error| ConfigError::Parse { path: path.into(), error: Box::new(error) })
    }

    /// These settings, and those of `file` where these say nothing.
    #[must_use]
    pub fn or(self, file: Self) -> Self {
        let list = |own: Vec<_>, other: Vec<_>| if own.is_empty() { other } else { own };
        // The two are one setting: a flag for the one takes the place of the other in the file.
        let (fence_command, fence_endpoint) = match (self.fence_command, self.fence_endpoint) {
            (None, None) => (file.fence_command, file.fence_endpoint),
            by_flag => by_flag,
        };
        Self {
            listen: list(self.listen, file.listen),
            source_listen: list(self.source_listen, file.source_listen),
            admin_listen: list(self.admin_listen, file.admin_listen),
            allow_uid: if self.allow_uid.is_empty() { file.allow_uid } else { self.allow_uid },
            insecure: self.insecure || file.insecure,
            shards: self.shards.or(file.shards),
            busy_poll: self.busy_poll.or(file.busy_poll),
            lease: self.lease.or(file.lease),
            lease_drift_ppm: self.lease_drift_ppm.or(file.lease_drift_ppm),
            lease_margin: self.lease_margin.or(file.lease_margin),
            ack_timeout: self.ack_timeout.or(file.ack_timeout),
            fence_timeout: self.fence_timeout.or(file.fence_timeout),
            fence_command,
            fence_endpoint,
            fencer: if self.fencer.is_empty() { file.fencer } else { self.fencer },
            quarantine_bytes: self.quarantine_bytes.or(file.quarantine_bytes),
            quarantine_pages: self.quarantine_pages.or(file.quarantine_pages),
            window: self.window.or(file.window),
            max_pending: self.max_pending.or(file.max_pending),
            max_sessions: self.max_sessions.or(file.max_sessions),
            max_connections: self.max_connections.or(file.max_connections),
            max_subscriptions: self.max_subscriptions.or(file.max_subscriptions),
            max_faults_in_flight: self.max_faults_in_flight.or(file.max_faults_in_flight),
            max_address_spaces: self.max_address_spaces.or(file.max_address_spaces),
            max_rounds_in_flight: self.max_rounds_in_flight.or(file.max_rounds_in_flight),
            memory_frames: self.memory_frames.or(file.memory_frames),
            memory_limit_bytes: self.memory_limit_bytes.or(file.memory_limit_bytes),
            swap_file: self.swap_file.or(file.swap_file),
            swap_bytes: self.swap_bytes.or(file.swap_bytes),
            stage_timing: self.stage_timing || file.stage_timing,
            state_dir: self.state_dir.or(file.state_dir),
            take_over: self.take_over || file.take_over,
            drain_timeout: self.drain_timeout.or(file.drain_timeout),
            source_fault_timeout: self.source_fault_timeout.or(file.source_fault_timeout),
        }
    }
}

#[cfg(test)]
mod tests;
