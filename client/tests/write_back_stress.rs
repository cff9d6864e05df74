//! Many tasks write, read and flush few pages through a tiny TLB and a tiny cache, and the host moves each page
//! to another frame as soon as its flush is acked: what was accepted is there by then, and nothing comes later.
#![cfg(feature = "agent")]
#![allow(clippy::unwrap_used, reason = "a helper of tests, which fail by panicking")]

mod host;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use host::{FakeHost, FakeSession, Frames, notice_of, page, pages, space};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use shootdown_client::agent::{Accelerator, AcceleratorConfig, FlushTime};
use shootdown_client::{
    AddrRange, Cause, DeviceTlb as _, FrameNumber, Invalidation, NoticeNumber, PageSize, Translation,
};
use shootdown_core::NoticeKind;
use shootdown_proto::message::{DeviceSays, Fault, Grant, HostSays};

const TASKS: u64 = 6;
/// Pages that each task writes a part of, and then one for each task that it writes as a whole.
const SHARED: u64 = 3;
const PAGES: u64 = SHARED + TASKS;
const OPERATIONS: u64 = 400;
const POISON: u8 = 0xee;

/// What each (page, task) was last told `Ok` for, and last tried.
type Oracle = Arc<Mutex<HashMap<(u64, u64), (u64, u64)>>>;

fn slot(task: u64) -> usize {
    task as usize * 512 + 8
}

/// One device task: its own slot of every shared page, and a page of its own.
async fn work(accelerator: Arc<Accelerator>, oracle: Oracle, task: u64) {
    let mut random = StdRng::seed_from_u64(task);
    for value in 1..=OPERATIONS {
        let page = match random.random_range(0..=SHARED) {
            SHARED => SHARED + task,
            shared => shared,
        };
        let (is_whole, address) = (page >= SHARED, (page << 12) + slot(task) as u64);
        let patience = match random.random_range(0..4) {
            0 => Duration::from_micros(random.random_range(0..2000)),
            _ => Duration::from_secs(20),
        };
        match random.random_range(0..10) {
            0..5 => {
                let (from, bytes) = match is_whole {
                    true => (page << 12, value.to_le_bytes().repeat(512)),
                    false => (address, value.to_le_bytes().to_vec()),
                };
                oracle.lock().entry((page, task)).or_default().1 = value;
                let write = accelerator.write(space(), from, bytes.into());
                // A caller that goes away has not written.
                if let Ok(written) = tokio::time::timeout(patience, write).await {
                    written.unwrap();
                    oracle.lock().entry((page, task)).or_default().0 = value;
                }
            }
            5..9 => {
                let read = accelerator.read(space(), address, 8);
                let Ok(read) = tokio::time::timeout(patience, read).await else { continue };
                let seen = u64::from_le_bytes(read.unwrap().bytes[..].try_into().unwrap());
                let accepted = oracle.lock().get(&(page, task)).copied().unwrap_or_default().0;
                assert_eq!(seen, accepted, "task {task} sees its own last write of page {page}");
            }
            // As `Subscription::unsubscribe` does; the write-backs go on where the caller does not.
            _ => {
                let (address_space, range, cause) = (space(), pages(0, PAGES), Cause::Unmap);
                let asked =
                    Invalidation { address_space, range, cause, owner: None, seq: None, notice: None };
                let _ = tokio::time::timeout(patience, accelerator.invalidate(asked)).await;
            }
        }
        if value % 7 == 0 {
            tokio::task::yield_now().await;
        }
    }
}

/// The host: where each page is, which are being taken away, and who waits for them.
struct Host {
    frames: Frames,
    oracle: Oracle,
    frame_of: Vec<u64>,
    free: VecDeque<u64>,
    brackets: BTreeMap<NoticeNumber, AddrRange>,
    /// Notices that open no bracket.
    queries: Vec<NoticeNumber>,
    held: Vec<Fault>,
    next: u64,
    moves: u64,
    random: StdRng,
}

impl Host {
    fn new(frames: Frames, oracle: Oracle) -> Self {
        let mut bytes = frames.bytes.lock();
        bytes.extend((0..PAGES).map(|page| (page, vec![0; 4096])));
        bytes.extend((PAGES..3 * PAGES).map(|frame| (frame, vec![POISON; 4096])));
        drop(bytes);
        Self {
            frames,
            oracle,
            frame_of: (0..PAGES).collect(),
            free: (PAGES..3 * PAGES).collect(),
            brackets: BTreeMap::new(),
            queries: Vec::new(),
            held: Vec::new(),
            next: 1,
            moves: 0,
            random: StdRng::seed_from_u64(99),
        }
    }

    async fn start_bracket(&mut self, session: &FakeSession, range: AddrRange) {
        let query = self.random.random_range(0..4) == 0;
        let kind = if query { NoticeKind::ClearFlushYoung } else { NoticeKind::Invalidate };
        let notice = notice_of(self.next, kind, range);
        self.next += 1;
        match query {
            true => self.queries.push(notice.number),
            false => drop(self.brackets.insert(notice.number, range)),
        }
        session.notices([notice]).await;
    }

