//! [4 of 9] The one task that reads a session's stream, and the owner of all its other tasks.
//!
//! Its loop is: take the next thing that happens, apply it. Nothing in it waits for a flush, so that the
//! stream is always drained: h2 closes connections with many small unread frames.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use shootdown_core::ack::Arrived;
use shootdown_core::busy_poll::BusyPoll;
use shootdown_core::{FlushReport, Moment, Notice, NoticeKind, Scope};
use shootdown_proto::message::{Grant, HostSays, RequestId, SessionError};
use shootdown_proto::v1;
use tokio::sync::Semaphore;
use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::WaitForCancellationFuture;
use tokio_util::task::AbortOnDropHandle;

use crate::config::ResumePolicy;
use crate::connection::TransportError;
use crate::fault::{self, Granted};
use crate::session::end::{AllFlushed, EndCause, SessionEnd, Violation};
use crate::session::flush::{AnyTlb, Flush};
use crate::session::requests::{FaultRefused, Reply, SubscribedAt};
use crate::session::{Session, Tell, heartbeat, reconnect, vigil};
use crate::subscription::Unclaimed;
use crate::ticket::NotOpened;
use crate::tlb::FlushAllCause;

/// How long the host agent may take to close the stream after Leave. It costs nothing but time: the
/// device holds nothing by then.
const LEAVE_PATIENCE: Duration = Duration::from_secs(2);

pub(crate) struct Driver {
    session: Arc<Session>,
    tlb: Arc<dyn AnyTlb>,
    inbound: tonic::Streaming<v1::SessionResponse>,
    /// Flushes that were not ready at once; at most the window.
    flushes: JoinSet<()>,
    permits: Arc<Semaphore>,
    busy_poll: BusyPoll,
    tell: Tell,
}

/// What can happen.
enum Next {
    Closing,
    FlushEnded(Result<(), JoinError>),
    Said(Result<Option<v1::SessionResponse>, tonic::Status>),
    /// Nothing comes any more.
    Unheard,
}

/// Whether the loop goes on.
enum Goes {
    On,
    Closing,
}

/// Whether anything can still come or go.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Line {
    Up,
    Down,
}

/// Fails closed when the driver's task is dropped with its runtime, or panics.
struct CloseOnDrop(Arc<Session>);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.close(EndCause::RuntimeStopped);
        self.0.gate.end();
    }
}

fn session_resumes(session: &Session) -> bool {
    session.config.resume == ResumePolicy::Resume
}

/// What the flush of a notice brought back is not known any more: all that it can have been.
fn report_of_a_lost_ack(notice: &Notice) -> Option<FlushReport> {
    // After a FlushAll nothing is reported by range; what was used is told again by itself.
    let Scope::Range(_, range) = notice.scope else { return None };
    let (young, dirty) = match notice.kind {
        NoticeKind::RangeEnd => return None,
        NoticeKind::ClearYoung => (vec![range], vec![]),
        NoticeKind::ClearFlushYoung
        | NoticeKind::ChangePte(_)
        | NoticeKind::Invalidate
        | NoticeKind::Release => (vec![range], vec![range]),
    };
    Some(FlushReport { notice: notice.number, young, dirty, timing: None })
}

fn answer_mismatch(request: RequestId) -> EndCause {
    EndCause::Violation(Violation::AnswerMismatch { request: request.get() })
}

impl Driver {
    pub(crate) fn start(
        session: Arc<Session>,
        tlb: Arc<dyn AnyTlb>,
        inbound: tonic::Streaming<v1::SessionResponse>,
        tell: Tell,
    ) {
        let permits = Arc::new(Semaphore::new(session.config.parallel_flushes));
        let busy_poll = BusyPoll::new(session.config.busy_poll);
        let driver = Self { session, tlb, inbound, flushes: JoinSet::new(), permits, busy_poll, tell };
        // Stopped by `Session::close`, awaited through `Session::ended`.
        tokio::spawn(driver.run());
    }

