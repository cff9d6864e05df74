//! Latency by stage: the parts of a round, named as in `docs/architecture.md`.
//!
//! ```text
//!   called -dispatch-> dispatched -stream-> received -flush-> flushed -ack-> resolved -completion-> answered
//!                                                                                       -release-> freed
//! ```
//!
//! Stream, flush and ack are those of each target. Both processes read `CLOCK_BOOTTIME` of one machine.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use shootdown_client::Moment;
use shootdown_server::source::RoundResult;

/// The longest that is told apart: a minute. What is longer counts as a minute.
const LONGEST_NANOS: u64 = 60_000_000_000;

/// Three significant digits.
const DIGITS: u8 = 3;

/// A part of a round.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// From the notifier call until a notice is in every target's outbox.
    Dispatch,
    /// From then until the SDK has the notice.
    Stream,
    /// From then until the device has stopped using the range.
    Flush,
    /// From then until the host agent has resolved the target.
    Ack,
    /// From the last target's resolution until the caller is answered.
    Completion,
    /// From the answer until the last page is freed.
    Release,
    /// From the notifier call until the caller is answered.
    Round,
}

impl Stage {
    /// Every stage, in the order of an event; the whole round last.
    pub const EVERY: [Self; 7] =
        [Self::Dispatch, Self::Stream, Self::Flush, Self::Ack, Self::Completion, Self::Release, Self::Round];

    /// The word of reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Dispatch => "dispatch",
            Self::Stream => "stream",
            Self::Flush => "flush",
            Self::Ack => "ack",
            Self::Completion => "completion",
            Self::Release => "release",
            Self::Round => "round",
        }
    }
}

/// A histogram for each stage.
#[derive(Debug)]
pub struct Stages(Vec<Histogram<u64>>);

impl Default for Stages {
    fn default() -> Self {
        Self(Stage::EVERY.iter().map(|_| histogram()).collect())
    }
}

impl Stages {
    /// Records the parts of a round that had targets; one without has no latency to speak of.
    pub fn record_round(&mut self, round: &RoundResult) {
        let times = &round.times;
        let Some(resolved) = times.resolved.filter(|_| !round.targets.is_empty()) else { return };
        self.record(Stage::Dispatch, times.dispatched.since(times.called));
        for target in &round.targets {
            if let (Some(timing), Some(resolved)) = (target.timing, target.resolved_at) {
                self.record(Stage::Stream, between(times.dispatched, timing.received));
                self.record(Stage::Flush, between(timing.received, timing.flushed));
                self.record(Stage::Ack, between(timing.flushed, resolved));
            }
        }
        self.record(Stage::Completion, times.answered.since(resolved));
        self.record(Stage::Round, times.answered.since(times.called));
    }

    /// Records one latency.
    pub fn record(&mut self, stage: Stage, took: Duration) {
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.0[stage as usize].saturating_record(nanos);
    }

    /// The figures, in the order of [`Stage::EVERY`].
    #[must_use]
    pub fn summaries(&self) -> Vec<StageSummary> {
        Stage::EVERY
            .iter()
            .zip(&self.0)
            .map(|(stage, histogram)| StageSummary::of(*stage, histogram))
            .collect()
    }
}

/// The figures of a stage, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct StageSummary {
    /// Which.
    pub stage: Stage,
    /// How many were recorded.
    pub count: u64,
    /// Half were as fast.
    pub p50_us: f64,
    /// 90 in a hundred.
    pub p90_us: f64,
    /// 99 in a hundred.
    pub p99_us: f64,
    /// 999 in a thousand.
    pub p999_us: f64,
    /// 9,999 in ten thousand.
    pub p9999_us: f64,
    /// The slowest.
    pub max_us: f64,
}

impl StageSummary {
    /// The figures of a histogram of nanoseconds.
    #[must_use]
    pub fn of(stage: Stage, histogram: &Histogram<u64>) -> Self {
        let at = |quantile: f64| micros(histogram.value_at_quantile(quantile));
        Self {
            stage,
            count: histogram.len(),
            p50_us: at(0.5),
            p90_us: at(0.9),
            p99_us: at(0.99),
            p999_us: at(0.999),
            p9999_us: at(0.9999),
            max_us: micros(histogram.max()),
        }
    }
}

/// A histogram of nanoseconds.
pub(crate) fn histogram() -> Histogram<u64> {
    Histogram::new_with_max(LONGEST_NANOS, DIGITS)
        .expect("the bounds of the histogram are constants that fit")
}

/// The device may have the notice before the host agent has told the last target: then it took no time.
fn between(earlier: Moment, later: Moment) -> Duration {
    later.since(earlier)
}

#[expect(clippy::cast_precision_loss, reason = "a minute of nanoseconds has 36 bits, an f64 has 53")]
fn micros(nanos: u64) -> f64 {
    nanos as f64 / 1000.0
}
