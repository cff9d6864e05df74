//! When a device may be taken as stopped without its word.
//!
//! ```text
//!  device   request sent                                   valid_until: uses nothing any more
//!   ------------+-----------------------------------------------+------------------------->
//!               |<--- duration - drift - margin --------------->|
//!               +-----------+                       +...........+
//!                           v                       |  (grant, however late it arrives)
//!   ------------------------+-----------------------+--------------------------+---------->
//!  host                 grant sent                                          expires: fenced
//!                           |<--- duration + drift + margin ------------------>|
//! ```
//!
//! Each side reads its own clock only, and corrects for its own drift against real time. The request
//! is sent before the grant, so for clocks within `drift_ppm` of real time the host's expiry is never
//! before the device's, whatever the delays of both messages: the bound that Gray and Cheriton give
//! ("Leases: an efficient fault-tolerant mechanism for distributed file cache consistency", 1989).
//! `sent` on the host may be any moment after the request arrived: later is longer, thus safe.

use std::time::Duration;

use crate::moment::Moment;

/// Long enough that heartbeats (three a lease) cost nothing; what a caller waits at most for a device
/// that died is T_ack more than this.
const DEFAULT_DURATION: Duration = Duration::from_secs(5);

/// Parts per million that a clock may differ from real time: the kernel steers `CLOCK_BOOTTIME` by at
/// most 500 (NTP's slew), and a cheap crystal adds up to 100 before it is steered.
const DEFAULT_DRIFT_PPM: u32 = 600;

/// What the drift does not cover: on the device the time between the check of the lease and the last
/// access that it allowed, on the host the time between the reading of the clock and its use.
const DEFAULT_MARGIN: Duration = Duration::from_millis(100);

/// The part of a lease that [`DEFAULT_MARGIN`] may take: of a lease of 50 ms it leaves 45.
const DEFAULT_MARGINS_A_LEASE: u32 = 10;

/// What host and device agree on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct LeaseTerms {
    /// How long a grant of the lease lasts, before the corrections.
    pub duration: Duration,
    /// The most by which either side's clock differs from real time, in parts per million.
    pub drift_ppm: u32,
    /// Added on the host, taken away on the device. It covers what drift does not: at least the
    /// granularity of both clocks.
    pub margin: Duration,
}

impl Default for LeaseTerms {
    fn default() -> Self {
        Self { duration: DEFAULT_DURATION, drift_ppm: DEFAULT_DRIFT_PPM, margin: DEFAULT_MARGIN }
    }
}

impl LeaseTerms {
    /// The margin of a lease for which none is set: 100 ms, or a tenth of a lease that is shorter than 1 s.
    #[must_use]
    pub fn default_margin(duration: Duration) -> Duration {
        DEFAULT_MARGIN.min(duration / DEFAULT_MARGINS_A_LEASE)
    }

    /// How long after it sent a grant the host must wait, on its own clock: lengthened, rounded up.
    #[must_use]
    pub fn host_duration(&self) -> Duration {
        self.duration.saturating_add(drift(self.duration, self.drift_ppm)).saturating_add(self.margin)
    }

    /// How long after it sent a request the device may go on, on its own clock: shortened, rounded
    /// down. Zero when the margin is longer than the lease.
    #[must_use]
    pub fn device_duration(&self) -> Duration {
        self.duration.saturating_sub(drift(self.duration, self.drift_ppm)).saturating_sub(self.margin)
    }
}

/// How far a clock may be off after `duration`, rounded up.
fn drift(duration: Duration, ppm: u32) -> Duration {
    let nanos = duration.as_nanos().saturating_mul(u128::from(ppm)).div_ceil(1_000_000);
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

/// The lease as the host agent counts it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct HostLease {
    terms: LeaseTerms,
    expires: Moment,
}

impl HostLease {
    /// The first grant, sent at `sent`.
    #[must_use]
    pub fn new(terms: LeaseTerms, sent: Moment) -> Self {
        Self { terms, expires: sent + terms.host_duration() }
    }

