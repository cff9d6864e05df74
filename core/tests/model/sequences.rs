//! How events are numbered, and what is decided by comparing their numbers: `core/src/id.rs`, `core/src/gate.rs`,
//! `core/src/outbox/pending.rs`, `server/src/directory.rs`.

use shootdown_core::Seq;

use crate::mutations::Mutation;
use crate::properties::notices;
use crate::round::OpenRound;
use crate::state::{Host, State, Subscription, members};
use crate::world::{Shootdown, World};

/// What a subscriber read when it joined.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct ReadAt {
    pub(crate) seq: Option<Seq>,
    /// How many events there had been. No rule reads it.
    opened: u8,
}

impl ReadAt {
    /// It joined before anything happened.
    pub(crate) const BEFORE_ALL: Self = Self { seq: None, opened: 0 };
}

impl World<'_> {
    /// `core/src/gate.rs::start`.
    pub(crate) fn next_seq(&self, at: usize) -> Seq {
        let next = self.state.hosts[at].last_seq.map_or(Seq::FIRST, Seq::next);
        let wraps = self.broken(Mutation::SequenceWraps) && i64::try_from(next.get()).is_err();
        if wraps { Seq::FIRST } else { next }
    }

    /// `server/src/directory.rs::subscribe`.
    pub(crate) fn read_last_seq(&self, at: usize) -> ReadAt {
        let host = &self.state.hosts[at];
        let nothing = self.broken(Mutation::NothingIsANumber).then_some(Seq::FIRST);
        ReadAt { seq: host.last_seq.or(nothing), opened: host.opened }
    }
}

/// The wrong order: that of the same bits with a sign.
pub(crate) fn signed_max(a: Seq, b: Seq) -> Seq {
    if (a.get() as i64) < b.get() as i64 { b } else { a }
}

/// Sequences say in what order events happened: among themselves, to who joined between them, and in what was merged.
pub(crate) fn seq_compare(_: &Shootdown, state: &State) -> bool {
    state.hosts.iter().all(|host| {
        let rises = |pair: &[OpenRound]| pair[0].opened < pair[1].opened && pair[0].seq < pair[1].seq;
        host.rounds.windows(2).all(rises)
            && host.rounds.last().is_none_or(|last| Some(last.seq) <= host.last_seq)
            && who_joined_knows_what_came_later(host)
            && what_was_merged_has_the_latest(host)
    })
}

fn who_joined_knows_what_came_later(host: &Host) -> bool {
    host.sessions.iter().all(|session| match session.subscription {
        Subscription::Subscribed(read) => {
            host.rounds.iter().all(|open| (open.opened > read.opened) == (Some(open.seq) > read.seq))
        }
        _ => true,
    })
}

fn what_was_merged_has_the_latest(host: &Host) -> bool {
    host.sessions.iter().flat_map(notices).all(|(_, events, seq)| {
        let of = members(events).filter_map(|event| host.rounds.iter().find(|open| open.event == event));
        of.max_by_key(|open| open.opened).is_none_or(|latest| latest.seq == seq)
    })
}
