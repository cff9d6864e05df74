//! A source on a machine of its own: a client of `NotifierService`, which tries again until it knows what became
//! of a call, takes its address spaces back, and answers their faults.
//!
//! ```text
//!   call --> try --answered--------------------> taken, if the run is the newest and knows the address space
//!             |  --no answer for a while-------> another connection, another try; the first may still be answered
//!             |  --the connection is lost------> a pause, another try
//!             +----ADDRESS_SPACE_UNKNOWN-------> registered again, another try
//! ```

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rand::RngExt as _;
use rand::rngs::StdRng;
use shootdown_core::{Access, AddressSpaceId, Translation};
use shootdown_proto::error::Reason;
use shootdown_proto::{convert, v1};
use shootdown_server::source::{FaultError, Translate as _, Wait};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::link::{Ask, Link};
use crate::memory::{PAGES, Tables, range_of};
use crate::observer::Times;
use crate::plan::{Broken, STORM, millis};
use crate::shared::{Shared, Stage};
use crate::trace::{Answer, Called, Frame, Op, Outcome, Pages, Patience, Target, Verdict, What};

/// Its machine.
pub const SOURCE: &str = "source";

/// Address spaces at a time.
const SPACES: usize = 2;

/// Calls in flight at a time.
const MOST_CALLS: usize = 12;

/// Tries of a call that wait at the same time.
const MOST_TRIES: usize = 3;

#[derive(Clone)]
struct Remote {
    shared: Arc<Shared>,
    link: Arc<Link>,
    rng: Arc<Mutex<StdRng>>,
    spaces: Arc<Mutex<BTreeMap<u64, Known>>>,
    /// The pages of the calls that are going on, and whether they are changed.
    going_on: Arc<Mutex<Vec<(Pages, bool)>>>,
    /// Of each call that was answered: how often its address space had been registered by then.
    taken: Arc<Mutex<BTreeMap<Op, u64>>>,
    /// The newest run of the host agent that has answered.
    newest: Arc<Mutex<u64>>,
    /// Held by whoever registers again.
    registering: Arc<tokio::sync::Mutex<()>>,
    broken: Broken,
}

/// What it knows of an address space.
#[derive(Debug, Clone, Copy, Default)]
struct Known {
    /// How often it was registered.
    registered: u64,
    releasing: bool,
}

/// What became of a call.
#[derive(Debug, Clone)]
enum Heard {
    /// An answer that may be used.
    Told(v1::RoundResult),
    /// The run that answers now knows nothing of what was asked for.
    Lost,
    Refused(String),
}

/// From here on, for as long as the world lasts.
pub async fn run(shared: Arc<Shared>) -> turmoil::Result {
    let remote = Remote {
        link: Arc::new(Link::new(Arc::clone(&shared))),
        rng: Arc::new(Mutex::new(shared.rng(5))),
        spaces: Arc::default(),
        going_on: Arc::default(),
        taken: Arc::default(),
        newest: Arc::default(),
        registering: Arc::default(),
        broken: shared.plan.broken,
        shared,
    };
    remote.work().await;
    Ok(())
}

impl Remote {
    async fn work(self) {
        for _ in 0..SPACES {
            self.register().await;
        }
        let mut calls = JoinSet::new();
        while !self.shared.is_past(Stage::Storm) {
            let pause = self.draw(0..self.shared.plan.call_every.as_millis() as u64 * 2);
            tokio::time::sleep(millis(pause)).await;
            while let Some(ended) = calls.try_join_next() {
                ended.expect("a call does not panic");
            }
            if calls.len() < MOST_CALLS {
                calls.spawn(self.clone().call());
            }
        }
        while let Some(ended) = calls.join_next().await {
            ended.expect("a call does not panic");
        }
        self.shared.source_is_done.change(|done| *done = true);
        // Its streams of faults are served until then.
        self.shared.until(Stage::Over).await;
    }

    fn draw(&self, range: Range<u64>) -> u64 {
        if range.is_empty() { range.start } else { self.rng.lock().random_range(range) }
    }

    /// How long it waits before it tries on another connection: most rounds are over by then.
    fn patience(&self) -> Duration {
        self.shared.plan.ack_timeout + self.shared.plan.latency.most * 4
    }

    async fn pause(&self) {
        tokio::time::sleep(millis(self.draw(2..15))).await;
    }

