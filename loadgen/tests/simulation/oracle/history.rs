//! A trace, put together: what came of each call, session, flush and use.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{Bounds, Heard, Round};
use crate::observer::NUMBERS_OF_A_RUN;
use crate::trace::{CutOffBy, Event, Frame, Life, Op, Pages, Scope, Span, Target, Told, What};

/// All that happened.
#[derive(Debug)]
pub struct History {
    pub bounds: Bounds,
    pub rounds: BTreeMap<Op, Round>,
    pub lives: BTreeMap<Life, LifeOf>,
    pub flushes: BTreeMap<Span, Flush>,
    pub uses: BTreeMap<Span, Use>,
    pub faults: BTreeMap<Span, Fault>,
    pub installs: Vec<Install>,
    pub reads: Vec<Read>,
    /// When each allocation of a frame was freed, and on the strength of what.
    pub freed: BTreeMap<Frame, (Duration, Op)>,
    /// When a run of a device agent was cut off.
    pub cut_off: BTreeMap<(usize, u64), Duration>,
    pub left: Option<(Duration, What)>,
    /// The incarnation of the host agent's last run.
    pub host: u64,
    pub end: Duration,
    /// When that run began.
    pub host_began: Duration,
    /// When a run came to its planned end.
    pub handed_over: Vec<Duration>,
    /// Rounds as the host agent opened them: when, in which run, address space, and sequence.
    pub seen: Vec<(Duration, u64, u64, u64)>,
    /// When something was going wrong in the world; until the end, what did not end.
    pub going_wrong: Vec<Trouble>,
    /// When each address space was last registered over the wire.
    pub registered: BTreeMap<u64, Duration>,
}

/// A device's session.
#[derive(Debug, Default)]
pub struct LifeOf {
    pub device: usize,
    pub start: u64,
    /// Who must cut its device off, if it does not stop when its lease is over.
    pub cut_off_by: Option<CutOffBy>,
    pub session: Option<u64>,
    pub opened: Option<Duration>,
    pub resumed: Vec<Duration>,
    /// The incarnation of the host agent that welcomed it.
    pub host: u64,
    pub leases: Vec<(Duration, Option<Duration>)>,
    /// By address space: when the device began to ask for a subscription, and when one had ended.
    pub subscribing: Vec<(Duration, u64)>,
    /// When it had one, and the newest event by then.
    pub subscribed: Vec<(Duration, u64, Option<u64>)>,
    pub unsubscribed: Vec<(Duration, u64)>,
}

#[derive(Debug)]
pub struct Flush {
    pub life: Life,
    pub scope: Scope,
    pub told: Option<Told>,
    pub began: Duration,
    pub ended: Option<Duration>,
}

/// Something that goes wrong in the world.
#[derive(Debug)]
pub struct Trouble {
    pub what: String,
    pub began: Duration,
    pub ended: Duration,
}

/// A device asks for pages.
#[derive(Debug)]
pub struct Fault {
    pub life: Life,
    pub pages: Pages,
    pub began: Duration,
    pub ended: Option<Duration>,
}

#[derive(Debug)]
pub struct Use {
    pub life: Life,
    pub space: u64,
    pub page: u64,
    pub frame: Frame,
    pub began: Duration,
    /// Of a use that is not over: the end of the trace.
    pub ended: Duration,
}

#[derive(Debug)]
pub struct Install {
    pub at: Duration,
    pub life: Life,
    pub space: u64,
    pub page: u64,
    pub frame: Frame,
}

/// What the host agent served.
#[derive(Debug)]
pub struct Read {
    /// When it came.
    pub at: Duration,
    pub life: Life,
    pub frame: Frame,
    pub times_freed: u64,
}

impl History {
    pub fn of(events: &[Event], bounds: Bounds) -> Self {
        let mut history = Self {
            bounds,
            rounds: BTreeMap::new(),
            lives: BTreeMap::new(),
            flushes: BTreeMap::new(),
            uses: BTreeMap::new(),
            faults: BTreeMap::new(),
            going_wrong: Vec::new(),
            installs: Vec::new(),
            reads: Vec::new(),
            freed: BTreeMap::new(),
            cut_off: BTreeMap::new(),
            left: None,
            host: 0,
            end: events.iter().map(|event| event.at).max().unwrap_or_default(),
            host_began: Duration::ZERO,
            handed_over: Vec::new(),
            seen: Vec::new(),
            registered: BTreeMap::new(),
        };
        events.iter().for_each(|event| history.add(event));
        history
    }

