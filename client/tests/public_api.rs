//! What the SDK shows to vendors.
#![allow(clippy::unwrap_used, reason = "a helper of tests, which fail by panicking")]

use std::fs;
use std::path::{Path, PathBuf};

/// The crates that a vendor must not have to know.
const HIDDEN: [&str; 7] = ["tonic", "prost", "hyper", "tower", "h2::", "http::", "v1::"];

/// Everything between a `pub` that the outside can see and the end of its signature.
fn public_signatures(source: &str) -> Vec<String> {
    let mut signatures = Vec::new();
    let mut lines = source.lines();
    while let Some(line) = lines.next() {
        let line = line.trim_start();
        if line == "#[cfg(test)]" {
            break;
        }
        // An impl of a foreign trait for a type of ours is public without saying so.
        if !line.starts_with("pub ") && !line.starts_with("impl") {
            continue;
        }
        let mut signature = line.to_owned();
        // A field is one line, anything else goes on to its body.
        let is_item = ["fn ", "impl", "trait ", "struct ", "enum ", "use ", "type ", "const ", "static "];
        let is_item = is_item.iter().any(|word| line.contains(word));
        while is_item && !signature.contains(['{', ';']) {
            match lines.next() {
                Some(more) => signature.push_str(more.trim()),
                None => break,
            }
        }
        let end = signature.find('{').unwrap_or(signature.len());
        signatures.push(signature[..end].to_owned());
    }
    signatures
}

fn sources(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { sources(&path) } else { vec![path] }).collect()
}

#[test]
fn no_type_of_the_grpc_library_is_in_the_public_api() {
    let mut seen = 0;
    for path in sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src")) {
        for signature in public_signatures(&fs::read_to_string(&path).unwrap()) {
            seen += 1;
            // Private types implement what the transport asks for.
            if signature.starts_with("impl Stream for OutgoingStream") {
                continue;
            }
            for hidden in HIDDEN {
                assert!(!signature.contains(hidden), "{}: `{signature}` shows {hidden}", path.display());
            }
        }
    }
    assert!(seen > 150, "only {seen} signatures were looked at: the search is broken");
}

#[test]
fn the_search_for_hidden_types_finds_them() {
    let source = "pub fn channel(\n    &self,\n) -> Result<(), tonic::Status> {\n}\nimpl From<tonic::Status> for X {\n";
    let found = public_signatures(source);
    assert_eq!(found.iter().filter(|it| it.contains("tonic")).count(), 2, "{found:?}");
}

#[test]
fn the_smallest_device_is_small() {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/smallest_device.rs");
    assert!(fs::read_to_string(example).unwrap().lines().count() < 60);
}

/// Vendors move these between threads and into tasks.
#[test]
fn handles_are_send_and_sync() {
    fn check<T: Send + Sync + 'static>() {}
    check::<shootdown_client::Device<()>>();
    check::<shootdown_client::Mapping>();
    check::<shootdown_client::UseGuard>();
    check::<shootdown_client::CommitTicket>();
    check::<shootdown_client::Subscription>();
    check::<shootdown_client::PageClient>();
    check::<shootdown_client::Gate>();
    check::<shootdown_client::Faulter>();
    check::<shootdown_client::SessionEnd>();
}
