//! The host agent: the notifier methods on one side, the devices' sessions on the other.
//!
//! This file is the way of an invalidation in one place; each method of [`Notifier`] reads from top
//! to bottom as the stages do.

use std::sync::Arc;
use std::time::Duration;

use shootdown_core::session::{Enforcement, SessionConfig};
use shootdown_core::{
    AddrRange, AddressSpaceId, Cause, Incarnation, Method, Moment, OwnerTag, PageSize, Seq, Translation,
};
use shootdown_proto::message::SessionError;
use tokio::sync::{TryAcquireError, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::clock::Clock;
use crate::completion::{End, EndedBy, WaitingRound};
use crate::directory::{AddressSpace, Directory};
use crate::dispatch::{Call, Dispatched, Leave};
use crate::fence::{FencerRule, Fencers};
use crate::quarantine::{self, Quarantine, QuarantineBudget};
use crate::restart::Restart;
use crate::session::handshake;
use crate::session::registry::Registry;
use crate::source::rpc::registrations::Registrations;
use crate::source::rpc::releases::Releases;
use crate::source::rpc::retries::Try;
use crate::source::{
    Invalidation, Notifier, NotifyError, RoundResult, RoundTimes, Strictness, Translate, Verdict, Wait,
};

/// What a host agent allows and expects.
#[derive(Debug, Clone)]
pub struct HostConfig {
    /// Leases, windows and quotas of each session.
    pub session: SessionConfig,
    /// Sessions at a time.
    pub max_sessions: usize,
    /// Address spaces at a time.
    pub max_address_spaces: usize,
    /// Rounds in flight at a time, in one address space. A source that can wait waits for a place.
    pub max_rounds_in_flight: usize,
    /// Who cuts devices off that owe an ack; the first rule that means a device is its own.
    pub fencers: Vec<FencerRule>,
    /// How much may be quarantined before callers have to wait.
    pub quarantine: QuarantineBudget,
    /// Ask the devices to say when they received and flushed each notice. Costs a report an ack.
    pub stage_timing: bool,
    /// How long a source may take to answer a fault over `ServeFaults`.
    pub source_fault_timeout: Duration,
    /// This run of the host agent: higher than that of any earlier run.
    pub incarnation: Incarnation,
    /// What leases and rounds are measured on.
    pub clock: Clock,
}

/// A host agent's rules and state, without its listeners. Cheap to clone.
///
/// Everything is reached through here and nothing is global. The price is one `Arc` more on each
/// path; what it buys is that a VMM can embed several, and that a test owns the one it looks at.
#[derive(Debug, Clone)]
pub struct Host(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    config: HostConfig,
    directory: Directory,
    registry: Registry,
    registrations: Registrations,
    releases: Releases,
    fencers: Fencers,
    quarantine: Arc<Quarantine>,
    /// What the runs before left, and what the next will find.
    restart: Arc<Restart>,
    /// Owns the rounds, the faults, the sessions, the attempts to fence.
    tasks: TaskTracker,
    /// Cancelled when the host agent begins to stop.
    stopping: CancellationToken,
    /// Where tasks run that belong to no session.
    control: tokio::runtime::Handle,
}

impl Host {
    /// A host agent that knows of nothing yet. Tasks that belong to no session run on `control`.
    #[must_use]
    pub fn new(config: HostConfig, control: tokio::runtime::Handle) -> Self {
        Self::restarted(config, control, Restart::none())
    }

    /// The same, on a journal.
    pub(crate) fn restarted(config: HostConfig, control: tokio::runtime::Handle, restart: Restart) -> Self {
        let first = restart.first_number();
        let (spaces, rounds) = (config.max_address_spaces, config.max_rounds_in_flight);
        let directory = Directory::new(spaces, rounds, first, config.incarnation);
        let registry = Registry::new(config.max_sessions, first);
        let fencers = Fencers::new(config.fencers.clone());
        let quarantine = Arc::new(Quarantine::new(config.quarantine));
        Self(Arc::new(Inner {
            config,
            directory,
            registry,
            registrations: Registrations::default(),
            releases: Releases::default(),
            fencers,
            quarantine,
            restart: Arc::new(restart),
            tasks: TaskTracker::new(),
            stopping: CancellationToken::new(),
            control,
        }))
    }

    pub(crate) fn directory(&self) -> &Directory {
        &self.0.directory
    }

    pub(crate) fn registry(&self) -> &Registry {
        &self.0.registry
    }

    pub(crate) fn registrations(&self) -> &Registrations {
        &self.0.registrations
    }

    pub(crate) fn releases(&self) -> &Releases {
        &self.0.releases
    }

    pub(crate) fn fencers(&self) -> &Fencers {
        &self.0.fencers
    }

    pub(crate) fn quarantine(&self) -> &Arc<Quarantine> {
        &self.0.quarantine
    }

    pub(crate) fn restart(&self) -> &Arc<Restart> {
        &self.0.restart
    }

    /// Whether the state directory is still this host agent's. When it is not, this ends every stream.
    pub(crate) fn is_current(&self) -> bool {
        let Err(loss) = self.0.restart.look() else { return true };
        if self.0.restart.on_loss(loss) {
            tracing::error!("{loss}");
            self.0.stopping.cancel();
            for session in self.registry().list() {
                let SessionError { reason, message, .. } = handshake::superseded();
                session.end(reason, message);
            }
        }
        false
    }

    /// Whether it was found that one has.
    pub(crate) fn is_superseded(&self) -> bool {
        self.0.restart.superseded().is_cancelled()
    }

    /// Waits for a round on a caller's behalf, but not for one that a superseded host agent will never
    /// complete.
    async fn outcome(&self, round: &WaitingRound, wait: Wait) -> Result<RoundResult, NotifyError> {
        if self.0.restart.journal().is_none() {
            return Ok(round.wait(wait).await);
        }
        tokio::select! {
            // First: what is complete is vouched for, or not.
            biased;
            result = round.wait(wait) => self.vouch(result),
            () = self.0.restart.superseded().cancelled() => Err(NotifyError::Superseded),
        }
    }

    /// Nobody is told that devices have stopped when a successor may have granted what this one knows
    /// nothing of.
    fn vouch(&self, result: RoundResult) -> Result<RoundResult, NotifyError> {
        match result.verdict {
            Verdict::Quiesced if !self.is_current() => Err(NotifyError::Superseded),
            _ => Ok(result),
        }
    }

    /// Where tasks run that belong to no session.
    pub(crate) fn control(&self) -> &tokio::runtime::Handle {
        &self.0.control
    }

    pub(crate) fn tasks(&self) -> &TaskTracker {
        &self.0.tasks
    }

    pub(crate) fn stopping(&self) -> &CancellationToken {
        &self.0.stopping
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.0.stopping.is_cancelled()
    }

    pub(crate) fn session_config(&self) -> SessionConfig {
        self.0.config.session
    }

    pub(crate) fn wants_timing(&self) -> bool {
        self.0.config.stage_timing
    }

    pub(crate) fn source_fault_timeout(&self) -> Duration {
        self.0.config.source_fault_timeout
    }

    /// Which run this is.
    #[must_use]
    pub fn incarnation(&self) -> Incarnation {
        self.0.config.incarnation
    }

    /// What leases and rounds are measured on.
    #[must_use]
    pub fn clock(&self) -> Clock {
        self.0.config.clock
    }

    /// `T_ack + T_fence`: when a round is answered that waits for a device which is not certain to stop
    /// (BoundedResolution). `T_fence` is what a device that enforces its lease takes to be fenced, or one
    /// attempt of the slowest fencer, whichever is longer.
    pub(crate) fn bound(&self) -> Duration {
        let session = self.session_config();
        session.ack_timeout + session.lease.host_duration().max(self.fencers().longest_attempt())
    }

    /// Makes an address space known. By [`Notifier::register`] it is strict.
    ///
    /// # Errors
    /// [`NotifyError::TooManyAddressSpaces`], [`NotifyError::Stopping`].
    pub fn register_address_space(
        &self,
        name: &str,
        source: Arc<dyn Translate>,
        strictness: Strictness,
    ) -> Result<AddressSpaceId, NotifyError> {
        if self.is_stopping() {
            return Err(NotifyError::Stopping);
        }
        let space = self.directory().register(name, source, strictness, self.0.restart.survivors())?;
        tracing::debug!(address_space = space.id.get(), name, source = space.source.source(), "registered");
        Ok(space.id)
    }

    /// Rounds that wait for a target, in all address spaces.
    #[must_use]
    pub fn rounds_in_flight(&self) -> usize {
        self.directory().list().iter().map(|space| space.rounds_in_flight()).sum()
    }

    /// Makes an address space known by the name that an earlier run of the host agent gave it, so that the
    /// devices which know that name find it again.
    ///
    /// # Errors
    /// [`NotifyError::AddressSpaceTaken`], [`NotifyError::OtherStrictness`], and as [`Notifier::register`].
    pub fn take_back(
        &self,
        id: AddressSpaceId,
        name: &str,
        source: Arc<dyn Translate>,
        strictness: Strictness,
    ) -> Result<(), NotifyError> {
        if self.is_stopping() {
            return Err(NotifyError::Stopping);
        }
        let space = self.directory().take_back(id, name, source, strictness, self.0.restart.survivors())?;
        self.releases().forget(id);
        tracing::debug!(address_space = id.get(), name, source = space.source.source(), "taken back");
        Ok(())
    }

    /// Waits for a round that was not quiesced when its caller's time passed. Waiting twice gives the
    /// same answer twice. Once its bracket has ended only the verdict is known any more, not the
    /// targets.
    ///
    /// # Errors
    /// [`NotifyError::BracketUnknown`] when there was no such event, [`NotifyError::AddressSpaceUnknown`].
    ///
    /// # Cancel safety
    /// Cancel safe: nothing about the round changes.
    pub async fn await_round(
        &self,
        address_space: AddressSpaceId,
        seq: Seq,
        wait: Wait,
    ) -> Result<RoundResult, NotifyError> {
        let called = self.clock().now();
        let space = self.directory().expect(address_space)?;
        // In this order: a round is listed with its sequence, in one step, and leaves the list complete.
        let last_seq = space.order.lock().gate.last_seq();
        let waiting = space.rounds.lock().get(&seq).cloned();
        if let Some(round) = waiting {
            return self.outcome(&round, self.bounded(wait, &round)).await;
        }
        if Some(seq) > last_seq || Some(seq) <= space.began_after {
            return Err(NotifyError::BracketUnknown { address_space, seq });
        }
        self.vouch(self.nothing_waits(Verdict::Quiesced, Some(seq), called))
    }

    /// [1] to [3]: takes a place among the rounds in flight, then opens the round. Until the place is
    /// there nothing has happened; after it nothing awaits.
    async fn open(
        &self,
        space: &Arc<AddressSpace>,
        call: Call,
        wait: Wait,
        called: Moment,
    ) -> Result<Dispatched, NotifyError> {
        // A replacement is a grant, and nothing is granted while somebody is waited for since a restart (RestartGrace).
        let mut call = call;
        if matches!(call.method, Method::ChangePte(_)) && !self.0.restart.is_accounted_for() {
            call.method = Method::Invalidate;
        }
        let leave = match wait {
            Wait::NotAtAll => Leave::NotToWait,
            Wait::ForTargets | Wait::AtMost(_) => {
                self.room_in_quarantine(space, &call, wait).await?;
                place(space, &call, self.rest(wait, called), self.bound()).await?
            }
        };
        if self.is_superseded() {
            return Err(NotifyError::Superseded);
        }
        if self.is_stopping() && call.method != Method::Release {
            return Err(NotifyError::Stopping);
        }
        let (method, quarantine) = (call.method, self.quarantine());
        let dispatched = space.open_round(call, leave, called, self.clock(), self.tasks())?;
        if matches!(dispatched, Dispatched::WouldBlock(_))
            && quarantine::parks(method)
            && quarantine.is_full()
        {
            return Err(self.quarantine_full());
        }
        Ok(dispatched)
    }

    /// Waits while the quarantine's budget is spent and the call's pages could come there as well; see
    /// [`crate::quarantine`].
    async fn room_in_quarantine(
        &self,
        space: &AddressSpace,
        call: &Call,
        wait: Wait,
    ) -> Result<(), NotifyError> {
        let might_be_parked = || might_be_parked(space, call, wait);
        let room = async {
            loop {
                let freed = self.quarantine().freed();
                tokio::pin!(freed);
                // Before the look, so that no charge is given back unheard between the two.
                freed.as_mut().enable();
                if !self.quarantine().is_full() || !might_be_parked() {
                    return;
                }
                freed.await;
            }
        };
        let limit = match wait {
            Wait::AtMost(limit) => limit,
            Wait::ForTargets | Wait::NotAtAll => self.bound(),
        };
        if !self.quarantine().is_full() {
            return Ok(());
        }
        tokio::time::timeout(limit, room).await.map_err(|_| self.quarantine_full())
    }

    fn quarantine_full(&self) -> NotifyError {
        let (parked, budget) = (self.quarantine().parked(), self.quarantine().budget());
        NotifyError::QuarantineFull {
            bytes: parked.bytes,
            pages: parked.pages,
            most_bytes: budget.bytes,
            most_pages: budget.pages,
        }
    }

    /// The same for a call that may be a retry: then an earlier try has opened the round, or is about to.
    async fn open_once(
        &self,
        space: &Arc<AddressSpace>,
        call: Call,
        wait: Wait,
        called: Moment,
        retry: Option<&Try<'_>>,
    ) -> Result<Dispatched, NotifyError> {
        let open = self.open(space, call, wait, called);
        let Some(retry) = retry else { return open.await };
        match wait {
            // Its time is its own, whoever is about to open the round. It is told of what that one waits for, as in
            // `open`: first for room in the quarantine, then for a place.
            Wait::AtMost(limit) => tokio::time::timeout(limit, retry.open(open)).await.unwrap_or_else(|_| {
                if self.quarantine().is_full() && might_be_parked(space, &call, wait) {
                    return Err(self.quarantine_full());
                }
                Err(NotifyError::TooManyRounds { address_space: space.id, most: space.most_rounds })
            }),
            Wait::ForTargets | Wait::NotAtAll => retry.open(open).await,
        }
    }

    /// What is left of the caller's time since it called.
    fn rest(&self, wait: Wait, called: Moment) -> Wait {
        match wait {
            Wait::AtMost(limit) => Wait::AtMost(limit.saturating_sub(self.clock().now().since(called))),
            Wait::ForTargets | Wait::NotAtAll => wait,
        }
    }

    /// A wait for a device that is not certain to stop has a bound, whatever its caller says.
    fn bounded(&self, wait: Wait, round: &WaitingRound) -> Wait {
        match wait {
            Wait::ForTargets if round.enforcement() == Enforcement::ByNobody => Wait::AtMost(self.bound()),
            other => other,
        }
    }

    /// [8], as the caller sees it. Who is not told that its pages may go has to keep them.
    async fn answer(
        &self,
        round: &Arc<WaitingRound>,
        wait: Wait,
        called: Moment,
        resident_pages: Option<u64>,
    ) -> Result<RoundResult, NotifyError> {
        let result = self.outcome(round, self.bounded(self.rest(wait, called), round)).await?;
        if result.verdict == Verdict::NotQuiesced {
            let event = round.look(|round| *round.event());
            if quarantine::parks(event.method) {
                round.park(self.quarantine().park(&event, resident_pages));
            }
        }
        Ok(result)
    }

    /// A whole method whose bracket is its own: opens, waits, and the round's task ends the bracket.
    async fn bracketed(
        &self,
        address_space: AddressSpaceId,
        method: Method,
        range: AddrRange,
        (cause, owner): (Cause, Option<OwnerTag>),
        wait: Wait,
        retry: Option<&Try<'_>>,
    ) -> Result<RoundResult, NotifyError> {
        let called = self.clock().now();
        let space = self.directory().expect(address_space)?;
        let call = Call { range, method, cause, owner, bracket: EndedBy::Task };
        match self.open_once(&space, call, wait, called, retry).await? {
            Dispatched::Open(round) => self.answer(&round, wait, called, None).await,
            Dispatched::WouldBlock(targets) => Ok(self.would_block(targets, called)),
        }
    }

    /// [`Notifier::invalidate_range_start`], which may be a retry.
    pub(crate) async fn start(
        &self,
        invalidation: Invalidation,
        retry: Option<&Try<'_>>,
    ) -> Result<RoundResult, NotifyError> {
        let called = self.clock().now();
        let Invalidation { address_space, range, cause, owner, wait, resident_pages } = invalidation;
        let space = self.directory().expect(address_space)?;
        let call = Call { range, method: Method::Invalidate, cause, owner, bracket: EndedBy::Caller };
        match self.open_once(&space, call, wait, called, retry).await? {
            Dispatched::WouldBlock(targets) => Ok(self.would_block(targets, called)),
            Dispatched::Open(round) => {
                // Who can try again comes back for the sequence; the bracket waits for it, as one of those
                // that may be open.
                let answered = retry.is_some();
                let mut caller = Unanswered { space: &space, round: &round, answered, clock: self.clock() };
                let result = self.answer(&round, wait, called, resident_pages).await;
                caller.answered = true;
                result
            }
        }
    }

    /// [`Notifier::change_pte`], which may be a retry.
    pub(crate) async fn change(
        &self,
        address_space: AddressSpaceId,
        translation: Translation,
        wait: Wait,
        retry: Option<&Try<'_>>,
    ) -> Result<RoundResult, NotifyError> {
        let method = Method::ChangePte(translation);
        self.bracketed(address_space, method, translation.range, (Cause::Clear, None), wait, retry).await
    }

    /// `invalidate_page`, on somebody's behalf.
    pub(crate) async fn invalidate_page_for(
        &self,
        address_space: AddressSpaceId,
        address: u64,
        cause: Cause,
        owner: Option<OwnerTag>,
        wait: Wait,
        retry: Option<&Try<'_>>,
    ) -> Result<RoundResult, NotifyError> {
        let page = AddrRange::page_of(address, PageSize::BASE);
        self.bracketed(address_space, Method::Invalidate, page, (cause, owner), wait, retry).await
    }

    /// A young query: the devices' bits, and what they reported before it.
    pub(crate) async fn young(
        &self,
        address_space: AddressSpaceId,
        method: Method,
        range: AddrRange,
        wait: Wait,
        retry: Option<&Try<'_>>,
    ) -> Result<RoundResult, NotifyError> {
        let space = self.directory().expect(address_space)?;
        let mut result =
            self.bracketed(address_space, method, range, (Cause::Clear, None), wait, retry).await?;
        if result.verdict != Verdict::WouldBlock {
            let take = || space.young.lock().clear(range);
            result.young |= retry.map_or_else(take, |retry| retry.young(take));
        }
        Ok(result)
    }

    fn would_block(&self, targets: Vec<shootdown_core::round::TargetReport>, called: Moment) -> RoundResult {
        RoundResult {
            dirty: !targets.is_empty(),
            targets,
            ..self.nothing_waits(Verdict::WouldBlock, None, called)
        }
    }

    fn nothing_waits(&self, verdict: Verdict, seq: Option<Seq>, called: Moment) -> RoundResult {
        let times = RoundTimes {
            called,
            dispatched: called,
            resolved: None,
            finished: None,
            answered: self.clock().now(),
        };
        RoundResult {
            verdict,
            seq,
            targets: Vec::new(),
            young: false,
            dirty: false,
            host_incarnation: self.incarnation(),
            times,
        }
    }

    /// Releases, and tells how far it has come: within the bound, and if that was NotQuiesced, once more at the end.
    pub(crate) fn release_telling(
        &self,
        address_space: AddressSpaceId,
        tell: mpsc::Sender<Result<RoundResult, NotifyError>>,
    ) {
        match self.directory().expect(address_space) {
            Ok(space) => {
                let release = self.clone().release_to_its_end(space, tell);
                drop(self.0.tasks.spawn_on(release, &self.0.control));
            }
            Err(error) => drop(tell.try_send(Err(error))),
        }
    }

    /// Runs to its end whatever becomes of the caller: see [`Notifier::release`]. Where a device did not stop
    /// in time the caller is told so before the end, which comes when the device has.
    async fn release_to_its_end(
        self,
        space: Arc<AddressSpace>,
        tell: mpsc::Sender<Result<RoundResult, NotifyError>>,
    ) {
        let called = self.clock().now();
        let call = Call {
            range: AddrRange::ALL,
            method: Method::Release,
            cause: Cause::Release,
            owner: None,
            bracket: EndedBy::Nobody,
        };
        // Two answers at most, and room for both. A caller that has gone away hears nothing.
        let tell = |answer| drop(tell.try_send(answer));
        let round = match self.open(&space, call, Wait::ForTargets, called).await {
            Ok(Dispatched::Open(round)) => round,
            Ok(Dispatched::WouldBlock(targets)) => return tell(Ok(self.would_block(targets, called))),
            Err(error) => return tell(Err(error)),
        };
        // Held faults look again, and find the address space released.
        space.bracket_ended.notify_waiters();
        let mut result = match self.answer(&round, Wait::ForTargets, called, None).await {
            Ok(result) => result,
            Err(error) => return tell(Err(error)),
        };
        if !result.is_quiesced() {
            tell(Ok(result));
            result = match self.outcome(&round, Wait::ForTargets).await {
                Ok(result) if result.is_quiesced() => result,
                // Its runtime is gone, the host agent was cut; or a successor has taken its place.
                Ok(_) | Err(_) => return,
            };
        }
        let subscribers = space.subscribers.update_with(|interest| {
            let handles: Vec<_> =
                interest.subscriptions().map(|subscription| Arc::clone(&subscription.handle)).collect();
            (shootdown_core::interest::Interest::default(), handles)
        });
        for session in subscribers {
            session.on_released(space.id);
        }
        space.subscribers.synchronize().await;
        self.directory().forget(space.id);
        space.source.on_released();
        tell(Ok(result));
    }
}

impl Notifier for Host {
    fn register(&self, name: &str, source: Arc<dyn Translate>) -> Result<AddressSpaceId, NotifyError> {
        self.register_address_space(name, source, Strictness::Strict)
    }

    async fn invalidate_range_start(&self, invalidation: Invalidation) -> Result<RoundResult, NotifyError> {
        self.start(invalidation, None).await
    }

    fn invalidate_range_end(&self, address_space: AddressSpaceId, seq: Seq) -> Result<(), NotifyError> {
        let space = self.directory().expect(address_space)?;
        let round = space.rounds.lock().get(&seq).cloned();
        match round.map(|round| round.on_end()) {
            Some(End::Now) => space.end_bracket(seq, self.clock()),
            Some(End::WhenComplete) => {}
            Some(End::NotTheCallers) | None => {
                return Err(NotifyError::BracketUnknown { address_space, seq });
            }
        }
        Ok(())
    }

    async fn invalidate_page(
        &self,
        address_space: AddressSpaceId,
        address: u64,
        cause: Cause,
        wait: Wait,
    ) -> Result<RoundResult, NotifyError> {
        self.invalidate_page_for(address_space, address, cause, None, wait, None).await
    }

    async fn change_pte(
        &self,
        address_space: AddressSpaceId,
        translation: Translation,
        wait: Wait,
    ) -> Result<RoundResult, NotifyError> {
        self.change(address_space, translation, wait, None).await
    }

    async fn clear_flush_young(
        &self,
        address_space: AddressSpaceId,
        range: AddrRange,
        wait: Wait,
    ) -> Result<RoundResult, NotifyError> {
        self.young(address_space, Method::ClearFlushYoung, range, wait, None).await
    }

    async fn clear_young(
        &self,
        address_space: AddressSpaceId,
        range: AddrRange,
        wait: Wait,
    ) -> Result<RoundResult, NotifyError> {
        self.young(address_space, Method::ClearYoung, range, wait, None).await
    }

    fn test_young(&self, address_space: AddressSpaceId, range: AddrRange) -> Result<bool, NotifyError> {
        let space = self.directory().expect(address_space)?;
        let young = space.young.lock().test(range);
        Ok(young)
    }

    async fn release(&self, address_space: AddressSpaceId) -> Result<RoundResult, NotifyError> {
        let space = self.directory().expect(address_space)?;
        let (tell, mut told) = mpsc::channel(2);
        drop(self.0.tasks.spawn_on(self.clone().release_to_its_end(space, tell), &self.0.control));
        // The task is not aborted and does not panic, so this fails only when the runtime is gone.
        told.recv().await.unwrap_or(Err(NotifyError::Stopping))
    }
}

/// A bracket whose caller has not been answered yet. If it never is, because its future was dropped,
/// nobody knows the sequence to end the bracket by, and the start counts as aborted (Pairing): the
/// bracket ends as soon as the round is complete, and never before.
struct Unanswered<'a> {
    space: &'a Arc<AddressSpace>,
    round: &'a Arc<WaitingRound>,
    answered: bool,
    clock: Clock,
}

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        if !self.answered && self.round.on_end() == End::Now {
            self.space.end_bracket(self.round.look(|round| round.event().seq), self.clock);
        }
    }
}

