//! [4 of 9] What a session is sent: one event, or several merged into one.

use crate::event::{Cause, Translation};
use crate::id::{AddressSpaceId, NoticeNumber, OwnerTag, Seq};
use crate::range::AddrRange;

/// Where a notice applies. The order is the order of width.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scope {
    /// A range of one address space.
    Range(AddressSpaceId, AddrRange),
    /// Every address space of the session: the outbox could not keep ranges apart any more.
    FlushAll,
}

impl Scope {
    /// Whether a translation of `range` in `address_space` must not be used any more.
    #[must_use]
    pub fn covers(self, address_space: AddressSpaceId, range: AddrRange) -> bool {
        match self {
            Self::Range(id, wide) => id == address_space && wide.overlaps(range),
            Self::FlushAll => true,
        }
    }
}

/// What the device must do about a notice. The order is the order of strength: merging keeps the
/// strongest, and each stronger one does at least what a weaker one asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NoticeKind {
    /// Nothing: a bracket was closed, and grants may be asked for again.
    RangeEnd,
    /// Report and clear the young bits.
    ClearYoung,
    /// Report and clear the young bits, and flush.
    ClearFlushYoung,
    /// Install this translation in the place of the old one, or flush.
    ChangePte(Translation),
    /// Flush.
    Invalidate,
    /// Flush; the address space is gone and its subscriptions with it.
    Release,
}

/// Why an outbox widened to FlushAll.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum FlushReason {
    /// More ranges were pending than the session's memory bound allows.
    OutboxFull,
    /// The device could not resume where it had stopped.
    NoResume,
}

/// One numbered message to a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Notice {
    /// Its number in the session: the one before it plus 1 (Contiguity).
    pub number: NoticeNumber,
    /// What the device must do.
    pub kind: NoticeKind,
    /// Where.
    pub scope: Scope,
    /// The highest sequence it covers in its address space; `None` for FlushAll, which spans
    /// address spaces.
    pub seq: Option<Seq>,
    /// The strongest cause of the events it covers.
    pub cause: Cause,
    /// On whose behalf; only if all the events it covers agree.
    pub owner: Option<OwnerTag>,
    /// Set if and only if the scope is FlushAll.
    pub flush_reason: Option<FlushReason>,
}
