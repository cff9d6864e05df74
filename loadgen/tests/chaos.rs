//! Faults into real processes: nothing is stale, lost or released too early, and each broken rule is found.

mod util;

use std::os::unix::fs::symlink;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use util::{PROGRAM, Run, program, run};

/// Leases that a machine which does other things too keeps: what is shown here is not how short they can be.
const LEASES: [&str; 4] = ["--lease", "1s", "--ack-timeout", "500ms"];

/// Bounds a run that breaks a rule; what is found ends it, mostly within seconds.
const SECONDS: &str = "60";

/// Until something is so; each look is this long after the one before.
const TICK: Duration = Duration::from_millis(10);

fn chaos(args: &[&str]) -> Run {
    run(&[&["chaos", "--output", "json", "--seed", "11"], &LEASES[..], args].concat())
}

/// Whatever was injected.
fn assert_nothing_is_wrong(run: &Run) {
    assert_eq!(run.code, Some(0), "{run:#?}");
    assert_eq!(run.json["passed"], true, "{run:#?}");
    for none in ["/stale_reads", "/lost_writes", "/host/releases_in_grace", "/host/second_outcomes"] {
        assert_eq!(run.number(none), 0, "{none}: {run:#?}");
    }
    for some in ["/devices/reads", "/devices/writes", "/host/rounds", "/host/releases"] {
        assert!(run.number(some) > 0, "{some}: {run:#?}");
    }
}

#[test]
fn nothing_is_stale_or_lost_whatever_happens_to_the_devices_and_the_host_agent() {
    let run = chaos(&["--seconds", "8"]);
    assert_nothing_is_wrong(&run);
    let faults = run.json["faults"].as_object().expect("faults are told by kind");
    let left_out = run.json["left_out"].as_array().expect("so is what was left out");
    assert!(faults.len() + left_out.len() >= 5, "several kinds in 8 seconds: {run:#?}");
    let seconds: f64 = run.json["longest_round_ms"].as_f64().expect("the longest round is told");
    assert!(seconds <= run.json["limit_ms"].as_f64().expect("so is its limit"));
    assert!(run.json["repeat"].as_str().is_some_and(|command| command.contains("--seed 11")));
}

#[test]
fn a_host_agent_that_is_killed_again_and_again_releases_nothing_early_and_answers_each_call_once() {
    let run = chaos(&["--only", "host-kill", "--count", "6"]);
    assert_nothing_is_wrong(&run);
    assert_eq!(run.number("/faults/host-kill/injected"), 6);
    assert_eq!(run.number("/faults/host-kill/outcomes/the grace period ended"), 6);
    assert!(run.number("/host/retried_calls") > 0, "a kill meets a call: {run:#?}");
    assert_eq!(run.number("/host/retried_calls"), run.number("/host/retried_with_one_outcome"));
}

#[test]
fn a_device_that_was_stopped_past_its_lease_uses_nothing_and_flushes_before_its_next_grant() {
    let run = chaos(&["--only", "device-stop-past-lease", "--count", "4"]);
    assert_nothing_is_wrong(&run);
    assert_eq!(run.number("/went_on_past_the_lease"), 0);
    assert_eq!(run.number("/devices/grants_before_the_flush"), 0);
    let outcomes = &run.json["faults"]["device-stop-past-lease"]["outcomes"];
    let flushed = ["flushed", "fenced, and flushed"].map(|outcome| outcomes[outcome].as_u64().unwrap_or(0));
    assert_eq!(flushed.iter().sum::<u64>(), 4, "{run:#?}");
}

#[test]
fn a_host_agent_that_was_stopped_past_all_leases_is_refused_when_it_goes_on_beside_its_successor() {
    let run = chaos(&["--only", "host-take-over", "--count", "1"]);
    assert_nothing_is_wrong(&run);
    assert_eq!(run.number("/faults/host-take-over/outcomes/refused"), 1);
    assert_eq!(run.number("/faults/host-take-over/outcomes/the old one ended"), 1);
    assert_eq!(run.number("/acted_though_replaced"), 0);
}

