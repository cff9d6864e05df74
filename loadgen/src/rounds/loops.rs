//! The two ways to send rounds.

use std::time::Duration;

use hdrhistogram::Histogram;
use parking_lot::Mutex;
use shootdown_client::{Clock, Moment};

use super::link::Link;
use super::{RoundsError, pacer};
use crate::cli::RoundsArgs;
use crate::report::histogram;

/// Rounds in flight: beyond it the generator waits for one to end, which marks the run invalid where it
/// makes later ones late.
const IN_FLIGHT: usize = 16_384;

/// A round that begins so much later than it was due is late.
const LATE: Duration = Duration::from_millis(10);

/// How long after the last round was due answers are waited for. What is not answered by then marks the run
/// invalid: a system that cannot keep up would be waited for without a bound.
const PATIENCE: Duration = Duration::from_secs(2);

/// What was measured, the warm-up left out.
#[derive(Debug, Clone)]
pub struct Measured {
    /// Nanoseconds of each round: from when it was due (open loop) or sent (closed loop) to its answer.
    pub latency: Histogram<u64>,
    /// Rounds a second that were asked for; `None`: closed loop.
    pub asked: Option<f64>,
    /// Rounds a second that were answered.
    pub achieved: f64,
    /// Rounds that failed.
    pub failed: u64,
    /// Rounds that began late.
    pub late: u64,
    /// Rounds that were due and not answered in time.
    pub unanswered: u64,
}

impl Measured {
    /// Whether the generator sent what it was to send, when it was to send it, and all was answered.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        let kept_up = self.asked.is_none_or(|asked| self.achieved >= 0.99 * asked);
        let all_answered = self.failed == 0 && self.unanswered == 0;
        kept_up && all_answered && self.late * 100 <= self.latency.len() && !self.latency.is_empty()
    }
}

#[derive(Debug)]
struct Book {
    latency: Histogram<u64>,
    failed: u64,
    late: u64,
    last: Moment,
}

impl Book {
    fn new(from: Moment) -> Self {
        Self { latency: histogram(), failed: 0, late: 0, last: from }
    }

    fn on_answered(&mut self, began: Moment, answered: Moment) {
        let nanos = u64::try_from(answered.since(began).as_nanos()).unwrap_or(u64::MAX);
        self.latency.saturating_record(nanos);
        self.last = self.last.max(answered);
    }

    fn measured(&self, from: Moment, asked: Option<f64>, unanswered: u64) -> Measured {
        let seconds = self.last.since(from).as_secs_f64();
        let achieved = if seconds > 0.0 { count(self.latency.len()) / seconds } else { 0.0 };
        let (latency, failed, late) = (self.latency.clone(), self.failed, self.late);
        Measured { latency, asked, achieved, failed, late, unanswered }
    }
}

/// Sends each round when it is due.
pub(super) async fn open(link: &Link, args: &RoundsArgs) -> Result<Measured, RoundsError> {
    let clock = Clock::boottime();
    let first = clock.now();
    let from = first + Duration::from_secs_f64(args.warm_up);
    let rounds = whole(args.rate * (args.warm_up + args.seconds));
    let length = Duration::from_secs_f64(args.warm_up + args.seconds);
    let mut due = pacer::start(first, args.rate, rounds).map_err(RoundsError::Thread)?;
    let book = Mutex::new(Book::new(from));
    let round = async |number: u64, intended: Moment| {
        let began = clock.now();
        let answer = link.round(number).await;
        let answered = clock.now();
        if intended >= from {
            let mut book = book.lock();
            book.late += u64::from(began.since(intended) > LATE);
            match &answer {
                Ok(_) => book.on_answered(intended, answered),
                Err(_) => book.failed += 1,
            }
        }
        if let Ok(bracket) = answer {
            // Not measured: nobody waits for the end of a bracket.
            let _ = bracket.end().await;
        }
    };
    // Polled by this task, beside each other: they borrow what they share.
    let mut flying = futures_util::stream::FuturesUnordered::new();
    let mut all_sent = false;
    let mut patience = std::pin::pin!(tokio::time::sleep(length + PATIENCE));
    while !all_sent || !flying.is_empty() {
        tokio::select! {
            // The end goes first, or a system that is too slow would keep it from its turn; then what is due,
            // for a late send is a wrong measurement.
            biased;
            () = &mut patience => break,
            next = due.recv(), if !all_sent && flying.len() < IN_FLIGHT => match next {
                Some((number, intended)) => flying.push(round(number, intended)),
                None => all_sent = true,
            },
            Some(()) = futures_util::StreamExt::next(&mut flying), if !flying.is_empty() => {}
        }
    }
    drop(flying);
    let book = book.lock();
    // Those of the warm-up are told by their number.
    let measured = rounds.saturating_sub(whole(args.rate * args.warm_up));
    let unanswered = measured.saturating_sub(book.latency.len() + book.failed);
    Ok(book.measured(from, Some(args.rate), unanswered))
}

/// Each caller sends its next round when its last is answered.
pub(super) async fn closed(link: &Link, args: &RoundsArgs, callers: u16) -> Result<Measured, RoundsError> {
    let clock = Clock::boottime();
    let first = clock.now();
    let from = first + Duration::from_secs_f64(args.warm_up);
    let until = from + Duration::from_secs_f64(args.seconds);
    let book = Mutex::new(Book::new(from));
    let caller = async |caller: u64| {
        let mut number = caller;
        loop {
            let began = clock.now();
            if began >= until {
                return;
            }
            let answer = link.round(number).await;
            let answered = clock.now();
            number += u64::from(callers);
            if began >= from {
                match &answer {
                    Ok(_) => book.lock().on_answered(began, answered),
                    Err(_) => book.lock().failed += 1,
                }
            }
            match answer {
                Ok(bracket) => drop(bracket.end().await),
                // A host agent that refuses must not be asked in a busy loop.
                Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        }
    };
    futures_util::future::join_all((0..u64::from(callers)).map(caller)).await;
    let measured = book.lock().measured(from, None, 0);
    Ok(measured)
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "both factors are bounded by the flags"
)]
fn whole(number: f64) -> u64 {
    number.ceil() as u64
}

#[expect(clippy::cast_precision_loss, reason = "a day at ten million a second has 40 bits")]
fn count(number: u64) -> f64 {
    number as f64
}
