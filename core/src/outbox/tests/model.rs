//! A model that keeps every event, and knows nothing of merging.

use std::collections::BTreeMap;

use super::*;

#[derive(Clone, Debug)]
pub(super) enum Op {
    Push {
        event: Event,
        token: bool,
    },
    Take {
        max: usize,
    },
    /// Everything up to one of the unacked notices, and some of those above it.
    Ack {
        through: usize,
        above: u8,
        young: u64,
        dirty: u64,
    },
    /// Numbers at random: mostly refused.
    WildAck {
        through: u64,
        selective: Vec<u64>,
        report: Option<u64>,
    },
}

/// Sequences come in any order: two sources of one address space may be told of in either.
fn any_event() -> impl Strategy<Value = Event> {
    let range = (0..16_u64, 1..4_u64);
    let method = (0..16_u64).prop_flat_map(|page| {
        prop_oneof![
            4 => Just(Method::Invalidate),
            2 => Just(Method::RangeEnd),
            1 => Just(Method::ClearYoung),
            1 => Just(Method::ClearFlushYoung),
            2 => Just(change_pte(page)),
            1 => Just(Method::Release),
        ]
    });
    (1..3_u64, 1..1000_u64, range, method, 0..Cause::EVERY.len(), 0..3_u64).prop_map(
        |(id, seq, (first, count), method, cause, owner)| {
            let range = if let Method::ChangePte(to) = method { to.range } else { pages(first, count) };
            let cause = Cause::EVERY[cause];
            Event { cause, owner: OwnerTag::new(owner), ..event(id, seq, method, range) }
        },
    )
}

pub(super) fn any_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (any_event(), any::<bool>()).prop_map(|(event, token)| Op::Push { event, token }),
        2 => (1..6_usize).prop_map(|max| Op::Take { max }),
        2 => (0..6_usize, any::<u8>(), 0..20_u64, 0..20_u64)
            .prop_map(|(through, above, young, dirty)| Op::Ack { through, above, young, dirty }),
        1 => (0..12_u64, prop::collection::vec(1..12_u64, 0..4), prop::option::of(1..12_u64))
            .prop_map(|(through, selective, report)| Op::WildAck { through, selective, report }),
    ]
}

/// An event that was pushed, and what became of it.
#[derive(Clone, Debug)]
pub(super) struct Told {
    event: Event,
    pub(super) token: Option<usize>,
    /// The notice that carried it.
    notice: Option<NoticeNumber>,
}

impl Told {
    fn range(&self) -> AddrRange {
        if self.event.method == Method::Release { AddrRange::ALL } else { self.event.range }
    }

    fn is_hint(&self) -> bool {
        self.event.method == Method::RangeEnd
    }

    fn opens_bracket(&self) -> bool {
        matches!(self.event.method, Method::Invalidate | Method::ChangePte(_) | Method::Release)
    }
}

pub(super) struct Model {
    pub(super) outbox: Outbox<usize>,
    limits: OutboxLimits,
    pub(super) told: Vec<Told>,
    /// Pages of which a RangeEnd is owed.
    hints: BTreeSet<(AddressSpaceId, u64)>,
    pub(super) flush_all_pending: bool,
    sent: BTreeMap<NoticeNumber, (Notice, Moment)>,
    acked: BTreeSet<NoticeNumber>,
    pub(super) resolved: BTreeSet<usize>,
    now: u64,
}

impl Model {
    fn new(limits: OutboxLimits) -> Self {
        Self {
            outbox: Outbox::new(limits),
            limits,
            told: Vec::new(),
            hints: BTreeSet::new(),
            flush_all_pending: false,
            sent: BTreeMap::new(),
            acked: BTreeSet::new(),
            resolved: BTreeSet::new(),
            now: 0,
        }
    }

    fn apply(&mut self, op: &Op) {
        self.now += 1;
        match op {
            Op::Push { event, token } => self.push(*event, *token),
            Op::Take { max } => self.take(*max),
            Op::Ack { through, above, young, dirty } => self.ack_some(*through, *above, *young, *dirty),
            Op::WildAck { through, selective, report: of } => {
                let reports = of.iter().map(|&notice| report(notice, vec![], vec![])).collect();
                self.ack(&Ack { reports, ..ack(*through, selective) });
            }
        }
        self.check_bounds();
    }

    fn push(&mut self, event: Event, token: bool) {
        let token = token.then_some(self.told.len());
        let told = Told { event, token, notice: None };
        let pushed = self.outbox.push(&event, token);
        assert_eq!(pushed == Pushed::Widened, self.outbox_is_widened(pushed), "once widened, until taken");
        let of_event = |&(id, page): &(AddressSpaceId, u64)| {
            id == event.address_space && told.range().contains_address(page * PAGE)
        };
        if pushed == Pushed::Widened {
            self.flush_all_pending = true;
            self.hints.clear();
        } else if told.is_hint() {
            let first = event.range.start() / PAGE;
            self.hints.extend((first..=event.range.last() / PAGE).map(|page| (event.address_space, page)));
        } else if told.opens_bracket() {
            self.hints.retain(|hint| !of_event(hint));
        }
        self.told.push(told);
    }

