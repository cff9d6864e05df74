//! Services that cut devices off.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use shootdown_proto::v1;
use shootdown_proto::v1::fencer_service_server::{FencerService, FencerServiceServer};
use shootdown_proto::v1::session_request::Message as Ask;
use shootdown_server::embed::FencerConnector;
use shootdown_server::source::Outcome;
use shootdown_server::{Endpoint, Fencer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_stream::Stream;
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tonic::transport::server::Connected;
use tonic::{Request, Response, Status};

use super::{LEASE, assert_outlived, long_lease, rule, short_lease, silent_targets};
use crate::common::{Agent, log, pages, quiesced, soon, until};

/// What a service does when it is asked about the device of that name.
#[derive(Clone, Default)]
struct Switch {
    asked: Arc<Mutex<Vec<v1::FenceRequest>>>,
}

#[tonic::async_trait]
impl FencerService for Switch {
    async fn fence(&self, request: Request<v1::FenceRequest>) -> Result<Response<v1::FenceResponse>, Status> {
        let request = request.into_inner();
        self.asked.lock().push(request.clone());
        let outcome = match request.device_id.as_str() {
            "confirmed" => v1::FenceOutcome::Confirmed.into(),
            "not-confirmed" => v1::FenceOutcome::NotConfirmed.into(),
            "unspecified" => v1::FenceOutcome::Unspecified.into(),
            "unknown" => 4711,
            "hang" => std::future::pending().await,
            _ => return Err(Status::internal("the switch is on fire")),
        };
        Ok(Response::new(v1::FenceResponse { outcome }))
    }
}

impl Switch {
    fn serve(&self, socket: &Path) {
        let listener = tokio::net::UnixListener::bind(socket).unwrap();
        self.serve_on(UnixListenerStream::new(listener));
    }

    fn serve_on<C>(&self, incoming: impl Stream<Item = std::io::Result<C>> + Send + 'static)
    where
        C: Connected<ConnectInfo: Clone + Send + Sync> + AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let serving = tonic::transport::Server::builder()
            .add_service(FencerServiceServer::new(self.clone()))
            .serve_with_incoming(incoming);
        tokio::spawn(serving);
    }

    fn times_asked(&self, device: &str) -> usize {
        self.asked.lock().iter().filter(|request| request.device_id == device).count()
    }
}

#[tokio::test]
async fn a_service_confirms_by_its_word_and_by_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let socket = |name: &str| Fencer::Service(Endpoint::Unix(folder.path().join(name)));
    let switch = Switch::default();
    switch.serve(&folder.path().join("switch"));
    let limit = Duration::from_millis(300);
    let agent = Agent::start_with(|config| {
        short_lease(config);
        config.host.fencers =
            vec![rule("unreachable", socket("nobody"), limit), rule("*", socket("switch"), limit)];
    });
    let space = agent.space();
    let confirmed = agent.space();
    let names = ["not-confirmed", "unspecified", "unknown", "hang", "fails", "unreachable"];
    let (_devices, round) = silent_targets(&agent, space, &names).await;
    let (_device, by_word) = silent_targets(&agent, confirmed, &["confirmed"]).await;
    let targets = quiesced(by_word).await;
    assert_eq!(targets[0].outcome, Outcome::Fenced);
    assert!(targets[0].elapsed.unwrap() < LEASE / 2, "by its word: {targets:?}");
    let asked = switch.asked.lock().clone();
    let request = asked.iter().find(|request| request.device_id == "confirmed").unwrap();
    assert_eq!((request.device_incarnation, request.session_id), (1, targets[0].session.get()));
    assert!(request.epoch > 0 && request.host_incarnation > 0);
    for name in &names[..5] {
        until(|| switch.times_asked(name) >= 2).await;
    }
    assert_outlived(&quiesced(round).await);
    assert_eq!(switch.times_asked("confirmed"), 1, "nobody is asked about what is over");
}

#[tokio::test]
async fn a_service_is_asked_over_a_connection_of_the_embedding_programs() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("switch");
    let switch = Switch::default();
    switch.serve(&path);
    let connector = FencerConnector::from_fn(move || tokio::net::UnixStream::connect(path.clone()));
    let unreachable = FencerConnector::from_fn(|| async {
        Err::<tokio::net::UnixStream, _>(std::io::ErrorKind::ConnectionRefused.into())
    });
    assert_ne!(connector, unreachable);
    let agent = Agent::start_with(|config| {
        short_lease(config);
        let limit = Duration::from_secs(10);
        config.host.fencers = vec![
            rule("unreachable", Fencer::Embedded(unreachable), limit),
            rule("*", Fencer::Embedded(connector), limit),
        ];
    });
    let (space, other) = (agent.space(), agent.space());
    let (_devices, round) = silent_targets(&agent, space, &["confirmed"]).await;
    let (_device, without) = silent_targets(&agent, other, &["unreachable"]).await;
    let targets = quiesced(round).await;
    assert_eq!(targets[0].outcome, Outcome::Fenced);
    assert!(targets[0].elapsed.unwrap() < LEASE / 2, "by its word: {targets:?}");
    assert_outlived(&quiesced(without).await);
}

