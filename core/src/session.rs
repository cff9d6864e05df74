//! A session, as the host agent sees it: its phase, its lease, its outbox and its quotas.
//!
//! ```text
//!                 on_tick: T_ack is over
//!        +------+ ---------------------> +---------+
//!  new ->| Live |                        | Suspect |   a Suspect session's lease is not renewed
//!        +------+ <--------------------- +---------+
//!          |  ^       on_ack: nothing       |
//!          |  :       is overdue            |
//!          |  : (resume)                    |
//!          |  :                             |
//!          v  :                             v
//!        +---------+ on_severed, on_evict
//!        | Severed |<-----------------------+          from Live and from Suspect
//!        +---------+
//!
//!   Live, Suspect, Severed --- on_tick: the lease expired [1]; on_fence_confirmed -> Fenced
//!   Live, Suspect, Severed --- on_left: "I flushed everything and leave" ---------> Gone
//! ```
//!
//! `on_resumed` brings a Severed session back, to Live or to Suspect by what is overdue then: to connect
//! again is no ack. Nothing leaves Fenced or Gone: a device that comes back gets a new session.
//!
//! \[1\] Only of a device that enforces its lease. Another one's lease says nothing about when it stops
//! (FenceIsPositive): a fencer is asked ([`Effect::AskFencer`]), and until it confirms the session stays.

mod effects;

use std::time::Duration;

pub use self::effects::{Effect, Effects, EndReason};
use crate::ack::Ack;
use crate::event::Event;
use crate::id::{DeviceId, NoticeNumber, SessionId};
use crate::lease::{HostLease, LeaseTerms};
use crate::moment::Moment;
use crate::notice::Notice;
use crate::outbox::{AckError, NotRetained, Outbox, OutboxLimits};
use crate::round::Resolution;

/// T_ack. The slowest flush known waits for running DMA, which is milliseconds; and a caller in the
/// kernel is reported as hung after 120 s. One second is far from both.
const DEFAULT_ACK_TIMEOUT: Duration = Duration::from_secs(1);

/// A device subscribes to what it maps, at most a few times per process that uses it.
const DEFAULT_MAX_SUBSCRIPTIONS: usize = 1024;

/// A message with this many ranges stays below 16 KiB; who has more makes another subscription.
const DEFAULT_MAX_RANGES_PER_SUBSCRIPTION: usize = 512;

/// Faults that one device may have waiting on the host: four times a usual fault buffer's batch.
const DEFAULT_MAX_FAULTS_IN_FLIGHT: usize = 256;

/// What a session is allowed and what is expected of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SessionConfig {
    /// The lease.
    pub lease: LeaseTerms,
    /// T_ack: for how long a notice may be unacked, or a stream undrained, before the session is
    /// Suspect.
    pub ack_timeout: Duration,
    /// Whether its device stops by itself when its lease has run out.
    pub enforcement: Enforcement,
    /// The bounds of its outbox.
    pub outbox: OutboxLimits,
    /// Subscriptions at a time.
    pub max_subscriptions: usize,
    /// Ranges in one subscription.
    pub max_ranges_per_subscription: usize,
    /// Faults at a time that wait for their grant.
    pub max_faults_in_flight: usize,
}

impl Default for SessionConfig {
    fn default() -> Self {
        Self {
            lease: LeaseTerms::default(),
            ack_timeout: DEFAULT_ACK_TIMEOUT,
            enforcement: Enforcement::ByDevice,
            outbox: OutboxLimits::default(),
            max_subscriptions: DEFAULT_MAX_SUBSCRIPTIONS,
            max_ranges_per_subscription: DEFAULT_MAX_RANGES_PER_SUBSCRIPTION,
            max_faults_in_flight: DEFAULT_MAX_FAULTS_IN_FLIGHT,
        }
    }
}

/// Who stops a device whose lease has run out.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Enforcement {
    /// The device itself, whether or not it can reach anybody: waiting for the end of its lease is a fence.
    ByDevice,
    /// Nobody: waiting proves nothing. Only an ack, its leave, or a fencer ends what waits for it.
    ByNobody,
}

/// Where a session stands; see the module's head.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Phase {
    /// It acks in time.
    Live,
    /// Silent past T_ack. Still sent notices, still waited for, its lease not renewed.
    Suspect,
    /// Its stream ended without a word. Still waited for until its lease expires.
    Severed,
    /// It cannot reach the memory any more; nothing is waited for.
    Fenced,
    /// It flushed everything and left; nothing is waited for.
    Gone,
}