    fn outbox_is_widened(&self, pushed: Pushed) -> bool {
        self.flush_all_pending || pushed == Pushed::Widened
    }

    /// Contiguity, MergeIsUnion, and the order of hints.
    fn take(&mut self, max: usize) {
        let before = (self.outbox.pending(), self.outbox.unacked());
        let notices = self.outbox.take_notices(max, at(self.now));
        let window = self.limits.window as usize - before.1;
        assert_eq!(notices.len(), max.min(window).min(before.0), "sends all that may be sent");
        for notice in notices {
            let expected = self.sent.last_key_value().map_or(NoticeNumber::FIRST, |(last, _)| last.next());
            assert_eq!(notice.number, expected, "contiguity");
            self.sent.insert(notice.number, (notice, at(self.now)));
            match notice.scope {
                Scope::FlushAll => self.took_flush_all(&notice),
                Scope::Range(id, range) if notice.kind == NoticeKind::RangeEnd => {
                    self.took_hint(&notice, id, range);
                }
                Scope::Range(id, range) => self.took_range(&notice, id, range),
            }
        }
    }

    fn took_flush_all(&mut self, notice: &Notice) {
        assert!(std::mem::take(&mut self.flush_all_pending));
        assert_eq!(notice.flush_reason, Some(FlushReason::OutboxFull));
        assert_eq!(notice.seq, None);
        let carried: Vec<_> = self.told.iter_mut().filter(|told| told.notice.is_none()).collect();
        for told in carried {
            told.notice = Some(notice.number);
            assert!(notice.cause >= told.event.cause || told.is_hint());
            assert!(notice.owner.is_none() || notice.owner == told.event.owner || told.is_hint());
        }
    }

    fn took_hint(&mut self, notice: &Notice, id: AddressSpaceId, range: AddrRange) {
        for page in range.start() / PAGE..=range.last() / PAGE {
            assert!(self.hints.remove(&(id, page)), "a hint that nobody gave, or that is not true any more");
        }
        for told in self.told.iter_mut().filter(|told| told.notice.is_none()) {
            let hit = told.event.address_space == id && told.range().overlaps(range);
            assert!(!hit || !told.opens_bracket(), "sent before the invalidation of a bracket");
            if hit && told.is_hint() {
                told.notice = Some(notice.number);
            }
        }
    }

    fn took_range(&mut self, notice: &Notice, id: AddressSpaceId, range: AddrRange) {
        assert_eq!(notice.flush_reason, None);
        let carried: Vec<&mut Told> = self
            .told
            .iter_mut()
            .filter(|told| told.notice.is_none() && !told.is_hint() && told.event.address_space == id)
            .filter(|told| told.range().overlaps(range))
            .collect();
        assert!(!carried.is_empty(), "a notice of no event");
        let mut covered = RangeSet::of(std::iter::empty());
        for told in &carried {
            assert!(range.contains(told.range()), "covers the union");
            covered.0.push(told.range());
        }
        let covered = RangeSet::of(covered.0.iter());
        assert_eq!(covered.0, [range], "and nothing but the union");
        assert_eq!(notice.seq, carried.iter().map(|told| told.event.seq).max());
        assert_eq!(Some(notice.cause), carried.iter().map(|told| told.event.cause).max());
        let owner = carried[0].event.owner;
        let agree = carried.iter().all(|told| told.event.owner == owner);
        assert_eq!(notice.owner, owner.filter(|_| agree));
        let kinds: Vec<Method> = carried.iter().map(|told| told.event.method).collect();
        assert_eq!(notice.kind, kind_that_does_all(&kinds));
        for told in carried {
            told.notice = Some(notice.number);
        }
    }

    fn ack_some(&mut self, through: usize, above: u8, young: u64, dirty: u64) {
        let unacked: Vec<NoticeNumber> = self.unacked();
        if unacked.is_empty() {
            return;
        }
        let (below, rest) = unacked.split_at(through.min(unacked.len()));
        let selective: Vec<NoticeNumber> = rest
            .iter()
            .enumerate()
            .filter(|(at, _)| above >> (at % 8) & 1 == 1)
            .map(|(_, n)| *n)
            .rev()
            .collect();
        let reports = below
            .iter()
            .chain(&selective)
            .map(|n| FlushReport {
                notice: *n,
                young: vec![pages(young, 2), pages(young / 2, 1)],
                dirty: vec![pages(dirty, 1)],
                timing: None,
            })
            .collect();
        self.ack(&Ack { through: below.last().copied(), selective, reports });
    }

    fn unacked(&self) -> Vec<NoticeNumber> {
        self.sent.keys().filter(|n| !self.acked.contains(n)).copied().collect()
    }

    pub(super) fn acked_through(&self) -> Option<NoticeNumber> {
        self.sent.keys().take_while(|n| self.acked.contains(n)).last().copied()
    }

