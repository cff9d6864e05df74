//! Subscribe and unsubscribe, from the device's side of the directory.

use std::sync::Arc;

use shootdown_core::interest::Subscription;
use shootdown_core::{AddrRange, AddressSpaceId, CauseSet, SubscriptionId};
use shootdown_proto::error::Reason;
use shootdown_proto::message::{HostSays, RequestId, Subscribe};

use super::{Farewell, Held, SessionHandle};
use crate::host::Host;
use crate::source::Strictness;
use crate::status;

impl SessionHandle {
    /// Publishes a subscription and answers.
    pub(super) fn subscribe(self: &Arc<Self>, host: &Host, ask: Subscribe) {
        let Some(space) = host.directory().get(ask.address_space) else {
            return self.refuse_unknown(ask.address_space, ask.request);
        };
        if space.strictness == Strictness::Strict && !self.can_be_fenced() {
            return self.refuse(
                Reason::LeaseRequired,
                format!(
                    "address space {} is strict: device {} does not stop by itself when its lease has run out, and has no fencer",
                    space.id, self.device
                ),
                Some(ask.request),
            );
        }
        let id = host.directory().next_subscription();
        {
            let mut state = self.state.lock();
            if let Err(quota) = state.session.try_subscribe(ask.ranges.len()) {
                drop(state);
                return self.refuse(Reason::SubscriptionQuota, quota.to_string(), Some(ask.request));
            }
            // Known here before it is published: a release that finds it published can end it.
            let held = Held { space: Arc::clone(&space), ranges: ask.ranges.clone(), causes: ask.causes };
            state.hold(id, held);
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
                if self.forget(id).is_some() {
                    self.state.lock().session.on_unsubscribed();
                }
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
                handle.farewell(request, id);
            },
            &self.shard.runtime,
        );
    }

    /// Withdraws every subscription of a session that is over.
    pub(super) fn withdraw_all(&self) {
        let held: Vec<_> = {
            let mut state = self.state.lock();
            state.covered.clear();
            state.subscriptions.drain().collect()
        };
        for (id, held) in held {
            held.space.unsubscribe(id);
        }
    }

    /// The address space was released: its subscriptions are gone.
    pub(crate) fn on_released(&self, address_space: AddressSpaceId) {
        let mut state = self.state.lock();
        let before = state.subscriptions.len();
        state.covered.remove(&address_space);
        state.subscriptions.retain(|_, held| held.space.id != address_space);
        for _ in state.subscriptions.len()..before {
            state.session.on_unsubscribed();
        }
    }

    /// Whether one subscription that hears of every cause covers all of `range`.
    pub(super) fn is_subscribed(&self, address_space: AddressSpaceId, range: AddrRange) -> bool {
        self.state.lock().is_subscribed(address_space, range)
    }

    /// Pages were used.
    pub(super) fn young(&self, address_space: AddressSpaceId, ranges: &[AddrRange]) {
        match self.space(address_space) {
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

    /// From here on nothing of it is granted. It counts against the quota until its farewell.
    fn forget(&self, id: SubscriptionId) -> Option<Held> {
        self.state.lock().release(id)
    }

    fn farewell(&self, request: RequestId, subscription: SubscriptionId) {
        let waker = {
            let mut state = self.state.lock();
            state.session.on_unsubscribed();
            let after = state.place_behind_pending();
            state
                .farewells
                .push_back(Farewell { says: HostSays::Unsubscribed { request, subscription }, after });
            state.waker_if_it_can_say()
        };
        super::wake(waker);
    }
}

impl super::State {
    pub(super) fn is_subscribed(&self, address_space: AddressSpaceId, range: AddrRange) -> bool {
        let covered = self.covered.get(&address_space);
        covered.is_some_and(|map| map.overlapping(range).any(|(covered, _, ())| covered.contains(range)))
    }

    fn hold(&mut self, id: SubscriptionId, held: Held) {
        self.ever_subscribed = true;
        // A device that leaves causes out would not hear of pages that go for one of them: it may be told
        // what it wants, and is granted nothing.
        if held.causes == CauseSet::EVERY {
            let map = self.covered.entry(held.space.id).or_default();
            for range in &held.ranges {
                map.set(*range, id, ());
            }
        }
        self.subscriptions.insert(id, held);
    }

    fn release(&mut self, id: SubscriptionId) -> Option<Held> {
        let held = self.subscriptions.remove(&id)?;
        if let Some(map) = self.covered.get_mut(&held.space.id) {
            for range in &held.ranges {
                map.take(*range, &id);
            }
            if map.is_empty() {
                self.covered.remove(&held.space.id);
            }
        }
        Some(held)
    }
}
