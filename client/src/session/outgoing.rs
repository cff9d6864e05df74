//! [6 of 9] What the device says, and when: the stream that the transport takes its messages from.
//!
//! ```text
//!   heartbeat ---+
//!   young -------+
//!   on_flushed --+--> State --- next(), when the transport can send ---> SessionRequest
//!   requests ----+
//!   leave -------+
//! ```
//!
//! There is no task between a flush and the transport. Whenever the transport asks for a message it gets
//! one ack of all that was flushed until then: under load acks get bigger, not later.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use futures_util::Stream;
use parking_lot::Mutex;
use shootdown_core::ack::{AckTracker, Arrived, ContiguityError};
use shootdown_core::{Ack, AddrRange, AddressSpaceId, FlushReport, Moment, NoticeNumber, SessionId};
use shootdown_proto::message::{DeviceSays, Hello, MAX_RANGES_A_MESSAGE, RequestId};
use shootdown_proto::v1;

use crate::clock::Clock;
use crate::ranges::at_most;

/// Ranges in the reports of one ack: each is some 25 bytes, and a message holds 512 KiB.
const MAX_RANGES_AN_ACK: usize = 8192;
/// Heartbeats whose answer may still come; the answer to an older one renews nothing.
const HEARTBEATS_KEPT: usize = 8;

#[derive(Debug)]
pub(crate) struct Outgoing {
    clock: Clock,
    state: Mutex<State>,
}

/// Bounded: requests by their permits, young by address space and [`MAX_RANGES_A_MESSAGE`], acks by the
/// session's window.
#[derive(Debug)]
struct State {
    /// Which stream the transport takes messages from: an earlier one gets none.
    line: u64,
    greeting: Greeting,
    hello: Option<Hello>,
    hello_sent: Option<Moment>,
    session: Option<SessionId>,
    heartbeat: Option<RequestId>,
    heartbeats_sent: VecDeque<(RequestId, Moment)>,
    /// The oldest heartbeat since anything arrived on this stream: sent, or waiting for the transport.
    unheard: Option<RequestId>,
    /// That one was waited on for long enough.
    is_dead: bool,
    young: YoungRanges,
    /// Reports that were sent, and with which heartbeat behind them: its answer says that they arrived.
    young_sent: YoungRanges,
    young_in_flight: VecDeque<(RequestId, YoungRanges)>,
    acks: AckTracker,
    /// What is left of an ack that was too large for one message.
    ack_parts: VecDeque<Ack>,
    requests: VecDeque<(RequestId, DeviceSays)>,
    /// Requests that were sent on a stream which was lost; they are not withdrawn any more.
    again: VecDeque<DeviceSays>,
    turn: Turn,
    last_word: LastWord,
    waker: Option<Waker>,
}

type YoungRanges = BTreeMap<AddressSpaceId, Vec<AddrRange>>;

fn join_young(into: &mut YoungRanges, address_space: AddressSpaceId, ranges: Vec<AddrRange>) {
    let known = into.entry(address_space).or_default();
    known.extend(ranges);
    at_most(known, MAX_RANGES_A_MESSAGE);
}

/// Whether there is a session on the stream: nothing but Hello goes before its Welcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Greeting {
    Said,
    /// The stream was lost, or its Welcome has not come.
    Awaited,
}

/// Acks go first, but never twice while a request waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    Ack,
    Request,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LastWord {
    NotYet,
    Leave,
    Silence,
}

impl Outgoing {
    pub(crate) fn new(clock: Clock, hello: Hello) -> Arc<Self> {
        let state = State {
            line: 1,
            greeting: Greeting::Said,
            hello: Some(hello),
            hello_sent: None,
            session: None,
            heartbeat: None,
            heartbeats_sent: VecDeque::with_capacity(HEARTBEATS_KEPT),
            unheard: None,
            is_dead: false,
            young: YoungRanges::new(),
            young_sent: YoungRanges::new(),
            young_in_flight: VecDeque::with_capacity(HEARTBEATS_KEPT),
            acks: AckTracker::new(),
            ack_parts: VecDeque::new(),
            requests: VecDeque::new(),
            again: VecDeque::new(),
            turn: Turn::Ack,
            last_word: LastWord::NotYet,
            waker: None,
        };
        Arc::new(Self { clock, state: Mutex::new(state) })
    }

