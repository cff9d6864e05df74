//! Whether a run has shown what it was to show.

use std::fmt;

use crate::check::history::{Happened, History, PageName};
use crate::check::lost::{LostWrite, LostYoung};
use crate::check::verdict::StaleRead;
use crate::control::{DeviceReport, HostReport, PathTally, Plan};
use crate::path::Path;

/// Everything that a run brought.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// What was asked for.
    pub plan: Plan,
    /// How long it ran.
    pub seconds: f64,
    /// It ended before its time, because something was found to be wrong.
    pub stopped_early: bool,
    /// What the host agent saw.
    pub host: HostReport,
    /// What each device saw.
    pub devices: Vec<DeviceReport>,
}

/// The sums over all devices.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Reads by devices that were checked.
    pub reads: u64,
    /// Those from a device's copy of the page.
    pub copy_reads: u64,
    /// Accesses whose translation was there.
    pub tlb_hits: u64,
    /// Accesses that had to fault.
    pub faults: u64,
    /// Accesses that were refused.
    pub refused: u64,
    /// Writes by devices.
    pub writes: u64,
    /// Reads that a store was under way in.
    pub torn: u64,
    /// Flushes of devices.
    pub flushes: u64,
    /// Reads, by devices and by the CPU, that found what had been released.
    pub stale_reads: u64,
    /// Writes by devices that were not there any more.
    pub lost_writes: u64,
    /// Uses by devices that a young query did not know of.
    pub lost_young: u64,
}

/// Why a run did not succeed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failing {
    /// Reads found what had been released.
    StaleReads(u64),
    /// What devices wrote is gone.
    LostWrites(u64),
    /// Pages that devices used counted as not used.
    LostYoung(u64),
    /// Free frames were written to.
    StaleWrites(u64),
    /// Pages were collapsed that nobody used, or left that somebody did.
    AgainstYoung(u64),
    /// A path that asks for young bits without waiting has never asked.
    NoQuestions(Path),
    /// Nothing was done on a path that was asked for.
    NoOperations(Path),
    /// No device was waited for on a path.
    NoRounds(Path),
    /// No device read a page that a path had released.
    NoReads(Path),
    /// A device read nothing, or nothing through a translation that it held: it would not have noticed.
    SilentDevice(usize),
    /// A rule was broken and nothing was found.
    BreakNotFound,
    /// Every address space had exited, and the memory source still held something.
    LeftBehind,
}

impl Outcome {
    /// The sums over all devices.
    #[must_use]
    pub fn totals(&self) -> Totals {
        let cpu = Totals {
            stale_reads: self.host.stale_reads,
            lost_writes: self.host.lost_writes,
            lost_young: self.host.lost_young,
            ..Totals::default()
        };
        self.devices.iter().fold(cpu, |sum, device| Totals {
            reads: sum.reads + device.reads,
            copy_reads: sum.copy_reads + device.copy_reads,
            tlb_hits: sum.tlb_hits + device.tlb_hits,
            faults: sum.faults + device.faults,
            refused: sum.refused + device.refused,
            writes: sum.writes + device.writes,
            torn: sum.torn + device.torn,
            flushes: sum.flushes + device.flushes,
            stale_reads: sum.stale_reads + device.stale_reads,
            lost_writes: sum.lost_writes + device.lost_writes + device.dirty_lost,
            lost_young: sum.lost_young,
        })
    }

    /// What a path did.
    #[must_use]
    pub fn path(&self, path: Path) -> PathTally {
        self.host.paths.get(path.index()).copied().unwrap_or_default()
    }

    /// Checked reads by devices of pages that the path had released last.
    #[must_use]
    pub fn reads_after(&self, path: Path) -> u64 {
        self.devices.iter().filter_map(|device| device.reads_after.get(path.index())).sum()
    }

