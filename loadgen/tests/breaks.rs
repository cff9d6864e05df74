//! Each broken rule is found, by itself and for what it is.

mod util;

use util::{Run, check};

/// Bounds the run; a stale read ends it, mostly within the first second.
const SECONDS: &str = "30";

fn found(rule: &str, more: &[&str]) -> Run {
    let run = check(&[&["--seconds", SECONDS, "--seed", "11", "--break", rule], more].concat());
    assert_eq!(run.code, Some(1), "{run:#?}");
    assert!(run.number("/stale_reads") > 0, "{run:#?}");
    assert_eq!(run.json["break"], rule);
    assert_eq!(run.json["passed"], false);
    assert_eq!(run.json["stopped_early"], true, "there is nothing more to find");
    let told = &run.json["stale"][0];
    let found = told["found"].is_object() || told["found"].is_string();
    assert!(found && told["address"].is_u64() && told["device"].is_string(), "{run:#?}");
    run
}

#[test]
fn pages_that_are_released_before_the_acks_are_found() {
    found("release-before-ack", &[]);
}

/// Nobody writes, or the others would read what the one that skips has written to their pages.
#[test]
fn a_device_that_skips_its_flushes_is_found_and_it_is_that_device() {
    let run = found("skip-one-target", &["--write-ratio", "0"]);
    let who = run.json["stale"].as_array().expect("stale reads are told");
    assert!(who.iter().all(|stale| stale["device"] == "device-0"), "{run:#?}");
}

#[test]
fn devices_that_ack_first_and_flush_afterwards_are_found() {
    found("flush-after-ack", &[]);
}

#[test]
fn grants_inside_a_bracket_are_found() {
    found("grant-in-window", &[]);
}

/// Only the paths that clear entries inside a bracket can show it.
#[test]
fn grants_inside_a_bracket_are_found_by_madv_dontneed_alone() {
    let args = ["--paths", "dontneed", "--seconds", SECONDS, "--seed", "3", "--break", "grant-in-window"];
    let run = check(&args);
    assert_eq!(run.code, Some(1), "{run:#?}");
    assert!(run.number("/paths/dontneed/notices") > 0, "{run:#?}");
}

/// Nothing in the programs that people run knows of breaks.
#[test]
fn no_other_program_has_a_break() {
    for program in ["shootdownd", "shootdown-agent"] {
        // Built only where the whole workspace is.
        let path = util::beside(program);
        if !path.exists() {
            continue;
        }
        let bytes = std::fs::read(&path).expect("a program that was built can be read");
        for rule in ["release-before-ack", "skip-one-target", "flush-after-ack", "grant-in-window"] {
            let has = bytes.windows(rule.len()).any(|window| window == rule.as_bytes());
            assert!(!has, "{program} knows of {rule}");
        }
        let output = std::process::Command::new(&path).args(["--break", "release-before-ack"]).output();
        let output = output.expect("a program that was built can be started");
        assert_eq!(output.status.code(), Some(2), "{program} must refuse --break");
    }
}
