//! docs/memory-source.md says of each twin which break proves its order, and it is so.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::path::Path as FilePath;

use clap::ValueEnum as _;
use shootdown_loadgen::path::Path;
use shootdown_loadgen::rule::Rule;
use shootdown_server::source::memory::Twin;

/// The rows of the table of twins: the twin's name, and the breaks.
fn rows() -> Vec<(String, Vec<String>)> {
    let file = FilePath::new(env!("CARGO_MANIFEST_DIR")).join("../docs/memory-source.md");
    let text = std::fs::read_to_string(file).unwrap();
    let table = text.lines().skip_while(|line| !line.starts_with("| twin |")).skip(2);
    let row = |line: &str| {
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        let breaks = cells[4].split(", ").map(|word| word.trim_matches(['`', ' ', '|']).to_owned());
        (cells[0].to_owned(), breaks.collect())
    };
    table.take_while(|line| line.starts_with('|')).map(row).collect()
}

#[test]
fn every_twin_has_its_row_and_every_row_a_break_that_exercises_it() {
    let rows = rows();
    let named: Vec<&str> = rows.iter().map(|(name, _)| name.as_str()).collect();
    let mut twins: Vec<&str> = Twin::EVERY.iter().map(|twin| twin.name()).collect();
    for name in &named {
        assert!(twins.contains(name), "there is no twin {name}");
    }
    twins.retain(|twin| !named.contains(twin));
    assert!(twins.is_empty(), "no row for {twins:?}");
    for (name, breaks) in &rows {
        let path: Path = name.parse().unwrap();
        for word in breaks {
            let rule = Rule::from_str(word, false).unwrap_or_else(|error| panic!("--break {word}: {error}"));
            assert!(
                rule.paths().contains(&path),
                "--break {word} does not exercise {name}, only {:?}",
                rule.paths()
            );
        }
    }
}

#[test]
fn every_break_of_an_order_is_in_the_table() {
    let named: BTreeSet<String> = rows().into_iter().flat_map(|(_, breaks)| breaks).collect();
    // These break a rule of rounds, whatever the path.
    let of_rounds = ["release-before-ack", "skip-one-target", "flush-after-ack", "grant-in-window"];
    let missing: Vec<&str> = Rule::value_variants()
        .iter()
        .map(|rule| rule.name())
        .filter(|name| !named.contains(*name) && !of_rounds.contains(name))
        .collect();
    assert!(missing.is_empty(), "no row says {missing:?}");
}
