//! Who has the journal.

use super::*;

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

/// It hangs between taking the directory and writing that it began: its successor cannot know of it, and would give
/// out the same numbers, after a planned end as the same incarnation.
#[test]
fn a_run_that_is_taken_over_from_before_it_began_does_not_begin() {
    let folder = tempfile::tempdir().unwrap();
    open(folder.path(), 1).journal.close(Some(drained()));
    let start = |at, clock: &mut dyn FnMut() -> BootMoment| {
        let terms = LeaseTerms::default();
        Journal::open(Arc::new(Disk), folder.path(), Takeover::IfHeld, Writer::Caller, now(at), terms, clock)
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
