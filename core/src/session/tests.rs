mod model;

use proptest::prelude::*;

use self::model::{Model, Step, any_step};
use super::*;
use crate::ack::FlushReport;
use crate::event::{Cause, Method};
use crate::id::{AddressSpaceId, NoticeNumber, Seq};
use crate::range::{AddrRange, PageSize};

const T_ACK: Duration = Duration::from_millis(100);

fn at(millis: u64) -> Moment {
    Moment::ZERO + Duration::from_millis(millis)
}

/// A lease of 1,000 ms, which the host counts as 1,010 ms; T_ack 100 ms; a window of 2.
fn config() -> SessionConfig {
    SessionConfig {
        lease: LeaseTerms {
            duration: Duration::from_millis(1000),
            drift_ppm: 0,
            margin: Duration::from_millis(10),
        },
        ack_timeout: T_ACK,
        enforcement: Enforcement::ByDevice,
        outbox: OutboxLimits { window: 2, max_pending: 4 },
        max_subscriptions: 2,
        max_ranges_per_subscription: 3,
        max_faults_in_flight: 2,
    }
}

fn session() -> Session<u32> {
    session_of(Enforcement::ByDevice)
}

fn session_of(enforcement: Enforcement) -> Session<u32> {
    let config = SessionConfig { enforcement, ..config() };
    Session::new(SessionId::FIRST, DeviceId::new("gpu0").unwrap(), config, at(0))
}

fn event(page: u64) -> Event {
    Event {
        address_space: AddressSpaceId::FIRST,
        seq: Seq::new(page + 1).unwrap(),
        range: AddrRange::page_of(page * 8192, PageSize::BASE),
        method: Method::Invalidate,
        cause: Cause::Unmap,
        owner: None,
    }
}

fn ack(through: u64) -> Ack {
    Ack { through: NoticeNumber::new(through), ..Ack::default() }
}

fn show(effect: &Effect<u32>) -> String {
    match effect {
        Effect::Resolve { token, how: Resolution::Acked { .. } } => format!("{token} acked"),
        Effect::Resolve { token, how } => format!("{token} {how:?}").to_lowercase(),
        Effect::Reported { report, .. } => format!("reported {}", report.notice),
        Effect::Phase { from, to } => format!("{}->{}", from.name(), to.name()),
        Effect::EndStream(reason) => format!("end stream: {reason:?}"),
        Effect::AskFencer => "ask fencer".to_owned(),
    }
}

fn drained(effects: &mut Effects<u32>) -> Vec<String> {
    effects.drain().map(|effect| show(&effect)).collect()
}

/// In the phase, before 200 ms. Notice 1 carries token 1 and was sent at 190 ms, in Suspect at 90 ms;
/// token 2 is pending since 195 ms; the lease expires at 1,010 ms.
fn in_phase(phase: Phase) -> Session<u32> {
    in_phase_of(Enforcement::ByDevice, phase)
}

fn in_phase_of(enforcement: Enforcement, phase: Phase) -> Session<u32> {
    let mut session = session_of(enforcement);
    let mut effects = Effects::new();
    let sent = if phase == Phase::Suspect { 90 } else { 190 };
    session.on_event(&event(0), Some(1), at(sent), &mut effects);
    assert_eq!(session.take_notices(1, at(sent)).len(), 1);
    session.on_event(&event(1), Some(2), at(195), &mut effects);
    match phase {
        Phase::Live => {}
        Phase::Suspect => drop(session.on_tick(at(199), &mut effects)),
        Phase::Severed => session.on_severed(at(199), &mut effects),
        Phase::Fenced => session.on_fence_confirmed(at(199), &mut effects),
        Phase::Gone => session.on_left(at(199), &mut effects),
    }
    assert_eq!(session.phase(), phase);
    session
}

type Input = fn(&mut Session<u32>, &mut Effects<u32>) -> String;

