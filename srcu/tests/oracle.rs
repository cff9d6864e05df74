//! Sequences of operations against a reference that knows nothing of banks or counters: it only remembers which
//! sections were open when something was asked for.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "a test helper fails as its test does")]

mod util;

use proptest::prelude::*;
use srcu::{Barrier, Cookie, Domain, Guard, ReadGuard, Srcu, Synchronize};
use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
    thread,
};
use util::Polled;

#[derive(Clone, Copy, Debug)]
enum Op {
    Read,
    ReadValue,
    /// Keeps the section of a guard, without its value.
    IntoSection(usize),
    End(usize),
    EndOnAnotherThread(usize),
    Update,
    StartPoll,
    Synchronize,
    /// Drops a future that waits.
    Cancel(usize),
    Call,
    /// A callback that defers another, and reads, and updates.
    CallThatCalls,
    Barrier,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => Just(Op::Read),
        2 => Just(Op::ReadValue),
        1 => any::<usize>().prop_map(Op::IntoSection),
        6 => any::<usize>().prop_map(Op::End),
        1 => any::<usize>().prop_map(Op::EndOnAnotherThread),
        2 => Just(Op::Update),
        3 => Just(Op::StartPoll),
        3 => Just(Op::Synchronize),
        1 => any::<usize>().prop_map(Op::Cancel),
        2 => Just(Op::Call),
        1 => Just(Op::CallThatCalls),
        1 => Just(Op::Barrier),
    ]
}

enum Held {
    #[allow(dead_code, reason = "held for its drop")]
    Section(ReadGuard),
    Value {
        guard: Guard<u64>,
        version: u64,
    },
}

/// What the reference knows of something that waits for sections.
struct Expectation {
    /// Safety: it must not be over while one of these is open.
    covered: BTreeSet<u64>,
    /// Progress: see [`Expectation::on_ended`].
    generation: BTreeSet<u64>,
    generations: u32,
}

/// A grace period may wait for sections that began after it was asked for, until it flips; and one that was in progress
/// comes first. Each has at most one more set of sections to wait for, so after three sets nothing is left.
const GENERATIONS: u32 = 3;

impl Expectation {
    fn new(open: &BTreeSet<u64>) -> Self {
        let mut new = Self { covered: open.clone(), generation: open.clone(), generations: 0 };
        new.renew(open);
        new
    }

    fn on_ended(&mut self, section: u64, open: &BTreeSet<u64>) {
        self.covered.remove(&section);
        self.generation.remove(&section);
        self.renew(open);
    }

    fn renew(&mut self, open: &BTreeSet<u64>) {
        while self.generation.is_empty() && self.generations < GENERATIONS {
            self.generations += 1;
            self.generation.clone_from(open);
        }
    }

    fn check(&self, over: bool, what: &str) {
        assert!(!over || self.covered.is_empty(), "{what} is over while {:?} are open", self.covered);
        assert!(over || self.generations < GENERATIONS || !self.generation.is_empty(), "{what} is not over");
    }
}

struct Bench {
    table: Arc<Srcu<u64>>,
    domain: Domain,
    version: u64,
    held: Vec<(u64, Held)>,
    next_section: u64,
    cookies: Vec<(Cookie, Expectation)>,
    synchronizers: Vec<(Polled<Synchronize>, Expectation)>,
    barriers: Vec<(Polled<Barrier>, usize)>,
    callbacks: Vec<Expectation>,
    /// Numbers of the callbacks that have run, in the order in which they did.
    ran: Arc<Mutex<Vec<usize>>>,
    nested: Arc<Mutex<(usize, usize)>>,
}

impl Bench {
    fn new() -> Self {
        let domain = Domain::builder().name("oracle").stripes(4).on_stall(|_| ()).build();
        Self {
            table: Arc::new(Srcu::new(domain.clone(), 0)),
            domain,
            version: 0,
            held: Vec::new(),
            next_section: 0,
            cookies: Vec::new(),
            synchronizers: Vec::new(),
            barriers: Vec::new(),
            callbacks: Vec::new(),
            ran: Arc::default(),
            nested: Arc::default(),
        }
    }

    fn open(&self) -> BTreeSet<u64> {
        self.held.iter().map(|(section, _)| *section).collect()
    }

    fn hold(&mut self, held: Held) {
        self.held.push((self.next_section, held));
        self.next_section += 1;
    }

    /// Takes the section that the index picks, if any is open.
    fn pick(&mut self, index: usize) -> Option<(u64, Held)> {
        (!self.held.is_empty()).then(|| self.held.swap_remove(index % self.held.len()))
    }

