//! `PageService`: bulk bytes, by frame, as a device's DMA moves them.

use std::sync::Arc;

use bytes::BytesMut;
use shootdown_core::{Epoch, SessionId};
use shootdown_proto::convert;
use shootdown_proto::error::{Reason, status as make_status};
use shootdown_proto::message::FrameSpan;
use shootdown_proto::v1;
use shootdown_proto::v1::page_service_server::PageService;
use tonic::{Request, Response, Status};

use crate::host::Host;
use crate::session::SessionHandle;
use crate::source::memory::{FrameError, FrameStore};
use crate::status;

/// The frames of this host agent, for the sessions that may reach them.
#[derive(Debug, Clone)]
pub(crate) struct Pages {
    pub(crate) host: Host,
    pub(crate) frames: Arc<FrameStore>,
}

#[tonic::async_trait]
impl PageService for Pages {
    async fn read(&self, request: Request<v1::ReadRequest>) -> Result<Response<v1::ReadResponse>, Status> {
        let request = request.into_inner();
        let spans = convert::spans(request.spans)?;
        let session = self.admit(request.session_id, request.epoch)?;
        let mut data = BytesMut::with_capacity(spans.iter().map(|span| span.length as usize).sum());
        let read = || {
            tell(&session, &spans, "a device reads frames");
            self.frames.read(&spans, &mut data)
        };
        let read = session.access(read).ok_or_else(|| over(&session))?;
        read.map_err(|error| refused(&error))?;
        Ok(Response::new(v1::ReadResponse { data: data.freeze() }))
    }

    async fn write(&self, request: Request<v1::WriteRequest>) -> Result<Response<v1::WriteResponse>, Status> {
        let request = request.into_inner();
        let spans = convert::spans(request.spans)?;
        let session = self.admit(request.session_id, request.epoch)?;
        let asked: usize = spans.iter().map(|span| span.length as usize).sum();
        if asked != request.data.len() {
            let message = format!("the spans have {asked} bytes, data has {}", request.data.len());
            return Err(make_status(Reason::FieldInvalid, message, &[]));
        }
        let mut rest = request.data;
        let write = || {
            tell(&session, &spans, "a device writes frames");
            spans.iter().try_for_each(|span| {
                let part = rest.split_to(span.length as usize);
                self.frames.write(span.frame, span.offset, &part)
            })
        };
        let written = session.access(write).ok_or_else(|| over(&session))?;
        written.map_err(|error| refused(&error))?;
        Ok(Response::new(v1::WriteResponse {}))
    }
}

impl Pages {
    /// Only by the session's own epoch; that it is not over is looked at together with the access.
    fn admit(&self, session: u64, epoch: u64) -> Result<Arc<SessionHandle>, Status> {
        let handle = SessionId::new(session).and_then(|id| self.host.registry().get(id));
        let handle = handle.ok_or_else(|| status::session_unknown(session))?;
        if Epoch::new(epoch) != Some(handle.epoch) {
            let message = format!("epoch {epoch} is not that of session {session}");
            return Err(make_status(Reason::EpochStale, message, &[("session_id", session.to_string())]));
        }
        Ok(handle)
    }
}

/// Which device reaches which frames, for whoever looks for one that should not. Told as a part of the access: what
/// is told after a fence is a breach of FenceReachesReuse.
fn tell(session: &SessionHandle, spans: &[FrameSpan], what: &str) {
    let (session, device) = (session.id.get(), session.device.as_str());
    tracing::trace!(session, device, ?spans, "{what}");
}

fn over(handle: &SessionHandle) -> Status {
    let message = format!("session {} is over; drop every translation and connect again", handle.id);
    make_status(Reason::SessionFenced, message, &[("session_id", handle.id.to_string())])
}

fn refused(error: &FrameError) -> Status {
    make_status(status::frame_reason(error), error.to_string(), &[])
}
