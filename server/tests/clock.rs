//! The clock that leases are counted on goes on while the machine is suspended.

#[path = "../../tests/rust/suspended.rs"]
mod suspended;

use std::time::Duration;

use shootdown_server::clock::Clock;

#[test]
fn the_clock_counts_the_time_that_the_machine_was_suspended() {
    let clock = || Duration::from_nanos(Clock::BOOTTIME.now().as_nanos());
    suspended::is_counted("the_clock_counts_the_time_that_the_machine_was_suspended", clock);
}
