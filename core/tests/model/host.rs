//! What a host agent does: `core/src/session.rs`, `core/src/outbox.rs`, and of `server/` the dispatch and the
//! watchdog.

use std::sync::Arc;

use shootdown_core::event::Method;
use shootdown_core::lease::LeaseTerms;
use shootdown_core::round::{Resolution, Round};
use shootdown_core::session::Phase;
use shootdown_core::{Ack, DeviceId, SessionId};

use crate::mutations::Mutation;
use crate::round::{OpenRound, TheRound, event};
use crate::sequences::signed_max;
use crate::state::{
    CallState, Down, Ended, Page, Pending, Sent, Session, Set, T_ACK, T_FENCE, Told, Up, members, moment,
    number, range_of, terms,
};
use crate::waits::Task;
use crate::world::World;

impl World<'_> {
    /// A host agent that acts: it runs and serves, and the journal is still its own where it must look
    /// (`server/`, takeover).
    pub(crate) fn acts(&self, process: u8) -> Option<usize> {
        let at = self.state.hosts.iter().position(|host| host.process == process)?;
        self.state.hosts[at].serves().then_some(at)
    }

    pub(crate) fn owns_journal(&self, at: usize) -> bool {
        self.broken(Mutation::SupersededGoesOn) || self.state.journal.owner == self.state.hosts[at].process
    }

    /// The lease as this host agent counts it.
    pub(crate) fn lease_terms(&self) -> LeaseTerms {
        let mut counted = terms();
        if self.broken(Mutation::HostLeaseNotLengthened) {
            counted.margin = std::time::Duration::ZERO;
        }
        counted
    }

    /// `server/src/dispatch.rs::open_round`: sequence, bracket and tickets, then every target's outbox.
    pub(crate) fn open_round(&mut self, at: usize, called: u8, page: Page) {
        let now = self.state.host_clock;
        let method = if self.config.young { Method::ClearFlushYoung } else { Method::Invalidate };
        let (config, one_list) = (self.config, self.broken(Mutation::OneListForAll));
        let forgets_accesses = self.broken(Mutation::FencedIsNoTarget);
        let seq = self.next_seq(at);
        let host = &mut self.state.hosts[at];
        host.last_seq = Some(seq);
        host.opened += 1;
        host.brackets.push(called);
        for ticket in host.tickets.iter_mut().filter(|ticket| ticket.translation.has(page)) {
            ticket.spoiled = true;
        }
        // One that is over is a target until its accesses are known to have ended.
        let is_target = |session: &&Session| {
            let over = session.phase.is_over() && (session.told || forgets_accesses);
            let is_told = one_list || config.subscribes(session.device, page);
            !over && is_told && session.subscription.is_published()
        };
        let targets: Vec<(u8, usize)> =
            host.sessions.iter().filter(is_target).map(|session| (session.id, session.device)).collect();
        let named = targets.iter().map(|&(id, device)| (session_id(id), self.device_ids[device].clone()));
        let round = TheRound(Arc::new(Round::new(event(seq, page, method), named, moment(now))));
        let host = &mut self.state.hosts[at];
        host.rounds.retain(|open| open.event != called);
        let targets: Vec<u8> = targets.into_iter().map(|(id, _)| id).collect();
        host.rounds.push(OpenRound {
            event: called,
            seq,
            opened: host.opened,
            round,
            targets: targets.clone(),
        });
        for id in targets {
            self.push(at, id, Pending { range: range_of(page), seq, events: 1 << called, since: now });
            self.pump(at, id);
        }
    }

    /// `core/src/outbox.rs::push`: what cannot be kept apart is merged.
    fn push(&mut self, at: usize, id: u8, notice: Pending) {
        let (most, window) = (self.config.max_pending, self.config.window);
        let (keeps_first, drops) =
            (self.broken(Mutation::MergeKeepsFirst), self.broken(Mutation::FullOutboxDrops));
        let signed = self.broken(Mutation::SequencesAreSigned);
        let Some(session) = self.state.hosts[at].session_mut(id) else { return };
        if drops && session.sent.len() >= window {
            return;
        }
        if session.pending.len() < most {
            session.pending.push(notice);
        } else if let Some(last) = session.pending.last_mut() {
            last.events |= notice.events;
            if !keeps_first {
                last.range = last.range.hull(notice.range);
                last.seq = if signed { signed_max(last.seq, notice.seq) } else { last.seq.max(notice.seq) };
            }
        }
    }

    /// The stream takes what the window allows: `core/src/outbox.rs::take_notices`.
    pub(crate) fn pump(&mut self, at: usize, id: u8) {
        let (now, window) = (self.state.host_clock, self.config.window);
        loop {
            let Some(session) = self.state.hosts[at].session_mut(id) else { return };
            if !session.phase.has_stream() || session.sent.len() >= window || session.pending.is_empty() {
                return;
            }
            let Pending { range, seq, events, .. } = session.pending.remove(0);
            session.last_sent += 1;
            let n = session.last_sent;
            session.sent.push(Sent { n, range, seq, events, at: now });
            self.send_down(at, id, Down::Notice { n, told: Told::of(range) });
        }
    }

    /// Puts a message on the session's stream; into the void when the device has left its end.
    pub(crate) fn send_down(&mut self, at: usize, id: u8, message: Down) {
        let process = self.state.hosts[at].process;
        let Some(session) = self.state.hosts[at].session(id) else { return };
        let run = &mut self.state.devices[session.device].runs[session.run];
        if run.session_id() != Some(id) {
            return;
        }
        if let Some(link) = run.link.as_mut().filter(|link| link.process == process) {
            link.down.push(message);
        }
    }

    /// The oldest message of the device is read.
    pub(crate) fn deliver_up(&mut self, process: u8, id: u8) -> Option<()> {
        let at = self.acts(process)?;
        let session = self.state.hosts[at].session_mut(id)?;
        if session.up.is_empty() || session.reader != Task::Works {
            return None;
        }
        match session.up.remove(0) {
            Up::Ack(ack) => self.on_ack(at, id, &ack),
            Up::Heartbeat(sent) => self.on_heartbeat(at, id, sent),
        }
        Some(())
    }

    /// `core/src/session.rs::on_ack`. What is acked already is passed over: it was acked before a resume.
    fn on_ack(&mut self, at: usize, id: u8, ack: &Ack) {
        let now = self.state.host_clock;
        let Some(session) = self.state.hosts[at].session_mut(id) else { return };
        if session.phase.is_over() {
            return;
        }
        let acked =
            |sent: &Sent| Some(number(sent.n)) <= ack.through || ack.selective.contains(&number(sent.n));
        let (resolved, kept): (Vec<Sent>, Vec<Sent>) = session.sent.drain(..).partition(acked);
        session.sent = kept;
        if session.phase == Phase::Suspect && !session.is_overdue(now) {
            session.phase = Phase::Live;
        }
        for notice in resolved {
            let reports = ack.reports.iter().filter(|report| report.notice == number(notice.n));
            let used: Vec<_> = reports.flat_map(|report| report.young.iter().copied()).collect();
            for called in members(notice.events) {
                let range = range_of(self.state.source.events[usize::from(called)].page);
                let young = used.iter().any(|part| part.overlaps(range));
                let how = Resolution::Acked { young, dirty: false, timing: None, sent: None };
                self.resolve(at, called, id, how);
            }
        }
        self.pump(at, id);
    }

    /// `core/src/session.rs::on_heartbeat`, after a look at the journal.
    fn on_heartbeat(&mut self, at: usize, id: u8, sent: u8) {
        let now = self.state.host_clock;
        let (owns, any_phase) = (self.owns_journal(at), self.broken(Mutation::SuspectRenewed));
        let Some(session) = self.state.hosts[at].session_mut(id) else { return };
        let in_time = session.phase == Phase::Live && !session.is_overdue(now);
        let deserves = in_time || any_phase && session.phase.has_stream();
        if owns && deserves && !session.lease.is_expired(moment(now)) {
            session.lease.grant(moment(now));
            self.send_down(at, id, Down::Lease(sent));
        }
    }

    /// `core/src/round.rs::on_resolved`, the real one.
    fn resolve(&mut self, at: usize, called: u8, id: u8, how: Resolution) {
        let now = moment(self.state.host_clock);
        let Some(open) = self.state.hosts[at].rounds.iter_mut().find(|open| open.event == called) else {
            return;
        };
        if let Some(target) =
            open.round.0.reports().iter().position(|report| report.session == session_id(id))
        {
            let _ = Arc::make_mut(&mut open.round.0).on_resolved(target, how, now);
        }
    }

    /// `server/src/watchdog.rs`: first whether the journal is still its own, then each session's
    /// `core/src/session.rs::on_tick`, then the callers that cannot be answered in time.
    pub(crate) fn watchdog(&mut self, at: usize) {
        let now = self.state.host_clock;
        if !self.owns_journal(at) {
            self.state.hosts.remove(at);
            return;
        }
        for index in 0..self.state.hosts[at].sessions.len() {
            let session = &self.state.hosts[at].sessions[index];
            let waited_out = session.enforces || self.broken(Mutation::LeaseFencesAnyone);
            if session.phase.is_over() {
            } else if session.lease.is_expired(moment(now)) && waited_out {
                self.fence(at, index, Ended::LeaseExpired);
            } else if session.phase == Phase::Live && session.is_overdue(now) {
                self.state.hosts[at].sessions[index].phase = Phase::Suspect;
                if self.broken(Mutation::TimeoutIsAck) {
                    let how = Resolution::Acked { young: false, dirty: false, timing: None, sent: None };
                    self.resolve_all(at, index, &how);
                }
            }
        }
        self.park_what_nobody_can_fence(at);
    }

    /// BoundedResolution for a target that cannot be waited out: its caller is answered NOT_QUIESCED.
    fn park_what_nobody_can_fence(&mut self, at: usize) {
        let host = &self.state.hosts[at];
        let due = |open: &&OpenRound| {
            let opened = open.round.0.opened().as_nanos();
            let cannot_wait = |id: u8| host.session(id).is_some_and(|session| !session.enforces);
            opened + u64::from(T_ACK + T_FENCE) <= u64::from(self.state.host_clock)
                && open.round.0.missing().any(|target| cannot_wait(id_of(target.session)))
        };
        let due: Vec<u8> = host.rounds.iter().filter(due).map(|open| open.event).collect();
        for called in due {
            self.park(called);
        }
    }

    pub(crate) fn park(&mut self, called: u8) {
        let call = &mut self.state.source.events[usize::from(called)];
        if call.state == CallState::Waiting && call.answer.is_none() {
            call.state = CallState::Parked;
            call.was_parked = true;
        }
    }

    /// The phase first: PageService refuses the session from here on.
    fn fence(&mut self, at: usize, index: usize, how: Ended) {
        let session = &mut self.state.hosts[at].sessions[index];
        session.phase = Phase::Fenced;
        session.ended = Some(how);
        session.up.clear();
        self.tell(at, index);
    }

    /// Then the rounds, when the accesses that had begun are over (FenceReachesReuse).
    pub(crate) fn tell(&mut self, at: usize, index: usize) {
        let session = &self.state.hosts[at].sessions[index];
        if session.told || session.phase != Phase::Fenced {
            return;
        }
        let run = &self.state.devices[session.device].runs[session.run];
        let accesses = run.session_id() == Some(session.id) && run.access.is_some();
        if !accesses || self.broken(Mutation::FenceToldDuringAccess) {
            self.end_session(at, index, &Resolution::Fenced);
        }
    }

    pub(crate) fn leave(&mut self, at: usize, index: usize) {
        let session = &mut self.state.hosts[at].sessions[index];
        session.phase = Phase::Gone;
        session.ended = Some(Ended::Left);
        session.up.clear();
        self.end_session(at, index, &Resolution::Left);
    }

    fn end_session(&mut self, at: usize, index: usize, how: &Resolution) {
        let session = &mut self.state.hosts[at].sessions[index];
        session.told = true;
        session.end_waits();
        let id = session.id;
        self.resolve_all(at, index, how);
        let session = &mut self.state.hosts[at].sessions[index];
        session.sent.clear();
        session.pending.clear();
        self.state.hosts[at].tickets.retain(|ticket| ticket.session != id);
        if self.owns_journal(at) {
            self.state.journal.sessions.retain(|durable| durable.id != id);
        }
    }

    fn resolve_all(&mut self, at: usize, index: usize, how: &Resolution) {
        let session = &self.state.hosts[at].sessions[index];
        let id = session.id;
        let sent = session.sent.iter().map(|sent| sent.events);
        let events: Set =
            sent.chain(session.pending.iter().map(|draft| draft.events)).fold(0, |all, one| all | one);
        for called in members(events) {
            self.resolve(at, called, id, *how);
        }
    }

    /// The host agent finds the stream ended.
    pub(crate) fn sever(&mut self, at: usize, id: u8) {
        let drops_target = self.broken(Mutation::DisconnectDropsTarget);
        let host = &mut self.state.hosts[at];
        let Some(index) = host.sessions.iter().position(|session| session.id == id) else { return };
        host.sessions[index].phase = Phase::Severed;
        host.sessions[index].up.clear();
        host.sessions[index].end_waits();
        host.tickets.retain(|ticket| ticket.session != id);
        if drops_target {
            for open in &mut host.rounds {
                let round = &open.round.0;
                let others = round.reports().iter().filter(|report| report.session != session_id(id));
                let others = others.map(|report| (report.session, report.device.clone()));
                open.round = TheRound(Arc::new(Round::new(*round.event(), others, round.opened())));
            }
            let session = &mut self.state.hosts[at].sessions[index];
            (session.sent, session.pending) = (Vec::new(), Vec::new());
        }
    }

    /// A fencer answers. Only its confirmation counts.
    pub(crate) fn on_fencer(&mut self, process: u8, id: u8, confirms: Confirms) -> Option<()> {
        let at = self.acts(process)?;
        let now = self.state.host_clock;
        let host = &self.state.hosts[at];
        let index = host.sessions.iter().position(|session| session.id == id)?;
        let session = &host.sessions[index];
        let cannot_be_waited_out = !session.enforces && session.lease.is_expired(moment(now));
        let asked = match session.phase {
            Phase::Suspect => true,
            Phase::Severed => session.is_overdue(now) || cannot_be_waited_out,
            Phase::Live | Phase::Fenced | Phase::Gone => false,
        };
        if !self.config.devices[session.device].fencer || !asked || !self.owns_journal(at) {
            return None;
        }
        if confirms == Confirms::Yes {
            let run = &mut self.state.devices[session.device].runs[session.run];
            if run.session_id() == Some(id) {
                run.cut = true;
            }
        } else if !self.broken(Mutation::FencerFailureConfirms) {
            return None;
        }
        self.fence(at, index, Ended::FencerConfirmed);
        Some(())
    }
}

/// What a fencer says: that the device is cut off, or anything else.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Confirms {
    Yes,
    No,
}

pub(crate) fn session_id(id: u8) -> SessionId {
    SessionId::new(u64::from(id)).expect("sessions count from 1")
}

fn id_of(session: SessionId) -> u8 {
    u8::try_from(session.get()).expect("a model has few sessions")
}

/// The names that the real rounds give their targets.
pub(crate) fn device_id(device: usize) -> DeviceId {
    DeviceId::new(&format!("device-{device}")).expect("a short name")
}
