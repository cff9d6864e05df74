//! [5 of 9] The accelerator: a device that keeps raw frames in a TLB of its own.

use std::sync::Arc;

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use shootdown_core::mapping::CommitError;
use shootdown_core::{Access, AddressSpaceId, PageSize};
use shootdown_proto::error::Reason;
use shootdown_proto::message::FrameSpan;

use super::cache::Cache;
use super::flush_time::FlushTime;
use super::tlb::{DmaGuard, Key, Reach, Tlb};
use crate::connection::TransportError;
use crate::device::Device;
use crate::fault::{FaultError, Faulter};
use crate::page::{PageClient, PageError};
use crate::session::gate::{Gate, UseRefused};
use crate::tlb::{DeviceTlb, FlushAllCause, Flushed, Invalidation, Young};

/// How often an access faults again because a notice overtook its grant.
const MAX_ATTEMPTS: u32 = 64;

/// A software accelerator.
///
/// It reads and writes the host's pages by DMA ([`PageClient`]) through raw frames that it keeps in a
/// set-associative TLB, and remembers the bytes of pages in a cache behind it. As hardware does, it goes
/// on using what it holds until a flush reaches it: [`DeviceTlb::invalidate`] first takes its
/// [`FlushTime`], then drops what overlaps from both levels, then waits for the DMAs in flight.
///
/// Writes go through: [`Accelerator::write`] returns when the host has the bytes, so a flush has nothing to
/// write back, and only reports what is dirty. The cache does not see what the host's CPU writes to a page
/// that it does not invalidate.
///
/// A load generator that wants a device which breaks the contract wraps this one in a [`DeviceTlb`] of its
/// own.
#[derive(Debug)]
pub struct Accelerator {
    tlb: Arc<Tlb>,
    cache: Arc<Cache>,
    flush_time: FlushTime,
    random: Mutex<StdRng>,
    link: RwLock<Option<Link>>,
    counts: Mutex<AccessCounts>,
}

/// How the accelerator's accesses found their translations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AccessCounts {
    /// The translation was in the TLB.
    pub hits: u64,
    /// The translation was asked for, and granted.
    pub faults: u64,
}

/// What the accelerator reaches the host through, as long as a session lasts.
#[derive(Debug, Clone)]
struct Link {
    gate: Gate,
    faulter: Faulter,
    pages: PageClient,
}

/// The accelerator's hardware.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AcceleratorConfig {
    /// Sets of the TLB.
    pub tlb_sets: usize,
    /// Entries a set.
    pub tlb_ways: usize,
    /// Pages whose bytes are kept. 0: none.
    pub cache_pages: usize,
    /// How long a flush takes.
    pub flush_time: FlushTime,
    /// Where the flush times are drawn from.
    pub seed: u64,
}

impl Default for AcceleratorConfig {
    /// 1024 entries in 8 ways, as a GPU's second level has, and a cache of 1 MiB.
    fn default() -> Self {
        Self { tlb_sets: 128, tlb_ways: 8, cache_pages: 256, flush_time: FlushTime::None, seed: 0 }
    }
}

/// What a read brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageRead {
    /// As many as were asked for.
    pub bytes: Bytes,
    /// They come from the accelerator's cache, not from the host just now.
    pub from_cache: bool,
}

