//! What the clock of each crate that counts leases owes: it goes on while the machine is suspended.
#![allow(clippy::unwrap_used, reason = "a test helper fails as its test does")]
#![allow(clippy::print_stdout, reason = "the other process reads it")]

use std::process::Command;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Set in the process that is in a time namespace.
const INSIDE: &str = "SHOOTDOWN_TEST_INSIDE";

/// For how long the machine of the time namespace was suspended.
const SUSPENDED: Duration = Duration::from_secs(1_000_000);

/// A suspended machine is one whose CLOCK_BOOTTIME is ahead of its CLOCK_MONOTONIC: a time namespace makes that,
/// without one. `test` is the whole name of the test that calls, which is run once more in there.
pub(crate) fn is_counted(test: &str, clock: impl Fn() -> Duration) {
    let monotonic = || {
        let time = clock_gettime(ClockId::Monotonic);
        Duration::new(time.tv_sec.try_into().unwrap(), time.tv_nsec.try_into().unwrap())
    };
    let read = || (clock(), monotonic());
    if std::env::var_os(INSIDE).is_some() {
        let (clock, monotonic) = read();
        println!("{INSIDE} {} {}", clock.as_nanos(), monotonic.as_nanos());
        return;
    }
    let before = read();
    let inside = Command::new("unshare")
        .args(["--time", "--boottime", &SUSPENDED.as_secs().to_string(), "--fork"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "1")
        .output();
    let Some(inside) = inside.ok().filter(|inside| inside.status.success()) else {
        eprintln!("not tested: it takes unshare, and a user who may make a time namespace (root)");
        return;
    };
    let after = read();
    let said = String::from_utf8(inside.stdout).unwrap();
    let said = said.split_once(INSIDE).expect("it says what it read").1;
    let mut said = said.split_whitespace().map(|nanos| Duration::from_nanos(nanos.parse().unwrap()));
    let (clock, monotonic) = (said.next().unwrap(), said.next().unwrap());
    assert!((before.1..=after.1).contains(&monotonic), "the namespace shifts the one and not the other");
    let expected = before.0 + SUSPENDED..=after.0 + SUSPENDED;
    assert!(expected.contains(&clock), "{clock:?} is not in {expected:?}");
}
