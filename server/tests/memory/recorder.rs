//! A notifier that writes down what it is told and what the source held at that time, answers as the test
//! says, and stands in for the devices of a host agent.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use shootdown_core::{
    Access, AddrRange, AddressSpaceId, Cause, FrameNumber, Incarnation, Moment, PageSize, Seq, Translation,
};
use shootdown_proto::message::FrameSpan;
use shootdown_server::source::memory::{FrameStore, MemoryConfig, MemorySource, MemoryStats, Twin};
use shootdown_server::source::{
    Invalidation, Notifier, NotifyError, RoundResult, RoundTimes, Translate, Verdict, Wait,
};
use tokio::sync::watch;

pub(crate) type Source = MemorySource<Recorder>;

/// What the notifier was asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Method {
    RangeStart(Cause),
    RangeEnd,
    Page(Cause),
    ClearFlushYoung,
    ClearYoung,
    ChangePte(FrameNumber),
    TestYoung,
    Release,
}

/// One call, and what the source held when it came.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) method: Method,
    pub(crate) space: AddressSpaceId,
    pub(crate) range: AddrRange,
    pub(crate) stats: MemoryStats,
    /// Of the frame at the first address of the range.
    pub(crate) generation: Option<u64>,
    /// Whose call it is.
    pub(crate) twin: Option<Twin>,
}

/// Whether devices report that they used a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum Reports {
    #[default]
    Young,
    Nothing,
}

/// How the next call that can be answered is answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Answer {
    Quiesced,
    /// Quiesced, once the test opens the gate.
    Held,
    /// Quiesced, once the test opens the last gate too.
    HeldLonger,
    NotQuiesced,
    HeldNotQuiesced,
    /// Not quiesced, once the test opens the last gate too.
    HeldLongerNotQuiesced,
    Refused,
}

pub(crate) struct Recorder {
    state: Mutex<State>,
    gate: watch::Sender<Gate>,
    source: OnceLock<Source>,
    frames: Arc<FrameStore>,
}

/// How often a device faults before it is taken for stuck. While a bracket is open each is a mere look, and the
/// thread that is to close it may be without a core for a while.
const TRIES: usize = 5_000_000;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd)]
enum Gate {
    Shut,
    Open,
    /// For those too that are held longer.
    Wide,
}

type Meanwhile = Arc<dyn Fn(&Recorder, Method, AddressSpaceId, AddrRange) + Send + Sync>;

#[derive(Default)]
struct State {
    calls: Vec<Call>,
    answers: VecDeque<Answer>,
    spaces: u64,
    refuse_spaces: bool,
    released: BTreeSet<AddressSpaceId>,
    seq: u64,
    /// All that ever began, by sequence.
    rounds: Vec<(u64, (AddressSpaceId, AddrRange))>,
    clock: u64,
    /// Brackets that are open.
    open: BTreeMap<Seq, (AddressSpaceId, AddrRange)>,
    /// What the devices hold.
    grants: BTreeMap<(AddressSpaceId, u64), Translation>,
    /// What the devices used since they were last asked.
    young: BTreeSet<(AddressSpaceId, u64)>,
    reports: Reports,
    /// What devices do while a round is in progress, before they stop.
    meanwhile: Option<Meanwhile>,
    /// Of a random stream: how often a round yields before it is over.
    random: Option<u64>,
}

/// A source of `frames` frames with a recorder, and blocks of four pages.
pub(crate) fn source(frames: usize) -> (Source, Arc<Recorder>) {
    source_on(FrameStore::new(frames).unwrap())
}

pub(crate) fn source_on(frames: Arc<FrameStore>) -> (Source, Arc<Recorder>) {
    source_with(frames, |_| {})
}

