//! What there is: clocks, host agents, their journal, the source, and devices with their streams.

use shootdown_core::ack::AckTracker;
use shootdown_core::lease::{DeviceLease, HostLease};
use shootdown_core::session::Phase;
use shootdown_core::{Ack, AddrRange, NoticeNumber, Seq};

use crate::config::Config;
pub(crate) use crate::ranges::{Told, Translation, range_of};
use crate::restart::{Read, Step};
use crate::round::OpenRound;
use crate::sequences::ReadAt;
pub(crate) use crate::ticks::{T_ACK, T_FENCE, moment, terms};
use crate::waits::{Task, WaitingFault};

/// A page of the one address space.
pub(crate) type Page = u8;
/// A set of pages, or of events.
pub(crate) type Set = u8;
/// The frame that a page has had since its last invalidation. Frame `v` of a page is released once, so
/// whoever uses it after that uses a page of somebody else.
pub(crate) type Frame = u8;

/// The number of a notice.
pub(crate) fn number(n: u8) -> NoticeNumber {
    NoticeNumber::new(u64::from(n)).expect("notices count from 1")
}

/// The members of a set, lowest first.
pub(crate) fn members(set: Set) -> impl Iterator<Item = u8> {
    (0..8).filter(move |member| set >> member & 1 == 1)
}

/// The whole world.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct State {
    pub(crate) host_clock: u8,
    pub(crate) device_clock: u8,
    /// Processes of the host agent that exist, oldest first. More than one: a takeover.
    pub(crate) hosts: Vec<Host>,
    pub(crate) journal: Journal,
    pub(crate) source: Source,
    pub(crate) devices: Vec<Device>,
    pub(crate) spent: Spent,
    pub(crate) ghost: Ghost,
}

/// How often the rare things have happened; the configuration says how often they may.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub(crate) struct Spent {
    pub(crate) disconnects: u8,
    pub(crate) losses: u8,
    pub(crate) device_crashes: u8,
    pub(crate) host_crashes: u8,
    pub(crate) planned_restarts: u8,
    pub(crate) pauses: u8,
    pub(crate) deadlines: u8,
}

/// What no rule reads: facts that a property needs and that the state itself forgets.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub(crate) struct Ghost {
    /// A page was granted in a bracket over it, or on a ticket that was older than the bracket.
    pub(crate) granted_in_window: bool,
    /// A page was released or granted while a device could still live on the lease of an earlier
    /// incarnation.
    pub(crate) acted_in_grace: bool,
}

/// One process of the host agent.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Host {
    pub(crate) process: u8,
    /// 0: it has not begun.
    pub(crate) incarnation: u8,
    /// Which registration of the address space it serves: one of its own, or that which a planned restart left.
    pub(crate) registration: u8,
    pub(crate) running: Running,
    /// What is left of its start, before it serves anybody.
    pub(crate) start: &'static [Step],
    /// What it read and has not acted on.
    pub(crate) read: Read,
    /// It took over the resume points of a planned restart.
    pub(crate) planned: bool,
    pub(crate) sessions: Vec<Session>,
    pub(crate) rounds: Vec<OpenRound>,
    /// Events whose bracket is open; [`REFUSED`] is one that the source was refused.
    pub(crate) brackets: Vec<u8>,
    pub(crate) tickets: Vec<Ticket>,
    /// The sequence of its last event.
    pub(crate) last_seq: Option<Seq>,
    /// How many events it has opened: their true order. No rule reads it.
    pub(crate) opened: u8,
}

/// An event that there is not: the source was told WOULD_BLOCK.
pub(crate) const REFUSED: u8 = u8::MAX;

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Running {
    Yes,
    /// SIGSTOP.
    Paused,
}

