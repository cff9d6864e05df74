//! The frames: real memory in a memfd, reached by pread and pwrite, so that nothing here is unsafe.
//!
//! ```text
//!   fresh --- take() ---> held (references: 1, 2 ...) --- last put() ---> poisoned --- take() ---> held
//! ```
//!
//! A reference is a [`FrameRef`], a token that can be neither copied nor forged; it is given back by
//! [`FrameStore::put`]. One that is lost leaks its frame, which is the safe way to fail: nothing but
//! `put` frees. Follows `get_page`, `put_page`, and `CONFIG_PAGE_POISONING`.

mod run;

use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::BytesMut;
use parking_lot::Mutex;
use rustix::fs::{MemfdFlags, SealFlags};
use shootdown_core::{FrameNumber, PageSize};
use shootdown_proto::message::FrameSpan;

/// Every byte of a frame that was freed and not taken again: the kernel's `PAGE_POISON`. A device that
/// reads it read through a stale translation.
pub const POISON: u8 = 0xaa;

pub(super) const FRAME_BYTES: usize = 4096;

const _: () = assert!(FRAME_BYTES as u64 == PageSize::BASE.bytes());

/// Real memory in frames of 4 KiB, counted by reference.
///
/// A frame is poisoned when its last reference goes, and given a new generation; generations come from
/// one counter for the whole store, so that a later life of a frame always has the higher one.
///
/// The price of no `unsafe`: an access to a frame is a system call. Taking a frame is one or two (is the
/// poison whole, fill it), and freeing it is one. Frames that were never taken cost no memory.
#[derive(Debug)]
pub struct FrameStore {
    memory: File,
    capacity: usize,
    most_references: u32,
    ledger: Mutex<Ledger>,
}

/// Who holds what. Locked last of all locks, and never while a frame's bytes are touched.
#[derive(Debug, Default)]
struct Ledger {
    /// Of every frame that was ever taken, by its number.
    frames: Vec<Slot>,
    /// Freed frames; the last freed is taken first, so that a stale use is soon seen.
    free: Vec<u32>,
    /// Frames that were never taken, below one that was: a run had to begin at a multiple of its length.
    passed_over: Vec<u32>,
    last_generation: u64,
    in_use: usize,
    broken_poison: u64,
}

#[derive(Debug)]
struct Slot {
    references: u32,
    generation: NonZeroU64,
}

/// One reference to one life of a frame. Not `Clone`: each is given back once.
#[must_use = "a reference that is lost leaks its frame"]
#[derive(Debug, PartialEq, Eq)]
pub(super) struct FrameRef {
    number: u32,
    generation: NonZeroU64,
}

/// One life of a frame, to compare by: `pte_same` without the danger that the frame was freed and taken
/// again meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct FrameLife {
    number: u32,
    generation: NonZeroU64,
}

/// Why frames were not taken, read or written.
#[derive(Debug, Clone, thiserror::Error)]
pub enum FrameError {
    /// There is no such frame.
    #[error("there is no frame {frame}: the store has {capacity}")]
    Unknown {
        /// The frame that was asked for.
        frame: FrameNumber,
        /// How many there are.
        capacity: usize,
    },
    /// The bytes are not all in one frame.
    #[error("{length} bytes at offset {offset} are not within one frame of {FRAME_BYTES} bytes")]
    Span {
        /// First byte in the frame.
        offset: u32,
        /// How many bytes.
        length: usize,
    },
    /// Every frame is in use.
    #[error("all {frames} frames are in use")]
    OutOfMemory {
        /// The bound.
        frames: usize,
    },
    /// There are frames, but not so many free in a row.
    #[error("there is no run of {frames} free frames in a row that begins at a multiple of its length")]
    NoRun {
        /// How long a run was asked for.
        frames: usize,
    },
    /// The frame is shared as often as it may be.
    #[error("frame {frame} has {most} references, as many as it may")]
    TooManyReferences {
        /// The frame.
        frame: FrameNumber,
        /// The bound.
        most: u32,
    },
    /// The memory itself failed.
    #[error("the memory of the frame store could not be read or written")]
    Memory(#[source] Arc<io::Error>),
}

impl FrameStore {
    /// A store of `frames` frames, at least one.
    ///
    /// # Errors
    /// When the system refuses the memfd, or `frames` is 0 or more than 2^32 - 1 (16 TiB).
    pub fn new(frames: usize) -> io::Result<Arc<Self>> {
        Self::with_reference_limit(frames, u32::MAX / 2)
    }

