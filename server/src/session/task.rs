//! [7 of 9] What a device says, applied. One task a session, on the session's shard: it selects the
//! next event, then applies it. It outlives the stream, until the device has provably stopped or the session
//! goes on on another stream, whose task takes over.

use std::pin::Pin;
use std::sync::Arc;

use shootdown_core::SessionId;
use shootdown_core::session::Phase;
use shootdown_proto::convert;
use shootdown_proto::error::{Malformed, Reason};
use shootdown_proto::message::{DeviceSays, HostSays, RequestId};
use shootdown_proto::v1;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::{Status, Streaming};

use super::handshake::{Earlier, Opened};
use super::silence::Silence;
use super::{LineId, SessionHandle, fault};
use crate::host::Host;
use crate::status;

/// What a session's task waits for.
enum Happening {
    Said(Box<DeviceSays>),
    /// With the request that it would have been, if it names one.
    Malformed(Malformed, Option<RequestId>),
    /// The stream broke; the transport says how.
    Broken(Status),
    /// The watchdog asked whether the device is heard, and there was nothing to read.
    NothingRead,
    /// The device closed its half without a Leave, or somebody ended the session.
    Closed,
}

/// Runs until the device has stopped: by its own word, or by a fence.
///
/// It owns no timer: deadlines are the watchdog's, on the control runtime. A shard on which no timer is
/// set sleeps until something arrives, and its sleep costs less.
pub(crate) async fn run(host: Host, opened: Opened, mut inbound: Streaming<v1::SessionRequest>) {
    let Opened { handle, line } = opened;
    // A copy: no lock for each word.
    let mut earlier = handle.earlier();
    let Some(ends) = handle.ends_of(line) else { return };
    handle.on_read_here(line);
    let severed = ends.severed.clone().cancelled_owned();
    tokio::pin!(severed);
    while handle.is_up(line) {
        let happening = next(&handle, &mut inbound, severed.as_mut()).await;
        if let Happening::Said(says) = &happening
            && earlier.are_left(says)
        {
            earlier = Earlier::None;
            handle.on_earlier_left();
            host.registry().leave_behind(&handle);
        }
        apply(&host, &handle, line, happening);
    }
    drop(inbound);
    outlive(&host, &handle, &ends.replaced).await;
}

/// Waits until the device has stopped, then forgets the session; unless it goes on on another stream, whose task
/// does it then.
async fn outlive(host: &Host, handle: &SessionHandle, replaced: &CancellationToken) {
    tokio::select! {
        biased;
        // First: the other stream's task does the rest.
        () = replaced.cancelled() => return,
        () = handle.over.cancelled() => {}
    }
    // What it had begun to read or write ends before a round may begin that does not count on it
    // (FenceReachesReuse): who owed nothing was waited for by nobody.
    handle.wait_for_accesses();
    // Before its subscriptions go: an address space that is registered now does not bring it new ones.
    host.restart().survivors().remove(handle);
    handle.withdraw_all();
    host.registry().forget(handle);
    host.restart().on_over(handle).await;
}

/// The same in a task of its own, for a session that no stream has a task of.
pub(crate) fn start_outliving(host: &Host, handle: Arc<SessionHandle>) {
    let replaced = handle.replaced();
    let (host, runtime) = (host.clone(), handle.shard.runtime.clone());
    let tasks = host.tasks().clone();
    drop(tasks.spawn_on(async move { outlive(&host, &handle, &replaced).await }, &runtime));
}

/// # Cancel safety
/// Every arm is: the stream keeps a message that was not taken, and a token stays cancelled. The watchdog asks again.
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
        // Last: whatever has come is an answer.
        () = listened(handle) => Happening::NothingRead,
    }
}

/// Resolves when the watchdog has asked whether the device is heard, and what it has said until then could be read.
async fn listened(handle: &SessionHandle) {
    handle.listen.notified().await;
    for _ in 0..TURNS_OF_A_LOOK {
        tokio::task::yield_now().await;
    }
}

