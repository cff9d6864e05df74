//! The processes of a run end with it, and so do its files.

#![allow(clippy::unwrap_used, reason = "a test helper fails as its test does")]

mod util;

use std::io::Read as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use util::program;

/// Far more than any of it takes.
const BOUND: Duration = Duration::from_secs(20);

/// A run in a directory for temporary files of its own.
struct Started {
    process: Child,
    dir: tempfile::TempDir,
}

impl Started {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut command = program(&["check", "--seconds", "300", "--devices", "2"]);
        let process = command.env("TMPDIR", dir.path()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
        let started = Self { process: process.unwrap(), dir };
        // The host agent and two devices: they run when the floor file is there and the last one was started.
        until("the agents run", || started.agents().len() == 3);
        started
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.process), signal).unwrap();
    }

    /// The processes whose parent is the run.
    fn agents(&self) -> Vec<u32> {
        children_of(self.process.id())
    }

    fn files(&self) -> Vec<PathBuf> {
        std::fs::read_dir(self.dir.path()).unwrap().map(|entry| entry.unwrap().path()).collect()
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

fn children_of(parent: u32) -> Vec<u32> {
    let numbered = std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    numbered.filter(|pid| parent_of(*pid) == Some(parent)).collect()
}

/// `None`: it is gone, or nobody has asked how it ended.
fn parent_of(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let state = fields.next()?;
    fields.next()?.parse().ok().filter(|_| state != "Z")
}

fn until(what: &str, mut reached: impl FnMut() -> bool) {
    let began = shootdown_client::Clock::boottime().now();
    while !reached() {
        let waited = shootdown_client::Clock::boottime().now().since(began);
        assert!(waited < BOUND, "not within {BOUND:?}: {what}");
        std::thread::park_timeout(Duration::from_millis(10));
    }
}

#[test]
fn agents_die_with_a_parent_that_is_killed() {
    let mut started = Started::new();
    let agents = started.agents();
    started.signal(Signal::KILL);
    started.process.wait().unwrap();
    until("the agents are gone", || agents.iter().all(|pid| parent_of(*pid).is_none()));
}

#[test]
fn a_run_that_is_told_to_end_leaves_neither_processes_nor_files() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut started = Started::new();
        let agents = started.agents();
        started.signal(signal);
        let ended = started.process.wait().unwrap();
        assert_eq!((ended.code(), ended.signal()), (Some(70), None));
        until("the agents are gone", || agents.iter().all(|pid| parent_of(*pid).is_none()));
        assert_eq!(started.files(), Vec::<PathBuf>::new());
    }
}

#[test]
fn a_run_whose_agent_dies_fails_says_so_and_leaves_nothing() {
    let mut started = Started::new();
    let agents = started.agents();
    let agent = Pid::from_raw(agents[1].cast_signed()).unwrap();
    kill_process(agent, Signal::KILL).unwrap();
    let ended = started.process.wait().unwrap();
    assert_eq!(ended.code(), Some(70));
    let mut told = String::new();
    started.process.stderr.take().unwrap().read_to_string(&mut told).unwrap();
    assert!(told.contains("agent") && told.contains("SIGKILL"), "{told}");
    until("the agents are gone", || agents.iter().all(|pid| parent_of(*pid).is_none()));
    assert_eq!(started.files(), Vec::<PathBuf>::new());
}
