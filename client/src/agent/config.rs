//! What `shootdown-agent` is told: flags, then the environment, then a file, then defaults.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};
use serde::Deserialize;
use shootdown_core::session::Enforcement;
use shootdown_core::{AddrRange, AddressSpaceId, DeviceId, PageSize};

use super::accelerator::{AcceleratorConfig, WritePolicy};
use super::flush_time::{FlushTime, duration};
use crate::config::ChangePte;
use crate::endpoint::Endpoint;

/// A release build is told of its commit: `SHOOTDOWN_VERSION="0.1.0 (1a2b3c4d)"`.
const VERSION: &str = match option_env!("SHOOTDOWN_VERSION") {
    Some(version) => version,
    None => env!("CARGO_PKG_VERSION"),
};

/// The reference accelerator of Shootdown: holds translations of a host's memory, and gives them back when
/// the host agent asks.
#[derive(Debug, Parser)]
#[command(name = "shootdown-agent", version = VERSION)]
pub struct Flags {
    /// A TOML file with the same settings, named as the flags with `_` for `-`.
    #[arg(long, env = "SHOOTDOWN_AGENT_CONFIG", global = true)]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
    #[command(subcommand)]
    command: Option<Command>,
}

/// What to do instead of running.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Subcommand)]
pub enum Command {
    /// Read the configuration, say what it comes to, and exit: 0 when it would do, 78 when not.
    CheckConfig,
}

/// One source of settings.
#[derive(Debug, Default, Clone, clap::Args, Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    /// The host agent: tcp://HOST:PORT or unix:/PATH.
    #[arg(long, env = "SHOOTDOWN_AGENT_HOST_AGENT", global = true)]
    host_agent: Option<Endpoint>,
    /// The device's name, stable over its restarts.
    #[arg(long, env = "SHOOTDOWN_AGENT_DEVICE_ID", global = true)]
    device_id: Option<String>,
    /// An address space to subscribe to; may be repeated.
    #[arg(
        long = "address-space",
        env = "SHOOTDOWN_AGENT_ADDRESS_SPACE",
        value_delimiter = ',',
        global = true
    )]
    address_space: Option<Vec<u64>>,
    /// Which pages of each address space, START..END in bytes; may be repeated. Default: all of it.
    #[arg(long, env = "SHOOTDOWN_AGENT_RANGE", value_delimiter = ',', global = true)]
    range: Option<Vec<PageRange>>,
    /// Tasks that read and write in the ranges. Default: 0.
    #[arg(long, env = "SHOOTDOWN_AGENT_WORKERS", global = true)]
    workers: Option<usize>,
    /// Sets of the TLB. Default: 128.
    #[arg(long, env = "SHOOTDOWN_AGENT_TLB_SETS", global = true)]
    tlb_sets: Option<usize>,
    /// Entries a set. Default: 8.
    #[arg(long, env = "SHOOTDOWN_AGENT_TLB_WAYS", global = true)]
    tlb_ways: Option<usize>,
    /// Pages whose bytes are cached. Default: 256.
    #[arg(long, env = "SHOOTDOWN_AGENT_CACHE_PAGES", global = true)]
    cache_pages: Option<usize>,
    /// When the host gets what is written: through, at once; back, when the page is flushed or must make
    /// room, which wants a cache. Default: back where pages are cached.
    #[arg(long, env = "SHOOTDOWN_AGENT_WRITE_POLICY", global = true)]
    write_policy: Option<WritePolicy>,
    /// Take a replacement translation instead of an invalidation (change_pte). Default: false.
    #[arg(long, env = "SHOOTDOWN_AGENT_CHANGE_PTE", num_args = 0..=1, default_missing_value = "true", global = true)]
    change_pte: Option<bool>,
    /// Promise the host agent that nothing here reaches its memory when the lease has run out. Default: true.
    #[arg(long, env = "SHOOTDOWN_AGENT_ENFORCES_LEASE", num_args = 0..=1, default_missing_value = "true", global = true)]
    enforces_lease: Option<bool>,
    /// How long a flush takes: none, fixed:500us, exp:1ms or pareto:200us,1.5. Default: none.
    #[arg(long, env = "SHOOTDOWN_AGENT_FLUSH_TIME", global = true)]
    flush_time: Option<FlushTime>,
    /// The longest that the session polls before it sleeps, while messages come that quickly; 0us: not at
    /// all. Default: 100us.
    #[arg(long, env = "SHOOTDOWN_AGENT_BUSY_POLL", global = true)]
    busy_poll: Option<String>,
    /// How many of the workers' accesses are reads, 0 to 1. Default: 0.9.
    #[arg(long, env = "SHOOTDOWN_AGENT_READ_RATIO", global = true)]
    read_ratio: Option<f64>,
    /// How logs are written. Default: text.
    #[arg(long, env = "SHOOTDOWN_AGENT_LOG_FORMAT", global = true)]
    log_format: Option<LogFormat>,
    /// How long leaving may take after SIGTERM, as 10s. Default: 10s.
    #[arg(long, env = "SHOOTDOWN_AGENT_DRAIN_TIMEOUT", global = true)]
    drain_timeout: Option<String>,
    /// Speak plaintext over a network that others may read.
    #[arg(long, env = "SHOOTDOWN_AGENT_INSECURE", num_args = 0..=1, default_missing_value = "true", global = true)]
    insecure: Option<bool>,
}

