//! What one search looks at: how many of everything, and which of the rare things happen.
//!
//! Each is exhausted. One search with everything in it would not end; the rules meet in pairs, and each
//! pair that matters has a configuration.

use shootdown_core::{PageSize, Seq};

/// How much there is of everything.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Config {
    pub(crate) name: &'static str,
    pub(crate) devices: &'static [DeviceKind],
    pub(crate) pages: u8,
    /// Each page is an address space of its own, and each device has subscribed to that of the page of its number.
    pub(crate) apart: bool,
    pub(crate) events: u8,
    /// The sequence of the last event before those.
    pub(crate) began_after: Option<Seq>,
    /// The highest tick of either clock.
    pub(crate) horizon: u8,
    /// The most by which the clocks differ, in ticks. 0: they are one.
    pub(crate) skew: u8,
    pub(crate) window: usize,
    pub(crate) max_pending: usize,
    /// Sessions that are made in all.
    pub(crate) sessions: u8,
    pub(crate) heartbeats: bool,
    pub(crate) faults: bool,
    pub(crate) subscriptions: bool,
    pub(crate) young: bool,
    /// Accesses to frames by way of the host agent, which take time.
    pub(crate) accesses: bool,
    pub(crate) non_blockable: bool,
    /// Faults for writing, for which the source copies a page.
    pub(crate) breaks: bool,
    pub(crate) disconnects: u8,
    /// Messages of a stream that is up may be lost, which gRPC does not do: the number of them.
    pub(crate) losses: u8,
    pub(crate) device_crashes: u8,
    pub(crate) host_crashes: u8,
    pub(crate) planned_restarts: u8,
    pub(crate) pauses: u8,
    pub(crate) deadlines: u8,
    /// States below which it has not looked at what it is about.
    pub(crate) floor: usize,
    /// What must be reachable in it, so that what holds does not hold for want of anything happening.
    pub(crate) reaches: &'static [&'static str],
}

/// What a device said of itself in its Hello, and who can fence it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DeviceKind {
    /// It stops when its lease ends.
    pub(crate) enforces: bool,
    /// A fencer is configured for it.
    pub(crate) fencer: bool,
    /// How much one of its translations covers.
    pub(crate) translates: PageSize,
}

impl Config {
    /// Whether the device is told of what happens to the page.
    pub(crate) fn subscribes(&self, device: usize, page: u8) -> bool {
        !self.apart || device == usize::from(page)
    }
}

const PLAIN: DeviceKind = DeviceKind { enforces: true, fencer: false, translates: PageSize::BASE };
const FENCEABLE: DeviceKind = DeviceKind { fencer: true, ..PLAIN };
const UNLEASED: DeviceKind = DeviceKind { enforces: false, ..FENCEABLE };
const UNSTOPPABLE: DeviceKind = DeviceKind { enforces: false, ..PLAIN };
const WIDE: DeviceKind =
    DeviceKind { translates: PageSize::from_bytes(8192).expect("a power of two"), ..PLAIN };

const NOTHING: Config = Config {
    name: "",
    devices: &[PLAIN],
    pages: 1,
    apart: false,
    events: 1,
    horizon: 0,
    skew: 1,
    window: 2,
    max_pending: 1,
    sessions: 1,
    heartbeats: false,
    faults: true,
    subscriptions: false,
    young: false,
    accesses: false,
    non_blockable: false,
    breaks: false,
    began_after: None,
    disconnects: 0,
    losses: 0,
    device_crashes: 0,
    host_crashes: 0,
    planned_restarts: 0,
    pauses: 0,
    deadlines: 0,
    floor: 0,
    reaches: &[],
};

/// Two devices, the brackets, a caller that gives up, a source that cannot wait; time stands still.
pub(crate) const ROUND: Config = Config {
    name: "round",
    devices: &[PLAIN, PLAIN],
    events: 2,
    sessions: 2,
    non_blockable: true,
    deadlines: 1,
    floor: 10_000,
    reaches: &["released", "quarantine released", "acked by all"],
    ..NOTHING
};

/// A window of one notice, so that the third event finds the second pending. Sequences reach the highest bit.
pub(crate) const MERGE: Config = Config {
    name: "merge",
    pages: 3,
    events: 3,
    began_after: Seq::new(i64::MAX as u64 - 2),
    window: 1,
    faults: false,
    disconnects: 1,
    floor: 500,
    reaches: &["merged", "resumed", "released"],
    ..NOTHING
};

