use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::ack::AckTracker;
use crate::event::{Access, Cause, Method, Translation};
use crate::id::{AddressSpaceId, FrameNumber, OwnerTag, Seq};
use crate::notice::{FlushReason, NoticeKind};
use crate::range::PageSize;

const PAGE: u64 = PageSize::BASE.bytes();

fn pages(from: u64, count: u64) -> AddrRange {
    AddrRange::new(from * PAGE, (from + count) * PAGE).unwrap()
}

fn n(number: u64) -> NoticeNumber {
    NoticeNumber::new(number).unwrap()
}

fn at(millis: u64) -> Moment {
    Moment::ZERO + Duration::from_millis(millis)
}

fn change_pte(page: u64) -> Method {
    let frame = FrameNumber(page + 100);
    Method::ChangePte(Translation { range: pages(page, 1), frame, access: Access::Read })
}

fn event(id: u64, seq: u64, method: Method, range: AddrRange) -> Event {
    Event {
        address_space: AddressSpaceId::new(id).unwrap(),
        seq: Seq::new(seq).unwrap(),
        range,
        method,
        cause: Cause::Unmap,
        owner: None,
    }
}

fn outbox(window: u32, max_pending: usize) -> Outbox<usize> {
    Outbox::new(OutboxLimits { window, max_pending })
}

fn ack(through: u64, selective: &[u64]) -> Ack {
    Ack {
        through: NoticeNumber::new(through),
        selective: selective.iter().map(|&number| n(number)).collect(),
        reports: Vec::new(),
    }
}

fn report(notice: u64, young: Vec<AddrRange>, dirty: Vec<AddrRange>) -> FlushReport {
    FlushReport { notice: n(notice), young, dirty, timing: None }
}

fn tokens(resolved: Vec<Resolved<usize>>) -> Vec<usize> {
    resolved.into_iter().map(|resolved| resolved.token).collect()
}

/// Pushes events of one address space, in order, and says what is sent then, without numbers.
fn sent_for(events: &[(Method, AddrRange)]) -> Vec<(NoticeKind, AddrRange)> {
    let mut outbox = outbox(64, 64);
    for (index, &(method, range)) in events.iter().enumerate() {
        outbox.push(&event(1, index as u64 + 1, method, range), None);
    }
    let notices = outbox.take_notices(usize::MAX, at(0));
    notices.iter().map(|notice| (notice.kind, range_of(notice.scope).unwrap())).collect()
}

fn range_of(scope: Scope) -> Option<AddrRange> {
    match scope {
        Scope::Range(_, range) => Some(range),
        Scope::FlushAll => None,
    }
}

// ---- unit tests: one rule each ----

#[test]
fn a_stream_that_keeps_up_gets_each_event_precisely() {
    let mut outbox = outbox(8, 8);
    for page in 0..4 {
        assert_eq!(outbox.push(&event(1, page + 1, change_pte(page), pages(page, 1)), None), Pushed::Queued);
        let notices = outbox.take_notices(usize::MAX, at(page));
        assert_eq!(notices.len(), 1);
        assert!(matches!(notices[0].kind, NoticeKind::ChangePte(to) if to.range == pages(page, 1)));
    }
}

#[test]
fn what_a_merge_asks_for_is_what_each_part_asked_for() {
    let methods = [
        Method::RangeEnd,
        Method::ClearYoung,
        Method::ClearFlushYoung,
        change_pte(0),
        Method::Invalidate,
        Method::Release,
    ];
    let mut table = String::new();
    for first in methods {
        for second in methods {
            let sent = sent_for(&[(first, pages(0, 1)), (second, pages(0, 1))]);
            let sent: Vec<_> =
                sent.iter().map(|(kind, range)| format!("{} {range}", kind_name(*kind))).collect();
            table += &format!("{:24} then {:24} -> {}\n", first.name(), second.name(), sent.join(", "));
        }
    }
    insta::assert_snapshot!("merged_kinds", table);
}

