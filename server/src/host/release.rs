//! The end of an address space: once, to its end, whatever becomes of its caller.

use std::sync::Arc;

use shootdown_core::{AddrRange, AddressSpaceId, Cause, Method};
use tokio::sync::mpsc;

use super::Host;
use crate::completion::EndedBy;
use crate::directory::AddressSpace;
use crate::dispatch::{Call, Dispatched};
use crate::source::{NotifyError, RoundResult, Wait};

impl Host {
    /// Releases, and tells how far it has come: within the bound, and if that was NotQuiesced, once more at the end.
    pub(crate) fn release_telling(
        &self,
        address_space: AddressSpaceId,
        tell: mpsc::Sender<Result<RoundResult, NotifyError>>,
    ) {
        match self.directory().expect(address_space) {
            Ok(space) => {
                let release = self.clone().release_to_its_end(space, tell);
                drop(self.0.tasks.spawn_on(release, &self.0.control));
            }
            Err(error) => drop(tell.try_send(Err(error))),
        }
    }

    /// Runs to its end whatever becomes of the caller: see [`Notifier::release`](crate::source::Notifier::release). Where a device did not stop
    /// in time the caller is told so before the end, which comes when the device has.
    pub(super) async fn release_to_its_end(
        self,
        space: Arc<AddressSpace>,
        tell: mpsc::Sender<Result<RoundResult, NotifyError>>,
    ) {
        let called = self.clock().now();
        let call = Call {
            range: AddrRange::ALL,
            method: Method::Release,
            cause: Cause::Release,
            owner: None,
            bracket: EndedBy::Nobody,
        };
        // Two answers at most, and room for both. A caller that has gone away hears nothing.
        let tell = |answer| drop(tell.try_send(answer));
        let round = match self.open(&space, call, Wait::ForTargets, called, None).await {
            Ok(Dispatched::Open(round)) => round,
            Ok(Dispatched::WouldBlock(targets)) => return tell(Ok(self.would_block(targets, called))),
            Err(error) => return tell(Err(error)),
        };
        // Held faults look again, and find the address space released.
        space.bracket_ended.notify_waiters();
        let mut result = match self.answer(&round, Wait::ForTargets, called, None).await {
            Ok(result) => result,
            Err(error) => return tell(Err(error)),
        };
        if !result.is_quiesced() {
            tell(Ok(result));
            result = match self.outcome(&round, Wait::ForTargets).await {
                Ok(result) if result.is_quiesced() => result,
                // Its runtime is gone, the host agent was cut; or a successor has taken its place.
                Ok(_) | Err(_) => return,
            };
        }
        let subscribers = space.subscribers.update_with(|interest| {
            let handles: Vec<_> =
                interest.subscriptions().map(|subscription| Arc::clone(&subscription.handle)).collect();
            (shootdown_core::interest::Interest::default(), handles)
        });
        for session in subscribers {
            session.on_released(space.id);
        }
        space.subscribers.synchronize().await;
        self.directory().forget(space.id);
        space.source.on_released();
        tell(Ok(result));
    }
}
