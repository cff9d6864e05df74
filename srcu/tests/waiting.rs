//! Futures that wait, and what happens when they are dropped.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "a test helper fails as its test does")]

mod util;

use srcu::Domain;
use util::Polled;

#[test]
fn synchronize_is_ready_at_its_first_poll_if_no_section_is_open() {
    let domain = Domain::new("idle");
    drop(domain.read());
    assert!(Polled::new(domain.synchronize()).is_ready());
}

#[test]
fn a_waiter_is_woken_once_and_only_by_the_last_section() {
    let domain = Domain::new("wakes");
    let mut sections = vec![domain.read(), domain.read(), domain.read()];
    let mut waiting = Polled::new(domain.synchronize());
    while !sections.is_empty() {
        assert!(!waiting.is_ready());
        assert_eq!(waiting.wakes(), 0);
        sections.pop();
    }
    assert_eq!(waiting.wakes(), 1);
    assert!(waiting.is_ready());
}

#[test]
fn synchronize_covers_the_sections_of_its_first_poll() {
    let domain = Domain::new("lazy");
    let mut waiting = Polled::new(domain.synchronize());
    let section = domain.read();
    assert!(!waiting.is_ready());
    drop(section);
    assert!(waiting.is_ready());
}

/// When the waiter that gives up does so.
#[derive(Clone, Copy, Debug)]
enum GivesUp {
    Unpolled,
    WhileItWaits,
    AfterItWasWoken,
    AfterItWasReady,
}

#[test]
fn a_waiter_that_gives_up_at_any_point_hurts_no_other() {
    for gives_up in
        [GivesUp::Unpolled, GivesUp::WhileItWaits, GivesUp::AfterItWasWoken, GivesUp::AfterItWasReady]
    {
        let domain = Domain::new("quitters");
        let section = domain.read();
        let mut first = Polled::new(domain.synchronize());
        let mut quitter = Polled::new(domain.synchronize());
        let mut last = Polled::new(domain.synchronize());
        assert!(!first.is_ready());
        if !matches!(gives_up, GivesUp::Unpolled) {
            assert!(!quitter.is_ready());
        }
        assert!(!last.is_ready());

        let mut quitter = Some(quitter);
        if matches!(gives_up, GivesUp::Unpolled | GivesUp::WhileItWaits) {
            quitter = None;
        }
        drop(section);
        if matches!(gives_up, GivesUp::AfterItWasReady) {
            assert!(quitter.as_mut().is_some_and(Polled::is_ready), "{gives_up:?}");
        }
        drop(quitter);

        assert_eq!((first.wakes(), last.wakes()), (1, 1), "{gives_up:?}");
        assert!(first.is_ready() && last.is_ready(), "{gives_up:?}");
        assert!(Polled::new(domain.synchronize()).is_ready(), "{gives_up:?}");
    }
}

#[test]
fn a_grace_period_goes_on_when_its_only_waiter_gives_up() {
    let domain = Domain::new("orphaned");
    let section = domain.read();
    let cookie = domain.start_poll();
    let mut waiting = Polled::new(domain.synchronize());
    assert!(!waiting.is_ready());
    drop(waiting);
    drop(section);
    assert!(domain.poll(cookie));
}

#[test]
fn a_cookie_taken_while_a_grace_period_waits_covers_later_sections_too() {
    let domain = Domain::new("cookies");
    let early = domain.read();
    let first = domain.start_poll();
    let late = domain.read();
    let second = domain.start_poll();
    assert!(first < second);
    drop(early);
    assert!(!domain.poll(second));
    drop(late);
    assert!(domain.poll(first) && domain.poll(second));
}

#[test]
fn a_barrier_waits_for_callbacks_and_for_nothing_else() {
    let domain = Domain::new("barriers");
    let section = domain.read();
    assert!(Polled::new(domain.barrier()).is_ready(), "no callback is queued");
    domain.call(|| ());
    let mut barrier = Polled::new(domain.barrier());
    assert!(!barrier.is_ready());
    drop(section);
    assert_eq!(barrier.wakes(), 1);
    assert!(barrier.is_ready());
}

#[test]
fn a_future_that_is_ready_stays_ready() {
    let domain = Domain::new("fused");
    let mut waiting = Polled::new(domain.synchronize());
    assert!(waiting.is_ready());
    assert!(waiting.is_ready());
}