fn kind_name(kind: NoticeKind) -> &'static str {
    match kind {
        NoticeKind::RangeEnd => "RangeEnd",
        NoticeKind::ClearYoung => "ClearYoung",
        NoticeKind::ClearFlushYoung => "ClearFlushYoung",
        NoticeKind::ChangePte(_) => "ChangePte",
        NoticeKind::Invalidate => "Invalidate",
        NoticeKind::Release => "Release",
    }
}

#[test]
fn neighbours_become_one_only_where_nothing_precise_is_lost() {
    let inv = Method::Invalidate;
    assert_eq!(sent_for(&[(inv, pages(0, 1)), (inv, pages(1, 1))]), [(NoticeKind::Invalidate, pages(0, 2))]);
    assert_eq!(
        sent_for(&[(inv, pages(0, 1)), (inv, pages(2, 1)), (inv, pages(1, 1))]),
        [(NoticeKind::Invalidate, pages(0, 3))],
        "a bridge joins both sides"
    );
    assert_eq!(sent_for(&[(change_pte(0), pages(0, 1)), (change_pte(1), pages(1, 1))]).len(), 2);
    assert_eq!(sent_for(&[(inv, pages(0, 1)), (Method::ClearYoung, pages(1, 1))]).len(), 2);
    let mut outbox = outbox(8, 8);
    let mine = Event { owner: OwnerTag::new(7), ..event(1, 1, inv, pages(0, 1)) };
    outbox.push(&mine, None);
    assert_eq!(outbox.push(&event(1, 2, inv, pages(1, 1)), None), Pushed::Queued);
    assert_eq!(outbox.push(&event(2, 1, inv, pages(0, 1)), None), Pushed::Queued, "another address space");
}

#[test]
fn a_range_end_is_never_sent_before_the_invalidation_of_its_bracket() {
    use NoticeKind::{Invalidate, RangeEnd};
    // The second bracket's end touches the first's, and would go out with it ahead of its start.
    let sent = sent_for(&[
        (Method::Invalidate, pages(0, 1)),
        (Method::RangeEnd, pages(0, 1)),
        (Method::Invalidate, pages(5, 1)),
        (Method::Invalidate, pages(1, 4)),
        (Method::RangeEnd, pages(1, 4)),
    ]);
    assert_eq!(sent, [(Invalidate, pages(0, 6)), (RangeEnd, pages(0, 5))]);
    let sent = sent_for(&[
        (Method::Invalidate, pages(0, 1)),
        (Method::RangeEnd, pages(0, 1)),
        (Method::ClearYoung, pages(8, 1)),
        (change_pte(1), pages(1, 1)),
        (Method::RangeEnd, pages(1, 1)),
    ]);
    assert_eq!(sent.last(), Some(&(RangeEnd, pages(0, 2))), "the merged hint takes the latest place");
}

#[test]
fn a_new_bracket_takes_its_pages_out_of_a_pending_range_end() {
    use NoticeKind::{Invalidate, RangeEnd};
    let sent = sent_for(&[
        (Method::Invalidate, pages(0, 9)),
        (Method::RangeEnd, pages(0, 9)),
        (Method::Invalidate, pages(3, 2)),
    ]);
    assert_eq!(sent, [(Invalidate, pages(0, 9)), (RangeEnd, pages(0, 3)), (RangeEnd, pages(5, 4))]);
    let top = AddrRange::new(u64::MAX - 8191, 0).unwrap();
    let sent = sent_for(&[
        (Method::RangeEnd, AddrRange::ALL),
        (Method::Invalidate, pages(0, 1)),
        (Method::Invalidate, AddrRange::page_of(u64::MAX, PageSize::BASE)),
    ]);
    assert!(sent.iter().any(|(kind, range)| *kind == RangeEnd && range.start() == PAGE));
    assert!(sent.iter().all(|(kind, range)| *kind != RangeEnd || range.last() < top.last()));
    let sent = sent_for(&[(Method::RangeEnd, pages(0, 9)), (Method::ClearFlushYoung, pages(3, 2))]);
    assert_eq!(sent[0], (RangeEnd, pages(0, 9)), "clear_flush_young opens no bracket");
}

