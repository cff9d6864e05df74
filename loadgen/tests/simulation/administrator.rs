//! The administrator, beside the host agent: cuts devices off that nobody else can stop, and says so.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use rand::RngExt as _;
use shootdown_proto::v1;
use shootdown_proto::v1::admin_service_client::AdminServiceClient;

use crate::agent;
use crate::clock::virtual_now;
use crate::device;
use crate::fabric::DeviceRun;
use crate::plan::millis;
use crate::shared::{Shared, Stage};
use crate::trace::CutOffBy;

/// How often it looks at the listing.
const LOOK: Duration = millis(15);

/// What it takes to cut a device off by hand.
const BY_HAND: Duration = millis(2);

/// How long after the faults it may take until a device that nobody else can stop is cut off.
pub const PATIENCE: Duration = millis(200);

/// Looks for as long as the host agent runs. The run's number keeps what it draws apart from other runs'.
pub async fn run(shared: Arc<Shared>, run: u64) -> turmoil::Result {
    let mut rng = shared.rng(5000 + (run << 32));
    let mut admin = AdminServiceClient::new(agent::administer(&shared).await?);
    // When it has lost its patience with a session.
    let mut stuck = BTreeMap::<u64, Duration>::new();
    loop {
        tokio::time::sleep(LOOK).await;
        let listed = admin.list_sessions(v1::ListSessionsRequest::default()).await?.into_inner();
        for session in listed.sessions.iter().filter(|session| is_stuck(session)) {
            let device = device::index(&session.device_id);
            if shared.plan.cut_off_by(device) != Some(CutOffBy::Administrator) {
                continue;
            }
            let until = *stuck
                .entry(session.session_id)
                .or_insert_with(|| virtual_now() + millis(rng.random_range(20..600)));
            // When all else is well, nobody is waited for.
            if virtual_now() >= until || shared.stage.get() > Stage::Storm {
                let of = DeviceRun { device, start: session.device_incarnation };
                shared.fabric.cut_off(of, CutOffBy::Administrator, &shared.trace);
                tokio::time::sleep(BY_HAND).await;
                let word = v1::EvictSessionRequest { session_id: session.session_id, is_cut_off: true };
                // It may be over by now.
                drop(admin.evict_session(word).await);
            }
        }
    }
}

/// Its stream is gone, or it owes an ack, and its lease is over.
fn is_stuck(session: &v1::Session) -> bool {
    let is_silent = matches!(session.phase(), v1::SessionPhase::Suspect | v1::SessionPhase::Severed);
    is_silent && session.lease_remaining_ms == 0
}
