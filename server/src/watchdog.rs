//! Looks at what takes too long, and names it: rounds, and who holds a read section of a subscriber
//! list. It changes nothing; what ends a round is an ack or a fence.

use std::time::Duration;

use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

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

fn look(host: &Host, space: &AddressSpace) {
    let now = host.clock().now();
    let waiting: Vec<_> = space.rounds.lock().values().filter(|round| round.is_waiting()).cloned().collect();
    for round in waiting {
        round.look(|round| {
            let age = now.since(round.opened());
            if age < SLOW_ROUND {
                return;
            }
            let event = round.event();
            let missing: Vec<&str> = round.missing().map(|target| target.device.as_str()).collect();
            tracing::warn!(
                address_space = event.address_space.get(),
                seq = event.seq.get(),
                range = %event.range,
                ?age,
                ?missing,
                "a round waits for devices; each is fenced when its lease ends",
            );
        });
    }
    for stall in space.subscribers.domain().check_stalls() {
        tracing::debug!(address_space = space.id.get(), %stall, "a read section of the subscriber list is old");
    }
}
