//! `AdminService`: what there is, page by page, and the end of a session.

use shootdown_core::session::{Enforcement, Phase};
use shootdown_core::{AddressSpaceId, Seq};
use shootdown_proto::convert;
use shootdown_proto::error::Malformed;
use shootdown_proto::v1;
use shootdown_proto::v1::admin_service_server::AdminService;
use tonic::{Request, Response, Status};

use super::notifier::{nanos, wire_target};
use crate::completion::WaitingRound;
use crate::directory::AddressSpace;
use crate::host::Host;
use crate::listen::require_leave;
use crate::session::task::Evicted;
use crate::session::{SessionHandle, task};

/// The most entries of one page.
const MOST_ENTRIES: usize = 1000;

/// The administrator's service.
#[derive(Debug, Clone)]
pub(crate) struct Admin {
    pub(crate) host: Host,
}

#[tonic::async_trait]
impl AdminService for Admin {
    async fn list_address_spaces(
        &self,
        request: Request<v1::ListAddressSpacesRequest>,
    ) -> Result<Response<v1::ListAddressSpacesResponse>, Status> {
        require_leave(&request)?;
        let request = request.into_inner();
        let page = Page::parse(request.page_size, &request.page_token)?;
        let spaces = self.host.directory().list();
        let (spaces, next_page_token) = page.cut(spaces, |space| (space.id.get(), 0));
        let address_spaces = spaces.iter().map(|space| wire_space(space)).collect();
        Ok(Response::new(v1::ListAddressSpacesResponse { address_spaces, next_page_token }))
    }

    async fn list_sessions(
        &self,
        request: Request<v1::ListSessionsRequest>,
    ) -> Result<Response<v1::ListSessionsResponse>, Status> {
        require_leave(&request)?;
        let request = request.into_inner();
        let page = Page::parse(request.page_size, &request.page_token)?;
        let sessions = self.host.registry().list();
        let (sessions, next_page_token) = page.cut(sessions, |session| (session.id.get(), 0));
        let now = self.host.clock().now();
        let sessions = sessions.iter().map(|session| wire_session(session, now)).collect();
        Ok(Response::new(v1::ListSessionsResponse { sessions, next_page_token }))
    }

    async fn list_quarantine(
        &self,
        request: Request<v1::ListQuarantineRequest>,
    ) -> Result<Response<v1::ListQuarantineResponse>, Status> {
        require_leave(&request)?;
        let request = request.into_inner();
        let page = Page::parse(request.page_size, &request.page_token)?;
        let now = self.host.clock().now();
        let mut quarantined: Vec<v1::Quarantined> = Vec::new();
        for space in self.host.directory().list() {
            let rounds: Vec<_> = space.rounds.lock().values().cloned().collect();
            quarantined.extend(rounds.iter().filter_map(|round| wire_quarantined(round, now)));
        }
        let key = |entry: &v1::Quarantined| {
            entry.round.as_ref().map_or((0, 0), |round| (round.address_space_id, round.seq))
        };
        let (quarantined, next_page_token) = page.cut(quarantined, key);
        let (parked, budget) = (self.host.quarantine().parked(), self.host.quarantine().budget());
        Ok(Response::new(v1::ListQuarantineResponse {
            quarantined,
            next_page_token,
            bytes: saturated(parked.bytes),
            most_bytes: budget.bytes,
            pages: saturated(parked.pages),
            most_pages: budget.pages,
        }))
    }

    async fn list_subscriptions(
        &self,
        request: Request<v1::ListSubscriptionsRequest>,
    ) -> Result<Response<v1::ListSubscriptionsResponse>, Status> {
        require_leave(&request)?;
        let request = request.into_inner();
        let page = Page::parse(request.page_size, &request.page_token)?;
        let id = convert::address_space_id(request.address_space_id, "address_space_id")?;
        let space = self.host.directory().expect(id)?;
        let interest = space.subscribers.read();
        let all = interest.subscriptions().map(|subscription| v1::Subscription {
            subscription_id: subscription.id.get(),
            session_id: subscription.session.get(),
            ranges: subscription.ranges.iter().map(|range| convert::wire_range(*range)).collect(),
            causes: convert::wire_causes(subscription.causes),
            wants_end: subscription.wants_end,
        });
        let (subscriptions, next_page_token) =
            page.cut(all.collect(), |subscription| (subscription.subscription_id, 0));
        Ok(Response::new(v1::ListSubscriptionsResponse { subscriptions, next_page_token }))
    }

    async fn list_rounds(
        &self,
        request: Request<v1::ListRoundsRequest>,
    ) -> Result<Response<v1::ListRoundsResponse>, Status> {
        require_leave(&request)?;
        let request = request.into_inner();
        let page = Page::parse(request.page_size, &request.page_token)?;
        let spaces = match AddressSpaceId::new(request.address_space_id) {
            Some(id) => vec![self.host.directory().expect(id)?],
            None => self.host.directory().list(),
        };
        let now = self.host.clock().now();
        let mut rounds: Vec<v1::Round> = Vec::new();
        for space in spaces {
            let waiting: Vec<_> =
                space.rounds.lock().values().filter(|round| round.is_waiting()).cloned().collect();
            rounds.extend(waiting.iter().map(|round| round.look(|round| wire_round(round, now))));
        }
        let (rounds, next_page_token) = page.cut(rounds, |round| (round.address_space_id, round.seq));
        Ok(Response::new(v1::ListRoundsResponse { rounds, next_page_token }))
    }

