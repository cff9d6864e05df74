//! A worker: uses random pages, and looks at each before it believes it.
//!
//! ```text
//!   look at the lease, begin the use --> read the frame --> look at the lease again --> write one counter
//!                                                           over: the read is not used  --> publish it
//! ```

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use shootdown_client::{Access, AddrRange, AddressSpaceId, Device};

use super::clock::DeviceClock;
use super::process::{Bulletin, ChaosDeviceError};
use super::tlb::{Entry, Tlb};
use crate::chaos::content::{Frames, address_of};
use crate::chaos::plan::DevicePlan;
use crate::chaos::shared::{Counts, Mark, Phase, Shared, tell};
use crate::check::stamp::PAGE_BYTES;

/// Uses between two pauses: several translations are hot when something happens.
const BURST: usize = 64;

/// The pause: devices, movers and host agent share the machine's cores.
const PAUSE: Duration = Duration::from_millis(1);

/// How long a worker waits for a translation before it turns to a page that it has: a device that is cut off
/// goes on with what it holds.
const FAULT: Duration = Duration::from_millis(20);

/// The most uses of a page in a row, as programs do: only a translation that is used again can be stale.
const STAY: u32 = 16;

/// Writes among the uses, in percent.
const WRITES: u32 = 25;

/// What the workers of a device share.
#[derive(Debug)]
pub(super) struct Bench {
    pub(super) plan: DevicePlan,
    pub(super) clock: DeviceClock,
    pub(super) frames: Frames,
    pub(super) shared: Arc<Shared>,
    pub(super) bulletin: Arc<Bulletin>,
    pub(super) tlb: Arc<Tlb>,
}

/// One of them.
#[derive(Debug)]
pub(super) struct Worker {
    bench: Arc<Bench>,
    number: usize,
    counts: Counts,
    random: SmallRng,
}

/// What became of one use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Used {
    Done,
    Refused,
}

