//! What the source does: it calls, waits, releases, and calls again when the host agent is another one.

use crate::mutations::Mutation;
use crate::state::{CallState, Called, Host, Page, REFUSED};
use crate::waits::fault_waits_for_end_of;
use crate::world::World;

impl World<'_> {
    /// The host agent that the source speaks to.
    fn registered(&self) -> Option<usize> {
        let registered = self.state.source.registered;
        let speaks = |host: &Host| host.registration == registered && host.serves();
        self.state.hosts.iter().rposition(speaks)
    }

    /// `invalidate_range_start`, blockable.
    pub(crate) fn start(&mut self, page: Page) -> Option<()> {
        let at = self.registered()?;
        let events = &self.state.source.events;
        let nested = events.iter().any(|call| call.page == page && !call.bracket_ended);
        if events.len() >= usize::from(self.config.events) || nested {
            return None;
        }
        let called = events.len() as u8;
        let frame = self.state.source.mapped[usize::from(page)];
        let used = self.state.runs().any(|(_, _, run)| run.used >> page & 1 == 1);
        self.state.source.events.push(Called {
            page,
            frame,
            registration: self.state.source.registered,
            state: CallState::Waiting,
            answer: None,
            bracket_ended: false,
            was_parked: false,
            used,
        });
        self.open_round(at, called, page);
        Some(())
    }

    /// `invalidate_range_start`, not blockable: with a target it is refused, and nothing has happened.
    pub(crate) fn start_non_blockable(&mut self) -> Option<()> {
        let at = self.registered()?;
        let host = &mut self.state.hosts[at];
        let refused = host.sessions.iter().any(|session| !session.phase.is_over());
        if !refused || host.brackets.contains(&REFUSED) {
            return None;
        }
        self.broken(Mutation::RefusedStartLeavesBracket).then(|| self.state.hosts[at].brackets.push(REFUSED))
    }

    /// A caller's deadline passes: NOT_QUIESCED, and the page is parked.
    pub(crate) fn deadline(&mut self, called: u8) -> Option<()> {
        let call = &self.state.source.events[usize::from(called)];
        if call.state != CallState::Waiting || call.answer.is_some() {
            return None;
        }
        if self.broken(Mutation::DeadlineReleases) {
            let registration = call.registration;
            self.release(called, registration);
        } else {
            self.park(called);
        }
        Some(())
    }

    /// The host agent finds the round complete and says so, if it is still the one that may.
    pub(crate) fn answer(&mut self, process: u8, called: u8) -> Option<()> {
        let at = self.acts(process)?;
        let host = &self.state.hosts[at];
        let open = host.rounds.iter().find(|open| open.event == called)?;
        let call = self.state.source.events.get(usize::from(called))?;
        let due = call.state != CallState::Released && call.answer.is_none();
        if !due
            || call.registration != host.registration
            || !open.round.0.is_complete()
            || !self.owns_journal(at)
        {
            return None;
        }
        self.state.source.events[usize::from(called)].answer = Some(host.registration);
        Some(())
    }

    /// The answer arrives. One of a host agent that has a successor which the source knows is refused.
    pub(crate) fn take_answer(&mut self, called: u8) -> Option<()> {
        let old_taken = self.broken(Mutation::OldAnswerTaken);
        let registered = self.state.source.registered;
        let call = &mut self.state.source.events[usize::from(called)];
        let registration = call.answer.take()?;
        if registration >= registered || old_taken {
            self.release(called, registration);
        }
        Some(())
    }

    /// The frame is somebody else's from here on.
    fn release(&mut self, called: u8, registration: u8) {
        self.state.ghost.acted_in_grace |= self.an_older_lease_may_be_used(registration);
        let source = &mut self.state.source;
        let call = &mut source.events[usize::from(called)];
        call.state = CallState::Released;
        let page = usize::from(call.page);
        source.released[page] |= 1 << call.frame;
        if source.mapped[page] == call.frame {
            source.mapped[page] += 1;
        }
    }

    /// `invalidate_range_end`. After NOT_QUIESCED the page gets a new frame, the old one stays parked.
    pub(crate) fn end(&mut self, called: u8) -> Option<()> {
        let forgotten = self.broken(Mutation::ParkedEndForgotten);
        let waits_for_fault = self.broken(Mutation::EndWaitsForFault);
        let at = self.registered()?;
        let host = &mut self.state.hosts[at];
        let source = &mut self.state.source;
        let call = &mut source.events[usize::from(called)];
        if call.bracket_ended || call.state == CallState::Waiting || call.registration != host.registration {
            return None;
        }
        if waits_for_fault && fault_waits_for_end_of(host, called) {
            return None;
        }
        call.bracket_ended = true;
        let parked = call.state == CallState::Parked;
        if parked && source.mapped[usize::from(call.page)] == call.frame {
            source.mapped[usize::from(call.page)] += 1;
        }
        if !(parked && forgotten) {
            host.brackets.retain(|open| *open != called);
        }
        Some(())
    }

    /// The source finds the successor.
    pub(crate) fn register(&mut self) -> Option<()> {
        let host = self.state.hosts.last().filter(|host| host.serves())?;
        if host.registration <= self.state.source.registered {
            return None;
        }
        self.state.source.registered = host.registration;
        Some(())
    }

    /// It calls again what the last host agent did not answer.
    pub(crate) fn retry(&mut self, called: u8) -> Option<()> {
        let at = self.registered()?;
        let registered = self.state.source.registered;
        let call = &mut self.state.source.events[usize::from(called)];
        if call.registration >= registered || call.state == CallState::Released {
            return None;
        }
        call.registration = registered;
        call.state = CallState::Waiting;
        call.bracket_ended = false;
        let page = call.page;
        self.open_round(at, called, page);
        Some(())
    }
}
