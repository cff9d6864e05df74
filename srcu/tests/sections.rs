//! What a read section and its guard promise.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "a test helper fails as its test does")]

mod util;

use srcu::{Barrier, Cookie, Domain, Guard, ReadGuard, Srcu, Synchronize};
use std::{cell::Cell, thread};
use util::Polled;

#[test]
fn guards_and_futures_may_go_anywhere() {
    fn anywhere<T: Send + Sync + 'static>() {}
    anywhere::<Domain>();
    anywhere::<ReadGuard>();
    anywhere::<Srcu<Vec<String>>>();
    anywhere::<Guard<Vec<String>>>();
    anywhere::<Synchronize>();
    anywhere::<Barrier>();
    anywhere::<Cookie>();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guard_lives_across_awaits_in_a_spawned_task() {
    let table = Srcu::new(Domain::new("tasks"), vec![1, 2, 3]);
    let (release, released) = tokio::sync::oneshot::channel::<()>();
    let guard = table.read();
    let task = tokio::spawn(async move {
        released.await.unwrap();
        guard.iter().sum::<i32>()
    });
    table.update(|_| Vec::new());

    let mut waiting = Polled::new(table.synchronize());
    assert!(!waiting.is_ready());
    release.send(()).unwrap();
    table.synchronize().await;
    assert!(waiting.is_ready());
    assert_eq!(task.await.unwrap(), 6);
}

#[test]
fn the_section_of_a_value_outlives_the_value() {
    let table = Srcu::new(Domain::new("sections"), 1);
    let section = table.read().into_section();
    let cookie = table.domain().start_poll();
    assert_eq!(table.domain().readers(), 1);
    assert!(!table.domain().poll(cookie));
    drop(section);
    assert!(table.domain().poll(cookie));
}

#[test]
fn into_section_lets_go_of_the_version() {
    let table = Srcu::new(Domain::new("sections"), ());
    let section = table.read().into_section();
    let old = table.update(|()| ());
    assert_eq!(std::sync::Arc::strong_count(&old), 1);
    drop(section);
}

#[test]
fn a_section_that_begins_after_synchronize_is_not_waited_for() {
    let domain = Domain::new("sections");
    let before = domain.read();
    let mut waiting = Polled::new(domain.synchronize());
    assert!(!waiting.is_ready());
    // Two grace periods' worth of flips later it would have to be waited for; this one has one.
    let mut held = before;
    for _ in 0..3 {
        drop(std::mem::replace(&mut held, domain.read()));
    }
    assert!(waiting.is_ready(), "a chain of overlapping sections starved the waiter");
    assert_eq!(domain.readers(), 1);
}

#[test]
fn a_parked_guard_holds_up_its_own_domain_only() {
    let (parked, other) = (Domain::new("parked"), Domain::new("other"));
    let guard = parked.read();
    let mut own = Polled::new(parked.synchronize());
    assert!(!own.is_ready());
    assert!(Polled::new(other.synchronize()).is_ready());
    drop(guard);
    assert!(own.is_ready());
}

#[test]
fn a_section_keeps_its_domain_alive_for_its_callbacks() {
    let (tell, told) = std::sync::mpsc::sync_channel(1);
    let domain = Domain::builder().on_stall(|_| ()).build();
    let guard = domain.read();
    domain.call(move || tell.send(()).unwrap());
    drop(domain);
    assert!(told.try_recv().is_err());
    drop(guard);
    assert!(told.try_recv().is_ok());
}

#[test]
fn a_guard_may_be_dropped_while_the_locals_of_its_thread_are() {
    std::thread_local! { static KEPT: Cell<Option<ReadGuard>> = const { Cell::new(None) } }

    let domain = Domain::new("thread locals");
    // Joined, not scoped: a scope ends before the locals of its threads have been dropped.
    let thread = thread::spawn({
        let domain = domain.clone();
        move || {
            // The guard's local is made before the thread's cache, and so dropped after it.
            KEPT.set(None);
            KEPT.set(Some(domain.read()));
        }
    });
    thread.join().unwrap();
    assert_eq!(domain.readers(), 0);
    assert!(Polled::new(domain.synchronize()).is_ready());
}

#[test]
fn an_update_that_panics_publishes_nothing_and_blocks_nobody() {
    let table = Srcu::new(Domain::new("updates"), 1);
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        table.update(|_| panic!("the update cannot be made"));
    }));
    assert!(panicked.is_err());
    assert_eq!(*table.read(), 1);
    assert_eq!(table.update_with(|value| (value + 1, *value)), 1);
    assert_eq!(*table.read(), 2);
}

/// Its drop updates the table that it was in: the last reference goes where an update let it go.
struct Chained(Option<std::sync::Arc<Srcu<Option<Chained>>>>);

impl Drop for Chained {
    fn drop(&mut self) {
        if let Some(table) = self.0.take() {
            table.update(|_| None);
        }
    }
}

#[test]
fn the_last_reference_may_be_dropped_inside_an_update_of_the_same_value() {
    let table = std::sync::Arc::new(Srcu::new(Domain::new("updates"), None));
    table.update(|_| Some(Chained(Some(std::sync::Arc::clone(&table)))));
    // The version with the chain in it is dropped by this call, and updates from its drop.
    table.update_with(|_| (None, ()));
    assert!(table.read().is_none());
}

#[test]
#[should_panic(expected = "the cookie is of another domain")]
fn a_cookie_of_another_domain_is_refused() {
    let cookie = Domain::new("one").start_poll();
    let _: bool = Domain::new("two").poll(cookie);
}
