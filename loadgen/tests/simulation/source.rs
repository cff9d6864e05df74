//! The source: calls the notifier as `mm/` does, and frees what it may.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use shootdown_core::{AddrRange, AddressSpaceId, Cause, Moment, Seq, Translation};
use shootdown_server::Host;
use shootdown_server::source::{
    Invalidation, Notifier as _, NotifyError, Outcome as Became, RoundResult, Strictness, Verdict as Said,
    Wait,
};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::calls::{Calls, Drawn, MOST_CALLS, SPACES};
use crate::memory::{Migration, PAGE, PAGES, Tables, range_of};
use crate::plan::{Broken, millis};
use crate::shared::{Shared, Stage};
use crate::trace::{Answer, Called, CutOffBy, Frame, Op, Outcome, Pages, Target, Verdict, What};

#[derive(Clone)]
pub struct Source {
    shared: Arc<Shared>,
    host: Host,
    calls: Calls,
    /// Which run of the host agent it calls.
    run: u64,
    /// How often it had been asked to stop when it began.
    asked_before: u64,
    migrations: mpsc::Sender<Migration>,
}

/// Why the source calls nobody any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    StormIsOver,
    /// The host agent is about to stop.
    AskedTo,
}

impl Source {
    /// And what its page tables ask it for.
    pub fn new(shared: Arc<Shared>, host: Host, run: u64) -> (Self, mpsc::Receiver<Migration>) {
        let calls = Calls::new(Arc::clone(&shared), 1 + (run << 32));
        let asked_before = shared.agents[0].handovers_asked.get();
        let (migrations, asked_for) = mpsc::channel(MOST_CALLS);
        (Self { shared, host, calls, run, asked_before, migrations }, asked_for)
    }

    /// Calls until the storm is over, or the host agent is about to stop, and returns when every call has come
    /// to its end.
    pub async fn run(self, mut asked_for: mpsc::Receiver<Migration>) -> Ended {
        let known = self.shared.memory.lock().live_spaces();
        for space in &known {
            let strictness = self.strictness(*space);
            let taken_back = self.host.take_back(id(*space), "simulated", self.tables(), strictness);
            taken_back.expect("nobody else has it");
        }
        for _ in known.len()..SPACES {
            self.register();
        }
        let mut calls = JoinSet::new();
        // What nobody was told of when the run before crashed.
        let unanswered = self.shared.memory.lock().to_ask_again();
        for (space, frames) in unanswered {
            let source = self.clone();
            calls.spawn(async move { source.ask_again(space, frames).await });
        }
        while !self.shared.is_past(Stage::Storm) && !self.is_asked_to_stop() {
            let pause = self.draw(0..self.shared.plan.call_every.as_millis() as u64 * 2);
            let next = tokio::time::Instant::now() + millis(pause);
            while let Ok(Some(migration)) = tokio::time::timeout_at(next, asked_for.recv()).await {
                let source = self.clone();
                calls.spawn(async move { source.migrate(migration).await });
            }
            while let Some(ended) = calls.try_join_next() {
                ended.expect("a call does not panic");
            }
            if calls.len() < MOST_CALLS {
                calls.spawn(self.clone().call());
            }
        }
        // Who still asks goes on without.
        drop(asked_for);
        while let Some(ended) = calls.join_next().await {
            ended.expect("a call does not panic");
        }
        if !self.is_asked_to_stop() {
            return Ended::StormIsOver;
        }
        // Its memory is of this process.
        let spaces = self.shared.memory.lock().live_spaces();
        for space in spaces {
            self.release(space).await;
        }
        Ended::AskedTo
    }

    fn is_asked_to_stop(&self) -> bool {
        self.shared.agents[0].handovers_asked.get() > self.asked_before
    }

