//! What devices said they used, kept on the host: `test_young` is answered from here, because it may
//! not wait for a device.

use std::collections::BTreeMap;

use crate::range::AddrRange;

/// Ranges kept apart. Beyond it the smaller half of the gaps is closed: over-reporting costs a
/// reclaim its choice, under-reporting would cost the device its page (YoungIsConservative).
const MOST_RANGES: usize = 1024;

/// The young bits of one address space, as the devices reported them.
///
/// A set of addresses, in at most `MOST_RANGES` ranges. It may hold too much, never too little: what
/// was reported stays until a `clear_young` or `clear_flush_young` over it, or until the range is
/// unmapped.
#[derive(Debug, Default, Clone)]
pub struct YoungBits {
    /// First address -> last address; disjoint and not touching.
    ranges: BTreeMap<u64, u64>,
}

impl YoungBits {
    /// A device used `range`.
    pub fn mark(&mut self, range: AddrRange) {
        let (mut first, mut last) = (range.start(), range.last());
        // Whatever overlaps or touches becomes part of the new range.
        while let Some((&start, &end)) = self.ranges.range(..=last.saturating_add(1)).next_back() {
            if end.saturating_add(1) < first {
                break;
            }
            (first, last) = (first.min(start), last.max(end));
            self.ranges.remove(&start);
        }
        self.ranges.insert(first, last);
        if self.ranges.len() > MOST_RANGES {
            self.widen();
        }
    }

    /// Whether a device may have used an address of `range` (`mmu_notifier_test_young`).
    #[must_use]
    pub fn test(&self, range: AddrRange) -> bool {
        self.ranges.range(..=range.last()).next_back().is_some_and(|(_, &last)| last >= range.start())
    }

    /// The bits of `range` are taken; whether one was set. What lies outside of it stays.
    pub fn clear(&mut self, range: AddrRange) -> bool {
        let mut any = false;
        while let Some((&start, &end)) = self.ranges.range(..=range.last()).next_back() {
            if end < range.start() {
                break;
            }
            any = true;
            self.ranges.remove(&start);
            if end > range.last() {
                self.ranges.insert(range.last() + 1, end);
            }
            if start < range.start() {
                self.ranges.insert(start, range.start() - 1);
            }
        }
        // A cut in the middle makes one range two.
        if self.ranges.len() > MOST_RANGES {
            self.widen();
        }
        any
    }

    /// How many ranges are kept.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ranges.len()
    }

    /// Whether no bit is set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Closes the smaller half of the gaps at once, so that a flood costs O(1) a report, amortised.
    fn widen(&mut self) {
        let starts = self.ranges.keys().skip(1);
        let mut gaps: Vec<u64> = self.ranges.values().zip(starts).map(|(last, next)| next - last).collect();
        let middle = gaps.len() / 2;
        let (_, &mut widest_closed, _) = gaps.select_nth_unstable(middle);
        let mut wide: BTreeMap<u64, u64> = BTreeMap::new();
        for (&first, &last) in &self.ranges {
            match wide.last_entry() {
                Some(mut before) if first - *before.get() <= widest_closed => *before.get_mut() = last,
                _ => drop(wide.insert(first, last)),
            }
        }
        self.ranges = wide;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pages(first: u64, count: u64) -> AddrRange {
        AddrRange::new(first * 4096, (first + count) * 4096).unwrap()
    }

    proptest! {
        /// Invariant 20, the host's half: what was marked and not cleared is young.
        #[test]
        fn young_is_conservative(
            steps in prop::collection::vec((any::<bool>(), 0_u64..200, 1_u64..9), 1..200),
        ) {
            let (mut bits, mut oracle) = (YoungBits::default(), [false; 256]);
            for (mark, first, count) in steps {
                let span = first as usize..(first + count) as usize;
                if mark {
                    bits.mark(pages(first, count));
                    oracle[span].fill(true);
                } else {
                    let was = oracle[span.clone()].contains(&true);
                    prop_assert_eq!(bits.clear(pages(first, count)), was);
                    oracle[span].fill(false);
                }
                for (page, young) in oracle.iter().enumerate() {
                    prop_assert_eq!(bits.test(pages(page as u64, 1)), *young, "page {}", page);
                }
            }
        }
    }

    #[test]
    fn a_flood_of_reports_is_widened_and_nothing_is_forgotten() {
        let mut bits = YoungBits::default();
        for page in 0..100_000 {
            bits.mark(pages(page * 2, 1));
        }
        assert!(bits.len() <= MOST_RANGES);
        assert!((0..100_000).all(|page| bits.test(pages(page * 2, 1))));
    }

    #[test]
    fn the_whole_address_space_can_be_young_and_old_again() {
        let mut bits = YoungBits::default();
        bits.mark(AddrRange::ALL);
        assert!(bits.clear(pages(7, 1)));
        assert!(!bits.test(pages(7, 1)) && bits.test(pages(8, 1)) && bits.test(pages(6, 1)));
        assert!(bits.clear(AddrRange::ALL));
        assert!(bits.is_empty());
    }
}
