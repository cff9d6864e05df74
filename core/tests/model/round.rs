//! The real round, in a state that is compared and hashed.

use std::hash::{Hash, Hasher};
use std::sync::Arc;

use shootdown_core::event::{Cause, Event, Method};
use shootdown_core::round::{Outcome, Round};
use shootdown_core::{AddressSpaceId, Seq};

use crate::state::{Page, range_of};

/// A round with its targets as they were fixed at its start.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct OpenRound {
    pub(crate) event: u8,
    pub(crate) seq: Seq,
    /// The how many-th event of its host agent it is. No rule reads it.
    pub(crate) opened: u8,
    pub(crate) round: TheRound,
    /// The targets at the start: what the round is held against.
    pub(crate) targets: Vec<u8>,
}

/// The real round. Two are the same if no rule can tell them apart: the durations in its reports are
/// for the metrics.
#[derive(Clone, Debug)]
pub(crate) struct TheRound(pub(crate) Arc<Round>);

impl TheRound {
    fn key(&self) -> impl Iterator<Item = (u64, Outcome, bool)> + '_ {
        self.0.reports().iter().map(|report| (report.session.get(), report.outcome, report.young))
    }
}

impl PartialEq for TheRound {
    fn eq(&self, other: &Self) -> bool {
        self.0.opened() == other.0.opened() && self.key().eq(other.key())
    }
}

impl Eq for TheRound {}

impl Hash for TheRound {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        self.0.opened().hash(hasher);
        self.key().for_each(|key| key.hash(hasher));
    }
}

/// An event as the rules see it.
pub(crate) fn event(seq: Seq, page: Page, method: Method) -> Event {
    Event {
        address_space: AddressSpaceId::FIRST,
        seq,
        range: range_of(page),
        method,
        cause: Cause::Clear,
        owner: None,
    }
}
