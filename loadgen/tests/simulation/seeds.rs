//! Many seeds, and what is told of one that fails.

use std::fmt::Write as _;
use std::ops::Range;

use parking_lot::Mutex;

use crate::oracle::{self, Bounds};
use crate::world::Run;

/// Events that are shown before and after the first violation.
const SHOWN: usize = 60;

/// Violations that are shown; one often brings others.
const MOST_VIOLATIONS: usize = 10;

/// `SHOOTDOWN_SEEDS=17..18`.
pub fn asked_for() -> Option<Range<u64>> {
    let text = std::env::var("SHOOTDOWN_SEEDS").ok()?;
    let range = text.split_once("..").and_then(|(from, to)| Some(from.parse().ok()?..to.parse().ok()?));
    Some(range.unwrap_or_else(|| panic!("SHOOTDOWN_SEEDS is {text:?}; write for example 0..300")))
}

/// Runs seeds, a world at a time on each core; what they gave, in their order.
pub fn on_all_cores<T: Send>(seeds: Range<u64>, run: impl Fn(u64) -> Option<T> + Sync) -> Vec<T> {
    let (coming, given) = (Mutex::new(seeds), Mutex::new(Vec::new()));
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                loop {
                    let Some(seed) = coming.lock().next() else { return };
                    let of_seed = run(seed).map(|result| (seed, result));
                    given.lock().extend(of_seed);
                }
            });
        }
    });
    let mut given = given.into_inner();
    given.sort_unstable_by_key(|(seed, _)| *seed);
    given.into_iter().map(|(_, result)| result).collect()
}

/// What went wrong in a world, with what is needed to look into it.
pub fn failure(run: &Run) -> Option<String> {
    let violations = oracle::check(&run.events, Bounds::of(&run.plan));
    if violations.is_empty() && run.broke.is_none() {
        return None;
    }
    let seed = run.plan.seed;
    let mut text = format!("\nseed {seed} failed. The command that repeats it:\n\n");
    let again = seed + 1;
    writeln!(
        text,
        "  SHOOTDOWN_SEEDS={seed}..{again} cargo test -p shootdown-loadgen --test simulation no_inv\n"
    )
    .unwrap();
    if let Some(broke) = &run.broke {
        writeln!(text, "  the world stopped: {broke}").unwrap();
    }
    for violation in violations.iter().take(MOST_VIOLATIONS) {
        writeln!(text, "  {violation}").unwrap();
    }
    let first = violations.iter().map(|violation| violation.at).min();
    let at = first.map_or(run.events.len(), |first| run.events.partition_point(|event| event.at <= first));
    let shown = at.saturating_sub(SHOWN)..run.events.len().min(at + SHOWN / 4);
    writeln!(text, "\n  {:#?}\n\n  the trace around the first:", run.plan).unwrap();
    run.events[shown].iter().for_each(|event| writeln!(text, "  {event}").unwrap());
    Some(text)
}
