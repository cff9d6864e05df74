//! Settings of the daemon: flags over environment over file over defaults.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use clap::Args;
use rustix::fs::{Access, AtFlags, CWD, accessat};
use serde::{Deserialize, Deserializer};
use shootdown_core::Incarnation;
use shootdown_core::lease::LeaseTerms;
use shootdown_core::outbox::OutboxLimits;
use shootdown_core::session::SessionConfig;
use shootdown_proto::endpoint::Endpoint;

use crate::clock::Clock;
use crate::connections::{self, ConnectionLimits};
use crate::fence::{DevicePattern, Fencer, FencerRule};
use crate::host::HostConfig;
pub use crate::journal::Takeover;
use crate::listen::ListenAddr;
use crate::quarantine::QuarantineBudget;
use crate::source::rpc::DEFAULT_FAULT_TIMEOUT;

/// Rounds in flight of one address space. A round takes about half a kilobyte and what its targets
/// keep of it; a source with more to say at once waits.
const DEFAULT_ROUNDS_IN_FLIGHT: usize = 16_384;

/// Devices of one host: more than any machine has.
const DEFAULT_SESSIONS: usize = 4096;

/// Processes that share memory with devices.
const DEFAULT_ADDRESS_SPACES: usize = 4096;

/// 64 MiB of frames for the memory source, taken from the kernel only when they are used.
const DEFAULT_MEMORY_FRAMES: usize = 16_384;

/// A round trip to a device on the same machine or in the same rack, and half of what KVM polls by default.
const DEFAULT_BUSY_POLL: Duration = Duration::from_micros(100);

/// Below it the heartbeats, three a lease, and the host agent's own ticks are a good part of it.
const SHORTEST_LEASE: Duration = Duration::from_millis(50);

/// Above it a device that died holds up its callers for longer than anybody waits.
const LONGEST_LEASE: Duration = Duration::from_secs(3600);

/// T_fence where nothing else is said: a switch or an IOMMU is told in milliseconds, a power controller in
/// seconds.
const DEFAULT_FENCE_TIMEOUT: Duration = Duration::from_secs(5);

/// 1 GiB of pages that callers keep, in ranges that may be sparse.
const DEFAULT_QUARANTINE_PAGES: u64 = 1 << 18;
const DEFAULT_QUARANTINE_BYTES: u64 = 16 << 30;

/// Of the memory source.
const FRAME_BYTES: usize = 4096;

/// How long devices have to finish and leave when the daemon stops.
const DEFAULT_DRAIN: Duration = Duration::from_secs(10);

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

/// Everything that a host agent needs to start.
#[derive(Debug, Clone)]
pub struct Config {
    /// For devices.
    pub listen: Vec<ListenAddr>,
    /// For sources.
    pub source_listen: Vec<ListenAddr>,
    /// For administrators.
    pub admin_listen: Vec<ListenAddr>,
    /// Whether sockets that are passed may be reached from other machines.
    pub insecure: bool,
    /// What connections of devices may take.
    pub connections: ConnectionLimits,
    /// Users with leave for the latter two.
    pub allow_uids: Vec<u32>,
    /// Threads for sessions.
    pub shards: usize,
    /// The longest that a shard polls before it sleeps while a round waits.
    pub busy_poll: Duration,
    /// Frames of the memory source.
    pub memory_frames: usize,
    /// The most of them that are used for pages.
    pub memory_limit_frames: usize,
    /// The memory source's swap file, and how many pages it may have.
    pub swap: Option<(PathBuf, usize)>,
    /// How long devices have to leave.
    pub drain_timeout: Duration,
    /// Where to keep what the next run must know; without it a restart waits for nobody.
    pub state: Option<StateConfig>,
    /// The rules' limits.
    pub host: HostConfig,
}

/// What outlives a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateConfig {
    /// A directory of this host agent alone, on a local file system.
    pub dir: PathBuf,
    /// What to do if another has it.
    pub takeover: Takeover,
}

