//! `NotifierService`: the notifier methods for any program on the host.

use std::sync::Arc;
use std::time::Duration;

use shootdown_core::round::{Outcome, TargetReport};
use shootdown_core::{AddressSpaceId, OwnerTag, PageSize, Seq};
use shootdown_proto::convert;
use shootdown_proto::error::{Malformed, Reason, status};
use shootdown_proto::v1;
use shootdown_proto::v1::notifier_service_server::NotifierService;
use tonic::{Request, Response, Status};

use crate::host::Host;
use crate::listen::require_leave;
use crate::source::rpc::{self, RpcSource};
use crate::source::{Invalidation, Notifier, RoundResult, Verdict, Wait};

/// The longest name of an address space, in bytes: it is in every log line about it.
pub(crate) const LONGEST_NAME: usize = 128;

/// The rpc source's service.
#[derive(Debug, Clone)]
pub(crate) struct Notifiers {
    pub(crate) host: Host,
}

#[tonic::async_trait]
impl NotifierService for Notifiers {
    type ServeFaultsStream = tokio_stream::Empty<Result<v1::ServeFaultsResponse, Status>>;

    async fn serve_faults(
        &self,
        request: Request<tonic::Streaming<v1::ServeFaultsRequest>>,
    ) -> Result<Response<Self::ServeFaultsStream>, Status> {
        require_leave(&request)?;
        Err(Status::unimplemented("not yet"))
    }

    async fn register_address_space(
        &self,
        request: Request<v1::RegisterAddressSpaceRequest>,
    ) -> Result<Response<v1::RegisterAddressSpaceResponse>, Status> {
        require_leave(&request)?;
        let name = checked_name(request.into_inner().name)?;
        let id = self.host.register(&name, Arc::new(RpcSource))?;
        Ok(Response::new(v1::RegisterAddressSpaceResponse { address_space_id: id.get() }))
    }

    async fn invalidate_range_start(
        &self,
        request: Request<v1::InvalidateRangeStartRequest>,
    ) -> Result<Response<v1::InvalidateRangeStartResponse>, Status> {
        require_leave(&request)?;
        let request = request.into_inner();
        let invalidation = Invalidation {
            address_space: self.owned(request.address_space_id)?,
            range: convert::required_range(request.range, "range")?,
            cause: convert::cause(request.cause)?,
            owner: OwnerTag::new(request.owner),
            wait: if request.non_blockable { Wait::NotAtAll } else { wait(request.deadline_ms) },
        };
        let result = self.host.invalidate_range_start(invalidation).await?;
        Ok(Response::new(v1::InvalidateRangeStartResponse { result: Some(wire_result(&result)) }))
    }

    async fn invalidate_range_end(
        &self,
        request: Request<v1::InvalidateRangeEndRequest>,
    ) -> Result<Response<v1::InvalidateRangeEndResponse>, Status> {
        require_leave(&request)?;
        let request = request.into_inner();
        let address_space = self.owned(request.address_space_id)?;
        self.host.invalidate_range_end(address_space, convert::seq(request.seq, "seq")?)?;
        Ok(Response::new(v1::InvalidateRangeEndResponse {}))
    }

    async fn invalidate_page(
        &self,
        request: Request<v1::InvalidatePageRequest>,
    ) -> Result<Response<v1::InvalidatePageResponse>, Status> {
        require_leave(&request)?;
        let request = request.into_inner();
        if request.address & PageSize::BASE.offset_mask() != 0 {
            let expected = "the first address of a page";
            return Err(Malformed::Value { field: "address", value: request.address, expected }.into());
        }
        let address_space = self.owned(request.address_space_id)?;
        let cause = convert::cause(request.cause)?;
        let wait = wait(request.deadline_ms);
        let owner = OwnerTag::new(request.owner);
        let result =
            self.host.invalidate_page_for(address_space, request.address, cause, owner, wait).await?;
        Ok(Response::new(v1::InvalidatePageResponse { result: Some(wire_result(&result)) }))
    }

    async fn change_pte(
        &self,
        request: Request<v1::ChangePteRequest>,
    ) -> Result<Response<v1::ChangePteResponse>, Status> {
        require_leave(&request)?;
        let request = request.into_inner();
        let address_space = self.owned(request.address_space_id)?;
        let wire = request.translation.ok_or(Malformed::Missing { field: "translation" })?;
        let translation = convert::translation(wire)?;
        let result = self.host.change_pte(address_space, translation, wait(request.deadline_ms)).await?;
        Ok(Response::new(v1::ChangePteResponse { result: Some(wire_result(&result)) }))
    }

