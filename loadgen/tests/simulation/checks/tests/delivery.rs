use super::*;

/// An event of two pages, and of what the device is told.
fn two_pages(notices: &[(u64, Pages)]) -> Vec<Event> {
    let pages = Pages { space: 1, pages: 0..2 };
    let called = Called::RangeStart;
    let is_other =
        |what: &What| matches!(what, What::Call { .. } | What::FlushBegan { .. } | What::FlushEnded { .. });
    let call = What::Call { op: OP, called, pages, patience: Patience::Unlimited };
    let flushes = notices.iter().enumerate().flat_map(|(number, (seq, pages))| {
        let [mut began, ended] =
            flush(12, 13, 2 + number, Scope::Pages(pages.clone()), Some(number as u64 + 1));
        let What::FlushBegan { told: Some(told), .. } = &mut began.what else { panic!("a notice") };
        told.seq = *seq;
        [began, ended]
    });
    with(is_other, std::iter::once(at(10, call)).chain(flushes).collect())
}

/// The good trace, with the notice of its page as it is told by `change`, and its flush as that says.
fn told_otherwise(change: impl Fn(&mut Scope, &mut Told)) -> Vec<Event> {
    let mut events = good();
    for event in &mut events {
        if let What::FlushBegan { scope, told: Some(told), .. } = &mut event.what {
            change(scope, told);
        }
    }
    events
}

#[test]
fn never_drop_finds_a_page_of_which_nobody_was_told() {
    let all = Pages { space: 1, pages: 0..2 };
    assert_eq!(finds("NeverDrop", &two_pages(&[(1, all.clone())])), 0);
    assert_eq!(finds("NeverDrop", &two_pages(&[(1, page(0))])), 1);
    assert_eq!(finds("NeverDrop", &two_pages(&[(1, page(0)), (1, page(1))])), 0, "in two notices");
    assert_eq!(finds("NeverDrop", &two_pages(&[(1, page(0)), (7, page(1))])), 0, "in a later one");
    let other = Pages { space: 2, pages: 0..2 };
    assert_eq!(finds("NeverDrop", &two_pages(&[(1, page(0)), (1, other)])), 1, "of another address space");
    let everything = plus(two_pages(&[(1, page(0))]), flush(11, 14, 9, Scope::Everything, None));
    assert_eq!(finds("NeverDrop", &everything), 0);
    let before = plus(two_pages(&[(1, page(0))]), flush(7, 9, 9, Scope::Everything, None));
    assert_eq!(finds("NeverDrop", &before), 1, "everything, and too early");
    let late = plus(two_pages(&[(1, page(0))]), flush(14, 16, 9, Scope::Pages(page(1)), Some(2)));
    assert_eq!(finds("NeverDrop", &late), 1, "only after the ack");
}

#[test]
fn merge_is_union_finds_a_notice_that_is_less_than_its_event() {
    let all = Pages { space: 1, pages: 0..2 };
    assert_eq!(finds("MergeIsUnion", &two_pages(&[(1, all.clone())])), 0);
    assert_eq!(finds("MergeIsUnion", &two_pages(&[(4, all.clone())])), 0, "with a later one");
    assert_eq!(finds("MergeIsUnion", &two_pages(&[(1, page(0)), (1, page(1))])), 1, "torn into two");
    let weak = told_otherwise(|_, told| told.asks = Asks::Young);
    assert_eq!(finds("MergeIsUnion", &weak), 1, "it asks for less");
    let early = told_otherwise(|_, told| told.seq = 0);
    assert_eq!(finds("MergeIsUnion", &early), 1, "the sequence of an earlier one");
    let everything = plus(two_pages(&[(1, page(0))]), flush(11, 14, 9, Scope::Everything, None));
    assert_eq!(finds("MergeIsUnion", &everything), 0);
}

#[test]
fn range_over_approximates_finds_a_notice_of_less_than_whole_pages() {
    let bytes = |bytes: std::ops::Range<u64>| told_otherwise(move |_, told| told.bytes = bytes.clone());
    assert_eq!(finds("RangeOverApproximates", &bytes(0..4096)), 0);
    assert_eq!(finds("RangeOverApproximates", &bytes(0..8192)), 0);
    assert_eq!(finds("RangeOverApproximates", &bytes(0..u64::MAX)), 0, "everything");
    assert_eq!(finds("RangeOverApproximates", &bytes(0..4095)), 1);
    assert_eq!(finds("RangeOverApproximates", &bytes(1..4096)), 1);
    assert_eq!(finds("RangeOverApproximates", &bytes(4096..8192)), 1, "another page");
    assert_eq!(finds("RangeOverApproximates", &bytes(0..0)), 1);
    // What was named is less than a page: so much of the page is enough for nobody.
    let named = plus(bytes(4096..8192), [at(10, What::Announced { op: OP, bytes: 5000..6000 })]);
    assert_eq!(finds("RangeOverApproximates", &named), 0);
    let named = plus(bytes(5000..6000), [at(10, What::Announced { op: OP, bytes: 5000..6000 })]);
    assert_eq!(finds("RangeOverApproximates", &named), 1);
    // Of another event with that sequence, the device is no target: it is told of a merge.
    let merged = told_otherwise(|_, told| (told.seq, told.bytes) = (9, 4096..8192));
    assert_eq!(finds("RangeOverApproximates", &merged), 0);
}

#[test]
fn seq_compare_finds_a_later_event_with_a_lower_sequence() {
    let second = |called_at: u64, seq: u64| {
        let (op, called, patience) = (Op(2), Called::Page, Patience::Unlimited);
        let dispatched = Duration::from_millis(called_at);
        let answer = Answer {
            seq: Some(seq),
            targets: vec![],
            dispatched,
            resolved: Some(dispatched),
            ..answer(Verdict::Quiesced, Outcome::Acked)
        };
        plus(
            good(),
            [
                at(called_at, What::Call { op, called, pages: page(3), patience }),
                at(called_at + 1, What::Answered { op, answer }),
            ],
        )
    };
    assert_eq!(finds("SeqCompare", &second(20, 2)), 0);
    assert_eq!(finds("SeqCompare", &second(20, 1)), 1);
    assert_eq!(finds("SeqCompare", &second(20, 0)), 1);
    assert_eq!(finds("SeqCompare", &second(8, 2)), 1, "the first was called when the second was open");
    // Who subscribes is told where that was.
    let subscribed = |asked: u64, got: u64, seq: Option<u64>| {
        let (life, space) = (LIFE, 1);
        plus(
            good(),
            [at(asked, What::Subscribing { life, space }), at(got, What::Subscribed { life, space, seq })],
        )
    };
    assert_eq!(finds("SeqCompare", &subscribed(3, 4, Some(1))), 1, "no event was open");
    assert_eq!(finds("SeqCompare", &subscribed(9, 12, None)), 0, "either was first");
    assert_eq!(finds("SeqCompare", &subscribed(9, 12, Some(1))), 0, "either was first");
    assert_eq!(finds("SeqCompare", &subscribed(20, 21, None)), 1, "there was one");
    assert_eq!(finds("SeqCompare", &subscribed(20, 21, Some(1))), 0);
}
