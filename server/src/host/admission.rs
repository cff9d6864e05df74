//! [1] to [3] of 9, before a round is open: room in the quarantine, a place among the rounds in flight, and one round for
//! all tries of a call.

use std::sync::Arc;
use std::time::Duration;

use shootdown_core::session::Enforcement;
use shootdown_core::{Method, Moment};
use tokio::sync::TryAcquireError;

use super::Host;
use crate::directory::AddressSpace;
use crate::dispatch::{Call, Dispatched, Leave};
use crate::quarantine;
use crate::source::rpc::retries::Try;
use crate::source::{NotifyError, Wait};

/// Whether a call was held up before its round could open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Held {
    No,
    Yes,
}

/// A call that may open its round.
struct Admitted {
    call: Call,
    leave: Leave,
}

impl Host {
    /// [1] to [3]: takes a place among the rounds in flight, then opens the round. Until the place is
    /// there nothing has happened; after it nothing awaits. Of a call that may be a retry an earlier try may have
    /// opened the round, or may be about to: there is one for all of them.
    pub(super) async fn open(
        &self,
        space: &Arc<AddressSpace>,
        call: Call,
        wait: Wait,
        called: Moment,
        retry: Option<&Try<'_>>,
    ) -> Result<Dispatched, NotifyError> {
        let admitted = self.admit(space, call, wait, called);
        let open = |admitted: Result<Admitted, NotifyError>| self.open_round(space, admitted?, called);
        match retry {
            None => open(admitted.await),
            Some(retry) => retry.once(admitted, open).await,
        }
    }

    /// [1] and [2]: waits for room and for a place, as long as the caller can.
    async fn admit(
        &self,
        space: &Arc<AddressSpace>,
        mut call: Call,
        wait: Wait,
        called: Moment,
    ) -> Result<Admitted, NotifyError> {
        // A replacement is a grant, and nothing is granted while somebody is waited for since a restart (RestartGrace).
        if matches!(call.method, Method::ChangePte(_)) && !self.0.restart.is_accounted_for() {
            call.method = Method::Invalidate;
        }
        let leave = match wait {
            Wait::NotAtAll => Leave::NotToWait,
            Wait::ForTargets | Wait::AtMost(_) => {
                let room = self.room_in_quarantine(space, &call, wait).await?;
                let (leave, place) = place(space, &call, self.rest(wait, called), self.bound()).await?;
                // The page may have gone meanwhile: what would be installed may be somebody else's by now.
                if matches!(call.method, Method::ChangePte(_)) && (room, place) != (Held::No, Held::No) {
                    call.method = Method::Invalidate;
                }
                leave
            }
        };
        Ok(Admitted { call, leave })
    }

    /// [3], unless the host agent may not any more.
    fn open_round(
        &self,
        space: &Arc<AddressSpace>,
        Admitted { call, leave }: Admitted,
        called: Moment,
    ) -> Result<Dispatched, NotifyError> {
        if self.is_superseded() {
            return Err(NotifyError::Superseded);
        }
        if self.is_stopping() && call.method != Method::Release {
            return Err(NotifyError::Stopping);
        }
        let (method, quarantine) = (call.method, self.quarantine());
        let dispatched = space.open_round(call, leave, called, self.clock(), self.tasks())?;
        if matches!(dispatched, Dispatched::WouldBlock(_))
            && quarantine::parks(method)
            && quarantine.is_full()
        {
            return Err(self.quarantine_full());
        }
        Ok(dispatched)
    }

    /// Waits while the quarantine's budget is spent and the call's pages could come there as well; see
    /// [`crate::quarantine`].
    async fn room_in_quarantine(
        &self,
        space: &AddressSpace,
        call: &Call,
        wait: Wait,
    ) -> Result<Held, NotifyError> {
        let might_be_parked = || might_be_parked(space, call, wait);
        let room = async {
            loop {
                let freed = self.quarantine().freed();
                tokio::pin!(freed);
                // Before the look, so that no charge is given back unheard between the two.
                freed.as_mut().enable();
                if !self.quarantine().is_full() || !might_be_parked() {
                    return;
                }
                freed.await;
            }
        };
        let limit = match wait {
            Wait::AtMost(limit) => limit,
            Wait::ForTargets | Wait::NotAtAll => self.bound(),
        };
        if !self.quarantine().is_full() {
            return Ok(Held::No);
        }
        tokio::time::timeout(limit, room).await.map(|()| Held::Yes).map_err(|_| self.quarantine_full())
    }

    fn quarantine_full(&self) -> NotifyError {
        let (parked, budget) = (self.quarantine().parked(), self.quarantine().budget());
        NotifyError::QuarantineFull {
            bytes: parked.bytes,
            pages: parked.pages,
            most_bytes: budget.bytes,
            most_pages: budget.pages,
        }
    }
}

/// Whether the call's pages could come into quarantine: it has a target that may not stop within its caller's time.
fn might_be_parked(space: &AddressSpace, call: &Call, wait: Wait) -> bool {
    let until_the_end = matches!(wait, Wait::ForTargets);
    call.method != Method::Release
        && quarantine::parks(call.method)
        && space
            .subscribers
            .read()
            .targets(call.range, call.cause, call.method)
            .iter()
            .any(|target| !until_the_end || target.handle.enforcement == Enforcement::ByNobody)
}

/// A place among the rounds in flight. Who has no time of its own waits for as long as a round may take: then there is
/// none that will end (BoundedResolution). A release comes once, and needs none.
async fn place(
    space: &AddressSpace,
    call: &Call,
    wait: Wait,
    bound: Duration,
) -> Result<(Leave, Held), NotifyError> {
    if call.method == Method::Release {
        return Ok((Leave::ToWaitAlone, Held::No));
    }
    let full = || NotifyError::TooManyRounds { address_space: space.id, most: space.most_rounds };
    let permits = Arc::clone(&space.permits);
    match Arc::clone(&permits).try_acquire_owned() {
        Ok(permit) => return Ok((Leave::ToWait(permit), Held::No)),
        Err(TryAcquireError::NoPermits) => {}
        Err(TryAcquireError::Closed) => return Err(NotifyError::Stopping),
    }
    let acquired = match wait {
        Wait::NotAtAll => return Err(full()),
        Wait::AtMost(limit) => tokio::time::timeout(limit, permits.acquire_owned()).await,
        Wait::ForTargets => tokio::time::timeout(bound, permits.acquire_owned()).await,
    };
    let permit = acquired.map_err(|_| full())?.map_err(|_| NotifyError::Stopping)?;
    Ok((Leave::ToWait(permit), Held::Yes))
}
