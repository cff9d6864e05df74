//! [2 of 9] Which address spaces there are, and who must hear of what happens in each.
//!
//! The map of address spaces is the only shared map that every event touches. Whoever looks
//! something up copies the handle out and drops the guard before working on it; no guard of the map
//! leaves this file.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use dashmap::DashMap;
use parking_lot::Mutex;
use shootdown_core::gate::GrantGate;
use shootdown_core::interest::{Interest, Subscription};
use shootdown_core::young::YoungBits;
use shootdown_core::{AddrRange, AddressSpaceId, Incarnation, Seq, SubscriptionId};
use srcu::Srcu;
use tokio::sync::{Notify, Semaphore};

use crate::completion::WaitingRound;
use crate::restart::Survivors;
use crate::session::SessionHandle;
use crate::source::{NotifyError, Strictness, Translate};

/// Every address space of this host agent, by its id.
///
/// The price of a map of its own for each host agent instead of a global one: a handle has to be
/// passed around. What it buys: two host agents in one process (tests, a VMM with two guests) do not
/// know of each other.
#[derive(Debug)]
pub(crate) struct Directory {
    spaces: DashMap<AddressSpaceId, Arc<AddressSpace>>,
    next: Mutex<Numbers>,
    most: usize,
    rounds_per_space: usize,
    host_incarnation: Incarnation,
}

/// Ids are handed out here and never used twice.
#[derive(Debug)]
struct Numbers {
    address_space: AddressSpaceId,
    subscription: SubscriptionId,
    /// The first of this run: what is below was given out by an earlier one, if it was at all.
    first_address_space: AddressSpaceId,
    /// Names of earlier runs that were taken back in this one. None is ever taken back again: the order of
    /// its events begins anew, and who knows the earlier one must not take it for this one.
    taken_back: HashSet<AddressSpaceId>,
    /// Those that a planned end of the run before handed over, and that no source has asked for again.
    handed_over: HashSet<AddressSpaceId>,
}

/// Names that may be taken back in one run, for each address space that there may be: every one that was
/// there when the earlier run ended, and room for programs that try again.
const TAKEN_BACK_PER_SPACE: usize = 16;

impl Directory {
    /// Ids start at `first`, which no earlier run has given out.
    pub(crate) fn new(
        most: usize,
        rounds_per_space: usize,
        first: u64,
        host_incarnation: Incarnation,
    ) -> Self {
        let first_address_space = AddressSpaceId::new(first).unwrap_or(AddressSpaceId::FIRST);
        Self {
            spaces: DashMap::new(),
            next: Mutex::new(Numbers {
                address_space: first_address_space,
                subscription: SubscriptionId::new(first).unwrap_or(SubscriptionId::FIRST),
                first_address_space,
                taken_back: HashSet::new(),
                handed_over: HashSet::new(),
            }),
            most,
            rounds_per_space,
            host_incarnation,
        }
    }

    /// Makes an address space known, to `survivors` first: no event of it can miss one of them.
    pub(crate) fn register(
        &self,
        name: &str,
        source: Arc<dyn Translate>,
        strictness: Strictness,
        survivors: &Survivors,
    ) -> Result<Arc<AddressSpace>, NotifyError> {
        let mut next = self.next.lock();
        if self.spaces.len() >= self.most {
            return Err(NotifyError::TooManyAddressSpaces { most: self.most });
        }
        while next.taken_back.contains(&next.address_space) {
            next.address_space = next.address_space.next();
        }
        let id = next.address_space;
        next.address_space = id.next();
        let space = self.make(id, name, source, strictness);
        Ok(self.insert(space, &mut next, survivors))
    }

