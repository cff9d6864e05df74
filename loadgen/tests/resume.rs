//! A connection that is cut, with the SDK at one end and a host agent at the other: the session goes on.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::{HashSet, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use shootdown_client::{
    Access, AddrRange, AddressSpaceId, Cause, Device, DeviceConfig, DeviceId, DeviceTlb, Endpoint,
    FlushAllCause, Flushed, FrameNumber, PageSize, Translation, UseRefused,
};
use shootdown_server::config::{Settings, Span};
use shootdown_server::source::{
    FaultError, Invalidation, Notifier as _, Outcome, RoundResult, Translate, Wait,
};
use shootdown_server::{Host, ListenAddr, Running};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};

/// No wait in a test is longer: what has not happened by then does not happen.
const BOUND: Duration = Duration::from_secs(20);

async fn soon<F: Future>(what: F) -> F::Output {
    tokio::time::timeout(BOUND, what).await.expect("this must happen within the bound")
}

fn pages(first: u64, count: u64) -> AddrRange {
    AddrRange::new(first << 12, (first + count) << 12).unwrap()
}

/// A source whose page n is always in frame n.
struct Identity;

impl Translate for Identity {
    fn source(&self) -> &'static str {
        "api"
    }

    fn fault(
        &self,
        _: AddressSpaceId,
        range: AddrRange,
        access: Access,
    ) -> BoxFuture<'_, Result<Vec<Translation>, FaultError>> {
        let page = |address| AddrRange::page_of(address, PageSize::BASE);
        let all = range
            .pages(PageSize::BASE)
            .map(|address| Translation { range: page(address), frame: FrameNumber(address >> 12), access })
            .collect();
        Box::pin(async move { Ok(all) })
    }

    fn bytes(&self, _: &[Translation]) -> Result<Bytes, FaultError> {
        Err(FaultError::NotServed)
    }
}

/// Which way bytes go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    ToHost,
    ToDevice,
}

/// Between the device and its host agent: cuts connections.
struct Proxy {
    path: PathBuf,
    cuts: watch::Sender<u64>,
    limits: Arc<Mutex<VecDeque<(Way, usize)>>>,
}

impl Proxy {
    fn start(path: PathBuf, host: PathBuf) -> Self {
        let listener = UnixListener::bind(&path).unwrap();
        let cuts = watch::Sender::new(0);
        let limits = Arc::new(Mutex::new(VecDeque::new()));
        let (cut, left) = (cuts.clone(), Arc::clone(&limits));
        tokio::spawn(async move {
            loop {
                let (device, _) = listener.accept().await.unwrap();
                let Ok(host) = UnixStream::connect(&host).await else { continue };
                let (mut cut, left) = (cut.subscribe(), Arc::clone(&left));
                tokio::spawn(async move {
                    let (from_device, to_device) = device.into_split();
                    let (from_host, to_host) = host.into_split();
                    tokio::select! {
                        _ = cut.changed() => {}
                        () = copy(from_device, to_host, Way::ToHost, &left) => {}
                        () = copy(from_host, to_device, Way::ToDevice, &left) => {}
                    }
                });
            }
        });
        Self { path, cuts, limits }
    }

    /// Cuts the connection when it has carried so many more bytes that way, and then the next.
    fn cut_after(&self, limits: &[(Way, usize)]) {
        *self.limits.lock() = limits.iter().copied().collect();
    }

    /// Every connection is gone.
    fn cut(&self) {
        self.cuts.send_modify(|cuts| *cuts += 1);
    }
}

/// Ends when the connection does, or the limit is reached.
async fn copy(
    mut from: tokio::net::unix::OwnedReadHalf,
    mut to: tokio::net::unix::OwnedWriteHalf,
    way: Way,
    limits: &Mutex<VecDeque<(Way, usize)>>,
) {
    let mut buffer = vec![0; 4096];
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        let carried = {
            let mut limits = limits.lock();
            match limits.front_mut() {
                Some((limited, left)) if *limited == way => {
                    let carried = read.min(*left);
                    *left -= carried;
                    if *left == 0 {
                        limits.pop_front();
                        Err(carried)
                    } else {
                        Ok(carried)
                    }
                }
                _ => Ok(read),
            }
        };
        let (Ok(bytes) | Err(bytes)) = carried;
        if to.write_all(&buffer[..bytes]).await.is_err() || carried.is_err() {
            return;
        }
    }
}

struct World {
    running: Running,
    proxy: Proxy,
    _folder: tempfile::TempDir,
}