/// What each input returns, as text; its effects are in the sink.
const INPUTS: [(&str, Input); 17] = [
    ("event", |session, effects| {
        session.on_event(&event(2), Some(3), at(200), effects);
        String::new()
    }),
    ("take", |session, _| format!("{} notices", session.take_notices(8, at(200)).len())),
    ("ack 1", |session, effects| format!("{:?}", session.on_ack(&ack(1), at(200), effects))),
    ("ack 1 with a report", |session, effects| {
        let report = FlushReport {
            notice: NoticeNumber::FIRST,
            young: vec![],
            dirty: vec![AddrRange::ALL],
            timing: None,
        };
        format!("{:?}", session.on_ack(&Ack { reports: vec![report], ..ack(1) }, at(200), effects))
    }),
    ("ack 9", |session, effects| match session.on_ack(&ack(9), at(200), effects) {
        Ok(()) => "Ok(())".to_owned(),
        Err(error) => format!("refused: {error}"),
    }),
    ("heartbeat", |session, _| format!("{:?}", session.on_heartbeat(at(200)))),
    ("late heartbeat", |session, _| format!("{:?}", session.on_heartbeat(at(1011)))),
    ("severed", |session, effects| {
        session.on_severed(at(200), effects);
        String::new()
    }),
    ("ended", |session, effects| {
        session.on_ended(at(200), effects);
        String::new()
    }),
    ("resumed", |session, effects| {
        let resumed = session.on_resumed(NoticeNumber::new(1), at(200), effects);
        format!("{resumed:?}, then {} notices", session.take_notices(8, at(200)).len())
    }),
    ("resumed past the lease", |session, effects| {
        format!("{:?}", session.on_resumed(NoticeNumber::new(1), at(1010), effects))
    }),
    ("left", |session, effects| {
        session.on_left(at(200), effects);
        String::new()
    }),
    ("evict", |session, effects| {
        session.on_evict(at(200), effects);
        String::new()
    }),
    ("fence confirmed", |session, effects| {
        session.on_fence_confirmed(at(200), effects);
        String::new()
    }),
    ("tick", |session, effects| format!("next {:?}", session.on_tick(at(200), effects))),
    ("tick past T_ack", |session, effects| format!("next {:?}", session.on_tick(at(290), effects))),
    ("tick at expiry", |session, effects| format!("next {:?}", session.on_tick(at(1010), effects))),
];

/// Every (phase, input), of a device that enforces its lease.
#[test]
fn transitions() {
    insta::assert_snapshot!("transitions", table(Enforcement::ByDevice));
}

/// The same of one that does not: the tick at expiry fences nothing.
#[test]
fn transitions_without_enforcement() {
    insta::assert_snapshot!("transitions_without_enforcement", table(Enforcement::ByNobody));
}

fn table(enforcement: Enforcement) -> String {
    let mut table = String::new();
    for phase in Phase::EVERY {
        for (name, input) in INPUTS {
            let mut session = in_phase_of(enforcement, phase);
            let mut effects = Effects::new();
            let returned = input(&mut session, &mut effects);
            let effects = drained(&mut effects).join(", ");
            let line = format!(
                "{:8} {name:20} -> {:8} lease {:?} | {returned} | {effects}",
                phase.name(),
                session.phase().name(),
                session.lease_expires(),
            );
            table += line.trim_end_matches([' ', '|']);
            table.push('\n');
        }
    }
    table
}

#[test]
fn a_stream_that_nobody_drains_makes_the_session_suspect() {
    let (mut session, mut effects) = (session(), Effects::new());
    session.on_event(&event(0), Some(1), at(50), &mut effects);
    assert_eq!(session.on_tick(at(149), &mut effects), Some(at(150)));
    assert_eq!(session.phase(), Phase::Live);
    session.on_tick(at(150), &mut effects);
    assert_eq!(session.phase(), Phase::Suspect);
    assert_eq!(session.take_notices(8, at(160)).len(), 1, "it is still sent what is pending");
    session.on_ack(&ack(1), at(170), &mut effects).unwrap();
    assert_eq!(drained(&mut effects), ["live->suspect", "ask fencer", "1 acked", "suspect->live"]);
}

#[test]
fn what_waits_for_a_full_window_counts_from_the_oldest_unacked() {
    let (mut session, mut effects) = (session(), Effects::new());
    for page in 0..3 {
        session.on_event(&event(page), None, at(10 * page), &mut effects);
        session.take_notices(8, at(10 * page));
    }
    assert_eq!((session.outbox().unacked(), session.outbox().pending()), (2, 1));
    assert_eq!(session.on_tick(at(90), &mut effects), Some(at(100)), "sent at 0");
    session.on_ack(&ack(2), at(95), &mut effects).unwrap();
    assert_eq!(session.on_tick(at(120), &mut effects), Some(at(195)), "may be sent since 95");
}

