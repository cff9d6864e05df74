//! A planned restart: the run that ends writes down where each session stopped, and the one that begins goes
//! on from there, as the same incarnation. Nobody flushes. A crash never gets here.
//!
//! ```text
//!   drain    no new round, no new session; address spaces whose memory dies with the process are released
//!   quiet    every round is complete, every notice acked
//!   cut      the streams end without a word; the threads are joined, so nothing changes any more
//!   record   what is left: sessions with an empty outbox, and address spaces without an open round
//!   begin    the next run makes them again, before anybody can ask
//! ```
//!
//! What is not quiet in time is left out: its sessions are survivors of the next run, as after a crash.

use std::any::Any;
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use shootdown_core::gate::GrantGate;
use shootdown_core::interest::Subscription;
use shootdown_core::outbox::OutboxLimits;
use shootdown_core::session::SessionConfig;
use shootdown_core::{AddressSpaceId, Event, Method, Seq, SessionId};

use crate::clock::Clock;
use crate::completion::{EndedBy, WaitingRound};
use crate::directory::AddressSpace;
use crate::fence;
use crate::host::Host;
use crate::journal::{Drained, DrainedBracket, DrainedSession, DrainedSpace};
use crate::session::SessionHandle;
use crate::session::registry::Left;
use crate::session::restored::Restored;
use crate::session::task::start_outliving;
use crate::shard::Shard;
use crate::source::rpc::retries::{Asked, ToTryAgain};
use crate::source::rpc::{self, RpcSource};
use crate::source::{Notifier as _, RoundResult, RoundTimes, Translate, Verdict};

/// How often to look whether all is quiet. It is over in a round trip, or in as long as a device takes.
const LOOK: Duration = Duration::from_millis(2);

/// Calls that are over whose outcome is handed over, of all address spaces together: about 10 MB.
const MOST_CALLS: usize = 1 << 16;

/// Returns when nothing is under way any more.
///
/// # Cancel safety
/// It may be dropped at any time, and what is not quiet by then is left out.
pub(crate) async fn quiet(host: &Host) {
    let spaces = host.directory().list();
    let mortal = spaces.iter().filter(|space| space.source.source() != rpc::NAME);
    // Released before is released.
    let released = mortal.map(|space| async { drop(host.release(space.id).await) });
    futures_util::future::join_all(released).await;
    let is_busy = || host.rounds_in_flight() > 0 || host.releases().is_any_untold();
    while is_busy() || host.registry().list().iter().any(|session| !session.is_quiet()) {
        tokio::time::sleep(LOOK).await;
    }
}

/// What the next run may go on with. Nothing of the host agent runs any more.
pub(crate) fn record(host: &Host) -> Drained {
    let spaces = host.directory().list();
    let calls = MOST_CALLS / spaces.len().max(1);
    let spaces: Vec<DrainedSpace> = spaces.iter().filter_map(|space| drained(space, calls)).collect();
    let known: HashSet<AddressSpaceId> = spaces.iter().map(|space| space.id).collect();
    let left_out: HashSet<SessionId> = host.restart().survivors().ids().into_iter().collect();
    let sessions = host.registry().list();
    let resumable = sessions.iter().filter(|session| !left_out.contains(&session.id));
    let sessions: Vec<DrainedSession> = resumable
        .filter_map(|session| session.drained())
        .filter(|session| session.subscriptions.iter().all(|held| known.contains(&held.address_space)))
        .collect();
    tracing::info!(
        sessions = sessions.len(),
        address_spaces = spaces.len(),
        "a successor may go on with these"
    );
    let is_left_out = |id| host.directory().get(id).is_some() && !known.contains(&id);
    let registered = host.registrations().to_try_again(is_left_out);
    Drained { boot_id: Clock::id(), sessions, spaces, registered, released: host.releases().done() }
}

/// An address space whose source outlives this process, unless a round of it is not complete: the next run
/// could not tell whether it ever was. With the outcome of the latest `calls` that are over.
fn drained(space: &AddressSpace, calls: usize) -> Option<DrainedSpace> {
    if space.source.source() != rpc::NAME || space.rounds_in_flight() > 0 {
        return None;
    }
    let order = space.order.lock();
    if order.released {
        return None;
    }
    let source: Arc<dyn Any + Send + Sync> = Arc::<dyn Translate>::clone(&space.source);
    let source: Arc<RpcSource> = source.downcast().ok()?;
    // The locks the other way round than an end takes them: no thread is left that could be in one.
    let ToTryAgain { mut starts, over } = source.retries.to_try_again(calls);
    let rounds = space.rounds.lock();
    let bracket = |(seq, range)| {
        let (cause, owner) = rounds.get(&seq)?.look(|round| (round.event().cause, round.event().owner));
        Some(DrainedBracket { seq, range, cause, owner, start: starts.remove(&seq) })
    };
    Some(DrainedSpace {
        id: space.id,
        name: space.name.clone(),
        strictness: space.strictness,
        last_seq: order.gate.last_seq(),
        began_after: space.began_after,
        over,
        open_brackets: order.gate.brackets().filter_map(bracket).collect(),
    })
}

