//! The host agent's machine: the real host agent, and beside it an administrator and, where it is not on a
//! machine of its own, the source.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream;
use hyper_util::rt::TokioIo;
use rand::RngExt as _;
use shootdown_core::Incarnation;
use shootdown_core::outbox::OutboxLimits;
use shootdown_core::session::SessionConfig;
use shootdown_proto::v1;
use shootdown_proto::v1::admin_service_client::AdminServiceClient;
use shootdown_server::clock::Clock;
use shootdown_server::config::{StateConfig, Takeover};
use shootdown_server::{HostConfig, QuarantineBudget, embed};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use turmoil::net::{TcpListener, TcpStream};

use crate::administrator;
use crate::clock::{host_now, virtual_now};
use crate::device::{PORT, everywhere};
use crate::fencer;
use crate::link::SOURCE_PORT;
use crate::observer;
use crate::plan::{Broken, Caller, DevicePlan, millis};
use crate::shared::{Shared, Stage};
use crate::sockets::Socket;
use crate::source::{Ended, Source};
use crate::trace::What;

/// Where the host agent listens for administrators.
const ADMIN_PORT: u16 = 7401;

/// How long a planned end waits for rounds.
const DRAIN: Duration = millis(300);

/// When a successor is started, after it was asked for: it may be while the one before still runs.
const TAKEOVER_IN: std::ops::Range<u64> = 0..120;

/// When the one before stands still, likewise.
const STOPPED_IN: std::ops::Range<u64> = 0..40;

/// One run of the host agent. After a crash, and after a planned end, there is another.
pub async fn run(shared: Arc<Shared>, index: usize) -> turmoil::Result {
    let process = &shared.agents[index];
    let before = process.kills.get();
    let ended = tokio::select! {
        biased;
        // First: whoever is killed does nothing more.
        () = process.kills.until(|kills| kills > before) => Ok(()),
        ended = live(Arc::clone(&shared), index) => ended,
    };
    process.sockets.close_all();
    ended
}

async fn live(shared: Arc<Shared>, index: usize) -> turmoil::Result {
    let process = &shared.agents[index];
    let asked_before = process.handovers_asked.get();
    if index > 0 && shared.newest.get() != index {
        shared.takeovers_asked.until(|asked| asked > 0).await;
        tokio::time::sleep(millis(shared.rng(3).random_range(TAKEOVER_IN))).await;
    }
    let run = shared.start_of_agent();
    if shared.plan.broken == Broken::JournalLost {
        for entry in std::fs::read_dir(shared.state.path())? {
            std::fs::remove_file(entry?.path())?;
        }
        shared.disk.take_for_synced();
    }
    // The one before has the journal's lock, if it is there: a lock is of an open file, not of a process.
    let takeover = if index == 0 { Takeover::Never } else { Takeover::IfHeld };
    let state = StateConfig { dir: state_dir(&shared, index)?, takeover };
    let (config, control) = (config(&shared), tokio::runtime::Handle::current());
    let restarted = match state.dir == shared.state.path() {
        true => embed::restarted_on(Arc::clone(&shared.disk) as _, config, control, state),
        false => embed::restarted(config, control, state),
    };
    if restarted.is_err() && shared.disk.is_off() {
        // Whoever finds that out is gone with the power.
        std::future::pending::<()>().await;
    }
    let host = restarted?;
    if shared.plan.broken == Broken::SessionsNotSynced {
        shared.disk.lie();
    }
    let incarnation = host.incarnation().get();
    shared.trace.record(What::AgentStarted { incarnation });
    let stop = CancellationToken::new();
    let frames = Arc::clone(&shared.memory.lock().store);
    let watch = embed::watch(host.clone(), stop.clone());
    let mut watching = tokio::spawn(Arc::clone(&process.standstill).part(watch));
    let devices = listen(&shared, index, PORT).await?;
    let administrators = listen(&shared, index, ADMIN_PORT).await?;
    let (served, until) = (host.clone(), stop.clone());
    tokio::spawn(async move { embed::serve_devices(&served, &frames, devices, until).await });
    let (served, until) = (host.clone(), stop.clone());
    tokio::spawn(async move { embed::serve_administrators(&served, administrators, until).await });

    tokio::spawn(administrate(Arc::clone(&shared), run, stop.clone()));

    let ended = match shared.plan.source {
        Caller::Embedded => {
            let (source, asked_for) = Source::new(Arc::clone(&shared), host.clone(), run);
            source.run(asked_for).await
        }
        Caller::Remote => {
            let sources = listen(&shared, index, SOURCE_PORT).await?;
            shared.newest.change(|newest| *newest = index);
            let (served, until) = (host.clone(), stop.clone());
            tokio::spawn(async move { embed::serve_sources(&served, sources, until).await });
            tokio::spawn(observer::run(Arc::clone(&shared), host.clone()));
            if index == 0 {
                tokio::spawn(stand_still(Arc::clone(&shared)));
            }
            tokio::select! {
                biased;
                // First: it must not do anything more. Its watch ends by itself when there is a successor.
                _ = &mut watching => {
                    shared.trace.record(What::Superseded { host: incarnation });
                    stop.cancel();
                    return Ok(());
                }
                () = process.handovers_asked.until(|asked| asked > asked_before) => Ended::AskedTo,
                () = shared.source_is_done.until(|done| done) => Ended::StormIsOver,
            }
        }
    };
    if ended == Ended::AskedTo {
        embed::hand_over(&host, DRAIN).await;
        shared.trace.record(What::HandedOver);
        stop.cancel();
        process.handovers.change(|handovers| *handovers += 1);
        return Ok(());
    }
    shared.until(Stage::Quiet).await;
    let devices = shared.plan.devices.len();
    shared.stopped.until(|stopped| stopped == devices).await;
    let left = left(&shared).await?;
    shared.trace.record(left);
    shared.stage.change(|stage| *stage = Stage::Over);
    stop.cancel();
    Ok(())
}

