//! Time, in ticks: what a lease, T_ack and T_fence are.

use std::time::Duration;

use shootdown_core::Moment;
use shootdown_core::lease::LeaseTerms;

/// A lease of 3 ticks: the device counts 2 of its clock, the host 4 of its own. Two clocks that are at
/// most a tick apart may differ by 2 over a lease: the margins on both sides are just enough.
const LEASE: LeaseTerms =
    LeaseTerms { duration: Duration::from_nanos(3), drift_ppm: 0, margin: Duration::from_nanos(1) };
/// T_ack, in ticks of the host's clock.
pub(crate) const T_ACK: u8 = 1;
/// T_fence of a device that enforces its lease: the lease as the host counts it.
pub(crate) const T_FENCE: u8 = 4;
/// The terms of every lease.
pub(crate) const fn terms() -> LeaseTerms {
    LEASE
}

/// A tick of a clock as the rules see it.
pub(crate) fn moment(tick: u8) -> Moment {
    Moment::from_nanos(u64::from(tick))
}
