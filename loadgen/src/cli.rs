//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use shootdown_client::Endpoint;
use shootdown_client::agent::{FlushTime, FlushTimeError};
use shootdown_server::config::Settings;

use crate::chaos::ChaosArgs;
use crate::control::Plan;
use crate::fleet::{Noise, Workspace};
use crate::path::Path;
use crate::rule::Rule;

/// Load on Shootdown, and a checker that looks at every byte that a device reads.
///
/// Exit status: 0 when no read was stale, nothing was lost and every path was seen, 1 when a read was stale or
/// a write was lost, 2 for a wrong command line, 70 when the run failed or has shown nothing.
#[derive(Debug, Parser)]
#[command(name = "shootdown-loadgen", version)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// A host agent, some devices, every path of the memory source; latency by stage, and a verdict
    Demo {
        /// What is run.
        #[command(flatten)]
        load: Load,
        /// How the report is written
        #[arg(long, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// The checker alone: no latencies
    Check {
        /// What is run.
        #[command(flatten)]
        load: Load,
        /// How the report is written
        #[arg(long, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Rounds against a host agent that is already running: open loop, latency from the intended send time
    Run(RoundsArgs),
    /// Faults into processes that run, while devices read and write memory that is freed and reused
    ///
    /// Starts a host agent and devices as processes of its own; kills, stops, resets, cuts off and replaces them; and
    /// looks at every page that a device reads. Partitions need root and the programs `ip` and `nft` (Debian:
    /// iproute2, nftables): where one is missing they are left out, and the report says so. A run takes some seconds
    /// more than --seconds: at the end each device uses each page once more.
    ///
    /// Exit status: 0 when nothing is wrong; 1 when something is, and the report's FAILED lines say what (with --break:
    /// when it was found, as it must be); 2 for a wrong command line; 70 when the run failed, was interrupted, or has
    /// shown nothing, and the last lines say why. What to do: docs/faults.md, "How it is shown".
    Chaos(ChaosArgs),
    /// A process of `demo` or `check`
    #[command(name = crate::fleet::HOST_AGENT, hide = true)]
    HostAgent,
    /// A process of `demo` or `check`
    #[command(name = crate::fleet::DEVICE_AGENT, hide = true)]
    DeviceAgent,
    /// A process of `chaos`
    #[command(name = crate::chaos::CHAOS_HOST, hide = true)]
    ChaosHost(Box<Settings>),
    /// A process of `chaos`
    #[command(name = crate::chaos::CHAOS_DEVICE, hide = true)]
    ChaosDevice {
        /// What it does
        plan: String,
    },
}

/// How a report is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Output {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// What `demo` and `check` run.
#[derive(Debug, Clone, Args)]
pub struct Load {
    /// How long, in seconds
    #[arg(long, default_value_t = 20.0, value_parser = seconds)]
    pub seconds: f64,
    /// How much longer, at most, until every path has shown something
    #[arg(long, default_value = "0s", value_parser = humantime::parse_duration)]
    pub patience: Duration,
    /// Device agents
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub devices: u16,
    /// Address spaces, without the children that they fork
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub address_spaces: u16,
    /// Pages of each address space
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub pages: u16,
    /// Threads of the host that work on each address space at once
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=16))]
    pub threads: u16,
    /// The most frames that are used for pages: beyond it reclaim makes room [default: as many as there are]
    #[arg(long, value_name = "PAGES", default_value_t = 0, hide_default_value = true)]
    pub memory_limit_pages: u32,
    /// Every path is exercised: the default, unless a rule is broken
    #[arg(long, conflicts_with = "paths")]
    pub all: bool,
    /// What is exercised [default: all, and of a run that breaks a rule those that show it]
    #[arg(long, value_delimiter = ',')]
    pub paths: Vec<Path>,
    /// Of every random choice of the host and of each worker [default: one from the clock]
    #[arg(long)]
    pub seed: Option<u64>,
    /// Break a rule on purpose: the run must fail, and ends when the checker has found it
    #[arg(long = "break", value_enum, value_name = "RULE")]
    pub rule: Option<Rule>,
    /// How long a flush takes on a device: none, fixed:500us, exp:1ms, pareto:200us,1.5
    #[arg(long, default_value = "none", value_parser = flush_time)]
    pub flush_time: String,
    /// How long it takes on the first device, where that is to be slower than the others
    #[arg(long, value_parser = flush_time)]
    pub slow_flush_time: Option<String>,
    /// Between two operations of one address space
    #[arg(long, default_value = "1ms", value_parser = humantime::parse_duration)]
    pub pause: Duration,
    /// Tasks of each device that read and write
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub workers: u16,
    /// How many of a device's accesses are writes, 0 to 1
    #[arg(long, default_value_t = 0.05, value_parser = ratio)]
    pub write_ratio: f64,
    /// Pages that every second device keeps copies of; the others read frames only
    #[arg(long, default_value_t = 64)]
    pub cache_pages: usize,
    /// Runtimes of the host agent
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub shards: u16,
    /// Pass the agents' logs through
    #[arg(short, long)]
    pub verbose: bool,
}

