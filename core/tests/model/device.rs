//! What a device does: `core/src/ack.rs`, `core/src/lease.rs`, and the SDK's side of a session and of a resume.

use shootdown_core::ack::AckTracker;
use shootdown_core::lease::DeviceLease;
use shootdown_core::session::Phase;
use shootdown_core::{Ack, FlushReport};

use crate::mutations::Mutation;
use crate::state::{
    Down, Held, Joined, Link, Page, Run, Set, Subscription, Told, Up, members, moment, number, range_of,
    terms,
};
use crate::waits::Task;
use crate::world::World;

/// Whether the Welcome reaches the device.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Welcome {
    Arrives,
    IsLost,
    /// The host agent crashes when the session is durable.
    IsNotSent,
}

impl World<'_> {
    /// The run of this device that is alive.
    pub(crate) fn run(&self, device: usize) -> &Run {
        self.state.devices[device].runs.last().expect("a device has a run")
    }

    pub(crate) fn run_mut(&mut self, device: usize) -> &mut Run {
        self.state.devices[device].runs.last_mut().expect("a device has a run")
    }

    fn lease_is_valid(&self, device: usize) -> bool {
        let now = moment(self.state.device_clock);
        let joined = self.run(device).session.as_ref();
        joined.is_some_and(|joined| !self.config.devices[device].enforces || joined.lease.is_valid(now))
    }

    /// Hello and Welcome.
    pub(crate) fn connect(&mut self, device: usize, process: u8, welcome: Welcome) -> Option<()> {
        let at = self.acts(process)?;
        let run = self.run(device);
        // It looks when the record is written: a successor finds the session, or this finds the successor.
        let current = self.owns_journal(at) || self.broken(Mutation::LookBeforeRecord);
        if run.link.is_some() || run.must_flush || !current {
            return None;
        }
        // A host agent that has a successor which this device knows.
        if self.state.hosts[at].incarnation < run.highest {
            return None;
        }
        let before = run.clone();
        match run.session.clone() {
            Some(_) if welcome == Welcome::IsNotSent => return None,
            Some(joined) => self.reconnect(at, device, &joined)?,
            None => self.join(at, device)?,
        }
        let recorded = !self.broken(Mutation::WelcomeBeforeRecord);
        match welcome {
            Welcome::Arrives => {}
            Welcome::IsLost => *self.run_mut(device) = before,
            Welcome::IsNotSent => {
                self.state.hosts.remove(at);
                if recorded {
                    *self.run_mut(device) = before;
                } else {
                    self.state.journal.sessions.pop();
                }
            }
        }
        Some(())
    }

    /// "I hold nothing": sessions of exactly this run are over, those of other runs are waited for.
    fn join(&mut self, at: usize, device: usize) -> Option<()> {
        let this_run = self.state.devices[device].runs.len() - 1;
        let any_run = self.broken(Mutation::AnyRunEndsSurvivor);
        for index in 0..self.state.hosts[at].sessions.len() {
            let session = &self.state.hosts[at].sessions[index];
            if session.device != device || session.phase.is_over() {
                continue;
            }
            if session.run == this_run || any_run && session.survivor {
                self.leave(at, index);
            } else if session.phase.has_stream() {
                let id = session.id;
                self.sever(at, id);
            }
        }
        self.begin_session(at, device, this_run)
    }

    fn begin_session(&mut self, at: usize, device: usize, this_run: usize) -> Option<()> {
        let id = self.new_session(at, device, this_run)?;
        let host = &self.state.hosts[at];
        let (process, incarnation, registration) = (host.process, host.incarnation, host.registration);
        let mut lease = DeviceLease::new(terms().drift_ppm, terms().margin);
        lease.on_granted(moment(self.state.device_clock), terms().duration);
        let run = self.run_mut(device);
        run.session = Some(Joined { incarnation, registration, id, lease, books: AckTracker::new() });
        run.link = Some(Link { process, down: Vec::new() });
        run.flushing.clear();
        run.arrived = 0;
        run.cut = false;
        run.highest = run.highest.max(incarnation);
        Some(())
    }

    /// A resume: the same session goes on, or the device is told to flush everything.
    fn reconnect(&mut self, at: usize, device: usize, joined: &Joined) -> Option<()> {
        if !self.lease_is_valid(device) {
            return None;
        }
        let now = self.state.host_clock;
        let this_run = self.state.devices[device].runs.len() - 1;
        let received = joined.books.last_received().map_or(0, |last| last.get() as u8);
        let any_incarnation = self.broken(Mutation::AnyIncarnationResumes);
        let survivors_do = self.broken(Mutation::SurvivorResumes);
        let host = &self.state.hosts[at];
        let (process, incarnation) = (host.process, host.incarnation);
        let goes_on = host.session(joined.id).is_some_and(|session| {
            let retained = |n: u8| session.sent.iter().any(|sent| sent.n == n);
            let fits = received <= session.last_sent && (received + 1..=session.last_sent).all(retained);
            !session.phase.is_over()
                && session.run == this_run
                && !session.lease.is_expired(moment(now))
                && (joined.incarnation == incarnation && fits && (!session.survivor || survivors_do)
                    || any_incarnation)
        });
        if !goes_on {
            if self.broken(Mutation::ResumeSkipsFlush) {
                return self.begin_session(at, device, this_run);
            }
            self.run_mut(device).must_flush = true;
            return Some(());
        }
        let (sends_nothing, renews) =
            (self.broken(Mutation::ResumeSendsNothingAgain), self.broken(Mutation::ResumeRenewsLease));
        // The old stream is cut at once.
        let session = self.state.hosts[at].session_mut(joined.id)?;
        session.up.clear();
        session.end_waits();
        session.resumed = true;
        session.phase = Phase::Live;
        if session.is_overdue(now) {
            session.phase = Phase::Suspect;
        }
        if renews {
            session.lease.grant(moment(now));
        }
        let again: Vec<Down> =
            session.sent.iter().map(|sent| Down::Notice { n: sent.n, told: Told::of(sent.range) }).collect();
        self.state.hosts[at].tickets.retain(|ticket| ticket.session != joined.id);
        let device_now = moment(self.state.device_clock);
        let run = self.run_mut(device);
        let down = if sends_nothing { Vec::new() } else { again };
        run.link = Some(Link { process, down });
        run.flusher = Task::Works;
        run.highest = run.highest.max(incarnation);
        if let Some(joined) = run.session.as_mut().filter(|_| renews) {
            joined.lease.on_granted(device_now, terms().duration);
        }
        self.pump(at, joined.id);
        Some(())
    }

    /// The oldest message of the host agent is read.
    pub(crate) fn deliver_down(&mut self, device: usize) -> Option<()> {
        let run = self.run_mut(device);
        let link = run.link.as_mut().filter(|link| !link.down.is_empty())?;
        match link.down.remove(0) {
            Down::Notice { n, told } => {
                let pages = self.taken_out(device, told);
                self.on_notice(device, n, pages);
            }
            Down::Grant(translation) => {
                let session = run.session_id()?;
                for (page, frame) in translation.pages() {
                    run.tlb[usize::from(page)] = Some(Held { frame, session });
                }
            }
            Down::Lease(sent) => {
                let joined = run.session.as_mut()?;
                joined.lease.on_granted(moment(sent), terms().duration);
            }
        }
        Some(())
    }

    fn on_notice(&mut self, device: usize, n: u8, pages: Set) {
        let gap_taken = self.broken(Mutation::GapTaken);
        let (acks_first, young_told) =
            (self.broken(Mutation::AckBeforeFlush), !self.broken(Mutation::SecondAckWithoutYoung));
        let run = self.run_mut(device);
        let Some(joined) = run.session.as_mut() else { return };
        if Some(number(n)) <= joined.books.last_received() {
            // Sent again after a resume. One that is being flushed will be acked; one that was may have been
            // acked in vain, and with it the young bits went.
            if !run.flushing.iter().any(|(flushing, _)| *flushing == n) {
                let young = if young_told { members(pages).map(range_of).collect() } else { Vec::new() };
                let report = FlushReport { notice: number(n), young, dirty: Vec::new(), timing: None };
                let ack = Ack { through: None, selective: vec![number(n)], reports: vec![report] };
                self.send_up(device, Up::Ack(ack));
            }
            return;
        }
        if joined.books.on_notice(number(n)).is_err() {
            if !gap_taken {
                run.link = None;
                run.must_flush = true;
                return;
            }
            let first = joined.books.last_received().map_or(1, |last| last.get() as u8 + 1);
            for skipped in first..n {
                joined.books.on_notice(number(skipped)).expect("the next one");
                joined.books.on_flushed(None, number(skipped));
            }
            joined.books.on_notice(number(n)).expect("the next one");
        }
        run.arrived |= 1 << n;
        run.flushing.push((n, pages));
        if acks_first {
            joined.books.on_flushed(None, number(n));
            self.send_ack(device);
        }
    }

    /// A flush is complete in every level of the TLB, and nothing that went through it is going on.
    pub(crate) fn flush_done(&mut self, device: usize, index: usize) -> Option<()> {
        let acked_first = self.broken(Mutation::AckBeforeFlush);
        let reports = self.config.young;
        let run = self.run_mut(device);
        if index >= run.flushing.len() || run.flusher != Task::Works {
            return None;
        }
        let (n, pages) = run.flushing[index];
        if run.access.is_some_and(|(page, _)| pages >> page & 1 == 1) {
            return None;
        }
        run.flushing.remove(index);
        for page in members(pages) {
            run.tlb[usize::from(page)] = None;
        }
        let young: Vec<_> = members(run.used & pages).map(range_of).collect();
        run.used &= !pages;
        let report =
            reports.then(|| FlushReport { notice: number(n), young, dirty: Vec::new(), timing: None });
        let joined = run.session.as_mut()?;
        if !acked_first {
            joined.books.on_flushed(report, number(n));
            self.send_ack(device);
        }
        Some(())
    }

    /// What was flushed and not acked, if the stream is up.
    fn send_ack(&mut self, device: usize) {
        let run = self.run_mut(device);
        if run.link.is_none() {
            return;
        }
        let ack = run.session.as_mut().and_then(|joined| joined.books.take());
        if let Some(ack) = ack {
            self.send_up(device, Up::Ack(ack));
        }
    }

    /// Into the void when the host agent has left its end.
    fn send_up(&mut self, device: usize, message: Up) {
        let run = self.run(device);
        let (Some(link), Some(id)) = (run.link.as_ref(), run.session_id()) else { return };
        let process = link.process;
        let host = self.state.hosts.iter_mut().find(|host| host.process == process);
        let session = host.and_then(|host| host.session_mut(id));
        if let Some(session) = session.filter(|session| session.phase.has_stream()) {
            session.up.push(message);
        }
    }

    /// One at a time, and only if it brings a longer lease.
    pub(crate) fn heartbeat(&mut self, device: usize) -> Option<()> {
        let now = self.state.device_clock;
        let run = self.run(device);
        let (link, joined) = (run.link.as_ref()?, run.session.as_ref()?);
        let host = self.state.host(link.process)?;
        let session = host.session(joined.id)?;
        let brings = joined.lease.valid_until() < Some(moment(now) + terms().device_duration());
        let outstanding = link.down.iter().any(|message| matches!(message, Down::Lease(_)))
            || session.up.iter().any(|message| matches!(message, Up::Heartbeat(_)));
        if !brings || outstanding || !session.phase.has_stream() || !self.lease_is_valid(device) {
            return None;
        }
        self.send_up(device, Up::Heartbeat(now));
        Some(())
    }

    /// Its end of the stream is lost, with what was on its way to it.
    pub(crate) fn disconnect(&mut self, device: usize) {
        let run = self.run_mut(device);
        run.link = None;
        run.flusher = Task::Works;
    }

    /// The session is given up: every level of the TLB is flushed, every use is over.
    pub(crate) fn close(&mut self, device: usize) -> Option<()> {
        let run = self.run(device);
        let gives_up = run.must_flush || run.link.is_none() || !self.lease_is_valid(device);
        if run.session.is_none() || !gives_up || run.access.is_some() {
            return None;
        }
        let empty = Run { highest: run.highest, ..Run::new(self.config) };
        *self.run_mut(device) = empty;
        Some(())
    }

    /// The agent dies; its hardware does not.
    pub(crate) fn crash(&mut self, device: usize) -> Option<()> {
        let run = self.run_mut(device);
        run.session.as_ref()?;
        run.link = None;
        run.flushing.clear();
        let next = Run::new(self.config);
        self.state.devices[device].runs.push(next);
        Some(())
    }

    /// The device uses a page.
    pub(crate) fn use_page(&mut self, device: usize, page: Page) -> Option<()> {
        let run = self.run(device);
        let withdrawn = run.flushing.iter().any(|(_, pages)| pages >> page & 1 == 1);
        run.tlb[usize::from(page)]?;
        if !self.state.can_use(self.config, device, run) || withdrawn {
            return None;
        }
        self.run_mut(device).used |= 1 << page;
        for call in
            self.state.source.events.iter_mut().filter(|call| call.page == page && !call.bracket_ended)
        {
            call.used = true;
        }
        Some(())
    }

    /// PageService: an access begins, if the session is not over, and takes its time.
    pub(crate) fn begin_access(&mut self, device: usize, page: Page) -> Option<()> {
        let run = self.run(device);
        let (held, id) = (run.tlb[usize::from(page)]?, run.session_id()?);
        let admitted =
            self.state.hosts.iter().any(|host| {
                host.serves() && host.session(id).is_some_and(|session| !session.phase.is_over())
            });
        if run.access.is_some() || !admitted || !self.state.can_use(self.config, device, run) {
            return None;
        }
        self.run_mut(device).access = Some((page, held.frame));
        Some(())
    }

    /// The device lets go of everything before it leaves an address space; grants that are on their way
    /// find no subscription.
    pub(crate) fn unsubscribe(&mut self, device: usize) -> Option<()> {
        let run = self.run(device);
        let (link, id) = (run.link.as_ref()?, run.session_id()?);
        let at = self.acts(link.process)?;
        let acks_wait = self.broken(Mutation::AcksWaitForGracePeriod);
        let session = self.state.hosts[at].session_mut(id)?;
        if !matches!(session.subscription, Subscription::Subscribed(_)) {
            return None;
        }
        session.subscription = Subscription::Leaving;
        session.end_waits();
        if acks_wait {
            session.reader = Task::WaitsForGracePeriod;
        }
        self.state.hosts[at].tickets.retain(|ticket| ticket.session != id);
        let run = self.run_mut(device);
        run.tlb.fill(None);
        run.flusher = Task::Works;
        if let Some(link) = &mut run.link {
            link.down.retain(|message| !matches!(message, Down::Grant(..)));
        }
        Some(())
    }
}
