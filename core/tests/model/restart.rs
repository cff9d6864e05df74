//! What outlives a run of the host agent: `server/src/journal/`, and how the next run begins.

use shootdown_core::lease::HostLease;
use shootdown_core::session::Phase;

use crate::mutations::Mutation;
use crate::sequences::ReadAt;
use crate::state::{CallState, Durable, Host, Journal, Session, State, Subscription, moment};
use crate::waits::Task;
use crate::world::World;

/// A step of a start: `server/src/journal/mod.rs::open`, then all that `server/src/start.rs` does before it accepts.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Step {
    /// The clock, too early.
    ReadClock,
    /// The journal, too early.
    ReadJournal,
    /// The link to the next name: whoever had the journal is superseded. Then it is read, while nobody writes it.
    TakeJournal,
    /// It reads its clock, and writes that a run began; before that record nothing has happened.
    Begin,
    /// It accepts connections.
    Serve,
}

#[derive(Clone, PartialEq, Eq, Hash, Default, Debug)]
pub(crate) struct Read {
    pub(crate) clock: Option<u8>,
    pub(crate) journal: Option<Box<Journal>>,
}

impl World<'_> {
    /// A new session, durable before its Welcome.
    pub(crate) fn new_session(&mut self, at: usize, device: usize, run: usize) -> Option<u8> {
        if self.state.journal.next_session > self.config.sessions {
            return None;
        }
        let enforces = self.config.devices[device].enforces;
        let id = self.state.journal.next_session;
        let (read, owns) = (self.read_last_seq(at), self.owns_journal(at));
        let subscription =
            if self.config.subscriptions { Subscription::None } else { Subscription::Subscribed(read) };
        let lease = HostLease::new(self.lease_terms(), moment(self.state.host_clock));
        let Journal { next_session, sessions, .. } = &mut self.state.journal;
        *next_session += 1;
        let durable = Durable { id, device, run, enforces, unrenewed_since: None };
        let session = session(&durable, Phase::Live, lease, subscription);
        // What is written by one who has a successor, nobody reads.
        if owns {
            sessions.push(durable);
        }
        self.state.hosts[at].sessions.push(session);
        Some(id)
    }

    /// A process begins, and its start with it.
    pub(crate) fn start_host(&mut self) {
        let start = match () {
            () if self.broken(Mutation::ClockReadBeforeJournal) => {
                [Step::ReadClock, Step::TakeJournal, Step::Begin, Step::Serve].as_slice()
            }
            () if self.broken(Mutation::SessionsReadBeforeJournal) => {
                [Step::ReadJournal, Step::TakeJournal, Step::Begin, Step::Serve].as_slice()
            }
            () => [Step::TakeJournal, Step::Begin, Step::Serve].as_slice(),
        };
        let highest = self.state.hosts.iter().map(|host| host.process).max();
        let process = self.state.journal.owner.max(highest.unwrap_or_default()) + 1;
        self.state.hosts.push(Host::new(process, start));
        self.step_of_start(self.state.hosts.len() - 1);
    }

    /// The start goes on.
    pub(crate) fn start_on(&mut self, process: u8) -> Option<()> {
        let at = self.state.hosts.iter().position(|host| host.process == process)?;
        self.step_of_start(at);
        Some(())
    }

    fn step_of_start(&mut self, at: usize) {
        let now = self.state.host_clock;
        let superseded_begins = self.broken(Mutation::SupersededBegins);
        let State { hosts, journal, .. } = &mut self.state;
        let host = &mut hosts[at];
        let Some((step, left)) = host.start.split_first() else { return };
        host.start = left;
        match step {
            Step::ReadClock => host.read.clock = Some(now),
            Step::ReadJournal => host.read.journal = Some(Box::new(journal.clone())),
            Step::TakeJournal => {
                journal.owner = host.process;
                host.read.journal.get_or_insert_with(|| Box::new(journal.clone()));
            }
            // It was stopped, and has a successor that has not read its record: the two would use the same numbers.
            Step::Begin if journal.owner != host.process && !superseded_begins => drop(hosts.remove(at)),
            Step::Begin => self.begin(at),
            Step::Serve => {}
        }
    }

    /// `server/src/journal/mod.rs::open` and `server/src/restart.rs::bring_back`: what the last run left decides how
    /// this one begins. Sessions that it does not go on with are survivors.
    fn begin(&mut self, at: usize) {
        let (now, terms) = (self.state.host_clock, self.lease_terms());
        let points_kept = self.broken(Mutation::ResumePointsKept);
        let forgets_survivors = self.broken(Mutation::SurvivorsForgottenWhenPlanned);
        let counted_anew = self.broken(Mutation::LeaseCountedAnew);
        let all_unrenewed = self.broken(Mutation::ResumedIsUnrenewed);
        let no_grace = self.broken(Mutation::NoGrace);
        let State { hosts, journal, .. } = &mut self.state;
        let Host { process, start, read, .. } = hosts[at].clone();
        let Some(mut own) = read.journal else { return };
        let begun = read.clock.unwrap_or(now);
        let points = own.resume_points.take();
        // Its numbers were right when it was written: the sessions of a crash since then are not in it.
        if points_kept {
            own.resume_points.clone_from(&points);
        }
        let planned = points.is_some();
        let mut host = match points {
            Some(left) => Host { process, planned, start, ..*left },
            None => {
                own.incarnation += 1;
                Host { incarnation: own.incarnation, ..Host::new(process, start) }
            }
        };
        if host.registration == 0 {
            own.last_registration += 1;
            host.registration = own.last_registration;
        }
        let mut survivors = Vec::new();
        for durable in &mut own.sessions {
            let goes_on = host.session(durable.id).is_some();
            if !goes_on || all_unrenewed {
                durable.unrenewed_since.get_or_insert(begun);
            }
            if !(goes_on || no_grace || planned && forgets_survivors) {
                let since = durable.unrenewed_since.filter(|_| !counted_anew).unwrap_or(begun);
                let lease = HostLease::new(terms, moment(since));
                let severed =
                    session(durable, Phase::Severed, lease, Subscription::Subscribed(ReadAt::BEFORE_ALL));
                survivors.push(Session { survivor: true, ..severed });
            }
        }
        host.sessions.extend(survivors);
        hosts[at] = host;
        if journal.owner == process {
            (own.owner, own.next_session) = (process, journal.next_session);
            *journal = *own;
        }
    }

    /// SIGTERM, when the rounds are drained or the drain time-out has passed: the resume points are the journal's
    /// last record. An address space with a round that is not complete is left out, and so are its sessions, which
    /// are all there are; and survivors always are (`server/src/handover.rs::record`).
    pub(crate) fn stop_as_planned(&mut self, process: u8) -> Option<()> {
        let at = self.acts(process)?;
        if !self.owns_journal(at) {
            return None;
        }
        let hands_over_survivors = self.broken(Mutation::SurvivorHandedOver);
        let mut left = self.state.hosts.remove(at);
        let Host { incarnation, process, .. } = left;
        if left.rounds.iter().any(|open| !open.round.0.is_complete()) {
            left = Host { incarnation, ..Host::new(process, &[]) };
        }
        left.rounds
            .retain(|open| self.state.source.events[usize::from(open.event)].state != CallState::Released);
        left.tickets.clear();
        left.sessions
            .retain(|session| !session.phase.is_over() && (!session.survivor || hands_over_survivors));
        for session in &mut left.sessions {
            session.phase = Phase::Severed;
            session.survivor = false;
            session.up.clear();
            session.end_waits();
        }
        self.state.journal.resume_points = Some(Box::new(left));
        Some(())
    }
}

fn session(durable: &Durable, phase: Phase, lease: HostLease, subscription: Subscription) -> Session {
    let Durable { id, device, run, enforces, .. } = *durable;
    Session {
        id,
        device,
        run,
        enforces,
        phase,
        lease,
        subscription,
        pending: Vec::new(),
        sent: Vec::new(),
        last_sent: 0,
        up: Vec::new(),
        ended: None,
        told: false,
        survivor: false,
        resumed: false,
        fault: None,
        reader: Task::Works,
    }
}
