//! The invariants.
//!
//! A property reads what is: what TLBs hold, what is on its way, what was released; two read a fact that
//! the state forgets ([`crate::state::Ghost`]). NoStaleUse is what all the others are for.

use shootdown_core::round::{Outcome, TargetReport};
use shootdown_core::session::Phase;
use shootdown_core::{AddrRange, Moment, Seq};

use crate::host::session_id;
use crate::round::OpenRound;
use crate::state::{
    CallState, Down, Host, Run, Session, Set, State, Subscription, T_ACK, T_FENCE, Up, members, moment,
    number, range_of,
};
use crate::world::Shootdown;
use crate::{ranges, sequences, waits};

pub(crate) type Condition = fn(&Shootdown, &State) -> bool;

/// What holds in every state.
pub(crate) const ALWAYS: [(&str, Condition); 24] = [
    ("NoStaleUse", no_stale_use),
    ("NoFreeBeforeQuiesce", no_free_before_quiesce),
    ("AckMeansStopped", ack_means_stopped),
    ("NoGrantInWindow", |_, state| !state.ghost.granted_in_window),
    ("JoinCovers", join_covers),
    ("StableTargets", stable_targets),
    ("UnsubscribeBarrier", unsubscribe_barrier),
    ("Pairing", pairing),
    ("NonBlockAtomic", non_block_atomic),
    ("Contiguity", contiguity),
    ("NeverDrop", never_drop),
    ("MergeIsUnion", merge_is_union),
    ("ResumeOrFlush", resume_or_flush),
    ("TimeoutIsNotAck", timeout_is_not_ack),
    ("FenceIsPositive", fence_is_positive),
    ("FenceReachesReuse", fence_reaches_reuse),
    ("RestartGrace", |_, state| !state.ghost.acted_in_grace),
    ("Isolation", isolation),
    ("NoSelfWait", waits::no_self_wait),
    ("SomebodyCanGoOn", waits::somebody_can_go_on),
    ("BoundedResolution", bounded_resolution),
    ("YoungIsConservative", young_is_conservative),
    ("RangeOverApproximates", ranges::range_over_approximates),
    ("SeqCompare", sequences::seq_compare),
];

/// No device can reach a frame that was released: by a translation, or by an access that has begun.
fn no_stale_use(model: &Shootdown, state: &State) -> bool {
    state.runs().all(|(device, _, run)| {
        let usable = state.can_use(&model.config, device, run);
        let held = run.tlb.iter().enumerate().filter_map(|(page, held)| Some((page as u8, (*held)?.frame)));
        let reached = held.filter(|_| usable).chain(run.access);
        reached.into_iter().all(|(page, frame)| !state.is_released(page, frame))
    })
}

pub(crate) fn rounds(state: &State) -> impl Iterator<Item = (&Host, &OpenRound)> {
    state.hosts.iter().flat_map(|host| host.rounds.iter().map(move |open| (host, open)))
}

/// The sessions of a host agent that a round waits for.
pub(crate) fn waited_for<'a>(
    host: &'a Host,
    open: &'a OpenRound,
) -> impl Iterator<Item = Option<&'a Session>> {
    open.round.0.missing().map(|target| of_target(host, target))
}

fn of_target<'a>(host: &'a Host, target: &TargetReport) -> Option<&'a Session> {
    host.sessions.iter().find(|session| session_id(session.id) == target.session)
}

/// The rounds of this host agent that wait for this session.
pub(crate) fn rounds_that_wait_for(host: &Host, id: u8) -> impl Iterator<Item = &OpenRound> {
    let waits =
        move |open: &&OpenRound| open.round.0.missing().any(|target| target.session == session_id(id));
    host.rounds.iter().filter(waits)
}

fn no_free_before_quiesce(_: &Shootdown, state: &State) -> bool {
    rounds(state).all(|(host, open)| {
        let call = &state.source.events[usize::from(open.event)];
        let freed = call.state == CallState::Released && call.registration == host.registration;
        !freed || open.round.0.is_complete()
    })
}

/// For each ack on its way: no TLB of its device holds what the notice took away, and nothing is on its
/// way to be held. A newer frame may be.
fn ack_means_stopped(_: &Shootdown, state: &State) -> bool {
    state.hosts.iter().flat_map(|host| host.sessions.iter().map(move |session| (host, session))).all(
        |(host, session)| {
            session.sent.iter().all(|sent| {
                let acked = session.up.iter().any(|up| match up {
                    Up::Ack(ack) => {
                        Some(number(sent.n)) <= ack.through || ack.selective.contains(&number(sent.n))
                    }
                    Up::Heartbeat(_) => false,
                });
                let open = host.rounds.iter().filter(|open| sent.events >> open.event & 1 == 1);
                !acked || open.into_iter().all(|open| has_stopped(state, session, open.event))
            })
        },
    )
}

