//! What the program makes of the answers to its calls: of a host agent that answers as a test says.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rand::SeedableRng as _;
use rand::rngs::SmallRng;
use shootdown_proto::error::{Reason, status};
use shootdown_proto::v1;
use shootdown_proto::v1::notifier_service_server::{NotifierService, NotifierServiceServer};
use tempfile::TempDir;
use tokio::net::UnixListener;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::{Request, Response, Status};

use super::*;

type Told<T> = Result<Response<T>, Status>;

/// One answer to `InvalidateRangeStart`.
enum Says {
    /// A bracket, which is quiet, of this sequence.
    Opened(u64),
    /// A bracket that is not quiet when the deadline passes. Nobody can wait for it.
    OpenedAndWaits(u64),
    /// A bracket whose round took so long, of a host agent that did this before it answered.
    Took(Duration, Before),
    Refused(Reason),
    /// As the one before, and from then on another host agent answers.
    RefusedAndReplaced(Reason),
}

/// What a host agent does for a while, and then for as long.
#[derive(Clone, Copy)]
enum Before {
    Runs,
    StandsStill,
    WaitsForAProcessor,
}

/// How long it does that.
const A_WHILE: Duration = Duration::from_millis(30);

/// What it was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Asked {
    Start(String),
    End(u64),
}

/// How a host agent answers.
#[derive(Default)]
struct Script {
    says: Mutex<VecDeque<Says>>,
    asked: Mutex<Vec<Asked>>,
    vmm: Mutex<Option<Arc<Vmm>>>,
}

struct Scripted(Arc<Script>);

#[tonic::async_trait]
impl NotifierService for Scripted {
    type ServeFaultsStream = ReceiverStream<Result<v1::ServeFaultsResponse, Status>>;

    async fn invalidate_range_start(
        &self,
        request: Request<v1::InvalidateRangeStartRequest>,
    ) -> Told<v1::InvalidateRangeStartResponse> {
        self.0.asked.lock().push(Asked::Start(request.into_inner().request_id));
        let says = self.0.says.lock().pop_front().expect("it is asked as often as the test says");
        match says {
            Says::Opened(seq) => Ok(opened(seq, Duration::ZERO)),
            Says::OpenedAndWaits(seq) => {
                let verdict = v1::Verdict::NotQuiesced.into();
                let result =
                    v1::RoundResult { verdict, seq, host_incarnation: 1, ..v1::RoundResult::default() };
                Ok(Response::new(v1::InvalidateRangeStartResponse { result: Some(result) }))
            }
            Says::Took(elapsed, before) => {
                let vmm = self.0.vmm.lock().clone().expect("it is there");
                tokio::time::sleep(A_WHILE).await;
                match before {
                    Before::Runs => {}
                    Before::StandsStill => vmm.on_host_stopped(),
                    Before::WaitsForAProcessor => vmm.stalls.has_waited(A_WHILE),
                }
                tokio::time::sleep(A_WHILE).await;
                vmm.on_host_goes_on();
                Ok(opened(7, elapsed))
            }
            Says::Refused(reason) => Err(status(reason, "", &[])),
            Says::RefusedAndReplaced(reason) => {
                let vmm = self.0.vmm.lock().clone().expect("it is there");
                vmm.host.lock().lives += 1;
                Err(status(reason, "", &[]))
            }
        }
    }

    async fn invalidate_range_end(
        &self,
        request: Request<v1::InvalidateRangeEndRequest>,
    ) -> Told<v1::InvalidateRangeEndResponse> {
        self.0.asked.lock().push(Asked::End(request.into_inner().seq));
        Ok(Response::new(v1::InvalidateRangeEndResponse::default()))
    }

    async fn register_address_space(
        &self,
        _: Request<v1::RegisterAddressSpaceRequest>,
    ) -> Told<v1::RegisterAddressSpaceResponse> {
        Err(not_asked())
    }

