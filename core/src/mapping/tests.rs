use super::*;
use crate::event::Access;
use crate::id::FrameNumber;
use std::fmt::Write as _;

fn space(number: u64) -> AddressSpaceId {
    AddressSpaceId::new(number).unwrap()
}

fn pages(first: u64, end: u64) -> AddrRange {
    AddrRange::new(first << 12, end << 12).unwrap()
}

fn translation(range: AddrRange) -> Translation {
    Translation { range, frame: FrameNumber(range.start() >> 12), access: Access::Write }
}

fn over(first: u64, end: u64) -> Scope {
    Scope::Range(AddressSpaceId::FIRST, pages(first, end))
}

fn grant(table: &mut Mappings, first: u64, end: u64) -> CommitTicket {
    table.on_grant(AddressSpaceId::FIRST, translation(pages(first, end))).unwrap()
}

fn hold(table: &mut Mappings, first: u64, end: u64) -> MappingId {
    let ticket = grant(table, first, end);
    table.commit(ticket).unwrap()
}

/// Whether everything but the counters is gone.
fn is_bare(table: &Mappings) -> bool {
    let Mappings { spaces, mappings, waiting, live, uses, .. } = table;
    spaces.is_empty() && mappings.is_empty() && waiting.is_empty() && (*live, *uses) == (0, 0)
}

/// Invariant 2, as far as the table goes: a notice is not quiesced before the last use has ended.
#[test]
fn ack_means_stopped() {
    let mut table = Mappings::new();
    let (wide, near, far) = (hold(&mut table, 0, 8), hold(&mut table, 2, 3), hold(&mut table, 20, 21));
    for id in [wide, wide, near, far] {
        table.begin_use(id).unwrap();
    }
    let notice = table.on_notice(over(2, 3));
    assert_eq!(notice.outstanding_uses, 3);
    assert_eq!(table.begin_use(wide), Err(UseError::Revoked), "no use begins after the notice");
    assert_eq!(table.end_use(wide), []);
    assert_eq!(table.end_use(far), [], "what it does not overlap does not count");
    assert_eq!(table.end_use(near), []);
    assert_eq!(table.end_use(wide), [notice.id]);
    assert_eq!((table.len(), table.draining(), table.unquiesced()), (1, 0, 0));
}

#[test]
fn a_second_notice_waits_for_the_uses_that_the_first_one_found() {
    let mut table = Mappings::new();
    let id = hold(&mut table, 0, 4);
    table.begin_use(id).unwrap();
    let (first, second) = (table.on_notice(over(0, 1)), table.on_notice(over(3, 4)));
    assert_eq!((first.outstanding_uses, second.outstanding_uses), (1, 1));
    assert_eq!(table.on_notice(over(8, 9)).outstanding_uses, 0);
    assert_eq!(table.end_use(id), [first.id, second.id]);
}

#[test]
fn a_notice_waits_for_the_open_uses_of_what_the_device_has_removed() {
    let mut table = Mappings::new();
    let id = hold(&mut table, 0, 1);
    table.begin_use(id).unwrap();
    table.remove(id);
    table.remove(id);
    assert_eq!((table.len(), table.begin_use(id)), (0, Err(UseError::Revoked)));
    let notice = table.on_notice(over(0, 1));
    assert_eq!(notice.outstanding_uses, 1);
    assert_eq!(table.end_use(id), [notice.id]);
}

/// Invariant 3 at the device: a grant that a notice has overtaken is not installed.
#[test]
fn no_grant_in_window() {
    let mut table = Mappings::new();
    let (hit, beside) = (grant(&mut table, 0, 4), grant(&mut table, 4, 5));
    let elsewhere = table.on_grant(space(2), translation(pages(0, 4))).unwrap();
    let _ = table.on_notice(over(3, 4));
    assert_eq!(table.commit(hit), Err(CommitError::Spoiled));
    assert!(table.commit(beside).is_ok());
    assert!(table.commit(elsewhere).is_ok(), "another address space");
    let after = grant(&mut table, 0, 4);
    assert!(table.commit(after).is_ok(), "a grant that came after the notice");
}

