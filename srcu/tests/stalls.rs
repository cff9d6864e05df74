//! The watchdog names who holds up a grace period.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "a test helper fails as its test does")]
#![allow(clippy::mem_forget, reason = "a forgotten guard is what some of these are about")]

mod util;

use srcu::{Ages, Domain, Stall};
use std::{
    panic::Location,
    sync::{Arc, Mutex},
    time::Duration,
};
use util::{HandClock, Polled};

const LIMIT: Duration = Duration::from_secs(10);
const SECOND: Duration = Duration::from_secs(1);

/// A domain on a clock that the test moves, and what it reported.
struct Watched {
    domain: Domain,
    clock: HandClock,
    reported: Arc<Mutex<Vec<Stall>>>,
}

impl Watched {
    fn new(ages: Ages) -> Self {
        let (clock, reported) = (HandClock::new(), Arc::<Mutex<Vec<Stall>>>::default());
        let domain = Domain::builder()
            .name("address space 7")
            .stall_after(LIMIT)
            .ages(ages)
            .clock(clock.reader())
            .on_stall({
                let reported = Arc::clone(&reported);
                move |stall| reported.lock().unwrap().push(stall.clone())
            })
            .build();
        Self { domain, clock, reported }
    }

    fn pass(&self, time: Duration) -> Vec<Stall> {
        self.clock.pass(time);
        self.domain.check_stalls()
    }

    fn reports(&self) -> usize {
        self.reported.lock().unwrap().len()
    }
}

#[track_caller]
fn here() -> &'static Location<'static> {
    Location::caller()
}

#[test]
fn the_watchdog_names_where_a_long_section_was_taken_and_its_age() {
    let watched = Watched::new(Ages::Sampled);
    let (_guard, place) = (watched.domain.read(), here());
    assert!(watched.pass(SECOND).is_empty(), "seen for the first time");
    let stalls = watched.pass(LIMIT);
    let [stall] = stalls.as_slice() else { panic!("{stalls:?}") };
    assert_eq!((stall.location.file(), stall.location.line()), (place.file(), place.line()));
    assert_eq!(stall.location.file(), file!());
    assert_eq!(
        (&*stall.domain, stall.age, stall.waited, stall.leaked),
        ("address space 7", LIMIT, None, false)
    );
    assert_eq!(*watched.reported.lock().unwrap(), stalls);
    assert!(
        stall.to_string().contains(&place.to_string()[..place.to_string().rfind(':').unwrap()]),
        "{stall}"
    );
}

#[test]
fn a_section_that_a_grace_period_waits_for_is_named_at_the_first_check() {
    let watched = Watched::new(Ages::Sampled);
    let _guard = watched.domain.read();
    let mut waiting = Polled::new(watched.domain.synchronize());
    assert!(!waiting.is_ready());
    let stalls = watched.pass(LIMIT);
    assert_eq!(
        stalls.iter().map(|stall| (stall.age, stall.waited)).collect::<Vec<_>>(),
        [(LIMIT, Some(LIMIT))]
    );
}

#[test]
fn a_section_that_is_not_waited_for_is_not_blamed_for_the_wait() {
    let watched = Watched::new(Ages::Sampled);
    let old = watched.domain.read();
    let mut waiting = Polled::new(watched.domain.synchronize());
    assert!(!waiting.is_ready());
    watched.clock.pass(LIMIT);
    let _young = watched.domain.read();
    assert_eq!(watched.domain.check_stalls().len(), 1);
    drop(old);
    assert!(watched.domain.check_stalls().is_empty());
}

#[test]
fn exact_ages_are_known_at_the_first_check() {
    let watched = Watched::new(Ages::Exact);
    let _early = watched.domain.read();
    watched.clock.pass(SECOND);
    let _late = watched.domain.read();
    let ages: Vec<_> = watched.pass(LIMIT).iter().map(|stall| stall.age).collect();
    assert_eq!(ages, [LIMIT + SECOND, LIMIT]);
}

#[test]
fn a_new_section_does_not_inherit_the_age_of_the_one_before_it() {
    let watched = Watched::new(Ages::Sampled);
    for _ in 0..5 {
        let guard = watched.domain.read();
        assert!(watched.pass(LIMIT / 2).is_empty());
        drop(guard);
    }
}