    async fn run(mut self) {
        let guard = CloseOnDrop(Arc::clone(&self.session));
        let heartbeat =
            AbortOnDropHandle::new(tokio::spawn(heartbeat::keep_lease(Arc::clone(&self.session))));
        let session = Arc::clone(&self.session);
        // One for all turns: each new one would be listed with the token again.
        let mut closing = std::pin::pin!(session.closing.cancelled());
        let line = loop {
            let next = self.next(closing.as_mut()).await;
            let lost = matches!(next, Next::Said(Ok(None) | Err(_)) | Next::Unheard);
            match self.apply(next) {
                Ok(Goes::On) => {}
                Ok(Goes::Closing) => break Line::Up,
                Err(cause) if self.may_resume(&cause) => match self.resume(closing.as_mut(), &cause).await {
                    Ok(Goes::On) => {}
                    Ok(Goes::Closing) => break Line::Down,
                    Err(cause) => {
                        self.session.close(cause);
                        break Line::Down;
                    }
                },
                Err(cause) => {
                    self.session.close(cause);
                    break if lost { Line::Down } else { Line::Up };
                }
            }
        };
        let end = self.finish(line).await;
        drop((heartbeat, guard));
        tracing::info!(session = %self.session.welcome.session, cause = %end.cause, "session ended");
        self.tell.ended.send_replace(Some(end));
    }

    fn may_resume(&self, cause: &EndCause) -> bool {
        self.session.config.resume == ResumePolicy::Resume
            && reconnect::is_resumable(cause)
            && self.session.gate.check().is_ok()
    }

    /// Connects again, while flushes go on. The lease is watched by the heartbeat's task.
    async fn resume(
        &mut self,
        mut closing: Pin<&mut WaitForCancellationFuture<'_>>,
        cause: &EndCause,
    ) -> Result<Goes, EndCause> {
        let session = Arc::clone(&self.session);
        tracing::warn!(session = %session.welcome.session, %cause, "the stream is lost; connecting again");
        session.on_lost();
        let mut reconnecting = std::pin::pin!(reconnect::reconnect(&session));
        loop {
            tokio::select! {
                // As in `next`.
                biased;
                () = closing.as_mut() => return Ok(Goes::Closing),
                Some(ended) = self.flushes.join_next() => ended.map_err(|_| EndCause::FlushPanicked)?,
                inbound = reconnecting.as_mut() => {
                    self.inbound = inbound?;
                    tracing::info!(session = %session.welcome.session, "session resumed");
                    return Ok(Goes::On);
                }
            }
        }
    }

    async fn next(&mut self, closing: Pin<&mut WaitForCancellationFuture<'_>>) -> Next {
        let began = self.session.clock().now();
        let next = tokio::select! {
            // Closing goes first: what comes later must not be applied. Then flushes that ended, because
            // one that panicked must stop the session before another notice is acked. Both are bounded,
            // so the stream's turn comes. What the stream has goes before the word that it has nothing.
            biased;
            () = closing => Next::Closing,
            Some(ended) = self.flushes.join_next() => Next::FlushEnded(ended),
            said = self.inbound.message() => Next::Said(said),
            () = self.session.unheard.notified() => Next::Unheard,
            never = vigil::keep(self.session.clock(), began, &mut self.busy_poll) => match never {},
        };
        self.busy_poll.on_waited(self.session.clock().now().since(began));
        next
    }

    fn apply(&mut self, next: Next) -> Result<Goes, EndCause> {
        match next {
            Next::Closing => return Ok(Goes::Closing),
            Next::FlushEnded(Ok(())) => {}
            Next::FlushEnded(Err(_)) => return Err(EndCause::FlushPanicked),
            Next::Said(Ok(Some(wire))) => {
                self.session.outgoing.on_heard();
                self.on_said(HostSays::try_from(wire).map_err(EndCause::Malformed)?)?;
            }
            // Something may have come since it was noticed; and who does not come back has the lease.
            Next::Unheard if self.session.outgoing.is_dead() && session_resumes(&self.session) => {
                return Err(EndCause::Transport(TransportError::unheard()));
            }
            Next::Unheard => {}
            Next::Said(Ok(None)) => return Err(EndCause::Closed),
            Next::Said(Err(status)) => return Err(EndCause::Transport(TransportError::of_status(&status))),
        }
        Ok(Goes::On)
    }

