//! The layout of an address space: its VMAs (`vm_area_struct`), sorted, disjoint, in whole pages.
//!
//! ```text
//!              map                      unmap begins                  its pages are released
//!   (nothing) -----> mapped ---------------------------> leaving ----------------------------> (nothing)
//!                      ^                                    |
//!                      +--- the notifier refused: restored -+
//! ```
//!
//! The kernel holds `mmap_lock` over all of munmap. Here no lock is held while devices are waited for; a
//! VMA that is leaving keeps its place instead, so that nothing is mapped there too early.

use std::collections::BTreeMap;

use shootdown_core::{Access, AddrRange};

use super::error::MemoryError;

/// What is mapped where.
#[derive(Debug)]
pub(super) struct Vmas {
    by_start: BTreeMap<u64, Vma>,
    most: usize,
}

/// One mapping.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Vma {
    pub(super) range: AddrRange,
    pub(super) access: Access,
    pub(super) stay: Stay,
}

/// Whether the mapping can be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stay {
    Mapped,
    /// It is being unmapped: no access, no fault, no mapping in its place.
    Leaving,
}

impl Vmas {
    pub(super) fn new(most: usize) -> Self {
        Self { by_start: BTreeMap::new(), most }
    }

    /// All of them, leaving none.
    pub(super) fn take(&mut self) -> Self {
        Self { by_start: std::mem::take(&mut self.by_start), most: self.most }
    }

    pub(super) fn len(&self) -> usize {
        self.by_start.len()
    }

    /// The mapping at `address`, if it allows `access`.
    pub(super) fn allowing(&self, address: u64, access: Access) -> Result<Vma, MemoryError> {
        match self.at(address) {
            Some(vma) if vma.stay == Stay::Mapped && access <= vma.access => Ok(vma),
            Some(vma) if vma.stay == Stay::Mapped => Err(MemoryError::ReadOnly { address }),
            Some(_) | None => Err(MemoryError::Unmapped { address }),
        }
    }

    /// Whether all of `range` is mapped and allows `access`.
    pub(super) fn all_allowing(&self, range: AddrRange, access: Access) -> Result<(), MemoryError> {
        let mut address = range.start();
        loop {
            let vma = self.allowing(address, access)?;
            if vma.range.last() >= range.last() {
                return Ok(());
            }
            address = vma.range.last() + 1;
        }
    }

    /// The mappings that overlap `range`, lowest first.
    pub(super) fn overlapping(&self, range: AddrRange) -> impl Iterator<Item = Vma> {
        let before = self.by_start.range(..range.start()).next_back();
        let from = before.into_iter().chain(self.by_start.range(range.start()..=range.last()));
        from.map(|(_, vma)| *vma).filter(move |vma| vma.range.overlaps(range))
    }

    /// Maps a range where nothing is (`mmap` with `MAP_FIXED_NOREPLACE`). Neighbours that allow the same
    /// become one (`vma_merge`).
    pub(super) fn map(&mut self, range: AddrRange, access: Access) -> Result<(), MemoryError> {
        if let Some(vma) = self.overlapping(range).next() {
            let address = vma.range.start().max(range.start());
            return Err(match vma.stay {
                Stay::Mapped => MemoryError::AlreadyMapped { address },
                Stay::Leaving => MemoryError::Busy { address },
            });
        }
        self.room_for(1)?;
        self.put(Vma { range, access, stay: Stay::Mapped });
        self.merge_around(range);
        Ok(())
    }

    /// What is mapped in `range` is leaving; VMAs are split at the ends of `range` (`__split_vma`). The
    /// parts that leave, lowest first.
    pub(super) fn leave(&mut self, range: AddrRange) -> Result<Vec<AddrRange>, MemoryError> {
        let overlapping: Vec<Vma> = self.overlapping(range).filter(|vma| vma.stay == Stay::Mapped).collect();
        let outside = |vma: &Vma| {
            usize::from(vma.range.start() < range.start()) + usize::from(vma.range.last() > range.last())
        };
        self.room_for(overlapping.iter().map(outside).sum())?;
        let mut leaving = Vec::with_capacity(overlapping.len());
        for vma in overlapping {
            self.by_start.remove(&vma.range.start());
            let (below, above) = (vma.range.start()..range.start(), range.wire_end()..vma.range.wire_end());
            if !below.is_empty() {
                self.put(Vma { range: part(below.start, below.end), ..vma });
            }
            if vma.range.last() > range.last() {
                self.put(Vma { range: part(above.start, above.end), ..vma });
            }
            if let Some(shared) = vma.range.intersection(range) {
                self.put(Vma { range: shared, stay: Stay::Leaving, ..vma });
                leaving.push(shared);
            }
        }
        Ok(leaving)
    }

    /// Everything is leaving: the address space ends.
    pub(super) fn leave_all(&mut self) -> Vec<AddrRange> {
        let leave = |vma: &mut Vma| {
            vma.stay = Stay::Leaving;
            vma.range
        };
        self.by_start.values_mut().map(leave).collect()
    }

    /// The parts that were to leave stay.
    pub(super) fn restore(&mut self, leaving: &[AddrRange]) {
        for range in leaving {
            if let Some(vma) = self.by_start.get_mut(&range.start()) {
                vma.stay = Stay::Mapped;
            }
            self.merge_around(*range);
        }
    }