    async fn evict_session(
        &self,
        request: Request<v1::EvictSessionRequest>,
    ) -> Result<Response<v1::EvictSessionResponse>, Status> {
        require_leave(&request)?;
        let v1::EvictSessionRequest { session_id: id, is_cut_off } = request.into_inner();
        let session = convert::session_id(id, "session_id")?;
        let device = if is_cut_off { Evicted::CutOff } else { Evicted::MayStillRun };
        task::evict(&self.host, session, device).map_err(|_| crate::status::session_unknown(id))?;
        tracing::warn!(session = id, is_cut_off, "an administrator ended a session");
        Ok(Response::new(v1::EvictSessionResponse {}))
    }
}

/// Where a listing goes on, and how far.
struct Page {
    after: (u64, u64),
    most: usize,
}

impl Page {
    /// A token is the key of the last entry of the page before: listings stay right when entries come
    /// and go between two pages.
    fn parse(size: u32, token: &str) -> Result<Self, Malformed> {
        let most = match size as usize {
            0 => MOST_ENTRIES,
            asked => asked.min(MOST_ENTRIES),
        };
        let bad = Malformed::Value {
            field: "page_token",
            value: token.len() as u64,
            expected: "a next_page_token, unchanged",
        };
        let after = match token.split_once('-') {
            None if token.is_empty() => (0, 0),
            None => return Err(bad),
            Some((major, minor)) => match (major.parse(), minor.parse()) {
                (Ok(major), Ok(minor)) => (major, minor),
                _ => return Err(bad),
            },
        };
        Ok(Self { after, most })
    }

    /// The page's part of a sorted listing, and the token of the next page.
    fn cut<T>(&self, mut all: Vec<T>, key: impl Fn(&T) -> (u64, u64)) -> (Vec<T>, String) {
        all.retain(|entry| key(entry) > self.after);
        let more = all.len() > self.most;
        all.truncate(self.most);
        let token = match all.last() {
            Some(last) if more => {
                let (major, minor) = key(last);
                format!("{major}-{minor}")
            }
            _ => String::new(),
        };
        (all, token)
    }
}

fn wire_space(space: &AddressSpace) -> v1::AddressSpace {
    let (seq, open_brackets) = {
        let order = space.order.lock();
        (order.gate.last_seq().map_or(0, Seq::get), order.gate.open_brackets())
    };
    v1::AddressSpace {
        address_space_id: space.id.get(),
        name: space.name.clone(),
        source: space.source.source().to_owned(),
        seq,
        subscriptions: space.subscribers.read().subscriptions().count() as u64,
        open_brackets: open_brackets as u64,
        rounds_in_flight: space.rounds_in_flight() as u64,
    }
}

fn wire_session(session: &SessionHandle, now: shootdown_core::Moment) -> v1::Session {
    let standing = session.standing();
    v1::Session {
        session_id: session.id.get(),
        device_id: session.device.as_str().to_owned(),
        device_incarnation: session.incarnation.get(),
        phase: match standing.phase {
            Phase::Live => v1::SessionPhase::Live,
            Phase::Suspect => v1::SessionPhase::Suspect,
            Phase::Severed => v1::SessionPhase::Severed,
            Phase::Fenced => v1::SessionPhase::Fenced,
            Phase::Gone => v1::SessionPhase::Gone,
        }
        .into(),
        lease_remaining_ms: u64::try_from(standing.lease_expires.since(now).as_millis()).unwrap_or(u64::MAX),
        subscriptions: standing.subscriptions as u64,
        notices_unacked: standing.unacked as u64,
        notices_pending: standing.pending as u64,
        acked_through: standing.acked_through,
        faults_in_flight: standing.faults_in_flight as u64,
        shard: u32::try_from(session.shard.index).unwrap_or(u32::MAX),
        enforces_lease: session.enforcement == Enforcement::ByDevice,
    }
}

fn wire_round(round: &shootdown_core::round::Round, now: shootdown_core::Moment) -> v1::Round {
    let event = round.event();
    v1::Round {
        address_space_id: event.address_space.get(),
        seq: event.seq.get(),
        range: Some(convert::wire_range(event.range)),
        cause: convert::wire_cause(event.cause).into(),
        age_ns: nanos(now.since(round.opened())),
        targets: round.reports().iter().map(wire_target).collect(),
    }
}

fn wire_quarantined(round: &WaitingRound, now: shootdown_core::Moment) -> Option<v1::Quarantined> {
    let charge = round.quarantined()?;
    Some(v1::Quarantined {
        round: Some(round.look(|round| wire_round(round, now))),
        bytes: saturated(charge.bytes),
        pages: saturated(charge.pages),
    })
}

fn saturated(count: u128) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_cover_a_listing_once_even_when_entries_go_between_them() {
        let all: Vec<u64> = (1..=25).collect();
        let first = Page::parse(10, "").unwrap();
        let (page, token) = first.cut(all.clone(), |id| (*id, 0));
        assert_eq!((page.len(), token.as_str()), (10, "10-0"));
        let without_ten: Vec<u64> = all.into_iter().filter(|id| *id != 10).collect();
        let (page, token) = Page::parse(10, &token).unwrap().cut(without_ten.clone(), |id| (*id, 0));
        assert_eq!((page[0], page.len()), (11, 10));
        let (page, token) = Page::parse(10, &token).unwrap().cut(without_ten, |id| (*id, 0));
        assert_eq!((page.len(), token.as_str()), (5, ""));
    }

    #[test]
    fn a_page_token_that_nobody_gave_out_is_refused() {
        assert!(Page::parse(10, "tomorrow").is_err());
        assert!(Page::parse(10, "1-x").is_err());
    }
}
