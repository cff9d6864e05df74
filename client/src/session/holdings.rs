//! [5 of 9] What the device holds, under one lock: mappings, tickets, subscriptions, and the flushes that
//! wait for a use to end.

use std::collections::HashMap;

use shootdown_core::mapping::{MappingId, Mappings, Revocation, RevocationId};
use shootdown_core::{AddrRange, AddressSpaceId, Scope, SubscriptionId};
use tokio::sync::oneshot;

#[derive(Debug, Default)]
pub(crate) struct Holdings {
    pub(crate) mappings: Mappings,
    /// Those that `subscribe` has returned: one that nobody claims is ended again without a flush, so
    /// nothing may rest on it.
    subscriptions: HashMap<SubscriptionId, Covered>,
    /// Their device flushes the range and then ends them: no grant is taken that nobody would be told of.
    leaving: HashMap<SubscriptionId, Covered>,
    quiescing: HashMap<RevocationId, oneshot::Sender<()>>,
    raw: RawCommits,
}

#[derive(Debug)]
struct Covered {
    address_space: AddressSpaceId,
    ranges: Vec<AddrRange>,
}

/// Whether the device may use translations that the table of mappings does not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum RawCommits {
    #[default]
    Never,
    Made,
}

impl Holdings {
    /// A notice is applied. Resolves when the uses that were open have ended; `None`: none was.
    pub(crate) fn revoke(&mut self, scope: Scope) -> Option<oneshot::Receiver<()>> {
        let Revocation { id, outstanding_uses } = self.mappings.on_notice(scope);
        (outstanding_uses > 0).then(|| {
            let (quiesced, wait) = oneshot::channel();
            self.quiescing.insert(id, quiesced);
            wait
        })
    }

    /// Whom to tell.
    pub(crate) fn end_use(&mut self, id: MappingId) -> Vec<oneshot::Sender<()>> {
        let quiesced = self.mappings.end_use(id);
        quiesced.iter().filter_map(|revocation| self.quiescing.remove(revocation)).collect()
    }

    pub(crate) fn subscribed(
        &mut self,
        id: SubscriptionId,
        address_space: AddressSpaceId,
        ranges: Vec<AddrRange>,
    ) {
        self.subscriptions.insert(id, Covered { address_space, ranges });
    }

    /// From here on no grant is taken that only this subscription covers.
    pub(crate) fn start_unsubscribe(&mut self, id: SubscriptionId) {
        if let Some(covered) = self.subscriptions.remove(&id) {
            self.leaving.insert(id, covered);
        }
    }

    pub(crate) fn unsubscribed(&mut self, id: SubscriptionId) {
        self.subscriptions.remove(&id);
        self.leaving.remove(&id);
    }

    /// The address space is gone, and its subscriptions with it.
    pub(crate) fn released(&mut self, address_space: AddressSpaceId) {
        self.subscriptions.retain(|_, covered| covered.address_space != address_space);
        self.leaving.retain(|_, covered| covered.address_space != address_space);
    }

    /// Whether a subscription that the device has, and has not begun to end, covers all of `range`.
    /// Whatever the device holds elsewhere nobody would tell it to give up.
    pub(crate) fn is_covered(&self, address_space: AddressSpaceId, range: AddrRange) -> bool {
        let covers = |covered: &Covered| {
            covered.address_space == address_space && covered.ranges.iter().any(|part| part.contains(range))
        };
        self.subscriptions.values().any(covers)
    }

    pub(crate) fn raw_commit(&mut self) {
        self.raw = RawCommits::Made;
    }

    pub(crate) fn raw_commits(&self) -> RawCommits {
        self.raw
    }

    /// All that may be young: what the table knows, and whatever the device may use beside it.
    pub(crate) fn everything_young(&mut self) -> Vec<(AddressSpaceId, Vec<AddrRange>)> {
        let known = self.mappings.take_young(Scope::FlushAll);
        match self.raw {
            RawCommits::Never => known.into_iter().map(|(id, range)| (id, vec![range])).collect(),
            RawCommits::Made => self
                .subscriptions
                .values()
                .chain(self.leaving.values())
                .map(|covered| (covered.address_space, covered.ranges.clone()))
                .chain(known.into_iter().map(|(id, range)| (id, vec![range])))
                .collect(),
        }
    }
}