#[test]
fn a_suspect_session_stays_so_while_anything_is_overdue() {
    let (mut session, mut effects) = (session(), Effects::new());
    for (page, moment) in [(0, 0), (1, 50)] {
        session.on_event(&event(page), None, at(moment), &mut effects);
        session.take_notices(8, at(moment));
    }
    session.on_tick(at(160), &mut effects);
    session.on_ack(&ack(1), at(170), &mut effects).unwrap();
    assert_eq!(session.phase(), Phase::Suspect, "notice 2 is overdue, too");
    session.on_ack(&ack(2), at(180), &mut effects).unwrap();
    assert_eq!(session.phase(), Phase::Live);
    assert_eq!(session.on_heartbeat(at(180)), Some(Duration::from_millis(1000)));
}

/// Invariant 12: by its phase, its lease, its books, and whether the host agent ended it.
#[test]
fn resume_or_flush() {
    for phase in Phase::EVERY {
        let session = in_phase(phase);
        let first = NoticeNumber::new(1);
        let resumed = session.resume_or_flush(first, at(1009));
        match phase {
            Phase::Live | Phase::Suspect | Phase::Severed => assert_eq!(resumed, Ok(()), "{phase:?}"),
            Phase::Fenced | Phase::Gone => assert_eq!(resumed, Err(ResumeError::Over { phase })),
        }
        if !phase.is_over() {
            assert_eq!(session.resume_or_flush(first, at(1010)), Err(ResumeError::LeaseExpired));
            assert!(matches!(
                session.resume_or_flush(NoticeNumber::new(2), at(200)),
                Err(ResumeError::NotRetained(_))
            ));
        }
    }
    type End = fn(&mut Session<u32>, &mut Effects<u32>);
    let ends: [End; 2] = [
        |session, effects| session.on_evict(at(200), effects),
        |session, effects| session.on_ended(at(200), effects),
    ];
    for end in ends {
        for phase in [Phase::Live, Phase::Severed] {
            let mut session = in_phase(phase);
            end(&mut session, &mut Effects::new());
            assert_eq!(session.resume_or_flush(NoticeNumber::new(1), at(200)), Err(ResumeError::Ended));
        }
    }
}

/// Invariant 19: who only connects again gets no lease by it, and none later while the ack is owed.
#[test]
fn coming_back_is_neither_a_lease_nor_an_ack() {
    let mut session = in_phase(Phase::Severed);
    let mut effects = Effects::new();
    session.try_fault().unwrap();
    let expires = session.lease_expires();
    for millis in (200..1000).step_by(50) {
        session.on_resumed(NoticeNumber::new(1), at(millis), &mut effects).unwrap();
        assert_eq!(session.lease_expires() > expires, millis > 200, "by a heartbeat only");
        let overdue = millis >= 290;
        assert_eq!(session.phase(), if overdue { Phase::Suspect } else { Phase::Live });
        assert!(
            session.take_notices(8, at(millis)).iter().any(|notice| notice.number == NoticeNumber::FIRST)
        );
        assert_eq!(session.on_heartbeat(at(millis)).is_some(), !overdue);
        session.on_severed(at(millis + 1), &mut effects);
    }
    assert_eq!(session.faults_in_flight(), 0, "given back with the stream");
    drained(&mut effects);
    assert!(session.on_tick(session.lease_expires(), &mut effects).is_none());
    assert_eq!(drained(&mut effects), ["severed->fenced", "1 fenced", "2 fenced"]);
}

/// What is sent and not read, on one stream after the other, is overdue as on one.
#[test]
fn a_device_that_connects_again_and_reads_nothing_is_suspect() {
    let mut session = session();
    let mut effects = Effects::new();
    session.on_event(&event(0), Some(1), at(0), &mut effects);
    for millis in [30, 60, 90] {
        session.on_severed(at(millis), &mut effects);
        session.on_resumed(None, at(millis), &mut effects).unwrap();
    }
    assert_eq!(session.on_heartbeat(at(100)), None);
    session.on_tick(at(100), &mut effects);
    assert_eq!(session.phase(), Phase::Suspect);
    // It reads and acks at last.
    assert_eq!(session.take_notices(8, at(110)).len(), 1);
    session.on_ack(&ack(1), at(120), &mut effects).unwrap();
    assert_eq!(session.phase(), Phase::Live);
}

