//! One wrong rule at a time, and the property that it breaks.

use crate::config::{
    APART, BREAK, Config, DEVICE_CRASH, FENCE, JOIN, LEASE, LOSS, MERGE, PLANNED, PLANNED_GRACE,
    PLANNED_HANG, RECONNECT, RESTART, RESTARTS, RESUME, ROUND, TAKEOVER, TAKEOVER_CLOCKS, UNSTOPPED,
    WIDE_TRANSLATIONS,
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
    /// A successor reads its clock before it has taken the journal.
    ClockReadBeforeJournal,
    /// A successor reads who may hold leases before it has taken the journal.
    SessionsReadBeforeJournal,
    /// A device is welcomed before its session is durable.
    WelcomeBeforeRecord,
    /// Whether there is a successor is looked at first, and the session's record written then.
    LookBeforeRecord,
    /// A run that has a successor before it has written that it began serves all the same.
    SupersededBegins,
    /// The run after a planned restart waits for nobody.
    SurvivorsForgottenWhenPlanned,
    /// A planned restart hands survivors over as sessions that go on.
    SurvivorHandedOver,
    /// A session that a planned restart left out is resumed: the incarnation is the same.
    SurvivorResumes,
    /// Each start counts the leases of survivors anew.
    LeaseCountedAnew,
    /// A session that a planned restart hands over is marked as one that nobody renews.
    ResumedIsUnrenewed,
    /// Another run of its device ends a session.
    AnyRunEndsSurvivor,
    /// A host agent that has a successor goes on as before.
    SupersededGoesOn,
    /// The source takes an answer of an incarnation that has a successor.
    OldAnswerTaken,
    /// There is one list of subscribers for all address spaces.
    OneListForAll,
    /// A session's task reads no acks while it serves a fault.
    AcksWaitForFault,
    /// A device flushes nothing while it waits for the answer to a fault.
    FlushWaitsForFault,
    /// The source ends a bracket when nobody faults in its range any more: the fault that it copied a page for among them.
    EndWaitsForFault,
    /// A session's task reads no acks while it waits until no round counts on the session.
    AcksWaitForGracePeriod,
    /// Heartbeats renew the lease of a session that owes an ack.
    SuspectRenewed,
    /// A resume renews the lease.
    ResumeRenewsLease,
    /// A notice that was flushed before a resume is acked again without young bits.
    SecondAckWithoutYoung,
    /// A notice takes out the translations that lie in its range, and none that it only touches.
    RangeRoundedInward,
    /// The end of a range that reaches the top, 0 on the wire, makes it an empty one.
    TopTakenForEmpty,
    /// Sequences are of 63 bits: after the highest comes the first again.
    SequenceWraps,
    /// Sequences are compared as numbers with a sign.
    SequencesAreSigned,
    /// Who joins before the first event has read the first sequence.
    NothingIsANumber,
}

/// Each mutation, the property that finds it, and the configuration in which it does.
pub(crate) const MUTATIONS: [(Mutation, &str, Config); 59] = [
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
    (Mutation::ClockReadBeforeJournal, "RestartGrace", TAKEOVER_CLOCKS),
    (Mutation::SessionsReadBeforeJournal, "RestartGrace", TAKEOVER),
    (Mutation::SessionsReadBeforeJournal, "NoStaleUse", TAKEOVER),
    (Mutation::WelcomeBeforeRecord, "RestartGrace", RESTART),
    (Mutation::LookBeforeRecord, "RestartGrace", TAKEOVER),
    (Mutation::SupersededBegins, "Pairing", PLANNED_HANG),
    (Mutation::SurvivorsForgottenWhenPlanned, "RestartGrace", PLANNED),
    (Mutation::SurvivorHandedOver, "RestartGrace", PLANNED_GRACE),
    (Mutation::SurvivorResumes, "RestartGrace", PLANNED),
    (Mutation::ResumedIsUnrenewed, "RestartGrace", RESTARTS),
    (Mutation::LeaseCountedAnew, "BoundedResolution", RESTARTS),
    (Mutation::OldAnswerTaken, "NoStaleUse", TAKEOVER),
    (Mutation::OneListForAll, "Isolation", APART),
    (Mutation::AcksWaitForFault, "NoSelfWait", BREAK),
    (Mutation::FlushWaitsForFault, "NoSelfWait", BREAK),
    (Mutation::AcksWaitForGracePeriod, "NoSelfWait", JOIN),
    (Mutation::EndWaitsForFault, "SomebodyCanGoOn", BREAK),
    (Mutation::SuspectRenewed, "BoundedResolution", LEASE),
    (Mutation::ResumeRenewsLease, "BoundedResolution", RECONNECT),
    (Mutation::SecondAckWithoutYoung, "YoungIsConservative", RESUME),
    (Mutation::AnyIncarnationResumes, "NoStaleUse", PLANNED),
    (Mutation::RangeRoundedInward, "RangeOverApproximates", WIDE_TRANSLATIONS),
    (Mutation::RangeRoundedInward, "NoStaleUse", WIDE_TRANSLATIONS),
    (Mutation::TopTakenForEmpty, "RangeOverApproximates", WIDE_TRANSLATIONS),
    (Mutation::MergeKeepsFirst, "RangeOverApproximates", MERGE),
    (Mutation::SequenceWraps, "SeqCompare", MERGE),
    (Mutation::SequencesAreSigned, "SeqCompare", MERGE),
    (Mutation::NothingIsANumber, "SeqCompare", JOIN),
];
