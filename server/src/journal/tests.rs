mod format;
mod torn;
mod takeover;
mod power_loss;

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::source::rpc::registrations::ToRegister;
use crate::source::rpc::releases::Released;
use crate::source::rpc::retries::{Asked, MayWait, Over};
use crate::source::{NotifyError, Strictness};
use proptest::prelude::*;
use shootdown_core::lease::LeaseTerms;
use shootdown_core::{
    Access, AddrRange, AddressSpaceId, Cause, CauseSet, DeviceId, Epoch, FrameNumber, Incarnation, Method,
    Moment, NoticeNumber, OwnerTag, PageSize, Seq, SessionId, SubscriptionId, Translation,
};
use shootdown_proto::convert;
use shootdown_proto::message::{CallId, RequestId};

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
    Journal::open(Arc::new(Disk), path, Takeover::Never, Writer::Thread, now(at), terms, || boot_moment(at))
        .unwrap()
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

/// Each method, and each outcome.
fn over() -> Vec<(CallId, Over)> {
    let (range, owner, address_space) = (AddrRange::ALL, OwnerTag::new(8), AddressSpaceId::new(4).unwrap());
    let page = AddrRange::page_of(4096, PageSize::BASE);
    let translation = Translation { range: page, frame: FrameNumber(3), access: Access::Read };
    let start = |may_wait| Asked::Start { range, cause: Cause::Unmap, owner, may_wait };
    let no_place = NotifyError::TooManyRounds { address_space, most: 4 };
    let full = NotifyError::QuarantineFull { bytes: 1, pages: 2, most_bytes: 3, most_pages: 4 };
    let over = [
        Over::Ended(Seq::FIRST),
        Over::Settled(start(MayWait::Yes), Seq::FIRST),
        Over::Settled(Asked::Page { address: 4096, cause: Cause::Clear, owner: None }, Seq::FIRST),
        Over::Settled(Asked::Around { method: Method::ChangePte(translation), range: page }, Seq::FIRST),
        Over::Settled(Asked::Around { method: Method::ClearYoung, range: page }, Seq::FIRST),
        Over::WouldBlock(start(MayWait::No)),
        Over::Refused(start(MayWait::No), no_place),
        Over::Refused(Asked::Around { method: Method::ClearFlushYoung, range: page }, full),
    ];
    let name = |(number, over)| (convert::call_id(&format!("over-{number}")).unwrap().unwrap(), over);
    over.into_iter().enumerate().map(name).collect()
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
            over: over(),
        }],
        registered: [Ok(AddressSpaceId::FIRST), Err(NotifyError::TooManyAddressSpaces { most: 3 })]
            .map(|outcome| {
                let call = convert::call_id("register-1").unwrap().unwrap();
                let (name, taken_back) = ("vm".to_owned(), AddressSpaceId::new(4));
                (call, ToRegister { name, strictness: Strictness::Strict, taken_back }, outcome)
            })
            .into(),
        released: vec![Released {
            address_space: AddressSpaceId::new(5).unwrap(),
            call: convert::call_id("release-1").unwrap().unwrap(),
            seq: Seq::new(7),
        }],
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
    let successor = Journal::open(
        Arc::new(Disk),
        folder.path(),
        Takeover::IfHeld,
        Writer::Thread,
        now(2),
        LeaseTerms::default(),
        || {
            was_current = Some(old.standing() == Standing::Current);
            boot_moment(2)
        },
    );
    assert_eq!(was_current, Some(false));
    drop(successor);
}

/// Whoever writes itself finds the same, at once, and its end is the same.
#[test]
fn a_journal_without_a_thread_is_durable_when_the_call_returns() {
    let folder = tempfile::tempdir().unwrap();
    let open_alone = |at| {
        let terms = LeaseTerms::default();
        let writer = Writer::Caller;
        Journal::open(Arc::new(Disk), folder.path(), Takeover::Never, writer, now(at), terms, || {
            boot_moment(at)
        })
        .unwrap()
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
        let second =
            Journal::open(Arc::new(Disk), folder.path(), Takeover::Never, writer, now(200), terms, clock)
                .unwrap();
        assert_eq!(second.before.drained, None, "boot {boot:?}");
        assert_eq!(second.run.incarnation, now(200), "boot {boot:?}");
        let survivor = second.before.sessions.values().next().unwrap();
        assert_eq!(survivor.unrenewed_since, Some(clock()), "its lease is counted from the start");
        second.journal.close(None);
    }
}
