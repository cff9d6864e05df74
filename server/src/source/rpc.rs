//! The rpc source: any program on the host that calls the notifier methods over `NotifierService`.
//!
//! What it can hold: the caller keeps its pages until its call is answered, so it holds them for as
//! long as the caller waits. What it cannot: a caller that does not wait, or dies, releases its pages
//! by itself; the round goes on without it, and only its bracket is kept.
//!
//! It hands out no translations. A device learns them from the program itself (an RDMA key, a VMM's
//! table); a `Fault` is answered FAULT_NOT_SERVED.

use bytes::Bytes;
use futures_util::future::BoxFuture;
use shootdown_core::{Access, AddrRange, AddressSpaceId, Translation};

use super::{FaultError, Translate};

/// The name of the rpc source in listings.
pub const NAME: &str = "rpc";

/// Stands for the program behind an address space that was registered over gRPC.
#[derive(Debug, Clone, Copy, Default)]
pub struct RpcSource;

impl Translate for RpcSource {
    fn source(&self) -> &'static str {
        NAME
    }

    fn fault(
        &self,
        _address_space: AddressSpaceId,
        _range: AddrRange,
        _access: Access,
    ) -> BoxFuture<'_, Result<Vec<Translation>, FaultError>> {
        Box::pin(std::future::ready(Err(FaultError::NotServed)))
    }

    fn bytes(&self, _translations: &[Translation]) -> Result<Bytes, FaultError> {
        Err(FaultError::NotServed)
    }
}
