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
}

/// A process, as `/proc/PID/task` tells of it.
#[derive(Debug, Default)]
struct Followed {
    tasks: PathBuf,
    /// What each of its threads had waited in all at the last look, and when that look began.
    threads: HashMap<u32, Duration>,
    looked: Option<Moment>,
    looks: VecDeque<Look>,
}

/// What a look has found.
#[derive(Debug)]
struct Look {
    /// When the look before it began: the kernel counts a wait when it ends, so each of these ended after it.
    after: Moment,
    /// Threads that had waited, and for how long.
    waited: Vec<(u32, Duration)>,
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

    /// From now on it is this process whose waiting is looked at. Of the one before it nothing is known any more.
    pub(crate) fn follow(&self, pid: i32) {
        let tasks = PathBuf::from(format!("/proc/{pid}/task"));
        self.seen.lock().followed = Some(Followed { tasks, ..Followed::default() });
    }

    /// As if the followed process had waited for so long until now.
    #[cfg(test)]
    pub(crate) fn has_waited(&self, waited: Duration) {
        let look = Look { after: self.clock.now(), waited: vec![(1, waited)] };
        self.seen.lock().followed = Some(Followed { looks: [look].into(), ..Followed::default() });
    }

    /// How long the followed process certainly waited for a processor between `from` and now: the thread of it that
    /// waited the longest. It excuses what was slow, so what is not known counts as not waited: what was before the
    /// first look, before the oldest that is kept, or may have been before `from`.
    ///
    /// One thread and not all together: threads that wait for one processor wait at the same time, and what they held
    /// up was held up once. Work that goes through several threads may wait in each of them in turn, and then this is
    /// too little; a host agent of chaos has one shard, where nearly all of a round is done.
    pub(crate) fn waited_since(&self, from: Moment) -> Duration {
        let mut seen = self.seen.lock();
        let now = self.clock.now();
        let Some(followed) = &mut seen.followed else { return Duration::ZERO };
        followed.look(now);
        // Whatever the kernel says, nobody waits for longer than there was time.
        followed.waited_since(from).min(now.since(from))
    }
}

impl Followed {
    /// Begins at `now`.
    fn look(&mut self, now: Moment) {
        let (mut threads, mut waited) = (HashMap::new(), Vec::new());
        // It may have ended.
        for thread in std::fs::read_dir(&self.tasks).into_iter().flatten().flatten() {
            let Some(id) = thread.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let Ok(said) = std::fs::read_to_string(thread.path().join("schedstat")) else { continue };
            let Some(in_all) = run_delay(&said) else { continue };
            threads.insert(id, in_all);
            // When a thread waited that is seen for the first time, nobody knows.
            let anew = self.threads.get(&id).map_or(Duration::ZERO, |before| in_all.saturating_sub(*before));
            if !anew.is_zero() {
                waited.push((id, anew));
            }
        }
        self.threads = threads;
        let Some(after) = self.looked.replace(now) else { return };
        if self.looks.len() == LOOKS {
            self.looks.pop_front();
        }
        self.looks.push_back(Look { after, waited });
    }

