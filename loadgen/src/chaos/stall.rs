//! How long the machine keeps processes from running that want to: what leases and bounds rest on, and what a run
//! that finds something to be slow has to tell of.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use shootdown_client::{Clock, Moment};

/// How long the watch sleeps. Short beside any margin of a lease.
const NAP: Duration = Duration::from_millis(1);

/// Every so many naps it looks how long the followed process has waited.
const NAPS_A_LOOK: u32 = 5;

/// Looks that are kept: half a minute, longer than any call lasts.
const LOOKS: usize = 6000;

/// Watches in a thread of its own: nothing else that this program does makes it late. Ends when it is dropped.
#[derive(Debug)]
pub(crate) struct StallWatch {
    clock: Clock,
    seen: Arc<Mutex<Seen>>,
}

#[derive(Debug, Default)]
struct Seen {
    /// The longest that the watch itself woke up late.
    longest: Duration,
    followed: Option<Followed>,
    /// How long the processes that were followed had waited for a processor, all their threads together.
    waited: Duration,
    looks: VecDeque<(Moment, Duration)>,
}

/// A process, as `/proc/PID/task` tells of it.
#[derive(Debug)]
struct Followed {
    tasks: PathBuf,
    /// What each of its threads had waited at the last look.
    threads: HashMap<std::ffi::OsString, Duration>,
}

impl StallWatch {
    pub(crate) fn start(clock: Clock) -> io::Result<Self> {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let (of_the_watch, weak) = (clock.clone(), Arc::downgrade(&seen));
        std::thread::Builder::new()
            .name("stall-watch".to_owned())
            .spawn(move || watch(&of_the_watch, &weak))?;
        Ok(Self { clock, seen })
    }

    /// The longest so far.
    pub(crate) fn longest(&self) -> Duration {
        self.seen.lock().longest
    }

    /// From now on it is this process whose waiting is looked at.
    pub(crate) fn follow(&self, pid: i32) {
        let tasks = PathBuf::from(format!("/proc/{pid}/task"));
        self.seen.lock().followed = Some(Followed { tasks, threads: HashMap::new() });
    }

    /// How long threads of the followed process waited for a processor between `from` and now: each thread counts,
    /// and so does what came between `from` and the look before it, so it was not longer.
    pub(crate) fn waited_since(&self, from: Moment) -> Duration {
        let mut seen = self.seen.lock();
        seen.look(self.clock.now());
        let before = seen.looks.partition_point(|(at, _)| *at <= from);
        let then = before.checked_sub(1).and_then(|last| seen.looks.get(last)).map(|(_, waited)| *waited);
        seen.waited - then.unwrap_or_default()
    }
}

impl Seen {
    fn look(&mut self, now: Moment) {
        self.waited += self.followed.as_mut().map_or(Duration::ZERO, Followed::waited_anew);
        if self.looks.len() == LOOKS {
            self.looks.pop_front();
        }
        self.looks.push_back((now, self.waited));
    }
}

impl Followed {
    /// Since the last look. What a thread waited between that and its end is not known any more.
    fn waited_anew(&mut self) -> Duration {
        let mut anew = Duration::ZERO;
        // It may have ended.
        for thread in std::fs::read_dir(&self.tasks).into_iter().flatten().flatten() {
            let Ok(said) = std::fs::read_to_string(thread.path().join("schedstat")) else { continue };
            let Some(waited) = run_delay(&said) else { continue };
            let known = self.threads.insert(thread.file_name(), waited);
            anew += waited.saturating_sub(known.unwrap_or_default());
        }
        anew
    }
}

/// The second word of a `schedstat`: nanoseconds in which the thread could have run, and another did
/// (Documentation/scheduler/sched-stats.rst).
fn run_delay(schedstat: &str) -> Option<Duration> {
    schedstat.split_ascii_whitespace().nth(1)?.parse().ok().map(Duration::from_nanos)
}

fn watch(clock: &Clock, seen: &Weak<Mutex<Seen>>) {
    let mut before = clock.now();
    let mut naps = 0;
    while let Some(seen) = seen.upgrade() {
        std::thread::park_timeout(NAP);
        let now = clock.now();
        let late = now.since(before).saturating_sub(NAP);
        let mut seen = seen.lock();
        seen.longest = seen.longest.max(late);
        naps += 1;
        if naps == NAPS_A_LOOK {
            naps = 0;
            seen.look(now);
        }
        drop(seen);
        before = clock.now();
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

    #[test]
    fn what_a_process_waited_is_counted_from_a_moment_on_and_over_its_successors() {
        let dir = tempfile::tempdir().unwrap();
        let process = |name: &str, threads: &[(&str, u64)]| {
            let tasks = dir.path().join(name);
            for (thread, waited) in threads {
                std::fs::create_dir_all(tasks.join(thread)).unwrap();
                std::fs::write(tasks.join(thread).join("schedstat"), format!("7 {waited} 9\n")).unwrap();
            }
            Followed { tasks, threads: HashMap::new() }
        };
        let at = Moment::from_nanos;
        let mut seen = Seen { followed: Some(process("first", &[("1", 100), ("2", 10)])), ..Seen::default() };
        seen.look(at(1));
        process("first", &[("1", 150), ("3", 5)]);
        seen.look(at(2));
        seen.followed = Some(process("second", &[("1", 1000)]));
        seen.look(at(3));
        seen.followed = Some(process("gone", &[]));
        seen.look(at(4));
        let waited: Vec<u128> = seen.looks.iter().map(|(_, waited)| waited.as_nanos()).collect();
        assert_eq!(waited, [110, 165, 1165, 1165]);

        let clock = Clock::from_fn(move || at(5));
        let watch = StallWatch { clock, seen: Arc::new(Mutex::new(seen)) };
        let since = |from| watch.waited_since(at(from)).as_nanos();
        assert_eq!([since(0), since(1), since(2), since(3), since(9)], [1165, 1055, 1000, 0, 0]);
    }

    #[test]
    fn the_kernel_tells_of_this_process() {
        let mut own = Followed { tasks: "/proc/self/task".into(), threads: HashMap::new() };
        own.waited_anew();
        assert!(!own.threads.is_empty());
        assert_eq!(run_delay("12 345 6\n"), Some(Duration::from_nanos(345)));
        assert_eq!(run_delay("12"), None);
    }
}
