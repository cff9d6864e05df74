//! Answers, as tables for people and as JSON for programs.

use std::fmt::Write as _;
use std::time::Duration;

use serde_json::{Value, json};
use shootdown_proto::v1;

/// Between two columns.
const GAP: usize = 2;

/// An answer in both forms.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) text: String,
    pub(super) json: Value,
}

pub(super) fn sessions(sessions: &[v1::Session]) -> Answer {
    let mut table = Table::new(&[
        "SESSION",
        "DEVICE",
        "RUN",
        "PHASE",
        "LEASE",
        "UNACKED",
        "PENDING",
        "ACKED",
        "SUBSCRIPTIONS",
        "FAULTS",
        "SHARD",
    ]);
    for session in sessions {
        table.row([
            session.session_id.to_string(),
            printable(&session.device_id),
            session.device_incarnation.to_string(),
            word(session.phase().as_str_name(), "SESSION_PHASE_"),
            lease(session),
            session.notices_unacked.to_string(),
            session.notices_pending.to_string(),
            session.acked_through.to_string(),
            session.subscriptions.to_string(),
            session.faults_in_flight.to_string(),
            session.shard.to_string(),
        ]);
    }
    let listed: Vec<Value> = sessions.iter().map(session_json).collect();
    Answer { text: table.or("no sessions"), json: json!({ "sessions": listed }) }
}

/// What remains of it. One that the device does not enforce ends nothing.
fn lease(session: &v1::Session) -> String {
    match (session.enforces_lease, session.lease_remaining_ms) {
        (false, _) => "not enforced".to_owned(),
        (true, 0) => "over".to_owned(),
        (true, left) => age(Duration::from_millis(left)),
    }
}

fn session_json(session: &v1::Session) -> Value {
    json!({
        "session_id": session.session_id,
        "device_id": session.device_id,
        "device_incarnation": session.device_incarnation,
        "phase": word(session.phase().as_str_name(), "SESSION_PHASE_"),
        "enforces_lease": session.enforces_lease,
        "lease_remaining_ms": session.lease_remaining_ms,
        "subscriptions": session.subscriptions,
        "notices_unacked": session.notices_unacked,
        "notices_pending": session.notices_pending,
        "acked_through": session.acked_through,
        "faults_in_flight": session.faults_in_flight,
        "shard": session.shard,
    })
}

pub(super) fn address_spaces(spaces: &[v1::AddressSpace]) -> Answer {
    let mut table =
        Table::new(&["ADDRESS-SPACE", "NAME", "SOURCE", "SEQ", "SUBSCRIPTIONS", "BRACKETS", "ROUNDS"]);
    for space in spaces {
        table.row([
            space.address_space_id.to_string(),
            printable(&space.name),
            printable(&space.source),
            space.seq.to_string(),
            space.subscriptions.to_string(),
            space.open_brackets.to_string(),
            space.rounds_in_flight.to_string(),
        ]);
    }
    let listed: Vec<Value> = spaces.iter().map(space_json).collect();
    Answer { text: table.or("no address spaces"), json: json!({ "address_spaces": listed }) }
}

fn space_json(space: &v1::AddressSpace) -> Value {
    json!({
        "address_space_id": space.address_space_id,
        "name": space.name,
        "source": space.source,
        "seq": space.seq,
        "subscriptions": space.subscriptions,
        "open_brackets": space.open_brackets,
        "rounds_in_flight": space.rounds_in_flight,
    })
}

const ROUND: [&str; 6] = ["ADDRESS-SPACE", "SEQ", "RANGE", "CAUSE", "AGE", "WAITS FOR"];

pub(super) fn rounds(rounds: &[v1::Round]) -> Answer {
    let mut table = Table::new(&ROUND);
    for round in rounds {
        table.row(round_cells(round));
    }
    let listed: Vec<Value> = rounds.iter().map(round_json).collect();
    Answer { text: table.or("no rounds wait"), json: json!({ "rounds": listed }) }
}

