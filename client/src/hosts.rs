//! Which runs of host agents a device has spoken with.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use shootdown_core::Incarnation;

use crate::endpoint::Endpoint;

/// The newest run seen of each host agent, by its endpoint. A run that is older than one seen before is refused:
/// a host agent that was stopped for a while, and does not know of its successor, may not grant anything.
///
/// Clones share what they know. [`DeviceConfig`](crate::DeviceConfig) holds one, so a device that is connected again
/// with the same configuration, or a clone of it, goes on knowing.
#[derive(Debug, Clone, Default)]
pub struct HostsSeen(Arc<Mutex<HashMap<Endpoint, Incarnation>>>);

/// The host agent that answered is older than one that this device has spoken with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "host incarnation {got} answered, after {newest} was seen: it has been succeeded, and must not be listened to"
)]
pub struct StaleHost {
    /// Who answered.
    pub got: Incarnation,
    /// The newest seen.
    pub newest: Incarnation,
}

impl HostsSeen {
    /// The newest run seen of the host agent at `endpoint`.
    #[must_use]
    pub fn newest(&self, endpoint: &Endpoint) -> Option<Incarnation> {
        self.0.lock().get(endpoint).copied()
    }

    /// Remembers a run.
    ///
    /// # Errors
    /// [`StaleHost`] when a newer one was seen.
    pub(crate) fn see(&self, endpoint: &Endpoint, got: Incarnation) -> Result<(), StaleHost> {
        let mut seen = self.0.lock();
        match seen.get(endpoint) {
            Some(&newest) if newest > got => Err(StaleHost { got, newest }),
            _ => {
                seen.insert(endpoint.clone(), got);
                Ok(())
            }
        }
    }
}