/// Not even a token that was given with a hint, which nobody need wait for.
#[test]
fn a_token_of_a_swallowed_range_end_is_not_lost() {
    let mut outbox = outbox(8, 8);
    outbox.push(&event(1, 1, Method::RangeEnd, pages(0, 1)), Some(1));
    outbox.push(&event(1, 2, Method::Invalidate, pages(0, 1)), Some(2));
    assert_eq!(outbox.take_notices(8, at(0)).len(), 1);
    let mut resolved = tokens(outbox.on_ack(&ack(1, &[])).unwrap());
    resolved.sort_unstable();
    assert_eq!(resolved, [1, 2]);
}

#[test]
fn release_covers_the_whole_address_space_and_takes_in_what_is_pending_there() {
    let mut outbox = outbox(8, 8);
    outbox.push(&event(1, 1, Method::Invalidate, pages(3, 1)), Some(1));
    outbox.push(&event(2, 1, Method::Invalidate, pages(3, 1)), Some(2));
    outbox.push(&event(1, 2, Method::Release, pages(0, 1)), Some(3));
    let notices = outbox.take_notices(8, at(0));
    assert_eq!(notices[0].scope, Scope::Range(AddressSpaceId::new(1).unwrap(), AddrRange::ALL));
    assert_eq!(notices[0].kind, NoticeKind::Release);
    assert_eq!(notices.len(), 2);
    assert_eq!(tokens(outbox.on_ack(&ack(1, &[])).unwrap()).len(), 2);
}

#[test]
fn one_range_too_many_becomes_one_flush_all_that_takes_in_everything_until_it_is_taken() {
    let mut outbox = outbox(4, 3);
    for page in 0..3 {
        let pushed =
            outbox.push(&event(1, page + 1, Method::Invalidate, pages(2 * page, 1)), Some(page as usize));
        assert_eq!(pushed, Pushed::Queued);
    }
    let migrate = Event { cause: Cause::Release, ..event(2, 1, Method::Invalidate, pages(99, 1)) };
    assert_eq!(outbox.push(&migrate, Some(3)), Pushed::Widened);
    assert_eq!(outbox.push(&event(1, 4, Method::RangeEnd, pages(0, 1)), None), Pushed::Widened);
    assert_eq!(outbox.push(&event(3, 1, Method::Invalidate, pages(0, 1)), Some(4)), Pushed::Widened);
    assert_eq!(outbox.pending(), 1);
    let notices = outbox.take_notices(8, at(0));
    assert_eq!(notices.len(), 1);
    let all = notices[0];
    assert_eq!((all.scope, all.flush_reason), (Scope::FlushAll, Some(FlushReason::OutboxFull)));
    assert_eq!((all.kind, all.seq, all.cause), (NoticeKind::Invalidate, None, Cause::Release));
    assert_eq!(
        outbox.push(&event(1, 5, Method::Invalidate, pages(0, 1)), None),
        Pushed::Queued,
        "it was taken"
    );
    let mut resolved = tokens(outbox.on_ack(&ack(1, &[])).unwrap());
    resolved.sort_unstable();
    assert_eq!(resolved, [0, 1, 2, 3, 4]);
}

#[test]
fn one_slow_flush_holds_one_place_of_the_window() {
    let mut outbox = outbox(2, 8);
    for round in 0..50_u64 {
        outbox.push(&event(1, round + 1, Method::Invalidate, pages(2 * round, 1)), None);
        assert_eq!(outbox.take_notices(8, at(round)).len(), 1);
        if round > 0 {
            outbox.on_ack(&ack(0, &[round + 1])).unwrap();
        }
        assert!(outbox.unacked() <= 2);
    }
    assert_eq!((outbox.acked_through(), outbox.oldest_unacked_sent()), (None, Some(at(0))));
    outbox.on_ack(&ack(1, &[])).unwrap();
    assert_eq!((outbox.acked_through(), outbox.unacked()), (Some(n(50)), 0));
}