/// Trap 10: the making and the unmaking of a mapping, with a notice at each step.
#[test]
fn a_notice_at_each_step_of_create_and_destroy_leaves_nothing_usable() {
    for notice_at in 0..6 {
        let mut table = Mappings::new();
        let mut notices = Vec::new();
        let mut notice_if = |step, table: &mut Mappings| {
            if step == notice_at {
                notices.push(table.on_notice(over(0, 1)));
            }
        };
        notice_if(0, &mut table);
        let ticket = grant(&mut table, 0, 1);
        notice_if(1, &mut table);
        let mapping = table.commit(ticket);
        assert_eq!(mapping.is_err(), notice_at == 1);
        notice_if(2, &mut table);
        let mut quiesced = Vec::new();
        if let Ok(id) = mapping {
            assert_eq!(table.begin_use(id).is_err(), notice_at == 2);
            notice_if(3, &mut table);
            table.remove(id);
            notice_if(4, &mut table);
            quiesced = table.end_use(id);
            assert_eq!(table.begin_use(id), Err(UseError::Revoked));
        }
        notice_if(5, &mut table);
        let waited: Vec<_> = notices.iter().filter(|n| n.outstanding_uses > 0).map(|n| n.id).collect();
        assert_eq!(waited.len(), usize::from(matches!(notice_at, 3 | 4)), "step {notice_at}");
        assert_eq!(quiesced, waited, "step {notice_at}");
        let _ = table.take_young(Scope::FlushAll);
        assert!(is_bare(&table), "step {notice_at}: {table:?}");
    }
}

/// Trap 12: what the device held before a session was lost is refused in the next one.
#[test]
fn ids_and_tickets_of_a_lost_session_stay_refused_after_reopening() {
    let mut table = Mappings::new();
    let (idle, busy) = (hold(&mut table, 0, 1), hold(&mut table, 1, 2));
    let pending = grant(&mut table, 0, 1);
    table.begin_use(busy).unwrap();
    assert_eq!(table.close(), [idle, busy]);
    assert_eq!(table.close(), [], "once");
    assert_eq!(table.begin_use(idle), Err(UseError::Closed));
    assert_eq!(table.on_grant(space(1), translation(pages(0, 1))).unwrap_err(), Closed);
    table.reopen();
    assert_eq!(
        (table.begin_use(idle), table.begin_use(busy)),
        (Err(UseError::Revoked), Err(UseError::Revoked))
    );
    let fresh = grant(&mut table, 0, 1);
    assert_eq!(table.commit(pending), Err(CommitError::Spoiled));
    assert!(table.commit(fresh).is_ok_and(|id| id > busy));
    let notice = table.on_notice(Scope::FlushAll);
    assert_eq!(notice.outstanding_uses, 1, "the old session's use is still waited for");
    assert_eq!(table.end_use(busy), [notice.id]);
}

#[test]
fn a_spoiled_ticket_does_not_come_back_to_life_when_its_address_space_is_forgotten() {
    let mut table = Mappings::new();
    let old = grant(&mut table, 0, 1);
    let _ = table.on_notice(over(0, 1));
    assert!(is_bare(&table));
    let new = grant(&mut table, 0, 1);
    assert_eq!(table.commit(old), Err(CommitError::Spoiled));
    assert!(table.commit(new).is_ok());
}

/// Invariant 20.
#[test]
fn young_is_conservative() {
    let mut table = Mappings::new();
    let (used, unused) = (hold(&mut table, 0, 1), hold(&mut table, 4, 5));
    table.begin_use(used).unwrap();
    let young = [(space(1), pages(0, 1))];
    assert_eq!(table.take_young(Scope::FlushAll), young);
    assert_eq!(table.take_young(Scope::FlushAll), young, "an open use may touch memory at any time");
    assert_eq!(table.end_use(used), []);
    assert_eq!(table.take_young(over(1, 9)), [], "elsewhere");
    assert_eq!(table.take_young(over(0, 1)), young, "once more, for what it did since");
    assert_eq!(table.take_young(Scope::FlushAll), [], "and then no more");
    assert_eq!(table.begin_use(unused).map(|t| t.range), Ok(pages(4, 5)));
}

#[test]
fn what_was_revoked_or_removed_while_young_is_reported_once() {
    let mut table = Mappings::new();
    let (revoked, removed) = (hold(&mut table, 0, 1), hold(&mut table, 8, 9));
    for id in [revoked, removed] {
        table.begin_use(id).unwrap();
        table.end_use(id);
    }
    table.remove(removed);
    let _ = table.on_notice(over(0, 1));
    assert_eq!(table.take_young(Scope::FlushAll), [(space(1), pages(0, 1)), (space(1), pages(8, 9))]);
    assert_eq!(table.take_young(Scope::FlushAll), []);
    assert!(is_bare(&table));
}

#[test]
fn a_huge_mapping_is_reported_whole_for_any_of_its_pages() {
    let mut table = Mappings::new();
    let huge = hold(&mut table, 512, 1024);
    table.begin_use(huge).unwrap();
    table.end_use(huge);
    assert_eq!(table.take_young(over(700, 701)), [(space(1), pages(512, 1024))]);
}