    fn on_said(&mut self, says: HostSays) -> Result<(), EndCause> {
        match says {
            HostSays::Notices(notices) => self.on_notices(notices),
            HostSays::Grant(grant) => self.on_grant(grant),
            HostSays::LeaseRenewed { request, lease } => {
                if let Some(sent) = self.session.outgoing.heartbeat_sent(request) {
                    self.session.gate.on_granted(sent, lease);
                }
                Ok(())
            }
            HostSays::Subscribed { request, subscription, seq } => {
                // Where nobody waits any more it is dropped unclaimed, and unsubscribes itself.
                let unclaimed = Unclaimed::new(&self.session, SubscribedAt { id: subscription, seq });
                match self.answered(request) {
                    Some(Reply::Subscribe { to, .. }) => drop(to.send(Ok(unclaimed))),
                    Some(_) => return Err(answer_mismatch(request)),
                    None => {}
                }
                Ok(())
            }
            HostSays::Unsubscribed { request, .. } => {
                match self.answered(request) {
                    Some(Reply::Unsubscribe { subscription, to }) => {
                        self.session.holdings.lock().unsubscribed(subscription);
                        to.map(|to| to.send(Ok(())));
                    }
                    Some(_) => return Err(answer_mismatch(request)),
                    None => {}
                }
                Ok(())
            }
            HostSays::Drain { resumable: true, .. } if session_resumes(&self.session) => Ok(()),
            HostSays::Drain { deadline, .. } => {
                self.tell.drain.send_replace(Some(deadline));
                Ok(())
            }
            HostSays::Error(error) if error.fatal => Err(EndCause::Host(error)),
            HostSays::Error(error) => {
                self.on_refused(error);
                Ok(())
            }
            HostSays::Welcome(_) => Err(EndCause::Violation(Violation::WelcomeTwice)),
        }
    }

    fn on_notices(&mut self, notices: Vec<Notice>) -> Result<(), EndCause> {
        let session = &self.session;
        let received: Option<Moment> = session.welcome.wants_timing.then(|| session.clock().now());
        for notice in notices {
            let arrived = self.session.outgoing.on_notice(notice.number).map_err(EndCause::Gap)?;
            let in_flight = match arrived {
                (Arrived::New, in_flight) => in_flight,
                (Arrived::Known, _) => continue,
                (Arrived::Flushed, _) => {
                    self.session.outgoing.on_lost_ack(report_of_a_lost_ack(&notice), notice.number);
                    continue;
                }
            };
            let window = self.session.welcome.window;
            if in_flight > window as usize {
                return Err(EndCause::Violation(Violation::WindowExceeded { window }));
            }
            let flush = Flush::begin(&self.session, &self.permits, notice, received);
            self.start_flush(flush)?;
        }
        Ok(())
    }

    /// Polls it once here, because most flushes are done then and a task would cost more than they do.
    fn start_flush(&mut self, flush: Flush) -> Result<(), EndCause> {
        let mut flush = Arc::clone(&self.tlb).flush(flush);
        let mut context = Context::from_waker(Waker::noop());
        // Unconstrained: in a large batch tokio would make the 129th look unready, and a task of it.
        let mut once = tokio::task::unconstrained(&mut flush);
        match catch_unwind(AssertUnwindSafe(|| Pin::new(&mut once).poll(&mut context))) {
            Ok(Poll::Ready(())) => {}
            // Its new task polls it again, with a waker that means something.
            Ok(Poll::Pending) => drop(self.flushes.spawn(flush)),
            Err(_) => return Err(EndCause::FlushPanicked),
        }
        Ok(())
    }

    fn on_grant(&mut self, grant: Grant) -> Result<(), EndCause> {
        let (fault, to) = match self.answered(grant.request) {
            Some(Reply::Fault { fault, to }) => (fault, to),
            Some(_) => return Err(answer_mismatch(grant.request)),
            None => return Ok(()),
        };
        if to.is_closed() {
            return Ok(());
        }
        let mismatch = |what| {
            let request = fault.request.get();
            EndCause::Violation(Violation::GrantMismatch { request, what })
        };
        fault::check(&fault, &grant).map_err(mismatch)?;
        // Here, in the order of the stream: a notice that comes after the grant finds its tickets.
        let answer = match Granted::open(&self.session, &fault, grant) {
            Ok(granted) => Ok(granted),
            Err(NotOpened::NotSubscribed) => Err(FaultRefused::NotSubscribed),
            // Whoever waits learns it from the drop of the sender.
            Err(NotOpened::Closed) => return Ok(()),
        };
        // Dropped unread, tickets cancel themselves.
        let _ = to.send(answer);
        Ok(())
    }

