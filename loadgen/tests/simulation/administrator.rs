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

/// The device of a session whose record is torn.
const UNNAMED: &str = "unnamed:torn-journal";

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
            let Some(may_be) = may_be_of(&shared, session, &listed.sessions) else { continue };
            let until = *stuck
                .entry(session.session_id)
                .or_insert_with(|| virtual_now() + millis(rng.random_range(20..600)));
            // When all else is well, nobody is waited for.
            if virtual_now() >= until || shared.stage.get() > Stage::Storm {
                for run in may_be {
                    shared.fabric.cut_off(run, CutOffBy::Administrator, &shared.trace);
                }
                tokio::time::sleep(BY_HAND).await;
                let word = v1::EvictSessionRequest { session_id: session.session_id, is_cut_off: true };
                // It may be over by now.
                drop(admin.evict_session(word).await);
            }
        }
    }
}

/// What must be cut off before the session can be said to be over; `None`: that is somebody else's to say.
///
/// Whose session a torn record was nobody knows: it may be that of each device that enforces no lease and has not come
/// back since.
fn may_be_of(shared: &Shared, session: &v1::Session, listed: &[v1::Session]) -> Option<Vec<DeviceRun>> {
    if session.device_id != UNNAMED {
        let device = device::index(&session.device_id);
        let is_ours = shared.plan.cut_off_by(device) == Some(CutOffBy::Administrator);
        let run = DeviceRun { device, start: session.device_incarnation };
        return is_ours.then(|| vec![run]);
    }
    if session.enforces_lease {
        return None;
    }
    let unstoppable =
        shared.plan.devices.iter().filter(|device| shared.plan.cut_off_by(device.index).is_some());
    let runs =
        unstoppable.map(|device| DeviceRun { device: device.index, start: shared.starts_of(device.index) });
    let has_come_back = |run: &DeviceRun| {
        listed.iter().any(|other| {
            other.phase() == v1::SessionPhase::Live
                && other.device_id == device::name(run.device)
                && other.device_incarnation == run.start
        })
    };
    Some(runs.filter(|run| !has_come_back(run)).collect())
}

/// Its stream is gone, or it owes an ack, and its lease is over.
fn is_stuck(session: &v1::Session) -> bool {
    let is_silent = matches!(session.phase(), v1::SessionPhase::Suspect | v1::SessionPhase::Severed);
    is_silent && session.lease_remaining_ms == 0
}