/// With each the shard looks at its sockets, and runs whatever is ready then. In the first the connection takes what has
/// come; if that was leave to send, in the second an answer goes out, and makes room for what the device has said.
const TURNS_OF_A_LOOK: usize = 2;

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

fn apply(host: &Host, handle: &Arc<SessionHandle>, on: LineId, happening: Happening) {
    match happening {
        Happening::Said(says) => said(host, handle, on, *says),
        Happening::Malformed(malformed, request) => {
            handle.on_heard(on);
            handle.refuse(on, malformed.reason(), malformed.to_string(), request);
        }
        Happening::Broken(status) if status::is_too_large(&status) => {
            handle.end_on(on, Reason::MessageTooLarge, status::too_large());
        }
        Happening::Broken(status) => {
            tracing::debug!(session = handle.id.get(), %status, "the stream broke");
            handle.on_severed(on);
        }
        Happening::Closed => handle.on_severed(on),
        Happening::NothingRead => handle.on_nothing_read(on),
    }
}

fn said(host: &Host, handle: &Arc<SessionHandle>, on: LineId, says: DeviceSays) {
    // An ack and a heartbeat count by themselves, in the step in which they do what they are for.
    if !matches!(says, DeviceSays::Ack { .. } | DeviceSays::Heartbeat { .. }) {
        handle.on_heard(on);
    }
    match says {
        DeviceSays::Hello(_) => handle.end_on(
            on,
            Reason::HelloRepeated,
            "Hello opens a session and comes once; for another session open another stream",
        ),
        DeviceSays::Ack { session, ack } => match session {
            Some(other) if other != handle.id => handle.refuse(
                on,
                Reason::AckOtherSession,
                format!("the ack is of session {other}, this is session {}; nothing was acked", handle.id),
                None,
            ),
            _ => handle.on_ack(on, &ack),
        },
        DeviceSays::Subscribe(subscribe) => handle.subscribe(host, on, subscribe),
        DeviceSays::Unsubscribe { request, subscription } => {
            handle.unsubscribe(host, on, request, subscription);
        }
        DeviceSays::Fault(fault) => fault::start(host, handle, on, fault),
        DeviceSays::Young { address_space, ranges } => handle.young(on, address_space, &ranges),
        DeviceSays::Heartbeat { request } => heartbeat(host, handle, on, request),
        DeviceSays::Leave => handle.on_left(on),
    }
}

/// A device that owes an ack for too long gets no lease: it runs out (BoundedResolution). It is told so, because a
/// heartbeat without an answer says that the connection is lost, and it would come back on another.
fn heartbeat(host: &Host, handle: &SessionHandle, on: LineId, request: RequestId) {
    // After the request has come: what a successor waits for is a lease of what was asked before it came.
    if !host.is_current() {
        return;
    }
    let now = handle.clock.now();
    let granted = handle.with(now, |state, _| {
        if state.line.id != on {
            return None;
        }
        state.silence = Silence::since(now);
        state.session.on_heartbeat(now)
    });
    match granted {
        Some(lease) => handle.answer(on, HostSays::LeaseRenewed { request, lease }),
        None => handle.refuse(
            on,
            Reason::LeaseNotRenewed,
            "the device owes an ack for too long; its lease is renewed when it has acked",
            Some(request),
        ),
    }
}

/// What is known of the device of a session that is ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Evicted {
    MayStillRun,
    /// It cannot reach the memory any more: somebody vouches for that.
    CutOff,
}

/// Ends a session by its id.
pub(crate) fn evict(host: &Host, session: SessionId, device: Evicted) -> Result<(), Reason> {
    let handle = host.registry().get(session).ok_or(Reason::SessionUnknown)?;
    if matches!(handle.phase(), Phase::Fenced | Phase::Gone) {
        return Err(Reason::SessionUnknown);
    }
    match device {
        Evicted::MayStillRun => handle.evict(),
        // The administrator's word is a fencer's (FenceIsPositive).
        Evicted::CutOff => handle.fence(),
    }
    Ok(())
}
