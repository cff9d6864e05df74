//! Outcomes by their ids, in a host agent without sockets.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use shootdown_core::AddressSpaceId;

use super::*;
use crate::config::Settings;
use crate::host::Host;
use crate::source::rpc::RpcSource;
use crate::source::{Invalidation, Notifier as _, RoundResult, Verdict, Wait};

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
        let invalidation = Invalidation { address_space, range, cause, owner, wait, resident_pages: None };
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
    for call in 0..MOST_KEPT - 1 {
        bench.page(&call.to_string()).await;
    }
    assert_eq!(bench.page("oldest").await, oldest, "as many as are kept");
    bench.page("one more").await;
    assert_eq!(bench.known(), MOST_KEPT + 1, "and the open one");
    assert_ne!(bench.page("oldest").await, oldest, "forgotten, and done anew");
    for call in 0..3 * MOST_KEPT {
        bench.page(&format!("later {call}")).await;
    }
    assert_eq!(bench.start("open").await, open);
    assert_eq!(bench.known(), MOST_KEPT + 1);
    // It is one of the others when it has ended.
    bench.host.invalidate_range_end(bench.space, open).unwrap();
    for call in 0..2 * MOST_KEPT {
        bench.page(&format!("last {call}")).await;
    }
    assert_ne!(bench.start("open").await, open);
}