    /// Of the thread that waited the longest.
    fn waited_since(&self, from: Moment) -> Duration {
        let mut threads: HashMap<u32, Duration> = HashMap::new();
        for look in &self.looks {
            // Of a wait that a look has found, as much is certainly of the time after `from` as fits between that and
            // the look before: it may have begun long ago, and ended right after that.
            let certain = look.after.since(from);
            for (thread, waited) in &look.waited {
                *threads.entry(*thread).or_default() += (*waited).min(certain);
            }
        }
        threads.into_values().max().unwrap_or_default()
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
            if let Some(followed) = &mut seen.followed {
                followed.look(now);
            }
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

    /// A process of a folder's, which says what its threads have waited in all, in milliseconds.
    struct Told {
        dir: tempfile::TempDir,
    }

    impl Told {
        fn new() -> (Self, Followed) {
            let dir = tempfile::tempdir().unwrap();
            let tasks = dir.path().to_owned();
            (Self { dir }, Followed { tasks, ..Followed::default() })
        }

        fn thread(&self, id: u32, waited: u64) {
            let thread = self.dir.path().join(id.to_string());
            std::fs::create_dir_all(&thread).unwrap();
            std::fs::write(thread.join("schedstat"), format!("7 {waited}000000 9\n")).unwrap();
        }

        fn ended(&self, id: u32) {
            std::fs::remove_dir_all(self.dir.path().join(id.to_string())).unwrap();
        }
    }

    fn at(millis: u64) -> Moment {
        Moment::from_nanos(millis * 1_000_000)
    }

    /// What is said at `now`, in milliseconds.
    fn waited(followed: Followed, now: u64, from: u64) -> u128 {
        let seen = Seen { followed: Some(followed), ..Seen::default() };
        let watch = StallWatch { clock: Clock::from_fn(move || at(now)), seen: Arc::new(Mutex::new(seen)) };
        watch.waited_since(at(from)).as_millis()
    }

    #[test]
    fn what_was_waited_before_the_first_look_is_not_known_and_does_not_count() {
        let (told, mut followed) = Told::new();
        told.thread(1, 500);
        followed.look(at(100));
        told.thread(1, 530);
        told.thread(2, 90);
        assert_eq!(waited(followed, 200, 0), 30, "nor what a thread had that nobody had seen before");
        let watch = StallWatch { clock: Clock::from_fn(|| at(200)), seen: Arc::default() };
        assert_eq!(watch.waited_since(at(0)), Duration::ZERO, "nobody is followed");
    }

    #[test]
    fn what_was_waited_before_the_oldest_look_that_is_kept_does_not_count() {
        let (told, mut followed) = Told::new();
        told.thread(1, 0);
        followed.look(at(1));
        told.thread(1, 1);
        for look in 2..=u64::try_from(LOOKS).unwrap() + 1 {
            followed.look(at(look));
        }
        assert_eq!(followed.looks.len(), LOOKS);
        assert_eq!(followed.waited_since(at(0)), Duration::from_millis(1));
        assert_eq!(waited(followed, 9000, 0), 0, "one look more, and that one is the oldest");
    }

    #[test]
    fn of_a_wait_that_may_have_been_before_only_what_fits_behind_counts() {
        let waited_since = |from| {
            let (told, mut followed) = Told::new();
            told.thread(1, 0);
            followed.look(at(100));
            followed.look(at(105));
            told.thread(1, 80);
            // It ended between 105 and 110, and may have begun at 25.
            followed.look(at(110));
            waited(followed, 200, from)
        };
        assert_eq!([20, 25, 30, 104].map(waited_since), [80, 80, 75, 1]);
        assert_eq!([105, 107, 110, 150].map(waited_since), [0; 4], "it may have ended by then");
    }

    #[test]
    fn waits_of_several_threads_are_not_added_up_and_those_of_one_are() {
        let (told, mut followed) = Told::new();
        for (look, waited) in [(100, 0), (200, 20), (300, 50)] {
            told.thread(1, waited);
            told.thread(2, waited / 2);
            followed.look(at(look));
        }
        assert_eq!(followed.waited_since(at(0)), Duration::from_millis(50));
        assert_eq!(waited(followed, 400, 150), 30, "of the first of them nobody knows when it was");
    }

    #[test]
    fn nobody_waits_for_longer_than_there_was_time() {
        let (told, mut followed) = Told::new();
        for (look, waited) in [(100, 0), (130, 0), (140, 1000), (150, 2000)] {
            told.thread(1, waited);
            followed.look(at(look));
        }
        assert_eq!(waited(followed, 155, 100), 55);
    }

    #[test]
    fn a_thread_that_has_another_ones_number_begins_anew() {
        let (told, mut followed) = Told::new();
        told.thread(1, 10);
        followed.look(at(100));
        told.ended(1);
        followed.look(at(200));
        told.thread(1, 60);
        assert_eq!(waited(followed, 300, 0), 0);
    }

    #[test]
    fn a_process_that_is_followed_later_says_nothing_of_the_one_before_it() {
        let watch = StallWatch::start(Clock::boottime()).unwrap();
        let (told, mut followed) = Told::new();
        for (look, waited) in [(1, 0), (100, 0), (200, 50)] {
            told.thread(1, waited);
            followed.look(at(look));
        }
        watch.seen.lock().followed = Some(followed);
        assert_eq!(watch.waited_since(at(0)), Duration::from_millis(50));
        // It never was: no process has that number.
        watch.follow(i32::MAX);
        assert_eq!(watch.waited_since(at(0)), Duration::ZERO);
    }

    #[test]
    fn the_kernel_tells_of_this_process() {
        let mut own = Followed { tasks: "/proc/self/task".into(), ..Followed::default() };
        own.look(at(1));
        assert!(!own.threads.is_empty());
        assert_eq!(run_delay("12 345 6\n"), Some(Duration::from_nanos(345)));
        assert_eq!(run_delay("12"), None);
    }
}
