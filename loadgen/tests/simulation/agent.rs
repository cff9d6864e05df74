//! The host agent's machine: the real host agent, and beside it the source and an administrator.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream;
use hyper_util::rt::TokioIo;
use shootdown_core::Incarnation;
use shootdown_core::outbox::OutboxLimits;
use shootdown_core::session::SessionConfig;
use shootdown_proto::v1;
use shootdown_proto::v1::admin_service_client::AdminServiceClient;
use shootdown_server::clock::Clock;
use shootdown_server::config::{StateConfig, Takeover};
use shootdown_server::source::memory::FrameStore;
use shootdown_server::{HostConfig, QuarantineBudget, embed};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use turmoil::net::{TcpListener, TcpStream};

use crate::clock::{host_now, virtual_now};
use crate::device::{PORT, everywhere};
use crate::plan::{Broken, Plan, millis};
use crate::shared::{Shared, Stage};
use crate::sockets::Socket;
use crate::source::{Ended, Source};
use crate::trace::What;

/// Where the host agent listens for administrators.
const ADMIN_PORT: u16 = 7401;

/// How long a planned end waits for rounds.
const DRAIN: Duration = millis(300);

/// One run of the host agent. After a crash, and after a planned end, there is another.
pub async fn run(shared: Arc<Shared>) -> turmoil::Result {
    let before = shared.kills.get();
    let ended = tokio::select! {
        biased;
        // First: whoever is killed does nothing more.
        () = shared.kills.until(|kills| kills > before) => Ok(()),
        ended = live(Arc::clone(&shared)) => ended,
    };
    shared.sockets.close_all();
    ended
}

async fn live(shared: Arc<Shared>) -> turmoil::Result {
    let run = shared.start_of_agent();
    if shared.plan.broken == Broken::JournalLost {
        for entry in std::fs::read_dir(shared.state.path())? {
            std::fs::remove_file(entry?.path())?;
        }
    }
    let state = StateConfig { dir: shared.state.path().to_owned(), takeover: Takeover::Never };
    let host = embed::restarted(config(&shared.plan), tokio::runtime::Handle::current(), state)?;
    shared.trace.record(What::AgentStarted { incarnation: host.incarnation().get() });
    let stop = CancellationToken::new();
    // The simulated pages have no bytes: what is granted is looked at in the trace.
    let frames = FrameStore::new(1)?;
    tokio::spawn(embed::watch(host.clone(), stop.clone()));
    let (devices, administrators) = (listen(&shared, PORT).await?, listen(&shared, ADMIN_PORT).await?);
    let (served, until) = (host.clone(), stop.clone());
    tokio::spawn(async move { embed::serve_devices(&served, &frames, devices, until).await });
    let (served, until) = (host.clone(), stop.clone());
    tokio::spawn(async move { embed::serve_administrators(&served, administrators, until).await });

    let source = Source::new(Arc::clone(&shared), host.clone(), run);
    if source.run().await == Ended::AskedTo {
        embed::hand_over(&host, DRAIN).await;
        shared.trace.record(What::HandedOver);
        stop.cancel();
        shared.handovers.change(|handovers| *handovers += 1);
        return Ok(());
    }
    shared.until(Stage::Quiet).await;
    let devices = shared.plan.devices.len();
    shared.stopped.until(|stopped| stopped == devices).await;
    let left = left(&shared.plan).await?;
    shared.trace.record(left);
    shared.stage.change(|stage| *stage = Stage::Over);
    stop.cancel();
    Ok(())
}

fn config(plan: &Plan) -> HostConfig {
    let session = SessionConfig {
        lease: plan.terms,
        ack_timeout: plan.ack_timeout,
        outbox: OutboxLimits { window: plan.window, max_pending: plan.max_pending },
        ..SessionConfig::default()
    };
    HostConfig {
        session,
        max_sessions: 64,
        max_address_spaces: 64,
        max_rounds_in_flight: 64,
        stage_timing: false,
        // Wall time: also of a run that does not know of those before.
        incarnation: Incarnation::new(virtual_now().as_nanos() as u64 + 1).expect("it is not 0"),
        clock: Clock::new(host_now),
        fencers: Vec::new(),
        quarantine: QuarantineBudget { bytes: u64::MAX, pages: u64::MAX },
        source_fault_timeout: shootdown_server::source::rpc::DEFAULT_FAULT_TIMEOUT,
    }
}

async fn listen(
    shared: &Arc<Shared>,
    port: u16,
) -> io::Result<impl futures_util::Stream<Item = io::Result<Socket>> + use<>> {
    let listener = TcpListener::bind(everywhere(port)).await?;
    let open = (listener, Arc::clone(shared));
    Ok(stream::unfold(open, async |(listener, shared)| {
        let accepted = listener.accept().await.map(|(stream, _)| shared.sockets.add(stream));
        Some((accepted, (listener, shared)))
    }))
}

/// What the administrator's listings show, once it is nothing, or will not be.
async fn left(plan: &Plan) -> turmoil::Result<What> {
    let channel = tonic::transport::Endpoint::from_static("http://host-agent")
        .connect_with_connector(tower::service_fn(|_| async {
            TcpStream::connect(("127.0.0.1", ADMIN_PORT)).await.map(TokioIo::new)
        }))
        .await?;
    let mut admin = AdminServiceClient::new(channel);
    // A session that lost its stream is fenced when its lease is over.
    let patience = plan.resolution_bound() + millis(50);
    let mut waited = Duration::ZERO;
    loop {
        let left = count(&mut admin).await?;
        if left == What::NOTHING_LEFT || waited >= patience {
            return Ok(left);
        }
        let pause = millis(20);
        tokio::time::sleep(pause).await;
        waited += pause;
    }
}

async fn count(admin: &mut AdminServiceClient<Channel>) -> turmoil::Result<What> {
    let sessions = admin.list_sessions(v1::ListSessionsRequest::default()).await?.into_inner();
    let rounds = admin.list_rounds(v1::ListRoundsRequest::default()).await?.into_inner();
    let spaces = admin.list_address_spaces(v1::ListAddressSpacesRequest::default()).await?.into_inner();
    let spaces = spaces.address_spaces;
    let quarantine = admin.list_quarantine(v1::ListQuarantineRequest::default()).await?.into_inner();
    Ok(What::Left {
        sessions: sessions.sessions.len(),
        rounds: rounds.rounds.len(),
        brackets: spaces.iter().map(|space| space.open_brackets).sum(),
        subscriptions: spaces.iter().map(|space| space.subscriptions).sum(),
        quarantined: (quarantine.bytes, quarantine.pages),
    })
}
