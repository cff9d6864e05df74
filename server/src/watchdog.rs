//! Time, for everything that has a deadline: the sessions' leases and acks; and what takes too long is
//! named: rounds, and who holds a read section of a subscriber list.
//!
//! It runs on the control runtime. The shards have no timers of their own.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Interval, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::completion::WaitingRound;
use crate::directory::AddressSpace;
use crate::host::Host;
use crate::session::SessionHandle;
use crate::session::doubt::{self, Tick};

/// Deadlines are looked at this many times in the shorter of T_ack and the lease, so that one is
/// noticed at most an eighth late. A timer for each notice would cost more than all it watches.
const TICKS_A_DEADLINE: u32 = 8;

/// How often to look for what takes too long. What is looked for is measured in seconds.
const PERIOD: Duration = Duration::from_secs(5);

/// A round older than this is named. By then each of its devices has been suspect for a while.
const SLOW_ROUND: Duration = Duration::from_secs(10);

pub(crate) async fn run(host: Host, stop: CancellationToken) {
    let session = host.session_config();
    let mut ticks = every(deadline_tick(session.ack_timeout, session.lease.host_duration()));
    let mut looks = every(PERIOD);
    loop {
        tokio::select! {
            biased;
            // First: nothing is decided for a host agent that stops.
            () = stop.cancelled() => return,
            // Before the looks: it is what bounds every round.
            _ = ticks.tick() => {
                // First: a host agent that was stopped past its leases must not decide that they are over.
                if !host.is_current() {
                    return;
                }
                host.registry().list().iter().for_each(|session| tick(&host, session));
            }
            _ = looks.tick() => host.directory().list().iter().for_each(|space| look(&host, space)),
        }
    }
}

fn tick(host: &Host, session: &Arc<SessionHandle>) {
    match session.on_tick() {
        Tick::Done => {}
        Tick::InDoubt { on, reader } => {
            drop(host.tasks().spawn_on(doubt::settle(Arc::clone(session), on), &reader));
        }
    }
}

fn every(period: Duration) -> Interval {
    let mut interval = tokio::time::interval(period);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}

fn deadline_tick(ack_timeout: Duration, lease: Duration) -> Duration {
    (ack_timeout.min(lease) / TICKS_A_DEADLINE).clamp(Duration::from_millis(5), Duration::from_secs(1))
}

/// One line for each address space that has something, about the oldest: a device that is stuck holds
/// up every round that it is a target of.
fn look(host: &Host, space: &AddressSpace) {
    let now = host.clock().now();
    let is_slow = |round: &&Arc<WaitingRound>| {
        round.is_waiting() && round.look(|round| now.since(round.opened())) >= SLOW_ROUND
    };
    let (oldest, slow) = {
        let rounds = space.rounds.lock();
        (rounds.values().find(is_slow).cloned(), rounds.values().filter(is_slow).count())
    };
    if let Some(round) = oldest {
        round.look(|round| {
            let event = round.event();
            let missing: Vec<&str> = round.missing().map(|target| target.device.as_str()).collect();
            tracing::warn!(
                address_space = event.address_space.get(),
                slow,
                oldest = event.seq.get(),
                range = %event.range,
                age = ?now.since(round.opened()),
                ?missing,
                "rounds wait for devices; each device is fenced when its lease ends, if it enforces it, or by its fencer",
            );
        });
    }
    let stalls = space.subscribers.domain().check_stalls();
    if let Some(oldest) = stalls.iter().max_by_key(|stall| stall.age) {
        tracing::debug!(address_space = space.id.get(), stalls = stalls.len(), %oldest, "old read sections");
    }
}
