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
    /// Who found something.
    pub device: Option<String>,
    /// Of a round: each device that it waited for. Of anything else: nothing.
    pub waited_for: Option<Vec<WaitedFor>>,
}

/// A device that a round waited for.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct WaitedFor {
    /// Its name.
    pub device: String,
    /// Where it stood when the round was answered: acked, left, fenced, waiting.
    pub outcome: String,
    /// From the opening of the round until then, in microseconds; `None` while it is waited for.
    pub after_us: Option<u64>,
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

    /// A page of an address space that was forked begins with the last rounds over its parent's.
    pub fn inherit(&self, from: PageName, to: PageName) {
        let mut happened = self.of(from).happened;
        let rounds = happened.split_off(rounds_before(&happened, happened.len()));
        rounds.into_iter().for_each(|round| self.push(to, round));
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
    /// any, with its rounds, to `found` itself. What happened later is no part of it.
    #[must_use]
    pub fn shortest(&self, expected: u64, found: Happened) -> Vec<Happened> {
        let mut told: Vec<Happened> =
            self.happened.iter().filter(|happened| happened.at <= found.at).cloned().collect();
        told.sort_by_key(|happened| happened.at);
        let made = |version: u64| version <= expected;
        let good = told.iter().rposition(|happened| happened.version.is_some_and(made));
        let begin = rounds_before(&told, good.unwrap_or(0));
        // What was found in an address space that had ended: the place is another's by now, and what matters is the
        // last that happened in that one.
        let last_own = told.iter().rposition(|happened| happened.address_space == found.address_space);
        // That may be a round, or an operation with the rounds that it has waited for.
        let of_own = |last| rounds_before(&told, last).min(rounds_before(&told, last + 1));
        let begin = last_own.map_or(begin, |last| begin.min(of_own(last)));
        let begin = begin.max(told.len().saturating_sub(TOLD));
        told.drain(..begin);
        told.push(found);
        told
    }
}

/// Where the rounds begin that the operation at `end` has waited for: those of one kind directly before it.
fn rounds_before(happened: &[Happened], end: usize) -> usize {
    let Some(last) = end.checked_sub(1).map(|last| &happened[last]) else { return end };
    let same = |happened: &&Happened| happened.waited_for.is_some() && happened.what == last.what;
    end - happened[..end].iter().rev().take_while(same).count()
}

impl fmt::Display for Happened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { at, what, address_space, seq, version, device, waited_for } = self;
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
        if let Some(device) = device {
            write!(f, "  {device}")?;
        }
        match waited_for.as_deref() {
            None => Ok(()),
            Some([]) => f.write_str("  no device"),
            Some([first, more @ ..]) => {
                write!(f, "  {first}")?;
                more.iter().try_for_each(|waited_for| write!(f, ", {waited_for}"))
            }
        }
    }
}

impl fmt::Display for WaitedFor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { device, outcome, after_us } = self;
        match after_us {
            Some(after) => write!(f, "{device} {outcome} after {after} us"),
            None => write!(f, "{device} {outcome}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: PageName = PageName { slot: 0, page: 1 };

    fn at(at: u64, version: Option<u64>) -> Happened {
        let what = format!("at {at}");
        Happened { at, what, address_space: 1, seq: None, version, device: None, waited_for: None }
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
    fn a_round_is_told_with_its_event_and_with_each_device_and_what_became_of_it() {
        let waited_for = |device: &str, outcome: &str, after_us| WaitedFor {
            device: device.to_owned(),
            outcome: outcome.to_owned(),
            after_us,
        };
        let waited_for =
            vec![waited_for("device-0", "acked", Some(130)), waited_for("device-1", "waiting", None)];
        let round = Happened { seq: Some(9), waited_for: Some(waited_for), ..at(1_000_002_000, None) };
        let told = "1.000002 s  at 1000002000  address space 1  event 9  device-0 acked after 130 us, device-1 waiting";
        assert_eq!(round.to_string(), told);
        let alone = Happened { waited_for: Some(Vec::new()), ..at(0, None) };
        assert!(alone.to_string().ends_with("  no device"), "{alone}");
    }

    #[test]
    fn an_operation_is_told_with_its_rounds_and_a_child_with_those_over_its_parents_page() {
        let histories = Histories::new(1, 3);
        let round = |time, what: &str| Happened {
            waited_for: Some(Vec::new()),
            what: what.to_owned(),
            ..at(time, None)
        };
        for happened in
            [at(1, Some(7)), round(2, "aging"), round(3, "fork"), round(4, "fork"), at(5, Some(8))]
        {
            histories.push(PAGE, happened);
        }
        assert_eq!(times(&histories.of(PAGE), 8, 6), [3, 4, 5, 6]);
        histories.push(PAGE, round(7, "fork"));
        let child = PageName { page: 2, ..PAGE };
        histories.inherit(PAGE, child);
        histories.push(child, at(8, Some(9)));
        assert_eq!(times(&histories.of(child), u64::MAX, 9), [7, 8, 9]);
    }

    #[test]
    fn what_is_found_in_an_address_space_that_has_ended_is_told_with_its_end() {
        let histories = Histories::new(1, 2);
        let ended = Happened { waited_for: Some(Vec::new()), what: "exit".to_owned(), ..at(2, None) };
        for happened in [at(1, Some(7)), ended, Happened { address_space: 2, ..at(3, Some(8)) }] {
            histories.push(PAGE, happened);
        }
        assert_eq!(times(&histories.of(PAGE), 8, 4), [2, 3, 4]);
        // With the round that it has waited for, or should have.
        let histories = Histories::new(1, 2);
        let round = Happened { waited_for: Some(Vec::new()), what: "exit goes on".to_owned(), ..at(2, None) };
        let ended = Happened { what: "exit".to_owned(), ..at(3, Some(7)) };
        for happened in [at(1, Some(6)), round, ended, Happened { address_space: 2, ..at(4, Some(8)) }] {
            histories.push(PAGE, happened);
        }
        assert_eq!(times(&histories.of(PAGE), 8, 5), [2, 3, 4, 5]);
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