/// Why settings make no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read the config file {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// The file is not what it should be.
    #[error("the config file {path} is not valid")]
    Parse {
        /// Which.
        path: PathBuf,
        /// Where and why.
        #[source]
        error: Box<toml::de::Error>,
    },
    /// Nothing to listen on.
    #[error("nothing to listen on; give --listen, for example --listen 127.0.0.1:7400")]
    NoListener,
    /// A TCP address for privileged callers.
    #[error(
        "{address} is no Unix socket; sources and administrators are known by their credentials, which TCP does not have"
    )]
    NotUnix {
        /// Which.
        address: ListenAddr,
    },
    /// Plaintext that leaves the machine.
    #[error(
        "{address} can be reached from other machines, and there is no encryption; listen on loopback or a Unix socket, or say --insecure"
    )]
    Plaintext {
        /// Which.
        address: ListenAddr,
    },
    /// A fencer on another machine.
    #[error(
        "the fencer at {endpoint} may be on another machine, and there is no encryption: whoever is in between could confirm; use loopback, localhost or a Unix socket, or say --insecure"
    )]
    FencerInPlaintext {
        /// Which.
        endpoint: Endpoint,
    },
    /// A fencer that is no one, or two.
    #[error("the fencer of {devices:?} must have either a command or an endpoint")]
    Fencer {
        /// Of which devices.
        devices: Vec<String>,
    },
    /// There is no such program.
    #[error("fence_command is {path}, which cannot be looked at: no device could be cut off")]
    FenceCommand {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// It could never be started.
    #[error(
        "fence_command is {path}, which is no executable file for this user: no device could be cut off; make it one (chmod +x)"
    )]
    FenceCommandNotExecutable {
        /// Which.
        path: PathBuf,
    },
    /// Nobody is asked within it.
    #[error(
        "fence_timeout is set and there is no fencer; give --fence-command, --fence-endpoint or a [[fencer]]"
    )]
    FenceTimeoutOfNobody,
    /// Nobody can be taken over from.
    #[error("--take-over needs --state-dir: the state directory is what is taken over")]
    NothingToTakeOver,
    /// A number that cannot work.
    #[error("{setting} is {value}; it must be {expected}")]
    Value {
        /// Which.
        setting: &'static str,
        /// What it is.
        value: String,
        /// What would do.
        expected: &'static str,
    },
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

    /// Checks the settings and fills in the defaults.
    ///
    /// # Errors
    /// [`ConfigError`], naming the setting and what would do.
    pub fn resolve(self) -> Result<Config, ConfigError> {
        if self.listen.is_empty() {
            return Err(ConfigError::NoListener);
        }
        if let Some(address) = self.listen.iter().find(|address| !address.is_local() && !self.insecure) {
            return Err(ConfigError::Plaintext { address: address.clone() });
        }
        let privileged = self.source_listen.iter().chain(&self.admin_listen);
        if let Some(address) = privileged.into_iter().find(|address| matches!(address, ListenAddr::Tcp(_))) {
            return Err(ConfigError::NotUnix { address: address.clone() });
        }
        if self.take_over && self.state_dir.is_none() {
            return Err(ConfigError::NothingToTakeOver);
        }
        let takeover = if self.take_over { Takeover::IfHeld } else { Takeover::Never };
        let session = self.session()?;
        let source_fault_timeout = self.source_fault_timeout.map_or(DEFAULT_FAULT_TIMEOUT, |span| span.0);
        if source_fault_timeout.is_zero() {
            return Err(ConfigError::Value {
                setting: "source_fault_timeout",
                value: format!("{source_fault_timeout:?}"),
                expected: "longer than 0",
            });
        }
        let fencers = self.fencers()?;
        let own = rustix::process::geteuid().as_raw();
        let memory_frames =
            at_least_one("memory_frames", self.memory_frames.unwrap_or(DEFAULT_MEMORY_FRAMES))?;
        let frames_of = |setting, bytes: Option<usize>, default| match bytes {
            Some(bytes) => at_least_one(setting, bytes / FRAME_BYTES).map_err(|_| ConfigError::Value {
                setting,
                value: bytes.to_string(),
                expected: "at least a page, 4096",
            }),
            None => Ok(default),
        };
        let swap_slots = frames_of("swap_bytes", self.swap_bytes, memory_frames.saturating_mul(4))?;
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let shards = at_least_one("shards", self.shards.unwrap_or(cores))?;
        let max_sessions = at_least_one("max_sessions", self.max_sessions.unwrap_or(DEFAULT_SESSIONS))?;
        Ok(Config {
            insecure: self.insecure,
            connections: self.connections(max_sessions, shards)?,
            allow_uids: [0, own].into_iter().chain(self.allow_uid).collect(),
            shards,
            busy_poll: self.busy_poll.map_or(DEFAULT_BUSY_POLL, |span| span.0),
            memory_frames,
            memory_limit_frames: frames_of("memory_limit_bytes", self.memory_limit_bytes, memory_frames)?,
            swap: self.swap_file.map(|path| (path, swap_slots)),
            drain_timeout: self.drain_timeout.map_or(DEFAULT_DRAIN, |span| span.0),
            state: self.state_dir.map(|dir| StateConfig { dir, takeover }),
            host: HostConfig {
                session,
                max_sessions,
                max_address_spaces: at_least_one(
                    "max_address_spaces",
                    self.max_address_spaces.unwrap_or(DEFAULT_ADDRESS_SPACES),
                )?,
                max_rounds_in_flight: at_least_one(
                    "max_rounds_in_flight",
                    self.max_rounds_in_flight.unwrap_or(DEFAULT_ROUNDS_IN_FLIGHT),
                )?,
                fencers,
                quarantine: QuarantineBudget {
                    bytes: at_least_one(
                        "quarantine_bytes",
                        self.quarantine_bytes.unwrap_or(DEFAULT_QUARANTINE_BYTES),
                    )?,
                    pages: at_least_one(
                        "quarantine_pages",
                        self.quarantine_pages.unwrap_or(DEFAULT_QUARANTINE_PAGES),
                    )?,
                },
                stage_timing: self.stage_timing,
                source_fault_timeout,
                incarnation: incarnation(),
                clock: Clock::BOOTTIME,
            },
            listen: self.listen,
            source_listen: self.source_listen,
            admin_listen: self.admin_listen,
        })
    }

    /// More than there is room for would be at the cost of sources and administrators.
    fn connections(&self, max_sessions: usize, shards: usize) -> Result<ConnectionLimits, ConfigError> {
        let room = connections::room_for_devices(shards);
        let most = match self.max_connections {
            Some(most) if most > room => {
                return Err(ConfigError::Value {
                    setting: "max_connections",
                    value: most.to_string(),
                    expected: "less than the limit of open files (ulimit -n), of which a quarter is for others",
                });
            }
            Some(most) => at_least_one("max_connections", most)?,
            None => connections::most_by_default(max_sessions, room),
        };
        Ok(ConnectionLimits { most, first_request_within: connections::FIRST_REQUEST_WITHIN })
    }

    fn session(&self) -> Result<SessionConfig, ConfigError> {
        let defaults = SessionConfig::default();
        let duration = self.lease.map_or(defaults.lease.duration, |span| span.0);
        if !(SHORTEST_LEASE..=LONGEST_LEASE).contains(&duration) {
            return Err(ConfigError::Value {
                setting: "lease",
                value: format!("{duration:?}"),
                expected: "from 50ms to 1h",
            });
        }
        let margin = LeaseTerms::default_margin(duration);
        let lease = LeaseTerms {
            duration,
            drift_ppm: self.lease_drift_ppm.unwrap_or(defaults.lease.drift_ppm),
            margin: self.lease_margin.map_or(margin, |span| span.0),
        };
        if lease.device_duration().is_zero() {
            return Err(ConfigError::Value {
                setting: "lease_margin",
                value: format!("{:?}, with a drift of {} ppm", lease.margin, lease.drift_ppm),
                expected: "shorter than the lease less its drift, or no device could ever use it",
            });
        }
        let ack_timeout = self.ack_timeout.map_or(defaults.ack_timeout, |span| span.0);
        if ack_timeout.is_zero() {
            return Err(ConfigError::Value {
                setting: "ack_timeout",
                value: format!("{ack_timeout:?}"),
                expected: "longer than 0",
            });
        }
        Ok(SessionConfig {
            lease,
            ack_timeout,
            outbox: OutboxLimits {
                window: at_least_one("window", self.window.unwrap_or(defaults.outbox.window))?,
                max_pending: at_least_one(
                    "max_pending",
                    self.max_pending.unwrap_or(defaults.outbox.max_pending),
                )?,
            },
            max_subscriptions: self.max_subscriptions.unwrap_or(defaults.max_subscriptions),
            max_faults_in_flight: self.max_faults_in_flight.unwrap_or(defaults.max_faults_in_flight),
            ..defaults
        })
    }
}

