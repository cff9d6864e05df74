//! [5 of 9] A translation that the SDK keeps for a device, and its uses.

use std::fmt;
use std::sync::Arc;

use shootdown_core::mapping::{MappingId, UseError};
use shootdown_core::{Access, AddrRange, AddressSpaceId, FrameNumber, Moment, Translation};

use crate::session::Session;
use crate::session::gate::UseRefused;

/// Leave to reach one page, until a notice withdraws it. Dropped, the device does not want it any more.
pub struct Mapping {
    session: Arc<Session>,
    id: MappingId,
    address_space: AddressSpaceId,
    translation: Translation,
}

impl Mapping {
    pub(crate) fn new(
        session: Arc<Session>,
        id: MappingId,
        address_space: AddressSpaceId,
        translation: Translation,
    ) -> Self {
        Self { session, id, address_space, translation }
    }

    /// Whose memory.
    #[must_use]
    pub fn address_space(&self) -> AddressSpaceId {
        self.address_space
    }

    /// The page.
    #[must_use]
    pub fn range(&self) -> AddrRange {
        self.translation.range
    }

    /// What may be done there.
    #[must_use]
    pub fn access(&self) -> Access {
        self.translation.access
    }

    /// Begins a use: a DMA, a kernel launch, whatever reads or writes through the translation. No notice
    /// that overlaps is acked before the guard is dropped, so hold it for as short as the use lasts.
    ///
    /// That the lease lasts is looked at here. A use that may take longer than the lease's margin asks again while
    /// it lasts: [`UseGuard::check`], or [`UseGuard::run_until_expired`], which ends it.
    ///
    /// Do not wait for a fault while a use is open, of whatever page: the host may need the page of the use to make
    /// room for the one that is faulted, and waits for the use to end. It would end with the lease.
    ///
    /// The price: one lock, a reading of the clock, O(log n) in the device's mappings; as much when the
    /// guard is dropped.
    ///
    /// # Errors
    /// [`UseRefused`]: withdrawn, the session is closed, or the lease ran out. No access may follow.
    pub fn begin_use(&self) -> Result<UseGuard, UseRefused> {
        let translation = {
            let mut holdings = self.session.holdings.lock();
            self.session.gate.check()?;
            holdings.mappings.begin_use(self.id).map_err(|error| match error {
                UseError::Revoked | UseError::Unknown => UseRefused::Revoked,
                UseError::Closed => UseRefused::SessionEnded,
            })?
        };
        Ok(UseGuard { session: Arc::clone(&self.session), id: self.id, translation })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.session.holdings.lock().mappings.remove(self.id);
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mapping")
            .field("address_space", &self.address_space)
            .field("translation", &self.translation)
            .finish_non_exhaustive()
    }
}

/// A use that is going on. The host waits for it to end, up to the end of the lease; then it waits no longer, so
/// the use has to be over a margin before that. One that is leaked keeps the host waiting until this device is
/// fenced, and this session from its end.
#[must_use = "the use ends when the guard is dropped"]
pub struct UseGuard {
    session: Arc<Session>,
    id: MappingId,
    translation: Translation,
}

impl UseGuard {
    /// The frame, for [`PageClient`](crate::PageClient) or the device's DMA.
    #[must_use]
    pub fn frame(&self) -> FrameNumber {
        self.translation.frame
    }

    /// What may be done there.
    #[must_use]
    pub fn access(&self) -> Access {
        self.translation.access
    }

    /// The page.
    #[must_use]
    pub fn range(&self) -> AddrRange {
        self.translation.range
    }

    /// Whether the use may go on: a loop asks it between two accesses, each shorter than the lease's margin. A notice
    /// that came meanwhile is no reason to stop, since its ack waits for the use; the end of the lease is one.
    ///
    /// The price: that of [`Gate::check`](crate::Gate::check).
    ///
    /// # Errors
    /// [`UseRefused::LeaseExpired`]: what was read since it was asked last may not be trusted. Drop the guard.
    pub fn check(&self) -> Result<(), UseRefused> {
        self.session.gate.check_in_flight()
    }

    /// When the use must be over, unless the lease is renewed; `None`: it must be over now.
    #[must_use]
    pub fn valid_until(&self) -> Option<Moment> {
        self.session.gate.valid_until()
    }

    /// Resolves when the use must be over: for a DMA that is aborted by hand.
    ///
    /// # Cancel safety
    /// May be dropped and called again.
    pub async fn expired(&self) {
        self.session.gate.expired().await;
    }

    /// Runs an access for as long as the lease lasts: see
    /// [`Gate::run_until_expired`](crate::Gate::run_until_expired).
    ///
    /// # Errors
    /// [`UseRefused::LeaseExpired`]: what it read may not be trusted, and whether it wrote is not known. Drop the guard.
    ///
    /// # Cancel safety
    /// That of the access.
    pub async fn run_until_expired<T>(&self, access: impl Future<Output = T>) -> Result<T, UseRefused> {
        self.session.gate.run_until_expired(access).await
    }
}

impl Drop for UseGuard {
    fn drop(&mut self) {
        self.session.end_use(self.id);
    }
}

impl fmt::Debug for UseGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UseGuard").field("translation", &self.translation).finish_non_exhaustive()
    }
}
