//! Is what a device read still valid?
//!
//! ```text
//!   block        fresh, if                                        else
//!   -----        ---------                                        ----
//!   stamp        of this address (or of the one that the page     stale: elsewhere
//!                was moved from, or has the bytes of), and of
//!                this address space (or inherited from its
//!                parent at the fork), or of this file,
//!                and its version is not below the floor           stale: older
//!   zeros        the record allows them, or it changed during     stale: zeros
//!                the read
//!   poison       never                                            stale: freed
//!   mangled      never, but the page is read again first, for a   stale: mangled
//!                store may be under way
//! ```
//!
//! A page of several blocks is judged block by block, and is as bad as the worst of them. So a page that a
//! store is changing, of which one half is old and one new, is *torn* and not stale: each half is valid by
//! itself.
//!
//! A page may be moved to an address, or have the bytes of another, and bears the stamp of that place then. A
//! record allows it from before the operation on; a read that began earlier may find it too, so such a page is
//! stale only if the record has not changed during the read.
//!
//! Zeros are the one content without a version. A record allows them from before the page is dropped or
//! mapped until its first stamp is stored; a device that finds zeros where the record forbade them looks at
//! the record again, and if it has not changed during the read, no zero page was there to be found. A
//! device's own copy may have been made in that time, and no store in place withdraws it: the record allows
//! zeros in copies until the next round that takes the page from devices and leaves its content (fork, copy
//! on write). So a stale copy of zeros goes unseen until then.
//!
//! The pages that devices write have stamps whose versions are their device's own: here they are judged by
//! writer, address and poison, and [`crate::check::lost`] judges what became of the last write.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::check::floor::{Record, Zeros};
use crate::check::history::PageName;
use crate::check::stamp::{Block, Stamp, Writer};
use crate::path::Path;

/// Where the bytes came from.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// The frame, through a translation.
    Frame,
    /// The device's own copy of the page.
    Copy,
}

/// Who writes to a page, and so what it may hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// The CPU only: its stamps are versions.
    Stamped,
    /// One device only: its stamps say where they belong, zeros are always right.
    Scratch,
}

/// A page that was read.
#[derive(Clone, Copy, Debug)]
pub struct Reading<'a> {
    /// Whose stamps it bears: the address space's that was read, or its file's.
    pub owner: u64,
    /// The page's first address.
    pub address: u64,
    /// What kind of page it is.
    pub kind: Kind,
    /// Where the bytes came from.
    pub origin: Origin,
    /// The bytes.
    pub page: &'a [u8],
}

/// What was found where it should not be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Found {
    /// The page of before a release or a store.
    Older {
        /// Its version.
        version: u64,
    },
    /// A page of another address or another address space: the frame has a new life.
    Elsewhere {
        /// The address space of the stamp.
        address_space: u64,
        /// The address of the stamp.
        address: u64,
    },
    /// The frame is free.
    Freed,
    /// A page of zeros where one was stamped: the frame has a new life, and is not written yet.
    Zeros,
    /// No valid content, three times.
    Mangled,
    /// Anything at all, in an address space that has ended.
    Ended,
    /// Anything at all, behind the end of its file.
    BehindTheEnd,
    /// What a device wrote while no device had the leave to write.
    WrittenWithoutLeave,
}

/// What a reading comes to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Judgement {
    /// It is valid.
    Fresh,
    /// It is valid, and a store was under way.
    Torn,
    /// A store may be under way in the middle of a block: read it again.
    ReadAgain,
    /// Zeros, or the page of another address: stale, unless the record changed during the read.
    StaleIfUnchanged(Found),
    /// It is not valid any more.
    Stale(Found),
}

/// Judges a reading by the record that was read before it began.
#[must_use]
pub fn judge(reading: &Reading<'_>, before: &Record) -> Judgement {
    if before.address_space != reading.owner {
        return Judgement::Stale(Found::Ended);
    }
    let blocks = Block::of_page(reading.page);
    let mut worst = if blocks.len() > 1 { Judgement::Torn } else { Judgement::Fresh };
    for block in blocks {
        match judge_block(block, reading, before) {
            Judgement::Fresh | Judgement::Torn => {}
            stale @ Judgement::Stale(_) => return stale,
            other => worst = other,
        }
    }
    worst
}