    /// What the transport reads.
    pub(crate) fn stream(self: &Arc<Self>) -> OutgoingStream {
        OutgoingStream { outgoing: Arc::clone(self), line: self.state.lock().line }
    }

    /// The stream is lost: nothing goes out on it any more. The requests that did not.
    pub(crate) fn cut(&self) -> HashSet<RequestId> {
        let mut unsent = HashSet::new();
        self.change(|state| {
            state.line += 1;
            state.greeting = Greeting::Awaited;
            state.heartbeats_sent.clear();
            (state.unheard, state.is_dead) = (None, false);
            // Whether they arrived is not known: they are told again.
            let in_flight = std::mem::take(&mut state.young_in_flight).into_iter().map(|(_, young)| young);
            let sent = std::mem::take(&mut state.young_sent);
            for (address_space, ranges) in in_flight.chain([sent]).flatten() {
                join_young(&mut state.young, address_space, ranges);
            }
            // Parts of an ack that was begun: the host agent sends those notices again.
            state.ack_parts.clear();
            state.again.clear();
            unsent = state.requests.iter().map(|(request, _)| *request).collect();
        });
        unsent
    }

    /// Requests whose answers did not come; they go before any other.
    pub(crate) fn ask_again(&self, requests: Vec<DeviceSays>) {
        self.state.lock().again = requests.into();
    }

    /// The next stream: Hello goes first, and all that waits when its Welcome has come.
    pub(crate) fn greet_again(self: &Arc<Self>, hello: Hello) -> OutgoingStream {
        self.change(|state| {
            state.line += 1;
            state.greeting = Greeting::Awaited;
            (state.hello, state.hello_sent) = (Some(hello), None);
        });
        self.stream()
    }

    /// The session goes on: what is below `floor` the host agent has acks of.
    pub(crate) fn on_resumed(&self, floor: Option<NoticeNumber>) {
        self.change(|state| {
            state.acks.on_resumed(floor);
            state.greeting = Greeting::Said;
        });
    }

    /// The last notice that arrived.
    pub(crate) fn last_received(&self) -> Option<NoticeNumber> {
        self.state.lock().acks.last_received()
    }

    /// When the transport took Hello.
    pub(crate) fn on_welcome(&self, session: SessionId) -> Option<Moment> {
        let mut state = self.state.lock();
        state.session = Some(session);
        state.hello_sent
    }

    /// A notice arrived; what it asks for, and how many are in flight now.
    pub(crate) fn on_notice(&self, number: NoticeNumber) -> Result<(Arrived, usize), ContiguityError> {
        let mut state = self.state.lock();
        let arrived = state.acks.on_notice(number)?;
        Ok((arrived, state.acks.in_flight()))
    }

    /// The notice's ack was lost with an earlier stream: it is acked again.
    pub(crate) fn on_lost_ack(&self, report: Option<FlushReport>, number: NoticeNumber) {
        self.change(|state| state.acks.on_lost_ack(report, number));
    }

    /// The notice's flush is complete and its uses have ended: it may be acked.
    pub(crate) fn on_flushed(&self, report: Option<FlushReport>, number: NoticeNumber) {
        self.change(|state| state.acks.on_flushed(report, number));
    }

    /// Notices that arrived and are not flushed.
    pub(crate) fn in_flight(&self) -> usize {
        self.state.lock().acks.in_flight()
    }

    pub(crate) fn request(&self, request: RequestId, says: DeviceSays) {
        self.change(|state| state.requests.push_back((request, says)));
    }

    /// Takes a request back; false: it was sent.
    pub(crate) fn withdraw(&self, request: RequestId) -> bool {
        let mut state = self.state.lock();
        let at = state.requests.iter().position(|(waiting, _)| *waiting == request);
        at.and_then(|at| state.requests.remove(at)).is_some()
    }

    /// Goes out before every ack that is not sent yet.
    pub(crate) fn report_young(&self, address_space: AddressSpaceId, ranges: Vec<AddrRange>) {
        self.change(|state| join_young(&mut state.young, address_space, ranges));
    }

