//! What settings come to: each with its default, and refused where it cannot work.

use std::path::PathBuf;
use std::time::Duration;

use shootdown_core::Incarnation;
use shootdown_core::lease::LeaseTerms;
use shootdown_core::outbox::OutboxLimits;
use shootdown_core::session::SessionConfig;

use super::Settings;
use super::error::ConfigError;
use crate::clock::Clock;
use crate::connections::{self, ConnectionLimits};
use crate::host::HostConfig;
use crate::journal::Takeover;
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

/// 1 GiB of pages that callers keep, in ranges that may be sparse.
const DEFAULT_QUARANTINE_PAGES: u64 = 1 << 18;
const DEFAULT_QUARANTINE_BYTES: u64 = 16 << 30;

/// Of the memory source.
const FRAME_BYTES: usize = 4096;

/// How long devices have to finish and leave when the daemon stops.
const DEFAULT_DRAIN: Duration = Duration::from_secs(10);

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

impl Settings {
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
