//! The one question before every use, and while it lasts: is there a session, and has its lease not run out?

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use parking_lot::RwLock;
use shootdown_core::Moment;
use shootdown_core::lease::DeviceLease;
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;

/// A timer stands still while the machine is suspended, and a lease does not: whoever waits for its end looks
/// at the clock at least twice a margin, so that an access which was asleep with its machine ends within it.
const LOOKS_A_MARGIN: u32 = 2;

/// What tokio's timers can do.
const LEAST_WAIT: Duration = Duration::from_millis(1);

/// Says whether translations may be used at all. A device that holds raw frames in a TLB of its own asks
/// [`Gate::check`] before every access; [`Mapping::begin_use`](crate::Mapping::begin_use) does by itself.
///
/// The price: a lock for readers and a reading of the clock, some 30 ns. What it allows may go on for the
/// lease's margin ([`DeviceConfig::lease_margin`](crate::DeviceConfig::lease_margin)), not longer: an access that
/// may take longer asks again on its way ([`Gate::check_in_flight`]), or is run by [`Gate::run_until_expired`].
#[derive(Debug, Clone)]
pub struct Gate {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    clock: Clock,
    state: RwLock<State>,
    /// The longest wait of those who wait for the lease's end.
    longest_wait: Duration,
    /// Cancelled when nothing may be used any more, whatever was granted.
    ended: CancellationToken,
}

#[derive(Debug)]
struct State {
    door: Door,
    lease: DeviceLease,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Door {
    Open,
    Shut,
}

/// Why a translation must not be used. Fail closed: no access may follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UseRefused {
    /// A notice withdrew it. Fault it again.
    #[error("the translation was withdrawn")]
    Revoked,
    /// The session is closed. Wait for [`Device::lost`](crate::Device::lost), then connect again.
    #[error("the session is closed")]
    SessionEnded,
    /// The lease was not renewed in time: the host may have given the page to somebody else.
    #[error("the lease ran out")]
    LeaseExpired,
}

impl Gate {
    pub(crate) fn new(clock: Clock, drift_ppm: u32, margin: Duration) -> Self {
        let state = State { door: Door::Open, lease: DeviceLease::new(drift_ppm, margin) };
        let longest_wait = (margin / LOOKS_A_MARGIN).max(LEAST_WAIT);
        let ended = CancellationToken::new();
        Self { inner: Arc::new(Inner { clock, state: RwLock::new(state), longest_wait, ended }) }
    }

    /// Whether the session is live and its lease has not run out.
    ///
    /// # Errors
    /// [`UseRefused::SessionEnded`] or [`UseRefused::LeaseExpired`]; never [`UseRefused::Revoked`], of
    /// which it knows nothing.
    pub fn check(&self) -> Result<(), UseRefused> {
        // The clock is read first: what is later than it may only shorten what is left.
        let now = self.inner.clock.now();
        let state = self.inner.state.read();
        match state.door {
            Door::Shut => Err(UseRefused::SessionEnded),
            Door::Open if state.lease.is_valid(now) => Ok(()),
            Door::Open => Err(UseRefused::LeaseExpired),
        }
    }

    /// When the lease runs out unless it is renewed; `None`: it has ended.
    #[must_use]
    pub fn valid_until(&self) -> Option<Moment> {
        self.inner.state.read().lease.valid_until()
    }

    /// Whether a use that was begun in time may go on. That the session is closing does not end it: the flush
    /// of everything waits for it, as every flush does. The end of the lease does, and dirty bytes may be
    /// written back until then.
    ///
    /// # Errors
    /// [`UseRefused::LeaseExpired`].
    pub fn check_in_flight(&self) -> Result<(), UseRefused> {
        let now = self.inner.clock.now();
        if self.inner.state.read().lease.is_valid(now) { Ok(()) } else { Err(UseRefused::LeaseExpired) }
    }

    /// Resolves when no use may go on any more: the lease has run out and was not renewed, or the session
    /// has ended. At most half a margin after that, also when the machine was suspended meanwhile.
    ///
    /// # Cancel safety
    /// May be dropped and called again.
    pub async fn expired(&self) {
        loop {
            let now = self.inner.clock.now();
            let Some(until) = self.valid_until().filter(|until| *until > now) else { return };
            let wait = until.since(now).clamp(LEAST_WAIT, self.inner.longest_wait);
            tokio::select! {
                () = self.inner.ended.cancelled() => {}
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Does what an access does, for as long as the lease lasts: past it the access is dropped where it waits.
    /// `Ok` says that all of it lay within the lease.
    ///
    /// The access must be one that ends when it is dropped, within the margin; and what it does between two
    /// points at which it waits must be shorter than the margin, because only there it can be stopped.
    ///
    /// # Errors
    /// [`UseRefused::LeaseExpired`]: what it read may not be trusted, and whether it wrote is not known.
    ///
    /// # Cancel safety
    /// That of the access.
    pub async fn run_until_expired<T>(&self, access: impl Future<Output = T>) -> Result<T, UseRefused> {
        let mut access = pin!(access);
        let mut expired = pin!(self.expired());
        poll_fn(|context| {
            // At every turn, and not only when a timer says so: the clock alone counts.
            if let Err(refused) = self.check_in_flight() {
                return Poll::Ready(Err(refused));
            }
            if let Poll::Ready(done) = access.as_mut().poll(context) {
                return Poll::Ready(self.check_in_flight().map(|()| done));
            }
            expired.as_mut().poll(context).map(|()| Err(UseRefused::LeaseExpired))
        })
        .await
    }

    pub(crate) fn on_granted(&self, request_sent: Moment, lease: Duration) {
        self.inner.state.write().lease.on_granted(request_sent, lease);
    }

    pub(crate) fn shut(&self) {
        self.inner.state.write().door = Door::Shut;
    }

    /// Nothing goes any more, write-backs neither.
    pub(crate) fn end(&self) {
        {
            let mut state = self.inner.state.write();
            state.door = Door::Shut;
            state.lease.on_ended();
        }
        self.inner.ended.cancel();
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Waker};

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_the_lease_hears_at_once_that_the_session_has_ended() {
        let gate = Gate::new(Clock::from_fn(|| Moment::ZERO), 0, HOUR);
        gate.on_granted(Moment::ZERO, 3 * HOUR);
        let began = tokio::time::Instant::now();
        let mut access = pin!(gate.run_until_expired(std::future::pending::<()>()));
        assert!(access.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        let other = gate.clone();
        let (refused, ()) = tokio::join!(access, async move { other.end() });
        assert_eq!(refused, Err(UseRefused::LeaseExpired));
        assert_eq!(began.elapsed(), Duration::ZERO, "no timer was needed");
    }

    /// Whatever the timers do, the clock is looked at twice a margin: the bound for a machine that slept.
    #[tokio::test(start_paused = true)]
    async fn the_end_of_the_lease_is_seen_half_a_margin_later_at_most() {
        let began = tokio::time::Instant::now();
        let margin = Duration::from_millis(100);
        // It jumps while the timers stand still, as CLOCK_BOOTTIME does over a suspend.
        let slept = Duration::from_secs(1);
        let awake_at = Duration::from_millis(10);
        let clock = Clock::from_fn(move || {
            let awake = began.elapsed();
            Moment::ZERO + if awake > awake_at { awake + slept } else { awake }
        });
        let gate = Gate::new(clock, 0, margin);
        gate.on_granted(Moment::ZERO, Duration::from_secs(1));
        gate.expired().await;
        assert!(began.elapsed() <= awake_at + margin / LOOKS_A_MARGIN, "{:?}", began.elapsed());
    }
}
