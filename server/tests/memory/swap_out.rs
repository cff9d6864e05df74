//! MADV_PAGEOUT, and with it try_to_unmap_one and pageout: pages go to the swap file, and come back.

use std::fs::OpenOptions;
use std::sync::Arc;

use shootdown_core::{Access, Cause};
use shootdown_server::source::Translate;
use shootdown_server::source::memory::{
    FrameStore, MemoryError, MemoryEvents, POISON, PagedOut, SwapError, SwapFile, Twin,
};

use crate::cancel::poll_and_drop;
use crate::recorder::{Answer, Method, Recorder, Source, settle_down, source_with, until};
use crate::{PAGE, dma, get, mapped, pages, put};

/// A source of so many frames, at most `limit` of them in use, and a swap file of so many slots.
pub(crate) fn swapping(frames: usize, limit: usize, slots: usize) -> (Source, Arc<Recorder>, Arc<SwapFile>) {
    swapping_on(SwapFile::on(tempfile::tempfile().unwrap(), slots).unwrap(), frames, limit)
}

fn swapping_on(file: SwapFile, frames: usize, limit: usize) -> (Source, Arc<Recorder>, Arc<SwapFile>) {
    let swap = Arc::new(file);
    let (source, recorder) = source_with(FrameStore::new(frames).unwrap(), |config| {
        config.limit_frames = limit;
        config.swap = Some(Arc::clone(&swap));
    });
    (source, recorder, swap)
}

/// Ends the address spaces that there may be, and looks that nothing is left.
pub(crate) async fn nothing_is_left(source: &Source, recorder: &Recorder) {
    for id in 1..=8 {
        drop(source.exit(shootdown_core::AddressSpaceId::new(id).unwrap()).await);
    }
    assert_eq!(source.stats(), Default::default());
    assert_eq!((recorder.frames().broken_poison(), recorder.open_brackets()), (0, 0));
}

const ONE_OUT: PagedOut = PagedOut { out: 1, kept: 0 };

#[tokio::test]
async fn the_entry_is_gone_before_devices_are_told_and_the_frame_lives_until_they_have_stopped() {
    let (source, recorder, swap) = swapping(8, 8, 8);
    let space = mapped(&source, pages(0, 4));
    put(&source, space, 0, 1).await;
    let device = recorder.grant(space, 0, Access::Read).await.unwrap();
    let life = source.frames().generation(device.frame);
    recorder.answer([Answer::Held]);
    let out = tokio::spawn({
        let source = source.clone();
        async move { source.page_out(space, pages(0, 4)).await.unwrap() }
    });
    until(|| !recorder.calls().is_empty()).await;
    settle_down().await;
    let call = recorder.calls().remove(0);
    assert_eq!((call.method, call.range), (Method::Page(Cause::Clear), pages(0, 1)));
    assert_eq!((call.generation, call.twin), (None, Some(Twin::SwapOut)), "the entry is cleared first");
    assert_eq!((call.stats.frames_in_use, call.stats.isolated), (1, 1));
    assert_eq!(dma(source.frames(), device.frame), 1, "the frame is not poisoned");
    assert_eq!(source.frames().generation(device.frame), life, "nor freed");

    recorder.open_gate();
    assert_eq!(out.await.unwrap(), ONE_OUT);
    assert_eq!(dma(source.frames(), device.frame), POISON);
    let stats = source.stats();
    assert_eq!((stats.frames_in_use, stats.mapped_pages, stats.swapped_pages), (0, 0, 1));
    assert_eq!((stats.active, stats.inactive, stats.isolated), (0, 0, 0));
    assert_eq!(source.address_space_stats(space).unwrap().swapped_pages, 1);

    assert_eq!(source.load(space, 0, 9).await.unwrap()[..], [1, 1, 1, 1, 1, 1, 1, 1, 0]);
    assert_eq!((swap.in_use(), source.stats().mapped_pages), (0, 1), "the slot is free again");
    assert_eq!(source.events(), MemoryEvents { swapped_in: 1, ..MemoryEvents::default() });
    assert_eq!(recorder.methods().len(), 1, "nobody is told of a page that comes back");
    nothing_is_left(&source, &recorder).await;
}

#[tokio::test]
async fn what_a_device_writes_until_its_ack_is_in_the_swap_file() {
    let (source, recorder, _swap) = swapping(8, 8, 8);
    let space = mapped(&source, pages(0, 2));
    put(&source, space, 0, 1).await;
    let device = recorder.grant(space, 0, Access::Write).await.unwrap();
    let frames = Arc::clone(source.frames());
    recorder.meanwhile(move |_, _, _, _| frames.write(device.frame, 3, b"late").unwrap());
    assert_eq!(source.page_out(space, pages(0, 2)).await.unwrap(), ONE_OUT);
    recorder.meanwhile(|_, _, _, _| {});
    assert_eq!(source.load(space, 0, 8).await.unwrap()[..], [1, 1, 1, b'l', b'a', b't', b'e', 1]);
    nothing_is_left(&source, &recorder).await;
}