    /// Makes an address space known by the name that an earlier run gave it. One that a planned end handed over
    /// is known already: its source finds it again, once. `forget` is told before anybody knows of another one
    /// by that name.
    pub(crate) fn take_back(
        &self,
        id: AddressSpaceId,
        name: &str,
        source: Arc<dyn Translate>,
        strictness: Strictness,
        survivors: &Survivors,
        forget: impl FnOnce(AddressSpaceId),
    ) -> Result<Arc<AddressSpace>, NotifyError> {
        let mut next = self.next.lock();
        if next.handed_over.contains(&id)
            && let Some(space) = self.get(id)
        {
            if space.strictness != strictness {
                return Err(NotifyError::OtherStrictness { address_space: id, is: space.strictness });
            }
            next.handed_over.remove(&id);
            return Ok(space);
        }
        let of_this_run = next.first_address_space <= id && id < next.address_space;
        if of_this_run || next.taken_back.contains(&id) || self.spaces.contains_key(&id) {
            return Err(NotifyError::AddressSpaceTaken(id));
        }
        if self.spaces.len() >= self.most
            || next.taken_back.len() >= self.most.saturating_mul(TAKEN_BACK_PER_SPACE)
        {
            return Err(NotifyError::TooManyAddressSpaces { most: self.most });
        }
        // It was handed over, perhaps, and has come to its end since: this one is another.
        next.handed_over.remove(&id);
        next.taken_back.insert(id);
        forget(id);
        let mut space = self.make(id, name, source, strictness);
        // Above those of every earlier run: an end that comes late names no bracket of this one.
        space.began_after = Seq::new(next.first_address_space.get());
        space.order.get_mut().gate = GrantGate::restored(space.began_after, []);
        // What was reported to an earlier run went with it: too much is young, never too little.
        space.young.get_mut().mark(AddrRange::ALL);
        Ok(self.insert(space, &mut next, survivors))
    }

    fn make(
        &self,
        id: AddressSpaceId,
        name: &str,
        source: Arc<dyn Translate>,
        of: Strictness,
    ) -> AddressSpace {
        AddressSpace::new(id, name, source, of, self.rounds_per_space, self.host_incarnation)
    }

    /// Nobody else knows of it before the survivors do.
    fn insert(&self, space: AddressSpace, next: &mut Numbers, survivors: &Survivors) -> Arc<AddressSpace> {
        let space = Arc::new(space);
        survivors.join(&space, || {
            let id = next.subscription;
            next.subscription = id.next();
            id
        });
        self.spaces.insert(space.id, Arc::clone(&space));
        space
    }

    /// Makes an address space of an earlier run known, under its id; to `survivors` first, as above.
    pub(crate) fn restore(&self, make: impl FnOnce(usize) -> AddressSpace, survivors: &Survivors) {
        let mut next = self.next.lock();
        let space = Arc::new(make(self.rounds_per_space));
        survivors.join(&space, || {
            let id = next.subscription;
            next.subscription = id.next();
            id
        });
        next.handed_over.insert(space.id);
        self.spaces.insert(space.id, space);
    }

    pub(crate) fn get(&self, id: AddressSpaceId) -> Option<Arc<AddressSpace>> {
        self.spaces.get(&id).map(|space| Arc::clone(&space))
    }

    /// The address space, or the error that tells a source that there is none.
    pub(crate) fn expect(&self, id: AddressSpaceId) -> Result<Arc<AddressSpace>, NotifyError> {
        self.get(id).ok_or(NotifyError::AddressSpaceUnknown(id))
    }

    /// Forgets an address space, after its release.
    pub(crate) fn forget(&self, id: AddressSpaceId) {
        self.spaces.remove(&id);
    }

    pub(crate) fn next_subscription(&self) -> SubscriptionId {
        let mut next = self.next.lock();
        let id = next.subscription;
        next.subscription = id.next();
        id
    }

    /// All of them, in ascending order of their ids: a copy, for listings.
    pub(crate) fn list(&self) -> Vec<Arc<AddressSpace>> {
        let mut spaces: Vec<_> = self.spaces.iter().map(|entry| Arc::clone(entry.value())).collect();
        spaces.sort_unstable_by_key(|space| space.id);
        spaces
    }
}

