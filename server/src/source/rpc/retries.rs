//! Calls that are tried again: one outcome for each request id.
//!
//! A caller that lost its connection does not know whether its call arrived. With an id it calls again,
//! and gets the outcome of the call that did:
//!
//! ```text
//!   ask(id) --not known--> Undecided --the round is open--> Opened ----until it is settled and old
//!           |                  |------WOULD_BLOCK---------> Blocked ---until it is old
//!           |                  |------no room for it------> Refused ---until it is old
//!           |                  +------nobody asks any more, or refused for another reason--> not known
//!           +--known, the same request--> has its outcome, as soon as there is one
//!           +--known, another request---> REQUEST_ID_REUSED
//! ```
//!
//! The first try that comes to a decision decides for all. WOULD_BLOCK, ROUND_QUOTA and QUARANTINE_FULL leave nothing
//! behind in the address space (NonBlockAtomic), and are outcomes all the same: their caller goes on without a bracket,
//! so a try that comes late, when there is room and nobody is in the way any more, must not open one. What a host agent
//! refuses that stops, or that was replaced, is none: it refuses every try, and its successor decides.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use shootdown_core::{AddrRange, Cause, Method, OwnerTag, PageSize, Seq};
use shootdown_proto::message::CallId;
use tokio::sync::SetOnce;

use crate::completion::WaitingRound;
use crate::dispatch::Dispatched;
use crate::source::NotifyError;

/// Settled calls of one address space whose outcome is remembered. A caller tries again within seconds,
/// and has at most a few hundred calls in flight.
const MOST_KEPT: usize = 4096;

/// The targets that they name, all together: about 40 MB.
const MOST_TARGETS_KEPT: usize = 1 << 18;

/// How many of those that were open are looked at when one is added: more than one, so that a backlog goes away.
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
    /// Those that have an outcome, with the number of their targets. First those that were open when they were looked
    /// at last: there are hardly more of them than the address space may have open brackets.
    open: VecDeque<(CallId, usize)>,
    /// Then those that are settled, the oldest first.
    kept: VecDeque<(CallId, usize)>,
    /// Of those.
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
    /// The latest of those that are over, the oldest first.
    pub(crate) over: Vec<(CallId, Over)>,
}

/// What is known of a call that is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Over {
    /// `invalidate_range_end` of this bracket.
    Ended(Seq),
    /// Its targets have stopped, and its bracket has ended.
    Settled(Asked, Seq),
    WouldBlock(Asked),
    /// For want of room.
    Refused(Asked, NotifyError),
}

/// One request, however often it is tried.
#[derive(Debug)]
struct Once {
    asked: Asked,
    /// Held while a try decides: of several that come to it at once, the first.
    deciding: Mutex<()>,
    outcome: SetOnce<Outcome>,
    /// The bits that the host had of the range. Taken once: what is reported later belongs to a later query.
    young: OnceLock<bool>,
}

/// A refusal is one for want of room.
type Outcome = Result<Dispatched, NotifyError>;

/// One try.
#[derive(Debug)]
pub(crate) struct Try<'a> {
    retries: &'a Retries,
    id: CallId,
    once: Arc<Once>,
}

impl Asked {
    /// What its round was told of.
    pub(crate) fn told(self) -> (AddrRange, Method, Cause, Option<OwnerTag>) {
        match self {
            Self::Start { range, cause, owner, .. } => (range, Method::Invalidate, cause, owner),
            Self::Page { address, cause, owner } => {
                (AddrRange::page_of(address, PageSize::BASE), Method::Invalidate, cause, owner)
            }
            Self::Around { method, range } => (range, method, Cause::Clear, None),
        }
    }
}

impl Retries {
    /// A call arrives.
    pub(crate) fn ask(&self, id: CallId, asked: Asked) -> Result<Try<'_>, IdReused> {
        let mut table = self.table.lock();
        let known = table
            .calls
            .entry(id.clone())
            .or_insert_with(|| Known::Round { once: Arc::new(Once::new(asked)), callers: 0 });
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
    /// are open still, by the sequences of these, and the latest `most` of those that are over.
    pub(crate) fn to_try_again(&self, most: usize) -> ToTryAgain {
        let mut to_try_again = ToTryAgain::default();
        let table = self.table.lock();
        for (id, _) in table.open.iter().rev().chain(table.kept.iter().rev()) {
            let over = match table.calls.get(id) {
                Some(Known::Round { once, .. }) => match (once.asked, once.outcome.get()) {
                    (Asked::Start { may_wait, .. }, Some(Ok(Dispatched::Open(round))))
                        if !round.is_settled() =>
                    {
                        to_try_again.starts.insert(round.seq(), (id.clone(), may_wait));
                        continue;
                    }
                    (asked, Some(outcome)) => Over::of(asked, outcome),
                    (_, None) => continue,
                },
                Some(Known::Ended(seq)) => Over::Ended(*seq),
                None => continue,
            };
            if to_try_again.over.len() < most {
                to_try_again.over.push((id.clone(), over));
            }
        }
        to_try_again.over.reverse();
        to_try_again
    }

    /// A call that opened its bracket in the run before.
    pub(crate) fn restore_start(&self, id: CallId, asked: Asked, round: Arc<WaitingRound>) {
        self.restore(id, Known::before(asked, Ok(Dispatched::Open(round))));
    }

