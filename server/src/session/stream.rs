//! [4 of 9] The outbox drained into frames, by the connection itself.
//!
//! The order of what a device is sent is the order of truth, and this is where it is made:
//!
//! 1. Answers and grants go first. A grant that is waiting here was committed before any event that
//!    overlaps it started (the address space's lock saw to that), so it must not be overtaken by that
//!    event's notice; and an event that overlaps it and started earlier has ended, so the device has
//!    acked its notice already.
//! 2. Then the notices, as many as the window allows, in one frame.
//! 3. An answer to Unsubscribe goes when the notices that were pending before it are out: nothing that
//!    belongs to the subscription comes after it (UnsubscribeBarrier), and it waits for nothing else.
//!
//! After a resume the notices that were sent and not acked go out again before any new one. A grant still goes
//! first: whatever it overlaps has been acked, or the bracket would hold it.
//!
//! When the device does not read, HTTP/2's flow control stops this from being polled; then notices
//! merge in the outbox, and the busier the stream, the more one frame says.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use shootdown_core::NoticeNumber;
use shootdown_core::outbox::Outbox;
use shootdown_proto::error::{Reason, status};
use shootdown_proto::message::{HostSays, SessionError};
use shootdown_proto::v1;
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::{LineEnds, LineId, SessionHandle, State};
use crate::clock::Clock;
use crate::completion::Token;

/// Notices in one frame. At about 60 bytes each a full frame stays below one HTTP/2 frame of 16 KiB.
const NOTICES_A_FRAME: usize = 256;

/// What the connection polls.
pub(crate) struct Outgoing {
    source: Source,
    /// The status that ends the stream, once the last word is out.
    verdict: Option<Status>,
}

enum Source {
    Session {
        handle: Arc<SessionHandle>,
        line: LineId,
        ends: LineEnds,
    },
    /// There is no session: the device is told why, and that is all.
    Refused(Option<SessionError>),
    Ended,
}

impl Outgoing {
    pub(crate) fn session(handle: Arc<SessionHandle>, line: LineId) -> Self {
        let source = match handle.ends_of(line) {
            Some(ends) => Source::Session { handle, line, ends },
            None => Source::Refused(Some(goes_on_elsewhere())),
        };
        Self { source, verdict: None }
    }

    pub(crate) fn refused(error: SessionError) -> Self {
        Self { source: Source::Refused(Some(error)), verdict: None }
    }
}

impl Stream for Outgoing {
    type Item = Result<v1::SessionResponse, Status>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if let Some(verdict) = this.verdict.take() {
            this.source = Source::Ended;
            return Poll::Ready(Some(Err(verdict)));
        }
        let said = match &mut this.source {
            Source::Session { handle, line, .. } => match handle.poll_say(*line, cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(said) => said,
            },
            Source::Refused(error) => error.take().map(HostSays::Error),
            Source::Ended => None,
        };
        if let Some(HostSays::Error(error)) = &said
            && error.fatal
        {
            this.verdict = Some(status(error.reason, error.message.clone(), &[]));
        }
        Poll::Ready(said.map(|says| Ok(says.into())))
    }
}

impl Drop for Outgoing {
    /// The connection is gone, or the stream is finished.
    fn drop(&mut self) {
        if let Source::Session { ends, .. } = &self.source {
            ends.severed.cancel();
        }
    }
}

fn goes_on_elsewhere() -> SessionError {
    SessionError::fatal(Reason::SessionReplaced, "the device went on with its session on another stream")
}

impl SessionHandle {
    /// `None`: the session goes on on another stream.
    pub(super) fn ends_of(&self, line: LineId) -> Option<LineEnds> {
        let state = self.state.lock();
        (state.line.id == line).then(|| state.line.ends.clone())
    }

    /// Cancelled when the session goes on on another stream than its newest.
    pub(super) fn replaced(&self) -> CancellationToken {
        self.state.lock().line.ends.replaced.clone()
    }

    /// What to say next; `None` ends the stream.
    fn poll_say(&self, line: LineId, cx: &mut Context<'_>) -> Poll<Option<HostSays>> {
        let mut state = self.state.lock();
        if state.line.id != line {
            return Poll::Ready(Some(HostSays::Error(goes_on_elsewhere())));
        }
        match state.next_say(self.clock) {
            Some(says) => {
                drop(state);
                self.room.notify_one();
                Poll::Ready(Some(says))
            }
            None if state.line.closed => Poll::Ready(None),
            None => {
                match &mut state.line.stream {
                    Some(waker) if waker.will_wake(cx.waker()) => {}
                    other => *other = Some(cx.waker().clone()),
                }
                Poll::Pending
            }
        }
    }
}

impl State {
    /// The stream's waker, if polling it would bring something. To wake it for nothing would cost
    /// every ack a poll of the connection.
    pub(super) fn waker_if_it_can_say(&mut self) -> Option<Waker> {
        let outbox = self.session.outbox();
        let can_say = !self.line.answers.is_empty()
            || (self.session.phase().has_stream() && outbox.has_sendable())
            || self.farewell_is_due()
            || self.line.last_word.is_some()
            || self.line.closed;
        if can_say { self.line.stream.take() } else { None }
    }

