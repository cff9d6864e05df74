//! [3 of 9] Opens a round: sequence, bracket and targets in one step, then one notice into each
//! target's outbox. All targets first, then wait: a round takes as long as its slowest device, not
//! as long as all of them together.
//!
//! Nothing in here awaits. A caller that is dropped was either not dispatched at all, or its round is
//! owned by its task already.

use std::sync::Arc;

use shootdown_core::interest::Target;
use shootdown_core::round::{Outcome, TargetReport};
use shootdown_core::session::Enforcement;
use shootdown_core::{AddrRange, Cause, Event, Method, Moment, OwnerTag, PageSize, Seq};
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::task::TaskTracker;

use crate::clock::Clock;
use crate::completion::{self, EndedBy, Owned, Token, WaitingRound};
use crate::directory::AddressSpace;
use crate::session::{After, SessionHandle};
use crate::source::NotifyError;

/// What is to be dispatched.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Call {
    pub(crate) range: AddrRange,
    pub(crate) method: Method,
    pub(crate) cause: Cause,
    pub(crate) owner: Option<OwnerTag>,
    pub(crate) bracket: EndedBy,
}

/// What became of a call that must not wait.
#[derive(Debug, Clone)]
pub(crate) enum Dispatched {
    /// The round is open, or complete already.
    Open(Arc<WaitingRound>),
    /// It has targets and may not wait: nothing was done.
    WouldBlock(Vec<TargetReport>),
}

/// Whether a call may have targets.
#[derive(Debug)]
pub(crate) enum Leave {
    /// It waits for its targets; the permit is its place among the rounds in flight.
    ToWait(OwnedSemaphorePermit),
    /// It waits for its targets, and has no place: there is one such call for an address space.
    ToWaitAlone,
    /// It is refused if it has one.
    NotToWait,
}

impl AddressSpace {
    /// Opens a round. All of it is one step under the lock that grants take as well:
    ///
    /// * sequence, bracket, spoiled tickets and targets: a subscriber that this call does not see cannot
    ///   have been granted anything before it, and is held after it (JoinCovers, NoGrantInWindow);
    /// * the round in the list: whoever knows its sequence finds it there;
    /// * the notices in the outboxes: they stand there in the order of their sequences, so that the new
    ///   translation of a `change_pte` never comes after the event that takes it away.
    ///
    /// What may run code of others, wakers and rounds of sessions that are over, comes after the lock.
    pub(crate) fn open_round(
        self: &Arc<Self>,
        call: Call,
        leave: Leave,
        called: Moment,
        clock: Clock,
        tasks: &TaskTracker,
    ) -> Result<Dispatched, NotifyError> {
        // Devices work in pages: whoever names bytes of one names all of it (RangeOverApproximates).
        let call = Call { range: call.range.widen_to(PageSize::BASE), ..call };
        let mut order = self.order.lock();
        if order.released {
            return Err(NotifyError::Released(self.id));
        }
        let subscribers = self.subscribers.read();
        let targets = subscribers.targets(call.range, call.cause, call.method);
        if !targets.is_empty() && matches!(leave, Leave::NotToWait) {
            drop(order);
            return Ok(Dispatched::WouldBlock(in_the_way(&targets)));
        }
        // A release ends them all, so it is never refused for them.
        if call.method != Method::Release && order.gate.open_brackets() >= self.most_brackets() {
            drop(order);
            return Err(NotifyError::TooManyRounds { address_space: self.id, most: self.most_brackets() });
        }
        order.released |= call.method == Method::Release;
        let seq = order.gate.start(call.range);
        let event = Event {
            address_space: self.id,
            seq,
            range: call.range,
            method: degrade(call.method, seq, &order.gate),
            cause: call.cause,
            owner: call.owner,
        };
        let names = targets.iter().map(|target| (target.session, target.handle.device.clone()));
        let run = (clock, self.host_incarnation);
        let enforcement = weakest(&targets);
        let round = Arc::new(WaitingRound::new(event, names, call.bracket, enforcement, called, run));
        self.rounds.lock().insert(seq, Arc::clone(&round));
        let sent = send(event, &targets, &round, clock.now());
        drop(order);

        round.on_dispatched(clock.now());
        for (target, after) in targets.iter().zip(sent) {
            target.handle.carry_out(after);
        }
        let permit = match leave {
            Leave::ToWait(permit) => Some(permit),
            Leave::ToWaitAlone | Leave::NotToWait => None,
        };
        let owned = Owned { space: Arc::clone(self), section: subscribers.into_section(), permit };
        match targets.first() {
            None => completion::finish(&round, owned),
            // On the first target's shard: its ack then wakes the round without leaving the core.
            Some(first) => {
                let shard = &first.handle.shard;
                let own = completion::own(Arc::clone(&round), owned, Arc::clone(&shard.vigil));
                drop(tasks.spawn_on(own, &shard.runtime));
            }
        }
        Ok(Dispatched::Open(round))
    }

