//! [3 of 9] Asking for translations, and what comes back.

use std::sync::Arc;

use bytes::Bytes;
use shootdown_core::mapping::CommitError;
use shootdown_core::{Access, AddrRange, AddressSpaceId, PageSize, Seq};
use shootdown_proto::error::Reason;
use shootdown_proto::message::{
    DeviceSays, Fault, Grant as WireGrant, MAX_FAULT_DATA_PAGES, MAX_FAULT_PAGES, SessionError,
};

use crate::mapping::Mapping;
use crate::session::Session;
use crate::session::end::NotLive;
use crate::session::requests::{FaultRefused, Reply};
use crate::ticket::{CommitTicket, NotOpened};

/// Asks for translations. A clone of what is in [`Device`](crate::Device), which does not keep the session
/// alive: for the hardware model inside a [`DeviceTlb`](crate::DeviceTlb), which the session itself owns.
#[derive(Debug, Clone)]
pub struct Faulter {
    session: Arc<Session>,
}

/// What a fault brought: leave to install, not installed yet.
#[must_use]
#[derive(Debug)]
pub struct Grant {
    /// One for each page, in ascending order; together they cover the range.
    pub tickets: Vec<CommitTicket>,
    /// The newest event of the address space when the grant was given.
    pub seq: Option<Seq>,
}

/// A page with the bytes that it held when it was granted.
#[must_use]
#[derive(Debug)]
pub struct MappedPage {
    /// The translation.
    pub mapping: Mapping,
    /// The page's bytes: those of the grant, not those of now.
    pub data: Bytes,
}

/// Why a fault brought nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FaultError {
    /// More pages than one fault may ask for, or the whole address space.
    #[error("the range {range} is more than {most} pages; fault it in parts")]
    TooManyPages {
        /// What was asked for.
        range: AddrRange,
        /// The most that one fault may ask for.
        most: u64,
    },
    /// The host agent refused; [`SessionError::reason`] says whether asking again can help.
    #[error("the host agent refused the fault")]
    Refused(#[source] SessionError),
    /// No one subscription of this device covers the range: `subscribe` has not returned it yet, it is
    /// being ended, or its address space was released. The host agent was not asked, or its grant was
    /// not taken, because nobody would tell the device to give it up.
    #[error("no subscription of this device covers the range")]
    NotSubscribed,
    /// The connection was lost before the answer came. The session may go on: ask again.
    #[error("the connection was lost before the answer came; ask again")]
    Interrupted,
    /// The page changed each time, before its translation could be installed. Ask again later.
    #[error("a notice overtook the grant {attempts} times")]
    Contended {
        /// How often it was asked.
        attempts: u32,
    },
    /// The session is closed.
    #[error(transparent)]
    NotLive(#[from] NotLive),
}

/// Whether the bytes are wanted too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Data {
    No,
    Yes,
}

impl Faulter {
    pub(crate) fn new(session: Arc<Session>) -> Self {
        Self { session }
    }

    /// Waits for translations of a range and installs them. When an overlapping notice came between the
    /// grant and the installation it asks again, at most
    /// [`DeviceConfig::max_refaults`](crate::DeviceConfig::max_refaults) times; also when the connection was lost
    /// meanwhile and the session goes on.
    ///
    /// One subscription that [`Device::subscribe`](crate::Device::subscribe) has returned must cover the range.
    /// The host agent holds a fault while an invalidation overlaps, so this may wait as long as a round.
    ///
    /// # Errors
    /// [`FaultError`].
    ///
    /// # Cancel safety
    /// Dropped, it leaves nothing behind: a request that was sent is forgotten when its answer comes.
    pub async fn fault(
        &self,
        address_space: AddressSpaceId,
        range: AddrRange,
        access: Access,
    ) -> Result<Vec<Mapping>, FaultError> {
        self.until_committed(address_space, range, access, Data::No).await.map(|(mappings, _)| mappings)
    }

    /// As [`Faulter::fault`], with the pages' bytes as they were when granted; at most 64 pages.
    ///
    /// # Errors
    /// [`FaultError`].
    ///
    /// # Cancel safety
    /// As [`Faulter::fault`].
    pub async fn fault_with_data(
        &self,
        address_space: AddressSpaceId,
        range: AddrRange,
        access: Access,
    ) -> Result<Vec<MappedPage>, FaultError> {
        let (mappings, mut data) = self.until_committed(address_space, range, access, Data::Yes).await?;
        let page = |mapping: Mapping| {
            // Their sum was compared with what came.
            let length = mapping.range().length().map_or(0, |length| length as usize);
            MappedPage { data: data.split_to(length.min(data.len())), mapping }
        };
        Ok(mappings.into_iter().map(page).collect())
    }

