//! What a slow flush holds up, and what it does not: the real host agent, real devices on real sockets.
//!
//! The host agent has one shard, so that a flush that waited on its thread would hold up everybody. Run it
//! with `--nocapture` to see the times.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test helper fails and prints as its test does"
)]

use std::sync::Arc;
use std::time::Duration;

use shootdown_client::{
    Access, AddrRange, AddressSpaceId, Cause, Clock, Device, DeviceConfig, DeviceId, DeviceTlb, Endpoint,
    FlushAllCause, Flushed, Invalidation, Mapping, SubscribeOptions,
};
use shootdown_server::config::{Settings, Span};
use shootdown_server::source::memory::{MemorySource, Released};
use shootdown_server::source::rpc::RpcSource;
use shootdown_server::source::{Invalidation as Event, Notifier as _, Outcome, RoundResult, Wait};
use shootdown_server::{Host, ListenAddr, Running};
use tokio::sync::{Barrier, Semaphore};

/// How long a test waits for what must happen. It only has to be longer than a slow machine.
const PATIENCE: Duration = Duration::from_secs(20);

const HALF_A_SECOND: Duration = Duration::from_millis(500);
const A_FIFTH: Duration = Duration::from_millis(200);

/// Of another address space, while a flush goes on.
const ROUNDS: usize = 50;

const PAGE: AddrRange = AddrRange::page_of(0x7000_0000_0000, shootdown_client::PageSize::BASE);

/// A device that has slept, and been let go, when its flush is done.
struct Slow {
    takes: Duration,
    flushing: Semaphore,
    let_go: Semaphore,
}

impl DeviceTlb for Slow {
    async fn invalidate(&self, _: Invalidation) -> Flushed {
        self.flushing.add_permits(1);
        tokio::time::sleep(self.takes).await;
        self.let_go.acquire().await.unwrap().forget();
        Flushed::default()
    }

    async fn flush_all(&self, _: FlushAllCause) {}
}

/// A device that begins to sleep when the other one flushes too: asked one after the other, never.
struct Together {
    takes: Duration,
    both_flush: Arc<Barrier>,
}

impl DeviceTlb for Together {
    async fn invalidate(&self, _: Invalidation) -> Flushed {
        self.both_flush.wait().await;
        tokio::time::sleep(self.takes).await;
        Flushed::default()
    }

    async fn flush_all(&self, _: FlushAllCause) {}
}

/// A device whose flush takes no time.
struct Fast;

impl DeviceTlb for Fast {
    async fn invalidate(&self, _: Invalidation) -> Flushed {
        Flushed::default()
    }

    async fn flush_all(&self, _: FlushAllCause) {}
}

struct HostAgent {
    dir: tempfile::TempDir,
    running: Running,
}

impl HostAgent {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let settings = Settings {
            listen: vec![ListenAddr::Unix(dir.path().join("device"))],
            shards: Some(1),
            // A machine that is busy with something else must not have a device fenced.
            ack_timeout: Some(Span(PATIENCE)),
            lease: Some(Span(2 * PATIENCE)),
            drain_timeout: Some(Span(Duration::from_secs(1))),
            ..Settings::default()
        };
        let running = shootdown_server::start(settings.resolve().unwrap()).unwrap();
        Self { dir, running }
    }

    fn host(&self) -> &Host {
        self.running.host()
    }

    fn memory(&self) -> &MemorySource<Host> {
        self.running.memory()
    }

    /// A device that is told of the page in one address space.
    async fn device<T: DeviceTlb>(&self, name: &str, tlb: T, space: AddressSpaceId) -> Device<T> {
        let endpoint = Endpoint::Unix(self.dir.path().join("device"));
        let config = DeviceConfig::new(DeviceId::new(name).unwrap(), endpoint);
        let device = soon(Device::connect(config, Arc::new(tlb))).await.unwrap();
        soon(device.subscribe(space, &[PAGE], SubscribeOptions::default())).await.unwrap();
        device
    }

    /// An address space with the page in it.
    async fn mapped(&self, name: &str) -> AddressSpaceId {
        let space = self.memory().create(name).unwrap();
        self.memory().map(space, PAGE, Access::Write).unwrap();
        self.memory().store(space, PAGE.start(), &[1]).await.unwrap();
        space
    }
}

/// Bounds every wait of a test.
async fn soon<F: Future>(what: F) -> F::Output {
    tokio::time::timeout(PATIENCE, what).await.expect("what the test waits for must happen")
}

/// What it gave, and how long it took.
async fn timed<F: Future>(what: F) -> (F::Output, Duration) {
    let clock = Clock::boottime();
    let began = clock.now();
    let output = soon(what).await;
    (output, clock.now().since(began))
}

