//! What the handles and the sections of one domain share, and how its grace periods are driven.

use crate::{
    builder::{Ages, Config},
    callbacks::Job,
    counters::{Bank, Counters, Ended},
    grace::Grace,
    record::Records,
    stall::Watch,
    sync::{AtomicU64, Mutex, Ordering, lock, thread_number},
    waiters::Place,
};
use std::{
    any::Any,
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::Arc,
    task::Waker,
    time::{Duration, Instant},
};

/// What a future of this crate waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Line {
    GracePeriods,
    Callbacks,
}

/// The shared state of a domain. Alive while a handle, an open section or a thread's cache refers to it.
///
/// The design: sections touch `counters` and their own record only. `grace` is a lock that is taken by whoever asks
/// for a grace period, and by a section that ends while one waits on its bank. No code of a user runs under it:
/// wakers, callbacks and reports are taken out and run after it. Its price: while a grace period waits, each section
/// that ends in the bank it waits on takes that lock and sums the bank once.
pub(crate) struct Core {
    /// Differs between domains; a cookie carries it.
    pub(crate) serial: usize,
    pub(crate) counters: Counters,
    grace: Mutex<Grace>,
    /// `grace.completed`, for a poll that takes no lock.
    completed: AtomicU64,
    pub(crate) records: Records,
    pub(crate) watch: Watch,
    pub(crate) config: Config,
    born: Instant,
}

/// What was decided under the lock, to be done after it.
#[must_use = "who was woken sleeps until this is carried out"]
struct Effects {
    woken: Vec<Waker>,
    batch: Option<VecDeque<Job>>,
}

impl Core {
    pub(crate) fn new(config: Config) -> Arc<Self> {
        static NEXT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
        Arc::new(Self {
            serial: NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed),
            counters: Counters::new(config.stripes),
            grace: Mutex::new(Grace::new()),
            completed: AtomicU64::new(0),
            records: Records::default(),
            watch: Watch::default(),
            born: config.clock.now(),
            config,
        })
    }

    /// The age of the domain, if sections are to be stamped with it.
    #[inline]
    pub(crate) fn stamp(&self) -> Option<Duration> {
        match self.config.ages {
            Ages::Sampled => None,
            Ages::Exact => Some(self.age()),
        }
    }

    pub(crate) fn age(&self) -> Duration {
        self.config.clock.now().saturating_duration_since(self.born)
    }

    /// Ends a section. If a grace period waits on its bank, this moves it on.
    #[inline]
    pub(crate) fn end(&self, bank: Bank) {
        if self.counters.end(bank, thread_number()) == Ended::Watched {
            self.drive();
        }
    }

    #[cold]
    fn drive(&self) {
        self.with_grace(|_| ());
    }

    /// The grace period that covers every section open now. It is under way, or over, when this returns.
    pub(crate) fn start_grace_period(&self) -> u64 {
        self.with_grace(Grace::request)
    }

    pub(crate) fn call(&self, job: Job) {
        self.with_grace(|grace| {
            let grace_period = grace.request();
            grace.callbacks.queue(grace_period, job);
        });
    }

    /// How many callbacks have to have run for those queued until now to have run.
    pub(crate) fn queued(&self) -> u64 {
        lock(&self.grace).callbacks.queued()
    }

    /// Acquire, with the Release in `with_grace`: who sees the number sees what the sections before it did.
    pub(crate) fn is_completed(&self, grace_period: u64) -> bool {
        self.completed.load(Ordering::Acquire) >= grace_period
    }

    pub(crate) fn waiting(&self) -> Option<crate::grace::Waiting> {
        lock(&self.grace).waiting()
    }

    /// Takes or keeps a place until the line reaches `until`; true if it has.
    pub(crate) fn wait(&self, line: Line, until: u64, place: &mut Option<Place>, waker: &Waker) -> bool {
        // Cloned before the lock and dropped after it: both run code of an executor.
        let waker = waker.clone();
        let (reached, unused) = {
            let mut grace = lock(&self.grace);
            let reached = match line {
                Line::GracePeriods => grace.completed() >= until,
                Line::Callbacks => grace.callbacks.ran() >= until,
            };
            let waiters = line.of(&mut grace);
            let unused = match (reached, *place) {
                (true, Some(held)) => [waiters.leave(held), Some(waker)],
                (true, None) => [Some(waker), None],
                (false, Some(held)) => [waiters.renew(held, waker), None],
                (false, None) => {
                    *place = Some(waiters.join(until, waker));
                    [None, None]
                }
            };
            (reached, unused)
        };
        drop(unused);
        if reached {
            *place = None;
        }
        reached
    }

    pub(crate) fn leave(&self, line: Line, place: Place) {
        let unused = line.of(&mut lock(&self.grace)).leave(place);
        drop(unused);
    }

    /// Runs `f` on the machine, moves it on, and carries out what follows from it, after the lock.
    fn with_grace<R>(&self, f: impl FnOnce(&mut Grace) -> R) -> R {
        let mut effects = Effects { woken: Vec::new(), batch: None };
        let result = {
            let mut grace = lock(&self.grace);
            let result = f(&mut grace);
            grace.advance(&self.counters, || self.config.clock.now(), &mut effects.woken);
            // Release: pairs with the Acquire in `is_completed`. Stored under the lock, so it never goes back.
            self.completed.store(grace.completed(), Ordering::Release);
            effects.batch = grace.callbacks.try_run();
            result
        };
        self.carry_out(effects);
        result
    }

    /// Wakes, then runs callbacks until none is ready. A panic of one does not stop the others: it goes on from here
    /// once all have run, unless this thread is unwinding already.
    fn carry_out(&self, effects: Effects) {
        let mut first_panic = None;
        wake_all(effects.woken, &mut first_panic);
        let mut next = effects.batch;
        while let Some(batch) = next {
            let count = batch.len();
            for job in batch {
                contain(job, &mut first_panic);
            }
            let mut woken = Vec::new();
            next = {
                let mut grace = lock(&self.grace);
                let next = grace.callbacks.on_ran(count);
                let ran = grace.callbacks.ran();
                grace.barriers.take_reached(ran, &mut woken);
                next
            };
            wake_all(woken, &mut first_panic);
        }
        if let Some(panic) = first_panic
            && !std::thread::panicking()
        {
            resume_unwind(panic);
        }
    }
}

impl Line {
    fn of(self, grace: &mut Grace) -> &mut crate::waiters::Waiters {
        match self {
            Self::GracePeriods => &mut grace.sleepers,
            Self::Callbacks => &mut grace.barriers,
        }
    }
}

fn wake_all(woken: Vec<Waker>, first_panic: &mut Option<Box<dyn Any + Send>>) {
    for waker in woken {
        contain(|| waker.wake(), first_panic);
    }
}

fn contain(f: impl FnOnce(), first_panic: &mut Option<Box<dyn Any + Send>>) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(f)) {
        first_panic.get_or_insert(panic);
    }
}
