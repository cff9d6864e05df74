//! Faults that the program behind an address space answers itself, on its stream `ServeFaults`.
//!
//! ```text
//!   a device's fault --> ask --> a place? --no: wait--+
//!                                  | yes <------------+
//!                         question on the stream, and kept with its place
//!                                  |
//!          +-----------------------+------------------------+
//!       answered                the time limit           the stream ends
//!    checked, then granted   refused; the question    every question refused
//!    or refused              keeps its place until
//!                            it is answered
//! ```
//!
//! An answer is only good if no overlapping event starts before it is granted; the fault looks at that,
//! and asks again ([`crate::session`]).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use shootdown_core::{Access, AddrRange, PageSize, Translation};
use shootdown_proto::error::Malformed;
use shootdown_proto::message::{Decline, FaultAsked, FaultId, SourceSays};
use shootdown_proto::v1;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use crate::source::{FaultError, NotifyError};
use crate::status;

/// Questions of one stream that are not answered. Four times what one session may have in flight by
/// default, so that one device does not take every place; a fault beyond it waits for one.
pub(crate) const MOST_QUESTIONS: usize = 1024;

/// What the stream to the source says.
pub(crate) type Said = Result<v1::ServeFaultsResponse, Status>;

/// Who answers the faults of one address space.
///
/// The price of a stream that the source opens, instead of a service that the host agent would call:
/// while the source is away its devices' faults are refused, not queued. What it buys: the source needs
/// no socket of its own, and is known by the credentials that its other calls have.
#[derive(Debug)]
pub(crate) struct Faults {
    served: Mutex<Served>,
    limit: Duration,
    released: CancellationToken,
}

#[derive(Debug)]
enum Served {
    /// Nobody serves them.
    No,
    By(Arc<Stream>),
    /// The host agent stops: a device should turn to its successor.
    Stopping,
}

/// The address space has a stream already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the faults of this address space are served by another stream; close that first")]
pub(crate) struct AlreadyServed;

/// Why an answer is none. The stream ends: a source that answers wrongly cannot be granted from.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum AnswerError {
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error("open comes first and once")]
    OpenedTwice,
    #[error("there is no open question {0}: it was never asked, or has been answered")]
    UnknownQuestion(FaultId),
    #[error("question {fault}: where page {page:#x} was asked for there is none, or another")]
    OtherPage { fault: FaultId, page: u64 },
    #[error("question {fault}: more translations than pages of {range}")]
    TooMany { fault: FaultId, range: AddrRange },
    #[error("question {fault}: page {page:#x} is read-only, and was asked for to be written")]
    ReadOnly { fault: FaultId, page: u64 },
    #[error("question {fault}: {address:#x} was declined, which is not in {range}")]
    DeclinedElsewhere { fault: FaultId, address: u64, range: AddrRange },
}

/// How a stream came to its end.
enum End {
    /// The source closed it, or is gone.
    Left,
    Stopping,
    Released,
    Wrong(AnswerError),
    TooLarge,
}

impl Faults {
    pub(crate) fn new(limit: Duration) -> Self {
        Self { served: Mutex::new(Served::No), limit, released: CancellationToken::new() }
    }

    /// Asks the source, and waits for its answer: not for longer than the limit.
    ///
    /// # Cancel safety
    /// Cancel safe: the answer is then thrown away when it comes.
    pub(crate) async fn ask(&self, range: AddrRange, access: Access) -> Result<Vec<Translation>, FaultError> {
        let stream = match &*self.served.lock() {
            Served::By(stream) => Arc::clone(stream),
            Served::No => return Err(FaultError::NotServed),
            Served::Stopping => return Err(FaultError::Notify(NotifyError::Stopping)),
        };
        let answer = tokio::time::timeout(self.limit, stream.ask(range, access)).await;
        answer.unwrap_or(Err(FaultError::Unanswered { limit: self.limit }))
    }

