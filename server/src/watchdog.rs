//! Looks at what takes too long, and names it: rounds, and who holds a read section of a subscriber
//! list. It changes nothing; what ends a round is an ack or a fence.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::completion::WaitingRound;
use crate::directory::AddressSpace;
use crate::host::Host;

/// How often to look. What is looked for is measured in seconds.
const PERIOD: Duration = Duration::from_secs(5);

/// A round older than this is named. By then each of its devices has been suspect for a while.
const SLOW_ROUND: Duration = Duration::from_secs(10);

pub(crate) async fn run(host: Host, stop: CancellationToken) {
    let mut looks = tokio::time::interval(PERIOD);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            // First: nothing is reported of a host agent that stops.
            () = stop.cancelled() => return,
            _ = looks.tick() => host.directory().list().iter().for_each(|space| look(&host, space)),
        }
    }
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
                "rounds wait for devices; each device is fenced when its lease ends",
            );
        });
    }
    let stalls = space.subscribers.domain().check_stalls();
    if let Some(oldest) = stalls.iter().max_by_key(|stall| stall.age) {
        tracing::debug!(address_space = space.id.get(), stalls = stalls.len(), %oldest, "old read sections");
    }
}