#[test]
fn each_ack_that_does_not_fit_is_refused_with_its_reason() {
    let fresh = || {
        let mut outbox = outbox(8, 8);
        for page in 0..6 {
            outbox.push(&event(1, page + 1, Method::Invalidate, pages(2 * page, 1)), Some(page as usize));
        }
        outbox.take_notices(5, at(0));
        outbox.on_ack(&ack(2, &[4])).unwrap();
        outbox
    };
    let with_report = |ack: Ack, notice| Ack { reports: vec![report(notice, vec![], vec![])], ..ack };
    let never = |notice| AckError::NeverSent { notice: n(notice), last_sent: Some(n(5)) };
    let cases = [
        (ack(6, &[]), never(6), "pending is not sent"),
        (ack(0, &[3, 9]), never(9), "one of several"),
        (ack(2, &[3, 3, 7]), never(7), "the fatal one wins"),
        (ack(1, &[3]), AckError::Regressed { through: n(1), acked_through: n(2) }, ""),
        (ack(2, &[]), AckError::Twice { notice: n(2) }, "nothing new"),
        (ack(2, &[4]), AckError::Twice { notice: n(4) }, "acked out of turn before"),
        (ack(0, &[2]), AckError::Twice { notice: n(2) }, ""),
        (ack(0, &[3, 3]), AckError::Twice { notice: n(3) }, ""),
        (ack(3, &[3]), AckError::Twice { notice: n(3) }, "twice in one ack"),
        (ack(0, &[]), AckError::Empty, ""),
        (with_report(ack(3, &[]), 5), AckError::ReportForUnacked { notice: n(5) }, ""),
        (with_report(ack(3, &[]), 2), AckError::ReportForUnacked { notice: n(2) }, "acked before"),
        (with_report(ack(0, &[3]), 8), AckError::ReportForUnacked { notice: n(8) }, ""),
    ];
    for (ack, error, why) in cases {
        let mut outbox = fresh();
        let before = format!("{outbox:?}");
        assert_eq!(outbox.on_ack(&ack), Err(error), "{ack:?} {why}");
        assert_eq!(format!("{outbox:?}"), before, "a refused ack changes nothing: {ack:?}");
        assert_eq!(error.is_fatal(), matches!(error, AckError::NeverSent { .. }));
    }
    let mut outbox = fresh();
    assert_eq!(tokens(outbox.on_ack(&ack(2, &[3])).unwrap()), [2], "the same through, and something new");
    assert_eq!(outbox.acked_through(), Some(n(4)), "moves up over what was acked out of turn");
}

/// Five notices sent at 0 ms, 2 and 4 acked, one more pending.
fn interrupted() -> Outbox<usize> {
    let mut outbox = outbox(8, 8);
    for page in 0..5 {
        outbox.push(&event(1, page + 1, Method::Invalidate, pages(page * 2, 1)), Some(page as usize + 1));
    }
    assert_eq!(outbox.take_notices(8, at(0)).len(), 5);
    outbox.on_ack(&ack(0, &[2, 4])).unwrap();
    outbox.push(&event(1, 9, Method::Invalidate, pages(99, 1)), Some(6));
    outbox
}

/// Invariant 12: only above the highest notice that is acked, and only up to what was sent.
#[test]
fn resume_or_flush() {
    let outbox = interrupted();
    for received in [4, 5] {
        assert_eq!(outbox.can_resume(NoticeNumber::new(received)), Ok(()));
    }
    for received in [0, 1, 2, 3] {
        let received_through = NoticeNumber::new(received);
        let refused = NotRetained::BelowFloor { received_through, acked: n(4) };
        assert_eq!(outbox.can_resume(received_through), Err(refused));
    }
    let refused = NotRetained::NeverSent { received_through: Some(n(6)), last_sent: Some(n(5)) };
    assert_eq!(outbox.can_resume(Some(n(6))), Err(refused));
}

