mod power_loss;

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::source::Strictness;
use crate::source::rpc::registrations::ToRegister;
use crate::source::rpc::releases::Released;
use crate::source::rpc::retries::MayWait;
use proptest::prelude::*;
use shootdown_core::lease::LeaseTerms;
use shootdown_core::{
    AddrRange, AddressSpaceId, Cause, CauseSet, DeviceId, Epoch, Incarnation, Moment, NoticeNumber, Seq,
    SessionId, SubscriptionId,
};
use shootdown_proto::convert;
use shootdown_proto::message::RequestId;

use super::file::JournalFile;
use super::record::{Record, frame, header, read};
use super::*;

fn boot_moment(at: u64) -> BootMoment {
    BootMoment { boot_id: "this boot".to_owned(), at: Moment::from_nanos(at) }
}

fn session(id: u64) -> SessionRecord {
    SessionRecord {
        id: SessionId::new(id).unwrap(),
        device: DeviceId::new(&format!("gpu{id}")).unwrap(),
        incarnation: Incarnation::new(id + 7).unwrap(),
        epoch: Epoch::new(id).unwrap(),
        terms: LeaseTerms { duration: Duration::from_millis(id), ..LeaseTerms::default() },
        enforces_lease: id.is_multiple_of(2),
        unrenewed_since: id.is_multiple_of(3).then(|| boot_moment(id)),
    }
}

fn ids(history: &History) -> Vec<u64> {
    history.sessions.keys().map(|id| id.get()).collect()
}

fn now(nanos: u64) -> Incarnation {
    Incarnation::new(nanos).unwrap()
}

fn take(path: &Path) -> (JournalFile, History) {
    JournalFile::take(path, Takeover::Never, Arc::new(Disk)).unwrap()
}

fn open(path: &Path, at: u64) -> Opened {
    let terms = LeaseTerms::default();
    Journal::open(path, Takeover::Never, Writer::Thread, now(at), terms, || boot_moment(at)).unwrap()
}

fn is_current(claim: &Claim) -> bool {
    claim.standing() == Standing::Current
}

/// The one journal file that there is.
fn only(path: &Path) -> std::path::PathBuf {
    let mut files: Vec<_> = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    files.remove(0)
}

fn drained() -> Drained {
    let subscription = DrainedSubscription {
        id: SubscriptionId::new(3).unwrap(),
        address_space: AddressSpaceId::new(4).unwrap(),
        ranges: vec![AddrRange::ALL, AddrRange::new(4096, 8192).unwrap()],
        causes: CauseSet::of([Cause::Unmap]),
        wants_end: true,
        request: RequestId::new(21).unwrap(),
    };
    Drained {
        boot_id: "this boot".to_owned(),
        sessions: vec![DrainedSession {
            session: session(5),
            lease_expires: Moment::from_nanos(17),
            acked_through: NoticeNumber::new(9),
            window: 8,
            change_pte: true,
            subscriptions: vec![
                DrainedSubscription { causes: CauseSet::EVERY, ..subscription.clone() },
                subscription,
            ],
        }],
        spaces: vec![DrainedSpace {
            id: AddressSpaceId::new(4).unwrap(),
            name: "vm".to_owned(),
            last_seq: None,
            began_after: Some(Seq::FIRST),
            open_brackets: vec![DrainedBracket {
                seq: Seq::FIRST,
                range: AddrRange::ALL,
                cause: Cause::Clear,
                owner: None,
                start: convert::call_id("start-1").unwrap().map(|id| (id, MayWait::No)),
            }],
            strictness: Strictness::Strict,
            ended: vec![(convert::call_id("end-0").unwrap().unwrap(), Seq::FIRST)],
            registered: convert::call_id("register-1").unwrap().map(|call| {
                let (name, taken_back) = ("vm".to_owned(), AddressSpaceId::new(4));
                (call, ToRegister { name, strictness: Strictness::Strict, taken_back })
            }),
        }],
        released: vec![Released {
            address_space: AddressSpaceId::new(5).unwrap(),
            call: convert::call_id("release-1").unwrap().unwrap(),
            seq: Seq::new(7),
        }],
    }
}

