//! Tells each host agent of the address space, and answers its devices' faults.

use std::sync::Arc;
use std::time::Duration;

use shootdown_proto::error::Reason;
use shootdown_proto::v1;
use shootdown_proto::v1::serve_faults_request::Message;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::{BACKOFF, Vmm, VmmError, reason};
use crate::chaos::content::page_of;
use crate::check::stamp::PAGE_BYTES;

/// Answers that are not sent yet; beyond it no question is read.
const ANSWERS: usize = 256;

/// How long the host agent may take to take the stream.
const PATIENCE: Duration = Duration::from_secs(2);

/// What became of a stream of faults.
enum Ended {
    /// It was open, or was not to be had; try again.
    TryAgain,
    /// This host agent does not know the address space.
    Unknown,
}

/// Until the program stops.
pub(crate) async fn serve(vmm: Arc<Vmm>) -> Result<(), VmmError> {
    let stop = vmm.stop.clone();
    let serving = async {
        loop {
            let known = *vmm.address_space.borrow() != 0;
            if !known || matches!(answer(&vmm).await?, Ended::Unknown) {
                // Before it is registered: whoever answers from then on knows of no call before.
                vmm.on_forgotten();
                register(&vmm).await?;
            }
            tokio::time::sleep(BACKOFF).await;
        }
    };
    tokio::select! {
        // The end goes first.
        biased;
        () = stop.cancelled() => Ok(()),
        failed = serving => failed,
    }
}

async fn register(vmm: &Vmm) -> Result<(), VmmError> {
    let request = v1::RegisterAddressSpaceRequest {
        name: "chaos".to_owned(),
        // Every device here enforces its lease.
        strict: true,
        address_space_id: *vmm.address_space.borrow(),
        // One a run of the host agent: a retry finds what an earlier try made.
        request_id: format!("{}-register-{}", std::process::id(), vmm.host.lock().incarnation),
    };
    let mut client = vmm.client.clone();
    match tokio::time::timeout(PATIENCE, client.register_address_space(request)).await {
        Ok(Ok(registered)) => {
            vmm.ledger.lock().registrations += 1;
            vmm.address_space.send_replace(registered.into_inner().address_space_id);
            Ok(())
        }
        Ok(Err(status)) => vmm.may_be_tried_again("RegisterAddressSpace", status),
        Err(_) => Ok(()),
    }
}

async fn answer(vmm: &Vmm) -> Result<Ended, VmmError> {
    let (tx, rx) = mpsc::channel(ANSWERS);
    let say = |message| v1::ServeFaultsRequest { message: Some(message) };
    let open = v1::ServeFaultsOpen { address_space_id: *vmm.address_space.borrow() };
    // There is room: nothing was sent yet.
    let _ = tx.send(say(Message::Open(open))).await;
    let mut client = vmm.client.clone();
    let opened = tokio::time::timeout(PATIENCE, client.serve_faults(ReceiverStream::new(rx))).await;
    let mut questions = match opened {
        Ok(Ok(opened)) => opened.into_inner(),
        Ok(Err(status)) => return ended(vmm, status),
        Err(_) => return Ok(Ended::TryAgain),
    };
    loop {
        match questions.message().await {
            Ok(Some(question)) => {
                let Some(asked) = question.asked else { continue };
                if tx.send(say(translate(vmm, &asked))).await.is_err() {
                    return Ok(Ended::TryAgain);
                }
            }
            Ok(None) => return Ok(Ended::TryAgain),
            Err(status) => return ended(vmm, status),
        }
    }
}

fn ended(vmm: &Vmm, status: tonic::Status) -> Result<Ended, VmmError> {
    match reason(&status) {
        Some(Reason::AddressSpaceUnknown) => Ok(Ended::Unknown),
        // The stream before this one has ended here, and not there yet.
        Some(Reason::FaultsAlreadyServed) => Ok(Ended::TryAgain),
        _ => vmm.may_be_tried_again("ServeFaults", status).map(|()| Ended::TryAgain),
    }
}

/// From the page table as it is now: an invalidation that overtakes the answer spoils it at the host agent.
fn translate(vmm: &Vmm, asked: &v1::FaultAsked) -> Message {
    let range = asked.range.unwrap_or_default();
    let mut translations = Vec::new();
    let memory = vmm.memory.lock();
    for start in (range.start..range.end).step_by(PAGE_BYTES) {
        let Some(held) = page_of(start).and_then(|page| memory.find(page)) else {
            vmm.ledger.lock().faults_declined += 1;
            let reason = v1::ErrorReason::FaultUnmapped.into();
            return Message::Declined(v1::FaultDeclined { fault_id: asked.fault_id, reason, address: start });
        };
        translations.push(v1::Translation {
            range: Some(v1::AddressRange { start, end: start + PAGE_BYTES as u64, all: false }),
            frame: held.frame,
            access: v1::Access::Write.into(),
        });
    }
    vmm.ledger.lock().faults_translated += 1;
    Message::Translated(v1::FaultTranslated { fault_id: asked.fault_id, translations })
}
