//! The ladder's last step by force: programs and services that cut devices off, and what of them counts. Each
//! program is a real process, each service a real socket.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;
#[path = "fence/programs.rs"]
mod programs;
#[path = "fence/services.rs"]
mod services;
#[path = "fence/reuse.rs"]
mod reuse;
#[path = "fence/silence.rs"]
mod silence;
#[path = "fence/slow.rs"]
mod slow;

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{Agent, Device, lease_of, pages, soon, until, wire};
use shootdown_core::AddressSpaceId;
use shootdown_proto::error::Reason;
use shootdown_proto::v1;
use shootdown_server::config::Config;
use shootdown_server::source::{Outcome, RoundResult, TargetReport};
use shootdown_server::{DevicePattern, Fencer, FencerRule};
use tokio::task::JoinHandle;

const T_ACK: Duration = Duration::from_millis(50);

/// Longer than an attempt and its pauses, and much shorter than a test may take.
const LEASE: Duration = Duration::from_secs(3);

fn rule(device: &str, fencer: Fencer, time_limit: Duration) -> FencerRule {
    FencerRule { devices: vec![DevicePattern::new(device)], fencer, time_limit }
}

fn short_lease(config: &mut Config) {
    lease_of(config, LEASE);
}

/// Only a fencer can end it: the lease lasts as long as a test may.
fn long_lease(config: &mut Config) {
    config.host.session.ack_timeout = T_ACK;
}

/// A program that can be run.
fn script(folder: &Path, name: &str, body: &str) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

fn lines(path: &Path) -> Vec<String> {
    // Not there yet: nobody has written to it.
    std::fs::read_to_string(path).unwrap_or_default().lines().map(str::to_owned).collect()
}

/// Devices that subscribed, were told of a round, and say nothing.
async fn silent_targets(
    agent: &Agent,
    space: AddressSpaceId,
    names: &[&str],
) -> (Vec<Device>, JoinHandle<RoundResult>) {
    let mut devices = Vec::new();
    for name in names {
        let mut device = agent.device(name).await;
        device.subscribe(space, pages(1, 1)).await;
        devices.push(device);
    }
    let round = agent.round(space, pages(1, 1));
    for device in &mut devices {
        device.notice().await;
    }
    (devices, round)
}

/// None was fenced before its lease, which began before the round did, was over.
fn assert_outlived(targets: &[TargetReport]) {
    for target in targets {
        assert_eq!(target.outcome, Outcome::Fenced, "{target:?}");
        assert!(target.elapsed.unwrap() > LEASE / 2, "no earlier than its lease: {target:?}");
    }
}

/// 14: the lease of a device that does not enforce it fences nobody; a fencer's confirmation does, also of a
/// device whose stream is gone.
#[tokio::test]
async fn fence_is_positive() {
    let folder = tempfile::tempdir().unwrap();
    let gate = folder.path().join("cut-off");
    let attempts = folder.path().join("attempts");
    let body = format!("echo >> {}; test -e {}", attempts.display(), gate.display());
    let program = script(folder.path(), "fence", &body);
    let agent = Agent::start_with(|config| {
        lease_of(config, Duration::from_millis(200));
        config.host.fencers = vec![rule("gpu", Fencer::Command(program), Duration::from_secs(10))];
    });
    let space = agent.space();
    let mut device = agent.unbound_device("gpu").await;
    device.subscribe(space, pages(1, 1)).await;
    let session = device.session;
    device.cut();
    // Severed, owes nothing, its lease over: there is a reason to ask, and the answer is no.
    until(|| lines(&attempts).len() >= 3).await;
    let listed = &agent.listed_sessions().await[0];
    assert_eq!((listed.session_id, listed.phase()), (session, v1::SessionPhase::Severed));
    assert_eq!(listed.lease_remaining_ms, 0);
    let round = agent.round(space, pages(1, 1));
    until(|| agent.host().rounds_in_flight() == 1).await;
    std::fs::write(&gate, "").unwrap();
    let result = soon(round).await.unwrap();
    let seq = result.seq.unwrap();
    let wait = shootdown_server::source::Wait::AtMost(common::BOUND);
    let result = agent.host().await_round(space, seq, wait).await.unwrap();
    assert!(result.is_quiesced(), "the fencer confirmed: {result:?}");
    until(|| agent.host().rounds_in_flight() == 0).await;
}