impl World {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = |name: &str| vec![ListenAddr::Unix(folder.path().join(name))];
        let settings = Settings {
            listen: socket("device"),
            source_listen: socket("source"),
            admin_listen: socket("admin"),
            shards: Some(2),
            lease: Some(Span(Duration::from_secs(60))),
            ack_timeout: Some(Span(Duration::from_secs(60))),
            drain_timeout: Some(Span(Duration::from_secs(1))),
            ..Settings::default()
        };
        let running = shootdown_server::start(settings.resolve().unwrap()).unwrap();
        let proxy = Proxy::start(folder.path().join("proxy"), folder.path().join("device"));
        Self { running, proxy, _folder: folder }
    }

    fn host(&self) -> &Host {
        self.running.host()
    }

    fn space(&self) -> AddressSpaceId {
        self.host().register("test", Arc::new(Identity)).unwrap()
    }

    async fn device(&self, name: &str, tlb: &Arc<Tlb>) -> Device<Tlb> {
        let endpoint = Endpoint::Unix(self.proxy.path.clone());
        let config = DeviceConfig::new(DeviceId::new(name).unwrap(), endpoint);
        soon(Device::connect(config, Arc::clone(tlb))).await.unwrap()
    }

    /// A bracket over `range`: resolves when its round is complete, and the bracket is closed.
    fn bracket(
        &self,
        address_space: AddressSpaceId,
        range: AddrRange,
    ) -> tokio::task::JoinHandle<RoundResult> {
        let host = self.host().clone();
        tokio::spawn(async move {
            let wait = Wait::ForTargets;
            let call = Invalidation {
                address_space,
                range,
                cause: Cause::Unmap,
                owner: None,
                wait,
                resident_pages: None,
            };
            let result = host.invalidate_range_start(call).await.unwrap();
            host.invalidate_range_end(address_space, result.seq.unwrap()).unwrap();
            result
        })
    }
}

/// A TLB whose flushes wait while a test holds the permits.
struct Tlb {
    flushed: Mutex<Vec<shootdown_client::Invalidation>>,
    flush_alls: Mutex<Vec<FlushAllCause>>,
    begun: watch::Sender<usize>,
    leave: Semaphore,
    dirty: Mutex<HashSet<u64>>,
}

impl Tlb {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            flushed: Mutex::default(),
            flush_alls: Mutex::default(),
            begun: watch::Sender::new(0),
            leave: Semaphore::new(Semaphore::MAX_PERMITS),
            dirty: Mutex::default(),
        })
    }

    fn hold(&self) {
        self.leave.forget_permits(Semaphore::MAX_PERMITS);
    }

    fn release(&self) {
        self.leave.add_permits(1 << 20);
    }

    async fn begun(&self, count: usize) {
        soon(self.begun.subscribe().wait_for(|begun| *begun >= count)).await.unwrap();
    }
}

impl DeviceTlb for Tlb {
    async fn invalidate(&self, invalidation: shootdown_client::Invalidation) -> Flushed {
        self.begun.send_modify(|begun| *begun += 1);
        self.leave.acquire().await.unwrap().forget();
        self.flushed.lock().push(invalidation);
        let written = |page: &u64| invalidation.range.overlaps(pages(*page, 1));
        let dirty: Vec<u64> = self.dirty.lock().extract_if(written).collect();
        Flushed { young: vec![], dirty: dirty.into_iter().map(|page| pages(page, 1)).collect() }
    }

    async fn flush_all(&self, cause: FlushAllCause) {
        self.flush_alls.lock().push(cause);
    }
}

/// 12: the round is complete by the ack that comes on the second connection, and nothing else was lost.
#[tokio::test]
async fn a_session_goes_on_when_its_connection_is_cut_in_the_middle_of_a_round() {
    let world = World::start();
    let space = world.space();
    let tlb = Tlb::new();
    let device = world.device("gpu0", &tlb).await;
    let ranges = [pages(0, 16)];
    let subscription = soon(device.subscribe(space, &ranges, Default::default())).await.unwrap();
    let held = soon(device.fault(space, pages(1, 3), Access::Write)).await.unwrap();
    tlb.hold();
    let round = world.bracket(space, pages(1, 1));
    tlb.begun(1).await;
    let session = device.session_id();
    world.proxy.cut();
    soon(device.resumed(1)).await;
    assert!(!round.is_finished(), "to come back is no ack");
    assert_eq!(held[0].begin_use().unwrap_err(), UseRefused::Revoked);
    drop(held[1].begin_use().expect("what no notice took is still held"));
    tlb.release();
    let result = soon(round).await.unwrap();
    assert!(result.is_quiesced());
    assert_eq!(result.targets[0].outcome, Outcome::Acked);
    assert_eq!((device.session_id(), device.resumes()), (session, 1));
    drop(held[2].begin_use().expect("and after the round"));
    // The session works as before.
    assert_eq!(soon(world.bracket(space, pages(2, 1))).await.unwrap().targets[0].outcome, Outcome::Acked);
    assert_eq!(held[1].begin_use().unwrap_err(), UseRefused::Revoked);
    soon(device.fault(space, pages(2, 1), Access::Read)).await.unwrap();
    soon(subscription.unsubscribe()).await.unwrap();
    assert_eq!(*tlb.flush_alls.lock(), [FlushAllCause::Connecting], "nothing else was flushed");
    let flushed: Vec<AddrRange> = tlb.flushed.lock().iter().map(|flush| flush.range).collect();
    assert_eq!(flushed, [pages(1, 1), pages(2, 1), pages(0, 16)], "and nothing twice");
}

