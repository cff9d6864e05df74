//! [1 of 9] Where invalidations come from.
//!
//! Two traits meet here. A source calls a [`Notifier`], as `mm/` calls the methods of
//! `struct mmu_notifier_ops`; the host agent is one. The host agent calls a [`Translate`], to answer
//! a device's fault from the source that the address space belongs to.
//!
//! [`memory`] is the embedded source: address spaces on real memory. `rpc` serves any program on the
//! host that calls the notifier methods itself.

pub mod memory;
pub mod rpc;

use std::any::Any;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
pub use shootdown_core::round::{Outcome, TargetReport};
use shootdown_core::{
    Access, AddrRange, AddressSpaceId, Cause, Incarnation, Moment, OwnerTag, Seq, Translation,
};

/// How long a caller waits for a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// Until every target has stopped, which is bounded by `T_ack + T_fence` (BoundedResolution). Where a
    /// target is not certain to stop, the verdict is [`Verdict::NotQuiesced`] when that time has passed.
    ForTargets,
    /// At most so long. When it passes, the verdict is [`Verdict::NotQuiesced`] and the round goes on.
    AtMost(Duration),
    /// Not at all: with any target, [`Verdict::WouldBlock`], and nothing was done (NonBlockAtomic).
    NotAtAll,
}

/// One call of `invalidate_range_start`.
#[derive(Debug, Clone, Copy)]
pub struct Invalidation {
    /// Whose memory.
    pub address_space: AddressSpaceId,
    /// Which pages. Some bytes of a page stand for all of it.
    pub range: AddrRange,
    /// Why.
    pub cause: Cause,
    /// On whose behalf, if the source knows.
    pub owner: Option<OwnerTag>,
    /// How long the caller waits.
    pub wait: Wait,
    /// How many pages the caller has to keep if it is told [`Verdict::NotQuiesced`]; `None`: every page of the
    /// range.
    pub resident_pages: Option<u64>,
}

/// Which devices an address space is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strictness {
    /// Those that stop by themselves when their lease has run out, or have a fencer: a round is over in time
    /// whatever they do.
    Strict,
    /// Any: a round that one of them does not ack may never be over, and its pages stay quarantined.
    Lenient,
}

impl std::fmt::Display for Strictness {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Strict => "strict",
            Self::Lenient => "not strict",
        })
    }
}

/// How a round ended, as far as its caller waited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Every target has stopped: the pages may be released.
    Quiesced,
    /// The caller's time passed first: the pages must not be released. Time is never an ack
    /// (TimeoutIsNotAck).
    NotQuiesced,
    /// The caller cannot wait and there is a target: nothing was done.
    WouldBlock,
}

/// When the parts of a round happened, on the host agent's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RoundTimes {
    /// The notifier call arrived.
    pub called: Moment,
    /// A notice was in every target's outbox.
    pub dispatched: Moment,
    /// The last target was resolved. `None` while one is waiting.
    pub resolved: Option<Moment>,
    /// It was over, and Quiesced from then on, whenever its outcome is asked for. `None` while it is not.
    pub finished: Option<Moment>,
    /// The caller was about to be answered.
    pub answered: Moment,
}

impl RoundTimes {
    /// From the call to the verdict. Of a round that is over it is the same whenever it is asked for: who tries again
    /// because the first answer was lost is not told of that.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.finished.unwrap_or(self.answered).since(self.called)
    }
}

/// What became of a round.
#[derive(Debug, Clone)]
#[must_use = "pages may be released only where the verdict is Quiesced"]
pub struct RoundResult {
    /// How it ended.
    pub verdict: Verdict,
    /// The sequence of its event, which names the bracket; `None` where the verdict is WouldBlock.
    pub seq: Option<Seq>,
    /// Each target, its outcome and its time, in the order of their sessions.
    pub targets: Vec<TargetReport>,
    /// Whether a target used the range since it was last asked.
    pub young: bool,
    /// Whether a target wrote the range since it last told. It may say so of a page that nobody wrote, never
    /// the reverse: where a target was fenced, left, is waited for, or had to flush everything, it counts as
    /// one that wrote. A `clear_young` does not ask.
    ///
    /// A device tells once. What it wrote elsewhere in a flush of everything, or before it left or was fenced,
    /// no later round tells: a page whose writable grant ended in such a way may be dirty.
    pub dirty: bool,
    /// The run of the host agent that says so. Who has seen a higher one passes this result over: it comes
    /// from a host agent that was stopped while its successor ran.
    pub host_incarnation: Incarnation,
    /// When its parts happened.
    pub times: RoundTimes,
}