/// How logs are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// For programs: one JSON object a line.
    Json,
}

/// A bounded range of whole pages, written `0x10000..0x20000`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct PageRange(pub AddrRange);

/// What the agent runs with.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The host agent.
    pub host_agent: Endpoint,
    /// The device's name.
    pub device: DeviceId,
    /// What to subscribe to.
    pub address_spaces: Vec<AddressSpaceId>,
    /// Which part of each; empty: all of it.
    pub ranges: Vec<PageRange>,
    /// Tasks that keep the accelerator busy.
    pub workers: usize,
    /// The hardware.
    pub accelerator: AcceleratorConfig,
    /// Whether replacement translations are taken.
    pub change_pte: ChangePte,
    /// Who stops the device when its lease has run out.
    pub enforcement: Enforcement,
    /// The longest that the session polls before it sleeps; `None`: the SDK's default.
    pub busy_poll: Option<Duration>,
    /// How many of the workers' accesses are reads, 0 to 1.
    pub read_ratio: f64,
    /// How logs are written.
    pub log_format: LogFormat,
    /// How long leaving may take.
    pub drain_timeout: Duration,
}

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is not a configuration.
    #[error("{} is not a configuration of shootdown-agent", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A setting without a default is not set.
    #[error("`{setting}` is not set; give --{setting}")]
    Missing {
        /// The flag.
        setting: &'static str,
    },
    /// A setting has a value that it cannot have.
    #[error("`{setting}` cannot be {given}: {expected}")]
    Value {
        /// The flag.
        setting: &'static str,
        /// What was given.
        given: String,
        /// What would do.
        expected: &'static str,
    },
    /// The device's name.
    #[error("`device-id` is not a device's name")]
    DeviceId(#[source] shootdown_core::id::DeviceIdError),
    /// Everybody on the way could read the pages, and write them.
    #[error(
        "{endpoint} is not on this machine, and the connection would be plaintext; \
         use unix:/PATH or a tunnel, or give --insecure"
    )]
    Plaintext {
        /// The host agent.
        endpoint: Endpoint,
    },
}

impl Flags {
    /// What to do instead of running.
    #[must_use]
    pub fn command(&self) -> Option<Command> {
        self.command
    }

    /// Reads the file, if there is one, and puts the sources together.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn config(&self) -> Result<Config, ConfigError> {
        let file = match &self.config {
            None => Settings::default(),
            Some(path) => {
                let text = std::fs::read_to_string(path)
                    .map_err(|source| ConfigError::Read { path: path.clone(), source })?;
                toml::from_str(&text)
                    .map_err(|source| ConfigError::Parse { path: path.clone(), source: Box::new(source) })?
            }
        };
        self.settings.clone().or(file).check()
    }
}

impl Settings {
    fn or(self, less: Self) -> Self {
        Self {
            host_agent: self.host_agent.or(less.host_agent),
            device_id: self.device_id.or(less.device_id),
            address_space: self.address_space.or(less.address_space),
            range: self.range.or(less.range),
            workers: self.workers.or(less.workers),
            tlb_sets: self.tlb_sets.or(less.tlb_sets),
            tlb_ways: self.tlb_ways.or(less.tlb_ways),
            cache_pages: self.cache_pages.or(less.cache_pages),
            write_policy: self.write_policy.or(less.write_policy),
            change_pte: self.change_pte.or(less.change_pte),
            enforces_lease: self.enforces_lease.or(less.enforces_lease),
            flush_time: self.flush_time.or(less.flush_time),
            busy_poll: self.busy_poll.or(less.busy_poll),
            read_ratio: self.read_ratio.or(less.read_ratio),
            log_format: self.log_format.or(less.log_format),
            drain_timeout: self.drain_timeout.or(less.drain_timeout),
            insecure: self.insecure.or(less.insecure),
        }
    }

