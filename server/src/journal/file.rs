//! A state directory: which of its files is the journal, and whose it is.
//!
//! ```text
//!   journal.7   the journal of its owner, who holds its flock
//!   journal.8   made by whoever comes next: a successor, or the owner when it compacts
//! ```
//!
//! The next generation is made apart and linked to its name, which fails if the name is taken: of two who
//! want to go on from journal.7 one does. From the link on the owner of journal.7 is superseded, and knows
//! it by a look ([`Claim::standing`]); only then does the successor read journal.7, so that whatever its
//! owner wrote and still found itself current is read. When journal.8 says that it is complete journal.7
//! goes. A crash in between leaves both, which are then read one after the other.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};

use super::history::History;
use super::medium::Medium;
use super::record::{self, Record};
use super::{JournalError, Takeover};

/// A file is compacted when it has this many bytes, and twice as many as it needs.
const COMPACT_FROM_BYTES: u64 = 64 << 10;

/// A file that has no final name yet begins with this.
const TEMPORARY: &str = "new.";

/// Tries to become the owner while others try, too. Each failure means that another succeeded.
const MOST_TRIES: usize = 16;

/// Whether a host agent still has its state directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It has.
    Current,
    /// A successor has it.
    Superseded,
    /// Nobody has: the journal is not where it was, and who starts now does not find it.
    Removed,
}

/// One host agent's hold on a state directory. Cheap to ask whether it still is.
#[derive(Debug, Clone)]
pub(super) struct Claim(Arc<Mutex<Owned>>);

#[derive(Debug, Clone)]
struct Owned {
    folder: Arc<OwnedFd>,
    /// Kept open, so that no other file gets its number.
    file: Arc<File>,
    inode: u64,
    generation: u64,
    /// The file that the owner itself is about to link to the next name.
    next: Option<u64>,
}

impl Claim {
    /// Whether the directory is still the owner's. Two system calls on what the kernel has in memory, as long as
    /// it is.
    pub(super) fn standing(&self) -> Standing {
        loop {
            let before = self.0.lock().clone();
            if before.is_last() {
                return Standing::Current;
            }
            let now = self.0.lock();
            // The owner itself may have gone on to its next file, between the copy and the look.
            if (now.generation, now.next) == (before.generation, before.next) {
                return if before.is_followed() { Standing::Superseded } else { Standing::Removed };
            }
        }
    }
}

impl Owned {
    /// Whatever fails counts as a no.
    fn is_last(&self) -> bool {
        let look =
            |generation| rustix::fs::statat(&*self.folder, name(generation), AtFlags::SYMLINK_NOFOLLOW);
        // By its name: a file that was moved away is found by nobody who comes next.
        look(self.generation).is_ok_and(|stat| stat.st_ino == self.inode)
            && match look(self.generation + 1) {
                Err(rustix::io::Errno::NOENT) => true,
                Ok(stat) => Some(stat.st_ino) == self.next,
                Err(_) => false,
            }
    }

    /// Whether somebody goes on from it, however far they have come.
    fn is_followed(&self) -> bool {
        rustix::fs::Dir::read_from(&*self.folder).is_ok_and(|entries| {
            entries
                .flatten()
                .filter_map(|entry| generation(entry.file_name().to_str().ok()?))
                .any(|found| found > self.generation)
        })
    }
}

/// The journal of the one host agent that owns a state directory. Its calls wait for the disk.
#[derive(Debug)]
pub(super) struct JournalFile {
    path: PathBuf,
    claim: Claim,
    folder: Arc<OwnedFd>,
    medium: Arc<dyn Medium>,
    file: Arc<File>,
    generation: u64,
    /// The last generation whose name survives a power loss.
    durable_generation: u64,
    frames: u64,
    bytes: u64,
    /// What the file says.
    history: History,
    /// The bytes of [`History::snapshot`] when it was last written.
    needed: u64,
    /// An append failed, so nobody knows what the file holds behind `bytes`; or the file's name may not survive a
    /// power loss. The next append begins anew.
    is_doubtful: bool,
}

/// What a state directory is on.
struct Beneath {
    folder: Arc<OwnedFd>,
    medium: Arc<dyn Medium>,
}

/// Why nothing was written.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum AppendError {
    /// The disk is full, or broken.
    #[error("the journal cannot be written: {0}")]
    Io(Arc<JournalError>),
    /// It is another's now.
    #[error("another host agent has taken over the state directory")]
    Superseded,
    /// The host agent stops.
    #[error("the journal is closed")]
    Closed,
}

