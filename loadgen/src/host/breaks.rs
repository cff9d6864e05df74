//! Breaks the rules of the source's side, one a run, on purpose: see [`Rule`]. Without a rule every call goes
//! through as it came.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use shootdown_client::{AddrRange, AddressSpaceId, Cause, Moment, OwnerTag, PageSize, Seq};
use shootdown_server::clock::Clock;
use shootdown_server::source::{
    Invalidation, Notifier, NotifyError, RoundResult, RoundTimes, Translate, Verdict, Wait,
};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use crate::rule::Rule;

/// How long a bracket that was ended too early is left before its caller goes on: devices must have the time
/// to fault in the window, which is there by accident only.
const WINDOW: Duration = Duration::from_millis(20);

/// The owner tag of the device that skips.
pub(crate) const SKIPPING: OwnerTag = OwnerTag::FIRST;

/// A notifier that may break a rule.
#[derive(Debug)]
pub(super) struct Breaks<N> {
    inner: Arc<N>,
    rule: Option<Rule>,
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

impl<N: Notifier> Breaks<N> {
    pub(super) fn new(inner: N, rule: Option<Rule>, clock: Clock, runtime: Handle) -> Self {
        Self { inner: Arc::new(inner), rule, clock, runtime, state: Mutex::default() }
    }

    pub(super) fn honest(&self) -> &N {
        &self.inner
    }

    pub(super) fn register(
        &self,
        name: &str,
        source: Arc<dyn Translate>,
    ) -> Result<AddressSpaceId, NotifyError> {
        self.inner.register(name, source)
    }

    pub(super) async fn start(&self, invalidation: Invalidation) -> Result<RoundResult, NotifyError> {
        match self.rule {
            None | Some(Rule::FlushAfterAck) => self.inner.invalidate_range_start(invalidation).await,
            Some(Rule::SkipOneTarget) => {
                let owner = Some(SKIPPING);
                self.inner.invalidate_range_start(Invalidation { owner, ..invalidation }).await
            }
            Some(Rule::ReleaseBeforeAck) => Ok(self.start_behind(invalidation)),
            Some(Rule::GrantInWindow) => {
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
        if matches!(self.rule, None | Some(Rule::FlushAfterAck)) {
            return self.inner.invalidate_page(address_space, address, cause, wait).await;
        }
        let range = AddrRange::page_of(address, PageSize::BASE);
        let round = self.start(Invalidation { address_space, range, cause, owner: None, wait }).await?;
        if let Some(seq) = round.seq {
            self.end(address_space, seq)?;
        }
        Ok(round)
    }

    pub(super) async fn release(&self, address_space: AddressSpaceId) -> Result<RoundResult, NotifyError> {
        if self.rule != Some(Rule::ReleaseBeforeAck) {
            return self.inner.release(address_space).await;
        }
        let called = self.clock.now();
        let inner = Arc::clone(&self.inner);
        self.runtime.spawn(async move { inner.release(address_space).await.map(drop) });
        Ok(self.pretend(None, called))
    }

    /// The real round goes on in a task, and its bracket is ended when the source has ended the pretended one.
    fn start_behind(&self, invalidation: Invalidation) -> RoundResult {
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
        let inner = Arc::clone(&self.inner);
        self.runtime.spawn(async move {
            let Ok(round) = inner.invalidate_range_start(invalidation).await else { return };
            // Dropped unsent where the source was dropped: the bracket must end as well.
            let _ = end_rx.await;
            if let Some(seq) = round.seq {
                let _ = inner.invalidate_range_end(invalidation.address_space, seq);
            }
        });
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
