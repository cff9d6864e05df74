//! Deferred callbacks: when they run, in what order, and what they may do.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "a test helper fails as its test does")]

mod util;

use srcu::{Domain, ReadGuard, Srcu};
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex},
    thread,
};
use util::{Polled, block_on};

/// What callbacks write down, in the order in which they run.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<&'static str>>>);

impl Log {
    fn write(&self, line: &'static str) {
        self.0.lock().unwrap().push(line);
    }

    fn writer(&self, line: &'static str) -> impl FnOnce() + Send + 'static {
        let log = self.clone();
        move || log.write(line)
    }

    fn lines(&self) -> Vec<&'static str> {
        self.0.lock().unwrap().clone()
    }
}

#[test]
fn a_callback_runs_in_the_call_if_no_section_is_open() {
    let (domain, log) = (Domain::new("callbacks"), Log::default());
    domain.call(log.writer("ran"));
    assert_eq!(log.lines(), ["ran"]);
}

#[test]
fn a_callback_runs_in_the_last_readers_drop_and_nobody_has_to_poll() {
    let (domain, log) = (Domain::new("callbacks"), Log::default());
    let sections = [domain.read(), domain.read()];
    domain.call(log.writer("first"));
    domain.call(log.writer("second"));
    let [one, two] = sections;
    drop(one);
    assert!(log.lines().is_empty());
    thread::spawn(move || drop(two)).join().unwrap();
    assert_eq!(log.lines(), ["first", "second"]);
}

#[test]
fn a_callback_may_use_its_domain() {
    let log = Log::default();
    let table = Arc::new(Srcu::new(Domain::new("callbacks"), 0));
    let section = table.domain().read();
    let kept = Mutex::new(Some(table.domain().read()));
    table.domain().call({
        let (table, log) = (Arc::clone(&table), log.clone());
        move || {
            let nested = table.read();
            table.update(|value| value + 1);
            table.domain().call(log.writer("deferred inside"));
            let _cookie = table.domain().start_poll();
            drop(nested);
            assert!(table.domain().check_stalls().is_empty());
            log.write("outer is done");
        }
    });
    drop(section);
    drop(kept.lock().unwrap().take());
    assert_eq!(log.lines(), ["outer is done", "deferred inside"]);
    assert_eq!(*table.read(), 1);
}

/// Ends a section when it is dropped, as the last reference to something does.
struct EndsASection(#[allow(dead_code, reason = "held for its drop")] ReadGuard);

#[test]
fn a_callback_may_end_the_section_that_another_waits_for() {
    let (domain, log) = (Domain::new("callbacks"), Log::default());
    let first = domain.read();
    let held = EndsASection(domain.read());
    let other = Domain::new("other");
    other.call({
        let log = log.clone();
        let domain = domain.clone();
        move || {
            domain.call(log.writer("after both"));
            drop(held);
            log.write("held is dropped");
        }
    });
    assert_eq!(log.lines(), ["held is dropped"]);
    drop(first);
    assert_eq!(log.lines(), ["held is dropped", "after both"]);
}

#[test]
fn the_last_handle_may_be_dropped_inside_a_callback() {
    let log = Log::default();
    let domain = Domain::new("callbacks");
    let section = domain.read();
    let handle = domain.clone();
    domain.call({
        let log = log.clone();
        move || {
            drop(handle);
            log.write("ran");
        }
    });
    drop(domain);
    drop(section);
    assert_eq!(log.lines(), ["ran"]);
}

#[test]
fn a_callback_that_panics_does_not_stop_those_after_it() {
    let (domain, log) = (Domain::new("callbacks"), Log::default());
    let section = domain.read();
    domain.call(|| panic!("a callback fails"));
    domain.call(log.writer("after the panic"));
    let mut barrier = Polled::new(domain.barrier());
    assert!(!barrier.is_ready());

    let panicked = catch_unwind(AssertUnwindSafe(|| drop(section)));
    assert!(panicked.is_err(), "the panic goes on in who ran the callback");
    assert_eq!(log.lines(), ["after the panic"]);
    assert!(barrier.is_ready());
    domain.call(log.writer("the queue goes on"));
    assert_eq!(log.lines(), ["after the panic", "the queue goes on"]);
}

#[test]
fn a_callback_that_panics_while_its_thread_unwinds_does_not_abort() {
    let (domain, log) = (Domain::new("callbacks"), Log::default());
    let section = domain.read();
    domain.call(|| panic!("a callback fails"));
    domain.call(log.writer("after the panic"));
    let unwound = catch_unwind(AssertUnwindSafe(move || {
        let _section = section;
        panic!("a reader fails");
    }));
    assert_eq!(unwound.unwrap_err().downcast_ref(), Some(&"a reader fails"));
    assert_eq!(log.lines(), ["after the panic"]);
}

#[test]
fn a_barrier_waits_for_a_callback_that_another_thread_is_running() {
    let (domain, log) = (Domain::new("callbacks"), Log::default());
    let (enter, entered) = std::sync::mpsc::sync_channel(0);
    let (leave, left) = std::sync::mpsc::sync_channel::<()>(0);
    let runner = thread::spawn({
        let (domain, log) = (domain.clone(), log.clone());
        move || {
            domain.call(move || {
                enter.send(()).unwrap();
                left.recv().unwrap();
                log.write("ran");
            });
        }
    });
    entered.recv().unwrap();
    // The runner takes this one along; its caller does not wait.
    domain.call(log.writer("queued meanwhile"));
    let mut barrier = Polled::new(domain.barrier());
    assert!(!barrier.is_ready());
    leave.send(()).unwrap();
    block_on(domain.barrier());
    assert!(barrier.is_ready());
    assert_eq!(log.lines(), ["ran", "queued meanwhile"]);
    runner.join().unwrap();
}