#[test]
fn what_is_not_acked_is_sent_again_as_it_was_and_before_anything_new() {
    let mut outbox = interrupted();
    outbox.on_resumed();
    assert_eq!(outbox.retained_floor(), Some(n(1)));
    let first = outbox.take_notices(2, at(50));
    assert_eq!(first.iter().map(|notice| notice.number.get()).collect::<Vec<_>>(), [1, 3]);
    assert_eq!(first[1].scope, Scope::Range(AddressSpaceId::FIRST, pages(4, 1)));
    assert!(outbox.is_sending_again() && outbox.has_sendable());
    // 5 is acked before its turn comes: the device had received it.
    assert_eq!(tokens(outbox.on_ack(&ack(0, &[5])).unwrap()), [5]);
    assert!(!outbox.is_sending_again());
    let rest = outbox.take_notices(8, at(50));
    assert_eq!(rest.iter().map(|notice| notice.number.get()).collect::<Vec<_>>(), [6]);
    assert_eq!(outbox.oldest_unacked_sent(), Some(at(0)), "T_ack counts from the first time");
    assert_eq!(tokens(outbox.on_ack(&ack(6, &[])).unwrap()), [1, 3, 6]);
    assert_eq!(outbox.take_notices(8, at(60)), []);
}

#[test]
fn an_ack_of_before_the_resume_may_come_again_and_one_of_after_it_may_not() {
    let mut outbox = interrupted();
    outbox.on_resumed();
    outbox.take_notices(8, at(50));
    let told_again = Ack { reports: vec![report(2, vec![], vec![pages(2, 1)])], ..ack(0, &[1, 2]) };
    assert_eq!(tokens(outbox.on_ack(&told_again).unwrap()), [1]);
    assert_eq!(outbox.acked_through(), Some(n(2)));
    assert_eq!(tokens(outbox.on_ack(&ack(1, &[])).unwrap()), Vec::<usize>::new(), "it does not go back");
    assert_eq!(outbox.acked_through(), Some(n(2)));
    assert_eq!(tokens(outbox.on_ack(&ack(1, &[4, 5])).unwrap()), [5]);
    assert_eq!(tokens(outbox.on_ack(&ack(2, &[6])).unwrap()), [6]);
    assert_eq!(outbox.on_ack(&ack(0, &[6])), Err(AckError::Twice { notice: n(6) }));
    assert_eq!(outbox.on_ack(&ack(0, &[3, 3])), Err(AckError::Twice { notice: n(3) }));
    assert_eq!(
        outbox.on_ack(&ack(0, &[7])),
        Err(AckError::NeverSent { notice: n(7), last_sent: Some(n(6)) })
    );
    let of_an_unacked = Ack { reports: vec![report(3, vec![], vec![])], ..ack(0, &[2]) };
    assert_eq!(outbox.on_ack(&of_an_unacked), Err(AckError::ReportForUnacked { notice: n(3) }));
    assert_eq!(tokens(outbox.on_ack(&ack(6, &[])).unwrap()), [3]);
    assert_eq!(outbox.on_ack(&ack(6, &[])), Err(AckError::Twice { notice: n(6) }));
}

#[test]
fn young_and_dirty_bits_go_to_the_tokens_whose_range_was_used() {
    let mut outbox = outbox(1, 8);
    outbox.push(&event(1, 1, Method::Invalidate, pages(50, 1)), None);
    outbox.take_notices(8, at(1));
    outbox.push(&event(1, 2, Method::ClearFlushYoung, pages(0, 3)), Some(0));
    outbox.push(&event(1, 3, Method::Invalidate, pages(2, 4)), Some(1));
    outbox.push(&event(1, 4, Method::Invalidate, pages(5, 4)), Some(2));
    outbox.on_ack(&ack(1, &[])).unwrap();
    let merged = outbox.take_notices(8, at(3));
    assert_eq!(
        (merged.len(), merged[0].scope),
        (1, Scope::Range(AddressSpaceId::new(1).unwrap(), pages(0, 9)))
    );
    let timing = Some(FlushTiming { received: at(1), flushed: at(2) });
    let young = vec![pages(9, 1), pages(0, 1), pages(1, 1), pages(20, 2)];
    let reports = vec![FlushReport { notice: n(2), young, dirty: vec![pages(5, 4)], timing }];
    let resolved = outbox.on_ack(&Ack { reports, ..ack(2, &[]) }).unwrap();
    let mut bits: Vec<_> = resolved.iter().map(|r| (r.token, r.young, r.dirty, r.timing, r.sent)).collect();
    bits.sort_unstable_by_key(|bits| bits.0);
    assert_eq!(
        bits,
        [(0, true, false, timing, at(3)), (1, false, true, timing, at(3)), (2, false, true, timing, at(3)),]
    );
}

