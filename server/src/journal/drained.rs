//! What a planned end leaves to the next run: where each session stopped, so that it can go on without a
//! flush, and the address spaces of sources that outlive the host agent.

use std::time::Duration;

use shootdown_core::{
    AddrRange, AddressSpaceId, Cause, CauseSet, Moment, NoticeNumber, OwnerTag, Seq, SubscriptionId,
};
use shootdown_proto::convert;
use shootdown_proto::message::{CallId, RequestId};

use super::calls;
use super::record::{self, Nonsense, SessionRecord};
use crate::source::rpc::registrations::{Registered, ToRegister};
use crate::source::rpc::releases::Released;
use crate::source::rpc::retries::{MayWait, Over};
use crate::source::{NotifyError, Strictness};

/// The last record of a run that ended as planned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Drained {
    /// Of the machine's boot: moments are comparable in the same boot only.
    pub(crate) boot_id: String,
    pub(crate) sessions: Vec<DrainedSession>,
    pub(crate) spaces: Vec<DrainedSpace>,
    /// Registrations that may be tried again, the oldest first.
    pub(crate) registered: Vec<Registered>,
    /// Releases that may be tried again.
    pub(crate) released: Vec<Released>,
}

/// A session that may go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DrainedSession {
    pub(crate) session: SessionRecord,
    /// When its lease ends, on the host's clock.
    pub(crate) lease_expires: Moment,
    /// Every notice that was sent is acked; this was the last.
    pub(crate) acked_through: Option<NoticeNumber>,
    /// Of its outbox.
    pub(crate) window: u32,
    pub(crate) change_pte: bool,
    pub(crate) subscriptions: Vec<DrainedSubscription>,
}

/// A subscription of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DrainedSubscription {
    pub(crate) id: SubscriptionId,
    pub(crate) address_space: AddressSpaceId,
    pub(crate) ranges: Vec<AddrRange>,
    pub(crate) causes: CauseSet,
    pub(crate) wants_end: bool,
    /// By which request of its session it was asked for, so that it is known when it is asked for again.
    pub(crate) request: RequestId,
}

/// An address space whose source outlives the host agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DrainedSpace {
    pub(crate) id: AddressSpaceId,
    pub(crate) name: String,
    pub(crate) strictness: Strictness,
    pub(crate) last_seq: Option<Seq>,
    /// Events up to this one were another run's: nobody knows what became of them.
    pub(crate) began_after: Option<Seq>,
    /// Brackets whose rounds are complete, and which their callers have not ended.
    pub(crate) open_brackets: Vec<DrainedBracket>,
    /// Calls that are over, and may be tried again; the oldest first.
    pub(crate) over: Vec<(CallId, Over)>,
}

/// A bracket, and what its end will tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DrainedBracket {
    pub(crate) seq: Seq,
    pub(crate) range: AddrRange,
    pub(crate) cause: Cause,
    pub(crate) owner: Option<OwnerTag>,
    /// The call that opened it, which may be tried again.
    pub(crate) start: Option<(CallId, MayWait)>,
}

pub(super) mod wire {
    use shootdown_proto::v1::AddressRange;

    use crate::journal::calls::wire as calls;
    use crate::journal::record::wire as record;

