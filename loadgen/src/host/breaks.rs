//! Breaks the rules of the source's side, one a run, on purpose: see [`Rule`]. Without a rule every call goes
//! through as it came.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use shootdown_client::{AddrRange, AddressSpaceId, Cause, Moment, OwnerTag, PageSize, Seq, Translation};
use shootdown_server::clock::Clock;
use shootdown_server::source::memory::Twin;
use shootdown_server::source::{
    Invalidation, Notifier, NotifyError, RoundResult, RoundTimes, Translate, Verdict, Wait,
};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use crate::rule::Rule;

/// How long a bracket that was ended too early is left before its caller goes on: devices must have the time
/// to fault in the window, which is there by accident only.
const WINDOW: Duration = Duration::from_millis(20);

/// How much later a call is made that comes too late: time for some reads, on a machine that is busy too.
const LATE: Duration = Duration::from_millis(50);

/// How much later a hint is: after its bracket, and before the page is taken from devices once more.
const HINT_LATE: Duration = Duration::from_millis(4);

/// The owner tag of the device that skips.
pub(crate) const SKIPPING: OwnerTag = OwnerTag::FIRST;

/// A notifier that may break a rule.
#[derive(Debug)]
pub(super) struct Breaks<N> {
    inner: Arc<N>,
    rule: Option<Rule>,
    moving: Moving,
    clock: Clock,
    runtime: Handle,
    state: Mutex<State>,
}

/// Brackets that are not what the source thinks.
#[derive(Debug, Default)]
struct State {
    /// Those that were ended too early; the source's own end of it changes nothing.
    ended: HashSet<(AddressSpaceId, Seq)>,
    /// Those whose round is still going on behind the source's back, by the sequence that it was given.
    behind: HashMap<Seq, oneshot::Sender<()>>,
    invented: u64,
}

/// Where pages are about to be moved to, as the workload says it: a place is made free before, and a device
/// that keeps what it holds there must not hear of that either. A clone is the same.
#[derive(Debug, Clone, Default)]
pub(super) struct Moving(Arc<Mutex<Vec<(AddressSpaceId, AddrRange)>>>);

/// A place that pages are moved to, until it is dropped.
#[derive(Debug)]
pub(super) struct MovingTo {
    moving: Moving,
    place: (AddressSpaceId, AddrRange),
}

/// What becomes of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Deed {
    /// It goes through.
    Honest,
    /// It goes through in the name of the device that skips.
    ForTheSkipping,
    /// It goes through, and its bracket ends at once.
    EndedEarly,
    /// It is answered at once, and goes through so much later.
    Behind(Duration),
    /// It is answered, and never goes through.
    Never,
}

impl<N: Notifier> Breaks<N> {
    pub(super) fn new(inner: N, rule: Option<Rule>, moving: Moving, clock: Clock, runtime: Handle) -> Self {
        Self { inner: Arc::new(inner), rule, moving, clock, runtime, state: Mutex::default() }
    }

    pub(super) fn register(
        &self,
        name: &str,
        source: Arc<dyn Translate>,
    ) -> Result<AddressSpaceId, NotifyError> {
        self.inner.register(name, source)
    }

