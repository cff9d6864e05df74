//! What can happen.

use std::ops::Range;
use std::time::Duration;

use super::words::{
    Answer, Called, CutOffBy, Frame, Life, Lost, Op, Pages, Patience, Reply, Scope, Span, Told,
};

/// An event, without its time.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum What {
    // The source.
    /// A page got a frame: from here on devices may be granted it.
    Mapped {
        space: u64,
        page: u64,
        frame: Frame,
    },
    Call {
        op: Op,
        called: Called,
        pages: Pages,
        patience: Patience,
    },
    /// What was named were these bytes, and not whole pages.
    Announced {
        op: Op,
        bytes: Range<u64>,
    },
    /// A device's fault waits for it.
    InFault {
        op: Op,
    },
    Answered {
        op: Op,
        answer: Answer,
    },
    Refused {
        op: Op,
        error: String,
    },
    /// The caller ended its bracket.
    Ended {
        op: Op,
    },
    /// The caller's future was dropped before its answer.
    Abandoned {
        op: Op,
    },
    /// The frame may be used for another page, on the strength of `op`.
    Freed {
        op: Op,
        frame: Frame,
    },

    // Devices.
    Connecting {
        life: Life,
        device: usize,
        /// Which start of the device agent: what an earlier one held is gone with it.
        start: u64,
    },
    /// Its device goes on when its lease is over, until somebody cuts it off.
    EnforcesNoLease {
        life: Life,
        cut_off_by: CutOffBy,
    },
    Opened {
        life: Life,
        session: u64,
        /// The host agent's incarnation.
        host: u64,
    },
    /// The session went on, on another connection.
    Resumed {
        life: Life,
    },
    /// The lease of a session was granted, renewed, or has ended, in virtual time.
    Lease {
        life: Life,
        until: Option<Duration>,
    },
    Subscribing {
        life: Life,
        space: u64,
    },
    Subscribed {
        life: Life,
        space: u64,
        /// The newest event at the time.
        seq: Option<u64>,
    },
    /// It was refused: nobody could stop the device.
    Barred {
        life: Life,
        space: u64,
    },
    Unsubscribed {
        life: Life,
        space: u64,
    },
    Installed {
        life: Life,
        space: u64,
        page: u64,
        frame: Frame,
    },
    FlushBegan {
        life: Life,
        span: Span,
        scope: Scope,
        told: Option<Told>,
    },
    FlushEnded {
        span: Span,
    },
    UseBegan {
        life: Life,
        span: Span,
        space: u64,
        page: u64,
        frame: Frame,
    },
    UseEnded {
        span: Span,
    },
    FaultBegan {
        life: Life,
        span: Span,
        pages: Pages,
    },
    /// It was granted.
    FaultEnded {
        span: Span,
    },
    /// The host agent served a frame's bytes, which say how often it had been freed by then.
    Read {
        life: Life,
        frame: Frame,
        times_freed: u64,
    },
    /// It did not.
    ReadRefused {
        life: Life,
        frame: Frame,
        reason: String,
    },
    Closed {
        life: Life,
        cause: String,
    },

    // The host agent.
    /// A run begins.
    AgentStarted {
        incarnation: u64,
    },
    /// It stops without a word, and the source's calls with it.
    AgentCrashed,
    /// It has stopped as planned: its successor goes on with its sessions.
    HandedOver,
    /// It has found that there is a successor, and ends.
    Superseded {
        host: u64,
    },
    /// A round of it that has targets, or a bracket, was opened.
    RoundSeen {
        host: u64,
        space: u64,
        seq: u64,
    },

    /// Its machine's power goes, and the disk has not all that was written.
    DiskLost(Lost),

    // A source on a machine of its own.
    /// The run of the host agent that answers now knows the address space.
    Registered {
        space: u64,
    },
    /// A try of a call sets out.
    Sent {
        op: Op,
    },
    /// A try was answered: by which run, and with which round.
    Heard {
        op: Op,
        host: u64,
        /// How often its address space had been registered when it set out.
        registered: u64,
        seq: Option<u64>,
    },
    /// That answer is good: it comes with the next [`What::Answered`].
    Taken {
        op: Op,
        host: u64,
        /// How long the host agent says that it took, in virtual time.
        took: Duration,
    },

    // The path from the devices to the memory.
    FencerAsked {
        device: usize,
        start: u64,
        reply: Reply,
    },
    /// Nothing of this run of the device agent reaches the memory any more.
    CutOff {
        device: usize,
        start: u64,
        by: CutOffBy,
    },

    // The world.
    Fault(String),
    /// What the administrator's listings count at the end.
    Left {
        sessions: usize,
        rounds: usize,
        brackets: u64,
        subscriptions: u64,
        /// Bytes and pages.
        quarantined: (u64, u64),
    },
}

impl What {
    /// What the listings show when all is over.
    pub const NOTHING_LEFT: Self =
        Self::Left { sessions: 0, rounds: 0, brackets: 0, subscriptions: 0, quarantined: (0, 0) };
}