    /// One that was not sent yet is replaced: it would renew nothing more.
    pub(crate) fn heartbeat(&self, request: RequestId) {
        self.change(|state| {
            state.heartbeat = Some(request);
            state.unheard.get_or_insert(request);
        });
    }

    /// Something came from the host agent, whatever it was.
    pub(crate) fn on_heard(&self) {
        let mut state = self.state.lock();
        (state.unheard, state.is_dead) = (None, false);
    }

    /// Nothing will come after that heartbeat any more; unless something has, or the stream is another by now.
    pub(crate) fn give_up(&self, since: RequestId) {
        let mut state = self.state.lock();
        state.is_dead = state.unheard == Some(since);
    }

    /// Whether nothing comes on the stream any more.
    pub(crate) fn is_dead(&self) -> bool {
        self.state.lock().is_dead
    }

    /// The oldest heartbeat since which nothing has come. None where there is no stream on which it could.
    pub(crate) fn unheard(&self) -> Option<RequestId> {
        let state = self.state.lock();
        state.unheard.filter(|_| state.greeting == Greeting::Said)
    }

    /// When the heartbeat that was answered was sent. Whatever was sent before it has arrived.
    pub(crate) fn heartbeat_sent(&self, request: RequestId) -> Option<Moment> {
        let mut state = self.state.lock();
        if let Some(at) = state.young_in_flight.iter().position(|(sent, _)| *sent == request) {
            state.young_in_flight.drain(..=at);
        }
        state.heartbeats_sent.iter().find(|(sent, _)| *sent == request).map(|(_, at)| *at)
    }

    /// Leave is the last message; nothing is held any more.
    pub(crate) fn leave(&self) {
        self.change(|state| state.last_word = LastWord::Leave);
    }