/// Two address spaces, the device of one of which may say nothing for ever; time stands still.
pub(crate) const APART: Config = Config {
    name: "two address spaces",
    devices: &[PLAIN, PLAIN],
    pages: 2,
    apart: true,
    events: 2,
    sessions: 2,
    floor: 3_000,
    reaches: &["released beside a round that waits", "released"],
    ..NOTHING
};

/// Joining and leaving between events.
pub(crate) const JOIN: Config = Config {
    name: "join",
    devices: &[PLAIN, PLAIN],
    events: 2,
    sessions: 2,
    subscriptions: true,
    floor: 10_000,
    reaches: &["released", "unsubscribed"],
    ..NOTHING
};

/// Faults for which the source copies a page, and so waits for the device that waits for the answer; time stands
/// still. Of two devices and two pages each may wait for the other's.
pub(crate) const BREAK: Config = Config {
    name: "break",
    devices: &[PLAIN, PLAIN],
    pages: 2,
    events: 2,
    sessions: 2,
    faults: false,
    breaks: true,
    floor: 50_000,
    reaches: &["a fault waits for its own session", "a newer frame is held", "released"],
    ..NOTHING
};

/// The same with a stream that ends while a fault waits.
pub(crate) const BREAK_LOST: Config = Config {
    name: "break, stream lost",
    events: 2,
    sessions: 2,
    breaks: true,
    disconnects: 1,
    floor: 500,
    reaches: &["a fault waits for its own session", "resumed", "released"],
    ..NOTHING
};

/// A device whose translations are of two pages each, and events of one; the third page is alone in its own.
pub(crate) const WIDE_TRANSLATIONS: Config = Config {
    name: "wide translations",
    devices: &[WIDE],
    pages: 3,
    events: 2,
    floor: 1_000,
    reaches: &["taken out beside what was told", "a newer frame is held", "released"],
    ..NOTHING
};

/// Two clocks, heartbeats that are under way for any time, a stream that ends.
pub(crate) const LEASE: Config = Config {
    name: "lease",
    horizon: 6,
    heartbeats: true,
    floor: 50_000,
    reaches: &["fenced by lease", "released", "suspect", "renewed"],
    ..NOTHING
};

/// Fencers, a device that cannot be waited out, accesses by way of the host agent.
pub(crate) const FENCE: Config = Config {
    name: "fence",
    devices: &[UNLEASED],
    horizon: 5,
    skew: 0,
    sessions: 2,
    accesses: true,
    disconnects: 1,
    floor: 5_000,
    reaches: &["fenced by a fencer", "quarantine released", "released"],
    ..NOTHING
};

/// A device that nobody can stop beside one that enforces its lease.
pub(crate) const UNSTOPPED: Config = Config {
    name: "unstopped",
    devices: &[UNSTOPPABLE, FENCEABLE],
    horizon: 5,
    skew: 0,
    sessions: 2,
    floor: 5_000,
    reaches: &["fenced by lease", "fenced by a fencer", "quarantined"],
    ..NOTHING
};

/// Streams that end at any point and are taken up again, with the young bits of what was used.
pub(crate) const RESUME: Config = Config {
    name: "resume",
    events: 2,
    sessions: 2,
    young: true,
    disconnects: 2,
    floor: 5_000,
    reaches: &["resumed", "released", "left", "acked again", "a newer frame is held"],
    ..NOTHING
};

/// The same on running clocks: who only reconnects does not live for ever.
pub(crate) const RECONNECT: Config = Config {
    name: "reconnect",
    horizon: 6,
    skew: 0,
    faults: false,
    heartbeats: true,
    disconnects: 3,
    floor: 10_000,
    reaches: &["resumed", "fenced by lease", "released"],
    ..NOTHING
};

/// A stream that loses messages.
pub(crate) const LOSS: Config = Config {
    name: "loss",
    pages: 2,
    events: 2,
    sessions: 2,
    losses: 1,
    floor: 3_000,
    reaches: &["gap", "released", "left"],
    ..NOTHING
};

/// A device agent that crashes and comes back, while its hardware goes on.
pub(crate) const DEVICE_CRASH: Config = Config {
    name: "device crash",
    horizon: 5,
    sessions: 2,
    device_crashes: 1,
    floor: 10_000,
    reaches: &["new run beside the old one", "fenced by lease", "released"],
    ..NOTHING
};

