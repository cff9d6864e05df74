//! The readers' side of the protocol: two banks of striped lock and unlock counters.
//!
//! A section adds one to a `locks` counter of the current bank when it begins, and one to an `unlocks` counter of
//! the same bank when it ends, each on the stripe of the thread that does it; a section that ends on another
//! thread therefore touches no line of the thread it began on. A bank is drained when the two sums agree.
//!
//! Follows `kernel/rcu/srcutree.c`, except in how its barriers are written. The kernel pairs full fences: reader
//! `lock++; mb; read data`, updater `write data; mb; sum locks`. Here both sides meet in read-modify-writes of
//! the *same* counter instead. A single object's read-modify-writes are totally ordered and each reads its
//! predecessor, so one of the two sees the other, with no fence at all; a reader then pays one atomic add where it
//! would pay an add and a fence, which on x86 costs as much again (`benches/read.rs`, `fence`). The price, a write
//! to each stripe in a scan, is on the side that waits. The pairs are named below: BEGIN, END, WAKE.

use crate::sync::{AtomicU64, AtomicUsize, Ordering};
use crossbeam_utils::CachePadded;

/// One of the two banks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bank(usize);

impl Bank {
    pub(crate) fn other(self) -> Self {
        Self(self.0 ^ 1)
    }

    #[inline]
    pub(crate) fn index(self) -> usize {
        self.0 & 1
    }

    #[inline]
    pub(crate) fn from_index(index: usize) -> Self {
        Self(index & 1)
    }
}

/// Set in an `unlocks` counter while a grace period waits on its bank; the count itself is in the bits above.
const ARMED: u64 = 1;
/// One section that ended.
const UNLOCK: u64 = 2;

/// A stripe is one padded line: a thread's own begin and end go to the same one.
struct Stripe {
    locks: [AtomicU64; 2],
    unlocks: [AtomicU64; 2],
}

/// What a reader learns from ending its section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// Nobody waits on this bank.
    Unwatched,
    /// A grace period waits on this bank: whoever ends a section has to look whether it was the last.
    Watched,
}

/// The counters of a domain. Sums may wrap in theory only: a bank counts 2^63 sections.
pub(crate) struct Counters {
    /// The bank in which sections begin. Read by every reader, written by a flip only.
    current: CachePadded<AtomicUsize>,
    stripes: Box<[CachePadded<Stripe>]>,
    /// `stripes.len() - 1`; the length is a power of two.
    mask: usize,
}

impl Counters {
    pub(crate) fn new(stripes: usize) -> Self {
        let stripes = stripes.max(1).next_power_of_two();
        let stripe = || {
            let zeros = || [AtomicU64::new(0), AtomicU64::new(0)];
            CachePadded::new(Stripe { locks: zeros(), unlocks: zeros() })
        };
        Self {
            current: CachePadded::new(AtomicUsize::new(0)),
            stripes: (0..stripes).map(|_| stripe()).collect(),
            mask: stripes - 1,
        }
    }

    /// The bank in which a section would begin now.
    ///
    /// Relaxed: a stale answer is harmless, since a grace period drains both banks. That is what its first scan
    /// is for: a reader may sleep between this load and [`Counters::begin`] for a whole grace period.
    #[inline]
    pub(crate) fn current(&self) -> Bank {
        Bank::from_index(self.current.load(Ordering::Relaxed))
    }

    /// Begins a section in `bank`.
    ///
    /// Acquire, the reader's half of BEGIN; its partner is the add of zero in [`Counters::is_drained`]. Both change
    /// this one counter, so one comes first. The scan first: this add reads from its release sequence, and the
    /// section sees everything that was published before the grace period began. This add first: the scan reads
    /// it, and the grace period waits for the section.
    #[inline]
    pub(crate) fn begin(&self, bank: Bank, thread: usize) {
        self.stripes[thread & self.mask].locks[bank.index()].fetch_add(1, Ordering::Acquire);
    }

