//! Moves: pages leave their frames, and the frames are given away.

use std::sync::Arc;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use shootdown_proto::error::Reason;
use shootdown_proto::v1;
use shootdown_proto::v1::RoundResult;

use super::memory::Held;
use super::{BACKOFF, Vmm, VmmError, reason};
use crate::chaos::content::address_of;

/// The most pages of a move.
const MOST_PAGES: usize = 4;

/// Between two moves of one mover.
const PAUSE: Duration = Duration::from_millis(2);

/// How long the host agent may take to close a bracket before it is asked again.
const PATIENCE: Duration = Duration::from_secs(2);

/// Moves pages until it is told to stop.
pub(crate) async fn run(vmm: Arc<Vmm>, mover: u64) -> Result<(), VmmError> {
    let mut random =
        SmallRng::seed_from_u64(vmm.shape.seed ^ (mover + 1).wrapping_mul(0xd134_2543_de82_ef95));
    let mut number = 0_u64;
    while !vmm.moving.is_cancelled() {
        tokio::time::sleep(PAUSE).await;
        let first = random.random_range(0..vmm.shape.pages);
        let pages = first..(first + random.random_range(1..=MOST_PAGES)).min(vmm.shape.pages);
        let Some(old) = vmm.memory.lock().clear(pages.clone()) else { continue };
        number += 1;
        let mut request = v1::InvalidateRangeStartRequest {
            address_space_id: *vmm.address_space.borrow(),
            range: Some(v1::AddressRange {
                start: address_of(pages.start),
                end: address_of(pages.end),
                all: false,
            }),
            cause: v1::Cause::Migrate.into(),
            deadline_ms: u64::try_from(vmm.shape.deadline.as_millis()).ok(),
            request_id: format!("{}-{mover}-{number}", std::process::id()),
            resident_pages: old.len() as u64,
            ..v1::InvalidateRangeStartRequest::default()
        };
        let result = vmm.quiesce(&mut request, &mut random).await?;
        vmm.look_for_a_grace_period(&result, old.len())?;
        for held in old {
            vmm.move_page(held)?;
        }
        vmm.end(&request, &result).await?;
    }
    Ok(())
}

impl Vmm {
    /// Takes what the devices wrote along, gives the frame away, and goes on in another.
    fn move_page(&self, old: Held) -> Result<(), VmmError> {
        let mut content = self.frames.read(old.frame)?;
        if content.generation(old.page) != Ok(old.generation) {
            self.ledger.lock().lost_writes += 1;
            self.found(&format!("page {} is not in frame {} any more", old.page, old.frame))?;
        }
        for slot in 0..self.shape.slots {
            let (counter, mark) = (content.counter(slot), self.shared.marks.read(slot, old.page)?.value);
            // One write may be there whose device was killed before it could tell.
            if counter < mark {
                self.ledger.lock().lost_writes += 1;
                self.found(&format!(
                    "page {} has counter {counter} of slot {slot} in frame {}, and {mark} was written",
                    old.page, old.frame
                ))?;
            }
        }
        self.frames.poison(old.frame)?;
        let mut memory = self.memory.lock();
        memory.free(old.frame);
        // There are as many frames as pages beyond those in use.
        let Some(new) = memory.take_frame(old.page) else { return Ok(()) };
        let is_poison = self.frames.read(new.frame)?.is_poison();
        content.stamp(new.page, new.generation);
        self.frames.write(new.frame, &content)?;
        memory.set(new);
        drop(memory);
        self.ledger.lock().releases += 1;
        if !is_poison {
            self.ledger.lock().writes_after_release += 1;
            self.found(&format!("frame {} was written after it was given away", new.frame))?;
        }
        Ok(())
    }

    /// A device that is in a session of an earlier run of the host agent, with a lease that has not ended,
    /// may still use what is given away now.
    fn look_for_a_grace_period(&self, result: &RoundResult, pages: usize) -> Result<(), VmmError> {
        let now = self.clock.now().as_nanos();
        for device in 0..self.shape.devices {
            let status = self.shared.status.read(device, 0)?;
            let earlier = status.session != 0 && status.host_incarnation < result.host_incarnation;
            if earlier && now < status.valid_until {
                self.ledger.lock().releases_in_grace += pages as u64;
                self.found(&format!(
                    "{pages} pages were released by run {} while device-{device} is in a session of run {}, \
                     whose lease lasts until {}",
                    result.host_incarnation, status.host_incarnation, status.valid_until
                ))?;
            }
        }
        Ok(())
    }

    /// Closes the bracket. One that its host agent does not know any more is closed.
    pub(super) async fn end(
        &self,
        start: &v1::InvalidateRangeStartRequest,
        started: &RoundResult,
    ) -> Result<(), VmmError> {
        let request = v1::InvalidateRangeEndRequest {
            address_space_id: start.address_space_id,
            seq: started.seq,
            host_incarnation: started.host_incarnation,
            request_id: format!("{}-end", start.request_id),
        };
        loop {
            let mut client = self.client.clone();
            match tokio::time::timeout(PATIENCE, client.invalidate_range_end(request.clone())).await {
                Ok(Ok(_)) => return Ok(()),
                // A crash took it along.
                Ok(Err(status)) if reason(&status) == Some(Reason::RoundUnknown) => return Ok(()),
                Ok(Err(status)) => self.may_be_tried_again("InvalidateRangeEnd", status)?,
                Err(_) => {}
            }
            tokio::time::sleep(BACKOFF).await;
        }
    }
}
