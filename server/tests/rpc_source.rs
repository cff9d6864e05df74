//! The rpc source over real sockets: a program that serves the faults of its own address space, tries
//! calls again, and outlives its connections.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;
#[path = "rpc_source/faults.rs"]
mod faults;
#[path = "rpc_source/names.rs"]
mod names;
#[path = "rpc_source/retries.rs"]
mod retries;

use common::{Agent, Device, pages, soon, wire};
use shootdown_core::{AddrRange, AddressSpaceId};
use shootdown_proto::error::Reason;
use shootdown_proto::v1;
use shootdown_proto::v1::notifier_service_client::NotifierServiceClient;
use shootdown_proto::v1::serve_faults_request::Message as Answer;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

/// A program with an address space, on one connection. A clone shares it.
#[derive(Clone)]
struct Vmm {
    calls: NotifierServiceClient<Channel>,
    space: u64,
}

impl Vmm {
    async fn start(agent: &Agent) -> Self {
        let mut calls = NotifierServiceClient::new(agent.channel("source.sock").await);
        let register = v1::RegisterAddressSpaceRequest { name: "vmm".to_owned(), ..Default::default() };
        let space = calls.register_address_space(register).await.unwrap().into_inner().address_space_id;
        Self { calls, space }
    }

    /// The same program on another connection.
    async fn reconnected(&self, agent: &Agent) -> Self {
        let calls = NotifierServiceClient::new(agent.channel("source.sock").await);
        Self { calls, space: self.space }
    }

    fn id(&self) -> AddressSpaceId {
        AddressSpaceId::new(self.space).unwrap()
    }

    fn unmap(&self, range: AddrRange, request_id: &str) -> v1::InvalidateRangeStartRequest {
        v1::InvalidateRangeStartRequest {
            address_space_id: self.space,
            range: Some(wire(range)),
            cause: v1::Cause::Unmap.into(),
            request_id: request_id.to_owned(),
            ..Default::default()
        }
    }

    async fn invalidate(&self, start: v1::InvalidateRangeStartRequest) -> Result<v1::RoundResult, Status> {
        let answer = soon(self.calls.clone().invalidate_range_start(start)).await?;
        Ok(answer.into_inner().result.unwrap())
    }

    /// The same in a task: dropped with it, the call loses its handler.
    fn invalidating(
        &self,
        start: v1::InvalidateRangeStartRequest,
    ) -> tokio::task::JoinHandle<Result<v1::RoundResult, Status>> {
        let vmm = self.clone();
        tokio::spawn(async move { vmm.invalidate(start).await })
    }

    async fn end(&self, seq: u64, request_id: &str) -> Result<(), Status> {
        let end = v1::InvalidateRangeEndRequest {
            address_space_id: self.space,
            seq,
            request_id: request_id.to_owned(),
            ..Default::default()
        };
        soon(self.calls.clone().invalidate_range_end(end)).await.map(drop)
    }

    async fn release(&self, request_id: &str) -> Result<v1::RoundResult, Status> {
        let release = v1::ReleaseAddressSpaceRequest {
            address_space_id: self.space,
            request_id: request_id.to_owned(),
        };
        let answer = soon(self.calls.clone().release_address_space(release)).await?;
        Ok(answer.into_inner().result.unwrap())
    }

    async fn serve(&self) -> Result<Faults, Status> {
        Faults::begin(self, Answer::Open(v1::ServeFaultsOpen { address_space_id: self.space })).await
    }
}

/// The stream on which a program answers faults.
struct Faults {
    answers: mpsc::Sender<v1::ServeFaultsRequest>,
    questions: Streaming<v1::ServeFaultsResponse>,
}

impl Faults {
    async fn begin(vmm: &Vmm, first: Answer) -> Result<Self, Status> {
        let (answers, rx) = mpsc::channel(2048);
        answers.send(v1::ServeFaultsRequest { message: Some(first) }).await.unwrap();
        let questions = soon(vmm.calls.clone().serve_faults(ReceiverStream::new(rx))).await?.into_inner();
        Ok(Self { answers, questions })
    }

    async fn asked(&mut self) -> v1::FaultAsked {
        let said = soon(self.questions.message()).await.expect("the stream is up");
        said.expect("the stream goes on").asked.expect("a question")
    }