    /// From now on `stream` answers.
    pub(crate) fn open(&self) -> Result<(Arc<Stream>, mpsc::Receiver<Said>), AlreadyServed> {
        let mut served = self.served.lock();
        if matches!(*served, Served::By(_)) {
            return Err(AlreadyServed);
        }
        let (stream, questions) = Stream::new();
        let stream = Arc::new(stream);
        *served = Served::By(Arc::clone(&stream));
        Ok((stream, questions))
    }

    /// The stream's task: applies what the source says, until the stream ends.
    pub(crate) async fn serve(
        self: Arc<Self>,
        stream: Arc<Stream>,
        mut inbound: Streaming<v1::ServeFaultsRequest>,
        stopping: CancellationToken,
    ) {
        // However this task ends, nobody waits for the stream any more.
        let open = OpenStream { faults: &self, stream: &stream };
        let end = loop {
            let said = tokio::select! {
                biased;
                // First: a source that never falls silent must not keep a stopping host agent.
                () = stopping.cancelled() => break End::Stopping,
                () = self.released.cancelled() => break End::Released,
                said = inbound.message() => said,
            };
            match said {
                Ok(Some(said)) => {
                    if let Err(wrong) = stream.on_said(said) {
                        break End::Wrong(wrong);
                    }
                }
                Err(broken) if status::is_too_large(&broken) => break End::TooLarge,
                Ok(None) | Err(_) => break End::Left,
            }
        };
        open.end(end);
    }

    /// The address space is gone: its stream ends, with what was still asked.
    pub(crate) fn on_released(&self) {
        self.released.cancel();
    }
}

/// A stream that is ended in any case, so that no fault waits for a source that nobody listens to.
struct OpenStream<'a> {
    faults: &'a Faults,
    stream: &'a Arc<Stream>,
}

impl OpenStream<'_> {
    fn end(self, end: End) {
        let (next, why, last_word) = match end {
            End::Left => (Served::No, FaultError::SourceGone, None),
            End::Stopping => {
                let why = NotifyError::Stopping;
                (Served::Stopping, FaultError::Notify(why.clone()), Some(why.into()))
            }
            End::Released => (Served::No, FaultError::SourceGone, Some(status::source_released())),
            End::Wrong(wrong) => {
                tracing::warn!(%wrong, "a source answered a fault wrongly; its stream of faults ends");
                (Served::No, FaultError::SourceGone, Some(wrong.into()))
            }
            End::TooLarge => (Served::No, FaultError::SourceGone, Some(status::answer_too_large())),
        };
        *self.faults.served.lock() = next;
        self.stream.end(&why, last_word);
    }
}

impl Drop for OpenStream<'_> {
    fn drop(&mut self) {
        // Not reached by `end`: the task was dropped with its runtime.
        let mut served = self.faults.served.lock();
        if matches!(&*served, Served::By(stream) if Arc::ptr_eq(stream, self.stream)) {
            *served = Served::No;
        }
        drop(served);
        self.stream.end(&FaultError::SourceGone, None);
    }
}

/// One stream of questions and answers.
#[derive(Debug)]
pub(crate) struct Stream {
    places: Arc<Semaphore>,
    state: Mutex<Questions>,
}

#[derive(Debug)]
struct Questions {
    last: u64,
    open: BTreeMap<FaultId, Question>,
    /// Bounded by the places; `None` when the stream is over.
    tx: Option<mpsc::Sender<Said>>,
}

#[derive(Debug)]
struct Question {
    range: AddrRange,
    access: Access,
    answer: oneshot::Sender<Result<Vec<Translation>, FaultError>>,
    _place: OwnedSemaphorePermit,
}

impl Stream {
    fn new() -> (Self, mpsc::Receiver<Said>) {
        // One more than there are places: for the last word.
        let (tx, rx) = mpsc::channel(MOST_QUESTIONS + 1);
        let state = Questions { last: 0, open: BTreeMap::new(), tx: Some(tx) };
        (Self { places: Arc::new(Semaphore::new(MOST_QUESTIONS)), state: Mutex::new(state) }, rx)
    }

