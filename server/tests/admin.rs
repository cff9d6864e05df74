//! `shootdownd admin` as a program, against a host agent that runs, hangs, or is not there.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::daemon::{DAEMON, Daemon, listens_in};
use common::{Device, connect, pages, soon, until, wire};
use rustix::process::Signal;
use serde_json::Value;
use shootdown_proto::v1;
use shootdown_proto::v1::notifier_service_client::NotifierServiceClient;
use tonic::transport::Channel;

/// A user that no test is run as.
const NOBODY: u32 = 65_534;

/// A folder with the sockets and the state of host agents that come one after the other.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn socket(&self, name: &str) -> String {
        format!("unix:{}", self.path(name).display())
    }

    /// Returns when it listens.
    fn start(&self, more: &[&str]) -> Daemon {
        let mut command = Command::new(DAEMON);
        command.args(listens_in(self.0.path()));
        command.args(["--shards", "1", "--state-dir"]).arg(self.path("state")).args(more);
        Daemon::start(command)
    }

    fn admin_command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(DAEMON);
        command.arg("admin").args(words).env("SHOOTDOWND_ADMIN_ENDPOINT", self.socket("admin"));
        command
    }

    /// `shootdownd admin`, to its end, while the test's own tasks go on.
    async fn admin(&self, words: &[&str]) -> Output {
        let mut command = self.admin_command(words);
        soon(tokio::task::spawn_blocking(move || command.output().unwrap())).await.unwrap()
    }

    /// What it says to people.
    async fn text(&self, words: &[&str]) -> String {
        let output = self.admin(words).await;
        assert_eq!(output.status.code(), Some(0), "{words:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// What it says to programs.
    async fn json(&self, words: &[&str]) -> Value {
        let text = self.text(&[words, &["--output", "json"]].concat()).await;
        serde_json::from_str(&text).unwrap()
    }

    /// What it says to people when it fails with this exit status.
    async fn refused(&self, code: i32, words: &[&str]) -> String {
        let output = self.admin(words).await;
        assert_eq!(output.status.code(), Some(code), "{words:?}: {output:?}");
        assert!(output.stdout.is_empty(), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    async fn notifier(&self) -> NotifierServiceClient<Channel> {
        NotifierServiceClient::new(connect(&self.path("source")).await)
    }

    /// A device that its lease does not stop.
    async fn unbound_device(&self, name: &str) -> Device {
        let mut device = Device::on(connect(&self.path("device")).await);
        let capabilities = Some(v1::Capabilities { enforces_lease: false, change_pte: true });
        device.welcomed(v1::Hello { capabilities, ..Device::hello_of(name) }).await;
        device
    }
}

async fn register(notifier: &mut NotifierServiceClient<Channel>, name: &str) -> u64 {
    let request = v1::RegisterAddressSpaceRequest { name: name.to_owned(), ..Default::default() };
    notifier.register_address_space(request).await.unwrap().into_inner().address_space_id
}

/// One page.
fn invalidation(space: u64, deadline_ms: Option<u64>) -> v1::InvalidateRangeStartRequest {
    v1::InvalidateRangeStartRequest {
        address_space_id: space,
        range: Some(wire(pages(0, 1))),
        cause: v1::Cause::Unmap.into(),
        deadline_ms,
        ..Default::default()
    }
}

/// The lines of a table below its head, word by word.
fn rows(text: &str) -> Vec<Vec<&str>> {
    text.lines().skip(1).map(|line| line.split_whitespace().collect()).collect()
}

#[tokio::test]
async fn a_grace_period_that_does_not_end_is_ended_by_an_operator() {
    let place = Place::new();
    let first = place.start(&[]);
    let space = register(&mut place.notifier().await, "vm").await;
    let mut device = place.unbound_device("fpga7").await;
    device.try_subscribe(space, vec![wire(pages(0, 4))]).await.unwrap();
    drop(first);
    device.cut();

    let _second = place.start(&[]);
    let mut notifier = place.notifier().await;
    let space = register(&mut notifier, "vm").await;
    let mut caller = notifier.clone();
    let call = tokio::spawn(async move { caller.invalidate_range_start(invalidation(space, None)).await });

    let told = place.text(&["sessions"]).await;
    let survivor = rows(&told).into_iter().find(|row| row[1] == "fpga7");
    let survivor = survivor.unwrap_or_else(|| panic!("the survivor is named: {told}"));
    assert!(told.contains("not enforced"), "why nothing ends it: {told}");
    // Listed as soon as the call has reached the host agent.
    let rounds = soon(async {
        loop {
            let told = place.text(&["rounds"]).await;
            if told.contains("fpga7") {
                return told;
            }
        }
    })
    .await;
    assert!(rounds.contains(&format!("fpga7 (session {})", survivor[0])), "{rounds}");

    // To end it is not enough: nobody has said that the device has stopped.
    assert!(place.text(&["evict", survivor[0]]).await.contains("--cut-off"));
    assert!(place.text(&["rounds"]).await.contains("fpga7"), "no eviction stands for an ack");
    assert!(place.text(&["evict", survivor[0], "--cut-off"]).await.contains("nothing waits for it"));
    let result = soon(call).await.unwrap().unwrap().into_inner().result.unwrap();
    assert_eq!(result.verdict(), v1::Verdict::Quiesced);
    assert_eq!(result.targets[0].outcome(), v1::TargetOutcome::Fenced);
    assert_eq!(place.text(&["rounds"]).await, "no rounds wait\n");
    let refused = place.refused(65, &["evict", survivor[0], "--cut-off"]).await;
    assert!(refused.contains("there is no session") && refused.contains("admin sessions"), "{refused}");
}

/// Its socket is the machine's and its session somebody's; in the test they are the test's own.
#[tokio::test]
async fn the_commands_that_the_document_of_faults_shows_are_right() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/faults.md");
    let text = std::fs::read_to_string(file).unwrap();
    let blocks = text.split("```sh\n").skip(1).filter_map(|rest| rest.split_once("```"));
    let lines: Vec<&str> = blocks.flat_map(|(block, _)| block.lines()).collect();
    assert!(lines.len() >= 6, "{lines:?}");
    let place = Place::new();
    let _daemon = place.start(&[]);
    for line in lines {
        let command = line.split(" #").next().unwrap();
        let words = command.strip_prefix("shootdownd admin ").unwrap_or_else(|| panic!("nobody runs {line}"));
        let device = place.unbound_device("some").await;
        let session = device.session.to_string();
        let theirs = words.split_whitespace();
        let words: Vec<&str> = theirs.map(|word| if word == "7" { session.as_str() } else { word }).collect();
        let told = place.text(&words).await;
        assert!(words[0] != "evict" || told.contains(&format!("session {session} is ")), "{line}: {told}");
        // Nothing is left of it for the next.
        drop(place.admin(&["evict", &session, "--cut-off"]).await);
    }
}

#[tokio::test]
async fn what_waits_and_what_is_parked_is_told_to_people_and_to_programs() {
    let place = Place::new();
    let _daemon = place.start(&["--quarantine-pages", "64"]);
    let mut notifier = place.notifier().await;
    let (quiet, busy) = (register(&mut notifier, "quiet").await, register(&mut notifier, "busy").await);
    assert_eq!(place.text(&["sessions"]).await, "no sessions\n");
    let mut device = place.unbound_device("nic0").await;
    device.try_subscribe(busy, vec![wire(pages(0, 4))]).await.unwrap();
    let answer = soon(notifier.invalidate_range_start(invalidation(busy, Some(1)))).await.unwrap();
    assert_eq!(answer.into_inner().result.unwrap().verdict(), v1::Verdict::NotQuiesced);

    let told = place.text(&["address-spaces"]).await;
    let names: Vec<_> = rows(&told).iter().map(|row| (row[0].to_owned(), row[1].to_owned())).collect();
    assert_eq!(names, [(quiet.to_string(), "quiet".to_owned()), (busy.to_string(), "busy".to_owned())]);
    let told = place.text(&["quarantine"]).await;
    assert_eq!(rows(&told)[0][..5], ["1", "4096", &busy.to_string(), "1", "0x0-0x1000"], "{told}");
    assert!(told.contains("1 of at most 64 pages"), "{told}");
    let told = place.json(&["quarantine"]).await;
    assert_eq!((&told["pages"], &told["most_pages"]), (&1.into(), &64.into()));
    assert_eq!(told["quarantined"][0]["round"]["targets"][0]["device_id"], "nic0");
    let told = place.json(&["rounds"]).await;
    assert_eq!(told["rounds"][0]["targets"][0]["outcome"], "waiting");
    assert_eq!(told["rounds"][0]["cause"], "unmap");
    let told = place.json(&["rounds", "--address-space", &quiet.to_string()]).await;
    assert_eq!(told["rounds"], Value::Array(Vec::new()));
    let told = place.json(&["sessions"]).await;
    assert_eq!(told["sessions"][0]["phase"], "live");
    assert_eq!(told["sessions"][0]["enforces_lease"], false);
    assert_eq!(told["sessions"][0]["notices_unacked"], 1);
    let notice = device.notice().await;
    device.ack(notice.number).await;
    soon(async { while !place.text(&["quarantine"]).await.contains("nothing is quarantined") {} }).await;
}

#[tokio::test]
async fn a_listing_of_several_pages_is_told_whole() {
    const SPACES: u64 = 1001;
    let place = Place::new();
    let _daemon = place.start(&[]);
    let mut notifier = place.notifier().await;
    for number in 0..SPACES {
        register(&mut notifier, &format!("space-{number}")).await;
    }
    let told = place.json(&["address-spaces"]).await;
    let names =
        told["address_spaces"].as_array().unwrap().iter().map(|space| space["name"].as_str().unwrap());
    assert!(names.eq((0..SPACES).map(|number| format!("space-{number}"))), "each once, in order");
}

#[tokio::test]
async fn whoever_asks_nobody_is_told_what_to_do() {
    let place = Place::new();
    let told = place.refused(69, &["sessions"]).await;
    assert!(told.contains("there is no socket") && told.contains("--admin-listen"), "{told}");
    assert!(told.contains(place.path("admin").to_str().unwrap()), "{told}");
    drop(place.start(&[]));
    let told = place.refused(69, &["sessions"]).await;
    assert!(told.contains("nobody listens") && told.contains("start it again"), "{told}");
    let told = place.refused(2, &["--endpoint", "127.0.0.1:7400", "sessions"]).await;
    assert!(told.contains("unix:/PATH"), "{told}");
    assert!(place.refused(2, &["evict", "0"]).await.contains("SESSION_ID"));

    let daemon = place.start(&[]);
    assert!(place.refused(65, &["evict", "4711"]).await.contains("there is no session 4711"));
    let told = place.refused(65, &["rounds", "--address-space", "4711"]).await;
    assert!(told.contains("there is no address space 4711"), "{told}");
    daemon.signal(Signal::STOP);
    let stopped = || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", daemon.pid().as_raw_nonzero())).unwrap();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
    };
    until(stopped).await;
    let told = place.refused(69, &["sessions", "--timeout", "200ms"]).await;
    assert!(told.contains("does not answer within 200ms") && told.contains("--take-over"), "{told}");
}

/// To become another user takes root, which CI has.
#[tokio::test]
async fn whoever_has_no_leave_is_told_whom_to_ask() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let place = Place::new();
    let _daemon = place.start(&[]);
    let program = place.path("shootdownd");
    std::fs::copy(DAEMON, &program).unwrap();
    let open = |path: &Path, mode| std::fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    open(place.0.path(), 0o755);
    let asked = || {
        let mut command = Command::new(&program);
        command.args(["admin", "sessions", "--endpoint", &place.socket("admin")]).uid(NOBODY);
        let output = command.output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, told) = asked();
    assert_eq!(code, Some(77), "{told}");
    assert!(told.contains("no leave to open") && told.contains("as root"), "{told}");
    open(&place.path("admin"), 0o666);
    let (code, told) = asked();
    assert_eq!(code, Some(77), "{told}");
    assert!(told.contains("--allow-uid"), "{told}");
}