    /// Whose call it is says [`Twin::current`].
    fn deed(&self, address_space: AddressSpaceId, range: AddrRange) -> Deed {
        let Some(rule) = self.rule else { return Deed::Honest };
        let (all, twins, deed): (_, &[Twin], _) = match rule {
            Rule::ReleaseBeforeAck => (true, &[], Deed::Behind(Duration::ZERO)),
            Rule::SkipOneTarget => (true, &[], Deed::ForTheSkipping),
            Rule::GrantInWindow => (true, &[], Deed::EndedEarly),
            Rule::FlushAfterAck | Rule::YoungBitsDropped | Rule::ChangePteOutsideBracket => {
                (true, &[], Deed::Honest)
            }
            Rule::CowFreeBeforeNotify => (false, &[Twin::CopyOnWrite], Deed::Behind(LATE)),
            Rule::PlaceholderNotInvalidated => (false, &[Twin::Placeholder], Deed::Never),
            Rule::WriteKeptAfterMkclean => (false, &[Twin::WriteBack], Deed::Never),
            Rule::SwapFailMistaken => (false, &[Twin::SwapOut], Deed::Never),
            Rule::MigrateNotNotified => (false, &[Twin::Migrate], Deed::Never),
            Rule::ClusterOutsideBracket => (false, &[Twin::Cluster], Deed::Behind(LATE)),
            Rule::GatherFreedBeforeFlush => {
                (false, &[Twin::Unmap, Twin::DontNeed, Twin::Truncate], Deed::Behind(Duration::ZERO))
            }
            Rule::ReleaseAfterUnmap => (false, &[Twin::Exit], Deed::Behind(LATE)),
            Rule::CollapseNotBracketed => (false, &[Twin::Collapse], Deed::Never),
            Rule::ForkWriteKept => (false, &[Twin::Fork], Deed::Never),
            Rule::SnapshotWriteKept => (false, &[Twin::Snapshot], Deed::Never),
            Rule::MprotectWriteKept => (false, &[Twin::Protect], Deed::Never),
            Rule::MremapNewPlaceKept => {
                let twins: &[Twin] = match self.moving.is_place(address_space, range) {
                    true => &[Twin::Unmap, Twin::Remap],
                    false => &[],
                };
                (false, twins, Deed::Never)
            }
            Rule::MremapOldPlaceKept => {
                let twins: &[Twin] = match self.moving.is_place(address_space, range) {
                    true => &[],
                    false => &[Twin::Remap],
                };
                (false, twins, Deed::Never)
            }
        };
        let is_meant = all || Twin::current().is_some_and(|twin| twins.contains(&twin));
        if is_meant { deed } else { Deed::Honest }
    }

    pub(super) async fn start(&self, invalidation: Invalidation) -> Result<RoundResult, NotifyError> {
        let deed = self.deed(invalidation.address_space, invalidation.range);
        self.start_as(deed, invalidation).await
    }

    async fn start_as(&self, deed: Deed, invalidation: Invalidation) -> Result<RoundResult, NotifyError> {
        match deed {
            Deed::Honest => self.inner.invalidate_range_start(invalidation).await,
            Deed::ForTheSkipping => {
                let owner = Some(SKIPPING);
                self.inner.invalidate_range_start(Invalidation { owner, ..invalidation }).await
            }
            Deed::Behind(late) => Ok(self.start_behind(invalidation, Some(late))),
            Deed::Never => Ok(self.start_behind(invalidation, None)),
            Deed::EndedEarly => {
                let round = self.inner.invalidate_range_start(invalidation).await?;
                if let Some(seq) = round.seq {
                    self.inner.invalidate_range_end(invalidation.address_space, seq)?;
                    self.state.lock().ended.insert((invalidation.address_space, seq));
                }
                tokio::time::sleep(WINDOW).await;
                Ok(round)
            }
        }
    }

    pub(super) fn end(&self, address_space: AddressSpaceId, seq: Seq) -> Result<(), NotifyError> {
        {
            let mut state = self.state.lock();
            if state.ended.remove(&(address_space, seq)) {
                return Ok(());
            }
            if let Some(end) = state.behind.remove(&seq) {
                // The round's task may have failed and be gone.
                let _ = end.send(());
                return Ok(());
            }
        }
        self.inner.invalidate_range_end(address_space, seq)
    }

    /// A page is a bracket around one page: the brackets' breaks are its own.
    pub(super) async fn page(
        &self,
        address_space: AddressSpaceId,
        address: u64,
        cause: Cause,
        wait: Wait,
    ) -> Result<RoundResult, NotifyError> {
        let range = AddrRange::page_of(address, PageSize::BASE);
        let deed = self.deed(address_space, range);
        if deed == Deed::Honest {
            return self.inner.invalidate_page(address_space, address, cause, wait).await;
        }
        let invalidation = Invalidation { address_space, range, cause, owner: None, wait };
        let round = self.start_as(deed, invalidation).await?;
        if let Some(seq) = round.seq {
            self.end(address_space, seq)?;
        }
        Ok(round)
    }