/// Goes on where the run before stopped.
pub(crate) fn begin(host: &Host, drained: Drained, shard: &Shard) {
    // Of this boot: the journal keeps no other.
    let Drained { boot_id: _, sessions, spaces, registered, released } = drained;
    tracing::info!(
        sessions = sessions.len(),
        address_spaces = spaces.len(),
        incarnation = host.incarnation().get(),
        "goes on with what a planned end left"
    );
    for registered in registered {
        host.registrations().restore(registered);
    }
    for released in released {
        host.releases().restore(released.address_space, released.call, quiesced_before(host, released.seq));
    }
    for space in spaces {
        // It is not the one that was released by its name.
        host.releases().forget(space.id);
        host.directory()
            .restore(|most_rounds| restored(host, space, most_rounds), host.restart().survivors());
    }
    for session in sessions {
        let handle = Arc::new(resumable(host, &session, shard));
        for held in session.subscriptions {
            let space =
                host.directory().get(held.address_space).expect("it was recorded with its address space");
            handle.join_with(
                &space,
                Subscription {
                    id: held.id,
                    session: handle.id,
                    ranges: held.ranges,
                    causes: held.causes,
                    wants_end: held.wants_end,
                    handle: Arc::clone(&handle),
                },
                held.request,
            );
        }
        host.registry().restore(&handle, Left::Resumable);
        fence::watch_over(host, &handle);
        start_outliving(host, handle);
    }
}

/// What is known of a release of the run before. What its targets told is forgotten, and counts as the worst.
fn quiesced_before(host: &Host, seq: Option<Seq>) -> RoundResult {
    let now = host.clock().now();
    RoundResult {
        verdict: Verdict::Quiesced,
        seq,
        targets: Vec::new(),
        young: true,
        dirty: true,
        host_incarnation: host.incarnation(),
        times: RoundTimes {
            called: now,
            dispatched: now,
            resolved: None,
            finished: Some(now),
            answered: now,
        },
    }
}

fn resumable(host: &Host, session: &DrainedSession, shard: &Shard) -> SessionHandle {
    let config = host.session_config();
    let record = session.session.clone();
    // No lease was renewed since.
    let longest = host.clock().now() + record.terms.host_duration();
    let lease_expires = session.lease_expires.min(longest);
    let config = SessionConfig {
        lease: record.terms,
        outbox: OutboxLimits { window: session.window.max(1), ..config.outbox },
        max_subscriptions: config.max_subscriptions.max(session.subscriptions.len()),
        enforcement: record.enforcement(),
        ..config
    };
    let (change_pte, acked_through) = (session.change_pte, session.acked_through);
    SessionHandle::restored(
        Restored {
            fencer: host.fencers().of(&record.device),
            record,
            config,
            change_pte,
            lease_expires,
            acked_through,
        },
        shard.clone(),
        host.clock(),
    )
}

fn restored(host: &Host, drained: DrainedSpace, most_rounds: usize) -> AddressSpace {
    let DrainedSpace { id, name, strictness, last_seq, began_after, open_brackets, over } = drained;
    let source = RpcSource::new(host.source_fault_timeout());
    let run = (host.clock(), host.incarnation());
    let gate =
        GrantGate::restored(last_seq, open_brackets.iter().map(|bracket| (bracket.seq, bracket.range)));
    let mut rounds = BTreeMap::new();
    let event =
        |seq, (range, method, cause, owner)| Event { address_space: id, seq, range, method, cause, owner };
    // The oldest first, as they were kept.
    for (call, over) in over {
        let settled =
            |asked: Asked, seq| WaitingRound::of_an_earlier_run(event(seq, asked.told()), EndedBy::Task, run);
        source.retries.restore_over(call, over, settled);
    }
    for DrainedBracket { seq, range, cause, owner, start } in open_brackets {
        let told = (range, Method::Invalidate, cause, owner);
        let round = Arc::new(WaitingRound::of_an_earlier_run(event(seq, told), EndedBy::Caller, run));
        rounds.insert(seq, Arc::clone(&round));
        if let Some((call, may_wait)) = start {
            let asked = Asked::Start { range, cause, owner, may_wait };
            source.retries.restore_start(call, asked, round);
        }
    }
    let mut space =
        AddressSpace::new(id, &name, Arc::new(source), strictness, most_rounds, host.incarnation());
    space.began_after = began_after;
    space.order.lock().gate = gate;
    *space.rounds.lock() = rounds;
    // What was reported is forgotten: too much is young, never too little (YoungIsConservative).
    space.young.lock().mark(shootdown_core::AddrRange::ALL);
    space
}