    /// Each notice takes at least one entry, the oldest, out of what is pending: when as many were sent as
    /// were pending then, none of them is left. If they were merged it is sooner. The one exception is a
    /// hint: the end of a bracket that was merged with a later one goes at the place of the later, and is
    /// the other subscription's then.
    fn farewell_is_due(&self) -> bool {
        let outbox = self.session.outbox();
        self.line.farewells.front().is_some_and(|farewell| {
            !outbox.is_sending_again() && (outbox.pending() == 0 || sent(outbox) >= farewell.after)
        })
    }

    /// The place of a farewell: behind all that is pending.
    pub(super) fn place_behind_pending(&self) -> u64 {
        let outbox = self.session.outbox();
        sent(outbox).saturating_add(outbox.pending() as u64)
    }

    fn next_say(&mut self, clock: Clock) -> Option<HostSays> {
        if let Some(answer) = self.line.answers.pop_front() {
            if matches!(answer, HostSays::Grant(_)) {
                // Until here its bytes were kept for the device.
                self.session.on_fault_done();
            }
            return Some(answer);
        }
        if self.farewell_is_due()
            && let Some(farewell) = self.line.farewells.pop_front()
        {
            return Some(farewell.says);
        }
        if self.session.outbox().has_sendable() {
            let notices = self.session.take_notices(NOTICES_A_FRAME, clock.now());
            if !notices.is_empty() {
                return Some(HostSays::Notices(notices));
            }
        }
        let last_word = self.line.last_word.take()?;
        self.line.closed = true;
        Some(HostSays::Error(last_word))
    }
}

fn sent(outbox: &Outbox<Token>) -> u64 {
    outbox.last_sent().map_or(0, NoticeNumber::get)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use shootdown_core::session::{Effects, Session, SessionConfig};
    use shootdown_core::{
        AddrRange, AddressSpaceId, Cause, DeviceId, Event, Method, Seq, SessionId, SubscriptionId,
    };
    use shootdown_proto::message::{Grant, RequestId};

    use super::super::{Earlier, Farewell};
    use super::*;

    const CLOCK: Clock = Clock::BOOTTIME;

    fn state() -> State {
        let config = SessionConfig::default();
        let mut session = Session::new(SessionId::FIRST, DeviceId::new("gpu").unwrap(), config, CLOCK.now());
        session.try_fault().unwrap();
        State { ever_subscribed: true, ..State::new(session, Earlier::None, CLOCK.now()) }
    }

    fn happens(state: &mut State, page: u64) {
        let event = Event {
            address_space: AddressSpaceId::FIRST,
            seq: Seq::FIRST,
            range: AddrRange::new(page << 12, (page + 1) << 12).unwrap(),
            method: Method::Invalidate,
            cause: Cause::Unmap,
            owner: None,
        };
        state.session.on_event(&event, None, CLOCK.now(), &mut Effects::new());
    }

    fn said(state: &mut State) -> Option<&'static str> {
        state.next_say(CLOCK).map(|says| match says {
            HostSays::Grant(_) => "grant",
            HostSays::Notices(_) => "notices",
            HostSays::Unsubscribed { .. } => "unsubscribed",
            HostSays::Error(_) => "error",
            _ => "other",
        })
    }

    /// Both wait: the grant was committed first, or the event's bracket would have held it.
    #[test]
    fn a_grant_goes_before_the_notice_that_takes_it_away() {
        let mut state = state();
        state.line.answers.push_back(HostSays::Grant(Grant {
            request: RequestId::MIN,
            address_space: AddressSpaceId::FIRST,
            seq: None,
            translations: vec![],
            data: Bytes::new(),
        }));
        happens(&mut state, 1);
        assert_eq!(said(&mut state), Some("grant"));
        assert_eq!(state.session.faults_in_flight(), 0, "its bytes are with the transport");
        assert_eq!(said(&mut state), Some("notices"));
        assert_eq!(said(&mut state), None);
    }

    #[test]
    fn an_answer_to_unsubscribe_goes_after_what_was_pending_and_before_what_came_later() {
        let mut state = state();
        happens(&mut state, 1);
        let after = state.place_behind_pending();
        let says = HostSays::Unsubscribed { request: RequestId::MIN, subscription: SubscriptionId::FIRST };
        state.line.farewells.push_back(Farewell { says, after });
        assert!(!state.farewell_is_due());
        assert_eq!(said(&mut state), Some("notices"));
        happens(&mut state, 3);
        assert_eq!(said(&mut state), Some("unsubscribed"));
        assert_eq!(said(&mut state), Some("notices"));
    }

    #[test]
    fn the_last_word_is_the_last() {
        let mut state = state();
        happens(&mut state, 1);
        state.line.last_word =
            Some(SessionError::fatal(shootdown_proto::error::Reason::SessionEvicted, "evicted"));
        assert_eq!(said(&mut state), Some("notices"));
        assert_eq!(said(&mut state), Some("error"));
        assert!(state.line.closed);
        assert_eq!(said(&mut state), None);
    }
}
