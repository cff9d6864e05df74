//! [8 of 9] A round that waits for its targets, and the task that owns it.
//!
//! ```text
//!   dispatch --> WaitingRound --> on_resolved (from the sessions' acks and fences)
//!                    |                  |
//!             round task waits          | the last one rings `complete`
//!                    |<-----------------+
//!             drops the SRCU section, ends the bracket if nobody else will, answers every waiter
//! ```

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use shootdown_core::event::Event;
use shootdown_core::round::{Progress, Resolution, Round};
use shootdown_core::session::Enforcement;
use shootdown_core::{Cause, DeviceId, Incarnation, Moment, Seq, SessionId};
use tokio::sync::{Notify, OwnedSemaphorePermit, SetOnce};
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::directory::AddressSpace;
use crate::quarantine::{Charge, Parked};
use crate::source::{RoundResult, RoundTimes, Verdict, Wait};
use crate::vigil::Vigil;

/// A round while it waits. Its targets' outboxes hold it through their tokens; its task owns what
/// must last until it is complete.
#[derive(Debug)]
pub(crate) struct WaitingRound {
    round: Mutex<Ledger>,
    /// Rung once, by whoever resolves the last target. Only the round's task listens.
    complete: Notify,
    /// Set by the round's task after the read section has ended. Any number of callers listen.
    finished: SetOnce<Moment>,
    /// Cancelled when the round's task is dropped with its runtime: nobody will finish the round.
    lost: CancellationToken,
    /// Whether each target is certain to stop: by nobody, if one of them is not.
    enforcement: Enforcement,
    called: Moment,
    clock: Clock,
    host_incarnation: Incarnation,
    /// Its targets are forgotten.
    of_an_earlier_run: bool,
}

#[derive(Debug)]
struct Ledger {
    round: Round,
    bracket: EndedBy,
    dispatched: Moment,
    /// Its caller was told that it is not quiesced, and keeps the pages until it is.
    parked: Option<Parked>,
}

/// Who ends the bracket of a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EndedBy {
    /// The caller will, by `invalidate_range_end`.
    Caller,
    /// The round's task does as soon as the round is complete: the method is a bracket around one
    /// page, or the caller ended or abandoned it before.
    Task,
    /// Nobody: the address space is released, and nothing will be granted any more.
    Nobody,
}

/// What the end of a bracket by its caller comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// The round is complete: the caller ends the bracket now.
    Now,
    /// The round is not: its task ends the bracket when it is.
    WhenComplete,
    /// It was ended before, or was never the caller's to end (Pairing).
    NotTheCallers,
}

/// What a target's outbox holds until the target is resolved.
#[derive(Debug)]
pub(crate) struct Token {
    pub(crate) round: Arc<WaitingRound>,
    pub(crate) target: usize,
}

impl Token {
    pub(crate) fn resolve(self, how: Resolution, now: Moment) {
        self.round.on_resolved(self.target, how, now);
    }
}

impl WaitingRound {
    pub(crate) fn new(
        event: Event,
        targets: impl IntoIterator<Item = (SessionId, DeviceId)>,
        bracket: EndedBy,
        enforcement: Enforcement,
        called: Moment,
        (clock, host_incarnation): (Clock, Incarnation),
    ) -> Self {
        let round = Round::new(event, targets, called);
        Self {
            round: Mutex::new(Ledger { round, bracket, dispatched: called, parked: None }),
            complete: Notify::new(),
            finished: SetOnce::new(),
            lost: CancellationToken::new(),
            enforcement,
            called,
            clock,
            host_incarnation,
            of_an_earlier_run: false,
        }
    }

    /// A round that was complete when an earlier run of the host agent ended, and whose bracket its caller has ended
    /// or has not.
    pub(crate) fn of_an_earlier_run(
        event: Event,
        bracket: EndedBy,
        (clock, host_incarnation): (Clock, Incarnation),
    ) -> Self {
        // Nobody is waited for.
        let enforcement = Enforcement::ByDevice;
        let run = (clock, host_incarnation);
        let round = Self::new(event, [], bracket, enforcement, clock.now(), run);
        round.finished.set(clock.now()).expect("nobody else has it yet");
        Self { of_an_earlier_run: true, ..round }
    }

    /// A notice is in every target's outbox.
    pub(crate) fn on_dispatched(&self, now: Moment) {
        self.round.lock().dispatched = now;
    }

    fn on_resolved(&self, target: usize, how: Resolution, now: Moment) {
        let progress = self.round.lock().round.on_resolved(target, how, now);
        if progress == Progress::Complete {
            self.complete.notify_one();
        }
    }

    /// The caller ends the bracket, or abandons it.
    pub(crate) fn on_end(&self) -> End {
        let mut ledger = self.round.lock();
        match ledger.bracket {
            EndedBy::Task | EndedBy::Nobody => End::NotTheCallers,
            EndedBy::Caller => {
                ledger.bracket = EndedBy::Task;
                if self.finished.initialized() { End::Now } else { End::WhenComplete }
            }
        }
    }

    /// Whether nothing is to come: it waits for no target, and its bracket is not the caller's to end.
    pub(crate) fn is_settled(&self) -> bool {
        let ledger = self.round.lock();
        self.finished.initialized() && ledger.bracket != EndedBy::Caller
    }

    /// Its caller was told that it is not quiesced. What is parked is given back when it completes, which may
    /// be now; a second time changes nothing.
    pub(crate) fn park(&self, parked: Parked) {
        let given_back = {
            let mut ledger = self.round.lock();
            if self.finished.initialized() || ledger.parked.is_some() {
                Some(parked)
            } else {
                ledger.parked.replace(parked)
            }
        };
        // Wakes who waits for room.
        drop(given_back);
    }

