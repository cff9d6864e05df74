//! The source's memory: a few pages over fewer frames, so that what is freed is used again at once.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use rand::RngExt as _;
use rand::rngs::StdRng;
use shootdown_core::{Access, AddrRange, AddressSpaceId, PageSize, Translation};
use shootdown_server::source::memory::FrameStore;
use shootdown_server::source::{FaultError, Translate};
use tokio::sync::{mpsc, oneshot};

use crate::content;
use crate::plan::millis;
use crate::shared::Shared;
use crate::trace::{Frame, Op, Trace, What};

/// Pages of an address space.
pub const PAGES: u64 = 8;
/// Frames of the machine: less than the pages of two address spaces.
pub const FRAMES: usize = 12;
pub const PAGE: u64 = PageSize::BASE.bytes();

/// Page tables and frames. The tables outlive the host agent: they belong to the program that it serves.
#[derive(Debug)]
pub struct Memory {
    /// How often each frame was freed.
    generations: Vec<u64>,
    /// The last that was freed is the first to be used again.
    free: Vec<u64>,
    spaces: BTreeMap<u64, Space>,
    /// Frames that are in no page table any more, and on whose behalf somebody asks the host agent; with their
    /// address spaces.
    asked_for: BTreeMap<Frame, u64>,
    /// What the frames hold.
    pub store: Arc<FrameStore>,
}

#[derive(Debug, Default)]
struct Space {
    table: [Option<Frame>; PAGES as usize],
    /// Frames that are in no page table any more, and whose invalidation was refused: devices may have
    /// them until the address space has come to its end.
    orphans: Vec<Frame>,
    released: Option<Op>,
}

impl Default for Memory {
    fn default() -> Self {
        Self {
            generations: vec![0; FRAMES],
            free: (0..FRAMES as u64).collect(),
            spaces: BTreeMap::new(),
            asked_for: BTreeMap::new(),
            store: content::fresh(),
        }
    }
}

impl Memory {
    pub fn add_space(&mut self, space: u64) {
        self.spaces.insert(space, Space::default());
    }

    /// The address spaces that were not released.
    pub fn live_spaces(&self) -> Vec<u64> {
        let live = self.spaces.iter().filter(|(_, space)| space.released.is_none());
        live.map(|(id, _)| *id).collect()
    }

    /// The frame of a page, a fresh one if it has none.
    fn frame_of(&mut self, space: u64, page: u64, trace: &Trace) -> Result<Frame, FaultError> {
        let unmapped = FaultError::Unmapped { address: page * PAGE };
        let found = self.spaces.get(&space).ok_or_else(|| unmapped.clone())?;
        if page >= PAGES || found.released.is_some() {
            return Err(unmapped);
        }
        match found.table[page as usize] {
            Some(frame) => Ok(frame),
            None => self.replace(space, page, trace).map(|(fresh, _)| fresh),
        }
    }

    /// Gives a page a fresh frame; returns it, and the one that was there.
    pub fn replace(
        &mut self,
        space: u64,
        page: u64,
        trace: &Trace,
    ) -> Result<(Frame, Option<Frame>), FaultError> {
        let index = self.free.pop().ok_or(FaultError::OutOfMemory { frames: FRAMES })?;
        let fresh = Frame { index, generation: self.generations[index as usize] };
        trace.record(What::Mapped { space, page, frame: fresh });
        let table = &mut self.spaces.get_mut(&space).expect("the caller has looked it up").table;
        let old = table[page as usize].replace(fresh);
        self.asked_for.extend(old.map(|old| (old, space)));
        Ok((fresh, old))
    }

    /// Clears the entries of pages.
    pub fn take(&mut self, space: u64, pages: Range<u64>) -> Vec<Frame> {
        let Some(found) = self.spaces.get_mut(&space) else { return Vec::new() };
        let taken: Vec<_> = pages.filter_map(|page| found.table[page as usize].take()).collect();
        self.asked_for.extend(taken.iter().map(|frame| (*frame, space)));
        taken
    }

    /// The host agent has crashed, and nobody was answered: for each address space the frames on whose behalf it
    /// must be asked again.
    pub fn to_ask_again(&self) -> BTreeMap<u64, Vec<Frame>> {
        let mut of_spaces = BTreeMap::<u64, Vec<Frame>>::new();
        self.asked_for.iter().for_each(|(frame, space)| of_spaces.entry(*space).or_default().push(*frame));
        of_spaces
    }