/// One address space: its order, its subscribers, its rounds.
///
/// Three locks, none of them ever held across an await: `order` for what must happen in one order
/// (sequence, brackets, notices, grants), `rounds` for the listing, `young` for the bits. Inside of
/// `order` only `rounds` and a session's lock are taken, never the other way round. The subscriber list is read under SRCU, in a domain of its own: a slow round delays the
/// unsubscribers of this address space and of no other (Isolation).
pub(crate) struct AddressSpace {
    pub(crate) id: AddressSpaceId,
    pub(crate) name: String,
    pub(crate) source: Arc<dyn Translate>,
    pub(crate) strictness: Strictness,
    pub(crate) subscribers: Srcu<Interest<Arc<SessionHandle>>>,
    pub(crate) order: Mutex<Order>,
    pub(crate) rounds: Mutex<BTreeMap<Seq, Arc<WaitingRound>>>,
    pub(crate) young: Mutex<YoungBits>,
    /// Rings when a bracket ends: faults that were held look again.
    pub(crate) bracket_ended: Notify,
    /// One permit a round in flight. A source that can wait waits for one: back-pressure, not loss.
    pub(crate) permits: Arc<Semaphore>,
    pub(crate) most_rounds: usize,
    /// Events up to this one were another run's, if there were any: a sequence of an earlier run names no bracket of
    /// this one.
    pub(crate) began_after: Option<Seq>,
    /// The run that its rounds' results name.
    pub(crate) host_incarnation: Incarnation,
}

/// What must happen in one order.
#[derive(Debug, Default)]
pub(crate) struct Order {
    pub(crate) gate: GrantGate,
    /// Its release has begun: no event, no subscription and no grant after it.
    pub(crate) released: bool,
}

impl AddressSpace {
    pub(crate) fn new(
        id: AddressSpaceId,
        name: &str,
        source: Arc<dyn Translate>,
        strictness: Strictness,
        most_rounds: usize,
        host_incarnation: Incarnation,
    ) -> Self {
        // The watchdog asks for stalls and tells of them; a callback a section would be a line for each
        // of the rounds that one slow device holds.
        let domain =
            srcu::Domain::builder().name(format!("address space {id} ({name})")).on_stall(|_| {}).build();
        Self {
            id,
            name: name.to_owned(),
            source,
            strictness,
            subscribers: Srcu::new(domain, Interest::default()),
            order: Mutex::default(),
            rounds: Mutex::default(),
            young: Mutex::default(),
            bracket_ended: Notify::new(),
            permits: Arc::new(Semaphore::new(most_rounds)),
            most_rounds,
            began_after: None,
            host_incarnation,
        }
    }

    /// Publishes a subscription, then reads the sequence: in this order, so that an event which the
    /// subscriber does not hear of is one whose bracket its first fault will meet (JoinCovers).
    pub(crate) fn subscribe(
        &self,
        subscription: Subscription<Arc<SessionHandle>>,
    ) -> Result<Option<Seq>, NotifyError> {
        // The flag and the list change under one lock: a release either sees the subscriber, or the
        // subscriber sees the release.
        let order = self.order.lock();
        if order.released {
            return Err(NotifyError::Released(self.id));
        }
        self.subscribers.update(|interest| interest.subscribe(subscription));
        Ok(order.gate.last_seq())
    }

    /// Brackets that may be open: those of rounds in flight, and as many that their callers have not
    /// ended yet. A caller that never ends its brackets is refused further ones, until it ends them or
    /// the address space is released.
    pub(crate) fn most_brackets(&self) -> usize {
        self.most_rounds.saturating_mul(2)
    }

    /// Its rounds that wait for a target.
    pub(crate) fn rounds_in_flight(&self) -> usize {
        self.rounds.lock().values().filter(|round| round.is_waiting()).count()
    }

    /// Takes a subscription from the list. It may be a target of rounds that have begun; whoever must
    /// know that there are none left waits for `subscribers.synchronize()`.
    pub(crate) fn unsubscribe(&self, subscription: SubscriptionId) {
        self.subscribers
            .update(|interest| interest.unsubscribe(subscription).unwrap_or_else(|| interest.clone()));
    }
}

impl std::fmt::Debug for AddressSpace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AddressSpace").field("id", &self.id).field("name", &self.name).finish_non_exhaustive()
    }
}