/// A device that flushed everything can name no range: it may have written any, and each waiter must know.
#[test]
fn after_a_flush_of_everything_each_token_is_dirty() {
    let mut outbox = Outbox::new(OutboxLimits { window: 1, max_pending: 1 });
    outbox.push(&event(1, 1, Method::Invalidate, pages(0, 1)), Some(0));
    assert!(outbox.take_notices(8, at(3)).iter().all(|notice| notice.scope != Scope::FlushAll));
    outbox.push(&event(1, 2, Method::Invalidate, pages(4, 2)), Some(1));
    outbox.push(&event(2, 1, Method::Invalidate, pages(900, 1)), Some(2));
    let precise = outbox.on_ack(&ack(1, &[])).unwrap();
    assert_eq!(precise.iter().map(|r| (r.token, r.dirty)).collect::<Vec<_>>(), [(0, false)]);
    assert_eq!(outbox.take_notices(8, at(4))[0].scope, Scope::FlushAll);
    let mut dirty: Vec<_> =
        outbox.on_ack(&ack(2, &[])).unwrap().iter().map(|r| (r.token, r.young, r.dirty)).collect();
    dirty.sort_unstable();
    assert_eq!(
        dirty,
        [(1, false, true), (2, false, true)],
        "young is told beforehand, in messages of its own"
    );
}

