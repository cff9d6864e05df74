//! [4 and 7 of 9] Sessions: what a device is sent, and what it says.
//!
//! A session is three things. The [`SessionHandle`] is what everybody else holds: events go into it,
//! and its lock guards the rules of [`shootdown_core::session`]. The `stream` is polled by the
//! connection and takes from the handle whatever may be sent: there is no task and no channel between
//! an outbox and the wire. The `task` reads what the device says, applies it, and lives on after the
//! stream is gone until the device has provably stopped.
//!
//! A session outlives its stream: a device that lost it connects again, and the session goes on on the new
//! one. What belongs to one stream is a [`Line`], replaced as a whole; whoever still works for an earlier one
//! names it by its [`LineId`], and changes nothing any more.

pub(crate) mod registry;
pub(crate) mod handshake;
mod resume;
pub(crate) mod stream;
pub(crate) mod task;
pub(crate) mod fault;
mod subscription;
mod silence;
pub(crate) mod doubt;
pub(crate) mod restored;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::task::Waker;

use parking_lot::{Mutex, RwLock};
use shootdown_core::interest::IntervalMap;
use shootdown_core::round::Resolution;
use shootdown_core::session::{Effect, Effects, EndReason, Enforcement, Phase, Session};
use shootdown_core::{
    Ack, AddrRange, AddressSpaceId, CauseSet, DeviceId, Epoch, Event, FlushReport, Incarnation, Moment,
    Scope, SessionId, SubscriptionId,
};
use shootdown_proto::error::Reason;
use shootdown_proto::message::{HostSays, RequestId, SessionError};
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use self::doubt::Tick;
use self::handshake::Earlier;
use self::silence::{Hearing, Silence};
use crate::clock::Clock;
use crate::completion::Token;
use crate::directory::AddressSpace;
use crate::fence::FencerRule;
use crate::shard::Shard;

/// The most answers that wait to be sent. A device that asks and does not read is not read any more
/// itself until it does: back-pressure that it alone feels.
const MOST_ANSWERS: usize = 1024;

/// A session, as everybody else holds it.
///
/// One lock guards everything that changes. It is held for the length of one input and never across
/// an await; rounds are told of their acks after it is dropped, so that no two locks are ever held
/// together by the ack path (NoSelfWait).
pub(crate) struct SessionHandle {
    pub(crate) id: SessionId,
    pub(crate) device: DeviceId,
    pub(crate) incarnation: Incarnation,
    pub(crate) epoch: Epoch,
    pub(crate) change_pte: bool,
    /// Who stops the device when its lease has run out.
    pub(crate) enforcement: Enforcement,
    /// Who cuts the device off, if anybody can.
    pub(crate) fencer: Option<FencerRule>,
    /// Rings when the fencer is to be asked.
    ask_fencer: Notify,
    /// Where it lives.
    pub(crate) shard: Shard,
    state: Mutex<State>,
    /// Held for reading by each access to frames, for writing by nobody for longer than it takes to get
    /// it: see [`SessionHandle::access`].
    accesses: RwLock<()>,
    /// Rings when an answer was taken for the stream.
    room: Notify,
    /// Rings when nothing was heard of the device for too long: see [`silence`].
    listen: Notify,
    /// Cancelled when the session is over: faults that wait give up.
    over: CancellationToken,
    clock: Clock,
}

struct State {
    session: Session<Token>,
    line: Line,
    /// By which of its device's attempts it went on last. What comes after a planned end begins at 0 again: the
    /// first that is read then is taken, and none below it any more.
    attempt: u64,
    subscriptions: HashMap<SubscriptionId, Held>,
    /// Those that are being ended: rounds may still count on them. Who waits for the answer.
    leaving: HashMap<SubscriptionId, Leaving>,
    /// What the session may fault: the ranges of those subscriptions that hear of every cause.
    covered: HashMap<AddressSpaceId, IntervalMap<SubscriptionId, ()>>,
    /// A device that never subscribed was never told of anything, nor granted.
    ever_subscribed: bool,
    /// What says that the device holds nothing of its earlier sessions, until it is said.
    earlier: Earlier,
    silence: Silence,
}

/// Which of a session's streams, in the order of their Hellos.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct LineId(u64);

impl LineId {
    /// That of the Hello which opened the session.
    const FIRST: Self = Self(1);

    fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// One stream of a session, and what was to be said on it: of no use to the next one. What a device asked on a
/// stream that was lost it asks again on the next.
struct Line {
    id: LineId,
    /// Answers and grants: they go before the notices, see [`stream`].
    answers: VecDeque<HostSays>,
    /// Answers to Unsubscribe: they go after the notices that were pending before them.
    farewells: VecDeque<Farewell>,
    last_word: Option<SessionError>,
    closed: bool,
    stream: Option<Waker>,
    /// Where it is read, once its task runs: after a resume another shard than that of the session's rounds.
    reader: Option<Handle>,
    /// Its reader was asked to look whether an ack has come: see [`doubt`].
    is_in_doubt: bool,
    ends: LineEnds,
}

/// How a stream comes to its end.
#[derive(Clone)]
struct LineEnds {
    /// Cancelled when the stream is to end, or has.
    severed: CancellationToken,
    /// Cancelled when the session goes on on another stream.
    replaced: CancellationToken,
}

impl Line {
    fn new(id: LineId) -> Self {
        Self {
            id,
            answers: VecDeque::new(),
            farewells: VecDeque::new(),
            last_word: None,
            closed: false,
            stream: None,
            reader: None,
            is_in_doubt: false,
            ends: LineEnds { severed: CancellationToken::new(), replaced: CancellationToken::new() },
        }
    }
}

/// A request, and the stream that it came on.
#[derive(Clone, Copy)]
struct Asked {
    request: RequestId,
    on: LineId,
}

/// A subscription that is ending: acks that come meanwhile still tell of its address space.
struct Leaving {
    asked: Asked,
    space: Arc<AddressSpace>,
}

/// A subscription, as its session knows it.
struct Held {
    space: Arc<AddressSpace>,
    ranges: Vec<AddrRange>,
    causes: CauseSet,
    /// Whom to tell of it: a device that lost its stream before the answer asks again.
    asked: Asked,
    answer: Option<HostSays>,
}

/// An answer to Unsubscribe, and the last notice that may have to go before it.
struct Farewell {
    says: HostSays,
    after: u64,
}

/// What follows from an input, to be carried out when no lock is held.
#[must_use = "a dropped effect is a round that never completes"]
pub(crate) struct After {
    effects: Effects<Token>,
    waker: Option<Waker>,
    now: Moment,
}

/// What a device does when the host agent has stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Then {
    /// It has left by then.
    Leave,
    /// It comes to the successor, with what it holds.
    Resume,
}

/// Whether the accesses of a session that is over are known to have ended.
#[derive(PartialEq, Eq)]
enum Stopped {
    NotKnown,
    Yes,
}

/// What a listing says of a session.
pub(crate) struct Standing {
    pub(crate) phase: Phase,
    pub(crate) lease_expires: Moment,
    pub(crate) subscriptions: usize,
    pub(crate) unacked: usize,
    pub(crate) pending: usize,
    pub(crate) acked_through: u64,
    pub(crate) faults_in_flight: usize,
}

impl SessionHandle {
    /// An event that this session is a target of, or, without a token, is told of. What comes of it is
    /// carried out by the caller, when it holds no lock any more.
    pub(crate) fn on_event(&self, event: &Event, token: Option<Token>, now: Moment) -> After {
        self.input(now, |state, effects| state.session.on_event(event, token, now, effects)).1
    }

    /// Puts an answer on the stream that its request came on; if the session goes on on another one, on none.
    fn answer(&self, on: LineId, says: HostSays) {
        let waker = {
            let mut state = self.state.lock();
            if state.line.id != on {
                return;
            }
            state.line.answers.push_back(says);
            state.line.stream.take()
        };
        wake(waker);
    }

    /// Tells the device that a request was refused. The session goes on.
    fn refuse(&self, on: LineId, reason: Reason, message: impl Into<String>, request: Option<RequestId>) {
        self.answer(on, HostSays::Error(SessionError::refused(reason, message, request)));
    }

    /// Ends the session's stream with a last word; the device cannot resume. It is waited for until it has
    /// provably stopped.
    pub(crate) fn end(&self, reason: Reason, message: impl Into<String>) {
        self.finish(None, |state, now, effects| state.end(reason, message, now, effects));
    }