/// What `run` does.
#[derive(Debug, Clone, Args)]
pub struct RoundsArgs {
    /// The host agent's socket for sources: unix:/PATH
    #[arg(long)]
    pub source: Endpoint,
    /// The host agent's address for devices: unix:/PATH or tcp://HOST:PORT
    #[arg(long)]
    pub device_endpoint: Endpoint,
    /// Devices in this process, with no flush work
    #[arg(long, default_value_t = 1)]
    pub devices: u16,
    /// Rounds a second, sent whether or not earlier ones are done
    #[arg(long, default_value_t = 1000.0, value_parser = rate, conflicts_with = "closed_loop")]
    pub rate: f64,
    /// One round after the other from each of so many callers, as fast as they go
    #[arg(long, value_name = "CALLERS", value_parser = clap::value_parser!(u16).range(1..))]
    pub closed_loop: Option<u16>,
    /// How long is measured, in seconds
    #[arg(long, default_value_t = 10.0, value_parser = seconds)]
    pub seconds: f64,
    /// How long goes before, and is left out, in seconds
    #[arg(long, default_value_t = 1.0, value_parser = seconds)]
    pub warm_up: f64,
    /// Pages of each round's range; repeatable, taken in turn
    #[arg(long, value_delimiter = ',', default_value = "1", value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    pub range_pages: Vec<u32>,
    /// How the report is written
    #[arg(long, value_enum, default_value_t = Output::Text)]
    pub output: Output,
    /// Also write the latencies as an HdrHistogram log
    #[arg(long, value_name = "FILE")]
    pub hlog: Option<PathBuf>,
}

impl Load {
    /// What the processes of the run are told.
    #[must_use]
    pub fn plan(&self, workspace: &Workspace, seed: u64) -> Plan {
        let mut paths = match (self.paths.as_slice(), self.rule) {
            ([], Some(rule)) if !self.all => rule.paths(),
            ([], _) => Path::EVERY.to_vec(),
            (paths, _) => paths.to_vec(),
        };
        paths.sort_unstable();
        paths.dedup();
        Plan {
            socket: workspace.socket(),
            directory: workspace.path().into(),
            seed,
            devices: self.devices.into(),
            address_spaces: self.address_spaces.into(),
            pages: self.pages.into(),
            threads: self.threads.into(),
            memory_limit_pages: self.memory_limit_pages as usize,
            paths,
            rule: self.rule,
            pause: self.pause,
            flush_time: self.flush_time.clone(),
            slow_flush_time: self.slow_flush_time.clone(),
            workers: self.workers.into(),
            write_percent: percent(self.write_ratio),
            cache_pages: self.cache_pages,
            shards: self.shards.into(),
        }
    }

    /// The command that repeats the run.
    #[must_use]
    pub fn repeat(&self, plan: &Plan) -> String {
        let paths: Vec<&str> = plan.paths.iter().map(|path| path.name()).collect();
        let mut command = format!(
            "shootdown-loadgen check --seed {} --seconds {} --devices {} --address-spaces {} --pages {} \
             --threads {} --memory-limit-pages {} --workers {} --write-ratio {} --cache-pages {} --shards {} --pause {} --flush-time {} --paths {}",
            plan.seed,
            self.seconds,
            self.devices,
            self.address_spaces,
            self.pages,
            self.threads,
            self.memory_limit_pages,
            self.workers,
            self.write_ratio,
            self.cache_pages,
            self.shards,
            humantime::format_duration(self.pause),
            self.flush_time,
            paths.join(","),
        );
        if !self.patience.is_zero() {
            command.push_str(" --patience ");
            command.push_str(&humantime::format_duration(self.patience).to_string());
        }
        if let Some(slow) = &self.slow_flush_time {
            command.push_str(" --slow-flush-time ");
            command.push_str(slow);
        }
        if let Some(rule) = self.rule {
            command.push_str(" --break ");
            command.push_str(rule.name());
        }
        command
    }

    /// What becomes of the agents' logs.
    #[must_use]
    pub const fn noise(&self) -> Noise {
        if self.verbose { Noise::Always } else { Noise::WhenFailing }
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it was checked to be 0 to 1")]
fn percent(ratio: f64) -> u32 {
    (ratio * 100.0).round() as u32
}

fn seconds(given: &str) -> Result<f64, String> {
    number(given, "more than 0, and at most a day", |seconds| seconds > 0.0 && seconds <= 86_400.0)
}

fn rate(given: &str) -> Result<f64, String> {
    number(given, "more than 0, and at most ten million", |rate| rate > 0.0 && rate <= 1e7)
}

fn ratio(given: &str) -> Result<f64, String> {
    number(given, "0 to 1", |ratio| (0.0..=1.0).contains(&ratio))
}

fn number(given: &str, expected: &str, fits: impl Fn(f64) -> bool) -> Result<f64, String> {
    let number = given.parse().ok().filter(|number| fits(*number));
    number.ok_or_else(|| format!("a number is expected that is {expected}"))
}

fn flush_time(given: &str) -> Result<String, FlushTimeError> {
    given.parse::<FlushTime>().map(|_| given.to_owned())
}
