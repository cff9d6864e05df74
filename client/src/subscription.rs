//! [2 of 9] Asking to be told of what happens to a range.

use std::fmt;
use std::sync::Arc;

use shootdown_core::{AddrRange, AddressSpaceId, Cause, CauseSet, Scope, Seq, SubscriptionId};
use shootdown_proto::error::Reason;
use shootdown_proto::message::{DeviceSays, MAX_RANGES_A_MESSAGE, SessionError, Subscribe};

use crate::session::Session;
use crate::session::end::NotLive;
use crate::session::flush::AnyTlb;
use crate::session::requests::{Reply, SubscribedAt};
use crate::tlb::Invalidation;

/// A range that this device is told of, and may fault.
///
/// **Dropping it ends nothing.** The subscription lasts until [`Subscription::unsubscribe`], the end of its
/// address space or of the session: a destructor cannot wait for a flush, and a subscription that ended
/// without one would leave translations that nobody withdraws.
pub struct Subscription {
    session: Arc<Session>,
    tlb: Arc<dyn AnyTlb>,
    id: SubscriptionId,
    address_space: AddressSpaceId,
    ranges: Vec<AddrRange>,
    seq: Option<Seq>,
}

/// What a subscription hears of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SubscribeOptions {
    /// The causes. Every one by default; RELEASE is always among them.
    pub causes: CauseSet,
    /// The ends of brackets. By default they are not sent.
    pub ends: RangeEnds,
}

/// Whether [`DeviceTlb::range_end`](crate::DeviceTlb::range_end) is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RangeEnds {
    /// It is not called.
    #[default]
    Unwanted,
    /// It is called when a bracket over the subscribed range is closed.
    Wanted,
}

impl Default for SubscribeOptions {
    fn default() -> Self {
        Self { causes: CauseSet::EVERY, ends: RangeEnds::default() }
    }
}