#[test]
fn a_heartbeat_ahead_of_a_late_tick_renews_nothing_that_is_overdue() {
    let (mut session, mut effects) = (session(), Effects::new());
    session.on_event(&event(0), Some(1), at(0), &mut effects);
    session.take_notices(8, at(0));
    assert_eq!(session.on_heartbeat(at(99)), Some(Duration::from_millis(1000)));
    assert_eq!(session.on_heartbeat(at(100)), None, "the tick would have made it Suspect");
    assert_eq!(session.lease_expires(), at(99 + 1010));
}

/// Invariant 14.
#[test]
fn fence_is_positive() {
    let silent = |session: &mut Session<u32>, effects: &mut Effects<u32>| {
        session.on_severed(at(201), effects);
        session.on_evict(at(202), effects);
        for moment in [300, 1009] {
            session.on_tick(at(moment), effects);
            assert_eq!(session.phase(), Phase::Severed, "neither eviction nor silence is a fence");
        }
    };
    let mut session = in_phase(Phase::Live);
    let mut effects = Effects::new();
    silent(&mut session, &mut effects);
    assert_eq!(drained(&mut effects), ["live->severed", "ask fencer"], "to be asked is not to confirm");
    assert_eq!(session.on_tick(at(1010), &mut effects), None);
    assert_eq!(drained(&mut effects), ["severed->fenced", "1 fenced", "2 fenced"], "the lease expired");
    // The lease of a device that does not enforce it proves nothing, however long it is over.
    let mut session = in_phase_of(Enforcement::ByNobody, Phase::Live);
    silent(&mut session, &mut effects);
    assert_eq!(session.on_tick(at(1_000_000), &mut effects), None, "time has nothing more to say");
    assert_eq!(drained(&mut effects), ["live->severed", "ask fencer"]);
    session.on_fence_confirmed(at(1_000_001), &mut effects);
    assert_eq!(drained(&mut effects), ["severed->fenced", "1 fenced", "2 fenced"], "a fencer confirmed");
    let mut session = in_phase(Phase::Suspect);
    session.on_fence_confirmed(at(201), &mut effects);
    assert_eq!(drained(&mut effects)[..2], ["suspect->fenced", "end stream: Fenced"], "a fencer confirmed");
}

/// Invariant 13: of all inputs, none but an ack makes a token Acked, and no tick short of the expiry
/// of the lease resolves one at all.
#[test]
fn timeout_is_not_ack() {
    for phase in [Phase::Live, Phase::Suspect, Phase::Severed] {
        for (name, input) in INPUTS.iter().filter(|(name, _)| !name.starts_with("ack 1")) {
            let mut session = in_phase(phase);
            let mut effects = Effects::new();
            input(&mut session, &mut effects);
            let shown = drained(&mut effects);
            assert!(shown.iter().all(|effect| !effect.ends_with("acked")), "{phase:?} {name}: {shown:?}");
            if matches!(*name, "tick" | "tick past T_ack") {
                let told = |effect: &String| effect.contains("->") || effect == "ask fencer";
                assert!(shown.iter().all(told), "{phase:?} {name}: {shown:?}");
            }
        }
    }
}

#[test]
fn a_fencer_is_asked_for_once_and_again_when_the_device_owes_something_anew() {
    let (mut session, mut effects) = (session_of(Enforcement::ByNobody), Effects::new());
    session.on_event(&event(0), Some(1), at(0), &mut effects);
    session.take_notices(8, at(0));
    assert_eq!(session.on_tick(at(99), &mut effects), Some(at(100)), "no lease to wait for");
    for moment in [100, 110, 2000] {
        session.on_tick(at(moment), &mut effects);
    }
    assert_eq!(drained(&mut effects), ["live->suspect", "ask fencer"]);
    session.on_ack(&ack(1), at(2001), &mut effects).unwrap();
    assert!(!session.wants_fencer(at(2001)));
    assert_eq!(session.on_heartbeat(at(2002)), Some(Duration::from_millis(1000)), "it answers again");
    session.on_severed(at(2003), &mut effects);
    assert_eq!(session.on_tick(at(2004), &mut effects), Some(at(2002 + 1010)), "it owes nothing");
    assert_eq!(drained(&mut effects), ["1 acked", "suspect->live", "live->severed"]);
    session.on_tick(at(2002 + 1010), &mut effects);
    assert_eq!(drained(&mut effects), ["ask fencer"]);
}

