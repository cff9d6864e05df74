//! What the records of a journal add up to.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use shootdown_core::lease::LeaseTerms;
use shootdown_core::{DeviceId, Epoch, Incarnation, SessionId};

use super::drained::Drained;
use super::record::{BootMoment, Record, Run, SessionRecord, UNNAMED, is_same_boot};

/// What is known of the runs before.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct History {
    /// The last run.
    pub(crate) last: Option<Run>,
    /// Sessions that may hold leases.
    pub(crate) sessions: BTreeMap<SessionId, SessionRecord>,
    /// What the last run left when it ended as planned; nothing came after it.
    pub(crate) drained: Option<Drained>,
    /// The longest lease that any run granted.
    pub(crate) longest: Option<LeaseTerms>,
    /// Whether a session may be of a device that does not enforce its lease: one that there is, or one that the last
    /// run opened.
    pub(super) has_unenforced: bool,
}

impl History {
    pub(crate) fn of(records: impl IntoIterator<Item = Record>) -> Self {
        let mut history = Self::default();
        records.into_iter().for_each(|record| history.apply(record));
        history
    }

    pub(super) fn apply(&mut self, record: Record) {
        if record != Record::Complete {
            // What a planned end left is good for the very next run only.
            self.drained = None;
        }
        match record {
            Record::Began(run) => {
                self.last = self.last.max_by_number(run);
                self.may_have_granted(run.terms);
                self.has_unenforced = self.sessions.values().any(|session| !session.enforces_lease);
            }
            Record::Opened(session) => {
                self.may_have_granted(session.terms);
                self.has_unenforced |= !session.enforces_lease;
                self.sessions.insert(session.id, session);
            }
            Record::Over(id) => drop(self.sessions.remove(&id)),
            Record::Complete => {}
            Record::Drained(drained) => self.drained = Some(drained),
            Record::Unenforced => self.has_unenforced = true,
        }
    }

    fn may_have_granted(&mut self, terms: LeaseTerms) {
        let longest = self.longest.map_or(Duration::ZERO, |longest| longest.host_duration());
        if terms.host_duration() > longest {
            self.longest = Some(terms);
        }
    }

    /// The last record is torn: it may have been that of a session. It was never synced, so nobody was
    /// welcomed on it; unless the medium lost what it had promised to keep, which looks the same. So the
    /// longest lease is waited for, on behalf of a session without a name; and where that may have been of a device
    /// which does not stop at its lease's end, for somebody who says that it has.
    pub(super) fn on_torn(&mut self) {
        let (Some(last), Some(terms)) = (self.last, self.longest) else { return };
        let Some(id) = SessionId::new(last.first_number().saturating_add(Run::NUMBERS - 1)) else { return };
        let device = DeviceId::new(UNNAMED).expect("a constant that is a name");
        let (incarnation, epoch) = (Incarnation::FIRST, Epoch::FIRST);
        let record = SessionRecord {
            id,
            device,
            incarnation,
            epoch,
            terms,
            enforces_lease: !self.has_unenforced,
            unrenewed_since: None,
        };
        self.drained = None;
        self.sessions.insert(id, record);
    }

    /// A run begins at `now`. In another boot it goes on with nothing: the memory behind every translation is gone.
    /// Sessions that it does not go on with are renewed by nobody from now on; returns those of which that was not
    /// known.
    pub(super) fn on_begin(&mut self, now: &BootMoment) -> Vec<SessionRecord> {
        self.drained = self.drained.take().filter(|drained| is_same_boot(&drained.boot_id, &now.boot_id));
        let resumable: HashSet<SessionId> = self
            .drained
            .iter()
            .flat_map(|drained| &drained.sessions)
            .map(|resumable| resumable.session.id)
            .collect();
        let left = self.sessions.values_mut().filter(|session| !resumable.contains(&session.id));
        let news = left.filter(|session| {
            session.unrenewed_since.as_ref().is_none_or(|since| !since.is_of(&now.boot_id))
        });
        news.map(|session| {
            session.unrenewed_since = Some(now.clone());
            session.clone()
        })
        .collect()
    }

    /// The fewest records that say the same. What was torn and what was drained is the reader's to act on.
    pub(super) fn snapshot(&self) -> Vec<Record> {
        let runs = self.last.map(|last| Run { terms: self.longest.unwrap_or(last.terms), ..last });
        let began = runs.map(Record::Began);
        let unenforced = self.has_unenforced.then_some(Record::Unenforced);
        began
            .into_iter()
            .chain(unenforced)
            .chain(self.sessions.values().cloned().map(Record::Opened))
            .collect()
    }
}

trait Later {
    fn max_by_number(self, run: Run) -> Self;
}

impl Later for Option<Run> {
    fn max_by_number(self, run: Run) -> Self {
        let later = |last: &Run| last.number > run.number;
        self.filter(later).or(Some(run))
    }
}