    /// A new address space. An answer that is lost leaves one that nobody knows the name of.
    async fn register(&self) {
        let space = loop {
            match self.try_register(0).await {
                Ok(space) => break space,
                Err(_) => self.pause().await,
            }
        };
        self.spaces.lock().insert(space, Known { registered: 1, releasing: false });
        self.shared.memory.lock().add_space(space);
        self.shared.trace.record(What::Registered { space });
        tokio::spawn(self.clone().serve_faults(space));
    }

    async fn try_register(&self, address_space_id: u64) -> Result<u64, Status> {
        let request = v1::RegisterAddressSpaceRequest {
            name: "simulated".to_owned(),
            strict: true,
            address_space_id,
            ..v1::RegisterAddressSpaceRequest::default()
        };
        let (number, mut client) = self.link.get();
        match tokio::time::timeout(self.patience(), client.register_address_space(request)).await {
            Ok(answer) => Ok(answer?.into_inner().address_space_id),
            Err(_) => {
                self.link.replace(number);
                Err(Status::deadline_exceeded("nobody answers"))
            }
        }
    }

    fn known(&self, space: u64) -> Known {
        self.spaces.lock()[&space]
    }

    /// The host agent does not know the address space that it knew at the `registered`-th time.
    async fn take_back(&self, space: u64, registered: u64) {
        let _alone = self.registering.lock().await;
        while self.known(space).registered == registered {
            let taken = match self.try_register(space).await {
                Ok(_) => true,
                // By a try whose answer was lost.
                Err(refused) => Reason::of_status(&refused) == Some(Reason::FieldInvalid),
            };
            if taken {
                self.spaces.lock().entry(space).and_modify(|known| known.registered += 1);
                self.shared.trace.record(What::Registered { space });
            } else {
                self.pause().await;
            }
        }
    }

    // Faults.

    /// Answers the faults of an address space until it is released, on one stream after the other.
    async fn serve_faults(self, space: u64) {
        let rng = Mutex::new(self.shared.rng(6 + (space << 8)));
        let tables = Arc::new(Tables { shared: Arc::clone(&self.shared), rng, migrations: None });
        while self.shared.memory.lock().live_spaces().contains(&space) {
            let known = self.known(space);
            let ended = self.serve_stream(space, &tables).await;
            let reason = ended.as_ref().err().and_then(Reason::of_status);
            if reason == Some(Reason::AddressSpaceUnknown) && !self.known(space).releasing {
                self.take_back(space, known.registered).await;
            }
            self.pause().await;
        }
    }

    async fn serve_stream(&self, space: u64, tables: &Arc<Tables>) -> Result<(), Status> {
        let (tx, rx) = mpsc::channel(64);
        let open = v1::ServeFaultsOpen { address_space_id: space };
        let open = v1::serve_faults_request::Message::Open(open);
        drop(tx.try_send(v1::ServeFaultsRequest { message: Some(open) }));
        let (number, mut client) = self.link.get();
        let opened = tokio::time::timeout(self.patience(), client.serve_faults(ReceiverStream::new(rx)));
        let Ok(opened) = opened.await else {
            self.link.replace(number);
            return Ok(());
        };
        let mut questions = opened?.into_inner();
        let registered = self.known(space).registered;
        let mut silent = Duration::ZERO;
        loop {
            let Ok(question) = tokio::time::timeout(LOOK, questions.message()).await else {
                silent += LOOK;
                // A connection may be lost without a word, and then nothing more is asked on it; who asks now
                // may be another.
                if silent >= SILENCE || self.known(space).registered != registered {
                    return Ok(());
                }
                continue;
            };
            silent = Duration::ZERO;
            let Some(asked) = question?.and_then(|said| said.asked) else { return Ok(()) };
            let (tables, tx) = (Arc::clone(tables), tx.clone());
            tokio::spawn(async move { drop(tx.send(answer_fault(space, &tables, asked).await).await) });
        }
    }

    // Calls.