fn round_cells(round: &v1::Round) -> [String; 6] {
    let missing: Vec<String> = missing(round)
        .map(|target| format!("{} (session {})", printable(&target.device_id), target.session_id))
        .collect();
    [
        round.address_space_id.to_string(),
        round.seq.to_string(),
        round.range.as_ref().map_or_else(String::new, range),
        word(round.cause().as_str_name(), "CAUSE_"),
        age(Duration::from_nanos(round.age_ns)),
        missing.join(", "),
    ]
}

fn missing(round: &v1::Round) -> impl Iterator<Item = &v1::Target> {
    round.targets.iter().filter(|target| target.outcome() == v1::TargetOutcome::Waiting)
}

fn round_json(round: &v1::Round) -> Value {
    let targets = round.targets.iter().map(|target| {
        json!({
            "session_id": target.session_id,
            "device_id": target.device_id,
            "outcome": word(target.outcome().as_str_name(), "TARGET_OUTCOME_"),
            "elapsed_ns": target.elapsed_ns,
        })
    });
    let range = round.range.as_ref().map(|range| {
        let v1::AddressRange { start, end, all } = *range;
        json!({ "start": start, "end": end, "all": all })
    });
    json!({
        "address_space_id": round.address_space_id,
        "seq": round.seq,
        "range": range,
        "cause": word(round.cause().as_str_name(), "CAUSE_"),
        "age_ns": round.age_ns,
        "targets": targets.collect::<Vec<_>>(),
    })
}

pub(super) fn quarantine(listed: &v1::ListQuarantineResponse) -> Answer {
    let mut table = Table::new(&[&["PAGES", "BYTES"], &ROUND[..]].concat());
    for parked in &listed.quarantined {
        let round = parked.round.clone().unwrap_or_default();
        let size = [parked.pages.to_string(), parked.bytes.to_string()];
        table.row(size.into_iter().chain(round_cells(&round)));
    }
    let v1::ListQuarantineResponse { bytes, most_bytes, pages, most_pages, .. } = *listed;
    let mut text = table.or("nothing is quarantined");
    text.push_str(&format!("{pages} of at most {most_pages} pages, {bytes} of at most {most_bytes} bytes\n"));
    let entries: Vec<Value> = listed
        .quarantined
        .iter()
        .map(|parked| {
            json!({
                "pages": parked.pages,
                "bytes": parked.bytes,
                "round": parked.round.as_ref().map(round_json),
            })
        })
        .collect();
    let sums = json!({
        "quarantined": entries,
        "pages": pages,
        "most_pages": most_pages,
        "bytes": bytes,
        "most_bytes": most_bytes,
    });
    Answer { text, json: sums }
}

pub(super) fn evicted(session_id: u64, cut_off: bool) -> Answer {
    let text = match cut_off {
        true => format!("session {session_id} is fenced: nothing waits for it any more\n"),
        false => format!(
            "session {session_id} is ended: its rounds wait until its lease is over, and without end where the device \
             enforces none; once the device is certain to be cut off, say --cut-off\n"
        ),
    };
    Answer { text, json: json!({ "session_id": session_id, "is_cut_off": cut_off }) }
}

/// `SESSION_PHASE_LIVE` is `live`; what a later version says is `unspecified`.
fn word(name: &str, prefix: &str) -> String {
    name.strip_prefix(prefix).unwrap_or(name).to_lowercase().replace('_', "-")
}

fn range(range: &v1::AddressRange) -> String {
    if range.all { "all".to_owned() } else { format!("{:#x}-{:#x}", range.start, range.end) }
}

/// To a tenth of a second, or to a millisecond where it is less than one.
fn age(time: Duration) -> String {
    match time.as_millis() {
        millis @ 0..1000 => format!("{millis}ms"),
        _ => format!("{:.1}s", time.as_secs_f64()),
    }
}

/// A name that others chose, without what a terminal would obey, and not empty.
fn printable(name: &str) -> String {
    match name {
        "" => "-".to_owned(),
        name => name.chars().map(|c| if c.is_control() { '?' } else { c }).collect(),
    }
}