#[tokio::test]
async fn whoever_touches_a_page_on_its_way_out_waits_and_finds_its_bytes() {
    let (source, recorder, _swap) = swapping(8, 8, 8);
    let space = mapped(&source, pages(0, 1));
    put(&source, space, 0, 7).await;
    recorder.answer([Answer::Held]);
    let out = tokio::spawn({
        let source = source.clone();
        async move { source.page_out(space, pages(0, 1)).await.unwrap() }
    });
    until(|| !recorder.calls().is_empty()).await;
    let load = tokio::spawn({
        let source = source.clone();
        async move { get(&source, space, 0).await }
    });
    let store = tokio::spawn({
        let source = source.clone();
        async move { source.store(space, 100, b"x").await.unwrap() }
    });
    let fault = tokio::spawn({
        let source = source.clone();
        async move { source.fault(space, pages(0, 1), Access::Write).await.unwrap() }
    });
    settle_down().await;
    assert!(!load.is_finished() && !store.is_finished() && !fault.is_finished());
    recorder.open_gate();
    assert_eq!((out.await.unwrap(), load.await.unwrap()), (ONE_OUT, 7));
    store.await.unwrap();
    let frame = fault.await.unwrap()[0].frame;
    assert_eq!(Some(source.frames().generation(frame)), source.generation(space, 0));
    assert_eq!((dma(source.frames(), frame), source.load(space, 100, 1).await.unwrap()[0]), (7, b'x'));
    nothing_is_left(&source, &recorder).await;
}

#[tokio::test]
async fn a_page_that_a_fork_shares_is_swapped_once_and_is_two_pages_when_it_is_back() {
    let (source, recorder, swap) = swapping(8, 8, 8);
    let parent = mapped(&source, pages(0, 2));
    put(&source, parent, 0, 1).await;
    let child = source.fork(parent, "child").await.unwrap();
    recorder.forget_calls();
    assert_eq!(source.page_out(parent, pages(0, 2)).await.unwrap(), ONE_OUT);
    let mut told: Vec<_> = recorder.calls().iter().map(|call| (call.method, call.space)).collect();
    told.sort_by_key(|(_, space)| *space);
    let page = Method::Page(Cause::Clear);
    assert_eq!(told, [(page, parent), (page, child)], "the devices of both");
    assert_eq!((swap.in_use(), source.stats().frames_in_use), (1, 0));
    for space in [parent, child] {
        assert_eq!(source.address_space_stats(space).unwrap().swapped_pages, 1);
    }
    // A child of one whose page is swapped has a share of the slot.
    let late = source.fork(parent, "late").await.unwrap();
    assert_eq!(swap.in_use(), 1);
    put(&source, parent, 0, 2).await;
    assert_eq!(swap.in_use(), 1, "the others have it still");
    assert_eq!(get(&source, child, 0).await, 1);
    put(&source, child, 0, 3).await;
    assert_eq!(get(&source, late, 0).await, 1);
    assert_eq!((get(&source, parent, 0).await, get(&source, child, 0).await), (2, 3));
    assert_eq!((swap.in_use(), source.stats().frames_in_use), (0, 3));
    nothing_is_left(&source, &recorder).await;
}

#[tokio::test]
async fn a_full_swap_file_keeps_the_page_says_so_and_tells_nobody() {
    let (source, recorder, swap) = swapping(8, 8, 1);
    let space = mapped(&source, pages(0, 3));
    for page in 0..3 {
        put(&source, space, page, page as u8 + 1).await;
    }
    assert_eq!(source.page_out(space, pages(0, 3)).await.unwrap(), PagedOut { out: 1, kept: 2 });
    recorder.forget_calls();
    let full = source.page_out(space, pages(0, 3)).await;
    assert!(matches!(full, Err(MemoryError::Swap(SwapError::Full { slots: 1 }))), "{full:?}");
    assert_eq!((recorder.methods(), swap.in_use()), (vec![], 1));
    for page in 0..3 {
        assert_eq!(get(&source, space, page).await, page as u8 + 1);
    }
    let (source, _recorder, _swap) = swapping(8, 8, 0);
    let space = mapped(&source, pages(0, 1));
    assert_eq!(source.page_out(space, pages(0, 1)).await.unwrap(), PagedOut::default(), "nothing is there");
}