    async fn on_said(&mut self, session: &FakeSession, says: DeviceSays) {
        match says {
            DeviceSays::Fault(fault) => self.held.push(fault),
            DeviceSays::Ack { ack, .. } => {
                let is_acked =
                    |number: &NoticeNumber| Some(*number) <= ack.through || ack.selective.contains(number);
                self.queries.retain(|number| !is_acked(number));
                let acked: Vec<_> = self.brackets.extract_if(.., |number, _| is_acked(number)).collect();
                for (_, range) in acked {
                    self.on_acked(range);
                }
            }
            DeviceSays::Young { .. } => {}
            other => panic!("{other:?}"),
        }
        let held = std::mem::take(&mut self.held);
        for fault in held {
            if self.brackets.values().any(|range| range.overlaps(fault.range)) {
                self.held.push(fault);
            } else {
                self.grant(session, &fault).await;
            }
        }
    }

    async fn grant(&self, session: &FakeSession, fault: &Fault) {
        let translation = Translation {
            range: AddrRange::page_of(fault.range.start(), PageSize::BASE),
            frame: FrameNumber(self.frame_of[(fault.range.start() >> 12) as usize]),
            access: fault.access,
        };
        let grant = Grant {
            request: fault.request,
            address_space: fault.address_space,
            seq: None,
            translations: vec![translation],
            data: Bytes::new(),
        };
        session.say(HostSays::Grant(grant)).await;
    }

    /// The device has stopped using the range: all that was accepted is there, and the pages go elsewhere.
    fn on_acked(&mut self, range: AddrRange) {
        for page in (0..PAGES).filter(|number| range.contains(page(*number))) {
            if self
                .brackets
                .values()
                .any(|other| other.contains(AddrRange::page_of(page << 12, PageSize::BASE)))
            {
                continue;
            }
            let old = self.frame_of[page as usize];
            let mut frames = self.frames.bytes.lock();
            check(page, &frames[&old], &self.oracle);
            let new = self.free.pop_front().unwrap();
            assert!(frames[&new].iter().all(|byte| *byte == POISON), "a write came after the ack");
            let bytes = frames.insert(old, vec![POISON; 4096]).unwrap();
            frames.insert(new, bytes);
            self.free.push_back(old);
            self.frame_of[page as usize] = new;
            self.moves += 1;
        }
    }
}

fn check(page: u64, bytes: &[u8], oracle: &Oracle) {
    let oracle = oracle.lock();
    for task in (0..TASKS).filter(|task| page < SHARED || page == SHARED + task) {
        let (accepted, tried) = oracle.get(&(page, task)).copied().unwrap_or_default();
        let found = u64::from_le_bytes(bytes[slot(task)..][..8].try_into().unwrap());
        // A write that was accepted a moment ago may not be in the books yet.
        assert!(found == accepted || found == tried, "page {page}, task {task}: {found}, not {accepted}");
    }
}

async fn stress(config: AcceleratorConfig) -> Arc<Accelerator> {
    let mut host = FakeHost::start();
    let accelerator = Accelerator::new(config);
    let (device, mut session) = host.subscribed(host.config(), &accelerator).await;
    accelerator.attach(&device).unwrap();
    let oracle = Oracle::default();
    let mut model = Host::new(host.frames.clone(), Arc::clone(&oracle));
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..TASKS {
        let (accelerator, oracle) = (Arc::clone(&accelerator), Arc::clone(&oracle));
        tasks.spawn(work(accelerator, oracle, task));
    }
    let mut pace = tokio::time::interval(Duration::from_millis(2));
    let mut last = false;
    loop {
        tokio::select! {
            biased;
            Some(done) = tasks.join_next() => done.unwrap(),
            says = session.next() => match says.unwrap() {
                DeviceSays::Heartbeat { request } => {
                    session.say(HostSays::LeaseRenewed { request, lease: session.lease }).await;
                }
                says => model.on_said(&session, says).await,
            },
            _ = pace.tick() => {
                let is_over = tasks.is_empty();
                let waiting = model.brackets.len() + model.queries.len();
                if is_over && waiting == 0 && last {
                    break;
                }
                if waiting < 3 && !last {
                    let first = model.random.random_range(0..PAGES);
                    let count = model.random.random_range(1..=PAGES - first);
                    let range = if is_over { pages(0, PAGES) } else { pages(first, count) };
                    model.start_bracket(&session, range).await;
                    last = is_over;
                }
            }
        }
    }
    for (page, frame) in model.frame_of.iter().enumerate() {
        check(page as u64, &host.frames.bytes.lock()[frame], &oracle);
    }
    assert!(model.moves > 20, "{} moves", model.moves);
    assert_eq!(
        (accelerator.dirty_pages(), accelerator.dmas_in_flight(), accelerator.access_counts().dirty_lost),
        (0, 0, 0)
    );
    accelerator
}

fn tiny(tlb_ways: usize, cache_pages: usize) -> AcceleratorConfig {
    let flush_time = FlushTime::Exponential { mean: Duration::from_micros(200) };
    AcceleratorConfig { tlb_sets: 2, tlb_ways, cache_pages, flush_time, ..AcceleratorConfig::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_accepted_write_is_lost_where_the_cache_is_smaller_than_the_tlb() {
    let counts = stress(tiny(4, 2)).await.access_counts();
    assert!(counts.written_back > 100, "{counts:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_accepted_write_is_lost_where_the_tlb_is_smaller_than_the_cache() {
    let counts = stress(tiny(1, 8)).await.access_counts();
    assert!(counts.written_back > 100, "{counts:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_accepted_write_is_lost_where_one_page_fits() {
    let counts = stress(tiny(1, 1)).await.access_counts();
    assert!(counts.written_back > 100, "{counts:?}");
}