    /// Stale reads of pages that the path had taken last.
    #[must_use]
    pub fn stale_after(&self, path: Path) -> u64 {
        let devices = self.devices.iter().map(|device| &device.stale_after);
        let rows = devices.chain([&self.host.stale_after]);
        rows.filter_map(|row| row.get(path.index())).sum()
    }

    /// Lost writes to pages that the path had taken last.
    #[must_use]
    pub fn lost_after(&self, path: Path) -> u64 {
        let devices = self.devices.iter().map(|device| &device.lost_after);
        let rows = devices.chain([&self.host.lost_after]);
        rows.filter_map(|row| row.get(path.index())).sum()
    }

    /// The first lost writes.
    pub fn lost(&self) -> impl Iterator<Item = &LostWrite> {
        self.host.lost.iter().chain(self.devices.iter().flat_map(|device| &device.lost))
    }

    /// The first lost young bits.
    pub fn lost_young(&self) -> impl Iterator<Item = &LostYoung> {
        self.host.young.iter()
    }

    /// What led to the first thing that is wrong, as short as it can be told; empty where nothing is, or
    /// nothing is known of it.
    #[must_use]
    pub fn shortest_history(&self) -> Vec<Happened> {
        let found = |at, what, address_space, device: &str| Happened {
            at,
            what,
            address_space,
            seq: None,
            version: None,
            device: Some(device.to_owned()),
            waited_for: None,
        };
        let stale = self.stale().map(|stale| {
            let what = format!("found {}, expected version {}", stale.found, stale.expected_at_least);
            let found = found(stale.at, what, stale.address_space, &stale.device);
            (stale.page, stale.expected_at_least, found)
        });
        let lost = self.lost().map(|lost| {
            let what = format!("lost the write of version {}", lost.written);
            (lost.page, u64::MAX, found(lost.at, what, lost.address_space, &lost.found_by))
        });
        let young = self.lost_young().map(|young| {
            let what = "lost that it was used".to_owned();
            (young.page, u64::MAX, found(young.at, what, young.address_space, &young.device))
        });
        let first = stale.chain(lost).chain(young).min_by_key(|(_, _, found)| found.at);
        let Some((page, expected, found)) = first else { return Vec::new() };
        let nothing = History { page, happened: Vec::new() };
        let history = self.history(page).unwrap_or(&nothing);
        history.shortest(expected, found)
    }

    fn history(&self, page: PageName) -> Option<&History> {
        self.host.histories.iter().find(|history| history.page == page)
    }

    /// The first stale reads.
    pub fn stale(&self) -> impl Iterator<Item = &StaleRead> {
        self.host.stale.iter().chain(self.devices.iter().flat_map(|device| &device.stale))
    }

    /// Everything that is wrong with the run; nothing: it succeeded.
    #[must_use]
    pub fn failings(&self) -> Vec<Failing> {
        let mut failings = Vec::new();
        let stale_reads = self.totals().stale_reads;
        if stale_reads > 0 {
            failings.push(Failing::StaleReads(stale_reads));
        }
        let Totals { lost_writes, lost_young, .. } = self.totals();
        if lost_writes > 0 {
            failings.push(Failing::LostWrites(lost_writes));
        }
        if lost_young > 0 {
            failings.push(Failing::LostYoung(lost_young));
        }
        if self.host.stale_writes > 0 {
            failings.push(Failing::StaleWrites(self.host.stale_writes));
        }
        if self.host.against_young > 0 {
            failings.push(Failing::AgainstYoung(self.host.against_young));
        }
        // A run that was broken on purpose has shown what it was to show, or has not.
        if self.plan.rule.is_some() {
            if stale_reads + lost_writes + lost_young == 0 {
                failings.push(Failing::BreakNotFound);
            }
            return failings;
        }
        if self.host.left_behind.is_some() {
            failings.push(Failing::LeftBehind);
        }
        for (index, device) in self.devices.iter().enumerate() {
            if device.reads == 0 || device.tlb_hits == 0 {
                failings.push(Failing::SilentDevice(index));
            }
        }
        for path in &self.plan.paths {
            let tally = self.path(*path);
            if tally.operations == 0 {
                failings.push(Failing::NoOperations(*path));
            } else if path.has_rounds() && (tally.rounds == 0 || tally.notices == 0) {
                failings.push(Failing::NoRounds(*path));
            } else if path.has_reads() && self.reads_after(*path) == 0 {
                failings.push(Failing::NoReads(*path));
            } else if path.asks_young() && tally.asked_young == 0 {
                failings.push(Failing::NoQuestions(*path));
            }
        }
        failings
    }
}

