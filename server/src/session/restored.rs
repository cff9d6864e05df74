//! A session that an earlier run of the host agent opened.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::RwLock;
use shootdown_core::interest::Subscription;
use shootdown_core::session::{Enforcement, Session, SessionConfig};
use shootdown_core::{AddrRange, CauseSet, Moment, NoticeNumber, SubscriptionId};
use shootdown_proto::message::{HostSays, RequestId};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::handshake::Earlier;
use super::silence::Silence;
use super::{Asked, Held, Line, LineId, SessionHandle, State};
use crate::clock::Clock;
use crate::directory::AddressSpace;
use crate::fence::FencerRule;
use crate::journal::{DrainedSession, DrainedSubscription, SessionRecord};
use crate::shard::Shard;

/// What is known of such a session beside its record.
pub(crate) struct Restored {
    pub(crate) record: SessionRecord,
    pub(crate) config: SessionConfig,
    pub(crate) change_pte: bool,
    pub(crate) fencer: Option<FencerRule>,
    pub(crate) lease_expires: Moment,
    pub(crate) acked_through: Option<NoticeNumber>,
}

impl SessionHandle {
    /// The session, without a stream. Its rounds run on `shard`.
    pub(crate) fn restored(restored: Restored, shard: Shard, clock: Clock) -> Self {
        let Restored { record, config, change_pte, fencer, lease_expires, acked_through } = restored;
        let mut line = Line::new(LineId::FIRST);
        line.closed = true;
        line.ends.severed.cancel();
        let session =
            Session::restored(record.id, record.device.clone(), config, lease_expires, acked_through);
        Self {
            id: record.id,
            device: record.device.clone(),
            incarnation: record.incarnation,
            epoch: record.epoch,
            change_pte,
            enforcement: config.enforcement,
            fencer,
            ask_fencer: Notify::new(),
            shard,
            state: State {
                session,
                line,
                attempt: 0,
                subscriptions: HashMap::new(),
                leaving: HashMap::new(),
                covered: HashMap::new(),
                ever_subscribed: true,
                // What it had said by then nobody knows any more. A fault says it, however it came to its session.
                earlier: Earlier::UntilFault,
                silence: Silence::since(lease_expires),
            }
            .into(),
            accesses: RwLock::new(()),
            room: Notify::new(),
            listen: Notify::new(),
            over: CancellationToken::new(),
            clock,
        }
    }

    /// Subscribes to everything of an address space that nobody else knows of yet.
    pub(crate) fn join(self: &Arc<Self>, space: &Arc<AddressSpace>, id: SubscriptionId) {
        self.join_with(
            space,
            Subscription {
                id,
                session: self.id,
                ranges: vec![AddrRange::ALL],
                causes: CauseSet::EVERY,
                wants_end: false,
                handle: Arc::clone(self),
            },
            // Nobody asked for it. No device numbers its requests as far as that.
            RequestId::MAX,
        );
    }

    /// Whether everything that it was told is acked, or nobody will tell it anything any more.
    pub(crate) fn is_quiet(&self) -> bool {
        let state = self.state.lock();
        let outbox = state.session.outbox();
        state.session.phase().is_over() || (outbox.pending() == 0 && outbox.unacked() == 0)
    }

    /// Ends the stream without a word: the device finds out, and connects again.
    pub(crate) fn cut(&self) {
        self.sever(None);
    }

    /// Where it stopped, if it can go on from there.
    pub(crate) fn drained(&self) -> Option<DrainedSession> {
        let state = self.state.lock();
        let session = &state.session;
        let outbox = session.outbox();
        // What is pending now are hints without a round, which nobody misses: with a round its address space is
        // left out, and the session with it.
        if !session.is_resumable() || outbox.unacked() > 0 {
            return None;
        }
        let subscription = |(id, held): (&SubscriptionId, &Held)| {
            let wants_end = held.space.subscribers.read().subscription(*id)?.wants_end;
            let (address_space, ranges, causes) = (held.space.id, held.ranges.clone(), held.causes);
            let request = held.asked.request;
            Some(DrainedSubscription { id: *id, address_space, ranges, causes, wants_end, request })
        };
        let config = session.config();
        Some(DrainedSession {
            session: SessionRecord {
                id: self.id,
                device: self.device.clone(),
                incarnation: self.incarnation,
                epoch: self.epoch,
                terms: config.lease,
                enforces_lease: self.enforcement == Enforcement::ByDevice,
                unrenewed_since: None,
            },
            lease_expires: session.lease_expires(),
            acked_through: outbox.last_sent(),
            window: config.outbox.window,
            change_pte: self.change_pte,
            subscriptions: state.subscriptions.iter().filter_map(subscription).collect(),
        })
    }

    pub(crate) fn join_with(
        &self,
        space: &Arc<AddressSpace>,
        subscription: Subscription<Arc<Self>>,
        request: RequestId,
    ) {
        let id = subscription.id;
        {
            let mut state = self.state.lock();
            let counted = state.session.try_subscribe(subscription.ranges.len());
            counted.expect("a restored session has room for what it is given");
            let ranges = subscription.ranges.clone();
            // Its answer went with the run before: whether it arrived, the device knows.
            let asked = Asked { request, on: state.line.id };
            let (space, causes) = (Arc::clone(space), subscription.causes);
            let held = Held { space, ranges, causes, asked, answer: None };
            state.hold(id, held);
        }
        let published = space.subscribe(subscription);
        let seq = published.expect("an address space that nobody knows of is not released");
        if let Some(held) = self.state.lock().subscriptions.get_mut(&id) {
            held.answer = Some(HostSays::Subscribed { request, subscription: id, seq });
        }
    }
}
