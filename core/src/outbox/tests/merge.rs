//! What becomes one notice, and what it asks for then.

use super::*;

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
