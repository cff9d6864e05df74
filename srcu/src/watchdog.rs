//! A task that watches a domain, for who runs tokio.

use crate::domain::Domain;
use std::{future::Future, time::Duration};
use tokio::time::MissedTickBehavior;

/// Calls [`Domain::check_stalls`] every `period`, until the last handle of the domain is gone. Spawn it, and keep what
/// `spawn` returns to stop it earlier. It does not keep the domain alive.
///
/// # Panics
///
/// When polled, if `period` is zero or the runtime has no timer.
pub fn watchdog(domain: &Domain, period: Duration) -> impl Future<Output = ()> + Send + 'static {
    let domain = domain.downgrade();
    async move {
        let mut ticks = tokio::time::interval(period);
        // A check that is late tells as much as two would.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let Some(domain) = domain.upgrade() else { return };
            domain.check_stalls();
        }
    }
}
