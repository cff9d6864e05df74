//! `DeviceService`: a stream becomes a session.

use std::sync::Arc;
use std::time::Duration;

use shootdown_proto::error::Reason;
use shootdown_proto::message::{DeviceSays, SessionError};
use shootdown_proto::v1;
use shootdown_proto::v1::device_service_server::DeviceService;
use tonic::{Request, Response, Status, Streaming};

use crate::host::Host;
use crate::session::stream::Outgoing;
use crate::session::{handshake, task};
use crate::shard::Shard;
use crate::status;
use crate::vigil::Vigil;

/// How long a stream may stay silent before its Hello. It holds nothing but a connection.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// One for each shard: a session lives where its connection does.
#[derive(Debug, Clone)]
pub(crate) struct Devices {
    pub(crate) host: Host,
    pub(crate) shard_index: usize,
    pub(crate) vigil: Arc<Vigil>,
}

#[tonic::async_trait]
impl DeviceService for Devices {
    type SessionStream = Outgoing;

    async fn session(
        &self,
        request: Request<Streaming<v1::SessionRequest>>,
    ) -> Result<Response<Outgoing>, Status> {
        let mut inbound = request.into_inner();
        let opened = match hello(&mut inbound).await {
            Ok(hello) => {
                let shard = Shard {
                    index: self.shard_index,
                    runtime: tokio::runtime::Handle::current(),
                    vigil: Arc::clone(&self.vigil),
                };
                handshake::open(&self.host, &hello, shard).await
            }
            Err(refused) => Err(refused),
        };
        match opened {
            // No await between this and the task: a session without one would never be forgotten.
            Ok(opened) => {
                let outgoing = Outgoing::session(Arc::clone(&opened.handle), opened.line);
                self.host.tasks().spawn(task::run(self.host.clone(), opened, inbound));
                Ok(Response::new(outgoing))
            }
            Err(refused) => {
                tracing::info!(reason = refused.reason.word(), %refused, "a session was refused");
                Ok(Response::new(Outgoing::refused(refused)))
            }
        }
    }
}

async fn hello(
    inbound: &mut Streaming<v1::SessionRequest>,
) -> Result<shootdown_proto::message::Hello, SessionError> {
    let first = tokio::time::timeout(HELLO_TIMEOUT, inbound.message()).await;
    match first {
        Ok(Ok(Some(wire))) => match DeviceSays::try_from(wire) {
            Ok(says) => handshake::expect_hello(says),
            Err(malformed) => Err(SessionError { fatal: true, ..SessionError::malformed(&malformed, None) }),
        },
        Ok(Err(broken)) if status::is_too_large(&broken) => {
            Err(SessionError::fatal(Reason::MessageTooLarge, status::too_large()))
        }
        Ok(Ok(None) | Err(_)) | Err(_) => Err(SessionError::fatal(
            Reason::HelloExpected,
            "the stream ended, or stayed silent, before its Hello",
        )),
    }
}