    /// One call, drawn at random.
    async fn call(self) {
        let spaces = self.shared.memory.lock().live_spaces();
        let Some(space) = spaces.get(self.draw(0..spaces.len() as u64) as usize).copied() else { return };
        if self.known(space).releasing {
            return;
        }
        let page = self.draw(0..PAGES);
        let end = self.draw(page + 1..PAGES + 1);
        let wait = match self.draw(0..6) {
            0 => Wait::AtMost(millis(self.draw(0..self.shared.plan.ack_timeout.as_millis() as u64))),
            1 => Wait::AtMost(self.shared.plan.ack_timeout * 2),
            _ => Wait::ForTargets,
        };
        let drawn = self.draw(0..40);
        let (pages, called) = match drawn {
            0..12 => (page..page + 1, Called::Page),
            28..35 => (page..page + 1, Called::ChangePte(Frame { index: 0, generation: 0 })),
            39.. => (0..PAGES, Called::Release),
            _ => (page..end, Called::RangeStart),
        };
        let Some(_busy) = self.begin(Pages { space, pages }, called) else { return };
        match drawn {
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
                    return self.free_if(true, op, space, frames);
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
        self.free_if(started.verdict() == v1::Verdict::Quiesced, op, space, frames);
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
        let op = self.shared.trace.next_op();
        let patience = match wait {
            Wait::ForTargets => Patience::Unlimited,
            Wait::AtMost(limit) => Patience::AtMost(limit),
            Wait::NotAtAll => Patience::None,
        };
        let pages = Pages { space, pages };
        self.shared.trace.record(What::Call { op, called, pages: pages.clone(), patience });
        (op, Ask::Call { called, pages, wait, translation: None })
    }

    async fn free_when_told(&self, (op, asked): (Op, Ask), frames: Vec<Frame>) {
        match self.tell(op, &asked).await {
            Heard::Told(result) => self.free_after(op, asked, result, frames).await,
            Heard::Lost | Heard::Refused(_) => self.free_if(false, op, asked.space(), frames),
        }
    }

    /// When the round is quiesced, however often it has to be begun anew.
    async fn free_after(&self, op: Op, asked: Ask, result: v1::RoundResult, frames: Vec<Frame>) {
        let (mut op, mut result) = (op, result);
        let space = asked.space();
        loop {
            match self.wait_on(op, &asked, result).await {
                Some(true) => return self.free_if(true, op, space, frames),
                None => return self.free_if(false, op, space, frames),
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
                Heard::Lost | Heard::Refused(_) => return self.free_if(false, op, space, frames),
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

    fn free_if(&self, quiesced: bool, op: Op, space: u64, frames: Vec<Frame>) {
        let mut memory = self.shared.memory.lock();
        if quiesced {
            memory.free(op, frames, &self.shared.trace);
        } else {
            memory.orphan(space, frames, &self.shared.trace);
        }
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

    /// Until it is known what became of it.
    async fn ask(&self, op: Op, ask: &Ask) -> Heard {
        let mut tries = Tries::default();
        let (mut patience, then) = match self.broken {
            // New calls go to the successor; this one waits for whom it has called.
            Broken::OldAnswerTaken => (self.patience(), STORM),
            _ => (self.patience(), self.patience()),
        };
        loop {
            if tries.set.is_empty() {
                self.begin_try(op, ask, &mut tries);
            }
            let tried = tokio::select! {
                biased;
                // First: an answer is better than another try.
                tried = tries.set.join_next() => tried,
                () = tokio::time::sleep(patience) => {
                    self.link.replace(tries.connection);
                    if patience == then {
                        self.begin_try(op, ask, &mut tries);
                    }
                    patience = then;
                    continue;
                }
            };
            let Some(Ok((registered, answer))) = tried else { continue };
            match answer {
                Ok(result) => {
                    if let Some(heard) = self.on_answer(op, ask, registered, result) {
                        return heard;
                    }
                    self.pause().await;
                }
                Err(status) => {
                    if let Some(heard) = self.on_refused(op, ask, registered, &status).await {
                        return heard;
                    }
                    self.pause().await;
                }
            }
        }
    }

    fn begin_try(&self, op: Op, ask: &Ask, tries: &mut Tries) {
        let name = match ask {
            Ask::Call { .. } | Ask::Await { .. } => "",
            Ask::End { .. } => "-end",
        };
        let id = match self.broken {
            Broken::RetryWithNewId => format!("{}{name}-{}", op.0, tries.begun),
            _ => format!("{}{name}", op.0),
        };
        tries.begun += 1;
        let (connection, client) = self.link.get();
        let registered = self.known(ask.space()).registered;
        if matches!(ask, Ask::Call { .. }) {
            self.shared.trace.record(What::Sent { op });
        }
        let sent = ask.clone().send(client, id);
        tries.connection = connection;
        tries.handles.push_back(tries.set.spawn(async move { (registered, sent.await) }));
        tries.handles.retain(|handle| !handle.is_finished());
        if tries.handles.len() > MOST_TRIES {
            tries.handles.pop_front().expect("there are several").abort();
        }
    }

    /// `None`: it may not be used.
    fn on_answer(
        &self,
        op: Op,
        ask: &Ask,
        registered: u64,
        result: Option<v1::RoundResult>,
    ) -> Option<Heard> {
        // An end says nothing, so nobody can be deceived by it.
        let Some(result) = result else { return Some(Heard::Lost) };
        let (host, seq) = (result.host_incarnation, Some(result.seq).filter(|seq| *seq > 0));
        if matches!(ask, Ask::Call { .. }) {
            self.shared.trace.record(What::Heard { op, host, registered, seq });
        }
        let mut newest = self.newest.lock();
        // A lower one has a successor; and what was asked before the address space was registered again is asked
        // again, so that this is not the answer to it.
        let is_old = host < *newest || registered != self.known(ask.space()).registered;
        *newest = host.max(*newest);
        if is_old && self.broken != Broken::OldAnswerTaken {
            return None;
        }
        self.taken.lock().insert(op, registered);
        Some(Heard::Told(result))
    }

    /// `None`: it is tried again.
    async fn on_refused(&self, op: Op, ask: &Ask, registered: u64, status: &Status) -> Option<Heard> {
        let space = ask.space();
        match Reason::of_status(status) {
            Some(Reason::AddressSpaceUnknown) => {
                let is_release = matches!(ask, Ask::Call { called: Called::Release, .. });
                if self.known(space).releasing && !is_release {
                    return Some(Heard::Refused(status.message().to_owned()));
                }
                if let Ask::End { .. } = ask {
                    return Some(Heard::Lost);
                }
                self.take_back(space, registered).await;
                matches!(ask, Ask::Await { .. }).then_some(Heard::Lost)
            }
            Some(Reason::RoundUnknown) => {
                // Whoever told of the round, and knows the address space as it did then, knows the round. It may have been
                // registered anew, and the answer to that is on its way.
                drop(self.registering.lock().await);
                let is_gone = self.taken.lock().get(&op) != Some(&self.known(space).registered);
                assert!(is_gone || self.broken != Broken::Nothing, "{op:?}: {}", status.message());
                Some(Heard::Lost)
            }
            Some(Reason::AddressSpaceReleased) => Some(Heard::Refused(status.message().to_owned())),
            Some(Reason::Draining | Reason::HostSuperseded) | None => None,
            Some(_) => Some(Heard::Refused(status.message().to_owned())),
        }
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

/// After so long without a question a stream is opened anew.
const SILENCE: Duration = millis(250);

/// How often it looks whether that is so.
const LOOK: Duration = millis(20);

/// Tries of one call.
#[derive(Default)]
struct Tries {
    set: JoinSet<(u64, Result<Option<v1::RoundResult>, Status>)>,
    /// The oldest first.
    handles: VecDeque<AbortHandle>,
    begun: u64,
    /// The one of the newest.
    connection: u64,
}

async fn answer_fault(space: u64, tables: &Tables, asked: v1::FaultAsked) -> v1::ServeFaultsRequest {
    let fault_id = asked.fault_id;
    let id = AddressSpaceId::new(space).expect("it was given out");
    let range = convert::required_range(asked.range, "range").expect("the host agent asks for a range");
    let message = match tables.fault(id, range, Access::Write).await {
        Ok(translations) => {
            let translations = translations.into_iter().map(convert::wire_translation).collect();
            v1::serve_faults_request::Message::Translated(v1::FaultTranslated { fault_id, translations })
        }
        Err(error) => {
            let (reason, address) = match error {
                FaultError::Unmapped { address } => (v1::ErrorReason::FaultUnmapped, address),
                _ => (v1::ErrorReason::OutOfMemory, range.start()),
            };
            let reason = reason.into();
            v1::serve_faults_request::Message::Declined(v1::FaultDeclined { fault_id, reason, address })
        }
    };
    v1::ServeFaultsRequest { message: Some(message) }
}
