//! A successor on the same state, or on the same sockets.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::Signal;
use shootdown_proto::error::Reason;
use shootdown_proto::v1;
use shootdown_proto::v1::session_request::Message as Ask;
use shootdown_proto::v1::session_response::Message as Say;
use shootdown_server::config::{StateConfig, Takeover};
use shootdown_server::source::{Notifier as _, NotifyError};
use tonic::Code;

use crate::common::daemon::{DAEMON, Daemon};
use crate::common::{Agent, Device, pages, quiesced, soon, unmap, wire};
use crate::place::{Place, invalidate, register};

#[tokio::test]
async fn a_second_daemon_on_the_same_state_is_refused() {
    let place = Place::new();
    let _first = place.start(&[]);
    let other = format!("unix:{}", place.path("other").display());
    let state = place.path("state");
    let second = Command::new(DAEMON)
        .args(["--listen", &other, "--state-dir", state.to_str().unwrap()])
        .output()
        .unwrap();
    assert_eq!(second.status.code(), Some(75), "{second:?}");
    assert!(String::from_utf8(second.stderr).unwrap().contains("--take-over"));
    place.hello("welcome").await.settled().await;
    // Without a state directory there is nothing to take over.
    let lost = Command::new(DAEMON).args(["--listen", &other, "--take-over"]).output().unwrap();
    assert_eq!(lost.status.code(), Some(78), "{lost:?}");
}

#[tokio::test]
async fn a_stopped_host_agent_that_was_taken_over_from_refuses_everybody_and_ends() {
    let place = Place::new();
    let mut old = place.start(&["--lease", "60s"]);
    let mut to_old = place.notifier().await;
    let space = register(&mut to_old).await;
    let mut device = place.hello("old").await;
    device.try_subscribe(space, vec![wire(pages(8, 4))]).await.unwrap();
    old.signal(Signal::STOP);
    let successor = place.start(&["--lease", "60s", "--take-over"]);
    // The device goes over to the successor, and there is nobody else to wait for there.
    let mut back = place.hello("old").await;
    back.settled().await;
    assert!(back.session > device.session);
    let mut to_new = place.notifier().await;
    let new_space = register(&mut to_new).await;
    let result = invalidate(&mut to_new, new_space, None).await.unwrap();
    assert_eq!(result.verdict(), v1::Verdict::Quiesced);

    // Nobody is a target of this, so only the look at the journal stands in its way.
    let asked = tokio::spawn(async move { invalidate(&mut to_old, space, None).await });
    device.beat().await;
    old.signal(Signal::CONT);
    let refused = soon(asked).await.unwrap().unwrap_err();
    if refused.code() != Code::Unavailable && refused.code() != Code::Unknown {
        let reason = Reason::of_status(&refused).unwrap();
        assert!(matches!(reason, Reason::HostSuperseded | Reason::Draining), "{refused:?}");
    }
    loop {
        match device.next().await {
            Ok(Some(Say::Error(error))) => assert_eq!(error.reason(), Reason::HostSuperseded),
            Ok(Some(other)) => panic!("its lease is not renewed: {other:?}"),
            Ok(None) | Err(_) => break,
        }
    }
    assert_eq!(old.exit_code().await, Some(75));
    assert!(old.says("a successor has taken the state directory over"));
    // Its end took nothing away from the successor.
    back.settled().await;
    place.hello("another").await.settled().await;
    drop(successor);
}

#[tokio::test]
async fn a_host_agent_that_nobody_talks_to_finds_by_itself_that_it_was_taken_over_from() {
    let place = Place::new();
    let mut old = place.start(&[]);
    let _successor = place.start(&["--take-over"]);
    assert_eq!(old.exit_code().await, Some(75));
    place.hello("gpu").await.settled().await;
}