    /// Waits for a grant and leaves it to the device to install it: for devices that work out of order, or
    /// keep translations in a TLB of their own. See [`CommitTicket`].
    ///
    /// # Errors
    /// [`FaultError`], never [`FaultError::Contended`].
    ///
    /// # Cancel safety
    /// As [`Faulter::fault`].
    pub async fn fault_ticketed(
        &self,
        address_space: AddressSpaceId,
        range: AddrRange,
        access: Access,
    ) -> Result<Grant, FaultError> {
        let Granted { tickets, seq, .. } = self.ask(address_space, range, access, Data::No).await?;
        Ok(Grant { tickets, seq })
    }

    async fn until_committed(
        &self,
        address_space: AddressSpaceId,
        range: AddrRange,
        access: Access,
        data: Data,
    ) -> Result<(Vec<Mapping>, Bytes), FaultError> {
        let attempts = self.session.config.max_refaults.saturating_add(1);
        for _ in 0..attempts {
            let granted = match self.ask(address_space, range, access, data).await {
                Err(FaultError::Refused(error)) if error.reason == Reason::FaultContended => continue,
                Err(FaultError::Interrupted) => continue,
                granted => granted?,
            };
            match granted.tickets.into_iter().map(CommitTicket::commit).collect() {
                Ok(mappings) => return Ok((mappings, granted.data)),
                // Those that were installed are dropped, and asked for again with the rest.
                Err(CommitError::Spoiled) => {}
                Err(CommitError::Closed) => return Err(self.session.not_live().into()),
            }
        }
        Err(FaultError::Contended { attempts })
    }

    async fn ask(
        &self,
        address_space: AddressSpaceId,
        range: AddrRange,
        access: Access,
        data: Data,
    ) -> Result<Granted, FaultError> {
        let most = if data == Data::Yes { MAX_FAULT_DATA_PAGES } else { MAX_FAULT_PAGES };
        if range.is_all() || (range.last() - range.start()) / PageSize::BASE.bytes() >= most {
            return Err(FaultError::TooManyPages { range, most });
        }
        let session = &self.session;
        session.live()?;
        if !session.holdings.lock().is_covered(address_space, range) {
            return Err(FaultError::NotSubscribed);
        }
        let permit = Arc::clone(&session.requests.fault_permits).acquire_owned().await;
        let permit = permit.map_err(|_| session.not_live())?;
        let asked = session.ask(permit, |request, to| {
            let fault = Fault { request, address_space, range, access, wants_data: data == Data::Yes };
            (DeviceSays::Fault(fault), Reply::Fault { fault, to })
        })?;
        match asked.answer().await? {
            Ok(granted) => Ok(granted),
            Err(FaultRefused::Host(error)) => Err(FaultError::Refused(error)),
            Err(FaultRefused::NotSubscribed) => Err(FaultError::NotSubscribed),
            Err(FaultRefused::Interrupted) => Err(FaultError::Interrupted),
        }
    }
}

/// A grant whose tickets are open.
#[derive(Debug)]
pub(crate) struct Granted {
    tickets: Vec<CommitTicket>,
    data: Bytes,
    seq: Option<Seq>,
}

impl Granted {
    pub(crate) fn open(session: &Arc<Session>, fault: &Fault, grant: WireGrant) -> Result<Self, NotOpened> {
        let WireGrant { translations, data, seq, .. } = grant;
        let tickets = CommitTicket::open(session, (fault.address_space, fault.range), &translations)?;
        Ok(Self { tickets, data, seq })
    }
}

/// Whether a grant is for what was asked; else what does not fit.
pub(crate) fn check(fault: &Fault, grant: &WireGrant) -> Result<(), &'static str> {
    if grant.address_space != fault.address_space {
        return Err("another address space");
    }
    let (Some(first), Some(last)) = (grant.translations.first(), grant.translations.last()) else {
        return Err("no translation");
    };
    let follows = |pair: &[shootdown_core::Translation]| {
        pair[0].range.last().checked_add(1) == Some(pair[1].range.start())
    };
    if !grant.translations.windows(2).all(follows) {
        return Err("pages that do not follow each other");
    }
    if !first.range.hull(last.range).contains(fault.range) {
        return Err("not all of the range");
    }
    if grant.translations.iter().any(|translation| translation.access < fault.access) {
        return Err("less access");
    }
    let bytes: u64 = if fault.wants_data {
        grant.translations.iter().filter_map(|translation| translation.range.length()).sum()
    } else {
        0
    };
    if bytes != grant.data.len() as u64 {
        return Err("another number of bytes");
    }
    Ok(())
}
