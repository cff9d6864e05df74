//! Calls that are over, as they are handed over: who tries one again is told the outcome that it had.

use shootdown_core::{AddressSpaceId, Method, OwnerTag, Seq};
use shootdown_proto::convert;
use shootdown_proto::message::CallId;

use super::record::Nonsense;
use crate::source::NotifyError;
use crate::source::rpc::retries::{Asked, MayWait, Over};

pub(super) mod wire {
    use shootdown_proto::v1::{AddressRange, Translation};

    #[derive(Clone, PartialEq, prost::Message)]
    pub(in crate::journal) struct Call {
        #[prost(string, tag = "1")]
        pub(in crate::journal) request_id: String,
        /// None: `invalidate_range_end`.
        #[prost(oneof = "Asked", tags = "2, 3, 4, 5, 6")]
        pub(in crate::journal) asked: Option<Asked>,
        #[prost(oneof = "Became", tags = "7, 8, 9, 10")]
        pub(in crate::journal) became: Option<Became>,
    }

    #[derive(Clone, PartialEq, prost::Oneof)]
    pub(in crate::journal) enum Asked {
        #[prost(message, tag = "2")]
        Start(Start),
        #[prost(message, tag = "3")]
        Page(Page),
        #[prost(message, tag = "4")]
        ChangePte(Translation),
        #[prost(message, tag = "5")]
        ClearFlushYoung(AddressRange),
        #[prost(message, tag = "6")]
        ClearYoung(AddressRange),
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(in crate::journal) struct Start {
        #[prost(message, optional, tag = "1")]
        pub(in crate::journal) range: Option<AddressRange>,
        #[prost(int32, tag = "2")]
        pub(in crate::journal) cause: i32,
        /// 0: none.
        #[prost(uint64, tag = "3")]
        pub(in crate::journal) owner: u64,
        #[prost(bool, tag = "4")]
        pub(in crate::journal) non_blockable: bool,
    }

    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub(in crate::journal) struct Page {
        #[prost(uint64, tag = "1")]
        pub(in crate::journal) address: u64,
        #[prost(int32, tag = "2")]
        pub(in crate::journal) cause: i32,
        /// 0: none.
        #[prost(uint64, tag = "3")]
        pub(in crate::journal) owner: u64,
    }