impl JournalFile {
    /// Takes a state directory: returns what the runs before left, and a journal that says the same.
    pub(super) fn take(
        path: &Path,
        takeover: Takeover,
        medium: Arc<dyn Medium>,
    ) -> Result<(Self, History), JournalError> {
        let on = Beneath { folder: open_folder(path)?, medium };
        for _ in 0..MOST_TRIES {
            if let Some(taken) = Self::try_take(path, &on, takeover)? {
                return Ok(taken);
            }
        }
        Err(JournalError::Held { path: path.to_owned() })
    }

    /// `None`: another was faster.
    fn try_take(
        path: &Path,
        on: &Beneath,
        takeover: Takeover,
    ) -> Result<Option<(Self, History)>, JournalError> {
        let folder = &on.folder;
        let Some(last) = generations(path)?.last().copied() else {
            return Ok(Self::make(path, on, 1)?.map(|made| (made, History::default())));
        };
        let file = match open(folder, last) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(JournalError::io("open", path, last, error)),
        };
        let is_held = flock(&file).is_err();
        if is_held && takeover == Takeover::Never {
            return Err(JournalError::Held { path: path.to_owned() });
        }
        // Before anything is changed: a journal that cannot be read stays whose it is.
        read_all(path, folder, last)?;
        let Some(mut taken) = Self::make(path, on, last + 1)? else {
            return Ok(None);
        };
        // From here on the owner before knows that it is superseded; what it was sure of is in its file.
        let history = match read_all(path, folder, last) {
            Ok(history) => history,
            Err(error) => {
                drop(unlink(folder, last + 1));
                return Err(error);
            }
        };
        let mut records = history.snapshot();
        records.extend(history.drained.clone().map(Record::Drained));
        records.push(Record::Complete);
        if let Err(error) = taken.write(&records) {
            drop(unlink(folder, last + 1));
            return Err(error);
        }
        taken.history = History::of(records);
        taken.needed = taken.bytes;
        taken.remove_before();
        taken.remove_left_behind();
        Ok(Some((taken, history)))
    }

    /// A new file, complete if it is the first, under the name of its generation. `None`: the name is taken.
    fn make(
        path: &Path,
        Beneath { folder, medium }: &Beneath,
        generation: u64,
    ) -> Result<Option<Self>, JournalError> {
        let (file, temporary) = create(path, folder, generation)?;
        let records = if generation == 1 { vec![Record::Complete] } else { Vec::new() };
        let linked = start(&**medium, &file, generation, &records).and_then(|bytes| {
            link(folder, &temporary, generation)?;
            Ok((bytes, rustix::fs::fstat(&file)?.st_ino))
        });
        drop(remove(folder, &temporary));
        let (bytes, inode) = match linked {
            Ok(made) => made,
            // Taken; or removed, by one who takes the directory and tidies up.
            Err(error) if matches!(error.kind(), io::ErrorKind::AlreadyExists | io::ErrorKind::NotFound) => {
                return Ok(None);
            }
            Err(error) => return Err(JournalError::io("write", path, generation, error)),
        };
        // A name lower than the highest may have been free because its owner has moved on.
        if generations(path)?.last() != Some(&generation) {
            drop(unlink(folder, generation));
            return Ok(None);
        }
        medium.sync_folder(folder).map_err(|error| JournalError::io("sync", path, generation, error))?;
        let file = Arc::new(file);
        let (folder, medium) = (Arc::clone(folder), Arc::clone(medium));
        let owned =
            Owned { folder: Arc::clone(&folder), file: Arc::clone(&file), inode, generation, next: None };
        Ok(Some(Self {
            path: path.to_owned(),
            claim: Claim(Arc::new(Mutex::new(owned))),
            folder,
            medium,
            file,
            generation,
            durable_generation: generation,
            frames: u64::from(!records.is_empty()),
            bytes,
            history: History::default(),
            needed: bytes,
            is_doubtful: false,
        }))
    }

    pub(super) fn claim(&self) -> &Claim {
        &self.claim
    }

    /// Appends records, and returns when they are durable. A refused append has no effect, now or after a
    /// restart, but that a session may be waited for which was never welcomed.
    pub(super) fn append(&mut self, records: &[Record]) -> Result<(), AppendError> {
        let grown = self.bytes > COMPACT_FROM_BYTES && self.bytes > 2 * self.needed;
        if self.is_doubtful || grown {
            match self.compact() {
                Ok(()) => {}
                // A file that is longer than it needs to be still takes records.
                Err(AppendError::Io(error)) if !self.is_doubtful => {
                    tracing::warn!(
                        error = &*error as &dyn std::error::Error,
                        "the journal cannot be compacted"
                    );
                    self.needed = self.bytes;
                }
                Err(error) => return Err(error),
            }
        }
        // In a frame of its own: of what a crash, or a disk that forgets, can tear it is not a part.
        if !self.history.has_unenforced && records.iter().any(Record::is_of_unenforced) {
            self.write_one(&[Record::Unenforced])?;
        }
        self.write_one(records)
    }

    fn write_one(&mut self, records: &[Record]) -> Result<(), AppendError> {
        if let Err(error) = self.write(records) {
            self.is_doubtful = true;
            return Err(AppendError::Io(Arc::new(error)));
        }
        records.iter().for_each(|record| self.history.apply(record.clone()));
        Ok(())
    }

    /// Sessions that were refused for want of a record are over; those that ended are, whatever was written.
    pub(super) fn forget(&mut self, records: &[Record]) {
        let over = records.iter().filter(|record| matches!(record, Record::Over(_)));
        over.for_each(|record| self.history.apply(record.clone()));
    }

    /// One frame, and its sync.
    fn write(&mut self, records: &[Record]) -> Result<(), JournalError> {
        let frame = record::frame(self.generation, self.frames, records);
        let failed = |error| JournalError::io("write", &self.path, self.generation, error);
        self.file.write_all_at(&frame, self.bytes).map_err(failed)?;
        self.medium.sync_file(&self.file).map_err(failed)?;
        self.bytes += frame.len() as u64;
        self.frames += 1;
        Ok(())
    }

    /// Goes on in a new file that says the same with less.
    pub(super) fn compact(&mut self) -> Result<(), AppendError> {
        let generation = self.generation + 1;
        let failed = |error: io::Error| {
            AppendError::Io(Arc::new(JournalError::io("compact", &self.path, generation, error)))
        };
        let (file, temporary) =
            create(&self.path, &self.folder, generation).map_err(|error| AppendError::Io(Arc::new(error)))?;
        let mut records = self.history.snapshot();
        records.push(Record::Complete);
        let linked = start(&*self.medium, &file, generation, &records).and_then(|bytes| {
            let inode = rustix::fs::fstat(&file)?.st_ino;
            // Before the link, so that nobody takes our own next file for a successor's.
            self.claim.0.lock().next = Some(inode);
            link(&self.folder, &temporary, generation).map(|()| (bytes, inode))
        });
        drop(remove(&self.folder, &temporary));
        let (bytes, inode) = match linked {
            Ok(made) => made,
            Err(error) => {
                self.claim.0.lock().next = None;
                return Err(match error.kind() {
                    io::ErrorKind::AlreadyExists => AppendError::Superseded,
                    _ => failed(error),
                });
            }
        };
        if !generations(&self.path).is_ok_and(|all| all.last() == Some(&generation)) {
            drop(unlink(&self.folder, generation));
            self.claim.0.lock().next = None;
            return Err(AppendError::Superseded);
        }
        let file = Arc::new(file);
        {
            let mut owned = self.claim.0.lock();
            (owned.file, owned.inode) = (Arc::clone(&file), inode);
            (owned.generation, owned.next) = (generation, None);
        }
        (self.file, self.generation, self.frames) = (file, generation, 1);
        (self.bytes, self.needed) = (bytes, bytes);
        // Until it is done a power loss may bring the file before back. Not tried again on this file: after a sync
        // that failed the next may succeed, and mean nothing.
        if let Err(error) = self.medium.sync_folder(&self.folder) {
            self.is_doubtful = true;
            // However often it fails, two files are left.
            self.remove_between(self.durable_generation + 1, generation);
            return Err(failed(error));
        }
        (self.durable_generation, self.is_doubtful) = (generation, false);
        self.remove_before();
        Ok(())
    }

    /// What this file makes superfluous.
    fn remove_before(&self) {
        self.remove_between(0, self.generation);
    }

    /// The generations from `first` on, before `end`. What cannot be removed is removed by the next, with what comes
    /// after it: a host agent that was paused knows by the name after its own that it was taken over from.
    fn remove_between(&self, first: u64, end: u64) {
        for generation in generations(&self.path).unwrap_or_default() {
            if (first..end).contains(&generation) && unlink(&self.folder, generation).is_err() {
                return;
            }
        }
    }

    /// Files without a final name: of a crash, or of one who is being taken over from.
    fn remove_left_behind(&self) {
        for entry in std::fs::read_dir(&self.path).into_iter().flatten().flatten() {
            if let Some(name) = entry.file_name().to_str().filter(|name| name.starts_with(TEMPORARY)) {
                drop(remove(&self.folder, name));
            }
        }
    }

    #[cfg(test)]
    pub(super) fn break_file(&mut self, with: File) {
        self.file = Arc::new(with);
    }

    #[cfg(test)]
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// Reads a state directory without taking it.
///
/// # Errors
/// [`JournalError`], if it could not be taken because of what is in it.
pub(super) fn inspect(path: &Path) -> Result<History, JournalError> {
    let folder = open_folder(path)?;
    generations(path)?.last().map_or(Ok(History::default()), |last| read_all(path, &folder, *last))
}