    fn register(&self) {
        // Each second one admits everybody, where there is anybody who would not be admitted.
        let has_unstoppable = self
            .shared
            .plan
            .devices
            .iter()
            .any(|device| self.shared.plan.cut_off_by(device.index) == Some(CutOffBy::Administrator));
        let is_lenient = has_unstoppable && self.shared.next_is_lenient();
        let strictness = if is_lenient { Strictness::Lenient } else { Strictness::Strict };
        let registered = self.host.register_address_space("simulated", self.tables(), strictness);
        let id = registered.expect("there is room for it").get();
        if is_lenient {
            self.shared.lenient.lock().insert(id);
        }
        self.shared.memory.lock().add_space(id);
    }

    fn strictness(&self, space: u64) -> Strictness {
        if self.shared.lenient.lock().contains(&space) { Strictness::Lenient } else { Strictness::Strict }
    }

    fn tables(&self) -> Arc<Tables> {
        let rng = Mutex::new(self.shared.rng(2 + (self.run << 32)));
        Arc::new(Tables { shared: Arc::clone(&self.shared), rng, migrations: Some(self.migrations.clone()) })
    }

    /// The host agent has crashed since it was asked: it is asked anew, and whoever waits, waits for that.
    async fn ask_again(&self, space: u64, frames: Vec<Frame>) {
        let is_live = self.shared.memory.lock().live_spaces().contains(&space);
        if !is_live {
            return self.shared.memory.lock().orphan(space, frames, &self.shared.trace);
        }
        let op = self.begin(space, 0..PAGES, Called::RangeStart, Wait::ForTargets);
        let told =
            self.host.invalidate_range_start(self.invalidation(op, space, 0..PAGES, Wait::ForTargets)).await;
        if let Some(seq) = told.as_ref().ok().and_then(|result| result.seq) {
            self.end(op, space, seq);
        }
        self.free_when_told(op, space, told, frames).await;
    }

    fn draw(&self, range: Range<u64>) -> u64 {
        self.calls.draw(range)
    }

    /// One call, drawn at random.
    async fn call(self) {
        let Some(space) = self.calls.draw_space() else { return };
        let Drawn { page, end, wait, which } = self.calls.draw_call();
        match which {
            0..14 => self.unmap_page(space, page, wait).await,
            14..24 => self.unmap_range(space, page..end, wait).await,
            24..29 => self.change_pte(space, page, wait).await,
            29..32 => self.young(space, page..end, Called::ClearFlushYoung, wait).await,
            32..34 => self.young(space, page..end, Called::ClearYoung, wait).await,
            34..36 => self.try_range(space, page..end).await,
            36..39 => self.abandon(space, page).await,
            _ => self.release(space).await,
        }
    }

    /// `try_to_unmap`: the entry is cleared, then the devices are told, then the frame is freed.
    async fn unmap_page(&self, space: u64, page: u64, wait: Wait) {
        let frames = self.shared.memory.lock().take(space, page..page + 1);
        let op = self.begin(space, page..page + 1, Called::Page, wait);
        let told = self.host.invalidate_page(id(space), page << 12, Cause::Unmap, wait).await;
        self.free_when_told(op, space, told, frames).await;
    }

    /// `unmap_region`: the entries are cleared inside of the bracket.
    async fn unmap_range(&self, space: u64, pages: Range<u64>, wait: Wait) {
        let op = self.begin(space, pages.clone(), Called::RangeStart, wait);
        let invalidation = self.invalidation(op, space, pages.clone(), wait);
        let Ok(started) = self.note(op, self.host.invalidate_range_start(invalidation).await) else { return };
        let seq = started.seq.expect("a round that waits has a sequence");
        if started.is_quiesced() || self.draw(0..2) == 0 {
            let quiesced = self.wait_on(op, space, started).await;
            let frames = self.shared.memory.lock().take(space, pages);
            tokio::time::sleep(millis(self.draw(0..4))).await;
            self.end(op, space, seq);
            self.calls.free_if(quiesced, op, space, frames);
        } else {
            // The caller does not wait any longer; what it unmapped stays parked.
            let frames = self.shared.memory.lock().take(space, pages);
            self.end(op, space, seq);
            self.free_when_told(op, space, Ok(started), frames).await;
        }
    }