/// A source whose configuration is changed first.
pub(crate) fn source_with(
    frames: Arc<FrameStore>,
    change: impl FnOnce(&mut MemoryConfig),
) -> (Source, Arc<Recorder>) {
    let recorder = Arc::new(Recorder {
        state: Mutex::default(),
        gate: watch::Sender::new(Gate::Shut),
        source: OnceLock::new(),
        frames: Arc::clone(&frames),
    });
    let clock = Arc::clone(&recorder);
    let now = Arc::new(move || clock.tick());
    let mut config = MemoryConfig::new(now, tokio::runtime::Handle::current());
    config.zap_block_pages = 4;
    config.most_mappings = 64;
    config.huge_page_pages = 8;
    change(&mut config);
    let source = MemorySource::new(Arc::clone(&recorder), frames, config);
    assert!(recorder.source.set(source.clone()).is_ok());
    (source, recorder)
}

/// Lets the other tasks run until `reached`.
pub(crate) async fn until(reached: impl Fn() -> bool) {
    for _ in 0..10_000 {
        if reached() {
            return;
        }
        tokio::task::yield_now().await;
    }
    panic!("the state was not reached");
}

/// Lets the other tasks run for as long as they can without help, on a current-thread runtime.
pub(crate) async fn settle_down() {
    for _ in 0..200 {
        tokio::task::yield_now().await;
    }
}

impl Recorder {
    pub(crate) fn answer(&self, answers: impl IntoIterator<Item = Answer>) {
        self.state.lock().answers.extend(answers);
    }

    pub(crate) fn refuse_spaces(&self) {
        self.state.lock().refuse_spaces = true;
    }

    pub(crate) fn yield_at_random(&self, seed: u64) {
        self.state.lock().random = Some(seed | 1);
    }

    /// A device uses what it holds of a page; whether it holds it.
    pub(crate) fn uses(&self, space: AddressSpaceId, page: u64) -> bool {
        let state = &mut *self.state.lock();
        let held = state.grants.contains_key(&(space, page));
        if held {
            state.young.insert((space, page));
        }
        held
    }

    /// A device used a page, whatever it holds of it now.
    pub(crate) fn used(&self, space: AddressSpaceId, page: u64) {
        self.state.lock().young.insert((space, page));
    }

    pub(crate) fn report(&self, reports: Reports) {
        self.state.lock().reports = reports;
    }

    pub(crate) fn open_gate(&self) {
        self.gate.send_replace(Gate::Open);
    }

    pub(crate) fn open_last_gate(&self) {
        self.gate.send_replace(Gate::Wide);
    }

    /// Devices do this in each round from now on, before they stop: no grant of theirs is withdrawn yet.
    pub(crate) fn meanwhile(
        &self,
        act: impl Fn(&Self, Method, AddressSpaceId, AddrRange) + Send + Sync + 'static,
    ) {
        self.state.lock().meanwhile = Some(Arc::new(act));
    }

    pub(crate) fn calls(&self) -> Vec<Call> {
        self.state.lock().calls.clone()
    }

    pub(crate) fn methods(&self) -> Vec<Method> {
        self.state.lock().calls.iter().map(|call| call.method).collect()
    }

    pub(crate) fn forget_calls(&self) {
        self.state.lock().calls.clear();
    }

    pub(crate) fn open_brackets(&self) -> usize {
        self.state.lock().open.len()
    }

    /// A device faults, as a host agent serves it: granted only if no overlapping bracket is open or has
    /// begun since. `None` when the source refused.
    pub(crate) async fn grant(
        &self,
        space: AddressSpaceId,
        page: u64,
        access: Access,
    ) -> Option<Translation> {
        let range = AddrRange::page_of(page, PageSize::BASE);
        for _ in 0..TRIES {
            let overlaps = |(id, open): &(AddressSpaceId, AddrRange)| *id == space && open.overlaps(range);
            let (before, held) = {
                let state = self.state.lock();
                (state.seq, state.open.values().any(overlaps))
            };
            if held {
                // What is answered inside a bracket may be of a page that goes before its end.
                tokio::task::yield_now().await;
                continue;
            }
            let source = self.source.get().unwrap();
            let translation = source.fault(space, range, access).await.ok()?[0];
            {
                let mut state = self.state.lock();
                if state.released.contains(&space) {
                    return None;
                }
                let began = state.rounds.iter().rev().take_while(|(seq, _)| *seq > before);
                if !began.map(|(_, place)| place).chain(state.open.values()).any(overlaps) {
                    state.grants.insert((space, page), translation);
                    return Some(translation);
                }
            }
            tokio::task::yield_now().await;
        }
        panic!("the device made no progress");
    }

