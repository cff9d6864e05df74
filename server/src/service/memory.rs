//! `MemoryService`: the embedded memory source for programs on the host.

use shootdown_proto::convert;
use shootdown_proto::error::{Malformed, Reason, status};
use shootdown_proto::v1;
use shootdown_proto::v1::memory_service_server::MemoryService;
use tonic::{Request, Response, Status};

use super::notifier::checked_name;
use crate::host::Host;
use crate::listen::require_leave;
use crate::source::memory::{MemoryError, MemorySource, StoreBranch};
use crate::status::memory_reason;

/// The most bytes of one load or store.
const MOST_BYTES: usize = 1 << 20;

/// The memory source's service.
#[derive(Debug, Clone)]
pub(crate) struct Memory {
    pub(crate) memory: MemorySource<Host>,
}

#[tonic::async_trait]
impl MemoryService for Memory {
    async fn create_address_space(
        &self,
        request: Request<v1::CreateAddressSpaceRequest>,
    ) -> Result<Response<v1::CreateAddressSpaceResponse>, Status> {
        require_leave(&request)?;
        let name = checked_name(request.into_inner().name)?;
        let id = self.memory.create(&name)?;
        Ok(Response::new(v1::CreateAddressSpaceResponse { address_space_id: id.get() }))
    }

    async fn map(&self, request: Request<v1::MapRequest>) -> Result<Response<v1::MapResponse>, Status> {
        require_leave(&request)?;
        let request = request.into_inner();
        let id = convert::address_space_id(request.address_space_id, "address_space_id")?;
        let range = convert::bounded_range(request.range, "range")?;
        self.memory.map(id, range, convert::access(request.access)?)?;
        Ok(Response::new(v1::MapResponse {}))
    }

    async fn load(&self, request: Request<v1::LoadRequest>) -> Result<Response<v1::LoadResponse>, Status> {
        require_leave(&request)?;
        let request = request.into_inner();
        let id = convert::address_space_id(request.address_space_id, "address_space_id")?;
        let length = checked_length(request.length as usize, "length")?;
        let data = self.memory.load(id, request.address, length).await?;
        Ok(Response::new(v1::LoadResponse { data }))
    }

    async fn store(&self, request: Request<v1::StoreRequest>) -> Result<Response<v1::StoreResponse>, Status> {
        require_leave(&request)?;
        let request = request.into_inner();
        let id = convert::address_space_id(request.address_space_id, "address_space_id")?;
        checked_length(request.data.len(), "data")?;
        let outcome = self.memory.store(id, request.address, &request.data).await?;
        let copied = outcome.pages.iter().filter(|page| matches!(page.branch, StoreBranch::Copied(_)));
        let pages_copied = u32::try_from(copied.count()).unwrap_or(u32::MAX);
        Ok(Response::new(v1::StoreResponse { pages_copied }))
    }

    async fn fork(&self, request: Request<v1::ForkRequest>) -> Result<Response<v1::ForkResponse>, Status> {
        require_leave(&request)?;
        let request = request.into_inner();
        let id = convert::address_space_id(request.address_space_id, "address_space_id")?;
        let child = self.memory.fork(id, &checked_name(request.name)?).await?;
        Ok(Response::new(v1::ForkResponse { address_space_id: child.get() }))
    }

    async fn unmap(&self, request: Request<v1::UnmapRequest>) -> Result<Response<v1::UnmapResponse>, Status> {
        require_leave(&request)?;
        let request = request.into_inner();
        let id = convert::address_space_id(request.address_space_id, "address_space_id")?;
        let released = self.memory.unmap(id, convert::bounded_range(request.range, "range")?).await?;
        Ok(Response::new(v1::UnmapResponse { pages_released: released.frames as u64 }))
    }

    async fn dont_need(
        &self,
        request: Request<v1::DontNeedRequest>,
    ) -> Result<Response<v1::DontNeedResponse>, Status> {
        require_leave(&request)?;
        let request = request.into_inner();
        let id = convert::address_space_id(request.address_space_id, "address_space_id")?;
        let released = self.memory.dont_need(id, convert::bounded_range(request.range, "range")?).await?;
        Ok(Response::new(v1::DontNeedResponse { pages_released: released.frames as u64 }))
    }

    async fn exit(&self, request: Request<v1::ExitRequest>) -> Result<Response<v1::ExitResponse>, Status> {
        require_leave(&request)?;
        let id = convert::address_space_id(request.into_inner().address_space_id, "address_space_id")?;
        let released = self.memory.exit(id).await?;
        Ok(Response::new(v1::ExitResponse { pages_released: released.frames as u64 }))
    }
}

fn checked_length(length: usize, field: &'static str) -> Result<usize, Malformed> {
    match length {
        0 => Err(Malformed::Zero { field }),
        1..=MOST_BYTES => Ok(length),
        _ => Err(Malformed::TooLong { field, length, most: MOST_BYTES }),
    }
}

impl From<MemoryError> for Status {
    fn from(error: MemoryError) -> Self {
        let reason: Reason = memory_reason(&error);
        status(reason, chain(&error), &[])
    }
}

/// An error and its sources on one line: a status has one text.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}
