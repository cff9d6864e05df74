use super::*;

#[test]
fn no_grant_in_window_finds_what_is_installed_between_ack_and_end() {
    let frame = Frame { index: 5, generation: 0 };
    // The bracket of a caller that takes its time lasts until 25.
    let long = |install: u64| {
        let is_end = |what: &What| matches!(what, What::Ended { .. });
        let installed = What::Installed { life: LIFE, space: 1, page: 0, frame };
        with(is_end, vec![at(25, What::Ended { op: OP }), at(install, installed)])
    };
    assert_eq!(finds("NoGrantInWindow", &long(20)), 1);
    assert_eq!(finds("NoGrantInWindow", &long(26)), 0);
    assert_eq!(finds("NoGrantInWindow", &long(14)), 0, "its notice is on the way");
}

#[test]
fn join_covers_finds_a_grant_to_who_joined_meanwhile() {
    let life = Life(2);
    let joins = |subscribing: u64| {
        plus(
            good(),
            [
                at(0, What::Connecting { life, device: 1, start: 1 }),
                at(1, What::Opened { life, session: 2, host: 1 }),
                at(subscribing, What::Subscribing { life, space: 1 }),
                at(14, What::Installed { life, space: 1, page: 0, frame: FRAME }),
            ],
        )
    };
    assert_eq!(finds("JoinCovers", &joins(11)), 1);
    assert_eq!(finds("JoinCovers", &plus(good(), [])), 0);
}

#[test]
fn stable_targets_finds_an_answer_that_names_others() {
    let mut second = answer(Verdict::Quiesced, Outcome::Acked);
    let again = |answer: &Answer| plus(good(), [at(15, What::Answered { op: OP, answer: answer.clone() })]);
    assert_eq!(finds("StableTargets", &again(&second)), 0);
    second.targets[0].session = 2;
    assert_eq!(finds("StableTargets", &again(&second)), 1);
}

#[test]
fn unsubscribe_barrier_finds_a_notice_after_the_end() {
    let left = at(8, What::Unsubscribed { life: LIFE, space: 1 });
    assert_eq!(finds("UnsubscribeBarrier", &plus(good(), [left.clone()])), 1);
    let again = at(9, What::Subscribing { life: LIFE, space: 1 });
    assert_eq!(finds("UnsubscribeBarrier", &plus(good(), [left, again])), 0);
}