    /// Uses of what the devices hold, during which nothing is withdrawn.
    pub(crate) fn with_grants<T>(
        &self,
        uses: impl FnOnce(&BTreeMap<(AddressSpaceId, u64), Translation>) -> T,
    ) -> T {
        uses(&self.state.lock().grants)
    }

    pub(crate) fn frames(&self) -> &FrameStore {
        &self.frames
    }

    fn tick(&self) -> Moment {
        let mut state = self.state.lock();
        state.clock += 1;
        Moment::from_nanos(state.clock)
    }

    /// Writes the call down. The figures take every lock of the source in turn: they would never come back
    /// if the caller held one.
    fn record(&self, method: Method, space: AddressSpaceId, range: AddrRange) {
        let source = self.source.get().unwrap();
        let (stats, generation) = (source.stats(), source.generation(space, range.start()));
        let twin = Twin::current();
        self.state.lock().calls.push(Call { method, space, range, stats, generation, twin });
    }

    /// What devices hold of a page that is replaced is read-only, and has the bytes of what replaces it.
    fn check_replacement(&self, space: AddressSpaceId, translation: Translation) {
        let held = self.state.lock().grants.get(&(space, translation.range.start())).copied();
        let Some(held) = held else { return };
        assert_eq!(held.access, Access::Read, "a device may write to a page that is replaced");
        let bytes = [held.frame, translation.frame].map(|frame| {
            let mut out = bytes::BytesMut::new();
            self.frames.read(&[FrameSpan { frame, offset: 0, length: 4096 }], &mut out).unwrap();
            out
        });
        assert!(bytes[0] == bytes[1], "a page is replaced by another that is not equal");
    }

    async fn round(
        &self,
        method: Method,
        space: AddressSpaceId,
        range: AddrRange,
    ) -> Result<RoundResult, NotifyError> {
        self.record(method, space, range);
        let called = self.tick();
        let (answer, seq, number, alone, yields) = {
            let mut state = self.state.lock();
            let answer = state.answers.pop_front().unwrap_or(Answer::Quiesced);
            if answer == Answer::Refused {
                return Err(NotifyError::Stopping);
            }
            if state.released.contains(&space) {
                return Err(NotifyError::Released(space));
            }
            if method == Method::Release {
                state.released.insert(space);
            }
            state.seq += 1;
            let number = state.seq;
            state.rounds.push((number, (space, range)));
            let seq = Seq::new(number).unwrap();
            let alone = !state.open.values().any(|(id, open)| *id == space && open.overlaps(range));
            state.open.insert(seq, (space, range));
            (answer, seq, number, alone, state.next_random() % 4)
        };
        for _ in 0..yields {
            tokio::task::yield_now().await;
        }
        let meanwhile = self.state.lock().meanwhile.clone();
        if let Some(meanwhile) = meanwhile {
            meanwhile(self, method, space, range);
        }
        let opened = match answer {
            Answer::Held | Answer::HeldNotQuiesced => Gate::Open,
            Answer::HeldLonger | Answer::HeldLongerNotQuiesced => Gate::Wide,
            Answer::Quiesced | Answer::NotQuiesced | Answer::Refused => Gate::Shut,
        };
        self.gate.subscribe().wait_for(|gate| *gate >= opened).await.unwrap();
        let overlaps = |(id, page): (AddressSpaceId, u64)| id == space && range.contains_address(page);
        let mut state = self.state.lock();
        let is_later = |(seq, (id, other)): &(u64, (AddressSpaceId, AddrRange))| {
            *seq > number && *id == space && other.overlaps(range)
        };
        match method {
            // A hint: with another bracket over the page, before it or after, it is an invalidation.
            Method::ChangePte(frame) if alone && !state.rounds.iter().rev().any(is_later) => {
                if answer.is_quiesced()
                    && let Some(grant) = state.grants.get_mut(&(space, range.start()))
                {
                    grant.frame = frame;
                }
            }
            Method::ClearYoung => {}
            _ if answer.is_quiesced() => state.grants.retain(|place, _| !overlaps(*place)),
            _ => {}
        }
        let used = state.young.extract_if(.., |place| overlaps(*place)).count() > 0;
        let young = used && state.reports == Reports::Young;
        if !matches!(method, Method::RangeStart(_)) {
            state.open.remove(&seq);
        }
        drop(state);
        let verdict = if answer.is_quiesced() { Verdict::Quiesced } else { Verdict::NotQuiesced };
        let answered = self.tick();
        let times = RoundTimes {
            called,
            dispatched: called,
            resolved: Some(answered),
            finished: Some(answered),
            answered,
        };
        let host_incarnation = Incarnation::FIRST;
        let targets = Vec::new();
        Ok(RoundResult { verdict, seq: Some(seq), targets, young, dirty: false, host_incarnation, times })
    }
}

