//! What a seed stands for: the machines, their clocks, the network, and what goes wrong when.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use shootdown_client::Enforcement;
use shootdown_core::lease::LeaseTerms;

use crate::administrator;
use crate::clock::SkewedClock;
use crate::content;
use crate::faults::{self, Planned};
use crate::fencer::{self, FencerPlan};
use crate::trace::CutOffBy;

/// How long things go wrong.
pub const STORM: Duration = Duration::from_millis(700);

/// Everything that is drawn from a seed.
#[derive(Debug, Clone)]
pub struct Plan {
    pub seed: u64,
    pub host_clock: SkewedClock,
    pub terms: LeaseTerms,
    pub ack_timeout: Duration,
    pub window: u32,
    pub max_pending: usize,
    /// Pages that may be quarantined.
    pub quarantine_pages: u64,
    pub fencer: Option<FencerPlan>,
    pub latency: Latency,
    pub devices: Vec<DevicePlan>,
    pub faults: Vec<Planned>,
    /// The mean pause between two calls of the source.
    pub call_every: Duration,
    /// What is broken on purpose.
    pub broken: Broken,
    pub source: Caller,
}

/// Where the source is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caller {
    /// In the host agent's process; it calls the Rust API.
    Embedded,
    /// On a machine of its own; it calls `NotifierService`.
    Remote,
}

/// The time that a message takes.
#[derive(Debug, Clone, Copy)]
pub struct Latency {
    pub least: Duration,
    pub most: Duration,
    /// The rate of its exponential distribution: the higher, the more messages are near the least.
    pub curve: f64,
}

/// A device.
#[derive(Debug, Clone)]
pub struct DevicePlan {
    pub index: usize,
    pub clock: SkewedClock,
    pub table: Table,
    pub reach: Reach,
    pub change_pte: bool,
    /// Who stops it when its lease is over. Nobody: it goes on.
    pub enforcement: Enforcement,
    pub window: u32,
    pub parallel_flushes: usize,
    /// A flush takes up to so long; zero: it is ready at once.
    pub flush: Duration,
    /// A use takes up to so long, which the margin of the lease must cover.
    pub most_use: Duration,
    /// A few take so long, which may be longer than the lease is.
    pub long_use: Duration,
    pub workers: usize,
}

/// Where a device keeps its translations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Table {
    /// In the SDK's, by [`shootdown_client::Mapping`].
    Sdk,
    /// In its own, filled by [`shootdown_client::CommitTicket::commit_raw`].
    Own,
}

/// How a device's uses reach the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// Nobody is asked any more.
    Itself,
    /// Through the host agent, which serves the bytes.
    PageService,
}

/// What is broken on purpose: the oracle must notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Broken {
    Nothing,
    /// The devices' clocks stand still, so that no lease ever runs out there.
    DeviceClock,
    /// The source frees its pages whatever the verdict is.
    ReleaseOnTimeout,
    /// A long use goes on past the lease.
    UseOutlastsLease,
    /// The fencer confirms, and cuts nobody off.
    FencerLies,
    /// The host agent is told of no budget.
    NoBudget,
    /// A flush does not wait for the uses that are going on.
    AckBeforeUsesEnded,
    /// The host agent's state directory is emptied before it starts again.
    JournalLost,
    /// What the host agent writes to its journal once it has taken it is not synced: its devices' sessions.
    SessionsNotSynced,
    /// A device does not flush what it is told to after it has resumed its session.
    ResumeSkipsFlush,
    /// A device goes on with the translations of the session that it has lost.
    TableOutlivesSession,
    /// The devices' clocks are further from real time than both sides were told.
    DriftBeyondBound,
    /// A source on a machine of its own tries again with another request id.
    RetryWithNewId,
    /// It waits for the answer of the host agent that it called, and takes it, whoever has taken over since.
    OldAnswerTaken,
    /// A successor is started on a copy of the state directory, so that the host agent before it never knows.
    StateCopied,
}

