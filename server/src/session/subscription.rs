//! Subscribe and unsubscribe, from the device's side of the directory.

use std::sync::Arc;

use shootdown_core::interest::Subscription;
use shootdown_core::{AddrRange, AddressSpaceId, CauseSet, SubscriptionId};
use shootdown_proto::error::Reason;
use shootdown_proto::message::{HostSays, RequestId, SessionError, Subscribe};

use super::{Asked, Farewell, Held, Leaving, LineId, SessionHandle};
use crate::host::Host;
use crate::source::Strictness;
use crate::status;

impl SessionHandle {
    /// Publishes a subscription and answers. One that was asked for on an earlier stream, by the same request,
    /// is not made a second time: it is told of again.
    pub(super) fn subscribe(self: &Arc<Self>, host: &Host, on: LineId, ask: Subscribe) {
        let Some(space) = host.directory().get(ask.address_space) else {
            return self.refuse_unknown(on, ask.address_space, ask.request);
        };
        if space.strictness == Strictness::Strict && !self.can_be_fenced() {
            return self.refuse(
                on,
                Reason::LeaseRequired,
                format!(
                    "address space {} is strict: device {} does not stop by itself when its lease has run out, and has no fencer",
                    space.id, self.device
                ),
                Some(ask.request),
            );
        }
        let asked = Asked { request: ask.request, on };
        let id = host.directory().next_subscription();
        {
            let mut state = self.state.lock();
            if state.line.id != on {
                return;
            }
            if let Some(waker) = state.ask_again(asked) {
                drop(state);
                return super::wake(waker);
            }
            if let Err(quota) = state.session.try_subscribe(ask.ranges.len()) {
                drop(state);
                return self.refuse(on, Reason::SubscriptionQuota, quota.to_string(), Some(ask.request));
            }
            // Known here before it is published: a release that finds it published can end it.
            let (space, ranges) = (Arc::clone(&space), ask.ranges.clone());
            state.hold(id, Held { space, ranges, causes: ask.causes, asked, answer: None });
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
            Ok(seq) => {
                self.published(on, id, HostSays::Subscribed { request: ask.request, subscription: id, seq });
            }
            Err(error) => {
                let mut on = on;
                if let Some(held) = self.forget(id) {
                    on = held.asked.on;
                    self.state.lock().session.on_unsubscribed();
                }
                self.refuse(on, status::notify_reason(&error), error.to_string(), Some(ask.request));
            }
        }
    }

    /// Answers on the stream on which it was last asked for, if that is the one that is up; else the device asks again.
    pub(super) fn published(&self, on: LineId, id: SubscriptionId, answer: HostSays) {
        let waker = {
            let mut state = self.state.lock();
            // Gone by now where the address space was released: the device hears of that.
            let asked_on = state.subscriptions.get_mut(&id).map_or(on, |held| {
                held.answer = Some(answer.clone());
                held.asked.on
            });
            if asked_on != state.line.id {
                return;
            }
            state.line.answers.push_back(answer);
            state.line.stream.take()
        };
        super::wake(waker);
    }

    /// Ends a subscription: no grant of it from now on, then no event, then wait until no round
    /// counts on it, then answer (UnsubscribeBarrier).
    pub(super) fn unsubscribe(
        self: &Arc<Self>,
        host: &Host,
        on: LineId,
        request: RequestId,
        id: SubscriptionId,
    ) {
        let held = {
            let mut state = self.state.lock();
            if state.line.id != on {
                return;
            }
            let asked = Asked { request, on };
            if let Some(leaving) = state.leaving.get_mut(&id) {
                // Asked for on an earlier stream: its answer comes on this one.
                leaving.asked = asked;
                return;
            }
            match state.release(id) {
                Some(held) => {
                    state.leaving.insert(id, Leaving { asked, space: Arc::clone(&held.space) });
                    held
                }
                None => {
                    let message = format!("session {} has no subscription {id}", self.id);
                    let error = SessionError::refused(Reason::SubscriptionUnknown, message, Some(request));
                    // Behind what is sent again: it may be one whose answer was lost, and notices of which were not.
                    state.say_behind_pending(HostSays::Error(error));
                    let waker = state.waker_if_it_can_say();
                    drop(state);
                    return super::wake(waker);
                }
            }
        };
        held.space.unsubscribe(id);
        let handle = Arc::clone(self);
        // In a task of its own: the acks that the wait is for come in through this session's task.
        host.tasks().spawn_on(
            async move {
                held.space.subscribers.synchronize().await;
                handle.farewell(id);
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
    pub(super) fn young(&self, on: LineId, address_space: AddressSpaceId, ranges: &[AddrRange]) {
        match self.space(address_space) {
            Some(space) => {
                let mut young = space.young.lock();
                ranges.iter().for_each(|range| young.mark(*range));
            }
            None => self.refuse(
                on,
                Reason::FaultNotSubscribed,
                format!("session {} has no subscription in address space {address_space}", self.id),
                None,
            ),
        }
    }

    pub(super) fn refuse_unknown(&self, on: LineId, address_space: AddressSpaceId, request: RequestId) {
        let message = format!("there is no address space {address_space}");
        self.refuse(on, Reason::AddressSpaceUnknown, message, Some(request));
    }

    /// From here on nothing of it is granted. It counts against the quota until its farewell.
    fn forget(&self, id: SubscriptionId) -> Option<Held> {
        self.state.lock().release(id)
    }

    /// No round counts on it any more. A device that lost the stream on which it asked is not told: it asks again.
    fn farewell(&self, subscription: SubscriptionId) {
        let waker = {
            let mut state = self.state.lock();
            state.session.on_unsubscribed();
            let asked = state.leaving.remove(&subscription).map(|leaving| leaving.asked);
            if let Some(Asked { request, .. }) = asked.filter(|asked| asked.on == state.line.id) {
                state.say_behind_pending(HostSays::Unsubscribed { request, subscription });
            }
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

    /// A request that was made on an earlier stream: its answer, if it is known by now, goes out on this one.
    /// `None`: there was none. Only a device that resumed asks twice, and by the same request.
    fn ask_again(&mut self, asked: Asked) -> Option<Option<std::task::Waker>> {
        let made = |held: &&mut Held| held.asked.request == asked.request && held.asked.on < asked.on;
        let held = self.subscriptions.values_mut().find(made)?;
        held.asked = asked;
        self.line.answers.extend(held.answer.clone());
        Some(self.line.stream.take())
    }

    /// Goes out after the notices that are to be sent now.
    fn say_behind_pending(&mut self, says: HostSays) {
        let after = self.place_behind_pending();
        self.line.farewells.push_back(Farewell { says, after });
    }

    pub(super) fn hold(&mut self, id: SubscriptionId, held: Held) {
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
