//! What the host agent knows of its rounds and does not tell over the wire: when each was opened. Asked by its
//! Rust API, each millisecond, as what is looked at must not wait for what is looked for.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use shootdown_core::{AddressSpaceId, Seq};
use shootdown_server::Host;
use shootdown_server::source::Wait;

use crate::plan::millis;
use crate::shared::Shared;
use crate::trace::What;

/// Each run of the host agent numbers what it names from a block of its own.
pub const NUMBERS_OF_A_RUN: u64 = 1 << 40;

/// One round: the run of the host agent, its address space, its sequence.
pub type Name = (u64, u64, u64);

/// The rounds of all runs.
#[derive(Debug, Default)]
pub struct Seen {
    rounds: BTreeMap<Name, Times>,
    /// By address space: the next sequence.
    next: BTreeMap<u64, u64>,
}

/// Of a round, in virtual time.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    pub called: Duration,
    /// When its notices were in the outboxes.
    pub dispatched: Duration,
    /// When its last target had stopped.
    pub resolved: Option<Duration>,
}

impl Seen {
    pub fn times(&self, name: Name) -> Option<Times> {
        self.rounds.get(&name).copied()
    }
}

/// Writes down each round of a run as it opens. Does not return.
pub async fn run(shared: Arc<Shared>, host: Host) {
    loop {
        let spaces = shared.memory.lock().live_spaces();
        for space in spaces {
            while look(&shared, &host, space).await {}
        }
        tokio::time::sleep(millis(1)).await;
    }
}

/// Whether there is a further round in the address space.
async fn look(shared: &Arc<Shared>, host: &Host, space: u64) -> bool {
    let id = AddressSpaceId::new(space).expect("it was given out");
    for candidate in candidates(shared, space) {
        let Some(seq) = Seq::new(candidate) else { continue };
        // Never waits.
        let Ok(round) = host.await_round(id, seq, Wait::AtMost(Duration::ZERO)).await else { continue };
        let incarnation = host.incarnation().get();
        let mut seen = shared.seen.lock();
        seen.next.insert(space, candidate + 1);
        // Of one that is over already it knows nothing but the verdict.
        if !round.targets.is_empty() || round.times.resolved.is_some() {
            let when = |moment| shared.plan.host_clock.when(moment);
            let times = Times {
                called: when(round.times.called),
                dispatched: when(round.times.dispatched),
                resolved: round.times.resolved.map(when),
            };
            seen.rounds.insert((incarnation, space, candidate), times);
            if times.resolved.is_none() {
                tokio::spawn(until_resolved(Arc::clone(shared), host.clone(), id, seq));
            }
            shared.trace.record(What::RoundSeen { host: incarnation, space, seq: candidate });
        }
        return true;
    }
    false
}

/// Once its bracket has ended the host agent knows nothing of a round any more; who waited before does.
async fn until_resolved(shared: Arc<Shared>, host: Host, space: AddressSpaceId, seq: Seq) {
    let Ok(round) = host.await_round(space, seq, Wait::ForTargets).await else { return };
    let name = (host.incarnation().get(), space.get(), seq.get());
    if let Some(times) = shared.seen.lock().rounds.get_mut(&name) {
        times.resolved = round.times.resolved.map(|moment| shared.plan.host_clock.when(moment));
    }
}

/// The sequence after the last that was seen, or the first of a run: each numbers from a block of its own.
fn candidates(shared: &Shared, space: u64) -> BTreeSet<u64> {
    let next = shared.seen.lock().next.get(&space).copied().unwrap_or(1);
    let of_runs = (0..shared.starts_of_agent()).map(|run| run * NUMBERS_OF_A_RUN + 2);
    of_runs.chain([next]).filter(|candidate| *candidate >= next).collect()
}
