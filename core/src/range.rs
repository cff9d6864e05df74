//! Ranges of virtual addresses, up to the top of a 64-bit address space.
//!
//! On the wire a range is half-open, `[start, end)`, and an `end` of 0 means 2^64: it is what
//! `start + length` gives in 64 bits when a range reaches the top. In here a range keeps its *last*
//! address, so that the top is no special case. The whole address space is [`AddrRange::ALL`]; it is
//! asked for by name, never by a size that happens to be 0 (RangeOverApproximates).

use std::fmt;

/// A page size: a power of two, at least 4 KiB.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageSize(u8);

impl PageSize {
    /// 4 KiB, the base page of every supported host.
    pub const BASE: Self = Self(12);
    /// 2 MiB, a huge page on x86-64 and on arm64 with 4 KiB pages.
    pub const HUGE: Self = Self(21);

    /// `None` unless `bytes` is a power of two from 4 KiB to 2^48.
    #[must_use]
    pub const fn from_bytes(bytes: u64) -> Option<Self> {
        if bytes.is_power_of_two() && bytes >= 4096 && bytes <= 1 << 48 {
            Some(Self(bytes.trailing_zeros() as u8))
        } else {
            None
        }
    }

    /// The size in bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        1 << self.0
    }

    /// The bits of an address that are its offset in a page of this size.
    #[must_use]
    pub const fn offset_mask(self) -> u64 {
        self.bytes() - 1
    }
}

impl fmt::Debug for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}B", self.bytes())
    }
}

/// A range of virtual addresses that is never empty and never wraps.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AddrRange {
    first: u64,
    last: u64,
}

/// Why a range was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    /// `start == end`. The whole address space is asked for by its flag, not by an empty range.
    #[error("the range [{start:#x}, {end:#x}) is empty; to name the whole address space set its flag")]
    Empty {
        /// First address.
        start: u64,
        /// End of the range, exclusive.
        end: u64,
    },
    /// `end < start`: inverted, or `start + length` wrapped past the top.
    #[error("the range [{start:#x}, {end:#x}) is inverted or wraps past the top of the address space")]
    Inverted {
        /// First address.
        start: u64,
        /// End of the range, exclusive.
        end: u64,
    },
    /// An end of the range is not a multiple of the page size.
    #[error("the range [{start:#x}, {end:#x}) is not aligned to pages of {page_bytes} bytes")]
    Unaligned {
        /// First address.
        start: u64,
        /// End of the range, exclusive.
        end: u64,
        /// The page size that both ends must be a multiple of.
        page_bytes: u64,
    },
}

impl AddrRange {
    /// The whole address space.
    pub const ALL: Self = Self { first: 0, last: u64::MAX };

    /// The half-open range `[start, end)`; an `end` of 0 is 2^64.
    ///
    /// # Errors
    /// [`RangeError`] when the range is empty or inverted. `[0, 0)` is empty: see [`AddrRange::ALL`].
    pub const fn new(start: u64, end: u64) -> Result<Self, RangeError> {
        if start == end {
            return Err(RangeError::Empty { start, end });
        }
        let last = end.wrapping_sub(1);
        if last < start {
            return Err(RangeError::Inverted { start, end });
        }
        Ok(Self { first: start, last })
    }

    /// As [`AddrRange::new`], and both ends must be multiples of `page`.
    ///
    /// # Errors
    /// [`RangeError`], also when an end is not aligned.
    pub const fn page_aligned(start: u64, end: u64, page: PageSize) -> Result<Self, RangeError> {
        if (start | end) & page.offset_mask() != 0 {
            return Err(RangeError::Unaligned { start, end, page_bytes: page.bytes() });
        }
        Self::new(start, end)
    }

    /// The page of size `page` that holds `address`.
    #[must_use]
    pub const fn page_of(address: u64, page: PageSize) -> Self {
        Self { first: address & !page.offset_mask(), last: address | page.offset_mask() }
    }

    /// The first address.
    #[must_use]
    pub const fn start(self) -> u64 {
        self.first
    }

    /// The last address: inclusive, so that the top of the address space has one.
    #[must_use]
    pub const fn last(self) -> u64 {
        self.last
    }

    /// The exclusive end as it is written on the wire: 0 when the range reaches the top.
    #[must_use]
    pub const fn wire_end(self) -> u64 {
        self.last.wrapping_add(1)
    }

    /// Bytes in the range; `None` for [`AddrRange::ALL`], whose length has no 64-bit number.
    #[must_use]
    pub const fn length(self) -> Option<u64> {
        (self.last - self.first).checked_add(1)
    }

