//! What a host agent owes to the devices of its run before: real processes, killed, stopped, taken over.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;
#[path = "restart/chains.rs"]
mod chains;
#[path = "restart/state.rs"]
mod state;

use std::io::{BufRead as _, BufReader};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{Agent, Device, connect, pages, quiesced, soon, unmap, until, wire};
use rustix::process::{Pid, Signal, kill_process};
use shootdown_core::{AddressSpaceId, Moment};
use shootdown_proto::error::Reason;
use shootdown_proto::v1;
use shootdown_proto::v1::memory_service_client::MemoryServiceClient;
use shootdown_proto::v1::notifier_service_client::NotifierServiceClient;
use shootdown_proto::v1::session_request::Message as Ask;
use shootdown_proto::v1::session_response::Message as Say;
use shootdown_server::clock::Clock;
use shootdown_server::config::{StateConfig, Takeover};
use shootdown_server::source::{Notifier as _, NotifyError};
use tonic::transport::Channel;
use tonic::{Code, Status};

const DAEMON: &str = env!("CARGO_BIN_EXE_shootdownd");

/// Of the first run, where a test waits for its end: with its margin and drift 650 ms and a little on the
/// host.
const SHORT: [&str; 4] = ["--lease", "600ms", "--lease-margin", "50ms"];
const SHORT_ON_THE_HOST: Duration = Duration::from_millis(650);

/// A folder with the sockets and the state of host agents that come one after the other.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn arguments(&self) -> Vec<String> {
        let mut arguments: Vec<String> = ["--shards", "1", "--drain-timeout", "1s"].map(str::to_owned).into();
        for (flag, name) in [("listen", "device"), ("source-listen", "source"), ("admin-listen", "admin")] {
            arguments.push(format!("--{flag}"));
            arguments.push(format!("unix:{}", self.path(name).display()));
        }
        arguments.extend(["--state-dir".to_owned(), self.path("state").display().to_string()]);
        arguments
    }

    fn start(&self, more: &[&str]) -> Daemon {
        let mut command = Command::new(DAEMON);
        command.args(self.arguments()).args(more);
        Daemon::start(command)
    }

    /// One that ends by itself.
    fn run(&self, more: &[&str]) -> Output {
        Command::new(DAEMON).args(self.arguments()).args(more).env_remove("RUST_LOG").output().unwrap()
    }

    async fn hello(&self, name: &str) -> Device {
        let mut device = Device::on(connect(&self.path("device")).await);
        device.hello(name).await;
        device
    }

    async fn notifier(&self) -> NotifierServiceClient<Channel> {
        NotifierServiceClient::new(connect(&self.path("source")).await)
    }

    async fn sessions(&self) -> Vec<v1::Session> {
        let mut admin = v1::admin_service_client::AdminServiceClient::new(connect(&self.path("admin")).await);
        admin.list_sessions(v1::ListSessionsRequest::default()).await.unwrap().into_inner().sessions
    }

    /// A device that was welcomed and subscribed before the host agent was killed.
    async fn one_that_is_killed(&self, more: &[&str]) -> Device {
        let daemon = self.start(more);
        let space = register(&mut self.notifier().await).await;
        let mut device = self.hello("old").await;
        device.try_subscribe(space, vec![wire(pages(0, 4))]).await.unwrap();
        daemon.kill();
        device
    }

    fn journal(&self) -> PathBuf {
        let mut files: Vec<_> =
            std::fs::read_dir(self.path("state")).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(files.len(), 1, "{files:?}");
        files.remove(0)
    }
}

async fn register(notifier: &mut NotifierServiceClient<Channel>) -> u64 {
    let request = v1::RegisterAddressSpaceRequest { name: "vm".to_owned(), ..Default::default() };
    notifier.register_address_space(request).await.unwrap().into_inner().address_space_id
}

/// One page, for as long as the caller waits; without a limit where that is `None`.
async fn invalidate(
    notifier: &mut NotifierServiceClient<Channel>,
    space: u64,
    deadline_ms: Option<u64>,
) -> Result<v1::RoundResult, Status> {
    let request = v1::InvalidateRangeStartRequest {
        address_space_id: space,
        range: Some(wire(pages(0, 1))),
        cause: v1::Cause::Unmap.into(),
        deadline_ms,
        ..Default::default()
    };
    let response = soon(notifier.invalidate_range_start(request)).await?;
    Ok(response.into_inner().result.unwrap())
}

