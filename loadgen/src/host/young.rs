//! Whether young queries know of what devices used.
//!
//! ```text
//!   query answers ----- a device uses the page ----- query is called ... answers "not young": the bit is lost
//!                       (began ... ended)
//! ```
//!
//! The times are of one machine's clock, and a use counts only where it lies wholly between the two. Any other
//! round over a page takes its bits too, and tells them to the host agent, where the next query finds them, or
//! does not because the page was dropped: what was used before it is not asked for. Nor is anything where two
//! rounds over a page overlap, for either may have been told.

use std::collections::HashMap;

use parking_lot::Mutex;
use shootdown_client::{AddrRange, AddressSpaceId, Clock};
use shootdown_server::source::{Outcome, RoundResult};

use crate::check::floor::FloorError;
use crate::check::history::PageName;
use crate::check::layout::Layout;
use crate::check::lost::{LostYoung, UseFile, Used};
use crate::control::device_name;

/// How many lost bits are told in full.
const MOST_TOLD: usize = 8;

/// The address spaces that live, and when rounds over their pages were answered.
#[derive(Debug)]
pub(super) struct Watch {
    layout: Layout,
    devices: usize,
    uses: UseFile,
    clock: Clock,
    lives: Mutex<HashMap<AddressSpaceId, Life>>,
    found: Mutex<Found>,
}

#[derive(Debug)]
struct Life {
    slot: usize,
    since: u64,
    pages: HashMap<usize, Asked>,
}

/// What is known of the rounds over a page.
#[derive(Debug, Clone, Copy)]
struct Asked {
    answered: u64,
    in_flight: u32,
    /// Counts the rounds that have begun.
    begun: u64,
}

/// What was lost.
#[derive(Debug, Default)]
struct Found {
    count: u64,
    first: Vec<LostYoung>,
}

/// A round that has begun.
#[derive(Debug)]
pub(super) struct Entered {
    called: u64,
    pages: Vec<(usize, Asked)>,
}

impl Watch {
    pub(super) fn new(layout: Layout, devices: usize, uses: UseFile) -> Self {
        let (lives, found) = (Mutex::default(), Mutex::default());
        Self { layout, devices, uses, clock: Clock::boottime(), lives, found }
    }

    /// Devices are about to be told of an address space.
    pub(super) fn on_lives(&self, id: AddressSpaceId, slot: usize) {
        let since = self.clock.now().as_nanos();
        self.lives.lock().insert(id, Life { slot, since, pages: HashMap::new() });
    }

    pub(super) fn on_ended(&self, id: AddressSpaceId) {
        self.lives.lock().remove(&id);
    }

    /// The pages of a range of an address space that devices know of.
    pub(super) fn pages_in(&self, id: AddressSpaceId, range: AddrRange) -> Vec<PageName> {
        let Some(slot) = self.lives.lock().get(&id).map(|life| life.slot) else { return Vec::new() };
        let name = |page| PageName { slot: self.layout.record_slot(slot, page), page };
        self.layout.pages_in(range).map(name).collect()
    }

    /// A round is called.
    pub(super) fn enter(&self, id: AddressSpaceId, range: AddrRange) -> Entered {
        let called = self.clock.now().as_nanos();
        let mut lives = self.lives.lock();
        let Some(life) = lives.get_mut(&id) else { return Entered { called, pages: Vec::new() } };
        let pages = self.layout.pages_in(range);
        let begin = |page| {
            let new = Asked { answered: life.since, in_flight: 0, begun: 0 };
            let asked = life.pages.entry(page).or_insert(new);
            let before = *asked;
            asked.in_flight += 1;
            asked.begun += 1;
            (page, before)
        };
        Entered { called, pages: pages.map(begin).collect() }
    }

    /// The round is answered; a query's answer is looked at.
    pub(super) fn leave(
        &self,
        id: AddressSpaceId,
        entered: &Entered,
        query: Option<&RoundResult>,
    ) -> Result<(), FloorError> {
        let now = self.clock.now().as_nanos();
        let mut unheard = Vec::new();
        let slot = {
            let mut lives = self.lives.lock();
            let Some(life) = lives.get_mut(&id) else { return Ok(()) };
            for (page, before) in &entered.pages {
                let Some(asked) = life.pages.get_mut(page) else { continue };
                asked.in_flight -= 1;
                asked.answered = now;
                let alone = before.in_flight == 0 && asked.begun == before.begun + 1;
                if alone && query.is_some_and(|query| !query.young) {
                    unheard.push((*page, before.answered));
                }
            }
            life.slot
        };
        for (page, since) in unheard {
            for device in (0..self.devices).filter(|device| query.is_some_and(|query| acked(query, *device)))
            {
                let used = self.uses.read(slot, page * self.devices + device)?;
                if is_between(&used, id, since, entered.called) {
                    self.on_found(id, slot, page, device, entered.called);
                }
            }
        }
        Ok(())
    }