/// Whether the call's pages could come into quarantine: it has a target that may not stop within its caller's time.
fn might_be_parked(space: &AddressSpace, call: &Call, wait: Wait) -> bool {
    let until_the_end = matches!(wait, Wait::ForTargets);
    call.method != Method::Release
        && quarantine::parks(call.method)
        && space
            .subscribers
            .read()
            .targets(call.range, call.cause, call.method)
            .iter()
            .any(|target| !until_the_end || target.handle.enforcement == Enforcement::ByNobody)
}

/// A place among the rounds in flight. Who has no time of its own waits for as long as a round may take: then there is
/// none that will end (BoundedResolution). A release comes once, and needs none.
async fn place(space: &AddressSpace, call: &Call, wait: Wait, bound: Duration) -> Result<Leave, NotifyError> {
    if call.method == Method::Release {
        return Ok(Leave::ToWaitAlone);
    }
    let full = || NotifyError::TooManyRounds { address_space: space.id, most: space.most_rounds };
    let permits = Arc::clone(&space.permits);
    match Arc::clone(&permits).try_acquire_owned() {
        Ok(permit) => return Ok(Leave::ToWait(permit)),
        Err(TryAcquireError::NoPermits) => {}
        Err(TryAcquireError::Closed) => return Err(NotifyError::Stopping),
    }
    let acquired = match wait {
        Wait::NotAtAll => return Err(full()),
        Wait::AtMost(limit) => tokio::time::timeout(limit, permits.acquire_owned()).await,
        Wait::ForTargets => tokio::time::timeout(bound, permits.acquire_owned()).await,
    };
    acquired.map_err(|_| full())?.map(Leave::ToWait).map_err(|_| NotifyError::Stopping)
}