fn any_record() -> impl Strategy<Value = Record> {
    prop_oneof![
        8 => (1..6_u64).prop_map(|id| Record::Opened(session(id))),
        4 => (1..6_u64).prop_map(|id| Record::Over(SessionId::new(id).unwrap())),
        1 => (0..9_u64).prop_map(|number| Record::Began(Run {
            number,
            incarnation: now(number + 1),
            terms: LeaseTerms { duration: Duration::from_millis(number), ..LeaseTerms::default() },
        })),
        1 => Just(Record::Complete),
        1 => Just(Record::Drained(drained())),
        1 => Just(Record::Unenforced),
    ]
}

/// A file of these frames, and where each of them ends.
fn file_of(frames: &[Vec<Record>]) -> (Vec<u8>, Vec<usize>) {
    let (mut bytes, mut ends) = (header(7), Vec::new());
    for (number, records) in frames.iter().enumerate() {
        bytes.extend(frame(7, number as u64, records));
        ends.push(bytes.len());
    }
    (bytes, ends)
}

fn any_frames() -> impl Strategy<Value = Vec<Vec<Record>>> {
    prop::collection::vec(prop::collection::vec(any_record(), 1..4), 1..6)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_prefix_of_a_journal_opens_to_a_prefix_of_its_history(frames in any_frames()) {
        let (bytes, ends) = file_of(&frames);
        for cut in super::record::HEADER_BYTES..=bytes.len() {
            let contents = read(&bytes[..cut], 7).expect("a torn tail is no damage");
            let whole = ends.iter().filter(|end| **end <= cut).count();
            let expected: Vec<Record> = frames[..whole].iter().flatten().cloned().collect();
            prop_assert_eq!(&contents.records, &expected);
            let kept = if whole == 0 { super::record::HEADER_BYTES } else { ends[whole - 1] };
            prop_assert_eq!(contents.torn, cut - kept);
        }
    }

    /// In the last frame it cannot be told from a torn tail; before it, it is found.
    #[test]
    fn a_flipped_byte_is_found_or_is_a_torn_tail_and_never_another_history(
        frames in any_frames(),
        mask in 1..=u8::MAX,
    ) {
        let (bytes, ends) = file_of(&frames);
        let last = if ends.len() > 1 { ends[ends.len() - 2] } else { super::record::HEADER_BYTES };
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= mask;
            match read(&damaged, 7) {
                Err((found, _)) => prop_assert!(found <= at && at < last, "{found} for {at}"),
                Ok(contents) => {
                    prop_assert!(at >= last, "a damage at {at} was taken for a torn tail");
                    let before: Vec<Record> = frames[..frames.len() - 1].iter().flatten().cloned().collect();
                    prop_assert_eq!(contents.records, before);
                    prop_assert_eq!(contents.torn, bytes.len() - last);
                }
            }
        }
    }

    /// Against a set that is kept beside it, across appends, compactions and restarts.
    #[test]
    fn a_journal_says_after_a_restart_what_was_said_before(
        steps in prop::collection::vec((0..8_u8, 1..20_u64), 1..40),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let (mut file, _) = take(folder.path());
        let mut open = std::collections::BTreeSet::new();
        for (step, id) in steps {
            match step {
                0..=3 => {
                    file.append(&[Record::Opened(session(id))]).unwrap();
                    open.insert(id);
                }
                4..=5 => {
                    file.append(&[Record::Over(SessionId::new(id).unwrap())]).unwrap();
                    open.remove(&id);
                }
                6 => file.compact().unwrap(),
                _ => {
                    drop(file);
                    let (next, history) = take(folder.path());
                    prop_assert_eq!(ids(&history), open.iter().copied().collect::<Vec<_>>());
                    file = next;
                }
            }
            prop_assert!(is_current(file.claim()));
        }
        drop(file);
        prop_assert_eq!(ids(&take(folder.path()).1), open.into_iter().collect::<Vec<_>>());
    }
}

