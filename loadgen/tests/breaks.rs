//! Each broken rule is found, by itself and for what it is.

mod util;

use clap::ValueEnum as _;
use shootdown_loadgen::rule::Rule;
use util::{Run, check};

/// Bounds the run; what is found ends it, mostly within the first second.
const SECONDS: &str = "60";

/// Of any kind: a stale read, a lost write, a lost young bit.
fn wrong(rule: &str, more: &[&str]) -> Run {
    let run = check(&[&["--seconds", SECONDS, "--seed", "11", "--break", rule], more].concat());
    assert_eq!(run.code, Some(1), "{run:#?}");
    let wrong = ["/stale_reads", "/lost_writes", "/lost_young"].map(|what| run.number(what));
    assert!(wrong.iter().sum::<u64>() > 0, "{run:#?}");
    assert_eq!(run.json["break"], rule);
    assert_eq!(run.json["passed"], false);
    assert_eq!(run.json["stopped_early"], true, "there is nothing more to find");
    let history = run.json["history"].as_array().expect("what led to it is told");
    let found = history.last().expect("it ends with what was found");
    assert!(found["device"].is_string() && found["at"].is_u64(), "{run:#?}");
    let times: Vec<Option<u64>> = history.iter().map(|happened| happened["at"].as_u64()).collect();
    assert!(times.is_sorted(), "{run:#?}");
    for happened in history {
        // No run has as many events: such a sequence would be one that the host agent never gave.
        assert!(happened["seq"].is_null() || happened["seq"].as_u64() < Some(1 << 32), "{run:#?}");
        for waited_for in happened["waited_for"].as_array().into_iter().flatten() {
            let (device, outcome) = (&waited_for["device"], &waited_for["outcome"]);
            assert!(device.as_str().is_some_and(|device| device.starts_with("device-")), "{run:#?}");
            assert!(["acked", "left", "fenced", "waiting"].iter().any(|known| outcome == known), "{run:#?}");
        }
    }
    let repeat = run.json["repeat"].as_str().expect("the command that repeats it");
    assert!(repeat.contains("--seed 11 ") && repeat.ends_with(rule), "{repeat}");
    run
}

fn found(rule: &str, more: &[&str]) -> Run {
    let run = wrong(rule, more);
    assert!(run.number("/stale_reads") > 0, "{run:#?}");
    let told = &run.json["stale"][0];
    let found = told["found"].is_object() || told["found"].is_string();
    assert!(found && told["address"].is_u64() && told["device"].is_string(), "{run:#?}");
    run
}

/// Whether the history tells of it.
fn tells(run: &Run, of: &str) -> bool {
    let history = run.json["history"].as_array().expect("what led to it is told");
    history.iter().any(|happened| happened["what"].as_str().is_some_and(|what| what.contains(of)))
}

#[test]
fn pages_that_are_released_before_the_acks_are_found() {
    let run = wrong("release-before-ack", &[]);
    assert!(tells(&run, "goes on before it has asked"), "{run:#?}");
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
    let run = wrong("flush-after-ack", &[]);
    let history = run.json["history"].as_array().expect("what led to it is told");
    let acked = |happened: &serde_json::Value| {
        let mut waited_for = happened["waited_for"].as_array().into_iter().flatten();
        waited_for.any(|device| device["outcome"] == "acked") && happened["seq"].is_u64()
    };
    assert!(history.iter().any(acked), "the round that was acked too early is told: {run:#?}");
}

#[test]
fn grants_inside_a_bracket_are_found() {
    wrong("grant-in-window", &[]);
}

/// Only the paths that clear entries inside a bracket can show it.
#[test]
fn grants_inside_a_bracket_are_found_by_madv_dontneed_alone() {
    let run = wrong("grant-in-window", &["--paths", "dontneed"]);
    assert!(run.number("/paths/dontneed/notices") > 0, "{run:#?}");
}

#[test]
fn a_page_that_is_copied_and_released_before_devices_hear_of_it_is_found() {
    wrong("cow-free-before-notify", &[]);
}

#[test]
fn a_placeholder_that_devices_keep_is_found() {
    found("placeholder-not-invalidated", &[]);
}

#[test]
fn young_bits_that_are_dropped_are_found() {
    let run = wrong("young-bits-dropped", &[]);
    assert!(run.number("/lost_young") > 0, "{run:#?}");
    assert_eq!(run.number("/stale_reads"), 0, "a page that seems unused is as right as ever: {run:#?}");
}

#[test]
fn leave_to_write_that_is_kept_after_a_write_back_is_found() {
    let run = wrong("write-kept-after-mkclean", &[]);
    assert!(run.number("/lost_writes") > 0, "{run:#?}");
}

#[test]
fn a_page_that_is_swapped_out_and_mistaken_for_one_that_stays_is_found() {
    wrong("swap-fail-mistaken", &[]);
}

#[test]
fn a_migration_that_nobody_hears_of_is_found() {
    let run = wrong("migrate-not-notified", &[]);
    assert!(tells(&run, "migrate goes on and never asked"), "{run:#?}");
}

#[test]
fn a_cluster_that_is_unmapped_outside_of_its_bracket_is_found() {
    wrong("cluster-outside-bracket", &[]);
}

#[test]
fn pages_that_are_gathered_and_freed_before_the_flush_are_found() {
    wrong("gather-freed-before-flush", &[]);
}

#[test]
fn page_tables_that_are_walked_after_they_were_freed_are_found() {
    let run = found("pgtables-freed-under-walk", &[]);
    assert!(run.number("/page_tables_freed") > 0, "{run:#?}");
}

#[test]
fn a_release_that_comes_after_the_unmap_is_found() {
    wrong("release-after-unmap", &[]);
}

#[test]
fn a_collapse_outside_of_a_bracket_is_found() {
    wrong("collapse-not-bracketed", &[]);
}

#[test]
fn a_hint_that_is_delivered_after_its_bracket_is_found() {
    // Few pages, and a pause: a device must use one of two between the store and the hint, and after it.
    let few = ["--address-spaces", "1", "--threads", "1", "--pages", "4", "--pause", "20ms"];
    found("change-pte-outside-bracket", &few);
}

#[test]
fn the_new_place_of_a_move_that_devices_keep_is_found() {
    wrong("mremap-new-place-kept", &[]);
}

#[test]
fn the_old_place_of_a_move_that_devices_keep_is_found() {
    wrong("mremap-old-place-kept", &[]);
}

#[test]
fn leave_to_write_that_is_kept_after_a_fork_is_found() {
    wrong("fork-write-kept", &[]);
}

#[test]
fn leave_to_write_that_is_kept_after_a_snapshot_is_found() {
    wrong("snapshot-write-kept", &[]);
}

#[test]
fn leave_to_write_that_is_kept_after_an_mprotect_is_found() {
    wrong("mprotect-write-kept", &[]);
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
        // As text, whose search is a fast one; what is text in it comes through as it is.
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.contains("listen"), "the search finds what is there");
        for rule in Rule::value_variants().iter().map(|rule| rule.name()) {
            assert!(!text.contains(rule), "{program} knows of {rule}");
        }
        let output = std::process::Command::new(&path).args(["--break", "release-before-ack"]).output();
        let output = output.expect("a program that was built can be started");
        assert_eq!(output.status.code(), Some(2), "{program} must refuse --break");
    }
}
