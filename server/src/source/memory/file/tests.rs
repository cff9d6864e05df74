//! A page's way out, as reclaim takes it. Beside reclaim nobody calls it, so it is tested here.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use parking_lot::Mutex;
use shootdown_core::{Incarnation, Moment, Seq, Translation};
use tokio::sync::watch;

use super::super::{FrameStore, MemoryConfig, POISON, Twin};
use super::*;
use crate::source::{Invalidation, NotifyError, RoundResult, RoundTimes, Translate, Verdict, Wait};

const PAGE: u64 = FRAME_BYTES as u64;

/// A notifier whose page rounds are held while the gate is shut, or refused.
struct Held {
    gate: watch::Sender<Gate>,
    rounds: Mutex<u64>,
    spaces: Mutex<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Gate {
    Open,
    Shut,
    Refuses,
}

fn quiesced() -> RoundResult {
    let at = Moment::from_nanos(0);
    let times =
        RoundTimes { called: at, dispatched: at, resolved: Some(at), finished: Some(at), answered: at };
    RoundResult {
        verdict: Verdict::Quiesced,
        seq: Seq::new(1),
        targets: Vec::new(),
        young: false,
        dirty: false,
        host_incarnation: Incarnation::FIRST,
        times,
    }
}

impl Notifier for Held {
    fn register(&self, _: &str, _: Arc<dyn Translate>) -> Result<AddressSpaceId, NotifyError> {
        *self.spaces.lock() += 1;
        Ok(AddressSpaceId::new(*self.spaces.lock()).unwrap())
    }

    async fn invalidate_range_start(&self, _: Invalidation) -> Result<RoundResult, NotifyError> {
        Ok(quiesced())
    }

    fn invalidate_range_end(&self, _: AddressSpaceId, _: Seq) -> Result<(), NotifyError> {
        Ok(())
    }

    async fn invalidate_page(
        &self,
        _: AddressSpaceId,
        _: u64,
        cause: Cause,
        _: Wait,
    ) -> Result<RoundResult, NotifyError> {
        let twin = Twin::current();
        assert!(matches!(
            (cause, twin),
            (Cause::Clear, None) | (Cause::ProtectionPage, Some(Twin::WriteBack))
        ));
        *self.rounds.lock() += 1;
        let gate = *self.gate.subscribe().wait_for(|gate| *gate != Gate::Shut).await.unwrap();
        if gate == Gate::Refuses { Err(NotifyError::Stopping) } else { Ok(quiesced()) }
    }

    async fn change_pte(
        &self,
        _: AddressSpaceId,
        _: Translation,
        _: Wait,
    ) -> Result<RoundResult, NotifyError> {
        Ok(quiesced())
    }

    async fn clear_flush_young(
        &self,
        _: AddressSpaceId,
        _: AddrRange,
        _: Wait,
    ) -> Result<RoundResult, NotifyError> {
        Ok(quiesced())
    }

    async fn clear_young(
        &self,
        _: AddressSpaceId,
        _: AddrRange,
        _: Wait,
    ) -> Result<RoundResult, NotifyError> {
        Ok(quiesced())
    }

    fn test_young(&self, _: AddressSpaceId, _: AddrRange) -> Result<bool, NotifyError> {
        Ok(false)
    }

    async fn release(&self, _: AddressSpaceId) -> Result<RoundResult, NotifyError> {
        Ok(quiesced())
    }
}

/// A source, its notifier, and a file of two pages that two address spaces show; only the first has touched it.
struct Setup {
    source: MemorySource<Held>,
    notifier: Arc<Held>,
    file: MemoryFile,
    spaces: [AddressSpaceId; 2],
}

impl Setup {
    fn new(disk: &File) -> Self {
        let notifier = Arc::new(Held {
            gate: watch::Sender::new(Gate::Open),
            rounds: Mutex::default(),
            spaces: Mutex::default(),
        });
        let now: super::super::Clock = Arc::new(|| Moment::from_nanos(0));
        let config = MemoryConfig::new(now, tokio::runtime::Handle::current());
        let source = MemorySource::new(Arc::clone(&notifier), FrameStore::new(8).unwrap(), config);
        let file = source.open_file(disk.try_clone().unwrap(), 2 * PAGE).unwrap();
        let spaces = ["first", "second"].map(|name| {
            let space = source.create(name).unwrap();
            let range = AddrRange::new(0, 2 * PAGE).unwrap();
            source.map_file(space, range, Access::Write, &file, 0).unwrap();
            space
        });
        Self { source, notifier, file, spaces }
    }

    async fn get(&self, space: usize) -> u8 {
        self.source.load(self.spaces[space], 0, 1).await.unwrap()[0]
    }

    async fn put(&self, space: usize, byte: u8) {
        self.source.store(self.spaces[space], 0, &[byte]).await.unwrap();
    }

    fn isolate(&self) -> Option<Isolated> {
        let life = self.file.open.backing.lock().get(0)?.frame.life();
        self.source.inner.pool.lru.isolate(life)
    }

    /// Evicts the first page, in a task.
    fn evict(&self) -> tokio::task::JoinHandle<Result<Evicted, MemoryError>> {
        let (page, inner) = (self.isolate().unwrap(), Arc::clone(&self.source.inner));
        tokio::spawn(async move { evict(&inner, page).await })
    }

    async fn settle_down(&self) {
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
    }

