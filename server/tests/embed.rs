//! A host agent inside another program: the same services over pipes in memory, without a socket or a
//! thread of its own.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::io;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use shootdown_core::Incarnation;
use shootdown_core::session::SessionConfig;
use shootdown_proto::v1;
use shootdown_proto::v1::admin_service_client::AdminServiceClient;
use shootdown_proto::v1::notifier_service_client::NotifierServiceClient;
use shootdown_proto::v1::page_service_client::PageServiceClient;
use shootdown_server::clock::Clock;
use shootdown_server::source::memory::FrameStore;
use shootdown_server::{Host, HostConfig, QuarantineBudget, embed};
use tokio::io::DuplexStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

type Incoming = ReceiverStream<io::Result<DuplexStream>>;

/// A way in, and the host agent's end of it.
fn way_in() -> (Channel, Incoming) {
    let (tx, rx) = mpsc::channel(1);
    let connect = tower::service_fn(move |_| {
        let tx = tx.clone();
        async move {
            let (ours, theirs) = tokio::io::duplex(1 << 16);
            tx.send(Ok(theirs)).await.map_err(|_| io::Error::from(io::ErrorKind::ConnectionRefused))?;
            Ok::<_, io::Error>(TokioIo::new(ours))
        }
    });
    let channel = Endpoint::from_static("http://in-memory").connect_with_connector_lazy(connect);
    (channel, ReceiverStream::new(rx))
}

fn host() -> Host {
    let config = HostConfig {
        session: SessionConfig::default(),
        max_sessions: 4,
        max_address_spaces: 4,
        max_rounds_in_flight: 4,
        stage_timing: false,
        incarnation: Incarnation::FIRST,
        clock: Clock::BOOTTIME,
        fencers: Vec::new(),
        quarantine: QuarantineBudget { bytes: u64::MAX, pages: u64::MAX },
        source_fault_timeout: shootdown_server::source::rpc::DEFAULT_FAULT_TIMEOUT,
    };
    Host::new(config, tokio::runtime::Handle::current())
}

#[tokio::test]
async fn each_way_in_offers_its_own_services_and_gives_its_own_leave() {
    let (host, frames, stop) = (host(), FrameStore::new(1).unwrap(), CancellationToken::new());
    let (source, sources) = way_in();
    let (administrator, administrators) = way_in();
    let (device, devices) = way_in();
    let peers = async {
        let mut notifier = NotifierServiceClient::new(source);
        let register = v1::RegisterAddressSpaceRequest { name: "embedded".to_owned(), ..Default::default() };
        let registered = notifier.register_address_space(register.clone()).await.unwrap().into_inner();
        let mut admin = AdminServiceClient::new(administrator);
        let listed = admin.list_address_spaces(v1::ListAddressSpacesRequest::default()).await.unwrap();
        let listed = listed.into_inner().address_spaces;
        assert_eq!(listed.len(), 1);
        assert_eq!(listed[0].address_space_id, registered.address_space_id);
        // A device may neither invalidate nor list; of frames it reads none without a session.
        let refused = NotifierServiceClient::new(device.clone()).register_address_space(register).await;
        assert_eq!(refused.unwrap_err().code(), Code::Unimplemented);
        let refused =
            AdminServiceClient::new(device.clone()).list_sessions(v1::ListSessionsRequest::default()).await;
        assert_eq!(refused.unwrap_err().code(), Code::Unimplemented);
        let spans = vec![v1::FrameSpan { frame: 0, offset: 0, length: 1 }];
        let read = v1::ReadRequest { session_id: 1, epoch: 1, spans };
        let refused = PageServiceClient::new(device).read(read).await.unwrap_err();
        assert_eq!(refused.code(), Code::NotFound, "{refused}");
        stop.cancel();
    };
    let all = async {
        tokio::join!(
            embed::serve_devices(&host, &frames, devices, stop.clone()),
            embed::serve_sources(&host, sources, stop.clone()),
            embed::serve_administrators(&host, administrators, stop.clone()),
            embed::watch(host.clone(), stop.clone()),
            peers,
        )
    };
    // All of them return when they are told to stop, with their connections still open.
    tokio::time::timeout(Duration::from_secs(20), Box::pin(all)).await.expect("told to stop, they stop");
}
