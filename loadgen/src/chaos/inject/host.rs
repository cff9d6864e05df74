//! The host agent's lane.

use std::sync::Arc;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::seq::IndexedRandom as _;
use rand::{RngExt as _, SeedableRng as _};
use shootdown_proto::v1::Verdict;
use shootdown_proto::v1::notifier_service_client::NotifierServiceClient;
use tokio::sync::MutexGuard;
use tonic::transport::Channel;

use super::{Field, InjectError, TICK, between};
use crate::chaos::plan::{Broken, FaultKind};
use crate::chaos::process::{Process, Start, remove_journal, start_host_agent};
use crate::chaos::shared::Status;
use crate::chaos::vmm::Before;
use crate::chaos::vmm::Probed;

/// How long a host agent has to end when it is asked to, or finds that it was replaced.
const END: Duration = Duration::from_secs(10);

/// The longest that devices stand still while the host agent is started again: less than a lease, so that
/// they go on with what they hold.
const MOST_STILL: Duration = Duration::from_millis(150);

/// Until the faults are over.
pub(crate) async fn run(field: Arc<Field>) -> Result<(), InjectError> {
    let kinds: Vec<FaultKind> =
        field.kinds.iter().copied().filter(|kind| kind.is_of_the_host_agent()).collect();
    let mut random = SmallRng::seed_from_u64(field.seed ^ 0xe703_7ed1_a0b4_28db);
    while let Some(kind) = kinds.choose(&mut random).copied() {
        if !field.next_turn(between(&mut random, 150, 500)).await {
            break;
        }
        let mut host = field.host.lock().await;
        host.check()?;
        field.injected(kind);
        let still = random.random_range(0..2) == 0;
        let short = between(&mut random, 30, 120);
        match kind {
            FaultKind::HostKill => field.kill(&mut host, still).await?,
            FaultKind::HostTakeOver => field.take_over(&mut host).await?,
            FaultKind::HostRestart => field.restart(&mut host).await?,
            _ => field.stop_for(&host, short).await?,
        }
    }
    Ok(())
}

impl Field {
    /// Kills it and starts it again. With `still` every device that can be had stands still meanwhile: it
    /// finds the successor only after that has had the time to do something wrong.
    async fn kill(&self, host: &mut Process, still: bool) -> Result<(), InjectError> {
        let still = still || self.args.rule == Some(Broken::NoGrace);
        let held = if still { self.stop_devices().await? } else { Vec::new() };
        let killed = self.vmm.clock.now();
        let rounds = self.kill_and_start(host).await;
        if !held.is_empty() {
            let until = tokio::time::Instant::now() + MOST_STILL;
            while rounds.is_ok() && tokio::time::Instant::now() < until {
                tokio::time::sleep(TICK).await;
            }
        }
        for process in &held {
            process.go_on()?;
        }
        drop(held);
        let over = self.a_round_is_over(rounds?).await;
        self.outcome(FaultKind::HostKill, if over { "the grace period ended" } else { "did not come back" });
        let took = u64::try_from(self.vmm.clock.now().since(killed).as_millis()).unwrap_or(u64::MAX);
        let mut tally = self.tally.lock();
        tally.longest_grace_ms = tally.longest_grace_ms.max(took);
        Ok(())
    }

    /// How many rounds were over when the next one was started.
    async fn kill_and_start(&self, host: &mut Process) -> Result<u64, InjectError> {
        host.kill().await?;
        if self.args.rule == Some(Broken::NoGrace) {
            remove_journal(&self.places).map_err(InjectError::Journal)?;
        }
        let rounds = self.vmm.ledger.lock().rounds;
        *host = start_host_agent(&self.args, &self.places, &self.sockets, Start::Alone)?;
        self.vmm.on_host_started(host, Before::Nothing);
        Ok(rounds)
    }

