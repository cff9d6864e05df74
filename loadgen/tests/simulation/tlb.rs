//! A device's TLB: what it holds by itself, what is going on through it, and how long a flush takes.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use shootdown_client::{
    AddrRange, CommitTicket, DeviceTlb, Enforcement, FlushAllCause, Flushed, Gate, Invalidation, Mapping,
    Young,
};
use tokio::sync::Notify;

use crate::fabric::DeviceRun;
use crate::memory::{range_of, whole_pages_of};
use crate::plan::{Broken, DevicePlan, Table};
use crate::shared::Shared;
use crate::trace::{Asks, Frame, Life, Pages, Scope, Span, Told, What};

/// One life's TLB: a session has it from Hello until everything is flushed.
pub struct SimTlb {
    shared: Arc<Shared>,
    life: Life,
    run: DeviceRun,
    plan: DevicePlan,
    table: Mutex<Own>,
    /// How often its device had connected before.
    connections_before: u64,
    use_ended: Notify,
    rng: Mutex<StdRng>,
    /// What its workers may fault.
    pub subscribed: Mutex<Vec<u64>>,
    /// Translations that came by `change_pte`.
    pub replacements: Mutex<Vec<Mapping>>,
}

/// A table of the device's own, and the uses through it.
#[derive(Debug, Default)]
struct Own {
    entries: Vec<Entry>,
    uses: Vec<(Span, Entry)>,
    /// Pages that were used since that was last told.
    used: BTreeSet<(u64, u64)>,
}

#[derive(Debug, Clone, Copy)]
pub struct Entry {
    space: u64,
    page: u64,
    frame: Frame,
}

impl SimTlb {
    pub fn new(shared: Arc<Shared>, life: Life, run: DeviceRun, plan: DevicePlan, seed: u64) -> Self {
        let entries = shared.kept.lock().remove(&plan.index).unwrap_or_default();
        let connections_before = shared.connections_of(plan.index);
        Self {
            shared,
            connections_before,
            life,
            run,
            plan,
            table: Mutex::new(Own { entries, ..Own::default() }),
            use_ended: Notify::new(),
            rng: Mutex::new(StdRng::seed_from_u64(seed)),
            subscribed: Mutex::default(),
            replacements: Mutex::default(),
        }
    }

    pub fn tell(&self, what: impl FnOnce(Life) -> What) {
        self.shared.trace.record(what(self.life));
    }

    /// A translation is in the SDK's table.
    pub fn on_installed(&self, mapping: &Mapping) {
        let (space, page) = (mapping.address_space().get(), mapping.range().start() >> 12);
        let Ok(guard) = mapping.begin_use() else { return };
        let frame = Frame::of(guard.frame());
        self.shared.trace.record(What::Installed { life: self.life, space, page, frame });
    }

    /// Puts a translation into the device's own table, unless a notice has overtaken it.
    pub fn install(&self, ticket: CommitTicket) {
        let mut table = self.table.lock();
        let (space, page) = (ticket.address_space().get(), ticket.range().start() >> 12);
        if let Ok(translation) = ticket.commit_raw() {
            let frame = Frame::of(translation.frame);
            table.entries.retain(|entry| (entry.space, entry.page) != (space, page));
            table.entries.push(Entry { space, page, frame });
            self.shared.trace.record(What::Installed { life: self.life, space, page, frame });
        }
    }

    /// Uses a translation of the device's own table, if it has one and may.
    pub fn begin_use(self: &Arc<Self>, gate: &Gate, space: u64, page: u64) -> Option<Use> {
        let mut table = self.table.lock();
        if self.plan.enforcement == Enforcement::ByDevice {
            gate.check().ok()?;
        }
        let entry = *table.entries.iter().find(|entry| (entry.space, entry.page) == (space, page))?;
        let begun = Use::begin(self, space, page, entry.frame)?;
        table.used.insert((space, page));
        table.uses.push((begun.span, entry));
        Some(begun)
    }

    async fn flush(
        &self,
        scope: Scope,
        invalidation: Option<Invalidation>,
        replacement: Option<CommitTicket>,
    ) -> Vec<AddrRange> {
        let span = self.shared.trace.next_span();
        let told = invalidation.and_then(|invalidation| told(&invalidation, Asks::Stop));
        let (life, covers) = (self.life, scope.clone());
        self.shared.trace.record(What::FlushBegan { life, span, scope, told });
        if self.is_skipped(&covers) {
            self.shared.trace.record(What::FlushEnded { span });
            return Vec::new();
        }
        let covered = |entry: &Entry| match &covers {
            Scope::Pages(pages) => pages.holds(entry.space, entry.page),
            Scope::Everything | Scope::EverythingOfTheSession => true,
        };
        // Hardware that nobody stops goes on until it has come to the flush.
        let goes_on = self.plan.enforcement == Enforcement::ByNobody;
        if goes_on {
            self.take_time().await;
        }
        let open: Vec<Span> = {
            let mut table = self.table.lock();
            table.entries.retain(|entry| !covered(entry));
            table.uses.iter().filter(|(_, entry)| covered(entry)).map(|(span, _)| *span).collect()
        };
        if !goes_on {
            self.take_time().await;
        }
        if self.shared.plan.broken != Broken::AckBeforeUsesEnded {
            self.until_ended(&open).await;
        }
        match (replacement, self.plan.table) {
            (Some(ticket), Table::Own) => self.install(ticket),
            (Some(ticket), Table::Sdk) => {
                if let Ok(mapping) = ticket.commit() {
                    self.on_installed(&mapping);
                    self.replacements.lock().push(mapping);
                }
            }
            (None, _) => {}
        }
        let used = self.take_used(&covers);
        self.shared.trace.record(What::FlushEnded { span });
        used
    }

