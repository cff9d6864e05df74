//! What the documents say of the tree is true of it: paths, symbols, tests, limits, reasons, the arrows
//! between the crates, and the example that protocol.md shows.
#![allow(clippy::unwrap_used, reason = "a test helper fails as its test does")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use shootdown_proto::error::Reason;
use shootdown_proto::message;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// A document, by its path from the root.
struct Document {
    path: String,
    text: String,
}

fn documents() -> Vec<Document> {
    let mut paths = vec!["README.md".to_owned(), "CONTRIBUTING.md".to_owned()];
    for folder in ["docs", "docs/decisions"] {
        let entries = fs::read_dir(root().join(folder)).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().display().to_string());
        paths.extend(names.filter(|name| name.ends_with(".md")).map(|name| format!("{folder}/{name}")));
    }
    paths.into_iter().map(|path| Document { text: read(&path), path }).collect()
}

impl Document {
    /// The text outside of code blocks.
    fn prose(&self) -> String {
        self.text.split("```").step_by(2).collect()
    }

    /// What stands between backticks.
    fn code(&self) -> Vec<String> {
        self.prose().split('`').skip(1).step_by(2).map(str::to_owned).collect()
    }

    /// The targets of its links that are not to other sites.
    fn links(&self) -> Vec<String> {
        let prose = self.prose();
        let targets = prose.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        targets.filter(|target| !target.contains("://")).map(str::to_owned).collect()
    }
}

/// The folders at the root whose paths the documents name.
const FOLDERS: [&str; 9] =
    ["proto/", "core/", "srcu/", "server/", "client/", "loadgen/", "docs/", "tests/", "scripts/"];

