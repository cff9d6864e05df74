//! The futures of [`Domain::synchronize`] and [`Domain::barrier`].

use crate::{
    core::{Core, Line},
    domain::Domain,
    waiters::Place,
};
use std::{
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

/// A sleep until a domain's line reaches a number.
///
/// ```text
///   [New] --first poll: the number is fixed--> [Waiting] --reached--> [Done]
/// ```
struct Wait {
    domain: Domain,
    line: Line,
    state: State,
}

enum State {
    New,
    Waiting { until: u64, place: Option<Place> },
    Done,
}

impl Wait {
    fn new(domain: &Domain, line: Line) -> Self {
        Self { domain: domain.clone(), line, state: State::New }
    }

    /// The number that stands for "all until now". Asking for a grace period also starts it.
    fn fix(line: Line, core: &Core) -> u64 {
        match line {
            Line::GracePeriods => core.start_grace_period(),
            Line::Callbacks => core.queued(),
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let core = self.domain.core();
        if let State::New = self.state {
            self.state = State::Waiting { until: Self::fix(self.line, core), place: None };
        }
        if let State::Waiting { until, place } = &mut self.state {
            if !core.wait(self.line, *until, place, cx.waker()) {
                return Poll::Pending;
            }
            self.state = State::Done;
        }
        Poll::Ready(())
    }
}

impl Drop for Wait {
    /// Only the place is given up: the grace period belongs to the domain and goes on.
    fn drop(&mut self) {
        if let State::Waiting { place: Some(place), .. } = self.state {
            self.domain.core().leave(self.line, place);
        }
    }
}

/// Ends when every read section that was open at its first poll has ended; see [`Domain::synchronize`].
#[must_use = "nothing is waited for until the future is awaited"]
pub struct Synchronize(Wait);

/// Ends when every callback that was queued at its first poll has run; see [`Domain::barrier`].
#[must_use = "nothing is waited for until the future is awaited"]
pub struct Barrier(Wait);

impl Synchronize {
    pub(crate) fn new(domain: &Domain) -> Self {
        Self(Wait::new(domain, Line::GracePeriods))
    }
}

impl Barrier {
    pub(crate) fn new(domain: &Domain) -> Self {
        Self(Wait::new(domain, Line::Callbacks))
    }
}

impl Future for Synchronize {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.0.poll(cx)
    }
}

impl Future for Barrier {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.0.poll(cx)
    }
}

impl fmt::Debug for Synchronize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Synchronize").field("domain", &self.0.domain.name()).finish_non_exhaustive()
    }
}

impl fmt::Debug for Barrier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Barrier").field("domain", &self.0.domain.name()).finish_non_exhaustive()
    }
}
