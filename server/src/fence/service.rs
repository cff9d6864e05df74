//! A gRPC `FencerService` as a fencer: the outcome CONFIRMED confirms, nothing else does.
//!
//! Each attempt has a connection of its own: they are seldom, and one that was opened when all was well says
//! nothing about the way now.

use std::future::Future;
use std::time::Duration;

use shootdown_proto::endpoint::Endpoint;
use shootdown_proto::v1;
use shootdown_proto::v1::fencer_service_client::FencerServiceClient;
use tonic::transport::Channel;

use super::{Confirmed, NotConfirmed, Subject};

/// One attempt, over the connection that `connecting` makes; its time is part of the limit.
pub(super) async fn fence(
    connecting: impl Future<Output = Result<Channel, tonic::transport::Error>>,
    subject: &Subject,
    limit: Duration,
) -> Result<Confirmed, NotConfirmed> {
    let asked = tokio::time::timeout(limit, ask(connecting, subject)).await;
    match asked.map_err(|_| NotConfirmed::TimeLimit(limit))?? {
        v1::FenceOutcome::Confirmed => Ok(Confirmed(())),
        other @ (v1::FenceOutcome::Unspecified | v1::FenceOutcome::NotConfirmed) => {
            Err(NotConfirmed::Answered(other))
        }
    }
}

async fn ask(
    connecting: impl Future<Output = Result<Channel, tonic::transport::Error>>,
    subject: &Subject,
) -> Result<v1::FenceOutcome, NotConfirmed> {
    let channel = connecting.await.map_err(NotConfirmed::Unreachable)?;
    let request = v1::FenceRequest {
        device_id: subject.device.as_str().to_owned(),
        device_incarnation: subject.device_incarnation.get(),
        session_id: subject.session.get(),
        epoch: subject.epoch.get(),
        host_incarnation: subject.host_incarnation.get(),
    };
    let answer = FencerServiceClient::new(channel).fence(request).await;
    // An outcome of a later version is read as UNSPECIFIED, which confirms nothing.
    answer.map(|answer| answer.into_inner().outcome()).map_err(|status| NotConfirmed::Call(Box::new(status)))
}

/// A name is resolved here, anew for each attempt.
pub(super) async fn connect(endpoint: &Endpoint) -> Result<Channel, tonic::transport::Error> {
    tonic::transport::Endpoint::from_shared(endpoint.uri())?.connect().await
}
