//! Bulk bytes, on a connection of their own so that they never stall a session.

use std::sync::Arc;

use bytes::Bytes;
use shootdown_core::PageSize;
use shootdown_proto::error::Reason;
use shootdown_proto::message::{FrameSpan, MAX_SPANS};
use shootdown_proto::v1;
use shootdown_proto::v1::page_service_client::PageServiceClient;
use tonic::transport::Channel;

use crate::connection::{self, TransportError, Watch};
use crate::session::Session;
use crate::session::gate::UseRefused;

/// Reads and writes frames as a device's DMA does: by frame, with no look at any page table. What
/// protects the host is that a device asks only under a translation that it may use: hold the
/// [`UseGuard`](crate::UseGuard), or have asked the [`Gate`](crate::Gate), until the answer is there.
///
/// It carries the session and its epoch; the host agent refuses those of a fenced session. It connects at
/// the first call. A session that is closing may still write back, as long as its lease lasts.
#[derive(Debug, Clone)]
pub struct PageClient {
    session: Arc<Session>,
    client: PageServiceClient<Channel>,
}

/// Why bytes did not come or go.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PageError {
    /// Nothing was sent.
    #[error(transparent)]
    UseRefused(#[from] UseRefused),
    /// None, or too many.
    #[error("one call moves 1 to {MAX_SPANS} spans, not {given}")]
    Spans {
        /// How many were given.
        given: usize,
    },
    /// A span is empty or leaves its frame.
    #[error("the span of {length} bytes at {offset} is not within one frame")]
    Span {
        /// First byte.
        offset: u32,
        /// Bytes.
        length: u32,
    },
    /// The data is not as long as its spans.
    #[error("{bytes} bytes for spans of {spans} bytes")]
    Length {
        /// Length of the data.
        bytes: u64,
        /// Length of the spans together.
        spans: u64,
    },
    /// The host agent refused; a write may not have happened.
    #[error("the host agent refused: {}", reason.word())]
    Refused {
        /// Why.
        reason: Reason,
        /// In its own words.
        #[source]
        source: TransportError,
    },
    /// The connection broke; a write may have happened.
    #[error("the connection for pages was lost")]
    Transport(#[source] TransportError),
}

impl PageClient {
    pub(crate) fn new(session: Arc<Session>) -> Result<Self, TransportError> {
        let config = &session.config;
        // Bytes that are waited for on a dead connection would take the rest of the lease with them.
        let watch = Watch::within(session.welcome.lease, config);
        let channel = connection::connect_lazy(&config.endpoint, &watch)?;
        Ok(Self { client: PageServiceClient::new(channel), session })
    }

    /// Reads spans of frames; their bytes one after the other.
    ///
    /// # Errors
    /// [`PageError`].
    ///
    /// # Cancel safety
    /// Dropped, the host agent may still read.
    pub async fn read(&self, spans: &[FrameSpan]) -> Result<Bytes, PageError> {
        let length = check(spans)?;
        self.session.gate.check_in_flight()?;
        let request = v1::ReadRequest {
            session_id: self.session.welcome.session.get(),
            epoch: self.session.welcome.epoch.get(),
            spans: spans.iter().copied().map(Into::into).collect(),
        };
        let response = self.client.clone().read(request).await.map_err(|status| refused(&status))?;
        let data = response.into_inner().data;
        if data.len() as u64 != length {
            return Err(PageError::Length { bytes: data.len() as u64, spans: length });
        }
        Ok(data)
    }

    /// Writes spans of frames; `data` is their bytes one after the other.
    ///
    /// # Errors
    /// [`PageError`].
    ///
    /// # Cancel safety
    /// Dropped, the host agent may still write: a write that was begun must be awaited, or taken for one
    /// that may land at any later time.
    pub async fn write(&self, spans: &[FrameSpan], data: Bytes) -> Result<(), PageError> {
        let length = check(spans)?;
        if data.len() as u64 != length {
            return Err(PageError::Length { bytes: data.len() as u64, spans: length });
        }
        self.session.gate.check_in_flight()?;
        let request = v1::WriteRequest {
            session_id: self.session.welcome.session.get(),
            epoch: self.session.welcome.epoch.get(),
            spans: spans.iter().copied().map(Into::into).collect(),
            data,
        };
        self.client.clone().write(request).await.map_err(|status| refused(&status))?;
        Ok(())
    }
}

fn check(spans: &[FrameSpan]) -> Result<u64, PageError> {
    if spans.is_empty() || spans.len() > MAX_SPANS {
        return Err(PageError::Spans { given: spans.len() });
    }
    let mut total = 0;
    for &FrameSpan { offset, length, .. } in spans {
        if length == 0 || u64::from(offset) + u64::from(length) > PageSize::BASE.bytes() {
            return Err(PageError::Span { offset, length });
        }
        total += u64::from(length);
    }
    Ok(total)
}

fn refused(status: &tonic::Status) -> PageError {
    let source = TransportError::of_status(status);
    match source.reason() {
        Some(reason) => PageError::Refused { reason, source },
        None => PageError::Transport(source),
    }
}