/// The host agent crashes; a device comes back, another one may crash, too.
pub(crate) const RESTART: Config = Config {
    name: "restart",
    devices: &[FENCEABLE],
    horizon: 5,
    skew: 0,
    sessions: 2,
    device_crashes: 1,
    host_crashes: 1,
    floor: 20_000,
    reaches: &[
        "grace",
        "grace over: left",
        "grace over: lease",
        "grace over: fencer",
        "released after a crash",
    ],
    ..NOTHING
};

/// The same on two clocks: who waits for whom after a crash.
pub(crate) const RESTART_CLOCKS: Config = Config {
    name: "restart, two clocks",
    horizon: 5,
    sessions: 2,
    host_crashes: 1,
    floor: 10_000,
    reaches: &["grace over: left", "grace over: lease", "released after a crash"],
    ..NOTHING
};

/// The host agent is stopped at any point and goes on, and may crash before and after that, in its start, too; time
/// stands still.
pub(crate) const PLANNED: Config = Config {
    name: "planned restart",
    events: 2,
    sessions: 2,
    planned_restarts: 1,
    host_crashes: 2,
    floor: 3_000,
    reaches: &[
        "resumed after a planned restart",
        "stopped in the grace period",
        "left out",
        "crashed in its start",
        "grace over: left",
        "released",
    ],
    ..NOTHING
};

/// The same beside a device agent that crashes, so that a grace period is not over when a new run of it is there.
pub(crate) const PLANNED_GRACE: Config = Config {
    name: "planned restart in the grace period",
    sessions: 2,
    device_crashes: 1,
    planned_restarts: 1,
    host_crashes: 1,
    floor: 3_000,
    reaches: &["stopped in the grace period", "new run beside the old one", "released"],
    ..NOTHING
};

/// A successor that goes on hangs in its start, and another takes over that could go on with the same.
pub(crate) const PLANNED_HANG: Config = Config {
    name: "planned restart that hangs",
    sessions: 2,
    planned_restarts: 1,
    pauses: 1,
    floor: 3_000,
    reaches: &["resumed after a planned restart", "hung in its start", "left out", "released"],
    ..NOTHING
};

/// Restarts in a row, planned and not, on running clocks: whose lease ends when.
pub(crate) const RESTARTS: Config = Config {
    name: "restarts in a row",
    horizon: 4,
    skew: 0,
    faults: false,
    heartbeats: true,
    planned_restarts: 1,
    host_crashes: 1,
    floor: 10_000,
    reaches: &[
        "resumed after a planned restart",
        "stopped in the grace period",
        "crashed in its start",
        "renewed",
        "grace over: lease",
        "released after a crash",
    ],
    ..NOTHING
};

/// The host agent hangs, a successor takes over, and the old one wakes.
pub(crate) const TAKEOVER: Config = Config {
    name: "takeover",
    events: 2,
    sessions: 2,
    disconnects: 1,
    pauses: 1,
    floor: 10_000,
    reaches: &[
        "woke beside its successor",
        "woke beside a start",
        "old answer on its way",
        "released after a takeover",
    ],
    ..NOTHING
};

/// The same while time passes: who stays with the old host agent lives on its lease.
pub(crate) const TAKEOVER_CLOCKS: Config = Config {
    name: "takeover, clocks",
    horizon: 4,
    skew: 0,
    heartbeats: true,
    pauses: 1,
    floor: 10_000,
    reaches: &[
        "woke beside its successor",
        "woke beside a start",
        "grace over: lease",
        "released after a takeover",
    ],
    ..NOTHING
};

/// Every configuration.
pub(crate) const EVERY: [Config; 22] = [
    ROUND,
    MERGE,
    APART,
    JOIN,
    BREAK,
    BREAK_LOST,
    WIDE_TRANSLATIONS,
    LEASE,
    FENCE,
    UNSTOPPED,
    RESUME,
    RECONNECT,
    LOSS,
    DEVICE_CRASH,
    RESTART,
    RESTART_CLOCKS,
    PLANNED,
    PLANNED_GRACE,
    PLANNED_HANG,
    RESTARTS,
    TAKEOVER,
    TAKEOVER_CLOCKS,
];