/// All that is known up to a generation: its file's records, and those of the files before it where it is
/// not complete.
fn read_all(path: &Path, folder: &OwnedFd, last: u64) -> Result<History, JournalError> {
    let mut files = Vec::new();
    let mut is_torn = false;
    for generation in generations(path)?.into_iter().rev().filter(|generation| *generation <= last) {
        let mut bytes = Vec::new();
        open(folder, generation)
            .and_then(|mut file| file.read_to_end(&mut bytes))
            .map_err(|error| JournalError::io("read", path, generation, error))?;
        let contents = record::read(&bytes, generation).map_err(|(at, damage)| JournalError::Damaged {
            path: path.join(name(generation)),
            at,
            damage,
        })?;
        if contents.torn > 0 {
            tracing::warn!(path = %path.join(name(generation)).display(), bytes = contents.torn, "the journal's last record is torn, as a crash in the middle of its write leaves it");
        }
        is_torn |= contents.torn > 0;
        let is_complete = contents.records.contains(&Record::Complete);
        files.push(contents.records);
        if is_complete {
            let mut history = History::of(files.into_iter().rev().flatten());
            if is_torn {
                history.on_torn();
            }
            return Ok(history);
        }
    }
    Err(JournalError::Damaged { path: path.join(name(last)), at: 0, damage: record::Damage::Incomplete })
}