    /// Ends a section of `bank`, on any thread.
    ///
    /// Release, the reader's half of END; its partner is the Acquire load in [`Counters::is_drained`]. The load sees
    /// this add: all that the section did happens before the grace period ends, and its `locks` add is seen by the
    /// sum that follows. The load misses it: the sums differ, and the grace period goes on.
    ///
    /// It is also the reader's half of WAKE; its partner is [`Counters::arm`], which changes the same counter. This
    /// add first: the scan after arming counts it. Arming first: this add returns the mark, and this side scans.
    #[inline]
    pub(crate) fn end(&self, bank: Bank, thread: usize) -> Ended {
        let before =
            self.stripes[thread & self.mask].unlocks[bank.index()].fetch_add(UNLOCK, Ordering::Release);
        if before & ARMED == 0 { Ended::Unwatched } else { Ended::Watched }
    }

    /// Whether every section that began in `bank` before this call has ended.
    ///
    /// Unlocks are summed before locks. A section whose unlock is counted has its lock counted too (END), so equal
    /// sums mean that each lock counted has its unlock counted. The other way round, a section that begins and ends
    /// between the sums would stand in for one that is still open.
    pub(crate) fn is_drained(&self, bank: Bank) -> bool {
        let unlocks = self.sum_unlocks(bank);
        // Release, the scan's half of BEGIN; its partner is `begin`. It changes nothing and has to be a
        // read-modify-write all the same: a load could be missed by, and miss, a section that begins just now.
        let locks = self.sum(|stripe| stripe.locks[bank.index()].fetch_add(0, Ordering::Release));
        unlocks == locks
    }

    /// From now on who ends a section of `bank` is told [`Ended::Watched`].
    ///
    /// The waiting side's half of WAKE; its partner is [`Counters::end`]. The caller scans once more after it, since
    /// the last section may have ended before. Relaxed: the order of this one counter is all that is needed; a
    /// reader that sees the mark takes the grace period's lock before it looks at anything else.
    pub(crate) fn arm(&self, bank: Bank) {
        for stripe in &self.stripes {
            stripe.unlocks[bank.index()].fetch_or(ARMED, Ordering::Relaxed);
        }
    }

    /// Undoes [`Counters::arm`]. A reader that saw the mark just before finds nothing to do, which is harmless.
    pub(crate) fn disarm(&self, bank: Bank) {
        for stripe in &self.stripes {
            stripe.unlocks[bank.index()].fetch_and(!ARMED, Ordering::Relaxed);
        }
    }

    /// Makes the other bank the current one, so that new sections no longer hold up the one to be drained.
    ///
    /// Relaxed: who misses the flip goes on counting in the old bank, and is waited for there. The flip is for
    /// progress; safety comes from draining both banks.
    pub(crate) fn flip(&self) {
        let current = self.current.load(Ordering::Relaxed);
        self.current.store(current ^ 1, Ordering::Relaxed);
    }

    /// Sections now open, in both banks. Unlocks first, so that it never falls below zero.
    pub(crate) fn open(&self) -> usize {
        let unlocks = [0, 1].map(|bank| self.sum_unlocks(Bank::from_index(bank)));
        let locks = [0, 1].map(|bank| self.sum(|stripe| stripe.locks[bank].load(Ordering::Relaxed)));
        let open = (locks[0].wrapping_add(locks[1])).wrapping_sub(unlocks[0].wrapping_add(unlocks[1]));
        usize::try_from(open).unwrap_or(usize::MAX)
    }

    fn sum_unlocks(&self, bank: Bank) -> u64 {
        // Acquire, the scan's half of END; its partner is `end`.
        self.sum(|stripe| stripe.unlocks[bank.index()].load(Ordering::Acquire) / UNLOCK)
    }

    fn sum(&self, count: impl Fn(&Stripe) -> u64) -> u64 {
        self.stripes.iter().fold(0, |sum, stripe| sum.wrapping_add(count(stripe)))
    }
}
