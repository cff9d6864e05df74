//! The bytes of the source's frames, as the host agent's `PageService` serves them. Each frame says in its first
//! bytes how often it was freed, so that whoever reads it knows whether it is still the one that was granted.

use std::sync::Arc;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use shootdown_client::{FrameSpan, PageClient, PageError};
use shootdown_core::FrameNumber;
use shootdown_server::source::memory::FrameStore;

use crate::faults::{Fault, Planned};
use crate::memory::FRAMES;
use crate::plan::{Plan, Reach, Table, millis};
use crate::tlb::SimTlb;
use crate::trace::{Frame, What};

/// Keeps what is drawn here apart from what is drawn elsewhere of the same seed.
const OF_ITS_OWN: u64 = 0xB17E_5000_0000_0001;

/// Bytes of a frame that say how often it was freed.
const COUNT: u32 = u64::BITS / 8;

/// Devices that reach the memory through the host agent, in half of the worlds. Nothing that was drawn before it
/// changes.
pub fn vary(plan: &mut Plan) {
    let mut rng = StdRng::seed_from_u64(plan.seed ^ OF_ITS_OWN);
    let has_any = rng.random_bool(0.5);
    for device in &mut plan.devices {
        if has_any && device.table == Table::Sdk && rng.random_bool(0.6) {
            device.reach = Reach::PageService;
            // What it asked in time arrives when its session is over, and the frame is another's.
            let lasts = plan.terms.duration * rng.random_range(11..18) / 10;
            let at = millis(rng.random_range(100..400));
            plan.faults.push(Planned { at, lasts, fault: Fault::Hold(device.index) });
        }
    }
    plan.faults.sort_by_key(|planned| planned.at);
}

/// Frames that were never freed.
pub fn fresh() -> Arc<FrameStore> {
    FrameStore::new(FRAMES).expect("there is memory for a few frames")
}

/// The frame is not what it was.
pub fn on_freed(store: &FrameStore, index: u64, times_freed: u64) {
    store.write(FrameNumber(index), 0, &times_freed.to_le_bytes()).expect("the frame is one of the store's");
}

/// Reads a frame through the host agent, and writes down what came until the device has no more patience.
pub async fn read(tlb: &SimTlb, pages: &PageClient, frame: Frame, patience: Duration) {
    let span = FrameSpan { frame: FrameNumber(frame.index), offset: 0, length: COUNT };
    let Ok(read) = tokio::time::timeout(patience, pages.read(&[span])).await else { return };
    match read {
        Ok(bytes) => {
            let times_freed = u64::from_le_bytes(bytes[..].try_into().expect("as many as were asked for"));
            tlb.tell(|life| What::Read { life, frame, times_freed });
        }
        Err(PageError::Refused { reason, .. }) => {
            tlb.tell(|life| What::ReadRefused { life, frame, reason: reason.word().to_owned() });
        }
        // Nobody knows whether it was read.
        Err(_) => {}
    }
}
