//! What must not be finished once something overlapping has begun: the tickets of the host's grants
//! ([3 of 9], [`crate::gate`]) and of the device's commits ([5 of 9], [`crate::mapping`]).
//!
//! ```text
//!               commit: Ok
//!   open() --> Open --------> gone
//!               |  \ cancel     ^
//!         spoil |   +-----------+
//!               v               |
//!            Spoiled -----------+
//!               commit: false, cancel
//! ```
//!
//! The kernel's `mmu_interval_read_begin` and `mmu_interval_read_retry` compare a sequence of their
//! whole interval, and so retry on events elsewhere in it; a ticket is spoiled by what overlaps it only.

use crate::interval::IntervalMap;
use crate::range::AddrRange;

/// The tickets that can still be committed.
///
/// Spoiling takes a ticket out, so a spoiled one costs no memory, and is looked at once however many
/// events come after. The price: a ticket that its holder lost stays until something overlaps it.
#[derive(Default, Debug)]
pub(crate) struct Tickets {
    open: IntervalMap<u64, ()>,
}

/// Hands out the numbers of tickets. It lives longer than each [`Tickets`] that it numbers: a number
/// that came twice would let a spoiled ticket commit in the place of a newer one.
#[derive(Default, Debug)]
pub(crate) struct TicketNumbers {
    last: u64,
}

/// One ticket; whoever holds it does so alone.
#[must_use]
#[derive(Debug)]
pub(crate) struct Ticket {
    number: u64,
    range: AddrRange,
}

impl Tickets {
    /// O(log n), as all below but `spoil`.
    pub(crate) fn open(&mut self, numbers: &mut TicketNumbers, range: AddrRange) -> Ticket {
        numbers.last += 1;
        let number = numbers.last;
        self.open.set(range, number, ());
        Ticket { number, range }
    }

    /// Spoils every open ticket that overlaps: O(k log n) for k of them.
    pub(crate) fn spoil(&mut self, range: AddrRange) {
        let overlapping: Vec<_> =
            self.open.overlapping(range).map(|(range, number, ())| (range, *number)).collect();
        for (range, number) in overlapping {
            self.open.take(range, &number);
        }
    }

    /// Ends a ticket, and says whether it was still open.
    #[expect(clippy::needless_pass_by_value, reason = "a ticket is ended once")]
    pub(crate) fn end(&mut self, ticket: Ticket) -> bool {
        self.open.take(ticket.range, &ticket.number).is_some()
    }

    pub(crate) const fn len(&self) -> usize {
        self.open.len()
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.open.is_empty()
    }
}