    /// Those that no other fault has.
    async fn stop_devices(&self) -> Result<Vec<MutexGuard<'_, Process>>, InjectError> {
        let mut held = Vec::new();
        for slot in &self.devices {
            if let Ok(process) = slot.process.try_lock() {
                self.stop_between_writes(slot, &process).await?;
                held.push(process);
            }
        }
        Ok(held)
    }

    async fn stop_for(&self, host: &Process, time: Duration) -> Result<(), InjectError> {
        let rounds = self.vmm.ledger.lock().rounds;
        // It excuses rounds, so it is told of no earlier than it is so, and no longer.
        host.stop().await?;
        self.vmm.on_host_stopped();
        tokio::time::sleep(time).await;
        self.vmm.on_host_goes_on();
        host.go_on()?;
        let over = self.a_round_is_over(rounds).await;
        self.outcome(FaultKind::HostStop, if over { "went on" } else { "did not come back" });
        Ok(())
    }

    /// Stops it past all leases, lets a successor take over, and lets the old one go on.
    async fn take_over(&self, host: &mut Process) -> Result<(), InjectError> {
        let kind = FaultKind::HostTakeOver;
        // It has answered on it: the connection is its own, and not one that waits for its successor.
        let mut connection = self.vmm.connect().await;
        let known = match &mut connection {
            Some(connection) => self.known_on(connection).await,
            None => None,
        };
        host.stop().await?;
        self.vmm.on_host_stopped();
        tokio::time::sleep(self.past_the_lease() + self.args.ack_timeout).await;
        let rounds = self.vmm.ledger.lock().rounds;
        // What the old one says of its rounds is passed over from here on: whether it stands still is all the same.
        self.vmm.on_host_goes_on();
        let successor = start_host_agent(&self.args, &self.places, &self.sockets, Start::TakeOver)?;
        let mut old = std::mem::replace(host, successor);
        self.vmm.on_host_started(host, Before::Nothing);
        let over = self.a_round_is_over(rounds).await;
        self.vmm.on_replaced_goes_on();
        old.go_on()?;
        if !over {
            self.outcome(kind, "the successor did not work");
            return Ok(());
        }
        let asked = match connection.as_mut().zip(known) {
            Some((connection, known)) => {
                let answer = tokio::time::timeout(END, self.vmm.probe(connection)).await;
                Some((known, answer.unwrap_or(None)))
            }
            None => None,
        };
        let ended = old.ended(END).await.is_some();
        if ended {
            self.vmm.on_replaced_ended();
        }
        match asked {
            None => self.outcome(kind, "was not asked"),
            // It had closed the connection, and the successor took the next one.
            Some((known, Some(answer))) if answer.host_incarnation > known.host_incarnation => {
                self.outcome(kind, "refused");
            }
            Some((_, Some(answer))) if answer.verdict == Verdict::Quiesced => {
                self.tally.lock().acted_though_replaced += 1;
                self.outcome(kind, "ACTED THOUGH IT WAS REPLACED");
            }
            Some(_) => self.outcome(kind, "refused"),
        }
        self.outcome(kind, if ended { "the old one ended" } else { "the old one did not end" });
        Ok(())
    }

    /// What it says of itself, as soon as it says something: while a device of an earlier run is waited for and the
    /// quarantine is full, it refuses.
    async fn known_on(&self, connection: &mut NotifierServiceClient<Channel>) -> Option<Probed> {
        let asked = async {
            loop {
                if let Some(known) = self.vmm.probe(connection).await {
                    return known;
                }
                tokio::time::sleep(TICK).await;
            }
        };
        tokio::time::timeout(self.past_the_lease() + self.args.ack_timeout, asked).await.ok()
    }

    /// Asks it to end, and starts the next, while no other fault is under way.
    async fn restart(&self, host: &mut Process) -> Result<(), InjectError> {
        let kind = FaultKind::HostRestart;
        let mut held = Vec::new();
        for slot in &self.devices {
            held.push(slot.process.lock().await);
        }
        let were = self.statuses()?;
        let rounds = self.vmm.ledger.lock().rounds;
        host.ask_to_end()?;
        let mut before = Before::PlannedEnd;
        if host.ended(END).await.is_none() {
            self.outcome(kind, "did not end");
            host.kill().await?;
            before = Before::Nothing;
        }
        *host = start_host_agent(&self.args, &self.places, &self.sockets, Start::Alone)?;
        self.vmm.on_host_started(host, before);
        if !self.a_round_is_over(rounds).await {
            self.outcome(kind, "did not come back");
            return Ok(());
        }
        let started = self.vmm.clock.now();
        for (device, was) in were.iter().enumerate() {
            let after = self.recovered(device, started).await?;
            let same = after.is_some_and(|after| {
                was.session != 0 && (after.session, after.flushes) == (was.session, was.flushes)
            });
            self.outcome(kind, if same { "resumed" } else { "flushed" });
        }
        Ok(())
    }

    fn statuses(&self) -> Result<Vec<Status>, InjectError> {
        let statuses = (0..self.devices.len()).map(|device| self.status(device));
        Ok(statuses.collect::<Result<_, _>>()?)
    }
}