/// Whether the session's device holds nothing of what this event took away.
fn has_stopped(state: &State, session: &Session, called: u8) -> bool {
    let call = &state.source.events[usize::from(called)];
    let run = &state.devices[session.device].runs[session.run];
    if run.session_id() != Some(session.id) {
        return true;
    }
    let holds = run.tlb[usize::from(call.page)].is_some_and(|held| held.frame <= call.frame);
    let accesses = run.access.is_some_and(|(page, frame)| page == call.page && frame <= call.frame);
    let granted = |message: &Down| match message {
        Down::Grant(translation) => {
            translation.pages().any(|(page, frame)| page == call.page && frame <= call.frame)
        }
        Down::Notice { .. } | Down::Lease(_) => false,
    };
    let will_hold = run.link.as_ref().is_some_and(|link| link.down.iter().any(granted));
    !holds && !accesses && !will_hold
}

/// Who subscribed is told of every event above the sequence that it read.
fn join_covers(model: &Shootdown, state: &State) -> bool {
    rounds(state).all(|(host, open)| {
        let page = state.source.events[usize::from(open.event)].page;
        let told = host.sessions.iter().filter(|session| model.config.subscribes(session.device, page));
        told.into_iter().all(|session| match session.subscription {
            Subscription::Subscribed(read) if !session.survivor && !session.phase.is_over() => {
                Some(open.seq) <= read.seq || open.targets.contains(&session.id)
            }
            _ => true,
        })
    })
}

/// The targets are those of the start, and each that is waited for is there.
fn stable_targets(_: &Shootdown, state: &State) -> bool {
    rounds(state).all(|(host, open)| {
        let reports = open.round.0.reports();
        let same = reports.len() == open.targets.len()
            && reports.iter().zip(&open.targets).all(|(report, id)| report.session == session_id(*id));
        same && waited_for(host, open).all(|session| session.is_some())
    })
}

fn unsubscribe_barrier(_: &Shootdown, state: &State) -> bool {
    state.hosts.iter().all(|host| {
        let left = |session: &&Session| session.subscription == Subscription::Unsubscribed;
        host.sessions.iter().filter(left).all(|session| {
            let run = &state.devices[session.device].runs[session.run];
            let notice = |message: &Down| matches!(message, Down::Notice { .. });
            let linked = run.link.as_ref().filter(|_| run.session_id() == Some(session.id));
            rounds_that_wait_for(host, session.id).next().is_none()
                && session.pending.is_empty()
                && (session.sent.is_empty() || session.phase.is_over())
                && !linked.is_some_and(|link| link.down.iter().any(notice))
        })
    })
}

fn pairing(_: &Shootdown, state: &State) -> bool {
    state.hosts.iter().all(|host| {
        state.source.events.iter().enumerate().filter(|(_, call)| call.registration == host.registration).all(
            |(called, call)| {
                let open = host.brackets.iter().filter(|bracket| usize::from(**bracket) == called).count();
                open == usize::from(!call.bracket_ended)
            },
        )
    })
}

fn non_block_atomic(_: &Shootdown, state: &State) -> bool {
    let there_is = |called: &u8| usize::from(*called) < state.source.events.len();
    state.hosts.iter().all(|host| host.brackets.iter().all(there_is))
}

/// What the books say was received did arrive: all of it.
fn contiguity(_: &Shootdown, state: &State) -> bool {
    state.runs().all(|(_, _, run)| {
        let last = run.session.as_ref().and_then(|joined| joined.books.last_received());
        last.is_none_or(|last| (1..=last.get()).all(|n| run.arrived >> n & 1 == 1))
    })
}

/// Each round that waits has a notice that is sent or will be, and that covers its page.
fn never_drop(_: &Shootdown, state: &State) -> bool {
    rounds(state).all(|(host, open)| {
        let call = &state.source.events[usize::from(open.event)];
        waited_for(host, open).flatten().all(|session| {
            let covers = |(range, events, _): (AddrRange, Set, Seq)| {
                events >> open.event & 1 == 1 && range.contains(range_of(call.page))
            };
            session.told || notices(session).any(covers)
        })
    })
}

/// Range, events and sequence of each notice that is not acked.
pub(crate) fn notices(session: &Session) -> impl Iterator<Item = (AddrRange, Set, Seq)> + '_ {
    let sent = session.sent.iter().map(|sent| (sent.range, sent.events, sent.seq));
    sent.chain(session.pending.iter().map(|draft| (draft.range, draft.events, draft.seq)))
}

/// The events of a notice of this run's session, if it is not acked.
pub(crate) fn events_of(state: &State, run: &Run, n: u8) -> impl Iterator<Item = u8> {
    let id = run.session_id();
    let sessions = state.hosts.iter().flat_map(|host| &host.sessions).filter(|it| Some(it.id) == id);
    let sent = sessions.flat_map(|session| &session.sent).filter(|sent| sent.n == n);
    members(sent.fold(0, |events, sent| events | sent.events))
}

