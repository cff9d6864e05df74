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

use super::cache::{Cache, Fate, Fetch, Step};
use super::flush_time::FlushTime;
use super::tlb::{DmaGuard, Evictable, Key, NotFilled, Reach, Tlb};
use super::writeback::Delivered;
use crate::connection::TransportError;
use crate::device::Device;
use crate::fault::{FaultError, Faulter};
use crate::page::{PageClient, PageError};
use crate::session::gate::{Gate, UseRefused};
use crate::ticket::CommitTicket;
use crate::tlb::{DeviceTlb, FlushAllCause, Flushed, Invalidation, Young};

/// How often an access faults again because a notice overtook its grant.
const MAX_ATTEMPTS: u32 = 64;

/// A software accelerator.
///
/// It reads and writes the host's pages by DMA ([`PageClient`]) through raw frames that it keeps in a
/// set-associative TLB, and remembers the bytes of pages in a cache behind it. As hardware does, it goes
/// on using what it holds until a flush reaches it: [`DeviceTlb::invalidate`] first takes its
/// [`FlushTime`], then drops what overlaps from the TLB, waits for the DMAs in flight, drops it from the
/// cache, and waits until what was written there is with the host.
///
/// Where it has a cache, writes stay in it ([`WritePolicy::Back`]): [`Accelerator::write`] returns when the
/// cache has the bytes, and they go to the host when their page is flushed, or must make room. The price: a
/// flush takes as long as they do, and a session that is lost takes with it what is not delivered
/// ([`AccessCounts::dirty_lost`]). With [`WritePolicy::Through`] a flush has nothing to write back, and only
/// reports what is dirty. Either way the cache does not see what the host's CPU writes to a page that it does
/// not invalidate.
///
/// A write-back that fails is not tried again: it may still land. The flush of such a page panics while the
/// session lasts, and does not return where it is ending, so that no ack claims what was not delivered.
///
/// A load generator that wants a device which breaks the contract wraps this one in a [`DeviceTlb`] of its
/// own.
#[derive(Debug)]
pub struct Accelerator {
    tlb: Arc<Tlb>,
    cache: Arc<Cache>,
    write_policy: WritePolicy,
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
    /// Write-backs of a page that the host has taken.
    pub written_back: u64,
    /// Pages that were written and could not be delivered, because their session was lost. A write-back that
    /// fails loses its session.
    pub dirty_lost: u64,
}

/// When the host gets what the accelerator writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WritePolicy {
    /// Before the write returns.
    Through,
    /// Before a flush of the page does, or before the page or its translation must make room. Without a cache
    /// writes go through.
    #[default]
    Back,
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
    /// Whether writes stay in the cache.
    pub write_policy: WritePolicy,
    /// How long a flush takes.
    pub flush_time: FlushTime,
    /// Where the flush times are drawn from.
    pub seed: u64,
}

impl Default for AcceleratorConfig {
    /// 1024 entries in 8 ways, as a GPU's second level has, and a cache of 1 MiB.
    fn default() -> Self {
        Self {
            tlb_sets: 128,
            tlb_ways: 8,
            cache_pages: 256,
            write_policy: WritePolicy::default(),
            flush_time: FlushTime::None,
            seed: 0,
        }
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
    /// What was written to the page before could not be delivered. The session ends at its next flush, if it
    /// has not; until then the page is not to be seen.
    #[error("what was written to the page at {address:#x} is lost")]
    Lost {
        /// First address.
        address: u64,
    },
}

/// Who waits for a flush.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asker {
    /// A session, which drops it when it ends.
    Notice,
    Device,
}

