//! Whole runs without a break: real processes, real sockets, real memory.

mod util;

use util::{Run, check};

/// Those that take something from devices.
const TAKING: [&str; 17] = [
    "fork",
    "snapshot",
    "cow",
    "placeholder",
    "aging",
    "writeback",
    "swapout",
    "migrate",
    "cluster",
    "munmap",
    "dontneed",
    "truncate",
    "exit",
    "mremap",
    "mprotect",
    "collapse",
    "ksm",
];

fn nothing_is_wrong(run: &Run) {
    for what in ["/stale_reads", "/stale_writes", "/lost_writes", "/lost_young", "/against_young"] {
        assert_eq!(run.number(what), 0, "{what}: {run:#?}");
    }
}

#[test]
fn every_path_is_seen_and_no_read_is_stale() {
    let run = check(&["--all", "--seconds", "10", "--patience", "60s", "--seed", "5"]);
    assert_eq!(run.code, Some(0), "{run:#?}");
    assert_eq!(run.number("/version"), 2);
    nothing_is_wrong(&run);
    assert!(run.number("/reads") > 0 && run.number("/copy_reads") > 0 && run.number("/writes") > 0);
    assert!(run.number("/tlb_hits") > 0 && run.number("/faults") > 0 && run.number("/flushes") > 0);
    for path in ["map", "read", "write"] {
        assert!(run.number(&format!("/quiet_paths/{path}")) > 0, "{path}: {run:#?}");
    }
    for path in TAKING {
        for what in ["operations", "rounds", "notices"] {
            assert!(run.number(&format!("/paths/{path}/{what}")) > 0, "{path} {what}: {run:#?}");
        }
        // Aging does not say which pages it has asked for.
        assert!(path == "aging" || run.number(&format!("/paths/{path}/reads")) > 0, "{path}: {run:#?}");
        for what in ["stale_reads", "lost_writes"] {
            assert_eq!(run.number(&format!("/paths/{path}/{what}")), 0, "{path} {what}: {run:#?}");
        }
    }
    let young = |what: &str| run.number(&format!("/paths/collapse/test_young/{what}"));
    assert!(young("yes") > 0 && young("no") > 0 && young("asked") == young("yes") + young("no"), "{run:#?}");
    assert!(run.number("/page_tables_freed") > 0, "{run:#?}");
    for branch in ["cow_reuse", "cow_copy", "swap_in"] {
        assert!(run.number(&format!("/branches/{branch}")) > 0, "{branch}: {run:#?}");
    }
    // Whether somebody comes too late, or at a bad time, is chance.
    for branch in ["cow_lost_race", "swap_fail", "swap_again"] {
        run.number(&format!("/branches/{branch}"));
    }
    for stage in ["dispatch", "stream", "flush", "ack", "completion", "release", "round"] {
        assert!(run.number(&format!("/stages/{stage}/count")) > 0, "{stage}: {run:#?}");
    }
    let repeat = run.json["repeat"].as_str().expect("the command that repeats it");
    assert!(repeat.contains("--seed 5 ") && repeat.contains("--seconds 10 "), "{repeat}");
}

#[test]
fn a_demo_ends_with_the_command_that_repeats_it() {
    let args = ["demo", "--seconds", "1", "--seed", "9", "--paths", "dontneed", "--devices", "1"];
    let output = util::program(&args).output().expect("the program can be started");
    let told = String::from_utf8(output.stdout).expect("a report is text");
    let last = told.lines().last().expect("there is a report");
    assert!(last.starts_with("repeat: shootdown-loadgen check --seed 9 --seconds 1 --devices 1 "), "{told}");
    assert!(last.ends_with("--paths dontneed"), "{told}");
}

#[test]
fn chosen_paths_are_done_and_others_are_not() {
    let run = check(&[
        "--seconds",
        "2",
        "--patience",
        "60s",
        "--seed",
        "1",
        "--paths",
        "dontneed,read",
        "--devices",
        "1",
    ]);
    assert_eq!(run.code, Some(0), "{run:#?}");
    assert!(run.number("/paths/dontneed/notices") > 0 && run.number("/quiet_paths/read") > 0);
    for path in TAKING.iter().filter(|path| **path != "dontneed") {
        assert_eq!(run.number(&format!("/paths/{path}/operations")), 0, "{path}");
    }
}

/// As long as each of them needs, on a machine that is busy too, to show something of every path.
#[test]
fn ten_short_runs_show_something_of_every_path_and_nothing_is_stale_or_lost() {
    for seed in 100..110 {
        let run = check(&["--all", "--seconds", "2", "--patience", "60s", "--seed", &seed.to_string()]);
        assert_eq!(run.code, Some(0), "seed {seed}: {run:#?}");
        nothing_is_wrong(&run);
        assert!(run.number("/reads") > 0 && run.number("/writes") > 0, "seed {seed}: {run:#?}");
    }
}

/// Not half of the pages fit: reclaim runs by itself, beside everything else.
#[test]
fn nothing_is_stale_or_lost_where_memory_is_short() {
    let limit = ["--memory-limit-pages", "150", "--address-spaces", "2", "--devices", "2"];
    let paths = ["--paths", "map,read,write,fork,cow,munmap,dontneed,swapout,writeback,placeholder"];
    let run = check(&[&["--seconds", "5", "--patience", "60s", "--seed", "4"], &limit[..], &paths].concat());
    assert_eq!(run.code, Some(0), "{run:#?}");
    nothing_is_wrong(&run);
    assert!(run.number("/paths/swapout/notices") > 0, "{run:#?}");
}

/// Many workers on few pages and no pause: most reads meet an operation.
#[test]
fn no_read_is_stale_where_reads_and_operations_crowd() {
    let crowd = ["--pages", "8", "--pause", "0ms", "--workers", "8", "--cache-pages", "256"];
    let args = [
        "--seconds",
        "3",
        "--patience",
        "60s",
        "--seed",
        "98",
        "--paths",
        "fork,cow,dontneed",
        "--write-ratio",
        "0.2",
    ];
    let run = check(&[&args[..], &crowd].concat());
    assert_eq!(run.code, Some(0), "{run:#?}");
}

#[test]
fn a_flush_that_takes_its_time_shows_in_the_stage_of_flushes() {
    let args = [
        "--seconds",
        "2",
        "--patience",
        "60s",
        "--seed",
        "2",
        "--paths",
        "dontneed,write",
        "--flush-time",
        "fixed:20ms",
    ];
    let run = check(&args);
    assert_eq!(run.code, Some(0), "{run:#?}");
    let p50 = run.json.pointer("/stages/flush/p50_us").and_then(serde_json::Value::as_f64);
    assert!(p50 >= Some(20_000.0), "{run:#?}");
}

/// A run in which a path had no chance must not count as one that was passed.
#[test]
fn a_run_that_has_shown_nothing_fails() {
    // It ends before the first operation that could be waited for.
    let run = check(&["--seconds", "0.2", "--seed", "2", "--pause", "10s", "--paths", "exit"]);
    assert_eq!(run.code, Some(70), "{run:#?}");
    assert!(run.json["failings"].to_string().contains("exit"), "{run:#?}");
}
