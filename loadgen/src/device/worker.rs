//! A worker: reads random pages and checks each, and writes the device's own scratch pages.

use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use shootdown_client::agent::{Accelerator, AccessError, PageRead};
use shootdown_client::{AddressSpaceId, Clock, FaultError};
use tokio_util::sync::CancellationToken;

use super::writes::Writes;
use crate::check::floor::{FloorError, Record};
use crate::check::history::PageName;
use crate::check::layout::{Layout, Use};
use crate::check::lost::{Left, LostWrite, Mark, Used, what_is_left};
use crate::check::stamp::PAGE_BYTES;
use crate::check::verdict::{Found, Judgement, Kind, Origin, Reading, StaleRead, judge, judge_again};
use crate::control::{DeviceReport, Plan, Shared, device_name};

/// How many stale reads, and lost writes, are told in full.
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
    pub(super) shared: Shared,
    pub(super) layout: Layout,
    pub(super) plan: Plan,
    /// Which device this is.
    pub(super) index: usize,
    /// The address space that lives in each slot and that the device hears of.
    pub(super) lives: RwLock<Vec<Option<AddressSpaceId>>>,
    pub(super) writes: Writes,
    pub(super) clock: Clock,
    pub(super) report: Mutex<DeviceReport>,
}

/// Where an access goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) slot: usize,
    pub(super) page: usize,
    pub(super) address_space: AddressSpaceId,
}