    fn dma(&self, frame: shootdown_core::FrameNumber) -> u8 {
        let mut out = bytes::BytesMut::new();
        let span = shootdown_proto::message::FrameSpan { frame, offset: 0, length: 1 };
        self.source.frames().read(&[span], &mut out).unwrap();
        out[0]
    }

    async fn end(self) {
        for space in self.spaces {
            self.source.exit(space).await.unwrap();
        }
        drop(self.file);
        assert_eq!(self.source.stats(), super::super::MemoryStats::default());
    }
}

fn disk() -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&[1; 2 * FRAME_BYTES], 0).unwrap();
    file
}

fn on_disk(file: &File) -> u8 {
    let mut byte = [0];
    file.read_exact_at(&mut byte, 0).unwrap();
    byte[0]
}

#[tokio::test]
async fn an_evicted_page_is_written_after_the_acks_and_no_fault_finds_another_frame_meanwhile() {
    let disk = disk();
    let setup = Setup::new(&disk);
    setup.put(0, 5).await;
    let page = setup.isolate().unwrap();
    let frame = page.number();
    drop(page);
    setup.notifier.gate.send_replace(Gate::Shut);
    let evicted = setup.evict();
    setup.settle_down().await;
    assert_eq!((*setup.notifier.rounds.lock(), on_disk(&disk), setup.dma(frame)), (1, 1, 5));
    let load = tokio::spawn({
        let (source, space) = (setup.source.clone(), setup.spaces[1]);
        async move { source.load(space, 0, 1).await.unwrap()[0] }
    });
    setup.settle_down().await;
    assert!(!load.is_finished(), "it waits, and brings in no second frame");
    assert_eq!(setup.source.stats().frames_in_use, 1);
    // A device hands over what it wrote, with its ack.
    setup.source.frames().write(frame, 0, &[6]).unwrap();
    setup.notifier.gate.send_replace(Gate::Open);
    assert_eq!(evicted.await.unwrap().unwrap(), Evicted::Freed);
    assert_eq!((load.await.unwrap(), on_disk(&disk)), (6, 6));
    assert_eq!(setup.file.dirty_pages(), 0);
    setup.end().await;
}

#[tokio::test]
async fn a_clean_page_is_freed_and_its_frame_poisoned() {
    let setup = Setup::new(&disk());
    assert_eq!((setup.get(0).await, setup.get(1).await), (1, 1));
    let page = setup.isolate().unwrap();
    let frame = page.number();
    drop(page);
    assert_eq!(setup.evict().await.unwrap().unwrap(), Evicted::Freed);
    assert_eq!(*setup.notifier.rounds.lock(), 2);
    assert_eq!((setup.dma(frame), setup.source.stats().frames_in_use), (POISON, 0));
    assert_eq!(setup.get(1).await, 1);
    setup.end().await;
}

#[tokio::test]
async fn a_refused_round_or_a_full_disk_brings_everything_back() {
    let full = File::options().read(true).write(true).open("/dev/full").unwrap();
    let setup = Setup::new(&full);
    setup.put(0, 5).await;
    setup.notifier.gate.send_replace(Gate::Refuses);
    assert!(matches!(setup.evict().await.unwrap(), Err(MemoryError::Notify(_))));
    setup.notifier.gate.send_replace(Gate::Open);
    assert!(matches!(setup.evict().await.unwrap(), Err(MemoryError::File(_))));
    let stats = setup.source.stats();
    assert_eq!((stats.mapped_pages, stats.frames_in_use, setup.file.dirty_pages()), (1, 1, 1));
    assert_eq!((setup.get(0).await, setup.get(1).await), (5, 5));
    setup.put(1, 6).await;
    assert_eq!(setup.get(0).await, 6);
    setup.end().await;
}

#[tokio::test]
async fn a_page_that_is_written_back_or_that_another_holds_is_kept() {
    let setup = Setup::new(&disk());
    setup.put(0, 5).await;
    setup.notifier.gate.send_replace(Gate::Shut);
    let write_back = tokio::spawn({
        let (source, file) = (setup.source.clone(), setup.file.clone());
        async move { source.write_back(&file).await.unwrap() }
    });
    setup.settle_down().await;
    assert!(setup.isolate().is_none(), "write-back has it to itself");
    setup.notifier.gate.send_replace(Gate::Open);
    assert_eq!(write_back.await.unwrap().written, 1);
    let held = setup.file.open.backing.try_hold(Part::Page(0), Hold::Alone).unwrap();
    assert_eq!(setup.evict().await.unwrap().unwrap(), Evicted::Kept);
    drop(held);
    assert_eq!(setup.evict().await.unwrap().unwrap(), Evicted::Freed);
    setup.end().await;
}

#[tokio::test]
async fn a_walk_meets_a_mapping_at_any_time_while_it_is_split_and_made_whole() {
    let setup = Setup::new(&disk());
    let space = setup.source.space(setup.spaces[0]).unwrap();
    let object = Arc::clone(&setup.file.open.object);
    let middle = AddrRange::new(PAGE, 2 * PAGE).unwrap();
    std::thread::scope(|scope| {
        let changes = scope.spawn(|| {
            for _ in 0..30_000 {
                let leaving = space.layout.write().vmas.leave(middle).unwrap();
                space.layout.write().vmas.restore(&leaving);
            }
        });
        while !changes.is_finished() {
            let shown = object.shown_at(0);
            assert!(shown.iter().any(|(shown, _)| shown.id == space.id), "the walk missed it");
        }
    });
    drop(space);
    drop(object);
    setup.end().await;
}