impl Settings {
    /// Those of certain devices first, then that of all.
    fn fencers(&self) -> Result<Vec<FencerRule>, ConfigError> {
        let for_all = FencerSettings {
            devices: vec!["*".to_owned()],
            command: self.fence_command.clone(),
            endpoint: self.fence_endpoint.clone(),
            timeout: None,
        };
        let is_set = for_all.command.is_some() || for_all.endpoint.is_some();
        if self.fence_timeout.is_some() && !is_set && self.fencer.is_empty() {
            return Err(ConfigError::FenceTimeoutOfNobody);
        }
        self.fencer.iter().chain(is_set.then_some(&for_all)).map(|fencer| self.fencer_rule(fencer)).collect()
    }

    fn fencer_rule(&self, fencer: &FencerSettings) -> Result<FencerRule, ConfigError> {
        let who = match (&fencer.command, &fencer.endpoint) {
            (Some(program), None) if program.is_absolute() => {
                can_run(program)?;
                Fencer::Command(program.clone())
            }
            (Some(program), None) => {
                return Err(ConfigError::Value {
                    setting: "fence_command",
                    value: program.display().to_string(),
                    expected: "an absolute path",
                });
            }
            (None, Some(endpoint)) if endpoint.is_local() || self.insecure => {
                Fencer::Service(endpoint.clone())
            }
            (None, Some(endpoint)) => {
                return Err(ConfigError::FencerInPlaintext { endpoint: endpoint.clone() });
            }
            (None, None) | (Some(_), Some(_)) => {
                return Err(ConfigError::Fencer { devices: fencer.devices.clone() });
            }
        };
        let time_limit = fencer.timeout.or(self.fence_timeout).map_or(DEFAULT_FENCE_TIMEOUT, |span| span.0);
        if time_limit.is_zero() {
            return Err(ConfigError::Value {
                setting: "fence_timeout",
                value: "0s".to_owned(),
                expected: "longer than 0",
            });
        }
        let devices = fencer.devices.iter().map(|pattern| DevicePattern::new(pattern)).collect();
        Ok(FencerRule { devices, fencer: who, time_limit })
    }
}

