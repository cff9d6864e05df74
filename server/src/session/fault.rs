//! A device's fault, from the question to the grant.
//!
//! ```text
//!   open a ticket --Held--> wait for the bracket's end, try again
//!        | ok
//!   ask the source (may sleep: it may have to copy a page, and notify)
//!        |
//!   commit the ticket and put the grant on the stream, in one step under the address space's lock
//!        |--Spoiled: an overlapping event started meanwhile--> try again
//! ```
//!
//! As `mmu_interval_read_begin` and `mmu_interval_read_retry` have it.

use std::sync::Arc;

use bytes::Bytes;
use shootdown_core::gate::Ticket;
use shootdown_core::{AddrRange, Translation};
use shootdown_proto::error::Reason;
use shootdown_proto::message::{Fault, Grant, HostSays};

use super::{LineId, SessionHandle};
use crate::directory::AddressSpace;
use crate::host::Host;
use crate::restart::GraceError;
use crate::source::FaultError;
use crate::status;

/// How often a fault is tried before the device is told to ask again. Each further try means that an
/// event over these very pages came between question and answer; a device that asks again goes to the
/// back, so that two which take a page from each other both make progress.
const MOST_TRIES: usize = 16;

/// Why a fault was refused.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error(
        "the range {0} is not covered by one subscription of this session that hears of every cause; subscribe first"
    )]
    NotSubscribed(AddrRange),
    #[error("the address space was released")]
    Released,
    /// Never said: there is nobody to say it to.
    #[error("the stream that it came on is lost; ask again")]
    Interrupted,
    #[error("the pages changed {MOST_TRIES} times while the fault was served; ask again")]
    Contended,
    #[error(transparent)]
    Grace(GraceError),
    #[error(transparent)]
    Source(FaultError),
}

impl Refused {
    fn reason(&self) -> Reason {
        match self {
            Self::NotSubscribed(_) => Reason::FaultNotSubscribed,
            Self::Released => Reason::AddressSpaceReleased,
            Self::Contended | Self::Interrupted | Self::Grace(_) => Reason::FaultContended,
            Self::Source(error) => status::fault_reason(error),
        }
    }
}

/// Serves a fault in a task of its own, so that a held one never delays an ack of the same session.
///
/// It ends with the stream that it came on: the device asks again on the next one.
pub(super) fn start(host: &Host, handle: &Arc<SessionHandle>, on: LineId, fault: Fault) {
    let Some(space) = host.directory().get(fault.address_space) else {
        return handle.refuse_unknown(on, fault.address_space, fault.request);
    };
    let (counted, severed) = {
        let mut state = handle.state.lock();
        if state.line.id != on {
            return;
        }
        (state.session.try_fault(), state.line.ends.severed.clone())
    };
    if let Err(quota) = counted {
        return handle.refuse(on, Reason::FaultQuota, quota.to_string(), Some(fault.request));
    }
    let (restart, clock) = (Arc::clone(host.restart()), host.clock());
    let mut in_flight = InFlight { handle: Arc::clone(handle), on, granted: Granted::No };
    host.tasks().spawn_on(
        async move {
            let handle = &in_flight.handle;
            let served = tokio::select! {
                biased;
                // First: a session that is over must not be granted anything.
                () = handle.over.cancelled() => return,
                () = severed.cancelled() => return,
                served = async {
                    restart.accounted_for(clock).await.map_err(Refused::Grace)?;
                    serve(handle, on, &space, fault).await
                } => served,
            };
            match served {
                Ok(()) => in_flight.on_granted(),
                Err(refused) => {
                    handle.refuse(on, refused.reason(), refused.to_string(), Some(fault.request));
                }
            }
        },
        &handle.shard.runtime,
    );
}

/// A fault that counts against its session's quota: until its grant is taken for the stream, because the
/// bytes that a grant carries are kept for the device until then, or until it is refused.
struct InFlight {
    handle: Arc<SessionHandle>,
    on: LineId,
    granted: Granted,
}

