//! Random operations on several address spaces against an oracle, with devices that hold translations and
//! a notifier whose rounds take a random time.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use shootdown_core::{Access, AddressSpaceId};
use shootdown_proto::message::FrameSpan;
use shootdown_server::source::memory::{MemoryError, Snapshot};

use crate::recorder::{Recorder, Source, source};
use crate::{PAGE, pages};

/// Pages of an address space: some on each side of the border of two page tables.
const FIRST: u64 = 508;
const PAGES: u64 = 10;

#[derive(Clone, Debug)]
enum Op {
    Create,
    Map { space: usize, first: u64, pages: u64, access: Access },
    Store { space: usize, at: u64, length: usize, byte: u8 },
    Load { space: usize, at: u64, length: usize },
    Fork { space: usize },
    Unmap { space: usize, first: u64, pages: u64 },
    DontNeed { space: usize, first: u64, pages: u64 },
    Protect { space: usize, first: u64, pages: u64, access: Access },
    Remap { space: usize, first: u64, pages: u64, to: u64 },
    Snapshot { space: usize },
    DropSnapshot,
    Exit { space: usize },
    Grant { space: usize, page: u64, access: Access },
    DeviceWrites { which: usize, byte: u8 },
}

/// The bytes of each page, by its number.
type Picture = Vec<(u64, Vec<u8>)>;

/// What must be in memory: of each address space and each mapped page, what may be done and its bytes.
#[derive(Default)]
struct Oracle {
    spaces: Vec<AddressSpaceId>,
    pages: BTreeMap<(AddressSpaceId, u64), (Access, Vec<u8>)>,
    /// Pictures that were taken, and what was there.
    snapshots: Vec<(Snapshot, Picture)>,
}

fn any_op() -> impl Strategy<Value = Op> {
    let space = 0..4usize;
    let access = prop_oneof![1 => Just(Access::Read), 4 => Just(Access::Write)];
    let run = (0..PAGES, 1..5u64).prop_map(|(first, pages)| (FIRST + first, pages.min(PAGES - first)));
    let bytes = (0..PAGES * PAGE, 1..9000usize)
        .prop_map(|(at, length)| (at, length.min((PAGES * PAGE - at) as usize)));
    prop_oneof![
        1 => Just(Op::Create),
        4 => (space.clone(), run.clone(), access.clone())
            .prop_map(|(space, (first, pages), access)| Op::Map { space, first, pages, access }),
        6 => (space.clone(), bytes.clone(), any::<u8>())
            .prop_map(|(space, (at, length), byte)| Op::Store { space, at: FIRST * PAGE + at, length, byte }),
        4 => (space.clone(), bytes)
            .prop_map(|(space, (at, length))| Op::Load { space, at: FIRST * PAGE + at, length }),
        2 => space.clone().prop_map(|space| Op::Fork { space }),
        3 => (space.clone(), run.clone()).prop_map(|(space, (first, pages))| Op::Unmap { space, first, pages }),
        3 => (space.clone(), run.clone()).prop_map(|(space, (first, pages))| Op::DontNeed { space, first, pages }),
        4 => (space.clone(), run.clone(), access.clone())
            .prop_map(|(space, (first, pages), access)| Op::Protect { space, first, pages, access }),
        4 => (space.clone(), run, 0..PAGES)
            .prop_map(|(space, (first, pages), to)| Op::Remap { space, first, pages, to: FIRST + to }),
        2 => space.clone().prop_map(|space| Op::Snapshot { space }),
        1 => Just(Op::DropSnapshot),
        1 => space.clone().prop_map(|space| Op::Exit { space }),
        5 => (space, 0..PAGES, access).prop_map(|(space, page, access)| Op::Grant { space, page: FIRST + page, access }),
        3 => (0..8usize, any::<u8>()).prop_map(|(which, byte)| Op::DeviceWrites { which, byte }),
    ]
}

impl Oracle {
    fn space(&self, index: usize) -> Option<AddressSpaceId> {
        (!self.spaces.is_empty()).then(|| self.spaces[index % self.spaces.len()])
    }

    /// Whether all of the pages are mapped so.
    fn allows(&self, space: AddressSpaceId, mut pages: impl Iterator<Item = u64>, access: Access) -> bool {
        pages.all(|page| self.pages.get(&(space, page)).is_some_and(|(allowed, _)| access <= *allowed))
    }

    fn bytes(&self, space: AddressSpaceId, at: u64, length: usize) -> Vec<u8> {
        let byte = |at: u64| self.pages[&(space, at / PAGE)].1[(at % PAGE) as usize];
        (at..at + length as u64).map(byte).collect()
    }