#[test]
fn each_run_has_a_higher_incarnation_and_numbers_of_its_own_even_if_the_clock_goes_back() {
    let folder = tempfile::tempdir().unwrap();
    let first = open(folder.path(), 1_000);
    assert_eq!((first.run.incarnation, first.run.first_number()), (now(1_000), 1));
    first.journal.close(None);
    let second = open(folder.path(), 10);
    assert_eq!(second.run.incarnation, now(1_001));
    assert_eq!(second.run.first_number(), Run::NUMBERS + 1);
    second.journal.close(None);
    assert_eq!(open(folder.path(), 5_000).run.incarnation, now(5_000));
}

#[test]
fn a_second_owner_is_refused_while_the_first_lives() {
    let folder = tempfile::tempdir().unwrap();
    let (first, _) = take(folder.path());
    let refused = JournalFile::take(folder.path(), Takeover::Never, Arc::new(Disk)).unwrap_err();
    assert!(matches!(refused, JournalError::Held { .. }), "{refused}");
    assert!(is_current(first.claim()), "and nothing happened to it");
    drop(first);
    take(folder.path());
}

#[test]
fn who_is_taken_over_from_knows_it_by_a_look_and_cannot_compact_it_away() {
    let folder = tempfile::tempdir().unwrap();
    let (mut first, _) = take(folder.path());
    first.append(&[Record::Opened(session(1))]).unwrap();
    let claim = first.claim().clone();
    let (mut second, history) = JournalFile::take(folder.path(), Takeover::IfHeld, Arc::new(Disk)).unwrap();
    assert_eq!(ids(&history), [1]);
    assert!(!is_current(&claim) && is_current(second.claim()));
    assert!(matches!(first.compact(), Err(AppendError::Superseded)));
    // However far the successor has come.
    second.compact().unwrap();
    second.compact().unwrap();
    assert!(matches!(first.compact(), Err(AppendError::Superseded)));
    assert!(!is_current(&claim) && is_current(second.claim()));
    second.append(&[Record::Opened(session(2))]).unwrap();
    drop(second);
    assert_eq!(ids(&take(folder.path()).1), [1, 2]);
}

/// The file of the next generation is there, and its maker died before it had read the one before.
#[test]
fn a_takeover_that_was_cut_short_loses_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let (mut first, _) = take(folder.path());
    first.append(&[Record::Opened(session(1))]).unwrap();
    drop(first);
    fs::write(folder.path().join("journal.2"), header(2)).unwrap();
    assert_eq!(ids(&take(folder.path()).1), [1]);
    // With the file before it gone, nobody knows.
    fs::remove_file(only(folder.path())).unwrap();
    fs::write(folder.path().join("journal.9"), header(9)).unwrap();
    let refused = JournalFile::take(folder.path(), Takeover::Never, Arc::new(Disk)).unwrap_err();
    assert!(matches!(refused, JournalError::Damaged { damage: Damage::Incomplete, .. }), "{refused}");
}

#[test]
fn a_damage_is_told_with_its_file_and_its_byte_and_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let opened = open(folder.path(), 1);
    opened.journal.close(None);
    let (mut file, _) = take(folder.path());
    let at = file.bytes();
    for id in 1..4 {
        file.append(&[Record::Opened(session(id))]).unwrap();
    }
    drop(file);
    let path = only(folder.path());
    let mut bytes = fs::read(&path).unwrap();
    bytes[usize::try_from(at).unwrap() + 21] ^= 1;
    fs::write(&path, &bytes).unwrap();
    for takeover in [Takeover::Never, Takeover::IfHeld] {
        let refused = JournalFile::take(folder.path(), takeover, Arc::new(Disk)).unwrap_err().to_string();
        assert!(refused.contains(path.to_str().unwrap()), "{refused}");
        assert!(refused.contains(&format!("byte {at}:")), "{refused}");
        assert!(refused.contains("start again"), "it says what to do: {refused}");
    }
    assert_eq!(fs::read(only(folder.path())).unwrap(), bytes);
}

#[test]
fn a_file_of_a_later_version_is_refused_as_such() {
    let mut bytes = header(7);
    bytes[8] = 2;
    let crc = crc32c::crc32c(&bytes[..20]).to_le_bytes();
    bytes[20..].copy_from_slice(&crc);
    assert_eq!(read(&bytes, 7), Err((8, Damage::Version(2))));
}

