//! [5 of 9] What a vendor implements: the device's TLB, as the SDK calls it.

use std::future::Future;

use shootdown_core::{AddrRange, AddressSpaceId, Cause, NoticeNumber, OwnerTag, Seq};

use crate::ticket::CommitTicket;

/// The TLB of a device, and everything else in the device that remembers a translation: its levels, its
/// page-walk caches, its DMA engines, its cache of bytes.
///
/// # When what is called
///
/// A notice withdraws every overlapping [`Mapping`](crate::Mapping) and spoils every overlapping
/// [`CommitTicket`] *before* anything here is called for it, so a translation that the device commits
/// under its own lock is either there when the flush takes that lock, or is refused.
///
/// Calls for different notices run at the same time, at most
/// [`DeviceConfig::parallel_flushes`](crate::DeviceConfig::parallel_flushes) of them, and finish in any
/// order; overlapping ones too. [`DeviceTlb::flush_all`] is called at the beginning and at the end of a
/// session, and for a notice that covers everything; other calls may run beside it.
///
/// # What must be true on return
///
/// An ack is sent when a call has returned and every [`UseGuard`](crate::UseGuard) of what it covers is
/// dropped; the host then gives the pages to somebody else. So on return (AckMeansStopped):
///
/// * no level holds a translation that overlaps,
/// * every DMA through such a translation is complete, or aborted and certain not to land,
/// * what the device wrote is delivered to the host, and what it used and wrote is in [`Flushed`].
///
/// There is no error to return: a flush that cannot be finished must not return, or must panic. A panic
/// is never taken for an ack: it ends the session, fails closed, and leaves the device to its lease.
///
/// # What may sleep
///
/// Every call may. None may block its thread, which the session's stream is read on: a flush that spins
/// or waits in a system call belongs into `tokio::task::spawn_blocking`. A call that is ready when it
/// is first polled costs no task. A future may be dropped before it is done only after `flush_all`
/// has returned at the end of the session.
pub trait DeviceTlb: Send + Sync + 'static {
    /// `invalidate_range_start`, `invalidate_page`: stop using the range.
    fn invalidate(&self, invalidation: Invalidation) -> impl Future<Output = Flushed> + Send;

    /// Stop using everything of this session, of every address space.
    ///
    /// Nothing is reported: the SDK tells the host agent that all of what was subscribed is young, and the host
    /// agent takes it that the device wrote whatever a round waited for. What the device wrote must be with the host before this returns, as for every flush.
    fn flush_all(&self, cause: FlushAllCause) -> impl Future<Output = ()> + Send;

    /// `clear_flush_young`: stop using the range and say whether it was used.
    fn clear_flush_young(&self, invalidation: Invalidation) -> impl Future<Output = Flushed> + Send {
        self.invalidate(invalidation)
    }

    /// `clear_young`: say what of the range was used since it was last asked, and go on using it.
    ///
    /// By default [`Young::Unknown`]: the SDK answers from its own table of uses, and with the whole range
    /// if the device holds translations of its own ([`CommitTicket::commit_raw`]).
    fn clear_young(&self, invalidation: Invalidation) -> impl Future<Output = Young> + Send {
        let _ = invalidation;
        async { Young::Unknown }
    }

    /// `change_pte`: commit the replacement in the place of what it replaces, or stop using the range.
    /// Called only where [`DeviceConfig::change_pte`](crate::DeviceConfig::change_pte) says so.
    ///
    /// A later notice may overtake this call; the ticket is refused then, and the range must be dropped.
    fn change_pte(
        &self,
        invalidation: Invalidation,
        replacement: CommitTicket,
    ) -> impl Future<Output = Flushed> + Send {
        drop(replacement);
        self.invalidate(invalidation)
    }

    /// `release`: the address space is gone, and the session's subscriptions of it. The range is
    /// [`AddrRange::ALL`].
    fn release(&self, invalidation: Invalidation) -> impl Future<Output = Flushed> + Send {
        self.invalidate(invalidation)
    }

    /// `invalidate_range_end`: faulting the range again makes sense. A hint; nobody waits for it.
    fn range_end(&self, address_space: AddressSpaceId, range: AddrRange) -> impl Future<Output = ()> + Send {
        let _ = (address_space, range);
        async {}
    }
}

/// What to stop using, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Invalidation {
    /// Whose memory.
    pub address_space: AddressSpaceId,
    /// Which pages: whole ones, at least those of the event.
    pub range: AddrRange,
    /// Why: the strongest cause where it stands for several events.
    pub cause: Cause,
    /// On whose behalf, if all of its events agree.
    pub owner: Option<OwnerTag>,
    /// The highest sequence of the events in it; `None` where the device itself asked for the flush.
    pub seq: Option<Seq>,
    /// The notice; `None` where the device itself asked for the flush, by
    /// [`Subscription::unsubscribe`](crate::Subscription::unsubscribe).
    pub notice: Option<NoticeNumber>,
}

/// A flush is complete; what it brought back. Ranges may name too much, never too little.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Flushed {
    /// What the device used since it last told, of the range. Uses through
    /// [`Mapping::begin_use`](crate::Mapping::begin_use) are known to the SDK and need not be named.
    pub young: Vec<AddrRange>,
    /// What the device wrote since it last told, of the range; the bytes are with the host already.
    pub dirty: Vec<AddrRange>,
}

/// What a device knows of its uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Young {
    /// These, beside what the SDK's own table knows.
    Known(Vec<AddrRange>),
    /// Nothing.
    Unknown,
}

/// Why everything is flushed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FlushAllCause {
    /// A session is about to begin, with the promise that the device holds nothing.
    Connecting,
    /// The host agent asks for it.
    Host(shootdown_core::FlushReason),
    /// The device leaves. The host's pages can still be written, by
    /// [`PageClient`](crate::PageClient).
    Leaving,
    /// The session is lost. The host's pages can be written only as long as the lease lasts.
    Lost,
}
