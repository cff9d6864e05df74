//! What outlives a run of the host agent: `server/src/journal/`, and how the next run begins.

use shootdown_core::lease::HostLease;
use shootdown_core::session::Phase;

use crate::mutations::Mutation;
use crate::state::{CallState, Durable, Host, Journal, Running, Session, Subscription, moment};
use crate::world::World;

impl World<'_> {
    /// A new session, durable before its Welcome.
    pub(crate) fn new_session(&mut self, at: usize, device: usize, run: usize) -> Option<u8> {
        if self.state.journal.next_session > self.config.sessions {
            return None;
        }
        let enforces = self.config.devices[device].enforces;
        let id = self.state.journal.next_session;
        let seq = self.state.hosts[at].seq;
        let subscription =
            if self.config.subscriptions { Subscription::None } else { Subscription::Subscribed(seq) };
        let lease = HostLease::new(self.lease_terms(), moment(self.state.host_clock));
        let Journal { next_session, sessions, .. } = &mut self.state.journal;
        *next_session += 1;
        let durable = Durable { id, device, run, enforces };
        let session = session(&durable, Phase::Live, lease, subscription);
        sessions.push(durable);
        self.state.hosts[at].sessions.push(session);
        Some(id)
    }

    /// `server/src/journal/`: what the last run left decides how this one begins.
    pub(crate) fn start_host(&mut self) {
        let points_kept = self.broken(Mutation::ResumePointsKept);
        let journal = &mut self.state.journal;
        journal.owner += 1;
        let process = journal.owner;
        if let Some(left) = journal.resume_points.clone() {
            let mut host = Host { process, planned: true, ..*left };
            // Its numbers were right when it was written: the sessions of a crash since then are not in it.
            if !points_kept {
                journal.resume_points = None;
            }
            host.running = Running::Yes;
            self.state.hosts.push(host);
            return;
        }
        journal.incarnation += 1;
        let mut host = Host::new(process, journal.incarnation);
        if !self.broken(Mutation::NoGrace) {
            let lease = HostLease::new(self.lease_terms(), moment(self.state.host_clock));
            let survivors = self.state.journal.sessions.iter();
            host.sessions = survivors
                .map(|durable| Session {
                    survivor: true,
                    ..session(durable, Phase::Severed, lease, Subscription::Subscribed(0))
                })
                .collect();
        }
        self.state.hosts.push(host);
    }

    /// SIGTERM, when the rounds are drained: the resume points are the journal's last record.
    pub(crate) fn stop_as_planned(&mut self, process: u8) -> Option<()> {
        let at = self.acts(process)?;
        let drained = self.state.hosts[at].rounds.iter().all(|open| open.round.0.is_complete())
            && self.state.source.events.iter().all(|call| call.state == CallState::Released);
        if !drained || self.state.hosts[at].in_grace() || !self.owns_journal(at) {
            return None;
        }
        let mut left = self.state.hosts.remove(at);
        left.rounds.clear();
        left.tickets.clear();
        left.sessions.retain(|session| !session.phase.is_over());
        for session in &mut left.sessions {
            session.phase = Phase::Severed;
            session.up.clear();
        }
        self.state.journal.resume_points = Some(Box::new(left));
        Some(())
    }
}

fn session(durable: &Durable, phase: Phase, lease: HostLease, subscription: Subscription) -> Session {
    let Durable { id, device, run, enforces } = *durable;
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
    }
}