    /// What of it is quarantined; `None`: it is not.
    pub(crate) fn quarantined(&self) -> Option<Charge> {
        self.round.lock().parked.as_ref().map(|parked| parked.charge)
    }

    /// Whether its targets are certain to stop.
    pub(crate) fn enforcement(&self) -> Enforcement {
        self.enforcement
    }

    /// Whether it waits for a target.
    pub(crate) fn is_waiting(&self) -> bool {
        !self.finished.initialized()
    }

    pub(crate) fn seq(&self) -> Seq {
        self.look(|round| round.event().seq)
    }

    /// Runs `look` on the ledger: for listings.
    pub(crate) fn look<R>(&self, look: impl FnOnce(&Round) -> R) -> R {
        look(&self.round.lock().round)
    }

    /// Waits for the round as long as the caller allows, and tells how far it has come. Any number
    /// may wait; dropping the future changes nothing about the round.
    pub(crate) async fn wait(&self, wait: Wait) -> RoundResult {
        match wait {
            // Only a round without targets was opened for such a caller: it is complete.
            Wait::NotAtAll => {}
            // A timer takes a millisecond, even for no time at all.
            Wait::AtMost(Duration::ZERO) => {}
            Wait::ForTargets => self.over().await,
            // An expired timer is not looked at: the ledger alone says whether the round is complete
            // (TimeoutIsNotAck).
            Wait::AtMost(limit) => drop(tokio::time::timeout(limit, self.over()).await),
        }
        self.result()
    }

    /// Finished, or never to be: the verdict says which.
    async fn over(&self) {
        tokio::select! {
            // First: a round that is finished is finished, even if its runtime stops.
            biased;
            _ = self.finished.wait() => {}
            () = self.lost.cancelled() => {}
        }
    }

    fn result(&self) -> RoundResult {
        let ledger = self.round.lock();
        let finished = self.finished.get().copied();
        let verdict = if finished.is_some() { Verdict::Quiesced } else { Verdict::NotQuiesced };
        RoundResult {
            verdict,
            seq: Some(ledger.round.event().seq),
            targets: ledger.round.reports().to_vec(),
            young: ledger.round.young(),
            // What the targets of an earlier run told went with it.
            dirty: ledger.round.dirty() || self.of_an_earlier_run,
            host_incarnation: self.host_incarnation,
            times: RoundTimes {
                called: self.called,
                dispatched: ledger.dispatched,
                // Without a target it was complete when it was called, which may be long before it was dispatched.
                resolved: ledger.round.completed().map(|completed| completed.max(ledger.dispatched)),
                finished,
                answered: self.clock.now(),
            },
        }
    }
}

/// What must last until every target has stopped: the read section of the subscriber list, and the
/// round's place in the bound on rounds in flight.
pub(crate) struct Owned {
    pub(crate) space: Arc<AddressSpace>,
    pub(crate) section: srcu::ReadGuard,
    pub(crate) permit: Option<OwnedSemaphorePermit>,
}

/// The round's task: it lives until every target has stopped, whatever becomes of the caller.
///
/// Dropped with its runtime, when the host agent is cut, it tells the waiters that there is nothing more to
/// wait for: their verdict is NotQuiesced.
pub(crate) async fn own(round: Arc<WaitingRound>, owned: Owned, vigil: Arc<Vigil>) {
    let lost = round.lost.clone().drop_guard();
    vigil.wait(round.complete.notified()).await;
    lost.disarm();
    finish(&round, owned);
}

/// Ends the read section and answers. Also called at once for a round that has no targets.
pub(crate) fn finish(round: &WaitingRound, owned: Owned) {
    let Owned { space, section, permit } = owned;
    drop(section);
    let (event, bracket, parked) = {
        let mut ledger = round.round.lock();
        // Under the lock, so that `on_end` either comes before, and leaves the end to this task, or
        // sees the round finished, and ends the bracket itself.
        round.finished.set(round.clock.now()).expect("a round is finished by its one task, once");
        (*ledger.round.event(), ledger.bracket, ledger.parked.take())
    };
    // What is unmapped is not young any more; whatever else is invalidated may be asked for again.
    if matches!(event.cause, Cause::Unmap | Cause::Release) {
        space.young.lock().clear(event.range);
    }
    match bracket {
        EndedBy::Task => space.end_bracket(event.seq, round.clock),
        // It stays listed, so that its caller can ask for the outcome until the end.
        EndedBy::Caller | EndedBy::Nobody => {}
    }
    drop((permit, parked));
}

#[cfg(test)]
mod tests {
    use super::*;
    use shootdown_core::{AddrRange, AddressSpaceId, Method};

    #[test]
    fn a_round_is_not_resolved_before_it_is_dispatched() {
        let event = Event {
            address_space: AddressSpaceId::FIRST,
            seq: Seq::FIRST,
            range: AddrRange::ALL,
            method: Method::Invalidate,
            cause: Cause::Unmap,
            owner: None,
        };
        let run = (Clock::BOOTTIME, Incarnation::FIRST);
        // Held up while the quarantine's budget was spent, and nobody is left whom it concerns.
        let (called, dispatched) = (Moment::from_nanos(1), Moment::from_nanos(5));
        let round = WaitingRound::new(event, [], EndedBy::Task, Enforcement::ByDevice, called, run);
        round.on_dispatched(dispatched);
        assert_eq!(round.result().times.resolved, Some(dispatched));
    }
}