/// Judges it again by the record as it was when the read had ended, if that is another: what an operation brought
/// that began meanwhile was allowed before it began.
#[must_use]
pub fn judge_again(
    judgement: Judgement,
    reading: &Reading<'_>,
    before: &Record,
    after: &Record,
) -> Judgement {
    let changed = after.change != before.change;
    match judgement {
        Judgement::StaleIfUnchanged(_) if changed => Judgement::Fresh,
        Judgement::StaleIfUnchanged(found) => Judgement::Stale(found),
        // A page that was moved away from here and came back, older than what was stored here in between.
        Judgement::Stale(Found::Older { .. }) if changed && judge(reading, after) == Judgement::Fresh => {
            Judgement::Fresh
        }
        judgement => judgement,
    }
}

fn judge_block(block: Block, reading: &Reading<'_>, before: &Record) -> Judgement {
    match (block, reading.kind) {
        (Block::Poison, _) => Judgement::Stale(Found::Freed),
        (Block::Mangled, _) => Judgement::ReadAgain,
        (Block::Zeros, Kind::Scratch) => Judgement::Fresh,
        (Block::Zeros, Kind::Stamped) => {
            let allowed = match reading.origin {
                Origin::Frame => before.zeros,
                Origin::Copy => before.copy_zeros,
            };
            match allowed {
                Zeros::Allowed => Judgement::Fresh,
                Zeros::Forbidden => Judgement::StaleIfUnchanged(Found::Zeros),
            }
        }
        (Block::Stamp(stamp), kind) => judge_stamp(stamp, kind, reading, before),
    }
}

fn judge_stamp(stamp: Stamp, kind: Kind, reading: &Reading<'_>, before: &Record) -> Judgement {
    let Stamp { writer, address_space, address, version } = stamp;
    let elsewhere = Judgement::Stale(Found::Elsewhere { address_space, address });
    let writer_of_kind = match kind {
        Kind::Stamped => Writer::Cpu,
        Kind::Scratch => Writer::Device,
    };
    let own = address_space == reading.owner;
    let of_parent = before.inherited_from != 0 && address_space == before.inherited_from;
    if writer != writer_of_kind || !(own || of_parent) {
        return elsewhere;
    }
    let may = match reading.origin {
        Origin::Frame => before.also_in_frame,
        Origin::Copy => before.also_in_copies,
    };
    // First, for a page may be moved away from here and back.
    if may && kind == Kind::Stamped && (address, version) == (before.also_at, before.also_version) {
        return Judgement::Fresh;
    }
    if address != reading.address {
        return match kind {
            Kind::Stamped => Judgement::StaleIfUnchanged(Found::Elsewhere { address_space, address }),
            Kind::Scratch => elsewhere,
        };
    }
    // A device's versions are its own.
    if kind == Kind::Scratch {
        return Judgement::Fresh;
    }
    if !own && version > before.inherited_through {
        return elsewhere;
    }
    let floor = match reading.origin {
        Origin::Frame => before.floor,
        Origin::Copy => before.copy_floor,
    };
    if version < floor { Judgement::Stale(Found::Older { version }) } else { Judgement::Fresh }
}

/// A stale read, as it is told.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct StaleRead {
    /// Who read: a device, or `cpu`.
    pub device: String,
    /// The address space that was read.
    pub address_space: u64,
    /// The page's first address.
    pub address: u64,
    /// The lowest version that was valid.
    pub expected_at_least: u64,
    /// What was there.
    pub found: Found,
    /// Where the bytes came from.
    pub origin: Origin,
    /// What had taken the page from devices last.
    pub released_by: Path,
    /// Where its history is.
    pub page: PageName,
    /// When it was found, on the machine's clock, in nanoseconds.
    pub at: u64,
}

impl fmt::Display for StaleRead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { device, address_space, address, expected_at_least, found, origin, released_by, .. } = self;
        let by = match origin {
            Origin::Frame => "through a translation",
            Origin::Copy => "from its copy of the page",
        };
        write!(
            f,
            "{device} read address space {address_space} at {address:#x} {by}: expected version {expected_at_least} \
             or later, found {found}; last released by {released_by}"
        )
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Older { version } => write!(f, "version {version}"),
            Self::Elsewhere { address_space, address } => {
                write!(f, "a page of address space {address_space} at {address:#x}")
            }
            Self::Freed => f.write_str("the poison of a freed frame"),
            Self::Zeros => f.write_str("zeros"),
            Self::Mangled => f.write_str("no whole stamp"),
            Self::Ended => f.write_str("a page, though the address space has ended"),
            Self::BehindTheEnd => f.write_str("a page, though its file ends before it"),
            Self::WrittenWithoutLeave => f.write_str("what a device wrote without leave"),
        }
    }
}

#[cfg(test)]
mod tests {
    use shootdown_server::source::memory::POISON;

