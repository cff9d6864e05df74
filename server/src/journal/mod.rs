//! What a host agent must know of its earlier runs: which sessions may still hold leases, and which
//! numbers were given out.
//!
//! ```text
//!   record    the bytes: header, frames, checksums, a torn tail
//!   history   what the records add up to
//!   drained   what a planned end leaves to the next run
//!   medium    what survives a power loss
//!   file      the state directory: whose it is, appending, going on in a new file
//! ```
//!
//! A session is durable before its device is welcomed, so the next run knows of every device that may hold
//! a translation. Nothing is written for a notice, an ack or a renewal: a lease that was renewed lasts, at
//! the longest, as long after the next run's start as one that was granted just before it.

mod record;
mod history;
mod calls;
mod drained;
mod medium;
mod file;

use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use shootdown_core::lease::LeaseTerms;
use shootdown_core::{Incarnation, SessionId};
use tokio::sync::{mpsc, oneshot};

pub(crate) use self::drained::{Drained, DrainedBracket, DrainedSession, DrainedSpace, DrainedSubscription};
pub(crate) use self::file::AppendError;
pub(crate) use self::file::Standing;
use self::file::{Claim, JournalFile};
pub(crate) use self::history::History;
pub(crate) use self::medium::Disk;
pub use self::medium::Medium;
pub use self::record::Damage;
use self::record::Record;
pub(crate) use self::record::{BootMoment, Run, SessionRecord, is_unnamed};

/// Whether a host agent that holds the state directory is superseded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Takeover {
    /// The start fails while another runs.
    Never,
    /// The other is stopped, or hangs: it finds itself superseded when it goes on.
    IfHeld,
}

/// Why a state directory could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The directory itself.
    #[error("cannot open the state directory {path}")]
    Folder {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// A file in it.
    #[error("cannot {step} {path}")]
    Io {
        /// What failed.
        step: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// Another has it.
    #[error(
        "the state directory {path} belongs to a host agent that is running; stop it, or if it hangs start with --take-over"
    )]
    Held {
        /// Which.
        path: PathBuf,
    },
    /// What is in it is not what a crash may leave.
    #[error(
        "the journal {path} is damaged at byte {at}: {damage}. Nothing was changed. It says which devices may still hold translations, so without it nothing can be released safely: stop every device of this host, or wait until the longest lease has passed since the last run, then move the directory's journal.* away and start again"
    )]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// Where, in bytes from its beginning.
        at: usize,
        /// What.
        damage: Damage,
    },
    /// The thread that writes it.
    #[error("cannot start the journal's thread")]
    Thread(#[source] io::Error),
}

impl JournalError {
    fn io(step: &'static str, folder: &Path, generation: u64, error: io::Error) -> Self {
        Self::Io { step, path: folder.join(format!("journal.{generation}")), error }
    }
}

/// Requests that wait for the disk. More wait for room.
const QUEUE: usize = 1024;

/// Requests that share one sync.
const MOST_A_SYNC: usize = 1024;

/// The journal of a running host agent. Cheap to clone.
///
/// A thread of its own writes: what arrives while it waits for the disk shares the next sync, and no shard
/// ever waits for one. Unless its program asks for a [`Writer::Caller`].
#[derive(Debug, Clone)]
pub(crate) struct Journal {
    pen: Pen,
    claim: Claim,
}

/// Who writes a journal, and waits for the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Writer {
    /// A thread of its own.
    Thread,
    /// Whoever has something to write: on one thread with virtual time everything is written in the same
    /// order each time.
    Caller,
}

#[derive(Debug, Clone)]
enum Pen {
    Thread {
        asks: mpsc::Sender<Ask>,
        thread: Arc<Mutex<Option<std::thread::JoinHandle<()>>>>,
    },
    /// `None`: closed.
    Caller(Arc<Mutex<Option<JournalFile>>>),
}

#[derive(Debug)]
enum Ask {
    Append(Record, oneshot::Sender<Result<(), AppendError>>),
    /// Nobody waits for it: a session too many is waited for after a restart, never one too few.
    Note(Record),
    /// The last that is written, if there is something to leave.
    Close(Option<Drained>),
}

/// A journal as it was found, and as it is from here on.
pub(crate) struct Opened {
    pub(crate) journal: Journal,
    /// What the runs before left.
    pub(crate) before: History,
    /// This run.
    pub(crate) run: Run,
}

/// Looks whether a state directory could be taken, without touching it.
///
/// # Errors
/// [`JournalError`].
pub(crate) fn inspect(path: &Path) -> Result<(), JournalError> {
    file::inspect(path).map(drop)
}

impl Journal {
    /// Takes a state directory, and writes down that a run began. Waits for the disk.
    ///
    /// The run's incarnation is `now` (nanoseconds of wall time) or, where that clock went back, the one
    /// after the last run's; after a planned end it is the last run's.
    ///
    /// # Errors
    /// [`JournalError`].
    pub(crate) fn open(
        medium: Arc<dyn Medium>,
        path: &Path,
        takeover: Takeover,
        writer: Writer,
        now: Incarnation,
        terms: LeaseTerms,
        clock: impl FnOnce() -> BootMoment,
    ) -> Result<Opened, JournalError> {
        let taken = JournalFile::take(path, takeover, medium)?;
        Self::begin(taken, path, writer, now, terms, clock)
    }

