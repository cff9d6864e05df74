//! Its calls, as `mm/` makes them, and what it does with the frames when it is told.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use shootdown_core::{Access, Translation};
use shootdown_proto::v1;
use shootdown_server::source::Wait;

use super::Remote;
use super::tries::Heard;
use crate::calls::Drawn;
use crate::link::Ask;
use crate::memory::{PAGES, range_of};
use crate::observer::Times;
use crate::plan::{Broken, millis};
use crate::shared::Stage;
use crate::trace::{Answer, Called, Frame, Op, Outcome, Pages, Target, Verdict, What};

impl Remote {
    /// One call, drawn at random.
    pub(super) async fn call(self) {
        let Some(space) = self.calls.draw_space() else { return };
        if self.known(space).releasing {
            return;
        }
        let Drawn { page, end, wait, which } = self.calls.draw_call();
        let (pages, called) = match which {
            0..12 => (page..page + 1, Called::Page),
            28..35 => (page..page + 1, Called::ChangePte(Frame { index: 0, generation: 0 })),
            39.. => (0..PAGES, Called::Release),
            _ => (page..end, Called::RangeStart),
        };
        let Some(_busy) = self.begin(Pages { space, pages }, called) else { return };
        match which {
            0..12 => self.unmap_page(space, page, wait).await,
            12..26 => self.unmap_range(space, page..end, wait).await,
            26..28 => self.try_range(space, page..end).await,
            28..35 => self.change_pte(space, page, wait).await,
            35..37 => self.young(space, page..end, Called::ClearFlushYoung, wait).await,
            37..39 => self.young(space, page..end, Called::ClearYoung, wait).await,
            _ => self.release(space).await,
        }
    }

    /// Calls arrive in another order than they are made in, so a new translation may come after the call that
    /// takes it away: whoever changes a page has it to himself until he is answered. The kernel's page table lock
    /// does as much.
    fn begin(&self, pages: Pages, called: Called) -> Option<Busy> {
        let is_change = matches!(called, Called::ChangePte(_));
        let mut going_on = self.going_on.lock();
        let in_the_way = |(other, changes): &(Pages, bool)| other.overlaps(&pages) && (is_change || *changes);
        if going_on.iter().any(in_the_way) {
            return None;
        }
        going_on.push((pages.clone(), is_change));
        Some(Busy { going_on: Arc::clone(&self.going_on), this: (pages, is_change) })
    }

    /// `try_to_unmap`.
    async fn unmap_page(&self, space: u64, page: u64, wait: Wait) {
        let frames = self.shared.memory.lock().take(space, page..page + 1);
        let asked = self.ask_for(space, page..page + 1, Called::Page, wait);
        self.free_when_told(asked, frames).await;
    }

    /// `unmap_region`: the entries are cleared inside of the bracket, in the step in which it is known to be quiesced.
    async fn unmap_range(&self, space: u64, pages: Range<u64>, wait: Wait) {
        loop {
            let (op, asked) = self.ask_for(space, pages.clone(), Called::RangeStart, wait);
            let Heard::Told(started) = self.tell(op, &asked).await else { return };
            let seq = started.seq;
            if started.verdict() != v1::Verdict::Quiesced && self.draw(0..2) == 0 {
                // The caller does not wait any longer; what it unmapped stays parked.
                let frames = self.shared.memory.lock().take(space, pages);
                self.end(op, space, seq).await;
                return self.free_after(op, asked, started, frames).await;
            }
            match self.wait_on(op, &asked, started).await {
                Some(true) => {
                    let frames = self.shared.memory.lock().take(space, pages);
                    tokio::time::sleep(millis(self.draw(0..4))).await;
                    self.end(op, space, seq).await;
                    return self.calls.free_if(true, op, space, frames);
                }
                // Its bracket is gone with the run that it was of, and nothing was unmapped yet.
                Some(false) => self.shared.trace.record(What::Ended { op }),
                None => return self.shared.trace.record(What::Ended { op }),
            }
        }
    }