/// Why an access did not happen.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AccessError {
    /// [`Accelerator::attach`] was not called.
    #[error("the accelerator is attached to no session")]
    Detached,
    /// An access lies in one page.
    #[error("{length} bytes at {address:#x} are none, or not in one page")]
    CrossesPage {
        /// First address.
        address: u64,
        /// Bytes.
        length: u64,
    },
    /// The session is closed, or the lease ran out.
    #[error(transparent)]
    UseRefused(#[from] UseRefused),
    /// There is no translation.
    #[error("no translation of {address:#x}")]
    Fault {
        /// First address.
        address: u64,
        /// Why.
        #[source]
        source: FaultError,
    },
    /// The page changed each time, before its translation was in the TLB.
    #[error("a notice overtook the grant {attempts} times")]
    Contended {
        /// How often it was asked.
        attempts: u32,
    },
    /// The DMA failed. A write may have happened.
    #[error("the DMA failed")]
    Dma(#[from] PageError),
    /// The DMA's task was stopped with its runtime. A write may have happened.
    #[error("the DMA was stopped")]
    Stopped,
}

impl Accelerator {
    /// An accelerator that holds nothing and is attached to nothing.
    #[must_use]
    pub fn new(config: AcceleratorConfig) -> Arc<Self> {
        Arc::new(Self {
            tlb: Tlb::new(config.tlb_sets, config.tlb_ways),
            cache: Arc::new(Cache::new(config.cache_pages)),
            flush_time: config.flush_time,
            random: Mutex::new(StdRng::seed_from_u64(config.seed)),
            link: RwLock::default(),
            counts: Mutex::default(),
        })
    }

    /// Gives the accelerator its session: after [`Device::connect`], which wants its
    /// [`DeviceTlb`] first, and again after each later one. `device` may be one whose TLB wraps this
    /// accelerator. It does not keep the session alive.
    ///
    /// # Errors
    /// [`TransportError`] when the endpoint cannot be one.
    pub fn attach<T: DeviceTlb>(&self, device: &Device<T>) -> Result<(), TransportError> {
        let link = Link { gate: device.gate(), faulter: device.faulter(), pages: device.pages()? };
        *self.link.write() = Some(link);
        Ok(())
    }

    /// Reads bytes of one page as the device sees them: from its cache, or by DMA through its TLB, or after
    /// a fault.
    ///
    /// # Errors
    /// [`AccessError`].
    ///
    /// # Cancel safety
    /// Dropped, the host may still read; nothing else is left behind.
    pub async fn read(
        &self,
        address_space: AddressSpaceId,
        address: u64,
        length: usize,
    ) -> Result<PageRead, AccessError> {
        let (key, span) = locate(address_space, address, length as u64)?;
        let link = self.link()?;
        let dma = self.translate(&link, key, Access::Read).await?;
        let part = span.offset as usize..(span.offset + span.length) as usize;
        if let Some(page) = self.cache.get(key) {
            return Ok(PageRead { bytes: page.slice(part), from_cache: true });
        }
        let whole = FrameSpan { frame: dma.frame, offset: 0, length: PAGE };
        let page = link.pages.read(&[whole]).await?;
        dma.if_current(|| self.cache.put(key, page.clone()));
        Ok(PageRead { bytes: page.slice(part), from_cache: false })
    }

    /// Writes bytes of one page through to the host.
    ///
    /// # Errors
    /// [`AccessError`]; after [`AccessError::Dma`] the write may have happened.
    ///
    /// # Cancel safety
    /// Dropped, the write goes on if its DMA was begun, and a flush waits for it.
    pub async fn write(
        &self,
        address_space: AddressSpaceId,
        address: u64,
        bytes: Bytes,
    ) -> Result<(), AccessError> {
        let (key, span) = locate(address_space, address, bytes.len() as u64)?;
        let link = self.link()?;
        let dma = self.translate(&link, key, Access::Write).await?;
        let cache = Arc::clone(&self.cache);
        // A task of its own: a DMA on its way cannot be called back by dropping a future.
        let written = tokio::spawn(async move {
            // Before and while: no read keeps what it read beside a write.
            cache.drop_page(key);
            let written = link.pages.write(&[FrameSpan { frame: dma.frame, ..span }], bytes).await;
            drop(dma);
            written
        });
        Ok(written.await.map_err(|_| AccessError::Stopped)??)
    }

    /// Entries of the TLB that are filled.
    #[must_use]
    pub fn tlb_entries(&self) -> usize {
        self.tlb.len()
    }

    /// Pages whose bytes are in the cache.
    #[must_use]
    pub fn cached_pages(&self) -> usize {
        self.cache.len()
    }

    /// How accesses found their translations, since the accelerator was made.
    #[must_use]
    pub fn access_counts(&self) -> AccessCounts {
        *self.counts.lock()
    }

    /// DMAs in flight.
    #[must_use]
    pub fn dmas_in_flight(&self) -> usize {
        self.tlb.dmas()
    }

    fn link(&self) -> Result<Link, AccessError> {
        self.link.read().clone().ok_or(AccessError::Detached)
    }

    /// Looks the page up, and faults it where it is not there; the DMA that may begin.
    async fn translate(&self, link: &Link, key: Key, access: Access) -> Result<DmaGuard, AccessError> {
        for _ in 0..MAX_ATTEMPTS {
            let found = self.tlb.begin(key, access);
            let dma = match found {
                Some(dma) => {
                    self.counts.lock().hits += 1;
                    dma
                }
                None => match self.fill(link, key, access).await? {
                    Some(dma) => {
                        self.counts.lock().faults += 1;
                        dma
                    }
                    None => continue,
                },
            };
            // Asked while the DMA counts as in flight: a flush that is not over yet waits for it.
            link.gate.check()?;
            return Ok(dma);
        }
        Err(AccessError::Contended { attempts: MAX_ATTEMPTS })
    }

    /// `None`: a notice overtook the grant.
    async fn fill(&self, link: &Link, key: Key, access: Access) -> Result<Option<DmaGuard>, AccessError> {
        let address = key.range().start();
        let granted = match link.faulter.fault_ticketed(key.address_space, key.range(), access).await {
            Err(FaultError::Refused(error)) if error.reason == Reason::FaultContended => return Ok(None),
            granted => granted.map_err(|source| AccessError::Fault { address, source })?,
        };
        // One page was asked for, so there is one ticket, and it covers the page.
        let Some(ticket) = granted.tickets.into_iter().next() else { return Ok(None) };
        match self.tlb.fill(key, ticket, access) {
            Ok(dma) => Ok(Some(dma)),
            Err(CommitError::Spoiled) => Ok(None),
            Err(CommitError::Closed) => Err(UseRefused::SessionEnded.into()),
        }
    }

    async fn flush(&self, reach: Reach) -> Flushed {
        let time = self.flush_time.draw(&mut *self.random.lock());
        if let Some(time) = time {
            tokio::time::sleep(time).await;
        }
        let flushed = self.tlb.flush(reach);
        // After the TLB: whatever was cached through an entry was cached before the entry went.
        self.cache.drop_reached(reach);
        self.tlb.drained(reach).await;
        flushed
    }
}

impl DeviceTlb for Accelerator {
    async fn invalidate(&self, invalidation: Invalidation) -> Flushed {
        self.flush(Reach::Range(invalidation.address_space, invalidation.range)).await
    }

    async fn flush_all(&self, cause: FlushAllCause) {
        tracing::debug!(?cause, entries = self.tlb_entries(), "flushing everything");
        self.flush(Reach::All).await;
    }

    async fn clear_young(&self, invalidation: Invalidation) -> Young {
        Young::Known(self.tlb.take_young(Reach::Range(invalidation.address_space, invalidation.range)))
    }
}

const PAGE: u32 = PageSize::BASE.bytes() as u32;

/// The page of an access, and where in it the access lies; its frame is not known yet.
fn locate(address_space: AddressSpaceId, address: u64, length: u64) -> Result<(Key, FrameSpan), AccessError> {
    let offset = address & PageSize::BASE.offset_mask();
    if length == 0 || offset.saturating_add(length) > PageSize::BASE.bytes() {
        return Err(AccessError::CrossesPage { address, length });
    }
    let frame = shootdown_core::FrameNumber(0);
    Ok((Key::of(address_space, address), FrameSpan { frame, offset: offset as u32, length: length as u32 }))
}
