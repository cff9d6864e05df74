//! A model of round, lease, fence, resume and restart, every state of which is looked at.
//!
//! ```text
//!   source (a process of its own)   host agents: processes, a journal     device: its runs
//!   Start, Deadline, TakeAnswer,    rounds, brackets, tickets, sessions,  TLB, flushes in flight,
//!   End, Register, Retry     <----> outboxes, watchdog, fencers    <----> books, lease, hardware of a
//!                                                                         run that has crashed
//!                 the host's clock  <- at most a tick apart ->  the devices' clock
//! ```
//!
//! [`config`] has small worlds: one or two devices, up to three pages and events, leases of three ticks,
//! and so many streams that end, crashes and pauses. In each, every order in which anything can happen is
//! tried, and the [`properties`] hold in every state; what a configuration must be able to reach is
//! listed with it, so that nothing holds only because nothing happens. [`mutations`] break one rule each,
//! and for each property there is one that breaks it: a property that no wrong rule can break says nothing.
//!
//! # What is real
//!
//! Leases on both sides (`core/src/lease.rs`), rounds and how their targets are resolved
//! (`core/src/round.rs`), the device's books (`core/src/ack.rs`), ranges (`core/src/range.rs`), sequences
//! (`core/src/id.rs`), and the phases of a session are the code that ships; time is an argument there, so a tick of
//! the model is a nanosecond to them.
//!
//! # What is abstract
//!
//! * A session of the host agent, its outbox and its answers to Hello are written again in [`host`]
//!   and [`device`], after `core/src/session.rs`, `core/src/outbox.rs` and `server/src/session/`: the real
//!   ones cannot be cloned and compared. A stream that is up takes what the window allows at once.
//! * The gate (`core/src/gate.rs`) is a list of brackets and of tickets, each spoiled or not. There is one address
//!   space, or (in one world) two of a page each. An event is about one page, a merged notice about the smallest
//!   range that covers its events; there is no FlushAll.
//! * Of tasks there are those that an ack needs: that which reads a stream, and that which flushes. A fault that waits is
//!   served beside them. There are no locks.
//! * A frame is a page and a number. It is released once, so that to use it after that is to use a page of
//!   somebody else, and NoStaleUse asks that of everything a TLB holds, whether it is used or not.
//! * A stream is first in, first out in each direction, for any time. When it ends, what is on its way to
//!   the device is lost, and what is on its way to the host agent arrives or not; each end finds it out
//!   for itself. Hello and Welcome are one step, or the Welcome is lost. A fault and the opening of its
//!   ticket are one step, the commit is another.
//! * A device that is stopped does nothing, which is among all that it may do. One that enforces its
//!   lease uses nothing past it, in flight neither: that is its promise, and `client/` tests it. A run that
//!   crashed leaves hardware that goes on until the lease ends; of a device that enforces none, for ever.
//! * A host agent starts in three steps, between which anything may happen: it takes the journal, it reads its clock
//!   and writes that a run began, it serves. It may crash or hang between them. A planned end is one step: what is
//!   not quiet then is left out. A record of a session that is torn is not in it: nobody was welcomed on it, and the
//!   session without a name that the next run waits for makes it wait, no more.
//! * What a source calls by belongs to a registration of its address space, and is unknown in the next one. A planned
//!   restart keeps the registration; that an earlier name is taken back after a crash is not in it.
//! * The watchdog is on time, but in a host agent that was stopped. An access to a frame by way of the host
//!   agent ends before the host's clock moves, if a fence waits for it.
//! * A resume point that does not fit makes no session: the device flushes everything, and connects as one
//!   that holds nothing.
//! * The budget of the quarantine, eviction, owners, causes and `change_pte` are not in it, nor a range that is told as
//!   the whole address space. Of Isolation there is who is waited for, not whose lock or queue.
//!
//! `cargo test -p shootdown-core --test model -- --nocapture` prints how many states there are, and for
//! each mutation the shortest way to what it breaks.
#![allow(clippy::unwrap_used, reason = "a test's helpers are tests, which clippy sees in a mod tests only")]
#![allow(clippy::print_stdout, reason = "how many states there are, for whoever asks")]

mod config;
mod ticks;
mod ranges;
mod sequences;
mod round;
mod state;
mod source;
mod host;
mod gate;
mod waits;
mod restart;
mod device;
mod actions;
mod world;
mod properties;
mod reaches;
mod mutations;

use stateright::{Checker, Model};

use crate::config::Config;
use crate::mutations::{MUTATIONS, Mutation};
use crate::world::Shootdown;

/// The machine that tests this may have two cores.
const THREADS: usize = 2;

/// Every state of a configuration is looked at: each property holds in all of them, and what should be
/// reachable is.
fn the_model_holds(config: Config) {
    let checker = Shootdown::new(config, None, None).checker().threads(THREADS).spawn_bfs().join();
    let states = checker.unique_state_count();
    println!("{}: {states} states, the last after {} steps", config.name, checker.max_depth());
    for (name, path) in checker.discoveries() {
        let broken = properties::ALWAYS.iter().any(|(always, _)| *always == name);
        assert!(!broken, "{}: {name} does not hold after {:?}", config.name, path.into_actions());
    }
    checker.assert_properties();
    assert!(checker.is_done(), "{}: there are states that nobody looked at", config.name);
    assert!(states > config.floor, "{}: only {states} states", config.name);
}

