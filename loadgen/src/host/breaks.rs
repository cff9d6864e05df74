//! Breaks the rules of the source's side, one a run, on purpose: see [`Rule`]. Without a rule every call goes
//! through as it came.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use shootdown_client::{
    AddrRange, AddressSpaceId, Cause, Incarnation, Moment, OwnerTag, PageSize, Seq, Translation,
};
use shootdown_server::clock::Clock;
use shootdown_server::source::memory::Twin;
use shootdown_server::source::{
    Invalidation, Notifier, NotifyError, RoundResult, RoundTimes, Translate, Verdict, Wait,
};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::told::{Part, Told};
use super::walks::Walks;
use crate::rule::Rule;

/// How long a bracket that was ended too early is left before its caller goes on: devices must have the time
/// to fault in the window, which is there by accident only.
const WINDOW: Duration = Duration::from_millis(20);

/// How much later a call is made that comes too late: time for some reads, on a machine that is busy too.
const LATE: Duration = Duration::from_millis(50);

/// Sequences above it are invented: no event of a run comes so far.
const LAST_REAL: u64 = u64::MAX / 2;

/// How much later a hint is than the copy that makes it wrong: devices must hold the copy by then.
const HINT_LATE: Duration = Duration::from_millis(4);

/// The owner tag of the device that skips.
pub(crate) const SKIPPING: OwnerTag = OwnerTag::FIRST;

/// A notifier that may break a rule.
#[derive(Debug)]
pub(super) struct Breaks<N> {
    inner: Arc<N>,
    rule: Option<Rule>,
    moving: Moving,
    walks: Walks,
    told: Told,
    clock: Clock,
    runtime: Handle,
    state: Mutex<State>,
}

/// What the source is answered.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) round: RoundResult,
    /// Which part the round had: it may be nobody's.
    pub(super) part: Part,
}

/// Brackets that are not what the source thinks.
#[derive(Debug, Default)]
struct State {
    /// Those that were ended too early; the source's own end of it changes nothing.
    ended: HashSet<(AddressSpaceId, Seq)>,
    /// Those whose round is still going on behind the source's back, by the sequence that it was given.
    behind: HashMap<Seq, oneshot::Sender<()>>,
    invented: u64,
    /// Hints that are kept back, by the page that they are of.
    hints: HashMap<(AddressSpaceId, u64), Translation>,
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
    pub(super) fn new(
        inner: N,
        rule: Option<Rule>,
        workload: (Moving, Walks),
        told: Told,
        clock: Clock,
        runtime: Handle,
    ) -> Self {
        let (inner, state, (moving, walks)) = (Arc::new(inner), Mutex::default(), workload);
        Self { inner, rule, moving, walks, told, clock, runtime, state }
    }

    pub(super) fn register(
        &self,
        name: &str,
        source: Arc<dyn Translate>,
    ) -> Result<AddressSpaceId, NotifyError> {
        match self.rule {
            Some(Rule::PgtablesFreedUnderWalk) => self.inner.register(name, self.walks.through(source)),
            _ => self.inner.register(name, source),
        }
    }