/// Why a notifier call was refused. Nothing of a refused call takes effect.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotifyError {
    /// There is no such address space.
    #[error("there is no address space {0}; register it first")]
    AddressSpaceUnknown(AddressSpaceId),
    /// The address space is coming to its end; only its release is going on.
    #[error("address space {0} was released; no event can follow its release")]
    Released(AddressSpaceId),
    /// The bracket is not open: it was ended before, or never started.
    #[error("address space {address_space} has no open bracket {seq}; each start has exactly one end")]
    BracketUnknown {
        /// Whose memory.
        address_space: AddressSpaceId,
        /// The sequence that was given.
        seq: Seq,
    },
    /// Too many rounds wait for their targets, and this caller cannot wait for one of them to end.
    #[error("address space {address_space} has {most} rounds in flight, as many as it may; try again")]
    TooManyRounds {
        /// Whose memory.
        address_space: AddressSpaceId,
        /// The bound.
        most: usize,
    },
    /// As much is quarantined as may be, and the pages of this call might have to be as well. A caller that can
    /// wait was made to, as long as it does.
    #[error(
        "{pages} pages ({bytes} bytes) are quarantined, of at most {most_pages} ({most_bytes}); wait until their rounds are complete"
    )]
    QuarantineFull {
        /// Bytes of ranges that are quarantined.
        bytes: u128,
        /// Pages that are.
        pages: u128,
        /// The bound on bytes.
        most_bytes: u64,
        /// The bound on pages.
        most_pages: u64,
    },
    /// There are as many address spaces as there may be.
    #[error(
        "there are {most} address spaces, as many as there may be; release one, or raise max-address-spaces"
    )]
    TooManyAddressSpaces {
        /// The bound.
        most: usize,
    },
    /// The name that was to be taken back is in use, or was given out or taken back by this run before.
    #[error(
        "address_space_id is {0}, which this run of the host agent has given out; where that was to the same program, go on using it, otherwise register without one"
    )]
    AddressSpaceTaken(AddressSpaceId),
    /// An address space that was handed over stays as it was: devices were let in by its rule.
    #[error(
        "address space {address_space} was handed over, and is {is}; take it back as that, or register another"
    )]
    OtherStrictness {
        /// Whose memory.
        address_space: AddressSpaceId,
        /// What it is.
        is: Strictness,
    },
    /// The round is of another run of the host agent, in which its sequence meant something else.
    #[error(
        "round {seq} of address space {address_space} is of run {of} of the host agent, and this is run {this}: nothing of that one is left to end or to wait for; start again"
    )]
    RoundOfAnotherRun {
        /// Whose memory.
        address_space: AddressSpaceId,
        /// The sequence that was given.
        seq: Seq,
        /// The run that was given.
        of: Incarnation,
        /// The run that answers.
        this: Incarnation,
    },
    /// The host agent is stopping.
    #[error("the host agent is stopping")]
    Stopping,
    /// A successor has taken the place of this host agent. Whatever devices said to this one, the pages must
    /// not be released.
    #[error("a successor runs in the place of this host agent; connect to it, and ask it again")]
    Superseded,
}

impl NotifyError {
    /// Whether the host agent would have, had there been room. It refuses what asks for room only while there is none;
    /// for other reasons it refuses every call that comes.
    pub(crate) fn is_for_want_of_room(&self) -> bool {
        matches!(
            self,
            Self::TooManyRounds { .. } | Self::QuarantineFull { .. } | Self::TooManyAddressSpaces { .. }
        )
    }
}