fn now() -> Moment {
    Clock::BOOTTIME.now()
}

/// A process that is ended when the test is.
struct Daemon {
    child: Child,
    log: Arc<Mutex<String>>,
}

impl Daemon {
    /// Returns when it listens.
    fn start(mut command: Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).env_remove("RUST_LOG").spawn().unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let log = Arc::new(Mutex::new(String::new()));
        let mut line = String::new();
        while !line.contains("listening for devices") {
            line.clear();
            assert!(stderr.read_line(&mut line).unwrap() > 0, "it ended: {}", log.lock().unwrap());
            log.lock().unwrap().push_str(&line);
        }
        let rest = Arc::clone(&log);
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                rest.lock().unwrap().push_str(&line);
            }
        });
        Self { child, log }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// kill -9, and gone.
    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    async fn exit_code(&mut self) -> Option<i32> {
        let mut status = None;
        until(|| {
            status = self.child.try_wait().unwrap();
            status.is_some()
        })
        .await;
        status.unwrap().code()
    }

    fn says(&self, word: &str) -> bool {
        self.log.lock().unwrap().contains(word)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Invariant 16.
#[tokio::test]
async fn restart_grace() {
    let place = Place::new();
    let old = place.one_that_is_killed(&SHORT).await;
    let started = now();
    let _second = place.start(&["--lease", "60s"]);
    let listed = place.sessions().await;
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].session_id, listed[0].device_id.as_str()), (old.session, "old"));
    assert_eq!(listed[0].phase(), v1::SessionPhase::Severed);

    // Nothing is granted …
    let mut memory = MemoryServiceClient::new(connect(&place.path("source")).await);
    let created = memory.create_address_space(v1::CreateAddressSpaceRequest { name: "vm".to_owned() }).await;
    let mapped = created.unwrap().into_inner().address_space_id;
    let range = Some(wire(pages(0, 4)));
    let access = v1::Access::Write.into();
    memory.map(v1::MapRequest { address_space_id: mapped, range, access }).await.unwrap();
    let mut new = place.hello("new").await;
    new.try_subscribe(mapped, vec![wire(pages(0, 4))]).await.unwrap();
    new.start_fault(AddressSpaceId::new(mapped).unwrap(), pages(0, 1)).await;
    // … and nothing released.
    let mut notifier = place.notifier().await;
    let space = register(&mut notifier).await;
    let early = invalidate(&mut notifier, space, Some(0)).await.unwrap();
    let ((whole, released), granted) =
        tokio::join!(async { (invalidate(&mut notifier, space, None).await.unwrap(), now()) }, async {
            new.grant().await;
            now()
        },);
    assert!(released.since(started) >= SHORT_ON_THE_HOST, "after {:?}", released.since(started));
    assert!(granted.since(started) >= SHORT_ON_THE_HOST, "after {:?}", granted.since(started));
    assert_eq!(early.verdict(), v1::Verdict::NotQuiesced);
    assert_eq!((early.targets[0].device_id.as_str(), early.targets[0].session_id), ("old", old.session));
    assert_eq!(whole.verdict(), v1::Verdict::Quiesced);
    assert_eq!(whole.targets[0].outcome(), v1::TargetOutcome::Fenced);

    // It is over for good.
    assert_eq!(place.sessions().await.len(), 1, "the new one");
    let after = invalidate(&mut notifier, space, Some(0)).await.unwrap();
    assert_eq!((after.verdict(), after.targets.len()), (v1::Verdict::Quiesced, 0));
}

