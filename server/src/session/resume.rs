//! A device that lost its stream goes on where it stopped, or flushes everything (ResumeOrFlush).
//!
//! Nothing of the old stream is waited for: it may be stuck in a full socket, and its host may not have seen its
//! end. The session's [`Line`] is replaced under the session's lock. From there on whatever still comes in on the
//! old stream changes nothing, and what was to be said on it is dropped: notices are sent again, requests are
//! asked again.

use shootdown_core::session::{Enforcement, ResumeError};
use shootdown_core::{Incarnation, Moment, PageSize, SessionId};
use shootdown_proto::message::{Hello, HostSays, Resume, ResumePoint, Welcome};

use super::handshake::Opened;
use super::silence::Silence;
use super::{Line, LineId, SessionHandle, wake};
use crate::host::Host;

/// What was agreed anew.
#[derive(Clone, Copy)]
pub(super) struct Terms {
    pub(super) version: u32,
    pub(super) wants_timing: bool,
}

/// Why the device flushes everything.
#[derive(Debug, thiserror::Error)]
pub(super) enum Flush {
    #[error("it was a session of host incarnation {named}, this is {own}")]
    OtherHost { named: Incarnation, own: Incarnation },
    #[error("there is no session {0}")]
    Unknown(SessionId),
    #[error(
        "the run before left session {0} with notices that were not acked, and nobody knows them any more"
    )]
    Survivor(SessionId),
    #[error("session {0} is of another device")]
    OtherDevice(SessionId),
    #[error("it is a session of device incarnation {of}, and this is {now}")]
    OtherRun { of: Incarnation, now: Incarnation },
    #[error("the device says other things of itself than when it opened session {0}")]
    Changed(SessionId),
    /// Not even that: it says nothing any more of what the device holds.
    #[error(
        "the device went on with session {session} by its attempt {by}, and this is its attempt {attempt}"
    )]
    Overtaken { session: SessionId, by: u64, attempt: u64 },
    #[error(transparent)]
    Refused(#[from] ResumeError),
}

/// Goes on with the session that `point` names.
///
/// # Errors
/// [`Flush`]; nothing has changed then.
pub(super) fn resume(host: &Host, hello: &Hello, point: ResumePoint, terms: Terms) -> Result<Opened, Flush> {
    let own = host.incarnation();
    if point.host_incarnation != own {
        return Err(Flush::OtherHost { named: point.host_incarnation, own });
    }
    // What a survivor was told before it was cut is forgotten, so it cannot be told again.
    if host.restart().survivors().ids().contains(&point.session) {
        return Err(Flush::Survivor(point.session));
    }
    let handle = host.registry().get(point.session).ok_or(Flush::Unknown(point.session))?;
    if handle.device != hello.device {
        return Err(Flush::OtherDevice(point.session));
    }
    if handle.incarnation != hello.incarnation {
        return Err(Flush::OtherRun { of: handle.incarnation, now: hello.incarnation });
    }
    let enforces = handle.enforcement == Enforcement::ByDevice;
    if (enforces, handle.change_pte) != (hello.enforces_lease, hello.change_pte) {
        return Err(Flush::Changed(point.session));
    }
    let line = handle.go_on(point, own, terms)?;
    tracing::info!(session = handle.id.get(), device = %handle.device, "session resumed");
    Ok(Opened { handle, line })
}

impl SessionHandle {
    /// The new stream's first answer is the Welcome: in the same step, so that nothing gets ahead of it.
    fn go_on(
        &self,
        point: ResumePoint,
        host_incarnation: Incarnation,
        terms: Terms,
    ) -> Result<LineId, Flush> {
        let now: Moment = self.clock.now();
        let (swapped, after) = self.input(now, |state, effects| {
            if (1..=state.attempt).contains(&point.attempt) {
                let (session, by, attempt) = (self.id, state.attempt, point.attempt);
                return Err(Flush::Overtaken { session, by, attempt });
            }
            state.session.on_resumed(point.received_through, now, effects)?;
            state.attempt = state.attempt.max(point.attempt);
            state.silence = Silence::since(now);
            let outbox = state.session.outbox();
            let welcome = HostSays::Welcome(Welcome {
                session: self.id,
                host_incarnation,
                version: terms.version,
                // Of the renewals to come: this grants none. The setting may be another one by now.
                lease: state.session.config().lease.duration,
                window: state.session.window(),
                epoch: self.epoch,
                retained_floor: outbox.retained_floor(),
                resume: Resume::Continue,
                page_size: PageSize::BASE,
                wants_timing: terms.wants_timing,
            });
            let mut line = Line::new(state.line.id.next());
            line.answers.push_back(welcome);
            let id = line.id;
            Ok((id, std::mem::replace(&mut state.line, line)))
        });
        let swapped: Result<(LineId, Line), Flush> = swapped;
        self.carry_out(after);
        let (id, old) = swapped?;
        old.ends.replaced.cancel();
        old.ends.severed.cancel();
        wake(old.stream);
        Ok(id)
    }

    /// Whether what comes in on that stream counts.
    pub(super) fn is_up(&self, line: LineId) -> bool {
        let state = self.state.lock();
        state.line.id == line && state.session.phase().has_stream()
    }
}

#[cfg(test)]
mod tests;
