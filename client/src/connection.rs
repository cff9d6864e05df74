//! A gRPC connection to a host agent: the only settings of the transport in this crate.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use shootdown_proto::error::Reason;
use tonic::transport::Channel;

use crate::config::DeviceConfig;
use crate::connector::Connector;
use crate::endpoint::Endpoint;

/// What may be unread on a connection, in bytes. h2 closes a connection when half of it, counted in
/// frames of at least 256 bytes, is unread: 32,768 notices in frames of their own, 32 default windows.
const CONNECTION_WINDOW: u32 = 16 * 1024 * 1024;
/// What may be unread on one stream, in bytes: 16 of the largest messages.
const STREAM_WINDOW: u32 = 8 * 1024 * 1024;

/// The connection to the host agent failed.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct TransportError {
    message: String,
    reason: Option<Reason>,
    source: Option<Arc<dyn Error + Send + Sync>>,
}

impl TransportError {
    /// What the host agent gave as its reason, if it was the host agent that ended it.
    #[must_use]
    pub fn reason(&self) -> Option<Reason> {
        self.reason
    }

    pub(crate) fn of_status(status: &tonic::Status) -> Self {
        let reason = Reason::of_status(status);
        let message = match status.message() {
            "" => format!("the call ended with {:?}", status.code()),
            said => format!("the call ended with {:?}: {said}", status.code()),
        };
        // A status from the peer has no source; one that the transport made has the transport's error.
        let source = std::error::Error::source(status).map(|error| Arc::new(Text::of(error)) as Arc<_>);
        Self { message, reason, source }
    }

    /// The connection is open, and nothing comes on it.
    pub(crate) fn unheard() -> Self {
        Self { message: "no heartbeat is answered".to_owned(), reason: None, source: None }
    }

    pub(crate) fn of_connect(error: tonic::transport::Error) -> Self {
        Self { message: "no connection".to_owned(), reason: None, source: Some(Arc::new(error)) }
    }
}

/// A chain of errors that could not be cloned, as text.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
struct Text {
    message: String,
    source: Option<Box<Text>>,
}

impl Text {
    fn of(error: &dyn Error) -> Self {
        Self { message: error.to_string(), source: error.source().map(|source| Box::new(Self::of(source))) }
    }
}

/// How a connection is made and watched.
#[derive(Debug, Clone)]
pub(crate) struct Watch {
    pub(crate) connector: Connector,
    pub(crate) connect_timeout: Duration,
    pub(crate) keepalive: Duration,
}

/// A silent connection is tried once in this part of a lease, and given up after two of them.
const KEEPALIVES_A_LEASE: u32 = 4;

impl Watch {
    /// For a session whose lease is known.
    pub(crate) fn within(lease: Duration, config: &DeviceConfig) -> Self {
        let keepalive = config.keepalive.min(lease / KEEPALIVES_A_LEASE);
        Self { keepalive, ..Self::of(config) }
    }

    pub(crate) fn of(config: &DeviceConfig) -> Self {
        Self {
            connector: config.connector.clone(),
            connect_timeout: config.connect_timeout,
            keepalive: config.keepalive,
        }
    }
}

/// # Cancel safety
/// Dropping it closes the connection.
pub(crate) async fn connect(endpoint: &Endpoint, watch: &Watch) -> Result<Channel, TransportError> {
    let settings = settings(endpoint, watch)?;
    let channel = match watch.connector.own(endpoint) {
        None => settings.connect().await,
        Some(connect) => {
            let connect = tower::service_fn(move |_| connect());
            settings.connect_with_connector(connect).await
        }
    };
    channel.map_err(TransportError::of_connect)
}

/// Connects at the first call, and again at the next call after it was lost: right for calls that stand
/// alone, wrong for a session.
pub(crate) fn connect_lazy(endpoint: &Endpoint, watch: &Watch) -> Result<Channel, TransportError> {
    let settings = settings(endpoint, watch)?;
    Ok(match watch.connector.own(endpoint) {
        None => settings.connect_lazy(),
        Some(connect) => settings.connect_with_connector_lazy(tower::service_fn(move |_| connect())),
    })
}

fn settings(endpoint: &Endpoint, watch: &Watch) -> Result<tonic::transport::Endpoint, TransportError> {
    let settings =
        tonic::transport::Endpoint::from_shared(endpoint.uri()).map_err(TransportError::of_connect)?;
    Ok(settings
        .connect_timeout(watch.connect_timeout)
        .tcp_nodelay(true)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .initial_stream_window_size(STREAM_WINDOW)
        .http2_adaptive_window(false)
        .http2_keep_alive_interval(watch.keepalive)
        .keep_alive_timeout(watch.keepalive)
        .keep_alive_while_idle(true))
}
