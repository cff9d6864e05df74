//! The tries of a call, until one is answered by who may answer it.

use std::collections::VecDeque;

use shootdown_proto::error::Reason;
use shootdown_proto::v1;
use tokio::task::{AbortHandle, JoinSet};
use tonic::Status;

use super::Remote;
use crate::link::Ask;
use crate::plan::{Broken, STORM};
use crate::trace::{Called, Op, What};

/// Tries of a call that wait at the same time.
const MOST_TRIES: usize = 3;

/// What became of a call.
#[derive(Debug, Clone)]
pub(super) enum Heard {
    /// An answer that may be used.
    Told(v1::RoundResult),
    /// The run that answers now knows nothing of what was asked for.
    Lost,
    Refused(String),
}

/// Tries of one call.
#[derive(Default)]
struct Tries {
    set: JoinSet<(u64, Result<Option<v1::RoundResult>, Status>)>,
    /// The oldest first.
    handles: VecDeque<AbortHandle>,
    begun: u64,
    /// The one of the newest.
    connection: u64,
}

impl Tries {
    /// The call is decided. Nobody takes back what was sent: it may arrive when its caller has gone on.
    fn go_on(&mut self) {
        self.set.detach_all();
    }
}

impl Remote {
    /// Until it is known what became of it.
    pub(super) async fn ask(&self, op: Op, ask: &Ask) -> Heard {
        let mut tries = Tries::default();
        let (mut patience, then) = match self.broken {
            // New calls go to the successor; this one waits for whom it has called.
            Broken::OldAnswerTaken => (self.patience(), STORM),
            _ => (self.patience(), self.patience()),
        };
        loop {
            if tries.set.is_empty() {
                self.begin_try(op, ask, &mut tries);
            }
            let tried = tokio::select! {
                biased;
                // First: an answer is better than another try.
                tried = tries.set.join_next() => tried,
                () = tokio::time::sleep(patience) => {
                    self.link.replace(tries.connection);
                    if patience == then {
                        self.begin_try(op, ask, &mut tries);
                    }
                    patience = then;
                    continue;
                }
            };
            let Some(Ok((registered, answer))) = tried else { continue };
            match answer {
                Ok(result) => {
                    if let Some(heard) = self.on_answer(op, ask, registered, result) {
                        tries.go_on();
                        return heard;
                    }
                    self.pause().await;
                }
                Err(status) => {
                    if let Some(heard) = self.on_refused(op, ask, registered, &status).await {
                        // What a run does not know that has crashed meanwhile, nobody has decided.
                        if Reason::of_status(&status) != Some(Reason::AddressSpaceUnknown) {
                            tries.go_on();
                        }
                        return heard;
                    }
                    self.pause().await;
                }
            }
        }
    }

    fn begin_try(&self, op: Op, ask: &Ask, tries: &mut Tries) {
        let name = match ask {
            Ask::Call { .. } | Ask::Await { .. } => "",
            Ask::End { .. } => "-end",
        };
        let id = match self.broken {
            Broken::RetryWithNewId => format!("{}{name}-{}", op.0, tries.begun),
            _ => format!("{}{name}", op.0),
        };
        tries.begun += 1;
        let (connection, client) = self.link.get();
        let registered = self.known(ask.space()).registered;
        if matches!(ask, Ask::Call { .. }) {
            self.shared.trace.record(What::Sent { op });
        }
        // A later one has less time: what it is refused is refused to those that wait.
        let sent = ask.clone().in_less_time(tries.begun).send(client, id);
        tries.connection = connection;
        tries.handles.push_back(tries.set.spawn(async move { (registered, sent.await) }));
        tries.handles.retain(|handle| !handle.is_finished());
        if tries.handles.len() > MOST_TRIES {
            tries.handles.pop_front().expect("there are several").abort();
        }
    }

    /// `None`: it may not be used.
    fn on_answer(
        &self,
        op: Op,
        ask: &Ask,
        registered: u64,
        result: Option<v1::RoundResult>,
    ) -> Option<Heard> {
        // An end says nothing, so nobody can be deceived by it.
        let Some(result) = result else { return Some(Heard::Lost) };
        let (host, seq) = (result.host_incarnation, Some(result.seq).filter(|seq| *seq > 0));
        if matches!(ask, Ask::Call { .. }) {
            self.shared.trace.record(What::Heard { op, host, registered, seq });
        }
        let mut newest = self.newest.lock();
        // A lower one has a successor; and what was asked before the address space was registered again is asked
        // again, so that this is not the answer to it.
        let is_old = host < *newest || registered != self.known(ask.space()).registered;
        *newest = host.max(*newest);
        if is_old && self.broken != Broken::OldAnswerTaken {
            return None;
        }
        self.taken.lock().insert(op, registered);
        Some(Heard::Told(result))
    }

    /// `None`: it is tried again.
    async fn on_refused(&self, op: Op, ask: &Ask, registered: u64, status: &Status) -> Option<Heard> {
        let space = ask.space();
        match Reason::of_status(status) {
            Some(Reason::AddressSpaceUnknown) => {
                let is_release = matches!(ask, Ask::Call { called: Called::Release, .. });
                if self.known(space).releasing && !is_release {
                    return Some(Heard::Refused(status.message().to_owned()));
                }
                if let Ask::End { .. } = ask {
                    return Some(Heard::Lost);
                }
                self.take_back(space, registered).await;
                matches!(ask, Ask::Await { .. }).then_some(Heard::Lost)
            }
            Some(Reason::RoundUnknown) => {
                // Whoever told of the round, and knows the address space as it did then, knows the round. It may have been
                // registered anew, and the answer to that is on its way.
                drop(self.registering.lock().await);
                let is_gone = self.taken.lock().get(&op) != Some(&self.known(space).registered);
                assert!(is_gone || self.broken != Broken::Nothing, "{op:?}: {}", status.message());
                Some(Heard::Lost)
            }
            Some(Reason::AddressSpaceReleased) => Some(Heard::Refused(status.message().to_owned())),
            Some(Reason::Draining | Reason::HostSuperseded) | None => None,
            Some(_) => Some(Heard::Refused(status.message().to_owned())),
        }
    }
}