    async fn ask(&self, range: AddrRange, access: Access) -> Result<Vec<Translation>, FaultError> {
        // Closed when the stream ends.
        let place = Arc::clone(&self.places).acquire_owned().await.map_err(|_| FaultError::SourceGone)?;
        let (answer, answered) = oneshot::channel();
        self.state.lock().put(Question { range, access, answer, _place: place })?;
        answered.await.unwrap_or(Err(FaultError::SourceGone))
    }

    fn on_said(&self, said: v1::ServeFaultsRequest) -> Result<(), AnswerError> {
        let (fault, answer) = match SourceSays::try_from(said)? {
            SourceSays::Open { .. } => return Err(AnswerError::OpenedTwice),
            SourceSays::Translated { fault, translations } => (fault, Ok(translations)),
            SourceSays::Declined { fault, why, address } => (fault, Err((why, address))),
        };
        let question = self.state.lock().take(fault)?;
        let answer = match answer {
            Ok(translations) => {
                question.check(fault, &translations)?;
                Ok(translations)
            }
            Err((why, address)) => Err(question.declined(fault, why, address)?),
        };
        // Nobody may wait for it any more: its session is over, or its time has passed.
        drop(question.answer.send(answer));
        Ok(())
    }

    fn end(&self, why: &FaultError, last_word: Option<Status>) {
        self.places.close();
        let (open, tx) = {
            let mut state = self.state.lock();
            (std::mem::take(&mut state.open), state.tx.take())
        };
        for question in open.into_values() {
            drop(question.answer.send(Err(why.clone())));
        }
        if let (Some(tx), Some(last_word)) = (tx, last_word) {
            // No room is left only where the source read nothing: then it does not read this either.
            drop(tx.try_send(Err(last_word)));
        }
    }
}

impl Questions {
    fn put(&mut self, question: Question) -> Result<(), FaultError> {
        let Some(tx) = &self.tx else { return Err(FaultError::SourceGone) };
        self.last += 1;
        let fault = FaultId::new(self.last).expect("it counts up from 1");
        let asked = FaultAsked { fault, range: question.range, access: question.access };
        // There is room: what lies in the channel is unanswered, and has a place each. Only a source that
        // answers what it has not read can have filled it; it is asked nothing more.
        tx.try_send(Ok(asked.into())).map_err(|_| FaultError::SourceGone)?;
        self.open.insert(fault, question);
        Ok(())
    }

    fn take(&mut self, fault: FaultId) -> Result<Question, AnswerError> {
        self.open.remove(&fault).ok_or(AnswerError::UnknownQuestion(fault))
    }
}

impl Question {
    /// Exactly the pages that were asked for, in their order, with at least the access.
    fn check(&self, fault: FaultId, translations: &[Translation]) -> Result<(), AnswerError> {
        let mut answered = translations.iter();
        for page in self.range.pages(PageSize::BASE) {
            let translation = answered
                .next()
                .filter(|translation| translation.range == AddrRange::page_of(page, PageSize::BASE))
                .ok_or(AnswerError::OtherPage { fault, page })?;
            if self.access == Access::Write && translation.access == Access::Read {
                return Err(AnswerError::ReadOnly { fault, page });
            }
        }
        match answered.next() {
            None => Ok(()),
            Some(_) => Err(AnswerError::TooMany { fault, range: self.range }),
        }
    }

    fn declined(&self, fault: FaultId, why: Decline, address: u64) -> Result<FaultError, AnswerError> {
        let inside = self.range.contains_address(address);
        match why {
            Decline::OutOfMemory => Ok(FaultError::SourceOutOfMemory),
            _ if !inside => Err(AnswerError::DeclinedElsewhere { fault, address, range: self.range }),
            Decline::Unmapped => Ok(FaultError::Unmapped { address }),
            Decline::Access => Ok(FaultError::Denied { address }),
        }
    }
}