    /// The same, on a state directory that was just taken.
    fn begin(
        (mut file, mut before): (JournalFile, History),
        path: &Path,
        writer: Writer,
        now: Incarnation,
        terms: LeaseTerms,
        clock: impl FnOnce() -> BootMoment,
    ) -> Result<Opened, JournalError> {
        // Not before the file is this run's: until then the run before may renew leases.
        let began = clock();
        // First: what it drops makes this a restart after a crash.
        let unrenewed = before.on_begin(&began).into_iter().map(Record::Opened);
        let run = match (&before.last, &before.drained) {
            (None, _) => Run { number: 0, incarnation: now, terms },
            (Some(last), Some(_)) => Run { number: last.number + 1, incarnation: last.incarnation, terms },
            (Some(last), None) => {
                Run { number: last.number + 1, incarnation: now.max(last.incarnation.next()), terms }
            }
        };
        let records: Vec<Record> = std::iter::once(Record::Began(run)).chain(unrenewed).collect();
        file.append(&records).map_err(|error| match error {
            AppendError::Io(error) => Arc::into_inner(error).expect("nobody else has it"),
            AppendError::Superseded | AppendError::Closed => JournalError::Held { path: path.to_owned() },
        })?;
        let claim = file.claim().clone();
        // A successor that came before it was written has not read it, and gives out the same numbers.
        if claim.standing() != Standing::Current {
            return Err(JournalError::Held { path: path.to_owned() });
        }
        let pen = match writer {
            Writer::Thread => {
                let (asks, rx) = mpsc::channel(QUEUE);
                let thread = std::thread::Builder::new()
                    .name("journal".to_owned())
                    .spawn(move || write(file, rx))
                    .map_err(JournalError::Thread)?;
                Pen::Thread { asks, thread: Arc::new(Mutex::new(Some(thread))) }
            }
            Writer::Caller => Pen::Caller(Arc::new(Mutex::new(Some(file)))),
        };
        let journal = Self { pen, claim };
        Ok(Opened { journal, before, run })
    }

    /// Whether the state directory is still this host agent's.
    pub(crate) fn standing(&self) -> Standing {
        self.claim.standing()
    }

    /// Makes a session durable.
    ///
    /// # Errors
    /// [`AppendError`]: the device must not be welcomed.
    ///
    /// # Cancel safety
    /// The record may be written all the same; say [`Journal::over`] then.
    pub(crate) async fn opened(&self, session: SessionRecord) -> Result<(), AppendError> {
        self.append(Record::Opened(session)).await
    }

    /// A session's device has certainly stopped. Returns before it is durable.
    pub(crate) async fn over(&self, session: SessionId) {
        // When the journal is closed the next run waits for one session more.
        self.ask(Ask::Note(Record::Over(session))).await;
    }

    async fn append(&self, record: Record) -> Result<(), AppendError> {
        let (tx, rx) = oneshot::channel();
        self.ask(Ask::Append(record, tx)).await;
        rx.await.unwrap_or(Err(AppendError::Closed))
    }

    async fn ask(&self, ask: Ask) {
        match &self.pen {
            Pen::Thread { asks, .. } => drop(asks.send(ask).await),
            Pen::Caller(file) => {
                if let Some(file) = &mut *file.lock() {
                    let _: ControlFlow<()> = carry_out(file, std::iter::once(ask));
                }
            }
        }
    }

    /// Writes what was asked for, then what a planned end leaves, and gives the directory to whoever comes
    /// next. Waits for the disk.
    pub(crate) fn close(self, drained: Option<Drained>) {
        match self.pen {
            Pen::Thread { asks, thread } => {
                let thread = thread.lock().take();
                if let Some(thread) = thread
                    && asks.blocking_send(Ask::Close(drained)).is_ok()
                {
                    // A panic in there was reported by the thread itself.
                    drop(thread.join());
                }
            }
            Pen::Caller(file) => {
                if let Some(mut file) = file.lock().take() {
                    let _: ControlFlow<()> = carry_out(&mut file, std::iter::once(Ask::Close(drained)));
                }
            }
        }
    }
}

/// The journal's thread.
fn write(mut file: JournalFile, mut rx: mpsc::Receiver<Ask>) {
    let mut asks = Vec::with_capacity(MOST_A_SYNC);
    while rx.blocking_recv_many(&mut asks, MOST_A_SYNC) > 0 {
        if carry_out(&mut file, asks.drain(..)).is_break() {
            return;
        }
    }
}

/// Writes what is asked for, with one sync. Breaks when nothing more is to be written.
fn carry_out(file: &mut JournalFile, asks: impl Iterator<Item = Ask>) -> ControlFlow<()> {
    let (mut records, mut waiting, mut close) = (Vec::new(), Vec::new(), None);
    for ask in asks {
        match ask {
            Ask::Append(record, done) => {
                records.push(record);
                waiting.push(done);
            }
            Ask::Note(record) => records.push(record),
            Ask::Close(drained) => close = Some(drained),
        }
    }
    if !records.is_empty() {
        let appended = file.append(&records);
        if let Err(error) = &appended {
            tracing::error!(
                error = error as &dyn std::error::Error,
                refused = waiting.len(),
                "the journal was not written; new sessions are refused until it is"
            );
            file.forget(&records);
        }
        for done in waiting {
            // Who does not wait any more has said, or will say, that its session is over.
            drop(done.send(appended.clone()));
        }
    }
    let Some(drained) = close else { return ControlFlow::Continue(()) };
    if let Some(drained) = drained
        && let Err(error) = file.append(&[Record::Drained(drained)])
    {
        tracing::error!(
            error = &error as &dyn std::error::Error,
            "the resume points were not written; the next run takes this end for a crash"
        );
    }
    ControlFlow::Break(())
}

#[cfg(test)]
mod tests;