    #[derive(Clone, Copy, PartialEq, prost::Oneof)]
    pub(in crate::journal) enum Became {
        /// Of its round, or of the bracket that it ended.
        #[prost(uint64, tag = "7")]
        Seq(u64),
        #[prost(message, tag = "8")]
        WouldBlock(WouldBlock),
        /// How many there may be.
        #[prost(uint64, tag = "9")]
        RoundQuota(u64),
        #[prost(message, tag = "10")]
        QuarantineFull(QuarantineFull),
    }

    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub(in crate::journal) struct WouldBlock {}

    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub(in crate::journal) struct QuarantineFull {
        #[prost(uint64, tag = "1")]
        pub(in crate::journal) bytes: u64,
        #[prost(uint64, tag = "2")]
        pub(in crate::journal) pages: u64,
        #[prost(uint64, tag = "3")]
        pub(in crate::journal) most_bytes: u64,
        #[prost(uint64, tag = "4")]
        pub(in crate::journal) most_pages: u64,
    }
}

/// `None` where it was refused for a reason that is not remembered.
pub(super) fn wire_call((id, over): &(CallId, Over)) -> Option<wire::Call> {
    let (asked, became) = match over {
        Over::Ended(seq) => (None, wire::Became::Seq(seq.get())),
        Over::Settled(asked, seq) => (Some(wire_asked(asked)?), wire::Became::Seq(seq.get())),
        Over::WouldBlock(asked) => (Some(wire_asked(asked)?), wire::Became::WouldBlock(wire::WouldBlock {})),
        Over::Refused(asked, refused) => (Some(wire_asked(asked)?), wire_refused(refused)?),
    };
    Some(wire::Call { request_id: id.to_string(), asked, became: Some(became) })
}

/// `None` where it is no method that is called by an id.
fn wire_asked(asked: &Asked) -> Option<wire::Asked> {
    Some(match *asked {
        Asked::Start { range, cause, owner, may_wait } => wire::Asked::Start(wire::Start {
            range: Some(convert::wire_range(range)),
            cause: convert::wire_cause(cause).into(),
            owner: owner.map_or(0, OwnerTag::get),
            non_blockable: may_wait == MayWait::No,
        }),
        Asked::Page { address, cause, owner } => wire::Asked::Page(wire::Page {
            address,
            cause: convert::wire_cause(cause).into(),
            owner: owner.map_or(0, OwnerTag::get),
        }),
        Asked::Around { method, range } => match method {
            Method::ChangePte(translation) => wire::Asked::ChangePte(convert::wire_translation(translation)),
            Method::ClearFlushYoung => wire::Asked::ClearFlushYoung(convert::wire_range(range)),
            Method::ClearYoung => wire::Asked::ClearYoung(convert::wire_range(range)),
            Method::Invalidate | Method::RangeEnd | Method::Release => return None,
        },
    })
}

fn wire_refused(refused: &NotifyError) -> Option<wire::Became> {
    let most = |number: u128| u64::try_from(number).unwrap_or(u64::MAX);
    match *refused {
        NotifyError::TooManyRounds { most, .. } => {
            Some(wire::Became::RoundQuota(u64::try_from(most).unwrap_or(u64::MAX)))
        }
        NotifyError::QuarantineFull { bytes, pages, most_bytes, most_pages } => {
            let (bytes, pages) = (most(bytes), most(pages));
            Some(wire::Became::QuarantineFull(wire::QuarantineFull { bytes, pages, most_bytes, most_pages }))
        }
        _ => None,
    }
}

/// A call of this address space.
pub(super) fn call(call: wire::Call, address_space: AddressSpaceId) -> Result<(CallId, Over), Nonsense> {
    let id = convert::call_id(&call.request_id).map_err(|_| Nonsense)?.ok_or(Nonsense)?;
    let asked = call.asked.map(asked).transpose()?;
    let over = match (asked, call.became.ok_or(Nonsense)?) {
        (None, wire::Became::Seq(seq)) => Over::Ended(Seq::new(seq).ok_or(Nonsense)?),
        (None, _) => return Err(Nonsense),
        (Some(asked), wire::Became::Seq(seq)) => Over::Settled(asked, Seq::new(seq).ok_or(Nonsense)?),
        (Some(asked), wire::Became::WouldBlock(_)) => Over::WouldBlock(asked),
        (Some(asked), wire::Became::RoundQuota(most)) => {
            let most = usize::try_from(most).map_err(|_| Nonsense)?;
            Over::Refused(asked, NotifyError::TooManyRounds { address_space, most })
        }
        (Some(asked), wire::Became::QuarantineFull(full)) => {
            let wire::QuarantineFull { bytes, pages, most_bytes, most_pages } = full;
            let (bytes, pages) = (bytes.into(), pages.into());
            Over::Refused(asked, NotifyError::QuarantineFull { bytes, pages, most_bytes, most_pages })
        }
    };
    Ok((id, over))
}

fn asked(asked: wire::Asked) -> Result<Asked, Nonsense> {
    let range = |range| convert::range(range).map_err(|_| Nonsense);
    let cause = |cause| convert::cause(cause).map_err(|_| Nonsense);
    Ok(match asked {
        wire::Asked::Start(start) => Asked::Start {
            range: range(start.range.ok_or(Nonsense)?)?,
            cause: cause(start.cause)?,
            owner: OwnerTag::new(start.owner),
            may_wait: if start.non_blockable { MayWait::No } else { MayWait::Yes },
        },
        wire::Asked::Page(page) => {
            Asked::Page { address: page.address, cause: cause(page.cause)?, owner: OwnerTag::new(page.owner) }
        }
        wire::Asked::ChangePte(translation) => {
            let translation = convert::translation(translation).map_err(|_| Nonsense)?;
            Asked::Around { method: Method::ChangePte(translation), range: translation.range }
        }
        wire::Asked::ClearFlushYoung(wire) => {
            Asked::Around { method: Method::ClearFlushYoung, range: range(wire)? }
        }
        wire::Asked::ClearYoung(wire) => Asked::Around { method: Method::ClearYoung, range: range(wire)? },
    })
}
