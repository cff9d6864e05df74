//! The way of an invalidation in one place: each method of [`Notifier`] reads from top to bottom as the stages do.

use std::sync::Arc;

use shootdown_core::{AddrRange, AddressSpaceId, Cause, Method, OwnerTag, PageSize, Seq, Translation};
use tokio::sync::mpsc;

use super::Host;
use crate::clock::Clock;
use crate::completion::{End, EndedBy, WaitingRound};
use crate::directory::AddressSpace;
use crate::dispatch::{Call, Dispatched};
use crate::source::rpc::retries::Try;
use crate::source::{Invalidation, Notifier, NotifyError, RoundResult, Strictness, Translate, Verdict, Wait};

impl Host {
    /// A whole method whose bracket is its own: opens, waits, and the round's task ends the bracket.
    async fn bracketed(
        &self,
        address_space: AddressSpaceId,
        method: Method,
        range: AddrRange,
        (cause, owner): (Cause, Option<OwnerTag>),
        wait: Wait,
        retry: Option<&Try<'_>>,
    ) -> Result<RoundResult, NotifyError> {
        let called = self.clock().now();
        let space = self.directory().expect(address_space)?;
        let call = Call { range, method, cause, owner, bracket: EndedBy::Task };
        match self.open(&space, call, wait, called, retry).await? {
            Dispatched::Open(round) => self.answer(&round, wait, called, None).await,
            Dispatched::WouldBlock(targets) => Ok(self.would_block(targets, called)),
        }
    }

    /// [`Notifier::invalidate_range_start`], which may be a retry.
    pub(crate) async fn start(
        &self,
        invalidation: Invalidation,
        retry: Option<&Try<'_>>,
    ) -> Result<RoundResult, NotifyError> {
        let called = self.clock().now();
        let Invalidation { address_space, range, cause, owner, wait, resident_pages } = invalidation;
        let space = self.directory().expect(address_space)?;
        let call = Call { range, method: Method::Invalidate, cause, owner, bracket: EndedBy::Caller };
        match self.open(&space, call, wait, called, retry).await? {
            Dispatched::WouldBlock(targets) => Ok(self.would_block(targets, called)),
            Dispatched::Open(round) => {
                // Who can try again comes back for the sequence; the bracket waits for it, as one of those
                // that may be open.
                let answered = retry.is_some();
                let mut caller = Unanswered { space: &space, round: &round, answered, clock: self.clock() };
                let result = self.answer(&round, wait, called, resident_pages).await;
                caller.answered = true;
                result
            }
        }
    }

    /// [`Notifier::change_pte`], which may be a retry.
    pub(crate) async fn change(
        &self,
        address_space: AddressSpaceId,
        translation: Translation,
        wait: Wait,
        retry: Option<&Try<'_>>,
    ) -> Result<RoundResult, NotifyError> {
        let method = Method::ChangePte(translation);
        self.bracketed(address_space, method, translation.range, (Cause::Clear, None), wait, retry).await
    }

    /// `invalidate_page`, on somebody's behalf.
    pub(crate) async fn invalidate_page_for(
        &self,
        address_space: AddressSpaceId,
        address: u64,
        cause: Cause,
        owner: Option<OwnerTag>,
        wait: Wait,
        retry: Option<&Try<'_>>,
    ) -> Result<RoundResult, NotifyError> {
        let page = AddrRange::page_of(address, PageSize::BASE);
        self.bracketed(address_space, Method::Invalidate, page, (cause, owner), wait, retry).await
    }

    /// A young query: the devices' bits, and what they reported before it.
    pub(crate) async fn young(
        &self,
        address_space: AddressSpaceId,
        method: Method,
        range: AddrRange,
        wait: Wait,
        retry: Option<&Try<'_>>,
    ) -> Result<RoundResult, NotifyError> {
        let space = self.directory().expect(address_space)?;
        let mut result =
            self.bracketed(address_space, method, range, (Cause::Clear, None), wait, retry).await?;
        if result.verdict != Verdict::WouldBlock {
            let take = || space.young.lock().clear(range);
            result.young |= retry.map_or_else(take, |retry| retry.young(take));
        }
        Ok(result)
    }
}

impl Notifier for Host {
    fn register(&self, name: &str, source: Arc<dyn Translate>) -> Result<AddressSpaceId, NotifyError> {
        self.register_address_space(name, source, Strictness::Strict)
    }

    async fn invalidate_range_start(&self, invalidation: Invalidation) -> Result<RoundResult, NotifyError> {
        self.start(invalidation, None).await
    }

    fn invalidate_range_end(&self, address_space: AddressSpaceId, seq: Seq) -> Result<(), NotifyError> {
        let space = self.directory().expect(address_space)?;
        let round = space.rounds.lock().get(&seq).cloned();
        match round.map(|round| round.on_end()) {
            Some(End::Now) => space.end_bracket(seq, self.clock()),
            Some(End::WhenComplete) => {}
            Some(End::NotTheCallers) | None => {
                return Err(NotifyError::BracketUnknown { address_space, seq });
            }
        }
        Ok(())
    }

    async fn invalidate_page(
        &self,
        address_space: AddressSpaceId,
        address: u64,
        cause: Cause,
        wait: Wait,
    ) -> Result<RoundResult, NotifyError> {
        self.invalidate_page_for(address_space, address, cause, None, wait, None).await
    }

    async fn change_pte(
        &self,
        address_space: AddressSpaceId,
        translation: Translation,
        wait: Wait,
    ) -> Result<RoundResult, NotifyError> {
        self.change(address_space, translation, wait, None).await
    }

    async fn clear_flush_young(
        &self,
        address_space: AddressSpaceId,
        range: AddrRange,
        wait: Wait,
    ) -> Result<RoundResult, NotifyError> {
        self.young(address_space, Method::ClearFlushYoung, range, wait, None).await
    }

    async fn clear_young(
        &self,
        address_space: AddressSpaceId,
        range: AddrRange,
        wait: Wait,
    ) -> Result<RoundResult, NotifyError> {
        self.young(address_space, Method::ClearYoung, range, wait, None).await
    }

    fn test_young(&self, address_space: AddressSpaceId, range: AddrRange) -> Result<bool, NotifyError> {
        let space = self.directory().expect(address_space)?;
        let young = space.young.lock().test(range);
        Ok(young)
    }

    async fn release(&self, address_space: AddressSpaceId) -> Result<RoundResult, NotifyError> {
        let space = self.directory().expect(address_space)?;
        let (tell, mut told) = mpsc::channel(2);
        drop(self.0.tasks.spawn_on(self.clone().release_to_its_end(space, tell), &self.0.control));
        // The task is not aborted and does not panic, so this fails only when the runtime is gone.
        told.recv().await.unwrap_or(Err(NotifyError::Stopping))
    }
}

/// A bracket whose caller has not been answered yet. If it never is, because its future was dropped,
/// nobody knows the sequence to end the bracket by, and the start counts as aborted (Pairing): the
/// bracket ends as soon as the round is complete, and never before.
struct Unanswered<'a> {
    space: &'a Arc<AddressSpace>,
    round: &'a Arc<WaitingRound>,
    answered: bool,
    clock: Clock,
}

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        if !self.answered && self.round.on_end() == End::Now {
            self.space.end_bracket(self.round.look(|round| round.event().seq), self.clock);
        }
    }
}