    fn check(self) -> Result<Config, ConfigError> {
        let host_agent = self.host_agent.ok_or(ConfigError::Missing { setting: "host-agent" })?;
        if !host_agent.is_local() && !self.insecure.unwrap_or(false) {
            return Err(ConfigError::Plaintext { endpoint: host_agent });
        }
        let device = self.device_id.ok_or(ConfigError::Missing { setting: "device-id" })?;
        let device = DeviceId::new(&device).map_err(ConfigError::DeviceId)?;
        let value = |setting, given: String, expected| ConfigError::Value { setting, given, expected };
        let address_spaces = self
            .address_space
            .unwrap_or_default()
            .into_iter()
            .map(|id| {
                AddressSpaceId::new(id)
                    .ok_or_else(|| value("address-space", id.to_string(), "1 is the lowest"))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let ranges = self.range.unwrap_or_default();
        let workers = self.workers.unwrap_or(0);
        if workers > 0 && address_spaces.is_empty() {
            return Err(ConfigError::Missing { setting: "address-space" });
        }
        if workers > 0 && ranges.is_empty() {
            return Err(ConfigError::Missing { setting: "range" });
        }
        let hardware = AcceleratorConfig::default();
        let positive = |setting, given: Option<usize>, default| match given {
            Some(0) => Err(value(setting, "0".to_owned(), "1 is the lowest")),
            given => Ok(given.unwrap_or(default)),
        };
        let cache_pages = self.cache_pages.unwrap_or(hardware.cache_pages);
        let write_policy = match (self.write_policy, cache_pages) {
            (Some(WritePolicy::Back), 0) => {
                return Err(value("write-policy", "back".to_owned(), "through where cache-pages is 0"));
            }
            (None | Some(WritePolicy::Through), 0) => WritePolicy::Through,
            (given, _) => given.unwrap_or(hardware.write_policy),
        };
        let read_ratio = self.read_ratio.unwrap_or(0.9);
        if !(0.0..=1.0).contains(&read_ratio) {
            return Err(value("read-ratio", read_ratio.to_string(), "0 to 1"));
        }
        let span = |setting, given: String| {
            duration(&given).map_err(|_| value(setting, given, "a number and ns, us, ms or s"))
        };
        let drain_timeout = span("drain-timeout", self.drain_timeout.unwrap_or_else(|| "10s".to_owned()))?;
        let busy_poll = self.busy_poll.map(|given| span("busy-poll", given)).transpose()?;
        Ok(Config {
            host_agent,
            device,
            address_spaces,
            ranges,
            workers,
            accelerator: AcceleratorConfig {
                tlb_sets: positive("tlb-sets", self.tlb_sets, hardware.tlb_sets)?,
                tlb_ways: positive("tlb-ways", self.tlb_ways, hardware.tlb_ways)?,
                cache_pages,
                write_policy,
                flush_time: self.flush_time.unwrap_or_default(),
                seed: hardware.seed,
            },
            change_pte: match self.change_pte.unwrap_or(false) {
                true => ChangePte::Supported,
                false => ChangePte::Unsupported,
            },
            enforcement: match self.enforces_lease.unwrap_or(true) {
                true => Enforcement::ByDevice,
                false => Enforcement::ByNobody,
            },
            busy_poll,
            read_ratio,
            log_format: self.log_format.unwrap_or_default(),
            drain_timeout,
        })
    }
}

impl FromStr for PageRange {
    type Err = String;

    fn from_str(given: &str) -> Result<Self, String> {
        let number = |text: &str| match text.trim().strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(&hex.replace('_', ""), 16).ok(),
            None => text.trim().replace('_', "").parse().ok(),
        };
        let (start, end) = given.split_once("..").ok_or("write START..END, as 0x10000..0x20000")?;
        let (Some(start), Some(end)) = (number(start), number(end)) else {
            return Err("START and END are numbers, as 4096 or 0x1000".to_owned());
        };
        AddrRange::page_aligned(start, end, PageSize::BASE).map(Self).map_err(|error| error.to_string())
    }
}

impl TryFrom<String> for PageRange {
    type Error = String;

