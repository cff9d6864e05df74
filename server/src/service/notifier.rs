//! `NotifierService`: the notifier methods for any program on the host.

use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

use shootdown_core::round::{Outcome, TargetReport};
use shootdown_core::{AddrRange, AddressSpaceId, Incarnation, Method, OwnerTag, PageSize, Seq};
use shootdown_proto::convert;
use shootdown_proto::error::{Malformed, Reason, status};
use shootdown_proto::message::SourceSays;
use shootdown_proto::v1;
use shootdown_proto::v1::notifier_service_server::NotifierService;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::host::Host;
use crate::listen::require_leave;
use crate::source::rpc::RpcSource;
use crate::source::rpc::faults::Said;
use crate::source::rpc::registrations::ToRegister;
use crate::source::rpc::releases::Releases;
use crate::source::rpc::retries::{Asked, MayWait, Retries, Try};
use crate::source::{Invalidation, Notifier, NotifyError, RoundResult, Strictness, Verdict, Wait};
use crate::status::{answer_too_large, is_too_large};

/// The longest name of an address space, in bytes: it is in every log line about it.
pub(crate) const LONGEST_NAME: usize = 128;

/// How long a stream of faults may stay silent before it says whose they are. It holds nothing but a
/// connection.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);

/// The rpc source's service.
#[derive(Debug, Clone)]
pub(crate) struct Notifiers {
    pub(crate) host: Host,
}

#[tonic::async_trait]
impl NotifierService for Notifiers {
    type ServeFaultsStream = ReceiverStream<Said>;

    async fn serve_faults(
        &self,
        request: Request<Streaming<v1::ServeFaultsRequest>>,
    ) -> Result<Response<Self::ServeFaultsStream>, Status> {
        require_leave(&request)?;
        let mut inbound = request.into_inner();
        let Owned { source, .. } = self.owned_id(opened(&mut inbound).await?)?;
        if self.host.is_stopping() {
            return Err(NotifyError::Stopping.into());
        }
        let (stream, questions) = source.faults.open()?;
        let stopping = self.host.stopping().clone();
        self.host.tasks().spawn(Arc::clone(&source.faults).serve(stream, inbound, stopping));
        Ok(Response::new(ReceiverStream::new(questions)))
    }

    async fn register_address_space(
        &self,
        request: Request<v1::RegisterAddressSpaceRequest>,
    ) -> Result<Response<v1::RegisterAddressSpaceResponse>, Status> {
        require_leave(&request)?;
        let request = request.into_inner();
        let strictness = if request.strict { Strictness::Strict } else { Strictness::Lenient };
        let name = checked_name(request.name)?;
        let taken_back = AddressSpaceId::new(request.address_space_id);
        let asked = ToRegister { name, strictness, taken_back };
        let id = match convert::call_id(&request.request_id)? {
            None => self.register(&asked)?,
            Some(call) => self.host.registrations().once(call, asked, |asked| self.register(asked))??,
        };
        Ok(Response::new(v1::RegisterAddressSpaceResponse { address_space_id: id.get() }))
    }

    async fn invalidate_range_start(
        &self,
        request: Request<v1::InvalidateRangeStartRequest>,
    ) -> Result<Response<v1::InvalidateRangeStartResponse>, Status> {
        require_leave(&request)?;
        let request = request.into_inner();
        let owned = self.owned(request.address_space_id)?;
        let invalidation = Invalidation {
            address_space: owned.id,
            range: convert::required_range(request.range, "range")?,
            cause: convert::cause(request.cause)?,
            owner: OwnerTag::new(request.owner),
            wait: if request.non_blockable { Wait::NotAtAll } else { wait(request.deadline_ms) },
            resident_pages: Some(request.resident_pages).filter(|pages| *pages > 0),
        };
        let Invalidation { range, cause, owner, .. } = invalidation;
        let may_wait = if request.non_blockable { MayWait::No } else { MayWait::Yes };
        let retry = owned.retry(&request.request_id, Asked::Start { range, cause, owner, may_wait })?;
        let result = self.host.start(invalidation, retry.as_ref()).await?;
        Ok(Response::new(v1::InvalidateRangeStartResponse { result: Some(wire_result(&result)) }))
    }