    /// A lease that was granted before the clock could be asked, and has ended by `expires`.
    #[must_use]
    pub fn until(terms: LeaseTerms, expires: Moment) -> Self {
        Self { terms, expires }
    }

    /// Renews the lease by a grant sent at `sent`. It never gets shorter: the device may have
    /// received every grant.
    pub fn grant(&mut self, sent: Moment) {
        self.expires = self.expires.max(sent + self.terms.host_duration());
    }

    /// From here on the device has stopped.
    #[must_use]
    pub fn expires(&self) -> Moment {
        self.expires
    }

    /// Whether the device has stopped at `now`.
    #[must_use]
    pub fn is_expired(&self, now: Moment) -> bool {
        now >= self.expires
    }

    /// What was agreed.
    #[must_use]
    pub fn terms(&self) -> &LeaseTerms {
        &self.terms
    }
}

/// The lease as the device counts it. Without a grant it is not valid (fail closed).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct DeviceLease {
    drift_ppm: u32,
    margin: Duration,
    valid_until: Option<Moment>,
}

impl DeviceLease {
    /// No lease yet. `drift_ppm` and `margin` are those of [`LeaseTerms`].
    #[must_use]
    pub const fn new(drift_ppm: u32, margin: Duration) -> Self {
        Self { drift_ppm, margin, valid_until: None }
    }

    /// The host agent granted `duration` on the request that was sent at `request_sent`.
    pub fn on_granted(&mut self, request_sent: Moment, duration: Duration) {
        let terms = LeaseTerms { duration, drift_ppm: self.drift_ppm, margin: self.margin };
        self.valid_until = self.valid_until.max(Some(request_sent + terms.device_duration()));
    }

    /// The session ended: no translation may be used, whatever was granted.
    pub fn on_ended(&mut self) {
        self.valid_until = None;
    }

    /// The first moment at which no translation may be used any more; `None`: none may now.
    #[must_use]
    pub fn valid_until(&self) -> Option<Moment> {
        self.valid_until
    }

