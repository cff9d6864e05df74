//! The memory source, path by path, against a notifier that records, holds and refuses.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "memory/recorder.rs"]
mod recorder;
#[path = "memory/cow.rs"]
mod cow;
#[path = "memory/fork.rs"]
mod fork;
#[path = "memory/zap.rs"]
mod zap;
#[path = "memory/migrate.rs"]
mod migrate;
#[path = "memory/exit.rs"]
mod exit;
#[path = "memory/file.rs"]
mod file;
#[path = "memory/placeholder.rs"]
mod placeholder;
#[path = "memory/writeback.rs"]
mod writeback;
#[path = "memory/truncate.rs"]
mod truncate;
#[path = "memory/cluster.rs"]
mod cluster;
#[path = "memory/fault.rs"]
mod fault;
#[path = "memory/protect.rs"]
mod protect;
#[path = "memory/remap.rs"]
mod remap;
#[path = "memory/snapshot.rs"]
mod snapshot;
#[path = "memory/cancel.rs"]
mod cancel;
#[path = "memory/swap_out.rs"]
mod swap_out;
#[path = "memory/reclaim.rs"]
mod reclaim;
#[path = "memory/pressure.rs"]
mod pressure;
#[path = "memory/collapse.rs"]
mod collapse;
#[path = "memory/merge.rs"]
mod merge;
#[path = "memory/merge_refused.rs"]
mod merge_refused;
#[path = "memory/passes.rs"]
mod passes;
#[path = "memory/model.rs"]
mod model;
#[path = "memory/threads.rs"]
mod threads;

use shootdown_core::{Access, AddrRange, AddressSpaceId, FrameNumber};
use shootdown_proto::message::FrameSpan;
use shootdown_server::source::memory::{FrameStore, StoreBranch, StoreOutcome};

use recorder::Source;

const PAGE: u64 = 4096;

/// A range in pages.
fn pages(first: u64, end: u64) -> AddrRange {
    AddrRange::new(first * PAGE, end * PAGE).unwrap()
}

/// An address space with `range` mapped for writing.
fn mapped(source: &Source, range: AddrRange) -> AddressSpaceId {
    let space = source.create("test").unwrap();
    source.map(space, range, Access::Write).unwrap();
    space
}

/// Writes `byte` over the first bytes of a page.
async fn put(source: &Source, space: AddressSpaceId, page: u64, byte: u8) -> StoreOutcome {
    source.store(space, page * PAGE, &[byte; 8]).await.unwrap()
}

/// The first byte of a page.
async fn get(source: &Source, space: AddressSpaceId, page: u64) -> u8 {
    source.load(space, page * PAGE, 1).await.unwrap()[0]
}

/// What a DMA reads from a frame.
fn dma(frames: &FrameStore, frame: FrameNumber) -> u8 {
    let mut out = bytes::BytesMut::new();
    frames.read(&[FrameSpan { frame, offset: 0, length: 1 }], &mut out).unwrap();
    out[0]
}

fn branch(outcome: &StoreOutcome) -> &StoreBranch {
    assert_eq!(outcome.pages.len(), 1);
    &outcome.pages[0].branch
}
