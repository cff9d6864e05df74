use super::*;

#[test]
fn no_stale_use_finds_a_use_of_a_freed_frame() {
    let late = |millis| {
        with(|what| matches!(what, What::UseEnded { .. }), vec![at(millis, What::UseEnded { span: Span(1) })])
    };
    assert_eq!(finds("NoStaleUse", &late(18)), 1);
    assert_eq!(finds("NoStaleUse", &late(17)), 0);
    let never = with(|what| matches!(what, What::UseEnded { .. }), vec![]);
    assert_eq!(finds("NoStaleUse", &never), 1, "a use that does not end");
}

#[test]
fn no_free_before_quiesce_finds_a_release_without_a_verdict() {
    let is_freed = |what: &What| matches!(what, What::Freed { .. });
    let early = with(is_freed, vec![at(14, What::Freed { op: OP, frame: FRAME })]);
    assert_eq!(finds("NoFreeBeforeQuiesce", &early), 1);
    let is_answer = |what: &What| matches!(what, What::Answered { .. });
    let timed_out = with(is_answer, vec![answered(15, Verdict::NotQuiesced, Outcome::Waiting)]);
    assert_eq!(finds("NoFreeBeforeQuiesce", &timed_out), 1);
}

#[test]
fn ack_means_stopped_finds_a_use_that_outlasts_the_ack() {
    let late =
        with(|what| matches!(what, What::UseEnded { .. }), vec![at(16, What::UseEnded { span: Span(1) })]);
    assert_eq!(finds("AckMeansStopped", &late), 1);
    // Of another page it may.
    let (life, span, frame) = (LIFE, Span(9), Frame { index: 4, generation: 0 });
    let other =
        [at(7, What::UseBegan { life, span, space: 1, page: 1, frame }), at(19, What::UseEnded { span })];
    assert_eq!(finds("AckMeansStopped", &plus(good(), other)), 0);
}

#[test]
fn timeout_is_not_ack_finds_an_ack_that_nobody_gave() {
    let is_flush = |what: &What| matches!(what, What::FlushBegan { .. } | What::FlushEnded { .. });
    assert_eq!(finds("TimeoutIsNotAck", &with(is_flush, vec![])), 1);
    let late = flush(12, 16, 2, Scope::Pages(page(0)), Some(1));
    assert_eq!(finds("TimeoutIsNotAck", &with(is_flush, late.to_vec())), 1);
    let elsewhere = flush(12, 13, 2, Scope::Pages(page(5)), Some(1));
    assert_eq!(finds("TimeoutIsNotAck", &with(is_flush, elsewhere.to_vec())), 1);
    let is_answer = |what: &What| matches!(what, What::Answered { .. });
    let waiting = with(is_answer, vec![answered(15, Verdict::Quiesced, Outcome::Waiting)]);
    assert_eq!(finds("TimeoutIsNotAck", &waiting), 1, "a verdict over a target that is waited for");
    let left = with(is_answer, vec![answered(15, Verdict::Quiesced, Outcome::Left)]);
    assert_eq!(finds("TimeoutIsNotAck", &left), 1, "it never flushed everything");
}

#[test]
fn fence_is_positive_finds_a_fence_within_the_lease() {
    let is_answer = |what: &What| matches!(what, What::Answered { .. });
    let fenced = with(is_answer, vec![answered(15, Verdict::Quiesced, Outcome::Fenced)]);
    assert_eq!(finds("FenceIsPositive", &fenced), 1);
    let over = at(9, What::Lease { life: LIFE, until: Some(Duration::from_millis(15)) });
    assert_eq!(finds("FenceIsPositive", &plus(fenced, [over])), 0);
}

#[test]
fn fence_is_positive_finds_a_fence_of_who_enforces_no_lease_and_was_not_cut_off() {
    let is_answer = |what: &What| matches!(what, What::Answered { .. });
    let fenced = || with(is_answer, vec![answered(15, Verdict::Quiesced, Outcome::Fenced)]);
    let over = || at(9, What::Lease { life: LIFE, until: Some(Duration::from_millis(10)) });
    let unenforced = || plus(fenced(), [unstoppable(CutOffBy::Fencer), over()]);
    assert_eq!(finds("FenceIsPositive", &unenforced()), 1, "its lease says nothing");
    assert_eq!(finds("FenceIsPositive", &plus(unenforced(), [cut_off(15, 1)])), 0);
    assert_eq!(finds("FenceIsPositive", &plus(unenforced(), [cut_off(16, 1)])), 1, "that was too late");
    assert_eq!(finds("FenceIsPositive", &plus(unenforced(), [cut_off(9, 2)])), 1, "another run was");
    assert_eq!(
        finds("FenceIsPositive", &plus(fenced(), [cut_off(15, 1)])),
        0,
        "within its lease, by a fencer"
    );
}

#[test]
fn fence_reaches_reuse_finds_bytes_of_a_frame_that_was_freed() {
    let read = |times_freed| plus(good(), [at(20, What::Read { life: LIFE, frame: FRAME, times_freed })]);
    assert_eq!(finds("FenceReachesReuse", &read(1)), 1);
    assert_eq!(finds("FenceReachesReuse", &read(0)), 0, "it was read before, and came late");
}
