//! When rounds are due. A thread of its own: tokio's timers count milliseconds, and a busy runtime is late.

use std::io;
use std::time::Duration;

use shootdown_client::{Clock, Moment};
use tokio::sync::mpsc;

/// Rounds that are due and not begun. When it is full the pacer waits, and the run is marked invalid.
const DUE: usize = 16_384;

/// Sends each round's number and the moment at which it is due, `count` of them, `rate` a second, from
/// `first` on.
///
/// # Errors
/// When no thread can be started.
pub(super) fn start(first: Moment, rate: f64, count: u64) -> io::Result<mpsc::Receiver<(u64, Moment)>> {
    let (tx, rx) = mpsc::channel(DUE);
    let clock = Clock::boottime();
    // It ends when it has sent all, or when nobody listens any more.
    std::thread::Builder::new().name("pacer".to_owned()).spawn(move || {
        for number in 0..count {
            let due = due(first, rate, number);
            wait_until(&clock, due);
            if tx.blocking_send((number, due)).is_err() {
                return;
            }
        }
    })?;
    Ok(rx)
}

/// From the number, not from the round before: what is lost by rounding does not add up.
#[expect(clippy::cast_precision_loss, reason = "a day at ten million a second has 40 bits")]
fn due(first: Moment, rate: f64, number: u64) -> Moment {
    first + Duration::from_secs_f64(number as f64 / rate)
}

fn wait_until(clock: &Clock, due: Moment) {
    loop {
        let left = due.since(clock.now());
        if left.is_zero() {
            return;
        }
        // May return early, and never knows of anybody who unparks it.
        std::thread::park_timeout(left);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_are_due_at_equal_distances_and_the_rest_of_a_division_does_not_add_up() {
        let first = Moment::from_nanos(1_000);
        assert_eq!(due(first, 1000.0, 0), first);
        assert_eq!(due(first, 3.0, 3_000_000).since(first), Duration::from_secs(1_000_000));
    }

    #[test]
    fn no_round_is_sent_before_it_is_due() {
        let clock = Clock::boottime();
        let first = clock.now();
        let mut rx = start(first, 2_000.0, 20).unwrap();
        let mut sent = 0;
        while let Some((number, due)) = rx.blocking_recv() {
            assert!(clock.now() >= due);
            assert_eq!(number, sent);
            sent += 1;
        }
        assert_eq!(sent, 20);
    }
}