    /// Whose call it is says [`Twin::current`].
    fn deed(&self, address_space: AddressSpaceId, range: AddrRange) -> Deed {
        let Some(rule) = self.rule else { return Deed::Honest };
        let (all, twins, deed): (_, &[Twin], _) = match rule {
            Rule::ReleaseBeforeAck => (true, &[], Deed::Behind(Duration::ZERO)),
            Rule::SkipOneTarget => (true, &[], Deed::ForTheSkipping),
            Rule::GrantInWindow => (true, &[], Deed::EndedEarly),
            Rule::FlushAfterAck
            | Rule::YoungBitsDropped
            | Rule::ChangePteOutsideBracket
            | Rule::PgtablesFreedUnderWalk => (true, &[], Deed::Honest),
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

    pub(super) async fn start(&self, invalidation: Invalidation) -> Result<Answer, NotifyError> {
        let deed = self.deed(invalidation.address_space, invalidation.range);
        self.start_as(deed, invalidation).await
    }

    async fn start_as(&self, deed: Deed, invalidation: Invalidation) -> Result<Answer, NotifyError> {
        match deed {
            Deed::Honest => self.inner.invalidate_range_start(invalidation).await.map(Answer::awaited),
            Deed::ForTheSkipping => {
                let invalidation = Invalidation { owner: Some(SKIPPING), ..invalidation };
                self.inner.invalidate_range_start(invalidation).await.map(Answer::awaited)
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
                Ok(Answer::awaited(round))
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
    ) -> Result<Answer, NotifyError> {
        let range = AddrRange::page_of(address, PageSize::BASE);
        let deed = self.deed(address_space, range);
        if deed == Deed::Honest {
            let round = self.inner.invalidate_page(address_space, address, cause, wait).await?;
            self.deliver_late_hint(address_space, address);
            return Ok(Answer::awaited(round));
        }
        let invalidation =
            Invalidation { address_space, range, cause, owner: None, wait, resident_pages: None };
        let answer = self.start_as(deed, invalidation).await?;
        if let Some(seq) = answer.round.seq {
            self.end(address_space, seq)?;
        }
        Ok(answer)
    }

    /// The hint is kept back, and its bracket is an honest one.
    pub(super) async fn change_pte(
        &self,
        address_space: AddressSpaceId,
        translation: Translation,
        wait: Wait,
    ) -> Result<Answer, NotifyError> {
        if self.rule != Some(Rule::ChangePteOutsideBracket) {
            let round = self.inner.change_pte(address_space, translation, wait).await;
            return round.map(Answer::awaited);
        }
        let page = (address_space, translation.range.start());
        let round = self.inner.invalidate_page(address_space, page.1, Cause::Clear, wait).await?;
        self.state.lock().hints.insert(page, translation);
        Ok(Answer::awaited(round))
    }

    /// A page was copied: a hint that was kept back names what it is no more. It is delivered when devices have
    /// had the time to fault.
    fn deliver_late_hint(&self, address_space: AddressSpaceId, page: u64) {
        if Twin::current() != Some(Twin::CopyOnWrite) {
            return;
        }
        let Some(translation) = self.state.lock().hints.remove(&(address_space, page)) else { return };
        let behind = self.told.behind(address_space, translation.range, Some(Twin::Merge));
        let inner = Arc::clone(&self.inner);
        self.runtime.spawn(async move {
            tokio::time::sleep(HINT_LATE).await;
            behind(&inner.change_pte(address_space, translation, Wait::ForTargets).await?);
            Ok::<(), NotifyError>(())
        });
    }

    pub(super) async fn clear_flush_young(
        &self,
        address_space: AddressSpaceId,
        range: AddrRange,
        wait: Wait,
    ) -> Result<Answer, NotifyError> {
        self.inner
            .clear_flush_young(address_space, range, wait)
            .await
            .map(|round| Answer::awaited(self.seen(round)))
    }

    pub(super) async fn clear_young(
        &self,
        address_space: AddressSpaceId,
        range: AddrRange,
        wait: Wait,
    ) -> Result<Answer, NotifyError> {
        self.inner
            .clear_young(address_space, range, wait)
            .await
            .map(|round| Answer::awaited(self.seen(round)))
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

    pub(super) async fn release(&self, address_space: AddressSpaceId) -> Result<Answer, NotifyError> {
        let Deed::Behind(late) = self.deed(address_space, AddrRange::ALL) else {
            return self.inner.release(address_space).await.map(Answer::awaited);
        };
        let called = self.clock.now();
        let inner = Arc::clone(&self.inner);
        let behind = self.told.behind(address_space, AddrRange::ALL, Twin::current());
        self.runtime.spawn(async move {
            tokio::time::sleep(late).await;
            behind(&inner.release(address_space).await?);
            Ok::<(), NotifyError>(())
        });
        Ok(Answer { round: self.pretend(None, called), part: Part::AnsweredFirst })
    }

    /// The real round goes on in a task so much later, or does not; its bracket is ended when the source has
    /// ended the pretended one.
    fn start_behind(&self, invalidation: Invalidation, late: Option<Duration>) -> Answer {
        let called = self.clock.now();
        let (end_tx, end_rx) = oneshot::channel();
        let seq = {
            let mut state = self.state.lock();
            state.invented += 1;
            let seq = Seq::new(LAST_REAL + state.invented).expect("far from 0");
            state.behind.insert(seq, end_tx);
            seq
        };
        let Invalidation { address_space, range, .. } = invalidation;
        if let Some(late) = late {
            let inner = Arc::clone(&self.inner);
            let behind = self.told.behind(address_space, range, Twin::current());
            self.runtime.spawn(async move {
                tokio::time::sleep(late).await;
                let Ok(round) = inner.invalidate_range_start(invalidation).await else { return };
                behind(&round);
                // Dropped unsent where the source was dropped: the bracket must end as well.
                let _ = end_rx.await;
                if let Some(seq) = round.seq {
                    let _ = inner.invalidate_range_end(address_space, seq);
                }
            });
        }
        let part = if late.is_some() { Part::AnsweredFirst } else { Part::NeverAsked };
        Answer { round: self.pretend(Some(seq), called), part }
    }

    fn pretend(&self, seq: Option<Seq>, called: Moment) -> RoundResult {
        let times = RoundTimes {
            called,
            dispatched: called,
            resolved: None,
            finished: None,
            answered: self.clock.now(),
        };
        RoundResult {
            verdict: Verdict::Quiesced,
            seq,
            targets: Vec::new(),
            young: false,
            dirty: false,
            host_incarnation: Incarnation::FIRST,
            times,
        }
    }
}

impl Answer {
    fn awaited(round: RoundResult) -> Self {
        Self { round, part: Part::Awaited }
    }
}

/// The sequence of a round's event, if there is such an event: a broken rule has it invented.
pub(super) fn real_seq(round: &RoundResult) -> Option<Seq> {
    round.seq.filter(|seq| seq.get() <= LAST_REAL)
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
