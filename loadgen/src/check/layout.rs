//! Where the pages of an address space are, what each is for, and whose.
//!
//! ```text
//!   page 0 ...                                                                        ... pages()
//!   | thread 0                          | thread 1  ... || thread 0           | thread 1 ...
//!   | stamped … | twins | scratch per d. | …             || stamped … | scratch | …
//!   +------------- anonymous memory ---------------------++----------- a file -------------
//! ```
//!
//! The part of each thread has page tables to itself, so that they are freed when all of it is unmapped.
//!
//! Several threads of the host work on one address space at once, each on pages of its own; what they do to
//! the whole address space they do alone.
//!
//! A slot is a place that address spaces take in turn: first those of the parents, then those of their
//! children, then those of the files. Parent and child share a file, which outlives both, so its pages have
//! their records in the file's slot.

use std::ops::Range;

use shootdown_client::{AddrRange, PageSize};

/// Where the region of every address space begins: the same in all, so that only the address space tells
/// them apart.
const REGION: u64 = 0x10_0000_0000;

/// Where the file is mapped.
const FILE_REGION: u64 = 0x20_0000_0000;

/// Pages of a page table, 2 MiB of an address space.
const TABLE_PAGES: usize = 512;

/// Pages of a huge page of a run: few, so that there are many.
pub const HUGE_PAGES: usize = 4;

/// Pages of equal bytes.
const TWINS: usize = 2;

/// What tells a file from an address space in a stamp.
const FILE: u64 = 1 << 63;

/// The layout of a run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layout {
    threads: usize,
    devices: usize,
    address_spaces: usize,
    stamped: usize,
    file_stamped: usize,
}

/// What a page is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Use {
    /// The CPU stamps it.
    Stamped,
    /// The CPU stamps it, now and then with the bytes of the page before it or after it.
    Twin,
    /// One device writes it.
    Scratch {
        /// Which.
        device: usize,
    },
}

impl Layout {
    /// The layout for so many stamped pages of anonymous memory in each address space; a file has half as
    /// many.
    #[must_use]
    pub fn new(address_spaces: usize, pages: usize, threads: usize, devices: usize) -> Self {
        let threads = threads.max(1);
        let rest = TWINS + devices;
        // Whole huge pages, so that none is of two threads.
        let stamped = (pages.div_ceil(threads).max(HUGE_PAGES) + rest).next_multiple_of(HUGE_PAGES) - rest;
        let file_stamped = (pages / 2).div_ceil(threads).max(2);
        Self { threads, devices, address_spaces, stamped, file_stamped }
    }

    /// Slots: of parents, of children, and of files.
    #[must_use]
    pub const fn slots(&self) -> usize {
        3 * self.address_spaces
    }

    /// Slots in which address spaces live.
    #[must_use]
    pub const fn homes(&self) -> usize {
        2 * self.address_spaces
    }

    /// Pages of an address space, its file's among them.
    #[must_use]
    pub const fn pages(&self) -> usize {
        self.anonymous() + self.threads * self.file_part()
    }

    /// Pages of anonymous memory, which come first.
    #[must_use]
    pub const fn anonymous(&self) -> usize {
        self.threads * self.part()
    }

    const fn part(&self) -> usize {
        self.stamped + TWINS + self.devices
    }

    const fn file_part(&self) -> usize {
        self.file_stamped + self.devices
    }

    /// The pages of anonymous memory that a thread has to itself.
    #[must_use]
    pub const fn of_thread(&self, thread: usize) -> Range<usize> {
        thread * self.part()..(thread + 1) * self.part()
    }

    /// The pages of the thread whose page of anonymous memory this is.
    #[must_use]
    pub const fn part_of(&self, page: usize) -> Range<usize> {
        self.of_thread(page / self.part())
    }

    /// Those of them that are stamped and are no twins.
    #[must_use]
    pub const fn stamped_of_thread(&self, thread: usize) -> Range<usize> {
        thread * self.part()..thread * self.part() + self.stamped
    }

    /// The two of them that may have the same bytes.
    #[must_use]
    pub const fn twins_of_thread(&self, thread: usize) -> [usize; TWINS] {
        let first = thread * self.part() + self.stamped;
        [first, first + 1]
    }

    /// The pages of the file that a thread has to itself.
    #[must_use]
    pub const fn file_of_thread(&self, thread: usize) -> Range<usize> {
        let first = self.anonymous() + thread * self.file_part();
        first..first + self.file_part()
    }

    /// What a page is for.
    #[must_use]
    pub fn use_of(&self, page: usize) -> Use {
        let (within, stamped, twins) = match page.checked_sub(self.anonymous()) {
            None => (page % self.part(), self.stamped, TWINS),
            Some(page) => (page % self.file_part(), self.file_stamped, 0),
        };
        match within.checked_sub(stamped) {
            None => Use::Stamped,
            Some(after) if after < twins => Use::Twin,
            Some(after) => Use::Scratch { device: after - twins },
        }
    }

    /// The pages that a device writes.
    #[must_use]
    pub fn scratch_of(&self, device: usize) -> Vec<usize> {
        (0..self.pages()).filter(|page| self.use_of(*page) == Use::Scratch { device }).collect()
    }

    /// Whether it is a page of the file.
    #[must_use]
    pub const fn is_file(&self, page: usize) -> bool {
        page >= self.anonymous()
    }

    /// Where a page of the file is in it.
    #[must_use]
    pub const fn offset_in_file(&self, page: usize) -> u64 {
        (page - self.anonymous()) as u64 * PageSize::BASE.bytes()
    }