fn open_folder(path: &Path) -> Result<Arc<OwnedFd>, JournalError> {
    let failed = |error| JournalError::Folder { path: path.to_owned(), error };
    std::fs::create_dir_all(path).map_err(failed)?;
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).map(Arc::new).map_err(|error| failed(error.into()))
}

fn name(generation: u64) -> String {
    format!("journal.{generation}")
}

/// Those that there are, in ascending order.
fn generations(path: &Path) -> Result<Vec<u64>, JournalError> {
    let failed = |error| JournalError::Folder { path: path.to_owned(), error };
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path).map_err(failed)? {
        let entry = entry.map_err(failed)?.file_name();
        found.extend(entry.to_str().and_then(generation));
    }
    found.sort_unstable();
    Ok(found)
}

/// The other way round than [`name`].
fn generation(name: &str) -> Option<u64> {
    name.strip_prefix("journal.")?.parse().ok()
}

fn open(folder: &OwnedFd, generation: u64) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    Ok(rustix::fs::openat(folder, name(generation), flags, Mode::empty())?.into())
}

fn unlink(folder: &OwnedFd, generation: u64) -> io::Result<()> {
    remove(folder, &name(generation))
}

fn remove(folder: &OwnedFd, name: &str) -> io::Result<()> {
    Ok(rustix::fs::unlinkat(folder, name, AtFlags::empty())?)
}

fn flock(file: &File) -> io::Result<()> {
    Ok(rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive)?)
}

/// A file without its final name, locked before anybody else can see it.
fn create(path: &Path, folder: &OwnedFd, generation: u64) -> Result<(File, String), JournalError> {
    let failed = |error| JournalError::io("create", path, generation, error);
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    // Two containers may have a process of the same number each.
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let temporary = format!("{TEMPORARY}{}.{}{:09}", std::process::id(), now.tv_sec, now.tv_nsec);
    let file: File = rustix::fs::openat(folder, &temporary, flags, Mode::from_raw_mode(0o600))
        .map_err(|error| failed(error.into()))?
        .into();
    flock(&file).map_err(failed)?;
    Ok((file, temporary))
}

/// The beginning of a file, durable. Returns its bytes.
fn start(medium: &dyn Medium, mut file: &File, generation: u64, records: &[Record]) -> io::Result<u64> {
    let mut bytes = record::header(generation);
    if !records.is_empty() {
        bytes.extend(record::frame(generation, 0, records));
    }
    file.write_all(&bytes)?;
    medium.sync_file(file)?;
    Ok(bytes.len() as u64)
}

/// Fails if there is a file of that name.
fn link(folder: &OwnedFd, temporary: &str, generation: u64) -> io::Result<()> {
    Ok(rustix::fs::linkat(folder.as_fd(), temporary, folder.as_fd(), name(generation), AtFlags::empty())?)
}
