//! Releases that are tried again: the address space is gone by then, so its own table of calls is, too.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use shootdown_core::{AddressSpaceId, Seq};
use shootdown_proto::message::CallId;
use tokio::sync::{mpsc, watch};

use crate::host::Host;
use crate::source::{NotifyError, RoundResult};

/// Releases whose outcome is remembered after their address space has gone, of one host agent.
const MOST_RELEASES_KEPT: usize = 1024;

/// Releases by their ids: the address space itself is gone when one is tried again.
#[derive(Debug, Default)]
pub(crate) struct Releases {
    table: Mutex<ReleaseTable>,
}

#[derive(Debug, Default)]
struct ReleaseTable {
    /// A name that was taken back has those of each address space that had it: a late try is of the one it was for.
    by_call: HashMap<(AddressSpaceId, CallId), Arc<Release>>,
    /// Of the one that has the name now, or had it last.
    begun: HashMap<AddressSpaceId, Arc<Release>>,
    /// Those that are complete, the oldest first.
    done: VecDeque<Arc<Release>>,
}

/// A release that is complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Released {
    pub(crate) address_space: AddressSpaceId,
    pub(crate) call: CallId,
    /// Of its last round.
    pub(crate) seq: Option<Seq>,
}

#[derive(Debug)]
pub(crate) struct Release {
    address_space: AddressSpaceId,
    id: CallId,
    /// It may be NotQuiesced at first, and better later.
    outcome: watch::Sender<Option<Result<RoundResult, NotifyError>>>,
}

impl Release {
    fn on_told(self: &Arc<Self>, host: &Host, outcome: Result<RoundResult, NotifyError>) {
        host.releases().on_told(self, &outcome);
        self.outcome.send_replace(Some(outcome));
    }

    /// # Cancel safety
    /// Cancel safe: the release has a task of its own.
    pub(crate) async fn outcome(&self, bound: Duration) -> Result<RoundResult, NotifyError> {
        let mut outcome = self.outcome.subscribe();
        let is_good = |outcome: &Option<Result<RoundResult, NotifyError>>| {
            outcome.as_ref().is_some_and(|outcome| outcome.as_ref().is_ok_and(RoundResult::is_quiesced))
        };
        // A try that comes after NOT_QUIESCED waits on, for as long as the first did.
        let waits_on = matches!(&*outcome.borrow(), Some(Ok(result)) if !result.is_quiesced());
        if waits_on {
            drop(tokio::time::timeout(bound, outcome.wait_for(is_good)).await);
        }
        let told = outcome.wait_for(Option::is_some).await.map(|outcome| outcome.clone());
        told.ok().flatten().unwrap_or(Err(NotifyError::Stopping))
    }
}

impl Releases {
    /// The release of an address space by this id, which may be over.
    pub(crate) fn find(&self, address_space: AddressSpaceId, id: &CallId) -> Option<Arc<Release>> {
        self.table.lock().by_call.get(&(address_space, id.clone())).cloned()
    }

    /// The release of an address space by this id; begins it where there is none. `None` where another
    /// has begun.
    pub(crate) fn begin(host: &Host, address_space: AddressSpaceId, id: CallId) -> Option<Arc<Release>> {
        let mut table = host.releases().table.lock();
        if let Some(release) = table.by_call.get(&(address_space, id.clone())) {
            return Some(Arc::clone(release));
        }
        if table.begun.contains_key(&address_space) {
            return None;
        }
        let release = Arc::new(Release { address_space, id, outcome: watch::Sender::new(None) });
        table.insert(&release);
        drop(table);
        let (host, task) = (host.clone(), Arc::clone(&release));
        let (tasks, control) = (host.tasks().clone(), host.control().clone());
        // Owned by a task: the caller may go away, and comes back for the outcome.
        drop(tasks.spawn_on(
            async move {
                let (tell, mut told) = mpsc::channel(2);
                host.release_telling(address_space, tell);
                while let Some(outcome) = told.recv().await {
                    task.on_told(&host, outcome);
                }
                // The runtime of what was to tell is gone.
                if task.outcome.borrow().is_none() {
                    task.on_told(&host, Err(NotifyError::Stopping));
                }
            },
            &control,
        ));
        Some(release)
    }

    /// Whether one is under way of which nothing was told yet: its address space may have gone already.
    pub(crate) fn is_any_untold(&self) -> bool {
        self.table.lock().by_call.values().any(|release| release.outcome.borrow().is_none())
    }

    /// Those that are complete, and may be tried again in the next run; the oldest first.
    pub(crate) fn done(&self) -> Vec<Released> {
        let released = |release: &Arc<Release>| {
            let seq = release.outcome.borrow().as_ref()?.as_ref().ok()?.seq;
            Some(Released { address_space: release.address_space, call: release.id.clone(), seq })
        };
        self.table.lock().done.iter().filter_map(released).collect()
    }

    /// A release of the run before, with what is known of it: that it was quiesced.
    pub(crate) fn restore(&self, address_space: AddressSpaceId, call: CallId, outcome: RoundResult) {
        let outcome = Ok(outcome);
        let told = watch::Sender::new(Some(outcome.clone()));
        let release = Arc::new(Release { address_space, id: call, outcome: told });
        self.table.lock().insert(&release);
        self.on_told(&release, &outcome);
    }