    async fn invalidate_page(
        &self,
        _: Request<v1::InvalidatePageRequest>,
    ) -> Told<v1::InvalidatePageResponse> {
        Err(not_asked())
    }

    async fn change_pte(&self, _: Request<v1::ChangePteRequest>) -> Told<v1::ChangePteResponse> {
        Err(not_asked())
    }

    async fn clear_flush_young(
        &self,
        _: Request<v1::ClearFlushYoungRequest>,
    ) -> Told<v1::ClearFlushYoungResponse> {
        Err(not_asked())
    }

    async fn clear_young(&self, _: Request<v1::ClearYoungRequest>) -> Told<v1::ClearYoungResponse> {
        Err(not_asked())
    }

    async fn test_young(&self, _: Request<v1::TestYoungRequest>) -> Told<v1::TestYoungResponse> {
        Err(not_asked())
    }

    async fn release_address_space(
        &self,
        _: Request<v1::ReleaseAddressSpaceRequest>,
    ) -> Told<v1::ReleaseAddressSpaceResponse> {
        Err(not_asked())
    }

    async fn await_round(&self, _: Request<v1::AwaitRoundRequest>) -> Told<v1::AwaitRoundResponse> {
        Err(status(Reason::Draining, "", &[]))
    }

    async fn serve_faults(
        &self,
        _: Request<tonic::Streaming<v1::ServeFaultsRequest>>,
    ) -> Told<Self::ServeFaultsStream> {
        Err(not_asked())
    }
}

fn opened(seq: u64, elapsed: Duration) -> Response<v1::InvalidateRangeStartResponse> {
    let verdict = v1::Verdict::Quiesced.into();
    let elapsed_ns = u64::try_from(elapsed.as_nanos()).unwrap();
    let result =
        v1::RoundResult { verdict, seq, elapsed_ns, host_incarnation: 1, ..v1::RoundResult::default() };
    Response::new(v1::InvalidateRangeStartResponse { result: Some(result) })
}

fn not_asked() -> Status {
    status(Reason::FieldInvalid, "nobody asks for that here", &[])
}

/// The program, and a host agent that answers as it is told.
struct Bench {
    vmm: Arc<Vmm>,
    script: Arc<Script>,
    _dir: TempDir,
}

impl Bench {
    fn new(says: impl IntoIterator<Item = Says>) -> Self {
        Self::with_room(says, None)
    }

    fn with_room(says: impl IntoIterator<Item = Says>, limits: Option<Limits>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let places = Places { directory: dir.path().into() };
        let shape = Shape {
            pages: 8,
            devices: 1,
            slots: 1,
            deadline: Duration::from_millis(100),
            seed: 1,
            rule: None,
            limits,
        };
        let shared = Arc::new(Shared::create(&places, 1, 1, 8).unwrap());
        let vmm = Arc::new(Vmm::new(&places, shared, shape).unwrap());
        vmm.host.lock().lives = 1;
        let script = Script { says: Mutex::new(says.into_iter().collect()), ..Script::default() };
        *script.vmm.lock() = Some(Arc::clone(&vmm));
        let script = Arc::new(script);
        let listener = UnixListenerStream::new(UnixListener::bind(places.source_socket()).unwrap());
        let service = NotifierServiceServer::new(Scripted(Arc::clone(&script)));
        tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(listener));
        Self { vmm, script, _dir: dir }
    }

    /// One move's call, by the id `move`: the sequence, and the id of the call that has it.
    async fn quiesce(&self) -> (u64, String) {
        let mut request = v1::InvalidateRangeStartRequest {
            address_space_id: 1,
            range: Some(v1::AddressRange { start: 0x1000, end: 0x2000, all: false }),
            request_id: "move".to_owned(),
            resident_pages: 1,
            ..v1::InvalidateRangeStartRequest::default()
        };
        // With this seed no first call is asked for again.
        let mut random = SmallRng::seed_from_u64(1);
        let result = self.vmm.quiesce(&mut request, &mut random).await.unwrap();
        assert!(self.script.says.lock().is_empty(), "it was asked as often as it was to be");
        (result.seq, request.request_id)
    }

    fn asked(&self) -> Vec<Asked> {
        self.script.asked.lock().clone()
    }

    fn counted(&self) -> [u64; 3] {
        let ledger = self.vmm.ledger.lock();
        [ledger.refused_for_want_of_room, ledger.refused_again, ledger.second_outcomes]
    }
}