    /// Whether nothing is asked now.
    async fn is_silent(&mut self) -> bool {
        common::is_pending(&mut Box::pin(self.questions.message())).await
    }

    async fn say(&self, answer: Answer) {
        let said = v1::ServeFaultsRequest { message: Some(answer) };
        soon(self.answers.send(said)).await.expect("the stream is up");
    }

    async fn answer(&self, asked: &v1::FaultAsked, translations: Vec<v1::Translation>) {
        self.say(Answer::Translated(v1::FaultTranslated { fault_id: asked.fault_id, translations })).await;
    }

    /// Answers with page n in frame n + `offset`.
    async fn grant(&self, asked: &v1::FaultAsked, offset: u64) {
        let area = asked.range.unwrap();
        let all = (area.start..area.end).step_by(4096).map(|page| page / 4096);
        let all = all.map(|page| translation(page, page + offset, v1::Access::Write)).collect();
        self.answer(asked, all).await;
    }

    async fn decline(&self, asked: &v1::FaultAsked, reason: i32, address: u64) {
        self.say(Answer::Declined(v1::FaultDeclined { fault_id: asked.fault_id, reason, address })).await;
    }

    /// How the stream ended: what was still asked is passed over.
    async fn last_word(&mut self) -> Option<Reason> {
        loop {
            match soon(self.questions.message()).await {
                Ok(Some(_)) => {}
                Ok(None) => return None,
                Err(status) => return Some(reason(&status)),
            }
        }
    }
}

fn translation(page: u64, frame: u64, access: v1::Access) -> v1::Translation {
    v1::Translation { range: Some(wire(pages(page, 1))), frame, access: access.into() }
}

fn reason(status: &Status) -> Reason {
    Reason::of_status(status).unwrap_or_else(|| panic!("no reason of ours: {status:?}"))
}

fn refused<T: std::fmt::Debug>(answer: Result<T, Status>) -> Reason {
    reason(&answer.expect_err("it should be refused"))
}

/// A VMM as one would write it: guest memory that moves, faults answered from its table, and each move
/// announced before the old frame is given to somebody else.
#[tokio::test]
async fn a_vmm_in_another_process_has_devices_that_fault() {
    let agent = Agent::start();
    let vmm = Vmm::start(&agent).await;
    let mut faults = vmm.serve().await.unwrap();
    let mut device = agent.device("gpu").await;
    device.subscribe(vmm.id(), pages(0, 16)).await;

    let fault = device.start_fault(vmm.id(), pages(2, 3)).await;
    let asked = faults.asked().await;
    assert_eq!((asked.range, asked.access()), (Some(wire(pages(2, 3))), v1::Access::Read));
    faults.grant(&asked, 100).await;
    let granted = device.grant().await;
    assert_eq!(granted.request_id, fault);
    assert_eq!(granted.translations.iter().map(|page| page.frame).collect::<Vec<_>>(), [102, 103, 104]);

    // The guest's page 3 moves: nobody may use frame 103 afterwards.
    let moving = vmm.invalidating(vmm.unmap(pages(3, 1), "move-1"));
    let notice = device.notice().await;
    device.start_fault(vmm.id(), pages(3, 1)).await;
    device.ack(notice.number).await;
    let moved = moving.await.unwrap().unwrap();
    assert_eq!(moved.verdict(), v1::Verdict::Quiesced);
    device.settled().await;
    assert!(faults.is_silent().await, "the source is not asked for what it is moving");
    vmm.end(moved.seq, "move-1-end").await.unwrap();
    let asked = faults.asked().await;
    faults.grant(&asked, 200).await;
    let granted = device.grant().await;
    assert_eq!((granted.translations[0].frame, granted.seq), (203, moved.seq));

    assert_eq!(vmm_released(&vmm, &mut device).await.verdict(), v1::Verdict::Quiesced);
    assert_eq!(faults.last_word().await, Some(Reason::AddressSpaceReleased));
}

async fn vmm_released(vmm: &Vmm, device: &mut Device) -> v1::RoundResult {
    let other = vmm.clone();
    let releasing = tokio::spawn(async move { other.release("bye").await });
    let notice = device.notice().await;
    device.ack(notice.number).await;
    releasing.await.unwrap().unwrap()
}