/// Torn at every byte of its last record, which may have been any session's.
#[test]
fn a_torn_record_keeps_the_sessions_before_it_and_one_without_a_name() {
    let folder = tempfile::tempdir().unwrap();
    open(folder.path(), 1).journal.close(None);
    let (mut file, _) = take(folder.path());
    file.append(&[Record::Opened(session(1))]).unwrap();
    let whole = file.bytes();
    file.append(&[Record::Opened(session(2))]).unwrap();
    drop(file);
    let path = only(folder.path());
    let bytes = fs::read(&path).unwrap();
    for cut in usize::try_from(whole).unwrap()..=bytes.len() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(path.file_name().unwrap()), &bytes[..cut]).unwrap();
        let named = |history: &History| {
            history.sessions.values().map(|session| session.device.to_string()).collect::<Vec<_>>()
        };
        let expected: &[&str] = match cut {
            _ if cut as u64 == whole => &["gpu1"],
            _ if cut == bytes.len() => &["gpu1", "gpu2"],
            _ => &["gpu1", "unnamed:torn-journal"],
        };
        let (file, history) = take(folder.path());
        assert_eq!(named(&history), expected, "cut at {cut}");
        drop(file);
        // It is written down now: a crash right after does not forget it.
        assert_eq!(named(&take(folder.path()).1), expected, "cut at {cut}, the second time");
    }
}

fn unenforced(id: u64) -> SessionRecord {
    SessionRecord { enforces_lease: false, ..session(id) }
}

fn enforced(id: u64) -> SessionRecord {
    SessionRecord { enforces_lease: true, ..session(id) }
}

/// What the last frame says cannot be known, so what it may have said counts: time alone ends the wait for a device
/// that enforces its lease, and for no other. Torn at every byte of it.
#[test]
fn a_torn_record_may_be_of_a_device_that_enforces_no_lease_where_there_may_be_one() {
    let cases: [(&str, &[SessionRecord], bool); 4] = [
        ("every device of the run enforces its lease", &[enforced(1), enforced(2)], true),
        ("one that is there does not", &[unenforced(1), enforced(2)], false),
        ("the first that does not is torn", &[enforced(1), unenforced(2)], false),
        ("and it is the first of all", &[unenforced(2)], false),
    ];
    for (what, sessions, enforces_lease) in cases {
        let folder = tempfile::tempdir().unwrap();
        open(folder.path(), 1).journal.close(None);
        let (mut file, _) = take(folder.path());
        let (last, before) = sessions.split_last().unwrap();
        for session in before {
            file.append(&[Record::Opened(session.clone())]).unwrap();
        }
        file.append(&[Record::Opened(last.clone())]).unwrap();
        // The frame of the last alone, wherever it begins.
        let last_frame = frame(2, 0, &[Record::Opened(last.clone())]).len();
        let whole = usize::try_from(file.bytes()).unwrap() - last_frame;
        drop(file);
        let path = only(folder.path());
        let bytes = fs::read(&path).unwrap();
        for cut in whole + 1..bytes.len() {
            let folder = tempfile::tempdir().unwrap();
            fs::write(folder.path().join(path.file_name().unwrap()), &bytes[..cut]).unwrap();
            for time in ["the first", "the second"] {
                let (_, history) = take(folder.path());
                let unnamed = history.sessions.values().find(|session| session.is_unnamed()).unwrap();
                assert_eq!(unnamed.enforces_lease, enforces_lease, "{what}; cut at {cut}, {time} time");
            }
        }
    }
}

/// Who is gone costs nobody a person's attention.
#[test]
fn a_device_that_enforced_no_lease_and_has_left_counts_to_the_end_of_its_run() {
    let folder = tempfile::tempdir().unwrap();
    let tear = |session| {
        let opened = open(folder.path(), 2);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(opened.journal.opened(session)).unwrap();
        opened.journal.close(None);
        let path = only(folder.path());
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        let (_, history) = take(folder.path());
        history.sessions.values().find(|session| session.is_unnamed()).unwrap().enforces_lease
    };
    let first = open(folder.path(), 1);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        first.journal.opened(unenforced(2)).await.unwrap();
        first.journal.over(SessionId::new(2).unwrap()).await;
    });
    first.journal.close(None);
    assert!(tear(enforced(3)), "none in this run");
}

