//! Records: one for each open section, so that whoever holds up a grace period can be named.
//!
//! A record belongs to one section at a time, is written by plain stores, and is handed from section to section by
//! moving it (see `cache`), never by claiming it. It also carries the reference to its domain that keeps the domain
//! alive while a section is open. Nothing here decides who waits for whom.

use crate::{core::Core, counters::Bank, site::Site, sync::lock_plain};
use std::{
    collections::BTreeMap,
    panic::Location,
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

/// A line of its own: records of two threads come from one allocator.
#[repr(align(64))]
pub(crate) struct Record {
    core: Arc<Core>,
    id: RecordId,
    /// The call site of the section, 0 when none is open.
    site: AtomicUsize,
    /// Sections that have used this record; tells the watchdog an old section from a new one.
    serial: AtomicU64,
    bank: AtomicUsize,
    /// Nanoseconds from the domain's birth to the section's begin, if ages are exact.
    began: AtomicU64,
}

/// Never used twice in a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct RecordId(u64);

impl Record {
    #[inline]
    pub(crate) fn core(&self) -> &Arc<Core> {
        &self.core
    }

    #[inline]
    pub(crate) fn open(&self, site: Site, bank: Bank, began: Option<Duration>) {
        // Only the owner writes, so load and store are enough.
        self.serial.store(self.serial.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        self.bank.store(bank.index(), Ordering::Relaxed);
        if let Some(began) = began {
            self.began.store(u64::try_from(began.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        }
        // Release, with the Acquire in `read`: who sees the site sees the rest of this section, or a later one's.
        self.site.store(site.number(), Ordering::Release);
    }

    /// The bank in which the section began, told to its owner, to whom the record came along with the section.
    #[inline]
    pub(crate) fn close(&self) -> Bank {
        self.site.store(0, Ordering::Release);
        Bank::from_index(self.bank.load(Ordering::Relaxed))
    }

    /// The open section, if there is one. It may end while this looks: the serial is read twice, and a section that
    /// changed meanwhile is too young to matter.
    fn read(&self) -> Option<Section> {
        let serial = self.serial.load(Ordering::Acquire);
        let site = self.site.load(Ordering::Acquire);
        let bank = Bank::from_index(self.bank.load(Ordering::Relaxed));
        let began = Duration::from_nanos(self.began.load(Ordering::Relaxed));
        if site == 0 || self.serial.load(Ordering::Relaxed) != serial {
            return None;
        }
        Some(Section { record: self.id, location: Site::resolve(site)?, serial, bank, began })
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        lock_plain(&self.core.records.0).all.remove(&self.id);
    }
}

/// An open section as the watchdog sees it.
pub(crate) struct Section {
    pub(crate) record: RecordId,
    pub(crate) location: &'static Location<'static>,
    pub(crate) serial: u64,
    pub(crate) bank: Bank,
    pub(crate) began: Duration,
}

/// All records of a domain, for the watchdog: those of open sections, and those that threads keep for the next.
#[derive(Default)]
pub(crate) struct Records(Mutex<List>);

#[derive(Default)]
struct List {
    all: BTreeMap<RecordId, Weak<Record>>,
    next: u64,
}

impl Records {
    #[cold]
    pub(crate) fn create(core: &Arc<Core>) -> Arc<Record> {
        let mut list = lock_plain(&core.records.0);
        let id = RecordId(list.next);
        list.next += 1;
        let record = Arc::new(Record {
            core: Arc::clone(core),
            id,
            site: AtomicUsize::new(0),
            serial: AtomicU64::new(0),
            bank: AtomicUsize::new(0),
            began: AtomicU64::new(0),
        });
        list.all.insert(id, Arc::downgrade(&record));
        record
    }

    /// The open sections.
    pub(crate) fn sections(&self) -> Vec<Section> {
        // Upgraded under the lock and dropped after it: the last reference to a record takes the lock.
        let all: Vec<_> = lock_plain(&self.0).all.values().filter_map(Weak::upgrade).collect();
        all.iter().filter_map(|record| record.read()).collect()
    }
}
