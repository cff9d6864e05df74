//! A value that is waited for. As `tokio::sync::watch`, which wakes those who wait in an order that differs
//! from run to run.

use parking_lot::Mutex;
use tokio::sync::Notify;

#[derive(Debug, Default)]
pub struct Level<T> {
    value: Mutex<T>,
    changed: Notify,
}

impl<T: Copy> Level<T> {
    pub fn new(value: T) -> Self {
        Self { value: Mutex::new(value), changed: Notify::new() }
    }

    pub fn get(&self) -> T {
        *self.value.lock()
    }

    pub fn change(&self, change: impl FnOnce(&mut T)) {
        change(&mut self.value.lock());
        self.changed.notify_waiters();
    }

    /// Waits until it is right.
    pub async fn until(&self, mut right: impl FnMut(T) -> bool) {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            // Before the look, so that no change between the look and the wait is missed.
            changed.as_mut().enable();
            if right(self.get()) {
                return;
            }
            changed.await;
        }
    }
}
