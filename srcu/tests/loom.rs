//! One race a test. Run with
//! `RUSTFLAGS="--cfg loom" cargo test -p srcu --release --test loom`.
//!
//! A section that saw the old value writes 1 when it begins to act on it and 2 when it is through, both Relaxed. After
//! the grace period the updater must read 2: 1 would be a section it did not wait for, and 0 one whose end it was not
//! ordered after, which a Relaxed load is free to show.
#![cfg(loom)]
#![allow(clippy::unwrap_used, reason = "a test helper fails as its test does")]

use loom::{
    future::block_on,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    thread,
};
use srcu::{Domain, Guard, Srcu};
use std::{
    future::Future,
    pin::pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};

/// Two threads: every schedule.
fn model(f: impl Fn() + Sync + Send + 'static) {
    loom::model::Builder::new().check(f);
}

/// More threads: every schedule in which threads are preempted this often at most, so that all tests together take
/// seconds. All mutations that the README lists are found within it.
const PREEMPTIONS: usize = 3;

fn model_of_three(f: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(PREEMPTIONS);
    builder.check(f);
}

fn domain(stripes: usize) -> Domain {
    Domain::builder().stripes(stripes).build()
}

/// What a reader does to the thing that the updater is about to take away.
struct Page(AtomicUsize);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Saw {
    Old,
    New,
}

impl Page {
    const UNTOUCHED: usize = 0;
    const IN_USE: usize = 1;
    const LET_GO: usize = 2;

    fn new() -> Arc<Self> {
        Arc::new(Self(AtomicUsize::new(Self::UNTOUCHED)))
    }

    /// The first half of a section: the old version leads to the page, the new one does not.
    fn use_through(&self, version: &Guard<usize>) -> Saw {
        if **version == 0 {
            self.0.store(Self::IN_USE, Relaxed);
            Saw::Old
        } else {
            Saw::New
        }
    }

    fn let_go(&self, saw: Saw) {
        if saw == Saw::Old {
            self.0.store(Self::LET_GO, Relaxed);
        }
    }

    /// One whole section.
    fn visit(&self, table: &Srcu<usize>) -> Saw {
        let version = table.read();
        let saw = self.use_through(&version);
        self.let_go(saw);
        saw
    }

    fn state(&self) -> usize {
        self.0.load(Relaxed)
    }

    fn assert_quiescent(state: usize, saw: Saw) {
        let expected = if saw == Saw::Old { Self::LET_GO } else { Self::UNTOUCHED };
        assert_eq!(state, expected, "the grace period did not cover a section that saw {saw:?}");
    }
}

fn remap(table: &Srcu<usize>) {
    table.update(|version| version + 1);
}

#[test]
fn synchronize_waits_for_a_section_that_saw_the_old_version() {
    model(|| {
        let table = Arc::new(Srcu::new(domain(1), 0));
        let page = Page::new();
        let reader = {
            let (table, page) = (Arc::clone(&table), Arc::clone(&page));
            thread::spawn(move || page.visit(&table))
        };
        remap(&table);
        block_on(table.synchronize());
        let state = page.state();
        Page::assert_quiescent(state, reader.join().unwrap());
    });
}

#[test]
fn a_cookie_is_over_only_after_the_sections_it_covers() {
    model(|| {
        let table = Arc::new(Srcu::new(domain(1), 0));
        let page = Page::new();
        let reader = {
            let (table, page) = (Arc::clone(&table), Arc::clone(&page));
            thread::spawn(move || page.visit(&table))
        };
        remap(&table);
        let cookie = table.domain().start_poll();
        let state = table.domain().poll(cookie).then(|| page.state());
        let saw = reader.join().unwrap();
        if let Some(state) = state {
            Page::assert_quiescent(state, saw);
        }
        assert!(table.domain().poll(cookie), "the last section to end completes the grace period");
    });
}

