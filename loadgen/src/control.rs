//! What the parent and its agents say to each other: a line of JSON each, on the agents' standard input and
//! output. An agent whose input ends has lost its parent, and ends too.

use std::io::{self, BufRead as _, Write as _};
use std::path::PathBuf;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use shootdown_server::source::memory::MemoryEvents;
use tokio::sync::mpsc;

use crate::check::floor::{FloorError, FloorFile};
use crate::check::history::{History, PageName};
use crate::check::layout::Layout;
use crate::check::lost::{LostWrite, LostYoung, MarkFile, UseFile};
use crate::check::verdict::StaleRead;
use crate::path::Path;
use crate::report::StageSummary;
use crate::rule::Rule;

/// Lines that were read and not handled yet. When it is full the reader waits, and further ones wait in
/// the pipe.
const LINES: usize = 256;

/// What every process of a run must know.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Plan {
    /// The host agent's socket for devices.
    pub socket: PathBuf,
    /// Where the files of the run are.
    pub directory: PathBuf,
    /// Of every random choice.
    pub seed: u64,
    /// Device agents.
    pub devices: usize,
    /// Address spaces, without the children that they fork.
    pub address_spaces: usize,
    /// Pages of each that the CPU stamps: see [`Layout`].
    pub pages: usize,
    /// Threads of the host that work on each.
    pub threads: usize,
    /// The most frames that are used for pages; 0: as many as there are.
    pub memory_limit_pages: usize,
    /// What is exercised.
    pub paths: Vec<Path>,
    /// What is broken.
    pub rule: Option<Rule>,
    /// Between two operations of one address space.
    pub pause: Duration,
    /// How long a flush takes on a device, as shootdown-agent takes it: `fixed:500us`.
    pub flush_time: String,
    /// How long it takes on the first device, if that is slower than the others.
    pub slow_flush_time: Option<String>,
    /// Tasks of each device that read and write.
    pub workers: usize,
    /// How many accesses in a hundred are writes.
    pub write_percent: u32,
    /// Pages that every second device keeps copies of; the others read frames only.
    pub cache_pages: usize,
    /// Runtimes of the host agent.
    pub shards: usize,
}

/// What processes of a run share.
#[derive(Debug)]
pub struct Shared {
    /// What each page must hold at least: from the host.
    pub floors: FloorFile,
    /// What devices have written: from the device that writes the page.
    pub marks: MarkFile,
    /// What devices have used: from each device, in rows of its own.
    pub uses: UseFile,
}

impl Plan {
    /// Where the pages are.
    #[must_use]
    pub fn layout(&self) -> Layout {
        Layout::new(self.address_spaces, self.pages, self.threads, self.devices)
    }

    /// Makes the files that processes share.
    ///
    /// # Errors
    /// [`FloorError::File`].
    pub fn create_shared(&self) -> Result<(), FloorError> {
        let (slots, pages) = (self.layout().slots(), self.layout().pages());
        drop(FloorFile::create(&self.directory.join("floor"), slots, pages)?);
        drop(MarkFile::create(&self.directory.join("marks"), slots, pages)?);
        drop(UseFile::create(&self.directory.join("uses"), slots, pages * self.devices)?);
        Ok(())
    }

    /// Opens them.
    ///
    /// # Errors
    /// [`FloorError::File`].
    pub fn open_shared(&self) -> Result<Shared, FloorError> {
        let pages = self.layout().pages();
        Ok(Shared {
            floors: FloorFile::open(&self.directory.join("floor"), pages)?,
            marks: MarkFile::open(&self.directory.join("marks"), pages)?,
            uses: UseFile::open(&self.directory.join("uses"), pages * self.devices)?,
        })
    }
}

/// The name of a device.
#[must_use]
pub fn device_name(index: usize) -> String {
    format!("device-{index}")
}

/// To an agent.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "snake_case")]
pub enum ToAgent {
    /// First: what to do, and which device this is.
    Plan {
        /// For all.
        plan: Box<Plan>,
        /// 0 for the first device; nothing for the host agent.
        index: usize,
    },
    /// An address space lives in a slot from now on.
    Lives {
        /// The slot.
        slot: usize,
        /// The address space.
        address_space: u64,
    },
    /// It does not any more.
    Ended {
        /// The slot.
        slot: usize,
        /// The address space.
        address_space: u64,
    },
    /// Begin.
    Start,
    /// End, and report.
    Stop {
        /// To the host agent: pages whose history is wanted.
        wanted: Vec<PageName>,
    },
}

/// From an agent.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "snake_case")]
pub enum FromAgent {
    /// It runs, and waits for Start.
    Ready,
    /// From the host agent, for every device agent.
    Lives {
        /// The slot.
        slot: usize,
        /// The address space.
        address_space: u64,
    },
    /// From the host agent, for every device agent.
    Ended {
        /// The slot.
        slot: usize,
        /// The address space.
        address_space: u64,
    },
    /// From a device agent: it hears of the address space.
    Subscribed {
        /// The address space.
        address_space: u64,
    },
    /// So far.
    Progress {
        /// Operations of the host, or checked reads of a device.
        done: u64,
        /// Stale reads, lost writes, lost young bits.
        wrong: u64,
        /// Paths of which there was something to see: operations and rounds on the host, reads on a device.
        shown: Vec<Path>,
    },
    /// Last, from the host agent.
    HostReport(Box<HostReport>),
    /// Last, from a device agent.
    DeviceReport(Box<DeviceReport>),
}