/// Why there is no subscription.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SubscribeError {
    /// None, or too many.
    #[error("a subscription has 1 to {MAX_RANGES_A_MESSAGE} ranges, not {given}")]
    Ranges {
        /// How many were given.
        given: usize,
    },
    /// The host agent refused.
    #[error("the host agent refused the subscription")]
    Refused(#[source] SessionError),
    /// The session is closed.
    #[error(transparent)]
    NotLive(#[from] NotLive),
}

/// Why a subscription was not ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnsubscribeError {
    /// The host agent refused.
    #[error("the host agent refused to end the subscription")]
    Refused(#[source] SessionError),
    /// The session is closed, and the subscription with it.
    #[error(transparent)]
    NotLive(#[from] NotLive),
}

impl Subscription {
    pub(crate) async fn open(
        session: &Arc<Session>,
        tlb: Arc<dyn AnyTlb>,
        address_space: AddressSpaceId,
        ranges: &[AddrRange],
        options: SubscribeOptions,
    ) -> Result<Self, SubscribeError> {
        if ranges.is_empty() || ranges.len() > MAX_RANGES_A_MESSAGE {
            return Err(SubscribeError::Ranges { given: ranges.len() });
        }
        session.live()?;
        let permit = Arc::clone(&session.requests.subscription_permits).acquire_owned().await;
        let permit = permit.map_err(|_| session.not_live())?;
        let ranges = ranges.to_vec();
        let asked = session.ask(permit, |request, to| {
            let (causes, wants_end) = (options.causes, options.ends == RangeEnds::Wanted);
            let subscribe = Subscribe { request, address_space, ranges: ranges.clone(), causes, wants_end };
            (DeviceSays::Subscribe(subscribe.clone()), Reply::Subscribe { ask: subscribe, to })
        })?;
        let SubscribedAt { id, seq } = asked.answer().await?.map_err(SubscribeError::Refused)?.claim();
        session.holdings.lock().subscribed(id, address_space, ranges.clone());
        Ok(Self { session: Arc::clone(session), tlb, id, address_space, ranges, seq })
    }

    /// Its name at the host agent.
    #[must_use]
    pub fn id(&self) -> SubscriptionId {
        self.id
    }

    /// Whose memory.
    #[must_use]
    pub fn address_space(&self) -> AddressSpaceId {
        self.address_space
    }

    /// Which part of it.
    #[must_use]
    pub fn ranges(&self) -> &[AddrRange] {
        &self.ranges
    }

    /// The newest event when it began; notices of later ones come.
    #[must_use]
    pub fn seq(&self) -> Option<Seq> {
        self.seq
    }

    /// Flushes the ranges through [`DeviceTlb::invalidate`](crate::DeviceTlb::invalidate), waits for open
    /// uses, and ends the subscription. When it returns no notice of it is in flight or will come
    /// (UnsubscribeBarrier). Faults of the ranges are refused from the call on, unless another
    /// subscription covers them.
    ///
    /// # Errors
    /// [`UnsubscribeError`].
    ///
    /// # Cancel safety
    /// Dropped, the subscription stays with the host agent until the session ends; its notices are flushed
    /// and acked as before, and faults stay refused.
    pub async fn unsubscribe(self) -> Result<(), UnsubscribeError> {
        let session = &self.session;
        session.live()?;
        let uses: Vec<_> = {
            let mut holdings = session.holdings.lock();
            holdings.start_unsubscribe(self.id);
            let revoke = |range: &AddrRange| holdings.revoke(Scope::Range(self.address_space, *range));
            self.ranges.iter().filter_map(revoke).collect()
        };
        for range in &self.ranges {
            let flushed = Arc::clone(&self.tlb).invalidate(self.invalidation(*range)).await;
            session.report_young(self.address_space, flushed.young);
        }
        for use_ended in uses {
            // Its sender is in the session's table, which lives as long as `self`.
            let _ = use_ended.await;
        }
        let young = {
            let mut holdings = session.holdings.lock();
            let take =
                |range: &AddrRange| holdings.mappings.take_young(Scope::Range(self.address_space, *range));
            self.ranges.iter().flat_map(take).map(|(_, range)| range).collect()
        };
        session.report_young(self.address_space, young);
        let permit = Arc::clone(&session.requests.subscription_permits).acquire_owned().await;
        let permit = permit.map_err(|_| session.not_live())?;
        let subscription = self.id;
        let asked = session.ask(permit, |request, to| {
            let reply = Reply::Unsubscribe { subscription, to: Some(to) };
            (DeviceSays::Unsubscribe { request, subscription }, reply)
        })?;
        match asked.answer().await? {
            Ok(()) => Ok(()),
            // The address space was released meanwhile; or it was done, and the answer was lost with a stream or with
            // a host agent that ended as planned.
            Err(error) if error.reason == Reason::SubscriptionUnknown => Ok(()),
            Err(error) => Err(UnsubscribeError::Refused(error)),
        }
    }

    fn invalidation(&self, range: AddrRange) -> Invalidation {
        let address_space = self.address_space;
        Invalidation { address_space, range, cause: Cause::Unmap, owner: None, seq: None, notice: None }
    }
}

impl fmt::Debug for Subscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscription")
            .field("id", &self.id)
            .field("address_space", &self.address_space)
            .field("ranges", &self.ranges)
            .finish_non_exhaustive()
    }
}

/// A subscription that the host agent has made and nobody has taken: dropped, it is ended again. No grant
/// rests on it, because the SDK takes none that no claimed subscription covers, so there is nothing to flush.
#[derive(Debug)]
pub(crate) struct Unclaimed {
    session: Option<Arc<Session>>,
    at: SubscribedAt,
}

impl Unclaimed {
    pub(crate) fn new(session: &Arc<Session>, at: SubscribedAt) -> Self {
        Self { session: Some(Arc::clone(session)), at }
    }

    fn claim(mut self) -> SubscribedAt {
        self.session = None;
        self.at
    }
}

impl Drop for Unclaimed {
    fn drop(&mut self) {
        if let Some(session) = self.session.take() {
            session.unsubscribe_unclaimed(self.at.id);
        }
    }
}
