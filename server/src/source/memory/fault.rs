//! One page is touched, by the CPU or on a device's behalf: `handle_pte_fault`, `do_anonymous_page`, and
//! the branch of `do_wp_page` that reuses the page.
//!
//! Everything here happens under the layout's read lock and the page-table lock, and nothing here waits.
//! What has to wait is answered as an [`Obstacle`]; the caller removes it without a lock and touches
//! again.
//!
//! Races of a device's fault, and what makes each safe. The answer is only a proposal: the host agent
//! grants it unless an overlapping bracket is open or has begun since the fault arrived, else it asks
//! again.
//!
//! * With fork: computed before the entry is write-protected, it may allow writes. Fork's bracket began
//!   before, so it is not granted.
//! * With a zap: computed before the entry is cleared, it names a frame that is about to be freed. The
//!   bracket began before, so it is not granted. Computed after, it finds a new page, or none.
//! * With `do_wp_page`, whose entry changes *before* its bracket begins: computed before the change, it
//!   names the old frame, and is not granted once the bracket has begun; granted earlier, it is a target
//!   of that round. Computed after the change, it is of the new frame, and waits until the entry has
//!   settled, or the device could write there while another still reads the old frame.

use shootdown_core::{Access, FrameNumber, PageSize};

use super::address_space::AddressSpace;
use super::error::MemoryError;
use super::frame::FrameError;
use super::lru::List;
use super::outcome::StoreBranch;
use super::page_table::{Entry, Slot, Stage};

/// Who touches.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum By {
    Cpu,
    Device,
}

/// What became of a touch.
#[derive(Debug)]
pub(super) enum Touch<T> {
    /// It was allowed, by this branch.
    Done(StoreBranch, T),
    /// Something has to be done first, without a lock.
    Obstacle(Obstacle),
}

/// What stands in the way of a touch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Obstacle {
    /// The entry has replaced another, and devices may still use that one, or its page is on its way
    /// elsewhere: wait until it has settled.
    Settling,
    /// A write, and the frame is shared: `do_wp_page` has to copy it.
    Shared,
    /// As many frames are in use as may be: reclaim has to make room.
    NoRoom,
    /// The page is in the swap file.
    Swapped,
    /// The page is a file's, and not in the page table, or not so that it can be written.
    File,
}

impl AddressSpace {
    /// Makes the page at `address` present, and writable where `access` asks for it and no wait is needed;
    /// then does `act` on its frame, under the page-table lock.
    pub(super) fn touch<T>(
        &self,
        address: u64,
        by: By,
        access: Access,
        act: impl FnOnce(FrameNumber) -> Result<T, FrameError>,
    ) -> Result<Touch<T>, MemoryError> {
        let layout = self.layout.read();
        layout.check_door(self.id)?;
        let vma = layout.vmas.allowing(address, access)?;
        let table = self.tables.get_or_make(address);
        let mut entries = table.lock();
        match entries.slot(address) {
            Slot::Absent if vma.object.backing().is_some() => return Ok(Touch::Obstacle(Obstacle::File)),
            Slot::Absent if !self.pool.has_room() => return Ok(Touch::Obstacle(Obstacle::NoRoom)),
            Slot::Absent => {
                let frame = match self.frames.take_zeroed() {
                    // Another took the last one since it was looked for.
                    Err(FrameError::OutOfMemory { .. }) => return Ok(Touch::Obstacle(Obstacle::NoRoom)),
                    taken => taken?,
                };
                let (number, life) = (frame.number(), frame.life());
                let mut entry = Entry::new(frame, vma.access);
                entry.mark(access);
                entries.install(address, entry);
                self.pool.lru.add(life, vma.owner_of(page_start(address)), List::Active);
                return Ok(Touch::Done(StoreBranch::ZeroFill, act(number)?));
            }
            Slot::Moving(_) => return Ok(Touch::Obstacle(Obstacle::Settling)),
            Slot::Swapped(_) => return Ok(Touch::Obstacle(Obstacle::Swapped)),
            Slot::Present(_) => {}
        }
        let entry = entries.get_mut(address).expect("it is present, under the lock");
        // The CPU may read the new frame before it has settled: nobody has written there yet.
        if entry.stage == Stage::Settling && (by, access) != (By::Cpu, Access::Read) {
            return Ok(Touch::Obstacle(Obstacle::Settling));
        }
        let mut branch = StoreBranch::InPlace;
        if access > entry.allows {
            if vma.object.backing().is_some() {
                return Ok(Touch::Obstacle(Obstacle::File));
            }
            if !self.frames.is_only_reference(&entry.frame) {
                return Ok(Touch::Obstacle(Obstacle::Shared));
            }
            // The frame stays: what devices hold stays right, so nobody is told.
            entry.allows = Access::Write;
            branch = StoreBranch::Reuse;
            self.pool.count(|events| events.reused += 1);
        }
        entry.mark(access);
        Ok(Touch::Done(branch, act(entry.frame.number())?))
    }

    /// Waits until the entry at `address` has settled, or is gone.
    pub(super) async fn settled(&self, address: u64) {
        self.wait_until(|| {
            let table = self.tables.get(address);
            table.is_none_or(|table| match table.lock().slot(address) {
                Slot::Present(entry) => entry.stage == Stage::Settled,
                Slot::Moving(_) => false,
                Slot::Absent | Slot::Swapped(_) => true,
            })
        })
        .await;
    }
}

fn page_start(address: u64) -> u64 {
    address & !PageSize::BASE.offset_mask()
}