    /// A caller that must not sleep: with a device in its way nothing happens, however late a try arrives that was
    /// lost on the way.
    async fn try_range(&self, space: u64, pages: Range<u64>) {
        let (op, asked) = self.ask_for(space, pages.clone(), Called::RangeStart, Wait::NotAtAll);
        let Heard::Told(started) = self.tell(op, &asked).await else { return };
        if started.verdict() == v1::Verdict::WouldBlock {
            return;
        }
        let frames = self.shared.memory.lock().take(space, pages);
        tokio::time::sleep(millis(self.draw(0..4))).await;
        self.end(op, space, started.seq).await;
        self.calls.free_if(started.verdict() == v1::Verdict::Quiesced, op, space, frames);
    }

    /// `replace_page`, as KSM does it.
    async fn change_pte(&self, space: u64, page: u64, wait: Wait) {
        let replaced = self.shared.memory.lock().replace(space, page, &self.shared.trace);
        let Ok((fresh, old)) = replaced else { return };
        let (op, mut asked) = self.ask_for(space, page..page + 1, Called::ChangePte(fresh), wait);
        if let Ask::Call { translation, .. } = &mut asked {
            let range = range_of(page..page + 1);
            *translation = Some(Translation { range, frame: fresh.number(), access: Access::Write });
        }
        self.free_when_told((op, asked), old.into_iter().collect()).await;
    }

    async fn young(&self, space: u64, pages: Range<u64>, called: Called, wait: Wait) {
        let asked = self.ask_for(space, pages, called, wait);
        self.free_when_told(asked, Vec::new()).await;
    }

    /// `exit_mmap`: the release comes first, then everything is unmapped.
    async fn release(&self, space: u64) {
        let was_releasing = self
            .spaces
            .lock()
            .get_mut(&space)
            .is_none_or(|known| std::mem::replace(&mut known.releasing, true));
        if was_releasing {
            return;
        }
        loop {
            let (op, asked) = self.ask_for(space, 0..PAGES, Called::Release, Wait::ForTargets);
            // A try after NOT_QUIESCED waits on.
            match self.tell(op, &asked).await {
                Heard::Told(result) if result.verdict() == v1::Verdict::Quiesced => {
                    self.shared.memory.lock().release(op, space, &self.shared.trace);
                    if !self.shared.is_past(Stage::Storm) {
                        self.register().await;
                    }
                    return;
                }
                Heard::Told(_) | Heard::Lost => {}
                Heard::Refused(_) => return,
            }
        }
    }

    fn ask_for(&self, space: u64, pages: Range<u64>, called: Called, wait: Wait) -> (Op, Ask) {
        let pages = Pages { space, pages };
        let op = self.calls.begin(pages.clone(), called, wait);
        (op, Ask::Call { called, pages, wait, translation: None })
    }

    async fn free_when_told(&self, (op, asked): (Op, Ask), frames: Vec<Frame>) {
        match self.tell(op, &asked).await {
            Heard::Told(result) => self.free_after(op, asked, result, frames).await,
            Heard::Lost | Heard::Refused(_) => self.calls.free_if(false, op, asked.space(), frames),
        }
    }

    /// When the round is quiesced, however often it has to be begun anew.
    async fn free_after(&self, op: Op, asked: Ask, result: v1::RoundResult, frames: Vec<Frame>) {
        let (mut op, mut result) = (op, result);
        let space = asked.space();
        loop {
            match self.wait_on(op, &asked, result).await {
                Some(true) => return self.calls.free_if(true, op, space, frames),
                None => return self.calls.free_if(false, op, space, frames),
                Some(false) => {}
            }
            // The round went with its run: whoever has the pages since then must hear of it anew.
            let again;
            (op, again) = self.ask_for(space, 0..PAGES, Called::RangeStart, Wait::ForTargets);
            match self.tell(op, &again).await {
                Heard::Told(told) => {
                    self.end(op, space, told.seq).await;
                    result = told;
                }
                Heard::Lost | Heard::Refused(_) => return self.calls.free_if(false, op, space, frames),
            }
        }
    }