impl Failing {
    /// Whether a device, or the CPU, has seen or changed what was not its own any more, or has lost what was.
    #[must_use]
    pub const fn is_wrong(self) -> bool {
        matches!(
            self,
            Self::StaleReads(_)
                | Self::LostWrites(_)
                | Self::LostYoung(_)
                | Self::StaleWrites(_)
                | Self::AgainstYoung(_)
        )
    }
}

impl fmt::Display for Failing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::StaleReads(count) => write!(f, "{count} stale reads"),
            Self::LostWrites(count) => write!(f, "{count} lost writes"),
            Self::LostYoung(count) => write!(f, "{count} lost young bits"),
            Self::StaleWrites(count) => write!(f, "{count} writes to free frames"),
            Self::AgainstYoung(count) => {
                write!(f, "{count} collapses against the answer of test_young")
            }
            Self::NoQuestions(path) => write!(f, "{path} never asked test_young: nothing is shown of it"),
            Self::NoOperations(path) => write!(f, "{path} was asked for and never done"),
            Self::NoRounds(path) => write!(f, "{path} never waited for a device: nothing is shown of it"),
            Self::NoReads(path) => {
                write!(f, "no device read what {path} had released: nothing is shown of it")
            }
            Self::SilentDevice(index) => {
                write!(f, "device {index} read nothing through a translation that it held: it shows nothing")
            }
            Self::LeftBehind => {
                f.write_str("the memory source held something when every address space had exited")
            }
            Self::BreakNotFound => f.write_str("a rule was broken and the checker did not find it"),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::rule::Rule;

    /// A run on which nothing is wrong.
    pub(crate) fn good() -> Outcome {
        let tally = PathTally { operations: 5, rounds: 4, notices: 3, asked_young: 2, young: 1 };
        let device = DeviceReport {
            reads: 80,
            tlb_hits: 9,
            reads_after: vec![10; Path::EVERY.len()],
            ..DeviceReport::default()
        };
        Outcome {
            plan: Plan {
                socket: "/tmp/s".into(),
                directory: "/tmp".into(),
                seed: 7,
                devices: 1,
                address_spaces: 1,
                pages: 1,
                threads: 1,
                memory_limit_pages: 0,
                paths: Path::EVERY.to_vec(),
                rule: None,
                pause: std::time::Duration::ZERO,
                flush_time: "none".to_owned(),
                slow_flush_time: None,
                workers: 1,
                write_percent: 0,
                cache_pages: 0,
                shards: 1,
            },
            seconds: 1.0,
            stopped_early: false,
            host: HostReport { paths: vec![tally; Path::EVERY.len()], ..HostReport::default() },
            devices: vec![device],
        }
    }

    #[test]
    fn a_run_without_a_stale_read_that_has_seen_every_path_succeeds() {
        assert_eq!(good().failings(), []);
    }

    #[test]
    fn a_path_without_rounds_notices_or_reads_is_told_and_fails_the_run() {
        let mut run = good();
        run.host.paths[Path::Munmap.index()].rounds = 0;
        run.host.paths[Path::Cow.index()].notices = 0;
        run.host.paths[Path::Map.index()].operations = 0;
        run.devices[0].reads_after[Path::Exit.index()] = 0;
        run.host.paths[Path::Write.index()].rounds = 0;
        let failings = run.failings();
        assert_eq!(
            failings,
            [
                Failing::NoOperations(Path::Map),
                Failing::NoRounds(Path::Cow),
                Failing::NoRounds(Path::Munmap),
                Failing::NoReads(Path::Exit),
            ],
            "a store in place has no rounds, and need not have"
        );
        assert!(!failings.iter().any(|failing| failing.is_wrong()));
    }

    #[test]
    fn a_collapse_that_never_asked_shows_nothing_and_one_against_the_answer_is_wrong() {
        let mut run = good();
        run.host.paths[Path::Collapse.index()].asked_young = 0;
        assert_eq!(run.failings(), [Failing::NoQuestions(Path::Collapse)]);
        assert!(!Failing::NoQuestions(Path::Collapse).is_wrong());
        let mut run = good();
        run.host.against_young = 1;
        assert_eq!(run.failings(), [Failing::AgainstYoung(1)]);
        assert!(Failing::AgainstYoung(1).is_wrong());
    }

    #[test]
    fn a_device_that_read_nothing_through_its_tlb_fails_the_run() {
        let mut run = good();
        run.devices[0].tlb_hits = 0;
        assert_eq!(run.failings(), [Failing::SilentDevice(0)]);
    }

    #[test]
    fn a_break_that_only_a_write_has_shown_is_not_found() {
        let mut run = good();
        run.plan.rule = Some(Rule::FlushAfterAck);
        run.host.stale_writes = 1;
        assert!(run.failings().contains(&Failing::BreakNotFound));
    }

    #[test]
    fn a_stale_read_of_a_device_or_of_the_cpu_fails_the_run_and_so_does_a_stale_write() {
        let mut run = good();
        run.devices[0].stale_reads = 2;
        run.host.stale_reads = 1;
        run.host.stale_writes = 4;
        assert_eq!(run.failings(), [Failing::StaleReads(3), Failing::StaleWrites(4)]);
    }

    #[test]
    fn a_break_that_was_not_found_fails_the_run() {
        let mut run = good();
        run.plan.rule = Some(Rule::GrantInWindow);
        assert_eq!(run.failings(), [Failing::BreakNotFound]);
    }

    #[test]
    fn what_is_left_behind_fails_the_run() {
        let mut run = good();
        run.host.left_behind = Some("a frame".to_owned());
        assert_eq!(run.failings(), [Failing::LeftBehind]);
    }

    #[test]
    fn what_devices_wrote_or_used_and_nobody_knows_of_fails_the_run() {
        let mut run = good();
        run.devices[0].lost_writes = 2;
        run.devices[0].dirty_lost = 1;
        run.host.lost_young = 5;
        let failings = run.failings();
        assert_eq!(failings, [Failing::LostWrites(3), Failing::LostYoung(5)]);
        assert!(failings.iter().all(|failing| failing.is_wrong()));
        run.plan.rule = Some(Rule::YoungBitsDropped);
        assert!(!run.failings().contains(&Failing::BreakNotFound));
    }

    #[test]
    fn the_history_of_what_went_wrong_first_ends_with_what_was_found() {
        let page = PageName { slot: 1, page: 2 };
        let lost = |at| LostWrite {
            found_by: "device-0".to_owned(),
            address_space: 3,
            address: 0x1000,
            written: 9,
            found: None,
            after: Path::Swapout,
            page,
            at,
        };
        let stored = Happened {
            at: 4,
            what: "swapout".to_owned(),
            address_space: 3,
            seq: Some(8),
            version: None,
            device: None,
            waited_for: None,
        };
        let mut run = good();
        run.devices[0].lost = vec![lost(20), lost(10)];
        run.host.histories = vec![History { page, happened: vec![stored] }];
        let told: Vec<u64> = run.shortest_history().iter().map(|happened| happened.at).collect();
        assert_eq!(told, [4, 10]);
        assert!(good().shortest_history().is_empty());
    }
}
