//! `shootdownd` as a process: its flags, its exit codes, its signals, its listeners.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::path::Path;
use std::process::{Command, Output};

use common::daemon::{DAEMON, Daemon};
use common::{Device, connect, soon};
use rustix::process::Signal;
use shootdown_proto::v1;
use shootdown_proto::v1::session_request::Message as Ask;
use shootdown_proto::v1::session_response::Message as Say;

fn run(arguments: &[&str]) -> Output {
    Command::new(DAEMON).args(arguments).env_remove("RUST_LOG").output().unwrap()
}

/// Returns when it listens.
fn start(arguments: &[&str]) -> Daemon {
    let mut command = Command::new(DAEMON);
    command.args(arguments);
    Daemon::start(command)
}

fn flag(folder: &Path, name: &str) -> String {
    format!("unix:{}", folder.join(name).display())
}

#[test]
fn a_wrong_flag_is_a_usage_error_and_a_wrong_setting_exits_78() {
    assert_eq!(run(&["--no-such-flag"]).status.code(), Some(2));
    for wrong in [
        &[][..],
        &["--listen", "127.0.0.1:0", "--window", "0"],
        &["--listen", "0.0.0.0:0"],
        &["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"],
        &["--config", "/nowhere/at/all.toml"],
        &["--listen", "127.0.0.1:0", "--fence-command", "/nowhere/at/all"],
        &["--listen", "127.0.0.1:0", "--fence-command", "/nowhere/at/all", "check-config"],
        &["--listen", "127.0.0.1:0", "--fence-timeout", "1s"],
    ] {
        let output = run(wrong);
        assert_eq!(output.status.code(), Some(78), "{wrong:?}: {output:?}");
        assert!(!output.stderr.is_empty(), "it says what to do");
    }
}

#[test]
fn a_wrong_config_file_is_named_with_the_line_and_check_config_accepts_a_right_one() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("shootdownd.toml");
    std::fs::write(&file, "listen = ['127.0.0.1:0']\nwindow = 'wide'\n").unwrap();
    let path = file.to_str().unwrap();
    let output = run(&["check-config", "--config", path]);
    assert_eq!(output.status.code(), Some(78));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains(path) && text.contains("line 2"), "{text}");
    std::fs::write(&file, "listen = ['127.0.0.1:0']\nwindow = 8\nlease = '3s'\n").unwrap();
    assert_eq!(run(&["check-config", "--config", path]).status.code(), Some(0));
}

/// The rules can be broken on purpose by the checker only: not by anything in the daemon as shipped.
#[test]
fn the_daemon_knows_no_way_to_break_a_rule() {
    assert_eq!(run(&["--listen", "127.0.0.1:0", "--break", "release-before-ack"]).status.code(), Some(2));
    let binary = std::fs::read(DAEMON).unwrap();
    let holds = |word: &str| binary.windows(word.len()).any(|window| window == word.as_bytes());
    assert!(holds("listening for devices"), "the search finds what is there");
    for rule in ["release-before-ack", "skip-one-target", "flush-after-ack", "grant-in-window"] {
        assert!(!holds(rule), "{rule}");
    }
}

#[test]
fn a_second_daemon_on_the_same_socket_exits_69() {
    let folder = tempfile::tempdir().unwrap();
    let listen = flag(folder.path(), "device.sock");
    let _first = start(&["--listen", &listen]);
    let second = run(&["--listen", &listen]);
    assert_eq!(second.status.code(), Some(69), "{second:?}");
}

/// Its Unix sockets can be.
#[test]
fn a_tcp_port_that_is_held_cannot_be_taken_over_and_the_error_says_what_to_do() {
    let state = tempfile::tempdir().unwrap();
    let held = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = held.local_addr().unwrap().to_string();
    let state = state.path().to_str().unwrap();
    let output = run(&["--listen", &address, "--state-dir", state, "--take-over"]);
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(69), "{told}");
    assert!(told.contains(&address) && told.contains("fd://NAME") && told.contains("kill"), "{told}");
}

#[tokio::test]
async fn it_listens_on_several_sockets_at_once_and_on_tcp() {
    let folder = tempfile::tempdir().unwrap();
    let (one, two) = (flag(folder.path(), "one.sock"), flag(folder.path(), "two.sock"));
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let tcp = format!("127.0.0.1:{port}");
    let _daemon = start(&["--listen", &one, "--listen", &two, "--listen", &tcp, "--shards", "2"]);
    let tcp = tonic::transport::Endpoint::from_shared(format!("http://{tcp}")).unwrap();
    for (name, channel) in [
        ("one", connect(&folder.path().join("one.sock")).await),
        ("two", connect(&folder.path().join("two.sock")).await),
        ("tcp", soon(tcp.connect()).await.unwrap()),
    ] {
        let mut device = Device::on(channel);
        device.hello(name).await;
        device.settled().await;
    }
}

