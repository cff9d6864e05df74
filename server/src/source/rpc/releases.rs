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
    by_space: HashMap<AddressSpaceId, Arc<Release>>,
    /// Those that are complete, the oldest first.
    done: VecDeque<AddressSpaceId>,
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
    id: CallId,
    /// It may be NotQuiesced at first, and better later.
    outcome: watch::Sender<Option<Result<RoundResult, NotifyError>>>,
}

impl Release {
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
        let release = self.table.lock().by_space.get(&address_space).cloned();
        release.filter(|release| release.id == *id)
    }

    /// The release of an address space by this id; begins it where there is none. `None` where another
    /// has begun.
    pub(crate) fn begin(host: &Host, address_space: AddressSpaceId, id: CallId) -> Option<Arc<Release>> {
        let mut table = host.releases().table.lock();
        if let Some(release) = table.by_space.get(&address_space) {
            return (release.id == id).then(|| Arc::clone(release));
        }
        let release = Arc::new(Release { id, outcome: watch::Sender::new(None) });
        table.by_space.insert(address_space, Arc::clone(&release));
        drop(table);
        let (host, task) = (host.clone(), Arc::clone(&release));
        let (tasks, control) = (host.tasks().clone(), host.control().clone());
        // Owned by a task: the caller may go away, and comes back for the outcome.
        drop(tasks.spawn_on(
            async move {
                let (tell, mut told) = mpsc::channel(2);
                host.release_telling(address_space, tell);
                while let Some(outcome) = told.recv().await {
                    host.releases().on_told(address_space, &task, &outcome);
                    task.outcome.send_replace(Some(outcome));
                }
            },
            &control,
        ));
        Some(release)
    }

    /// Those that are complete, and may be tried again in the next run; the oldest first.
    pub(crate) fn done(&self) -> Vec<Released> {
        let table = self.table.lock();
        let released = |address_space: &AddressSpaceId| {
            let release = table.by_space.get(address_space)?;
            let seq = release.outcome.borrow().as_ref()?.as_ref().ok()?.seq;
            Some(Released { address_space: *address_space, call: release.id.clone(), seq })
        };
        table.done.iter().filter_map(released).collect()
    }

    /// A release of the run before, with what is known of it: that it was quiesced.
    pub(crate) fn restore(&self, address_space: AddressSpaceId, call: CallId, outcome: RoundResult) {
        let outcome = Ok(outcome);
        let release = Arc::new(Release { id: call, outcome: watch::Sender::new(Some(outcome.clone())) });
        self.table.lock().by_space.insert(address_space, Arc::clone(&release));
        self.on_told(address_space, &release, &outcome);
    }

    /// The name is given to an address space again: what was released by it is another one.
    pub(crate) fn forget(&self, address_space: AddressSpaceId) {
        let mut table = self.table.lock();
        table.by_space.remove(&address_space);
        table.done.retain(|done| *done != address_space);
    }

    fn on_told(
        &self,
        address_space: AddressSpaceId,
        release: &Arc<Release>,
        outcome: &Result<RoundResult, NotifyError>,
    ) {
        let mut table = self.table.lock();
        // Forgotten: the name is another's by now, which has releases of its own.
        if !table.by_space.get(&address_space).is_some_and(|known| Arc::ptr_eq(known, release)) {
            return;
        }
        match outcome {
            Err(_) => {
                table.by_space.remove(&address_space);
                return;
            }
            Ok(result) if !result.is_quiesced() => return,
            Ok(_) => {}
        }
        table.done.push_back(address_space);
        if table.done.len() > MOST_RELEASES_KEPT
            && let Some(oldest) = table.done.pop_front()
        {
            table.by_space.remove(&oldest);
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
        assert_eq!((table.by_space.len(), table.done.len()), (MOST_RELEASES_KEPT, MOST_RELEASES_KEPT));
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
        assert_eq!(host.releases().table.lock().done, [], "of the one that there is now");
        let second = Releases::begin(&host, NAME, by("second")).expect("it has not been released");
        assert!(second.outcome(Duration::ZERO).await.unwrap().is_quiesced());
        assert_eq!(host.releases().done().len(), 1);
    }
}