impl Bench {
    /// Reads and writes until it is stopped, or a file of the run fails.
    pub(super) async fn work(&self, worker: usize, stop: CancellationToken) -> Result<(), FloorError> {
        let number = (self.index as u64) << 32 | worker as u64;
        let mut random = SmallRng::seed_from_u64(self.plan.seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mut last = None;
        while !stop.is_cancelled() {
            let again = last.filter(|_| random.random_bool(AGAIN));
            let Some(place) = again.or_else(|| self.choose(&mut random)) else {
                tokio::time::sleep(BACKOFF).await;
                continue;
            };
            last = Some(place);
            if random.random_range(0..100) < self.plan.write_percent {
                let place = self.scratch(place, &mut random);
                self.write(place).await?;
                // What was written is what is to be found again.
                last = Some(place);
            } else {
                self.read(place).await?;
            }
            // A cache that hits never waits, and the session wants the thread too.
            tokio::task::yield_now().await;
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
        let page = random.random_range(0..self.layout.pages());
        Some(Place { slot, page, address_space })
    }

    /// A page of this device in the same address space. Those of a file are written through the parent's
    /// only: a device caches by address, and two addresses of one page would each have a cache line of it.
    fn scratch(&self, place: Place, random: &mut SmallRng) -> Place {
        let mine = self.writes.pages(place.slot < self.plan.address_spaces);
        Place { page: mine[random.random_range(0..mine.len())], ..place }
    }

    /// Writes a scratch page of this device, and lets the host know when it is done.
    async fn write(&self, place: Place) -> Result<(), FloorError> {
        let name = self.name(place);
        // Another worker writes it: which of the two comes last nobody could tell.
        let Some(write) = self.writes.try_begin(name) else { return Ok(()) };
        let zaps = self.shared.floors.read(name.slot, name.page)?.zaps;
        let stamp = write.stamp(self.owner(place), self.layout.address_of(place.page));
        let (id, address, bytes) = (place.address_space, stamp.address, stamp.to_page().into());
        let began = self.now();
        match self.accelerator.write(id, address, bytes).await {
            Ok(()) => {
                self.on_used(place, began)?;
                let mark = Mark { address_space: id.get(), zaps, version: stamp.version };
                self.shared.marks.write(name.slot, name.page, &mark)?;
                write.done(mark);
                self.report.lock().writes += 1;
            }
            Err(error) => {
                drop(write);
                self.refused(&error).await;
            }
        }
        Ok(())
    }

    async fn read(&self, place: Place) -> Result<(), FloorError> {
        let name = self.name(place);
        for attempt in 1..=MOST_TRIES {
            // Before the read begins: see `crate::check`.
            let before = self.shared.floors.read(name.slot, name.page)?;
            let lives = self.lives_before(place, &before)?;
            let written = self.writes.last(name);
            let began = self.now();
            let address = self.layout.address_of(place.page);
            let read = match self.accelerator.read(place.address_space, address, PAGE_BYTES).await {
                Ok(read) => read,
                Err(error) => {
                    self.refused(&error).await;
                    return Ok(());
                }
            };
            self.on_used(place, began)?;
            let reading = Reading {
                owner: self.owner(place),
                address,
                kind: match self.layout.use_of(place.page) {
                    Use::Stamped | Use::Twin => Kind::Stamped,
                    Use::Scratch { .. } => Kind::Scratch,
                },
                origin: if read.from_cache { Origin::Copy } else { Origin::Frame },
                page: &read.bytes,
            };
            let judgement = if lives { judge(&reading, &before) } else { Judgement::Stale(Found::Ended) };
            let judgement = match judgement {
                Judgement::ReadAgain if attempt < MOST_TRIES => continue,
                Judgement::ReadAgain => Judgement::Stale(Found::Mangled),
                judged @ (Judgement::StaleIfUnchanged(_) | Judgement::Stale(_)) => {
                    let after = self.shared.floors.read(name.slot, name.page)?;
                    judge_again(judged, &reading, &before, &after)
                }
                judgement => judgement,
            };
            if let Some(written) = written {
                self.look_for(place, written, &before, &read)?;
            }
            self.count(place, &reading, &before, judgement)?;
            break;
        }
        Ok(())
    }

    /// Whether the address space lived when the read began. A page of a file tells of its file only.
    fn lives_before(&self, place: Place, before: &Record) -> Result<bool, FloorError> {
        let home = match self.layout.is_file(place.page) {
            true => self.shared.floors.read(place.slot, 0)?,
            false => *before,
        };
        Ok(home.address_space == place.address_space.get())
    }

    /// The last write that had returned when the read began must be there, unless the page was dropped.
    fn look_for(
        &self,
        place: Place,
        written: Mark,
        before: &Record,
        read: &PageRead,
    ) -> Result<(), FloorError> {
        if written.address_space != place.address_space.get() || !before.keeps_since(written.zaps) {
            return Ok(());
        }
        let Left::Lost(found) = what_is_left(&read.bytes, written.version) else { return Ok(()) };
        let name = self.name(place);
        let after = self.shared.floors.read(name.slot, name.page)?;
        // The page, or all of its address space, was dropped meanwhile.
        if !after.keeps_since(written.zaps) || after.address_space != before.address_space {
            return Ok(());
        }
        let mut report = self.report.lock();
        report.lost_writes += 1;
        report.lost_after[after.path.index()] += 1;
        if report.lost.len() < MOST_TOLD {
            report.lost.push(LostWrite {
                found_by: device_name(self.index),
                address_space: place.address_space.get(),
                address: self.layout.address_of(place.page),
                written: written.version,
                found,
                after: after.path,
                page: name,
                at: self.now(),
            });
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
        let name = self.name(place);
        // By now: the release that it read into may have been going on before.
        let released_by = self.shared.floors.read(name.slot, name.page)?.path;
        report.stale_reads += 1;
        report.stale_after[released_by.index()] += 1;
        if report.stale.len() < MOST_TOLD {
            report.stale.push(StaleRead {
                device: device_name(self.index),
                address_space: place.address_space.get(),
                address: reading.address,
                expected_at_least: match reading.origin {
                    Origin::Frame => before.floor,
                    Origin::Copy => before.copy_floor,
                },
                found,
                origin: reading.origin,
                released_by,
                page: name,
                at: self.now(),
            });
        }
        Ok(())
    }

    /// Publishes a use that is over, for the host's young queries.
    fn on_used(&self, place: Place, began: u64) -> Result<(), FloorError> {
        let used = Used { address_space: place.address_space.get(), began, ended: self.now() };
        self.shared.uses.write(place.slot, place.page * self.plan.devices + self.index, &used)
    }

    fn name(&self, place: Place) -> PageName {
        PageName { slot: self.layout.record_slot(place.slot, place.page), page: place.page }
    }

    fn owner(&self, place: Place) -> u64 {
        self.layout.owner(place.slot, place.page, place.address_space.get())
    }

    fn now(&self) -> u64 {
        self.clock.now().as_nanos()
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
