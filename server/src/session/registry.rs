//! Which sessions there are.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use dashmap::DashMap;
use parking_lot::Mutex;
use shootdown_core::{DeviceId, Epoch, Incarnation, SessionId};
use shootdown_proto::error::Reason;
use shootdown_proto::message::SessionError;

use super::SessionHandle;

/// Every session that is not over, by its id; and the one session of each device that has a stream.
///
/// Quotas count devices. What a device left behind must not keep it out, because only its next session says that it
/// holds nothing of it; and what one device leaves must not keep another out. So in one run of the host agent:
///
/// * `most` devices have a session. Survivors of the run before are not counted: their devices come back.
/// * Each of them has one beside an earlier one that is waited for, whatever there is of others.
/// * More of them has a device only while there are fewer than `most` in all.
///
/// That is 3 × `most` at most, and the survivors on top.
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
    by_device: HashMap<DeviceId, Arc<SessionHandle>>,
    /// How many sessions each device has, without survivors; none that has none.
    counts: HashMap<DeviceId, usize>,
    survivors: HashSet<SessionId>,
}

/// What an earlier run left of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Left {
    /// All that it takes to go on.
    Resumable,
    /// That it may still hold a lease.
    Survivor,
}

/// A session, and an earlier one which is waited for: a device has as much whatever others have.
const ALWAYS: usize = 2;

impl Registry {
    /// Ids and epochs start at `first`, which no earlier run has given out.
    pub(crate) fn new(most: usize, first: u64) -> Self {
        Self {
            sessions: DashMap::new(),
            admission: Mutex::new(Admission {
                next_session: SessionId::new(first).unwrap_or(SessionId::FIRST),
                next_epoch: Epoch::new(first).unwrap_or(Epoch::FIRST),
                by_device: HashMap::new(),
                counts: HashMap::new(),
                survivors: HashSet::new(),
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
            self.check_quota(&admission, device)?;
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
            *admission.counts.entry(device.clone()).or_default() += 1;
            let replaced = admission.by_device.insert(device.clone(), Arc::clone(&handle));
            (handle, replaced)
        };
        if let Some(replaced) = replaced {
            replaced
                .end(Reason::SessionReplaced, "a newer session of this device took the place of this one");
        }
        Ok(handle)
    }

    fn check_quota(&self, admission: &Admission, device: &DeviceId) -> Result<(), SessionError> {
        let of_device = admission.counts.get(device).copied().unwrap_or_default();
        let message = if of_device == 0 && admission.counts.len() >= self.most {
            format!("{} devices have sessions, as many as may; try again, or raise max_sessions", self.most)
        } else if of_device >= ALWAYS && self.sessions.len() >= self.most {
            format!(
                "device {device} has {of_device} sessions that are not known to have stopped; try again when a lease is over, or cut the device off and say so (AdminService.EvictSession, is_cut_off)"
            )
        } else {
            return Ok(());
        };
        Err(SessionError::fatal(Reason::SessionQuota, message))
    }

    /// Lists a session of an earlier run. It counts as its device's, unless there is one of a newer
    /// incarnation.
    pub(crate) fn restore(&self, handle: &Arc<SessionHandle>, left: Left) {
        let mut admission = self.admission.lock();
        self.sessions.insert(handle.id, Arc::clone(handle));
        match left {
            Left::Resumable => *admission.counts.entry(handle.device.clone()).or_default() += 1,
            Left::Survivor => drop(admission.survivors.insert(handle.id)),
        }
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
        let mut admission = self.admission.lock();
        if self.sessions.remove(&handle.id).is_some()
            && !admission.survivors.remove(&handle.id)
            && let Some(count) = admission.counts.get_mut(&handle.device)
        {
            *count -= 1;
            if *count == 0 {
                admission.counts.remove(&handle.device);
            }
        }
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
