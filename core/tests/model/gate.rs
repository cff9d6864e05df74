//! Which page is granted, and when: `core/src/gate.rs`, `server/src/session/fault.rs`.

use crate::mutations::Mutation;
use crate::state::{Down, Page, Set, Subscription, Ticket, Translation, members};
use crate::world::World;

impl World<'_> {
    /// A fault opens its ticket, and the source says which frame the page has.
    pub(crate) fn on_fault(&mut self, device: usize, page: Page) -> Option<()> {
        let run = self.state.devices[device].runs.last()?;
        let (link, id) = (run.link.as_ref()?, run.session_id()?);
        let at = self.acts(link.process)?;
        let host = &self.state.hosts[at];
        let session = host.session(id)?;
        let of = self.config.translation(device, page);
        let asks = self.config.subscribes(device, page)
            && run.tlb[usize::from(page)].is_none()
            && !link
                .down
                .iter()
                .any(|message| matches!(message, Down::Grant(translation) if translation.has(page)))
            && !host.tickets.iter().any(|ticket| ticket.session == id && ticket.translation.has(page))
            && !(run.flushing.iter().any(|(_, pages)| pages >> page & 1 == 1));
        let held = self.bracket_over(at, of).is_some();
        let may = matches!(session.subscription, Subscription::Subscribed(_)) && session.phase.has_stream();
        if !asks
            || !may
            || held && !self.broken(Mutation::GrantInBracket)
            || host.in_grace()
            || self.state.source.registered != host.registration
        {
            return None;
        }
        let translation = Translation::new(of, &self.state.source.mapped);
        self.state.hosts[at].tickets.push(Ticket { session: id, translation, spoiled: false });
        Some(())
    }

    /// The ticket is committed and the grant put on the stream in one step.
    pub(crate) fn commit(&mut self, process: u8, index: usize) -> Option<()> {
        let at = self.acts(process)?;
        if index >= self.state.hosts[at].tickets.len() {
            return None;
        }
        let ticket = self.state.hosts[at].tickets.remove(index);
        let committed = !ticket.spoiled
            || self.broken(Mutation::GrantInBracket)
            || self.broken(Mutation::SpoiledTicketCommitted);
        if committed {
            let in_bracket = self.bracket_over(at, ticket.translation.of).is_some();
            let unaccounted = self.an_older_lease_may_be_used(self.state.hosts[at].registration);
            self.state.ghost.granted_in_window |= in_bracket || ticket.spoiled;
            self.state.ghost.acted_in_grace |= unaccounted;
            self.send_down(at, ticket.session, Down::Grant(ticket.translation));
        }
        Some(())
    }

    /// The event of a bracket over any of these pages.
    pub(crate) fn bracket_over(&self, at: usize, pages: Set) -> Option<u8> {
        let over = |called: u8| members(pages).any(|page| self.covers(called, page));
        self.state.hosts[at].brackets.iter().copied().find(|called| over(*called))
    }

    fn covers(&self, called: u8, page: Page) -> bool {
        // A bracket of an event that there is not lies over page 0.
        self.state.source.events.get(usize::from(called)).map_or(page == 0, |call| call.page == page)
    }

    /// The truth that RestartGrace is about: a device that may use what was granted by an earlier run, which this
    /// one does not go on for.
    pub(crate) fn an_older_lease_may_be_used(&self, registration: u8) -> bool {
        self.state.runs().any(|(device, _, run)| {
            run.session.as_ref().is_some_and(|joined| joined.registration < registration)
                && self.state.can_use(self.config, device, run)
        })
    }
}