impl Plan {
    pub fn draw(seed: u64, broken: Broken) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let drift_ppm = [600, 20_000, 100_000][rng.random_range(0..3)];
        let clock = |rng: &mut StdRng| SkewedClock {
            // From "just booted" to "up for months".
            origin: rng.random_range(0..1_u64 << 53),
            ppm: rng.random_range(-i64::from(drift_ppm)..=i64::from(drift_ppm)),
        };
        let terms = LeaseTerms {
            duration: millis(rng.random_range(80..260)),
            drift_ppm,
            margin: millis(rng.random_range(6..14)),
        };
        let host_clock = clock(&mut rng);
        let ack_timeout = millis(rng.random_range(20..70));
        let least = millis(rng.random_range(1..4));
        let latency = Latency {
            least,
            most: least + millis([2, 8, 25][rng.random_range(0..3)]),
            curve: rng.random_range(2..10).into(),
        };
        let count = rng.random_range(2..=4);
        let devices = (0..count).map(|index| {
            let clock = match broken {
                Broken::DriftBeyondBound => SkewedClock { ppm: -600_000, ..clock(&mut rng) },
                _ => clock(&mut rng),
            };
            DevicePlan::draw(index, clock, &terms, ack_timeout, &mut rng)
        });
        let devices: Vec<_> = devices.collect();
        let (source, of_source) = Caller::draw(seed, broken, &terms);
        let mut plan = Self {
            seed,
            host_clock,
            terms,
            ack_timeout,
            window: [2, 8, 64][rng.random_range(0..3)],
            max_pending: [2, 16, 1024][rng.random_range(0..3)],
            quarantine_pages: u64::MAX,
            fencer: None,
            latency,
            faults: faults::with(faults::draw(devices.len(), &terms, &mut rng), of_source),
            devices,
            call_every: millis(rng.random_range(4..20)),
            broken,
            source,
        };
        // What the other kind of source does not know of: address spaces that are not strict, budgets, bytes.
        if plan.source == Caller::Embedded {
            fencer::vary(&mut plan);
            content::vary(&mut plan);
        }
        plan
    }

    /// Who must cut a device off that does not stop by itself.
    pub fn cut_off_by(&self, device: usize) -> Option<CutOffBy> {
        let has_fencer = self.fencer.as_ref().is_some_and(|fencer| fencer.devices.contains(&device));
        match self.devices[device].enforcement {
            Enforcement::ByDevice => None,
            Enforcement::ByNobody if has_fencer => Some(CutOffBy::Fencer),
            Enforcement::ByNobody => Some(CutOffBy::Administrator),
        }
    }

    /// How long it takes at most, when all else is well, until somebody has cut such a device off.
    pub fn cut_off_bound(&self) -> Duration {
        let by_hand = administrator::PATIENCE;
        let bound = |device: &DevicePlan| match self.cut_off_by(device.index) {
            None => Duration::ZERO,
            // Or by hand, where nobody knows whom to cut off.
            Some(CutOffBy::Fencer) => {
                self.fencer.as_ref().map_or(Duration::ZERO, FencerPlan::patience).max(by_hand)
            }
            Some(CutOffBy::Administrator) => by_hand,
        };
        self.devices.iter().map(bound).max().unwrap_or_default()
    }

    /// Within how long a caller is answered that waits for a device which nobody is certain to stop.
    pub fn answer_bound(&self) -> Duration {
        let attempt = self.fencer.as_ref().map_or(Duration::ZERO, |fencer| fencer.time_limit);
        self.ack_timeout + self.terms.host_duration().max(attempt)
    }

    /// How long a round may take: its notice is overdue after T_ack, and the lease, which is not renewed
    /// from then on, lasts as long as the host agent counts it. The rest is for the watchdog, which looks
    /// eight times in the shorter of the two. For as many windows as its outbox may hold, because what is
    /// pending behind a full window is not overdue before it could be sent.
    pub fn resolution_bound(&self) -> Duration {
        let lease = self.terms.host_duration();
        let tick = self.ack_timeout.min(lease) / 8 + millis(7);
        self.host_clock.lasts(self.ack_timeout + lease + tick)
    }
}

impl Caller {
    /// Where it is, and what goes wrong there; by numbers of its own, so that the others stay what they are.
    fn draw(seed: u64, broken: Broken, terms: &LeaseTerms) -> (Self, Vec<Planned>) {
        let mut rng = StdRng::seed_from_u64(seed ^ 0x0050_5243_0000_0000);
        let is_remote = rng.random_range(0..3) == 0;
        let is_broken =
            matches!(broken, Broken::RetryWithNewId | Broken::OldAnswerTaken | Broken::StateCopied);
        match is_remote || is_broken {
            // The longer the one before stands still, the more its successor has done by then.
            true if broken == Broken::OldAnswerTaken => {
                (Self::Remote, faults::long_takeover(terms, &mut rng))
            }
            true => (Self::Remote, faults::draw_of_source(terms, &mut rng)),
            false => (Self::Embedded, Vec::new()),
        }
    }
}

impl DevicePlan {
    fn draw(
        index: usize,
        clock: SkewedClock,
        terms: &LeaseTerms,
        ack_timeout: Duration,
        rng: &mut StdRng,
    ) -> Self {
        let flush = match rng.random_range(0..4) {
            0 => Duration::ZERO,
            1 => millis(3),
            2 => millis(10),
            // Slower than is expected of it now and then.
            _ => ack_timeout + ack_timeout / 2,
        };
        Self {
            index,
            clock,
            table: if rng.random_bool(0.5) { Table::Sdk } else { Table::Own },
            reach: Reach::Itself,
            change_pte: rng.random_bool(0.5),
            enforcement: Enforcement::ByDevice,
            window: [1, 4, 1024][rng.random_range(0..3)],
            parallel_flushes: [1, 4, 64][rng.random_range(0..3)],
            flush,
            // Less than the margin on a clock that is off by a tenth, with two ticks to spare.
            most_use: (terms.margin * 4 / 5).saturating_sub(millis(3)).max(millis(1)),
            long_use: terms.duration * 2,
            workers: rng.random_range(1..4),
        }
    }
}

pub const fn millis(count: u64) -> Duration {
    Duration::from_millis(count)
}