impl Phase {
    /// Every phase.
    pub const EVERY: [Self; 5] = [Self::Live, Self::Suspect, Self::Severed, Self::Fenced, Self::Gone];

    /// The word that logs and metric labels use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Live => "live",
            Self::Suspect => "suspect",
            Self::Severed => "severed",
            Self::Fenced => "fenced",
            Self::Gone => "gone",
        }
    }

    /// Whether its stream is up.
    #[must_use]
    pub const fn has_stream(self) -> bool {
        matches!(self, Self::Live | Self::Suspect)
    }

    /// Whether the device has certainly stopped.
    #[must_use]
    pub const fn is_over(self) -> bool {
        matches!(self, Self::Fenced | Self::Gone)
    }
}

/// A device asks for more than its session allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum QuotaError {
    /// Too many subscriptions.
    #[error("the session has {limit} subscriptions, which is its limit")]
    Subscriptions {
        /// The most there may be.
        limit: usize,
    },
    /// Too many ranges in one subscription.
    #[error("a subscription has at most {limit} ranges, this one has {asked}")]
    Ranges {
        /// Ranges in the refused subscription.
        asked: usize,
        /// The most there may be.
        limit: usize,
    },
    /// Too many faults wait for their grant.
    #[error("the session has {limit} faults in flight, which is its limit")]
    FaultsInFlight {
        /// The most there may be.
        limit: usize,
    },
}

/// Why a session does not go on: the device flushes everything and gets a new one (ResumeOrFlush).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ResumeError {
    /// It is over.
    #[error("the session is {}", phase.name())]
    Over {
        /// Fenced or Gone.
        phase: Phase,
    },
    /// Its lease has expired, even if no tick has seen it yet.
    #[error("the session's lease has expired")]
    LeaseExpired,
    /// The host agent ended it: by an administrator's word, for a newer one, or because the device broke the protocol.
    #[error("the host agent ended the session")]
    Ended,
    /// What the device says it received does not fit what was sent.
    #[error(transparent)]
    NotRetained(#[from] NotRetained),
}

/// Whether a device that lost its stream may come back to its session.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Resumable {
    Yes,
    /// The host agent ended it.
    No,
}

/// One session: phase, lease, outbox and quotas, to be kept under one lock.
///
/// Every token that [`Session::on_event`] is given comes back exactly once, as an
/// [`Effect::Resolve`]; and it does so within T_ack and a lease of being sent, if only
/// [`Session::on_tick`] is called (BoundedResolution). The session itself never makes up an ack: a
/// token resolves as Acked by the device's ack only, as Left by its word only, as Fenced by a fencer's
/// word or the expiry of a lease that the device enforces only. For a device that does not enforce its
/// lease there is no bound in here: who waits for it has one of its own, and is not told that it stopped.
///
/// The price: a device that answers heartbeats but not notices loses its lease and everything it
/// holds; and a slow one whose window never drains may keep what is still pending waiting for as many
/// T_ack as there are windows in the outbox. The caller's deadline and the quarantine cover that.
#[derive(Debug)]
pub struct Session<T> {
    id: SessionId,
    device: DeviceId,
    config: SessionConfig,
    phase: Phase,
    resumable: Resumable,
    lease: HostLease,
    outbox: Outbox<T>,
    /// Since when a notice could be sent and none was taken.
    undrained_since: Option<Moment>,
    /// A fencer was asked for, and there is still reason to ask.
    fencer_asked: bool,
    subscriptions: usize,
    faults_in_flight: usize,
}

impl<T> Session<T> {
    /// A Live session. Its first lease is granted with the Welcome, at `now`.
    ///
    /// # Panics
    /// When a limit of the outbox is 0.
    #[must_use]
    pub fn new(id: SessionId, device: DeviceId, config: SessionConfig, now: Moment) -> Self {
        Self {
            id,
            device,
            phase: Phase::Live,
            resumable: Resumable::Yes,
            lease: HostLease::new(config.lease, now),
            outbox: Outbox::new(config.outbox),
            undrained_since: None,
            fencer_asked: false,
            subscriptions: 0,
            faults_in_flight: 0,
            config,
        }
    }

    /// A session of an earlier run of the host agent. It is Severed: its device may hold translations until
    /// the lease expires, at `lease_expires`, which must not be before the device stops. Every notice up to
    /// `acked_through` was acked; the next has the number after it.
    ///
    /// # Panics
    /// When a limit of the outbox is 0.
    #[must_use]
    pub fn restored(
        id: SessionId,
        device: DeviceId,
        config: SessionConfig,
        lease_expires: Moment,
        acked_through: Option<NoticeNumber>,
    ) -> Self {
        Self {
            phase: Phase::Severed,
            lease: HostLease::until(config.lease, lease_expires),
            outbox: Outbox::after(config.outbox, acked_through),
            ..Self::new(id, device, config, lease_expires)
        }
    }