/// Whatever was on its way, and however much of it had arrived: nothing is released that is in use, nothing that a
/// device wrote or used is forgotten, nothing is done twice, and nothing is flushed that need not be.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_may_be_cut_after_any_number_of_bytes() {
    let world = World::start();
    let mut resumed = 0;
    for bytes in 1..250 {
        let (one, other) =
            if bytes % 2 == 0 { (Way::ToHost, Way::ToDevice) } else { (Way::ToDevice, Way::ToHost) };
        // The second cut is anywhere from the greeting to the end.
        resumed += cut(&world, &[(one, bytes), (other, 1 + bytes * 37 % 701)]).await;
    }
    assert!(resumed > 200, "only {resumed} connections were lost while something was on its way");
}

/// How often the session was resumed.
async fn cut(world: &World, limits: &[(Way, usize)]) -> u64 {
    let case = format!("cut after {limits:?}");
    let space = world.space();
    let tlb = Tlb::new();
    let device = world.device(&format!("gpu-{space}"), &tlb).await;
    soon(device.subscribe(space, &[pages(0, 8)], Default::default())).await.unwrap();
    let held = soon(device.fault(space, pages(0, 4), Access::Write)).await.unwrap();
    tlb.dirty.lock().extend([1, 2]);

    world.proxy.cut_after(limits);
    device.report_young(space, vec![pages(3, 1)]).unwrap();
    let rounds = async { tokio::join!(world.bracket(space, pages(1, 1)), world.bracket(space, pages(2, 1))) };
    let faults = device.fault(space, pages(5, 2), Access::Read);
    let joins_and_leaves = async {
        let joined = device.subscribe(space, &[pages(8, 8)], Default::default()).await.unwrap();
        drop(device.fault(space, pages(9, 1), Access::Read).await.unwrap());
        joined.unsubscribe().await.unwrap();
    };
    let ((first, second), faulted, ()) = soon(async { tokio::join!(rounds, faults, joins_and_leaves) }).await;
    let faulted = faulted.unwrap();
    for result in [first.unwrap(), second.unwrap()] {
        assert!(result.is_quiesced() && result.targets.len() == 1, "{case}: {result:?}");
        assert_eq!(result.targets[0].outcome, Outcome::Acked, "{case}");
        assert!(result.dirty, "{case}: the device wrote that page");
    }
    for (page, mapping) in held.iter().enumerate() {
        let taken = page == 1 || page == 2;
        assert_eq!(mapping.begin_use().is_err(), taken, "{case}: page {page}");
    }
    assert!(faulted.iter().all(|mapping| mapping.begin_use().is_ok()), "{case}");

    // Nobody is told any more of what was unsubscribed: not once, and not twice either.
    let left = soon(world.bracket(space, pages(8, 8))).await.unwrap();
    assert!(left.targets.is_empty(), "{case}: {left:?}");
    // And of the rest precisely.
    let last = soon(world.bracket(space, pages(5, 1))).await.unwrap();
    assert_eq!(last.targets[0].outcome, Outcome::Acked, "{case}");
    assert!(faulted[0].begin_use().is_err() && faulted[1].begin_use().is_ok(), "{case}");
    // It comes on the stream before the ack of the last round, which is here.
    assert!(world.host().test_young(space, pages(3, 1)).unwrap(), "{case}: the device used that page");

    assert_eq!(*tlb.flush_alls.lock(), [FlushAllCause::Connecting], "{case}");
    let flushes_of = |page| {
        let flushed = tlb.flushed.lock();
        flushed.iter().filter(|flush| flush.notice.is_some() && flush.range.overlaps(pages(page, 1))).count()
    };
    for page in [1, 2, 5] {
        assert_eq!(flushes_of(page), 1, "{case}: page {page}");
    }
    let resumes = device.resumes();
    world.proxy.cut_after(&[]);
    soon(device.leave()).await;
    resumes
}
