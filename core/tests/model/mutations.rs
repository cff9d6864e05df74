//! One wrong rule at a time, and the property that it breaks.

use crate::config::{
    Config, DEVICE_CRASH, FENCE, JOIN, LEASE, LOSS, MERGE, PLANNED, RECONNECT, RESTART, RESUME, ROUND,
    TAKEOVER, TAKEOVER_CLOCKS, UNSTOPPED,
};

/// A rule that is broken.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Mutation {
    /// A caller whose deadline passed releases its page.
    DeadlineReleases,
    /// The device acks when the notice arrives.
    AckBeforeFlush,
    /// Faults are served while a bracket is open.
    GrantInBracket,
    /// A ticket that an event spoiled is committed.
    SpoiledTicketCommitted,
    /// A subscriber reads the sequence first, and is published then.
    SequenceBeforePublish,
    /// A stream that ends takes its session out of the rounds.
    DisconnectDropsTarget,
    /// Unsubscribed is said without waiting for the rounds that count on the leaver.
    UnsubscribedAtOnce,
    /// The end of a call that was answered NOT_QUIESCED is forgotten.
    ParkedEndForgotten,
    /// A start that is answered WOULD_BLOCK has opened its bracket.
    RefusedStartLeavesBracket,
    /// The device takes a notice that is not the next one, and acks through it.
    GapTaken,
    /// An outbox that is full drops the notice.
    FullOutboxDrops,
    /// A merged notice has the range of its first event.
    MergeKeepsFirst,
    /// A resume point of any incarnation is good.
    AnyIncarnationResumes,
    /// A resume goes on with the next notice.
    ResumeSendsNothingAgain,
    /// A device that is told to flush goes on in its new session with what it holds.
    ResumeSkipsFlush,
    /// A successor leaves the resume points in the journal for the next one.
    ResumePointsKept,
    /// T_ack is taken for an ack.
    TimeoutIsAck,
    /// The host agent counts a lease as long as it is.
    HostLeaseNotLengthened,
    /// The end of a lease fences a device that does not enforce it.
    LeaseFencesAnyone,
    /// A fencer that fails is taken for one that confirmed.
    FencerFailureConfirms,
    /// Rounds hear of a fence while an access of the fenced session is going on.
    FenceToldDuringAccess,
    /// A round that opens while an access of a fenced session is going on does not count on it.
    FencedIsNoTarget,
    /// After a crash nobody is waited for.
    NoGrace,
    /// Another run of its device ends a session.
    AnyRunEndsSurvivor,
    /// A host agent that has a successor goes on as before.
    SupersededGoesOn,
    /// The source takes an answer of an incarnation that has a successor.
    OldAnswerTaken,
    /// Heartbeats renew the lease of a session that owes an ack.
    SuspectRenewed,
    /// A resume renews the lease.
    ResumeRenewsLease,
    /// A notice that was flushed before a resume is acked again without young bits.
    SecondAckWithoutYoung,
}

/// Each mutation, the property that finds it, and the configuration in which it does.
pub(crate) const MUTATIONS: [(Mutation, &str, Config); 36] = [
    (Mutation::DeadlineReleases, "NoFreeBeforeQuiesce", ROUND),
    (Mutation::AckBeforeFlush, "AckMeansStopped", ROUND),
    (Mutation::AckBeforeFlush, "NoStaleUse", ROUND),
    (Mutation::GrantInBracket, "NoGrantInWindow", ROUND),
    (Mutation::GrantInBracket, "NoStaleUse", ROUND),
    (Mutation::SpoiledTicketCommitted, "NoGrantInWindow", ROUND),
    (Mutation::SequenceBeforePublish, "JoinCovers", JOIN),
    (Mutation::DisconnectDropsTarget, "StableTargets", RESUME),
    (Mutation::UnsubscribedAtOnce, "UnsubscribeBarrier", JOIN),
    (Mutation::ParkedEndForgotten, "Pairing", ROUND),
    (Mutation::RefusedStartLeavesBracket, "NonBlockAtomic", ROUND),
    (Mutation::GapTaken, "Contiguity", LOSS),
    (Mutation::GapTaken, "NoStaleUse", LOSS),
    (Mutation::FullOutboxDrops, "NeverDrop", MERGE),
    (Mutation::MergeKeepsFirst, "MergeIsUnion", MERGE),
    (Mutation::AnyIncarnationResumes, "ResumeOrFlush", RESTART),
    (Mutation::ResumeSendsNothingAgain, "ResumeOrFlush", RESUME),
    (Mutation::ResumeSkipsFlush, "ResumeOrFlush", RESTART),
    (Mutation::ResumePointsKept, "NoStaleUse", PLANNED),
    (Mutation::TimeoutIsAck, "TimeoutIsNotAck", LEASE),
    (Mutation::HostLeaseNotLengthened, "FenceIsPositive", LEASE),
    (Mutation::HostLeaseNotLengthened, "NoStaleUse", DEVICE_CRASH),
    (Mutation::LeaseFencesAnyone, "FenceIsPositive", UNSTOPPED),
    (Mutation::FencerFailureConfirms, "FenceIsPositive", FENCE),
    (Mutation::FenceToldDuringAccess, "FenceReachesReuse", FENCE),
    (Mutation::FenceToldDuringAccess, "NoStaleUse", FENCE),
    (Mutation::FencedIsNoTarget, "NoStaleUse", FENCE),
    (Mutation::NoGrace, "RestartGrace", RESTART),
    (Mutation::AnyRunEndsSurvivor, "RestartGrace", RESTART),
    (Mutation::SupersededGoesOn, "RestartGrace", TAKEOVER),
    (Mutation::SupersededGoesOn, "RestartGrace", TAKEOVER_CLOCKS),
    (Mutation::OldAnswerTaken, "NoStaleUse", TAKEOVER),
    (Mutation::SuspectRenewed, "BoundedResolution", LEASE),
    (Mutation::ResumeRenewsLease, "BoundedResolution", RECONNECT),
    (Mutation::SecondAckWithoutYoung, "YoungIsConservative", RESUME),
    (Mutation::AnyIncarnationResumes, "NoStaleUse", PLANNED),
];
