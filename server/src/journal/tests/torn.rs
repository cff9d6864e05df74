//! A torn last record.

use super::*;

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