    use super::*;
    use crate::check::stamp::PAGE_BYTES;

    const SPACE: u64 = 8;
    const PARENT: u64 = 5;
    const ADDRESS: u64 = 0x5000;

    /// Of a child that was forked at version 30, and stored to at 40.
    const RECORD: Record = Record {
        address_space: SPACE,
        floor: 20,
        copy_floor: 10,
        inherited_from: PARENT,
        inherited_through: 30,
        zeros: Zeros::Forbidden,
        copy_zeros: Zeros::Forbidden,
        also_at: 0x9000,
        also_version: 12,
        also_in_frame: true,
        also_in_copies: false,
        zaps: 0,
        path: Path::Munmap,
        change: 1,
    };

    fn stamp(address_space: u64, version: u64) -> Stamp {
        Stamp { writer: Writer::Cpu, address_space, address: ADDRESS, version }
    }

    fn judged(page: &[u8], kind: Kind, origin: Origin, record: &Record) -> Judgement {
        let reading = Reading { owner: SPACE, address: ADDRESS, kind, origin, page };
        judge(&reading, record)
    }

    fn in_frame(page: &[u8]) -> Judgement {
        judged(page, Kind::Stamped, Origin::Frame, &RECORD)
    }

    #[test]
    fn a_version_at_the_floor_is_fresh_and_one_below_is_stale() {
        assert_eq!(in_frame(&stamp(SPACE, 20).to_page()), Judgement::Fresh);
        let older = Judgement::Stale(Found::Older { version: 19 });
        assert_eq!(in_frame(&stamp(SPACE, 19).to_page()), older);
    }

    #[test]
    fn a_copy_is_judged_by_the_last_release_and_not_by_the_last_store() {
        let copy = |version| judged(&stamp(SPACE, version).to_page(), Kind::Stamped, Origin::Copy, &RECORD);
        assert_eq!(copy(10), Judgement::Fresh);
        assert_eq!(copy(9), Judgement::Stale(Found::Older { version: 9 }));
    }

    #[test]
    fn poison_is_always_stale() {
        let freed = Judgement::Stale(Found::Freed);
        assert_eq!(in_frame(&[POISON; PAGE_BYTES]), freed);
        let zeros_allowed = Record { zeros: Zeros::Allowed, ..RECORD };
        assert_eq!(judged(&[POISON; PAGE_BYTES], Kind::Scratch, Origin::Frame, &zeros_allowed), freed);
    }

    #[test]
    fn half_a_page_of_poison_is_stale() {
        let mut page = stamp(SPACE, 25).to_page();
        page[4032..].fill(POISON);
        assert_eq!(in_frame(&page), Judgement::Stale(Found::Freed));
    }

    #[test]
    fn a_page_of_another_address_is_stale() {
        let other = Stamp { address: 0x6000, ..stamp(SPACE, 25) };
        let elsewhere = Found::Elsewhere { address_space: SPACE, address: 0x6000 };
        assert_eq!(in_frame(&other.to_page()), Judgement::StaleIfUnchanged(elsewhere));
    }

    #[test]
    fn a_page_that_was_moved_away_and_back_during_the_read_is_fresh_and_no_other_that_is_older() {
        let back = |version| stamp(SPACE, version).to_page();
        let after = Record { also_at: ADDRESS, also_version: 12, change: 2, ..RECORD };
        let again = |page: &[u8], after: &Record| {
            let (kind, origin) = (Kind::Stamped, Origin::Frame);
            let reading = Reading { owner: SPACE, address: ADDRESS, kind, origin, page };
            judge_again(judge(&reading, &RECORD), &reading, &RECORD, after)
        };
        assert_eq!(again(&back(12), &after), Judgement::Fresh);
        assert_eq!(again(&back(13), &after), Judgement::Stale(Found::Older { version: 13 }));
        assert_eq!(again(&back(12), &RECORD), Judgement::Stale(Found::Older { version: 12 }));
        let later = Record { change: 2, ..RECORD };
        assert_eq!(again(&back(12), &later), Judgement::Stale(Found::Older { version: 12 }));
        assert_eq!(again(&[POISON; PAGE_BYTES], &after), Judgement::Stale(Found::Freed));
    }

