//! What all address spaces of the workload share, and how it fails.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use shootdown_client::{AddressSpaceId, Clock, RangeError};
use shootdown_server::Host;
use shootdown_server::source::RoundResult;
use shootdown_server::source::memory::{FrameError, MemoryError, MemorySource, Released};

use super::breaks::{Moving, real_seq};
use super::recorder::{Ledger, Recorder};
use super::walks::Walks;
use super::young::Watch;
use crate::check::floor::FloorError;
use crate::check::history::{Happened, Histories, PageName};
use crate::check::layout::Layout;
use crate::check::lost::LostWrite;
use crate::check::verdict::{Found, Origin, StaleRead};
use crate::control::{Plan, Shared};
use crate::path::Path;

/// How many stale loads, and lost writes, are told in full.
const MOST_TOLD: usize = 8;

/// How often an operation is tried that found no frame, under a limit: others hold what could be freed.
const MOST_TRIES: usize = 200;

/// Between two tries.
const BETWEEN_TRIES: Duration = Duration::from_millis(1);

/// Why the workload came to an end before it was told to.
#[derive(Debug, thiserror::Error)]
pub enum WorkloadError {
    /// An operation failed that must not.
    #[error("{path} of address space {address_space} failed")]
    Operation {
        /// Which.
        path: Path,
        /// Whose.
        address_space: u64,
        /// Why.
        #[source]
        error: MemoryError,
    },
    /// No address space could be made.
    #[error("no address space could be made")]
    Create(#[source] MemoryError),
    /// No file could be made.
    #[error("no file to map could be made")]
    File(#[source] std::io::Error),
    /// The region has no pages.
    #[error("the region of an address space is no range")]
    Region(#[from] RangeError),
    /// A floor, a mark or a use could not be written or read.
    #[error(transparent)]
    Floor(#[from] FloorError),
    /// The parent is gone.
    #[error("the parent does not listen")]
    Parent(#[source] std::io::Error),
    /// A task of the workload was stopped.
    #[error("a task of the workload ended by itself")]
    Task,
}

/// What all address spaces share.
#[derive(Debug)]
pub(super) struct World {
    pub(super) source: MemorySource<Recorder<Host>>,
    pub(super) shared: Shared,
    pub(super) layout: Layout,
    pub(super) ledger: Ledger,
    pub(super) watch: Arc<Watch>,
    pub(super) moving: Moving,
    pub(super) walks: Walks,
    pub(super) histories: Arc<Histories>,
    pub(super) plan: Plan,
    pub(super) checks: Mutex<Checks>,
    pub(super) clock: Clock,
    /// The last version. One counter for all: a stamp of another address space is never mistaken for a
    /// later one of this.
    pub(super) version: Mutex<u64>,
}

/// What the CPU's own loads found.
#[derive(Debug, Default)]
pub(super) struct Checks {
    pub(super) loads: u64,
    pub(super) stale_reads: u64,
    pub(super) stale_after: [u64; Path::EVERY.len()],
    pub(super) stale: Vec<StaleRead>,
    pub(super) lost_writes: u64,
    pub(super) lost_after: [u64; Path::EVERY.len()],
    pub(super) lost: Vec<LostWrite>,
    pub(super) against_young: u64,
}

/// A page of an address space, as reports name it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Where {
    pub(super) address_space: AddressSpaceId,
    pub(super) address: u64,
    pub(super) name: PageName,
    /// What took it from devices last.
    pub(super) path: Path,
}

impl World {
    pub(super) fn next_version(&self) -> u64 {
        let mut version = self.version.lock();
        *version += 1;
        *version
    }

    fn now(&self) -> u64 {
        self.clock.now().as_nanos()
    }

    /// Tells of an operation on a page.
    pub(super) fn on_done(
        &self,
        place: Where,
        what: &str,
        round: Option<&RoundResult>,
        version: Option<u64>,
    ) {
        let happened = Happened {
            at: self.now(),
            what: what.to_owned(),
            address_space: place.address_space.get(),
            seq: round.and_then(real_seq).map(shootdown_client::Seq::get),
            version,
            device: None,
            waited_for: None,
        };
        self.histories.push(place.name, happened);
    }

    /// Counts an operation that released pages.
    pub(super) fn on_released(&self, path: Path, released: &Released) {
        self.ledger.on_operation(path);
        self.ledger.on_tables(released.tables);
        self.ledger.on_release(&released.rounds, released.release);
    }

    /// The CPU found what must not be there.
    pub(super) fn on_stale(&self, place: Where, expected: u64, found: Found) {
        let mut checks = self.checks.lock();
        checks.stale_reads += 1;
        checks.stale_after[place.path.index()] += 1;
        if checks.stale.len() < MOST_TOLD {
            checks.stale.push(StaleRead {
                device: "cpu".to_owned(),
                address_space: place.address_space.get(),
                address: place.address,
                expected_at_least: expected,
                found,
                origin: Origin::Frame,
                released_by: place.path,
                page: place.name,
                at: self.now(),
            });
        }
    }

    /// The CPU did not find what a device wrote.
    pub(super) fn on_lost(&self, place: Where, written: u64, found: Option<u64>) {
        let mut checks = self.checks.lock();
        checks.lost_writes += 1;
        checks.lost_after[place.path.index()] += 1;
        if checks.lost.len() < MOST_TOLD {
            checks.lost.push(LostWrite {
                found_by: "cpu".to_owned(),
                address_space: place.address_space.get(),
                address: place.address,
                written,
                found,
                after: place.path,
                page: place.name,
                at: self.now(),
            });
        }
    }

    /// Does what may find no frame, under a limit, while others hold what could be freed.
    pub(super) async fn patiently<T, F: Future<Output = Result<T, MemoryError>>>(
        &self,
        mut operation: impl FnMut() -> F,
    ) -> Result<T, MemoryError> {
        for _ in 0..MOST_TRIES {
            match operation().await {
                Err(error) if self.is_shortage(&error) => tokio::time::sleep(BETWEEN_TRIES).await,
                done => return done,
            }
        }
        operation().await
    }

    /// Whether an operation found no frame, and may: it is left undone then where nothing depends on it.
    pub(super) fn is_shortage(&self, error: &MemoryError) -> bool {
        self.plan.memory_limit_pages > 0
            && matches!(error, MemoryError::Frame(FrameError::OutOfMemory { .. }))
    }
}