impl Worker {
    pub(super) fn new(bench: Arc<Bench>, number: usize) -> Result<Self, ChaosDeviceError> {
        let plan = &bench.plan;
        let counts = Counts { in_write: 0, ..bench.shared.counts.read(plan.index, number)? };
        let who = (plan.index * plan.workers + number) as u64;
        let random = SmallRng::seed_from_u64(plan.seed ^ who.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        Ok(Self { bench, number, counts, random })
    }

    /// Uses pages until the run is over.
    pub(super) async fn run(mut self) -> Result<(), ChaosDeviceError> {
        let pages = self.bench.plan.pages;
        let mut swept = 0;
        loop {
            for _ in 0..BURST {
                match self.bench.bulletin.phase() {
                    Phase::Faults => {
                        let page = self.random.random_range(0..pages);
                        self.visit(page).await?;
                    }
                    Phase::Sweep if swept < pages => {
                        swept += usize::from(self.visit(swept).await? == Used::Done);
                        if swept == pages {
                            self.bench.bulletin.on_swept();
                        }
                    }
                    Phase::Sweep => {}
                    Phase::Stop => return Ok(()),
                }
            }
            self.publish()?;
            tokio::time::sleep(PAUSE).await;
        }
    }

    fn publish(&self) -> Result<(), ChaosDeviceError> {
        self.bench.shared.counts.write(self.bench.plan.index, self.number, &self.counts)?;
        Ok(())
    }

    async fn visit(&mut self, page: usize) -> Result<Used, ChaosDeviceError> {
        let entry = match self.bench.tlb.find(page) {
            Some(entry) => entry,
            None => match self.fault(page).await {
                Some(entry) => entry,
                None => {
                    tokio::time::sleep(PAUSE).await;
                    return Ok(Used::Refused);
                }
            },
        };
        for _ in 0..self.random.random_range(1..=STAY) {
            let write = self.random.random_range(0..100) < WRITES;
            if self.use_once(page, &entry, write)? == Used::Refused {
                self.counts.refused += 1;
                self.bench.tlb.forget(page, &entry);
                return Ok(Used::Refused);
            }
        }
        Ok(Used::Done)
    }

    fn use_once(&mut self, page: usize, entry: &Arc<Entry>, write: bool) -> Result<Used, ChaosDeviceError> {
        if write {
            // Who stops this process looks at it: a device whose accesses come later than its margin after
            // the look at the lease does not honour it, and is not what is tried here.
            self.counts.in_write = 1;
            self.publish()?;
        }
        let used = self.look_and_use(page, entry, write);
        if write {
            self.counts.in_write = 0;
            self.publish()?;
        }
        used
    }

    fn look_and_use(
        &mut self,
        page: usize,
        entry: &Arc<Entry>,
        write: bool,
    ) -> Result<Used, ChaosDeviceError> {
        let bench = Arc::clone(&self.bench);
        let until = entry.gate.valid_until();
        let Ok(held) = bench.tlb.begin_use(entry) else { return Ok(Used::Refused) };
        let content = bench.frames.read(entry.frame).map_err(ChaosDeviceError::Frames)?;
        let seen = content.generation(page).and_then(|generation| {
            match *entry.generation.get_or_init(|| generation) {
                first if first == generation => Ok(()),
                first => {
                    Err(format!("generation {generation}, and it was {first} under the same translation"))
                }
            }
        });
        if !Tlb::was_valid(&held) {
            self.counts.discarded += 1;
            return Ok(Used::Refused);
        }
        self.counts.reads += 1;
        let slot = bench.plan.index * bench.plan.workers + self.number;
        if let Err(instead) = seen {
            self.counts.stale += 1;
            self.tell(&format!("read page {page} through frame {} and found {instead}", entry.frame))?;
            return Ok(Used::Refused);
        }
        let mark = bench.shared.marks.read(slot, page)?.value;
        let counter = content.counter(slot);
        if counter < mark {
            self.counts.lost += 1;
            self.tell(&format!(
                "found counter {counter} of slot {slot} in page {page}, and had written {mark}"
            ))?;
        }
        if write {
            let value = counter.max(mark) + 1;
            bench.frames.count(entry.frame, slot, value).map_err(ChaosDeviceError::Frames)?;
            let latest = until.map(|until| until + bench.plan.lease_margin);
            if latest.is_none_or(|latest| bench.clock.real() > latest) && !Tlb::was_valid(&held) {
                // It may be in a frame that is another page's by now: nobody counts on it, and it is told at once.
                self.counts.late += 1;
                self.publish()?;
                return Ok(Used::Refused);
            }
            bench.shared.marks.write(slot, page, &Mark { value })?;
            self.counts.writes += 1;
        }
        Ok(Used::Done)
    }

    fn tell(&self, what: &str) -> Result<(), ChaosDeviceError> {
        let Bench { plan, clock, .. } = &*self.bench;
        // What a kill must not take away.
        self.publish()?;
        let at = clock.real().as_nanos();
        tell(&plan.places.findings(), &format!("{at} device-{} worker {}: {what}", plan.index, self.number))?;
        Ok(())
    }

    /// Asks for a translation; `None`: not now.
    async fn fault(&self, page: usize) -> Option<Arc<Entry>> {
        let device: Arc<Device<Tlb>> = self.bench.bulletin.device()?;
        let address_space = AddressSpaceId::new(self.bench.plan.address_space)?;
        let start = address_of(page);
        let range = AddrRange::new(start, start + PAGE_BYTES as u64).ok()?;
        let asked = self.bench.clock.real();
        let fault = device.fault_ticketed(address_space, range, Access::Write);
        let grant = tokio::time::timeout(FAULT, fault).await.ok()?.ok()?;
        let ticket = grant.tickets.into_iter().next()?;
        let frame = ticket.frame().0;
        let mapping = ticket.commit().ok()?;
        self.bench.bulletin.on_granted(&device, asked);
        let entry = Arc::new(Entry { mapping, frame, gate: device.gate(), generation: OnceLock::new() });
        self.bench.tlb.install(page, Arc::clone(&entry));
        Some(entry)
    }
}