/// Strict address spaces admit devices that do not enforce a lease because they have a fencer: one that could not
/// even be started is none.
fn can_run(program: &Path) -> Result<(), ConfigError> {
    let metadata =
        fs::metadata(program).map_err(|error| ConfigError::FenceCommand { path: program.into(), error })?;
    let may = accessat(CWD, program, Access::EXEC_OK, AtFlags::EACCESS);
    if !metadata.is_file() || may.is_err() {
        return Err(ConfigError::FenceCommandNotExecutable { path: program.into() });
    }
    Ok(())
}

fn at_least_one<T: PartialOrd + From<u8> + ToString>(
    setting: &'static str,
    value: T,
) -> Result<T, ConfigError> {
    if value < T::from(1) {
        return Err(ConfigError::Value { setting, value: value.to_string(), expected: "at least 1" });
    }
    Ok(value)
}

/// The time of the start, in nanoseconds: higher than that of any earlier run whose clock was right.
fn incarnation() -> Incarnation {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    let nanos = u64::try_from(now.tv_sec).unwrap_or(0).saturating_mul(1_000_000_000);
    Incarnation::new(nanos.saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0)))
        .unwrap_or(Incarnation::FIRST)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn settings(text: &str) -> Result<Config, String> {
        let settings: Settings = toml::from_str(text).map_err(|error| error.to_string())?;
        settings.resolve().map_err(|error| error.to_string())
    }

    #[test]
    fn a_wrong_setting_is_refused_by_name_with_what_would_do() {
        let refused = |text: &str| settings(text).unwrap_err();
        assert!(refused("").contains("--listen"));
        assert!(refused("listne = ['127.0.0.1:1']").contains("listne"));
        assert!(refused("listen = ['127.0.0.1']").contains("IP:PORT"));
        assert!(refused("listen = ['127.0.0.1:1']\nwindow = 0").contains("window is 0"));
        assert!(refused("listen = ['127.0.0.1:1']\nmax_connections = 0").contains("max_connections is 0"));
        assert!(
            refused("listen = ['127.0.0.1:1']\nmax_connections = 9223372036854775807").contains("ulimit -n")
        );
        assert!(refused("listen = ['127.0.0.1:1']\nmemory_limit_bytes = 4095").contains("at least a page"));
        assert!(
            refused("listen = ['127.0.0.1:1']\nlease = '49ms'")
                .contains("lease is 49ms; it must be from 50ms")
        );
        assert!(refused("listen = ['127.0.0.1:1']\nlease = '2h'").contains("to 1h"));
        let no_margin = "listen = ['127.0.0.1:1']\nlease = '100ms'\nlease_margin = '100ms'";
        assert!(refused(no_margin).contains("lease_margin is 100ms"));
        assert!(refused("listen = ['127.0.0.1:1']\nlease = 'soon'").contains("lease"));
        assert!(refused("listen = ['127.0.0.1:1']\nsource_fault_timeout = '0s'").contains("longer than 0"));
        assert!(
            refused("listen = ['127.0.0.1:1']\nadmin_listen = ['127.0.0.1:2']").contains("no Unix socket")
        );
    }

    #[test]
    fn a_short_lease_has_a_margin_that_leaves_most_of_it() {
        let lease =
            |text: &str| settings(&format!("listen = ['127.0.0.1:1']\n{text}")).unwrap().host.session.lease;
        assert_eq!(lease("").margin, Duration::from_millis(100));
        assert_eq!(lease("lease = '50ms'").margin, Duration::from_millis(5));
        assert!(lease("lease = '50ms'").device_duration() > Duration::from_millis(44));
        assert_eq!(lease("lease = '1h'").margin, Duration::from_millis(100));
        assert_eq!(lease("lease = '1s'\nlease_margin = '10ms'").margin, Duration::from_millis(10));
    }

    #[test]
    fn each_device_has_the_first_fencer_that_means_it() {
        let fencers = |text: &str| {
            settings(&format!("listen = ['127.0.0.1:1']\n{text}")).map(|config| config.host.fencers)
        };
        assert_eq!(fencers("").unwrap(), []);
        let all = "fence_command = '/bin/sh'\nfence_timeout = '2s'\n";
        let some = "[[fencer]]\ndevices = ['gpu*']\nendpoint = 'unix:/f'\ntimeout = '1s'\n";
        let rules = fencers(&format!("{all}{some}")).unwrap();
        assert_eq!(rules.len(), 2);
        assert_eq!(rules[0].fencer, Fencer::Service("unix:/f".parse().unwrap()));
        assert_eq!(
            (rules[0].time_limit, rules[1].time_limit),
            (Duration::from_secs(1), Duration::from_secs(2))
        );
        assert_eq!(
            (&rules[1].devices[0], &rules[1].fencer),
            (&DevicePattern::every(), &Fencer::Command("/bin/sh".into()))
        );
        let refused = |text: &str| fencers(text).unwrap_err();
        assert!(refused("[[fencer]]\ndevices = ['a']").contains("either a command or an endpoint"));
        assert!(refused("fence_command = 'fence'").contains("absolute path"));
        assert!(refused("fence_endpoint = '10.0.0.1:1'").contains("--insecure"));
        assert!(
            refused("fence_endpoint = 'tcp://pdu.example:1'").contains("pdu.example:1 may be on another")
        );
        assert!(refused("fence_endpoint = 'fd://fencer'").contains("tcp://HOST:PORT"));
        assert_eq!(fencers("fence_endpoint = 'localhost:1'").unwrap().len(), 1);
        let by_name = fencers("fence_endpoint = 'pdu.example:1'\ninsecure = true").unwrap();
        assert_eq!(by_name[0].fencer, Fencer::Service("tcp://pdu.example:1".parse().unwrap()));
        assert!(refused("fence_command = '/bin/sh'\nfence_timeout = '0s'").contains("fence_timeout"));
        assert!(refused("quarantine_pages = 0").contains("quarantine_pages"));
    }

    #[test]
    fn a_fencer_that_could_not_run_is_refused_by_its_path() {
        let folder = tempfile::tempdir().unwrap();
        let fencer = |text: &str| settings(&format!("listen = ['127.0.0.1:1']\n{text}"));
        let given = |path: &Path| fencer(&format!("fence_command = '{}'", path.display()));
        let nowhere = folder.path().join("nowhere");
        let refused = given(&nowhere).unwrap_err();
        assert!(
            refused.contains(nowhere.to_str().unwrap()) && refused.contains("fence_command"),
            "{refused}"
        );
        assert!(
            given(folder.path()).unwrap_err().contains("no executable file"),
            "a directory is no program"
        );
        let program = folder.path().join("fence");
        fs::write(&program, "#!/bin/sh\n").unwrap();
        assert!(given(&program).unwrap_err().contains("executable"));
        let of_some = format!("[[fencer]]\ndevices = ['gpu*']\ncommand = '{}'", program.display());
        assert!(fencer(&of_some).unwrap_err().contains("executable"));
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(given(&program).is_ok() && fencer(&of_some).is_ok());
    }

    #[test]
    fn a_time_limit_for_no_fencer_is_refused() {
        let refused = settings("listen = ['127.0.0.1:1']\nfence_timeout = '2s'").unwrap_err();
        assert!(refused.contains("fence_timeout") && refused.contains("--fence-command"), "{refused}");
    }

    #[test]
    fn a_fencer_by_flag_takes_the_place_of_the_other_kind_in_the_file() {
        let file: Settings = toml::from_str("listen = ['127.0.0.1:1']\nfence_endpoint = 'unix:/f'").unwrap();
        let flags = Settings { fence_command: Some("/bin/sh".into()), ..Settings::default() };
        let fencers = flags.or(file).resolve().unwrap().host.fencers;
        assert_eq!(
            fencers.iter().map(|rule| &rule.fencer).collect::<Vec<_>>(),
            [&Fencer::Command("/bin/sh".into())]
        );
    }

    #[test]
    fn plaintext_that_leaves_the_machine_must_be_asked_for() {
        assert!(settings("listen = ['0.0.0.0:1']").unwrap_err().contains("--insecure"));
        assert!(settings("listen = ['0.0.0.0:1']\ninsecure = true").is_ok());
    }

    #[test]
    fn memory_is_limited_in_bytes_and_swaps_only_where_it_is_told_to() {
        let config = settings("listen = ['127.0.0.1:1']\nmemory_frames = 100").unwrap();
        assert_eq!((config.memory_limit_frames, config.swap), (100, None));
        let text =
            "listen = ['127.0.0.1:1']\nmemory_limit_bytes = 40960\nswap_file = '/s'\nswap_bytes = 8192";
        let config = settings(text).unwrap();
        assert_eq!((config.memory_limit_frames, config.swap), (10, Some(("/s".into(), 2))));
    }

    #[test]
    fn a_flag_wins_over_the_file() {
        let file: Settings = toml::from_str("listen = ['127.0.0.1:1']\nwindow = 7\nlease = '3s'").unwrap();
        let flags = Settings { window: Some(9), ..Settings::default() };
        let config = flags.or(file).resolve().unwrap();
        assert_eq!(config.host.session.outbox.window, 9);
        assert_eq!(config.host.session.lease.duration, Duration::from_secs(3));
        assert_eq!(config.listen, ["127.0.0.1:1".parse().unwrap()]);
    }
}