/// `core/src/session.rs` and, in `server/`, the session's task. The phase and the lease are the real ones.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Session {
    pub(crate) id: u8,
    pub(crate) device: usize,
    pub(crate) run: usize,
    pub(crate) enforces: bool,
    pub(crate) phase: Phase,
    pub(crate) lease: HostLease,
    pub(crate) subscription: Subscription,
    /// Merged, not numbered.
    pub(crate) pending: Vec<Pending>,
    /// Sent, not acked: what a resume sends again.
    pub(crate) sent: Vec<Sent>,
    pub(crate) last_sent: u8,
    /// On the way to the host agent.
    pub(crate) up: Vec<Up>,
    /// How it ended.
    pub(crate) ended: Option<Ended>,
    /// The rounds have heard of its end.
    pub(crate) told: bool,
    /// It is of a run that crashed: known from the journal only.
    pub(crate) survivor: bool,
    pub(crate) resumed: bool,
    /// A fault that is being served.
    pub(crate) fault: Option<WaitingFault>,
    /// The task that reads its stream.
    pub(crate) reader: Task,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Ended {
    Left,
    LeaseExpired,
    FencerConfirmed,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Subscription {
    None,
    /// It read this sequence and is not published: no state of the valid model.
    Unpublished(ReadAt),
    /// In the list, has not read the sequence.
    Published,
    /// In the list, and events above this sequence are told to it.
    Subscribed(ReadAt),
    /// Out of the list, rounds may still count on it.
    Leaving,
    Unsubscribed,
}

impl Subscription {
    pub(crate) const fn is_published(self) -> bool {
        matches!(self, Self::Published | Self::Subscribed(_))
    }
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Pending {
    pub(crate) range: AddrRange,
    pub(crate) seq: Seq,
    /// The events whose rounds wait for it.
    pub(crate) events: Set,
    /// Since when it waits to be sent.
    pub(crate) since: u8,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Sent {
    pub(crate) n: u8,
    pub(crate) range: AddrRange,
    pub(crate) seq: Seq,
    pub(crate) events: Set,
    /// When it was first sent.
    pub(crate) at: u8,
}

/// Device to host agent.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Up {
    Ack(Ack),
    /// Sent at this tick of the device's clock.
    Heartbeat(u8),
}

/// Host agent to device.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Down {
    Notice {
        n: u8,
        told: Told,
    },
    Grant(Translation),
    /// The lease is renewed, on the heartbeat that was sent at this tick of the device's clock.
    Lease(u8),
}

/// `core/src/gate.rs`, one ticket of it.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Ticket {
    pub(crate) session: u8,
    /// What the source said.
    pub(crate) translation: Translation,
    pub(crate) spoiled: bool,
}

/// What survives a run of the host agent.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Journal {
    /// The process whose file it is.
    pub(crate) owner: u8,
    pub(crate) incarnation: u8,
    /// Registrations of the address space so far. None is used twice.
    pub(crate) last_registration: u8,
    pub(crate) next_session: u8,
    /// Sessions that may hold leases.
    pub(crate) sessions: Vec<Durable>,
    /// The last record of a planned restart.
    pub(crate) resume_points: Option<Box<Host>>,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Durable {
    pub(crate) id: u8,
    pub(crate) device: usize,
    pub(crate) run: usize,
    pub(crate) enforces: bool,
    /// The tick of the host's clock at which the first run began that could not renew its lease.
    pub(crate) unrenewed_since: Option<u8>,
}

/// Whose memory it is: a process of its own, which outlives the host agent.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Source {
    /// Its last registration.
    pub(crate) registered: u8,
    pub(crate) mapped: Vec<Frame>,
    /// For each page its frames that were released.
    pub(crate) released: Vec<Set>,
    pub(crate) events: Vec<Called>,
}

/// A call of the source.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Called {
    pub(crate) page: Page,
    pub(crate) frame: Frame,
    /// The registration that it belongs to.
    pub(crate) registration: u8,
    pub(crate) state: CallState,
    /// The registration for which the answer "quiesced" is on its way.
    pub(crate) answer: Option<u8>,
    pub(crate) bracket_ended: bool,
    /// It was answered NOT_QUIESCED.
    pub(crate) was_parked: bool,
    /// A device used the page and has not said so: the truth about the young bit.
    pub(crate) used: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum CallState {
    Waiting,
    /// NOT_QUIESCED: its page is in quarantine.
    Parked,
    Released,
}

/// A device: the runs of its agent, the last of which is alive.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Device {
    pub(crate) runs: Vec<Run>,
}

/// One incarnation of a device agent, and what its hardware holds. A run that crashed says nothing any
/// more, and its hardware goes on until its lease ends.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Run {
    /// The highest host incarnation it has seen.
    pub(crate) highest: u8,
    pub(crate) session: Option<Joined>,
    pub(crate) link: Option<Link>,
    /// What its TLBs hold.
    pub(crate) tlb: Vec<Option<Held>>,
    /// Notices that arrived and whose flush is not complete, and the pages that each takes out.
    pub(crate) flushing: Vec<(u8, Set)>,
    /// The task that flushes.
    pub(crate) flusher: Task,
    /// Notices that truly arrived: what the books are held against.
    pub(crate) arrived: Set,
    /// Pages used since the last report.
    pub(crate) used: Set,
    /// An access to a frame by way of the host agent that has begun.
    pub(crate) access: Option<(Page, Frame)>,
    /// A fencer took the way to the memory away.
    pub(crate) cut: bool,
    /// It must flush everything before it connects.
    pub(crate) must_flush: bool,
}

/// The device's side of a session. Lease and books are the real ones.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Joined {
    pub(crate) incarnation: u8,
    /// The registration by which it may hold pages. No rule reads it.
    pub(crate) registration: u8,
    pub(crate) id: u8,
    pub(crate) lease: DeviceLease,
    pub(crate) books: AckTracker,
}

