//! Connections that are opened and not used: what they may cost the others.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use common::daemon::{DAEMON, Daemon, listens_in};
use common::{Agent, Device, connect, pages, soon, until};
use shootdown_proto::v1;
use shootdown_proto::v1::session_request::Message as Ask;
use shootdown_proto::v1::session_response::Message as Say;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// With 200 open files.
fn start(folder: &Path) -> Daemon {
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -n 200; exec \"$0\" \"$@\"", DAEMON]);
    command.args(listens_in(folder)).args(["--shards", "1", "--drain-timeout", "1s"]);
    Daemon::start(command)
}

#[tokio::test]
async fn silent_connections_of_devices_keep_neither_sources_nor_administrators_nor_later_devices_out() {
    let folder = tempfile::tempdir().unwrap();
    let daemon = start(folder.path());
    let socket = folder.path().join("device");
    let silent = tokio::task::spawn_blocking(move || {
        (0..300).map(|_| UnixStream::connect(&socket).unwrap()).collect::<Vec<_>>()
    });
    let silent = soon(silent).await.unwrap();

    let mut notifier = v1::notifier_service_client::NotifierServiceClient::new(
        soon(connect(&folder.path().join("source"))).await,
    );
    soon(notifier.register_address_space(v1::RegisterAddressSpaceRequest::default())).await.unwrap();
    let mut admin =
        v1::admin_service_client::AdminServiceClient::new(soon(connect(&folder.path().join("admin"))).await);
    soon(admin.list_sessions(v1::ListSessionsRequest::default())).await.unwrap();
    until(|| daemon.says("as many connections as")).await;
    assert!(daemon.times_said("as many connections as") < 5, "a line for each would fill the log");
    assert!(!daemon.says("could not be accepted"), "it never ran out");

    drop(silent);
    soon(async {
        loop {
            let Ok(mut device) = Device::try_on(&folder.path().join("device")).await else { continue };
            device.ask(Ask::Hello(Device::hello_of("late"))).await;
            // Its connection may have come before the others were seen to end.
            if let Ok(Some(said)) = device.next().await {
                return assert!(matches!(said, Say::Welcome(_)), "{said:?}");
            }
        }
    })
    .await;
}

/// Reads until the host agent closes the connection.
async fn closed(connection: &mut tokio::net::UnixStream) {
    let mut said = Vec::new();
    // What a peer reads that the other side has closed may also be a reset.
    drop(soon(connection.read_to_end(&mut said)).await);
}

async fn open(agent: &Agent) -> tokio::net::UnixStream {
    tokio::net::UnixStream::connect(agent.socket("device.sock")).await.unwrap()
}

#[tokio::test]
async fn a_connection_beyond_the_limit_is_closed_at_once_and_there_is_room_when_another_ends() {
    let agent = Agent::start_with(|config| config.connections.most = 2);
    let mut device = agent.device("gpu").await;
    let silent = open(&agent).await;
    closed(&mut open(&agent).await).await;
    drop(silent);
    // The host agent has to see that it was closed first.
    soon(async {
        loop {
            if let Ok(mut second) = Device::try_on(&agent.socket("device.sock")).await {
                second.ask(Ask::Hello(Device::hello_of("second"))).await;
                if let Ok(Some(Say::Welcome(_))) = second.next().await {
                    return;
                }
            }
        }
    })
    .await;
    device.settled().await;
}

#[tokio::test]
async fn a_connection_on_which_nothing_is_asked_is_closed_and_one_that_was_used_stays() {
    let agent = Agent::start_with(|config| config.connections.first_request_within = Duration::from_secs(1));
    let space = agent.space();
    let mut device = agent.device("gpu").await;
    // As a page client's: used once, then idle.
    let once = Mutex::new(Some(open(&agent).await));
    let connector = tower::service_fn(move |_| {
        let socket = once.lock().unwrap().take().ok_or(std::io::ErrorKind::NotConnected);
        async move { socket.map(hyper_util::rt::TokioIo::new).map_err(std::io::Error::from) }
    });
    let idle = tonic::transport::Endpoint::from_static("http://localhost");
    let idle = idle.connect_with_connector(connector).await.unwrap();
    let mut health = tonic_health::pb::health_client::HealthClient::new(idle);
    health.check(tonic_health::pb::HealthCheckRequest::default()).await.unwrap();

    let mut silent = open(&agent).await;
    let mut spoke = open(&agent).await;
    // HTTP/2's preface and empty settings, and pings for as long as anybody listens: all but a request.
    spoke.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00").await.unwrap();
    let (mut said, mut says) = spoke.into_split();
    let pings = tokio::spawn(async move {
        while says.write_all(b"\x00\x00\x08\x06\x00\x00\x00\x00\x0012345678").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    closed(&mut silent).await;
    let mut heard = Vec::new();
    drop(soon(said.read_to_end(&mut heard)).await);
    soon(pings).await.unwrap();

    // By now its time would be up, too.
    device.subscribe(space, pages(0, 1)).await;
    health.check(tonic_health::pb::HealthCheckRequest::default()).await.unwrap();
}
