//! How long the machine keeps processes from running that want to: what leases and bounds rest on, and what a run
//! that finds something to be slow has to tell of.

use std::collections::{HashMap, VecDeque};
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
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
    followed: Option<PathBuf>,
    /// The oldest first.
    looks: VecDeque<(Moment, Waited)>,
}

/// How long each thread of a process has waited for a processor since it began.
type Waited = HashMap<OsString, Duration>;

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
        self.seen.lock().follow(PathBuf::from(format!("/proc/{pid}/task")));
    }

    /// How long the thread of the followed process that waited longest for a processor did so between `from` and now.
    /// It was at least as long: what came between `from` and the look after it is not known, and where threads waited
    /// one after the other for the same thing only one of them counts.
    pub(crate) fn waited_since(&self, from: Moment) -> Duration {
        let mut seen = self.seen.lock();
        seen.look(self.clock.now());
        seen.waited_since(from)
    }
}

impl Seen {
    /// What was seen of the one before says nothing of this one.
    fn follow(&mut self, tasks: PathBuf) {
        self.followed = Some(tasks);
        self.looks.clear();
    }

    fn look(&mut self, now: Moment) {
        let Some(tasks) = &self.followed else { return };
        let waited = waited(tasks);
        if self.looks.len() == LOOKS {
            self.looks.pop_front();
        }
        self.looks.push_back((now, waited));
    }

    fn waited_since(&self, from: Moment) -> Duration {
        let first = self.looks.partition_point(|(at, _)| *at < from);
        let (Some((_, then)), Some((_, now))) = (self.looks.get(first), self.looks.back()) else {
            return Duration::ZERO;
        };
        // A thread that is new since then has waited since then.
        let anew = |(thread, waited): (&OsString, &Duration)| {
            waited.saturating_sub(then.get(thread).copied().unwrap_or_default())
        };
        now.iter().map(anew).max().unwrap_or_default()
    }
}

/// `/proc/PID/task`, as it is now.
fn waited(tasks: &Path) -> Waited {
    let threads = std::fs::read_dir(tasks).into_iter().flatten().flatten();
    let waited = threads.filter_map(|thread| {
        // It may have ended.
        let said = std::fs::read_to_string(thread.path().join("schedstat")).ok()?;
        Some((thread.file_name(), run_delay(&said)?))
    });
    waited.collect()
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

    /// A process whose threads have waited for so many nanoseconds.
    fn process(tasks: &Path, threads: &[(&str, u64)]) {
        for (thread, waited) in threads {
            std::fs::create_dir_all(tasks.join(thread)).unwrap();
            std::fs::write(tasks.join(thread).join("schedstat"), format!("7 {waited} 9\n")).unwrap();
        }
    }

    #[test]
    fn the_thread_that_waited_longest_counts_from_the_look_after_a_moment_on() {
        let dir = tempfile::tempdir().unwrap();
        let at = Moment::from_nanos;
        let mut seen = Seen::default();
        seen.follow(dir.path().to_owned());
        process(dir.path(), &[("1", 1000), ("2", 10)]);
        seen.look(at(10));
        process(dir.path(), &[("1", 1050), ("2", 90), ("3", 5)]);
        seen.look(at(20));
        process(dir.path(), &[("1", 1051), ("2", 91), ("3", 65)]);
        seen.look(at(30));
        let since = |from| seen.waited_since(at(from)).as_nanos();
        // What was waited before the first look is not known, and what was before the next one neither.
        assert_eq!([since(0), since(10), since(11), since(20)], [81, 81, 60, 60]);
        assert_eq!([since(21), since(31)], [0, 0]);
    }

    #[test]
    fn nothing_is_known_of_a_process_from_before_it_was_followed_nor_of_the_one_before_it() {
        let dir = tempfile::tempdir().unwrap();
        let at = Moment::from_nanos;
        let mut seen = Seen::default();
        seen.look(at(1));
        assert_eq!(seen.waited_since(at(0)), Duration::ZERO, "nobody is followed");
        seen.follow(dir.path().join("first"));
        process(&dir.path().join("first"), &[("1", 100)]);
        seen.look(at(2));
        seen.follow(dir.path().join("second"));
        process(&dir.path().join("second"), &[("1", 500)]);
        seen.look(at(3));
        assert_eq!(seen.waited_since(at(0)), Duration::ZERO);
        seen.follow(dir.path().join("gone"));
        seen.look(at(4));
        assert_eq!(seen.waited_since(at(0)), Duration::ZERO);
    }

    #[test]
    fn the_kernel_tells_of_this_process() {
        assert!(!waited(Path::new("/proc/self/task")).is_empty());
        assert_eq!(run_delay("12 345 6\n"), Some(Duration::from_nanos(345)));
        assert_eq!(run_delay("12"), None);
    }
}