    /// An event that this session is a target of (or, without a token, is told of).
    ///
    /// A Severed session keeps it: it must be acked after a resume, or the session be fenced. One that
    /// is over has stopped already, so its token resolves at once.
    pub fn on_event(&mut self, event: &Event, token: Option<T>, now: Moment, effects: &mut Effects<T>) {
        if let Some(how) = self.resolved_by_phase() {
            effects.extend(token.map(|token| Effect::Resolve { token, how }));
            return;
        }
        self.outbox.push(event, token);
        self.watch_drain(now);
    }

    /// Notices for the stream, at most `max`; none unless the stream is up.
    pub fn take_notices(&mut self, max: usize, now: Moment) -> Vec<Notice> {
        if !self.phase.has_stream() {
            return Vec::new();
        }
        let notices = self.outbox.take_notices(max, now);
        if !notices.is_empty() {
            self.undrained_since = None;
        }
        self.watch_drain(now);
        notices
    }

    /// The device acked. Brings a Suspect session back to Live when nothing is overdue any more.
    ///
    /// A Severed session's ack counts as well: it was on its way. One that is over has no tokens, its
    /// late acks are passed over.
    ///
    /// # Errors
    /// [`AckError`], and then nothing has changed. If it is fatal the caller ends the stream and calls
    /// [`Session::on_severed`].
    pub fn on_ack(&mut self, ack: &Ack, now: Moment, effects: &mut Effects<T>) -> Result<(), AckError> {
        if self.phase.is_over() {
            return Ok(());
        }
        let scopes: Vec<_> =
            ack.reports.iter().map(|report| self.outbox.unacked_scope(report.notice)).collect();
        let resolved = self.outbox.on_ack(ack)?;
        for (report, scope) in ack.reports.iter().zip(scopes) {
            effects.extend(scope.map(|scope| Effect::Reported { scope, report: report.clone() }));
        }
        effects.extend(resolved.into_iter().map(|resolved| Effect::Resolve {
            token: resolved.token,
            how: Resolution::Acked {
                young: resolved.young,
                dirty: resolved.dirty,
                timing: resolved.timing,
                sent: Some(resolved.sent),
            },
        }));
        self.watch_drain(now);
        if self.phase == Phase::Suspect && !self.is_overdue(now) {
            self.enter(Phase::Live, effects);
        }
        self.fencer_asked &= self.wants_fencer(now);
        Ok(())
    }

    /// The device asks for its lease to be renewed. Returns the duration granted, to be sent now.
    ///
    /// `None`, no renewal, unless the session is Live and nothing is overdue: a device that sends
    /// heartbeats and never acks would hold a round for ever (BoundedResolution). Nor is a lease
    /// renewed whose end is a fence, even if no tick has seen it yet.
    pub fn on_heartbeat(&mut self, now: Moment) -> Option<Duration> {
        if self.phase != Phase::Live || self.is_overdue(now) || self.has_outlived_its_lease(now) {
            return None;
        }
        self.lease.grant(now);
        Some(self.config.lease.duration)
    }

    /// The stream ended without a word. The lease runs on.
    pub fn on_severed(&mut self, _now: Moment, effects: &mut Effects<T>) {
        if self.phase.has_stream() {
            self.enter(Phase::Severed, effects);
        }
    }

    /// The host agent ends the session for a reason of its own: as [`Session::on_severed`], and the device
    /// cannot resume.
    pub fn on_ended(&mut self, now: Moment, effects: &mut Effects<T>) {
        self.resumable = Resumable::No;
        self.on_severed(now, effects);
    }

    /// Whether the session goes on for a device that connected again, and has received every notice up to
    /// `received_through` and nothing above it (ResumeOrFlush). Changes nothing.
    ///
    /// # Errors
    /// [`ResumeError`]: the device flushes everything.
    pub fn resume_or_flush(
        &self,
        received_through: Option<NoticeNumber>,
        now: Moment,
    ) -> Result<(), ResumeError> {
        if self.phase.is_over() {
            return Err(ResumeError::Over { phase: self.phase });
        }
        if self.lease.is_expired(now) {
            return Err(ResumeError::LeaseExpired);
        }
        if self.resumable == Resumable::No {
            return Err(ResumeError::Ended);
        }
        Ok(self.outbox.can_resume(received_through)?)
    }