    fn fill(&mut self, space: AddressSpaceId, at: u64, length: usize, byte: u8) {
        for at in at..at + length as u64 {
            self.pages.get_mut(&(space, at / PAGE)).unwrap().1[(at % PAGE) as usize] = byte;
        }
    }
}

async fn apply(source: &Source, recorder: &Recorder, oracle: &mut Oracle, op: Op) {
    match op {
        Op::Create => {
            if oracle.spaces.len() < 4 {
                oracle.spaces.push(source.create("model").unwrap());
            }
        }
        Op::Map { space, first, pages: count, access } => {
            let Some(space) = oracle.space(space) else { return };
            let taken = (first..first + count).any(|page| oracle.pages.contains_key(&(space, page)));
            let result = source.map(space, pages(first, first + count), access);
            assert_eq!(matches!(result, Err(MemoryError::AlreadyMapped { .. })), taken);
            if !taken {
                result.unwrap();
                let zeros = |page| ((space, page), (access, vec![0; PAGE as usize]));
                oracle.pages.extend((first..first + count).map(zeros));
            }
        }
        Op::Store { space, at, length, byte } => {
            let Some(space) = oracle.space(space) else { return };
            let touched = at / PAGE..=(at + length as u64 - 1) / PAGE;
            let allowed = oracle.allows(space, touched, Access::Write);
            let result = source.store(space, at, &vec![byte; length]).await;
            assert_eq!(result.is_ok(), allowed, "{result:?}");
            if allowed {
                oracle.fill(space, at, length, byte);
            }
        }
        Op::Load { space, at, length } => {
            let Some(space) = oracle.space(space) else { return };
            let touched = at / PAGE..=(at + length as u64 - 1) / PAGE;
            let allowed = oracle.allows(space, touched, Access::Read);
            match source.load(space, at, length).await {
                Ok(bytes) => assert_eq!(bytes[..], oracle.bytes(space, at, length)[..]),
                Err(error) => assert!(!allowed, "{error:?}"),
            }
        }
        Op::Fork { space } => {
            let Some(space) = oracle.space(space).filter(|_| oracle.spaces.len() < 4) else { return };
            let child = source.fork(space, "child").await.unwrap();
            oracle.spaces.push(child);
            let of_parent = oracle.pages.range((space, 0)..=(space, u64::MAX));
            let copies: Vec<_> = of_parent.map(|((_, page), kept)| ((child, *page), kept.clone())).collect();
            oracle.pages.extend(copies);
        }
        Op::Unmap { space, first, pages: count } => {
            let Some(space) = oracle.space(space) else { return };
            source.unmap(space, pages(first, first + count)).await.unwrap();
            oracle.pages.retain(|(id, page), _| *id != space || !(first..first + count).contains(page));
        }
        Op::DontNeed { space, first, pages: count } => {
            let Some(space) = oracle.space(space) else { return };
            let allowed = oracle.allows(space, first..first + count, Access::Read);
            let result = source.dont_need(space, pages(first, first + count)).await;
            assert_eq!(result.is_ok(), allowed, "{result:?}");
            if allowed {
                oracle.fill(space, first * PAGE, (count * PAGE) as usize, 0);
            }
        }
        Op::Protect { .. } | Op::Remap { .. } | Op::Snapshot { .. } | Op::DropSnapshot => {
            apply_to_layout(source, oracle, op).await;
        }
        Op::Exit { space } => {
            let Some(space) = oracle.space(space) else { return };
            source.exit(space).await.unwrap();
            oracle.spaces.retain(|id| *id != space);
            oracle.pages.retain(|(id, _), _| *id != space);
        }
        Op::Grant { space, page, access } => {
            let Some(space) = oracle.space(space) else { return };
            let allowed = oracle.allows(space, page..=page, access);
            assert_eq!(recorder.grant(space, page * PAGE, access).await.is_some(), allowed);
        }
        Op::DeviceWrites { which, byte } => {
            let written = recorder.with_grants(|grants| {
                let mut writable = grants.iter().filter(|(_, grant)| grant.access == Access::Write);
                let (place, grant) = writable.nth(which)?;
                recorder.frames().write(grant.frame, 7, &[byte]).unwrap();
                Some(*place)
            });
            if let Some((space, address)) = written {
                oracle.fill(space, address + 7, 1, byte);
            }
        }
    }
}

