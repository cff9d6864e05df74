use super::*;

#[test]
fn young_is_conservative_finds_a_use_that_nobody_is_told_of() {
    let (life, space) = (LIFE, 1);
    let query = |used: std::ops::Range<u64>, young: bool| {
        let is_other = |what: &What| {
            let freed = matches!(what, What::Freed { .. } | What::Ended { .. });
            freed
                || matches!(
                    what,
                    What::Call { .. } | What::Answered { .. } | What::UseBegan { .. } | What::UseEnded { .. }
                )
        };
        let (op, called, patience) = (OP, Called::ClearYoung, Patience::Unlimited);
        let answer = Answer { young, ..answer(Verdict::Quiesced, Outcome::Acked) };
        let span = Span(1);
        with(
            is_other,
            vec![
                at(used.start, What::UseBegan { life, span, space, page: 0, frame: FRAME }),
                at(used.end, What::UseEnded { span }),
                at(10, What::Call { op, called, pages: page(0), patience }),
                at(15, What::Answered { op, answer }),
            ],
        )
    };
    assert_eq!(finds("YoungIsConservative", &query(5..6, true)), 0);
    assert_eq!(finds("YoungIsConservative", &query(5..6, false)), 1);
    assert_eq!(finds("YoungIsConservative", &query(5..12, false)), 1, "it goes on");
    assert_eq!(finds("YoungIsConservative", &query(11..12, false)), 0, "only after it was asked");
    // An earlier call may have been told, unless the use went on.
    let told = |used: std::ops::Range<u64>| {
        let (op, called, patience) = (Op(2), Called::ClearYoung, Patience::Unlimited);
        let moment = Duration::from_millis(8);
        let answer = Answer {
            seq: Some(0),
            targets: vec![],
            dispatched: moment,
            resolved: Some(moment),
            ..answer(Verdict::Quiesced, Outcome::Acked)
        };
        plus(
            query(used, false),
            [
                at(7, What::Call { op, called, pages: page(0), patience }),
                at(8, What::Answered { op, answer }),
            ],
        )
    };
    assert_eq!(finds("YoungIsConservative", &told(5..6)), 0);
    assert_eq!(finds("YoungIsConservative", &told(5..9)), 1);
}

#[test]
fn no_self_wait_finds_an_ack_that_waits_for_the_fault_that_waits_for_it() {
    let (life, op, span) = (LIFE, OP, Span(7));
    let moment = Duration::from_millis(60);
    let fenced = |flushed: u64, asked: std::ops::Range<u64>, of: u64| {
        let is_other = |what: &What| {
            matches!(
                what,
                What::Answered { .. }
                    | What::FlushBegan { .. }
                    | What::FlushEnded { .. }
                    | What::Freed { .. }
                    | What::Ended { .. }
            )
        };
        let target = Target { session: 1, outcome: Outcome::Fenced, resolved: Some(moment) };
        let answer = Answer {
            targets: vec![target],
            resolved: Some(moment),
            ..answer(Verdict::Quiesced, Outcome::Fenced)
        };
        let mut events = with(
            is_other,
            vec![
                at(asked.start, What::FaultBegan { life, span, pages: page(of) }),
                at(asked.end, What::FaultEnded { span }),
                at(10, What::InFault { op }),
                at(60, What::Answered { op, answer }),
            ],
        );
        events = plus(events, flush(12, flushed, 2, Scope::Pages(page(0)), Some(1)));
        events
    };
    assert_eq!(finds("NoSelfWait", &fenced(13, 8..70, 0)), 1);
    assert_eq!(finds("NoSelfWait", &fenced(55, 8..70, 0)), 0, "its ack was on its way");
    assert_eq!(finds("NoSelfWait", &fenced(13, 8..20, 0)), 0, "its fault was answered");
    assert_eq!(finds("NoSelfWait", &fenced(13, 11..70, 0)), 0, "its fault came later");
    assert_eq!(finds("NoSelfWait", &fenced(13, 8..70, 5)), 0, "a fault of another page");
    let mut not_for_a_fault = fenced(13, 8..70, 0);
    not_for_a_fault.retain(|event| !matches!(event.what, What::InFault { .. }));
    assert_eq!(finds("NoSelfWait", &not_for_a_fault), 0);
    let trouble = |text: &str, millis| at(millis, What::Fault(text.to_owned()));
    let cut = [trouble("begin of Partition(0)", 5), trouble("end of Partition(0)", 20)];
    assert_eq!(finds("NoSelfWait", &plus(fenced(13, 8..70, 0), cut)), 0, "its ack was lost");
    let later = [trouble("begin of Partition(0)", 61), trouble("end of Partition(0)", 70)];
    assert_eq!(finds("NoSelfWait", &plus(fenced(13, 8..70, 0), later)), 1);
}