    /// A caller that must not sleep: with a device in its way nothing happens.
    async fn try_range(&self, space: u64, pages: Range<u64>) {
        let op = self.begin(space, pages.clone(), Called::RangeStart, Wait::NotAtAll);
        let invalidation = self.invalidation(op, space, pages.clone(), Wait::NotAtAll);
        let Ok(started) = self.note(op, self.host.invalidate_range_start(invalidation).await) else { return };
        if started.verdict == Said::WouldBlock {
            return;
        }
        let frames = self.shared.memory.lock().take(space, pages);
        tokio::time::sleep(millis(self.draw(0..4))).await;
        self.end(op, space, started.seq.expect("it was not refused"));
        self.calls.free_if(started.is_quiesced(), op, space, frames);
    }

    /// `replace_page`, as KSM does it.
    async fn change_pte(&self, space: u64, page: u64, wait: Wait) {
        let replaced = self.shared.memory.lock().replace(space, page, &self.shared.trace);
        let Ok((fresh, old)) = replaced else { return };
        let op = self.begin(space, page..page + 1, Called::ChangePte(fresh), wait);
        let access = shootdown_core::Access::Write;
        let translation = Translation { range: range_of(page..page + 1), frame: fresh.number(), access };
        let told = self.host.change_pte(id(space), translation, wait).await;
        self.free_when_told(op, space, told, old.into_iter().collect()).await;
    }

    async fn young(&self, space: u64, pages: Range<u64>, called: Called, wait: Wait) {
        let op = self.begin(space, pages.clone(), called, wait);
        let range = self.bytes_of(op, pages);
        let told = match called {
            Called::ClearFlushYoung => self.host.clear_flush_young(id(space), range, wait).await,
            _ => self.host.clear_young(id(space), range, wait).await,
        };
        self.free_when_told(op, space, told, Vec::new()).await;
    }

    /// A caller is killed while it waits. The pages are unmapped, so somebody else has to ask again.
    async fn abandon(&self, space: u64, page: u64) {
        let frames = self.shared.memory.lock().take(space, page..page + 1);
        let patience = millis(self.draw(0..20));
        let op = self.begin(space, page..page + 1, Called::RangeStart, Wait::ForTargets);
        let invalidation = self.invalidation(op, space, page..page + 1, Wait::ForTargets);
        let start = self.host.invalidate_range_start(invalidation);
        match tokio::time::timeout(patience, start).await {
            Ok(started) => {
                if let Some(seq) = started.as_ref().ok().and_then(|result| result.seq) {
                    self.end(op, space, seq);
                }
                self.free_when_told(op, space, started, frames).await;
            }
            Err(_) => {
                self.shared.trace.record(What::Abandoned { op });
                let op = self.begin(space, page..page + 1, Called::Page, Wait::ForTargets);
                let told =
                    self.host.invalidate_page(id(space), page << 12, Cause::Unmap, Wait::ForTargets).await;
                self.free_when_told(op, space, told, frames).await;
            }
        }
    }

    /// `exit_mmap`: the release comes first, then everything is unmapped.
    async fn release(&self, space: u64) {
        let op = self.begin(space, 0..PAGES, Called::Release, Wait::ForTargets);
        if let Ok(result) = self.note(op, self.host.release(id(space)).await)
            && self.wait_on(op, space, result).await
        {
            self.shared.memory.lock().release(op, space, &self.shared.trace);
            if !self.is_asked_to_stop() {
                self.register();
            }
        }
    }

    fn invalidation(&self, op: Op, space: u64, pages: Range<u64>, wait: Wait) -> Invalidation {
        Invalidation {
            address_space: id(space),
            range: self.bytes_of(op, pages),
            cause: Cause::Unmap,
            owner: None,
            wait,
            resident_pages: None,
        }
    }