    fn on_found(&self, id: AddressSpaceId, slot: usize, page: usize, device: usize, at: u64) {
        let mut found = self.found.lock();
        found.count += 1;
        if found.first.len() < MOST_TOLD {
            found.first.push(LostYoung {
                device: device_name(device),
                address_space: id.get(),
                address: self.layout.address_of(page),
                page: PageName { slot: self.layout.record_slot(slot, page), page },
                at,
            });
        }
    }

    pub(super) fn count(&self) -> u64 {
        self.found.lock().count
    }

    pub(super) fn first(&self) -> Vec<LostYoung> {
        self.found.lock().first.clone()
    }
}

/// Whether the device still has its session, and was asked.
fn acked(query: &RoundResult, device: usize) -> bool {
    let name = device_name(device);
    query.targets.iter().any(|target| target.outcome == Outcome::Acked && target.device.as_str() == name)
}

fn is_between(used: &Used, id: AddressSpaceId, since: u64, called: u64) -> bool {
    used.address_space == id.get() && used.began > since && used.ended < called
}

#[cfg(test)]
mod tests {
    use shootdown_client::{DeviceId, Incarnation, Moment, PageSize, SessionId};
    use shootdown_server::source::{RoundTimes, TargetReport, Verdict};

    use super::*;

    const ID: AddressSpaceId = AddressSpaceId::FIRST;

    struct Bench {
        _dir: tempfile::TempDir,
        watch: Watch,
        page: AddrRange,
    }

    impl Bench {
        fn new() -> Self {
            let layout = Layout::new(1, 4, 1, 1);
            let dir = tempfile::tempdir().unwrap();
            let uses = UseFile::create(&dir.path().join("uses"), layout.slots(), layout.pages()).unwrap();
            let watch = Watch::new(layout, 1, uses);
            watch.on_lives(ID, 0);
            let page = AddrRange::page_of(layout.address_of(2), PageSize::BASE);
            Self { _dir: dir, watch, page }
        }

        fn is_used(&self) {
            let began = self.watch.clock.now().as_nanos();
            let ended = self.watch.clock.now().as_nanos();
            let used = Used { address_space: ID.get(), began, ended };
            self.watch.uses.write(0, 2, &used).unwrap();
        }

        fn ask(&self, young: bool) {
            let entered = self.watch.enter(ID, self.page);
            self.answer(&entered, young);
        }

        fn answer(&self, entered: &Entered, young: bool) {
            self.watch.leave(ID, entered, Some(&result(young))).unwrap();
        }
    }

    fn result(young: bool) -> RoundResult {
        let (now, time) = (Moment::ZERO, None);
        let target = TargetReport {
            session: SessionId::FIRST,
            device: DeviceId::new("device-0").unwrap(),
            outcome: Outcome::Acked,
            elapsed: time,
            young,
            dirty: false,
            sent_after: None,
            timing: None,
            resolved_at: None,
        };
        RoundResult {
            verdict: Verdict::Quiesced,
            seq: None,
            targets: vec![target],
            young,
            dirty: false,
            host_incarnation: Incarnation::FIRST,
            times: RoundTimes { called: now, dispatched: now, resolved: None, finished: None, answered: now },
        }
    }

    #[test]
    fn a_use_between_two_queries_that_the_second_does_not_know_of_is_lost() {
        let bench = Bench::new();
        bench.ask(false);
        bench.is_used();
        bench.ask(false);
        assert_eq!((bench.watch.count(), bench.watch.first()[0].device.as_str()), (1, "device-0"));
    }

    #[test]
    fn a_use_that_is_known_of_or_was_asked_for_before_is_not_lost() {
        let bench = Bench::new();
        bench.is_used();
        bench.ask(true);
        bench.ask(false);
        assert_eq!(bench.watch.count(), 0);
    }

    #[test]
    fn a_use_before_a_round_that_is_no_query_is_not_asked_for() {
        let bench = Bench::new();
        bench.is_used();
        let entered = bench.watch.enter(ID, AddrRange::ALL);
        bench.watch.leave(ID, &entered, None).unwrap();
        bench.ask(false);
        assert_eq!(bench.watch.count(), 0);
    }

    #[test]
    fn of_two_queries_at_once_either_may_be_told() {
        let bench = Bench::new();
        bench.is_used();
        let first = bench.watch.enter(ID, bench.page);
        let second = bench.watch.enter(ID, bench.page);
        bench.answer(&second, false);
        bench.answer(&first, true);
        assert_eq!(bench.watch.count(), 0);
        bench.ask(false);
        assert_eq!(bench.watch.count(), 0);
    }
}