#[tokio::test]
async fn a_device_that_comes_back_with_nothing_ends_the_grace_and_no_other_does() {
    let place = Place::new();
    place.one_that_is_killed(&["--lease", "60s"]).await;
    let second = place.start(&["--lease", "60s"]);
    let mut notifier = place.notifier().await;
    let space = register(&mut notifier).await;
    let mut waits = tokio::spawn({
        let mut notifier = notifier.clone();
        async move { invalidate(&mut notifier, space, None).await.unwrap() }
    });
    // Another device; and the same device, whose earlier run may still reach memory.
    place.hello("other").await.settled().await;
    let mut next = Device::on(connect(&place.path("device")).await);
    next.ask(Ask::Hello(v1::Hello { incarnation: 2, ..Device::hello_of("old") })).await;
    assert!(matches!(next.say().await, Say::Welcome(_)));
    let early = invalidate(&mut notifier, space, Some(0)).await.unwrap();
    assert_eq!(early.verdict(), v1::Verdict::NotQuiesced, "neither ends it");
    assert!(!waits.is_finished());
    drop(next);
    // An old incarnation never comes back behind a newer one, so the host agent is started anew.
    second.kill();
    assert!(soon(&mut waits).await.is_err(), "its host agent was killed");

    let place = Place::new();
    place.one_that_is_killed(&["--lease", "60s"]).await;
    let second = place.start(&["--lease", "60s"]);
    let mut notifier = place.notifier().await;
    let space = register(&mut notifier).await;
    assert_eq!(invalidate(&mut notifier, space, Some(0)).await.unwrap().verdict(), v1::Verdict::NotQuiesced);
    let waits = tokio::spawn({
        let mut notifier = notifier.clone();
        async move { invalidate(&mut notifier, space, None).await.unwrap() }
    });
    // Its first word after the Welcome says it.
    let mut back = place.hello("old").await;
    back.settled().await;
    let result = soon(waits).await.unwrap();
    assert_eq!(result.verdict(), v1::Verdict::Quiesced);
    assert_eq!(result.targets[0].outcome(), v1::TargetOutcome::Left);
    until(|| second.says("accounted for")).await;
}

/// Trap 29: a lease whose clock began anew with each restart, and so never ended.
#[tokio::test]
async fn a_lease_of_an_earlier_run_goes_on_running_out_however_often_the_host_agent_is_started() {
    let place = Place::new();
    place.one_that_is_killed(&["--lease", "60s"]).await;
    let mut remaining = Vec::new();
    soon(async {
        // A restart takes milliseconds; by then some 500 ms of them are over.
        while remaining.len() < 2 || remaining[0] < remaining[remaining.len() - 1] + 500 {
            let daemon = place.start(&["--lease", "60s"]);
            let sessions = place.sessions().await;
            assert_eq!(sessions.len(), 1, "it is waited for");
            remaining.push(sessions[0].lease_remaining_ms);
            daemon.kill();
        }
    })
    .await;
    assert!(remaining.is_sorted_by(|one, next| one >= next), "{remaining:?}");
}

#[tokio::test]
async fn no_id_is_used_twice_and_the_incarnation_rises() {
    let place = Place::new();
    let mut ids: Vec<(u64, u64, u64, u64)> = Vec::new();
    for _ in 0..3 {
        let daemon = place.start(&["--lease", "60s"]);
        let space = register(&mut place.notifier().await).await;
        let mut device = Device::on(connect(&place.path("device")).await);
        device.ask(Ask::Hello(Device::hello_of("old"))).await;
        let Say::Welcome(welcome) = device.say().await else { panic!("not welcomed") };
        let subscription = device.try_subscribe(space, vec![wire(pages(0, 4))]).await.unwrap();
        ids.push((welcome.host_incarnation, welcome.session_id, welcome.epoch, space.min(subscription)));
        daemon.kill();
    }
    for two in ids.windows(2) {
        let (one, other) = (two[0], two[1]);
        assert!(one.0 < other.0 && one.1 < other.1 && one.2 < other.2 && one.3 < other.3, "{ids:?}");
    }
}

#[tokio::test]
async fn a_run_that_leaves_nobody_behind_costs_the_next_no_wait() {
    let place = Place::new();
    for _ in 0..2 {
        let mut daemon = place.start(&["--lease", "60s"]);
        let mut notifier = place.notifier().await;
        let space = register(&mut notifier).await;
        let result = invalidate(&mut notifier, space, Some(0)).await.unwrap();
        assert_eq!(result.verdict(), v1::Verdict::Quiesced, "nobody is waited for");
        let device = place.hello("polite").await;
        device.ask(Ask::Leave(v1::Leave {})).await;
        while !place.sessions().await.is_empty() {
            tokio::task::yield_now().await;
        }
        drop(notifier);
        daemon.signal(Signal::TERM);
        assert_eq!(daemon.exit_code().await, Some(0));
    }
}

