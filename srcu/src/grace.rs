//! Grace periods: who asked for one, how far the one in progress is, who sleeps on it.
//!
//! ```text
//!            requested > completed                 idle bank drained: flip            old bank drained
//!   [Idle] -----------------------> [Scan1] --------------------------> [Scan2] -----------------------> [Idle]
//!                                   waits for the idle bank:             waits for the bank that was      completed += 1
//!                                   readers that missed the last flip    current until the flip
//! ```
//!
//! The machine has no thread. It is moved on, under its lock, by whoever is there: who asks for a grace period, and,
//! while one waits, each reader that ends a section in the bank it waits on. Both banks are drained after the grace
//! period was asked for, so each section that was open then is waited for, whatever bank it counted in. The flip
//! between makes sure that new sections cannot hold it up for ever.

use crate::{
    callbacks::Callbacks,
    counters::{Bank, Counters},
    waiters::Waiters,
};
use std::{task::Waker, time::Instant};

/// Named as in the kernel's `SRCU_STATE_IDLE`, `_SCAN1`, `_SCAN2`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Idle,
    Scan1,
    Scan2,
}

/// Whether the readers of the bank that is scanned were told to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Watch {
    Off,
    On,
}

/// The grace period that now waits, for the watchdog.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Waiting {
    /// When it first had to wait.
    pub(crate) since: Instant,
    /// The bank it drains, and since when: in its second scan, whoever is still in that bank began before.
    pub(crate) bank: Bank,
    pub(crate) bank_since: Instant,
    pub(crate) bank_is_retired: bool,
}

/// The state of a domain's grace periods, numbered 1, 2, 3 …
pub(crate) struct Grace {
    phase: Phase,
    watch: Watch,
    /// The last grace period that completed, and the last that anybody needs.
    completed: u64,
    requested: u64,
    waiting: Option<Waiting>,
    /// Those who wait for a grace period, by its number.
    pub(crate) sleepers: Waiters,
    pub(crate) callbacks: Callbacks,
    /// Those who wait for callbacks, by how many have to have run.
    pub(crate) barriers: Waiters,
}

impl Grace {
    pub(crate) fn new() -> Self {
        Self {
            phase: Phase::Idle,
            watch: Watch::Off,
            completed: 0,
            requested: 0,
            waiting: None,
            sleepers: Waiters::default(),
            callbacks: Callbacks::default(),
            barriers: Waiters::default(),
        }
    }

    pub(crate) fn completed(&self) -> u64 {
        self.completed
    }

    pub(crate) fn waiting(&self) -> Option<Waiting> {
        self.waiting
    }

    /// The first grace period that covers every section open now. One in progress does not: it may have scanned
    /// already past a section that has begun since. The kernel's `rcu_seq_snap`.
    pub(crate) fn request(&mut self) -> u64 {
        let covering = match self.phase {
            Phase::Idle => self.completed + 1,
            Phase::Scan1 | Phase::Scan2 => self.completed + 2,
        };
        self.requested = self.requested.max(covering);
        covering
    }

    /// Goes as far as it can without waiting; who can sleep no longer is put into `woken`.
    pub(crate) fn advance(&mut self, counters: &Counters, now: impl Fn() -> Instant, woken: &mut Vec<Waker>) {
        loop {
            match self.phase {
                Phase::Idle if self.requested > self.completed => self.phase = Phase::Scan1,
                Phase::Idle => break,
                Phase::Scan1 => {
                    if !self.scan(counters, counters.current().other(), &now) {
                        break;
                    }
                    counters.flip();
                    self.phase = Phase::Scan2;
                }
                Phase::Scan2 => {
                    if !self.scan(counters, counters.current().other(), &now) {
                        break;
                    }
                    self.phase = Phase::Idle;
                    self.waiting = None;
                    self.completed += 1;
                    self.callbacks.on_completed(self.completed);
                    self.sleepers.take_reached(self.completed, woken);
                }
            }
        }
    }

    /// Whether `bank` is drained. If not, its readers are told to look when they end, and the scan is repeated,
    /// since the last of them may have ended before it could be told (WAKE in `counters`).
    fn scan(&mut self, counters: &Counters, bank: Bank, now: impl Fn() -> Instant) -> bool {
        let mut drained = counters.is_drained(bank);
        if !drained && self.watch == Watch::Off {
            counters.arm(bank);
            self.watch = Watch::On;
            drained = counters.is_drained(bank);
            if !drained {
                let bank_since = now();
                let since = self.waiting.map_or(bank_since, |waiting| waiting.since);
                let bank_is_retired = self.phase == Phase::Scan2;
                self.waiting = Some(Waiting { since, bank, bank_since, bank_is_retired });
            }
        }
        if drained && self.watch == Watch::On {
            counters.disarm(bank);
            self.watch = Watch::Off;
        }
        drained
    }
}