impl InFlight {
    fn on_granted(&mut self) {
        self.granted = Granted::Yes;
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if self.granted == Granted::No {
            let mut state = self.handle.state.lock();
            // A resume has given back all that was counted on an earlier stream.
            if state.line.id == self.on {
                state.session.on_fault_done();
            }
        }
    }
}

async fn serve(
    handle: &SessionHandle,
    on: LineId,
    space: &Arc<AddressSpace>,
    fault: Fault,
) -> Result<(), Refused> {
    for _ in 0..MOST_TRIES {
        if !handle.is_subscribed(space.id, fault.range) {
            return Err(Refused::NotSubscribed(fault.range));
        }
        let ticket = open_ticket(space, fault.range).await?;
        let translations = match space.source.fault(space.id, fault.range, fault.access).await {
            Ok(translations) => translations,
            // What an event overtook is as stale where the source found nothing.
            Err(error) if error.is_of_the_pages() && ticket.was_overtaken() => continue,
            Err(error) => return Err(Refused::Source(error)),
        };
        let data = if fault.wants_data {
            space.source.bytes(&translations).map_err(Refused::Source)?
        } else {
            Bytes::new()
        };
        if grant((handle, on), ticket, fault, translations, data)? == Granted::Yes {
            return Ok(());
        }
    }
    Err(Refused::Contended)
}

/// A ticket that is given back even when the fault is dropped half-way.
struct OpenTicket<'space> {
    space: &'space AddressSpace,
    ticket: Option<Ticket>,
}

impl OpenTicket<'_> {
    /// Ends the ticket; whether an event that overlaps it has started meanwhile.
    fn was_overtaken(mut self) -> bool {
        let ticket = self.ticket.take().expect("a ticket is ended once");
        self.space.order.lock().gate.commit(ticket).is_err()
    }
}

impl Drop for OpenTicket<'_> {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            self.space.order.lock().gate.cancel(ticket);
        }
    }
}

/// Waits until no bracket overlaps.
async fn open_ticket(space: &AddressSpace, range: AddrRange) -> Result<OpenTicket<'_>, Refused> {
    loop {
        let ended = space.bracket_ended.notified();
        tokio::pin!(ended);
        // Before the look, so that an end between the look and the wait is not missed.
        ended.as_mut().enable();
        {
            let mut order = space.order.lock();
            if order.released {
                return Err(Refused::Released);
            }
            if let Ok(ticket) = order.gate.open_ticket(range) {
                return Ok(OpenTicket { space, ticket: Some(ticket) });
            }
        }
        ended.await;
    }
}

#[derive(PartialEq, Eq)]
enum Granted {
    Yes,
    /// The ticket was spoiled.
    No,
}

/// Commits the ticket and puts the grant on the stream. Both under the address space's lock: an event
/// that starts after it finds the grant ahead of its notice.
fn grant(
    (handle, on): (&SessionHandle, LineId),
    mut open: OpenTicket<'_>,
    fault: Fault,
    translations: Vec<Translation>,
    data: Bytes,
) -> Result<Granted, Refused> {
    let space = open.space;
    let mut order = space.order.lock();
    if order.released {
        return Err(Refused::Released);
    }
    let ticket = open.ticket.take().expect("a ticket is committed once");
    if order.gate.commit(ticket).is_err() {
        return Ok(Granted::No);
    }
    let seq = order.gate.last_seq();
    let waker = {
        // The session's lock inside the address space's: nowhere are they taken the other way round.
        let mut state = handle.state.lock();
        if state.session.phase().is_over() || !state.is_subscribed(space.id, fault.range) {
            return Err(Refused::NotSubscribed(fault.range));
        }
        if state.line.id != on {
            return Err(Refused::Interrupted);
        }
        state.line.answers.push_back(HostSays::Grant(Grant {
            request: fault.request,
            address_space: space.id,
            seq,
            translations,
            data,
        }));
        state.line.stream.take()
    };
    drop(order);
    super::wake(waker);
    Ok(Granted::Yes)
}