#[tokio::test]
async fn a_torn_journal_is_started_from_and_a_damaged_one_is_not() {
    let place = Place::new();
    place.one_that_is_killed(&SHORT).await;
    let journal = place.journal();
    let bytes = std::fs::read(&journal).unwrap();
    // Cut in its last record, which was that of the device.
    std::fs::write(&journal, &bytes[..bytes.len() - 3]).unwrap();
    let started = now();
    let second = place.start(&["--lease", "60s"]);
    let mut notifier = place.notifier().await;
    let space = register(&mut notifier).await;
    let result = invalidate(&mut notifier, space, None).await.unwrap();
    assert!(now().since(started) >= SHORT_ON_THE_HOST, "the longest lease is waited for");
    assert_eq!(result.targets[0].device_id, "unnamed:torn-journal");
    second.kill();

    let journal = place.journal();
    let mut bytes = std::fs::read(&journal).unwrap();
    bytes[50] ^= 1;
    std::fs::write(&journal, &bytes).unwrap();
    for more in [&[][..], &["--take-over"]] {
        let refused = place.run(more);
        assert_eq!(refused.status.code(), Some(78), "{refused:?}");
        let text = String::from_utf8(refused.stderr).unwrap();
        assert!(text.contains(journal.to_str().unwrap()) && text.contains("at byte 24"), "{text}");
    }
    assert_eq!(std::fs::read(&journal).unwrap(), bytes, "nothing was changed");
}

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

/// Waits for the end of a stream that ends without a word of error.
async fn ended(device: &mut Device) {
    loop {
        match device.next().await {
            Ok(None) => return,
            Ok(Some(Say::Drain(drain))) => assert!(drain.resumable),
            other => panic!("it is cut without a word: {other:?}"),
        }
    }
}

#[tokio::test]
async fn after_a_planned_end_the_successor_goes_on_where_it_stopped() {
    let place = Place::new();
    let mut first = place.start(&["--lease", "60s"]);
    let mut notifier = place.notifier().await;
    let space = register(&mut notifier).await;
    let mut device = Device::on(connect(&place.path("device")).await);
    device.ask(Ask::Hello(Device::hello_of("old"))).await;
    let Say::Welcome(welcomed) = device.say().await else { panic!("not welcomed") };
    device.session = welcomed.session_id;
    device.try_subscribe(space, vec![wire(pages(0, 4))]).await.unwrap();
    // A round that is complete, and whose bracket stays open.
    let round = tokio::spawn({
        let mut notifier = notifier.clone();
        async move { invalidate(&mut notifier, space, None).await.unwrap() }
    });
    let notice = device.notice().await;
    device.ack(notice.number).await;
    let round = soon(round).await.unwrap();
    assert_eq!(round.verdict(), v1::Verdict::Quiesced);
    first.signal(Signal::TERM);
    ended(&mut device).await;
    assert_eq!(first.exit_code().await, Some(0));

    let second = place.start(&["--lease", "60s"]);
    let listed = place.sessions().await;
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].session_id, listed[0].phase()), (device.session, v1::SessionPhase::Severed));
    assert_eq!((listed[0].subscriptions, listed[0].acked_through), (1, 1));
    let mut admin = v1::admin_service_client::AdminServiceClient::new(connect(&place.path("admin")).await);
    let spaces = admin.list_address_spaces(v1::ListAddressSpacesRequest::default()).await.unwrap();
    let spaces = spaces.into_inner().address_spaces;
    assert_eq!(spaces.len(), 1);
    assert_eq!((spaces[0].address_space_id, spaces[0].name.as_str(), spaces[0].seq), (space, "vm", 1));
    assert_eq!(spaces[0].open_brackets, 1);

    // Its device is waited for where it had subscribed, and nowhere else: there is no grace.
    let mut notifier = place.notifier().await;
    let elsewhere = v1::InvalidateRangeStartRequest {
        address_space_id: space,
        range: Some(wire(pages(100, 1))),
        cause: v1::Cause::Unmap.into(),
        non_blockable: true,
        ..Default::default()
    };
    let result = soon(notifier.invalidate_range_start(elsewhere)).await.unwrap().into_inner().result.unwrap();
    assert_eq!((result.verdict(), result.seq), (v1::Verdict::Quiesced, 2));
    let waits = invalidate(&mut notifier, space, Some(0)).await.unwrap();
    assert_eq!((waits.verdict(), waits.targets.len()), (v1::Verdict::NotQuiesced, 1));
    assert_eq!(waits.targets[0].session_id, device.session);
    // Its caller ends the bracket as if nothing had happened, once.
    let end = v1::InvalidateRangeEndRequest { address_space_id: space, seq: round.seq, ..Default::default() };
    notifier.invalidate_range_end(end.clone()).await.unwrap();
    let twice = notifier.invalidate_range_end(end).await.unwrap_err();
    assert_eq!(Reason::of_status(&twice), Some(Reason::RoundUnknown));
    // Nobody is granted less than before.
    let mut other = Device::on(connect(&place.path("device")).await);
    other.ask(Ask::Hello(Device::hello_of("other"))).await;
    let Say::Welcome(welcome) = other.say().await else { panic!("not welcomed") };
    assert_eq!(welcome.host_incarnation, welcomed.host_incarnation, "the run goes on");
    second.kill();

    // A crash is a crash.
    let _third = place.start(&["--lease", "60s"]);
    let mut notifier = place.notifier().await;
    let space = register(&mut notifier).await;
    let waits = invalidate(&mut notifier, space, Some(0)).await.unwrap();
    assert_eq!(waits.verdict(), v1::Verdict::NotQuiesced, "its devices are waited for everywhere");
    let mut again = Device::on(connect(&place.path("device")).await);
    again.ask(Ask::Hello(Device::hello_of("other"))).await;
    let Say::Welcome(later) = again.say().await else { panic!("not welcomed") };
    assert!(later.host_incarnation > welcome.host_incarnation);
}