    async fn clear_flush_young(
        &self,
        request: Request<v1::ClearFlushYoungRequest>,
    ) -> Result<Response<v1::ClearFlushYoungResponse>, Status> {
        require_leave(&request)?;
        let request = request.into_inner();
        let address_space = self.owned(request.address_space_id)?;
        let range = convert::required_range(request.range, "range")?;
        let result = self.host.clear_flush_young(address_space, range, wait(request.deadline_ms)).await?;
        let young = result.young;
        Ok(Response::new(v1::ClearFlushYoungResponse { result: Some(wire_result(&result)), young }))
    }

    async fn clear_young(
        &self,
        request: Request<v1::ClearYoungRequest>,
    ) -> Result<Response<v1::ClearYoungResponse>, Status> {
        require_leave(&request)?;
        let request = request.into_inner();
        let address_space = self.owned(request.address_space_id)?;
        let range = convert::required_range(request.range, "range")?;
        let result = self.host.clear_young(address_space, range, wait(request.deadline_ms)).await?;
        let young = result.young;
        Ok(Response::new(v1::ClearYoungResponse { result: Some(wire_result(&result)), young }))
    }

    async fn test_young(
        &self,
        request: Request<v1::TestYoungRequest>,
    ) -> Result<Response<v1::TestYoungResponse>, Status> {
        require_leave(&request)?;
        let request = request.into_inner();
        let address_space = self.owned(request.address_space_id)?;
        let range = convert::required_range(request.range, "range")?;
        let young = self.host.test_young(address_space, range)?;
        Ok(Response::new(v1::TestYoungResponse { young }))
    }

    async fn release_address_space(
        &self,
        request: Request<v1::ReleaseAddressSpaceRequest>,
    ) -> Result<Response<v1::ReleaseAddressSpaceResponse>, Status> {
        require_leave(&request)?;
        let address_space = self.owned(request.into_inner().address_space_id)?;
        let result = self.host.release(address_space).await?;
        Ok(Response::new(v1::ReleaseAddressSpaceResponse { result: Some(wire_result(&result)) }))
    }

    async fn await_round(
        &self,
        request: Request<v1::AwaitRoundRequest>,
    ) -> Result<Response<v1::AwaitRoundResponse>, Status> {
        require_leave(&request)?;
        let request = request.into_inner();
        let address_space = self.owned(request.address_space_id)?;
        let seq: Seq = convert::seq(request.seq, "seq")?;
        let result = self.host.await_round(address_space, seq, wait(request.deadline_ms)).await?;
        Ok(Response::new(v1::AwaitRoundResponse { result: Some(wire_result(&result)) }))
    }
}

impl Notifiers {
    /// An address space that was registered here: nobody opens or ends the brackets of another source.
    fn owned(&self, id: u64) -> Result<AddressSpaceId, Status> {
        let id = convert::address_space_id(id, "address_space_id")?;
        let space = self.host.directory().expect(id)?;
        if space.source.source() != rpc::NAME {
            let message = format!("address space {id} belongs to the {} source", space.source.source());
            return Err(status(Reason::AddressSpaceNotOwned, message, &[]));
        }
        Ok(id)
    }
}

pub(crate) fn checked_name(name: String) -> Result<String, Malformed> {
    if name.len() > LONGEST_NAME {
        return Err(Malformed::TooLong { field: "name", length: name.len(), most: LONGEST_NAME });
    }
    Ok(name)
}

fn wait(deadline_ms: Option<u64>) -> Wait {
    deadline_ms.map_or(Wait::ForTargets, |ms| Wait::AtMost(Duration::from_millis(ms)))
}

pub(crate) fn wire_result(result: &RoundResult) -> v1::RoundResult {
    v1::RoundResult {
        verdict: match result.verdict {
            Verdict::Quiesced => v1::Verdict::Quiesced,
            Verdict::NotQuiesced => v1::Verdict::NotQuiesced,
            Verdict::WouldBlock => v1::Verdict::WouldBlock,
        }
        .into(),
        seq: result.seq.map_or(0, Seq::get),
        targets: result.targets.iter().map(wire_target).collect(),
        elapsed_ns: nanos(result.times.answered.since(result.times.called)),
        dirty: result.dirty,
        host_incarnation: 0,
    }
}

pub(crate) fn wire_target(target: &TargetReport) -> v1::Target {
    v1::Target {
        session_id: target.session.get(),
        device_id: target.device.as_str().to_owned(),
        outcome: match target.outcome {
            Outcome::Waiting => v1::TargetOutcome::Waiting,
            Outcome::Acked => v1::TargetOutcome::Acked,
            Outcome::Left => v1::TargetOutcome::Left,
            Outcome::Fenced => v1::TargetOutcome::Fenced,
        }
        .into(),
        elapsed_ns: target.elapsed.map_or(0, nanos),
        young: target.young,
        dirty: target.dirty,
    }
}

pub(crate) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
