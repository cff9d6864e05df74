//! [1, 9 of 9] Stands between the memory source and the host agent: records every round, and breaks a rule
//! where the run asks for it. The host agent knows of neither.

use std::sync::Arc;

use parking_lot::Mutex;
use shootdown_client::{AddrRange, AddressSpaceId, Cause, Seq, Translation};
use shootdown_server::source::{Invalidation, Notifier, NotifyError, RoundResult, Translate, Wait};

use super::breaks::Breaks;
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
    inner: Arc<Breaks<N>>,
    ledger: Ledger,
}

impl<N: Notifier> Recorder<N> {
    pub(super) fn new(inner: Breaks<N>, ledger: Ledger) -> Self {
        Self { inner: Arc::new(inner), ledger }
    }

    fn on_round(
        &self,
        path: Path,
        round: Result<RoundResult, NotifyError>,
    ) -> Result<RoundResult, NotifyError> {
        if let Ok(round) = &round {
            self.ledger.on_round(path, round);
        }
        round
    }
}

/// The memory source brackets with one cause for each of its paths.
fn path_of(cause: Cause) -> Path {
    match cause {
        Cause::Unmap => Path::Munmap,
        Cause::ProtectionPage | Cause::ProtectionVma => Path::Fork,
        _ => Path::Dontneed,
    }
}

impl<N: Notifier> Notifier for Recorder<N> {
    fn register(&self, name: &str, source: Arc<dyn Translate>) -> Result<AddressSpaceId, NotifyError> {
        self.inner.register(name, source)
    }

    async fn invalidate_range_start(&self, invalidation: Invalidation) -> Result<RoundResult, NotifyError> {
        let round = self.inner.start(invalidation).await;
        self.on_round(path_of(invalidation.cause), round)
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
        let round = self.inner.page(address_space, address, cause, wait).await;
        self.on_round(Path::Cow, round)
    }

    async fn change_pte(
        &self,
        address_space: AddressSpaceId,
        translation: Translation,
        wait: Wait,
    ) -> Result<RoundResult, NotifyError> {
        self.inner.honest().change_pte(address_space, translation, wait).await
    }

    async fn clear_flush_young(
        &self,
        address_space: AddressSpaceId,
        range: AddrRange,
        wait: Wait,
    ) -> Result<RoundResult, NotifyError> {
        self.inner.honest().clear_flush_young(address_space, range, wait).await
    }

    async fn clear_young(
        &self,
        address_space: AddressSpaceId,
        range: AddrRange,
        wait: Wait,
    ) -> Result<RoundResult, NotifyError> {
        self.inner.honest().clear_young(address_space, range, wait).await
    }

    fn test_young(&self, address_space: AddressSpaceId, range: AddrRange) -> Result<bool, NotifyError> {
        self.inner.honest().test_young(address_space, range)
    }

    async fn release(&self, address_space: AddressSpaceId) -> Result<RoundResult, NotifyError> {
        let round = self.inner.release(address_space).await;
        self.on_round(Path::Exit, round)
    }
}