/// However many are open: that is when callers try again.
#[tokio::test]
async fn what_is_over_is_not_forgotten_for_what_is_open() {
    let bench = Bench::new();
    let settled = bench.start("settled").await;
    bench.host.invalidate_range_end(bench.space, settled).unwrap();
    for call in 0..2 * MOST_KEPT {
        bench.start(&format!("open {call}")).await;
    }
    for call in 0..MOST_KEPT - 1 {
        bench.page(&call.to_string()).await;
    }
    assert_eq!(bench.start("settled").await, settled, "another bracket would be nobody's");
    bench.page("one more").await;
    assert_ne!(bench.start("settled").await, settled, "as many later ones are over");
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

/// A start of a page, of which two tries have come.
fn asked(may_wait: MayWait) -> Asked {
    let range = AddrRange::page_of(4096, PageSize::BASE);
    Asked::Start { range, cause: Cause::Unmap, owner: None, may_wait }
}

impl Bench {
    fn tries(&self, may_wait: MayWait) -> [Try<'_>; 2] {
        ["a", "a"].map(|id| self.source.retries.ask(call_id(id), asked(may_wait)).unwrap())
    }

    /// `asked`, by one of its tries.
    async fn by(&self, retry: &Try<'_>, wait: Wait) -> Result<RoundResult, NotifyError> {
        let (range, _, cause, owner) = retry.once.asked.told();
        let (address_space, resident_pages) = (self.space, None);
        let invalidation = Invalidation { address_space, range, cause, owner, wait, resident_pages };
        self.host.start(invalidation, Some(retry)).await
    }

    fn last_seq(&self) -> Option<Seq> {
        self.host.directory().expect(self.space).unwrap().order.lock().gate.last_seq()
    }
}

#[tokio::test]
async fn of_two_tries_that_wait_the_first_that_is_admitted_opens_for_both() {
    let bench = Bench::new();
    let tries = bench.tries(MayWait::Yes);
    let open = |()| -> Outcome { unreachable!("it is not admitted") };
    let mut first = Box::pin(tries[0].once(std::future::pending(), open));
    assert!(futures_util::poll!(&mut first).is_pending());
    // It does not wait for the other: that one may wait for ever.
    assert_eq!(bench.by(&tries[1], Wait::ForTargets).await.unwrap().seq, Some(Seq::FIRST));
    assert!(futures_util::poll!(&mut first).is_ready());
    assert_eq!(bench.by(&tries[0], Wait::ForTargets).await.unwrap().seq, Some(Seq::FIRST));
    assert_eq!(bench.last_seq(), Some(Seq::FIRST));
}

#[tokio::test]
async fn a_try_that_would_block_decides_for_one_that_waits_and_for_one_that_is_late() {
    let bench = Bench::new();
    let tries = bench.tries(MayWait::No);
    let (admit, admitted) = tokio::sync::oneshot::channel::<()>();
    // When it is admitted nobody is in the way: on its own it would open a bracket, of which its caller does not know.
    let open = |_| -> Outcome { unreachable!("another has decided") };
    let mut waits = Box::pin(tries[0].once(admitted, open));
    assert!(futures_util::poll!(&mut waits).is_pending());
    let blocked = tries[1].once(std::future::ready(()), |()| Ok(Dispatched::WouldBlock(Vec::new())));
    assert!(matches!(blocked.await, Ok(Dispatched::WouldBlock(_))));
    admit.send(()).unwrap();
    assert!(matches!(waits.await, Ok(Dispatched::WouldBlock(_))));
    assert_eq!(bench.by(&tries[1], Wait::NotAtAll).await.unwrap().verdict, Verdict::WouldBlock);
    assert_eq!(bench.last_seq(), None);
    drop(tries);
    assert_eq!(bench.known(), 1, "it is remembered");
    for call in 0..MOST_KEPT {
        bench.page(&call.to_string()).await;
    }
    assert_eq!(bench.known(), MOST_KEPT, "no longer than others");
}

#[tokio::test]
async fn a_try_for_which_there_was_no_room_decides_for_one_that_waits_and_for_one_that_is_late() {
    let bench = Bench::new();
    let tries = bench.tries(MayWait::Yes);
    let permits = Arc::clone(&bench.host.directory().expect(bench.space).unwrap().permits);
    let all = permits.acquire_many(permits.available_permits().try_into().unwrap()).await.unwrap();
    let mut waits = Box::pin(bench.by(&tries[0], Wait::ForTargets));
    assert!(futures_util::poll!(&mut waits).is_pending());
    let hasty = bench.by(&tries[1], Wait::AtMost(Duration::from_millis(10)));
    let refused = tokio::time::timeout(Duration::from_secs(20), hasty).await.expect("its time passes");
    let refused = refused.unwrap_err();
    assert!(matches!(refused, NotifyError::TooManyRounds { .. }));
    // Now there is room: it would open a bracket for a caller that was told that there is none.
    drop(all);
    assert_eq!(waits.await.unwrap_err(), refused);
    assert_eq!(bench.by(&tries[1], Wait::ForTargets).await.unwrap_err(), refused);
    drop(tries);
    let late = bench.source.retries.ask(call_id("a"), asked(MayWait::Yes)).unwrap();
    assert_eq!(bench.by(&late, Wait::ForTargets).await.unwrap_err(), refused);
    assert_eq!((bench.last_seq(), bench.known()), (None, 1));
    // Another id is another call.
    assert_eq!(bench.start("b").await, Seq::FIRST);
}

#[tokio::test]
async fn two_tries_that_decide_at_once_open_one_round() {
    let bench = Bench::new();
    for round in 1..=200_u64 {
        let id = call_id(&format!("{round}"));
        let opened = [(); 2].map(|()| {
            let (host, source, id, space) =
                (bench.host.clone(), Arc::clone(&bench.source), id.clone(), bench.space);
            std::thread::spawn(move || {
                let retry = source.retries.ask(id, asked(MayWait::Yes)).unwrap();
                let (range, _, cause, owner) = retry.once.asked.told();
                let (wait, resident_pages) = (Wait::NotAtAll, None);
                let call = Invalidation { address_space: space, range, cause, owner, wait, resident_pages };
                host.start(call, Some(&retry)).now_or_never().unwrap().unwrap().seq
            })
        });
        let seqs = opened.map(|thread| thread.join().unwrap());
        assert_eq!(seqs, [Seq::new(round); 2]);
        bench.host.invalidate_range_end(bench.space, seqs[0].unwrap()).unwrap();
    }
}

#[tokio::test]
async fn what_a_host_agent_refuses_that_stops_is_decided_by_its_successor() {
    let bench = Bench::new();
    let tries = bench.tries(MayWait::Yes);
    let stopping = tries[0].once(std::future::ready(()), |()| Err(NotifyError::Stopping));
    assert!(matches!(stopping.await, Err(NotifyError::Stopping)));
    drop(tries);
    assert_eq!(bench.known(), 0);
}

#[tokio::test]
async fn a_try_that_nobody_waits_for_any_more_leaves_nothing() {
    let bench = Bench::new();
    let [first, second] = bench.tries(MayWait::Yes);
    let open = |()| -> Outcome { unreachable!("it is not admitted") };
    let mut waits = Box::pin(first.once(std::future::pending(), open));
    assert!(futures_util::poll!(&mut waits).is_pending());
    drop(waits);
    drop(first);
    assert_eq!(bench.known(), 1, "another is in it");
    drop(second);
    assert_eq!(bench.known(), 0);
}

#[tokio::test]
async fn the_latest_calls_are_handed_over_and_every_open_bracket() {
    let bench = Bench::new();
    let open = bench.start("open").await;
    for call in ["a", "b", "c"] {
        bench.page(call).await;
    }
    let ToTryAgain { starts, over } = bench.source.retries.to_try_again(2);
    assert_eq!(starts.into_iter().collect::<Vec<_>>(), [(open, (call_id("open"), MayWait::Yes))]);
    let asked = Asked::Page { address: 4096, cause: Cause::Unmap, owner: None };
    let settled = |call, seq| (call_id(call), Over::Settled(asked, Seq::new(seq).unwrap()));
    assert_eq!(over, [settled("b", 3), settled("c", 4)], "the oldest first");
}
