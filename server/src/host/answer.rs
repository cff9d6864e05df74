//! [8 of 9] What a caller is told of its round: no later than its time allows, and nothing that a successor could belie.

use std::sync::Arc;

use shootdown_core::session::Enforcement;
use shootdown_core::{AddressSpaceId, Moment, Seq};

use super::Host;
use crate::completion::WaitingRound;
use crate::quarantine;
use crate::source::{NotifyError, RoundResult, RoundTimes, Verdict, Wait};

impl Host {
    /// Waits for a round that was not quiesced when its caller's time passed. Waiting twice gives the
    /// same answer twice. Once its bracket has ended only the verdict is known any more, not the
    /// targets.
    ///
    /// # Errors
    /// [`NotifyError::BracketUnknown`] when there was no such event, [`NotifyError::AddressSpaceUnknown`].
    ///
    /// # Cancel safety
    /// Cancel safe: nothing about the round changes.
    pub async fn await_round(
        &self,
        address_space: AddressSpaceId,
        seq: Seq,
        wait: Wait,
    ) -> Result<RoundResult, NotifyError> {
        let called = self.clock().now();
        let space = self.directory().expect(address_space)?;
        // In this order: a round is listed with its sequence, in one step, and leaves the list complete.
        let last_seq = space.order.lock().gate.last_seq();
        let waiting = space.rounds.lock().get(&seq).cloned();
        if let Some(round) = waiting {
            return self.outcome(&round, self.bounded(wait, &round)).await;
        }
        if Some(seq) > last_seq || Some(seq) <= space.began_after {
            return Err(NotifyError::BracketUnknown { address_space, seq });
        }
        self.vouch(self.nothing_waits(Verdict::Quiesced, Some(seq), called))
    }

    /// Waits for a round on a caller's behalf, but not for one that a superseded host agent will never
    /// complete.
    pub(super) async fn outcome(&self, round: &WaitingRound, wait: Wait) -> Result<RoundResult, NotifyError> {
        if self.0.restart.journal().is_none() {
            return Ok(round.wait(wait).await);
        }
        tokio::select! {
            // First: what is complete is vouched for, or not.
            biased;
            result = round.wait(wait) => self.vouch(result),
            () = self.0.restart.superseded().cancelled() => Err(NotifyError::Superseded),
        }
    }

    /// Nobody is told that devices have stopped when a successor may have granted what this one knows
    /// nothing of.
    fn vouch(&self, result: RoundResult) -> Result<RoundResult, NotifyError> {
        match result.verdict {
            Verdict::Quiesced if !self.is_current() => Err(NotifyError::Superseded),
            _ => Ok(result),
        }
    }

    /// What is left of the caller's time since it called.
    pub(super) fn rest(&self, wait: Wait, called: Moment) -> Wait {
        match wait {
            Wait::AtMost(limit) => Wait::AtMost(limit.saturating_sub(self.clock().now().since(called))),
            Wait::ForTargets | Wait::NotAtAll => wait,
        }
    }

    /// A wait for a device that is not certain to stop has a bound, whatever its caller says.
    fn bounded(&self, wait: Wait, round: &WaitingRound) -> Wait {
        match wait {
            Wait::ForTargets if round.enforcement() == Enforcement::ByNobody => Wait::AtMost(self.bound()),
            other => other,
        }
    }

    /// [8], as the caller sees it. Who is not told that its pages may go has to keep them.
    pub(super) async fn answer(
        &self,
        round: &Arc<WaitingRound>,
        wait: Wait,
        called: Moment,
        resident_pages: Option<u64>,
    ) -> Result<RoundResult, NotifyError> {
        let result = self.outcome(round, self.bounded(self.rest(wait, called), round)).await?;
        if result.verdict == Verdict::NotQuiesced {
            let event = round.look(|round| *round.event());
            if quarantine::parks(event.method) {
                round.park(self.quarantine().park(&event, resident_pages));
            }
        }
        Ok(result)
    }

    pub(super) fn would_block(
        &self,
        targets: Vec<shootdown_core::round::TargetReport>,
        called: Moment,
    ) -> RoundResult {
        RoundResult {
            // Nobody was asked.
            dirty: true,
            targets,
            ..self.nothing_waits(Verdict::WouldBlock, None, called)
        }
    }

    fn nothing_waits(&self, verdict: Verdict, seq: Option<Seq>, called: Moment) -> RoundResult {
        let times = RoundTimes {
            called,
            dispatched: called,
            resolved: None,
            finished: None,
            answered: self.clock().now(),
        };
        RoundResult {
            verdict,
            seq,
            targets: Vec::new(),
            young: false,
            dirty: false,
            host_incarnation: self.incarnation(),
            times,
        }
    }
}
