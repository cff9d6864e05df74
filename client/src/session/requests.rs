//! Requests that wait for their answer.

use std::collections::{BTreeMap, HashSet};
use std::num::NonZeroU64;
use std::sync::Arc;

use parking_lot::Mutex;
use shootdown_core::{Seq, SubscriptionId};
use shootdown_proto::message::{DeviceSays, Fault, RequestId, SessionError, Subscribe};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::fault::Granted;
use crate::session::Session;
use crate::session::end::NotLive;
use crate::subscription::Unclaimed;

/// Subscribe and Unsubscribe requests that wait; more of them wait for their turn.
const MAX_SUBSCRIPTION_REQUESTS: usize = 64;

/// The requests of a session. Bounded: a fault and a subscription request each hold a permit until they
/// are answered, also when nobody waits any more, because the host agent counts them until then.
#[derive(Debug)]
pub(crate) struct Requests {
    pub(crate) fault_permits: Arc<Semaphore>,
    pub(crate) subscription_permits: Arc<Semaphore>,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    last: u64,
    /// In the order in which they were asked: so they are asked again, and so who waits hears that it was in vain.
    pending: BTreeMap<RequestId, Pending>,
    closed: bool,
}

/// A request that was made. Its answer goes nowhere when the receiver is gone.
#[derive(Debug)]
pub(crate) struct Pending {
    pub(crate) reply: Reply,
    _permit: OwnedSemaphorePermit,
}

/// Whom to answer.
#[derive(Debug)]
pub(crate) enum Reply {
    Fault { fault: Fault, to: oneshot::Sender<Result<Granted, FaultRefused>> },
    Subscribe { ask: Subscribe, to: oneshot::Sender<Result<Unclaimed, SessionError>> },
    Unsubscribe { subscription: SubscriptionId, to: Option<oneshot::Sender<Result<(), SessionError>>> },
}

/// Why a fault brought no grant.
#[derive(Debug)]
pub(crate) enum FaultRefused {
    Host(SessionError),
    /// No subscription that the device has covers the range any more.
    NotSubscribed,
    /// The stream was lost before the answer came.
    Interrupted,
}

/// A new subscription, as the host agent tells of it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SubscribedAt {
    pub(crate) id: SubscriptionId,
    pub(crate) seq: Option<Seq>,
}

impl Requests {
    pub(crate) fn new(max_faults: usize) -> Self {
        Self {
            fault_permits: Arc::new(Semaphore::new(max_faults)),
            subscription_permits: Arc::new(Semaphore::new(MAX_SUBSCRIPTION_REQUESTS)),
            table: Mutex::default(),
        }
    }

    pub(crate) fn next_id(&self) -> RequestId {
        let mut table = self.table.lock();
        table.last += 1;
        NonZeroU64::new(table.last).expect("a number after 0 is not 0")
    }

    /// Takes the request that `id` answers.
    pub(crate) fn take(&self, id: RequestId) -> Option<Pending> {
        self.table.lock().pending.remove(&id)
    }

    /// Whoever waits is told that the session is closed, by the drop of its sender.
    pub(crate) fn fail_all(&self) {
        let pending = {
            let mut table = self.table.lock();
            table.closed = true;
            std::mem::take(&mut table.pending)
        };
        drop(pending);
        self.fault_permits.close();
        self.subscription_permits.close();
    }

    /// The stream was lost. Faults that were sent end, because what was granted meanwhile is not waited for;
    /// whatever else was sent is to be asked again, by the same request, in the order in which it was asked: the
    /// host agent may have done it already, and does not do it twice.
    ///
    /// `cut` says which were not sent. It runs in the same step in which the table is looked through: a request that
    /// entered the table between the two would be taken for sent, and go out twice.
    pub(crate) fn interrupt(&self, cut: impl FnOnce() -> HashSet<RequestId>) -> Vec<DeviceSays> {
        let (mut again, mut ended) = (Vec::new(), Vec::new());
        {
            let mut table = self.table.lock();
            let unsent = cut();
            let sent: Vec<RequestId> =
                table.pending.keys().filter(|request| !unsent.contains(request)).copied().collect();
            for request in sent {
                match table.pending.get(&request).map(|pending| &pending.reply) {
                    Some(Reply::Fault { .. }) => ended.extend(table.pending.remove(&request)),
                    Some(Reply::Subscribe { ask, .. }) => {
                        again.push(DeviceSays::Subscribe(ask.clone()));
                    }
                    Some(&Reply::Unsubscribe { subscription, .. }) => {
                        again.push(DeviceSays::Unsubscribe { request, subscription });
                    }
                    None => {}
                }
            }
        }
        for pending in ended {
            if let Reply::Fault { to, .. } = pending.reply {
                let _ = to.send(Err(FaultRefused::Interrupted));
            }
        }
        again
    }

    /// Requests that are not answered.
    pub(crate) fn len(&self) -> usize {
        self.table.lock().pending.len()
    }

