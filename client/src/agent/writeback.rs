//! The way of what was written in the cache to the host.
//!
//! Each page that has something in flight has one task, which delivers its write-backs one after the other,
//! in the order of the writes: a later one never lands before an earlier one. Nobody's future owns it, so
//! nobody's being dropped ends it. A flush waits until nothing of its range is in flight.
//!
//! Only the bytes that were written go back: what the host or another device writes beside them stays.
//!
//! A write-back that fails is not tried again: where the connection broke, the first try may still land at
//! any time, also after a flush that a second one would have completed. What was written is lost then, no
//! access sees the page any more, and no flush of it is ever complete, until the session has ended.

use std::sync::Arc;

use bytes::Bytes;
use shootdown_core::{FrameNumber, PageSize};
use shootdown_proto::message::{FrameSpan, MAX_SPANS};

use super::cache::{Cache, State, WriteBackCounts};
use super::tlb::{Key, Reach};
use crate::page::{PageClient, PageError};

const PAGE: usize = PageSize::BASE.bytes() as usize;
const WORD: usize = u64::BITS as usize;

/// Which bytes of a page were written, and by whose leave.
#[derive(Debug)]
pub(super) struct Dirty {
    written: Box<[u64; PAGE / WORD]>,
    host: PageClient,
}

/// Written bytes on their way to their frame.
#[derive(Debug)]
pub(super) struct WriteBack {
    spans: Vec<FrameSpan>,
    data: Bytes,
    host: PageClient,
}

/// Whether all that was written to a range is with the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Delivered {
    Yes,
    No,
}

impl Dirty {
    pub(super) fn new(host: PageClient) -> Self {
        Self { written: Box::new([0; PAGE / WORD]), host }
    }

    pub(super) fn mark(&mut self, offset: usize, length: usize) {
        mark(&mut *self.written, offset, length);
    }

    pub(super) fn write_back(self, frame: FrameNumber, page: &[u8]) -> WriteBack {
        let spans = spans(&*self.written, frame);
        let bytes = |span: &FrameSpan| &page[span.offset as usize..][..span.length as usize];
        let data = spans.iter().flat_map(bytes).copied().collect();
        WriteBack { spans, data, host: self.host }
    }
}

fn mark(written: &mut [u64], offset: usize, length: usize) {
    for byte in offset..offset + length {
        written[byte / WORD] |= 1 << (byte % WORD);
    }
}

fn spans(written: &[u64], frame: FrameNumber) -> Vec<FrameSpan> {
    let mut spans: Vec<FrameSpan> = Vec::new();
    for byte in 0..written.len() * WORD {
        if written[byte / WORD] >> (byte % WORD) & 1 == 0 {
            continue;
        }
        match spans.last_mut() {
            Some(last) if (last.offset + last.length) as usize == byte => last.length += 1,
            _ => spans.push(FrameSpan { frame, offset: byte as u32, length: 1 }),
        }
    }
    spans
}

impl WriteBack {
    async fn deliver(&self) -> Result<(), PageError> {
        let mut rest = self.data.clone();
        for spans in self.spans.chunks(MAX_SPANS) {
            let length = spans.iter().map(|span| span.length as usize).sum();
            self.host.write(spans, rest.split_to(length)).await?;
        }
        Ok(())
    }
}

impl Cache {
    /// Changes the state, and then starts the write-backs that this has begun. After the lock: a runtime that
    /// is stopping drops a new task at once, and the task's end takes the lock.
    pub(super) fn locked<R>(self: &Arc<Self>, change: impl FnOnce(&mut State) -> R) -> R {
        let mut state = self.state.lock();
        let result = change(&mut state);
        let begun = std::mem::take(&mut state.begun);
        drop(state);
        for key in begun {
            let deliverer = Deliverer { cache: Arc::clone(self), key, ended: Ended::No };
            tokio::spawn(deliverer.run());
        }
        result
    }

    /// Resolves when nothing of the page is in flight.
    pub(super) async fn settled(&self, key: Key) {
        self.until(|state| !state.in_flight.contains_key(&key)).await;
    }

    /// Resolves when nothing of what is reached is in flight. `No`: some of it is lost.
    pub(super) async fn delivered(&self, reach: Reach) -> Delivered {
        self.until(|state| !state.in_flight.keys().any(|key| reach.covers(*key))).await;
        match self.state.lock().lost.iter().any(|key| reach.covers(*key)) {
            true => Delivered::No,
            false => Delivered::Yes,
        }
    }

    /// No flush of the session of what was lost can be acked any more.
    pub(super) fn forget_lost(&self) {
        self.state.lock().lost.clear();
    }

    /// Pages with write-backs in flight.
    pub(super) fn in_flight(&self) -> usize {
        self.state.lock().in_flight.len()
    }

    pub(super) fn counts(&self) -> WriteBackCounts {
        self.state.lock().counts
    }

    async fn until(&self, reached: impl Fn(&State) -> bool) {
        loop {
            let mut settled = std::pin::pin!(self.settled.notified());
            // Before the look: what settles between the two is heard.
            settled.as_mut().enable();
            if reached(&self.state.lock()) {
                return;
            }
            settled.await;
        }
    }

    /// The page's next write-back; `None`: nothing of it is in flight any more.
    fn next(&self, key: Key) -> Option<Arc<WriteBack>> {
        let state = &mut *self.state.lock();
        let next = state.in_flight.get(&key).and_then(|queue| queue.front()).cloned();
        if next.is_none() {
            state.in_flight.remove(&key);
        }
        next
    }

    fn on_delivered(&self, key: Key) {
        let state = &mut *self.state.lock();
        state.counts.delivered += 1;
        let delivered = state.in_flight.get_mut(&key).and_then(std::collections::VecDeque::pop_front);
        debug_assert!(delivered.is_some(), "only the page's one task takes out of its queue");
    }
}

/// Delivers the write-backs of one page.
struct Deliverer {
    cache: Arc<Cache>,
    key: Key,
    ended: Ended,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Ended {
    No,
    AllDelivered,
}

impl Deliverer {
    async fn run(mut self) {
        while let Some(write_back) = self.cache.next(self.key) {
            if let Err(error) = write_back.deliver().await {
                tracing::warn!(
                    address_space = self.key.address_space.get(),
                    page = self.key.page,
                    error = &error as &dyn std::error::Error,
                    "what was written to a page is lost"
                );
                return;
            }
            self.cache.on_delivered(self.key);
        }
        self.ended = Ended::AllDelivered;
    }
}

impl Drop for Deliverer {
    /// Also where the task was stopped with its runtime.
    fn drop(&mut self) {
        if self.ended == Ended::No {
            self.cache.state.lock().lose(self.key);
        }
        self.cache.settled.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_the_bytes_that_were_written() {
        let mut written = [0; PAGE / WORD];
        for (offset, length) in [(0, 1), (60, 10), (70, 2), (128, 64), (4095, 1)] {
            mark(&mut written, offset, length);
        }
        let spans = spans(&written, FrameNumber(3));
        assert!(spans.iter().all(|span| span.frame == FrameNumber(3)));
        let ends: Vec<_> = spans.iter().map(|span| (span.offset, span.length)).collect();
        assert_eq!(ends, [(0, 1), (60, 12), (128, 64), (4095, 1)]);
    }
}