    /// The name is given to an address space again, which has not been released.
    pub(crate) fn forget(&self, address_space: AddressSpaceId) {
        self.table.lock().begun.remove(&address_space);
    }

    fn on_told(&self, release: &Arc<Release>, outcome: &Result<RoundResult, NotifyError>) {
        let mut table = self.table.lock();
        match outcome {
            Err(_) => table.remove(release),
            Ok(result) if !result.is_quiesced() => {}
            Ok(_) => {
                table.done.push_back(Arc::clone(release));
                if table.done.len() > MOST_RELEASES_KEPT
                    && let Some(oldest) = table.done.pop_front()
                {
                    table.remove(&oldest);
                }
            }
        }
    }
}

impl ReleaseTable {
    fn insert(&mut self, release: &Arc<Release>) {
        self.begun.insert(release.address_space, Arc::clone(release));
        self.by_call.insert((release.address_space, release.id.clone()), Arc::clone(release));
    }

    fn remove(&mut self, release: &Arc<Release>) {
        let is_it = |known: Option<&Arc<Release>>| known.is_some_and(|known| Arc::ptr_eq(known, release));
        let call = (release.address_space, release.id.clone());
        if is_it(self.by_call.get(&call)) {
            self.by_call.remove(&call);
        }
        // The name may be another's by now, which has releases of its own.
        if is_it(self.begun.get(&release.address_space)) {
            self.begun.remove(&release.address_space);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::OnceLock;

    use bytes::Bytes;
    use futures_util::future::BoxFuture;
    use shootdown_core::{Access, AddrRange, Translation};

    use crate::config::Settings;
    use crate::directory::AddressSpace;
    use crate::source::rpc::RpcSource;
    use crate::source::{FaultError, Notifier as _, Strictness, Translate};

    fn host() -> Host {
        let listen = vec!["unix:/nowhere".parse().unwrap()];
        let config = Settings { listen, ..Settings::default() }.resolve().unwrap();
        Host::new(config.host, tokio::runtime::Handle::current())
    }

    fn by(id: &str) -> CallId {
        shootdown_proto::convert::call_id(id).unwrap().unwrap()
    }

    #[tokio::test]
    async fn releases_are_kept_in_a_bounded_number() {
        let host = host();
        for _ in 0..=MOST_RELEASES_KEPT {
            let space = host.register("test", Arc::new(RpcSource::default())).unwrap();
            let release = Releases::begin(&host, space, by("bye")).unwrap();
            assert!(release.outcome(Duration::ZERO).await.unwrap().is_quiesced());
        }
        let table = host.releases().table.lock();
        let kept = [table.by_call.len(), table.begun.len(), table.done.len()];
        assert_eq!(kept, [MOST_RELEASES_KEPT; 3]);
    }

    const NAME: AddressSpaceId = AddressSpaceId::FIRST.next();

    /// A source whose name is taken back as soon as its address space has gone: before its release is told.
    #[derive(Default)]
    struct TakenBack {
        host: OnceLock<Host>,
    }

    impl Translate for TakenBack {
        fn source(&self) -> &'static str {
            "test"
        }

        fn fault(
            &self,
            _: AddressSpaceId,
            _: AddrRange,
            _: Access,
        ) -> BoxFuture<'_, Result<Vec<Translation>, FaultError>> {
            Box::pin(async { Err(FaultError::NotServed) })
        }

        fn bytes(&self, _: &[Translation]) -> Result<Bytes, FaultError> {
            Err(FaultError::NoBytes)
        }

        fn on_released(&self) {
            let host = self.host.get().unwrap();
            host.take_back(NAME, "again", Arc::new(RpcSource::default()), Strictness::Strict).unwrap();
        }
    }

    #[tokio::test]
    async fn a_release_that_is_told_after_its_name_was_taken_back_is_not_the_newcomers() {
        let host = host();
        let source = Arc::new(TakenBack::default());
        source.host.set(host.clone()).unwrap();
        let (of, run) = (Strictness::Strict, host.incarnation());
        let make = |most| AddressSpace::new(NAME, "first", source, of, most, run);
        // As of a run before that ended as planned: who knows its name may take it back.
        host.directory().restore(make, host.restart().survivors());
        let first = Releases::begin(&host, NAME, by("first")).unwrap();
        assert!(first.outcome(Duration::ZERO).await.unwrap().is_quiesced());
        // One more try of it comes late: it is of the one before, and has its outcome.
        let late = Releases::begin(&host, NAME, by("first")).unwrap();
        assert!(Arc::ptr_eq(&late, &first));
        assert!(host.directory().get(NAME).is_some_and(|newcomer| !newcomer.order.lock().released));
        let second = Releases::begin(&host, NAME, by("second")).expect("it has not been released");
        assert!(second.outcome(Duration::ZERO).await.unwrap().is_quiesced());
        assert_eq!(host.releases().done().len(), 2);
    }
}
