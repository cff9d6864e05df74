//! Callbacks that wait for a grace period, then for their turn.
//!
//! ```text
//!   call() -> due --(its grace period completed)--> ready --(one runner at a time, in order)--> ran
//! ```

use std::collections::VecDeque;

/// What `Domain::call` defers.
pub(crate) type Job = Box<dyn FnOnce() + Send>;

/// The queue of one domain. First in, first out, also across grace periods.
#[derive(Default)]
pub(crate) struct Callbacks {
    /// With the number of the grace period that each waits for; never decreasing.
    due: VecDeque<(u64, Job)>,
    ready: VecDeque<Job>,
    queued: u64,
    ran: u64,
    runner: Runner,
}

#[derive(Default, PartialEq, Eq)]
enum Runner {
    #[default]
    None,
    /// Somebody runs a batch. Others leave what is ready to them: a callback that defers another, ends a section or
    /// ends a grace period adds to the runner's next batch and never nests.
    Some,
}

impl Callbacks {
    pub(crate) fn queue(&mut self, grace_period: u64, job: Job) {
        self.due.push_back((grace_period, job));
        self.queued += 1;
    }

    /// Queued ever, and run ever: a barrier waits for the second to reach what the first was.
    pub(crate) fn queued(&self) -> u64 {
        self.queued
    }

    pub(crate) fn ran(&self) -> u64 {
        self.ran
    }

    pub(crate) fn on_completed(&mut self, completed: u64) {
        while self.due.front().is_some_and(|(grace_period, _)| *grace_period <= completed) {
            self.ready.extend(self.due.pop_front().map(|(_, job)| job));
        }
    }

    /// A batch for a new runner; none if nothing is ready, or somebody runs already and will see it.
    pub(crate) fn try_run(&mut self) -> Option<VecDeque<Job>> {
        if self.runner == Runner::Some || self.ready.is_empty() {
            return None;
        }
        self.runner = Runner::Some;
        Some(std::mem::take(&mut self.ready))
    }

    /// The runner has run a batch of `count`. Its next one, or it is dismissed.
    pub(crate) fn on_ran(&mut self, count: usize) -> Option<VecDeque<Job>> {
        self.ran += count as u64;
        self.runner = Runner::None;
        self.try_run()
    }
}
