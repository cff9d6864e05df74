//! Sections that are open for too long, by name.

use crate::{
    core::Core,
    grace::Waiting,
    record::{RecordId, Section},
    sync::lock_plain,
};
use std::{
    collections::BTreeMap,
    fmt,
    panic::Location,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

/// A read section that is open for longer than its domain allows, or that outlived its domain.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stall {
    /// The name of the domain.
    pub domain: Arc<str>,
    /// Where the section was begun: the call of `read`.
    pub location: &'static Location<'static>,
    /// For how long it is known to be open; see [`Ages`](crate::Ages).
    pub age: Duration,
    /// For how long a grace period of the domain has been waiting, if one is.
    pub waited: Option<Duration>,
    /// The last handle of the domain is gone and the section is still open: its guard was forgotten, or outlives
    /// whoever could have waited for it.
    pub leaked: bool,
}

impl fmt::Display for Stall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { domain, location, age, waited, leaked } = self;
        write!(f, "domain {domain:?}: read section taken at {location} has been open for at least {age:?}")?;
        if let Some(waited) = waited {
            write!(f, ", and a grace period has been waiting for {waited:?}")?;
        }
        if *leaked {
            write!(f, ", and the domain's last handle is gone")?;
        }
        Ok(())
    }
}

/// What is done with a stall.
pub(crate) enum Report {
    StandardError,
    Callback(Arc<dyn Fn(&Stall) + Send + Sync>),
}

impl Report {
    fn send(&self, stall: &Stall) {
        match self {
            Self::StandardError => eprintln!("srcu: {stall}"),
            Self::Callback(on_stall) => on_stall(stall),
        }
    }
}

/// What the watchdog remembers of the open sections, by their record.
#[derive(Default)]
pub(crate) struct Watch(Mutex<BTreeMap<RecordId, Mark>>);

#[derive(Clone, Copy)]
struct Mark {
    /// Of the section that was seen; another one in the same record is another section.
    serial: u64,
    first_seen: Instant,
    /// The age at which it is reported again.
    report_at: Duration,
}

/// Why the watchdog looks.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Occasion {
    Check,
    /// Every open section is reported, however young: nobody will ask again.
    LastHandleDropped,
}

impl Core {
    /// One pass of the watchdog: the stalls, oldest first; those that are due are reported.
    pub(crate) fn find_stalls(&self, occasion: Occasion) -> Vec<Stall> {
        let now = self.config.clock.now();
        let sections = self.records.sections();
        let waiting = self.waiting();
        let waited = waiting.map(|waiting| now.saturating_duration_since(waiting.since));

        let mut stalls = Vec::new();
        {
            let mut marks = lock_plain(&self.watch.0);
            let mut open = BTreeMap::new();
            for section in sections {
                let fresh =
                    Mark { serial: section.serial, first_seen: now, report_at: self.config.stall_after };
                let known = marks.get(&section.record).copied().filter(|mark| mark.serial == section.serial);
                let mut mark = known.unwrap_or(fresh);
                let age = self.age_of(&section, &mark, waiting, now);
                if age >= self.config.stall_after || occasion == Occasion::LastHandleDropped {
                    let leaked = occasion == Occasion::LastHandleDropped;
                    let domain = Arc::clone(&self.config.name);
                    let stall = Stall { domain, location: section.location, age, waited, leaked };
                    let due = leaked || age >= mark.report_at;
                    if due {
                        mark.report_at = age.saturating_mul(2);
                    }
                    stalls.push((stall, due));
                }
                open.insert(section.record, mark);
            }
            *marks = open;
        }

        stalls.sort_by_key(|(stall, _)| std::cmp::Reverse(stall.age));
        for (stall, _) in stalls.iter().filter(|(_, due)| *due) {
            self.config.report.send(stall);
        }
        stalls.into_iter().map(|(stall, _)| stall).collect()
    }

    /// The longest time for which the section is known to be open.
    fn age_of(&self, section: &Section, mark: &Mark, waiting: Option<Waiting>, now: Instant) -> Duration {
        let seen = now.saturating_duration_since(mark.first_seen);
        let stamped = self.stamp().map_or(Duration::ZERO, |age| age.saturating_sub(section.began));
        // In the second scan nobody begins in the bank that is drained: who is in it was there before the flip.
        let waited_for = waiting.filter(|waiting| waiting.bank_is_retired && waiting.bank == section.bank);
        let waited_for = waited_for.map_or(Duration::ZERO, |w| now.saturating_duration_since(w.bank_since));
        seen.max(stamped).max(waited_for)
    }
}