#[test]
fn a_journal_does_not_grow_with_the_sessions_that_there_were() {
    let folder = tempfile::tempdir().unwrap();
    let (mut file, _) = take(folder.path());
    file.append(&[Record::Opened(session(1))]).unwrap();
    for id in 2..2_000 {
        file.append(&[Record::Opened(session(id)), Record::Over(SessionId::new(id).unwrap())]).unwrap();
        assert!(file.bytes() < 70 << 10, "{} bytes after {id} sessions", file.bytes());
    }
    drop(file);
    only(folder.path());
    assert_eq!(ids(&take(folder.path()).1), [1]);
}

/// The kernel's own full device in the place of the file: what could not be written is refused, and the
/// next record goes to a new file that has all that was promised.
#[test]
fn a_full_disk_refuses_a_record_and_loses_none() {
    let folder = tempfile::tempdir().unwrap();
    let (mut file, _) = take(folder.path());
    file.append(&[Record::Opened(session(1))]).unwrap();
    file.break_file(fs::File::options().read(true).write(true).open("/dev/full").unwrap());
    let refused = file.append(&[Record::Opened(session(2))]).unwrap_err();
    assert!(matches!(&refused, AppendError::Io(_)), "{refused}");
    file.append(&[Record::Opened(session(3))]).unwrap();
    assert!(is_current(file.claim()));
    drop(file);
    assert_eq!(ids(&take(folder.path()).1), [1, 3]);
}

/// Nobody goes on from a journal that is gone, and who starts anew does not know of its sessions.
#[test]
fn a_journal_that_is_removed_or_moved_away_is_not_a_successors() {
    type Step = fn(&Path);
    let steps: [(&str, Step); 4] = [
        ("the directory is removed", |state| fs::remove_dir_all(state).unwrap()),
        ("the file is removed", |state| fs::remove_file(only(state)).unwrap()),
        ("the file is moved", |state| fs::rename(only(state), state.with_extension("old")).unwrap()),
        ("another is in its place", |state| {
            let file = only(state);
            fs::copy(&file, file.with_extension("copy")).unwrap();
            fs::rename(file.with_extension("copy"), file).unwrap();
        }),
    ];
    for (what, step) in steps {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("state");
        let (mut file, _) = take(&state);
        // Not the first generation: one that starts anew has lower ones.
        file.compact().unwrap();
        file.compact().unwrap();
        assert_eq!(file.claim().standing(), Standing::Current);
        step(&state);
        assert_eq!(file.claim().standing(), Standing::Removed, "{what}");
        if only_if_any(&state).is_none() {
            let _successor = take(&state);
            assert_eq!(file.claim().standing(), Standing::Removed, "{what}, and somebody starts");
        }
    }
    // However far a successor has come.
    let folder = tempfile::tempdir().unwrap();
    let (file, _) = take(folder.path());
    let (mut next, _) = JournalFile::take(folder.path(), Takeover::IfHeld, Arc::new(Disk)).unwrap();
    next.compact().unwrap();
    assert_eq!(file.claim().standing(), Standing::Superseded);
}

fn only_if_any(state: &Path) -> Option<fs::DirEntry> {
    fs::read_dir(state).ok()?.next()?.ok()
}

/// What a planned end leaves is good for the very next run.
#[test]
fn resume_points_are_for_the_next_run_and_for_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let first = open(folder.path(), 100);
    first.journal.close(Some(drained()));
    let second = open(folder.path(), 200);
    assert_eq!(second.before.drained, Some(drained()));
    assert_eq!(second.run.incarnation, first.run.incarnation, "it goes on in its place");
    assert!(second.run.first_number() > first.run.first_number());
    second.journal.close(None);
    let third = open(folder.path(), 300);
    assert_eq!(third.before.drained, None);
    assert_eq!(third.run.incarnation, now(300));
}

