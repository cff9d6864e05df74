//! [5 of 9] Young ranges of mappings that a device does not hold any more.

use crate::range::AddrRange;

/// What was used through mappings that are forgotten, and is not reported yet: ascending, disjoint,
/// no two side by side. Bounded: beyond [`UNREPORTED_MAX`] the two that lie closest become one with
/// the gap between them, which over-reports.
#[derive(Default, Debug)]
pub(super) struct Unreported {
    ranges: Vec<AddrRange>,
}

/// Ranges an address space. Every ack takes what it overlaps, so more gather only where a device acks
/// nothing for long; 64 of them are one KiB.
const UNREPORTED_MAX: usize = 64;

impl Unreported {
    pub(super) const fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    pub(super) fn add(&mut self, range: AddrRange) {
        let mut wide = range;
        // In one pass: what one of them adds at the low end touches none of those before it.
        self.ranges.retain(|known| {
            let apart = !known.touches(wide);
            if !apart {
                wide = wide.hull(*known);
            }
            apart
        });
        let at = self.ranges.partition_point(|known| known.start() < wide.start());
        self.ranges.insert(at, wide);
        if self.ranges.len() > UNREPORTED_MAX {
            self.merge_closest();
        }
    }

    fn merge_closest(&mut self) {
        let gap = |at: &usize| self.ranges[*at].start() - self.ranges[*at - 1].last();
        if let Some(closest) = (1..self.ranges.len()).min_by_key(gap) {
            let high = self.ranges.remove(closest);
            self.ranges[closest - 1] = self.ranges[closest - 1].hull(high);
        }
    }

    /// Takes those that overlap, whole.
    pub(super) fn take(&mut self, range: AddrRange) -> Vec<AddrRange> {
        self.ranges.extract_if(.., |known| known.overlaps(range)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(first: u64, end: u64) -> AddrRange {
        AddrRange::new(first << 12, end << 12).unwrap()
    }

    #[test]
    fn unreported_ranges_beyond_the_bound_are_merged_and_never_lost() {
        let mut unreported = Unreported::default();
        let scattered: Vec<AddrRange> =
            (0..1_000_u64).map(|at| (at * 7919) % 1_000 * 5).map(|at| pages(at, at + 2)).collect();
        for range in &scattered {
            unreported.add(*range);
            assert!(unreported.ranges.len() <= UNREPORTED_MAX);
            assert!(unreported.ranges.is_sorted_by(|low, high| low.last() + 1 < high.start()));
        }
        let kept = unreported.take(AddrRange::ALL);
        assert!(scattered.iter().all(|range| kept.iter().any(|wide| wide.contains(*range))));
        assert!(unreported.ranges.is_empty());
    }

    #[test]
    fn unreported_ranges_that_lie_closest_are_merged_first() {
        let mut unreported = Unreported::default();
        for at in 0..UNREPORTED_MAX as u64 {
            unreported.add(pages(at * 100, at * 100 + 1));
        }
        unreported.add(pages(3_003, 3_004));
        assert_eq!(unreported.take(pages(3_000, 3_001)), [pages(3_000, 3_004)]);
    }
}