#[test]
fn a_section_that_ends_on_another_thread_is_waited_for() {
    model_of_three(|| {
        let table = Arc::new(Srcu::new(domain(2), 0));
        let page = Page::new();
        let reader = {
            let (table, page) = (Arc::clone(&table), Arc::clone(&page));
            thread::spawn(move || {
                let version = table.read();
                let saw = page.use_through(&version);
                let section = version.into_section();
                let ender = thread::spawn(move || {
                    page.let_go(saw);
                    drop(section);
                });
                ender.join().unwrap();
                saw
            })
        };
        remap(&table);
        block_on(table.synchronize());
        let state = page.state();
        Page::assert_quiescent(state, reader.join().unwrap());
    });
}

#[test]
fn a_reader_that_slept_through_a_flip_is_waited_for() {
    model(|| {
        let table = Arc::new(Srcu::new(domain(1), 0));
        let page = Page::new();
        let reader = {
            let (table, page) = (Arc::clone(&table), Arc::clone(&page));
            thread::spawn(move || page.visit(&table))
        };
        // The reader may have chosen its bank before this flips it, and count in it only after.
        block_on(table.synchronize());
        remap(&table);
        block_on(table.synchronize());
        let state = page.state();
        Page::assert_quiescent(state, reader.join().unwrap());
    });
}

#[test]
fn a_grace_period_in_progress_does_not_serve_who_asks_during_it() {
    model_of_three(|| {
        let table = Arc::new(Srcu::new(domain(1), 0));
        let page = Page::new();
        let early = table.domain().read();
        let first = table.domain().start_poll();
        let ender = thread::spawn(move || drop(early));
        let reader = {
            let (table, page) = (Arc::clone(&table), Arc::clone(&page));
            thread::spawn(move || page.visit(&table))
        };
        remap(&table);
        block_on(table.synchronize());
        let state = page.state();
        Page::assert_quiescent(state, reader.join().unwrap());
        assert!(table.domain().poll(first));
        ender.join().unwrap();
    });
}

#[test]
fn a_callback_queued_during_a_grace_period_waits_for_the_next() {
    model_of_three(|| {
        let table = Arc::new(Srcu::new(domain(1), 0));
        let page = Page::new();
        let early = table.domain().read();
        let _first = table.domain().start_poll();
        let ender = thread::spawn(move || drop(early));
        let reader = {
            let (table, page) = (Arc::clone(&table), Arc::clone(&page));
            thread::spawn(move || page.visit(&table))
        };
        remap(&table);
        let seen = Arc::new(std::sync::Mutex::new(None));
        table.domain().call({
            let (page, seen) = (Arc::clone(&page), Arc::clone(&seen));
            move || *seen.lock().unwrap() = Some(page.state())
        });
        let saw = reader.join().unwrap();
        ender.join().unwrap();
        let state = seen.lock().unwrap().take().expect("the last section to end runs the callback");
        Page::assert_quiescent(state, saw);
    });
}

#[test]
fn a_section_that_comes_and_goes_does_not_stand_in_for_an_open_one() {
    model(|| {
        let domain = domain(1);
        let open = domain.read();
        let passer = {
            let domain = domain.clone();
            thread::spawn(move || drop(domain.read()))
        };
        let cookie = domain.start_poll();
        assert!(!domain.poll(cookie), "a section is still open");
        passer.join().unwrap();
        assert!(!domain.poll(cookie), "a section is still open");
        drop(open);
        assert!(domain.poll(cookie));
    });
}

#[test]
fn a_section_that_comes_and_goes_on_another_stripe_does_not_stand_in_either() {
    model(|| {
        let domain = domain(2);
        let open = domain.read();
        let passer = {
            let domain = domain.clone();
            thread::spawn(move || drop(domain.read()))
        };
        let cookie = domain.start_poll();
        assert!(!domain.poll(cookie), "a section is still open");
        passer.join().unwrap();
        drop(open);
        assert!(domain.poll(cookie));
    });
}

