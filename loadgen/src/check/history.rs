//! What happened to a page, as it is told when the page went wrong.
//!
//! The host keeps the last operations of each page and the rounds over it; a device adds what it found. The
//! shortest history begins with the last operation that made the content which should have been there.

use std::collections::VecDeque;
use std::fmt;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

/// What is kept of each page: more than happens in the time that devices may take to tell.
const KEPT: usize = 96;

/// The most that is told.
const TOLD: usize = 24;

/// A page of the floor file.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct PageName {
    /// Its slot.
    pub slot: usize,
    /// Its number there.
    pub page: usize,
}

/// Something that happened to a page.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Happened {
    /// When, on the machine's clock, in nanoseconds.
    pub at: u64,
    /// What: an operation, or a round of one.
    pub what: String,
    /// The address space.
    pub address_space: u64,
    /// The sequence of the round's event.
    pub seq: Option<u64>,
    /// The version that the page must have from then on.
    pub version: Option<u64>,
    /// Who found something, or how many devices were asked.
    pub device: Option<String>,
}

/// What the host keeps. A lock for all: it is held for a push.
#[derive(Debug)]
pub struct Histories {
    pages: usize,
    kept: Mutex<Vec<VecDeque<Happened>>>,
}

/// The history of a page.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct History {
    /// Which.
    pub page: PageName,
    /// Earliest first.
    pub happened: Vec<Happened>,
}

impl Histories {
    /// For `pages` pages of each of `slots` slots.
    #[must_use]
    pub fn new(slots: usize, pages: usize) -> Self {
        Self { pages, kept: Mutex::new(vec![VecDeque::new(); slots * pages]) }
    }

    /// Keeps what happened to a page.
    pub fn push(&self, page: PageName, happened: Happened) {
        let mut kept = self.kept.lock();
        if let Some(ring) = kept.get_mut(page.slot * self.pages + page.page) {
            if ring.len() == KEPT {
                ring.pop_front();
            }
            ring.push_back(happened);
        }
    }

    /// What is kept of a page.
    #[must_use]
    pub fn of(&self, page: PageName) -> History {
        let kept = self.kept.lock();
        let ring = kept.get(page.slot * self.pages + page.page);
        History { page, happened: ring.into_iter().flatten().cloned().collect() }
    }
}

impl History {
    /// What led to `found`: from the operation that made the content of `expected`, or the last one that made
    /// any, to `found` itself. What happened later is no part of it.
    #[must_use]
    pub fn shortest(&self, expected: u64, found: Happened) -> Vec<Happened> {
        let mut told: Vec<Happened> =
            self.happened.iter().filter(|happened| happened.at <= found.at).cloned().collect();
        told.sort_by_key(|happened| happened.at);
        let made = |version: u64| version <= expected;
        let good = told.iter().rposition(|happened| happened.version.is_some_and(made));
        let begin = good.unwrap_or(0).max(told.len().saturating_sub(TOLD));
        told.drain(..begin);
        told.push(found);
        told
    }
}

impl fmt::Display for Happened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { at, what, address_space, seq, version, device } = self;
        write!(
            f,
            "{}.{:06} s  {what}  address space {address_space}",
            at / 1_000_000_000,
            at % 1_000_000_000 / 1000
        )?;
        if let Some(seq) = seq {
            write!(f, "  event {seq}")?;
        }
        if let Some(version) = version {
            write!(f, "  version {version}")?;
        }
        match device {
            Some(device) => write!(f, "  {device}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: PageName = PageName { slot: 0, page: 1 };

    fn at(at: u64, version: Option<u64>) -> Happened {
        Happened { at, what: format!("at {at}"), address_space: 1, seq: None, version, device: None }
    }

    fn times(history: &History, expected: u64, found: u64) -> Vec<u64> {
        history.shortest(expected, at(found, None)).iter().map(|happened| happened.at).collect()
    }

    #[test]
    fn it_begins_with_what_made_the_content_that_was_expected_and_ends_with_what_was_found() {
        let histories = Histories::new(1, 2);
        // Two tasks may tell of what they did in another order than they did it in.
        for (time, version) in [(1, Some(7)), (5, Some(8)), (3, None), (6, None), (9, Some(9))] {
            histories.push(PAGE, at(time, version));
        }
        let history = histories.of(PAGE);
        assert_eq!(times(&history, 8, 7), [5, 6, 7]);
        assert_eq!(times(&history, 7, 7), [1, 3, 5, 6, 7]);
        assert_eq!(times(&history, 2, 4), [1, 3, 4], "nothing that is kept made it");
    }

    #[test]
    fn only_the_last_of_it_is_kept() {
        let histories = Histories::new(1, 2);
        for time in 0..200 {
            histories.push(PAGE, at(time, None));
        }
        let history = histories.of(PAGE);
        assert_eq!((history.happened.len(), history.happened[0].at), (KEPT, 200 - KEPT as u64));
        assert_eq!(times(&history, 0, 300).len(), TOLD + 1);
    }
}