    /// The device connected again. The session goes on on its new stream, whether or not the old one is
    /// known to be lost: every notice that is not acked is sent again, then what is pending. Faults of the old
    /// stream are forgotten.
    ///
    /// No lease is granted, and what was overdue stays so: a device that only connects again is fenced
    /// like one that is silent (BoundedResolution).
    ///
    /// # Errors
    /// As [`Session::resume_or_flush`], and then nothing has changed.
    pub fn on_resumed(
        &mut self,
        received_through: Option<NoticeNumber>,
        now: Moment,
        effects: &mut Effects<T>,
    ) -> Result<(), ResumeError> {
        self.resume_or_flush(received_through, now)?;
        self.outbox.on_resumed();
        self.faults_in_flight = 0;
        // Kept where it was set: not to read on one stream after the other is not to read.
        self.watch_drain(now);
        let phase = if self.is_overdue(now) { Phase::Suspect } else { Phase::Live };
        if phase != self.phase {
            self.enter(phase, effects);
        }
        Ok(())
    }

    /// The device said that it flushed everything and leaves.
    pub fn on_left(&mut self, _now: Moment, effects: &mut Effects<T>) {
        if !self.phase.is_over() {
            self.enter(Phase::Gone, effects);
            self.resolve_all(Resolution::Left, effects);
        }
    }

    /// An administrator ends the session. No ack is made up for it: the device is waited for until
    /// its lease expires.
    pub fn on_evict(&mut self, _now: Moment, effects: &mut Effects<T>) {
        self.resumable = Resumable::No;
        if self.phase.has_stream() {
            self.enter(Phase::Severed, effects);
            effects.push(Effect::EndStream(EndReason::Evicted));
        }
    }

    /// A fencer confirmed that the device cannot reach the memory any more.
    pub fn on_fence_confirmed(&mut self, _now: Moment, effects: &mut Effects<T>) {
        self.fence(effects);
    }

    /// Time passed. Returns when a tick could matter next; `None` when none can.
    ///
    /// A late tick delays what it would have done and changes nothing else; an early one does nothing.
    pub fn on_tick(&mut self, now: Moment, effects: &mut Effects<T>) -> Option<Moment> {
        if self.phase.is_over() {
            return None;
        }
        if self.has_outlived_its_lease(now) {
            self.fence(effects);
            return None;
        }
        if self.phase == Phase::Live && self.is_overdue(now) {
            self.enter(Phase::Suspect, effects);
        }
        if !self.fencer_asked && self.wants_fencer(now) {
            self.fencer_asked = true;
            effects.push(Effect::AskFencer);
        }
        let expires = self.lease.expires();
        let fenced_at = (self.config.enforcement == Enforcement::ByDevice).then_some(expires);
        let (overdue_at, asked_at) = match self.phase {
            Phase::Live => (self.overdue_at(), None),
            Phase::Severed if !self.fencer_asked => (self.overdue_at(), Some(expires)),
            _ => (None, None),
        };
        fenced_at.into_iter().chain(overdue_at).chain(asked_at).min()
    }

    /// Whether a tick would find that the device owes an ack for too long. Who does not know whether all was applied
    /// that it has said looks at that first; the end of its lease does not wait for it.
    #[must_use]
    pub fn is_in_doubt(&self, now: Moment) -> bool {
        self.phase == Phase::Live && self.is_overdue(now) && !self.has_outlived_its_lease(now)
    }

    /// Whether there is reason to cut the device off by force: it owes something for longer than `T_ack`; or
    /// its stream is gone, and so is a lease whose end proves nothing.
    #[must_use]
    pub fn wants_fencer(&self, now: Moment) -> bool {
        match self.phase {
            Phase::Suspect => true,
            Phase::Severed => self.is_overdue(now) || self.lease.is_expired(now),
            Phase::Live | Phase::Fenced | Phase::Gone => false,
        }
    }

    /// Counts a new subscription.
    ///
    /// # Errors
    /// [`QuotaError`] when it has too many ranges, or the session too many subscriptions.
    pub fn try_subscribe(&mut self, ranges: usize) -> Result<(), QuotaError> {
        let limit = self.config.max_ranges_per_subscription;
        if ranges > limit {
            return Err(QuotaError::Ranges { asked: ranges, limit });
        }
        let limit = self.config.max_subscriptions;
        if self.subscriptions >= limit {
            return Err(QuotaError::Subscriptions { limit });
        }
        self.subscriptions += 1;
        Ok(())
    }

