mod merge;
mod model;

use std::collections::BTreeSet;
use std::time::Duration;

use proptest::prelude::*;

use self::model::{any_limits, any_op, run};
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
