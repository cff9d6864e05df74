//! One page is touched, by the CPU or on a device's behalf: `handle_pte_fault`, `do_anonymous_page`, and
//! the branch of `do_wp_page` that reuses the page.
//!
//! Everything here happens under the layout's read lock and the page-table lock, and nothing here waits.
//! What has to wait is answered as [`Touch::Settling`] or [`Touch::Shared`]; the caller does it without a
//! lock and touches again.
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

use shootdown_core::{Access, FrameNumber};

use super::address_space::AddressSpace;
use super::error::MemoryError;
use super::frame::FrameError;
use super::outcome::StoreBranch;
use super::page_table::{Entry, Stage};

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
    /// The entry has replaced another, and devices may still use that one: wait until it has settled.
    Settling,
    /// A write, and the frame is shared: `do_wp_page` has to copy it.
    Shared,
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
        let Some(entry) = entries.get_mut(address) else {
            let frame = self.frames.take_zeroed()?;
            let entry = Entry { frame, allows: vma.access, stage: Stage::Settled };
            let number = entries.install(address, entry).frame.number();
            return Ok(Touch::Done(StoreBranch::ZeroFill, act(number)?));
        };
        // The CPU may read the new frame before it has settled: nobody has written there yet.
        if entry.stage == Stage::Settling && (by, access) != (By::Cpu, Access::Read) {
            return Ok(Touch::Settling);
        }
        let mut branch = StoreBranch::InPlace;
        if access > entry.allows {
            if !self.frames.is_only_reference(&entry.frame) {
                return Ok(Touch::Shared);
            }
            // The frame stays: what devices hold stays right, so nobody is told.
            entry.allows = Access::Write;
            branch = StoreBranch::Reuse;
        }
        Ok(Touch::Done(branch, act(entry.frame.number())?))
    }

    /// Waits until the entry at `address` has settled, or is gone.
    pub(super) async fn settled(&self, address: u64) {
        self.wait_until(|| {
            let table = self.tables.get(address);
            table.is_none_or(|table| {
                table.lock().get(address).is_none_or(|entry| entry.stage == Stage::Settled)
            })
        })
        .await;
    }
}
