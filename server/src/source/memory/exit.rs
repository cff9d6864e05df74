//! The end of an address space: `exit_mmap`, with `mmu_notifier_release` first.
//!
//! ```text
//!   door closed: nothing begins -> operations in progress end (mm_users is 0)
//!   -> release, exactly once: every device has stopped, every subscription has ended
//!   -> unmap_vmas and free_pgtables without a bracket, for no event follows a release -> forgotten
//! ```
//!
//! A release that the notifier refuses opens the door again, and everything is as it was. A release that
//! is not quiesced keeps the door closed and every page where it is, for ever: that is safe, it shows in
//! the counters, and the source never asks for it.

use std::sync::Arc;

use shootdown_core::AddrRange;

use super::Inner;
use super::address_space::{AddressSpace, Door};
use super::error::MemoryError;
use super::gather::{Gather, Quiesced};
use super::outcome::Released;
use super::unmap::free_pgtables;
use super::zap::zap_range;
use crate::source::Notifier;

/// `exit_mmap`.
pub(super) async fn exit<N: Notifier>(
    inner: &Inner<N>,
    space: &Arc<AddressSpace>,
) -> Result<Released, MemoryError> {
    {
        let mut layout = space.layout.write();
        layout.check_door(space.id)?;
        layout.door = Door::Closed;
    }
    space.shut().await;
    let round = match inner.notifier.release(space.id).await {
        Ok(round) => round,
        Err(error) => {
            space.set_door(Door::Open);
            return Err(MemoryError::Notify(error));
        }
    };
    let proof = match Quiesced::judge(AddrRange::ALL, &round) {
        Ok(proof) => proof,
        Err(error) => {
            // Nobody need wait for an end that does not come.
            space.set_door(Door::Closed);
            return Err(error);
        }
    };

    let leaving = space.layout.write().vmas.leave_all();
    let mut gather = Gather::new(Arc::clone(space), inner.config.zap_block_pages);
    for range in &leaving {
        zap_range(space, *range, &mut gather, &proof).await;
    }
    gather.flush(&proof);
    let mut tally = gather.tally();
    tally.frames += space.free_quarantine(&proof);
    let freed = (inner.config.now)();
    let tables = free_pgtables(space, &leaving).await;
    space.changed.notify_waiters();
    inner.spaces.write().remove(&space.id);
    Ok(Released { tables, ..Released::new(tally, round, freed) })
}