/// A stream as the device sees it: to which process, and what is on its way.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Link {
    pub(crate) process: u8,
    pub(crate) down: Vec<Down>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Held {
    pub(crate) frame: Frame,
    pub(crate) session: u8,
}

impl State {
    /// One host agent, devices that are not connected, every page with its first frame.
    pub(crate) fn first(config: &Config) -> Self {
        let run = Run::new(config);
        Self {
            host_clock: 0,
            device_clock: 0,
            hosts: vec![Host {
                incarnation: 1,
                registration: 1,
                last_seq: config.began_after,
                ..Host::new(1, &[])
            }],
            journal: Journal {
                owner: 1,
                incarnation: 1,
                last_registration: 1,
                next_session: 1,
                sessions: Vec::new(),
                resume_points: None,
            },
            source: Source {
                registered: 1,
                mapped: vec![0; usize::from(config.pages)],
                released: vec![0; usize::from(config.pages)],
                events: Vec::new(),
            },
            devices: vec![Device { runs: vec![run] }; config.devices.len()],
            spent: Spent::default(),
            ghost: Ghost::default(),
        }
    }

    /// Every run of every device: the device, the place of the run, the run.
    pub(crate) fn runs(&self) -> impl Iterator<Item = (usize, usize, &Run)> {
        let runs_of = |(at, device): (usize, &'_ Device)| (at, device.runs.len());
        self.devices
            .iter()
            .enumerate()
            .map(runs_of)
            .flat_map(|(device, count)| (0..count).map(move |run| (device, run)))
            .map(|(device, run)| (device, run, &self.devices[device].runs[run]))
    }

    pub(crate) fn is_released(&self, page: Page, frame: Frame) -> bool {
        self.source.released[usize::from(page)] >> frame & 1 == 1
    }

    /// Whether the hardware of this run can reach memory by the leave of its session: the truth that
    /// leases and fencers are about.
    pub(crate) fn can_use(&self, config: &Config, device: usize, run: &Run) -> bool {
        let lease_allows = |joined: &Joined| {
            !config.devices[device].enforces || joined.lease.is_valid(moment(self.device_clock))
        };
        !run.cut && run.session.as_ref().is_some_and(lease_allows)
    }

    pub(crate) fn host(&self, process: u8) -> Option<&Host> {
        self.hosts.iter().find(|host| host.process == process)
    }
}

impl Host {
    /// A process that has all of its start before it, but for what is not in `start`.
    pub(crate) fn new(process: u8, start: &'static [Step]) -> Self {
        Self {
            process,
            incarnation: 0,
            registration: 0,
            running: Running::Yes,
            start,
            read: Read::default(),
            planned: false,
            sessions: Vec::new(),
            rounds: Vec::new(),
            brackets: Vec::new(),
            tickets: Vec::new(),
            last_seq: None,
            opened: 0,
        }
    }

    /// Whether it runs, and has begun to serve.
    pub(crate) fn serves(&self) -> bool {
        self.running == Running::Yes && self.start.is_empty()
    }

    pub(crate) fn session(&self, id: u8) -> Option<&Session> {
        self.sessions.iter().find(|session| session.id == id)
    }

    pub(crate) fn session_mut(&mut self, id: u8) -> Option<&mut Session> {
        self.sessions.iter_mut().find(|session| session.id == id)
    }

    /// Whether a session of a run that crashed is not accounted for.
    pub(crate) fn in_grace(&self) -> bool {
        self.sessions.iter().any(|session| session.survivor && !session.told)
    }
}

impl Session {
    /// Whether T_ack is over since its oldest notice that is not acked was first sent, or since one waits
    /// for a stream that is not there: `core/src/session.rs::is_overdue`.
    pub(crate) fn is_overdue(&self, now: u8) -> bool {
        let undrained = self.pending.iter().map(|draft| draft.since).filter(|_| !self.phase.has_stream());
        let since = self.sent.iter().map(|sent| sent.at).chain(undrained).min();
        since.is_some_and(|since| since + T_ACK <= now)
    }

    /// When the notice that this event's round waits for was first sent; `None`: it was not.
    pub(crate) fn sent_at(&self, event: u8) -> Option<u8> {
        self.sent.iter().find(|sent| sent.events >> event & 1 == 1).map(|sent| sent.at)
    }
}

impl Run {
    pub(crate) fn new(config: &Config) -> Self {
        Self {
            highest: 0,
            session: None,
            link: None,
            tlb: vec![None; usize::from(config.pages)],
            flushing: Vec::new(),
            flusher: Task::Works,
            arrived: 0,
            used: 0,
            access: None,
            cut: false,
            must_flush: false,
        }
    }

    pub(crate) fn session_id(&self) -> Option<u8> {
        self.session.as_ref().map(|joined| joined.id)
    }
}
