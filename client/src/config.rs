//! What a device tells the SDK about itself.

use std::time::Duration;

use shootdown_core::lease::LeaseTerms;
use shootdown_core::session::Enforcement;
use shootdown_core::{DeviceId, Incarnation, PageSize};
use shootdown_proto::message::MAX_NOTICES_A_MESSAGE;

use crate::clock::{self, Clock};
use crate::connector::Connector;
use crate::endpoint::Endpoint;
use crate::hosts::HostsSeen;

/// How a device opens its session. [`DeviceConfig::new`] has a reason for each of its defaults.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct DeviceConfig {
    /// The device's name, stable over its restarts.
    pub device: DeviceId,
    /// The host agent.
    pub endpoint: Endpoint,
    /// This run of the device agent: higher than that of any earlier run, or the host agent takes this
    /// run for an old one. By default the nanoseconds of wall time at the start; a machine whose wall
    /// clock may be set back wants a counter in a file instead.
    pub incarnation: Incarnation,
    /// The most notices that may be sent and not acked. 1024 by default: at 100,000 invalidations a
    /// second it covers flushes of 10 ms, and its notices unread are far below what h2 tolerates.
    pub window: u32,
    /// The most calls into [`DeviceTlb`](crate::DeviceTlb) that flush at the same time; notices beyond
    /// it wait, bounded by the window. 64 by default: what the invalidation queues of IOMMUs hold.
    pub parallel_flushes: usize,
    /// The most faults that wait for a grant; a fault beyond it waits for its turn. 256 by default.
    pub max_faults: usize,
    /// How often [`Device::fault`](crate::Device::fault) asks again after a notice overtook its grant.
    /// 16 by default: each loss means that the page changed within a round trip.
    pub max_refaults: u32,
    /// The page sizes that the device's TLB supports. 4 KiB only by default.
    pub page_sizes: Vec<PageSize>,
    /// Whether the device can install a replacement translation in place
    /// ([`DeviceTlb::change_pte`](crate::DeviceTlb::change_pte)). By default it cannot.
    pub change_pte: ChangePte,
    /// The most by which the device's clock differs from real time, in parts per million. By default as
    /// in [`LeaseTerms`].
    pub lease_drift_ppm: u32,
    /// The time between a look at the lease and the last access which that look allowed: the longest
    /// DMA. `None`, the default: as in [`LeaseTerms::default_margin`], which is less for a short lease.
    pub lease_margin: Option<Duration>,
    /// Who stops the device when its lease has run out. By the device, by default: its word to the host agent
    /// that nothing reaches the memory then, whatever hangs. The SDK refuses uses past the lease either way;
    /// a vendor whose hardware may go on with what it began says [`Enforcement::ByNobody`], and is then not
    /// admitted to strict address spaces unless the host agent has a fencer for it.
    pub enforcement: Enforcement,
    /// How long connecting and the answer to Hello may take. 10 s by default: a host agent that was
    /// restarted waits for its old sessions first.
    pub connect_timeout: Duration,
    /// How often a silent connection is tried by HTTP/2, and how long the answer may take, at the most: 2 s by
    /// default, and a quarter of the lease for a connection of a [`PageClient`](crate::PageClient). A session that
    /// comes back does not depend on it: it takes its connection for lost when nothing has come for a quarter of its
    /// lease after a heartbeat.
    pub keepalive: Duration,
    /// What the device does when its connection is lost. By default it connects again and goes on.
    pub resume: ResumePolicy,
    /// The pause after the first try to connect again that failed. 10 ms by default; it doubles with each, and
    /// up to a half of it is added, so that not all devices come back at the same moment.
    pub reconnect_pause: Duration,
    /// The longest that this pause becomes: 500 ms by default, a tenth of the default lease.
    pub reconnect_pause_most: Duration,
    /// The runs of host agents that this device has seen: an older one than the newest is refused. Give a device
    /// that connects again the same.
    pub hosts: HostsSeen,
    /// The longest that the session polls for the next message before it sleeps, while messages come that
    /// quickly: a round trip is shorter by what it costs to wake a core. 100 us by default, none of which is
    /// spent while nothing happens; zero: always sleep.
    pub busy_poll: Duration,
    /// What connects to the endpoint: the system's sockets by default.
    pub connector: Connector,
    /// Where the time is read.
    pub clock: Clock,
}

/// Whether a device takes a replacement translation instead of a flush.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChangePte {
    /// The host agent sends an invalidation instead.
    Unsupported,
    /// The host agent sends the replacement.
    Supported,
}

/// What a device does when the connection of its session is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResumePolicy {
    /// It connects again, within its lease: what it holds stays in use meanwhile.
    Resume,
    /// It flushes everything, and the session is lost.
    Flush,
}

/// Why a configuration was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// An ack could not name all that was flushed.
    #[error("window is {window}; it must be 1 to {MAX_NOTICES_A_MESSAGE}")]
    Window {
        /// What was asked for.
        window: u32,
    },
    /// Nothing would ever be done.
    #[error("{field} must not be 0")]
    Zero {
        /// The field of [`DeviceConfig`].
        field: &'static str,
    },
}

impl DeviceConfig {
    /// The defaults.
    #[must_use]
    pub fn new(device: DeviceId, endpoint: Endpoint) -> Self {
        let lease = LeaseTerms::default();
        Self {
            device,
            endpoint,
            incarnation: Incarnation::new(clock::wall_nanos()).unwrap_or(Incarnation::FIRST),
            window: 1024,
            parallel_flushes: 64,
            max_faults: 256,
            max_refaults: 16,
            page_sizes: vec![PageSize::BASE],
            change_pte: ChangePte::Unsupported,
            lease_drift_ppm: lease.drift_ppm,
            lease_margin: None,
            enforcement: Enforcement::ByDevice,
            connect_timeout: Duration::from_secs(10),
            keepalive: Duration::from_secs(2),
            resume: ResumePolicy::Resume,
            reconnect_pause: Duration::from_millis(10),
            reconnect_pause_most: Duration::from_millis(500),
            hosts: HostsSeen::default(),
            busy_poll: Duration::from_micros(100),
            connector: Connector::system(),
            clock: Clock::boottime(),
        }
    }

    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        if self.window == 0 || self.window as usize > MAX_NOTICES_A_MESSAGE {
            return Err(ConfigError::Window { window: self.window });
        }
        if self.parallel_flushes == 0 {
            return Err(ConfigError::Zero { field: "parallel_flushes" });
        }
        if self.reconnect_pause.is_zero() {
            return Err(ConfigError::Zero { field: "reconnect_pause" });
        }
        if self.max_faults == 0 {
            return Err(ConfigError::Zero { field: "max_faults" });
        }
        Ok(())
    }
}