/// What a path did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathTally {
    /// Operations that were completed.
    pub operations: u64,
    /// Rounds that they had to wait for.
    pub rounds: u64,
    /// Notices: the targets of those rounds.
    pub notices: u64,
    /// How often `test_young` was asked, which waits for nobody.
    pub asked_young: u64,
    /// How often the answer was yes.
    pub young: u64,
}

impl PathTally {
    /// Whether the host's side of the path has shown something.
    #[must_use]
    pub const fn shows(&self, path: Path) -> bool {
        self.operations > 0
            && (!path.has_rounds() || self.rounds > 0 && self.notices > 0)
            && (!path.asks_young() || self.asked_young > 0)
    }
}

/// How often a branch of the memory source was taken, by the CPU and on devices' behalf.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Branches {
    /// Copy on write that copied nothing: the page was shared no more.
    pub cow_reuse: u64,
    /// Copy on write that copied.
    pub cow_copy: u64,
    /// Copy on write that came too late.
    pub cow_lost_race: u64,
    /// Pages that came back from the swap file.
    pub swap_in: u64,
    /// Pages that were not taken because they are locked in memory (`SWAP_FAIL`).
    pub swap_fail: u64,
    /// Pages that were not taken because something else held them (`SWAP_AGAIN`).
    pub swap_again: u64,
}

impl From<MemoryEvents> for Branches {
    fn from(events: MemoryEvents) -> Self {
        Self {
            cow_reuse: events.reused,
            cow_copy: events.copied,
            cow_lost_race: events.lost_races,
            swap_in: events.swapped_in,
            swap_fail: events.unmaps_failed,
            swap_again: events.unmaps_busy,
        }
    }
}

/// What the host agent saw.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct HostReport {
    /// By [`Path::index`].
    pub paths: Vec<PathTally>,
    /// Page tables that munmap and exit have freed.
    pub tables_freed: u64,
    /// What the memory source did inside of them.
    pub branches: Branches,
    /// Pages that became a huge one though `test_young` said no, or did not though it said yes.
    pub against_young: u64,
    /// Latencies, in the order of the stages.
    pub stages: Vec<StageSummary>,
    /// Loads by the CPU, all of them checked.
    pub loads: u64,
    /// Those of them that were not what was stored.
    pub stale: Vec<StaleRead>,
    /// How many there were.
    pub stale_reads: u64,
    /// Frames that were written to while they were free.
    pub stale_writes: u64,
    /// Stale reads by what had taken the page last, by [`Path::index`].
    pub stale_after: Vec<u64>,
    /// Writes by devices that were not there any more.
    pub lost_writes: u64,
    /// Those, by what had taken the page last, by [`Path::index`].
    pub lost_after: Vec<u64>,
    /// The first of them.
    pub lost: Vec<LostWrite>,
    /// Uses that a young query did not know of.
    pub lost_young: u64,
    /// The first of them.
    pub young: Vec<LostYoung>,
    /// Of the pages that were asked for.
    pub histories: Vec<History>,
    /// The process's memory while it ran.
    pub memory: Vec<MemorySample>,
    /// What the memory source still held when every address space had exited and every file was closed; nothing,
    /// if it held nothing.
    pub left_behind: Option<String>,
}

/// How much memory the host agent's process took, at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct MemorySample {
    /// Since the host agent was ready.
    pub seconds: f64,
    /// Resident, in KiB, without the frames: they are in a memfd that nobody maps.
    pub rss_kib: u64,
    /// Frames in use.
    pub frames: usize,
}

/// What a device saw.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct DeviceReport {
    /// Reads that were checked.
    pub reads: u64,
    /// Those of them that were answered from a copy.
    pub copy_reads: u64,
    /// Accesses whose translation was there.
    pub tlb_hits: u64,
    /// Accesses that had to fault.
    pub faults: u64,
    /// Accesses that were refused: of holes, and of address spaces that end.
    pub refused: u64,
    /// Writes.
    pub writes: u64,
    /// Reads that a store was under way in.
    pub torn: u64,
    /// Flushes.
    pub flushes: u64,
    /// Checked reads by what had released the page last, by [`Path::index`].
    pub reads_after: Vec<u64>,
    /// Reads that found what had been released.
    pub stale_reads: u64,
    /// Those, by what had taken the page last, by [`Path::index`].
    pub stale_after: Vec<u64>,
    /// The first of them.
    pub stale: Vec<StaleRead>,
    /// Writes of this device that it did not find again.
    pub lost_writes: u64,
    /// Those, by what had taken the page last, by [`Path::index`].
    pub lost_after: Vec<u64>,
    /// The first of them.
    pub lost: Vec<LostWrite>,
    /// Pages that were written and could not be delivered before the session ended.
    pub dirty_lost: u64,
}

/// The lines of an agent's standard input, read on a thread of their own: a runtime cannot be stopped while
/// one of its threads reads. The channel closes where the input ends, or is not JSON.
#[must_use]
pub fn lines<T: DeserializeOwned + Send + 'static>() -> mpsc::Receiver<T> {
    let (tx, rx) = mpsc::channel(LINES);
    // Nobody awaits it: it ends with the process.
    std::thread::spawn(move || {
        for line in io::stdin().lock().lines() {
            let Some(said) = line.ok().and_then(|line| serde_json::from_str(&line).ok()) else { return };
            if tx.blocking_send(said).is_err() {
                return;
            }
        }
    });
    rx
}

/// Says something to the parent.
///
/// # Errors
/// When the parent is gone.
pub fn say(message: &FromAgent) -> io::Result<()> {
    let mut line = serde_json::to_string(message).map_err(io::Error::other)?;
    line.push('\n');
    let mut out = io::stdout().lock();
    out.write_all(line.as_bytes())?;
    out.flush()
}
