//! `run` against a host agent of its own process.

#![allow(clippy::unwrap_used, reason = "a test helper fails as its test does")]

mod util;

use shootdown_server::config::{Settings, Span};
use shootdown_server::{ListenAddr, Running};
use util::run;

struct HostAgent {
    dir: tempfile::TempDir,
    _running: Running,
}

impl HostAgent {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = |name: &str| vec![ListenAddr::Unix(dir.path().join(name))];
        let settings = Settings {
            listen: socket("device"),
            source_listen: socket("source"),
            shards: Some(1),
            drain_timeout: Some(Span(std::time::Duration::from_secs(1))),
            ..Settings::default()
        };
        let running = shootdown_server::start(settings.resolve().unwrap()).unwrap();
        Self { dir, _running: running }
    }

    fn run(&self, args: &[&str]) -> util::Run {
        let socket = |name: &str| format!("unix:{}", self.dir.path().join(name).display());
        let (source, device) = (socket("source"), socket("device"));
        let ends = ["run", "--output", "json", "--source", &source, "--device-endpoint", &device];
        run(&[&ends, args].concat())
    }
}

#[test]
fn an_open_loop_sends_as_many_rounds_as_were_asked_for() {
    let host = HostAgent::start();
    let log = host.dir.path().join("run.hlog");
    let hlog = log.display().to_string();
    let args = ["--rate", "40", "--seconds", "2", "--warm-up", "0.5", "--devices", "2", "--hlog", &hlog];
    let run = host.run(&args);
    // A machine that is busy with something else may make it late, and it says so.
    let code = if run.json["valid"] == true { 0 } else { 70 };
    assert_eq!(run.code, Some(code), "{run:#?}");
    assert_eq!(run.json["loop"], "open");
    assert_eq!(run.number("/rounds"), 80, "the warm-up is left out");
    assert_eq!((run.number("/failed"), run.number("/unanswered")), (0, 0));
    let log = std::fs::read_to_string(log).unwrap();
    assert!(log.lines().any(|line| line.contains("HIST")), "{log}");
}

#[test]
fn a_generator_that_cannot_keep_up_says_that_its_figures_are_not_valid() {
    let host = HostAgent::start();
    let run = host.run(&["--rate", "1000000", "--seconds", "0.5", "--warm-up", "0.1"]);
    assert_eq!(run.code, Some(70), "{run:#?}");
    assert_eq!(run.json["valid"], false);
    assert!(run.number("/unanswered") > 0);
}

#[test]
fn a_closed_loop_takes_range_sizes_in_turn() {
    let host = HostAgent::start();
    let args = ["--closed-loop", "2", "--seconds", "1", "--warm-up", "0.2", "--range-pages", "1,512"];
    let run = host.run(&args);
    assert_eq!(run.code, Some(0), "{run:#?}");
    assert_eq!(run.json["range_pages"], serde_json::json!([1, 512]));
    assert!(run.number("/rounds") > 10 && run.json["asked_per_s"].is_null(), "{run:#?}");
}