/// The longest round, and the longest without waits for a processor, of a call that is answered so, once.
async fn longest(elapsed: Duration, before: Before) -> (Duration, Duration) {
    let bench = Bench::new([Says::Took(elapsed, before)]);
    bench.quiesce().await;
    let ledger = bench.vmm.ledger.lock();
    (Duration::from_nanos(ledger.longest_round_ns), Duration::from_nanos(ledger.longest_running_ns))
}

#[tokio::test]
async fn a_round_is_excused_by_what_was_certainly_within_it_and_by_nothing_else() {
    let (short, long) = (Duration::from_millis(10), Duration::from_secs(1));
    assert_eq!(longest(long, Before::Runs).await, (long, long));
    let (round, running) = longest(long, Before::StandsStill).await;
    assert!(round <= long - A_WHILE && running == round, "{round:?} {running:?}");
    assert_eq!(longest(long, Before::WaitsForAProcessor).await, (long, long - A_WHILE));
    // The call took longer than its round, by more than that: it may all have been before the round, or after.
    assert_eq!(longest(short, Before::StandsStill).await, (short, short));
    assert_eq!(longest(short, Before::WaitsForAProcessor).await, (short, short));
}

#[tokio::test]
async fn a_call_that_may_have_waited_for_room_has_its_deadline_for_that() {
    let (elapsed, limits) = (Duration::from_millis(130), Some(Limits { rounds: 1, pages: 8 }));
    for (others, longest) in [(0, 130), (1, 30)] {
        let bench = Bench::with_room([Says::Took(elapsed, Before::Runs)], limits);
        let _others: Vec<_> = (0..others).map(|_| bench.vmm.room.enter(1)).collect();
        bench.quiesce().await;
        assert_eq!(bench.vmm.ledger.lock().longest_round_ns, longest * 1_000_000);
    }
}

fn start(id: &str) -> Asked {
    Asked::Start(id.to_owned())
}

#[tokio::test]
async fn a_call_that_is_refused_for_want_of_room_is_over_and_the_next_has_another_id() {
    use Says::{Opened, Refused};
    let bench = Bench::new([
        Refused(Reason::RoundQuota),
        Refused(Reason::QuarantineFull),
        Opened(7),
        Refused(Reason::QuarantineFull),
    ]);
    assert_eq!(bench.quiesce().await, (7, "move-2".to_owned()));
    assert_eq!(bench.asked(), ["move", "move-1", "move-2", "move-1"].map(start));
    assert_eq!(bench.counted(), [2, 1, 0]);
}

#[tokio::test]
async fn a_bracket_for_a_call_that_was_refused_is_a_second_outcome_and_is_ended() {
    use Says::{Opened, Refused};
    let bench = Bench::new([Refused(Reason::RoundQuota), Opened(7), Opened(8)]);
    assert_eq!(bench.quiesce().await, (7, "move-1".to_owned()));
    assert_eq!(bench.asked(), [start("move"), start("move-1"), start("move"), Asked::End(8)]);
    assert_eq!(bench.counted(), [1, 0, 1]);
}

#[tokio::test]
async fn another_refusal_of_a_call_that_was_refused_is_a_second_outcome() {
    use Says::{Opened, Refused};
    let bench = Bench::new([Refused(Reason::RoundQuota), Opened(7), Refused(Reason::QuarantineFull)]);
    bench.quiesce().await;
    assert_eq!(bench.counted(), [1, 0, 1]);
}