    /// The stream ends without a word.
    pub(crate) fn fall_silent(&self) {
        self.change(|state| state.last_word = LastWord::Silence);
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let waker = {
            let mut state = self.state.lock();
            change(&mut state);
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl State {
    fn next(&mut self, clock: &Clock) -> Option<DeviceSays> {
        if let Some(hello) = self.hello.take() {
            self.hello_sent = Some(clock.now());
            return Some(DeviceSays::Hello(hello));
        }
        if self.greeting == Greeting::Awaited {
            return None;
        }
        if let Some(request) = self.heartbeat.take() {
            if self.heartbeats_sent.len() == HEARTBEATS_KEPT {
                self.heartbeats_sent.pop_front();
            }
            self.heartbeats_sent.push_back((request, clock.now()));
            self.mark_young(request);
            return Some(DeviceSays::Heartbeat { request });
        }
        if let Some((address_space, ranges)) = self.young.pop_first() {
            join_young(&mut self.young_sent, address_space, ranges.clone());
            return Some(DeviceSays::Young { address_space, ranges });
        }
        if let Some(says) = self.again.pop_front() {
            return Some(says);
        }
        if self.turn == Turn::Request
            && let Some((_, says)) = self.requests.pop_front()
        {
            self.turn = Turn::Ack;
            return Some(says);
        }
        if let Some(ack) = self.next_ack() {
            self.turn = Turn::Request;
            return Some(DeviceSays::Ack { session: self.session, ack });
        }
        self.requests.pop_front().map(|(_, says)| says)
    }

    /// The answer to this heartbeat says that the reports before it arrived.
    fn mark_young(&mut self, heartbeat: RequestId) {
        if self.young_in_flight.len() == HEARTBEATS_KEPT
            && let Some((_, oldest)) = self.young_in_flight.pop_front()
        {
            // Nobody will know of it before the next.
            let next = self.young_in_flight.front_mut().map_or(&mut self.young_sent, |(_, young)| young);
            oldest.into_iter().for_each(|(address_space, ranges)| join_young(next, address_space, ranges));
        }
        self.young_in_flight.push_back((heartbeat, std::mem::take(&mut self.young_sent)));
    }

    fn next_ack(&mut self) -> Option<Ack> {
        if self.ack_parts.is_empty() {
            let ack = self.acks.take()?;
            if ack.reports.is_empty() {
                return Some(ack);
            }
            self.ack_parts = split(ack, MAX_RANGES_AN_ACK);
        }
        self.ack_parts.pop_front()
    }
}

/// The parts of an ack whose reports hold more than `most` ranges, in the order in which they must be
/// sent: each report goes with the first part that names its notice.
fn split(mut ack: Ack, most: usize) -> VecDeque<Ack> {
    let cost = |report: &FlushReport| 1 + report.young.len() + report.dirty.len();
    if ack.reports.iter().map(cost).sum::<usize>() <= most {
        return VecDeque::from([ack]);
    }
    ack.reports.sort_unstable_by_key(|report| report.notice);
    let mut parts = VecDeque::new();
    let (mut reports, mut spent) = (Vec::new(), 0);
    let (mut through, mut selective) = (None, Vec::new());
    for report in ack.reports {
        let (notice, cost) = (report.notice, cost(&report));
        if spent + cost > most && !reports.is_empty() {
            let reports = std::mem::take(&mut reports);
            let part_selective = std::mem::take(&mut selective);
            parts.push_back(Ack { through, selective: part_selective, reports });
            spent = 0;
        }
        spent += cost;
        reports.push(report);
        if Some(notice) <= ack.through {
            through = Some(notice);
        } else {
            // The first that is above: `through` is as high as it gets from here on.
            through = ack.through;
            selective.push(notice);
            ack.selective.retain(|other| *other != notice);
        }
    }
    selective.append(&mut ack.selective);
    parts.push_back(Ack { through: ack.through, selective, reports });
    parts
}

/// The messages of the device, as the transport takes them.
#[derive(Debug)]
pub(crate) struct OutgoingStream {
    outgoing: Arc<Outgoing>,
    line: u64,
}

impl Stream for OutgoingStream {
    type Item = v1::SessionRequest;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<v1::SessionRequest>> {
        let outgoing = &self.outgoing;
        let mut state = outgoing.state.lock();
        if state.line != self.line || state.last_word == LastWord::Silence {
            return Poll::Ready(None);
        }
        if let Some(says) = state.next(&outgoing.clock) {
            drop(state);
            return Poll::Ready(Some(says.into()));
        }
        if state.last_word == LastWord::Leave {
            state.last_word = LastWord::Silence;
            return Poll::Ready(Some(DeviceSays::Leave.into()));
        }
        state.waker = Some(context.waker().clone());
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn number(value: u64) -> NoticeNumber {
        NoticeNumber::new(value).unwrap()
    }

    fn report(notice: u64, ranges: usize) -> FlushReport {
        let page = |n: usize| AddrRange::new((n as u64) << 12, (n as u64 + 1) << 12).unwrap();
        FlushReport {
            notice: number(notice),
            young: (0..ranges).map(page).collect(),
            dirty: vec![],
            timing: None,
        }
    }

    proptest! {
        /// What the host agent checks of every ack holds for each part.
        #[test]
        fn the_parts_of_an_ack_are_acks_and_say_what_it_says(
            before in 0..5_u64,
            cumulative in 0..20_u64,
            above in prop::collection::btree_set(2..40_u64, 0..20),
            reported in prop::collection::btree_map(1..70_u64, 0..12_usize, 1..40),
            most in 1..40_usize,
        ) {
            let through = before + cumulative;
            let selective: Vec<_> = above.iter().map(|n| number(through + n)).collect();
            let named = |n: u64| (n > before && n <= through) || above.contains(&(n.saturating_sub(through)));
            let reports: Vec<_> =
                reported.iter().filter(|(n, _)| named(**n)).map(|(n, ranges)| report(*n, *ranges)).collect();
            prop_assume!(!reports.is_empty());
            let whole = Ack { through: NoticeNumber::new(through), selective, reports };

            let mut acked: BTreeSet<u64> = (1..=before).collect();
            let mut last_through = NoticeNumber::new(before);
            let mut told = Vec::new();
            for part in split(whole.clone(), most) {
                prop_assert!(part.through >= last_through, "never lower than in the ack before");
                let cumulative = (1..=part.through.map_or(0, NoticeNumber::get)).filter(|n| !acked.contains(n));
                let mut new: BTreeSet<u64> = cumulative.collect();
                for n in &part.selective {
                    prop_assert!(Some(*n) > part.through && !acked.contains(&n.get()) && new.insert(n.get()));
                }
                prop_assert!(!new.is_empty(), "names something new");
                for report in &part.reports {
                    prop_assert!(new.contains(&report.notice.get()), "goes with the first that names its notice");
                }
                let cost: usize = part.reports.iter().map(|it| 1 + it.young.len()).sum();
                prop_assert!(cost <= most || part.reports.len() == 1);
                told.extend(part.reports);
                acked.append(&mut new);
                last_through = part.through;
            }
            let everything: BTreeSet<u64> =
                (1..=through).chain(whole.selective.iter().map(|n| n.get())).collect();
            prop_assert_eq!(acked, everything);
            prop_assert_eq!(last_through, whole.through);
            let mut asked = whole.reports;
            asked.sort_unstable_by_key(|it| it.notice);
            prop_assert_eq!(told, asked);
        }
    }

    fn outgoing() -> Arc<Outgoing> {
        let hello = Hello {
            device: shootdown_core::DeviceId::new("d").unwrap(),
            incarnation: shootdown_core::Incarnation::FIRST,
            versions: vec![1],
            window: None,
            page_sizes: vec![],
            enforces_lease: true,
            change_pte: false,
            resume: None,
            clock_id: String::new(),
        };
        Outgoing::new(Clock::boottime(), hello)
    }

    fn take(outgoing: &Outgoing) -> Option<DeviceSays> {
        outgoing.state.lock().next(&outgoing.clock)
    }

    #[test]
    fn requests_and_acks_take_turns_and_neither_starves() {
        let outgoing = outgoing();
        assert!(matches!(take(&outgoing), Some(DeviceSays::Hello(_))));
        for n in 1..=3 {
            outgoing.request(RequestId::new(n).unwrap(), DeviceSays::Leave);
            outgoing.on_notice(number(n)).unwrap();
        }
        let mut words = Vec::new();
        for n in 1..=3 {
            outgoing.on_flushed(None, number(n));
            words.extend(take(&outgoing).map(|says| matches!(says, DeviceSays::Ack { .. })));
        }
        words.extend(
            std::iter::from_fn(|| take(&outgoing)).map(|says| matches!(says, DeviceSays::Ack { .. })),
        );
        assert_eq!(words, [true, false, true, false, false]);
    }

    #[test]
    fn a_request_is_withdrawn_only_before_it_is_sent() {
        let outgoing = outgoing();
        take(&outgoing);
        let request = RequestId::MIN;
        outgoing.request(request, DeviceSays::Leave);
        assert!(outgoing.withdraw(request) && !outgoing.withdraw(request));
        outgoing.request(request, DeviceSays::Leave);
        take(&outgoing);
        assert!(!outgoing.withdraw(request));
    }

    #[test]
    fn a_heartbeat_that_waits_is_replaced_and_only_the_last_ones_sent_are_remembered() {
        let outgoing = outgoing();
        take(&outgoing);
        let id = |n| RequestId::new(n).unwrap();
        outgoing.heartbeat(id(1));
        outgoing.heartbeat(id(2));
        assert_eq!(take(&outgoing), Some(DeviceSays::Heartbeat { request: id(2) }));
        assert_eq!(take(&outgoing), None);
        assert_eq!(outgoing.heartbeat_sent(id(1)), None, "it was never sent");
        assert!(outgoing.heartbeat_sent(id(2)).is_some());
        for n in 3..=10 {
            outgoing.heartbeat(id(n));
            take(&outgoing);
        }
        assert_eq!(outgoing.heartbeat_sent(id(2)), None);
        assert!(outgoing.heartbeat_sent(id(10)).is_some());
    }

    #[test]
    fn young_reports_that_wait_are_bounded_and_lose_nothing() {
        let outgoing = outgoing();
        take(&outgoing);
        let space = AddressSpaceId::FIRST;
        let page = |n: u64| AddrRange::new(n << 12, (n + 1) << 12).unwrap();
        for n in 0..5000 {
            outgoing.report_young(space, vec![page(n * 2)]);
        }
        let Some(DeviceSays::Young { ranges, .. }) = take(&outgoing) else { panic!("young") };
        assert!(ranges.len() <= MAX_RANGES_A_MESSAGE);
        assert!((0..5000).all(|n| ranges.iter().any(|range| range.contains(page(n * 2)))));
        assert_eq!(take(&outgoing), None);
    }
}
