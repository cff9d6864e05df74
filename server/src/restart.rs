//! What a run of the host agent owes to those before it, and leaves to the next.
//!
//! ```text
//!   journal --> survivors: a session each, without a stream, that hears of everything
//!                  |   rounds wait for them by the ordinary rules; faults wait until none is left
//!                  v
//!   accounted for: each came back empty-handed, left, was fenced, or outlived its lease  (RestartGrace)
//! ```

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;
use shootdown_core::lease::LeaseTerms;
use shootdown_core::session::SessionConfig;
use shootdown_core::{Moment, SessionId, SubscriptionId};
use shootdown_proto::error::Reason;
use shootdown_proto::message::SessionError;
use tokio::sync::SetOnce;
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::directory::AddressSpace;
use crate::fence;
use crate::handover;
use crate::host::Host;
use crate::journal::{AppendError, History, Journal, Opened, Run, SessionRecord, Standing};
use crate::session::SessionHandle;
use crate::session::registry::Left;
use crate::session::restored::Restored;
use crate::session::task::start_outliving;
use crate::shard::Shard;
use crate::vigil::Vigil;

/// How much later than at its end the watchdog may find that a lease is over: two of its ticks.
const NOTICED_WITHIN: Duration = Duration::from_secs(2);

/// A host agent's place in the sequence of its runs. Without a journal it is the only one.
#[derive(Debug)]
pub(crate) struct Restart {
    journal: Option<Journal>,
    run: Option<Run>,
    survivors: Survivors,
    /// Why it may not act any more; set before the token.
    loss: OnceLock<Loss>,
    superseded: CancellationToken,
}

/// Why a host agent that has a state directory may not act any more: it may not be the one that devices and
/// sources rely on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Loss {
    /// Another goes on in its place, and knows of its devices.
    #[error("a successor has taken the state directory over; this host agent has stopped")]
    Superseded,
    /// Nobody does, and who is started now does not know of its devices.
    #[error(
        "the journal is not in the state directory any more, so this host agent has stopped, and the next one will not wait for the devices that hold leases of it: start it only when the longest lease has passed from now on, or when the devices are cut off"
    )]
    JournalRemoved,
}

/// Sessions of earlier runs that may still hold leases.
///
/// Each is a target of every round of every address space, since nobody knows any more what it had
/// subscribed. The price: until the last of them is accounted for, whatever is released waits for a device
/// that may never have heard of it.
#[derive(Debug)]
pub(crate) struct Survivors {
    list: Mutex<Vec<Arc<SessionHandle>>>,
    /// When none is left.
    accounted_for: SetOnce<()>,
    /// When the last lease of those that can be waited out ends.
    grace_ends: SetOnce<Moment>,
}

/// A device cannot be granted anything yet.
#[derive(Debug, thiserror::Error)]
#[error(
    "the host agent was restarted, and waits for devices that may hold leases of its run before and do not stop by themselves: {missing}; bring them back, or cut them off and say so (shootdownd admin evict SESSION_ID --cut-off)"
)]
pub(crate) struct GraceError {
    missing: String,
}

impl Restart {
    /// Nothing came before, and nothing is kept.
    pub(crate) fn none() -> Self {
        Self {
            journal: None,
            run: None,
            survivors: Survivors::new(),
            loss: OnceLock::new(),
            superseded: CancellationToken::new(),
        }
    }

    /// A run on a journal, and what the runs before left.
    pub(crate) fn on(opened: Opened) -> (Self, History) {
        let Opened { journal, before, run } = opened;
        (Self { journal: Some(journal), run: Some(run), ..Self::none() }, before)
    }

    /// No id at or above this was given out by an earlier run.
    pub(crate) fn first_number(&self) -> u64 {
        self.run.map_or(1, |run| run.first_number())
    }

    pub(crate) fn survivors(&self) -> &Survivors {
        &self.survivors
    }

    pub(crate) fn journal(&self) -> Option<&Journal> {
        self.journal.as_ref()
    }

    /// Looks whether this host agent may still act.
    ///
    /// # Errors
    /// Why not.
    pub(crate) fn look(&self) -> Result<(), Loss> {
        match self.journal.as_ref().map_or(Standing::Current, Journal::standing) {
            Standing::Current => Ok(()),
            Standing::Superseded => Err(Loss::Superseded),
            Standing::Removed => Err(Loss::JournalRemoved),
        }
    }

    /// Returns whether that is news.
    pub(crate) fn on_loss(&self, loss: Loss) -> bool {
        let is_news = self.loss.set(loss).is_ok();
        self.superseded.cancel();
        is_news
    }

    /// What was found first, if anything was.
    pub(crate) fn loss(&self) -> Option<Loss> {
        self.loss.get().copied()
    }

    /// Cancelled when it was found that it may not.
    pub(crate) fn superseded(&self) -> &CancellationToken {
        &self.superseded
    }

    /// Makes the sessions of earlier runs this run's, before anybody can ask for anything. Their leases are
    /// counted from now on: none was renewed later.
    pub(crate) fn bring_back(host: &Host, history: History) {
        let History { mut sessions, drained, .. } = history;
        let (now, clock) = (host.clock().now(), host.clock());
        let vigil = Arc::new(Vigil::new(Duration::ZERO, clock));
        let shard = Shard { index: 0, runtime: host.control().clone(), vigil };
        for resumable in drained.iter().flat_map(|drained| &drained.sessions) {
            sessions.remove(&resumable.session.id);
        }
        // First, so that they hear of the address spaces that come back, too.
        Self::bring_back_survivors(host, sessions, &shard, now);
        if let Some(drained) = drained {
            handover::begin(host, drained, &shard);
        }
    }