/// A name is as good as an address; one that does not resolve confirms nothing, and the log says which it was.
#[tokio::test]
async fn a_service_may_be_given_by_name() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let by_name = format!("tcp://localhost:{}", listener.local_addr().unwrap().port());
    let switch = Switch::default();
    switch.serve_on(TcpListenerStream::new(listener));
    let nobody = "tcp://switch.invalid:7400";
    let service = |endpoint: &str| Fencer::Service(endpoint.parse().unwrap());
    let limit = Duration::from_millis(500);
    let not_confirmed = || log::lines("nameless", "a fence is not confirmed");
    assert!(not_confirmed().is_empty());
    let agent = Agent::start_with(|config| {
        short_lease(config);
        config.host.fencers =
            vec![rule("confirmed", service(&by_name), limit), rule("nameless", service(nobody), limit)];
    });
    let space = agent.space();
    let (_devices, by_word) = silent_targets(&agent, space, &["confirmed"]).await;
    let targets = quiesced(by_word).await;
    assert_eq!(targets[0].outcome, Outcome::Fenced);
    assert!(targets[0].elapsed.unwrap() < LEASE / 2, "by its word: {targets:?}");
    let (_devices, round) = silent_targets(&agent, agent.space(), &["nameless"]).await;
    assert_outlived(&quiesced(round).await);
    assert!(not_confirmed().len() >= 2, "it was tried again");
    for line in not_confirmed() {
        assert_eq!(line.field("fencer"), nobody);
    }
    assert_eq!(switch.times_asked("confirmed"), 1);
}

/// A fencer that comes back is asked again, and a device that acks meanwhile is left in peace.
#[tokio::test]
async fn an_ack_ends_the_attempts_and_a_fencer_that_comes_back_is_asked_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("switch");
    let fencer = Fencer::Service(Endpoint::Unix(path.clone()));
    let agent = Agent::start_with(|config| {
        long_lease(config);
        config.host.fencers = vec![rule("*", fencer, Duration::from_secs(1))];
    });
    let space = agent.space();
    let (mut devices, round) = silent_targets(&agent, space, &["confirmed", "late"]).await;
    soon(async {
        let all_suspect = |listed: &[v1::Session]| {
            listed.iter().all(|session| session.phase() == v1::SessionPhase::Suspect)
        };
        while !all_suspect(&agent.listed_sessions().await) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    // This one's acks come in before the fencer is there.
    devices[1].ack(1).await;
    devices[1].settled().await;
    let switch = Switch::default();
    switch.serve(&path);
    let targets = quiesced(round).await;
    assert_eq!([targets[0].outcome, targets[1].outcome], [Outcome::Fenced, Outcome::Acked]);
    devices[1].settled().await;
    assert_eq!(switch.times_asked("late"), 0);
    // The next time that it owes an ack is another one.
    let next = agent.round(space, pages(1, 1));
    devices[1].notice().await;
    until(|| switch.times_asked("late") >= 1).await;
    devices[1].ack(2).await;
    assert_eq!(quiesced(next).await[0].outcome, Outcome::Acked, "a switch on fire confirms nothing");
}

/// What was never waited for needs no fencer.
#[tokio::test]
async fn a_device_that_leaves_is_not_fenced() {
    let folder = tempfile::tempdir().unwrap();
    let switch = Switch::default();
    switch.serve(&folder.path().join("switch"));
    let fencer = Fencer::Service(Endpoint::Unix(folder.path().join("switch")));
    let agent = Agent::start_with(|config| {
        long_lease(config);
        config.host.fencers = vec![rule("*", fencer, Duration::from_secs(1))];
    });
    let space = agent.space();
    let mut leaver = agent.device("confirmed").await;
    leaver.subscribe(space, pages(1, 1)).await;
    let round = agent.round(space, pages(1, 1));
    leaver.notice().await;
    leaver.ask(Ask::Leave(v1::Leave {})).await;
    assert_eq!(quiesced(round).await[0].outcome, Outcome::Left);
    // Another device of the same fencer is fenced after it; by then it would have been asked.
    let (_devices, round) = silent_targets(&agent, space, &["confirmed"]).await;
    quiesced(round).await;
    assert_eq!(switch.times_asked("confirmed"), 1);
}