#[tokio::test]
async fn sigterm_drains_and_exits_0_within_its_bound() {
    let folder = tempfile::tempdir().unwrap();
    let listen = flag(folder.path(), "device.sock");
    let daemon = start(&["--listen", &listen, "--drain-timeout", "10s"]);
    let mut device = Device::on(connect(&folder.path().join("device.sock")).await);
    device.hello("polite").await;
    daemon.signal(Signal::TERM);
    assert!(matches!(device.say().await, Say::Drain(_)));
    device.ask(Ask::Leave(v1::Leave {})).await;
    daemon.ended_as_planned().await;
    assert!(!folder.path().join("device.sock").exists(), "its socket is gone");
    // One that does not leave is cut when the time is over.
    let daemon = start(&["--listen", &listen, "--drain-timeout", "100ms"]);
    let mut device = Device::on(connect(&folder.path().join("device.sock")).await);
    device.hello("stubborn").await;
    daemon.signal(Signal::TERM);
    daemon.ended_as_planned().await;
}

/// Trap 30: a monitor that took an interrupted wait for its end. `epoll_wait` returns EINTR to a process that
/// was stopped and goes on, and to one whose handler ran.
#[tokio::test]
async fn signals_in_the_middle_of_rounds_lose_none() {
    let folder = tempfile::tempdir().unwrap();
    let (listen, source) = (flag(folder.path(), "device.sock"), flag(folder.path(), "source.sock"));
    let daemon = start(&["--listen", &listen, "--source-listen", &source, "--lease", "60s"]);
    let mut device = Device::on(connect(&folder.path().join("device.sock")).await);
    device.hello("gpu").await;
    let channel = connect(&folder.path().join("source.sock")).await;
    let mut notifier = v1::notifier_service_client::NotifierServiceClient::new(channel);
    let register = v1::RegisterAddressSpaceRequest::default();
    let address_space_id =
        notifier.register_address_space(register).await.unwrap().into_inner().address_space_id;
    let range = v1::AddressRange { start: 4096, end: 8192, all: false };
    device.try_subscribe(address_space_id, vec![range]).await.unwrap();
    for number in 1..=50 {
        let mut caller = notifier.clone();
        let start = v1::InvalidatePageRequest {
            address_space_id,
            address: 4096,
            cause: v1::Cause::Unmap.into(),
            ..v1::InvalidatePageRequest::default()
        };
        let calling = tokio::spawn(async move { caller.invalidate_page(start).await });
        for signal in [Signal::STOP, Signal::CONT] {
            daemon.signal(signal);
        }
        assert_eq!(device.notice().await.number, number);
        for signal in [Signal::STOP, Signal::CONT] {
            daemon.signal(signal);
        }
        assert!(!calling.is_finished(), "nothing but the ack ends the round");
        device.ack(number).await;
        let result = soon(calling).await.unwrap().unwrap().into_inner().result.unwrap();
        assert_eq!(result.verdict(), v1::Verdict::Quiesced);
    }
}

/// The words of the command in a section of a document, without the program's.
fn command_in(document: &str, section: &str) -> Vec<String> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(document);
    let text = std::fs::read_to_string(file).unwrap();
    let block = text.split_once(section).unwrap().1.split_once("```sh\n").unwrap().1;
    let block = block.split_once("```").unwrap().0.replace("\\\n", " ");
    let mut words = block.split_whitespace().map(str::to_owned);
    assert_eq!(words.next().as_deref(), Some("shootdownd"));
    words.collect()
}

#[test]
fn the_settings_that_the_document_of_faults_shows_are_right() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/faults.md");
    let text = std::fs::read_to_string(file).unwrap();
    let shown = text.split_once("```toml\n").unwrap().1.split_once("```").unwrap().0;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("shown.toml");
    // A program that there is here.
    let (theirs, ours) = ("/usr/local/sbin/fence-device", "/bin/sh");
    assert!(shown.contains(theirs));
    std::fs::write(&path, shown.replace(theirs, ours)).unwrap();
    let checked = run(&["check-config", "--config", path.to_str().unwrap()]);
    assert_eq!(checked.status.code(), Some(0), "{}", String::from_utf8_lossy(&checked.stderr));
}

/// Its paths and its port are the machine's; in the test they are the test's own.
#[tokio::test]
async fn the_command_that_the_document_of_the_memory_source_shows_starts_a_daemon_that_swaps() {
    let folder = tempfile::tempdir().unwrap();
    let (swap, source) = (folder.path().join("swap"), folder.path().join("source"));
    std::fs::write(&swap, "pages of address spaces that are gone").unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let tcp = format!("127.0.0.1:{port}");
    let shown = [
        ("127.0.0.1:7400", tcp.clone()),
        ("unix:/run/shootdown/source", format!("unix:{}", source.display())),
        ("/var/lib/shootdown/swap", swap.display().to_string()),
    ];
    let mut words = command_in("memory-source.md", "## Use it");
    for (theirs, ours) in shown {
        let word = words.iter_mut().find(|word| *word == theirs);
        *word.unwrap_or_else(|| panic!("the command has no {theirs}")) = ours;
    }
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let _daemon = start(&words);
    assert_eq!(std::fs::metadata(&swap).unwrap().len(), 0, "the swap file is emptied at the start");
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{tcp}")).unwrap();
    let mut device = Device::on(soon(endpoint.connect()).await.unwrap());
    device.hello("reader").await;
    device.settled().await;
    connect(&source).await;
}
