//! The rpc source: any program on the host that calls the notifier methods over `NotifierService`.
//!
//! What it can hold: the caller keeps its pages until its call is answered, so it holds them for as
//! long as the caller waits. What it cannot: a caller that does not wait, or dies, releases its pages
//! by itself; the round goes on without it, and only its bracket is kept.
//!
//! It hands out translations while the program serves faults (`faults`). Without that a device learns
//! them from the program itself (an RDMA key, a VMM's table), and a `Fault` is answered
//! FAULT_NOT_SERVED. A call that is tried again with its request id is not done again (`retries`,
//! `registrations`, `releases`).

pub(crate) mod faults;
pub(crate) mod registrations;
pub(crate) mod retries;
pub(crate) mod releases;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use shootdown_core::{Access, AddrRange, AddressSpaceId, Translation};

use self::faults::Faults;
use self::retries::Retries;
use super::{FaultError, Translate};

/// The name of the rpc source in listings.
pub const NAME: &str = "rpc";

/// How long a source may take to answer a fault, unless the settings say otherwise. A page that comes
/// from a disk or from another machine takes milliseconds, from an overloaded one seconds; a source that
/// takes longer than this hangs, and each fault that waits for it is one that its session cannot have
/// elsewhere.
pub const DEFAULT_FAULT_TIMEOUT: Duration = Duration::from_secs(10);

/// Stands for the program behind an address space that was registered over gRPC.
#[derive(Debug)]
pub struct RpcSource {
    pub(crate) faults: Arc<Faults>,
    pub(crate) retries: Retries,
}

impl RpcSource {
    /// A program that may take so long to answer a fault.
    #[must_use]
    pub fn new(fault_timeout: Duration) -> Self {
        Self { faults: Arc::new(Faults::new(fault_timeout)), retries: Retries::default() }
    }
}

impl Default for RpcSource {
    fn default() -> Self {
        Self::new(DEFAULT_FAULT_TIMEOUT)
    }
}

impl Translate for RpcSource {
    fn source(&self) -> &'static str {
        NAME
    }

    fn fault(
        &self,
        _address_space: AddressSpaceId,
        range: AddrRange,
        access: Access,
    ) -> BoxFuture<'_, Result<Vec<Translation>, FaultError>> {
        Box::pin(self.faults.ask(range, access))
    }

    fn bytes(&self, _translations: &[Translation]) -> Result<Bytes, FaultError> {
        Err(FaultError::NoBytes)
    }

    fn on_released(&self) {
        self.faults.on_released();
    }
}