#[test]
fn the_table_is_bare_after_many_mappings_came_and_went() {
    let mut table = Mappings::new();
    for at in 0..1_000 {
        let id = hold(&mut table, at, at + 1);
        table.begin_use(id).unwrap();
        let _ = table.on_notice(over(at, at + 1));
        assert_eq!(table.end_use(id).len(), 1);
        assert_eq!(table.end_use(id), [], "an end too many changes nothing");
        assert_eq!(table.take_young(over(at, at + 1)).len(), 1);
        assert!(is_bare(&table));
    }
    assert_eq!(table.begin_use(MappingId(NonZeroU64::new(1_001).unwrap())), Err(UseError::Unknown));
}

#[test]
fn a_cancelled_ticket_leaves_nothing_behind() {
    let mut table = Mappings::new();
    let (kept, given_up) = (grant(&mut table, 0, 1), grant(&mut table, 0, 1));
    table.cancel(given_up);
    assert_eq!(table.tickets(), 1);
    table.cancel(kept);
    assert!(is_bare(&table));
}

/// How page 0 stands, with its ticket or its mapping.
struct Scene {
    table: Mappings,
    ticket: Option<CommitTicket>,
    id: MappingId,
}

fn scene(state: &str) -> Scene {
    let mut scene = Scene { table: Mappings::new(), ticket: None, id: MappingId(NonZeroU64::MIN) };
    for event in state.split(", ").filter(|event| *event != "nothing") {
        apply(event, &mut scene);
    }
    scene
}

fn apply(event: &str, Scene { table, ticket, id }: &mut Scene) -> String {
    let page = translation(pages(0, 1));
    let noticed =
        |Revocation { id, outstanding_uses }| format!("revocation {}: {outstanding_uses} uses", id.0);
    match event {
        "on_grant" => match table.on_grant(space(1), page) {
            Ok(granted) => {
                *ticket = Some(granted);
                "ticket".into()
            }
            Err(closed) => format!("{closed:?}"),
        },
        "commit" => ticket.take().map_or("-".into(), |ticket| format!("{:?}", table.commit(ticket))),
        "cancel" => ticket.take().map_or("-".into(), |ticket| format!("{:?}", table.cancel(ticket))),
        "begin_use" => table.begin_use(*id).map_or_else(|e| format!("{e:?}"), |t| t.range.to_string()),
        "end_use" => format!("{:?}", table.end_use(*id)),
        "remove" => format!("{:?}", table.remove(*id)),
        "on_notice" => noticed(table.on_notice(over(0, 2))),
        "on_notice elsewhere" => noticed(table.on_notice(Scope::Range(space(2), pages(0, 2)))),
        "on_notice all" => noticed(table.on_notice(Scope::FlushAll)),
        "take_young" => format!("{:?}", table.take_young(over(0, 2))),
        "close" => format!("{:?}", table.close()),
        "reopen" => format!("{:?}", table.reopen()),
        other => panic!("{other} is not an event"),
    }
}

const STATES: [&str; 13] = [
    "nothing",
    "on_grant",
    "on_grant, on_notice",
    "on_grant, commit",
    "on_grant, commit, begin_use",
    "on_grant, commit, begin_use, end_use",
    "on_grant, commit, begin_use, take_young, end_use",
    "on_grant, commit, begin_use, on_notice",
    "on_grant, commit, begin_use, on_notice, end_use",
    "on_grant, commit, begin_use, remove",
    "on_grant, commit, remove",
    "on_grant, commit, begin_use, on_grant, close",
    "on_grant, commit, begin_use, on_grant, close, reopen",
];

const EVENTS: [&str; 12] = [
    "on_grant",
    "commit",
    "cancel",
    "begin_use",
    "end_use",
    "remove",
    "on_notice",
    "on_notice elsewhere",
    "on_notice all",
    "take_young",
    "close",
    "reopen",
];

#[test]
fn every_event_in_every_state() {
    let mut table =
        String::from("state -> event: outcome (live, draining, tickets, uses, unquiesced after it)\n");
    for state in STATES {
        writeln!(table, "\n{state}").unwrap();
        for event in EVENTS {
            let mut scene = scene(state);
            let outcome = apply(event, &mut scene);
            let after = &scene.table;
            let counts = [after.len(), after.draining(), after.tickets(), after.uses(), after.unquiesced()];
            writeln!(table, "  -> {event:<20}{outcome:<48}{counts:?}").unwrap();
        }
    }
    insta::assert_snapshot!("mapping_transitions", table);
}
