//! One call, over errors and over host agents, until it has its one outcome.
//!
//! ```text
//!   Start(request id) --> QUIESCED: the frames may go
//!      ^    |   |   |
//!      |    |   |   +---> refused for want of room: that is its outcome; another call, by another id
//!      |    |   +-------> NOT_QUIESCED: AwaitRound, again and again
//!      +----+ error, no such round, no such address space: the same id again
//! ```

use std::time::Duration;

use rand::RngExt as _;
use rand::rngs::SmallRng;
use shootdown_client::Moment;
use shootdown_proto::error::Reason;
use shootdown_proto::v1;
use shootdown_proto::v1::{RoundResult, TargetOutcome, Verdict};

use super::ledger::within_the_round;
use super::room::Place;
use super::{BACKOFF, Vmm, VmmError, reason};
use crate::chaos::plan::Broken;

/// How much longer than its deadline an answer may take before the call is tried again.
const SLACK: Duration = Duration::from_secs(2);

/// How long one AwaitRound waits.
const AWAIT: Duration = Duration::from_millis(500);

/// One in so many calls is repeated although its outcome is known.
const ASK_AGAIN: u32 = 8;

/// What became of one try.
enum Tried {
    Told(RoundResult),
    /// There is no room for the call: an outcome, as a result is.
    NoRoom(Reason),
    /// Nobody knows; try again.
    Unknown,
}

/// An outcome.
enum Called {
    Over(RoundResult),
    NoRoom(Refusal),
}

/// A call that was refused for want of room.
struct Refusal {
    request_id: String,
    reason: Reason,
    /// Which host agent it was, if that is certain.
    by: Option<u64>,
}

/// A call that has no outcome yet.
struct Call<'a> {
    request: &'a v1::InvalidateRangeStartRequest,
    place: Place<'a>,
    began: Moment,
    /// Which life of the host agent it was started in at last, and since when: its round is no older.
    life: (u64, Moment),
    /// How often it was started.
    tries: u64,
    /// A try may have waited for room at the host agent.
    may_have_waited: bool,
    /// Which host agent answered a start, and the sequence that it gave.
    answers: Vec<(u64, u64)>,
}

impl Vmm {
    /// Until no device uses the range any more. A call that is refused for want of room has that for its outcome, and
    /// the next is another: it has its own id, and the caller finds that in the request.
    pub(super) async fn quiesce(
        &self,
        request: &mut v1::InvalidateRangeStartRequest,
        random: &mut SmallRng,
    ) -> Result<RoundResult, VmmError> {
        let (name, mut refusals) = (request.request_id.clone(), 0_u64);
        let mut last = None;
        loop {
            match self.call(request, random).await? {
                Called::Over(result) => {
                    // Its place is free again.
                    if let Some(refusal) = last {
                        self.ask_again_what_was_refused(request, refusal).await?;
                    }
                    return Ok(result);
                }
                Called::NoRoom(refusal) => last = Some(refusal),
            }
            refusals += 1;
            request.request_id = format!("{name}-{refusals}");
            tokio::time::sleep(BACKOFF).await;
        }
    }

    /// Until it has its outcome.
    async fn call(
        &self,
        request: &v1::InvalidateRangeStartRequest,
        random: &mut SmallRng,
    ) -> Result<Called, VmmError> {
        let (place, began) = (self.room.enter(pages_of(request)), self.clock.now());
        let (may_have_waited, life, answers) = (false, (self.who_answers().0, began), Vec::new());
        let mut call = Call { request, place, began, life, tries: 0, may_have_waited, answers };
        let (mut waiting, mut missed) = (None, false);
        loop {
            let (life, before) = self.who_answers();
            if waiting.is_none() {
                call.tries += 1;
                if call.life.0 != life {
                    (call.life, call.may_have_waited) = ((life, self.clock.now()), false);
                }
                call.may_have_waited |= call.place.may_have_to_wait();
            }
            let result = match self.one_try(request, waiting).await? {
                Tried::Told(result) => result,
                Tried::NoRoom(reason) => {
                    let by = before.filter(|_| self.who_answers().1 == before);
                    let refusal = Refusal { request_id: request.request_id.clone(), reason, by };
                    return self.on_refused(&call, refusal).map(Called::NoRoom);
                }
                Tried::Unknown => {
                    waiting = None;
                    tokio::time::sleep(BACKOFF).await;
                    continue;
                }
            };
            // Of which life an answer is that came while another began, nobody knows.
            if waiting.is_none() && self.who_answers().0 == life {
                call.answers.push((life, result.seq));
            }
            match result.verdict() {
                Verdict::Quiesced => {
                    self.on_quiesced(&result, &call);
                    self.ask_again(&result, &call, random).await?;
                    return Ok(Called::Over(result));
                }
                // The break: who has not answered in time is taken for quiet.
                Verdict::NotQuiesced if self.shape.rule == Some(Broken::TimeoutIsAck) => {
                    return Ok(Called::Over(result));
                }
                Verdict::NotQuiesced => {
                    self.ledger.lock().not_quiesced_first += u64::from(!missed);
                    missed = true;
                    waiting = Some((result.seq, result.host_incarnation));
                }
                Verdict::WouldBlock | Verdict::Unspecified => {
                    let status = tonic::Status::internal(format!("the verdict is {:?}", result.verdict()));
                    return Err(VmmError::Refused { call: "InvalidateRangeStart", status: Box::new(status) });
                }
            }
        }
    }