#[test]
fn requests_that_come_together_are_durable_together() {
    let folder = tempfile::tempdir().unwrap();
    let opened = open(folder.path(), 1);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let journal = opened.journal.clone();
    runtime.block_on(async {
        let all = futures_util::future::join_all((1..200).map(|id| journal.opened(session(id)))).await;
        assert!(all.into_iter().all(|written| written.is_ok()));
        journal.over(SessionId::FIRST).await;
    });
    drop(journal);
    opened.journal.close(None);
    assert_eq!(ids(&open(folder.path(), 2).before), (2..200).collect::<Vec<_>>());
}

/// A run that is taken over from renews leases until the file is not its own: what cannot be renewed any more is
/// counted from no earlier moment.
#[test]
fn the_moment_from_which_leases_are_counted_is_after_the_takeover() {
    let folder = tempfile::tempdir().unwrap();
    let old = open(folder.path(), 1).journal;
    let mut was_current = None;
    let successor =
        Journal::open(folder.path(), Takeover::IfHeld, Writer::Thread, now(2), LeaseTerms::default(), || {
            was_current = Some(old.standing() == Standing::Current);
            boot_moment(2)
        });
    assert_eq!(was_current, Some(false));
    drop(successor);
}

/// It hangs between taking the directory and writing that it began: its successor cannot know of it, and would give
/// out the same numbers, after a planned end as the same incarnation.
#[test]
fn a_run_that_is_taken_over_from_before_it_began_does_not_begin() {
    let folder = tempfile::tempdir().unwrap();
    open(folder.path(), 1).journal.close(Some(drained()));
    let start = |at, clock: &mut dyn FnMut() -> BootMoment| {
        let terms = LeaseTerms::default();
        Journal::open(folder.path(), Takeover::IfHeld, Writer::Caller, now(at), terms, clock)
    };
    let mut successor = None;
    let hung = start(2, &mut || {
        successor = Some(start(3, &mut || boot_moment(3)).unwrap());
        boot_moment(2)
    });
    let hung = hung.map(|opened| opened.run);
    assert!(
        matches!(hung, Err(JournalError::Held { .. })),
        "{hung:?} beside {:?}",
        successor.map(|it| it.run)
    );
}

/// Whoever writes itself finds the same, at once, and its end is the same.
#[test]
fn a_journal_without_a_thread_is_durable_when_the_call_returns() {
    let folder = tempfile::tempdir().unwrap();
    let open_alone = |at| {
        let terms = LeaseTerms::default();
        let writer = Writer::Caller;
        Journal::open(folder.path(), Takeover::Never, writer, now(at), terms, || boot_moment(at)).unwrap()
    };
    let on_disk = || History::of(read(&fs::read(only(folder.path())).unwrap(), 1).unwrap().records);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let Opened { journal, .. } = open_alone(1);
    runtime.block_on(async {
        journal.opened(session(1)).await.unwrap();
        assert_eq!(ids(&on_disk()), [1]);
        journal.over(SessionId::FIRST).await;
        assert_eq!(ids(&on_disk()), [0_u64; 0]);
    });
    journal.clone().close(Some(drained()));
    assert!(runtime.block_on(journal.opened(session(2))).is_err(), "it is closed");
    drop(journal);
    assert_eq!(open_alone(2).before.drained, Some(drained()));
}

/// After a reboot no translation is worth anything: the memory behind it is gone.
#[test]
fn resume_points_of_another_boot_are_a_crash() {
    for boot in ["another boot", ""] {
        let folder = tempfile::tempdir().unwrap();
        let first = open(folder.path(), 100);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(first.journal.opened(session(5))).unwrap();
        first.journal.close(Some(drained()));
        let (terms, writer) = (LeaseTerms::default(), Writer::Thread);
        let clock = || BootMoment { boot_id: boot.to_owned(), ..boot_moment(200) };
        let second = Journal::open(folder.path(), Takeover::Never, writer, now(200), terms, clock).unwrap();
        assert_eq!(second.before.drained, None, "boot {boot:?}");
        assert_eq!(second.run.incarnation, now(200), "boot {boot:?}");
        let survivor = second.before.sessions.values().next().unwrap();
        assert_eq!(survivor.unrenewed_since, Some(clock()), "its lease is counted from the start");
        second.journal.close(None);
    }
}