impl Accelerator {
    /// An accelerator that holds nothing and is attached to nothing.
    #[must_use]
    pub fn new(config: AcceleratorConfig) -> Arc<Self> {
        Arc::new(Self {
            tlb: Tlb::new(config.tlb_sets, config.tlb_ways),
            cache: Cache::new(config.cache_pages),
            write_policy: match config.cache_pages {
                0 => WritePolicy::Through,
                _ => config.write_policy,
            },
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
        let fetch = loop {
            match self.cache.read(dma.place(), part.clone()) {
                Step::Done(bytes) => return Ok(PageRead { bytes, from_cache: true }),
                Step::Miss(fetch) => break fetch,
                Step::Wait(page) => self.cache.settled(page).await,
                Step::Lost => return Err(AccessError::Lost { address }),
            }
            // That took its time.
            link.gate.check()?;
        };
        let page = link.pages.read(&[whole(&dma)]).await?;
        while let Step::Wait(page) = self.cache.keep(dma.place(), &fetch, &page) {
            self.cache.settled(page).await;
        }
        Ok(PageRead { bytes: page.slice(part), from_cache: false })
    }

    /// Writes bytes of one page: into the cache, or through to the host.
    ///
    /// # Errors
    /// [`AccessError`]; after [`AccessError::Dma`] a write that goes through may have happened.
    ///
    /// # Cancel safety
    /// Dropped, a write into the cache has not happened. One that goes through goes on if its DMA was begun,
    /// and a flush waits for it.
    pub async fn write(
        &self,
        address_space: AddressSpaceId,
        address: u64,
        bytes: Bytes,
    ) -> Result<(), AccessError> {
        let (key, span) = locate(address_space, address, bytes.len() as u64)?;
        let link = self.link()?;
        let dma = self.translate(&link, key, Access::Write).await?;
        match self.write_policy {
            WritePolicy::Back => self.write_to_cache(&link, &dma, address, span, &bytes).await,
            WritePolicy::Through => self.write_through(link, dma, key, span, bytes).await,
        }
    }

    /// The page's copy has the bytes when this returns. A part of a page that has no copy is written into one
    /// that is fetched first.
    async fn write_to_cache(
        &self,
        link: &Link,
        dma: &DmaGuard,
        address: u64,
        span: FrameSpan,
        bytes: &Bytes,
    ) -> Result<(), AccessError> {
        let mut fetched: Option<(Fetch, Bytes)> = None;
        loop {
            // A write into the copy is a use of the translation, and its flush waits for the DMA.
            link.gate.check()?;
            let offset = span.offset as usize;
            match self.cache.write(dma.place(), offset, bytes, fetched.as_ref(), &link.pages) {
                Step::Done(()) => return Ok(()),
                Step::Miss(fetch) => fetched = Some((fetch, link.pages.read(&[whole(dma)]).await?)),
                Step::Wait(page) => self.cache.settled(page).await,
                Step::Lost => return Err(AccessError::Lost { address }),
            }
        }
    }

    async fn write_through(
        &self,
        link: Link,
        dma: DmaGuard,
        key: Key,
        span: FrameSpan,
        bytes: Bytes,
    ) -> Result<(), AccessError> {
        let cache = Arc::clone(&self.cache);
        // A task of its own: a DMA on its way cannot be called back by dropping a future.
        let written = tokio::spawn(async move {
            // Before and after: no read keeps what it read beside a write.
            cache.drop_page(key);
            let written = link.pages.write(&[FrameSpan { frame: dma.frame, ..span }], bytes).await;
            cache.drop_page(key);
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

    /// Pages in the cache that were written and are not on their way to the host.
    #[must_use]
    pub fn dirty_pages(&self) -> usize {
        self.cache.dirty()
    }

    /// How accesses found their translations, and what became of what they wrote, since the accelerator was
    /// made.
    #[must_use]
    pub fn access_counts(&self) -> AccessCounts {
        let counts = self.cache.counts();
        AccessCounts { written_back: counts.delivered, dirty_lost: counts.lost, ..*self.counts.lock() }
    }

    /// DMAs in flight, and pages that are being written back.
    #[must_use]
    pub fn dmas_in_flight(&self) -> usize {
        self.tlb.dmas() + self.cache.in_flight()
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
            // The connection was lost, and the session goes on: asked again.
            Err(FaultError::Interrupted) => return Ok(None),
            granted => granted.map_err(|source| AccessError::Fault { address, source })?,
        };
        // One page was asked for, so there is one ticket, and it covers the page.
        let Some(mut ticket) = granted.tickets.into_iter().next() else { return Ok(None) };
        let evictable = |key, writes| match self.write_policy {
            WritePolicy::Back if writes > 0 || self.cache.owes(key) => Evictable::No,
            WritePolicy::Back | WritePolicy::Through => Evictable::Yes,
        };
        loop {
            match self.tlb.fill(key, ticket, access, evictable) {
                Ok(dma) => return Ok(Some(dma)),
                Err(NotFilled::Refused(CommitError::Spoiled)) => return Ok(None),
                Err(NotFilled::Refused(CommitError::Closed)) => return Err(UseRefused::SessionEnded.into()),
                Err(NotFilled::Full { ticket: unused, victim }) => {
                    ticket = *unused;
                    // A write that goes on has no DMA to wait for but its own, so it ends.
                    self.tlb.unwritten(victim).await;
                    self.cache.clean(victim);
                    self.cache.settled(victim).await;
                }
            }
        }
    }

    async fn flush(
        &self,
        reach: Reach,
        replacement: Option<CommitTicket>,
        fate: Fate,
    ) -> (Flushed, Delivered) {
        let time = self.flush_time.draw(&mut *self.random.lock());
        if let Some(time) = time {
            tokio::time::sleep(time).await;
        }
        let flushed = self.tlb.flush(reach, replacement);
        self.tlb.drained(reach).await;
        // After the DMAs: whatever was cached or written through an entry is there by now. Nobody may be the
        // one who has begun all of its write-backs, so each flush waits for those of all.
        self.cache.take(reach, fate);
        let delivered = self.cache.delivered(reach).await;
        (flushed, delivered)
    }

    async fn invalidate_and(&self, invalidation: Invalidation, replacement: Option<CommitTicket>) -> Flushed {
        let reach = Reach::Range(invalidation.address_space, invalidation.range);
        let (flushed, delivered) = self.flush(reach, replacement, Fate::WriteBack).await;
        if delivered == Delivered::No {
            self.not_delivered(invalidation.notice.map_or(Asker::Device, |_| Asker::Notice)).await;
        }
        flushed
    }

    /// The end of a flush that cannot be finished. It never returns: that would be an ack.
    async fn not_delivered(&self, asker: Asker) {
        let lasts = self.link().is_ok_and(|link| link.gate.check().is_ok());
        assert!(!lasts && asker == Asker::Notice, "what the device wrote cannot be delivered");
        // The session is ending for a cause of its own, and drops this.
        std::future::pending::<()>().await;
    }
}

impl DeviceTlb for Accelerator {
    async fn invalidate(&self, invalidation: Invalidation) -> Flushed {
        self.invalidate_and(invalidation, None).await
    }

    async fn flush_all(&self, cause: FlushAllCause) {
        tracing::debug!(?cause, entries = self.tlb_entries(), "flushing everything");
        let fate = match cause {
            FlushAllCause::Connecting => Fate::Lose,
            FlushAllCause::Host(_) | FlushAllCause::Leaving | FlushAllCause::Lost => Fate::WriteBack,
        };
        let (_, delivered) = self.flush(Reach::All, None, fate).await;
        match (cause, delivered) {
            (FlushAllCause::Connecting, _) => self.cache.forget_lost(),
            // Nobody is told that it was delivered. A flush that was begun still must not say so.
            (FlushAllCause::Lost, _) | (_, Delivered::Yes) => {}
            (FlushAllCause::Host(_), Delivered::No) => self.not_delivered(Asker::Notice).await,
            (FlushAllCause::Leaving, Delivered::No) => self.not_delivered(Asker::Device).await,
        }
    }

    async fn change_pte(&self, invalidation: Invalidation, replacement: CommitTicket) -> Flushed {
        self.invalidate_and(invalidation, Some(replacement)).await
    }

    async fn clear_young(&self, invalidation: Invalidation) -> Young {
        Young::Known(self.tlb.take_young(Reach::Range(invalidation.address_space, invalidation.range)))
    }
}

const PAGE: u32 = PageSize::BASE.bytes() as u32;

fn whole(dma: &DmaGuard) -> FrameSpan {
    FrameSpan { frame: dma.frame, offset: 0, length: PAGE }
}

/// The page of an access, and where in it the access lies; its frame is not known yet.
fn locate(address_space: AddressSpaceId, address: u64, length: u64) -> Result<(Key, FrameSpan), AccessError> {
    let offset = address & PageSize::BASE.offset_mask();
    if length == 0 || offset.saturating_add(length) > PageSize::BASE.bytes() {
        return Err(AccessError::CrossesPage { address, length });
    }
    let frame = shootdown_core::FrameNumber(0);
    Ok((Key::of(address_space, address), FrameSpan { frame, offset: offset as u32, length: length as u32 }))
}