    /// Makes a request and hands it to `queue`, in one step with regard to [`Requests::interrupt`]. False: the session
    /// is closed.
    fn enter(
        &self,
        permit: OwnedSemaphorePermit,
        make: impl FnOnce(RequestId) -> (DeviceSays, Reply),
        queue: impl FnOnce(RequestId, DeviceSays),
    ) -> Option<RequestId> {
        let request = self.next_id();
        // Dropped behind the lock where the session is closed: its sender wakes whoever waits.
        let (says, reply) = make(request);
        let mut table = self.table.lock();
        if table.closed {
            return None;
        }
        table.pending.insert(request, Pending { reply, _permit: permit });
        queue(request, says);
        Some(request)
    }

    /// Forgets a request that `withdraw` took back before it was sent.
    fn withdraw(&self, request: RequestId, withdraw: impl FnOnce() -> bool) {
        let mut table = self.table.lock();
        let pending = if withdraw() { table.pending.remove(&request) } else { None };
        drop(table);
        drop(pending);
    }
}

/// A request that was handed to the transport, or will be. Dropped before the answer it is withdrawn if
/// it was not sent yet, and else waits for its answer as one that nobody wants.
#[must_use]
#[derive(Debug)]
pub(crate) struct Asked<'a, A> {
    session: &'a Session,
    request: Option<RequestId>,
    answer: oneshot::Receiver<A>,
}

impl Session {
    /// # Errors
    /// [`NotLive`].
    pub(crate) fn ask<A>(
        &self,
        permit: OwnedSemaphorePermit,
        make: impl FnOnce(RequestId, oneshot::Sender<A>) -> (DeviceSays, Reply),
    ) -> Result<Asked<'_, A>, NotLive> {
        let (to, answer) = oneshot::channel();
        let queue = |request, says| self.outgoing.request(request, says);
        let request = self.requests.enter(permit, |request| make(request, to), queue);
        let request = request.ok_or_else(|| self.not_live())?;
        Ok(Asked { session: self, request: Some(request), answer })
    }

    /// Ends a subscription that nobody asked to keep. Without a permit to be had the session's end does.
    pub(crate) fn unsubscribe_unclaimed(&self, subscription: SubscriptionId) {
        let Ok(permit) = Arc::clone(&self.requests.subscription_permits).try_acquire_owned() else { return };
        let make = |request| {
            let reply = Reply::Unsubscribe { subscription, to: None };
            (DeviceSays::Unsubscribe { request, subscription }, reply)
        };
        // Nobody waits for it: a session that is closed has ended the subscription.
        let _ = self.requests.enter(permit, make, |request, says| self.outgoing.request(request, says));
    }
}

impl<A> Asked<'_, A> {
    /// # Errors
    /// [`NotLive`] when the session is closed first.
    pub(crate) async fn answer(mut self) -> Result<A, NotLive> {
        let answer = (&mut self.answer).await;
        self.request = None;
        answer.map_err(|_| self.session.not_live())
    }
}

impl<A> Drop for Asked<'_, A> {
    fn drop(&mut self) {
        if let Some(request) = self.request {
            self.session.requests.withdraw(request, || self.session.outgoing.withdraw(request));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shootdown_core::{AddrRange, AddressSpaceId, CauseSet};

    fn subscribe(request: RequestId) -> (DeviceSays, Reply) {
        let ask = Subscribe {
            request,
            address_space: AddressSpaceId::FIRST,
            ranges: vec![AddrRange::ALL],
            causes: CauseSet::EVERY,
            wants_end: false,
        };
        (DeviceSays::Subscribe(ask.clone()), Reply::Subscribe { ask, to: oneshot::channel().0 })
    }

    /// The host agent would make a second subscription, which nobody has asked for.
    #[test]
    fn a_request_that_is_made_while_the_stream_is_lost_goes_out_once() {
        const REQUESTS: usize = 60_000;
        let requests = Requests::new(1);
        let queue: Mutex<Vec<RequestId>> = Mutex::default();
        let mut sent = HashSet::new();
        std::thread::scope(|threads| {
            let asking = threads.spawn(|| {
                let all = Arc::new(Semaphore::new(REQUESTS));
                for _ in 0..REQUESTS {
                    let permit = Arc::clone(&all).try_acquire_owned().unwrap();
                    requests.enter(permit, subscribe, |request, _| queue.lock().push(request)).unwrap();
                }
            });
            // Each time all that waits is sent, and the stream is lost.
            while !asking.is_finished() || !queue.lock().is_empty() {
                sent.extend(queue.lock().drain(..));
                let again = requests.interrupt(|| queue.lock().iter().copied().collect());
                for says in &again {
                    let DeviceSays::Subscribe(ask) = says else { panic!("{says:?}") };
                    assert!(sent.contains(&ask.request), "it waits as well: {}", ask.request);
                }
                // So that the table stays small.
                sent.drain().for_each(|request| drop(requests.take(request)));
            }
        });
    }
}
