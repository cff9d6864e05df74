//! What a configuration must be able to reach.

use shootdown_core::round::Outcome;
use shootdown_core::session::Phase;

use crate::properties::{Condition, events_of, rounds, waited_for};
use crate::state::{
    CallState, Ended, Host, Run, Running, Session, Set, State, Subscription, T_FENCE, Up, members, moment,
};
use crate::waits;

/// What a configuration must be able to reach.
pub(crate) const SOMETIMES: [(&str, Condition); 33] = [
    ("released", |_, state| calls(state, CallState::Released)),
    ("released beside a round that waits", |_, state| {
        let waits = rounds(state).any(|(host, open)| waited_for(host, open).next().is_some());
        waits && calls(state, CallState::Released)
    }),
    ("quarantined", |_, state| calls(state, CallState::Parked)),
    ("quarantine released", |_, state| {
        state.source.events.iter().any(|call| call.was_parked && call.state == CallState::Released)
    }),
    ("acked by all", |_, state| {
        rounds(state).any(|(_, open)| {
            let reports = open.round.0.reports();
            reports.len() > 1 && reports.iter().all(|report| report.outcome == Outcome::Acked)
        })
    }),
    ("merged", |_, state| {
        sessions(state).any(|session| session.sent.iter().any(|sent| sent.events.count_ones() > 1))
    }),
    ("unsubscribed", |_, state| {
        sessions(state).any(|session| session.subscription == Subscription::Unsubscribed)
    }),
    ("suspect", |_, state| sessions(state).any(|session| session.phase == Phase::Suspect)),
    ("fenced by lease", |_, state| ended(state, Ended::LeaseExpired)),
    ("fenced by a fencer", |_, state| ended(state, Ended::FencerConfirmed)),
    ("left", |_, state| ended(state, Ended::Left)),
    ("resumed", |_, state| sessions(state).any(|session| session.resumed)),
    ("resumed after a planned restart", |_, state| {
        let planned = state.hosts.iter().filter(|host| host.planned);
        planned.into_iter().any(|host| host.sessions.iter().any(|session| session.resumed))
    }),
    ("acked again", |_, state| sessions(state).any(acked_again)),
    ("gap", |_, state| state.runs().any(|(_, _, run)| run.must_flush)),
    ("new run beside the old one", |_, state| {
        let new_runs = state.devices.iter().filter(|device| device.runs.len() > 1);
        new_runs.into_iter().any(|device| device.runs.last().is_some_and(|run| run.link.is_some()))
            && sessions(state).any(|session| session.run == 0 && !session.phase.is_over())
    }),
    // Nobody waits for it: who is a survivor was one when it stopped, or was left out.
    ("stopped in the grace period", |_, state| {
        state
            .hosts
            .iter()
            .any(|host| host.planned && host.in_grace() && host.registration == host.incarnation)
    }),
    ("left out", |_, state| {
        let left_out = |host: &Host| host.planned && host.in_grace() && host.registration > host.incarnation;
        state.hosts.iter().any(left_out)
    }),
    // A run that took the journal did not begin.
    ("crashed in its start", |_, state| {
        let begun = state
            .hosts
            .iter()
            .any(|host| host.serves() && host.process > host.incarnation + u8::from(host.planned));
        begun && state.spent.host_crashes > 0 && state.spent.pauses == 0
    }),
    ("hung in its start", |_, state| {
        let hung = |host: &Host| host.running == Running::Paused && !host.start.is_empty();
        state.hosts.len() > 1 && state.hosts.iter().any(hung)
    }),
    ("woke beside a start", |_, state| {
        let starts = state.hosts.last().is_some_and(|host| !host.start.is_empty());
        starts && state.hosts.iter().any(Host::serves)
    }),
    ("a fault waits for its own session", |_, state| waits::fault_waits_for_its_own_session(state)),
    ("taken out beside what was told", |_, state| {
        state.runs().any(|(_, _, run)| {
            run.flushing.iter().any(|(n, taken)| beside_what_was_told(state, run, *n, *taken))
        })
    }),
    ("grace", |_, state| state.hosts.iter().any(Host::in_grace)),
    ("grace over: left", |_, state| grace_over(state, Ended::Left)),
    ("grace over: lease", |_, state| grace_over(state, Ended::LeaseExpired)),
    ("grace over: fencer", |_, state| grace_over(state, Ended::FencerConfirmed)),
    ("released after a crash", |_, state| state.spent.host_crashes > 0 && released_by_a_successor(state)),
    ("released after a takeover", |_, state| state.spent.pauses > 0 && released_by_a_successor(state)),
    ("woke beside its successor", |_, state| {
        state.hosts.len() > 1 && state.hosts.iter().all(|host| host.running == Running::Yes)
    }),
    ("old answer on its way", |_, state| {
        let old = |answer: u8| answer < state.source.registered;
        state.source.events.iter().any(|call| call.answer.is_some_and(old))
    }),
    ("a newer frame is held", |_, state| {
        state.runs().any(|(_, _, run)| run.tlb.iter().flatten().any(|held| held.frame > 0))
    }),
    ("renewed", |_, state| {
        let first = moment(T_FENCE);
        sessions(state).any(|session| session.lease.expires() > first)
    }),
];

fn sessions(state: &State) -> impl Iterator<Item = &Session> {
    state.hosts.iter().flat_map(|host| &host.sessions)
}

fn calls(state: &State, in_state: CallState) -> bool {
    state.source.events.iter().any(|call| call.state == in_state)
}

fn ended(state: &State, how: Ended) -> bool {
    sessions(state).any(|session| session.ended == Some(how) && session.told)
}

fn grace_over(state: &State, how: Ended) -> bool {
    let over = state.hosts.iter().filter(|host| !host.in_grace());
    over.into_iter()
        .any(|host| host.sessions.iter().any(|session| session.survivor && session.ended == Some(how)))
}

fn released_by_a_successor(state: &State) -> bool {
    state.source.events.iter().any(|call| call.state == CallState::Released && call.registration > 1)
}

/// An ack is on its way that names a notice which was acked before.
fn acked_again(session: &Session) -> bool {
    let known = |n: u64| session.sent.iter().any(|sent| u64::from(sent.n) == n);
    session.up.iter().any(|up| match up {
        Up::Ack(ack) => ack.selective.iter().any(|n| !known(n.get())),
        Up::Heartbeat(_) => false,
    })
}

/// Whether a flush takes out a whole translation that is held, and pages in it that no event of its notice is about.
fn beside_what_was_told(state: &State, run: &Run, n: u8, taken: Set) -> bool {
    let pages = events_of(state, run, n).map(|called| state.source.events[usize::from(called)].page);
    let told: Set = pages.fold(0, |told, page| told | 1 << page);
    told != 0 && taken & !told != 0 && members(taken).all(|page| run.tlb[usize::from(page)].is_some())
}
