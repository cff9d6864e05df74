//! [8 of 9] Quarantine: what callers have to keep because their round was not quiesced in time.
//!
//! ```text
//!   round, its caller answered NOT_QUIESCED --> parked: bytes of its range, pages that its caller keeps
//!   round complete ------------------------------> the charge is given back, whoever waits looks again
//! ```
//!
//! The pages are with the source; here they are counted. While the budget is spent, a call whose pages may
//! come here as well does not open its round: one that can wait waits until a charge is given back, at most as
//! long as its caller does ([`NotifyError::QuarantineFull`](crate::source::NotifyError)), and one that cannot
//! wait and has a target is refused. A call whose pages cannot come here goes on: it has no target, or no
//! deadline and only targets that are certain to stop, so that one stuck device holds up none but those who
//! might add to the heap (Isolation).
//!
//! The budget is looked at before a round opens and charged when its caller is answered, so it may be passed
//! by what is in flight in that moment. To charge every call beforehand would make healthy calls wait for
//! each other. A release is listed and not charged: it is never refused, and there is one an address space.

use std::sync::Arc;

use parking_lot::Mutex;
use shootdown_core::event::{Event, Method};
use shootdown_core::{AddrRange, PageSize};
use tokio::sync::Notify;

/// How much may be quarantined before callers have to wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuarantineBudget {
    /// Bytes of ranges.
    pub bytes: u64,
    /// Pages that callers keep.
    pub pages: u64,
}

/// What is quarantined in a host agent.
#[derive(Debug)]
pub(crate) struct Quarantine {
    budget: QuarantineBudget,
    parked: Mutex<Charge>,
    /// Rings when a charge is given back.
    freed: Notify,
}

/// So much of the budget. A whole address space has 2^64 bytes, and there may be several.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Charge {
    pub(crate) bytes: u128,
    pub(crate) pages: u128,
}

impl Charge {
    /// What a caller keeps whose round was not quiesced: every page of the range, or as many as it says.
    fn of(event: &Event, resident_pages: Option<u64>) -> Self {
        if event.method == Method::Release {
            return Self::default();
        }
        let bytes = bytes(event.range);
        let all = bytes.div_ceil(u128::from(PageSize::BASE.bytes()));
        Self { bytes, pages: resident_pages.map_or(all, |pages| all.min(u128::from(pages))) }
    }
}

/// A range that wraps nowhere has an end; all of an address space has 2^64 bytes.
fn bytes(range: AddrRange) -> u128 {
    range.length().map_or(1 << 64, u128::from)
}

/// Whether the pages of such a call are kept when its round is not quiesced in time. A young query frees none.
pub(crate) const fn parks(method: Method) -> bool {
    matches!(method, Method::Invalidate | Method::ChangePte(_) | Method::Release)
}

/// A charge; given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Parked {
    quarantine: Arc<Quarantine>,
    pub(crate) charge: Charge,
}

impl Quarantine {
    pub(crate) fn new(budget: QuarantineBudget) -> Self {
        Self { budget, parked: Mutex::default(), freed: Notify::new() }
    }

    pub(crate) fn park(self: &Arc<Self>, event: &Event, resident_pages: Option<u64>) -> Parked {
        let charge = Charge::of(event, resident_pages);
        let mut parked = self.parked.lock();
        parked.bytes += charge.bytes;
        parked.pages += charge.pages;
        drop(parked);
        Parked { quarantine: Arc::clone(self), charge }
    }

    pub(crate) fn parked(&self) -> Charge {
        *self.parked.lock()
    }

    pub(crate) fn budget(&self) -> QuarantineBudget {
        self.budget
    }

    /// Whether the budget is spent.
    pub(crate) fn is_full(&self) -> bool {
        let parked = self.parked();
        parked.bytes >= u128::from(self.budget.bytes) || parked.pages >= u128::from(self.budget.pages)
    }

    /// Resolves at the next charge that is given back after it was first polled or enabled.
    pub(crate) fn freed(&self) -> tokio::sync::futures::Notified<'_> {
        self.freed.notified()
    }
}

impl Drop for Parked {
    fn drop(&mut self) {
        {
            let mut parked = self.quarantine.parked.lock();
            parked.bytes -= self.charge.bytes;
            parked.pages -= self.charge.pages;
        }
        self.quarantine.freed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shootdown_core::{AddressSpaceId, Cause, Seq};

    fn event(range: AddrRange, method: Method) -> Event {
        let (address_space, seq) = (AddressSpaceId::FIRST, Seq::FIRST);
        Event { address_space, seq, range, method, cause: Cause::Unmap, owner: None }
    }

    fn quarantine(bytes: u64, pages: u64) -> Arc<Quarantine> {
        Arc::new(Quarantine::new(QuarantineBudget { bytes, pages }))
    }

    #[test]
    fn what_is_parked_is_counted_until_it_is_given_back() {
        let quarantine = quarantine(1 << 20, 8);
        let range = AddrRange::new(0x1000, 0x5000).unwrap();
        let all = quarantine.park(&event(range, Method::Invalidate), None);
        assert_eq!(quarantine.parked(), Charge { bytes: 0x4000, pages: 4 });
        let some = quarantine.park(&event(range, Method::Invalidate), Some(1));
        let too_many = quarantine.park(&event(range, Method::Invalidate), Some(1000));
        assert_eq!(quarantine.parked(), Charge { bytes: 0xc000, pages: 9 });
        assert!(quarantine.is_full(), "by its pages");
        drop(too_many);
        assert!(!quarantine.is_full());
        drop((all, some));
        assert_eq!(quarantine.parked(), Charge::default());
    }

    #[test]
    fn a_whole_address_space_spends_the_budget_and_counts_back_to_zero() {
        let quarantine = quarantine(u64::MAX, u64::MAX);
        let twice = [0, 1].map(|_| quarantine.park(&event(AddrRange::ALL, Method::Invalidate), None));
        assert_eq!(quarantine.parked().bytes, 1 << 65);
        assert!(quarantine.is_full(), "by its bytes");
        drop(twice);
        assert_eq!(quarantine.parked(), Charge::default());
        let release = quarantine.park(&event(AddrRange::ALL, Method::Release), None);
        assert_eq!(quarantine.parked(), Charge::default(), "a release is not charged");
        drop(release);
    }

    #[test]
    fn a_budget_of_nothing_is_spent_from_the_start() {
        assert!(quarantine(0, 1).is_full() && quarantine(1, 0).is_full() && !quarantine(1, 1).is_full());
    }
}