/// Each place that looks at the journal, before the watchdog does.
#[tokio::test]
async fn who_is_taken_over_from_vouches_for_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let on = |takeover| {
        let state = StateConfig { dir: folder.path().to_owned(), takeover };
        Agent::start_with(|config| config.state = Some(state))
    };
    // Its watchdog looks once a second.
    let old = on(Takeover::Never);
    let space = old.space();
    let mut device = old.device("gpu").await;
    device.subscribe(space, pages(0, 4)).await;
    let _idle = old.device("idle").await;
    let host = old.host().clone();
    let waits = tokio::spawn(async move { host.invalidate_range_start(unmap(space, pages(0, 1))).await });
    let notice = device.notice().await;

    let successor = on(Takeover::IfHeld);
    device.ack_if_open(notice.number).await;
    let refused = soon(waits).await.unwrap().unwrap_err();
    assert_eq!(refused, NotifyError::Superseded, "an ack to the old is no leave to release");
    // Nor is it that nobody is in the way.
    let refused = old.host().invalidate_range_start(unmap(space, pages(9, 1))).await.unwrap_err();
    assert_eq!(refused, NotifyError::Superseded);
    soon(old.running.as_ref().unwrap().superseded()).await;
    // The successor waits for both.
    let early = successor.space();
    let round = successor.round(early, pages(0, 1));
    for name in ["gpu", "idle"] {
        successor.device(name).await.settled().await;
    }
    assert_eq!(quiesced(round).await.len(), 2);
}

#[tokio::test]
async fn a_host_agent_that_was_taken_over_from_renews_no_lease() {
    let folder = tempfile::tempdir().unwrap();
    let on = |takeover| {
        let state = StateConfig { dir: folder.path().to_owned(), takeover };
        Agent::start_with(|config| config.state = Some(state))
    };
    let old = on(Takeover::Never);
    let mut device = old.device("gpu").await;
    device.settled().await;
    let _successor = on(Takeover::IfHeld);
    device.beat().await;
    assert_eq!(device.last_word().await.0.reason(), Reason::HostSuperseded);
}

#[tokio::test]
async fn a_hello_to_a_host_agent_that_was_taken_over_from_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let on = |takeover| {
        let state = StateConfig { dir: folder.path().to_owned(), takeover };
        Agent::start_with(|config| config.state = Some(state))
    };
    let old = on(Takeover::Never);
    let mut late = Device::connect(&old).await;
    let _successor = on(Takeover::IfHeld);
    late.ask(Ask::Hello(Device::hello_of("late"))).await;
    assert_eq!(late.last_word().await.0.reason(), Reason::HostSuperseded);
}

/// A daemon that listens on sockets which the test passes to it.
fn activated(place: &Path, device: &UnixListener, source: &UnixListener) -> Daemon {
    let mut command = Command::new("sh");
    let passed = "exec 3<&0 4>&1; LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=device:source exec \"$0\" \"$@\"";
    command.args(["-c", passed, DAEMON, "--listen", "fd://device", "--source-listen", "fd://source"]);
    command.args(["--shards", "1", "--state-dir"]).arg(place.join("state"));
    command.stdin(Stdio::from(OwnedFd::from(device.try_clone().unwrap())));
    command.stdout(Stdio::from(OwnedFd::from(source.try_clone().unwrap())));
    Daemon::start(command)
}

#[tokio::test]
async fn sockets_that_are_passed_outlive_a_host_agent_and_its_successor_answers_on_them() {
    let place = Place::new();
    let device = UnixListener::bind(place.path("device")).unwrap();
    let source = UnixListener::bind(place.path("source")).unwrap();
    let first = activated(place.0.path(), &device, &source);
    place.hello("gpu").await.settled().await;
    register(&mut place.notifier().await).await;
    first.kill();
    // Nobody is there: the connection waits in the kernel's queue.
    let mut early = place.device().await;
    let second = activated(place.0.path(), &device, &source);
    early.hello("gpu").await;
    early.settled().await;
    let refused = place.run(&["--listen", "fd://nobody"]);
    assert_eq!(refused.status.code(), Some(69), "{refused:?}");
    second.end_as_planned().await;
    assert!(place.path("device").exists(), "it is not the host agent's to remove");
}
