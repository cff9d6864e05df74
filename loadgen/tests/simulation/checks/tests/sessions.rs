use super::*;

/// The same device begins another session, of the host agent's run `host`, and is granted a page at 25.
fn and_another_session(host: u64) -> Vec<Event> {
    let (life, frame) = (Life(2), Frame { index: 5, generation: 0 });
    let events = plus(
        good(),
        [
            at(20, What::Connecting { life, device: 0, start: 1 }),
            at(22, What::Opened { life, session: 2, host }),
            at(22, What::Subscribing { life, space: 1 }),
            at(25, What::Installed { life, space: 1, page: 2, frame }),
        ],
    );
    match host {
        1 => events,
        _ => plus(events, [at(18, What::AgentCrashed), at(19, What::AgentStarted { incarnation: host })]),
    }
}

#[test]
fn contiguity_finds_a_notice_that_was_missed_or_came_twice() {
    let next = |notice| flush(21, 22, 3, Scope::Pages(page(1)), Some(notice));
    assert_eq!(finds("Contiguity", &plus(good(), next(2))), 0);
    assert_eq!(finds("Contiguity", &plus(good(), next(3))), 1);
    assert_eq!(finds("Contiguity", &plus(good(), next(1))), 1);
    let everything = flush(20, 20, 4, Scope::Everything, None);
    assert_eq!(finds("Contiguity", &plus(plus(good(), next(3)), everything)), 0);
}

#[test]
fn resume_or_flush_finds_a_use_of_what_was_withdrawn_after_a_resume() {
    let (life, frame, span) = (LIFE, FRAME, Span(9));
    let uses = |began, installed| {
        // Its bracket's pages stay: nothing else is wrong.
        let mut events = with(|what| matches!(what, What::Freed { .. }), vec![]);
        if let Some(millis) = installed {
            events = plus(events, [at(millis, What::Installed { life, space: 1, page: 0, frame })]);
        }
        plus(
            events,
            [
                at(14, What::Resumed { life }),
                at(began, What::UseBegan { life, span, space: 1, page: 0, frame }),
                at(began + 1, What::UseEnded { span }),
            ],
        )
    };
    assert_eq!(finds("ResumeOrFlush", &uses(20, None)), 1);
    assert_eq!(finds("ResumeOrFlush", &uses(20, Some(19))), 0, "it was granted again");
    assert_eq!(finds("ResumeOrFlush", &uses(14, None)), 0, "it has not acked yet");
}

#[test]
fn resume_or_flush_finds_a_use_of_what_another_session_was_granted() {
    let (frame, span) = (Frame { index: 5, generation: 0 }, Span(9));
    let uses = [
        at(20, What::UseBegan { life: LIFE, span, space: 1, page: 1, frame }),
        at(21, What::UseEnded { span }),
    ];
    assert_eq!(finds("ResumeOrFlush", &plus(good(), uses)), 1);
}

#[test]
fn resume_or_flush_finds_a_grant_before_the_session_before_has_flushed() {
    let flushed = |began, ended| flush(began, ended, 8, Scope::EverythingOfTheSession, None);
    let another = || and_another_session(1);
    assert_eq!(finds("ResumeOrFlush", &another()), 1);
    assert_eq!(finds("ResumeOrFlush", &plus(another(), flushed(18, 19))), 0);
    assert_eq!(finds("ResumeOrFlush", &plus(another(), flushed(18, 26))), 1, "it has only begun to");
    assert_eq!(finds("ResumeOrFlush", &plus(another(), flushed(0, 0))), 1, "that was before the session");
}

#[test]
fn restart_grace_finds_a_grant_while_a_device_of_the_run_before_has_a_lease() {
    let another = || and_another_session(2);
    assert_eq!(finds("RestartGrace", &and_another_session(1)), 0, "nobody crashed");
    assert_eq!(finds("RestartGrace", &another()), 1);
    let over = at(18, What::Lease { life: LIFE, until: Some(Duration::from_millis(25)) });
    assert_eq!(finds("RestartGrace", &plus(another(), [over])), 0);
    let flushed = flush(20, 21, 8, Scope::EverythingOfTheSession, None);
    assert_eq!(finds("RestartGrace", &plus(another(), flushed)), 0);
}

#[test]
fn restart_grace_finds_a_grant_while_a_device_of_the_run_before_goes_on_without_a_lease() {
    let over = at(18, What::Lease { life: LIFE, until: Some(Duration::from_millis(25)) });
    let another = || plus(and_another_session(2), [unstoppable(CutOffBy::Administrator), over.clone()]);
    assert_eq!(finds("RestartGrace", &another()), 1);
    assert_eq!(finds("RestartGrace", &plus(another(), [cut_off(24, 1)])), 0);
    assert_eq!(finds("RestartGrace", &plus(another(), [cut_off(26, 1)])), 1);
    let mut holds_nothing = another();
    holds_nothing.retain(|event| !matches!(event.what, What::Installed { life: LIFE, .. }));
    assert_eq!(finds("RestartGrace", &holds_nothing), 0, "it was granted nothing");
}

#[test]
fn restart_grace_finds_a_verdict_while_a_device_of_the_run_before_has_a_lease() {
    let (op, called, patience) = (Op(2), Called::Page, Patience::Unlimited);
    let asks = |host, lease: u64| {
        let answer = Answer { targets: vec![], ..answer(Verdict::Quiesced, Outcome::Acked) };
        let mut events = with(|what| matches!(what, What::Lease { .. }), vec![]);
        events = plus(
            events,
            [
                at(2, What::Lease { life: LIFE, until: Some(Duration::from_millis(lease)) }),
                at(19, What::AgentStarted { incarnation: host }),
                at(20, What::Call { op, called, pages: page(3), patience }),
            ],
        );
        let resolved = Some(Duration::from_millis(30));
        let dispatched = Duration::from_millis(20);
        plus(events, [at(30, What::Answered { op, answer: Answer { resolved, dispatched, ..answer } })])
    };
    assert_eq!(finds("RestartGrace", &asks(2, 31)), 1);
    assert_eq!(finds("RestartGrace", &asks(2, 30)), 0);
    assert_eq!(finds("RestartGrace", &asks(1, 31)), 0, "a planned end, and its successor goes on");
}

#[test]
fn nothing_is_left_finds_pages_that_stay_in_quarantine() {
    let is_left = |what: &What| matches!(what, What::Left { .. });
    let parked = What::Left { sessions: 0, rounds: 0, brackets: 0, subscriptions: 0, quarantined: (4096, 1) };
    assert_eq!(finds("NothingIsLeft", &with(is_left, vec![at(30, parked)])), 1);
}

#[test]
fn nothing_is_left_finds_a_session_that_nobody_has() {
    let is_left = |what: &What| matches!(what, What::Left { .. });
    let one = What::Left { sessions: 1, rounds: 0, brackets: 0, subscriptions: 0, quarantined: (0, 0) };
    assert_eq!(finds("NothingIsLeft", &with(is_left, vec![at(30, one)])), 1);
    assert_eq!(finds("NothingIsLeft", &with(is_left, vec![])), 1, "nobody looked");
}
