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
use std::sync::{Arc, Weak};

use shootdown_core::{Access, AddrRange, AddressSpaceId};

use super::address_space::AddressSpace;
use super::error::MemoryError;
use super::file::OpenFile;
use super::lru::Owner;
use super::object::Object;

/// What is mapped where.
#[derive(Debug)]
pub(super) struct Vmas {
    by_start: BTreeMap<u64, Vma>,
    most: usize,
    /// Where nothing may be mapped, for memory is about to move there.
    reserved: Vec<AddrRange>,
    /// Whose they are: their objects are told of every change. None before there is an address space.
    of: Option<(Weak<AddressSpace>, AddressSpaceId)>,
}

/// One mapping.
#[derive(Clone, Debug)]
pub(super) struct Vma {
    pub(super) range: AddrRange,
    pub(super) access: Access,
    pub(super) stay: Stay,
    pub(super) flags: Flags,
    /// What it shows.
    pub(super) object: Arc<Object>,
    /// Which byte of the object its first is (`vm_pgoff`).
    pub(super) offset: u64,
    /// Keeps the object's pages, if it is a file's (`vm_file`).
    pub(super) file: Option<Arc<OpenFile>>,
}

/// Whether the mapping can be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stay {
    Mapped,
    /// It is being unmapped: no access, no fault, no mapping in its place.
    Leaving,
}

/// What is asked for beside the access.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Flags {
    /// Its pages are not to be swapped out (`VM_LOCKED`).
    pub(super) locked: bool,
    /// Its pages may be merged with equal ones (`VM_MERGEABLE`).
    pub(super) mergeable: bool,
}

impl Vma {
    /// What the page at `address` belongs to.
    pub(super) fn owner_of(&self, address: u64) -> Owner {
        Owner { object: Arc::clone(&self.object), position: self.position_of(address) }
    }

    /// Which byte of the object is at `address`.
    pub(super) fn position_of(&self, address: u64) -> u64 {
        self.offset.wrapping_add(address - self.range.start())
    }

    /// Which part of the object it shows.
    fn shown(&self) -> AddrRange {
        let length = self.range.last() - self.range.start() + 1;
        AddrRange::new(self.offset, self.offset.wrapping_add(length)).expect("it is as long as its range")
    }

    /// Its part in `range`.
    fn part(&self, range: AddrRange) -> Self {
        Self { range, offset: self.position_of(range.start()), ..self.clone() }
    }

    /// Whether the two are one mapping if they are neighbours, `self` the lower one (`can_vma_merge_after`).
    fn goes_on_as(&self, upper: &Self) -> bool {
        (self.access, self.stay, self.flags) == (upper.access, upper.stay, upper.flags)
            && Arc::ptr_eq(&self.object, &upper.object)
            && self.offset.wrapping_add(upper.range.start() - self.range.start()) == upper.offset
    }
}

impl Vmas {
    pub(super) fn new(most: usize) -> Self {
        Self { by_start: BTreeMap::new(), most, reserved: Vec::new(), of: None }
    }

    /// All of them, leaving none.
    pub(super) fn take(&mut self) -> Self {
        let (by_start, reserved) = (std::mem::take(&mut self.by_start), std::mem::take(&mut self.reserved));
        Self { by_start, most: self.most, reserved, of: self.of.take() }
    }

    /// They are this address space's from now on: their objects find it (`anon_vma_fork`).
    pub(super) fn belong_to(&mut self, space: Weak<AddressSpace>, id: AddressSpaceId) {
        for vma in self.by_start.values() {
            vma.object.link(&space, id, vma.range.start(), vma.shown());
        }
        self.of = Some((space, id));
    }

    pub(super) fn len(&self) -> usize {
        self.by_start.len()
    }

