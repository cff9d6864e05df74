//! Calls that are tried again: one outcome for each request id.
//!
//! A caller that lost its connection does not know whether its call arrived. With an id it calls again,
//! and gets the outcome of the call that did:
//!
//! ```text
//!   ask(id) --not known--> Opening --the round is open--> Opened, until it is settled and old
//!           |                 |-----WOULD_BLOCK---------> Blocked, until it is old
//!           |                 +--refused, or nobody asks any more--> not known
//!           +--known, the same request--> waits with the others, for the same outcome
//!           +--known, another request---> REQUEST_ID_REUSED
//! ```
//!
//! WOULD_BLOCK leaves nothing behind in the address space (NonBlockAtomic), and is an outcome all the same: its
//! caller goes on without a bracket, so a try that comes late, when nobody is in the way any more, must not open one.
//! A call that was refused is not remembered, and is done anew when it is tried again.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use shootdown_core::{AddrRange, Cause, Method, OwnerTag, Seq};
use shootdown_proto::message::CallId;
use tokio::sync::OnceCell;

use crate::completion::WaitingRound;
use crate::dispatch::Dispatched;
use crate::source::NotifyError;

/// Settled calls of one address space whose outcome is remembered. A caller tries again within seconds,
/// and has at most a few hundred calls in flight.
const MOST_KEPT: usize = 4096;

/// The targets that they name, all together: about 40 MB.
const MOST_TARGETS_KEPT: usize = 1 << 18;

/// How many are looked at when one is added: more than one, so that a backlog of open ones goes away.
const LOOKED_AT: usize = 4;

/// The id was used before, for another request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "this request_id was used before in this address space, for another request; only a retry repeats one"
)]
pub(crate) struct IdReused;

/// What a call asks for. Two that are equal are the same request; how long the caller waits is its own
/// affair, and is not part of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Asked {
    Start { range: AddrRange, cause: Cause, owner: Option<OwnerTag>, may_wait: MayWait },
    Page { address: u64, cause: Cause, owner: Option<OwnerTag> },
    Around { method: Method, range: AddrRange },
}

/// Whether the caller can wait at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MayWait {
    Yes,
    No,
}

/// The calls of one address space by their ids.
///
/// The price: a call with an id costs an entry that stays when it is over. It is paid by who gives an id;
/// a call without one is not seen here.
#[derive(Debug, Default)]
pub(crate) struct Retries {
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    calls: HashMap<CallId, Known>,
    /// Those that have an outcome, the oldest first, with the number of their targets.
    kept: VecDeque<(CallId, usize)>,
    targets: usize,
}

#[derive(Debug)]
enum Known {
    Round {
        once: Arc<Once>,
        /// How many are in a call with this id now. One that has no outcome, and that nobody is in, is
        /// forgotten.
        callers: usize,
    },
    Ended(Seq),
}

/// Calls that the next run may be asked for again.
#[derive(Debug, Default)]
pub(crate) struct ToTryAgain {
    /// Those that opened brackets which are open still.
    pub(crate) starts: BTreeMap<Seq, (CallId, MayWait)>,
    pub(crate) ends: Vec<(CallId, Seq)>,
}

/// One request, however often it is tried.
#[derive(Debug)]
struct Once {
    asked: Asked,
    outcome: OnceCell<Dispatched>,
    /// The bits that the host had of the range. Taken once: what is reported later belongs to a later query.
    young: OnceLock<bool>,
}

/// One try.
#[derive(Debug)]
pub(crate) struct Try<'a> {
    retries: &'a Retries,
    id: CallId,
    once: Arc<Once>,
}

