//! A host agent on a runtime and on connections of the program that it is part of: what
//! [`start()`](crate::start()) wires to threads and sockets, without either.
//!
//! Everything here runs on the runtime that it is awaited on, so on a current-thread runtime with virtual
//! time a host agent takes the same course each time: `loadgen/tests/simulation` is made of that.
//!
//! ```no_run
//! # async fn example(host: shootdown_server::Host, frames: std::sync::Arc<shootdown_server::source::memory::FrameStore>) {
//! use shootdown_server::embed;
//! use tokio_util::sync::CancellationToken;
//!
//! let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
//! let devices = tokio_stream::wrappers::TcpListenerStream::new(listener);
//! let stop = CancellationToken::new();
//! // Without it nothing is ever suspect, and nothing fenced.
//! tokio::spawn(embed::watch(host.clone(), stop.clone()));
//! embed::serve_devices(&host, &frames, devices, stop).await;
//! # }
//! ```

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_stream::{Stream, StreamExt as _};
use tokio_util::sync::CancellationToken;
use tonic::transport::server::{Connected, Router};

use crate::host::Host;
use crate::listen::Peer;
use crate::serve;
use crate::service::admin::Admin;
use crate::service::device::Devices;
use crate::service::notifier::Notifiers;
use crate::service::page::Pages;
use crate::shard;
use crate::source::memory::FrameStore;
use crate::vigil::Vigil;
use crate::watchdog;

/// Serves devices on `connections` until `stop`: their sessions live on this runtime, as do the rounds that
/// wait for them. An item that is an error is passed over; the end of the stream accepts no more.
///
/// # Cancel safety
/// Dropped, nothing more is accepted; connections that were go on until their runtime stops.
pub async fn serve_devices<C>(
    host: &Host,
    frames: &Arc<FrameStore>,
    connections: impl Stream<Item = io::Result<C>>,
    stop: CancellationToken,
) where
    C: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    // Never polls: a runtime that others use as well is not kept awake.
    let vigil = Arc::new(Vigil::new(Duration::ZERO, host.clock()));
    let devices = Devices { host: host.clone(), shard_index: 0, vigil };
    let pages = Pages { host: host.clone(), frames: Arc::clone(frames) };
    serve(serve::for_devices(devices, pages), connections, Peer::device(), stop, "devices").await;
}

/// Serves sources on `connections` until `stop`. Whoever is connected has leave to invalidate: the caller
/// has looked at who it is.
///
/// # Cancel safety
/// As [`serve_devices`].
pub async fn serve_sources<C>(
    host: &Host,
    connections: impl Stream<Item = io::Result<C>>,
    stop: CancellationToken,
) where
    C: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let notifiers = Notifiers { host: host.clone() };
    serve(serve::for_sources(notifiers), connections, Peer::with_leave(), stop, "sources").await;
}

/// Serves administrators on `connections` until `stop`. Whoever is connected has leave to list and to evict:
/// the caller has looked at who it is.
///
/// # Cancel safety
/// As [`serve_devices`].
pub async fn serve_administrators<C>(
    host: &Host,
    connections: impl Stream<Item = io::Result<C>>,
    stop: CancellationToken,
) where
    C: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let admin = Admin { host: host.clone() };
    serve(serve::for_administrators(admin), connections, Peer::with_leave(), stop, "administrators").await;
}

/// Watches the deadlines until `stop`: a device is suspect, and fenced, because this looks at the clock. One
/// a host agent, on a runtime that is not kept waiting.
///
/// # Cancel safety
/// Dropped, no deadline is noticed any more, until it is called again.
pub async fn watch(host: Host, stop: CancellationToken) {
    watchdog::run(host, stop).await;
}

async fn serve<C>(
    services: Router,
    connections: impl Stream<Item = io::Result<C>>,
    peer: Peer,
    stop: CancellationToken,
    what: &'static str,
) where
    C: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let incoming = connections.map(|accepted| accepted.map(|io| Carrier { io, peer: peer.clone() }));
    let serving = services.serve_with_incoming_shutdown(incoming, stop.clone().cancelled_owned());
    shard::until_stopped(serving, stop, what).await;
}

/// A connection of the embedding program, and what it vouches for.
#[derive(Debug)]
struct Carrier<C> {
    io: C,
    peer: Peer,
}

impl<C> Connected for Carrier<C> {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl<C: AsyncRead + Unpin> AsyncRead for Carrier<C> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_read(cx, buf)
    }
}

impl<C: AsyncWrite + Unpin> AsyncWrite for Carrier<C> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}