/// A session that owes an ack cannot go on, and its round may not be taken for complete.
#[tokio::test]
async fn what_is_not_quiet_at_a_planned_end_is_treated_as_after_a_crash() {
    let place = Place::new();
    let mut first = place.start(&["--lease", "60s"]);
    let mut notifier = place.notifier().await;
    let space = register(&mut notifier).await;
    let mut silent = place.hello("silent").await;
    silent.try_subscribe(space, vec![wire(pages(0, 4))]).await.unwrap();
    let round = invalidate(&mut notifier, space, Some(0)).await.unwrap();
    assert_eq!(round.verdict(), v1::Verdict::NotQuiesced);
    silent.notice().await;
    first.signal(Signal::TERM);
    assert_eq!(first.exit_code().await, Some(0));

    let _second = place.start(&["--lease", "60s"]);
    let mut notifier = place.notifier().await;
    let asked = v1::AwaitRoundRequest {
        address_space_id: space,
        seq: round.seq,
        deadline_ms: Some(0),
        ..Default::default()
    };
    let unknown = notifier.await_round(asked).await.unwrap_err();
    assert_eq!(Reason::of_status(&unknown), Some(Reason::AddressSpaceUnknown), "never quiesced");
    let space = register(&mut notifier).await;
    let waits = invalidate(&mut notifier, space, Some(0)).await.unwrap();
    assert_eq!(waits.verdict(), v1::Verdict::NotQuiesced);
    assert_eq!(waits.targets[0].device_id, "silent");
}