impl Retries {
    /// A call arrives.
    pub(crate) fn ask(&self, id: CallId, asked: Asked) -> Result<Try<'_>, IdReused> {
        let mut table = self.table.lock();
        let known = table.calls.entry(id.clone()).or_insert_with(|| Known::Round {
            once: Arc::new(Once { asked, outcome: OnceCell::new(), young: OnceLock::new() }),
            callers: 0,
        });
        match known {
            Known::Round { once, callers } if once.asked == asked => {
                *callers += 1;
                Ok(Try { retries: self, id, once: Arc::clone(once) })
            }
            Known::Round { .. } | Known::Ended(_) => Err(IdReused),
        }
    }

    /// `invalidate_range_end`, at most once for each id. `end` never waits, so it is called under the
    /// lock: a repetition that runs beside it finds it done.
    pub(crate) fn end(
        &self,
        id: CallId,
        seq: Seq,
        end: impl FnOnce() -> Result<(), NotifyError>,
    ) -> Result<Result<(), NotifyError>, IdReused> {
        let mut table = self.table.lock();
        match table.calls.get(&id) {
            Some(Known::Ended(ended)) if *ended == seq => return Ok(Ok(())),
            Some(_) => return Err(IdReused),
            None => {}
        }
        let ended = end();
        if ended.is_ok() {
            table.calls.insert(id.clone(), Known::Ended(seq));
            table.keep(id, 0);
        }
        Ok(ended)
    }

    /// The calls that a planned end of this run leaves open for a further try: those that opened brackets which
    /// are open still, by the sequences of these, and the ends.
    pub(crate) fn to_try_again(&self) -> ToTryAgain {
        let ToTryAgain { mut starts, mut ends } = ToTryAgain::default();
        for (id, known) in &self.table.lock().calls {
            match known {
                Known::Round { once, .. } => {
                    if let (Asked::Start { may_wait, .. }, Some(Dispatched::Open(round))) =
                        (once.asked, once.outcome.get())
                        && !round.is_settled()
                    {
                        starts.insert(round.look(|round| round.event().seq), (id.clone(), may_wait));
                    }
                }
                Known::Ended(seq) => ends.push((id.clone(), *seq)),
            }
        }
        ToTryAgain { starts, ends }
    }

    /// A call that opened its bracket in the run before.
    pub(crate) fn restore_start(&self, id: CallId, asked: Asked, round: Arc<WaitingRound>) {
        let outcome = OnceCell::new_with(Some(Dispatched::Open(round)));
        let once = Arc::new(Once { asked, outcome, young: OnceLock::new() });
        let mut table = self.table.lock();
        table.calls.insert(id.clone(), Known::Round { once, callers: 0 });
        table.keep(id, 0);
    }

    /// An end that was told in the run before.
    pub(crate) fn restore_end(&self, id: CallId, seq: Seq) {
        let mut table = self.table.lock();
        table.calls.insert(id.clone(), Known::Ended(seq));
        table.keep(id, 0);
    }

    /// The release has its outcome elsewhere; its id must be one of its own all the same.
    pub(crate) fn require_unknown(&self, id: &CallId) -> Result<(), IdReused> {
        if self.table.lock().calls.contains_key(id) { Err(IdReused) } else { Ok(()) }
    }
}

impl Try<'_> {
    /// Opens the round, unless another try has, or was told that it would block: of several that come at once
    /// one opens, and when it is dropped or refused before it did, the next.
    ///
    /// # Cancel safety
    /// Cancel safe: `open` has either done nothing yet, or its outcome is in the table.
    pub(crate) async fn open(
        &self,
        open: impl Future<Output = Result<Dispatched, NotifyError>>,
    ) -> Result<Dispatched, NotifyError> {
        let first = async {
            let dispatched = open.await?;
            // Nothing awaits between the opening and the table.
            let targets = match &dispatched {
                Dispatched::Open(round) => round.look(|round| round.reports().len()),
                Dispatched::WouldBlock(targets) => targets.len(),
            };
            self.retries.table.lock().keep(self.id.clone(), targets);
            Ok(dispatched)
        };
        self.once.outcome.get_or_try_init(|| first).await.cloned()
    }

    /// What `take` said when the first try asked it.
    pub(crate) fn young(&self, take: impl FnOnce() -> bool) -> bool {
        *self.once.young.get_or_init(take)
    }
}

impl Drop for Try<'_> {
    fn drop(&mut self) {
        let mut table = self.retries.table.lock();
        let Some(Known::Round { once, callers }) = table.calls.get_mut(&self.id) else { return };
        // Another's, where this one was old enough to be forgotten while its caller waited.
        if Arc::ptr_eq(once, &self.once) {
            *callers -= 1;
            if *callers == 0 && !once.outcome.initialized() {
                table.calls.remove(&self.id);
            }
        }
    }
}

