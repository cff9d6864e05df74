//! [5 of 9] One notice's flush, from its withdrawal to its place in the next ack.
//!
//! ```text
//!   notice --> revoke (in the stream's order) --> permit --> DeviceTlb --> uses ended --> on_flushed
//!                                                                 \
//!                                                            panic: never acked, the session ends
//! ```

use std::pin::Pin;
use std::sync::Arc;

use shootdown_core::{
    AddrRange, FlushReason, FlushReport, FlushTiming, Moment, Notice, NoticeKind, NoticeNumber, Scope,
};
use shootdown_proto::message::MAX_RANGES_A_MESSAGE;
use tokio::sync::{Semaphore, oneshot};

use crate::ranges::at_most;
use crate::session::Session;
use crate::session::holdings::RawCommits;
use crate::ticket::CommitTicket;
use crate::tlb::{DeviceTlb, FlushAllCause, Flushed, Invalidation, Young};

/// A future that is boxed once, where it is made.
pub(crate) type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// A [`DeviceTlb`] whose type is forgotten, so that a session needs no type parameter.
pub(crate) trait AnyTlb: Send + Sync + std::fmt::Debug {
    /// The whole way of one notice, in one allocation.
    fn flush(self: Arc<Self>, flush: Flush) -> BoxFuture<()>;

    fn flush_all(self: Arc<Self>, cause: FlushAllCause) -> BoxFuture<()>;

    fn invalidate(self: Arc<Self>, invalidation: Invalidation) -> BoxFuture<Flushed>;
}

/// Makes a [`DeviceTlb`] an [`AnyTlb`].
pub(crate) struct Vendor<T>(pub(crate) Arc<T>);

impl<T> std::fmt::Debug for Vendor<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Vendor")
    }
}

impl<T: DeviceTlb> AnyTlb for Vendor<T> {
    fn flush(self: Arc<Self>, flush: Flush) -> BoxFuture<()> {
        Box::pin(flush.run(Arc::clone(&self.0)))
    }

    fn flush_all(self: Arc<Self>, cause: FlushAllCause) -> BoxFuture<()> {
        Box::pin(async move { self.0.flush_all(cause).await })
    }

    fn invalidate(self: Arc<Self>, invalidation: Invalidation) -> BoxFuture<Flushed> {
        Box::pin(async move { self.0.invalidate(invalidation).await })
    }
}

/// One notice, applied to the table and not yet flushed.
#[derive(Debug)]
pub(crate) struct Flush {
    session: Arc<Session>,
    permits: Arc<Semaphore>,
    notice: Notice,
    replacement: Option<CommitTicket>,
    /// Resolves when the uses that were open have ended.
    uses: Option<oneshot::Receiver<()>>,
    /// Where the host agent wants timing.
    received: Option<Moment>,
}

impl Flush {
    /// Applies a notice to the table: called in the order of the stream, before anything later of the
    /// stream is looked at.
    pub(crate) fn begin(
        session: &Arc<Session>,
        permits: &Arc<Semaphore>,
        mut notice: Notice,
        received: Option<Moment>,
    ) -> Self {
        if let (NoticeKind::Release, Scope::Range(address_space, _)) = (notice.kind, notice.scope) {
            notice.scope = Scope::Range(address_space, AddrRange::ALL);
            session.holdings.lock().released(address_space);
        }
        let uses = match notice.kind {
            NoticeKind::ClearYoung | NoticeKind::RangeEnd => None,
            NoticeKind::Invalidate
            | NoticeKind::ClearFlushYoung
            | NoticeKind::ChangePte(_)
            | NoticeKind::Release => session.revoke(notice.scope),
        };
        let replacement = match (notice.kind, notice.scope) {
            // Opened here, so that a later notice that overlaps spoils it. Where the subscription is being
            // ended, or nobody claimed it, there is no replacement: nobody would tell of its end.
            (NoticeKind::ChangePte(translation), Scope::Range(address_space, _)) => {
                let opened = CommitTicket::open(session, (address_space, translation.range), &[translation]);
                opened.ok().and_then(|mut tickets| tickets.pop())
            }
            _ => None,
        };
        let (session, permits) = (Arc::clone(session), Arc::clone(permits));
        Self { session, permits, notice, replacement, uses, received }
    }

