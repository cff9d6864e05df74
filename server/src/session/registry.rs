//! Which sessions there are.

use std::sync::Arc;

use dashmap::DashMap;
use parking_lot::Mutex;
use shootdown_core::{DeviceId, Epoch, Incarnation, SessionId};
use shootdown_proto::error::Reason;
use shootdown_proto::message::SessionError;

use super::SessionHandle;

/// Every session that is not over, by its id; and the one session of each device that has a stream.
#[derive(Debug)]
pub(crate) struct Registry {
    sessions: DashMap<SessionId, Arc<SessionHandle>>,
    admission: Mutex<Admission>,
    most: usize,
}

#[derive(Debug)]
struct Admission {
    next_session: SessionId,
    next_epoch: Epoch,
    by_device: std::collections::HashMap<DeviceId, Arc<SessionHandle>>,
}

impl Registry {
    /// Ids and epochs start at `first`, which no earlier run has given out.
    pub(crate) fn new(most: usize, first: u64) -> Self {
        Self {
            sessions: DashMap::new(),
            admission: Mutex::new(Admission {
                next_session: SessionId::new(first).unwrap_or(SessionId::FIRST),
                next_epoch: Epoch::new(first).unwrap_or(Epoch::FIRST),
                by_device: std::collections::HashMap::new(),
            }),
            most,
        }
    }

    /// Admits a new session of a device, made by `make`. An older session of the device loses its
    /// stream, so that it never stands in the way of the new one; it is waited for like any other that
    /// lost its stream.
    pub(crate) fn admit(
        &self,
        device: &DeviceId,
        incarnation: Incarnation,
        make: impl FnOnce(SessionId, Epoch) -> SessionHandle,
    ) -> Result<Arc<SessionHandle>, SessionError> {
        let (handle, replaced) = {
            let mut admission = self.admission.lock();
            if self.sessions.len() >= self.most {
                return Err(SessionError::fatal(
                    Reason::SessionQuota,
                    format!(
                        "the host agent has {} sessions, as many as it may; try again, or raise max_sessions",
                        self.most
                    ),
                ));
            }
            if let Some(newer) = admission.by_device.get(device).filter(|old| old.incarnation > incarnation) {
                return Err(SessionError::fatal(
                    Reason::SessionReplaced,
                    format!(
                        "device {device} has a session of its incarnation {}, which is newer than {incarnation}",
                        newer.incarnation
                    ),
                ));
            }
            let (id, epoch) = (admission.next_session, admission.next_epoch);
            (admission.next_session, admission.next_epoch) = (id.next(), epoch.next());
            let handle = Arc::new(make(id, epoch));
            self.sessions.insert(id, Arc::clone(&handle));
            let replaced = admission.by_device.insert(device.clone(), Arc::clone(&handle));
            (handle, replaced)
        };
        if let Some(replaced) = replaced {
            replaced
                .end(Reason::SessionReplaced, "a newer session of this device took the place of this one");
        }
        Ok(handle)
    }

    /// Lists a session of an earlier run. It counts as its device's, unless there is one of a newer
    /// incarnation.
    pub(crate) fn restore(&self, handle: &Arc<SessionHandle>) {
        let mut admission = self.admission.lock();
        self.sessions.insert(handle.id, Arc::clone(handle));
        let of_device =
            admission.by_device.entry(handle.device.clone()).or_insert_with(|| Arc::clone(handle));
        if (of_device.incarnation, of_device.id) < (handle.incarnation, handle.id) {
            *of_device = Arc::clone(handle);
        }
    }

    pub(crate) fn get(&self, id: SessionId) -> Option<Arc<SessionHandle>> {
        self.sessions.get(&id).map(|handle| Arc::clone(&handle))
    }

    /// The device said in `newer` that it holds nothing of its earlier sessions: those of this run of the device
    /// agent. One of another run is waited for: nobody knows whether that run has stopped.
    pub(crate) fn leave_behind(&self, newer: &SessionHandle) {
        let is_earlier = |old: &SessionHandle| {
            old.device == newer.device && old.incarnation == newer.incarnation && old.id < newer.id
        };
        for earlier in self.list().into_iter().filter(|old| is_earlier(old)) {
            tracing::info!(session = earlier.id.get(), by = newer.id.get(), "left behind by its device");
            earlier.on_left_behind();
        }
    }

    /// Forgets a session that is over.
    pub(crate) fn forget(&self, handle: &SessionHandle) {
        self.sessions.remove(&handle.id);
        let mut admission = self.admission.lock();
        if admission.by_device.get(&handle.device).is_some_and(|current| current.id == handle.id) {
            admission.by_device.remove(&handle.device);
        }
    }

    /// All of them, in ascending order of their ids: a copy, for listings and for draining.
    pub(crate) fn list(&self) -> Vec<Arc<SessionHandle>> {
        let mut sessions: Vec<_> = self.sessions.iter().map(|entry| Arc::clone(entry.value())).collect();
        sessions.sort_unstable_by_key(|session| session.id);
        sessions
    }
}