    /// The same, for a reason that came up on that stream: nothing, if the session goes on on another one.
    fn end_on(&self, on: LineId, reason: Reason, message: impl Into<String>) {
        self.finish(Some(on), |state, now, effects| state.end(reason, message, now, effects));
    }

    /// Ends the session's stream by an input of the rules; if it names a stream, then that one or none.
    fn finish(&self, on: Option<LineId>, input: impl FnOnce(&mut State, Moment, &mut Effects<Token>)) {
        let now = self.clock.now();
        let severed = self.with(now, |state, effects| {
            if on.is_some_and(|on| on != state.line.id) {
                return None;
            }
            input(state, now, effects);
            Some(state.line.ends.severed.clone())
        });
        if let Some(severed) = severed {
            severed.cancel();
        }
    }

    /// An administrator ends the session.
    pub(crate) fn evict(&self) {
        let now = self.clock.now();
        self.with(now, |state, effects| state.session.on_evict(now, effects));
    }

    /// The device acked. What comes in on an earlier stream is passed over: the device was sent the notice
    /// again, and acks it again.
    fn on_ack(&self, on: LineId, ack: &Ack) {
        let now = self.clock.now();
        let applied = self.with(now, |state, effects| {
            (state.line.id == on).then(|| {
                state.silence = Silence::since(now);
                state.session.on_ack(ack, now, effects)
            })
        });
        match applied {
            None | Some(Ok(())) => {}
            Some(Err(error)) if error.is_fatal() => {
                self.end_on(on, crate::status::ack_reason(error), error.to_string());
            }
            Some(Err(error)) => {
                self.refuse(on, crate::status::ack_reason(error), error.to_string(), None);
            }
        }
    }

    /// The stream is gone. A device that never subscribed holds nothing, so it is as if it had left: it
    /// is not waited for, and does not count against the sessions there may be.
    fn on_severed(&self, on: LineId) {
        self.sever(Some(on));
    }

    fn sever(&self, on: Option<LineId>) {
        self.finish(on, |state, now, effects| {
            state.line.closed = true;
            if state.ever_subscribed {
                state.session.on_severed(now, effects);
            } else {
                state.session.on_left(now, effects);
            }
        });
    }

    /// The device leaves, and holds nothing any more.
    fn on_left(&self, on: LineId) {
        self.finish(Some(on), |state, now, effects| state.leave(now, effects));
    }

    /// The device says in a later session that it holds nothing of this one.
    pub(crate) fn on_left_behind(&self) {
        self.finish(None, |state, now, effects| state.leave(now, effects));
    }

    /// A fencer confirmed that the device is cut off.
    pub(crate) fn fence(&self) {
        let now = self.clock.now();
        self.with(now, |state, effects| state.session.on_fence_confirmed(now, effects));
    }

    /// Whether there is reason to ask the fencer, now.
    pub(crate) fn wants_fencer(&self) -> bool {
        let now = self.clock.now();
        self.state.lock().session.wants_fencer(now)
    }

    /// Resolves when there was reason to ask the fencer; the reason may have gone since.
    ///
    /// # Cancel safety
    /// Dropped, the next one resolves instead.
    pub(crate) async fn fencer_asked(&self) {
        self.ask_fencer.notified().await;
    }

    /// Resolves when the session is over.
    pub(crate) async fn over(&self) {
        self.over.cancelled().await;
    }

    /// Whether the device can be made to stop, or taken as stopped, without its word.
    pub(crate) fn can_be_fenced(&self) -> bool {
        self.enforcement == Enforcement::ByDevice || self.fencer.is_some()
    }

    /// Time passed; called for all sessions by the [`crate::watchdog`].
    pub(crate) fn on_tick(&self) -> Tick {
        let now = self.clock.now();
        let (tick, is_silent) = self.with(now, |state, effects| {
            let tick = if state.session.is_in_doubt(now) {
                let line = &mut state.line;
                match &line.reader {
                    // Once at a time: a shard that does not run is not asked more often than it can answer.
                    Some(reader) if !line.is_in_doubt => {
                        line.is_in_doubt = true;
                        Tick::InDoubt { on: line.id, reader: reader.clone() }
                    }
                    // Nobody has read anything of it yet.
                    Some(_) | None => Tick::Done,
                }
            } else {
                state.session.on_tick(now, effects);
                Tick::Done
            };
            (tick, state.silence.is_too_long(&state.session, now))
        });
        if is_silent {
            tracing::trace!(session = self.id.get(), device = %self.device, "is anything heard of a device?");
            self.listen.notify_one();
        }
        tick
    }

