//! The agent as a process: `shootdown-agent`.
#![cfg(feature = "agent")]
#![allow(clippy::unwrap_used, reason = "a helper of tests, which fail by panicking")]

mod host;

use std::process::Stdio;

use assert_cmd::cargo::CommandCargoExt as _;
use host::{FakeHost, FakeSession, grant_of, notice, number, page, soon, welcome};
use shootdown_client::{Reason, SubscriptionId};
use shootdown_proto::message::{DeviceSays, HostSays, SessionError};
use tokio::process::{Child, Command};

fn agent(host: &FakeHost, arguments: &[&str]) -> Command {
    let mut command: Command = std::process::Command::cargo_bin("shootdown-agent").unwrap().into();
    command.args(["--host-agent", &host.endpoint.to_string(), "--device-id", "agent-1"]).args(arguments);
    command.stderr(Stdio::piped()).kill_on_drop(true);
    command
}

async fn welcomed(host: &mut FakeHost) -> FakeSession {
    let mut session = host.session().await;
    let Some(DeviceSays::Hello(hello)) = soon(session.next()).await else { panic!("Hello comes first") };
    assert_eq!(hello.device.as_str(), "agent-1");
    session.say(HostSays::Welcome(welcome(hello.window.unwrap()))).await;
    session
}

fn terminate(child: &Child) {
    let pid = rustix::process::Pid::from_raw(child.id().unwrap() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
}

/// A real process, a real socket: subscribe, fault, flush, ack, SIGTERM, leave.
#[tokio::test]
async fn an_agent_works_acks_and_leaves_when_it_is_terminated() {
    let mut host = FakeHost::start();
    let arguments =
        ["--address-space", "11", "--range", "0x1000..0x2000", "--workers", "2", "--flush-time", "fixed:1ms"];
    let child = agent(&host, &arguments).spawn().unwrap();
    let mut session = welcomed(&mut host).await;
    let (mut acked, mut faults) = (false, 0);
    while !acked {
        match session.hear().await {
            DeviceSays::Subscribe(subscribe) => {
                assert_eq!(subscribe.ranges, [page(1)]);
                let (request, subscription) = (subscribe.request, SubscriptionId::FIRST);
                session.say(HostSays::Subscribed { request, subscription, seq: None }).await;
            }
            DeviceSays::Fault(fault) => {
                session.say(HostSays::Grant(grant_of(&fault))).await;
                faults += 1;
                if faults == 1 {
                    session.notices([notice(1, page(1))]).await;
                }
            }
            DeviceSays::Ack { ack, .. } => acked = ack.through == Some(number(1)),
            other => panic!("{other:?}"),
        }
    }
    terminate(&child);
    let mut last = None;
    while let Some(says) = soon(session.next()).await {
        if let DeviceSays::Fault(fault) = &says {
            session.say(HostSays::Grant(grant_of(fault))).await;
        }
        last = Some(says);
    }
    assert_eq!(last, Some(DeviceSays::Leave));
    drop(session);
    let output = soon(child.wait_with_output()).await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[tokio::test]
async fn the_exit_code_says_what_to_do() {
    let mut host = FakeHost::start();
    // 69: nobody is there.
    let mut absent: Command = std::process::Command::cargo_bin("shootdown-agent").unwrap().into();
    absent.args(["--host-agent", "unix:/nonexistent/socket", "--device-id", "agent-1"]);
    assert_eq!(soon(absent.output()).await.unwrap().status.code(), Some(69));
    // 77: not allowed.
    let refused = agent(&host, &[]).spawn().unwrap();
    let mut session = host.session().await;
    soon(session.next()).await.unwrap();
    session.say(HostSays::Error(SessionError::fatal(Reason::PermissionDenied, "not you"))).await;
    let output = soon(refused.wait_with_output()).await.unwrap();
    assert_eq!(output.status.code(), Some(77));
    assert!(String::from_utf8_lossy(&output.stderr).contains("not you"), "a person is told why");
    // 75: start it again, where the host agent could not resume.
    let lost = agent(&host, &[]).spawn().unwrap();
    drop(welcomed(&mut host).await);
    let mut session = host.session().await;
    let Some(DeviceSays::Hello(hello)) = soon(session.next()).await else { panic!("Hello comes first") };
    assert_eq!(hello.resume.map(|point| point.session), Some(welcome(1).session));
    session.say(HostSays::Welcome(welcome(hello.window.unwrap()))).await;
    assert_eq!(soon(lost.wait_with_output()).await.unwrap().status.code(), Some(75));
}

#[test]
fn check_config_says_whether_a_configuration_would_do() {
    let check = |arguments: &[&str]| {
        let mut command = std::process::Command::cargo_bin("shootdown-agent").unwrap();
        command.arg("check-config").args(["--device-id", "d"]).args(arguments).output().unwrap()
    };
    assert!(check(&["--host-agent", "unix:/a"]).status.success());
    let plaintext = check(&["--host-agent", "tcp://198.51.100.1:7400"]);
    assert_eq!(plaintext.status.code(), Some(78));
    assert!(String::from_utf8_lossy(&plaintext.stderr).contains("--insecure"));
    assert_eq!(check(&[]).status.code(), Some(78));
}
