//! Where pages lie, how ranges are told, and what a device takes out for them: `core/src/range.rs`,
//! `proto/src/convert.rs`, `core/src/mapping.rs`.

use shootdown_core::{AddrRange, PageSize};

use crate::config::Config;
use crate::mutations::Mutation;
use crate::properties::events_of;
use crate::state::{Down, Frame, Page, Set, State, members};
use crate::world::{Shootdown, World};

/// The most pages of a configuration.
const MOST_PAGES: usize = 3;

/// The addresses of a page. Page 0 is the last of the address space, the others lie below it: the end of a range that
/// reaches the top is no number of 64 bits.
pub(crate) fn range_of(page: Page) -> AddrRange {
    AddrRange::page_of(u64::MAX - u64::from(page) * PageSize::BASE.bytes(), PageSize::BASE)
}

/// The pages that a range touches.
fn pages_of(config: &Config, range: AddrRange) -> Set {
    (0..config.pages).filter(|page| range_of(*page).overlaps(range)).fold(0, |pages, page| pages | 1 << page)
}

/// A range on the wire: half-open, with an end of 0 at the top.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Told {
    start: u64,
    end: u64,
}

impl Told {
    pub(crate) const fn of(range: AddrRange) -> Self {
        Self { start: range.start(), end: range.wire_end() }
    }

    fn range(self) -> AddrRange {
        AddrRange::page_aligned(self.start, self.end, PageSize::BASE).expect("it was a range")
    }
}

/// What a device holds in one entry of its TLB: one page or more, each with its frame.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Translation {
    pub(crate) of: Set,
    frames: [Frame; MOST_PAGES],
}

impl Translation {
    pub(crate) fn new(of: Set, mapped: &[Frame]) -> Self {
        let mut frames = [0; MOST_PAGES];
        members(of).for_each(|page| frames[usize::from(page)] = mapped[usize::from(page)]);
        Self { of, frames }
    }

    pub(crate) const fn has(&self, page: Page) -> bool {
        self.of >> page & 1 == 1
    }

    pub(crate) fn pages(self) -> impl Iterator<Item = (Page, Frame)> {
        members(self.of).map(move |page| (page, self.frames[usize::from(page)]))
    }
}

impl Config {
    /// The pages of the device's translation that this page is in: a fault is widened to them.
    pub(crate) fn translation(&self, device: usize, page: Page) -> Set {
        pages_of(self, range_of(page).widen_to(self.devices[device].translates))
    }
}

impl World<'_> {
    /// The pages of all translations that a notice takes out: those that it touches, whatever else is in them.
    pub(crate) fn taken_out(&self, device: usize, told: Told) -> Set {
        let range = match told {
            Told { end: 0, .. } if self.broken(Mutation::TopTakenForEmpty) => return 0,
            told => told.range(),
        };
        let inward = self.broken(Mutation::RangeRoundedInward);
        let size = self.config.devices[device].translates;
        let goes = |page: &Page| {
            let entry = range_of(*page).widen_to(size);
            if inward { range.contains(entry) } else { range.overlaps(entry) }
        };
        (0..self.config.pages).filter(goes).fold(0, |pages, page| pages | 1 << page)
    }
}

/// Whoever is told of an event is told of all of its pages; and who takes something out for it takes out all
/// translations that any of them is in, as a whole.
pub(crate) fn range_over_approximates(model: &Shootdown, state: &State) -> bool {
    state.runs().all(|(device, _, run)| {
        let changed = |n: u8| {
            let pages = events_of(state, run, n).map(|called| state.source.events[usize::from(called)].page);
            pages.fold(0, |pages, page| pages | 1 << page)
        };
        let told = run.link.iter().flat_map(|link| &link.down).all(|message| match message {
            Down::Notice { n, told } => changed(*n) & !pages_of(&model.config, told.range()) == 0,
            Down::Grant(_) | Down::Lease(_) => true,
        });
        let whole = |page: Page| model.config.translation(device, page);
        told && run.flushing.iter().all(|(n, taken)| {
            let wanted = members(changed(*n)).fold(0, |wanted: Set, page| wanted | whole(page));
            wanted & !taken == 0
        })
    })
}