impl Answer {
    fn is_quiesced(self) -> bool {
        matches!(self, Self::Quiesced | Self::Held | Self::HeldLonger)
    }
}

impl State {
    fn next_random(&mut self) -> u64 {
        let Some(random) = &mut self.random else { return 0 };
        *random ^= *random << 13;
        *random ^= *random >> 7;
        *random ^= *random << 17;
        *random
    }
}

impl Notifier for Recorder {
    fn register(&self, _name: &str, source: Arc<dyn Translate>) -> Result<AddressSpaceId, NotifyError> {
        assert_eq!(source.source(), "memory");
        let mut state = self.state.lock();
        if state.refuse_spaces {
            return Err(NotifyError::TooManyAddressSpaces { most: 0 });
        }
        state.spaces += 1;
        Ok(AddressSpaceId::new(state.spaces).unwrap())
    }

    async fn invalidate_range_start(&self, call: Invalidation) -> Result<RoundResult, NotifyError> {
        assert_eq!(call.wait, Wait::ForTargets);
        self.round(Method::RangeStart(call.cause), call.address_space, call.range).await
    }

    fn invalidate_range_end(&self, space: AddressSpaceId, seq: Seq) -> Result<(), NotifyError> {
        let ended = self.state.lock().open.get(&seq).copied();
        let Some((_, range)) = ended else {
            return Err(NotifyError::BracketUnknown { address_space: space, seq });
        };
        self.record(Method::RangeEnd, space, range);
        self.state.lock().open.remove(&seq);
        Ok(())
    }

    async fn invalidate_page(
        &self,
        space: AddressSpaceId,
        address: u64,
        cause: Cause,
        wait: Wait,
    ) -> Result<RoundResult, NotifyError> {
        assert_eq!(wait, Wait::ForTargets);
        self.round(Method::Page(cause), space, AddrRange::page_of(address, PageSize::BASE)).await
    }

    async fn change_pte(
        &self,
        space: AddressSpaceId,
        translation: Translation,
        wait: Wait,
    ) -> Result<RoundResult, NotifyError> {
        assert_eq!(wait, Wait::ForTargets);
        assert_eq!(translation.access, Access::Read);
        self.check_replacement(space, translation);
        self.round(Method::ChangePte(translation.frame), space, translation.range).await
    }

    async fn clear_flush_young(
        &self,
        space: AddressSpaceId,
        range: AddrRange,
        wait: Wait,
    ) -> Result<RoundResult, NotifyError> {
        assert_eq!(wait, Wait::ForTargets);
        self.round(Method::ClearFlushYoung, space, range).await
    }

    async fn clear_young(
        &self,
        space: AddressSpaceId,
        range: AddrRange,
        wait: Wait,
    ) -> Result<RoundResult, NotifyError> {
        assert_eq!(wait, Wait::ForTargets);
        self.round(Method::ClearYoung, space, range).await
    }

    fn test_young(&self, space: AddressSpaceId, range: AddrRange) -> Result<bool, NotifyError> {
        self.record(Method::TestYoung, space, range);
        Ok(self.state.lock().young.iter().any(|(id, page)| *id == space && range.contains_address(*page)))
    }

    async fn release(&self, space: AddressSpaceId) -> Result<RoundResult, NotifyError> {
        self.round(Method::Release, space, AddrRange::ALL).await
    }
}
