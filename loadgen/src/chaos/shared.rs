//! What the processes of a run share beside the frames. Each row has one writer, and outlives it: what a
//! device counted is not lost when it is killed.

use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::path::Path;

use crate::chaos::plan::Places;
use crate::check::table::{Row, Table, TableError};

/// What a device says of itself.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct Status {
    /// This run of the device agent.
    pub(crate) incarnation: u64,
    /// 0: none, and it holds nothing.
    pub(crate) session: u64,
    /// The run of the host agent that the session is with.
    pub(crate) host_incarnation: u64,
    /// When its lease ends, on the machine's clock.
    pub(crate) valid_until: u64,
    /// Sessions that were opened.
    pub(crate) sessions: u64,
    /// Calls of `flush_all`.
    pub(crate) flushes: u64,
    /// Grants that were installed.
    pub(crate) grants: u64,
    /// When the last of them was asked for, on the machine's clock.
    pub(crate) last_asked: u64,
    /// Sessions that ended because the lease had run out, by either side's word.
    pub(crate) lapses: u64,
    /// Answers of a host agent that had been replaced.
    pub(crate) superseded: u64,
    /// Grants in a new session before everything of the old one was flushed.
    pub(crate) unflushed_grants: u64,
    /// Every page was used after the faults had ended.
    pub(crate) swept: u64,
}

/// What a worker of a device counted.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct Counts {
    pub(crate) reads: u64,
    pub(crate) writes: u64,
    pub(crate) stale: u64,
    pub(crate) lost: u64,
    /// Reads that were not used: the lease had ended before they were done.
    pub(crate) discarded: u64,
    /// Writes that were done only after the lease and its margin.
    pub(crate) late: u64,
    /// Uses that were refused.
    pub(crate) refused: u64,
    /// A write is under way: between the look at the lease and its end.
    pub(crate) in_write: u64,
}

/// The last write to a page by one worker that is known to have been done.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct Mark {
    pub(crate) value: u64,
}

/// What a device is told.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct Orders {
    /// [`Phase`], as a number.
    pub(crate) phase: u64,
    /// How long a flush takes, in milliseconds.
    pub(crate) flush_ms: u64,
    /// Not 0: its clock stands still. Only in a run that breaks that rule.
    pub(crate) clock_stands: u64,
}

/// How far a run is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Phase {
    /// Faults are injected.
    Faults,
    /// They are over; each device uses each page once more.
    Sweep,
    /// Leave.
    Stop,
}

impl Orders {
    pub(crate) const fn phase(self) -> Phase {
        match self.phase {
            0 => Phase::Faults,
            1 => Phase::Sweep,
            _ => Phase::Stop,
        }
    }
}

impl Row for Status {
    const WORDS: usize = 12;

    fn to_words(&self) -> Vec<u64> {
        vec![
            self.incarnation,
            self.session,
            self.host_incarnation,
            self.valid_until,
            self.sessions,
            self.flushes,
            self.grants,
            self.last_asked,
            self.lapses,
            self.superseded,
            self.unflushed_grants,
            self.swept,
        ]
    }

    fn from_words(words: &[u64]) -> Option<Self> {
        let [
            incarnation,
            session,
            host_incarnation,
            valid_until,
            sessions,
            flushes,
            grants,
            last_asked,
            lapses,
            superseded,
            unflushed_grants,
            swept,
        ] = *words
        else {
            return None;
        };
        Some(Self {
            incarnation,
            session,
            host_incarnation,
            valid_until,
            sessions,
            flushes,
            grants,
            last_asked,
            lapses,
            superseded,
            unflushed_grants,
            swept,
        })
    }
}

impl Row for Counts {
    const WORDS: usize = 8;

    fn to_words(&self) -> Vec<u64> {
        let Self { reads, writes, stale, lost, discarded, late, refused, in_write } = *self;
        vec![reads, writes, stale, lost, discarded, late, refused, in_write]
    }

    fn from_words(words: &[u64]) -> Option<Self> {
        let [reads, writes, stale, lost, discarded, late, refused, in_write] = *words else { return None };
        Some(Self { reads, writes, stale, lost, discarded, late, refused, in_write })
    }
}

impl Row for Mark {
    const WORDS: usize = 1;

    fn to_words(&self) -> Vec<u64> {
        vec![self.value]
    }

    fn from_words(words: &[u64]) -> Option<Self> {
        let [value] = *words else { return None };
        Some(Self { value })
    }
}

impl Row for Orders {
    const WORDS: usize = 3;

    fn to_words(&self) -> Vec<u64> {
        vec![self.phase, self.flush_ms, self.clock_stands]
    }

    fn from_words(words: &[u64]) -> Option<Self> {
        let [phase, flush_ms, clock_stands] = *words else { return None };
        Some(Self { phase, flush_ms, clock_stands })
    }
}

/// The files.
#[derive(Debug)]
pub(crate) struct Shared {
    /// A row a device.
    pub(crate) status: Table<Status>,
    /// A row a device.
    pub(crate) orders: Table<Orders>,
    /// A row a worker of a device.
    pub(crate) counts: Table<Counts>,
    /// A row a page, for each worker of each device.
    pub(crate) marks: Table<Mark>,
}

impl Shared {
    pub(crate) fn create(
        places: &Places,
        devices: usize,
        workers: usize,
        pages: usize,
    ) -> Result<Self, TableError> {
        let path = |name: &str| places.directory.join(name);
        Ok(Self {
            status: Table::create(&path("status"), devices, 1)?,
            orders: Table::create(&path("orders"), devices, 1)?,
            counts: Table::create(&path("counts"), devices, workers)?,
            marks: Table::create(&path("marks"), devices * workers, pages)?,
        })
    }

    pub(crate) fn open(places: &Places, workers: usize, pages: usize) -> Result<Self, TableError> {
        let path = |name: &str| places.directory.join(name);
        Ok(Self {
            status: Table::open(&path("status"), 1)?,
            orders: Table::open(&path("orders"), 1)?,
            counts: Table::open(&path("counts"), workers)?,
            marks: Table::open(&path("marks"), pages)?,
        })
    }
}

/// Adds a line to what was found. Whole lines only, whoever else adds one.
pub(crate) fn tell(findings: &Path, what: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().append(true).create(true).open(findings)?;
    file.write_all(format!("{what}\n").as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_read_back() {
        let status = Status { incarnation: 1, valid_until: 4, swept: 12, ..Status::default() };
        assert_eq!(Status::from_words(&status.to_words()), Some(status));
        let counts = Counts { reads: 1, in_write: 8, ..Counts::default() };
        assert_eq!(Counts::from_words(&counts.to_words()), Some(counts));
        let orders = Orders { phase: 1, flush_ms: 2, clock_stands: 3 };
        assert_eq!(Orders::from_words(&orders.to_words()), Some(orders));
        assert_eq!(orders.phase(), Phase::Sweep);
        assert_eq!(Mark::from_words(&Mark { value: 3 }.to_words()), Some(Mark { value: 3 }));
    }
}