    /// Whether translations may be used at `now`.
    #[must_use]
    pub fn is_valid(&self, now: Moment) -> bool {
        self.valid_until.is_some_and(|until| now < until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn millis(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    /// A clock that runs `ppm` parts per million fast (slow: below 0) from an origin of its own.
    #[derive(Clone, Copy, Debug)]
    struct Clock {
        origin: u64,
        ppm: i64,
    }

    impl Clock {
        /// What it shows `real` nanoseconds after the start of the test, rounded down as clocks do.
        fn shows(self, real: u64) -> Moment {
            let ran = i128::from(real) * i128::from(1_000_000 + self.ppm) / 1_000_000;
            Moment::from_nanos(self.origin + u64::try_from(ran).unwrap())
        }
    }

    fn any_clock(bound: u32) -> impl Strategy<Value = Clock> {
        let bound = i64::from(bound);
        (0..1_u64 << 60, -bound..=bound).prop_map(|(origin, ppm)| Clock { origin, ppm })
    }

    /// Margins from the least that covers the nanosecond which reading a clock rounds away, so that
    /// the correction for drift is tested on its own, up to far more than needed.
    fn any_terms() -> impl Strategy<Value = LeaseTerms> {
        let margin =
            prop_oneof![2..4_u64, 0..500_000_000_u64].prop_map(|nanos| Duration::from_nanos(nanos.max(2)));
        (1..20_000_u64, 0..200_000_u32, margin).prop_map(|(duration, drift_ppm, margin)| LeaseTerms {
            duration: millis(duration),
            drift_ppm,
            margin,
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]

        /// Whatever the drift of either clock and the delay of either message: at no moment of real
        /// time does the host take a lease for expired that the device takes for valid.
        #[test]
        fn the_host_never_expires_a_lease_before_the_device_does(
            (terms, host, device) in any_terms().prop_flat_map(|terms| {
                (Just(terms), any_clock(terms.drift_ppm), any_clock(terms.drift_ppm))
            }),
            start in 0..1_u64 << 40,
            request_delay in prop_oneof![Just(0), 0..30_000_000_000_u64],
            renew_after in prop::option::of(0..10_000_000_000_u64),
            probe in 0..60_000_000_000_u64,
        ) {
            let mut device_lease = DeviceLease::new(terms.drift_ppm, terms.margin);
            let mut host_lease = HostLease::new(terms, host.shows(start + request_delay));
            device_lease.on_granted(device.shows(start), terms.duration);
            if let Some(after) = renew_after {
                host_lease.grant(host.shows(start + after + request_delay));
                device_lease.on_granted(device.shows(start + after), terms.duration);
            }
            // Around the moment at which the host's clock shows the expiry, and anywhere.
            let shows = u128::from(host_lease.expires().as_nanos() - host.origin);
            let expiry = u64::try_from(shows * 1_000_000 / (1_000_000 + i128::from(host.ppm)) as u128).unwrap();
            for real in (expiry.saturating_sub(3)..expiry + 4).chain([start + probe]) {
                let expired = host_lease.is_expired(host.shows(real));
                let valid = device_lease.is_valid(device.shows(real));
                prop_assert!(!(expired && valid), "at {real}, the host's expiry being at {expiry}");
            }
        }

        #[test]
        fn a_renewal_never_shortens_a_lease(terms in any_terms(), grants in prop::collection::vec(0..1_u64 << 40, 1..10)) {
            let mut host = HostLease::new(terms, Moment::ZERO);
            let mut device = DeviceLease::new(terms.drift_ppm, terms.margin);
            for sent in grants {
                let before = (host.expires(), device.valid_until());
                host.grant(Moment::from_nanos(sent));
                device.on_granted(Moment::from_nanos(sent), terms.duration);
                prop_assert!(host.expires() >= before.0 && device.valid_until() >= before.1);
            }
        }
    }

    #[test]
    fn nothing_is_valid_without_a_grant_or_from_the_end_of_it_on() {
        let mut lease = DeviceLease::new(0, Duration::ZERO);
        assert!(!lease.is_valid(Moment::ZERO));
        lease.on_granted(Moment::ZERO, millis(10));
        assert!(lease.is_valid(Moment::ZERO + millis(9)));
        assert!(!lease.is_valid(Moment::ZERO + millis(10)), "the bound itself is past it");
        lease.on_ended();
        assert!(!lease.is_valid(Moment::ZERO), "fail closed");
        let terms = LeaseTerms { duration: millis(10), drift_ppm: 0, margin: Duration::ZERO };
        let host = HostLease::new(terms, Moment::ZERO);
        assert!(!host.is_expired(Moment::ZERO + millis(9)) && host.is_expired(Moment::ZERO + millis(10)));
    }

    #[test]
    fn the_default_margin_leaves_most_of_a_short_lease() {
        for (lease, margin) in [(50, 5), (999, 99), (1000, 100), (600_000, 100)] {
            assert_eq!(LeaseTerms::default_margin(millis(lease)).as_millis(), margin);
        }
        let default = LeaseTerms::default();
        assert_eq!(LeaseTerms::default_margin(default.duration), default.margin);
    }

    #[test]
    fn the_corrections_are_rounded_to_the_safe_side() {
        let terms = LeaseTerms { duration: Duration::from_nanos(10), drift_ppm: 1, margin: Duration::ZERO };
        assert_eq!(terms.host_duration(), Duration::from_nanos(11));
        assert_eq!(terms.device_duration(), Duration::from_nanos(9));
        let terms = LeaseTerms { duration: millis(10), drift_ppm: 0, margin: millis(11) };
        assert_eq!(terms.device_duration(), Duration::ZERO, "a margin longer than the lease leaves none");
        assert!(terms.host_duration() > terms.duration);
    }
}