    /// The frames may be used again.
    pub fn free(&mut self, op: Op, frames: Vec<Frame>, trace: &Trace) {
        for frame in frames {
            self.asked_for.remove(&frame);
            let generation = &mut self.generations[frame.index as usize];
            assert_eq!(*generation, frame.generation, "a frame is freed once");
            *generation += 1;
            content::on_freed(&self.store, frame.index, *generation);
            self.free.push(frame.index);
            trace.record(What::Freed { op, frame });
        }
    }

    /// The frames wait for the end of their address space, if it has not come.
    pub fn orphan(&mut self, space: u64, frames: Vec<Frame>, trace: &Trace) {
        let found = self.spaces.get_mut(&space).expect("address spaces are not forgotten");
        match found.released {
            Some(op) => self.free(op, frames, trace),
            None => {
                self.asked_for.retain(|frame, _| !frames.contains(frame));
                found.orphans.extend(frames);
            }
        }
    }

    /// No device has anything of the address space any more.
    pub fn release(&mut self, op: Op, space: u64, trace: &Trace) {
        let mut frames = self.take(space, 0..PAGES);
        let found = self.spaces.get_mut(&space).expect("address spaces are not forgotten");
        frames.append(&mut found.orphans);
        found.released = Some(op);
        self.free(op, frames, trace);
    }
}

/// Answers the host agent's questions from the page tables.
pub struct Tables {
    pub shared: Arc<Shared>,
    pub rng: Mutex<StdRng>,
    /// Who moves pages that are faulted; nobody, where the source is not in the host agent's process.
    pub migrations: Option<mpsc::Sender<Migration>>,
}

/// A page that is to be moved before a fault of it is answered.
#[derive(Debug)]
pub struct Migration {
    pub space: u64,
    pub page: u64,
    /// Dropped when it was, or never will be.
    pub moved: oneshot::Sender<()>,
}

/// Of so many faults one moves its page.
const MIGRATES: u32 = 8;

impl Tables {
    /// Before the page is looked up. Where the source has enough to do, it stays where it is.
    async fn migrate(&self, space: u64, page: u64) {
        let Some(migrations) = &self.migrations else { return };
        let (moved, done) = oneshot::channel();
        if self.rng.lock().random_ratio(1, MIGRATES)
            && migrations.try_send(Migration { space, page, moved }).is_ok()
        {
            // Nobody says so: it is over when the sender is gone.
            let _ = done.await;
        }
    }
}

impl Translate for Tables {
    fn source(&self) -> &'static str {
        "simulation"
    }

    fn fault(
        &self,
        address_space: AddressSpaceId,
        range: AddrRange,
        access: Access,
    ) -> BoxFuture<'_, Result<Vec<Translation>, FaultError>> {
        let pages = range.pages(PageSize::BASE);
        let translate = move |address: u64| {
            let page = address / PAGE;
            let frame = self.shared.memory.lock().frame_of(address_space.get(), page, &self.shared.trace)?;
            Ok(Translation { range: range_of(page..page + 1), frame: frame.number(), access })
        };
        // What was right when it was looked up may be wrong when it is answered.
        let late = millis(self.rng.lock().random_range(0..6_u64).saturating_sub(2));
        Box::pin(async move {
            self.migrate(address_space.get(), range.start() / PAGE).await;
            let translations: Result<Vec<_>, _> = pages.map(translate).collect();
            if late > Duration::ZERO {
                tokio::time::sleep(late).await;
            }
            translations
        })
    }

    fn bytes(&self, translations: &[Translation]) -> Result<Bytes, FaultError> {
        Ok(Bytes::from(vec![0; translations.len() * PAGE as usize]))
    }
}

pub fn range_of(pages: Range<u64>) -> AddrRange {
    AddrRange::new(pages.start * PAGE, pages.end * PAGE).unwrap()
}

/// The pages that are wholly in a range.
pub fn whole_pages_of(range: AddrRange) -> Range<u64> {
    let end = range.last().checked_add(1).map_or(PAGES, |end| (end / PAGE).min(PAGES));
    let start = range.start().div_ceil(PAGE);
    start.min(end)..end
}