    /// A subscription that was counted has ended.
    ///
    /// # Panics
    /// When none was counted.
    pub fn on_unsubscribed(&mut self) {
        self.subscriptions =
            self.subscriptions.checked_sub(1).expect("each ended subscription was counted once");
    }

    /// Counts a fault that will wait for its grant.
    ///
    /// # Errors
    /// [`QuotaError::FaultsInFlight`].
    pub fn try_fault(&mut self) -> Result<(), QuotaError> {
        let limit = self.config.max_faults_in_flight;
        if self.faults_in_flight >= limit {
            return Err(QuotaError::FaultsInFlight { limit });
        }
        self.faults_in_flight += 1;
        Ok(())
    }

    /// A fault that was counted is answered.
    ///
    /// # Panics
    /// When none was counted.
    pub fn on_fault_done(&mut self) {
        self.faults_in_flight =
            self.faults_in_flight.checked_sub(1).expect("each answered fault was counted once");
    }

    /// What it is allowed, and what is expected of it.
    #[must_use]
    pub fn config(&self) -> &SessionConfig {
        &self.config
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> SessionId {
        self.id
    }

    /// Its device.
    #[must_use]
    pub fn device(&self) -> &DeviceId {
        &self.device
    }

    /// Where it stands.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// When its lease expires on the host's clock, if it is not renewed.
    #[must_use]
    pub fn lease_expires(&self) -> Moment {
        self.lease.expires()
    }

    /// Who stops its device when its lease has run out.
    #[must_use]
    pub fn enforcement(&self) -> Enforcement {
        self.config.enforcement
    }

    /// Whether its device may go on with it; not when the host agent ended it.
    #[must_use]
    pub fn is_resumable(&self) -> bool {
        self.resumable == Resumable::Yes && !self.phase.is_over()
    }

    /// The most notices that are sent and not acked.
    #[must_use]
    pub fn window(&self) -> u32 {
        self.config.outbox.window
    }

    /// Its outbox.
    #[must_use]
    pub fn outbox(&self) -> &Outbox<T> {
        &self.outbox
    }

    /// Subscriptions it has.
    #[must_use]
    pub fn subscriptions(&self) -> usize {
        self.subscriptions
    }

    /// Faults that wait for their grant.
    #[must_use]
    pub fn faults_in_flight(&self) -> usize {
        self.faults_in_flight
    }

    /// How a target resolves in a session that is over.
    fn resolved_by_phase(&self) -> Option<Resolution> {
        match self.phase {
            Phase::Live | Phase::Suspect | Phase::Severed => None,
            Phase::Fenced => Some(Resolution::Fenced),
            Phase::Gone => Some(Resolution::Left),
        }
    }

    fn watch_drain(&mut self, now: Moment) {
        self.undrained_since = match self.outbox.has_sendable() {
            true => self.undrained_since.or(Some(now)),
            false => None,
        };
    }

    /// When the session becomes Suspect if nothing happens: T_ack after the oldest unacked notice was
    /// sent (which a full window waits for, too), or after the stream was last drained.
    fn overdue_at(&self) -> Option<Moment> {
        let since = self.outbox.oldest_unacked_sent().into_iter().chain(self.undrained_since).min()?;
        Some(since + self.config.ack_timeout)
    }

    fn is_overdue(&self, now: Moment) -> bool {
        self.overdue_at().is_some_and(|overdue| overdue <= now)
    }

    /// The lease has run out, and that says that the device has stopped.
    fn has_outlived_its_lease(&self, now: Moment) -> bool {
        self.config.enforcement == Enforcement::ByDevice && self.lease.is_expired(now)
    }

    fn fence(&mut self, effects: &mut Effects<T>) {
        if self.phase.is_over() {
            return;
        }
        let had_stream = self.phase.has_stream();
        self.enter(Phase::Fenced, effects);
        if had_stream {
            effects.push(Effect::EndStream(EndReason::Fenced));
        }
        self.resolve_all(Resolution::Fenced, effects);
    }

    /// Called after the phase has changed: who hears of the end of a round may release its pages, and
    /// by then a fence must have reached whoever grants them (FenceReachesReuse).
    fn resolve_all(&mut self, how: Resolution, effects: &mut Effects<T>) {
        self.undrained_since = None;
        effects.extend(self.outbox.abandon().into_iter().map(|token| Effect::Resolve { token, how }));
    }

    fn enter(&mut self, to: Phase, effects: &mut Effects<T>) {
        effects.push(Effect::Phase { from: self.phase, to });
        self.phase = to;
        // What it owed is acked: the next time that it owes something is another one.
        self.fencer_asked &= to != Phase::Live;
    }
}

#[cfg(test)]
mod tests;