#[tokio::test]
async fn without_a_swap_file_pages_stay() {
    let (source, recorder) = source_with(FrameStore::new(4).unwrap(), |_| {});
    let space = mapped(&source, pages(0, 1));
    put(&source, space, 0, 1).await;
    let none = source.page_out(space, pages(0, 1)).await;
    assert!(matches!(none, Err(MemoryError::Swap(SwapError::None))));
    assert!(matches!(source.reclaim(1).await, Err(MemoryError::Swap(SwapError::None))));
    assert_eq!((recorder.methods(), get(&source, space, 0).await), (vec![], 1));
}

#[tokio::test]
async fn a_disk_that_cannot_be_written_keeps_the_page() {
    let full = OpenOptions::new().read(true).write(true).open("/dev/full").unwrap();
    let (source, recorder, swap) = swapping_on(SwapFile::on(full, 8).unwrap(), 8, 8);
    let space = mapped(&source, pages(0, 1));
    put(&source, space, 0, 1).await;
    let before = source.generation(space, 0);
    let failed = source.page_out(space, pages(0, 1)).await;
    assert!(matches!(failed, Err(MemoryError::Swap(SwapError::File(_)))), "{failed:?}");
    assert_eq!((source.generation(space, 0), swap.in_use()), (before, 0));
    let stats = source.stats();
    assert_eq!((stats.active + stats.inactive, stats.isolated), (1, 0), "it is on a list again");
    assert_eq!(get(&source, space, 0).await, 1);
    nothing_is_left(&source, &recorder).await;
}

#[tokio::test]
async fn a_page_that_cannot_be_read_back_stays_in_the_swap_file() {
    let file = tempfile::tempfile().unwrap();
    let disk = file.try_clone().unwrap();
    let (source, recorder, swap) = swapping_on(SwapFile::on(file, 8).unwrap(), 8, 8);
    let space = mapped(&source, pages(0, 1));
    put(&source, space, 0, 1).await;
    source.page_out(space, pages(0, 1)).await.unwrap();
    let bytes = {
        use std::os::unix::fs::FileExt;
        let mut bytes = vec![0; PAGE as usize];
        disk.read_exact_at(&mut bytes, 0).unwrap();
        disk.set_len(0).unwrap();
        bytes
    };
    let lost = source.load(space, 0, 1).await;
    assert!(matches!(lost, Err(MemoryError::Swap(SwapError::File(_)))), "{lost:?}");
    assert_eq!((swap.in_use(), source.stats().frames_in_use), (1, 0));
    std::os::unix::fs::FileExt::write_all_at(&disk, &bytes, 0).unwrap();
    assert_eq!(get(&source, space, 0).await, 1, "it can be tried again");
    nothing_is_left(&source, &recorder).await;
}

#[tokio::test]
async fn a_round_that_fails_brings_every_entry_back() {
    for answer in [Answer::Refused, Answer::NotQuiesced] {
        let (source, recorder, swap) = swapping(8, 8, 8);
        let parent = mapped(&source, pages(0, 1));
        put(&source, parent, 0, 1).await;
        let child = source.fork(parent, "child").await.unwrap();
        let before = source.generation(parent, 0);
        recorder.answer([Answer::Quiesced, answer]);
        let failed = source.page_out(parent, pages(0, 1)).await;
        assert!(matches!(failed, Err(MemoryError::Notify(_) | MemoryError::NotQuiesced { .. })));
        assert_eq!((source.generation(parent, 0), source.generation(child, 0)), (before, before));
        assert_eq!((swap.in_use(), source.stats().isolated), (0, 0));
        assert_eq!((get(&source, parent, 0).await, get(&source, child, 0).await), (1, 1));
        assert_eq!(source.page_out(parent, pages(0, 1)).await.unwrap(), ONE_OUT, "it can be tried again");
        nothing_is_left(&source, &recorder).await;
    }
}