    /// Whether the round is quiesced, after as long as it takes; `Some(false)`: it is gone with the run that it was
    /// of. `None`: its address space is being released.
    async fn wait_on(&self, op: Op, asked: &Ask, mut result: v1::RoundResult) -> Option<bool> {
        let space = asked.space();
        while result.verdict() != v1::Verdict::Quiesced {
            if self.broken == Broken::ReleaseOnTimeout {
                return Some(true);
            }
            match self.tell(op, &Ask::Await { space, seq: result.seq }).await {
                Heard::Told(later) => result = later,
                Heard::Lost => return Some(false),
                Heard::Refused(_) => return None,
            }
        }
        Some(true)
    }

    /// The caller ends its bracket; until it says so the bracket is there.
    async fn end(&self, op: Op, space: u64, seq: u64) {
        self.shared.trace.record(What::Ended { op });
        // Where it is lost its bracket is, too.
        self.ask(op, &Ask::End { space, seq }).await;
    }

    /// Asks, and writes down what came of it.
    async fn tell(&self, op: Op, ask: &Ask) -> Heard {
        let heard = self.ask(op, ask).await;
        match &heard {
            Heard::Told(result) => {
                let took = self.shared.plan.host_clock.lasts(Duration::from_nanos(result.elapsed_ns));
                self.shared.trace.record(What::Taken { op, host: result.host_incarnation, took });
                self.shared.trace.record(What::Answered { op, answer: self.answer(ask.space(), result) });
            }
            Heard::Refused(error) => {
                self.shared.trace.record(What::Refused { op, error: error.clone() });
            }
            Heard::Lost => {}
        }
        heard
    }

    fn answer(&self, space: u64, result: &v1::RoundResult) -> Answer {
        let now = crate::clock::virtual_now();
        let times = self.shared.seen.lock().times((result.host_incarnation, space, result.seq));
        assert!(times.is_some() || result.targets.iter().all(|target| target.elapsed_ns == 0), "unseen");
        let unseen = Times { called: now, dispatched: now, resolved: Some(now) };
        let Times { called, dispatched, resolved } = times.unwrap_or(unseen);
        let after = |nanos| called + self.shared.plan.host_clock.lasts(Duration::from_nanos(nanos));
        let target = |target: &v1::Target| {
            let outcome = match target.outcome() {
                v1::TargetOutcome::Acked => Outcome::Acked,
                v1::TargetOutcome::Left => Outcome::Left,
                v1::TargetOutcome::Fenced => Outcome::Fenced,
                v1::TargetOutcome::Waiting | v1::TargetOutcome::Unspecified => Outcome::Waiting,
            };
            let resolved = (outcome != Outcome::Waiting).then(|| after(target.elapsed_ns));
            Target { session: target.session_id, outcome, resolved }
        };
        let verdict = match result.verdict() {
            v1::Verdict::Quiesced => Verdict::Quiesced,
            v1::Verdict::WouldBlock => Verdict::WouldBlock,
            v1::Verdict::NotQuiesced | v1::Verdict::Unspecified => Verdict::NotQuiesced,
        };
        let targets: Vec<Target> = result.targets.iter().map(target).collect();
        let last = targets.iter().filter_map(|target| target.resolved).max();
        Answer {
            verdict,
            seq: Some(result.seq).filter(|seq| *seq > 0),
            young: result.targets.iter().any(|target| target.young),
            targets,
            dispatched,
            // An answer that comes after the end of its bracket does not name the targets any more.
            resolved: last.or(resolved).filter(|_| verdict == Verdict::Quiesced),
        }
    }
}

/// A call is going on.
struct Busy {
    going_on: Arc<Mutex<Vec<(Pages, bool)>>>,
    this: (Pages, bool),
}

impl Drop for Busy {
    fn drop(&mut self) {
        let mut going_on = self.going_on.lock();
        let at = going_on.iter().position(|other| *other == self.this);
        going_on.remove(at.expect("it was put there"));
    }
}
