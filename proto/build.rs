//! Compiles the .proto files in pure Rust: a fresh machine needs no protoc.

use std::path::PathBuf;
use std::{env, fs};

use prost::Message as _;

const FILES: [&str; 7] = [
    "shootdown/v1/common.proto",
    "shootdown/v1/device.proto",
    "shootdown/v1/page.proto",
    "shootdown/v1/notifier.proto",
    "shootdown/v1/memory.proto",
    "shootdown/v1/admin.proto",
    "shootdown/v1/fencer.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(FILES, ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    // Server reflection serves these.
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    Ok(())
}