/// What keeps every page: it allows something else, is elsewhere, or has its picture taken.
async fn apply_to_layout(source: &Source, oracle: &mut Oracle, op: Op) {
    match op {
        Op::Protect { space, first, pages: count, access } => {
            let Some(space) = oracle.space(space) else { return };
            let mapped = oracle.allows(space, first..first + count, Access::Read);
            let result = source.protect(space, pages(first, first + count), access).await;
            assert_eq!(result.is_ok(), mapped, "{result:?}");
            for page in first..first + count {
                if let Some((allowed, _)) = oracle.pages.get_mut(&(space, page)).filter(|_| mapped) {
                    *allowed = access;
                }
            }
        }
        Op::Remap { space, first, pages: count, to } => {
            let Some(space) = oracle.space(space) else { return };
            let mapped = oracle.allows(space, first..first + count, Access::Read);
            let apart = first + count <= to || to + count <= first;
            let result = source.remap(space, pages(first, first + count), to * PAGE).await;
            assert_eq!(result.is_ok(), mapped && apart, "{result:?}");
            if result.is_ok() {
                for page in 0..count {
                    let kept = oracle.pages.remove(&(space, first + page)).unwrap();
                    oracle.pages.insert((space, to + page), kept);
                }
            }
        }
        Op::Snapshot { space } => {
            let Some(space) = oracle.space(space).filter(|_| oracle.snapshots.len() < 2) else { return };
            let of_space = oracle.pages.range((space, 0)..=(space, u64::MAX));
            let kept = of_space.map(|((_, page), (_, bytes))| (*page, bytes.clone())).collect();
            oracle.snapshots.push((source.snapshot(space).await.unwrap(), kept));
        }
        Op::DropSnapshot => drop(oracle.snapshots.pop()),
        other => unreachable!("{other:?}"),
    }
}

/// What each device reads through what it holds is what the host has there.
fn check_devices(recorder: &Recorder, oracle: &Oracle) {
    recorder.with_grants(|grants| {
        for ((space, address), grant) in grants {
            let mut out = bytes::BytesMut::new();
            let span = FrameSpan { frame: grant.frame, offset: 0, length: PAGE as u32 };
            recorder.frames().read(&[span], &mut out).unwrap();
            let kept = oracle.pages.get(&(*space, address / PAGE));
            assert_eq!(Some(&out[..]), kept.map(|(_, bytes)| &bytes[..]), "a stale translation");
            assert!(kept.is_some_and(|(allowed, _)| grant.access <= *allowed), "leave that was withdrawn");
        }
    });
}

fn check_snapshots(oracle: &Oracle) {
    for (snapshot, kept) in &oracle.snapshots {
        for (page, bytes) in kept {
            assert_eq!(snapshot.load(page * PAGE, PAGE as usize).unwrap()[..], bytes[..]);
        }
        let mapped: u64 = snapshot.ranges().iter().map(|range| range.length().unwrap() / PAGE).sum();
        assert_eq!(mapped as usize, kept.len());
    }
}

async fn run(ops: Vec<Op>, seed: u64) {
    let (source, recorder): (Source, Arc<Recorder>) = source(256);
    recorder.yield_at_random(seed);
    let mut oracle = Oracle::default();
    // Without an address space nothing happens, and random operations seldom begin with one.
    let begin = [Op::Create, Op::Map { space: 0, first: FIRST, pages: PAGES / 2, access: Access::Write }];
    for op in begin.into_iter().chain(ops) {
        apply(&source, &recorder, &mut oracle, op).await;
        check_devices(&recorder, &oracle);
        check_snapshots(&oracle);
        let stats = source.stats();
        assert_eq!((stats.quarantined, stats.operations, recorder.open_brackets()), (0, 0, 0));
        let pictured: usize = oracle.snapshots.iter().map(|(_, kept)| kept.len()).sum();
        assert!(stats.frames_in_use <= stats.mapped_pages + pictured);
        assert!(stats.mapped_pages <= oracle.pages.len());
    }
    for ((space, page), (_, kept)) in &oracle.pages {
        assert_eq!(source.load(*space, page * PAGE, PAGE as usize).await.unwrap()[..], kept[..]);
    }
    for space in oracle.spaces {
        source.exit(space).await.unwrap();
    }
    drop(oracle.snapshots);
    assert_eq!(source.stats(), Default::default());
    assert_eq!(recorder.frames().broken_poison(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn memory_has_what_was_stored_and_devices_never_see_anything_else(
        ops in proptest::collection::vec(any_op(), 1..60),
        seed in any::<u64>(),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(run(ops, seed));
    }
}
