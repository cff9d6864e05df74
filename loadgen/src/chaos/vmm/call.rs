//! One call, over errors and over host agents, until it has its one outcome.
//!
//! ```text
//!   Start(request id) --> QUIESCED: the frames may go
//!      ^    |   |
//!      |    |   +-------> NOT_QUIESCED: AwaitRound, again and again
//!      +----+ error, no such round, no such address space: the same id again
//!           |
//!           +-----------> no room for it: that is the outcome of this id, and another is taken
//! ```

use std::time::Duration;

use rand::RngExt as _;
use rand::rngs::SmallRng;
use shootdown_client::Moment;
use shootdown_proto::error::Reason;
use shootdown_proto::v1;
use shootdown_proto::v1::{RoundResult, TargetOutcome, Verdict};

use super::{BACKOFF, Vmm, VmmError, reason};
use crate::chaos::plan::Broken;

/// How much longer than its deadline an answer may take before the call is tried again.
const SLACK: Duration = Duration::from_secs(2);

/// How long one AwaitRound waits.
const AWAIT: Duration = Duration::from_millis(500);

/// One in so many calls is repeated although its outcome is known.
const ASK_AGAIN: u32 = 8;

/// What became of a try.
enum Tried {
    Told(RoundResult),
    /// There was no room: an outcome.
    Refused(Reason),
    /// Nobody knows; try again.
    Unknown,
}

impl Vmm {
    /// Until no device uses the range any more. Each time that there is no room for the call it takes another id.
    pub(super) async fn quiesce(
        &self,
        request: &mut v1::InvalidateRangeStartRequest,
        random: &mut SmallRng,
    ) -> Result<RoundResult, VmmError> {
        let name = request.request_id.clone();
        let mut refusals = 0_u64;
        loop {
            if let Some(result) = self.call(request, random).await? {
                return Ok(result);
            }
            refusals += 1;
            request.request_id = format!("{name}-{refusals}");
            tokio::time::sleep(BACKOFF).await;
        }
    }

    /// The one outcome of the call; `None`: there was no room for it.
    async fn call(
        &self,
        request: &v1::InvalidateRangeStartRequest,
        random: &mut SmallRng,
    ) -> Result<Option<RoundResult>, VmmError> {
        let began = self.clock.now();
        let (mut tries, mut waiting, mut missed) = (0, None, false);
        let mut answers = Vec::new();
        loop {
            tries += u64::from(waiting.is_none());
            let life = self.host.lock().lives;
            let result = match self.one_try(request, waiting).await? {
                Tried::Told(result) => result,
                Tried::Refused(reason) => {
                    self.ledger.lock().refused_for_want_of_room += 1;
                    self.ask_again_what_was_refused(request, reason, life).await?;
                    return Ok(None);
                }
                Tried::Unknown => {
                    waiting = None;
                    tokio::time::sleep(BACKOFF).await;
                    continue;
                }
            };
            // Of which life it is, is not known of an answer that came while another began.
            if waiting.is_none() && self.host.lock().lives == life {
                answers.push((life, result.seq));
            }
            match result.verdict() {
                Verdict::Quiesced => {
                    self.on_quiesced(&result, began, tries);
                    self.ask_again(request, &result, &answers, tries, random).await?;
                    return Ok(Some(result));
                }
                // The break: who has not answered in time is taken for quiet.
                Verdict::NotQuiesced if self.shape.rule == Some(Broken::TimeoutIsAck) => {
                    return Ok(Some(result));
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
                Some(no_room @ (Reason::RoundQuota | Reason::QuarantineFull)) => Ok(Tried::Refused(no_room)),
                _ => self.may_be_tried_again("InvalidateRangeStart", status).map(|()| Tried::Unknown),
            },
            Err(_) => Ok(Tried::Unknown),
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

    fn on_quiesced(&self, result: &RoundResult, began: Moment, tries: u64) {
        let now = self.clock.now();
        let elapsed = Duration::from_nanos(result.elapsed_ns);
        // The round lies somewhere within the call. Of what happened meanwhile as much was outside of it as the call
        // was longer, and all of that at the worst.
        let outside = now.since(began).saturating_sub(elapsed);
        let within = |excuse: Duration| excuse.saturating_sub(outside);
        let elapsed = elapsed.saturating_sub(within(self.stood_still(began, now)));
        let is_long = elapsed > Duration::from_nanos(self.ledger.lock().longest_running_ns);
        // To ask costs more than most rounds do.
        let waited = if is_long { within(self.stalls.waited_since(began)) } else { Duration::ZERO };
        let mut ledger = self.ledger.lock();
        ledger.on_round(elapsed, waited);
        ledger.on_call(tries, now.since(began));
        for target in &result.targets {
            match target.outcome() {
                TargetOutcome::Acked => ledger.acked += 1,
                TargetOutcome::Left => ledger.left += 1,
                TargetOutcome::Fenced => ledger.fenced += 1,
                TargetOutcome::Waiting | TargetOutcome::Unspecified => {}
            }
        }
    }

    /// What there was no room for is never done, also when there is room.
    async fn ask_again_what_was_refused(
        &self,
        request: &v1::InvalidateRangeStartRequest,
        reason: Reason,
        life: u64,
    ) -> Result<(), VmmError> {
        let again = self.one_try(request, None).await?;
        let same = match again {
            Tried::Told(_) => false,
            Tried::Refused(again) => again == reason,
            Tried::Unknown => return Ok(()),
        };
        // A host agent that has begun meanwhile does it anew: its bracket ends with the address space.
        if !same && self.host.lock().lives == life {
            self.ledger.lock().second_outcomes += 1;
            self.found(&format!("request {} was refused, and is not any more", request.request_id))?;
        }
        Ok(())
    }

    /// A call that was tried more than once had one round only, and it has the same outcome when it is
    /// asked for once more.
    async fn ask_again(
        &self,
        request: &v1::InvalidateRangeStartRequest,
        result: &RoundResult,
        answers: &[(u64, u64)],
        tries: u64,
        random: &mut SmallRng,
    ) -> Result<(), VmmError> {
        // Two answers of one life are of one round.
        let mut same = answers.windows(2).all(|pair| pair[0].0 != pair[1].0 || pair[0].1 == pair[1].1);
        if tries > 1 || random.random_range(0..ASK_AGAIN) == 0 {
            let life = self.host.lock().lives;
            let again = self.one_try(request, None).await?;
            // One that has begun meanwhile does not know of it.
            if self.host.lock().lives == life && answered_by(answers, life) {
                match again {
                    Tried::Told(again) => {
                        same &= again.verdict() == result.verdict() && again.seq == result.seq;
                    }

                    Tried::Refused(_) => same = false,
                    Tried::Unknown => return self.note_outcome(request, same, tries),
                }
                self.ledger.lock().asked_again += 1;
            }
        }
        self.note_outcome(request, same, tries)
    }

    fn note_outcome(
        &self,
        request: &v1::InvalidateRangeStartRequest,
        same: bool,
        tries: u64,
    ) -> Result<(), VmmError> {
        let mut ledger = self.ledger.lock();
        ledger.second_outcomes += u64::from(!same);
        ledger.retried_with_one_outcome += u64::from(tries > 1 && same);
        drop(ledger);
        if !same {
            self.found(&format!("request {} has a second outcome", request.request_id))?;
        }
        Ok(())
    }
}

/// Whether the last answer is of the life that is asked again.
fn answered_by(answers: &[(u64, u64)], life: u64) -> bool {
    answers.last().is_some_and(|(answered, _)| *answered == life)
}
