//! The report for programs. Its version rises when a field goes or changes its meaning.

use serde_json::{Map, Value, json};

use super::outcome::Outcome;
use crate::path::Path;

/// Of the shape below.
const VERSION: u32 = 2;

/// The run as JSON.
#[must_use]
pub fn to_json(run: &Outcome) -> Value {
    let totals = run.totals();
    let failings: Vec<String> = run.failings().iter().map(ToString::to_string).collect();
    json!({
        "version": VERSION,
        "passed": failings.is_empty(),
        "failings": failings,
        "stale_reads": totals.stale_reads,
        "stale_writes": run.host.stale_writes,
        "lost_writes": totals.lost_writes,
        "lost_young": totals.lost_young,
        "stale": run.stale().collect::<Vec<_>>(),
        "lost": run.lost().collect::<Vec<_>>(),
        "young": run.lost_young().collect::<Vec<_>>(),
        "history": run.shortest_history(),
        "reads": totals.reads,
        "copy_reads": totals.copy_reads,
        "cpu_reads": run.host.loads,
        "tlb_hits": totals.tlb_hits,
        "faults": totals.faults,
        "refused": totals.refused,
        "writes": totals.writes,
        "torn_reads": totals.torn,
        "flushes": totals.flushes,
        "paths": paths(run),
        "quiet_paths": quiet_paths(run),
        "page_tables_freed": run.host.tables_freed,
        "branches": run.host.branches,
        "against_young": run.host.against_young,
        "stages": stages(run),
        "memory": run.host.memory,
        "left_behind": run.host.left_behind,
        "seed": run.plan.seed,
        "seconds": run.seconds,
        "stopped_early": run.stopped_early,
        "devices": run.plan.devices,
        "address_spaces": run.plan.address_spaces,
        "chosen_paths": run.plan.paths,
        "break": run.plan.rule,
    })
}

/// The paths that take something away from devices: what they did, and how many device reads of their
/// pages were judged after it.
fn paths(run: &Outcome) -> Value {
    let row = |path: &Path| {
        let tally = run.path(*path);
        let row = json!({
            "operations": tally.operations,
            "rounds": tally.rounds,
            "notices": tally.notices,
            "reads": run.reads_after(*path),
            "stale_reads": run.stale_after(*path),
            "lost_writes": run.lost_after(*path),
            "test_young": {
                "asked": tally.asked_young,
                "yes": tally.young,
                "no": tally.asked_young - tally.young,
            },
        });
        (path.name().to_owned(), row)
    };
    Value::Object(Path::EVERY.iter().filter(|path| path.has_rounds()).map(row).collect::<Map<_, _>>())
}

/// The paths that take nothing away, so that devices need not be told: the operations of each.
fn quiet_paths(run: &Outcome) -> Value {
    let quiet = Path::EVERY.iter().filter(|path| !path.has_rounds());
    Value::Object(quiet.map(|path| (path.name().to_owned(), json!(run.path(*path).operations))).collect())
}

fn stages(run: &Outcome) -> Value {
    let row = |stage: &super::StageSummary| {
        let row = json!({
            "count": stage.count,
            "p50_us": stage.p50_us,
            "p90_us": stage.p90_us,
            "p99_us": stage.p99_us,
            "p999_us": stage.p999_us,
            "p9999_us": stage.p9999_us,
            "max_us": stage.max_us,
        });
        (stage.stage.name().to_owned(), row)
    };
    Value::Object(run.host.stages.iter().map(row).collect::<Map<_, _>>())
}

#[cfg(test)]
mod tests {
    use super::super::outcome::tests::good;
    use super::*;

    #[test]
    fn the_report_has_a_version_and_a_row_for_each_path() {
        let report = to_json(&good());
        assert_eq!(report["version"], 2);
        assert_eq!(report["passed"], true);
        assert_eq!(report["break"], Value::Null);
        assert_eq!(report["paths"]["munmap"]["rounds"], 4);
        assert_eq!(report["paths"]["collapse"]["test_young"], json!({ "asked": 2, "yes": 1, "no": 1 }));
        let branches = ["cow_reuse", "cow_copy", "cow_lost_race", "swap_in", "swap_fail", "swap_again"];
        assert!(branches.iter().all(|branch| report["branches"][branch] == 0), "{report:#}");
        let rows = |key: &str| report[key].as_object().unwrap().len();
        assert_eq!(rows("paths") + rows("quiet_paths"), Path::EVERY.len());
    }
}