    /// Which life of the host agent it is, and which it is that answers, where only one does.
    fn who_answers(&self) -> (u64, Option<u64>) {
        let host = self.host.lock();
        (host.lives, host.the_only_one())
    }

    /// With `waiting`, a sequence and the run that gave it: waits on for that round.
    async fn one_try(
        &self,
        request: &v1::InvalidateRangeStartRequest,
        waiting: Option<(u64, u64)>,
    ) -> Result<Tried, VmmError> {
        let mut client = self.client.clone();
        let answer = async {
            match waiting {
                None => client
                    .invalidate_range_start(request.clone())
                    .await
                    .map(|answer| answer.into_inner().result),
                Some((seq, host_incarnation)) => {
                    let request = v1::AwaitRoundRequest {
                        address_space_id: request.address_space_id,
                        seq,
                        deadline_ms: u64::try_from(AWAIT.as_millis()).ok(),
                        host_incarnation,
                    };
                    client.await_round(request).await.map(|answer| answer.into_inner().result)
                }
            }
        };
        match tokio::time::timeout(self.shape.deadline + AWAIT + SLACK, answer).await {
            Ok(Ok(Some(result))) => Ok(self.of_the_newest(result).map_or(Tried::Unknown, Tried::Told)),
            Ok(Ok(None)) => Err(VmmError::Refused {
                call: "InvalidateRangeStart",
                status: Box::new(tonic::Status::internal("there is no result in the answer")),
            }),
            Ok(Err(status)) => match reason(&status) {
                Some(reason @ (Reason::RoundQuota | Reason::QuarantineFull)) if waiting.is_none() => {
                    Ok(Tried::NoRoom(reason))
                }
                _ => self.may_be_tried_again("InvalidateRangeStart", status).map(|()| Tried::Unknown),
            },
            Err(_) => Ok(Tried::Unknown),
        }
    }

    /// The same, until it has an outcome: a try that nobody asks for any more may leave a bracket open.
    async fn until_told(&self, request: &v1::InvalidateRangeStartRequest) -> Result<Tried, VmmError> {
        loop {
            match self.one_try(request, None).await? {
                Tried::Unknown => tokio::time::sleep(BACKOFF).await,
                told => return Ok(told),
            }
        }
    }

    /// Passes over what a host agent says that was replaced.
    fn of_the_newest(&self, result: RoundResult) -> Option<RoundResult> {
        let mut host = self.host.lock();
        if result.host_incarnation < host.incarnation {
            drop(host);
            self.ledger.lock().superseded_results += 1;
            return None;
        }
        host.incarnation = result.host_incarnation;
        Some(result)
    }

    /// Fails where the host agent refused for a reason that no fault gives it.
    pub(super) fn may_be_tried_again(
        &self,
        call: &'static str,
        status: tonic::Status,
    ) -> Result<(), VmmError> {
        match reason(&status) {
            Some(Reason::HostSuperseded) => {
                self.ledger.lock().superseded_refusals += 1;
                Ok(())
            }
            // Of a host agent that has just started, or stops.
            Some(Reason::AddressSpaceUnknown | Reason::RoundUnknown | Reason::Draining) => Ok(()),
            // Of the transport: it was reset, or nobody answers.
            None if status.code() != tonic::Code::Unimplemented => Ok(()),
            _ => Err(VmmError::Refused { call, status: Box::new(status) }),
        }
    }

    fn on_quiesced(&self, result: &RoundResult, call: &Call<'_>) {
        let (now, round) = (self.clock.now(), Duration::from_nanos(result.elapsed_ns));
        let (_, since) = call.life;
        let stopped = self.host.lock().stood_still(since, now);
        // Of that nobody knows which part was for room: the bound is that of the rest.
        let for_room = if call.may_have_waited { self.shape.deadline } else { Duration::ZERO };
        let excused =
            |idle, until: Moment| round.saturating_sub(within_the_round(idle, until.since(since), round));
        let elapsed = excused(stopped, now).saturating_sub(for_room);
        // To ask costs more than most rounds do.
        let is_long = elapsed > Duration::from_nanos(self.ledger.lock().longest_running_ns);
        let running = if is_long {
            // Nobody waits for a processor while it stands still. The end is taken after the look: what was waited
            // until then was perhaps after the round.
            let idle = stopped + self.stalls.waited_since(since);
            excused(idle, self.clock.now()).saturating_sub(for_room)
        } else {
            elapsed
        };
        let mut ledger = self.ledger.lock();
        ledger.on_round(elapsed, running);
        ledger.on_call(call.tries, now.since(call.began));
        for target in &result.targets {
            match target.outcome() {
                TargetOutcome::Acked => ledger.acked += 1,
                TargetOutcome::Left => ledger.left += 1,
                TargetOutcome::Fenced => ledger.fenced += 1,
                TargetOutcome::Waiting | TargetOutcome::Unspecified => {}
            }
        }
    }