#[test]
fn the_last_reader_wakes_the_waiter() {
    model(|| {
        let domain = domain(1);
        let section = domain.read();
        let reader = thread::spawn(move || drop(section));
        // Loom reports a deadlock if the wake-up is lost.
        block_on(domain.synchronize());
        reader.join().unwrap();
    });
}

#[test]
fn two_readers_that_end_together_wake_the_waiter() {
    model_of_three(|| {
        let domain = domain(2);
        let sections = [domain.read(), domain.read()];
        let readers = sections.map(|section| thread::spawn(move || drop(section)));
        block_on(domain.synchronize());
        assert_eq!(domain.readers(), 0);
        for reader in readers {
            reader.join().unwrap();
        }
    });
}

#[test]
fn two_waiters_are_both_served() {
    model_of_three(|| {
        let domain = domain(1);
        let section = domain.read();
        let reader = thread::spawn(move || drop(section));
        let other = {
            let domain = domain.clone();
            thread::spawn(move || block_on(domain.synchronize()))
        };
        block_on(domain.synchronize());
        other.join().unwrap();
        reader.join().unwrap();
    });
}

#[test]
fn a_waiter_that_gives_up_takes_nobody_along() {
    model_of_three(|| {
        let domain = domain(1);
        let section = domain.read();
        let reader = thread::spawn(move || drop(section));
        let quitter = {
            let domain = domain.clone();
            thread::spawn(move || {
                let mut waiting = pin!(domain.synchronize());
                let _: Poll<()> = waiting.as_mut().poll(&mut Context::from_waker(Waker::noop()));
            })
        };
        block_on(domain.synchronize());
        quitter.join().unwrap();
        reader.join().unwrap();
    });
}

#[test]
fn a_callback_runs_once_whether_the_caller_or_the_last_reader_runs_it() {
    model(|| {
        let domain = domain(1);
        let section = domain.read();
        let page = Page::new();
        let reader = {
            let page = Arc::clone(&page);
            thread::spawn(move || {
                page.let_go(Saw::Old);
                drop(section);
            })
        };
        let runs = Arc::new(AtomicUsize::new(0));
        domain.call({
            let runs = Arc::clone(&runs);
            move || {
                Page::assert_quiescent(page.state(), Saw::Old);
                runs.fetch_add(1, Relaxed);
            }
        });
        reader.join().unwrap();
        assert_eq!(runs.load(Relaxed), 1);
    });
}

#[test]
fn callbacks_of_two_threads_run_one_at_a_time() {
    model(|| {
        let domain = domain(1);
        let running = Arc::new(AtomicUsize::new(0));
        let defer = move |domain: &Domain| {
            let running = Arc::clone(&running);
            domain.call(move || {
                let before = running.fetch_add(1, Relaxed);
                assert_eq!(before, 0, "two callbacks run at once");
                running.fetch_sub(1, Relaxed);
            });
        };
        let other = {
            let (domain, defer) = (domain.clone(), defer.clone());
            thread::spawn(move || defer(&domain))
        };
        defer(&domain);
        other.join().unwrap();
        block_on(domain.barrier());
    });
}

#[test]
fn a_barrier_returns_after_the_callbacks_that_another_thread_runs() {
    model(|| {
        let domain = domain(1);
        let section = domain.read();
        let reader = thread::spawn(move || drop(section));
        let ran = Arc::new(AtomicUsize::new(0));
        domain.call({
            let ran = Arc::clone(&ran);
            move || ran.store(1, Relaxed)
        });
        block_on(domain.barrier());
        assert_eq!(ran.load(Relaxed), 1);
        reader.join().unwrap();
    });
}

#[test]
fn updates_of_two_threads_are_both_kept() {
    model(|| {
        let count = Arc::new(Srcu::new(domain(1), 0));
        let other = {
            let count = Arc::clone(&count);
            thread::spawn(move || remap(&count))
        };
        remap(&count);
        other.join().unwrap();
        assert_eq!(*count.read(), 2);
    });
}
