//! [5 of 9] Leave to install a translation, unless an overlapping notice overtakes it.

use std::fmt;
use std::sync::Arc;

use shootdown_core::mapping::{self, CommitError};
use shootdown_core::{Access, AddrRange, AddressSpaceId, FrameNumber, Translation};

use crate::mapping::Mapping;
use crate::session::Session;

/// Leave to install one translation, opened where the grant stood in the stream. An overlapping notice
/// that comes after the grant spoils it, and the commit is refused (NoGrantInWindow).
///
/// A device that fills its TLB on a thread of its own commits under the lock that its TLB is filled and
/// flushed under; the SDK spoils before it calls [`DeviceTlb`](crate::DeviceTlb), so the flush either
/// finds the translation there, or it never gets there. Follows `mmu_interval_read_retry`.
///
/// Dropped, it is given back.
pub struct CommitTicket {
    session: Arc<Session>,
    address_space: AddressSpaceId,
    translation: Translation,
    ticket: Option<mapping::CommitTicket>,
}

/// Why no ticket was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NotOpened {
    /// No subscription that the device has covers the range.
    NotSubscribed,
    /// The session is closed.
    Closed,
}

impl CommitTicket {
    /// One for each translation of a range that a subscription covers. Looked up and opened under one
    /// lock: the flush of an unsubscription comes either before, and nothing is opened, or after, and
    /// spoils what was.
    pub(crate) fn open(
        session: &Arc<Session>,
        (address_space, range): (AddressSpaceId, AddrRange),
        translations: &[Translation],
    ) -> Result<Vec<Self>, NotOpened> {
        let tickets = {
            let mut holdings = session.holdings.lock();
            if !holdings.is_covered(address_space, range) {
                return Err(NotOpened::NotSubscribed);
            }
            let open = |translation: &Translation| holdings.mappings.on_grant(address_space, *translation);
            translations.iter().map(open).collect::<Result<Vec<_>, _>>().map_err(|_| NotOpened::Closed)?
        };
        let ours = |(translation, ticket): (&Translation, _)| Self {
            session: Arc::clone(session),
            address_space,
            translation: *translation,
            ticket: Some(ticket),
        };
        Ok(translations.iter().zip(tickets).map(ours).collect())
    }

    /// Whose memory.
    #[must_use]
    pub fn address_space(&self) -> AddressSpaceId {
        self.address_space
    }

    /// The page.
    #[must_use]
    pub fn range(&self) -> AddrRange {
        self.translation.range
    }

    /// What may be done there.
    #[must_use]
    pub fn access(&self) -> Access {
        self.translation.access
    }

    /// The frame, for a device that prepares its entry before it commits. It must not be used before.
    #[must_use]
    pub fn frame(&self) -> FrameNumber {
        self.translation.frame
    }

    /// Installs the translation in the SDK's table: uses go through [`Mapping::begin_use`].
    ///
    /// # Errors
    /// [`CommitError::Spoiled`]: fault again. [`CommitError::Closed`]: the session is closed.
    pub fn commit(mut self) -> Result<Mapping, CommitError> {
        let ticket = self.ticket.take().ok_or(CommitError::Spoiled)?;
        let id = self.session.holdings.lock().mappings.commit(ticket)?;
        Ok(Mapping::new(Arc::clone(&self.session), id, self.address_space, self.translation))
    }

    /// Lets the device keep the translation in a TLB of its own, which its
    /// [`DeviceTlb`](crate::DeviceTlb) flushes. The SDK forgets it: the device asks
    /// [`Gate::check`](crate::Gate::check) before each access, and tells by itself what it used and wrote.
    ///
    /// # Errors
    /// As [`CommitTicket::commit`].
    pub fn commit_raw(mut self) -> Result<Translation, CommitError> {
        let ticket = self.ticket.take().ok_or(CommitError::Spoiled)?;
        let mut holdings = self.session.holdings.lock();
        let id = holdings.mappings.commit(ticket)?;
        holdings.mappings.remove(id);
        holdings.raw_commit();
        Ok(self.translation)
    }
}

impl Drop for CommitTicket {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            self.session.holdings.lock().mappings.cancel(ticket);
        }
    }
}

impl fmt::Debug for CommitTicket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CommitTicket")
            .field("address_space", &self.address_space)
            .field("translation", &self.translation)
            .finish_non_exhaustive()
    }
}
