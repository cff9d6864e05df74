//! The faults of its address spaces, which the host agent asks on a stream for each.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use shootdown_core::{Access, AddressSpaceId};
use shootdown_proto::error::Reason;
use shootdown_proto::{convert, v1};
use shootdown_server::source::{FaultError, Translate as _};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::Remote;
use crate::memory::Tables;
use crate::plan::millis;

/// After so long without a question a stream is opened anew.
const SILENCE: Duration = millis(250);

/// How often it looks whether that is so.
const LOOK: Duration = millis(20);

impl Remote {
    /// Answers the faults of an address space until it is released, on one stream after the other.
    pub(super) async fn serve_faults(self, space: u64) {
        let rng = Mutex::new(self.shared.rng(6 + (space << 8)));
        let tables = Arc::new(Tables { shared: Arc::clone(&self.shared), rng, migrations: None });
        while self.shared.memory.lock().live_spaces().contains(&space) {
            let known = self.known(space);
            let ended = self.serve_stream(space, &tables).await;
            let reason = ended.as_ref().err().and_then(Reason::of_status);
            if reason == Some(Reason::AddressSpaceUnknown) && !self.known(space).releasing {
                self.take_back(space, known.registered).await;
            }
            self.pause().await;
        }
    }

    async fn serve_stream(&self, space: u64, tables: &Arc<Tables>) -> Result<(), Status> {
        let (tx, rx) = mpsc::channel(64);
        let open = v1::ServeFaultsOpen { address_space_id: space };
        let open = v1::serve_faults_request::Message::Open(open);
        drop(tx.try_send(v1::ServeFaultsRequest { message: Some(open) }));
        let (number, mut client) = self.link.get();
        let opened = tokio::time::timeout(self.patience(), client.serve_faults(ReceiverStream::new(rx)));
        let Ok(opened) = opened.await else {
            self.link.replace(number);
            return Ok(());
        };
        let mut questions = opened?.into_inner();
        let registered = self.known(space).registered;
        let mut silent = Duration::ZERO;
        loop {
            let Ok(question) = tokio::time::timeout(LOOK, questions.message()).await else {
                silent += LOOK;
                // A connection may be lost without a word, and then nothing more is asked on it; who asks now
                // may be another.
                if silent >= SILENCE || self.known(space).registered != registered {
                    return Ok(());
                }
                continue;
            };
            silent = Duration::ZERO;
            let Some(asked) = question?.and_then(|said| said.asked) else { return Ok(()) };
            let (tables, tx) = (Arc::clone(tables), tx.clone());
            tokio::spawn(async move { drop(tx.send(answer_fault(space, &tables, asked).await).await) });
        }
    }
}

async fn answer_fault(space: u64, tables: &Tables, asked: v1::FaultAsked) -> v1::ServeFaultsRequest {
    let fault_id = asked.fault_id;
    let id = AddressSpaceId::new(space).expect("it was given out");
    let range = convert::required_range(asked.range, "range").expect("the host agent asks for a range");
    let message = match tables.fault(id, range, Access::Write).await {
        Ok(translations) => {
            let translations = translations.into_iter().map(convert::wire_translation).collect();
            v1::serve_faults_request::Message::Translated(v1::FaultTranslated { fault_id, translations })
        }
        Err(error) => {
            let (reason, address) = match error {
                FaultError::Unmapped { address } => (v1::ErrorReason::FaultUnmapped, address),
                _ => (v1::ErrorReason::OutOfMemory, range.start()),
            };
            let reason = reason.into();
            v1::serve_faults_request::Message::Declined(v1::FaultDeclined { fault_id, reason, address })
        }
    };
    v1::ServeFaultsRequest { message: Some(message) }
}
