//! What all address spaces of a source share: the frames, the lists of their pages, the swap file, and how
//! many frames may be used.

use std::sync::Arc;

use parking_lot::Mutex;

use super::frame::{FrameError, FrameRef, FrameStore};
use super::gather::Quiesced;
use super::lru::Lru;
use super::outcome::MemoryEvents;
use super::swap::{SwapError, SwapFile, SwapRef};

#[derive(Debug)]
pub(super) struct Pool {
    pub(super) frames: Arc<FrameStore>,
    pub(super) lru: Arc<Lru>,
    swap: Option<Arc<SwapFile>>,
    last_ticket: Mutex<u64>,
    /// Taken last, for an addition.
    events: Mutex<MemoryEvents>,
    /// The most frames that are used for pages; the store may have more.
    pub(super) limit: usize,
}

impl Pool {
    pub(super) fn new(frames: Arc<FrameStore>, swap: Option<Arc<SwapFile>>, limit: usize) -> Arc<Self> {
        let (lru, limit) = (Lru::new(Arc::clone(&frames)), limit.min(frames.capacity()));
        Arc::new(Self { frames, lru, swap, last_ticket: Mutex::new(0), events: Mutex::default(), limit })
    }

    pub(super) fn swap(&self) -> Result<&SwapFile, SwapError> {
        self.swap.as_deref().ok_or(SwapError::None)
    }

    /// A number that nobody had before, and that is not 0.
    pub(super) fn next_ticket(&self) -> u64 {
        let mut last = self.last_ticket.lock();
        *last += 1;
        *last
    }

    /// Counts a branch that was taken (`count_vm_event`).
    pub(super) fn count(&self, count: impl FnOnce(&mut MemoryEvents)) {
        count(&mut self.events.lock());
    }

    pub(super) fn events(&self) -> MemoryEvents {
        *self.events.lock()
    }

    /// Gives references back that devices may have used: every one has stopped. How many frames were freed.
    pub(super) fn free(&self, frames: impl IntoIterator<Item = FrameRef>, _proof: &Quiesced) -> usize {
        self.frames.put(frames)
    }

    /// Gives a slot back.
    pub(super) fn put_slot(&self, slot: SwapRef) {
        if let Some(swap) = &self.swap {
            swap.put(slot);
        }
    }

    /// How many pages are in the swap file.
    pub(super) fn swapped(&self) -> usize {
        self.swap.as_ref().map_or(0, |swap| swap.in_use())
    }

    /// Whether another frame may be taken now.
    pub(super) fn has_room(&self) -> bool {
        self.frames.in_use() < self.limit
    }

    /// A run of frames, all or none; they must be given back by whoever does not use them.
    pub(super) fn take_run(&self, frames: usize) -> Result<Vec<FrameRef>, FrameError> {
        if self.frames.in_use().saturating_add(frames) > self.limit {
            return Err(self.out_of_memory());
        }
        self.frames.take_run(frames)
    }

    /// What a touch fails with that finds no room, and reclaim made none.
    pub(super) fn out_of_memory(&self) -> FrameError {
        FrameError::OutOfMemory { frames: self.limit }
    }
}
