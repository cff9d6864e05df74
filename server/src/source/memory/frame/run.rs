//! Runs of frames: as many in a row as a huge page has, from a multiple of that number on.
//!
//! Follows `alloc_pages` of a higher order. There is no buddy allocator behind it: free frames are a list,
//! and a run is looked for block by block. Frames of a run are frames like others, each with references of
//! its own; nothing but their numbers says that they belong together.

use std::collections::BTreeMap;
use std::ops::Range;

use super::{FrameError, FrameRef, FrameStore, Ledger, Slot, WasFreed};

impl FrameStore {
    /// So many frames in a row, the first a multiple of their number, with one reference each; or none.
    /// What they hold is not cleared: whoever takes them fills them before anybody can read them.
    ///
    /// # Errors
    /// [`FrameError::NoRun`]. Frames may be free, but not in a row.
    pub(in super::super) fn take_run(&self, frames: usize) -> Result<Vec<FrameRef>, FrameError> {
        let taken = u32::try_from(frames).ok().and_then(|length| {
            let mut ledger = self.ledger.lock();
            let run = ledger.find_run(length, self.capacity)?;
            Some(ledger.take_run(&run))
        });
        let taken = taken.ok_or(FrameError::NoRun { frames })?;
        let check = |(frame, was_freed): (FrameRef, WasFreed)| {
            if was_freed == WasFreed::Yes {
                self.check_poison(&frame);
            }
            frame
        };
        Ok(taken.into_iter().map(check).collect())
    }
}

impl Ledger {
    /// The lowest block of `length` frames that are all free or fresh.
    fn find_run(&self, length: u32, capacity: usize) -> Option<Range<u32>> {
        if length == 0 {
            return None;
        }
        let known = u32::try_from(self.frames.len()).expect("the capacity fits in 32 bits");
        // Every block that has a free frame, and the two that the first fresh frame may be in or before.
        let mut free_in: BTreeMap<u32, u32> =
            [known / length, known.div_ceil(length)].map(|block| (block, 0)).into();
        for number in self.free.iter().chain(&self.passed_over) {
            *free_in.entry(number / length).or_default() += 1;
        }
        free_in.into_iter().find_map(|(block, free)| {
            let start = block.checked_mul(length)?;
            let end = start.checked_add(length).filter(|end| *end as usize <= capacity)?;
            let fresh = end.saturating_sub(known.max(start));
            (free + fresh == length).then_some(start..end)
        })
    }

    fn take_run(&mut self, run: &Range<u32>) -> Vec<(FrameRef, WasFreed)> {
        let first_fresh = u32::try_from(self.frames.len()).expect("the capacity fits in 32 bits");
        for number in first_fresh..run.end {
            self.frames.push(Slot { references: 0, generation: std::num::NonZeroU64::MIN });
            if number < run.start {
                self.renew(number);
                self.passed_over.push(number);
            }
        }
        let passed_over: Vec<u32> =
            self.passed_over.iter().copied().filter(|number| run.contains(number)).collect();
        self.passed_over.retain(|number| !run.contains(number));
        self.free.retain(|number| !run.contains(number));
        self.in_use += run.len();
        let take = |number: u32| {
            let was_fresh = number >= first_fresh || passed_over.contains(&number);
            let generation = self.renew(number);
            self.frames[number as usize].references = 1;
            (FrameRef { number, generation }, if was_fresh { WasFreed::No } else { WasFreed::Yes })
        };
        run.clone().map(take).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::FRAME_BYTES;
    use super::*;

    fn numbers(frames: &[FrameRef]) -> Vec<u32> {
        frames.iter().map(|frame| frame.number).collect()
    }

    #[test]
    fn a_run_is_in_a_row_and_begins_at_a_multiple_of_its_length() {
        let store = FrameStore::new(12).unwrap();
        let one = store.take_zeroed().unwrap();
        let run = store.take_run(4).unwrap();
        assert_eq!(numbers(&run), [4, 5, 6, 7]);
        assert_eq!(store.in_use(), 5);
        // What was passed over is used, and nobody takes it for a frame whose poison was lost.
        let others: Vec<FrameRef> = (0..3).map(|_| store.take_zeroed().unwrap()).collect();
        assert_eq!(numbers(&others), [3, 2, 1]);
        assert_eq!(store.broken_poison(), 0);
        store.put(run.into_iter().chain(others).chain([one]));
        assert_eq!(store.in_use(), 0);
    }

    #[test]
    fn freed_frames_make_a_run_again_and_one_in_the_middle_that_is_held_prevents_it() {
        let store = FrameStore::new(8).unwrap();
        let mut all: Vec<FrameRef> = (0..8).map(|_| store.take_zeroed().unwrap()).collect();
        let held = all.remove(1);
        let last = all.remove(6);
        assert_eq!((held.number, last.number), (1, 7));
        store.put(all);
        assert!(matches!(store.take_run(4), Err(FrameError::NoRun { frames: 4 })), "six are free");
        assert_eq!(store.in_use(), 2, "all or none");
        assert!(matches!(store.take_run(usize::MAX), Err(FrameError::NoRun { .. })));
        store.put([last]);
        let run = store.take_run(4).unwrap();
        assert_eq!(numbers(&run), [4, 5, 6, 7]);
        store.put(run.into_iter().chain([held]));
    }

    #[test]
    fn frames_that_are_free_and_frames_that_are_fresh_make_one_run() {
        let store = FrameStore::new(4).unwrap();
        let two: Vec<FrameRef> = (0..2).map(|_| store.take_zeroed().unwrap()).collect();
        store.put(two);
        let run = store.take_run(4).unwrap();
        assert_eq!(numbers(&run), [0, 1, 2, 3]);
        assert!(store.take_run(1).is_err());
        store.put(run);
    }

    #[test]
    fn a_stale_write_to_a_frame_of_a_run_is_counted() {
        let store = FrameStore::new(2).unwrap();
        let run = store.take_run(2).unwrap();
        let number = run[1].number();
        store.put(run);
        store.write(number, FRAME_BYTES as u32 - 1, b"x").unwrap();
        let run = store.take_run(2).unwrap();
        assert_eq!(store.broken_poison(), 1);
        store.put(run);
    }
}