    /// The pages, or bytes in the first to bytes in the last of them: what a program unmaps it need not name by pages.
    fn bytes_of(&self, op: Op, pages: Range<u64>) -> AddrRange {
        let whole = range_of(pages);
        if self.draw(0..3) > 0 {
            return whole;
        }
        let (start, end) =
            (whole.start() + self.draw(0..PAGE / 2), whole.last() + 1 - self.draw(0..PAGE / 2));
        self.shared.trace.record(What::Announced { op, bytes: start..end });
        AddrRange::new(start, end).expect("the halves of a page do not meet")
    }

    /// `do_numa_page`: a page is moved because a device has faulted it, and the fault waits until nobody has the old one.
    async fn migrate(&self, Migration { space, page, moved }: Migration) {
        let frames = self.shared.memory.lock().take(space, page..page + 1);
        let op = self.begin(space, page..page + 1, Called::Page, Wait::ForTargets);
        self.shared.trace.record(What::InFault { op });
        let told = self.host.invalidate_page(id(space), page << 12, Cause::Migrate, Wait::ForTargets).await;
        self.free_when_told(op, space, told, frames).await;
        drop(moved);
    }

    fn begin(&self, space: u64, pages: Range<u64>, called: Called, wait: Wait) -> Op {
        self.calls.begin(Pages { space, pages }, called, wait)
    }

    fn note(&self, op: Op, told: Result<RoundResult, NotifyError>) -> Result<RoundResult, NotifyError> {
        match &told {
            Ok(result) => self.shared.trace.record(What::Answered { op, answer: self.answer(result) }),
            Err(error) => self.shared.trace.record(What::Refused { op, error: error.to_string() }),
        }
        told
    }

    fn end(&self, op: Op, space: u64, seq: Seq) {
        match self.host.invalidate_range_end(id(space), seq) {
            // Its address space came to its end meanwhile, and its brackets with it.
            Ok(()) | Err(NotifyError::AddressSpaceUnknown(_)) => self.shared.trace.record(What::Ended { op }),
            Err(error) => self.shared.trace.record(What::Refused { op, error: error.to_string() }),
        }
    }

    async fn free_when_told(
        &self,
        op: Op,
        space: u64,
        told: Result<RoundResult, NotifyError>,
        frames: Vec<Frame>,
    ) {
        let quiesced = match self.note(op, told) {
            Ok(result) => self.wait_on(op, space, result).await,
            Err(_) => false,
        };
        self.calls.free_if(quiesced, op, space, frames);
    }

    /// Whether the round is quiesced, after as long as it takes. `false`: its address space was released.
    async fn wait_on(&self, op: Op, space: u64, mut result: RoundResult) -> bool {
        while !result.is_quiesced() {
            if self.shared.plan.broken == Broken::ReleaseOnTimeout {
                return true;
            }
            let seq = result.seq.expect("a round that waits has a sequence");
            match self.note(op, self.host.await_round(id(space), seq, Wait::ForTargets).await) {
                Ok(later) => result = later,
                Err(_) => return false,
            }
        }
        true
    }

    fn answer(&self, result: &RoundResult) -> Answer {
        let when = |moment: Moment| -> Duration { self.shared.plan.host_clock.when(moment) };
        let target = |report: &shootdown_server::source::TargetReport| Target {
            session: report.session.get(),
            outcome: match report.outcome {
                Became::Waiting => Outcome::Waiting,
                Became::Acked => Outcome::Acked,
                Became::Left => Outcome::Left,
                Became::Fenced => Outcome::Fenced,
            },
            resolved: report.resolved_at.map(when),
        };
        Answer {
            verdict: match result.verdict {
                Said::Quiesced => Verdict::Quiesced,
                Said::NotQuiesced => Verdict::NotQuiesced,
                Said::WouldBlock => Verdict::WouldBlock,
            },
            seq: result.seq.map(Seq::get),
            targets: result.targets.iter().map(target).collect(),
            dispatched: when(result.times.dispatched),
            young: result.young,
            resolved: result.times.resolved.map(when),
        }
    }
}

fn id(space: u64) -> AddressSpaceId {
    AddressSpaceId::new(space).expect("it was given out")
}
