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

use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::runtime::Handle;
use tokio_stream::{Stream, StreamExt as _};
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;
use tonic::transport::{Channel, Endpoint};

use crate::config::StateConfig;
use crate::handover;
use crate::host::{Host, HostConfig};
pub use crate::journal::Medium;
use crate::journal::{Disk, JournalError, Writer};
use crate::listen::Peer;
use crate::restart::Restart;
use crate::serve::{self, Router};
use crate::service::admin::Admin;
use crate::service::device::Devices;
use crate::service::notifier::Notifiers;
use crate::service::page::Pages;
use crate::session::Then;
use crate::shard;
use crate::source::memory::FrameStore;
use crate::start;
use crate::vigil::Vigil;
use crate::watchdog;

/// A host agent that goes on where the run before stopped which had the same state directory. Its journal is
/// written by whoever has something to write: nothing that this runtime does depends on another thread, and
/// everybody on it waits for the disk. [`start()`](crate::start()) has a thread for it.
///
/// Its sessions' tasks run on `control`, from here on.
///
/// # Errors
/// [`JournalError`]: nothing was started.
pub fn restarted(config: HostConfig, control: Handle, state: StateConfig) -> Result<Host, JournalError> {
    restarted_on(Arc::new(Disk), config, control, state)
}

/// The same, where what survives a power loss is the embedding program's to say.
///
/// # Errors
/// As [`restarted`].
pub fn restarted_on(
    medium: Arc<dyn Medium>,
    mut config: HostConfig,
    control: Handle,
    state: StateConfig,
) -> Result<Host, JournalError> {
    let (restart, history) = start::remember(Some(state), Writer::Caller, medium, &mut config)?;
    let host = Host::restarted(config, control, restart);
    // Before anybody can register, subscribe or ask.
    Restart::bring_back(&host, history);
    Ok(host)
}

/// A planned end, of a host agent that was [`restarted`]: devices are told to come back, rounds are waited for
/// for at most `patience`, streams are cut, and what a successor needs to go on is written down. Address spaces
/// whose source is in this program are released before. Nothing more may be asked of `host` afterwards.
///
/// # Cancel safety
/// Dropped, nothing is written down: to the successor it was a crash.
pub async fn hand_over(host: &Host, patience: Duration) {
    host.stopping().cancel();
    let sessions = host.registry().list();
    sessions.iter().for_each(|session| session.drain(patience, Then::Resume));
    if tokio::time::timeout(patience, handover::quiet(host)).await.is_err() {
        tracing::warn!(rounds = host.rounds_in_flight(), "not all is quiet; what is not is left out");
    }
    // In one step of the one runtime that everything is on: nothing changes between the two.
    host.registry().list().iter().for_each(|session| session.cut());
    if let Some(journal) = host.restart().journal() {
        journal.clone().close(host.is_current().then(|| handover::record(host)));
    }
}

/// Serves devices on `connections` until `stop`: their sessions live on this runtime, as do the rounds that
/// wait for them. An item that is an error is passed over; the end of the stream accepts no more. How many connections
/// there may be, and for how long one may be silent, is the caller's to bound.
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

/// What connects to a `FencerService` of the embedding program's, for [`crate::Fencer::Embedded`]. Two are equal
/// when one is a clone of the other.
#[derive(Clone)]
pub struct FencerConnector(Arc<dyn Fn() -> Connecting + Send + Sync>);

type Connecting = Pin<Box<dyn Future<Output = io::Result<TokioIo<Box<dyn Duplex>>>> + Send>>;

/// Both halves of a connection.
trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<C: AsyncRead + AsyncWrite + Send + Unpin> Duplex for C {}

impl FencerConnector {
    /// `connect` is called once an attempt, and its time is part of the attempt's. What it makes must carry bytes in
    /// order, and both ways at once.
    pub fn from_fn<C, F>(connect: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        C: AsyncRead + AsyncWrite + Send + Unpin + 'static,
        F: Future<Output = io::Result<C>> + Send + 'static,
    {
        Self(Arc::new(move || {
            let connecting = connect();
            Box::pin(async move { Ok(TokioIo::new(Box::new(connecting.await?) as Box<dyn Duplex>)) })
        }))
    }

    pub(crate) async fn connect(&self) -> Result<Channel, tonic::transport::Error> {
        let connector = Arc::clone(&self.0);
        // The connector knows where; the name is what the request says it goes to.
        let endpoint = Endpoint::from_static("http://fencer");
        endpoint.connect_with_connector(tower::service_fn(move |_| connector())).await
    }
}

impl fmt::Debug for FencerConnector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FencerConnector")
    }
}

impl PartialEq for FencerConnector {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for FencerConnector {}

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