    /// Its task was asked to listen, and there was nothing to read on that stream.
    fn on_nothing_read(&self, on: LineId) {
        let now = self.clock.now();
        let hearing = {
            let mut state = self.state.lock();
            if state.line.id != on {
                return;
            }
            let State { silence, session, .. } = &mut *state;
            silence.on_nothing_read(session, now)
        };
        let (session, device) = (self.id.get(), self.device.as_str());
        match hearing {
            Hearing::Kept => {}
            Hearing::Doubted { looks } => {
                tracing::debug!(session, device, looks, "a device said nothing for a whole lease");
            }
            Hearing::Lost => {
                tracing::warn!(
                    session,
                    device,
                    "a device said nothing for a whole lease: its stream is taken for lost"
                );
                // The device may have come back on another by now.
                self.sever(Some(on));
            }
        }
    }

    /// The stream's task begins, on the runtime that reads it.
    fn on_read_here(&self, line: LineId) {
        let mut state = self.state.lock();
        if state.line.id == line {
            state.line.reader = Some(Handle::current());
        }
    }

    /// Something came that changes nothing by itself but that the device is there.
    fn on_heard(&self, on: LineId) {
        let mut state = self.state.lock();
        if state.line.id == on {
            state.silence = Silence::since(self.clock.now());
        }
    }

    /// Runs one input of the rules, then carries out what they gave out, with the lock dropped.
    fn with<R>(&self, now: Moment, input: impl FnOnce(&mut State, &mut Effects<Token>) -> R) -> R {
        let (result, after) = self.input(now, input);
        self.carry_out(after);
        result
    }

    fn input<R>(&self, now: Moment, input: impl FnOnce(&mut State, &mut Effects<Token>) -> R) -> (R, After) {
        let mut effects = Effects::new();
        let mut state = self.state.lock();
        let result = input(&mut state, &mut effects);
        for effect in effects.iter() {
            if let Effect::EndStream(reason) = effect {
                state.line.last_word.get_or_insert_with(|| last_word(*reason));
            }
        }
        let waker = state.waker_if_it_can_say();
        (result, After { effects, waker, now })
    }

    /// What follows from an input: wakes the stream, tells the rounds.
    pub(crate) fn carry_out(&self, after: After) {
        let After { effects, waker, now } = after;
        let mut is_stopped = Stopped::NotKnown;
        for effect in effects {
            match effect {
                Effect::Resolve { token, how } => {
                    if !matches!(how, Resolution::Acked { .. }) && is_stopped == Stopped::NotKnown {
                        self.wait_for_accesses();
                        is_stopped = Stopped::Yes;
                    }
                    token.resolve(how, now);
                }
                Effect::Reported { scope, report } => self.on_report(scope, &report),
                Effect::Phase { from, to } => self.tell_phase(from, to),
                Effect::AskFencer => self.ask_fencer(),
                // Nothing resumes after it: the stream is the one that it was meant for.
                Effect::EndStream(_) => {
                    let severed = self.state.lock().line.ends.severed.clone();
                    severed.cancel();
                }
            }
        }
        wake(waker);
    }

    /// The session is over, so no access to frames begins any more; those that had begun end here. Only
    /// then may a round hear that the device has stopped (FenceReachesReuse). An access is a copy of at
    /// most a megabyte and never sleeps.
    fn wait_for_accesses(&self) {
        drop(self.accesses.write());
    }

    /// Runs one access of this session to frames, unless the session is over: the look and the access are
    /// one step to whoever fences the session.
    pub(crate) fn access<R>(&self, access: impl FnOnce() -> R) -> Option<R> {
        let _in_progress = self.accesses.read();
        (!self.phase().is_over()).then(access)
    }

    /// Young bits are kept, whatever the flush was for: the device has told them, and will not again
    /// (YoungIsConservative). They may lie outside of the notice. Dirty bits are not kept: what a device
    /// wrote is in the frame before its ack, and the rounds that the ack resolves are told with their targets.
    fn on_report(&self, scope: Scope, report: &FlushReport) {
        let Scope::Range(address_space, _) = scope else { return };
        if !report.young.is_empty()
            && let Some(space) = self.space(address_space)
        {
            let mut young = space.young.lock();
            report.young.iter().for_each(|range| young.mark(*range));
        }
    }