/// The administrator, where there is work for one.
async fn administrate(shared: Arc<Shared>, run: u64, stop: CancellationToken) {
    // By hand, where there is no fencer for it; or a power loss has left a record that may be of any of them.
    let is_unstoppable = |device: &DevicePlan| shared.plan.cut_off_by(device.index).is_some();
    if shared.plan.devices.iter().any(is_unstoppable) {
        tokio::select! {
            biased;
            // First: there is nothing to administer any more.
            () = stop.cancelled() => {}
            ended = administrator::run(Arc::clone(&shared), run) => drop(ended),
        }
    }
}

/// The first process stands still when it is to be taken over from, a little after it was last heard.
async fn stand_still(shared: Arc<Shared>) {
    shared.takeovers_asked.until(|asked| asked > 0).await;
    tokio::time::sleep(millis(shared.rng(4).random_range(STOPPED_IN))).await;
    shared.agents[0].standstill.begin();
}

fn state_dir(shared: &Shared, index: usize) -> io::Result<PathBuf> {
    let dir = shared.state.path();
    if index == 0 || shared.plan.broken != Broken::StateCopied {
        return Ok(dir.to_owned());
    }
    let copy = dir.join("copy");
    if !copy.exists() {
        std::fs::create_dir(&copy)?;
        for entry in std::fs::read_dir(dir)? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                std::fs::copy(entry.path(), copy.join(entry.file_name()))?;
            }
        }
    }
    Ok(copy)
}

fn config(shared: &Arc<Shared>) -> HostConfig {
    let plan = &shared.plan;
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
        fencers: fencer::rules(shared),
        quarantine: QuarantineBudget {
            bytes: u64::MAX,
            pages: if plan.broken == Broken::NoBudget { u64::MAX } else { plan.quarantine_pages },
        },
        source_fault_timeout: shootdown_server::source::rpc::DEFAULT_FAULT_TIMEOUT,
    }
}

async fn listen(
    shared: &Arc<Shared>,
    index: usize,
    port: u16,
) -> io::Result<impl futures_util::Stream<Item = io::Result<Socket>> + use<>> {
    let listener = TcpListener::bind(everywhere(port)).await?;
    let open = (listener, Arc::clone(shared), index);
    Ok(stream::unfold(open, async |(listener, shared, index)| {
        let process = &shared.agents[index];
        let accepted = Arc::clone(&process.standstill).part(listener.accept()).await;
        let accepted = accepted.map(|(stream, _)| process.sockets.add(stream));
        Some((accepted, (listener, shared, index)))
    }))
}

/// A connection to the host agent on this machine, as an administrator.
pub async fn administer(shared: &Arc<Shared>) -> Result<Channel, tonic::transport::Error> {
    let shared = Arc::clone(shared);
    let connect = move |_| {
        let shared = Arc::clone(&shared);
        async move {
            let stream = TcpStream::connect(("127.0.0.1", ADMIN_PORT)).await?;
            let process = &shared.agents[shared.newest.get()];
            Ok::<_, io::Error>(TokioIo::new(process.sockets.add(stream)))
        }
    };
    let endpoint = tonic::transport::Endpoint::from_static("http://host-agent");
    endpoint.connect_with_connector(tower::service_fn(connect)).await
}

/// What the administrator's listings show, once it is nothing, or will not be.
async fn left(shared: &Arc<Shared>) -> turmoil::Result<What> {
    let plan = &shared.plan;
    let mut admin = AdminServiceClient::new(administer(shared).await?);
    // A session that lost its stream is fenced when its lease is over.
    let patience = plan.resolution_bound() + plan.cut_off_bound() + millis(50);
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
