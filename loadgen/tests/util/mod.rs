//! One helper for all tests that run the program.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::Value;

/// The program.
pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_shootdown-loadgen");

/// A run that has ended.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) code: Option<i32>,
    pub(crate) json: Value,
    pub(crate) stderr: String,
}

impl Run {
    /// The number at a JSON pointer.
    pub(crate) fn number(&self, pointer: &str) -> u64 {
        let value = self.json.pointer(pointer).and_then(Value::as_u64);
        value.unwrap_or_else(|| panic!("no number at {pointer}: {self:#?}"))
    }
}

/// The program with these arguments.
pub(crate) fn program(args: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    command.args(args).stdin(Stdio::null());
    command
}

/// Runs `check` to its end.
pub(crate) fn check(args: &[&str]) -> Run {
    run(&[&["check", "--output", "json"], args].concat())
}

/// Runs something that writes JSON to its end.
pub(crate) fn run(args: &[&str]) -> Run {
    let output = program(args).output().expect("the program can be started");
    let json = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
    Run { code: output.status.code(), json, stderr: String::from_utf8_lossy(&output.stderr).into_owned() }
}

/// Another program of the workspace, where it is when it was built.
pub(crate) fn beside(name: &str) -> PathBuf {
    PathBuf::from(PROGRAM).with_file_name(name)
}