    async fn invalidate_range_end(
        &self,
        request: Request<v1::InvalidateRangeEndRequest>,
    ) -> Result<Response<v1::InvalidateRangeEndResponse>, Status> {
        require_leave(&request)?;
        let request = request.into_inner();
        let owned = self.owned(request.address_space_id)?;
        let seq = convert::seq(request.seq, "seq")?;
        self.require_run(request.host_incarnation, owned.id, seq)?;
        let end = || self.host.invalidate_range_end(owned.id, seq);
        match convert::call_id(&request.request_id)? {
            None => end()?,
            Some(id) => owned.source.retries.end(id, seq, end)??,
        }
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
        let owned = self.owned(request.address_space_id)?;
        let cause = convert::cause(request.cause)?;
        let wait = wait(request.deadline_ms);
        let (address, owner) = (request.address, OwnerTag::new(request.owner));
        let retry = owned.retry(&request.request_id, Asked::Page { address, cause, owner })?;
        let result =
            self.host.invalidate_page_for(owned.id, address, cause, owner, wait, retry.as_ref()).await?;
        Ok(Response::new(v1::InvalidatePageResponse { result: Some(wire_result(&result)) }))
    }

    async fn change_pte(
        &self,
        request: Request<v1::ChangePteRequest>,
    ) -> Result<Response<v1::ChangePteResponse>, Status> {
        require_leave(&request)?;
        let request = request.into_inner();
        let owned = self.owned(request.address_space_id)?;
        let wire = request.translation.ok_or(Malformed::Missing { field: "translation" })?;
        let translation = convert::translation(wire)?;
        let asked = Asked::Around { method: Method::ChangePte(translation), range: translation.range };
        let retry = owned.retry(&request.request_id, asked)?;
        let result =
            self.host.change(owned.id, translation, wait(request.deadline_ms), retry.as_ref()).await?;
        Ok(Response::new(v1::ChangePteResponse { result: Some(wire_result(&result)) }))
    }

    async fn clear_flush_young(
        &self,
        request: Request<v1::ClearFlushYoungRequest>,
    ) -> Result<Response<v1::ClearFlushYoungResponse>, Status> {
        require_leave(&request)?;
        let request = request.into_inner();
        let owned = self.owned(request.address_space_id)?;
        let range = convert::required_range(request.range, "range")?;
        let wait = wait(request.deadline_ms);
        let result = self.young(&owned, Method::ClearFlushYoung, range, wait, &request.request_id).await?;
        let young = result.young;
        Ok(Response::new(v1::ClearFlushYoungResponse { result: Some(wire_result(&result)), young }))
    }

    async fn clear_young(
        &self,
        request: Request<v1::ClearYoungRequest>,
    ) -> Result<Response<v1::ClearYoungResponse>, Status> {
        require_leave(&request)?;
        let request = request.into_inner();
        let owned = self.owned(request.address_space_id)?;
        let range = convert::required_range(request.range, "range")?;
        let wait = wait(request.deadline_ms);
        let result = self.young(&owned, Method::ClearYoung, range, wait, &request.request_id).await?;
        let young = result.young;
        Ok(Response::new(v1::ClearYoungResponse { result: Some(wire_result(&result)), young }))
    }

    async fn test_young(
        &self,
        request: Request<v1::TestYoungRequest>,
    ) -> Result<Response<v1::TestYoungResponse>, Status> {
        require_leave(&request)?;
        let request = request.into_inner();
        let owned = self.owned(request.address_space_id)?;
        let range = convert::required_range(request.range, "range")?;
        let young = self.host.test_young(owned.id, range)?;
        Ok(Response::new(v1::TestYoungResponse { young }))
    }

    async fn release_address_space(
        &self,
        request: Request<v1::ReleaseAddressSpaceRequest>,
    ) -> Result<Response<v1::ReleaseAddressSpaceResponse>, Status> {
        require_leave(&request)?;
        let request = request.into_inner();
        let result = match convert::call_id(&request.request_id)? {
            None => self.host.release(self.owned(request.address_space_id)?.id).await?,
            Some(id) => {
                let address_space = convert::address_space_id(request.address_space_id, "address_space_id")?;
                let release = match self.owned_id(address_space) {
                    Ok(owned) => {
                        owned.source.retries.require_unknown(&id)?;
                        Releases::begin(&self.host, address_space, id)
                    }
                    // It has gone, perhaps by this very call.
                    Err(gone) => Some(self.host.releases().find(address_space, &id).ok_or(gone)?),
                };
                match release {
                    Some(release) => release.outcome(self.host.bound()).await?,
                    None => return Err(NotifyError::Released(address_space).into()),
                }
            }
        };
        Ok(Response::new(v1::ReleaseAddressSpaceResponse { result: Some(wire_result(&result)) }))
    }