    /// The length of the file.
    #[must_use]
    pub const fn file_bytes(&self) -> u64 {
        self.offset_in_file(self.pages())
    }

    /// The slot of the file that an address space in `slot` maps.
    #[must_use]
    pub const fn file_slot(&self, slot: usize) -> usize {
        2 * self.address_spaces + slot % self.address_spaces
    }

    /// The slot in which the record of a page of an address space in `slot` is.
    #[must_use]
    pub const fn record_slot(&self, slot: usize, page: usize) -> usize {
        if self.is_file(page) { self.file_slot(slot) } else { slot }
    }

    /// Whose stamps a page bears: its address space's, or its file's.
    #[must_use]
    pub const fn owner(&self, slot: usize, page: usize, address_space: u64) -> u64 {
        if self.is_file(page) { FILE | self.file_slot(slot) as u64 } else { address_space }
    }

    /// The address of a page.
    #[must_use]
    pub const fn address_of(&self, page: usize) -> u64 {
        if self.is_file(page) {
            FILE_REGION + self.offset_in_file(page)
        } else {
            let (thread, within) = (page / self.part(), page % self.part());
            self.region_of(thread) + within as u64 * PageSize::BASE.bytes()
        }
    }

    /// Where the anonymous memory of a thread begins.
    const fn region_of(&self, thread: usize) -> u64 {
        let tables = self.part().div_ceil(TABLE_PAGES) as u64;
        REGION + thread as u64 * tables * TABLE_PAGES as u64 * PageSize::BASE.bytes()
    }

    /// The addresses of pages of the anonymous memory of one thread, or of the file; `None`: of none.
    #[must_use]
    pub fn range_of(&self, pages: Range<usize>) -> Option<AddrRange> {
        let last = pages.end.checked_sub(1)?;
        AddrRange::new(self.address_of(pages.start), self.address_of(last) + PageSize::BASE.bytes()).ok()
    }

    /// The pages of a range of addresses.
    pub fn pages_in(&self, range: AddrRange) -> impl Iterator<Item = usize> + use<> {
        let layout = *self;
        let of_threads =
            (0..self.threads).map(move |thread| (layout.region_of(thread), layout.of_thread(thread)));
        let regions = of_threads.chain([(FILE_REGION, self.anonymous()..self.pages())]);
        regions.flat_map(move |(start, pages)| {
            let page_at = |address: u64| {
                pages.start + ((address.saturating_sub(start)) / PageSize::BASE.bytes()) as usize
            };
            let end = if range.last() < start { pages.start } else { page_at(range.last()) + 1 };
            page_at(range.start()).min(pages.end)..end.min(pages.end)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> Layout {
        Layout::new(2, 10, 2, 3)
    }

    #[test]
    fn every_page_is_of_one_thread_and_is_found_at_its_address() {
        let layout = layout();
        let threads = 0..2;
        let mut pages: Vec<usize> = threads.clone().flat_map(|thread| layout.of_thread(thread)).collect();
        pages.extend(threads.flat_map(|thread| layout.file_of_thread(thread)));
        assert!(pages.iter().copied().eq(0..layout.pages()));
        for page in pages {
            let range = AddrRange::page_of(layout.address_of(page), PageSize::BASE);
            assert_eq!(layout.pages_in(range).collect::<Vec<_>>(), [page]);
        }
        assert!(layout.pages_in(AddrRange::ALL).eq(0..layout.pages()));
        let ends =
            layout.range_of(layout.of_thread(0)).unwrap().hull(layout.range_of(layout.of_thread(1)).unwrap());
        assert!(layout.pages_in(ends).eq(0..layout.anonymous()), "what lies between is of nobody");
    }

    #[test]
    fn no_page_table_is_of_two_threads() {
        for pages in [10, 4096] {
            let layout = Layout::new(2, pages, 2, 3);
            let table_of = |page| layout.address_of(page) / (TABLE_PAGES as u64 * PageSize::BASE.bytes());
            let [first, second] = [0, 1].map(|thread| layout.of_thread(thread));
            assert!(table_of(first.end - 1) < table_of(second.start));
            assert!(table_of(second.end - 1) < table_of(layout.anonymous()));
        }
    }

    #[test]
    fn no_huge_page_is_of_two_threads() {
        assert_eq!(layout().of_thread(1).start % HUGE_PAGES, 0);
        assert!(layout().stamped_of_thread(0).len() >= HUGE_PAGES);
    }

    #[test]
    fn each_thread_has_a_page_for_each_device_in_each_region_and_two_twins() {
        let layout = layout();
        for device in 0..3 {
            let scratch = layout.scratch_of(device);
            assert_eq!(scratch.len(), 4);
            assert_eq!(scratch.iter().filter(|page| layout.is_file(**page)).count(), 2);
        }
        let twins: Vec<usize> =
            (0..layout.pages()).filter(|page| layout.use_of(*page) == Use::Twin).collect();
        assert_eq!(twins, [layout.twins_of_thread(0), layout.twins_of_thread(1)].concat());
    }

    #[test]
    fn parent_and_child_share_the_file_and_nothing_else() {
        let (layout, file) = (layout(), layout().anonymous());
        assert_eq!(layout.record_slot(1, file), layout.record_slot(3, file));
        assert_eq!(layout.owner(1, file, 7), layout.owner(3, file, 9));
        assert_ne!(layout.record_slot(0, file), layout.record_slot(1, file));
        assert_eq!((layout.record_slot(3, 0), layout.owner(3, 0, 9)), (3, 9));
    }
}