/// A disk that is full: the kernel refuses what goes beyond the limit on the size of a file.
#[tokio::test]
async fn a_session_that_cannot_be_written_down_is_refused_and_the_others_go_on() {
    let place = Place::new();
    let mut command = Command::new("sh");
    let limited = "trap '' XFSZ; ulimit -f 16; exec \"$0\" \"$@\"";
    command.args(["-c", limited, DAEMON]).args(place.arguments()).args(["--memory-frames", "1"]);
    let _daemon = Daemon::start(command);
    let mut notifier = place.notifier().await;
    let space = register(&mut notifier).await;
    let mut first = place.hello("first").await;
    first.try_subscribe(space, vec![wire(pages(0, 4))]).await.unwrap();
    let mut welcome = Vec::new();
    let refused = loop {
        assert!(welcome.len() < 400, "8 KiB hold fewer");
        let mut device = Device::on(connect(&place.path("device")).await);
        device.ask(Ask::Hello(Device::hello_of(&format!("gpu{}", welcome.len())))).await;
        match device.say().await {
            Say::Welcome(_) => welcome.push(device),
            Say::Error(error) => break error,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(refused.reason(), Reason::StoreFailed);
    assert!(welcome.len() > 50, "{} fitted", welcome.len());
    // Who is there goes on.
    let round = tokio::spawn({
        let mut notifier = notifier.clone();
        async move { invalidate(&mut notifier, space, None).await.unwrap() }
    });
    let notice = first.notice().await;
    first.ack(notice.number).await;
    assert_eq!(soon(round).await.unwrap().verdict(), v1::Verdict::Quiesced);
    // Room again: those who left take up none.
    for device in &welcome {
        device.ask(Ask::Leave(v1::Leave {})).await;
    }
    soon(async {
        loop {
            let mut device = Device::on(connect(&place.path("device")).await);
            device.ask(Ask::Hello(Device::hello_of("patient"))).await;
            if matches!(device.say().await, Say::Welcome(_)) {
                break;
            }
        }
    })
    .await;
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
    let mut early = Device::on(connect(&place.path("device")).await);
    let mut second = activated(place.0.path(), &device, &source);
    early.hello("gpu").await;
    early.settled().await;
    let refused = place.run(&["--listen", "fd://nobody"]);
    assert_eq!(refused.status.code(), Some(69), "{refused:?}");
    second.signal(Signal::TERM);
    assert_eq!(second.exit_code().await, Some(0));
    assert!(place.path("device").exists(), "it is not the host agent's to remove");
}

/// The first page, by a call that may be tried again.
fn start_by_id(space: u64, request_id: &str) -> v1::InvalidateRangeStartRequest {
    v1::InvalidateRangeStartRequest {
        address_space_id: space,
        range: Some(wire(pages(0, 1))),
        cause: v1::Cause::Unmap.into(),
        request_id: request_id.to_owned(),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_call_whose_answer_went_with_a_planned_end_has_its_outcome_and_counts_as_dirty() {
    let place = Place::new();
    let mut first = place.start(&["--lease", "60s"]);
    let mut notifier = place.notifier().await;
    let space = register(&mut notifier).await;
    let started = notifier.invalidate_range_start(start_by_id(space, "start-1")).await.unwrap().into_inner();
    let started = started.result.unwrap();
    assert!(!started.dirty, "nobody was asked");
    first.signal(Signal::TERM);
    assert_eq!(first.exit_code().await, Some(0));

    let mut second = place.start(&["--lease", "60s"]);
    let mut notifier = place.notifier().await;
    let again = notifier.invalidate_range_start(start_by_id(space, "start-1")).await.unwrap().into_inner();
    let again = again.result.unwrap();
    assert_eq!((again.seq, again.verdict()), (started.seq, v1::Verdict::Quiesced), "no second bracket");
    assert!(again.dirty, "what its targets told is forgotten");
    let end = v1::InvalidateRangeEndRequest {
        address_space_id: space,
        seq: started.seq,
        request_id: "end-1".to_owned(),
        host_incarnation: started.host_incarnation,
    };
    notifier.invalidate_range_end(end.clone()).await.unwrap();
    second.signal(Signal::TERM);
    assert_eq!(second.exit_code().await, Some(0));

    let _third = place.start(&["--lease", "60s"]);
    place.notifier().await.invalidate_range_end(end).await.expect("it was ended, and is told so");
    let mut admin = v1::admin_service_client::AdminServiceClient::new(connect(&place.path("admin")).await);
    let spaces = admin.list_address_spaces(v1::ListAddressSpacesRequest::default()).await.unwrap();
    assert_eq!(spaces.into_inner().address_spaces[0].open_brackets, 0);
}

/// Trap 32, across runs: an end that comes late names nothing.
#[tokio::test]
async fn a_sequence_of_an_earlier_run_names_no_bracket_of_this_one() {
    let place = Place::new();
    let first = place.start(&[]);
    let mut notifier = place.notifier().await;
    let space = register(&mut notifier).await;
    let before = invalidate(&mut notifier, space, None).await.unwrap();
    first.kill();
    let _second = place.start(&[]);
    let mut notifier = place.notifier().await;
    let back = v1::RegisterAddressSpaceRequest { address_space_id: space, ..Default::default() };
    assert_eq!(notifier.register_address_space(back).await.unwrap().into_inner().address_space_id, space);
    let after = invalidate(&mut notifier, space, None).await.unwrap();
    assert!(after.seq > before.seq && after.host_incarnation > before.host_incarnation);
    let asked = v1::AwaitRoundRequest { address_space_id: space, seq: before.seq, ..Default::default() };
    let unknown = notifier.await_round(asked).await.unwrap_err();
    assert_eq!(Reason::of_status(&unknown), Some(Reason::RoundUnknown));
    let end = |seq| v1::InvalidateRangeEndRequest { address_space_id: space, seq, ..Default::default() };
    let unknown = notifier.invalidate_range_end(end(before.seq)).await.unwrap_err();
    assert_eq!(Reason::of_status(&unknown), Some(Reason::RoundUnknown));
    notifier.invalidate_range_end(end(after.seq)).await.unwrap();
}

/// The quota counts devices: what the run before left of them does not keep them out.
#[tokio::test]
async fn a_fleet_as_large_as_the_quota_comes_back_after_a_crash_though_its_old_sessions_never_end() {
    let place = Place::new();
    let more = ["--lease", "60s", "--max-sessions", "2"];
    let daemon = place.start(&more);
    let space = register(&mut place.notifier().await).await;
    let capabilities = Some(v1::Capabilities { enforces_lease: false, change_pte: false });
    let hello = |name, incarnation| v1::Hello { capabilities, incarnation, ..Device::hello_of(name) };
    let mut fleet = Vec::new();
    for name in ["nic", "gpu"] {
        let mut device = Device::on(connect(&place.path("device")).await);
        device.welcomed(hello(name, 1)).await;
        device.try_subscribe(space, vec![wire(pages(0, 4))]).await.unwrap();
        fleet.push(device);
    }
    daemon.kill();
    let _second = place.start(&more);
    // One that lived on, and one that was started anew, whose earlier run may still reach memory.
    let mut back = Vec::new();
    for (name, incarnation) in [("nic", 1), ("gpu", 2)] {
        let mut device = Device::on(connect(&place.path("device")).await);
        device.welcomed(hello(name, incarnation)).await;
        device.settled().await;
        back.push(device);
    }
    let listed = place.sessions().await;
    let of = |name| listed.iter().filter(|session| session.device_id == name).count();
    assert_eq!((of("nic"), of("gpu")), (1, 2), "what is not known to have stopped is waited for");
    let mut other = Device::on(connect(&place.path("device")).await);
    other.ask(Ask::Hello(hello("other", 1))).await;
    assert_eq!(other.last_word().await.0.reason(), Reason::SessionQuota);
}

/// What is said of the lease and what is renewed are one thing, also when the setting is another one by now.
#[tokio::test]
async fn a_session_that_goes_on_after_a_planned_restart_is_told_its_own_lease() {
    let place = Place::new();
    let mut first = place.start(&["--lease", "5s"]);
    let space = register(&mut place.notifier().await).await;
    let mut device = Device::on(connect(&place.path("device")).await);
    device.ask(Ask::Hello(Device::hello_of("old"))).await;
    let Say::Welcome(welcomed) = device.say().await else { panic!("not welcomed") };
    device.try_subscribe(space, vec![wire(pages(0, 4))]).await.unwrap();
    first.signal(Signal::TERM);
    ended(&mut device).await;
    assert_eq!(first.exit_code().await, Some(0));
    let _second = place.start(&["--lease", "60s"]);
    let mut back = Device::on(connect(&place.path("device")).await);
    let resume = v1::ResumePoint {
        session_id: welcomed.session_id,
        host_incarnation: welcomed.host_incarnation,
        ..v1::ResumePoint::default()
    };
    back.ask(Ask::Hello(v1::Hello { resume: Some(resume), ..Device::hello_of("old") })).await;
    let Say::Welcome(again) = back.say().await else { panic!("not welcomed") };
    back.beat().await;
    let Say::LeaseRenewed(renewed) = back.say().await else { panic!("not renewed") };
    assert_eq!(again.resume(), v1::Resume::Continue);
    assert_eq!((again.lease_ms, renewed.lease_ms), (5000, 5000));
}

#[tokio::test]
async fn an_administrator_who_vouches_that_a_device_is_cut_off_ends_the_waiting_for_it() {
    let place = Place::new();
    place.one_that_is_killed(&["--lease", "60s"]).await;
    let second = place.start(&["--lease", "60s"]);
    let mut notifier = place.notifier().await;
    let space = register(&mut notifier).await;
    let waits = tokio::spawn({
        let mut notifier = notifier.clone();
        async move { invalidate(&mut notifier, space, None).await.unwrap() }
    });
    let session_id = place.sessions().await[0].session_id;
    let mut admin = v1::admin_service_client::AdminServiceClient::new(connect(&place.path("admin")).await);
    let evict = |is_cut_off| v1::EvictSessionRequest { session_id, is_cut_off };
    admin.evict_session(evict(false)).await.unwrap();
    let early = invalidate(&mut notifier, space, Some(0)).await.unwrap();
    assert_eq!(early.verdict(), v1::Verdict::NotQuiesced, "an eviction says nothing of the device");
    admin.evict_session(evict(true)).await.unwrap();
    assert_eq!(soon(waits).await.unwrap().targets[0].outcome(), v1::TargetOutcome::Fenced);
    until(|| second.says("accounted for")).await;
}

/// What the host agent ended stays ended.
#[tokio::test]
async fn a_session_that_was_evicted_is_not_resumed_after_a_planned_end() {
    let place = Place::new();
    let mut first = place.start(&["--lease", "60s"]);
    let space = register(&mut place.notifier().await).await;
    let mut device = place.hello("evicted").await;
    device.try_subscribe(space, vec![wire(pages(0, 4))]).await.unwrap();
    let mut admin = v1::admin_service_client::AdminServiceClient::new(connect(&place.path("admin")).await);
    let evict = v1::EvictSessionRequest { session_id: device.session, is_cut_off: false };
    admin.evict_session(evict).await.unwrap();
    first.signal(Signal::TERM);
    assert_eq!(first.exit_code().await, Some(0));
    let _second = place.start(&["--lease", "60s"]);
    let mut notifier = place.notifier().await;
    let space = register(&mut notifier).await;
    let waits = invalidate(&mut notifier, space, Some(0)).await.unwrap();
    assert_eq!(waits.targets[0].device_id, "evicted", "it is waited for everywhere, as after a crash");
}

#[tokio::test]
async fn a_registration_and_a_release_whose_answers_went_with_a_planned_end_have_their_outcome() {
    let place = Place::new();
    let by_id = |name: &str| v1::RegisterAddressSpaceRequest {
        name: name.to_owned(),
        request_id: format!("register-{name}"),
        ..Default::default()
    };
    let release = |space| v1::ReleaseAddressSpaceRequest {
        address_space_id: space,
        request_id: format!("release-{space}"),
    };
    let mut first = place.start(&[]);
    let mut notifier = place.notifier().await;
    let kept = notifier.register_address_space(by_id("kept")).await.unwrap().into_inner().address_space_id;
    let gone = notifier.register_address_space(by_id("gone")).await.unwrap().into_inner().address_space_id;
    let released = notifier.release_address_space(release(gone)).await.unwrap().into_inner().result.unwrap();
    first.signal(Signal::TERM);
    assert_eq!(first.exit_code().await, Some(0));

    // And the run after the next knows as much.
    for _ in 0..2 {
        let mut next = place.start(&[]);
        let mut notifier = place.notifier().await;
        let again = notifier.register_address_space(by_id("kept")).await.unwrap().into_inner();
        assert_eq!(again.address_space_id, kept);
        let again = notifier.release_address_space(release(gone)).await.unwrap().into_inner().result.unwrap();
        assert_eq!((again.verdict(), again.seq), (released.verdict(), released.seq));
        assert!(again.dirty, "what its targets told is forgotten");
        let another = v1::ReleaseAddressSpaceRequest { request_id: "another".to_owned(), ..release(gone) };
        let unknown = notifier.release_address_space(another).await.unwrap_err();
        assert_eq!(Reason::of_status(&unknown), Some(Reason::AddressSpaceUnknown));
        next.signal(Signal::TERM);
        assert_eq!(next.exit_code().await, Some(0));
    }

    // Under the name that was released another may begin, and end.
    let _last = place.start(&[]);
    let mut notifier = place.notifier().await;
    let back = v1::RegisterAddressSpaceRequest { address_space_id: gone, ..Default::default() };
    notifier.register_address_space(back).await.unwrap();
    let another = v1::ReleaseAddressSpaceRequest { request_id: "another".to_owned(), ..release(gone) };
    notifier.release_address_space(another).await.unwrap();
}

#[tokio::test]
async fn an_address_space_that_is_handed_over_is_taken_back_as_strict_as_it_is() {
    let place = Place::new();
    let mut first = place.start(&[]);
    let space = register(&mut place.notifier().await).await;
    first.signal(Signal::TERM);
    assert_eq!(first.exit_code().await, Some(0));
    let _second = place.start(&[]);
    let mut notifier = place.notifier().await;
    let back =
        |strict| v1::RegisterAddressSpaceRequest { address_space_id: space, strict, ..Default::default() };
    let refused = notifier.register_address_space(back(true)).await.unwrap_err();
    assert_eq!(Reason::of_status(&refused), Some(Reason::FieldInvalid), "{refused}");
    notifier.register_address_space(back(false)).await.unwrap();
    let refused = notifier.register_address_space(back(false)).await.unwrap_err();
    assert_eq!(Reason::of_status(&refused), Some(Reason::FieldInvalid), "it was taken back");
}
