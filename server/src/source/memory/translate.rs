//! What the host agent asks of the memory source: translations for a device's fault, and their bytes.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use shootdown_core::{Access, AddrRange, AddressSpaceId, PageSize, Translation};
use shootdown_proto::message::FrameSpan;

use super::MemorySource;
use super::address_space::AddressSpace;
use super::error::MemoryError;
use super::fault::{By, Touch};
use super::frame::{FRAME_BYTES, FrameError};
use crate::source::{FaultError, Notifier, Translate};

/// Pages that a fault brings in before others have their turn: each may be zeroed, which is about a
/// microsecond.
const PAGES_A_TURN: usize = 16;

impl<N: Notifier> Translate for MemorySource<N> {
    fn source(&self) -> &'static str {
        "memory"
    }

    /// # Cancel safety
    /// A future that is dropped may leave pages present that nobody asked for again; a copy on write that
    /// it began goes on.
    fn fault(
        &self,
        address_space: AddressSpaceId,
        range: AddrRange,
        access: Access,
    ) -> BoxFuture<'_, Result<Vec<Translation>, FaultError>> {
        Box::pin(async move {
            let in_fault = |address: u64| move |error: MemoryError| error.into_fault(address);
            let space = self.space(address_space).map_err(in_fault(range.start()))?;
            space.check_mapped(range, access).map_err(in_fault(range.start()))?;
            let mut translations = Vec::new();
            for (index, page) in range.pages(PageSize::BASE).enumerate() {
                if index % PAGES_A_TURN == PAGES_A_TURN - 1 {
                    // A fault of many pages does not keep the acks of its shard waiting.
                    tokio::task::yield_now().await;
                }
                translations.push(self.translate(&space, page, access).await.map_err(in_fault(page))?);
            }
            Ok(translations)
        })
    }

    fn bytes(&self, translations: &[Translation]) -> Result<Bytes, FaultError> {
        let length = u32::try_from(FRAME_BYTES).expect("a frame is 4 KiB");
        let span = |translation: &Translation| FrameSpan { frame: translation.frame, offset: 0, length };
        let spans: Vec<FrameSpan> = translations.iter().map(span).collect();
        let mut out = BytesMut::with_capacity(spans.len() * FRAME_BYTES);
        let read = self.frames().read(&spans, &mut out);
        read.map_err(|error| match error {
            FrameError::Memory(error) => FaultError::Store(error),
            other => FaultError::Store(Arc::new(std::io::Error::other(other))),
        })?;
        Ok(out.freeze())
    }
}

impl<N: Notifier> MemorySource<N> {
    /// The page at `page`, for a device. A read gets leave to read and no more, though the entry may allow
    /// writes: a page that the device never writes need not be taken from it by a fork.
    async fn translate(
        &self,
        space: &Arc<AddressSpace>,
        page: u64,
        access: Access,
    ) -> Result<Translation, MemoryError> {
        loop {
            match space.touch(page, By::Device, access, Ok)? {
                Touch::Done(_, frame) => {
                    let range = AddrRange::page_of(page, PageSize::BASE);
                    return Ok(Translation { range, frame, access });
                }
                Touch::Obstacle(obstacle) => drop(self.clear_way(space, page, access, obstacle).await?),
            }
        }
    }
}
