//! [7 of 9] What a device says, applied. One task a session, on the session's shard: it selects the
//! next event, then applies it. It outlives the stream, until the device has provably stopped.

use std::pin::Pin;
use std::sync::Arc;

use shootdown_core::SessionId;
use shootdown_core::session::Phase;
use shootdown_proto::convert;
use shootdown_proto::error::{Malformed, Reason};
use shootdown_proto::message::{DeviceSays, HostSays, RequestId};
use shootdown_proto::v1;
use tokio_util::sync::WaitForCancellationFutureOwned;
use tonic::{Status, Streaming};

use super::{SessionHandle, fault};
use crate::host::Host;
use crate::status;

/// What a session's task waits for.
enum Happening {
    Said(Box<DeviceSays>),
    /// With the request that it would have been, if it names one.
    Malformed(Malformed, Option<RequestId>),
    /// The stream broke; the transport says how.
    Broken(Status),
    /// The device closed its half without a Leave, or somebody ended the session.
    Closed,
}

/// Runs until the device has stopped: by its own word, or by a fence.
///
/// It owns no timer: deadlines are the watchdog's, on the control runtime. A shard on which no timer is
/// set sleeps until something arrives, and its sleep costs less.
pub(crate) async fn run(host: Host, handle: Arc<SessionHandle>, mut inbound: Streaming<v1::SessionRequest>) {
    let severed = handle.severed.clone().cancelled_owned();
    tokio::pin!(severed);
    while handle.phase().has_stream() {
        let happening = next(&handle, &mut inbound, severed.as_mut()).await;
        apply(&host, &handle, happening);
    }
    drop(inbound);
    handle.over.cancelled().await;
    handle.withdraw_all();
    host.registry().forget(&handle);
}

/// # Cancel safety
/// Both arms are: the stream keeps a message that was not taken, and a token stays cancelled.
async fn next(
    handle: &SessionHandle,
    inbound: &mut Streaming<v1::SessionRequest>,
    severed: Pin<&mut WaitForCancellationFutureOwned>,
) -> Happening {
    tokio::select! {
        biased;
        // First: a session that was ended says nothing more that counts.
        () = severed => Happening::Closed,
        message = read(handle, inbound) => match message {
            Ok(Some(wire)) => {
                let request = convert::request_of(&wire);
                match DeviceSays::try_from(wire) {
                    Ok(says) => Happening::Said(Box::new(says)),
                    Err(malformed) => Happening::Malformed(malformed, request),
                }
            }
            Ok(None) => Happening::Closed,
            Err(status) => Happening::Broken(status),
        },
    }
}

/// The next message, once there is room for its answer.
async fn read(
    handle: &SessionHandle,
    inbound: &mut Streaming<v1::SessionRequest>,
) -> Result<Option<v1::SessionRequest>, Status> {
    while !handle.has_room() {
        handle.room.notified().await;
    }
    inbound.message().await
}

fn apply(host: &Host, handle: &Arc<SessionHandle>, happening: Happening) {
    match happening {
        Happening::Said(says) => said(host, handle, *says),
        Happening::Malformed(malformed, request) => {
            handle.refuse(malformed.reason(), malformed.to_string(), request);
        }
        Happening::Broken(status) if status::is_too_large(&status) => {
            handle.end(Reason::MessageTooLarge, status::too_large());
        }
        Happening::Broken(status) => {
            tracing::debug!(session = handle.id.get(), %status, "the stream broke");
            handle.on_severed();
        }
        Happening::Closed => handle.on_severed(),
    }
}

fn said(host: &Host, handle: &Arc<SessionHandle>, says: DeviceSays) {
    match says {
        DeviceSays::Hello(_) => handle.end(
            Reason::HelloRepeated,
            "Hello opens a session and comes once; for another session open another stream",
        ),
        DeviceSays::Ack { session, ack } => match session {
            Some(other) if other != handle.id => handle.refuse(
                Reason::AckOtherSession,
                format!("the ack is of session {other}, this is session {}; nothing was acked", handle.id),
                None,
            ),
            _ => handle.on_ack(&ack),
        },
        DeviceSays::Subscribe(subscribe) => handle.subscribe(host, subscribe),
        DeviceSays::Unsubscribe { request, subscription } => {
            handle.unsubscribe(host, request, subscription);
        }
        DeviceSays::Fault(fault) => fault::start(host, handle, fault),
        DeviceSays::Young { address_space, ranges } => handle.young(address_space, &ranges),
        DeviceSays::Heartbeat { request } => heartbeat(handle, request),
        DeviceSays::Leave => handle.on_left(),
    }
}

/// A device that owes an ack for too long gets no answer: its lease runs out (BoundedResolution).
fn heartbeat(handle: &SessionHandle, request: RequestId) {
    let now = handle.clock.now();
    let granted = handle.with(now, |state, _| state.session.on_heartbeat(now));
    if let Some(lease) = granted {
        handle.answer(HostSays::LeaseRenewed { request, lease });
    }
}

/// Ends a session by its id.
pub(crate) fn evict(host: &Host, session: SessionId) -> Result<(), Reason> {
    let handle = host.registry().get(session).ok_or(Reason::SessionUnknown)?;
    if matches!(handle.phase(), Phase::Fenced | Phase::Gone) {
        return Err(Reason::SessionUnknown);
    }
    handle.evict();
    Ok(())
}