    /// As [`FrameStore::new`]; no frame is shared by more than `most_references` page table entries and
    /// copies in progress. Half of `u32` is the default: a count that wraps would free a page in use.
    ///
    /// # Errors
    /// As [`FrameStore::new`].
    pub fn with_reference_limit(frames: usize, most_references: u32) -> io::Result<Arc<Self>> {
        if frames == 0 || u32::try_from(frames).is_err() {
            let text = "a frame store has at least 1 and at most 2^32 - 1 frames";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memory = rustix::fs::memfd_create("shootdown-frames", flags)?;
        rustix::fs::ftruncate(&memory, (frames * FRAME_BYTES) as u64)?;
        // The size is what `capacity` says for ever: no access can fall off the end.
        rustix::fs::fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(Self::on(memory.into(), frames, most_references))
    }

    fn on(memory: File, capacity: usize, most_references: u32) -> Arc<Self> {
        Arc::new(Self { memory, capacity, most_references, ledger: Mutex::new(Ledger::default()) })
    }

    /// How many frames there are.
    #[must_use]
    pub const fn capacity(&self) -> usize {
        self.capacity
    }

    /// How many are not free: mapped, being copied, being freed, in quarantine, or unusable because
    /// their memory failed.
    #[must_use]
    pub fn in_use(&self) -> usize {
        self.ledger.lock().in_use
    }

    /// How many frames were found written to while they were free, when they were taken again: each is
    /// a write through a stale translation.
    #[must_use]
    pub fn broken_poison(&self) -> u64 {
        self.ledger.lock().broken_poison
    }

    /// The generation of a frame's present life, or of its present freedom: it changes when the frame is
    /// freed and when it is taken. 0 for one that was never taken, nor passed over by a run.
    #[must_use]
    pub fn generation(&self, frame: FrameNumber) -> u64 {
        let ledger = self.ledger.lock();
        let slot = usize::try_from(frame.0).ok().and_then(|number| ledger.frames.get(number));
        slot.map_or(0, |slot| slot.generation.get())
    }

    /// Reads as a device's DMA does: any frame that exists, a freed one too, for memory does not refuse
    /// a stale read. The bytes of the spans go to the end of `out`, in order.
    ///
    /// # Errors
    /// [`FrameError::Unknown`], [`FrameError::Span`], [`FrameError::Memory`]; `out` is as it was then.
    pub fn read(&self, spans: &[FrameSpan], out: &mut BytesMut) -> Result<(), FrameError> {
        let before = out.len();
        let result = spans.iter().try_for_each(|span| {
            let at = self.position(span.frame, span.offset, span.length as usize)?;
            let start = out.len();
            out.resize(start + span.length as usize, 0);
            self.memory.read_exact_at(&mut out[start..], at).map_err(FrameError::memory)
        });
        if result.is_err() {
            out.truncate(before);
        }
        result
    }

    /// Writes as a device's DMA does: any frame that exists, a freed one too.
    ///
    /// # Errors
    /// [`FrameError::Unknown`], [`FrameError::Span`]; [`FrameError::Memory`], after which some of the
    /// bytes may be written.
    pub fn write(&self, frame: FrameNumber, offset: u32, data: &[u8]) -> Result<(), FrameError> {
        let at = self.position(frame, offset, data.len())?;
        self.memory.write_all_at(data, at).map_err(FrameError::memory)
    }

    /// A frame of zeros, with one reference (`alloc_zeroed_user_highpage_movable`).
    pub(super) fn take_zeroed(&self) -> Result<FrameRef, FrameError> {
        self.take_filled(&[0; FRAME_BYTES])
    }

    /// A frame with the bytes of `original`, with one reference (`cow_user_page`).
    pub(super) fn take_copy(&self, original: &FrameRef) -> Result<FrameRef, FrameError> {
        self.take_filled(&self.bytes(original)?)
    }

    /// One more reference (`try_get_page`).
    pub(super) fn share(&self, frame: &FrameRef) -> Result<FrameRef, FrameError> {
        let mut ledger = self.ledger.lock();
        let slot = &mut ledger.frames[frame.number as usize];
        if slot.references >= self.most_references {
            return Err(FrameError::TooManyReferences { frame: frame.number(), most: self.most_references });
        }
        slot.references += 1;
        Ok(FrameRef { number: frame.number, generation: frame.generation })
    }

    /// Whether `frame` is the only reference (`page_count(page) == 1`). Only a holder of a reference can
    /// make another, so while the caller keeps hold of this one the answer stays true.
    pub(super) fn is_only_reference(&self, frame: &FrameRef) -> bool {
        self.ledger.lock().frames[frame.number as usize].references == 1
    }

    /// How many references there are, `frame` among them. A count that is not 1 may change at once.
    pub(super) fn references(&self, frame: &FrameRef) -> u32 {
        self.ledger.lock().frames[frame.number as usize].references
    }

    /// One more reference to a life, if it is not over (`get_page_unless_zero`).
    pub(super) fn pin(&self, life: FrameLife) -> Option<FrameRef> {
        let mut ledger = self.ledger.lock();
        let slot = ledger.frames.get_mut(life.number as usize)?;
        if slot.generation != life.generation
            || slot.references == 0
            || slot.references >= self.most_references
        {
            return None;
        }
        slot.references += 1;
        Some(FrameRef { number: life.number, generation: life.generation })
    }

    /// Whether a life is not over.
    pub(super) fn lives(&self, life: FrameLife) -> bool {
        let ledger = self.ledger.lock();
        let slot = ledger.frames.get(life.number as usize);
        slot.is_some_and(|slot| slot.generation == life.generation && slot.references > 0)
    }

    /// The bytes of a frame.
    pub(super) fn bytes(&self, frame: &FrameRef) -> Result<[u8; FRAME_BYTES], FrameError> {
        let mut bytes = [0; FRAME_BYTES];
        self.memory.read_exact_at(&mut bytes, position_of(frame.number)).map_err(FrameError::memory)?;
        Ok(bytes)
    }

    /// Gives references back; how many frames were freed. Those are poisoned before they can be taken
    /// again. Whoever calls knows that no device uses them: see [`super::gather::Gather::flush`].
    pub(super) fn put(&self, frames: impl IntoIterator<Item = FrameRef>) -> usize {
        let mut last = Vec::new();
        {
            let mut ledger = self.ledger.lock();
            for frame in frames {
                let slot = &mut ledger.frames[frame.number as usize];
                debug_assert_eq!(slot.generation, frame.generation, "a frame outlives its references");
                slot.references -= 1;
                if slot.references == 0 {
                    last.push(frame.number);
                }
            }
        }
        // No reference is left and none is free yet: nobody but stale devices can touch these.
        last.retain(|number| {
            let poisoned = self.memory.write_all_at(&[POISON; FRAME_BYTES], position_of(*number));
            if let Err(error) = &poisoned {
                tracing::error!(frame = number, %error, "a frame could not be poisoned; it is not used again");
            }
            poisoned.is_ok()
        });
        let mut ledger = self.ledger.lock();
        for number in &last {
            ledger.renew(*number);
            ledger.free.push(*number);
        }
        ledger.in_use -= last.len();
        last.len()
    }

    /// A frame with these bytes, with one reference.
    pub(super) fn take_filled(&self, bytes: &[u8; FRAME_BYTES]) -> Result<FrameRef, FrameError> {
        let (frame, was_freed) = self.take()?;
        if was_freed == WasFreed::Yes {
            self.check_poison(&frame);
        }
        match self.memory.write_all_at(bytes, position_of(frame.number)) {
            Ok(()) => Ok(frame),
            Err(error) => {
                // Nobody has seen it, so it needs no poison, which could not be written either.
                let mut ledger = self.ledger.lock();
                ledger.frames[frame.number as usize].references = 0;
                ledger.renew(frame.number);
                ledger.passed_over.push(frame.number);
                ledger.in_use -= 1;
                Err(FrameError::memory(error))
            }
        }
    }

    fn take(&self) -> Result<(FrameRef, WasFreed), FrameError> {
        let mut ledger = self.ledger.lock();
        let (number, was_freed) = if let Some(number) = ledger.free.pop() {
            (number, WasFreed::Yes)
        } else if let Some(number) = ledger.passed_over.pop() {
            (number, WasFreed::No)
        } else if ledger.frames.len() < self.capacity {
            let fresh = u32::try_from(ledger.frames.len()).expect("the capacity fits in 32 bits");
            ledger.frames.push(Slot { references: 0, generation: NonZeroU64::MIN });
            (fresh, WasFreed::No)
        } else {
            return Err(FrameError::OutOfMemory { frames: self.capacity });
        };
        ledger.in_use += 1;
        let generation = ledger.renew(number);
        ledger.frames[number as usize].references = 1;
        Ok((FrameRef { number, generation }, was_freed))
    }

    /// Follows `check_poison_mem`: what was written to a free frame came through a stale translation.
    fn check_poison(&self, frame: &FrameRef) {
        let mut bytes = [0; FRAME_BYTES];
        let read = self.memory.read_exact_at(&mut bytes, position_of(frame.number));
        if read.is_ok() && bytes != [POISON; FRAME_BYTES] {
            self.ledger.lock().broken_poison += 1;
            tracing::error!(frame = frame.number, "a free frame was written to, through a stale translation");
        }
    }

    fn position(&self, frame: FrameNumber, offset: u32, length: usize) -> Result<u64, FrameError> {
        let known = u32::try_from(frame.0).ok().filter(|number| (*number as usize) < self.capacity);
        let Some(number) = known else {
            return Err(FrameError::Unknown { frame, capacity: self.capacity });
        };
        if length > FRAME_BYTES || offset as usize > FRAME_BYTES - length {
            return Err(FrameError::Span { offset, length });
        }
        Ok(position_of(number) + u64::from(offset))
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum WasFreed {
    Yes,
    No,
}

impl Ledger {
    fn renew(&mut self, number: u32) -> NonZeroU64 {
        self.last_generation += 1;
        let generation = NonZeroU64::new(self.last_generation).expect("a counter that rose is not 0");
        self.frames[number as usize].generation = generation;
        generation
    }
}

impl FrameRef {
    pub(super) fn number(&self) -> FrameNumber {
        FrameNumber(u64::from(self.number))
    }

    pub(super) fn life(&self) -> FrameLife {
        FrameLife { number: self.number, generation: self.generation }
    }
}

impl FrameLife {
    pub(super) fn generation(self) -> u64 {
        self.generation.get()
    }
}

impl FrameError {
    fn memory(error: io::Error) -> Self {
        Self::Memory(Arc::new(error))
    }
}

fn position_of(number: u32) -> u64 {
    u64::from(number) * FRAME_BYTES as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes_of(store: &FrameStore, frame: FrameNumber) -> BytesMut {
        let mut out = BytesMut::new();
        store.read(&[FrameSpan { frame, offset: 0, length: 4096 }], &mut out).unwrap();
        out
    }

    #[test]
    fn a_frame_is_poisoned_only_when_its_last_reference_goes() {
        let store = FrameStore::new(4).unwrap();
        let first = store.take_zeroed().unwrap();
        let number = first.number();
        let life = store.generation(number);
        store.write(number, 4090, b"stamp").unwrap();
        let second = store.share(&first).unwrap();
        assert!(!store.is_only_reference(&first));
        assert_eq!(store.put([first]), 0);
        assert_eq!(&bytes_of(&store, number)[4090..4095], b"stamp");
        assert_eq!(store.generation(number), life);
        assert!(store.is_only_reference(&second));
        assert_eq!(store.put([second]), 1);
        assert!(bytes_of(&store, number).iter().all(|byte| *byte == POISON));
        assert!(store.generation(number) > life);
        assert_eq!(store.in_use(), 0);
    }

    /// As where the system has no memory for a memfd that is larger.
    #[test]
    fn memory_that_cannot_be_written_is_told_each_time_and_uses_no_frame_up() {
        let full = std::fs::OpenOptions::new().read(true).write(true).open("/dev/full").unwrap();
        let store = FrameStore::on(full, 2, 9);
        for _ in 0..10 {
            assert!(matches!(store.take_zeroed(), Err(FrameError::Memory(_))));
        }
        assert_eq!((store.in_use(), store.broken_poison()), (0, 0));
    }

    #[test]
    fn a_later_life_has_a_higher_generation_and_starts_with_zeros() {
        let store = FrameStore::new(1).unwrap();
        let mut last = store.generation(FrameNumber(0));
        assert_eq!(last, 0, "it was never taken");
        for _ in 0..3 {
            let frame = store.take_zeroed().unwrap();
            assert!(frame.life().generation() > last);
            last = frame.life().generation();
            assert!(bytes_of(&store, frame.number()).iter().all(|byte| *byte == 0));
            store.write(frame.number(), 0, b"dirt").unwrap();
            store.put([frame]);
        }
        assert_eq!(store.broken_poison(), 0);
    }

    #[test]
    fn a_stale_write_to_a_free_frame_is_counted_when_the_frame_is_taken_again() {
        let store = FrameStore::new(1).unwrap();
        let frame = store.take_zeroed().unwrap();
        let number = frame.number();
        store.put([frame]);
        store.write(number, 7, b"x").unwrap();
        let again = store.take_zeroed().unwrap();
        assert_eq!(store.broken_poison(), 1);
        assert!(bytes_of(&store, number).iter().all(|byte| *byte == 0));
        store.put([again]);
    }

    #[test]
    fn a_reference_count_never_wraps() {
        let store = FrameStore::with_reference_limit(1, 2).unwrap();
        let first = store.take_zeroed().unwrap();
        let second = store.share(&first).unwrap();
        assert!(matches!(store.share(&first), Err(FrameError::TooManyReferences { most: 2, .. })));
        assert_eq!(store.put([first, second]), 1, "two references, one frame");
    }

    #[test]
    fn what_is_outside_of_the_store_or_of_one_frame_is_refused() {
        let store = FrameStore::new(2).unwrap();
        let mut out = BytesMut::from(&b"kept"[..]);
        let span = |frame, offset, length| FrameSpan { frame: FrameNumber(frame), offset, length };
        for frame in [2, 1 << 32, u64::MAX] {
            let spans = [span(0, 0, 8), span(frame, 0, 1)];
            assert!(matches!(store.read(&spans, &mut out), Err(FrameError::Unknown { .. })));
            assert!(matches!(store.write(FrameNumber(frame), 0, b"x"), Err(FrameError::Unknown { .. })));
        }
        for (offset, length) in [(4096, 1), (0, 4097), (4095, 2), (u32::MAX, 1), (1, u32::MAX)] {
            assert!(matches!(store.read(&[span(0, offset, length)], &mut out), Err(FrameError::Span { .. })));
        }
        assert_eq!(&out[..], b"kept");
        assert!(FrameStore::new(0).is_err());
    }

    #[test]
    fn no_more_frames_are_taken_than_there_are() {
        let store = FrameStore::new(2).unwrap();
        let frames = [store.take_zeroed().unwrap(), store.take_zeroed().unwrap()];
        assert!(matches!(store.take_copy(&frames[0]), Err(FrameError::OutOfMemory { frames: 2 })));
        assert_eq!(store.in_use(), 2);
        assert_eq!(store.put(frames), 2);
        assert_eq!(store.in_use(), 0);
    }
}
