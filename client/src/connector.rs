//! How a connection to a host agent is made.

use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;

use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::endpoint::Endpoint;

/// What connects to an [`Endpoint`]: the system's sockets, or a transport of one's own (a tunnel, a virtual
/// socket, the network of a simulation). What it makes must carry bytes in order, and both ways at once.
#[derive(Clone, Default)]
pub struct Connector(Source);

#[derive(Clone, Default)]
enum Source {
    #[default]
    System,
    Function(Arc<dyn Fn(Endpoint) -> Connecting + Send + Sync>),
}

type Connecting = Pin<Box<dyn Future<Output = io::Result<Carrier>> + Send>>;

/// A connection as the gRPC library takes it.
pub(crate) type Carrier = TokioIo<Box<dyn Duplex>>;

/// Both halves of a connection.
pub(crate) trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<C: AsyncRead + AsyncWrite + Send + Unpin> Duplex for C {}

impl Connector {
    /// TCP and Unix sockets.
    #[must_use]
    pub const fn system() -> Self {
        Self(Source::System)
    }

    /// Whatever `connect` makes of an endpoint. It is called for each connection: one for the session, and
    /// one more where bytes are moved by [`PageClient`](crate::PageClient). It need not bound its time,
    /// [`DeviceConfig::connect_timeout`](crate::DeviceConfig::connect_timeout) does.
    pub fn from_fn<C, F>(connect: impl Fn(Endpoint) -> F + Send + Sync + 'static) -> Self
    where
        C: AsyncRead + AsyncWrite + Send + Unpin + 'static,
        F: Future<Output = io::Result<C>> + Send + 'static,
    {
        Self(Source::Function(Arc::new(move |endpoint| {
            let connecting = connect(endpoint);
            Box::pin(async move { Ok(TokioIo::new(Box::new(connecting.await?) as Box<dyn Duplex>)) })
        })))
    }

    /// What connects to `endpoint`, unless the system does.
    pub(crate) fn own(
        &self,
        endpoint: &Endpoint,
    ) -> Option<impl Fn() -> Connecting + Send + 'static + use<>> {
        match &self.0 {
            Source::System => None,
            Source::Function(connect) => {
                let (connect, endpoint) = (Arc::clone(connect), endpoint.clone());
                Some(move || connect(endpoint.clone()))
            }
        }
    }
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Source::System => "Connector(system)",
            Source::Function(_) => "Connector(function)",
        })
    }
}