#[test]
fn a_severed_session_that_is_told_of_something_is_asked_for_after_t_ack() {
    let (mut session, mut effects) = (session(), Effects::new());
    session.on_severed(at(10), &mut effects);
    session.on_event(&event(0), Some(1), at(20), &mut effects);
    assert_eq!(session.on_tick(at(30), &mut effects), Some(at(120)));
    assert_eq!(session.on_tick(at(120), &mut effects), Some(at(1010)));
    assert_eq!(drained(&mut effects), ["live->severed", "ask fencer"]);
}

#[test]
fn a_severed_session_that_acked_and_owes_anew_is_asked_for_again() {
    let mut session = in_phase(Phase::Severed);
    let mut effects = Effects::new();
    session.on_tick(at(290), &mut effects);
    session.on_ack(&ack(1), at(291), &mut effects).unwrap();
    assert!(!session.wants_fencer(at(291)), "token 2 may be sent since 291");
    session.on_tick(at(391), &mut effects);
    assert_eq!(drained(&mut effects), ["ask fencer", "1 acked", "ask fencer"]);
}

#[test]
fn a_session_of_an_earlier_run_is_waited_for_until_its_lease_is_over_and_numbers_on() {
    let device = DeviceId::new("gpu0").unwrap();
    let through = NoticeNumber::new(7);
    let mut session = Session::restored(SessionId::FIRST, device, config(), at(500), through);
    let mut effects = Effects::new();
    assert_eq!((session.phase(), session.lease_expires()), (Phase::Severed, at(500)));
    assert_eq!((session.outbox().last_sent(), session.outbox().acked_through()), (through, through));
    session.on_event(&event(0), Some(1), at(10), &mut effects);
    assert_eq!(session.on_heartbeat(at(20)), None, "it has no stream to ask on");
    assert_eq!(session.on_tick(at(499), &mut effects), Some(at(500)));
    assert_eq!(drained(&mut effects), ["ask fencer"], "it owes an ack for longer than T_ack");
    session.on_tick(at(500), &mut effects);
    assert_eq!(drained(&mut effects), ["severed->fenced", "1 fenced"]);
}

#[test]
fn each_quota_refuses_one_more_and_gives_back_what_is_returned() {
    let mut session = session();
    assert_eq!(session.try_subscribe(4), Err(QuotaError::Ranges { asked: 4, limit: 3 }));
    assert_eq!(session.subscriptions(), 0, "a refused one is not counted");
    session.try_subscribe(3).unwrap();
    session.try_subscribe(1).unwrap();
    assert_eq!(session.try_subscribe(1), Err(QuotaError::Subscriptions { limit: 2 }));
    session.on_unsubscribed();
    session.try_subscribe(1).unwrap();
    session.try_fault().unwrap();
    session.try_fault().unwrap();
    assert_eq!(session.try_fault(), Err(QuotaError::FaultsInFlight { limit: 2 }));
    session.on_fault_done();
    assert_eq!((session.faults_in_flight(), session.subscriptions()), (1, 2));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn a_session_does_what_its_model_does(
        steps in prop::collection::vec(any_step(), 1..120),
        enforcement in prop::sample::select(vec![Enforcement::ByDevice, Enforcement::ByNobody]),
    ) {
        let mut model = Model::of(enforcement);
        for step in &steps {
            model.apply(step);
        }
    }

    /// Invariant 19, in core's sense: from any state, ticks alone resolve every token, within T_ack
    /// and a lease from now.
    #[test]
    fn bounded_resolution(steps in prop::collection::vec(any_step(), 1..60)) {
        let mut model = Model::new();
        for step in &steps {
            model.apply(step);
        }
        let from = model.now;
        model.tick_to_the_end();
        prop_assert_eq!(model.resolved.len(), model.given.len());
        prop_assert!(model.now <= from + 100 + 1010);
    }

    /// The same against a device that sends heartbeats for ever and never acks (trap 3).
    #[test]
    fn heartbeats_without_acks_do_not_hold_a_round(
        beats in prop::collection::vec(1..60_u64, 40..80),
        drained in any::<bool>(),
    ) {
        let mut model = Model::new();
        model.apply(&Step::Event { page: 0, token: true });
        for beat in beats {
            if drained {
                model.apply(&Step::Take(8));
            }
            model.apply(&Step::Heartbeat);
            model.apply(&Step::Wait(beat));
            if model.resolved.is_empty() {
                prop_assert!(model.now <= 60 + 100 + 1010);
            }
            model.apply(&Step::Tick);
        }
    }
}