    /// Whether this is the whole address space.
    #[must_use]
    pub const fn is_all(self) -> bool {
        self.first == 0 && self.last == u64::MAX
    }

    /// Whether the two share an address.
    #[must_use]
    pub const fn overlaps(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }

    /// Whether every address of `other` is in `self`.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.first <= other.first && other.last <= self.last
    }

    /// Whether `address` is in the range.
    #[must_use]
    pub const fn contains_address(self, address: u64) -> bool {
        self.first <= address && address <= self.last
    }

    /// The smallest range that covers both, the gap between them included: widened, never narrowed.
    #[must_use]
    pub fn hull(self, other: Self) -> Self {
        Self { first: self.first.min(other.first), last: self.last.max(other.last) }
    }

    /// What the two share.
    #[must_use]
    pub fn intersection(self, other: Self) -> Option<Self> {
        self.overlaps(other)
            .then(|| Self { first: self.first.max(other.first), last: self.last.min(other.last) })
    }

    /// Whether the two overlap or lie side by side, so that their hull covers nothing else.
    #[must_use]
    pub const fn touches(self, other: Self) -> bool {
        self.overlaps(other)
            || (self.last != u64::MAX && self.last + 1 == other.first)
            || (other.last != u64::MAX && other.last + 1 == self.first)
    }

    /// The smallest range of whole pages that covers this one.
    #[must_use]
    pub const fn widen_to(self, page: PageSize) -> Self {
        Self { first: self.first & !page.offset_mask(), last: self.last | page.offset_mask() }
    }

    /// The first addresses of the pages that the range touches, lowest first.
    pub fn pages(self, page: PageSize) -> impl Iterator<Item = u64> + Clone {
        let wide = self.widen_to(page);
        let count = ((wide.last - wide.first) >> page.0) + 1;
        (0..count).map(move |index| wide.first + (index << page.0))
    }
}

impl fmt::Debug for AddrRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for AddrRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_all() {
            f.write_str("[all]")
        } else if self.last == u64::MAX {
            write!(f, "[{:#x}, top)", self.first)
        } else {
            write!(f, "[{:#x}, {:#x})", self.first, self.last + 1)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_range() -> impl Strategy<Value = AddrRange> {
        (any::<u64>(), any::<u64>()).prop_map(|(a, b)| AddrRange { first: a.min(b), last: a.max(b) })
    }

    proptest! {
        /// Invariant 21: an encoding widens, never narrows; what is empty or wraps is refused.
        #[test]
        fn range_over_approximates(start in any::<u64>(), end in any::<u64>()) {
            match AddrRange::new(start, end) {
                Ok(range) => {
                    prop_assert_eq!((range.start(), range.wire_end()), (start, end));
                    let wide = range.widen_to(PageSize::BASE);
                    prop_assert!(wide.contains(range));
                    prop_assert!(!range.is_all() , "the whole space has no [start, end) form");
                }
                Err(RangeError::Empty { .. }) => prop_assert_eq!(start, end),
                Err(RangeError::Inverted { .. }) => prop_assert!(end != 0 && end < start),
                Err(RangeError::Unaligned { .. }) => prop_assert!(false, "new does not look at pages"),
            }
        }

        #[test]
        fn a_hull_covers_both_and_an_intersection_is_in_both(a in any_range(), b in any_range()) {
            let hull = a.hull(b);
            prop_assert!(hull.contains(a) && hull.contains(b));
            match a.intersection(b) {
                Some(shared) => prop_assert!(a.contains(shared) && b.contains(shared) && a.overlaps(b)),
                None => prop_assert!(!a.overlaps(b)),
            }
        }
    }

    #[test]
    fn an_end_of_zero_is_the_top_and_only_with_a_start() {
        let top = AddrRange::new(u64::MAX - 4095, 0).unwrap();
        assert_eq!((top.last(), top.length()), (u64::MAX, Some(4096)));
        assert_eq!(AddrRange::new(0, 0), Err(RangeError::Empty { start: 0, end: 0 }));
        assert_eq!(AddrRange::ALL.length(), None);
    }

    #[test]
    fn an_unaligned_end_is_refused_even_where_the_start_is_aligned() {
        let refused = AddrRange::page_aligned(0x1000, 0x1fff, PageSize::BASE);
        assert!(matches!(refused, Err(RangeError::Unaligned { .. })));
    }

    #[test]
    fn the_pages_of_a_range_at_the_top_end() {
        let top = AddrRange::new(u64::MAX - 8191, 0).unwrap();
        let pages: Vec<u64> = top.pages(PageSize::BASE).collect();
        assert_eq!(pages, [u64::MAX - 8191, u64::MAX - 4095]);
    }
}