    fn bring_back_survivors(
        host: &Host,
        sessions: BTreeMap<SessionId, SessionRecord>,
        shard: &Shard,
        now: Moment,
    ) {
        if sessions.is_empty() {
            return host.restart().survivors.on_accounted_for();
        }
        let grace = sessions.values().map(|session| session.terms.host_duration()).max();
        let grace = grace.unwrap_or_default();
        let mut devices: Vec<_> = sessions.values().map(|session| session.device.to_string()).collect();
        devices.sort_unstable();
        devices.dedup();
        tracing::warn!(
            sessions = sessions.len(),
            ?devices,
            at_most = ?grace,
            "devices of the run before may hold leases; until each has come back, is fenced, or its lease is over, nothing is released and nothing granted",
        );
        let survivors = &host.restart().survivors;
        drop(survivors.grace_ends.set(now + grace));
        let handles: Vec<_> =
            sessions.into_values().map(|record| Arc::new(survivor(host, record, shard, now))).collect();
        for handle in &handles {
            host.registry().restore(handle, Left::Survivor);
        }
        survivors.list.lock().extend(handles.iter().cloned());
        for handle in handles {
            fence::watch_over(host, &handle);
            start_outliving(host, handle);
        }
    }

    /// Whether nobody can hold a lease of an earlier run.
    pub(crate) fn is_accounted_for(&self) -> bool {
        self.journal.is_none() || self.survivors.accounted_for.initialized()
    }

    /// Returns when nobody can hold a lease of an earlier run.
    ///
    /// # Errors
    /// [`GraceError`] when the grace is over and somebody is left who cannot be waited out.
    pub(crate) async fn accounted_for(&self, clock: Clock) -> Result<(), GraceError> {
        let survivors = &self.survivors;
        if self.is_accounted_for() {
            return Ok(());
        }
        let ends = survivors.grace_ends.get().copied().unwrap_or_default();
        let left = ends.since(clock.now()) + NOTICED_WITHIN;
        match tokio::time::timeout(left, survivors.accounted_for.wait()).await {
            Ok(_) => Ok(()),
            Err(_) => {
                let missing: Vec<_> =
                    survivors.list.lock().iter().map(|survivor| survivor.device.to_string()).collect();
                Err(GraceError { missing: missing.join(", ") })
            }
        }
    }

    /// Returns when the next run would know of the session.
    ///
    /// # Errors
    /// The device must be refused.
    pub(crate) async fn make_durable(
        &self,
        handle: &SessionHandle,
        terms: LeaseTerms,
        enforces_lease: bool,
    ) -> Result<(), SessionError> {
        let Some(journal) = &self.journal else { return Ok(()) };
        let record = SessionRecord {
            id: handle.id,
            device: handle.device.clone(),
            incarnation: handle.incarnation,
            epoch: handle.epoch,
            terms,
            enforces_lease,
            unrenewed_since: None,
        };
        journal.opened(record).await.map_err(|error| match error {
            AppendError::Superseded => crate::session::handshake::superseded(),
            AppendError::Io(_) | AppendError::Closed => SessionError::fatal(
                Reason::StoreFailed,
                "the host agent cannot write down that there is this session, so it would not be waited for after a restart; try again when its state directory has room",
            ),
        })
    }

    /// A session's device has stopped.
    pub(crate) async fn on_over(&self, handle: &SessionHandle) {
        if let Some(journal) = &self.journal {
            journal.over(handle.id).await;
        }
    }
}

impl Survivors {
    fn new() -> Self {
        Self { list: Mutex::default(), accounted_for: SetOnce::new(), grace_ends: SetOnce::new() }
    }

    /// Each of them hears of everything that happens in an address space, which is known to nobody else yet.
    pub(crate) fn join(&self, space: &Arc<AddressSpace>, mut next: impl FnMut() -> SubscriptionId) {
        // Held, so that one that is over meanwhile is withdrawn after it has joined, not before.
        for survivor in self.list.lock().iter() {
            survivor.join(space, next());
        }
    }

    pub(crate) fn ids(&self) -> Vec<SessionId> {
        self.list.lock().iter().map(|survivor| survivor.id).collect()
    }

    /// It is over.
    pub(crate) fn remove(&self, handle: &SessionHandle) {
        let is_last = {
            let mut list = self.list.lock();
            let before = list.len();
            list.retain(|survivor| survivor.id != handle.id);
            list.is_empty() && before > 0
        };
        if is_last {
            tracing::info!("every device of the run before is accounted for");
            self.on_accounted_for();
        }
    }

    fn on_accounted_for(&self) {
        // Set before by the same fact.
        drop(self.accounted_for.set(()));
    }
}

fn survivor(host: &Host, record: SessionRecord, shard: &Shard, now: Moment) -> SessionHandle {
    // It hears of every address space, however many there are.
    let config = SessionConfig {
        lease: record.terms,
        max_subscriptions: usize::MAX,
        enforcement: record.enforcement(),
        ..host.session_config()
    };
    // At the latest from now on; from the run on that could not renew it, if that was in this boot.
    let since = record.unrenewed_since.as_ref().filter(|since| since.is_of(&Clock::id()));
    let since = since.map_or(now, |since| since.at.min(now));
    let lease_expires = since + record.terms.host_duration();
    SessionHandle::restored(
        Restored {
            // A fencer that knows no such device may well say that it is cut off.
            fencer: if record.is_unnamed() { None } else { host.fencers().of(&record.device) },
            record,
            config,
            change_pte: false,
            lease_expires,
            acked_through: None,
        },
        shard.clone(),
        host.clock(),
    )
}