/// Columns that are as wide as their widest cell.
struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    fn new(header: &[&str]) -> Self {
        Self { rows: vec![header.iter().map(|cell| (*cell).to_owned()).collect()] }
    }

    fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// Or this line, where there is nothing.
    fn or(&self, nothing: &str) -> String {
        if self.rows.len() == 1 {
            return format!("{nothing}\n");
        }
        let columns = self.rows[0].len();
        let width = |column: usize| self.rows.iter().map(|row| row[column].chars().count()).max();
        let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or_default()).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                // Into a string, which never fails.
                let _ = write!(line, "{cell:<width$}{:GAP$}", "");
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(id: u64, device: &str) -> v1::Session {
        v1::Session {
            session_id: id,
            device_id: device.to_owned(),
            device_incarnation: 7,
            phase: v1::SessionPhase::Severed.into(),
            enforces_lease: true,
            lease_remaining_ms: 4_260,
            ..v1::Session::default()
        }
    }

    fn round() -> v1::Round {
        let target = |session_id, outcome: v1::TargetOutcome| v1::Target {
            session_id,
            device_id: format!("gpu{session_id}"),
            outcome: outcome.into(),
            ..v1::Target::default()
        };
        v1::Round {
            address_space_id: 3,
            seq: 9,
            range: Some(v1::AddressRange { start: 0x1000, end: 0x3000, all: false }),
            cause: v1::Cause::ProtectionVma.into(),
            age_ns: 250_000_000,
            targets: vec![target(1, v1::TargetOutcome::Acked), target(2, v1::TargetOutcome::Waiting)],
        }
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let told = sessions(&[session(1, "a"), session(12, "a-longer-name")]).text;
        let lines: Vec<&str> = told.lines().collect();
        assert_eq!(lines.len(), 3);
        let at = |line: &str, word: &str| line.find(word).unwrap_or_else(|| panic!("{line} has no {word}"));
        assert_eq!(at(lines[0], "PHASE"), at(lines[1], "severed"));
        assert_eq!(at(lines[0], "PHASE"), at(lines[2], "severed"));
        assert!(lines.iter().all(|line| !line.ends_with(' ')));
    }

    #[test]
    fn a_lease_is_told_as_what_it_is_worth() {
        let mut device = session(1, "gpu");
        assert_eq!(lease(&device), "4.3s");
        device.lease_remaining_ms = 0;
        assert_eq!(lease(&device), "over");
        (device.lease_remaining_ms, device.enforces_lease) = (900, false);
        assert_eq!(lease(&device), "not enforced");
    }

    #[test]
    fn a_round_tells_only_whom_it_waits_for() {
        let told = rounds(&[round()]);
        let line = told.text.lines().nth(1).expect("a line each");
        let words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(words, ["3", "9", "0x1000-0x3000", "protection-vma", "250ms", "gpu2", "(session", "2)"]);
        assert_eq!(told.json["rounds"][0]["targets"][0]["outcome"], "acked");
        assert_eq!(told.json["rounds"][0]["range"]["end"], 0x3000);
    }

    #[test]
    fn a_quarantine_is_told_with_its_budget() {
        let parked = v1::Quarantined { round: Some(round()), bytes: 8192, pages: 2 };
        let listed = v1::ListQuarantineResponse {
            quarantined: vec![parked],
            bytes: 8192,
            most_bytes: 16384,
            pages: 2,
            most_pages: 4,
            ..v1::ListQuarantineResponse::default()
        };
        let told = quarantine(&listed);
        assert!(told.text.ends_with("2 of at most 4 pages, 8192 of at most 16384 bytes\n"), "{}", told.text);
        assert_eq!(told.json["quarantined"][0]["round"]["seq"], 9);
        let none = quarantine(&v1::ListQuarantineResponse::default());
        assert!(none.text.starts_with("nothing is quarantined\n"));
    }

    #[test]
    fn a_name_that_would_move_the_cursor_does_not() {
        let space = v1::AddressSpace { name: "\u{1b}[2Jgone\n".to_owned(), ..v1::AddressSpace::default() };
        let told = address_spaces(std::slice::from_ref(&space));
        assert!(told.text.contains("?[2Jgone?"), "{}", told.text);
        assert_eq!(told.text.lines().count(), 2);
        assert_eq!(told.json["address_spaces"][0]["name"], space.name, "a program is told what it is");
    }
}
