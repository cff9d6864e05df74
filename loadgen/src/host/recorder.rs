//! [1, 9 of 9] Stands between the memory source and the host agent: records every round as its twin's, looks at
//! what young queries answer, and breaks a rule where the run asks for it. The host agent knows of none of it.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use shootdown_client::{AddrRange, AddressSpaceId, Cause, PageSize, Seq, Translation};
use shootdown_server::source::memory::Twin;
use shootdown_server::source::{Invalidation, Notifier, NotifyError, RoundResult, Translate, Wait};

use super::breaks::{Answer, Breaks};
use super::told::{Part, Told};
use super::young::Watch;
use crate::control::PathTally;
use crate::path::Path;
use crate::report::{Stage, StageSummary, Stages};

/// What was recorded. A clone is the same ledger.
#[derive(Clone, Debug, Default)]
pub(super) struct Ledger(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    stages: Stages,
    paths: [PathTally; Path::EVERY.len()],
    tables: u64,
    /// What `test_young` answered last, until it is looked at.
    answers: HashMap<(AddressSpaceId, AddrRange), Used>,
}

/// What `test_young` answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Used {
    Yes,
    No,
}

impl Ledger {
    pub(super) fn on_operation(&self, path: Path) {
        self.0.lock().paths[path.index()].operations += 1;
    }

    pub(super) fn on_round(&self, path: Path, round: &RoundResult) {
        let mut state = self.0.lock();
        let tally = &mut state.paths[path.index()];
        tally.rounds += 1;
        tally.notices += round.targets.len() as u64;
        state.stages.record_round(round);
    }

    /// Page tables were freed.
    pub(super) fn on_tables(&self, freed: usize) {
        self.0.lock().tables += freed as u64;
    }

    pub(super) fn tables(&self) -> u64 {
        self.0.lock().tables
    }

    fn on_question(&self, address_space: AddressSpaceId, range: AddrRange, path: Path, used: Used) {
        let mut state = self.0.lock();
        let tally = &mut state.paths[path.index()];
        tally.asked_young += 1;
        tally.young += u64::from(used == Used::Yes);
        state.answers.insert((address_space, range), used);
    }

    /// What `test_young` answered of `range` since this was last called; `None` where it was not asked.
    pub(super) fn take_answer(&self, address_space: AddressSpaceId, range: AddrRange) -> Option<Used> {
        self.0.lock().answers.remove(&(address_space, range))
    }

    /// Records how long the pages of rounds with targets took to be freed.
    pub(super) fn on_release<'a>(
        &self,
        rounds: impl IntoIterator<Item = &'a RoundResult>,
        took: std::time::Duration,
    ) {
        if rounds.into_iter().any(|round| !round.targets.is_empty()) {
            self.0.lock().stages.record(Stage::Release, took);
        }
    }

    pub(super) fn paths(&self) -> Vec<PathTally> {
        self.0.lock().paths.to_vec()
    }

    /// The paths that have shown something.
    pub(super) fn shown(&self) -> Vec<Path> {
        let state = self.0.lock();
        Path::EVERY.into_iter().filter(|path| state.paths[path.index()].shows(*path)).collect()
    }

    pub(super) fn operations(&self) -> u64 {
        self.0.lock().paths.iter().map(|tally| tally.operations).sum()
    }

    pub(super) fn stages(&self) -> Vec<StageSummary> {
        self.0.lock().stages.summaries()
    }
}

/// The notifier that the memory source calls.
#[derive(Debug)]
pub(super) struct Recorder<N> {
    inner: Breaks<N>,
    ledger: Ledger,
    watch: Arc<Watch>,
    told: Told,
}

/// Whether a round asks for young bits.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Asks {
    Young,
    Nothing,
}

impl<N: Notifier> Recorder<N> {
    pub(super) fn new(inner: Breaks<N>, ledger: Ledger, watch: Arc<Watch>, told: Told) -> Self {
        Self { inner, ledger, watch, told }
    }

    /// Awaits a round, and records it.
    async fn record(
        &self,
        address_space: AddressSpaceId,
        range: AddrRange,
        asks: Asks,
        answer: impl Future<Output = Result<Answer, NotifyError>> + Send,
    ) -> Result<RoundResult, NotifyError> {
        let entered = self.watch.enter(address_space, range);
        let (round, part) = answer
            .await
            .map_or_else(|error| (Err(error), Part::Awaited), |Answer { round, part }| (Ok(round), part));
        let query = round.as_ref().ok().filter(|_| asks == Asks::Young);
        if let Err(error) = self.watch.leave(address_space, &entered, query) {
            tracing::error!(error = &error as &dyn std::error::Error, "a young query cannot be checked");
        }
        // Of no twin is a call of nobody's path.
        if let (Ok(round), Some(twin)) = (&round, Twin::current()) {
            self.ledger.on_round(Path::of_twin(twin), round);
            self.told.on_round(address_space, range, twin, part, round);
        }
        round
    }
}

impl<N: Notifier> Notifier for Recorder<N> {
    fn register(&self, name: &str, source: Arc<dyn Translate>) -> Result<AddressSpaceId, NotifyError> {
        self.inner.register(name, source)
    }

    async fn invalidate_range_start(&self, invalidation: Invalidation) -> Result<RoundResult, NotifyError> {
        let Invalidation { address_space, range, .. } = invalidation;
        self.record(address_space, range, Asks::Nothing, self.inner.start(invalidation)).await
    }

    fn invalidate_range_end(&self, address_space: AddressSpaceId, seq: Seq) -> Result<(), NotifyError> {
        self.inner.end(address_space, seq)
    }

    async fn invalidate_page(
        &self,
        address_space: AddressSpaceId,
        address: u64,
        cause: Cause,
        wait: Wait,
    ) -> Result<RoundResult, NotifyError> {
        let round = self.inner.page(address_space, address, cause, wait);
        let page = AddrRange::page_of(address, PageSize::BASE);
        self.record(address_space, page, Asks::Nothing, round).await
    }

    async fn change_pte(
        &self,
        address_space: AddressSpaceId,
        translation: Translation,
        wait: Wait,
    ) -> Result<RoundResult, NotifyError> {
        let round = self.inner.change_pte(address_space, translation, wait);
        self.record(address_space, translation.range, Asks::Nothing, round).await
    }

    async fn clear_flush_young(
        &self,
        address_space: AddressSpaceId,
        range: AddrRange,
        wait: Wait,
    ) -> Result<RoundResult, NotifyError> {
        let round = self.inner.clear_flush_young(address_space, range, wait);
        self.record(address_space, range, Asks::Young, round).await
    }

    async fn clear_young(
        &self,
        address_space: AddressSpaceId,
        range: AddrRange,
        wait: Wait,
    ) -> Result<RoundResult, NotifyError> {
        let round = self.inner.clear_young(address_space, range, wait);
        self.record(address_space, range, Asks::Young, round).await
    }

    fn test_young(&self, address_space: AddressSpaceId, range: AddrRange) -> Result<bool, NotifyError> {
        let young = self.inner.test_young(address_space, range)?;
        if let Some(twin) = Twin::current() {
            let used = if young { Used::Yes } else { Used::No };
            self.ledger.on_question(address_space, range, Path::of_twin(twin), used);
        }
        Ok(young)
    }

    async fn release(&self, address_space: AddressSpaceId) -> Result<RoundResult, NotifyError> {
        let round = self.inner.release(address_space);
        self.record(address_space, AddrRange::ALL, Asks::Nothing, round).await
    }
}