/// Trap 18.
#[test]
fn a_million_pushes_to_an_idle_device_stay_within_the_bounds() {
    let limits = OutboxLimits::default();
    type Shape = (&'static str, u64, fn(u64) -> AddrRange);
    let shapes: [Shape; 4] = [
        ("disjoint", 1_000_000, |i| pages(3 * i, 1)),
        ("overlapping", 1_000_000, |i| pages(i % 4096, 64)),
        ("side by side", 100_000, |i| pages(i, 1)),
        ("scattered", 100_000, |i| pages(i.wrapping_mul(0x9e37_79b9_7f4a_7c15) % 1_000_000, 1 + i % 7)),
    ];
    for (shape, pushes, range) in shapes {
        let mut outbox: Outbox<u64> = Outbox::new(limits);
        let mut given = 0_u64;
        for i in 0..pushes {
            let method = [Method::Invalidate, Method::RangeEnd][(i % 2) as usize];
            let token = (i % 1000 == 0).then(|| {
                given += 1;
                i
            });
            outbox.push(&event(1 + i / 2 % 2, i + 1, method, range(i / 2)), token);
            if i % 10_000 == 0 {
                outbox.take_notices(usize::MAX, at(i));
            }
            assert!(outbox.pending() <= limits.max_pending, "{shape}");
            assert!(outbox.unacked() <= limits.window as usize, "{shape}");
        }
        assert_eq!(outbox.abandon().len() as u64, given, "{shape}");
        assert_eq!(outbox.pending(), 0);
    }
}

/// The bound in bytes that the docs name.
#[test]
fn a_full_outbox_has_320_kib_at_most() {
    let entry = pending::BYTES_AN_ENTRY;
    assert!(entry * DEFAULT_MAX_PENDING <= 320 * 1024, "{entry} bytes an entry");
}

// ---- a model that keeps every event, and knows nothing of merging ----

#[derive(Clone, Debug)]
enum Op {
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

fn any_op() -> impl Strategy<Value = Op> {
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
struct Told {
    event: Event,
    token: Option<usize>,
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

struct Model {
    outbox: Outbox<usize>,
    limits: OutboxLimits,
    told: Vec<Told>,
    /// Pages of which a RangeEnd is owed.
    hints: BTreeSet<(AddressSpaceId, u64)>,
    flush_all_pending: bool,
    sent: BTreeMap<NoticeNumber, (Notice, Moment)>,
    acked: BTreeSet<NoticeNumber>,
    resolved: BTreeSet<usize>,
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

    fn acked_through(&self) -> Option<NoticeNumber> {
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
    fn drain(&mut self) {
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

fn any_limits() -> impl Strategy<Value = OutboxLimits> {
    (1..6_u32, 1..9_usize).prop_map(|(window, max_pending)| OutboxLimits { window, max_pending })
}

fn run(limits: OutboxLimits, ops: &[Op]) -> Model {
    let mut model = Model::new(limits);
    for op in ops {
        model.apply(op);
    }
    model
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Invariant 10, with a bounded memory.
    #[test]
    fn never_drop(limits in any_limits(), ops in prop::collection::vec(any_op(), 1..80)) {
        run(limits, &ops).drain();
    }

    /// Invariant 11: with room for every range, so that nothing is widened.
    #[test]
    fn merge_is_union(ops in prop::collection::vec(any_op(), 1..120)) {
        let mut model = run(OutboxLimits { window: 3, max_pending: 64 }, &ops);
        prop_assert!(!model.flush_all_pending);
        model.drain();
    }

    #[test]
    fn abandon_hands_back_what_no_ack_did(limits in any_limits(), ops in prop::collection::vec(any_op(), 1..80)) {
        let mut model = run(limits, &ops);
        let given: BTreeSet<usize> = model.told.iter().filter_map(|told| told.token).collect();
        let rest = model.outbox.abandon();
        prop_assert_eq!(rest.len() + model.resolved.len(), given.len());
        model.resolved.extend(rest);
        prop_assert_eq!(&model.resolved, &given);
        prop_assert_eq!(model.outbox.pending(), 0);
        prop_assert_eq!(model.outbox.acked_through(), model.acked_through(), "abandoned is not acked");
        prop_assert!(model.outbox.abandon().is_empty());
    }

    /// Invariant 9, both sides: whatever order a device flushes in, each ack of its books is accepted,
    /// and in the end all are acked.
    #[test]
    fn contiguity(limits in any_limits(), steps in prop::collection::vec((0..4_u8, any::<prop::sample::Index>()), 1..200)) {
        let mut outbox: Outbox<usize> = Outbox::new(limits);
        let mut books = AckTracker::new();
        let mut in_flight = Vec::new();
        let mut pushed = 0;
        let mut done = 0;
        let flush_one = |books: &mut AckTracker, in_flight: &mut Vec<NoticeNumber>, at: usize| {
            let number: NoticeNumber = in_flight.swap_remove(at);
            books.on_flushed(number.get().is_multiple_of(2).then(|| report(number.get(), vec![], vec![])), number);
        };
        for (step, index) in steps {
            match step {
                0 => {
                    outbox.push(&event(1, pushed as u64 + 1, Method::Invalidate, pages(3 * pushed as u64, 1)), Some(pushed));
                    pushed += 1;
                }
                1 => for notice in outbox.take_notices(2, at(0)) {
                    prop_assert_eq!(books.on_notice(notice.number), Ok(crate::ack::Arrived::New));
                    in_flight.push(notice.number);
                },
                2 if !in_flight.is_empty() => {
                    let at = index.index(in_flight.len());
                    flush_one(&mut books, &mut in_flight, at);
                }
                _ => if let Some(ack) = books.take() {
                    done += outbox.on_ack(&ack).unwrap().len();
                    prop_assert_eq!(outbox.acked_through(), ack.through);
                },
            }
            prop_assert_eq!(books.in_flight(), in_flight.len());
            prop_assert!(outbox.unacked() >= in_flight.len(), "an ack names flushed notices only");
        }
        for _ in 0..=pushed {
            for notice in outbox.take_notices(8, at(0)) {
                books.on_notice(notice.number).unwrap();
                in_flight.push(notice.number);
            }
            while !in_flight.is_empty() {
                flush_one(&mut books, &mut in_flight, 0);
            }
            done += books.take().map_or(0, |ack| outbox.on_ack(&ack).unwrap().len());
        }
        prop_assert_eq!((outbox.pending(), outbox.unacked()), (0, 0));
        prop_assert_eq!(done, pushed);
    }
}
