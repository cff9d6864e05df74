//! A device's lane.

use std::sync::Arc;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::seq::IndexedRandom as _;
use rand::{RngExt as _, SeedableRng as _};

use super::{Field, InjectError, Slot, between};
use crate::chaos::plan::{Broken, FaultKind};
use crate::chaos::process::{Process, start_device};
use crate::chaos::shared::{Orders, Status};

/// Longer than a device reads its orders.
const ORDERS: Duration = Duration::from_millis(20);

/// Until the faults are over.
pub(crate) async fn run(field: Arc<Field>, device: usize) -> Result<(), InjectError> {
    let kinds: Vec<FaultKind> =
        field.kinds.iter().copied().filter(|kind| !kind.is_of_the_host_agent()).collect();
    let mut random =
        SmallRng::seed_from_u64(field.seed ^ (device as u64 + 1).wrapping_mul(0xa076_1d64_78bd_642f));
    let slot = &field.devices[device];
    while let Some(kind) = kinds.choose(&mut random).copied() {
        if !field.next_turn(between(&mut random, 200, 900)).await {
            break;
        }
        let mut process = slot.process.lock().await;
        field.injected(kind);
        field.inject(kind, slot, &mut process, &mut random).await?;
    }
    Ok(())
}

impl Field {
    async fn inject(
        &self,
        kind: FaultKind,
        slot: &Slot,
        process: &mut Process,
        random: &mut SmallRng,
    ) -> Result<(), InjectError> {
        process.check()?;
        let device = slot.plan.index;
        let before = self.status(device)?;
        // Every wait is drawn, whichever is used: the same seed gives the same faults.
        let (short, slow) = (between(random, 30, 120), random.random_range(20..=300));
        let past = self.past_the_lease() + between(random, 20, 250);
        match kind {
            FaultKind::DeviceKill => {
                process.kill().await?;
                // Not a grant of the new one.
                let killed = self.vmm.clock.now();
                *process = start_device(&slot.plan, slot.network.as_deref(), self.args.verbose)?;
                let recovered = self.recovered(device, killed).await?;
                self.outcome(kind, recovered.map_or("did not come back", |_| "restarted"));
                return Ok(());
            }
            FaultKind::DeviceStop => {
                self.stop_between_writes(slot, process).await?;
                tokio::time::sleep(short).await;
                process.go_on()?;
            }
            FaultKind::DeviceStopPastLease => {
                self.stop_the_clock(device).await?;
                self.stop_between_writes(slot, process).await?;
                tokio::time::sleep(past).await;
                process.go_on()?;
            }
            FaultKind::DeviceSlow => {
                self.order(device, Orders { flush_ms: slow, ..Orders::default() })?;
                tokio::time::sleep(Duration::from_millis(2 * slow)).await;
                self.order(device, Orders::default())?;
            }
            FaultKind::ConnectionReset => {
                let reset = process.reset_connections(slot.plan.host_agent);
                let reset = reset.map_err(|error| InjectError::Reset { device, error })?;
                if reset == 0 {
                    self.outcome(kind, "there was no connection");
                    return Ok(());
                }
            }
            FaultKind::Partition => self.cut_off(slot, short).await?,
            FaultKind::PartitionPastLease => {
                self.stop_the_clock(device).await?;
                self.cut_off(slot, past).await?;
            }
            FaultKind::HostKill | FaultKind::HostStop | FaultKind::HostTakeOver | FaultKind::HostRestart => {}
        }
        // What it asked for until here may be of the time before.
        let healed = self.vmm.clock.now();
        self.order(device, Orders::default())?;
        let Some(after) = self.recovered(device, healed).await? else {
            self.outcome(kind, "did not come back");
            return Ok(());
        };
        self.outcome(kind, outcome_of(kind, &before, &after));
        let past_lease = matches!(kind, FaultKind::DeviceStopPastLease | FaultKind::PartitionPastLease);
        if past_lease && went_on(&before, &after) {
            self.tally.lock().went_on_past_the_lease += 1;
        }
        Ok(())
    }

    /// What `--break lease` does.
    async fn stop_the_clock(&self, device: usize) -> Result<(), InjectError> {
        if self.args.rule == Some(Broken::Lease) {
            self.order(device, Orders { clock_stands: 1, ..Orders::default() })?;
            tokio::time::sleep(ORDERS).await;
        }
        Ok(())
    }

    /// In another thread: nft takes some milliseconds.
    async fn cut_off(&self, slot: &Slot, time: Duration) -> Result<(), InjectError> {
        let Some(network) = slot.network.clone() else { return Ok(()) };
        let cut = Arc::clone(&network);
        tokio::task::spawn_blocking(move || cut.cut()).await.map_err(|_| InjectError::Task)??;
        tokio::time::sleep(time).await;
        tokio::task::spawn_blocking(move || network.heal()).await.map_err(|_| InjectError::Task)??;
        Ok(())
    }
}

fn went_on(before: &Status, after: &Status) -> bool {
    before.session != 0 && (after.session, after.flushes) == (before.session, before.flushes)
}

fn outcome_of(kind: FaultKind, before: &Status, after: &Status) -> &'static str {
    match (went_on(before, after), kind) {
        // Its connection was gone for certain.
        (true, FaultKind::ConnectionReset) => "resumed",
        (true, _) => "went on",
        (false, _) if after.lapses > before.lapses => "fenced, and flushed",
        (false, _) => "flushed",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outcome_is_what_the_device_did() {
        let before = Status { session: 3, flushes: 1, lapses: 1, ..Status::default() };
        assert_eq!(outcome_of(FaultKind::DeviceStop, &before, &before), "went on");
        assert_eq!(outcome_of(FaultKind::ConnectionReset, &before, &before), "resumed");
        let flushed = Status { session: 4, flushes: 3, ..before };
        assert_eq!(outcome_of(FaultKind::ConnectionReset, &before, &flushed), "flushed");
        let fenced = Status { lapses: 2, ..flushed };
        assert_eq!(outcome_of(FaultKind::DeviceStop, &before, &fenced), "fenced, and flushed");
        assert!(!went_on(&Status::default(), &Status::default()), "there was no session to go on with");
    }
}
