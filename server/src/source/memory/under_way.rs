//! Which operations are under way: who needs frames and finds none waits for those that may give some back.
//!
//! ```text
//!   1 ... 2 . 3 .......... 4 ..      operations, by number
//!             ^ mark                 ended(): 1, 2 and 3 are over; 4 is not waited for
//! ```
//!
//! It is a grace period, so it ends though new operations begin all the time. It never waits for one that
//! waits for frames itself, nor for one that waits for such a one: while an operation needs room nobody waits
//! for operations at all.

use std::collections::BTreeSet;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::twin::Twin;

/// The operations of a source that are under way.
#[derive(Debug, Default)]
pub(super) struct UnderWay {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    last: u64,
    running: BTreeSet<u64>,
    /// Operations that wait for room.
    need_room: usize,
}

/// A moment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mark {
    /// The last operation that had begun.
    last: u64,
    running: usize,
}

/// An operation that is under way until this is dropped.
#[derive(Debug)]
pub(super) struct Operation {
    of: Arc<UnderWay>,
    number: u64,
}

/// An operation that waits for room until this is dropped.
#[derive(Debug)]
pub(super) struct NeedsRoom {
    of: Arc<UnderWay>,
}

impl UnderWay {
    /// An operation begins.
    pub(super) fn begin(self: &Arc<Self>) -> Operation {
        let mut state = self.state.lock();
        state.last += 1;
        let number = state.last;
        state.running.insert(number);
        Operation { of: Arc::clone(self), number }
    }

    /// The caller waits for room; `None` where it is no operation, and nothing can wait for it.
    pub(super) fn needs_room(self: &Arc<Self>) -> Option<NeedsRoom> {
        Twin::current()?;
        self.state.lock().need_room += 1;
        self.changed.notify_waiters();
        Some(NeedsRoom { of: Arc::clone(self) })
    }

    pub(super) fn mark(&self) -> Mark {
        let state = self.state.lock();
        Mark { last: state.last, running: state.running.len() }
    }

    /// Whether no operation ran since `mark`: what was found then is so now.
    pub(super) fn none_since(&self, mark: Mark) -> bool {
        mark.running == 0 && self.state.lock().last == mark.last
    }

    /// Waits until the operations that are under way now are over, or `enough`, or one of them waits for room.
    ///
    /// # Cancel safety
    /// It may be dropped at any time.
    pub(super) async fn ended(&self, enough: impl Fn() -> bool) {
        let last = self.mark().last;
        let over = || {
            let state = self.state.lock();
            state.need_room > 0 || state.running.first().is_none_or(|first| *first > last)
        };
        let mut changed = std::pin::pin!(self.changed.notified());
        loop {
            // Enlisted before it looks: a change after the look wakes it.
            changed.as_mut().enable();
            if over() || enough() {
                return;
            }
            changed.as_mut().await;
            changed.set(self.changed.notified());
        }
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        self.of.state.lock().running.remove(&self.number);
        self.of.changed.notify_waiters();
    }
}

impl Drop for NeedsRoom {
    fn drop(&mut self) {
        self.of.state.lock().need_room -= 1;
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Waker};

    use super::*;

    #[test]
    fn those_that_were_under_way_are_waited_for_and_those_that_came_later_are_not() {
        let under_way = Arc::new(UnderWay::default());
        let mut context = Context::from_waker(Waker::noop());
        assert!(pin!(under_way.ended(|| false)).poll(&mut context).is_ready());
        let (first, second) = (under_way.begin(), under_way.begin());
        let mut wait = pin!(under_way.ended(|| false));
        assert!(wait.as_mut().poll(&mut context).is_pending());
        let _later = under_way.begin();
        drop(second);
        assert!(wait.as_mut().poll(&mut context).is_pending());
        drop(first);
        assert!(wait.as_mut().poll(&mut context).is_ready());
    }

    #[tokio::test]
    async fn while_an_operation_waits_for_room_nobody_waits_for_operations() {
        let under_way = Arc::new(UnderWay::default());
        assert!(under_way.needs_room().is_none(), "it is no operation");
        let _operation = under_way.begin();
        let mut context = Context::from_waker(Waker::noop());
        let mut wait = pin!(under_way.ended(|| false));
        assert!(wait.as_mut().poll(&mut context).is_pending());
        let needs = Twin::Collapse.run(async { under_way.needs_room() }).await;
        assert!(wait.as_mut().poll(&mut context).is_ready());
        drop(needs);
        assert!(pin!(under_way.ended(|| false)).poll(&mut context).is_pending());
        assert!(pin!(under_way.ended(|| true)).poll(&mut context).is_ready());
    }

    #[test]
    fn an_operation_that_ran_meanwhile_is_seen_though_it_is_over() {
        let under_way = Arc::new(UnderWay::default());
        let mark = under_way.mark();
        assert!(under_way.none_since(mark));
        drop(under_way.begin());
        assert!(!under_way.none_since(mark));
        let running = under_way.begin();
        let mark = under_way.mark();
        drop(running);
        assert!(!under_way.none_since(mark));
    }
}
