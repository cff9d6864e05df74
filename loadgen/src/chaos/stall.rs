//! How long the machine keeps a process from running that wants to: what leases and bounds rest on, and what a run
//! that finds something to be slow has to tell of.

use std::io;
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use shootdown_client::Clock;

/// How long the watch sleeps. Short beside any margin of a lease.
const NAP: Duration = Duration::from_millis(1);

/// Sleeps and looks at the clock, in a thread of its own: nothing else that this program does makes it late. Ends when
/// it is dropped.
#[derive(Debug)]
pub(crate) struct StallWatch {
    longest: Arc<Mutex<Duration>>,
}

impl StallWatch {
    pub(crate) fn start(clock: Clock) -> io::Result<Self> {
        let longest = Arc::new(Mutex::new(Duration::ZERO));
        let seen = Arc::downgrade(&longest);
        std::thread::Builder::new().name("stall-watch".to_owned()).spawn(move || watch(&clock, &seen))?;
        Ok(Self { longest })
    }

    /// The longest so far.
    pub(crate) fn longest(&self) -> Duration {
        *self.longest.lock()
    }
}

fn watch(clock: &Clock, seen: &Weak<Mutex<Duration>>) {
    let mut before = clock.now();
    while let Some(longest) = seen.upgrade() {
        std::thread::park_timeout(NAP);
        let now = clock.now();
        let late = now.since(before).saturating_sub(NAP);
        let mut longest = longest.lock();
        *longest = longest.max(late);
        before = now;
    }
}

#[cfg(test)]
mod tests {
    use shootdown_client::Moment;

    use super::*;

    #[test]
    fn the_longest_stall_is_the_longest_step_of_the_clock() {
        // Two steps of a clock that stands still otherwise.
        let steps = Mutex::new(vec![900_u64, 900, 900, 200, 200, 0]);
        let clock = Clock::from_fn(move || {
            let mut steps = steps.lock();
            let millis = if steps.len() > 1 { steps.pop() } else { steps.last().copied() };
            Moment::from_nanos(millis.unwrap_or_default() * 1_000_000)
        });
        let watch = StallWatch::start(clock).unwrap();
        while watch.longest() < Duration::from_millis(699) {
            std::thread::yield_now();
        }
        assert_eq!(watch.longest(), Duration::from_millis(699), "700 ms, of which it meant to sleep one");
    }
}
