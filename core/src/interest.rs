//! [2 of 9] Who must hear of an invalidation: the subscriptions of one address space.
//!
//! ```text
//!   Subscribe ----> subscribe() -----+
//!                                    v
//!                  the host agent publishes the new Interest through SRCU
//!                                    ^                |
//!   Unsubscribe --> unsubscribe() ---+                v
//!   session ends -> remove_session() +       targets(range, cause, method), in a read section
//! ```

pub use crate::interval::IntervalMap;

use crate::event::{Cause, CauseSet, Method};
use crate::id::{SessionId, SubscriptionId};
use crate::range::AddrRange;
use std::fmt;
use std::sync::Arc;

/// A device's wish to hear of what happens to some ranges of an address space.
///
/// `S` is what a notice is handed to: an `Arc` of the session in the host agent. It is one and the
/// same for every subscription of a session.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Subscription<S> {
    /// Its number, never used twice.
    pub id: SubscriptionId,
    /// Whose it is.
    pub session: SessionId,
    /// What it covers, at least one range; [`AddrRange::ALL`] for the whole address space. They may
    /// overlap.
    pub ranges: Vec<AddrRange>,
    /// What it wants to hear of.
    pub causes: CauseSet,
    /// Whether it wants to hear when a bracket is closed, too.
    pub wants_end: bool,
    /// Where its notices go.
    pub handle: S,
}

impl<S> Subscription<S> {
    fn wants(&self, cause: Cause, method: Method) -> bool {
        match method {
            // A device that missed the end of an address space would hold its translations for ever.
            Method::Release => true,
            Method::RangeEnd => self.wants_end && self.causes.contains(cause),
            Method::Invalidate | Method::ChangePte(_) | Method::ClearFlushYoung | Method::ClearYoung => {
                self.causes.contains(cause)
            }
        }
    }
}

/// A session that an event must reach.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Target<S> {
    /// Which session.
    pub session: SessionId,
    /// Where its notice goes.
    pub handle: S,
}

/// The subscriptions of one address space, as a value: what `subscriptions->list` is to the kernel's
/// `mmu_notifier_subscriptions`, with a tree in the place of the list.
///
/// It never changes. Each update hands back a new one that shares all but a path with the old, so a
/// round that reads one under SRCU has stable targets however long it sleeps (StableTargets).
///
/// The price: three trees instead of one (by range, by id, by session), so that neither leaving nor
/// the end of a session looks at the subscriptions of others. A subscription with r ranges costs
/// r + 2 nodes; adding or removing it copies O((r + 2) log n). A lookup touches the first tree only.
pub struct Interest<S> {
    by_range: IntervalMap<SubscriptionId, Arc<Subscription<S>>>,
    /// Each subscription at its own number. Ids are points on a 64-bit line like addresses, so that
    /// one kind of tree will do.
    by_id: IntervalMap<SubscriptionId, Arc<Subscription<S>>>,
    /// Each subscription at the number of its session.
    by_session: IntervalMap<SubscriptionId, Arc<Subscription<S>>>,
}

impl<S: Clone> Interest<S> {
    /// Nobody's interest.
    #[must_use]
    pub const fn new() -> Self {
        Self { by_range: IntervalMap::new(), by_id: IntervalMap::new(), by_session: IntervalMap::new() }
    }

    /// This interest and `subscription`, which replaces the one with its id if there is one.
    #[must_use = "the interest itself does not change"]
    pub fn subscribe(&self, subscription: Subscription<S>) -> Self {
        let mut with = self.unsubscribe(subscription.id).unwrap_or_else(|| self.clone());
        let (id, session) = (subscription.id, subscription.session);
        let subscription = Arc::new(subscription);
        for range in &subscription.ranges {
            with.by_range.set(*range, id, Arc::clone(&subscription));
        }
        with.by_session.set(point(session.get()), id, Arc::clone(&subscription));
        with.by_id.set(point(id.get()), id, subscription);
        with
    }

    /// This interest without the subscription `id`; `None` if there is none of that id.
    #[must_use = "the interest itself does not change"]
    pub fn unsubscribe(&self, id: SubscriptionId) -> Option<Self> {
        let mut without = self.clone();
        let gone = without.by_id.take(point(id.get()), &id)?;
        for range in &gone.ranges {
            without.by_range.take(*range, &id);
        }
        without.by_session.take(point(gone.session.get()), &id);
        Some(without)
    }

    /// This interest without `session`, and the subscriptions that it had, lowest id first.
    #[must_use = "the interest itself does not change"]
    pub fn remove_session(&self, session: SessionId) -> (Self, Vec<SubscriptionId>) {
        let of_session = self.by_session.overlapping(point(session.get()));
        let ids: Vec<SubscriptionId> = of_session.map(|(_, id, _)| *id).collect();
        let without =
            ids.iter().fold(self.clone(), |interest, id| interest.unsubscribe(*id).unwrap_or(interest));
        (without, ids)
    }

