//! The one question before every use: is there a session, and has its lease not run out?

use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;
use shootdown_core::Moment;
use shootdown_core::lease::DeviceLease;

use crate::clock::Clock;

/// Says whether translations may be used at all. A device that holds raw frames in a TLB of its own asks
/// [`Gate::check`] before every access; [`Mapping::begin_use`](crate::Mapping::begin_use) does by itself.
///
/// The price: a lock for readers and a reading of the clock, some 30 ns. What it allows may go on for the
/// lease's margin ([`DeviceConfig::lease_margin`](crate::DeviceConfig::lease_margin)), not longer.
#[derive(Debug, Clone)]
pub struct Gate {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    clock: Clock,
    state: RwLock<State>,
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
        Self { inner: Arc::new(Inner { clock, state: RwLock::new(state) }) }
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

    /// Whether dirty bytes may still be written back: a session that is closing may, within its lease.
    pub(crate) fn check_lease(&self) -> Result<(), UseRefused> {
        let now = self.inner.clock.now();
        if self.inner.state.read().lease.is_valid(now) { Ok(()) } else { Err(UseRefused::LeaseExpired) }
    }

    pub(crate) fn on_granted(&self, request_sent: Moment, lease: Duration) {
        self.inner.state.write().lease.on_granted(request_sent, lease);
    }

    pub(crate) fn shut(&self) {
        self.inner.state.write().door = Door::Shut;
    }

    /// Nothing goes any more, write-backs neither.
    pub(crate) fn end(&self) {
        let mut state = self.inner.state.write();
        state.door = Door::Shut;
        state.lease.on_ended();
    }
}
