//! What an operation on memory can fail with, and what a device is told of it.

use std::io;
use std::sync::Arc;

use shootdown_core::{AddrRange, AddressSpaceId, RangeError};

use super::frame::FrameError;
use super::swap::SwapError;
use crate::source::{FaultError, NotifyError, Verdict};

/// Why an operation on an address space failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum MemoryError {
    /// There is no such address space.
    #[error("there is no address space {0}")]
    AddressSpaceUnknown(AddressSpaceId),
    /// The address space is coming to its end.
    #[error("address space {0} is coming to its end")]
    Exiting(AddressSpaceId),
    /// The range is empty, wraps, or does not consist of whole pages.
    #[error("the range cannot be used")]
    Range(#[from] RangeError),
    /// A collapse was asked for of something else than one huge page.
    #[error("{range} is not one huge page: {pages} pages, from a multiple of that on")]
    NotAHugePage {
        /// What was asked for.
        range: AddrRange,
        /// How many pages a huge page has.
        pages: usize,
    },
    /// Nothing is mapped there, or what is mapped is being unmapped.
    #[error("nothing is mapped at {address:#x}")]
    Unmapped {
        /// The first such address.
        address: u64,
    },
    /// The mapping does not allow writes.
    #[error("the mapping at {address:#x} does not allow writes")]
    ReadOnly {
        /// The first such address.
        address: u64,
    },
    /// Something is mapped there.
    #[error("something is mapped at {address:#x}; unmap it first")]
    AlreadyMapped {
        /// The first such address.
        address: u64,
    },
    /// What was mapped there is being unmapped, and its pages are not released yet.
    #[error("the range at {address:#x} is being unmapped; map it when the unmap has returned")]
    Busy {
        /// The first such address.
        address: u64,
    },
    /// The mapping is locked in memory: its pages are not dropped while it stays. Unlock it first.
    #[error("the mapping at {address:#x} is locked in memory; unlock it first")]
    Locked {
        /// The first such address.
        address: u64,
    },
    /// The place that memory was to be moved to overlaps the one where it is.
    #[error("{old} cannot move to {new}, which overlaps it")]
    Overlap {
        /// Where it is.
        old: AddrRange,
        /// Where it was to go.
        new: AddrRange,
    },
    /// There are as many mappings as there may be.
    #[error(
        "there are {most} mappings, as many as an address space may have, or splitting one would pass that"
    )]
    TooManyMappings {
        /// The bound.
        most: usize,
    },
    /// The notifier refused the call. The pages are as they were.
    #[error("the notifier refused; the pages are kept")]
    Notify(#[source] NotifyError),
    /// Devices may still use the range. The pages are as they were.
    #[error("devices may still use {range} (verdict {verdict:?}); its pages are kept")]
    NotQuiesced {
        /// What was to be released.
        range: AddrRange,
        /// How the round ended.
        verdict: Verdict,
    },
    /// The frame store has no frame, or failed.
    #[error("the frame store refused")]
    Frame(#[from] FrameError),
    /// The swap file has no room, or failed. The page is kept.
    #[error("the page could not be swapped")]
    Swap(#[from] SwapError),
    /// The file ends before the page (`SIGBUS`).
    #[error("the page at {address:#x} is beyond the end of the file that is mapped there")]
    BeyondEnd {
        /// The first such address.
        address: u64,
    },
    /// A file that is mapped could not be read, written or cut. Its pages are kept, and as dirty as they were.
    #[error("the file could not be read or written")]
    File(#[source] Arc<io::Error>),
    /// The task that carried the operation ended too early: its runtime stopped, or it panicked. What it
    /// held is kept.
    #[error("the task that carried the operation was ended; what it held is kept")]
    TaskEnded,
}

impl MemoryError {
    /// What a device is told whose fault at `address` ended so.
    pub(super) fn into_fault(self, address: u64) -> FaultError {
        match self {
            Self::AddressSpaceUnknown(_) | Self::Exiting(_) => FaultError::Unmapped { address },
            Self::Unmapped { address } => FaultError::Unmapped { address },
            Self::ReadOnly { address } => FaultError::ReadOnly { address },
            Self::Frame(FrameError::OutOfMemory { frames }) => FaultError::OutOfMemory { frames },
            Self::Frame(FrameError::Memory(error)) => FaultError::Store(error),
            Self::Swap(SwapError::Full { slots }) => FaultError::OutOfMemory { frames: slots },
            Self::Swap(SwapError::File(error)) => FaultError::Store(error),
            Self::BeyondEnd { address } => FaultError::BeyondEnd { address },
            Self::File(error) => FaultError::Store(error),
            Self::Notify(error) => FaultError::Notify(error),
            Self::TaskEnded => FaultError::Notify(NotifyError::Stopping),
            other => FaultError::Store(Arc::new(io::Error::other(other))),
        }
    }
}