#[test]
fn a_planned_restart_flushes_nobody() {
    let run = chaos(&["--only", "host-restart", "--count", "2"]);
    assert_nothing_is_wrong(&run);
    assert_eq!(run.number("/faults/host-restart/outcomes/resumed"), 6, "three devices, twice: {run:#?}");
}

#[test]
fn a_call_that_is_refused_for_want_of_room_stays_refused_when_there_is_room() {
    // While devices are gone the moves fill the host agent, and when they are fenced there is room again.
    let run = chaos(&["--only", "device-stop-past-lease", "--count", "4"]);
    assert_nothing_is_wrong(&run);
    assert!(run.number("/host/refused_for_want_of_room") > 0, "{run:#?}");
    assert!(run.number("/host/refused_again") > 0, "{run:#?}");
}

/// The content check finds it, and what is found ends the run.
fn is_found(rule: &str) {
    let run = run(&["chaos", "--output", "json", "--seed", "11", "--seconds", SECONDS, "--break", rule]);
    assert_eq!(run.code, Some(1), "{run:#?}");
    assert_eq!(run.json["break"], rule);
    assert_eq!(run.json["passed"], false);
    assert!(run.number("/stale_reads") + run.number("/lost_writes") > 0, "{run:#?}");
    assert!(run.json["findings"].as_array().is_some_and(|findings| !findings.is_empty()), "{run:#?}");
    let seconds: f64 = SECONDS.parse().expect("it is a number");
    assert!(run.json["seconds"].as_f64().is_some_and(|took| took < seconds), "there is nothing more to find");
}

#[test]
fn a_lease_on_a_clock_that_stands_still_is_found() {
    is_found("lease");
}

#[test]
fn a_resume_that_skips_the_flush_is_found() {
    is_found("resume-skips-flush");
}

#[test]
fn a_restart_without_its_journal_is_found() {
    is_found("no-grace");
}

#[test]
fn a_timeout_that_is_taken_for_an_ack_is_found() {
    is_found("timeout-is-ack");
}

#[test]
fn a_broken_rule_that_no_fault_shows_is_not_found_and_the_run_has_not_passed() {
    const NOT_FOUND: &str = "a rule was broken and the checker did not find it";
    // A device that is killed keeps nothing that it could go on with.
    let broken = ["--break", "resume-skips-flush", "--only", "device-kill", "--count", "1"];
    let run = chaos(&broken);
    assert_eq!(run.code, Some(70), "{run:#?}");
    assert_eq!(run.json["passed"], false);
    assert!(
        run.json["failings"].as_array().is_some_and(|failings| failings.iter().any(|it| it == NOT_FOUND))
    );
    let mut told = program(&[&["chaos", "--seed", "11"], &LEASES[..], &broken].concat());
    let told = told.output().expect("the program can be started");
    let text = String::from_utf8_lossy(&told.stdout);
    assert_eq!(told.status.code(), Some(70), "{text}");
    assert!(text.contains(&format!("FAILED: {NOT_FOUND}")) && !text.contains("passed"), "{text}");
}