    /// The targets of an event: each session once, lowest first, that has a subscription which overlaps
    /// `range` and wants `cause`. For [`Method::RangeEnd`] only those that asked for it; for
    /// [`Method::Release`] every session there is, whatever `range` and `cause` say.
    ///
    /// O(log n + k log k) for k subscriptions that overlap (see [`IntervalMap`] for strewn ones).
    #[must_use]
    pub fn targets(&self, range: AddrRange, cause: Cause, method: Method) -> Vec<Target<S>> {
        let mut wanting: Vec<&Arc<Subscription<S>>> = match method {
            Method::Release => self.by_session.iter().map(|(_, _, subscription)| subscription).collect(),
            _ => self.by_range.overlapping(range).map(|(_, _, subscription)| subscription).collect(),
        };
        wanting.retain(|subscription| subscription.wants(cause, method));
        // By id as well, so that the handle does not depend on which range was found first.
        wanting.sort_unstable_by_key(|subscription| (subscription.session, subscription.id));
        wanting.dedup_by_key(|subscription| subscription.session);
        wanting.into_iter().map(|s| Target { session: s.session, handle: s.handle.clone() }).collect()
    }

    /// The subscription of that id. O(log n).
    #[must_use]
    pub fn subscription(&self, id: SubscriptionId) -> Option<&Subscription<S>> {
        self.by_id.get(point(id.get()), &id).map(Arc::as_ref)
    }

    /// Every subscription, lowest id first.
    pub fn subscriptions(&self) -> impl Iterator<Item = &Subscription<S>> {
        self.by_id.iter().map(|(_, _, subscription)| subscription.as_ref())
    }

    /// Every session that has a subscription, once, lowest first.
    pub fn sessions(&self) -> impl Iterator<Item = SessionId> {
        let mut before = None;
        let sessions = self.by_session.iter().map(|(_, _, subscription)| subscription.session);
        sessions.filter(move |session| before.replace(*session) != Some(*session))
    }

    /// How many subscriptions there are.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Whether there is no subscription.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }
}

/// A number as a place on the 64-bit line.
fn point(number: u64) -> AddrRange {
    AddrRange::new(number, number.wrapping_add(1))
        .expect("an end of 0 is the top: a single point is never empty")
}

impl<S> Clone for Interest<S> {
    /// O(1): the two share every node.
    fn clone(&self) -> Self {
        Self {
            by_range: self.by_range.clone(),
            by_id: self.by_id.clone(),
            by_session: self.by_session.clone(),
        }
    }
}

impl<S> Default for Interest<S> {
    fn default() -> Self {
        let (by_range, by_id, by_session) = Default::default();
        Self { by_range, by_id, by_session }
    }
}