    /// There is no room for it, which is its outcome: it has no bracket, and never gets one.
    fn on_refused(&self, call: &Call<'_>, refusal: Refusal) -> Result<Refusal, VmmError> {
        let has_a_bracket = refusal.by.is_some_and(|by| answered_by(&call.answers, by));
        let mut ledger = self.ledger.lock();
        ledger.refused_for_want_of_room += 1;
        ledger.on_call(call.tries, self.clock.now().since(call.began));
        ledger.retried_with_one_outcome += u64::from(call.tries > 1 && !has_a_bracket);
        drop(ledger);
        if has_a_bracket {
            self.second_outcome(&refusal.request_id, "a bracket")?;
        }
        Ok(refusal)
    }

    /// A call that was refused for want of room stays refused when there is room: with the host agent that refused it.
    async fn ask_again_what_was_refused(
        &self,
        start: &v1::InvalidateRangeStartRequest,
        refusal: Refusal,
    ) -> Result<(), VmmError> {
        let is_its_own_word = || refusal.by.is_some() && self.who_answers().1 == refusal.by;
        if !is_its_own_word() {
            return Ok(());
        }
        let request =
            v1::InvalidateRangeStartRequest { request_id: refusal.request_id.clone(), ..start.clone() };
        let _place = self.room.enter(pages_of(start));
        let told = self.until_told(&request).await?;
        // One that has started meanwhile does not know of it.
        if is_its_own_word() {
            if matches!(told, Tried::NoRoom(reason) if reason == refusal.reason) {
                self.ledger.lock().refused_again += 1;
            } else {
                let first = format!("the refusal {}", refusal.reason.word());
                self.second_outcome(&refusal.request_id, &first)?;
            }
        }
        match told {
            Tried::Told(result) => self.end(&request, &result).await,
            Tried::NoRoom(_) | Tried::Unknown => Ok(()),
        }
    }

    /// A call that was tried more than once had one round only, and it has the same outcome when it is
    /// asked for once more.
    async fn ask_again(
        &self,
        result: &RoundResult,
        call: &Call<'_>,
        random: &mut SmallRng,
    ) -> Result<(), VmmError> {
        let Call { request, tries, answers, .. } = call;
        // Two answers of one life are of one round.
        let mut same = answers.windows(2).all(|pair| pair[0].0 != pair[1].0 || pair[0].1 == pair[1].1);
        if *tries > 1 || random.random_range(0..ASK_AGAIN) == 0 {
            let (life, before) = self.who_answers();
            let again = self.until_told(request).await?;
            let after = self.who_answers();
            // A host agent that has started meanwhile does not know of it.
            let is_known = after.0 == life && answered_by(answers, life);
            match &again {
                Tried::Told(again) if is_known => {
                    same &= again.verdict() == result.verdict() && again.seq == result.seq;
                    self.ledger.lock().asked_again += 1;
                }
                // A refusal does not say whose it is.
                Tried::NoRoom(_) if is_known && before.is_some() && after.1 == before => same = false,
                Tried::Told(_) | Tried::NoRoom(_) | Tried::Unknown => {}
            }
            if let Tried::Told(again) = again
                && (again.seq, again.host_incarnation) != (result.seq, result.host_incarnation)
            {
                let request_id = format!("{}-again", request.request_id);
                let request = v1::InvalidateRangeStartRequest { request_id, ..(*request).clone() };
                self.end(&request, &again).await?;
            }
        }
        self.ledger.lock().retried_with_one_outcome += u64::from(*tries > 1 && same);
        if same { Ok(()) } else { self.second_outcome(&request.request_id, "a bracket") }
    }

    fn second_outcome(&self, request_id: &str, first: &str) -> Result<(), VmmError> {
        self.ledger.lock().second_outcomes += 1;
        Ok(self.found(&format!("request {request_id} has a second outcome; its first was {first}"))?)
    }
}

/// How many pages of it may come into quarantine.
fn pages_of(request: &v1::InvalidateRangeStartRequest) -> usize {
    usize::try_from(request.resident_pages).unwrap_or(usize::MAX)
}

/// Whether the last answer is of the life that is asked again.
fn answered_by(answers: &[(u64, u64)], life: u64) -> bool {
    answers.last().is_some_and(|(answered, _)| *answered == life)
}