    /// An address space that the session has a subscription in, be it one that is ending.
    fn space(&self, address_space: AddressSpaceId) -> Option<Arc<AddressSpace>> {
        let state = self.state.lock();
        let leaving = state.leaving.values().map(|leaving| &leaving.space);
        let mut spaces = state.subscriptions.values().map(|held| &held.space).chain(leaving);
        spaces.find(|space| space.id == address_space).cloned()
    }

    fn ask_fencer(&self) {
        if self.fencer.is_some() {
            self.ask_fencer.notify_one();
        } else if !self.can_be_fenced() {
            let (session, device) = (self.id.get(), self.device.as_str());
            tracing::error!(
                session,
                device,
                "a device owes an ack, does not enforce its lease and has no fencer: what waits for it is quarantined until it acks or leaves; make it, or configure a fencer"
            );
        }
    }

    fn tell_phase(&self, from: Phase, to: Phase) {
        let (session, device) = (self.id.get(), self.device.as_str());
        match to {
            Phase::Suspect => {
                tracing::warn!(session, device, enforcement = ?self.enforcement, "a device owes an ack for too long");
            }
            Phase::Fenced => tracing::warn!(session, device, "a device is fenced"),
            Phase::Live | Phase::Severed | Phase::Gone => {
                tracing::info!(session, device, from = from.name(), to = to.name(), "session");
            }
        }
        if to.is_over() {
            self.over.cancel();
        }
    }

    /// Where the session stands.
    pub(crate) fn phase(&self) -> Phase {
        self.state.lock().session.phase()
    }

    pub(crate) fn standing(&self) -> Standing {
        let state = self.state.lock();
        let (session, outbox) = (&state.session, state.session.outbox());
        Standing {
            phase: session.phase(),
            lease_expires: session.lease_expires(),
            subscriptions: session.subscriptions(),
            unacked: outbox.unacked(),
            pending: outbox.pending(),
            acked_through: outbox.acked_through().map_or(0, shootdown_core::NoticeNumber::get),
            faults_in_flight: session.faults_in_flight(),
        }
    }

    /// The host agent is about to stop.
    pub(crate) fn drain(&self, deadline: std::time::Duration, then: Then) {
        let line = self.state.lock().line.id;
        self.answer(line, HostSays::Drain { deadline, resumable: then == Then::Resume });
    }

    /// Whether a device that asks much and reads little must wait.
    fn has_room(&self) -> bool {
        let state = self.state.lock();
        state.line.answers.len() + state.line.farewells.len() < MOST_ANSWERS
    }
}

impl State {
    fn new(session: Session<Token>, earlier: Earlier, now: Moment) -> Self {
        Self {
            session,
            line: Line::new(LineId::FIRST),
            attempt: 0,
            subscriptions: HashMap::new(),
            leaving: HashMap::new(),
            covered: HashMap::new(),
            ever_subscribed: false,
            earlier,
            silence: Silence::since(now),
        }
    }

    fn end(&mut self, reason: Reason, message: impl Into<String>, now: Moment, effects: &mut Effects<Token>) {
        self.line.last_word.get_or_insert_with(|| SessionError::fatal(reason, message));
        self.session.on_ended(now, effects);
        if !self.ever_subscribed {
            // It holds nothing, so nobody is to be waited for.
            self.session.on_left(now, effects);
        }
    }

    fn leave(&mut self, now: Moment, effects: &mut Effects<Token>) {
        self.line.closed = true;
        self.session.on_left(now, effects);
    }
}

fn last_word(reason: EndReason) -> SessionError {
    match reason {
        EndReason::Evicted => {
            SessionError::fatal(Reason::SessionEvicted, "an administrator ended the session; connect again")
        }
        EndReason::Fenced => SessionError::fatal(
            Reason::SessionFenced,
            "the session was fenced because it owed an ack or a heartbeat for too long; drop every translation and connect again",
        ),
    }
}

fn wake(waker: Option<Waker>) {
    if let Some(waker) = waker {
        waker.wake();
    }
}

impl std::fmt::Debug for SessionHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SessionHandle")
            .field("id", &self.id)
            .field("device", &self.device)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
