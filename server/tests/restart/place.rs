//! A folder for host agents that come one after the other, each a real process.

use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::Duration;

use shootdown_core::Moment;
use shootdown_proto::error::Reason;
use shootdown_proto::v1;
use shootdown_proto::v1::admin_service_client::AdminServiceClient;
use shootdown_proto::v1::notifier_service_client::NotifierServiceClient;
use shootdown_server::clock::Clock;
use tonic::Status;
use tonic::transport::Channel;

use crate::common::daemon::{DAEMON, Daemon, listens_in};
use crate::common::{Device, connect, pages, soon, wire};

/// Of the first run, where a test waits for its end: with its margin and drift 650 ms and a little on the
/// host.
pub(crate) const SHORT: [&str; 4] = ["--lease", "600ms", "--lease-margin", "50ms"];

pub(crate) const SHORT_ON_THE_HOST: Duration = Duration::from_millis(650);

/// A folder with the sockets and the state of host agents that come one after the other.
pub(crate) struct Place(pub(crate) tempfile::TempDir);

impl Place {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn arguments(&self) -> Vec<String> {
        let mut arguments = listens_in(self.0.path());
        arguments.extend(["--shards", "1", "--drain-timeout", "1s"].map(str::to_owned));
        arguments.extend(["--state-dir".to_owned(), self.path("state").display().to_string()]);
        arguments
    }

    pub(crate) fn start(&self, more: &[&str]) -> Daemon {
        let mut command = Command::new(DAEMON);
        command.args(self.arguments()).args(more);
        Daemon::start(command)
    }

    /// One that ends by itself.
    pub(crate) fn run(&self, more: &[&str]) -> Output {
        Command::new(DAEMON).args(self.arguments()).args(more).env_remove("RUST_LOG").output().unwrap()
    }

    pub(crate) async fn hello(&self, name: &str) -> Device {
        let mut device = self.device().await;
        device.hello(name).await;
        device
    }

    /// A device's stream that nothing was said on.
    pub(crate) async fn device(&self) -> Device {
        Device::on(connect(&self.path("device")).await)
    }

    /// A device that was welcomed and subscribed to the first pages, and where it goes on from.
    pub(crate) async fn subscribed(&self, name: &str, space: u64) -> (Device, v1::ResumePoint) {
        let mut device = self.device().await;
        let welcome = device.welcomed(Device::hello_of(name)).await;
        device.try_subscribe(space, vec![wire(pages(0, 4))]).await.unwrap();
        (device, point(&welcome))
    }

    /// The answer to a device, "old", that comes back with what it holds.
    pub(crate) async fn come_back(&self, resume: v1::ResumePoint) -> (Device, v1::Welcome) {
        let mut device = self.device().await;
        let hello = v1::Hello { resume: Some(resume), ..Device::hello_of("old") };
        let welcome = device.welcomed(hello).await;
        (device, welcome)
    }

    pub(crate) async fn admin(&self) -> AdminServiceClient<Channel> {
        AdminServiceClient::new(connect(&self.path("admin")).await)
    }

    pub(crate) async fn notifier(&self) -> NotifierServiceClient<Channel> {
        NotifierServiceClient::new(connect(&self.path("source")).await)
    }

    pub(crate) async fn sessions(&self) -> Vec<v1::Session> {
        let listed = self.admin().await.list_sessions(v1::ListSessionsRequest::default()).await;
        listed.unwrap().into_inner().sessions
    }

    pub(crate) async fn address_spaces(&self) -> Vec<v1::AddressSpace> {
        let listed = self.admin().await.list_address_spaces(v1::ListAddressSpacesRequest::default()).await;
        listed.unwrap().into_inner().address_spaces
    }

    /// What the source is told of a round, without waiting for it.
    pub(crate) async fn look(&self, space: u64, seq: u64) -> Result<v1::RoundResult, Reason> {
        let asked = v1::AwaitRoundRequest {
            address_space_id: space,
            seq,
            deadline_ms: Some(0),
            ..Default::default()
        };
        match self.notifier().await.await_round(asked).await {
            Ok(told) => Ok(told.into_inner().result.unwrap()),
            Err(refused) => Err(Reason::of_status(&refused).unwrap()),
        }
    }

    /// A round of an address space whose device, "silent", never acks: the address space, and its sequence.
    pub(crate) async fn never_quiesced(&self) -> (u64, u64, Device) {
        let mut notifier = self.notifier().await;
        let space = register(&mut notifier).await;
        let mut silent = self.hello("silent").await;
        silent.try_subscribe(space, vec![wire(pages(0, 4))]).await.unwrap();
        let round = invalidate(&mut notifier, space, Some(0)).await.unwrap();
        assert_eq!(round.verdict(), v1::Verdict::NotQuiesced);
        silent.notice().await;
        (space, round.seq, silent)
    }

    /// A device that was welcomed and subscribed before the host agent was killed.
    pub(crate) async fn one_that_is_killed(&self, more: &[&str]) -> Device {
        let daemon = self.start(more);
        let space = register(&mut self.notifier().await).await;
        let mut device = self.hello("old").await;
        device.try_subscribe(space, vec![wire(pages(0, 4))]).await.unwrap();
        daemon.kill();
        device
    }

    pub(crate) fn journal(&self) -> PathBuf {
        let mut files: Vec<_> =
            std::fs::read_dir(self.path("state")).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(files.len(), 1, "{files:?}");
        files.remove(0)
    }
}

/// Where a device goes on from that has received nothing.
pub(crate) fn point(welcome: &v1::Welcome) -> v1::ResumePoint {
    let (session_id, host_incarnation) = (welcome.session_id, welcome.host_incarnation);
    v1::ResumePoint { session_id, host_incarnation, ..Default::default() }
}

pub(crate) async fn register(notifier: &mut NotifierServiceClient<Channel>) -> u64 {
    let request = v1::RegisterAddressSpaceRequest { name: "vm".to_owned(), ..Default::default() };
    notifier.register_address_space(request).await.unwrap().into_inner().address_space_id
}

/// One page, for as long as the caller waits; without a limit where that is `None`.
pub(crate) async fn invalidate(
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

pub(crate) fn now() -> Moment {
    Clock::BOOTTIME.now()
}