/// The notifier methods, as a source calls them.
///
/// | method | may sleep |
/// |---|---|
/// | [`invalidate_range_start`](Self::invalidate_range_start) | unless [`Wait::NotAtAll`] |
/// | [`invalidate_range_end`](Self::invalidate_range_end) | never |
/// | [`invalidate_page`](Self::invalidate_page), [`change_pte`](Self::change_pte), [`clear_flush_young`](Self::clear_flush_young), [`clear_young`](Self::clear_young), [`release`](Self::release) | yes |
/// | [`test_young`](Self::test_young) | never |
///
/// The order is the caller's duty: clear the page table entry, drop the page-table lock, notify, and
/// only then free. No method may be awaited with a lock held; the lint `await_holding_lock` says so.
///
/// # Cancel safety
///
/// A future that is dropped never opens the gate: its round goes on until every target has stopped,
/// and its bracket stays until it is ended. The caller must not release the pages.
pub trait Notifier: Send + Sync + 'static {
    /// Makes an address space known, so that devices can subscribe to it: those that are certain to stop
    /// ([`Strictness::Strict`]).
    ///
    /// # Errors
    /// [`NotifyError::TooManyAddressSpaces`], [`NotifyError::Stopping`].
    fn register(&self, name: &str, source: Arc<dyn Translate>) -> Result<AddressSpaceId, NotifyError>;

    /// `mmu_notifier_invalidate_range_start`: when the verdict is Quiesced no device uses the range
    /// any more, and until the end of the bracket nothing that overlaps is granted.
    ///
    /// # Errors
    /// [`NotifyError`]; there is no bracket then.
    fn invalidate_range_start(
        &self,
        invalidation: Invalidation,
    ) -> impl Future<Output = Result<RoundResult, NotifyError>> + Send;

    /// `mmu_notifier_invalidate_range_end`: closes the bracket. A round that is not quiesced keeps
    /// its grants held until it is.
    ///
    /// # Errors
    /// [`NotifyError::BracketUnknown`], [`NotifyError::AddressSpaceUnknown`].
    fn invalidate_range_end(&self, address_space: AddressSpaceId, seq: Seq) -> Result<(), NotifyError>;

    /// `mmu_notifier_invalidate_page`: start and end around one page, after its entry is cleared and
    /// before it is freed.
    ///
    /// # Errors
    /// As [`Notifier::invalidate_range_start`].
    fn invalidate_page(
        &self,
        address_space: AddressSpaceId,
        address: u64,
        cause: Cause,
        wait: Wait,
    ) -> impl Future<Output = Result<RoundResult, NotifyError>> + Send;

    /// `mmu_notifier_change_pte`: a hint that `translation` replaces what was there.
    ///
    /// Poll it in the step that changes the page table entry, as `set_pte_at_notify` is called under the entry's lock.
    /// A call that is held up before its round opens, for a place or for room in the quarantine, is an invalidation:
    /// by then the entry may be another.
    ///
    /// # Errors
    /// As [`Notifier::invalidate_range_start`].
    fn change_pte(
        &self,
        address_space: AddressSpaceId,
        translation: Translation,
        wait: Wait,
    ) -> impl Future<Output = Result<RoundResult, NotifyError>> + Send;

    /// `mmu_notifier_clear_flush_young`: devices flush, and [`RoundResult::young`] ORs their bits.
    ///
    /// # Errors
    /// As [`Notifier::invalidate_range_start`].
    fn clear_flush_young(
        &self,
        address_space: AddressSpaceId,
        range: AddrRange,
        wait: Wait,
    ) -> impl Future<Output = Result<RoundResult, NotifyError>> + Send;

    /// `mmu_notifier_clear_young`: the same without a flush.
    ///
    /// # Errors
    /// As [`Notifier::invalidate_range_start`].
    fn clear_young(
        &self,
        address_space: AddressSpaceId,
        range: AddrRange,
        wait: Wait,
    ) -> impl Future<Output = Result<RoundResult, NotifyError>> + Send;

    /// `mmu_notifier_test_young`: from what the devices reported; never waits for a device.
    ///
    /// # Errors
    /// [`NotifyError::AddressSpaceUnknown`].
    fn test_young(&self, address_space: AddressSpaceId, range: AddrRange) -> Result<bool, NotifyError>;

    /// `mmu_notifier_release`: the address space ends. When it returns, no device uses any page of it
    /// and all its subscriptions have ended; the caller then frees its pages. Exactly once. Where the verdict is
    /// NotQuiesced a device has not stopped in time: the release goes on by itself, and when it is over the
    /// address space is unknown.
    ///
    /// # Errors
    /// [`NotifyError::Released`] when it was released before, [`NotifyError::AddressSpaceUnknown`].
    fn release(
        &self,
        address_space: AddressSpaceId,
    ) -> impl Future<Output = Result<RoundResult, NotifyError>> + Send;
}