/// Programs of the run's own, and no others: not `ip`, not `nft`.
fn without_networks(args: &[&str]) -> (Option<i32>, serde_json::Value, String) {
    let bin = tempfile::tempdir().expect("a directory can be made");
    symlink("/bin/sh", bin.path().join("sh")).expect("a link can be made");
    let mut command = program(&[&["chaos", "--output", "json"], &LEASES[..], args].concat());
    let output = command.env("PATH", bin.path()).output().expect("the program can be started");
    let json = serde_json::from_slice(&output.stdout).unwrap_or_default();
    (output.status.code(), json, String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn faults_that_cannot_be_injected_here_are_left_out_and_the_report_says_so() {
    let (code, json, stderr) = without_networks(&["--only", "partition,device-stop", "--seconds", "3"]);
    assert_eq!(code, Some(0), "{json:#}\n{stderr}");
    assert_eq!(json["left_out"][0]["fault"], "partition");
    assert!(json["left_out"][0]["because"].as_str().is_some_and(|because| !because.is_empty()));
    assert!(json["faults"]["device-stop"]["injected"].as_u64() > Some(0), "{json:#}");
    let (code, _, stderr) = without_networks(&["--only", "partition", "--seconds", "3"]);
    assert_eq!(code, Some(70), "nothing would be shown");
    assert!(stderr.contains("none of the faults can be injected"), "{stderr}");
}

#[test]
fn a_fault_that_there_is_not_is_a_wrong_command_line() {
    assert_eq!(chaos(&["--only", "earthquake"]).code, Some(2));
}

#[test]
fn leases_and_margins_that_cannot_go_together_are_a_wrong_command_line() {
    for (wrong, told) in [
        (["--lease", "50ms", "--lease-margin", "50ms"], "shorter than the lease less its drift"),
        (["--lease", "10ms", "--ack-timeout", "50ms"], "from 50ms to 1h"),
        (["--ack-timeout", "0s", "--lease", "1s"], "longer than 0"),
    ] {
        let run = run(&[&["chaos", "--output", "json", "--seconds", "1"], &wrong[..]].concat());
        assert_eq!(run.code, Some(2), "{wrong:?}: {run:#?}");
        assert!(run.stderr.contains(told), "{wrong:?}: {run:#?}");
    }
}

#[test]
fn the_shortest_lease_that_a_host_agent_takes_has_the_margin_that_it_gives_it() {
    // What is found with margins of 5 ms is the machine's affair: it runs, and the run says with what.
    let short = ["chaos", "--output", "json", "--lease", "50ms", "--ack-timeout", "50ms"];
    let run = run(&[&short[..], &["--only", "connection-reset", "--count", "2"]].concat());
    assert!(
        run.json["repeat"].as_str().is_some_and(|repeat| repeat.contains("--lease-margin 5ms")),
        "{run:#?}"
    );
    assert!(run.number("/devices/reads") > 0 && run.number("/host/rounds") > 0, "{run:#?}");
}

#[test]
fn no_process_is_left_behind_when_the_run_is_killed() {
    let mut started = program(&["chaos", "--only", "device-stop", "--seconds", "60"]);
    let mut chaos = started.stdout(std::process::Stdio::null()).spawn().expect("the program can be started");
    // The host agent and three devices.
    let children = until(|| Some(children_of(&chaos)).filter(|children| children.len() >= 4));
    let pid = Pid::from_child(&chaos);
    kill_process(pid, Signal::KILL).expect("it can be killed");
    let status = chaos.wait().expect("it can be waited for");
    assert_eq!(status.signal(), Some(Signal::KILL.as_raw()));
    until(|| children.iter().all(|child| !runs(child)).then_some(()));
}

fn until<T>(mut look: impl FnMut() -> Option<T>) -> T {
    for _ in 0..3000 {
        if let Some(seen) = look() {
            return seen;
        }
        // Nobody tells of another's children.
        let _ = Command::new("sleep").arg(format!("{}", TICK.as_secs_f64())).status();
    }
    panic!("it did not come to that");
}

fn children_of(parent: &Child) -> Vec<String> {
    let tasks = format!("/proc/{0}/task/{0}/children", parent.id());
    let children = std::fs::read_to_string(tasks).unwrap_or_default();
    children.split_whitespace().map(str::to_owned).filter(|child| is_ours(child)).collect()
}

fn is_ours(pid: &str) -> bool {
    std::fs::read(Path::new("/proc").join(pid).join("cmdline"))
        .is_ok_and(|line| String::from_utf8_lossy(&line).contains(PROGRAM))
}

/// A zombie has ended; its parent is to look after it.
fn runs(pid: &str) -> bool {
    let stat = std::fs::read_to_string(Path::new("/proc").join(pid).join("stat")).unwrap_or_default();
    is_ours(pid) && !stat.contains(") Z ")
}