    /// Too late the hint names a page that may be gone.
    pub(super) async fn change_pte(
        &self,
        address_space: AddressSpaceId,
        translation: Translation,
        wait: Wait,
    ) -> Result<RoundResult, NotifyError> {
        if self.rule != Some(Rule::ChangePteOutsideBracket) {
            return self.inner.change_pte(address_space, translation, wait).await;
        }
        let address = translation.range.start();
        let round = self.inner.invalidate_page(address_space, address, Cause::Clear, wait).await?;
        let inner = Arc::clone(&self.inner);
        self.runtime.spawn(async move {
            tokio::time::sleep(HINT_LATE).await;
            inner.change_pte(address_space, translation, Wait::ForTargets).await.map(drop)
        });
        Ok(round)
    }

    pub(super) async fn clear_flush_young(
        &self,
        address_space: AddressSpaceId,
        range: AddrRange,
        wait: Wait,
    ) -> Result<RoundResult, NotifyError> {
        self.inner.clear_flush_young(address_space, range, wait).await.map(|round| self.seen(round))
    }

    pub(super) async fn clear_young(
        &self,
        address_space: AddressSpaceId,
        range: AddrRange,
        wait: Wait,
    ) -> Result<RoundResult, NotifyError> {
        self.inner.clear_young(address_space, range, wait).await.map(|round| self.seen(round))
    }

    fn seen(&self, round: RoundResult) -> RoundResult {
        let young = round.young && self.rule != Some(Rule::YoungBitsDropped);
        RoundResult { young, ..round }
    }

    pub(super) fn test_young(
        &self,
        address_space: AddressSpaceId,
        range: AddrRange,
    ) -> Result<bool, NotifyError> {
        self.inner.test_young(address_space, range)
    }

    pub(super) async fn release(&self, address_space: AddressSpaceId) -> Result<RoundResult, NotifyError> {
        let Deed::Behind(late) = self.deed(address_space, AddrRange::ALL) else {
            return self.inner.release(address_space).await;
        };
        let called = self.clock.now();
        let inner = Arc::clone(&self.inner);
        self.runtime.spawn(async move {
            tokio::time::sleep(late).await;
            inner.release(address_space).await.map(drop)
        });
        Ok(self.pretend(None, called))
    }

    /// The real round goes on in a task so much later, or does not; its bracket is ended when the source has
    /// ended the pretended one.
    fn start_behind(&self, invalidation: Invalidation, late: Option<Duration>) -> RoundResult {
        let called = self.clock.now();
        let (end_tx, end_rx) = oneshot::channel();
        let seq = {
            let mut state = self.state.lock();
            state.invented += 1;
            // From the top, where no sequence of a run comes.
            let seq = Seq::new(u64::MAX - state.invented).expect("far from 0");
            state.behind.insert(seq, end_tx);
            seq
        };
        if let Some(late) = late {
            let inner = Arc::clone(&self.inner);
            self.runtime.spawn(async move {
                tokio::time::sleep(late).await;
                let Ok(round) = inner.invalidate_range_start(invalidation).await else { return };
                // Dropped unsent where the source was dropped: the bracket must end as well.
                let _ = end_rx.await;
                if let Some(seq) = round.seq {
                    let _ = inner.invalidate_range_end(invalidation.address_space, seq);
                }
            });
        }
        self.pretend(Some(seq), called)
    }

    fn pretend(&self, seq: Option<Seq>, called: Moment) -> RoundResult {
        let times = RoundTimes { called, dispatched: called, resolved: None, answered: self.clock.now() };
        RoundResult {
            verdict: Verdict::Quiesced,
            seq,
            targets: Vec::new(),
            young: false,
            dirty: false,
            times,
        }
    }
}

impl Moving {
    /// Pages are about to be moved to `range`.
    pub(super) fn begin(&self, address_space: AddressSpaceId, range: AddrRange) -> MovingTo {
        let place = (address_space, range);
        self.0.lock().push(place);
        MovingTo { moving: self.clone(), place }
    }

    fn is_place(&self, address_space: AddressSpaceId, range: AddrRange) -> bool {
        let within =
            |(id, place): &(_, AddrRange)| *id == address_space && place.intersection(range) == Some(range);
        self.0.lock().iter().any(within)
    }
}

impl Drop for MovingTo {
    fn drop(&mut self) {
        let mut places = self.moving.0.lock();
        if let Some(at) = places.iter().position(|place| *place == self.place) {
            places.swap_remove(at);
        }
    }
}