    /// What of it was used through the device's own table since it was last told; what is being used is used again.
    fn take_used(&self, scope: &Scope) -> Vec<AddrRange> {
        let covered = |space: u64, page: u64| match scope {
            Scope::Pages(pages) => pages.holds(space, page),
            Scope::Everything | Scope::EverythingOfTheSession => true,
        };
        let mut table = self.table.lock();
        let used: Vec<_> = table.used.extract_if(.., |(space, page)| covered(*space, *page)).collect();
        let open: Vec<_> = table.uses.iter().map(|(_, entry)| (entry.space, entry.page)).collect();
        table.used.extend(open);
        used.into_iter().map(|(_, page)| range_of(page..page + 1)).collect()
    }

    fn is_skipped(&self, scope: &Scope) -> bool {
        match self.shared.plan.broken {
            Broken::ResumeSkipsFlush => {
                // The session has one connection at a time.
                let is_another = self.shared.connections_of(self.plan.index) > self.connections_before + 1;
                is_another && matches!(scope, Scope::Pages(_))
            }
            Broken::TableOutlivesSession if *scope == Scope::EverythingOfTheSession => {
                let entries = self.table.lock().entries.clone();
                self.shared.kept.lock().entry(self.plan.index).or_default().extend(entries);
                true
            }
            _ => false,
        }
    }

    /// As long as the hardware takes; for ever while it hangs.
    async fn take_time(&self) {
        let most = self.plan.flush;
        if !most.is_zero() {
            let time = self.rng.lock().random_range(std::time::Duration::ZERO..=most);
            tokio::time::sleep(time).await;
        }
        self.shared.hangs[self.plan.index].until(|hangs| !hangs).await;
    }

    async fn until_ended(&self, uses: &[Span]) {
        loop {
            let mut ended = std::pin::pin!(self.use_ended.notified());
            ended.as_mut().enable();
            if !self.table.lock().uses.iter().any(|(span, _)| uses.contains(span)) {
                return;
            }
            ended.await;
        }
    }

    fn pages(invalidation: &Invalidation) -> Scope {
        // Hardware drops whole pages: those that are named entirely.
        let pages = whole_pages_of(invalidation.range);
        Scope::Pages(Pages { space: invalidation.address_space.get(), pages })
    }
}

/// `None`: the device itself asked for the flush.
fn told(invalidation: &Invalidation, asks: Asks) -> Option<Told> {
    let (notice, seq) = invalidation.notice.zip(invalidation.seq)?;
    let range = invalidation.range;
    let bytes = range.start()..range.last().saturating_add(1);
    Some(Told { notice: notice.get(), seq: seq.get(), bytes, asks })
}

impl DeviceTlb for SimTlb {
    async fn invalidate(&self, invalidation: Invalidation) -> Flushed {
        let young = self.flush(Self::pages(&invalidation), Some(invalidation), None).await;
        Flushed { young, ..Flushed::default() }
    }

    async fn flush_all(&self, cause: FlushAllCause) {
        let scope = match cause {
            FlushAllCause::Host(_) => Scope::Everything,
            FlushAllCause::Connecting | FlushAllCause::Leaving | FlushAllCause::Lost => {
                Scope::EverythingOfTheSession
            }
        };
        self.flush(scope, None, None).await;
    }

    async fn clear_young(&self, invalidation: Invalidation) -> Young {
        // Nothing is dropped, but it is asked and answered as a flush is.
        let span = self.shared.trace.next_span();
        let (scope, told) = (Self::pages(&invalidation), told(&invalidation, Asks::Young));
        let covers = scope.clone();
        self.shared.trace.record(What::FlushBegan { life: self.life, span, scope, told });
        self.take_time().await;
        // Every second device has no bits of its own.
        let young = match self.plan.index % 2 {
            0 => Young::Known(self.take_used(&covers)),
            _ => Young::Unknown,
        };
        self.shared.trace.record(What::FlushEnded { span });
        young
    }

    async fn change_pte(&self, invalidation: Invalidation, replacement: CommitTicket) -> Flushed {
        let young = self.flush(Self::pages(&invalidation), Some(invalidation), Some(replacement)).await;
        Flushed { young, ..Flushed::default() }
    }
}

/// The device reaches into a frame, until this is dropped.
pub struct Use {
    tlb: Arc<SimTlb>,
    span: Span,
}

impl Use {
    /// `None`: the device is cut off.
    pub fn begin(tlb: &Arc<SimTlb>, space: u64, page: u64, frame: Frame) -> Option<Self> {
        let trace = &tlb.shared.trace;
        let span = trace.next_span();
        let begun = || trace.record(What::UseBegan { life: tlb.life, span, space, page, frame });
        tlb.shared.fabric.begin(tlb.run, span, begun).then(|| Self { tlb: Arc::clone(tlb), span })
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        self.tlb.shared.fabric.end(self.span, &self.tlb.shared.trace);
        self.tlb.table.lock().uses.retain(|(span, _)| *span != self.span);
        self.tlb.use_ended.notify_waiters();
    }
}

/// The device has asked for pages.
#[must_use]
pub struct Asking {
    tlb: Arc<SimTlb>,
    span: Span,
}

impl Asking {
    pub fn begin(tlb: &Arc<SimTlb>, space: u64, pages: Range<u64>) -> Self {
        let span = tlb.shared.trace.next_span();
        tlb.tell(|life| What::FaultBegan { life, span, pages: Pages { space, pages } });
        Self { tlb: Arc::clone(tlb), span }
    }

    /// It was granted. Those that come to nothing with their stream do so all at once, in no order.
    pub fn granted(self) {
        self.tlb.shared.trace.record(What::FaultEnded { span: self.span });
    }
}