#[tokio::test]
async fn a_page_that_is_locked_anywhere_stays_and_nobody_is_told() {
    let (source, recorder, _swap) = swapping(8, 8, 8);
    let parent = mapped(&source, pages(0, 4));
    put(&source, parent, 0, 1).await;
    let child = source.fork(parent, "child").await.unwrap();
    source.lock(child, pages(0, 1)).unwrap();
    let before = source.generation(parent, 0);
    recorder.forget_calls();
    assert_eq!(source.page_out(parent, pages(0, 4)).await.unwrap(), PagedOut { out: 0, kept: 1 });
    let locked = source.page_out(child, pages(0, 4)).await;
    assert!(matches!(locked, Err(MemoryError::Locked { address: 0 })));
    source.lock(parent, pages(2, 3)).unwrap();
    let locked = source.page_out(parent, pages(1, 4)).await;
    assert!(matches!(locked, Err(MemoryError::Locked { address }) if address == 2 * PAGE));
    let hole = source.page_out(parent, pages(1, 5)).await;
    assert!(matches!(hole, Err(MemoryError::Unmapped { address }) if address == 4 * PAGE));
    assert_eq!(
        (recorder.methods(), source.generation(parent, 0)),
        (vec![], before),
        "SWAP_FAIL tells nobody"
    );
    assert_eq!((get(&source, parent, 0).await, get(&source, child, 0).await), (1, 1));
    assert_eq!(source.events(), MemoryEvents { unmaps_failed: 1, ..MemoryEvents::default() });
    nothing_is_left(&source, &recorder).await;
}

#[tokio::test]
async fn a_page_that_a_snapshot_shows_too_is_busy_and_nobody_is_told() {
    let (source, recorder, _swap) = swapping(8, 8, 8);
    let space = mapped(&source, pages(0, 1));
    put(&source, space, 0, 1).await;
    let _picture = source.snapshot(space).await.unwrap();
    recorder.forget_calls();
    assert_eq!(source.page_out(space, pages(0, 1)).await.unwrap(), PagedOut { out: 0, kept: 1 });
    assert_eq!(recorder.methods(), [], "SWAP_AGAIN tells nobody");
    assert_eq!(source.events(), MemoryEvents { unmaps_busy: 1, ..MemoryEvents::default() });
}

#[tokio::test]
async fn a_page_that_is_zapped_on_its_way_out_leaves_nothing_in_the_swap_file() {
    let (source, recorder, swap) = swapping(8, 8, 8);
    let space = mapped(&source, pages(0, 2));
    put(&source, space, 0, 1).await;
    put(&source, space, 1, 2).await;
    recorder.answer([Answer::Held, Answer::Held]);
    let out = tokio::spawn({
        let source = source.clone();
        async move { source.page_out(space, pages(0, 2)).await.unwrap() }
    });
    until(|| recorder.calls().len() == 2).await;
    assert_eq!(source.dont_need(space, pages(0, 1)).await.unwrap().pages, 1);
    assert_eq!(get(&source, space, 0).await, 0, "zeros, though the old page is on its way out still");
    recorder.open_gate();
    assert_eq!(out.await.unwrap().out, 2);
    assert_eq!((swap.in_use(), source.stats().frames_in_use), (1, 1));
    assert_eq!((get(&source, space, 0).await, get(&source, space, 1).await), (0, 2));
    nothing_is_left(&source, &recorder).await;
}

#[tokio::test]
async fn pages_in_the_swap_file_go_with_their_mapping() {
    let (source, recorder, swap) = swapping(8, 8, 8);
    let space = mapped(&source, pages(0, 4));
    for page in 0..4 {
        put(&source, space, page, 1).await;
    }
    assert_eq!(source.page_out(space, pages(0, 4)).await.unwrap().out, 4);
    assert_eq!(source.dont_need(space, pages(0, 1)).await.unwrap().pages, 1);
    assert_eq!((get(&source, space, 0).await, swap.in_use()), (0, 3));
    source.unmap(space, pages(1, 2)).await.unwrap();
    assert_eq!(swap.in_use(), 2);
    source.exit(space).await.unwrap();
    assert_eq!(swap.in_use(), 0);
    nothing_is_left(&source, &recorder).await;
}

#[tokio::test]
async fn a_caller_that_gives_up_neither_frees_early_nor_leaks() {
    for polls in 0..8 {
        let (source, recorder, _swap) = swapping(64, 64, 64);
        let space = mapped(&source, pages(0, 40));
        for page in 0..40 {
            put(&source, space, page, 1).await;
        }
        let device = recorder.grant(space, 0, Access::Read).await.unwrap();
        recorder.answer([Answer::Held]);
        let out = {
            let source = source.clone();
            async move { drop(source.page_out(space, pages(0, 40)).await) }
        };
        poll_and_drop(Box::pin(out), polls).await;
        settle_down().await;
        assert_eq!(dma(source.frames(), device.frame), 1, "{polls} polls: freed too early");
        recorder.open_gate();
        source.drain().await;
        let stats = source.stats();
        assert_eq!((stats.operations, stats.isolated), (0, 0), "{polls} polls");
        assert_eq!(stats.swapped_pages, if polls == 0 { 0 } else { 40 }, "{polls} polls: it goes on");
        nothing_is_left(&source, &recorder).await;
    }
}