    /// Closes a bracket and lets the faults that it held look again.
    pub(crate) fn end_bracket(&self, seq: Seq, clock: Clock) {
        let ended = self.order.lock().gate.end(seq);
        let round = self.rounds.lock().remove(&seq);
        let (Ok(range), Some(round)) = (ended, round) else { return };
        self.bracket_ended.notify_waiters();
        let (cause, owner) = round.look(|round| (round.event().cause, round.event().owner));
        self.tell_range_end(
            Event { address_space: self.id, seq, range, method: Method::RangeEnd, cause, owner },
            clock,
        );
    }

    /// A hint to those who asked for it; nobody waits for it.
    fn tell_range_end(&self, event: Event, clock: Clock) {
        let subscribers = self.subscribers.read();
        let targets = subscribers.targets(event.range, event.cause, event.method);
        if targets.is_empty() {
            return;
        }
        // In its place among the events, as in `open_round`.
        let order = self.order.lock();
        let now = clock.now();
        let sent: Vec<After> =
            targets.iter().map(|target| target.handle.on_event(&event, None, now)).collect();
        drop(order);
        for (target, after) in targets.iter().zip(sent) {
            target.handle.carry_out(after);
        }
    }
}

/// One notice into each target's outbox; what is to be done once the lock is dropped.
fn send(
    event: Event,
    targets: &[Target<Arc<SessionHandle>>],
    round: &Arc<WaitingRound>,
    now: Moment,
) -> Vec<After> {
    let push = |(index, target): (usize, &Target<Arc<SessionHandle>>)| {
        let token = Token { round: Arc::clone(round), target: index };
        let event = Event { method: understood(event.method, &target.handle), ..event };
        target.handle.on_event(&event, Some(token), now)
    };
    targets.iter().enumerate().map(push).collect()
}

/// `change_pte` is a hint that is only valid while its bracket is the only one over the page: another
/// event may be about to take away what it would install.
fn degrade(method: Method, seq: Seq, gate: &shootdown_core::gate::GrantGate) -> Method {
    match method {
        Method::ChangePte(translation) if !gate.sole_over(seq, translation.range) => Method::Invalidate,
        other => other,
    }
}

/// A device that does not know `change_pte` is told to invalidate.
fn understood(method: Method, session: &SessionHandle) -> Method {
    match method {
        Method::ChangePte(_) if !session.change_pte => Method::Invalidate,
        other => other,
    }
}

/// By nobody, if there is a target that nobody stops.
fn weakest(targets: &[Target<Arc<SessionHandle>>]) -> Enforcement {
    let mut enforcements = targets.iter().map(|target| target.handle.enforcement);
    enforcements.find(|each| *each == Enforcement::ByNobody).unwrap_or(Enforcement::ByDevice)
}

fn in_the_way(targets: &[Target<Arc<SessionHandle>>]) -> Vec<TargetReport> {
    targets
        .iter()
        .map(|target| TargetReport {
            session: target.session,
            device: target.handle.device.clone(),
            outcome: Outcome::Waiting,
            elapsed: None,
            young: false,
            // Nobody asked it.
            dirty: true,
            sent_after: None,
            timing: None,
            resolved_at: None,
        })
        .collect()
}
