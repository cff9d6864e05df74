//! A model: the device's notices one by one, and the rules of the head of `core/src/session.rs`.

use std::collections::{BTreeMap, BTreeSet};

use super::*;

#[derive(Clone, Debug)]
pub(super) enum Step {
    Event {
        page: u64,
        token: bool,
    },
    Take(usize),
    /// Acks the unacked notices whose bits are set.
    Ack(u8),
    BadAck,
    Heartbeat,
    Severed,
    Left,
    Evict,
    Fence,
    Tick,
    /// Lets this many milliseconds pass.
    Wait(u64),
}

pub(super) fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => (0..12_u64, any::<bool>()).prop_map(|(page, token)| Step::Event { page, token }),
        8 => (1..4_usize).prop_map(Step::Take),
        8 => any::<u8>().prop_map(Step::Ack),
        1 => Just(Step::BadAck),
        8 => Just(Step::Heartbeat),
        1 => Just(Step::Severed),
        1 => Just(Step::Left),
        1 => Just(Step::Evict),
        1 => Just(Step::Fence),
        8 => Just(Step::Tick),
        8 => (0..80_u64).prop_map(Step::Wait),
        1 => (80..800_u64).prop_map(Step::Wait),
    ]
}

pub(super) struct Model {
    session: Session<u32>,
    enforcement: Enforcement,
    fencer_asked: bool,
    pub(super) now: u64,
    phase: Phase,
    lease_ends: u64,
    /// What the device was sent and has not acked, with when it was sent.
    unacked: BTreeMap<NoticeNumber, u64>,
    undrained_since: Option<u64>,
    pub(super) given: BTreeMap<u32, u64>,
    pub(super) resolved: BTreeSet<u32>,
    /// What the step may resolve a token as.
    may_resolve: &'static str,
}

impl Model {
    pub(super) fn new() -> Self {
        Self::of(Enforcement::ByDevice)
    }

    pub(super) fn of(enforcement: Enforcement) -> Self {
        Self {
            session: session_of(enforcement),
            enforcement,
            fencer_asked: false,
            now: 0,
            phase: Phase::Live,
            lease_ends: 1010,
            unacked: BTreeMap::new(),
            undrained_since: None,
            given: BTreeMap::new(),
            resolved: BTreeSet::new(),
            may_resolve: "",
        }
    }

    fn has_stream(&self) -> bool {
        matches!(self.phase, Phase::Live | Phase::Suspect)
    }

    fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Fenced | Phase::Gone)
    }

    fn overdue_at(&self) -> Option<u64> {
        self.unacked.values().copied().chain(self.undrained_since).min().map(|since| since + 100)
    }

    fn is_overdue(&self) -> bool {
        self.overdue_at().is_some_and(|overdue| overdue <= self.now)
    }

    fn watch_drain(&mut self) {
        let sendable = self.session.outbox().pending() > 0 && self.unacked.len() < 2 && !self.is_over();
        self.undrained_since = if sendable { self.undrained_since.or(Some(self.now)) } else { None };
    }

    pub(super) fn apply(&mut self, step: &Step) {
        let mut effects = Effects::new();
        self.may_resolve = match self.phase {
            Phase::Fenced => "fenced",
            Phase::Gone => "left",
            _ => "",
        };
        let now = at(self.now);
        match step {
            Step::Event { page, token } => {
                let token = token.then_some(u32::try_from(self.given.len()).unwrap());
                self.given.extend(token.map(|token| (token, self.now)));
                self.session.on_event(&event(*page), token, now, &mut effects);
            }
            Step::Take(max) => self.take(*max),
            Step::Ack(bits) => self.ack(*bits, &mut effects),
            Step::BadAck => {
                let bad = ack(1 + self.session.outbox().last_sent().map_or(0, NoticeNumber::get));
                assert_eq!(self.session.on_ack(&bad, now, &mut effects).is_err(), !self.is_over());
                assert!(effects.is_empty());
            }
            Step::Heartbeat => self.heartbeat(),
            Step::Severed => {
                self.session.on_severed(now, &mut effects);
                self.phase = if self.has_stream() { Phase::Severed } else { self.phase };
            }
            Step::Left => {
                self.session.on_left(now, &mut effects);
                self.finish(Phase::Gone, "left");
            }
            Step::Evict => {
                self.session.on_evict(now, &mut effects);
                self.phase = if self.has_stream() { Phase::Severed } else { self.phase };
            }
            Step::Fence => {
                self.session.on_fence_confirmed(now, &mut effects);
                self.finish(Phase::Fenced, "fenced");
            }
            Step::Tick => {
                self.tick(&mut effects);
            }
            Step::Wait(millis) => self.now += millis,
        }
        self.check(effects);
    }

    fn take(&mut self, max: usize) {
        let notices = self.session.take_notices(max, at(self.now));
        assert!(notices.is_empty() || self.has_stream(), "sent without a stream");
        self.undrained_since = self.undrained_since.filter(|_| notices.is_empty());
        self.unacked.extend(notices.iter().map(|notice| (notice.number, self.now)));
    }

    fn ack(&mut self, bits: u8, effects: &mut Effects<u32>) {
        let chosen = self.unacked.keys().enumerate().filter(|(at, _)| bits >> at & 1 == 1);
        let selective: Vec<NoticeNumber> = chosen.map(|(_, number)| *number).collect();
        if selective.is_empty() {
            return;
        }
        self.unacked.retain(|number, _| !selective.contains(number));
        let ack = Ack { selective, ..Ack::default() };
        assert_eq!(self.session.on_ack(&ack, at(self.now), effects), Ok(()));
        if self.is_over() {
            return;
        }
        self.may_resolve = "acked";
        self.watch_drain();
        if self.phase == Phase::Suspect && !self.is_overdue() {
            self.phase = Phase::Live;
        }
        self.fencer_asked &= self.wants_fencer();
    }

    fn wants_fencer(&self) -> bool {
        match self.phase {
            Phase::Suspect => true,
            Phase::Severed => self.is_overdue() || self.now >= self.lease_ends,
            _ => false,
        }
    }

    fn is_enforced(&self) -> bool {
        self.enforcement == Enforcement::ByDevice
    }

    fn heartbeat(&mut self) {
        let renewed = self.session.on_heartbeat(at(self.now)).is_some();
        let is_stopped = self.is_enforced() && self.now >= self.lease_ends;
        let expected = self.phase == Phase::Live && !self.is_overdue() && !is_stopped;
        assert_eq!(renewed, expected);
        if renewed {
            self.lease_ends = self.now + 1010;
        }
    }

    fn finish(&mut self, phase: Phase, how: &'static str) {
        if !self.is_over() {
            self.phase = phase;
            self.may_resolve = how;
        }
    }

    fn tick(&mut self, effects: &mut Effects<u32>) -> Option<u64> {
        let next = self.session.on_tick(at(self.now), effects);
        if self.is_enforced() && self.now >= self.lease_ends {
            self.finish(Phase::Fenced, "fenced");
        } else if self.phase == Phase::Live && self.is_overdue() {
            self.phase = Phase::Suspect;
        }
        let asked = effects.iter().filter(|effect| **effect == Effect::AskFencer).count();
        assert_eq!(asked, usize::from(self.wants_fencer() && !self.fencer_asked));
        self.fencer_asked |= self.wants_fencer();
        let never = u64::MAX;
        let overdue = self.overdue_at().unwrap_or(never);
        let fenced = if self.is_enforced() { self.lease_ends } else { never };
        let expected = match self.phase {
            Phase::Live => overdue.min(fenced),
            Phase::Severed if !self.fencer_asked => overdue.min(self.lease_ends),
            Phase::Suspect | Phase::Severed => fenced,
            Phase::Fenced | Phase::Gone => never,
        };
        let expected = (expected != never).then_some(expected);
        assert_eq!(next, expected.map(at));
        assert!(expected.is_none_or(|next| next > self.now), "a tick that asks for itself again never ends");
        expected
    }

    fn check(&mut self, effects: Effects<u32>) {
        let before = effects.len();
        let mut phase_known = false;
        for effect in effects {
            match effect {
                Effect::Resolve { token, how } => {
                    let how = match how {
                        Resolution::Acked { .. } => "acked",
                        Resolution::Left => "left",
                        Resolution::Fenced => "fenced",
                    };
                    assert_eq!(how, self.may_resolve);
                    assert!(
                        self.given.contains_key(&token) && self.resolved.insert(token),
                        "once, and only once"
                    );
                }
                Effect::Phase { from, to } => {
                    assert!(from != to && !from.is_over(), "nothing leaves Fenced or Gone");
                    assert!(!phase_known || before == 1);
                    phase_known = true;
                }
                Effect::Reported { .. } | Effect::EndStream(_) | Effect::AskFencer => {}
            }
        }
        self.watch_drain();
        assert_eq!(self.session.phase(), self.phase);
        assert_eq!(self.session.lease_expires(), at(self.lease_ends));
        if self.is_over() {
            assert_eq!(self.resolved.len(), self.given.len(), "all are resolved in a session that is over");
            assert_eq!(self.session.outbox().pending(), 0);
        } else {
            assert_eq!(self.session.outbox().unacked(), self.unacked.len());
        }
    }

    /// Only time passes, and only where a tick said that it matters.
    pub(super) fn tick_to_the_end(&mut self) {
        // Live, Suspect, Fenced; or Severed, asked for, Fenced: no session has more to tell.
        for _ in 0..4 {
            self.may_resolve = "";
            let mut effects = Effects::new();
            let next = self.tick(&mut effects);
            self.check(effects);
            let Some(next) = next else { break };
            self.now = next;
        }
    }
}