/// Each mutation that is listed for the property breaks it.
fn mutations_break(property: &'static str) {
    let listed: Vec<(Mutation, Config)> = MUTATIONS
        .iter()
        .filter(|(_, of, _)| *of == property)
        .map(|(wrong, _, config)| (*wrong, *config))
        .collect();
    assert!(!listed.is_empty(), "no mutation breaks {property}");
    for (wrong, config) in listed {
        let model = Shootdown::new(config, Some(wrong), Some(property));
        let checker = model.checker().threads(THREADS).spawn_bfs().join();
        let path = checker.assert_any_discovery(property);
        println!("{wrong:?} breaks {property} ({}): {:?}", config.name, path.into_actions());
    }
}

macro_rules! holds {
    ($($name:ident: $config:ident),* $(,)?) => {
        /// One test a configuration.
        mod the_model_holds_with {
            $(#[test]
            fn $name() {
                crate::the_model_holds(crate::config::$config);
            })*
        }

        #[test]
        fn every_configuration_is_searched() {
            let searched = [$(config::$config.name),*];
            assert_eq!(config::EVERY.map(|config| config.name), searched);
        }
    };
}

holds! {
    two_devices_and_a_caller_that_gives_up: ROUND,
    a_full_window: MERGE,
    two_address_spaces: APART,
    joining_and_leaving: JOIN,
    faults_that_copy_a_page: BREAK,
    faults_whose_stream_is_lost: BREAK_LOST,
    translations_of_more_than_a_page: WIDE_TRANSLATIONS,
    two_clocks: LEASE,
    a_fencer_and_accesses_that_take_time: FENCE,
    a_device_that_nobody_can_stop: UNSTOPPED,
    streams_that_are_taken_up_again: RESUME,
    a_device_that_only_reconnects: RECONNECT,
    a_stream_that_loses_messages: LOSS,
    a_device_agent_that_crashes: DEVICE_CRASH,
    a_host_agent_that_crashes: RESTART,
    a_host_agent_that_crashes_between_two_clocks: RESTART_CLOCKS,
    a_planned_restart: PLANNED,
    a_planned_restart_in_the_grace_period: PLANNED_GRACE,
    a_planned_restart_that_hangs: PLANNED_HANG,
    restarts_in_a_row: RESTARTS,
    an_old_host_agent_that_wakes: TAKEOVER,
    an_old_host_agent_that_wakes_while_time_passes: TAKEOVER_CLOCKS,
}

macro_rules! found {
    ($($test:ident: $property:literal),* $(,)?) => {
        /// One test a property: it can fail.
        mod a_wrong_rule_is_found_by {
            $(#[test]
            fn $test() {
                crate::mutations_break($property);
            })*
        }

        #[test]
        fn every_property_has_a_mutation() {
            let tested = [$($property),*];
            assert_eq!(properties::ALWAYS.map(|(name, _)| name), tested);
            let unknown = MUTATIONS.iter().find(|(_, property, _)| !tested.contains(property));
            assert!(unknown.is_none(), "{unknown:?} is listed for a property that there is not");
        }
    };
}

found! {
    no_stale_use: "NoStaleUse",
    no_free_before_quiesce: "NoFreeBeforeQuiesce",
    ack_means_stopped: "AckMeansStopped",
    no_grant_in_window: "NoGrantInWindow",
    join_covers: "JoinCovers",
    stable_targets: "StableTargets",
    unsubscribe_barrier: "UnsubscribeBarrier",
    pairing: "Pairing",
    non_block_atomic: "NonBlockAtomic",
    contiguity: "Contiguity",
    never_drop: "NeverDrop",
    merge_is_union: "MergeIsUnion",
    resume_or_flush: "ResumeOrFlush",
    timeout_is_not_ack: "TimeoutIsNotAck",
    fence_is_positive: "FenceIsPositive",
    fence_reaches_reuse: "FenceReachesReuse",
    restart_grace: "RestartGrace",
    isolation: "Isolation",
    no_self_wait: "NoSelfWait",
    somebody_can_go_on: "SomebodyCanGoOn",
    bounded_resolution: "BoundedResolution",
    young_is_conservative: "YoungIsConservative",
    range_over_approximates: "RangeOverApproximates",
    seq_compare: "SeqCompare",
}

/// Who waits there in a circle is no round, so that nothing but [`waits::somebody_can_go_on`] sees it.
#[test]
fn a_bracket_that_waits_for_its_fault_is_no_round_that_waits_for_itself() {
    let (wrong, property) = (Mutation::EndWaitsForFault, "NoSelfWait");
    let model = Shootdown::new(config::BREAK, Some(wrong), Some(property));
    let checker = model.checker().threads(THREADS).spawn_bfs().join();
    checker.assert_no_discovery(property);
    assert!(checker.is_done());
}

#[test]
fn every_reachable_thing_is_reached_by_a_configuration() {
    for (name, _) in reaches::SOMETIMES {
        assert!(config::EVERY.iter().any(|config| config.reaches.contains(&name)), "nobody reaches {name:?}");
    }
    let known = |name: &&str| reaches::SOMETIMES.iter().any(|(of, _)| of == name);
    assert!(config::EVERY.iter().all(|config| config.reaches.iter().all(known)));
}