    /// A call that was over in the run before; `settled` makes its round again, if it had one.
    pub(crate) fn restore_over(
        &self,
        id: CallId,
        over: Over,
        settled: impl FnOnce(Asked, Seq) -> WaitingRound,
    ) {
        let known = match over {
            Over::Ended(seq) => Known::Ended(seq),
            Over::Settled(asked, seq) => {
                Known::before(asked, Ok(Dispatched::Open(Arc::new(settled(asked, seq)))))
            }
            // Who was in the way is forgotten.
            Over::WouldBlock(asked) => Known::before(asked, Ok(Dispatched::WouldBlock(Vec::new()))),
            Over::Refused(asked, refused) => Known::before(asked, Err(refused)),
        };
        self.restore(id, known);
    }

    fn restore(&self, id: CallId, known: Known) {
        let mut table = self.table.lock();
        table.calls.insert(id.clone(), known);
        table.keep(id, 0);
    }

    /// The release has its outcome elsewhere; its id must be one of its own all the same.
    pub(crate) fn require_unknown(&self, id: &CallId) -> Result<(), IdReused> {
        if self.table.lock().calls.contains_key(id) { Err(IdReused) } else { Ok(()) }
    }
}

impl Over {
    fn of(asked: Asked, outcome: &Outcome) -> Self {
        match outcome {
            Ok(Dispatched::Open(round)) => Self::Settled(asked, round.seq()),
            Ok(Dispatched::WouldBlock(_)) => Self::WouldBlock(asked),
            Err(refused) => Self::Refused(asked, refused.clone()),
        }
    }
}

impl Once {
    fn new(asked: Asked) -> Self {
        Self { asked, deciding: Mutex::default(), outcome: SetOnce::new(), young: OnceLock::new() }
    }
}

impl Try<'_> {
    /// Waits until the call is `admitted`, however that ends, and then opens its round or refuses it, unless another
    /// try has decided by then: that one's outcome is this one's, at once. No two of a call ever open one.
    ///
    /// # Errors
    /// What the try that decided was refused for, and what this one is refused for where that decides nothing.
    ///
    /// # Cancel safety
    /// Cancel safe: nothing has happened yet, or the outcome is in the table.
    pub(crate) async fn once<A>(
        &self,
        admitted: impl Future<Output = A>,
        open: impl FnOnce(A) -> Outcome,
    ) -> Outcome {
        let admitted = tokio::select! {
            biased;
            outcome = self.once.outcome.wait() => return outcome.clone(),
            admitted = admitted => admitted,
        };
        self.decide(|| open(admitted))
    }

    fn decide(&self, open: impl FnOnce() -> Outcome) -> Outcome {
        {
            let _deciding = self.once.deciding.lock();
            if let Some(outcome) = self.once.outcome.get() {
                return outcome.clone();
            }
            let outcome = open();
            if outcome.as_ref().is_err_and(|refused| !refused.is_for_want_of_room()) {
                return outcome;
            }
            self.once.outcome.set(outcome).expect("whoever decides looks first, under the lock");
        }
        let outcome = self.once.outcome.get().expect("it was decided").clone();
        let targets = match &outcome {
            Ok(Dispatched::Open(round)) => round.look(|round| round.reports().len()),
            Ok(Dispatched::WouldBlock(targets)) => targets.len(),
            Err(_) => 0,
        };
        self.retries.table.lock().keep(self.id.clone(), targets);
        outcome
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
            if *callers == 0 && once.outcome.get().is_none() {
                table.calls.remove(&self.id);
            }
        }
    }
}

impl Table {
    /// Remembers a call that has its outcome, and forgets old ones. One whose round waits, or whose bracket its caller
    /// has not ended, is never forgotten, and is none of those that are counted.
    fn keep(&mut self, id: CallId, targets: usize) {
        self.sort(id, targets);
        for _ in 0..LOOKED_AT {
            let Some((id, targets)) = self.open.pop_front() else { break };
            self.sort(id, targets);
        }
        while self.kept.len() > MOST_KEPT || self.targets > MOST_TARGETS_KEPT {
            let Some((id, targets)) = self.kept.pop_front() else { return };
            self.calls.remove(&id);
            self.targets -= targets;
        }
    }

    fn sort(&mut self, id: CallId, targets: usize) {
        match self.calls.get(&id) {
            Some(known) if known.is_open() => self.open.push_back((id, targets)),
            Some(_) => {
                self.kept.push_back((id, targets));
                self.targets += targets;
            }
            None => {}
        }
    }
}

impl Known {
    /// A call that was decided in the run before.
    fn before(asked: Asked, outcome: Outcome) -> Self {
        let young = OnceLock::from(true);
        let outcome = SetOnce::new_with(Some(outcome));
        Self::Round { once: Arc::new(Once { outcome, young, ..Once::new(asked) }), callers: 0 }
    }

    fn is_open(&self) -> bool {
        match self {
            Self::Round { once, .. } => match once.outcome.get() {
                Some(Ok(Dispatched::Open(round))) => !round.is_settled(),
                Some(Ok(Dispatched::WouldBlock(_)) | Err(_)) => false,
                // It waits to be admitted.
                None => true,
            },
            Self::Ended(_) => false,
        }
    }
}

#[cfg(test)]
mod tests;