impl Table {
    /// Remembers a call that took effect, and forgets old ones. One whose round waits, or whose bracket
    /// its caller has not ended, is never forgotten: it goes to the back. There are no more of those than
    /// the address space may have open brackets.
    fn keep(&mut self, id: CallId, targets: usize) {
        self.kept.push_back((id, targets));
        self.targets += targets;
        for _ in 0..LOOKED_AT {
            if self.kept.len() <= MOST_KEPT && self.targets <= MOST_TARGETS_KEPT {
                return;
            }
            let Some((id, targets)) = self.kept.pop_front() else { return };
            if self.calls.get(&id).is_some_and(Known::is_open) {
                self.kept.push_back((id, targets));
            } else {
                self.calls.remove(&id);
                self.targets -= targets;
            }
        }
    }
}

impl Known {
    fn is_open(&self) -> bool {
        match self {
            Self::Round { once, .. } => match once.outcome.get() {
                Some(Dispatched::Open(round)) => !round.is_settled(),
                Some(Dispatched::WouldBlock(_)) => false,
                // It is being opened.
                None => true,
            },
            Self::Ended(_) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use shootdown_core::{AddressSpaceId, PageSize};

    use super::*;
    use crate::config::Settings;
    use crate::host::Host;
    use crate::source::rpc::RpcSource;
    use crate::source::{Invalidation, Notifier as _, Wait};

    /// A host agent without sockets, and an address space that nobody subscribes to.
    struct Bench {
        host: Host,
        source: Arc<RpcSource>,
        space: AddressSpaceId,
    }

    fn call_id(text: &str) -> CallId {
        shootdown_proto::convert::call_id(text).unwrap().unwrap()
    }

    impl Bench {
        fn new() -> Self {
            let listen = vec!["unix:/nowhere".parse().unwrap()];
            let config = Settings { listen, ..Settings::default() }.resolve().unwrap();
            let host = Host::new(config.host, tokio::runtime::Handle::current());
            let source = Arc::new(RpcSource::default());
            let space = host.register("test", Arc::clone(&source) as _).unwrap();
            Self { host, source, space }
        }

        /// A whole round under an id: its sequence.
        async fn page(&self, id: &str) -> Seq {
            let (address, cause, owner) = (4096, Cause::Unmap, None);
            let retry = self.source.retries.ask(call_id(id), Asked::Page { address, cause, owner }).unwrap();
            let wait = Wait::ForTargets;
            let result =
                self.host.invalidate_page_for(self.space, address, cause, owner, wait, Some(&retry)).await;
            result.unwrap().seq.unwrap()
        }

        /// A bracket that is left open.
        async fn start(&self, id: &str) -> Seq {
            let (range, cause, owner) = (AddrRange::page_of(4096, PageSize::BASE), Cause::Unmap, None);
            let asked = Asked::Start { range, cause, owner, may_wait: MayWait::Yes };
            let retry = self.source.retries.ask(call_id(id), asked).unwrap();
            let (address_space, wait) = (self.space, Wait::ForTargets);
            let invalidation =
                Invalidation { address_space, range, cause, owner, wait, resident_pages: None };
            self.host.start(invalidation, Some(&retry)).await.unwrap().seq.unwrap()
        }

        fn known(&self) -> usize {
            self.source.retries.table.lock().calls.len()
        }
    }

    #[tokio::test]
    async fn outcomes_are_kept_in_a_bounded_number_and_open_ones_as_long_as_they_are_open() {
        let bench = Bench::new();
        let open = bench.start("open").await;
        let oldest = bench.page("oldest").await;
        for call in 0..MOST_KEPT - 2 {
            bench.page(&call.to_string()).await;
        }
        assert_eq!(bench.page("oldest").await, oldest, "as many as are kept");
        bench.page("one more").await;
        assert_eq!(bench.known(), MOST_KEPT);
        assert_ne!(bench.page("oldest").await, oldest, "forgotten, and done anew");
        for call in 0..3 * MOST_KEPT {
            bench.page(&format!("later {call}")).await;
        }
        assert_eq!(bench.start("open").await, open);
        assert_eq!(bench.known(), MOST_KEPT);
        // It is one of the others when it has ended.
        bench.host.invalidate_range_end(bench.space, open).unwrap();
        for call in 0..2 * MOST_KEPT {
            bench.page(&format!("last {call}")).await;
        }
        assert_ne!(bench.start("open").await, open);
    }

    #[tokio::test]
    async fn a_backlog_of_open_ones_goes_away_when_they_have_ended() {
        const OPEN: usize = 2 * MOST_KEPT;
        let bench = Bench::new();
        let mut seqs = Vec::new();
        for call in 0..OPEN {
            seqs.push(bench.start(&format!("open {call}")).await);
        }
        assert_eq!(bench.known(), OPEN);
        for seq in seqs {
            bench.host.invalidate_range_end(bench.space, seq).unwrap();
        }
        for call in 0..OPEN {
            bench.page(&call.to_string()).await;
        }
        assert_eq!(bench.known(), MOST_KEPT);
    }

    #[tokio::test]
    async fn a_try_waits_for_another_that_opens_no_longer_than_its_own_time() {
        let bench = Bench::new();
        let (range, cause, owner) = (AddrRange::page_of(4096, PageSize::BASE), Cause::Unmap, None);
        let asked = Asked::Start { range, cause, owner, may_wait: MayWait::Yes };
        let first = bench.source.retries.ask(call_id("a"), asked).unwrap();
        let second = bench.source.retries.ask(call_id("a"), asked).unwrap();
        let mut opening = Box::pin(first.open(std::future::pending()));
        assert!(futures_util::poll!(&mut opening).is_pending());
        let wait = Wait::AtMost(Duration::from_millis(10));
        let invalidation =
            Invalidation { address_space: bench.space, range, cause, owner, wait, resident_pages: None };
        let hasty = bench.host.start(invalidation, Some(&second));
        let refused = tokio::time::timeout(Duration::from_secs(20), hasty).await.expect("its time passes");
        assert!(matches!(refused, Err(NotifyError::TooManyRounds { .. })));
        // The first goes away: it had opened nothing, and the second does.
        drop(opening);
        assert_eq!(bench.host.start(invalidation, Some(&second)).await.unwrap().seq, Some(Seq::FIRST));
        assert_eq!(bench.host.start(invalidation, Some(&first)).await.unwrap().seq, Some(Seq::FIRST));
    }

    #[tokio::test]
    async fn a_try_beside_one_that_would_block_has_its_outcome_and_opens_nothing() {
        let bench = Bench::new();
        let (range, cause, owner) = (AddrRange::page_of(4096, PageSize::BASE), Cause::Unmap, None);
        let asked = Asked::Start { range, cause, owner, may_wait: MayWait::No };
        let tries = ["a", "a"].map(|id| bench.source.retries.ask(call_id(id), asked).unwrap());
        let (tell, told) = tokio::sync::oneshot::channel();
        let in_the_way = async { Ok(Dispatched::WouldBlock(told.await.unwrap())) };
        let mut first = Box::pin(tries[0].open(in_the_way));
        assert!(futures_util::poll!(&mut first).is_pending());
        // By now nobody is in the way: on its own it would open a bracket, of which its caller does not know.
        let wait = Wait::NotAtAll;
        let (address_space, resident_pages) = (bench.space, None);
        let invalidation = Invalidation { address_space, range, cause, owner, wait, resident_pages };
        let mut second = Box::pin(bench.host.start(invalidation, Some(&tries[1])));
        assert!(futures_util::poll!(&mut second).is_pending());
        tell.send(Vec::new()).unwrap();
        assert!(matches!(first.await, Ok(Dispatched::WouldBlock(_))));
        assert_eq!(second.await.unwrap().verdict, crate::source::Verdict::WouldBlock);
        assert_eq!(bench.host.directory().expect(bench.space).unwrap().order.lock().gate.last_seq(), None);
        drop(tries);
        assert_eq!(bench.known(), 1, "it is remembered");
        for call in 0..MOST_KEPT {
            bench.page(&call.to_string()).await;
        }
        assert_eq!(bench.known(), MOST_KEPT, "no longer than others");
    }

    #[tokio::test]
    async fn a_try_that_nobody_waits_for_any_more_leaves_nothing() {
        let bench = Bench::new();
        let (range, cause, owner) = (AddrRange::ALL, Cause::Unmap, None);
        let asked = Asked::Start { range, cause, owner, may_wait: MayWait::Yes };
        let first = bench.source.retries.ask(call_id("a"), asked).unwrap();
        let second = bench.source.retries.ask(call_id("a"), asked).unwrap();
        drop(first.open(std::future::pending()));
        drop(first);
        assert_eq!(bench.known(), 1, "another is in it");
        let refused = second.open(async { Err(NotifyError::Stopping) }).await;
        assert!(refused.is_err());
        drop(second);
        assert_eq!(bench.known(), 0);
    }
}