    fn on_refused(&mut self, error: SessionError) {
        match error.request.and_then(|request| self.answered(request)) {
            Some(Reply::Fault { to, .. }) => drop(to.send(Err(FaultRefused::Host(error)))),
            Some(Reply::Subscribe { to, .. }) => drop(to.send(Err(error))),
            Some(Reply::Unsubscribe { subscription, to }) => {
                self.session.holdings.lock().unsubscribed(subscription);
                to.map(|to| to.send(Err(error)));
            }
            None => {
                tracing::warn!(
                    reason = error.reason.word(),
                    message = error.message,
                    "the host agent refused a message"
                );
            }
        }
    }

    /// Whom the answer is for; `None`: nobody waits for it, and its permit is given back.
    fn answered(&self, request: RequestId) -> Option<Reply> {
        self.session.requests.take(request).map(|pending| pending.reply)
    }

    /// The gate is shut. Flushes everything, waits for the uses, says so where that can still be heard.
    async fn finish(&mut self, mut line: Line) -> SessionEnd {
        let cause = self.session.not_live().cause;
        let flush_all_cause = match (&cause, line) {
            (EndCause::Left | EndCause::Dropped, Line::Up) => FlushAllCause::Leaving,
            _ => FlushAllCause::Lost,
        };
        // A task of its own, because it may panic, and because the stream is read beside it.
        let flush_all = tokio::spawn(Arc::clone(&self.tlb).flush_all(flush_all_cause));
        let returned = self.while_reading(&mut line, AbortOnDropHandle::new(flush_all)).await;
        let flushed = if returned.is_ok() { AllFlushed::Yes } else { AllFlushed::No };
        // What `flush_all` stands for too.
        self.flushes.shutdown().await;
        if let Some(uses) = self.session.revoke(Scope::FlushAll) {
            // Its sender is in the session's table, which lives as long as `self`.
            let _ = self.while_reading(&mut line, uses).await;
        }
        // Leave stands for an ack of everything, and a TLB that panicked is not believed that much.
        let trusted = flushed == AllFlushed::Yes && !matches!(cause, EndCause::FlushPanicked);
        if trusted && line == Line::Up {
            let everything = self.session.holdings.lock().everything_young();
            for (address_space, ranges) in everything {
                self.session.report_young(address_space, ranges);
            }
            self.session.gate.end();
            self.session.outgoing.leave();
            let _ = tokio::time::timeout(LEAVE_PATIENCE, self.until_closed()).await;
        }
        self.session.gate.end();
        self.session.outgoing.fall_silent();
        SessionEnd { cause, flushed }
    }

    /// Waits, and keeps the stream drained and the lease alive: dirty bytes may be on their way back.
    async fn while_reading<F: Future>(&mut self, line: &mut Line, until: F) -> F::Output {
        let mut until = std::pin::pin!(until);
        loop {
            tokio::select! {
                // What is waited for goes first: it ends the loop.
                biased;
                output = &mut until => return output,
                said = self.inbound.message(), if *line == Line::Up => match said {
                    Ok(Some(wire)) => {
                        // A notice need not be applied: nothing is held that could be withdrawn.
                        if let Ok(HostSays::LeaseRenewed { request, lease }) = HostSays::try_from(wire)
                            && let Some(sent) = self.session.outgoing.heartbeat_sent(request)
                        {
                            self.session.gate.on_granted(sent, lease);
                        }
                    }
                    Ok(None) | Err(_) => *line = Line::Down,
                },
            }
        }
    }

    async fn until_closed(&mut self) {
        while let Ok(Some(_)) = self.inbound.message().await {}
    }
}