    fn expect_ended(&mut self, section: u64) {
        let open = self.open();
        let of_cookies = self.cookies.iter_mut().map(|(_, expectation)| expectation);
        let of_synchronizers = self.synchronizers.iter_mut().map(|(_, expectation)| expectation);
        for expectation in of_cookies.chain(of_synchronizers).chain(&mut self.callbacks) {
            expectation.on_ended(section, &open);
        }
    }

    fn callback(&mut self) -> impl FnOnce() + Send + 'static {
        let number = self.callbacks.len();
        self.callbacks.push(Expectation::new(&self.open()));
        let ran = Arc::clone(&self.ran);
        move || ran.lock().unwrap().push(number)
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Read => self.hold(Held::Section(self.domain.read())),
            Op::ReadValue => {
                let guard = self.table.read();
                self.hold(Held::Value { guard, version: self.version });
            }
            Op::IntoSection(index) => {
                if let Some((section, held)) = self.pick(index) {
                    let held = match held {
                        Held::Value { guard, .. } => Held::Section(guard.into_section()),
                        section @ Held::Section(_) => section,
                    };
                    self.held.push((section, held));
                }
            }
            Op::End(index) => {
                if let Some((section, held)) = self.pick(index) {
                    drop(held);
                    self.expect_ended(section);
                }
            }
            Op::EndOnAnotherThread(index) => {
                if let Some((section, held)) = self.pick(index) {
                    thread::spawn(move || drop(held)).join().unwrap();
                    self.expect_ended(section);
                }
            }
            Op::Update => {
                assert_eq!(*self.table.update(|version| version + 1), self.version);
                self.version += 1;
            }
            Op::StartPoll => self.cookies.push((self.domain.start_poll(), Expectation::new(&self.open()))),
            Op::Synchronize => {
                let mut future = Polled::new(self.domain.synchronize());
                let expectation = Expectation::new(&self.open());
                if future.is_ready() {
                    expectation.check(true, "synchronize");
                } else {
                    self.synchronizers.push((future, expectation));
                }
            }
            Op::Cancel(index) => {
                if !self.synchronizers.is_empty() {
                    self.synchronizers.swap_remove(index % self.synchronizers.len());
                }
            }
            Op::Call => {
                let callback = self.callback();
                self.domain.call(callback);
            }
            Op::CallThatCalls => {
                let callback = self.callback();
                let (domain, table) = (self.domain.clone(), Arc::clone(&self.table));
                let nested = Arc::clone(&self.nested);
                nested.lock().unwrap().0 += 1;
                self.domain.call(move || {
                    callback();
                    let guard = table.read();
                    table.update(|version| *version);
                    domain.call(move || nested.lock().unwrap().1 += 1);
                    drop(guard);
                });
            }
            Op::Barrier => {
                let mut future = Polled::new(self.domain.barrier());
                let queued = self.callbacks.len();
                let ready = future.is_ready();
                if !ready {
                    self.barriers.push((future, queued));
                }
            }
        }
    }

    fn check(&mut self) {
        assert_eq!(self.domain.readers(), self.held.len());
        for (_, held) in &self.held {
            if let Held::Value { guard, version } = held {
                assert_eq!(**guard, *version, "a version changed under its reader");
            }
        }
        for (cookie, expectation) in &self.cookies {
            expectation.check(self.domain.poll(*cookie), "a cookie");
        }
        self.synchronizers.retain_mut(|(future, expectation)| {
            let woken = future.wakes() > 0;
            let ready = future.is_ready();
            assert_eq!(woken, ready, "a sleeper is woken exactly when its grace period is over");
            expectation.check(ready, "synchronize");
            !ready
        });
        let ran = self.ran.lock().unwrap();
        assert!(ran.iter().copied().eq(0..ran.len()), "callbacks ran out of order or twice: {ran:?}");
        for (number, expectation) in self.callbacks.iter().enumerate() {
            expectation.check(number < ran.len(), "a callback");
        }
        self.barriers.retain_mut(|(future, queued)| {
            let ready = future.is_ready();
            assert!(!ready || ran.len() >= *queued, "a barrier overtook a callback");
            !ready
        });
    }

    fn end(mut self) {
        while let Some((section, held)) = self.pick(0) {
            drop(held);
            self.expect_ended(section);
        }
        self.check();
        assert_eq!(self.ran.lock().unwrap().len(), self.callbacks.len());
        let (expected, ran) = *self.nested.lock().unwrap();
        assert_eq!(expected, ran, "a callback deferred by a callback did not run");
        assert!(self.barriers.is_empty() && self.synchronizers.is_empty());
        assert!(self.domain.check_stalls().is_empty());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn a_domain_does_what_the_reference_allows(ops in prop::collection::vec(op(), 1..120)) {
        let mut bench = Bench::new();
        for op in ops {
            bench.apply(op);
            bench.check();
        }
        bench.end();
    }
}