impl<S: fmt::Debug> fmt::Debug for Interest<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Interest").field(&self.by_id).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Access, Translation};
    use crate::id::FrameNumber;
    use proptest::prelude::*;

    fn pages(first: u64, end: u64) -> AddrRange {
        AddrRange::new(first << 12, end << 12).unwrap()
    }

    fn session(number: u64) -> SessionId {
        SessionId::new(number).unwrap()
    }

    fn id(number: u64) -> SubscriptionId {
        SubscriptionId::new(number).unwrap()
    }

    /// Every cause, no ends, and the session's number as its handle.
    fn subscription(number: u64, of: u64, ranges: &[AddrRange]) -> Subscription<u64> {
        let (causes, wants_end, handle) = (CauseSet::EVERY, false, of);
        Subscription {
            id: id(number),
            session: session(of),
            ranges: ranges.to_vec(),
            causes,
            wants_end,
            handle,
        }
    }

    fn interest(subscriptions: &[Subscription<u64>]) -> Interest<u64> {
        subscriptions.iter().fold(Interest::new(), |interest, s| interest.subscribe(s.clone()))
    }

    /// The sessions that an unmap of `range` must reach.
    fn reached(interest: &Interest<u64>, range: AddrRange) -> Vec<u64> {
        let targets = interest.targets(range, Cause::Unmap, Method::Invalidate);
        targets.into_iter().map(|target| target.session.get()).collect()
    }

    #[test]
    fn a_session_is_one_target_however_many_of_its_ranges_overlap() {
        let interest = interest(&[
            subscription(1, 7, &[pages(0, 8), pages(4, 12), AddrRange::ALL]),
            subscription(2, 7, &[pages(5, 6)]),
            subscription(3, 4, &[pages(5, 6)]),
        ]);
        assert_eq!(reached(&interest, pages(5, 6)), [4, 7]);
        assert_eq!(reached(&interest, pages(20, 21)), [7]);
    }

    #[test]
    fn the_handle_is_that_of_the_sessions_oldest_subscription_that_wants_the_event() {
        let older = Subscription { handle: 100, ..subscription(1, 7, &[pages(8, 9)]) };
        let newer = Subscription { handle: 200, ..subscription(2, 7, &[pages(0, 9)]) };
        let deaf = Subscription { handle: 0, causes: CauseSet::of([]), ..older.clone() };
        let handles = |interest: Interest<u64>| {
            let targets = interest.targets(pages(8, 9), Cause::Clear, Method::Invalidate);
            targets.into_iter().map(|target| target.handle).collect::<Vec<_>>()
        };
        assert_eq!(handles(interest(&[newer.clone(), older])), [100]);
        assert_eq!(handles(interest(&[newer, deaf])), [200]);
    }

    #[test]
    fn an_end_reaches_only_those_who_asked_for_ends() {
        let eager = Subscription { wants_end: true, ..subscription(1, 1, &[pages(0, 4)]) };
        let interest = interest(&[eager, subscription(2, 2, &[pages(0, 4)])]);
        let ends = interest.targets(pages(0, 1), Cause::Unmap, Method::RangeEnd);
        assert_eq!(ends, [Target { session: session(1), handle: 1 }]);
        assert_eq!(reached(&interest, pages(0, 1)), [1, 2]);
    }

    #[test]
    fn a_cause_that_is_not_wanted_does_not_reach_and_release_always_does() {
        let picky =
            Subscription { causes: CauseSet::of([Cause::Migrate]), ..subscription(1, 1, &[pages(0, 4)]) };
        let interest = interest(&[picky]);
        let count = |cause, method| interest.targets(pages(0, 1), cause, method).len();
        assert_eq!(count(Cause::Migrate, Method::Invalidate), 1);
        assert_eq!(count(Cause::Unmap, Method::Invalidate), 0);
        assert_eq!(count(Cause::Release, Method::Invalidate), 1);
        assert_eq!(interest.targets(pages(90, 91), Cause::Unmap, Method::Release).len(), 1);
    }

    /// Invariant 5: what a round has read does not change when the list does.
    #[test]
    fn stable_targets() {
        let at_start = interest(&[subscription(1, 1, &[pages(0, 4)]), subscription(2, 2, &[pages(2, 6)])]);
        let left = at_start.unsubscribe(id(1)).unwrap();
        let joined = left.subscribe(subscription(3, 3, &[AddrRange::ALL]));
        assert_eq!(reached(&at_start, pages(2, 3)), [1, 2]);
        assert_eq!(reached(&left, pages(2, 3)), [2]);
        assert_eq!(reached(&joined, pages(2, 3)), [2, 3]);
    }

    /// Trap 32: a late unsubscribe must not end a newer subscription of the same range.
    #[test]
    fn a_late_unsubscribe_leaves_a_newer_subscription_of_the_same_range_alone() {
        let first = interest(&[subscription(1, 1, &[pages(0, 4)])]);
        let again = first.unsubscribe(id(1)).unwrap().subscribe(subscription(2, 1, &[pages(0, 4)]));
        assert!(again.unsubscribe(id(1)).is_none());
        assert_eq!(reached(&again, pages(0, 1)), [1]);
    }

    #[test]
    fn subscribing_an_id_again_replaces_all_its_ranges() {
        let interest = interest(&[
            subscription(1, 1, &[pages(0, 4), pages(8, 9)]),
            subscription(2, 1, &[pages(0, 1)]),
            subscription(1, 3, &[pages(6, 7)]),
        ]);
        assert_eq!(reached(&interest, pages(0, 10)), [1, 3]);
        assert_eq!(reached(&interest, pages(2, 6)), [] as [u64; 0]);
        assert_eq!(interest.sessions().collect::<Vec<_>>(), [session(1), session(3)]);
        assert_eq!(interest.len(), 2);
    }

    #[test]
    fn the_highest_ids_there_are_have_a_place() {
        let top = subscription(u64::MAX, u64::MAX, &[AddrRange::ALL]);
        let interest = interest(std::slice::from_ref(&top));
        assert_eq!(interest.subscription(id(u64::MAX)), Some(&top));
        let (without, ids) = interest.remove_session(session(u64::MAX));
        assert_eq!((without.len(), ids), (0, vec![id(u64::MAX)]));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Subscribe(Subscription<u64>),
        Unsubscribe(u64),
        RemoveSession(u64),
        Targets(AddrRange, Cause, Method),
    }

    fn any_range() -> impl Strategy<Value = AddrRange> {
        let range = (0..40_u64, 1..12_u64).prop_map(|(first, count)| pages(first, first + count));
        prop_oneof![12 => range, 1 => Just(AddrRange::ALL)]
    }

    fn any_subscription() -> impl Strategy<Value = Subscription<u64>> {
        let causes = prop::collection::vec(0..8_usize, 0..4);
        let ranges = prop::collection::vec(any_range(), 1..4);
        (1..16_u64, 1..6_u64, ranges, causes, any::<bool>()).prop_map(
            |(number, of, ranges, causes, wants_end)| {
                let causes = CauseSet::of(causes.into_iter().map(|at| Cause::EVERY[at]));
                Subscription { causes, wants_end, ..subscription(number, of, &ranges) }
            },
        )
    }

    fn any_step() -> impl Strategy<Value = Step> {
        let translation = Translation { range: pages(1, 2), frame: FrameNumber(0), access: Access::Read };
        let methods = prop::sample::select(vec![
            Method::Invalidate,
            Method::ChangePte(translation),
            Method::ClearFlushYoung,
            Method::ClearYoung,
            Method::Release,
            Method::RangeEnd,
        ]);
        let causes = prop::sample::select(Cause::EVERY.to_vec());
        prop_oneof![
            4 => any_subscription().prop_map(Step::Subscribe),
            1 => (1..16_u64).prop_map(Step::Unsubscribe),
            1 => (1..6_u64).prop_map(Step::RemoveSession),
            4 => (any_range(), causes, methods).prop_map(|(range, cause, method)| Step::Targets(range, cause, method)),
        ]
    }

    fn scan(list: &[Subscription<u64>], range: AddrRange, cause: Cause, method: Method) -> Vec<u64> {
        let mut sessions: Vec<u64> = Vec::new();
        for s in list {
            let overlaps = s.ranges.iter().any(|own| own.overlaps(range));
            let wanted = match method {
                Method::Release => true,
                Method::RangeEnd => overlaps && s.causes.contains(cause) && s.wants_end,
                _ => overlaps && s.causes.contains(cause),
            };
            if wanted && !sessions.contains(&s.session.get()) {
                sessions.push(s.session.get());
            }
        }
        sessions.sort_unstable();
        sessions
    }

    proptest! {
        #[test]
        fn targets_are_those_of_a_list_that_is_scanned(steps in prop::collection::vec(any_step(), 0..80)) {
            let mut interest = Interest::default();
            let mut list: Vec<Subscription<u64>> = Vec::new();
            for step in steps {
                match step {
                    Step::Subscribe(subscription) => {
                        interest = interest.subscribe(subscription.clone());
                        list.retain(|s| s.id != subscription.id);
                        list.push(subscription);
                        list.sort_by_key(|s| s.id);
                    }
                    Step::Unsubscribe(number) => {
                        let before = list.len();
                        list.retain(|s| s.id != id(number));
                        let without = interest.unsubscribe(id(number));
                        prop_assert_eq!(without.is_some(), list.len() < before);
                        interest = without.unwrap_or(interest);
                    }
                    Step::RemoveSession(of) => {
                        let gone: Vec<_> = list.iter().filter(|s| s.session == session(of)).map(|s| s.id).collect();
                        list.retain(|s| s.session != session(of));
                        let (without, ids) = interest.remove_session(session(of));
                        prop_assert_eq!(ids, gone);
                        interest = without;
                    }
                    Step::Targets(range, cause, method) => {
                        let targets = interest.targets(range, cause, method);
                        let sessions: Vec<u64> = targets.iter().map(|target| target.session.get()).collect();
                        prop_assert_eq!(sessions, scan(&list, range, cause, method));
                        prop_assert!(targets.iter().all(|target| target.handle == target.session.get()));
                    }
                }
                prop_assert_eq!(interest.subscriptions().cloned().collect::<Vec<_>>(), list.clone());
                prop_assert_eq!((interest.len(), interest.is_empty()), (list.len(), list.is_empty()));
                let mut sessions: Vec<_> = list.iter().map(|s| s.session).collect();
                sessions.sort_unstable();
                sessions.dedup();
                prop_assert_eq!(interest.sessions().collect::<Vec<_>>(), sessions);
                for number in 1..16 {
                    prop_assert_eq!(interest.subscription(id(number)), list.iter().find(|s| s.id == id(number)));
                }
            }
            for number in 1..16 {
                interest = interest.unsubscribe(id(number)).unwrap_or(interest);
            }
            prop_assert!(interest.by_range.is_empty() && interest.by_session.is_empty(), "nothing is left behind");
        }
    }
}