#[tokio::test]
async fn a_refusal_that_is_no_outcome_is_asked_for_again_by_the_same_id() {
    use Says::{Opened, Refused};
    let none = [Reason::AddressSpaceUnknown, Reason::RoundUnknown, Reason::Draining, Reason::HostSuperseded];
    // It was tried again, so it is asked for once more.
    let bench = Bench::new(none.map(Refused).into_iter().chain([Opened(7), Opened(7)]));
    assert_eq!(bench.quiesce().await, (7, "move".to_owned()));
    assert_eq!(bench.asked(), ["move"; 6].map(start));
    assert_eq!(bench.counted(), [0, 0, 0]);
    let ledger = bench.vmm.ledger.lock();
    assert_eq!((ledger.retried_calls, ledger.retried_with_one_outcome), (1, 1));
}

#[tokio::test]
async fn nothing_is_made_of_a_refusal_when_another_host_agent_answers() {
    use Says::{Opened, Refused, RefusedAndReplaced};
    let bench = Bench::new([RefusedAndReplaced(Reason::RoundQuota), Opened(7)]);
    bench.quiesce().await;
    assert_eq!(bench.asked(), ["move", "move-1"].map(start), "nobody knows whose word it was");
    // The one that is asked again is not the one that refused: what it opens is ended, and is its own first outcome.
    let bench = Bench::new([
        Refused(Reason::RoundQuota),
        Opened(7),
        RefusedAndReplaced(Reason::AddressSpaceUnknown),
        Opened(1),
    ]);
    bench.quiesce().await;
    assert_eq!(bench.asked(), [start("move"), start("move-1"), start("move"), start("move"), Asked::End(1)]);
    assert_eq!(bench.counted(), [1, 0, 0]);
    let bench = Bench::new([Refused(Reason::RoundQuota), Opened(7)]);
    bench.vmm.on_replaced_goes_on();
    bench.quiesce().await;
    assert_eq!(bench.counted(), [1, 0, 0], "one that was replaced may have said so");
}

#[tokio::test]
async fn a_retry_of_a_call_that_has_a_bracket_is_not_refused() {
    use Says::{Opened, Refused};
    // Tried twice, so it is asked for again: what has a bracket has room.
    let bench = Bench::new([Refused(Reason::Draining), Opened(7), Refused(Reason::RoundQuota)]);
    assert_eq!(bench.quiesce().await, (7, "move".to_owned()));
    assert_eq!(bench.counted(), [0, 0, 1]);
}

#[tokio::test]
async fn a_call_that_has_a_bracket_is_not_refused_by_the_host_agent_that_opened_it() {
    use Says::{Opened, OpenedAndWaits, Refused, RefusedAndReplaced};
    let quota = Reason::RoundQuota;
    let bench = Bench::new([OpenedAndWaits(7), Refused(quota), Opened(8), Refused(quota)]);
    assert_eq!(bench.quiesce().await, (8, "move-1".to_owned()));
    assert_eq!(bench.counted(), [1, 1, 1]);
    let bench = Bench::new([OpenedAndWaits(7), RefusedAndReplaced(quota), Opened(8)]);
    bench.quiesce().await;
    assert_eq!(bench.counted(), [1, 0, 0], "its successor may, after a crash");
}

#[tokio::test]
async fn a_bracket_that_a_successor_opens_for_a_call_that_is_over_is_ended() {
    use Says::{Opened, Refused, RefusedAndReplaced};
    let bench = Bench::new([
        Refused(Reason::Draining),
        Opened(7),
        RefusedAndReplaced(Reason::AddressSpaceUnknown),
        Opened(9),
    ]);
    bench.quiesce().await;
    assert_eq!(bench.asked().last(), Some(&Asked::End(9)));
    assert_eq!(bench.counted(), [0, 0, 0]);
}