    /// A part that was leaving has left (`remove_vma`).
    pub(super) fn unlink(&mut self, leaving: AddrRange) {
        let unlinked = self.by_start.remove(&leaving.start());
        debug_assert!(
            unlinked.is_some_and(|vma| vma.stay == Stay::Leaving && vma.range == leaving),
            "what leaves keeps its place until then"
        );
    }

    fn at(&self, address: u64) -> Option<Vma> {
        let (_, vma) = self.by_start.range(..=address).next_back()?;
        vma.range.contains_address(address).then_some(*vma)
    }

    fn room_for(&self, more: usize) -> Result<(), MemoryError> {
        if more > 0 && self.by_start.len() + more > self.most {
            return Err(MemoryError::TooManyMappings { most: self.most });
        }
        Ok(())
    }

    fn put(&mut self, vma: Vma) {
        self.by_start.insert(vma.range.start(), vma);
    }

    fn merge_around(&mut self, range: AddrRange) {
        let before = range.start().checked_sub(1).and_then(|address| self.at(address));
        let after = range.last().checked_add(1).and_then(|address| self.at(address));
        let Some(mut vma) = self.at(range.start()) else { return };
        for neighbour in [before, after].into_iter().flatten() {
            if (neighbour.access, neighbour.stay) == (vma.access, vma.stay) {
                self.by_start.remove(&neighbour.range.start());
                self.by_start.remove(&vma.range.start());
                vma.range = vma.range.hull(neighbour.range);
                self.put(vma);
            }
        }
    }
}

fn part(start: u64, end: u64) -> AddrRange {
    AddrRange::new(start, end).expect("a part that is outside is not empty")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(first: u64, end: u64) -> AddrRange {
        AddrRange::new(first << 12, end << 12).unwrap()
    }

    fn listing(vmas: &Vmas) -> Vec<(u64, u64, Stay)> {
        let row = |vma: Vma| (vma.range.start() >> 12, vma.range.last() >> 12, vma.stay);
        vmas.overlapping(AddrRange::ALL).map(row).collect()
    }

    #[test]
    fn unmapping_the_middle_splits_at_both_ends_and_restoring_makes_it_whole() {
        let mut vmas = Vmas::new(8);
        vmas.map(pages(10, 20), Access::Write).unwrap();
        assert_eq!(vmas.leave(pages(12, 15)).unwrap(), [pages(12, 15)]);
        let split = [(10, 11, Stay::Mapped), (12, 14, Stay::Leaving), (15, 19, Stay::Mapped)];
        assert_eq!(listing(&vmas), split);
        assert!(matches!(vmas.allowing(12 << 12, Access::Read), Err(MemoryError::Unmapped { .. })));
        assert!(matches!(vmas.map(pages(14, 15), Access::Read), Err(MemoryError::Busy { .. })));
        assert!(matches!(vmas.map(pages(15, 16), Access::Read), Err(MemoryError::AlreadyMapped { .. })));
        vmas.restore(&[pages(12, 15)]);
        assert_eq!(listing(&vmas), [(10, 19, Stay::Mapped)]);
    }

    #[test]
    fn neighbours_become_one_only_where_they_allow_the_same() {
        let mut vmas = Vmas::new(8);
        vmas.map(pages(0, 1), Access::Write).unwrap();
        vmas.map(pages(2, 3), Access::Write).unwrap();
        vmas.map(pages(3, 4), Access::Read).unwrap();
        vmas.map(pages(1, 2), Access::Write).unwrap();
        assert_eq!(listing(&vmas), [(0, 2, Stay::Mapped), (3, 3, Stay::Mapped)]);
        assert!(vmas.all_allowing(pages(0, 4), Access::Read).is_ok());
        let refused = vmas.all_allowing(pages(0, 4), Access::Write);
        assert!(matches!(refused, Err(MemoryError::ReadOnly { address: 0x3000 })));
        let hole = vmas.all_allowing(pages(3, 5), Access::Read);
        assert!(matches!(hole, Err(MemoryError::Unmapped { address: 0x4000 })));
    }

    #[test]
    fn holes_are_allowed_and_the_top_of_the_address_space_is_no_special_case() {
        let mut vmas = Vmas::new(8);
        let top = AddrRange::new(0u64.wrapping_sub(8192), 0).unwrap();
        vmas.map(pages(1, 2), Access::Read).unwrap();
        vmas.map(top, Access::Read).unwrap();
        assert_eq!(vmas.leave(AddrRange::ALL).unwrap(), [pages(1, 2), top]);
        for range in [pages(1, 2), top] {
            vmas.unlink(range);
        }
        assert_eq!(vmas.len(), 0);
    }

    #[test]
    fn a_split_that_would_pass_the_limit_changes_nothing() {
        let mut vmas = Vmas::new(2);
        vmas.map(pages(0, 9), Access::Write).unwrap();
        let refused = vmas.leave(pages(3, 4));
        assert!(matches!(refused, Err(MemoryError::TooManyMappings { most: 2 })));
        assert_eq!(listing(&vmas), [(0, 8, Stay::Mapped)]);
        assert!(vmas.leave(pages(0, 4)).is_ok());
    }
}
