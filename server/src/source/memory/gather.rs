//! [8, 9 of 9] The gate: what has to be shown before a page is freed, and the gather that it frees.
//!
//! Follows `struct mmu_gather`: pages whose entries are cleared are gathered, and freed together after the
//! flush. Here the flush is the notifier's round, which is over before the first entry is cleared
//! ([`Bracket`]), or before the gather is flushed (`do_wp_page`). A [`Quiesced`] says that it is over.

use std::sync::Arc;

use shootdown_core::{AddrRange, AddressSpaceId, Cause, Seq};

use super::address_space::AddressSpace;
use super::error::MemoryError;
use super::frame::FrameRef;
use super::page_table::Cleared;
use crate::source::{Invalidation, Notifier, RoundResult, Wait};

/// Every device has stopped using the pages that a round covered. Nothing but a verdict makes one, and
/// no page that a device may have seen is freed without one (NoFreeBeforeQuiesce).
#[derive(Debug)]
pub(super) struct Quiesced(());

impl Quiesced {
    /// # Errors
    /// [`MemoryError::NotQuiesced`]: the pages of `range` are not to be freed.
    pub(super) fn judge(range: AddrRange, round: &RoundResult) -> Result<Self, MemoryError> {
        if round.is_quiesced() {
            Ok(Self(()))
        } else {
            Err(MemoryError::NotQuiesced { range, verdict: round.verdict })
        }
    }
}

impl Quiesced {
    /// Of several rounds, when each has shown it.
    pub(super) fn all(_proofs: Vec<Self>) -> Self {
        Self(())
    }
}

/// Between `invalidate_range_start` and `invalidate_range_end`: no device uses the range, and nothing that
/// overlaps is granted. Dropped, it ends, so that each start has one end (Pairing).
#[derive(Debug)]
pub(super) struct Bracket<'a, N: Notifier> {
    notifier: &'a N,
    address_space: AddressSpaceId,
    seq: Seq,
}

impl<'a, N: Notifier> Bracket<'a, N> {
    /// `mmu_notifier_invalidate_range_start`: called before an entry of the range is changed, and with no
    /// lock held.
    ///
    /// # Errors
    /// [`MemoryError::Notify`], [`MemoryError::NotQuiesced`]. There is no bracket then.
    pub(super) async fn open(
        notifier: &'a N,
        address_space: AddressSpaceId,
        range: AddrRange,
        cause: Cause,
    ) -> Result<(Self, Quiesced, RoundResult), MemoryError> {
        let wait = Wait::ForTargets;
        let invalidation =
            Invalidation { address_space, range, cause, owner: None, wait, resident_pages: None };
        let round = notifier.invalidate_range_start(invalidation).await.map_err(MemoryError::Notify)?;
        let bracket = round.seq.map(|seq| Self { notifier, address_space, seq });
        let proof = Quiesced::judge(range, &round)?;
        let bracket = bracket.expect("a round that is quiesced has a sequence");
        Ok((bracket, proof, round))
    }

    /// `mmu_notifier_invalidate_range_end`: called when every page of the range that was to be freed is.
    pub(super) fn close(self) {
        drop(self);
    }
}

impl<N: Notifier> Drop for Bracket<'_, N> {
    fn drop(&mut self) {
        if let Err(error) = self.notifier.invalidate_range_end(self.address_space, self.seq) {
            let (address_space, seq) = (self.address_space, self.seq);
            tracing::error!(%address_space, %seq, %error, "the notifier lost a bracket");
        }
    }
}

/// Pages that are out of the page tables and not freed. Dropped, it parks them in quarantine: losing
/// one's way is no reason to free.
#[derive(Debug)]
pub(super) struct Gather {
    space: Arc<AddressSpace>,
    gathered: Vec<FrameRef>,
    most: usize,
    tally: Tally,
}

/// What went through a gather.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tally {
    pub(super) pages: usize,
    pub(super) frames: usize,
    pub(super) blocks: usize,
}

impl Gather {
    /// `tlb_gather_mmu`; it is full at `most` pages, at least one.
    pub(super) fn new(space: Arc<AddressSpace>, most: usize) -> Self {
        Self { space, gathered: Vec::new(), most: most.max(1), tally: Tally::default() }
    }

    /// `tlb_remove_page`: an entry was cleared, and this was its reference.
    pub(super) fn add(&mut self, cleared: Cleared) {
        self.tally.pages += 1;
        match cleared {
            Cleared::Frame(frame) => self.gathered.push(frame),
            // No device reaches the swap file.
            Cleared::Swapped(slot) => self.space.pool.put_slot(slot),
        }
    }

    pub(super) fn is_full(&self) -> bool {
        self.gathered.len() >= self.most
    }

    /// `tlb_finish_mmu`: frees what was gathered. Called with no page-table lock held.
    pub(super) fn flush(&mut self, _proof: &Quiesced) {
        if self.gathered.is_empty() {
            return;
        }
        self.tally.blocks += 1;
        self.tally.frames += self.space.frames.put(self.gathered.drain(..));
    }

    pub(super) fn tally(&self) -> Tally {
        self.tally
    }
}

impl Drop for Gather {
    fn drop(&mut self) {
        if !self.gathered.is_empty() {
            self.space.park(self.gathered.drain(..));
        }
    }
}
