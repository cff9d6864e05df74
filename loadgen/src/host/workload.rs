//! The tasks of the workload: one for each thread of each slot.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::slot::Slot;
use super::world::{WorkloadError, World};

/// The tasks. Dropped, they stop at their next await.
#[derive(Debug)]
pub(super) struct Workload {
    slots: Vec<Slot>,
    tasks: JoinSet<Result<(), WorkloadError>>,
    stop: CancellationToken,
}

impl Workload {
    /// Makes the address spaces, and tells devices of them.
    pub(super) async fn prepare(world: &Arc<World>) -> Result<Self, WorkloadError> {
        let mut slots = Vec::new();
        for index in 0..world.plan.address_spaces {
            slots.extend(Box::pin(Slot::create(world, index)).await?);
        }
        Ok(Self { slots, tasks: JoinSet::new(), stop: CancellationToken::new() })
    }

    pub(super) fn start(&mut self, pause: Duration) {
        for slot in self.slots.drain(..) {
            self.tasks.spawn(work(slot, pause, self.stop.clone()));
        }
    }

    /// Resolves when a task fails.
    pub(super) async fn failed(&mut self) -> WorkloadError {
        loop {
            match self.tasks.join_next().await {
                Some(Ok(Ok(()))) => {}
                Some(Ok(Err(error))) => return error,
                Some(Err(_)) => return WorkloadError::Task,
                None => std::future::pending().await,
            }
        }
    }

    /// Lets every task finish the operation that it is at.
    pub(super) async fn stop(mut self) -> Result<(), WorkloadError> {
        self.stop.cancel();
        while let Some(ended) = self.tasks.join_next().await {
            ended.map_err(|_| WorkloadError::Task)??;
        }
        Ok(())
    }
}

async fn work(mut slot: Slot, pause: Duration, stop: CancellationToken) -> Result<(), WorkloadError> {
    loop {
        tokio::select! {
            // The end goes first: a pause may be long, or none.
            biased;
            () = stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(pause), if !pause.is_zero() => {}
            () = tokio::task::yield_now(), if pause.is_zero() => {}
        }
        // Boxed: the largest of the operations is some kilobytes, and there are as many tasks as threads.
        Box::pin(slot.step()).await?;
    }
}