    #[test]
    fn a_page_may_bear_the_stamp_that_it_came_with_and_no_other_of_that_address() {
        let there = |version| Stamp { address: 0x9000, ..stamp(SPACE, version) }.to_page();
        assert_eq!(in_frame(&there(12)), Judgement::Fresh, "it is older than the place's own may be");
        let elsewhere = Found::Elsewhere { address_space: SPACE, address: 0x9000 };
        let elsewhere = Judgement::StaleIfUnchanged(elsewhere);
        assert_eq!(in_frame(&there(11)), elsewhere);
        assert_eq!(in_frame(&there(23)), elsewhere);
        assert_eq!(judged(&there(12), Kind::Stamped, Origin::Copy, &RECORD), elsewhere);
    }

    #[test]
    fn a_page_of_another_address_space_is_stale() {
        let elsewhere = Found::Elsewhere { address_space: 6, address: ADDRESS };
        assert_eq!(in_frame(&stamp(6, 25).to_page()), Judgement::Stale(elsewhere));
    }

    #[test]
    fn a_child_may_bear_its_parents_stamp_of_before_the_fork_and_none_of_after() {
        assert_eq!(in_frame(&stamp(PARENT, 30).to_page()), Judgement::Fresh);
        let after = Found::Elsewhere { address_space: PARENT, address: ADDRESS };
        assert_eq!(in_frame(&stamp(PARENT, 31).to_page()), Judgement::Stale(after));
        let written = Record { floor: 40, ..RECORD };
        let inherited = judged(&stamp(PARENT, 30).to_page(), Kind::Stamped, Origin::Frame, &written);
        assert_eq!(inherited, Judgement::Stale(Found::Older { version: 30 }));
    }

    #[test]
    fn a_parent_never_bears_its_childs_stamp() {
        let parents = Record { inherited_from: 0, inherited_through: 0, ..RECORD };
        let page = stamp(9, 25).to_page();
        let childs = Found::Elsewhere { address_space: 9, address: ADDRESS };
        assert_eq!(judged(&page, Kind::Stamped, Origin::Frame, &parents), Judgement::Stale(childs));
    }

    #[test]
    fn zeros_are_fresh_only_while_the_record_allows_them() {
        let zeros = [0; PAGE_BYTES];
        let stale = Judgement::StaleIfUnchanged(Found::Zeros);
        assert_eq!(in_frame(&zeros), stale);
        let allowed = Record { zeros: Zeros::Allowed, ..RECORD };
        assert_eq!(judged(&zeros, Kind::Stamped, Origin::Frame, &allowed), Judgement::Fresh);
        assert_eq!(judged(&zeros, Kind::Scratch, Origin::Frame, &RECORD), Judgement::Fresh);
        assert_eq!(judged(&zeros, Kind::Stamped, Origin::Copy, &allowed), stale);
        let in_copies = Record { copy_zeros: Zeros::Allowed, ..RECORD };
        assert_eq!(judged(&zeros, Kind::Stamped, Origin::Copy, &in_copies), Judgement::Fresh);
    }

    #[test]
    fn a_page_that_a_store_is_changing_is_torn_and_not_stale() {
        let mut page = stamp(SPACE, 25).to_page();
        page[..1024].copy_from_slice(&stamp(SPACE, 26).to_page()[..1024]);
        assert_eq!(in_frame(&page), Judgement::Torn);
        page[1000] ^= 1;
        assert_eq!(in_frame(&page), Judgement::ReadAgain);
    }

    #[test]
    fn a_torn_page_with_a_half_below_the_floor_is_stale() {
        let mut page = stamp(SPACE, 25).to_page();
        page[1024..].copy_from_slice(&stamp(SPACE, 7).to_page()[1024..]);
        assert_eq!(in_frame(&page), Judgement::Stale(Found::Older { version: 7 }));
    }

    #[test]
    fn a_devices_stamp_outside_of_its_page_is_stale_and_so_is_the_cpus_inside() {
        let device = Stamp { writer: Writer::Device, ..stamp(SPACE, 1) };
        let elsewhere = Judgement::Stale(Found::Elsewhere { address_space: SPACE, address: ADDRESS });
        assert_eq!(in_frame(&device.to_page()), elsewhere);
        let scratch = |page: &[u8]| judged(page, Kind::Scratch, Origin::Frame, &RECORD);
        assert_eq!(scratch(&device.to_page()), Judgement::Fresh);
        assert_eq!(scratch(&stamp(SPACE, 99).to_page()), elsewhere);
    }

    #[test]
    fn nothing_is_fresh_in_an_address_space_that_has_ended() {
        let next = Record { address_space: SPACE + 1, ..RECORD };
        let page = stamp(SPACE, 25).to_page();
        let ended = Judgement::Stale(Found::Ended);
        assert_eq!(judged(&page, Kind::Stamped, Origin::Frame, &next), ended);
    }
}
