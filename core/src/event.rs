//! [1 of 9] What a source says: one notifier call on one range of one address space.
//!
//! The names are the kernel's (`include/linux/mmu_notifier.h`).

use crate::id::{AddressSpaceId, FrameNumber, OwnerTag, Seq};
use crate::range::AddrRange;

/// Why a range is invalidated, as the kernel names it (`enum mmu_notifier_event`).
///
/// The order of the variants is the order of strength: a merged notice carries the strongest cause
/// of those it merges (MergeIsUnion). A stronger cause takes more away from the device.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Cause {
    /// The dirty bits are cleared; the device must fault before its next write.
    SoftDirty,
    /// The access rights of one page change.
    ProtectionPage,
    /// The access rights of a range change.
    ProtectionVma,
    /// A device asks for exclusive access.
    Exclusive,
    /// The pages move; their content does not change.
    Migrate,
    /// Page table entries are cleared, for any reason without a name of its own.
    Clear,
    /// The range leaves the address space.
    Unmap,
    /// The address space ends.
    Release,
}

impl Cause {
    /// Every cause, weakest first.
    pub const EVERY: [Self; 8] = [
        Self::SoftDirty,
        Self::ProtectionPage,
        Self::ProtectionVma,
        Self::Exclusive,
        Self::Migrate,
        Self::Clear,
        Self::Unmap,
        Self::Release,
    ];

    /// The kernel's name without its prefix, as logs and metric labels write it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::SoftDirty => "SOFT_DIRTY",
            Self::ProtectionPage => "PROTECTION_PAGE",
            Self::ProtectionVma => "PROTECTION_VMA",
            Self::Exclusive => "EXCLUSIVE",
            Self::Migrate => "MIGRATE",
            Self::Clear => "CLEAR",
            Self::Unmap => "UNMAP",
            Self::Release => "RELEASE",
        }
    }
}

/// The causes that a subscription wants to hear of.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct CauseSet(u8);

impl CauseSet {
    /// Every cause: what a device wants unless it knows better.
    pub const EVERY: Self = Self(u8::MAX);

    /// The set of `causes`, and RELEASE, which no subscription can leave out: a device that missed
    /// the end of an address space would hold its translations for ever.
    #[must_use]
    pub fn of(causes: impl IntoIterator<Item = Cause>) -> Self {
        let bits = causes.into_iter().fold(0, |bits, cause| bits | Self::bit(cause));
        Self(bits | Self::bit(Cause::Release))
    }

    /// Whether `cause` is in the set.
    #[must_use]
    pub const fn contains(self, cause: Cause) -> bool {
        self.0 & Self::bit(cause) != 0
    }

    const fn bit(cause: Cause) -> u8 {
        1 << cause as u8
    }
}

/// What a device does with a page: the least that a grant must allow.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Access {
    /// The device only reads.
    Read,
    /// The device reads and writes; a shared page is copied first (COW).
    Write,
}

/// Leave to reach one page: where its frame is, and what may be done there.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Translation {
    /// The virtual range that is translated; its length is one page of some size.
    pub range: AddrRange,
    /// The frame in the source's frame store, in pages of 4 KiB.
    pub frame: FrameNumber,
    /// Whether the device may write.
    pub access: Access,
}

/// A notifier method that reaches devices (`struct mmu_notifier_ops`).
///
/// `test_young` is not among them: it is answered on the host from the young bits that the devices
/// reported, and `invalidate_range_end` is [`Method::RangeEnd`], a hint that nobody waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Method {
    /// `invalidate_range_start`, and `invalidate_page`, which is one around a single page.
    Invalidate,
    /// `change_pte`: the device may install this translation instead of flushing.
    ChangePte(Translation),
    /// `clear_flush_young`: flush, and say whether the range was used.
    ClearFlushYoung,
    /// `clear_young`: say whether the range was used; no flush.
    ClearYoung,
    /// `release`: the address space ends.
    Release,
    /// `invalidate_range_end`: the bracket over the range is closed. A hint, never waited for.
    RangeEnd,
}

impl Method {
    /// The kernel's name of the method, as logs and metric labels write it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Invalidate => "invalidate_range_start",
            Self::ChangePte(_) => "change_pte",
            Self::ClearFlushYoung => "clear_flush_young",
            Self::ClearYoung => "clear_young",
            Self::Release => "release",
            Self::RangeEnd => "invalidate_range_end",
        }
    }
}

/// One notifier call on one range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Event {
    /// Whose memory.
    pub address_space: AddressSpaceId,
    /// Its sequence in that address space.
    pub seq: Seq,
    /// What it covers; whole pages.
    pub range: AddrRange,
    /// The notifier method.
    pub method: Method,
    /// Why.
    pub cause: Cause,
    /// On whose behalf, if the source knows.
    pub owner: Option<OwnerTag>,
}
