//! Subscribe and unsubscribe, from the device's side of the directory.

use std::sync::Arc;

use shootdown_core::interest::Subscription;
use shootdown_core::{AddrRange, AddressSpaceId, SubscriptionId};
use shootdown_proto::error::Reason;
use shootdown_proto::message::{HostSays, RequestId, Subscribe};

use super::{Held, SessionHandle};
use crate::host::Host;
use crate::status;

impl SessionHandle {
    /// Publishes a subscription and answers.
    pub(super) fn subscribe(self: &Arc<Self>, host: &Host, ask: Subscribe) {
        let Some(space) = host.directory().get(ask.address_space) else {
            return self.refuse_unknown(ask.address_space, ask.request);
        };
        let id = host.directory().next_subscription();
        let ranges: Arc<[AddrRange]> = ask.ranges.as_slice().into();
        {
            let mut state = self.state.lock();
            if let Err(quota) = state.session.try_subscribe(ranges.len()) {
                drop(state);
                return self.refuse(Reason::SubscriptionQuota, quota.to_string(), Some(ask.request));
            }
            // Known here before it is published: a release that finds it published can end it.
            state.subscriptions.insert(id, Held { space: Arc::clone(&space), ranges });
        }
        let published = space.subscribe(Subscription {
            id,
            session: self.id,
            ranges: ask.ranges,
            causes: ask.causes,
            wants_end: ask.wants_end,
            handle: Arc::clone(self),
        });
        match published {
            Ok(seq) => self.answer(HostSays::Subscribed { request: ask.request, subscription: id, seq }),
            Err(error) => {
                self.forget(id);
                self.refuse(status::notify_reason(&error), error.to_string(), Some(ask.request));
            }
        }
    }

    /// Ends a subscription: no grant of it from now on, then no event, then wait until no round
    /// counts on it, then answer (UnsubscribeBarrier).
    pub(super) fn unsubscribe(self: &Arc<Self>, host: &Host, request: RequestId, id: SubscriptionId) {
        let Some(held) = self.forget(id) else {
            return self.refuse(
                Reason::SubscriptionUnknown,
                format!("session {} has no subscription {id}", self.id),
                Some(request),
            );
        };
        held.space.unsubscribe(id);
        let handle = Arc::clone(self);
        // In a task of its own: the acks that the wait is for come in through this session's task.
        host.tasks().spawn_on(
            async move {
                held.space.subscribers.synchronize().await;
                handle.farewell(HostSays::Unsubscribed { request, subscription: id });
            },
            &self.shard,
        );
    }

    /// Withdraws every subscription of a session that is over.
    pub(super) fn withdraw_all(&self) {
        let held: Vec<_> = self.state.lock().subscriptions.drain().collect();
        for (id, held) in held {
            held.space.unsubscribe(id);
        }
    }

    /// The address space was released: its subscriptions are gone.
    pub(crate) fn on_released(&self, address_space: AddressSpaceId) {
        let mut state = self.state.lock();
        let before = state.subscriptions.len();
        state.subscriptions.retain(|_, held| held.space.id != address_space);
        for _ in state.subscriptions.len()..before {
            state.session.on_unsubscribed();
        }
    }

    /// Whether one subscription of the session covers all of `range`.
    pub(super) fn is_subscribed(&self, address_space: AddressSpaceId, range: AddrRange) -> bool {
        self.state.lock().is_subscribed(address_space, range)
    }

    /// Pages were used.
    pub(super) fn young(&self, address_space: AddressSpaceId, ranges: &[AddrRange]) {
        let space = {
            let state = self.state.lock();
            let of_space = state.subscriptions.values().find(|held| held.space.id == address_space);
            of_space.map(|held| Arc::clone(&held.space))
        };
        match space {
            Some(space) => {
                let mut young = space.young.lock();
                ranges.iter().for_each(|range| young.mark(*range));
            }
            None => self.refuse(
                Reason::FaultNotSubscribed,
                format!("session {} has no subscription in address space {address_space}", self.id),
                None,
            ),
        }
    }

    pub(super) fn refuse_unknown(&self, address_space: AddressSpaceId, request: RequestId) {
        let message = format!("there is no address space {address_space}");
        self.refuse(Reason::AddressSpaceUnknown, message, Some(request));
    }

    fn forget(&self, id: SubscriptionId) -> Option<Held> {
        let mut state = self.state.lock();
        let held = state.subscriptions.remove(&id)?;
        state.session.on_unsubscribed();
        Some(held)
    }

    fn farewell(&self, says: HostSays) {
        let waker = {
            let mut state = self.state.lock();
            state.farewells.push_back(says);
            state.stream.take()
        };
        super::wake(waker);
    }
}

impl super::State {
    pub(super) fn is_subscribed(&self, address_space: AddressSpaceId, range: AddrRange) -> bool {
        self.subscriptions.values().any(|held| {
            held.space.id == address_space && held.ranges.iter().any(|covered| covered.contains(range))
        })
    }
}