    fn add(&mut self, Event { at, what }: &Event) {
        let at = *at;
        match what.clone() {
            What::Mapped { .. } | What::Closed { .. } => {}
            What::Fault(text) => self.on_fault(at, &text),
            What::Superseded { .. } => {}
            What::ReadRefused { .. } => {}
            What::FencerAsked { .. } | What::Barred { .. } | What::DiskLost(_) => {}
            What::CutOff { device, start, .. } => drop(self.cut_off.insert((device, start), at)),
            What::HandedOver => self.handed_over.push(at),
            What::AgentStarted { incarnation } => {
                // After a planned end it is the same.
                if self.host != incarnation {
                    (self.host, self.host_began) = (incarnation, at);
                }
            }
            What::AgentCrashed => self.rounds.values_mut().for_each(|round| round.outlived_host = true),
            What::Call { op, called, pages, patience } => {
                let (answers, ended) = (Vec::new(), Vec::new());
                let (refused, abandoned) = (Vec::new(), Vec::new());
                let (host, outlived_host) = (self.host, false);
                let bytes = pages.bytes();
                let round = Round {
                    op,
                    bytes,
                    in_fault: false,
                    at,
                    host,
                    outlived_host,
                    called,
                    pages,
                    patience,
                    answers,
                    ended,
                    refused,
                    abandoned,
                    sent: Vec::new(),
                    heard: Vec::new(),
                    took: None,
                };
                self.rounds.insert(op, round);
            }
            What::Answered { op, answer } => self.round(op).answers.push((at, answer)),
            What::Refused { op, error } => self.round(op).refused.push((at, error)),
            What::Ended { op } => self.round(op).ended.push(at),
            What::Abandoned { op } => self.round(op).abandoned.push(at),
            What::RoundSeen { host, space, seq } => self.seen.push((at, host, space, seq)),
            What::Registered { space } => {
                // The run that answers now had not heard of it, nor of any call that was made before.
                let before = self.rounds.values_mut().filter(|round| round.pages.space == space);
                before.for_each(|round| round.outlived_host = true);
                self.registered.insert(space, at);
            }
            What::Sent { op } => self.round(op).sent.push(at),
            What::Heard { op, host, registered, seq } => {
                self.round(op).heard.push(Heard { at, host, registered, seq });
            }
            What::Taken { op, host, took } => {
                let round = self.round(op);
                // Whichever run it was called of, this one has answered.
                (round.host, round.outlived_host) = (host, false);
                round.took.get_or_insert(took);
            }
            What::Freed { op, frame } => drop(self.freed.insert(frame, (at, op))),
            What::Announced { op, bytes } => self.round(op).bytes = bytes,
            What::InFault { op } => self.round(op).in_fault = true,
            left @ What::Left { .. } => self.left = Some((at, left)),
            of_device => self.add_of_device(at, of_device),
        }
    }

    fn add_of_device(&mut self, at: Duration, what: What) {
        match what {
            What::Connecting { life, device, start } => {
                let life = self.life(life);
                (life.device, life.start) = (device, start);
            }
            What::Opened { life, session, host } => {
                let life = self.life(life);
                (life.session, life.opened, life.host) = (Some(session), Some(at), host);
            }
            What::Resumed { life } => self.life(life).resumed.push(at),
            What::Lease { life, until } => self.life(life).leases.push((at, until)),
            What::Subscribing { life, space } => self.life(life).subscribing.push((at, space)),
            What::Subscribed { life, space, seq } => self.life(life).subscribed.push((at, space, seq)),
            What::FaultBegan { life, span, pages } => {
                self.faults.insert(span, Fault { life, pages, began: at, ended: None });
            }
            What::FaultEnded { span } => {
                self.faults.get_mut(&span).expect("a fault begins first").ended = Some(at);
            }
            What::Unsubscribed { life, space } => self.life(life).unsubscribed.push((at, space)),
            What::Installed { life, space, page, frame } => {
                self.installs.push(Install { at, life, space, page, frame });
            }
            What::FlushBegan { life, span, scope, told } => {
                self.flushes.insert(span, Flush { life, scope, told, began: at, ended: None });
            }
            What::FlushEnded { span } => {
                self.flushes.get_mut(&span).expect("a flush begins first").ended = Some(at);
            }
            What::UseBegan { life, span, space, page, frame } => {
                self.uses.insert(span, Use { life, space, page, frame, began: at, ended: self.end });
            }
            What::UseEnded { span } => self.uses.get_mut(&span).expect("a use begins first").ended = at,
            What::Read { life, frame, times_freed } => self.reads.push(Read { at, life, frame, times_freed }),
            What::EnforcesNoLease { life, cut_off_by } => self.life(life).cut_off_by = Some(cut_off_by),
            other => unreachable!("{other:?} is of no device"),
        }
    }