/// Why a source has no translation for a device.
#[derive(Debug, Clone, thiserror::Error)]
pub enum FaultError {
    /// There is no mapping.
    #[error("nothing is mapped at {address:#x}")]
    Unmapped {
        /// The first such address.
        address: u64,
    },
    /// The mapping is read-only.
    #[error("the mapping at {address:#x} does not allow writes")]
    ReadOnly {
        /// The first such address.
        address: u64,
    },
    /// The file that is mapped there ends before the page.
    #[error("the page at {address:#x} is beyond the end of the file that is mapped there")]
    BeyondEnd {
        /// The first such address.
        address: u64,
    },
    /// No frame is left.
    #[error("no frame is left: {frames} are in use, as many as the source may have")]
    OutOfMemory {
        /// The bound.
        frames: usize,
    },
    /// The source hands out no translations, or nobody answers for it now.
    #[error("the source of this address space hands out no translations")]
    NotServed,
    /// The source went away before it answered, or answered what was not asked.
    #[error("the source went away before it answered; ask again when it is back")]
    SourceGone,
    /// The source did not answer in time.
    #[error("the source did not answer within {limit:?}; ask again")]
    Unanswered {
        /// The limit.
        limit: Duration,
    },
    /// The source says that the mapping does not allow the access.
    #[error("the source does not allow this access to {address:#x}")]
    Denied {
        /// The first such address.
        address: u64,
    },
    /// The source says that it has no memory left.
    #[error("the source has no memory left; try later")]
    SourceOutOfMemory,
    /// Only the source itself can reach the bytes.
    #[error(
        "the host agent has no way to the bytes of this address space, only to its translations; fault without wants_data, and read by the way that the source gave"
    )]
    NoBytes,
    /// The notifier call that the fault needed (to break COW) was refused.
    #[error("the fault needed a notifier call that was refused")]
    Notify(#[from] NotifyError),
    /// The frame store failed.
    #[error("the frame store failed")]
    Store(#[source] Arc<std::io::Error>),
}

impl FaultError {
    /// Whether it tells what the page tables said, which an event may have changed meanwhile.
    pub(crate) fn is_of_the_pages(&self) -> bool {
        matches!(
            self,
            Self::Unmapped { .. } | Self::ReadOnly { .. } | Self::BeyondEnd { .. } | Self::Denied { .. }
        )
    }
}

/// How the host agent asks a source for translations. Object safe: each address space has one.
pub trait Translate: Any + Send + Sync {
    /// The source's name in listings: "memory", "rpc", "api".
    fn source(&self) -> &'static str;

    /// Translations of every page of `range`, in ascending order, with the frames allocated, and
    /// copied where a write needs it (`get_user_pages`). It may itself notify (COW). The answer is
    /// only good if no overlapping event starts before it is granted; the caller checks that.
    fn fault(
        &self,
        address_space: AddressSpaceId,
        range: AddrRange,
        access: Access,
    ) -> BoxFuture<'_, Result<Vec<Translation>, FaultError>>;

    /// The bytes of granted pages, in order, for a grant that carries them.
    ///
    /// # Errors
    /// [`FaultError::Store`], [`FaultError::NoBytes`].
    fn bytes(&self, translations: &[Translation]) -> Result<Bytes, FaultError>;

    /// The address space is gone: no fault will be asked any more.
    fn on_released(&self) {}
}

impl RoundResult {
    /// Whether the pages may be released.
    #[must_use]
    pub fn is_quiesced(&self) -> bool {
        self.verdict == Verdict::Quiesced
    }
}
