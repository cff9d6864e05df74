//! A worker: reads random pages and checks each, and writes the device's own scratch pages.

use std::sync::Arc;

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use shootdown_client::agent::{Accelerator, AccessError};
use shootdown_client::{AddressSpaceId, FaultError};
use tokio_util::sync::CancellationToken;

use crate::check::floor::{FloorError, FloorFile, Record};
use crate::check::stamp::{PAGE_BYTES, Stamp, Writer};
use crate::check::verdict::{Found, Judgement, Kind, Origin, Reading, StaleRead, judge};
use crate::control::{DeviceReport, Plan};
use crate::host::address_of;

/// How many stale reads are told in full.
const MOST_TOLD: usize = 8;

/// How often a page is read that has no whole content: a store takes microseconds.
const MOST_TRIES: usize = 3;

/// Nothing lives, or nothing answers: do not ask in a busy loop.
const BACKOFF: std::time::Duration = std::time::Duration::from_millis(1);

/// How often a worker stays at a page, as programs do. Only a translation that is used again can be found
/// stale; its address space may have ended meanwhile.
const AGAIN: f64 = 0.75;

/// What the workers of a device share.
#[derive(Debug)]
pub(super) struct Bench {
    pub(super) accelerator: Arc<Accelerator>,
    pub(super) floors: FloorFile,
    pub(super) plan: Plan,
    /// Which device this is.
    pub(super) index: usize,
    /// The address space that lives in each slot and that the device hears of.
    pub(super) lives: RwLock<Vec<Option<AddressSpaceId>>>,
    pub(super) report: Mutex<DeviceReport>,
}

/// Where an access goes.
#[derive(Clone, Copy, Debug)]
struct Place {
    slot: usize,
    page: usize,
    address_space: AddressSpaceId,
}

impl Bench {
    /// Reads and writes until it is stopped, or the floor file fails.
    pub(super) async fn work(&self, worker: usize, stop: CancellationToken) -> Result<(), FloorError> {
        let number = (self.index as u64) << 32 | worker as u64;
        let mut random = SmallRng::seed_from_u64(self.plan.seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let (mut writes, mut last) = (0, None);
        while !stop.is_cancelled() {
            let again = last.filter(|_| random.random_bool(AGAIN));
            let Some(place) = again.or_else(|| self.choose(&mut random)) else {
                tokio::time::sleep(BACKOFF).await;
                continue;
            };
            last = Some(place);
            if random.random_range(0..100) < self.plan.write_percent {
                writes += 1;
                self.write(place, writes).await;
            } else {
                self.read(place).await?;
            }
        }
        Ok(())
    }

    fn choose(&self, random: &mut SmallRng) -> Option<Place> {
        let lives = self.lives.read();
        let occupied: Vec<_> =
            lives.iter().enumerate().filter_map(|(slot, lives)| Some((slot, (*lives)?))).collect();
        if occupied.is_empty() {
            return None;
        }
        let (slot, address_space) = occupied[random.random_range(0..occupied.len())];
        let page = random.random_range(0..self.plan.pages + self.plan.devices);
        Some(Place { slot, page, address_space })
    }

    /// Writes the scratch page of this device.
    async fn write(&self, place: Place, version: u64) {
        let address = address_of(self.plan.pages + self.index);
        let address_space = place.address_space.get();
        let stamp = Stamp { writer: Writer::Device, address_space, address, version };
        let written =
            self.accelerator.write(place.address_space, address, Bytes::from(stamp.to_page())).await;
        match written {
            Ok(()) => self.report.lock().writes += 1,
            Err(error) => self.refused(&error).await,
        }
    }

    async fn read(&self, place: Place) -> Result<(), FloorError> {
        for attempt in 1..=MOST_TRIES {
            // Before the read begins: see `crate::check`.
            let before = self.floors.read(place.slot, place.page)?;
            let address = address_of(place.page);
            let read = match self.accelerator.read(place.address_space, address, PAGE_BYTES).await {
                Ok(read) => read,
                Err(error) => {
                    self.refused(&error).await;
                    return Ok(());
                }
            };
            let reading = Reading {
                address_space: place.address_space.get(),
                address,
                kind: if place.page < self.plan.pages { Kind::Stamped } else { Kind::Scratch },
                origin: if read.from_cache { Origin::Copy } else { Origin::Frame },
                page: &read.bytes,
            };
            let judgement = match judge(&reading, &before) {
                Judgement::ReadAgain if attempt < MOST_TRIES => continue,
                Judgement::ReadAgain => Judgement::Stale(Found::Mangled),
                Judgement::ZerosIfUnchanged => {
                    let after = self.floors.read(place.slot, place.page)?;
                    let unchanged = after.change == before.change;
                    if unchanged { Judgement::Stale(Found::Zeros) } else { Judgement::Fresh }
                }
                judgement => judgement,
            };
            self.count(place, &reading, &before, judgement)?;
            break;
        }
        Ok(())
    }

    fn count(
        &self,
        place: Place,
        reading: &Reading<'_>,
        before: &Record,
        judgement: Judgement,
    ) -> Result<(), FloorError> {
        let mut report = self.report.lock();
        report.reads += 1;
        report.copy_reads += u64::from(reading.origin == Origin::Copy);
        report.reads_after[before.path.index()] += 1;
        report.torn += u64::from(judgement == Judgement::Torn);
        let Judgement::Stale(found) = judgement else { return Ok(()) };
        report.stale_reads += 1;
        if report.stale.len() < MOST_TOLD {
            report.stale.push(StaleRead {
                device: name(self.index),
                address_space: reading.address_space,
                address: reading.address,
                expected_at_least: match reading.origin {
                    Origin::Frame => before.floor,
                    Origin::Copy => before.copy_floor,
                },
                found,
                origin: reading.origin,
                // By now: the release that it read into may have been going on before.
                released_by: self.floors.read(place.slot, place.page)?.path,
            });
        }
        Ok(())
    }

    async fn refused(&self, error: &AccessError) {
        tracing::debug!(error = error as &dyn std::error::Error, "an access was refused");
        self.report.lock().refused += 1;
        // Only what the host agent refused has waited for an answer.
        if !matches!(error, AccessError::Fault { source: FaultError::Refused(_), .. }) {
            tokio::time::sleep(BACKOFF).await;
        }
    }
}

/// The name of a device.
pub(super) fn name(index: usize) -> String {
    format!("device-{index}")
}