    /// Whether all was well in the world from then on until then.
    pub fn is_quiet(&self, from: Duration, until: Duration) -> bool {
        !self.going_wrong.iter().any(|trouble| trouble.began <= until && from <= trouble.ended)
    }

    fn on_fault(&mut self, at: Duration, text: &str) {
        if let Some(what) = text.strip_prefix("begin of ") {
            self.going_wrong.push(Trouble { what: what.to_owned(), began: at, ended: Duration::MAX });
        } else if let Some(what) = text.strip_prefix("end of ") {
            let trouble = self.going_wrong.iter_mut().rfind(|trouble| trouble.what == what);
            trouble.expect("what ends has begun").ended = at;
        }
    }

    fn round(&mut self, op: Op) -> &mut Round {
        self.rounds.get_mut(&op).expect("a call comes before what becomes of it")
    }

    fn life(&mut self, life: Life) -> &mut LifeOf {
        self.lives.entry(life).or_default()
    }

    /// When the device's lease, on its own clock, ends, as far as it was renewed until `at`.
    pub fn lease_at(&self, life: Life, at: Duration) -> Option<Duration> {
        self.lives[&life].leases.iter().rfind(|(since, _)| *since <= at).and_then(|(_, until)| *until)
    }

    /// Whether the session has flushed everything at its end, until `at`.
    pub fn has_ended(&self, life: Life, at: Duration) -> bool {
        let opened = self.lives[&life].opened;
        self.flushes.values().any(|flush| {
            flush.life == life
                && flush.scope == Scope::EverythingOfTheSession
                && Some(flush.began) >= opened
                && flush.ended.is_some_and(|ended| ended <= at)
        })
    }

    /// Whether the run of the device agent was cut off, until `at`.
    pub fn is_cut_off(&self, life: Life, at: Duration) -> bool {
        let life = &self.lives[&life];
        self.cut_off.get(&(life.device, life.start)).is_some_and(|cut_off| *cut_off <= at)
    }

    /// Whether the device may use at `at` what it was granted in that session, for all that the host agent can know.
    pub fn may_use(&self, life: Life, at: Duration) -> bool {
        if self.has_ended(life, at) || self.is_cut_off(life, at) {
            return false;
        }
        match self.lives[&life].cut_off_by {
            None => self.lease_at(life, at).is_some_and(|until| until > at),
            Some(_) => self.installs.iter().any(|install| install.life == life && install.at <= at),
        }
    }

    /// Who must cut the session's device off, if it does not stop when its lease is over.
    pub fn cut_off_by(&self, session: u64) -> Option<CutOffBy> {
        self.lives[&self.life_of(session)?].cut_off_by
    }

    /// Whether somebody must cut its device off, or all that it may be of: a session that stands for whatever was in a
    /// torn record, the last of its run, may be of each device that does not stop when its lease is over.
    pub fn is_unstoppable(&self, session: u64) -> bool {
        let is_unnamed = session.is_multiple_of(NUMBERS_OF_A_RUN);
        self.cut_off_by(session).is_some() || is_unnamed && self.bounds.cut_off.1 > Duration::ZERO
    }

    /// The life that a session is of.
    pub fn life_of(&self, session: u64) -> Option<Life> {
        self.lives.iter().find(|(_, life)| life.session == Some(session)).map(|(life, _)| *life)
    }

    /// Each target of each round with the life of its session, once it is resolved.
    pub fn resolved(&self) -> impl Iterator<Item = (&Round, &Target, Duration, Option<Life>)> {
        let targets = self.rounds.values().flat_map(|round| {
            round.last_targets().iter().filter_map(move |target| Some((round, target, target.resolved?)))
        });
        targets.map(|(round, target, at)| (round, target, at, self.life_of(target.session)))
    }
}