    async fn run<T: DeviceTlb>(mut self, tlb: Arc<T>) {
        let permit = Arc::clone(&self.permits).acquire_owned().await;
        let replacement = self.replacement.take();
        let brought = call(&*tlb, &self.notice, replacement).await;
        // A flush that waits for a use keeps nobody from flushing: the use may be a long one, or wait for a
        // grant in spite of what `Mapping::begin_use` says, and that grant for the flush that would wait here.
        drop(permit);
        self.finish(brought).await;
    }

    async fn finish(self, brought: Brought) {
        if let Some(uses) = self.uses
            && uses.await.is_err()
        {
            // The table is gone without saying that the uses have ended: this is no ack.
            return std::future::pending().await;
        }
        let session = &self.session;
        let mut young = brought.young;
        match (self.notice.kind, self.notice.scope) {
            (NoticeKind::RangeEnd, _) => {}
            // Its ranges would not say of which address space they are.
            (_, Scope::FlushAll) => {
                let everything = session.holdings.lock().everything_young();
                for (address_space, ranges) in everything {
                    session.report_young(address_space, ranges);
                }
            }
            (_, Scope::Range(_, range)) => {
                let mut holdings = session.holdings.lock();
                young.extend(
                    holdings.mappings.take_young(self.notice.scope).into_iter().map(|(_, range)| range),
                );
                if brought.unknown && holdings.raw_commits() == RawCommits::Made {
                    young.push(range);
                }
            }
        }
        let report = self.received.map(|received| FlushTiming { received, flushed: session.clock().now() });
        session
            .outgoing
            .on_flushed(report_of(self.notice.number, young, brought.dirty, report), self.notice.number);
    }
}

fn report_of(
    notice: NoticeNumber,
    mut young: Vec<AddrRange>,
    mut dirty: Vec<AddrRange>,
    timing: Option<FlushTiming>,
) -> Option<FlushReport> {
    if young.is_empty() && dirty.is_empty() && timing.is_none() {
        return None;
    }
    at_most(&mut young, MAX_RANGES_A_MESSAGE);
    at_most(&mut dirty, MAX_RANGES_A_MESSAGE);
    Some(FlushReport { notice, young, dirty, timing })
}

/// What a call brought back.
#[derive(Debug, Default)]
struct Brought {
    young: Vec<AddrRange>,
    dirty: Vec<AddrRange>,
    /// The device does not know what it used.
    unknown: bool,
}

impl From<Flushed> for Brought {
    fn from(Flushed { young, dirty }: Flushed) -> Self {
        Self { young, dirty, unknown: false }
    }
}

async fn call<T: DeviceTlb>(tlb: &T, notice: &Notice, replacement: Option<CommitTicket>) -> Brought {
    let Scope::Range(address_space, range) = notice.scope else {
        let reason = notice.flush_reason.unwrap_or(FlushReason::OutboxFull);
        tlb.flush_all(FlushAllCause::Host(reason)).await;
        return Brought::default();
    };
    let invalidation = Invalidation {
        address_space,
        range,
        cause: notice.cause,
        owner: notice.owner,
        seq: notice.seq,
        notice: Some(notice.number),
    };
    match notice.kind {
        NoticeKind::RangeEnd => {
            tlb.range_end(address_space, range).await;
            Brought::default()
        }
        NoticeKind::ClearYoung => match tlb.clear_young(invalidation).await {
            Young::Known(young) => Brought { young, ..Brought::default() },
            Young::Unknown => Brought { unknown: true, ..Brought::default() },
        },
        NoticeKind::ClearFlushYoung => tlb.clear_flush_young(invalidation).await.into(),
        NoticeKind::ChangePte(_) => match replacement {
            Some(replacement) => tlb.change_pte(invalidation, replacement).await.into(),
            None => tlb.invalidate(invalidation).await.into(),
        },
        NoticeKind::Invalidate => tlb.invalidate(invalidation).await.into(),
        NoticeKind::Release => tlb.release(invalidation).await.into(),
    }
}
