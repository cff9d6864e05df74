//! [7 of 9] What a device says, applied. One task a session, on the session's shard: it selects the
//! next event, then applies it. It outlives the stream, until the device has provably stopped.

use std::sync::Arc;
use std::time::Duration;

use shootdown_core::SessionId;
use shootdown_core::session::Phase;
use shootdown_proto::error::{Malformed, Reason};
use shootdown_proto::message::{DeviceSays, HostSays, RequestId};
use shootdown_proto::v1;
use tokio::time::{Interval, MissedTickBehavior};
use tonic::{Status, Streaming};

use super::{SessionHandle, fault};
use crate::host::Host;
use crate::status;

/// Deadlines are looked at this many times in the shorter of T_ack and the lease, so that one is
/// noticed at most an eighth late. A timer for each notice would cost more than all it watches.
const TICKS_A_DEADLINE: u32 = 8;

/// What a session's task waits for.
enum Happening {
    Said(Box<DeviceSays>),
    Malformed(Malformed),
    /// The stream broke; the transport says how.
    Broken(Status),
    /// The device closed its half without a Leave, or somebody ended the session.
    Closed,
    Tick,
}

/// Runs until the device has stopped: by its own word, or by a fence.
pub(crate) async fn run(host: Host, handle: Arc<SessionHandle>, mut inbound: Streaming<v1::SessionRequest>) {
    let mut ticks = ticks(host.session_config().ack_timeout, host.session_config().lease.duration);
    while handle.phase().has_stream() {
        let happening = next(&handle, &mut inbound, &mut ticks).await;
        apply(&host, &handle, happening);
    }
    drop(inbound);
    while !handle.phase().is_over() {
        ticks.tick().await;
        handle.on_tick();
    }
    handle.withdraw_all();
    host.registry().forget(&handle);
}

/// # Cancel safety
/// Each arm is: the stream keeps a message that was not taken, a token stays cancelled, and a tick
/// that is missed comes again.
async fn next(
    handle: &SessionHandle,
    inbound: &mut Streaming<v1::SessionRequest>,
    ticks: &mut Interval,
) -> Happening {
    tokio::select! {
        biased;
        // First: a session that was ended says nothing more that counts.
        () = handle.severed.cancelled() => Happening::Closed,
        // Before the ticks: an ack that has arrived is heard before its deadline is looked at.
        message = read(handle, inbound) => match message {
            Ok(Some(wire)) => match DeviceSays::try_from(wire) {
                Ok(says) => Happening::Said(Box::new(says)),
                Err(malformed) => Happening::Malformed(malformed),
            },
            Ok(None) => Happening::Closed,
            Err(status) => Happening::Broken(status),
        },
        _ = ticks.tick() => Happening::Tick,
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
        Happening::Malformed(malformed) => handle.refuse(malformed.reason(), malformed.to_string(), None),
        Happening::Broken(status) if status::is_too_large(&status) => {
            handle.end(Reason::MessageTooLarge, status::too_large());
        }
        Happening::Broken(status) => {
            tracing::debug!(session = handle.id.get(), %status, "the stream broke");
            handle.on_severed();
        }
        Happening::Closed => handle.on_severed(),
        Happening::Tick => handle.on_tick(),
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

fn ticks(ack_timeout: Duration, lease: Duration) -> Interval {
    let period =
        (ack_timeout.min(lease) / TICKS_A_DEADLINE).clamp(Duration::from_millis(5), Duration::from_secs(1));
    let mut ticks = tokio::time::interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
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