async fn fault<T: DeviceTlb>(device: &Device<T>, space: AddressSpaceId) -> Mapping {
    soon(device.fault(space, PAGE, Access::Read)).await.unwrap().remove(0)
}

/// The one round of one page, which all of its targets have acked.
fn acked(released: &Released, targets: usize) -> &RoundResult {
    let [round] = &released.rounds[..] else { panic!("one round: {released:#?}") };
    assert_eq!(released.frames, 1, "{released:#?}");
    all_acked(round, targets);
    round
}

fn all_acked(round: &RoundResult, targets: usize) {
    assert!(round.is_quiesced() && round.targets.len() == targets, "{round:#?}");
    assert!(round.targets.iter().all(|target| target.outcome == Outcome::Acked), "{round:#?}");
}

#[tokio::test]
async fn a_flush_of_half_a_second_holds_its_munmap_and_no_other_address_space() {
    let agent = HostAgent::start();
    let (slow_space, fast_space) = (agent.mapped("slow").await, agent.mapped("fast").await);
    let tlb = Slow { takes: HALF_A_SECOND, flushing: Semaphore::new(0), let_go: Semaphore::new(0) };
    let slow = agent.device("slow", tlb, slow_space).await;
    let fast = agent.device("fast", Fast, fast_space).await;
    let held = fault(&slow, slow_space).await;

    let memory = agent.memory().clone();
    let munmap = tokio::spawn(timed(async move { memory.unmap(slow_space, PAGE).await }));
    soon(slow.tlb().flushing.acquire()).await.unwrap().forget();
    // In its flush, and it stays there until it is let go.
    assert!(held.begin_use().is_err(), "withdrawn before the flush began");
    let mut longest = Duration::ZERO;
    for _ in 0..ROUNDS {
        let memory = agent.memory();
        soon(memory.store(fast_space, PAGE.start(), &[1])).await.unwrap();
        let mapping = fault(&fast, fast_space).await;
        let (released, took) = timed(memory.dont_need(fast_space, PAGE)).await;
        acked(&released.unwrap(), 1);
        assert!(mapping.begin_use().is_err(), "the round was about this one");
        longest = longest.max(took);
    }
    assert!(!munmap.is_finished(), "its device has not acked");
    assert_eq!(agent.host().rounds_in_flight(), 1, "its round, and no other");

    slow.tlb().let_go.add_permits(1);
    let (released, took) = soon(munmap).await.unwrap();
    acked(&released.unwrap(), 1);
    println!("munmap behind a flush of {HALF_A_SECOND:?}: {took:?}");
    println!("meanwhile {ROUNDS} rounds of another address space, the longest: {longest:?}");
    assert!(took >= HALF_A_SECOND, "released after {took:?}, before the flush was over");
    agent.running.shutdown().await;
}

#[tokio::test]
async fn two_devices_flush_at_the_same_time() {
    let agent = HostAgent::start();
    let both_flush = Arc::new(Barrier::new(2));
    let space = agent.mapped("shared").await;
    let registered = agent.host().register("registered", Arc::new(RpcSource::default())).unwrap();
    let mut devices = Vec::new();
    for name in ["left", "right"] {
        let tlb = Together { takes: A_FIFTH, both_flush: Arc::clone(&both_flush) };
        let device = agent.device(name, tlb, space).await;
        soon(device.subscribe(registered, &[PAGE], SubscribeOptions::default())).await.unwrap();
        let mapping = fault(&device, space).await;
        devices.push((device, mapping));
    }

    // Asked one after the other, neither would get past the barrier.
    let (released, took) = timed(agent.memory().unmap(space, PAGE)).await;
    let released = released.unwrap();
    let munmap = acked(&released, 2);
    println!("munmap behind two flushes of {A_FIFTH:?} each: {took:?}");
    assert!(took >= A_FIFTH, "released after {took:?}, before the flushes were over");
    each_took_its_time(munmap);

    let (cause, wait) = (Cause::Unmap, Wait::ForTargets);
    let event =
        Event { address_space: registered, range: PAGE, cause, owner: None, wait, resident_pages: None };
    let (round, took) = timed(agent.host().invalidate_range_start(event)).await;
    let round = round.unwrap();
    println!("a round behind the same two: {took:?}");
    all_acked(&round, 2);
    each_took_its_time(&round);
    agent.host().invalidate_range_end(registered, round.seq.unwrap()).unwrap();
    agent.running.shutdown().await;
}

fn each_took_its_time(round: &RoundResult) {
    for target in &round.targets {
        let elapsed = target.elapsed.unwrap();
        println!("  {}: {elapsed:?}", target.device);
        assert!(elapsed >= A_FIFTH, "{target:#?}");
    }
}
