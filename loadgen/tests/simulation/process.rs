//! A process of the host agent, as its machine sees it: what kills it, what asks it to end, what it has open, and
//! whether it stands still.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use parking_lot::Mutex;

use crate::level::Level;
use crate::sockets::Sockets;

/// What the world has of it.
#[derive(Debug)]
pub struct Process {
    /// How often it was killed.
    pub kills: Level<u64>,
    /// What it has open.
    pub sockets: Sockets,
    /// How often it was asked to hand over.
    pub handovers_asked: Level<u64>,
    /// How often it has.
    pub handovers: Level<u64>,
    pub standstill: Arc<Standstill>,
}

impl Default for Process {
    fn default() -> Self {
        let standstill = Arc::new(Standstill::default());
        Self {
            kills: Level::new(0),
            sockets: Sockets::new(Arc::clone(&standstill)),
            handovers_asked: Level::new(0),
            handovers: Level::new(0),
            standstill,
        }
    }
}

/// A process that is stopped, and goes on later as if nothing had been: SIGSTOP and SIGCONT. Time passes.
///
/// Turmoil cannot leave out a machine's turn, so what stands still is all that a host agent does by: its sockets
/// neither give nor take, nothing is accepted, and nobody looks at its deadlines. What it has read by then it
/// works off, as one that is stopped a moment later would have; the answers stay in it.
#[derive(Debug, Default)]
pub struct Standstill(Mutex<Stopped>);

#[derive(Debug, Default)]
struct Stopped {
    is_stopped: bool,
    /// It goes on, for good.
    is_over: bool,
    /// Its machine has no power: it does not go on, and nobody notices.
    is_dark: bool,
    /// Who goes on with it, in the order in which they came.
    waiting: Vec<Waker>,
}

impl Standstill {
    /// Once; not when its end has come before.
    pub fn begin(&self) {
        let mut stopped = self.0.lock();
        stopped.is_stopped = !stopped.is_over;
    }

    pub fn end(&self) {
        let waiting = {
            let mut stopped = self.0.lock();
            (stopped.is_stopped, stopped.is_over) = (false, true);
            std::mem::take(&mut stopped.waiting)
        };
        waiting.into_iter().for_each(Waker::wake);
    }

    /// The power of its machine goes.
    pub fn darken(&self) {
        self.0.lock().is_dark = true;
    }

    /// The power returns, for who is started then.
    pub fn light(&self) {
        self.0.lock().is_dark = false;
    }

    /// Ready while it runs.
    pub fn poll(&self, cx: &Context<'_>) -> Poll<()> {
        let mut stopped = self.0.lock();
        if !stopped.is_stopped && !stopped.is_dark {
            return Poll::Ready(());
        }
        if !stopped.waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
            stopped.waiting.push(cx.waker().clone());
        }
        Poll::Pending
    }

    /// A part of the process.
    pub async fn part<F: Future>(self: Arc<Self>, part: F) -> F::Output {
        let mut part = std::pin::pin!(part);
        std::future::poll_fn(|cx| {
            std::task::ready!(self.poll(cx));
            Pin::as_mut(&mut part).poll(cx)
        })
        .await
    }
}
