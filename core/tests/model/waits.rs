//! Who waits for whom: faults that wait for rounds, and acks that must not wait for faults:
//! `server/src/session/fault.rs`, `server/src/session/subscription.rs`, `server/src/session/task.rs`.
//!
//! ```text
//!   round of e  ->  ack of each target  ->  flush by the device, reading by the session's task
//!       ^                                          |                     |
//!       |                                          x                     x   not in the right model
//!       |                                          v                     v
//!   bracket of e  <----------------------  fault of the session, grace period of a leaver
//!       |                                          ^
//!       +-----------------  x  --------------------+
//! ```

use stateright::Model;

use crate::mutations::Mutation;
use crate::properties::{rounds_that_wait_for, waited_for};
use crate::state::{CallState, Host, Page, Session, Set, State, Subscription, Ticket, Translation, members};
use crate::world::{Shootdown, World};

/// What a task does that acks need.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Task {
    /// Whatever comes. No other in the right model: who has to wait does so in a task of its own.
    Works,
    /// Nothing, until the fault of its session is answered.
    WaitsForFault,
    /// Nothing, until no round counts on its session any more.
    WaitsForGracePeriod,
}

/// A fault that waits for the end of a bracket: one that was open, or that of the event which the fault itself made
/// necessary.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct WaitingFault {
    pub(crate) page: Page,
    pub(crate) event: u8,
}

impl Session {
    /// A fault ends with the stream that it came on, and so does whatever waits for it.
    pub(crate) fn end_waits(&mut self) {
        self.fault = None;
        self.reader = Task::Works;
    }
}

impl World<'_> {
    /// The device writes to a page that is shared. The source copies it: an event over the page, for which the
    /// device that asks is a target like any other. Where a bracket lies over the page, the fault is held first.
    pub(crate) fn on_fault_for_writing(&mut self, device: usize, page: Page) -> Option<()> {
        let run = self.run(device);
        let (link, id) = (run.link.as_ref()?, run.session_id()?);
        let at = self.acts(link.process)?;
        let host = &self.state.hosts[at];
        let session = host.session(id)?;
        let may = matches!(session.subscription, Subscription::Subscribed(_)) && session.phase.has_stream();
        if !may
            || session.fault.is_some()
            || host.in_grace()
            || self.state.source.registered != host.registration
        {
            return None;
        }
        let event = match self.bracket_over(at, self.config.translation(device, page)) {
            Some(held) => held,
            None => {
                self.start(page)?;
                self.state.source.events.len() as u8 - 1
            }
        };
        self.wait_for_bracket(at, id, WaitingFault { page, event })
    }

    fn wait_for_bracket(&mut self, at: usize, id: u8, fault: WaitingFault) -> Option<()> {
        let acks_wait = self.broken(Mutation::AcksWaitForFault);
        let flush_waits = self.broken(Mutation::FlushWaitsForFault);
        let session = self.state.hosts[at].session_mut(id)?;
        session.fault = Some(fault);
        if acks_wait {
            session.reader = Task::WaitsForFault;
        }
        let device = session.device;
        if flush_waits {
            self.run_mut(device).flusher = Task::WaitsForFault;
        }
        Some(())
    }

    /// The bracket has ended: the fault opens its ticket, or is held by the next one.
    pub(crate) fn fault_goes_on(&mut self, process: u8, id: u8) -> Option<()> {
        let at = self.acts(process)?;
        let host = &self.state.hosts[at];
        let session = host.session(id)?;
        let (WaitingFault { page, .. }, device) = (session.fault?, session.device);
        let of = self.config.translation(device, page);
        if let Some(event) = self.bracket_over(at, of) {
            return self.wait_for_bracket(at, id, WaitingFault { page, event });
        }
        let translation = Translation::new(of, &self.state.source.mapped);
        let host = &mut self.state.hosts[at];
        host.session_mut(id)?.end_waits();
        host.tickets.push(Ticket { session: id, translation, spoiled: false });
        self.run_mut(device).flusher = Task::Works;
        Some(())
    }
}

/// No round waits for itself, by way of acks that wait for faults or leavers which wait for rounds.
pub(crate) fn no_self_wait(_: &Shootdown, state: &State) -> bool {
    state.hosts.iter().all(|host| {
        let mut waits = [0; Set::BITS as usize];
        for open in &host.rounds {
            waits[usize::from(open.event)] = waited_for(host, open)
                .flatten()
                .fold(0, |events, session| events | acks_wait_for(state, host, session));
        }
        // As far as it leads: no way is longer than there are rounds.
        for _ in &host.rounds {
            for event in 0..waits.len() {
                waits[event] =
                    members(waits[event]).fold(waits[event], |all, next| all | waits[usize::from(next)]);
            }
        }
        host.rounds.iter().all(|open| waits[usize::from(open.event)] >> open.event & 1 == 0)
    })
}

/// Lest that relation leave somebody out: where a fault or a leaver waits, somebody can go on, though time stands still.
/// What waits in a circle need be neither a round nor an ack.
pub(crate) fn somebody_can_go_on(model: &Shootdown, state: &State) -> bool {
    let waits = |host: &Host| host.sessions.iter().any(waits_for_a_round);
    let can_go_on = || {
        let mut actions = Vec::new();
        model.actions(state, &mut actions);
        actions.into_iter().any(|action| model.next_state(state, action).is_some())
    };
    !state.hosts.iter().any(waits) || can_go_on()
}

fn waits_for_a_round(session: &Session) -> bool {
    session.fault.is_some() || session.subscription == Subscription::Leaving
}

/// The events for whose rounds the acks of a session wait.
fn acks_wait_for(state: &State, host: &Host, session: &Session) -> Set {
    let run = &state.devices[session.device].runs[session.run];
    let flusher = if run.session_id() == Some(session.id) { run.flusher } else { Task::Works };
    let of = |task: Task| match task {
        Task::Works => 0,
        Task::WaitsForFault => session.fault.map_or(0, |fault| rounds_before_the_end(state, fault.event)),
        Task::WaitsForGracePeriod => {
            rounds_that_wait_for(host, session.id).fold(0, |events, open| events | 1 << open.event)
        }
    };
    of(session.reader) | of(flusher)
}

/// The source ends a bracket when its round is answered; one that was answered NOT_QUIESCED waits for no round.
fn rounds_before_the_end(state: &State, event: u8) -> Set {
    let call = &state.source.events[usize::from(event)];
    if call.state == CallState::Waiting { 1 << event } else { 0 }
}

/// Whether a fault waits for the end of that event's bracket.
pub(crate) fn fault_waits_for_end_of(host: &Host, event: u8) -> bool {
    host.sessions.iter().any(|session| session.fault.is_some_and(|fault| fault.event == event))
}

/// Whether a fault waits for a round that waits for the ack of the very session.
pub(crate) fn fault_waits_for_its_own_session(state: &State) -> bool {
    state.hosts.iter().any(|host| {
        host.sessions.iter().any(|session| {
            let mut rounds = rounds_that_wait_for(host, session.id);
            session.fault.is_some_and(|fault| rounds.any(|open| open.event == fault.event))
        })
    })
}