/// A connection that vanished without a word: no round waits for its device, and no transport tells.
#[tokio::test]
async fn a_device_that_keeps_no_lease_and_falls_silent_is_found_by_its_heartbeats() {
    let folder = tempfile::tempdir().unwrap();
    let attempts = folder.path().join("attempts");
    let program = script(folder.path(), "fence", &format!("echo >> {}; exit 1", attempts.display()));
    let agent = Agent::start_with(|config| {
        lease_of(config, Duration::from_secs(1));
        config.host.fencers = vec![rule("silent", Fencer::Command(program), Duration::from_secs(10))];
    });
    let mut notifier = agent.notifier().await;
    let lenient = notifier.register_address_space(v1::RegisterAddressSpaceRequest::default()).await.unwrap();
    let space = lenient.into_inner().address_space_id;
    let mut silent = agent.unbound_device("silent").await;
    let mut alive = agent.unbound_device("alive").await;
    let mut babbling = agent.unbound_device("babbling").await;
    for device in [&mut silent, &mut alive, &mut babbling] {
        device.try_subscribe(space, vec![wire(pages(1, 1))]).await.unwrap();
    }
    // It owes nothing, and its connection is up as far as anybody can tell.
    soon(async {
        while lines(&attempts).is_empty() {
            alive.settled().await;
            // Nobody understands it, but it is there.
            babbling.ask_raw(v1::SessionRequest { message: None }).await;
            assert!(!babbling.error().await.fatal);
        }
    })
    .await;
    let phases = agent.listed_sessions().await.iter().map(v1::Session::phase).collect::<Vec<_>>();
    assert_eq!(
        phases,
        [v1::SessionPhase::Severed, v1::SessionPhase::Live, v1::SessionPhase::Live],
        "who is silent is not taken for fenced"
    );
    assert!(matches!(silent.next().await, Ok(None)), "its stream has ended: if it lives it comes back");
    alive.settled().await;
}

/// Who may subscribe where.
#[tokio::test]
async fn a_strict_address_space_is_for_devices_that_are_certain_to_stop() {
    let fencer = Fencer::Command("/no/such/program".into());
    let agent = Agent::start_with(|config| {
        config.host.fencers = vec![rule("gpu*", fencer, Duration::from_secs(1))];
    });
    let mut notifier = agent.notifier().await;
    let mut register = async |strict| {
        let request =
            v1::RegisterAddressSpaceRequest { strict, ..v1::RegisterAddressSpaceRequest::default() };
        notifier.register_address_space(request).await.unwrap().into_inner().address_space_id
    };
    let (strict, lenient) = (register(true).await, register(false).await);
    let embedded = agent.space().get();
    let memory = agent.running.as_ref().unwrap().memory().create("memory").unwrap().get();
    let range = || vec![wire(pages(1, 1))];
    let mut enforces = agent.device("nic").await;
    let mut fenced = agent.unbound_device("gpu7").await;
    let mut unbound = agent.unbound_device("fpga").await;
    for space in [strict, lenient, embedded, memory] {
        enforces.try_subscribe(space, range()).await.unwrap();
        fenced.try_subscribe(space, range()).await.unwrap();
        match unbound.try_subscribe(space, range()).await {
            Ok(_) => assert_eq!(space, lenient),
            Err(error) => {
                assert_ne!(space, lenient);
                assert_eq!((error.reason(), error.fatal), (Reason::LeaseRequired, false));
            }
        }
    }
    unbound.settled().await;
    let sessions = agent.listed_sessions().await;
    assert_eq!(sessions.iter().map(|session| session.subscriptions).collect::<Vec<_>>(), [4, 4, 1]);
}
