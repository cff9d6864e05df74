//! Which services who is offered, with the settings of their transport: the same for the daemon's shards
//! ([`crate::start`]) and for a host agent inside another program ([`crate::embed`]).

use shootdown_proto::message::MAX_SESSION_MESSAGE;
use shootdown_proto::v1::admin_service_server::AdminServiceServer;
use shootdown_proto::v1::device_service_server::DeviceServiceServer;
use shootdown_proto::v1::notifier_service_server::NotifierServiceServer;
use shootdown_proto::v1::page_service_server::PageServiceServer;
use tonic::body::Body;
use tonic::codegen::http;
use tonic::transport::Server;
use tower::layer::util::{Identity, Stack};
use tower::util::MapRequestLayer;

use crate::listen::Peer;
use crate::service::admin::Admin;
use crate::service::device::Devices;
use crate::service::notifier::Notifiers;
use crate::service::page::Pages;

/// What a device says is small and read at once. The window is fixed: an adaptive one starts so low
/// that 136 unread tiny frames end a connection (RUSTSEC-2026-0258).
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;

/// Streams of one connection: a session, and reads and writes of frames.
const MOST_STREAMS: u32 = 256;

/// Reads and writes of frames: 256 spans of a page each, and room for the rest.
pub(crate) const MOST_PAGE_BYTES: usize = 2 << 20;

type Seen = MapRequestLayer<fn(http::Request<Body>) -> http::Request<Body>>;
pub(crate) type Router = tonic::transport::server::Router<Stack<Seen, Identity>>;

/// Sessions, and reads and writes of frames.
pub(crate) fn for_devices(devices: Devices, pages: Pages) -> Router {
    server()
        .add_service(DeviceServiceServer::new(devices).max_decoding_message_size(MAX_SESSION_MESSAGE))
        .add_service(
            PageServiceServer::new(pages)
                .max_decoding_message_size(MOST_PAGE_BYTES)
                .max_encoding_message_size(MOST_PAGE_BYTES),
        )
}

/// The notifier methods.
pub(crate) fn for_sources(notifiers: Notifiers) -> Router {
    server().add_service(NotifierServiceServer::new(notifiers).max_decoding_message_size(MAX_SESSION_MESSAGE))
}

/// Listings, and what an administrator may do.
pub(crate) fn for_administrators(admin: Admin) -> Router {
    server().add_service(AdminServiceServer::new(admin))
}

/// No HTTP/2 keepalive: a session that falls silent is found by its lease, and a connection without one
/// by TCP's own keepalive (see [`crate::listen`]), neither of which needs a timer on the shard.
fn server() -> Server<Stack<Seen, Identity>> {
    Server::builder()
        .layer(MapRequestLayer::new(seen as fn(_) -> _))
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(MOST_STREAMS)
}

/// Of every request, whatever it is for: a connection on which there is one is in use.
fn seen(request: http::Request<Body>) -> http::Request<Body> {
    if let Some(peer) = request.extensions().get::<Peer>() {
        peer.on_request();
    }
    request
}
