//! Threads that read, hand their guards around, update and wait, for a number of rounds.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "a test helper fails as its test does")]
#![allow(clippy::disallowed_types, reason = "the page's mark is what a use after its release would show in")]

mod util;

use srcu::{Domain, Guard, Srcu};
use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
};
use util::{Numbers, block_on};

const READERS: u64 = 4;
const UPDATERS: u64 = 2;
const READS: u64 = 20_000;
const UPDATES: u64 = 2_000;
/// Guards that wait to be dropped by another thread.
const POOL: usize = 16;

/// What an update takes away. The mark is Relaxed on both sides, so only the grace period orders it.
#[derive(Default)]
struct Page {
    released: AtomicBool,
}

impl Page {
    fn assert_usable(&self) {
        assert!(!self.released.load(Ordering::Relaxed), "a released page is in use");
    }
}

type Pool = Mutex<Vec<Guard<Arc<Page>>>>;

fn read_and_hand_on(table: &Srcu<Arc<Page>>, pool: &Pool, seed: u64) {
    let mut numbers = Numbers::seeded(seed);
    for _ in 0..READS {
        let page = table.read();
        page.assert_usable();
        match numbers.below(8) {
            0 => {
                let swapped = {
                    let mut pool = pool.lock().unwrap();
                    pool.push(page);
                    let index = usize::try_from(numbers.below(pool.len() as u64)).unwrap();
                    (pool.len() > POOL).then(|| pool.swap_remove(index))
                };
                if let Some(page) = swapped {
                    page.assert_usable();
                }
            }
            1 => {
                let nested = table.read();
                nested.assert_usable();
                drop(page);
                nested.assert_usable();
            }
            2 => {
                thread::yield_now();
                page.assert_usable();
                drop(page.into_section());
            }
            _ => page.assert_usable(),
        }
    }
    // Updaters wait for what is in the pool, and this may be the last reader to look.
    let rest = std::mem::take(&mut *pool.lock().unwrap());
    for page in rest {
        page.assert_usable();
    }
}

fn update_and_release(table: &Srcu<Arc<Page>>, released: &Arc<AtomicUsize>, seed: u64) {
    let mut numbers = Numbers::seeded(seed);
    for _ in 0..UPDATES {
        let old = table.update_with(|page| (Arc::default(), Arc::clone(page)));
        let released = Arc::clone(released);
        let release = move || {
            assert!(!old.released.swap(true, Ordering::Relaxed), "released twice");
            released.fetch_add(1, Ordering::Relaxed);
        };
        match numbers.below(3) {
            0 => table.domain().call(release),
            1 => {
                let cookie = table.domain().start_poll();
                block_on(table.synchronize());
                assert!(table.domain().poll(cookie), "the later grace period is over before the earlier");
                release();
            }
            _ => {
                block_on(table.synchronize());
                release();
            }
        }
    }
}

#[test]
fn no_page_is_in_use_when_it_is_released() {
    for stripes in [1, 8] {
        let domain = Domain::builder().name("stress").stripes(stripes).build();
        let table = Srcu::new(domain.clone(), Arc::<Page>::default());
        let pool = Pool::default();
        let released = Arc::new(AtomicUsize::new(0));
        thread::scope(|scope| {
            for reader in 0..READERS {
                scope.spawn({
                    let (table, pool) = (&table, &pool);
                    move || read_and_hand_on(table, pool, reader + 1)
                });
            }
            for updater in 0..UPDATERS {
                scope.spawn({
                    let (table, released) = (&table, &released);
                    move || update_and_release(table, released, 1_000 + updater)
                });
            }
        });
        assert_eq!(domain.readers(), 0);
        block_on(domain.barrier());
        assert_eq!(released.load(Ordering::Relaxed) as u64, UPDATERS * UPDATES);
    }
}

#[test]
fn many_domains_on_one_thread_keep_their_sections_apart() {
    // More than a thread's cache has room for, so that badges are evicted while sections are open.
    let domains: Vec<_> = (0..100).map(|index| Domain::new(format!("domain {index}"))).collect();
    let mut numbers = Numbers::seeded(7);
    let mut open: Vec<Vec<_>> = domains.iter().map(|_| Vec::new()).collect();
    for _ in 0..20_000 {
        let index = usize::try_from(numbers.below(domains.len() as u64)).unwrap();
        if numbers.below(2) == 0 {
            open[index].push(domains[index].read());
        } else {
            open[index].pop();
        }
        assert_eq!(domains[index].readers(), open[index].len());
    }
    drop(open);
    for domain in &domains {
        assert_eq!(domain.readers(), 0);
        block_on(domain.synchronize());
    }
}
