//! Futures that sleep until a number is reached: grace periods completed, or callbacks run.

use std::{collections::BTreeMap, task::Waker};

/// A waiter's place, by which it renews its waker or leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    /// The number that has to be reached. First, so that the map is ordered by it.
    until: u64,
    /// Tells apart those who wait for the same number.
    serial: u64,
}

/// Who sleeps. A waiter is woken by the number alone, never by another waiter, so one that leaves hurts nobody.
#[derive(Default)]
pub(crate) struct Waiters {
    sleeping: BTreeMap<Place, Waker>,
    next_serial: u64,
}

impl Waiters {
    pub(crate) fn join(&mut self, until: u64, waker: Waker) -> Place {
        let place = Place { until, serial: self.next_serial };
        self.next_serial += 1;
        self.sleeping.insert(place, waker);
        place
    }

    /// The old waker is handed back: to drop one runs code of its executor, which must not happen under the lock.
    #[must_use = "drop it after the lock"]
    pub(crate) fn renew(&mut self, place: Place, waker: Waker) -> Option<Waker> {
        self.sleeping.insert(place, waker)
    }

    #[must_use = "drop it after the lock"]
    pub(crate) fn leave(&mut self, place: Place) -> Option<Waker> {
        self.sleeping.remove(&place)
    }

    /// Takes out all who waited for `reached` or less; the caller wakes them after the lock.
    pub(crate) fn take_reached(&mut self, reached: u64, woken: &mut Vec<Waker>) {
        while let Some(first) = self.sleeping.first_entry() {
            if first.key().until > reached {
                break;
            }
            woken.push(first.remove());
        }
    }
}