#[test]
fn sections_of_one_thread_are_each_named() {
    let watched = Watched::new(Ages::Sampled);
    let guards: Vec<_> = (0..100).map(|_| watched.domain.read()).collect();
    let other = watched.domain.read();
    watched.domain.check_stalls();
    let stalls = watched.pass(LIMIT);
    assert_eq!(stalls.len(), 101);
    assert_eq!(watched.domain.readers(), 101);
    let lines: std::collections::BTreeSet<_> = stalls.iter().map(|stall| stall.location.line()).collect();
    assert_eq!(lines.len(), 2);
    drop((guards, other));
    assert!(watched.domain.check_stalls().is_empty());
}

#[test]
fn a_stall_is_reported_again_each_time_its_age_has_doubled() {
    let watched = Watched::new(Ages::Sampled);
    let _guard = watched.domain.read();
    watched.domain.check_stalls();
    let mut reported_at = Vec::new();
    for second in 1..=50 {
        let before = watched.reports();
        watched.pass(SECOND);
        if watched.reports() > before {
            reported_at.push(second);
        }
    }
    assert_eq!(reported_at, [10, 20, 40]);
}

#[test]
fn a_forgotten_guard_is_reported_and_holds_up_no_other_domain() {
    let watched = Watched::new(Ages::Sampled);
    let place = here().line() + 1;
    std::mem::forget(watched.domain.read());
    let mut waiting = Polled::new(watched.domain.synchronize());
    assert!(!waiting.is_ready());
    let lines: Vec<_> = watched.pass(LIMIT).iter().map(|stall| stall.location.line()).collect();
    assert_eq!(lines, [place]);
    assert!(Polled::new(Domain::new("other").synchronize()).is_ready());
}

#[test]
fn a_section_that_outlives_the_last_handle_is_reported_as_leaked() {
    let Watched { domain, clock: _, reported } = Watched::new(Ages::Sampled);
    std::mem::forget(domain.read());
    drop(domain.clone());
    assert!(reported.lock().unwrap().is_empty(), "a handle is left");
    drop(domain);
    let reported = reported.lock().unwrap();
    assert_eq!(
        reported.iter().map(|stall| (stall.location.file(), stall.leaked)).collect::<Vec<_>>(),
        [(file!(), true)]
    );
}

#[test]
fn a_domain_that_is_dropped_without_open_sections_reports_nothing() {
    let Watched { domain, clock: _, reported } = Watched::new(Ages::Sampled);
    drop(domain.read());
    domain.call(|| ());
    drop(domain);
    assert!(reported.lock().unwrap().is_empty());
}

#[test]
fn a_report_may_use_its_domain() {
    let own = Arc::new(Mutex::new(None::<Domain>));
    let readers = Arc::new(Mutex::new(None));
    let domain = Domain::builder()
        .stall_after(Duration::ZERO)
        .on_stall({
            let (own, readers) = (Arc::clone(&own), Arc::clone(&readers));
            move |_| {
                let domain = own.lock().unwrap().clone().unwrap();
                let _nested = domain.read();
                domain.call(|| ());
                *readers.lock().unwrap() = Some(domain.readers());
            }
        })
        .build();
    *own.lock().unwrap() = Some(domain.clone());
    let guard = domain.read();
    assert_eq!(domain.check_stalls().len(), 1);
    drop(guard);
    assert_eq!(*readers.lock().unwrap(), Some(2));
    // The report holds a handle of its own domain: a cycle that the test has to break.
    own.lock().unwrap().take();
}

#[cfg(feature = "tokio")]
#[tokio::test(start_paused = true)]
async fn the_watchdog_task_reports_and_ends_with_its_domain() {
    let (tell, mut told) = tokio::sync::mpsc::channel(4);
    let domain = Domain::builder()
        .stall_after(Duration::ZERO)
        .on_stall(move |stall| tell.try_send(stall.location.line()).unwrap_or_default())
        .build();
    let task = tokio::spawn(srcu::watchdog(&domain, SECOND));
    let guard = domain.read();
    assert_eq!(told.recv().await, Some(line!() - 1));
    drop(guard);
    drop(domain);
    task.await.unwrap();
}
