//! Sleepable read-copy-update for async Rust: what the Linux kernel's SRCU gives, for tasks.
//!
//! Readers work on a version of the data that does not change under them, and never wait. Whoever replaces the data
//! publishes a new version at once, and can then wait for a *grace period*: until every read section that may still
//! act on the old version has ended. Unlike with other RCU, a section may sleep: its guard is `Send + 'static`, lives
//! across awaits and ends on any thread.
//!
//! # Trade-offs
//!
//! What it gives: a reader that takes no lock, shares no cache line with readers of other threads, and may hold its
//! section for a round trip to another machine; an updater that publishes without waiting for such a reader, and can
//! still await the moment when nobody acts on what it replaced. Memory safety does not depend on any of it: a version is
//! also counted, so what a missing grace period breaks is a promise and never memory. The crate has no unsafe code.
//!
//! What it costs:
//!
//! * **A section** costs two atomic adds on a line of its own thread's stripe, and a record of where it was taken, which
//!   the thread keeps for its next section. That is more than a lock of std or parking_lot that nobody else reads, and
//!   a fraction of tokio's, whose guard can be held across awaits as this one can. What it buys is that a second reader
//!   costs the first nothing, where two readers of a lock pass a cache line to and fro. `cargo bench -p srcu --bench read`
//!   measures both.
//! * **A grace period** visits each stripe a few times, and then takes as long as the longest section that was open when
//!   it began. While one waits, each section that ends in the bank it waits on takes a lock and sums the stripes.
//! * **Memory**: a line for each section that is open, a padded line for each stripe of each domain, and whatever old
//!   versions the open sections keep. A thread keeps a few dozen records of each of the last 16 domains it read, and
//!   with them the counters (not the values) of a domain that is gone, until it reads others or ends.
//! * **One long reader stalls its domain**, and no other: every grace period of the domain, everything deferred by
//!   [`Domain::call`], and so the memory that those would free. A section that never ends stalls it for ever. The
//!   [watchdog](Domain::check_stalls) says who it is; it cannot end it.
//! * **Reads are not recent**: a section that began before an update goes on with what it has.
//!
//! When something else is better:
//!
//! * A **lock**, if updates are about as frequent as reads, if sections are short and rarely meet, or if a reader has to
//!   see the latest value and hold it still.
//! * **`ArcSwap` or `tokio::sync::watch` alone**, if nobody ever has to know that the readers of an old version are
//!   gone: they free its memory when the last one lets go, and cost less.
//! * **Epochs or hazard pointers** (crossbeam-epoch, seize, haphazard), if what is protected is many small nodes of a
//!   lock-free structure, read for nanoseconds at a time on one thread: they batch frees, and cannot be held across an
//!   await.
//!
//! # How to use
//!
//! A [`Domain`] is the set of readers that are waited for together; an [`Srcu<T>`] is a value in a domain.
//!
//! ```
//! # #[cfg(not(loom))]
//! # {
//! use srcu::{Domain, Srcu};
//!
//! # let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
//! # runtime.block_on(async {
//! let routes = Srcu::new(Domain::new("routes"), vec!["a", "b"]);
//!
//! // A reader, here one that sleeps in its section.
//! let section = routes.read();
//! let reader = async move {
//!     tokio::task::yield_now().await;
//!     section.len()
//! };
//!
//! // An updater: publish, then wait for those who may not have seen it.
//! let updater = async {
//!     let removed = routes.update_with(|routes| (routes[..1].to_vec(), routes[1]));
//!     routes.synchronize().await;
//!     removed // nobody uses it any more
//! };
//! assert_eq!(tokio::join!(reader, updater), (2, "b"));
//! # });
//! # }
//! ```
//!
//! Where nothing can wait, defer ([`Domain::call`], [`Domain::barrier`]) or poll ([`Domain::start_poll`],
//! [`Domain::poll`]):
//!
//! ```
//! let domain = srcu::Domain::new("pages");
//! let section = domain.read();
//!
//! let cookie = domain.start_poll();
//! domain.call(|| println!("every section from before has ended"));
//! assert!(!domain.poll(cookie));
//!
//! drop(section); // the last reader runs the callback
//! assert!(domain.poll(cookie));
//! ```
//!
//! # NoSelfWait
//!
//! Never wait for a grace period of a domain while holding one of its sections, nor for a barrier while holding a section
//! that a callback waits for, nor inside a callback: the wait is for the waiter itself and never ends. The same holds
//! around corners: a task that waits while it holds a lock which a reader needs to end its section, and two domains whose
//! readers wait for each other. The compiler does not see it, and neither does the domain, whose sections belong to no
//! task. The watchdog does: it names the section and says for how long a grace period has been waiting.
//!
//! ```
//! # fn poll_once(future: impl Future) -> bool {
//! #     let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
//! #     std::pin::pin!(future).poll(&mut cx).is_ready()
//! # }
//! let domain = srcu::Domain::new("self");
//! let section = domain.read();
//! assert!(!poll_once(domain.synchronize())); // awaited here it would sleep for ever
//! drop(section);
//! assert!(poll_once(domain.synchronize()));
//! ```
//!
//! # Who does the work
//!
//! There is no thread, no timer and no runtime. A grace period is moved on by whoever is there: the call that asks for it
//! ([`synchronize`](Domain::synchronize) at its first poll, [`start_poll`](Domain::start_poll), [`call`](Domain::call)),
//! and while it waits, each section that ends in the bank it waits on. So it ends in the call that asked if no section is
//! open, and otherwise in the drop of the last guard it waits for, which wakes those who sleep on it. A section that ends
//! while nobody waits learns so from the atomic add that ends it.
//!
//! Callbacks run right there, after all locks of the crate are released: in the drop of a guard, in a call that asks for a
//! grace period, or in a callback's own thread if one is running already; see [`Domain::call`] for what they may do.
//! Stalls are looked for when [`Domain::check_stalls`] is called; with the feature `tokio`, `watchdog` is a task that does.
//!
//! # How it works, and why to believe it
//!
//! Two banks of striped counters, one that counts begins and one that counts ends in each, after the kernel's
//! `srcutree.c` and the paper it cites; the modules `counters` and `grace` have the argument, with each order and its
//! partner. The orders are checked by loom, one race a test (`tests/loom.rs`), where breaking any of them makes a test
//! fail; the whole by a model that knows nothing of banks (`tests/oracle.rs`), and by threads that hand their guards
//! around (`tests/stress.rs`).
#![forbid(unsafe_code)]
#![allow(clippy::disallowed_types, reason = "the counters of this crate are what the ban points to")]

mod domain;
mod builder;
mod value;
mod guard;
mod cache;
mod record;
mod site;
mod counters;
mod core;
mod grace;
mod callbacks;
mod waiters;
mod wait;
mod stall;
#[cfg(all(feature = "tokio", not(loom)))]
mod watchdog;
mod sync;

pub use builder::{Ages, DomainBuilder};
pub use domain::{Cookie, Domain};
pub use guard::ReadGuard;
pub use stall::Stall;
pub use value::{Guard, Srcu};
pub use wait::{Barrier, Synchronize};
#[cfg(all(feature = "tokio", not(loom)))]
pub use watchdog::watchdog;

/// The example of the README compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