fn merge_is_union(_: &Shootdown, state: &State) -> bool {
    rounds(state).all(|(host, open)| {
        let page = state.source.events[usize::from(open.event)].page;
        let carries = |session: &Session| {
            notices(session)
                .filter(|(_, events, _)| events >> open.event & 1 == 1)
                .all(|(range, _, seq)| range.contains(range_of(page)) && seq >= open.seq)
        };
        host.sessions.iter().filter(|session| open.targets.contains(&session.id)).all(carries)
    })
}

/// A device whose stream is up speaks to a host agent that knows its session; every notice that it has
/// not received is on its way, in order; and all that it holds was granted in this session.
fn resume_or_flush(model: &Shootdown, state: &State) -> bool {
    state.runs().all(|(_, _, run)| {
        let (Some(link), Some(joined)) = (&run.link, &run.session) else { return true };
        let own = run.tlb.iter().flatten().all(|held| held.session == joined.id);
        let Some(host) = state.host(link.process) else { return own };
        let Some(session) = host.session(joined.id) else { return false };
        let received = joined.books.last_received().map_or(0, |last| last.get());
        let on_its_way = link.down.iter().filter_map(|message| match message {
            Down::Notice { n, .. } => Some(u64::from(*n)),
            _ => None,
        });
        let news = on_its_way.filter(|n| *n > received);
        let complete = !session.phase.has_stream()
            || model.config.losses > 0
            || news.eq(received + 1..=u64::from(session.last_sent));
        own && host.incarnation == joined.incarnation && complete && received <= u64::from(session.last_sent)
    })
}

/// A target that counts as acked has stopped.
fn timeout_is_not_ack(_: &Shootdown, state: &State) -> bool {
    rounds(state).all(|(host, open)| {
        let acked = |report: &&TargetReport| report.outcome == Outcome::Acked;
        open.round.0.reports().iter().filter(acked).all(|report| {
            of_target(host, report).is_none_or(|session| has_stopped(state, session, open.event))
        })
    })
}

/// A device whose session is fenced reaches nothing by that session.
fn fence_is_positive(model: &Shootdown, state: &State) -> bool {
    state.hosts.iter().flat_map(|host| &host.sessions).filter(|session| session.phase == Phase::Fenced).all(
        |session| {
            let run = &state.devices[session.device].runs[session.run];
            run.session_id() != Some(session.id) || !state.can_use(&model.config, session.device, run)
        },
    )
}

/// A round hears of a fence when no access of the fenced session is going on.
fn fence_reaches_reuse(_: &Shootdown, state: &State) -> bool {
    rounds(state).all(|(host, open)| {
        let fenced = |report: &&TargetReport| report.outcome == Outcome::Fenced;
        open.round.0.reports().iter().filter(fenced).all(|report| {
            of_target(host, report).is_none_or(|session| {
                let run = &state.devices[session.device].runs[session.run];
                run.session_id() != Some(session.id) || run.access.is_none()
            })
        })
    })
}

/// A round waits for devices of its own address space only.
fn isolation(model: &Shootdown, state: &State) -> bool {
    rounds(state).all(|(host, open)| {
        let page = state.source.events[usize::from(open.event)].page;
        waited_for(host, open).flatten().all(|session| model.config.subscribes(session.device, page))
    })
}

/// No caller waits for longer than T_ack and T_fence after its notice was first sent, or after its round
/// was opened where it was not. A host agent that was stopped is late, whatever it does.
fn bounded_resolution(model: &Shootdown, state: &State) -> bool {
    let late =
        |since: Moment| moment(state.host_clock) > since + (moment(T_ACK + T_FENCE).since(Moment::ZERO));
    model.config.pauses > 0
        || leases_end(state)
            && rounds(state).all(|(host, open)| {
                let call = &state.source.events[usize::from(open.event)];
                let waits = call.state == CallState::Waiting && call.registration == host.registration;
                !waits
                    || waited_for(host, open).flatten().all(|session| {
                        !late(session.sent_at(open.event).map_or(open.round.0.opened(), moment))
                    })
            })
}

/// However often the host agent is restarted, nobody is waited for longer than for one lease.
fn leases_end(state: &State) -> bool {
    let since = |id: u8| {
        let durable = state.journal.sessions.iter().find(|durable| durable.id == id);
        durable.and_then(|durable| durable.unrenewed_since)
    };
    state.hosts.iter().flat_map(|host| &host.sessions).filter(|session| session.survivor).all(|session| {
        since(session.id).is_none_or(|since| session.lease.expires() <= moment(since + T_FENCE))
    })
}

/// A page that was used is not said to be old.
fn young_is_conservative(model: &Shootdown, state: &State) -> bool {
    !model.config.young
        || rounds(state).all(|(_, open)| {
            let call = &state.source.events[usize::from(open.event)];
            !open.round.0.is_complete() || !call.used || open.round.0.young()
        })
}