    fn try_from(given: String) -> Result<Self, String> {
        given.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(arguments: &[&str]) -> Result<Config, ConfigError> {
        let program = ["shootdown-agent", "--device-id", "d"];
        Flags::try_parse_from(program.iter().chain(arguments)).unwrap().config()
    }

    #[test]
    fn plaintext_over_a_network_wants_a_flag() {
        let refused = config(&["--host-agent", "tcp://10.0.0.1:7400"]);
        assert!(matches!(refused, Err(ConfigError::Plaintext { .. })));
        config(&["--host-agent", "tcp://10.0.0.1:7400", "--insecure"]).unwrap();
        config(&["--host-agent", "tcp://127.0.0.1:7400"]).unwrap();
    }

    #[test]
    fn a_flag_wins_over_the_file_and_the_file_over_the_default() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.toml");
        let text = "host_agent = 'unix:/a'\ntlb_sets = 4\ntlb_ways = 2\nrange = ['0x1000..0x3000']\n\
                    flush_time = 'fixed:1ms'\nlog_format = 'json'\n";
        std::fs::write(&path, text).unwrap();
        let config = config(&["--config", path.to_str().unwrap(), "--tlb-sets", "8"]).unwrap();
        let hardware = config.accelerator;
        assert_eq!((hardware.tlb_sets, hardware.tlb_ways, hardware.cache_pages), (8, 2, 256));
        assert_eq!(hardware.flush_time, FlushTime::Fixed(Duration::from_millis(1)));
        assert_eq!(config.ranges, [PageRange(AddrRange::new(0x1000, 0x3000).unwrap())]);
        assert_eq!(config.log_format, LogFormat::Json);
    }

    #[test]
    fn writes_stay_in_the_cache_where_there_is_one_unless_it_is_said_otherwise() {
        let policy = |arguments: &[&str]| {
            config(&[&["--host-agent", "unix:/a"], arguments].concat())
                .map(|config| config.accelerator.write_policy)
        };
        assert_eq!(policy(&[]).unwrap(), WritePolicy::Back);
        assert_eq!(policy(&["--write-policy", "through"]).unwrap(), WritePolicy::Through);
        assert_eq!(policy(&["--cache-pages", "0"]).unwrap(), WritePolicy::Through);
        let nowhere = policy(&["--cache-pages", "0", "--write-policy", "back"]);
        assert!(matches!(nowhere, Err(ConfigError::Value { setting: "write-policy", .. })));
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.toml");
        std::fs::write(&path, "write_policy = 'through'\nchange_pte = true\n").unwrap();
        let file = ["--config", path.to_str().unwrap()];
        assert_eq!(policy(&file).unwrap(), WritePolicy::Through);
        assert_eq!(policy(&[&file[..], &["--write-policy", "back"]].concat()).unwrap(), WritePolicy::Back);
    }

    #[test]
    fn replacement_translations_are_taken_where_it_is_said() {
        let taken = |arguments: &[&str]| {
            config(&[&["--host-agent", "unix:/a"], arguments].concat()).unwrap().change_pte
        };
        assert_eq!(taken(&[]), ChangePte::Unsupported);
        assert_eq!(taken(&["--change-pte"]), ChangePte::Supported);
        assert_eq!(taken(&["--change-pte", "false"]), ChangePte::Unsupported);
    }

    #[test]
    fn the_lease_is_enforced_unless_it_is_said_otherwise() {
        let enforcement = |arguments: &[&str]| {
            config(&[&["--host-agent", "unix:/a"], arguments].concat()).unwrap().enforcement
        };
        assert_eq!(enforcement(&[]), Enforcement::ByDevice);
        assert_eq!(enforcement(&["--enforces-lease", "false"]), Enforcement::ByNobody);
    }

    #[test]
    fn a_setting_that_nobody_knows_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.toml");
        std::fs::write(&path, "tlb_set = 4\n").unwrap();
        assert!(matches!(config(&["--config", path.to_str().unwrap()]), Err(ConfigError::Parse { .. })));
    }

    #[test]
    fn workers_want_to_know_where() {
        let local = ["--host-agent", "unix:/a", "--workers", "1"];
        assert!(matches!(config(&local), Err(ConfigError::Missing { setting: "address-space" })));
        let spaces = [&local[..], &["--address-space", "3"]].concat();
        assert!(matches!(config(&spaces), Err(ConfigError::Missing { setting: "range" })));
        let ranges = [&spaces[..], &["--range", "0x1000..0x2000", "--range", "8192..12288"]].concat();
        assert_eq!(config(&ranges).unwrap().ranges.len(), 2);
    }

    #[test]
    fn the_flags_are_a_valid_command_line() {
        use clap::CommandFactory;
        <Flags as CommandFactory>::command().debug_assert();
    }
}