    /// What the ack newly acks, if it is to be accepted.
    fn newly(&self, ack: &Ack) -> Option<BTreeSet<NoticeNumber>> {
        let mut newly = BTreeSet::new();
        if let Some(through) = ack.through {
            if !self.sent.contains_key(&through) || Some(through) < self.acked_through() {
                return None;
            }
            newly.extend(self.unacked().into_iter().filter(|n| *n <= through));
        }
        for n in &ack.selective {
            let new = self.sent.contains_key(n) && !self.acked.contains(n);
            if !new || !newly.insert(*n) {
                return None;
            }
        }
        let reported = ack.reports.iter().all(|report| newly.contains(&report.notice));
        (reported && !newly.is_empty()).then_some(newly)
    }

    fn ack(&mut self, ack: &Ack) {
        let expected = self.newly(ack);
        let before = format!("{:?}", self.outbox);
        let resolved = self.outbox.on_ack(ack);
        let Some(newly) = expected else {
            assert!(resolved.is_err(), "{ack:?}");
            assert_eq!(format!("{:?}", self.outbox), before);
            return;
        };
        let resolved = resolved.unwrap();
        self.acked.extend(&newly);
        for r in &resolved {
            assert!(self.resolved.insert(r.token), "a token is handed back once");
            let told = &self.told[r.token];
            assert!(newly.contains(&r.notice));
            assert!(
                told.is_hint() || told.notice == Some(r.notice),
                "by the ack of the notice that carried it"
            );
            assert_eq!(r.sent, self.sent[&r.notice].1);
            let used = |of: fn(&FlushReport) -> &Vec<AddrRange>| {
                let mine = ack.reports.iter().filter(|report| report.notice == r.notice);
                mine.flat_map(of).any(|range| range.overlaps(told.range()))
            };
            assert_eq!(r.young, used(|report| &report.young));
            let everything = self.sent[&r.notice].0.scope == Scope::FlushAll;
            assert_eq!(r.dirty, everything || used(|report| &report.dirty));
        }
        let due = self
            .told
            .iter()
            .filter(|told| !told.is_hint() && told.notice.is_some_and(|n| newly.contains(&n)));
        for told in due {
            assert!(told.token.is_none_or(|token| self.resolved.contains(&token)), "{told:?}");
        }
    }

    fn check_bounds(&self) {
        assert!(self.outbox.pending() <= self.limits.max_pending);
        assert!(self.outbox.unacked() <= self.limits.window as usize);
        let unacked = self.unacked();
        assert_eq!(self.outbox.unacked(), unacked.len());
        assert_eq!(self.outbox.acked_through(), self.acked_through());
        assert_eq!(self.outbox.last_sent(), self.sent.keys().last().copied());
        assert_eq!(self.outbox.oldest_unacked_sent(), unacked.first().map(|n| self.sent[n].1));
        let may_send = self.outbox.pending() > 0 && unacked.len() < self.limits.window as usize;
        assert_eq!(self.outbox.has_sendable(), may_send);
    }

    /// NeverDrop: what was pushed is sent, and what was given is handed back.
    pub(super) fn drain(&mut self) {
        for _ in 0..=self.told.len() + self.hints.len() {
            self.take(usize::MAX);
            if let Some(last) = self.unacked().last().copied() {
                self.ack(&Ack { through: Some(last), ..Ack::default() });
            }
        }
        assert_eq!((self.outbox.pending(), self.outbox.unacked()), (0, 0));
        let lost = self.told.iter().find(|told| told.notice.is_none() && !told.is_hint());
        assert!(lost.is_none(), "in no notice: {lost:?}");
        assert!(self.hints.is_empty(), "hints that were not sent: {:?}", self.hints);
        let given: BTreeSet<usize> = self.told.iter().filter_map(|told| told.token).collect();
        assert_eq!(self.resolved, given);
    }
}

/// Written from the table in `notice.rs`, not from the merge.
fn kind_that_does_all(methods: &[Method]) -> NoticeKind {
    let has = |wanted: fn(&Method) -> bool| methods.iter().any(wanted);
    if has(|method| *method == Method::Release) {
        return NoticeKind::Release;
    }
    if let [Method::ChangePte(to)] = methods {
        return NoticeKind::ChangePte(*to);
    }
    if has(|method| matches!(method, Method::Invalidate | Method::ChangePte(_))) {
        return NoticeKind::Invalidate;
    }
    if has(|method| *method == Method::ClearFlushYoung) {
        return NoticeKind::ClearFlushYoung;
    }
    NoticeKind::ClearYoung
}

pub(super) fn any_limits() -> impl Strategy<Value = OutboxLimits> {
    (1..6_u32, 1..9_usize).prop_map(|(window, max_pending)| OutboxLimits { window, max_pending })
}

pub(super) fn run(limits: OutboxLimits, ops: &[Op]) -> Model {
    let mut model = Model::new(limits);
    for op in ops {
        model.apply(op);
    }
    model
}