#[test]
fn every_path_and_symbol_in_the_documents_exists() {
    let mut wrong = Vec::new();
    for document in documents() {
        for code in document.code() {
            let (path, symbol) = match code.split_once("::") {
                Some((path, symbol)) if path.ends_with(".rs") => (path, Some(symbol)),
                _ => (code.as_str(), None),
            };
            let is_path = FOLDERS.iter().any(|folder| path.starts_with(folder)) && !path.contains([' ', '*']);
            if !is_path {
                continue;
            }
            if !root().join(path).exists() {
                wrong.push(format!("{}: there is no {path}", document.path));
            } else if let Some(symbol) = symbol
                && !defines(&read(path), symbol)
            {
                wrong.push(format!("{}: {path} has no {symbol}", document.path));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Whether a file of Rust has an item of that name.
fn defines(source: &str, symbol: &str) -> bool {
    const ITEMS: [&str; 8] = ["fn", "struct", "enum", "trait", "const", "static", "mod", "type"];
    ITEMS.iter().any(|item| {
        let wanted = format!("{item} {symbol}");
        source.match_indices(&wanted).any(|(at, _)| {
            let before = source[..at].chars().next_back();
            let after = source[at + wanted.len()..].chars().next();
            let is_name = |c: char| c.is_alphanumeric() || c == '_';
            !before.is_some_and(is_name) && !after.is_some_and(is_name)
        })
    })
}

#[test]
fn every_link_in_the_documents_leads_somewhere() {
    let mut wrong = Vec::new();
    for document in documents() {
        let folder = Path::new(&document.path).parent().unwrap().to_owned();
        for link in document.links() {
            let (path, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let target =
                if path.is_empty() { root().join(&document.path) } else { root().join(&folder).join(path) };
            if !target.exists() {
                wrong.push(format!("{}: {link}", document.path));
            } else if !anchor.is_empty() && !anchors(&fs::read_to_string(target).unwrap()).contains(anchor) {
                wrong.push(format!("{}: no heading for {link}", document.path));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Headings as links name them.
fn anchors(markdown: &str) -> BTreeSet<String> {
    let headings = markdown.lines().filter(|line| line.starts_with('#'));
    let text = headings.map(|line| line.trim_start_matches('#').trim().to_lowercase());
    text.map(|text| {
        let kept = text.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    })
    .collect()
}

/// The invariants, in the order of their numbers.
const INVARIANTS: [&str; 22] = [
    "NoFreeBeforeQuiesce",
    "AckMeansStopped",
    "NoGrantInWindow",
    "JoinCovers",
    "StableTargets",
    "UnsubscribeBarrier",
    "Pairing",
    "NonBlockAtomic",
    "Contiguity",
    "NeverDrop",
    "MergeIsUnion",
    "ResumeOrFlush",
    "TimeoutIsNotAck",
    "FenceIsPositive",
    "FenceReachesReuse",
    "RestartGrace",
    "Isolation",
    "NoSelfWait",
    "BoundedResolution",
    "YoungIsConservative",
    "RangeOverApproximates",
    "SeqCompare",
];

#[test]
fn every_invariant_has_a_test_of_its_name_or_says_what_it_waits_for() {
    let architecture = read("docs/architecture.md");
    let tests = tests_by_name();
    for (number, name) in (1..).zip(INVARIANTS) {
        let head = format!("| {number} | **{name}**");
        let row = architecture.lines().find(|line| line.starts_with(&head));
        let row = row.unwrap_or_else(|| panic!("docs/architecture.md has no row {head:?}"));
        let named = row.trim_end_matches([' ', '|']).rsplit(" | ").next().unwrap();
        let exists = tests.get(&snake(name)).cloned().unwrap_or_default();
        let is_named = exists.iter().any(|file| named.contains(&format!("`{file}::{}`", snake(name))));
        if exists.is_empty() {
            assert!(
                named.starts_with("later: "),
                "{name} has no test of its name; its row must say later, and why"
            );
        } else {
            assert!(is_named, "the row of {name} names none of its tests, which are in {exists:?}");
        }
    }
}

/// docs/invariants.md: one row each, with the tests of its name, every wrong rule that the model knows for it, and its
/// check in the simulation.
#[test]
fn the_table_of_invariants_is_that_of_tests_model_and_simulation() {
    let document = read("docs/invariants.md");
    let mutations = read("core/tests/model/mutations.rs");
    let checks = sources_in("loadgen/tests/simulation/checks");
    let tests = tests_by_name();
    for (number, name) in (1..).zip(INVARIANTS) {
        let head = format!("| {number} | {name} |");
        let row = document.lines().find(|line| line.starts_with(&head));
        let row = row.unwrap_or_else(|| panic!("docs/invariants.md has no row {head:?}"));
        let cells: Vec<&str> = row.trim_matches('|').split(" | ").collect();
        let [_, _, test, model, simulation] = cells[..] else { panic!("{row} has {} cells", cells.len()) };
        let files = tests.get(&snake(name)).unwrap_or_else(|| panic!("{name} has no test of its name"));
        let named = files.iter().filter(|file| test.contains(&format!("`{file}::{}`", snake(name))));
        assert!(named.count() > 0, "the row of {name} names none of its tests, which are in {files:?}");
        let listed = mutations_of(&mutations, name);
        for mutation in &listed {
            assert!(model.contains(mutation), "the row of {name} leaves out the model's {mutation}");
        }
        assert!(!listed.is_empty(), "the model has no wrong rule that breaks {name}");
        let check = checks.iter().find(|(_, source)| defines(source, &snake(name)));
        let (file, _) = check.unwrap_or_else(|| panic!("the simulation has no check of {name}"));
        assert!(
            simulation.contains(&format!("`{file}::{}`", snake(name))),
            "the simulation's check of {name}"
        );
    }
    let (_, above_all) = document.split_once("have NoStaleUse: ").expect("what is above them all");
    for mutation in mutations_of(&mutations, "NoStaleUse") {
        assert!(above_all.contains(mutation), "NoStaleUse is broken by {mutation}, too");
    }
}

/// The wrong rules that the model lists for a property.
fn mutations_of<'a>(mutations: &'a str, property: &str) -> Vec<&'a str> {
    let listed = mutations.lines().filter(|line| line.contains(&format!("\"{property}\"")));
    listed.filter_map(|line| line.split_once("Mutation::")?.1.split(',').next()).collect()
}

/// The Rust files of a folder, by their paths from the root.
fn sources_in(folder: &str) -> Vec<(String, String)> {
    let entries = fs::read_dir(root().join(folder)).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().display().to_string());
    let paths = names.filter(|name| name.ends_with(".rs")).map(|name| format!("{folder}/{name}"));
    paths.map(|path| (path.clone(), read(&path))).collect()
}

fn snake(pascal: &str) -> String {
    let mut snake = String::new();
    for c in pascal.chars() {
        if c.is_ascii_uppercase() && !snake.is_empty() {
            snake.push('_');
        }
        snake.push(c.to_ascii_lowercase());
    }
    snake
}

/// The files in which a function of an invariant's name is a test.
fn tests_by_name() -> BTreeMap<String, Vec<String>> {
    let wanted: BTreeSet<_> = INVARIANTS.iter().map(|name| snake(name)).collect();
    let mut tests: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut folders: Vec<_> =
        ["core", "proto", "srcu", "server", "client", "loadgen"].map(|name| root().join(name)).into();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let file = path.strip_prefix(root()).unwrap().display().to_string();
                let source = fs::read_to_string(&path).unwrap();
                for name in wanted.iter().filter(|name| is_test(&source, name)) {
                    tests.entry(name.clone()).or_default().push(file.clone());
                }
            }
        }
    }
    tests
}

fn is_test(source: &str, name: &str) -> bool {
    let lines: Vec<&str> = source.lines().map(str::trim).collect();
    let is_it = |line: &str| {
        let line = line.trim_start_matches("async ");
        line.strip_prefix("fn ")
            .and_then(|rest| rest.strip_prefix(name))
            .is_some_and(|rest| rest.starts_with('('))
    };
    let above = |at: usize| {
        lines[..at].iter().rev().take_while(|line| line.starts_with('#') || line.starts_with("//"))
    };
    lines.iter().enumerate().any(|(at, line)| {
        is_it(line) && above(at).any(|line| line.starts_with("#[") && line.contains("test"))
    })
}

/// Of docs/faults.md; those that it shows in blocks are run by `server/tests/admin.rs`.
#[test]
fn every_command_that_the_document_of_faults_names_is_run() {
    let document = Document { path: "docs/faults.md".to_owned(), text: read("docs/faults.md") };
    let (all, gate) = (read("scripts/test"), read(".ci/run"));
    assert!(all.contains("--workspace") && gate.contains("\n$tests\n"), "every test of every crate");
    let (mut tests, mut runs) = (0, 0);
    for code in document.code() {
        if let Some(words) = code.strip_prefix("cargo test -p shootdown-") {
            let (crate_, test) = words.split_once(" --test ").unwrap_or_else(|| panic!("{code}"));
            let target = |name: &str| root().join(crate_).join("tests").join(test).join(name).exists();
            let file = root().join(crate_).join("tests").join(format!("{test}.rs")).exists();
            assert!(file || target("main.rs"), "there is no test for `{code}`");
            tests += 1;
        } else if let Some(words) = code.strip_prefix("shootdown-loadgen ") {
            let command = format!("shootdown-loadgen -- {words}");
            let is_run = gate.lines().any(|line| {
                line.split_once(&command).is_some_and(|(_, rest)| rest.is_empty() || rest.starts_with(' '))
            });
            assert!(is_run, ".ci/run does not run `{code}`");
            runs += 1;
        } else {
            let words = code.strip_prefix("cargo ").unwrap_or("nextest run");
            assert!(words == "nextest run", "nobody runs `{code}`");
        }
    }
    assert!(tests >= 2 && runs >= 2, "{tests} tests, {runs} runs");
}

#[test]
fn arrows_between_crates_run_one_way() {
    let arrows: [(&str, &[&str]); 6] = [
        ("core", &[]),
        ("srcu", &[]),
        ("proto", &["shootdown-core"]),
        ("server", &["shootdown-core", "shootdown-proto", "srcu"]),
        ("client", &["shootdown-core", "shootdown-proto"]),
        ("loadgen", &["shootdown-core", "shootdown-proto", "shootdown-server", "shootdown-client", "srcu"]),
    ];
    for (folder, allowed) in arrows {
        let used = dependencies(folder);
        let ours = used.iter().filter(|name| name.starts_with("shootdown") || *name == "srcu");
        for name in ours {
            assert!(allowed.contains(&name.as_str()), "{folder} depends on {name}");
        }
    }
}

#[test]
fn core_depends_on_no_runtime() {
    assert_eq!(dependencies("core"), ["thiserror"], "core is rules: no I/O, no clock, no runtime");
}

/// The names in the section `[dependencies]` of a crate's manifest.
fn dependencies(folder: &str) -> Vec<String> {
    let manifest = read(&format!("{folder}/Cargo.toml"));
    let section = manifest.lines().skip_while(|line| line.trim() != "[dependencies]").skip(1);
    let lines = section.take_while(|line| !line.starts_with('['));
    let names = lines.filter_map(|line| line.split(['.', ' ', '=']).next());
    names.filter(|name| !name.is_empty() && !name.starts_with('#')).map(str::to_owned).collect()
}

#[test]
fn the_table_of_reasons_is_that_of_the_enum() {
    let protocol = read("docs/protocol.md");
    let rows = protocol.lines().filter(|line| line.starts_with("| `") && line.contains("` | `"));
    let told: Vec<_> = rows.filter_map(|row| row.split('`').nth(1).zip(row.split('`').nth(3))).collect();
    let reasons = (1..).map_while(|number| Reason::try_from(number).ok());
    let codes: Vec<_> = reasons.map(|reason| (reason.word().to_owned(), code(reason))).collect();
    let told: Vec<_> = told.into_iter().map(|(word, code)| (word.to_owned(), code.to_owned())).collect();
    assert_eq!(told, codes);
}

/// The status code as gRPC's documents write it.
fn code(reason: Reason) -> String {
    snake(&format!("{:?}", reason.code())).to_uppercase()
}

#[test]
fn the_limits_are_those_of_the_code() {
    let protocol = read("docs/protocol.md");
    let limits = [
        ("bytes of a message of a session", message::MAX_SESSION_MESSAGE as u64),
        ("notices in a message, numbers or reports in an ack", message::MAX_NOTICES_A_MESSAGE as u64),
        ("ranges in a report", message::MAX_RANGES_A_MESSAGE as u64),
        ("pages of a fault", message::MAX_FAULT_PAGES),
        ("pages of a fault that asks for their bytes", message::MAX_FAULT_DATA_PAGES),
        ("spans of a read or write of frames", message::MAX_SPANS as u64),
        ("bytes of a `request_id` of a source", message::MAX_CALL_ID as u64),
    ];
    for (what, limit) in limits {
        let row = format!("| {what} | {} |", with_commas(limit));
        assert!(protocol.lines().any(|line| line.starts_with(&row)), "docs/protocol.md has no row {row:?}");
    }
}

fn with_commas(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[test]
fn the_example_in_protocol_md_is_the_one_that_is_tested() {
    let source = read("tests/python/device.py");
    let shown = source.split("# shown in docs/protocol.md: begin\n").nth(1).unwrap();
    let shown = shown.split("    # shown in docs/protocol.md: end").next().unwrap().trim_end();
    let wanted = format!("```python\n{shown}\n```\n");
    assert!(read("docs/protocol.md").contains(&wanted), "copy this into docs/protocol.md:\n{wanted}");
}