    async fn await_round(
        &self,
        request: Request<v1::AwaitRoundRequest>,
    ) -> Result<Response<v1::AwaitRoundResponse>, Status> {
        require_leave(&request)?;
        let request = request.into_inner();
        let owned = self.owned(request.address_space_id)?;
        let seq: Seq = convert::seq(request.seq, "seq")?;
        self.require_run(request.host_incarnation, owned.id, seq)?;
        let result = self.host.await_round(owned.id, seq, wait(request.deadline_ms)).await?;
        Ok(Response::new(v1::AwaitRoundResponse { result: Some(wire_result(&result)) }))
    }
}

impl Notifiers {
    fn register(&self, asked: &ToRegister) -> Result<AddressSpaceId, NotifyError> {
        let ToRegister { name, strictness, taken_back } = asked;
        let source = Arc::new(RpcSource::new(self.host.source_fault_timeout()));
        match *taken_back {
            None => self.host.register_address_space(name, source, *strictness),
            Some(id) => self.host.take_back(id, name, source, *strictness).map(|()| id),
        }
    }

    /// A sequence means what it meant in its run. 0: its caller does not say which that was.
    fn require_run(
        &self,
        host_incarnation: u64,
        address_space: AddressSpaceId,
        seq: Seq,
    ) -> Result<(), NotifyError> {
        let this = self.host.incarnation();
        match Incarnation::new(host_incarnation) {
            Some(of) if of > this => Err(NotifyError::Superseded),
            Some(of) if of < this => Err(NotifyError::RoundOfAnotherRun { address_space, seq, of, this }),
            Some(_) | None => Ok(()),
        }
    }

    /// An address space that was registered here: nobody opens or ends the brackets of another source.
    fn owned(&self, id: u64) -> Result<Owned, Status> {
        self.owned_id(convert::address_space_id(id, "address_space_id")?)
    }

    fn owned_id(&self, id: AddressSpaceId) -> Result<Owned, Status> {
        let space = self.host.directory().expect(id)?;
        let source: Arc<dyn Any + Send + Sync> = space.source.clone();
        source.downcast().map(|source| Owned { id, source }).map_err(|_| {
            let message = format!("address space {id} belongs to the {} source", space.source.source());
            status(Reason::AddressSpaceNotOwned, message, &[])
        })
    }

    async fn young(
        &self,
        owned: &Owned,
        method: Method,
        range: AddrRange,
        wait: Wait,
        request_id: &str,
    ) -> Result<RoundResult, Status> {
        let retry = owned.retry(request_id, Asked::Around { method, range })?;
        Ok(self.host.young(owned.id, method, range, wait, retry.as_ref()).await?)
    }
}

/// An address space of the rpc source.
struct Owned {
    id: AddressSpaceId,
    source: Arc<RpcSource>,
}

impl Owned {
    /// A call of a method; `None` where its caller gave no id to try again with.
    fn retry(&self, request_id: &str, asked: Asked) -> Result<Option<Try<'_>>, Status> {
        let retries: &Retries = &self.source.retries;
        match convert::call_id(request_id)? {
            Some(id) => Ok(Some(retries.ask(id, asked)?)),
            None => Ok(None),
        }
    }
}

/// Whose faults a stream serves: its first message.
async fn opened(inbound: &mut Streaming<v1::ServeFaultsRequest>) -> Result<AddressSpaceId, Status> {
    let open = Malformed::Missing { field: "open" };
    match tokio::time::timeout(OPEN_TIMEOUT, inbound.message()).await {
        Ok(Ok(Some(first))) => match SourceSays::try_from(first)? {
            SourceSays::Open { address_space } => Ok(address_space),
            SourceSays::Translated { .. } | SourceSays::Declined { .. } => Err(open.into()),
        },
        Ok(Ok(None)) | Err(_) => Err(open.into()),
        Ok(Err(broken)) if is_too_large(&broken) => Err(answer_too_large()),
        Ok(Err(broken)) => Err(broken),
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
        elapsed_ns: nanos(result.times.elapsed()),
        dirty: result.dirty,
        host_incarnation: result.host_incarnation.get(),
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
