//! What is written is read again, and what was torn or changed is not taken for more than it is.

use super::*;

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

/// Who has a name of its choice in a torn frame could have the journal taken for damaged.
#[test]
fn no_name_is_taken_for_a_frame() {
    let is_text = |number: &u64| std::str::from_utf8(&frame(7, *number, &[])).is_ok();
    assert_eq!((1..100_000).find(is_text), None);
}