    /// The mapping at `address`, if it allows `access`.
    pub(super) fn allowing(&self, address: u64, access: Access) -> Result<Vma, MemoryError> {
        match self.at(address) {
            Some(vma) if vma.stay == Stay::Mapped && access <= vma.access => Ok(vma.clone()),
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
        from.map(|(_, vma)| vma.clone()).filter(move |vma| vma.range.overlaps(range))
    }

    /// Maps anonymous memory where nothing is (`mmap` with `MAP_FIXED_NOREPLACE`). Neighbours that are alike
    /// become one (`vma_merge`), if they belong together (`find_mergeable_anon_vma`).
    pub(super) fn map(&mut self, range: AddrRange, access: Access) -> Result<(), MemoryError> {
        let alike = |vma: &&Vma| {
            vma.object.backing().is_none() && vma.position_of(vma.range.start()) == vma.range.start()
        };
        let before = range.start().checked_sub(1).and_then(|address| self.at(address)).filter(alike);
        let after = range.last().checked_add(1).and_then(|address| self.at(address)).filter(alike);
        let object = before.or(after).map_or_else(Object::anonymous, |vma| Arc::clone(&vma.object));
        self.map_object(range, access, object, range.start())
    }

    /// Maps a part of an object where nothing is.
    pub(super) fn map_object(
        &mut self,
        range: AddrRange,
        access: Access,
        object: Arc<Object>,
        offset: u64,
    ) -> Result<(), MemoryError> {
        let file = object.backing().and_then(|backing| backing.file());
        self.add(Vma { range, access, stay: Stay::Mapped, flags: Flags::default(), object, offset, file })
    }

    /// Maps as another mapping is.
    pub(super) fn add(&mut self, vma: Vma) -> Result<(), MemoryError> {
        let range = vma.range;
        if let Some(there) = self.overlapping(range).next() {
            let address = there.range.start().max(range.start());
            return Err(match there.stay {
                Stay::Mapped => MemoryError::AlreadyMapped { address },
                Stay::Leaving => MemoryError::Busy { address },
            });
        }
        if let Some(reserved) = self.reserved.iter().find(|reserved| reserved.overlaps(range)) {
            return Err(MemoryError::Busy { address: reserved.start().max(range.start()) });
        }
        self.room_for(1)?;
        self.put(vma);
        self.merge_around(range);
        Ok(())
    }

    /// Keeps `range` free, once what is leaving there has left.
    pub(super) fn reserve(&mut self, range: AddrRange) {
        self.reserved.push(range);
    }

    /// It can be mapped again.
    pub(super) fn unreserve(&mut self, range: AddrRange) {
        self.reserved.retain(|reserved| *reserved != range);
    }

    /// Whether anything is mapped in `range`, or will be.
    pub(super) fn has_use_for(&self, range: AddrRange) -> bool {
        self.overlapping(range).next().is_some()
            || self.reserved.iter().any(|reserved| reserved.overlaps(range))
    }

    /// Splits mappings at the ends of `range`, so that each is within it or outside (`__split_vma`).
    pub(super) fn split(&mut self, range: AddrRange) -> Result<(), MemoryError> {
        let across = |vma: &Vma| {
            usize::from(vma.range.start() < range.start()) + usize::from(vma.range.last() > range.last())
        };
        let overlapping: Vec<Vma> =
            self.overlapping(range).filter(|vma| vma.stay == Stay::Mapped && across(vma) > 0).collect();
        self.room_for(overlapping.iter().map(across).sum())?;
        for vma in overlapping {
            // The parts are linked before the whole is unlinked: a walk of the object meets it at any time.
            self.by_start.remove(&vma.range.start());
            if vma.range.start() < range.start() {
                self.put(vma.part(part(vma.range.start(), range.start())));
            }
            if vma.range.last() > range.last() {
                self.put(vma.part(part(range.wire_end(), vma.range.wire_end())));
            }
            if let Some(shared) = vma.range.intersection(range) {
                self.put(vma.part(shared));
            }
            self.unlink_object(&vma);
        }
        Ok(())
    }

    /// Changes what is mapped in `range`, split at its ends; neighbours that are alike then become one.
    pub(super) fn change(
        &mut self,
        range: AddrRange,
        mut change: impl FnMut(&mut Vma),
    ) -> Result<(), MemoryError> {
        self.split(range)?;
        let within: Vec<AddrRange> =
            self.overlapping(range).filter(|vma| vma.stay == Stay::Mapped).map(|vma| vma.range).collect();
        for range in within {
            if let Some(vma) = self.by_start.get_mut(&range.start()) {
                change(vma);
            }
            self.merge_around(range);
        }
        Ok(())
    }

    /// What is mapped in `range` is leaving; mappings are split at the ends of `range`. The parts that leave,
    /// lowest first.
    pub(super) fn leave(&mut self, range: AddrRange) -> Result<Vec<AddrRange>, MemoryError> {
        self.split(range)?;
        let mapped: Vec<AddrRange> =
            self.overlapping(range).filter(|vma| vma.stay == Stay::Mapped).map(|vma| vma.range).collect();
        for range in &mapped {
            if let Some(vma) = self.by_start.get_mut(&range.start()) {
                vma.stay = Stay::Leaving;
            }
        }
        Ok(mapped)
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

    /// A part that was leaving has left (`remove_vma`). What was mapped there.
    pub(super) fn unlink(&mut self, leaving: AddrRange) -> Option<Vma> {
        let unlinked = self.remove(leaving.start());
        debug_assert!(
            unlinked.as_ref().is_some_and(|vma| vma.stay == Stay::Leaving && vma.range == leaving),
            "what leaves keeps its place until then"
        );
        unlinked
    }

    fn at(&self, address: u64) -> Option<&Vma> {
        let (_, vma) = self.by_start.range(..=address).next_back()?;
        vma.range.contains_address(address).then_some(vma)
    }

    fn room_for(&self, more: usize) -> Result<(), MemoryError> {
        if more > 0 && self.by_start.len() + more > self.most {
            return Err(MemoryError::TooManyMappings { most: self.most });
        }
        Ok(())
    }

    fn put(&mut self, vma: Vma) {
        if let Some((space, id)) = &self.of {
            vma.object.link(space, *id, vma.range.start(), vma.shown());
        }
        self.by_start.insert(vma.range.start(), vma);
    }

    fn remove(&mut self, start: u64) -> Option<Vma> {
        let vma = self.by_start.remove(&start)?;
        self.unlink_object(&vma);
        Some(vma)
    }

    fn unlink_object(&self, vma: &Vma) {
        if let Some((_, id)) = &self.of {
            vma.object.unlink(*id, vma.range.start(), vma.shown());
        }
    }

    fn merge_around(&mut self, range: AddrRange) {
        let Some(vma) = self.at(range.start()).cloned() else { return };
        let before = vma.range.start().checked_sub(1).and_then(|address| self.at(address)).cloned();
        let after = vma.range.last().checked_add(1).and_then(|address| self.at(address)).cloned();
        let mut whole = vma.clone();
        let mut parts = vec![vma.clone()];
        if let Some(before) = before.filter(|before| before.goes_on_as(&vma)) {
            parts.push(before.clone());
            whole = Self::joined(before, &whole);
        }
        if let Some(after) = after.filter(|after| vma.goes_on_as(after)) {
            parts.push(after.clone());
            whole = Self::joined(whole, &after);
        }
        if parts.len() > 1 {
            for part in &parts {
                self.by_start.remove(&part.range.start());
            }
            self.put(whole);
            parts.iter().for_each(|part| self.unlink_object(part));
        }
    }

    fn joined(lower: Vma, upper: &Vma) -> Vma {
        Vma { range: lower.range.hull(upper.range), ..lower }
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
        let apart = [(0, 1, Stay::Mapped), (2, 2, Stay::Mapped), (3, 3, Stay::Mapped)];
        assert_eq!(listing(&vmas), apart, "what was mapped apart has objects of its own");
        vmas.map(pages(4, 5), Access::Read).unwrap();
        assert_eq!(listing(&vmas)[2..], [(3, 4, Stay::Mapped)]);
        assert!(vmas.all_allowing(pages(0, 4), Access::Read).is_ok());
        let refused = vmas.all_allowing(pages(0, 5), Access::Write);
        assert!(matches!(refused, Err(MemoryError::ReadOnly { address: 0x3000 })));
        let hole = vmas.all_allowing(pages(3, 6), Access::Read);
        assert!(matches!(hole, Err(MemoryError::Unmapped { address: 0x5000 })));
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