    #[derive(Clone, PartialEq, prost::Message)]
    pub(in crate::journal) struct Drained {
        #[prost(string, tag = "1")]
        pub(in crate::journal) boot_id: String,
        #[prost(message, repeated, tag = "2")]
        pub(in crate::journal) sessions: Vec<Session>,
        #[prost(message, repeated, tag = "3")]
        pub(in crate::journal) spaces: Vec<Space>,
        #[prost(message, repeated, tag = "4")]
        pub(in crate::journal) released: Vec<Released>,
        #[prost(message, repeated, tag = "5")]
        pub(in crate::journal) registered: Vec<Registered>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(in crate::journal) struct Released {
        #[prost(uint64, tag = "1")]
        pub(in crate::journal) address_space: u64,
        #[prost(string, tag = "2")]
        pub(in crate::journal) request_id: String,
        /// 0: none.
        #[prost(uint64, tag = "3")]
        pub(in crate::journal) seq: u64,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(in crate::journal) struct Session {
        #[prost(message, optional, tag = "1")]
        pub(in crate::journal) session: Option<record::Session>,
        #[prost(uint64, tag = "2")]
        pub(in crate::journal) lease_expires_ns: u64,
        /// 0: none.
        #[prost(uint64, tag = "3")]
        pub(in crate::journal) acked_through: u64,
        #[prost(uint32, tag = "4")]
        pub(in crate::journal) window: u32,
        #[prost(bool, tag = "5")]
        pub(in crate::journal) change_pte: bool,
        #[prost(message, repeated, tag = "6")]
        pub(in crate::journal) subscriptions: Vec<Subscription>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(in crate::journal) struct Subscription {
        #[prost(uint64, tag = "1")]
        pub(in crate::journal) id: u64,
        #[prost(uint64, tag = "2")]
        pub(in crate::journal) address_space: u64,
        #[prost(message, repeated, tag = "3")]
        pub(in crate::journal) ranges: Vec<AddressRange>,
        /// Empty: every one.
        #[prost(int32, repeated, tag = "4")]
        pub(in crate::journal) causes: Vec<i32>,
        #[prost(bool, tag = "5")]
        pub(in crate::journal) wants_end: bool,
        #[prost(uint64, tag = "6")]
        pub(in crate::journal) request: u64,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(in crate::journal) struct Space {
        #[prost(uint64, tag = "1")]
        pub(in crate::journal) id: u64,
        #[prost(string, tag = "2")]
        pub(in crate::journal) name: String,
        /// 0: none.
        #[prost(uint64, tag = "3")]
        pub(in crate::journal) last_seq: u64,
        #[prost(message, repeated, tag = "4")]
        pub(in crate::journal) open_brackets: Vec<Bracket>,
        #[prost(bool, tag = "5")]
        pub(in crate::journal) strict: bool,
        /// 0: none.
        #[prost(uint64, tag = "8")]
        pub(in crate::journal) began_after: u64,
        #[prost(message, repeated, tag = "9")]
        pub(in crate::journal) over: Vec<calls::Call>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(in crate::journal) struct Registered {
        #[prost(string, tag = "1")]
        pub(in crate::journal) request_id: String,
        #[prost(string, tag = "2")]
        pub(in crate::journal) name: String,
        #[prost(bool, tag = "3")]
        pub(in crate::journal) strict: bool,
        /// The name of an earlier run. 0: none.
        #[prost(uint64, tag = "4")]
        pub(in crate::journal) taken_back: u64,
        #[prost(oneof = "Became", tags = "5, 6")]
        pub(in crate::journal) became: Option<Became>,
    }

    #[derive(Clone, Copy, PartialEq, prost::Oneof)]
    pub(in crate::journal) enum Became {
        #[prost(uint64, tag = "5")]
        AddressSpace(u64),
        /// How many there may be.
        #[prost(uint64, tag = "6")]
        Quota(u64),
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(in crate::journal) struct Bracket {
        #[prost(uint64, tag = "1")]
        pub(in crate::journal) seq: u64,
        #[prost(message, optional, tag = "2")]
        pub(in crate::journal) range: Option<AddressRange>,
        #[prost(int32, tag = "3")]
        pub(in crate::journal) cause: i32,
        /// 0: none.
        #[prost(uint64, tag = "4")]
        pub(in crate::journal) owner: u64,
        /// Empty: none.
        #[prost(string, tag = "5")]
        pub(in crate::journal) request_id: String,
        #[prost(bool, tag = "6")]
        pub(in crate::journal) non_blockable: bool,
    }
}

impl From<&Drained> for wire::Drained {
    fn from(drained: &Drained) -> Self {
        Self {
            boot_id: drained.boot_id.clone(),
            sessions: drained.sessions.iter().map(wire_session).collect(),
            spaces: drained.spaces.iter().map(wire_space).collect(),
            released: drained.released.iter().map(wire_released).collect(),
            registered: drained.registered.iter().filter_map(wire_registered).collect(),
        }
    }
}

fn wire_released(released: &Released) -> wire::Released {
    wire::Released {
        address_space: released.address_space.get(),
        request_id: released.call.to_string(),
        seq: released.seq.map_or(0, Seq::get),
    }
}

/// `None` where it was refused for a reason that is not remembered.
fn wire_registered((call, asked, outcome): &Registered) -> Option<wire::Registered> {
    let became = match outcome {
        Ok(id) => wire::Became::AddressSpace(id.get()),
        Err(NotifyError::TooManyAddressSpaces { most }) => {
            wire::Became::Quota(u64::try_from(*most).unwrap_or(u64::MAX))
        }
        Err(_) => return None,
    };
    Some(wire::Registered {
        request_id: call.to_string(),
        name: asked.name.clone(),
        strict: asked.strictness == Strictness::Strict,
        taken_back: asked.taken_back.map_or(0, AddressSpaceId::get),
        became: Some(became),
    })
}

fn registered(registered: wire::Registered) -> Result<Registered, Nonsense> {
    let call = convert::call_id(&registered.request_id).map_err(|_| Nonsense)?.ok_or(Nonsense)?;
    let outcome = match registered.became.ok_or(Nonsense)? {
        wire::Became::AddressSpace(id) => Ok(AddressSpaceId::new(id).ok_or(Nonsense)?),
        wire::Became::Quota(most) => {
            let most = usize::try_from(most).map_err(|_| Nonsense)?;
            Err(NotifyError::TooManyAddressSpaces { most })
        }
    };
    let asked = ToRegister {
        name: registered.name,
        strictness: if registered.strict { Strictness::Strict } else { Strictness::Lenient },
        taken_back: AddressSpaceId::new(registered.taken_back),
    };
    Ok((call, asked, outcome))
}

fn wire_session(session: &DrainedSession) -> wire::Session {
    let subscriptions = session.subscriptions.iter().map(|subscription| wire::Subscription {
        id: subscription.id.get(),
        address_space: subscription.address_space.get(),
        ranges: subscription.ranges.iter().copied().map(convert::wire_range).collect(),
        causes: if subscription.causes == CauseSet::EVERY {
            Vec::new()
        } else {
            convert::wire_causes(subscription.causes)
        },
        wants_end: subscription.wants_end,
        request: subscription.request.get(),
    });
    wire::Session {
        session: Some(record::wire_session(&session.session)),
        lease_expires_ns: session.lease_expires.as_nanos(),
        acked_through: session.acked_through.map_or(0, NoticeNumber::get),
        window: session.window,
        change_pte: session.change_pte,
        subscriptions: subscriptions.collect(),
    }
}

fn wire_space(space: &DrainedSpace) -> wire::Space {
    let bracket = |bracket: &DrainedBracket| wire::Bracket {
        seq: bracket.seq.get(),
        range: Some(convert::wire_range(bracket.range)),
        cause: convert::wire_cause(bracket.cause).into(),
        owner: bracket.owner.map_or(0, OwnerTag::get),
        request_id: bracket.start.as_ref().map_or_else(String::new, |(id, _)| id.to_string()),
        non_blockable: bracket.start.as_ref().is_some_and(|(_, may_wait)| *may_wait == MayWait::No),
    };
    wire::Space {
        id: space.id.get(),
        name: space.name.clone(),
        last_seq: space.last_seq.map_or(0, Seq::get),
        began_after: space.began_after.map_or(0, Seq::get),
        open_brackets: space.open_brackets.iter().map(bracket).collect(),
        strict: space.strictness == Strictness::Strict,
        over: space.over.iter().filter_map(calls::wire_call).collect(),
    }
}

impl TryFrom<wire::Drained> for Drained {
    type Error = Nonsense;

    fn try_from(drained: wire::Drained) -> Result<Self, Nonsense> {
        Ok(Self {
            boot_id: drained.boot_id,
            sessions: drained.sessions.into_iter().map(session).collect::<Result<_, _>>()?,
            spaces: drained.spaces.into_iter().map(space).collect::<Result<_, _>>()?,
            released: drained.released.iter().map(released).collect::<Result<_, _>>()?,
            registered: drained.registered.into_iter().map(registered).collect::<Result<_, _>>()?,
        })
    }
}

fn released(released: &wire::Released) -> Result<Released, Nonsense> {
    Ok(Released {
        address_space: AddressSpaceId::new(released.address_space).ok_or(Nonsense)?,
        call: convert::call_id(&released.request_id).map_err(|_| Nonsense)?.ok_or(Nonsense)?,
        seq: Seq::new(released.seq),
    })
}

fn session(session: wire::Session) -> Result<DrainedSession, Nonsense> {
    Ok(DrainedSession {
        session: record::session(&session.session.ok_or(Nonsense)?)?,
        lease_expires: Moment::ZERO + Duration::from_nanos(session.lease_expires_ns),
        acked_through: NoticeNumber::new(session.acked_through),
        window: session.window,
        change_pte: session.change_pte,
        subscriptions: session.subscriptions.into_iter().map(subscription).collect::<Result<_, _>>()?,
    })
}

fn subscription(subscription: wire::Subscription) -> Result<DrainedSubscription, Nonsense> {
    let ranges = subscription.ranges.into_iter().map(|range| convert::range(range).map_err(|_| Nonsense));
    let causes = subscription.causes.into_iter().map(|cause| convert::cause(cause).map_err(|_| Nonsense));
    let causes: Vec<_> = causes.collect::<Result<_, _>>()?;
    Ok(DrainedSubscription {
        id: SubscriptionId::new(subscription.id).ok_or(Nonsense)?,
        address_space: AddressSpaceId::new(subscription.address_space).ok_or(Nonsense)?,
        ranges: ranges.collect::<Result<_, _>>()?,
        causes: if causes.is_empty() { CauseSet::EVERY } else { CauseSet::of(causes) },
        wants_end: subscription.wants_end,
        // 0: of a version that did not write it. No device numbers its requests as far as that.
        request: RequestId::new(subscription.request).unwrap_or(RequestId::MAX),
    })
}

fn space(space: wire::Space) -> Result<DrainedSpace, Nonsense> {
    let bracket = |bracket: wire::Bracket| {
        let range = bracket.range.ok_or(Nonsense)?;
        let range = convert::range(range).map_err(|_| Nonsense)?;
        let seq = Seq::new(bracket.seq).ok_or(Nonsense)?;
        let cause = convert::cause(bracket.cause).map_err(|_| Nonsense)?;
        let may_wait = if bracket.non_blockable { MayWait::No } else { MayWait::Yes };
        let start = convert::call_id(&bracket.request_id).map_err(|_| Nonsense)?.map(|id| (id, may_wait));
        Ok(DrainedBracket { seq, range, cause, owner: OwnerTag::new(bracket.owner), start })
    };
    let id = AddressSpaceId::new(space.id).ok_or(Nonsense)?;
    let strictness = if space.strict { Strictness::Strict } else { Strictness::Lenient };
    Ok(DrainedSpace {
        id,
        name: space.name,
        last_seq: Seq::new(space.last_seq),
        began_after: Seq::new(space.began_after),
        open_brackets: space.open_brackets.into_iter().map(bracket).collect::<Result<_, _>>()?,
        strictness,
        over: space.over.into_iter().map(|over| calls::call(over, id)).collect::<Result<_, _>>()?,
    })
}
