//! All the wiring of a host agent, in dependency order: [`start`].

use std::io;
use std::sync::Arc;
use std::time::Duration;

use shootdown_proto::v1;
use shootdown_proto::v1::device_service_server::DeviceServiceServer;
use shootdown_proto::v1::memory_service_server::MemoryServiceServer;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic_health::pb::health_server::{Health, HealthServer};
use tonic_health::server::HealthReporter;
use tonic_reflection::server::v1::{ServerReflection, ServerReflectionServer};

use crate::clock::Clock;
use crate::config::{Config, StateConfig};
use crate::connections::Connections;
use crate::handover;
use crate::host::{Host, HostConfig};
use crate::journal::{self, BootMoment, Disk, History, Journal, JournalError, Medium, Takeover, Writer};
use crate::listen::{Accepted, Acceptor, Connection, Leave, ListenAddr, Listener};
use crate::restart::{Loss, Restart};
use crate::serve::{self, MOST_PAGE_BYTES};
use crate::service::admin::Admin;
use crate::service::device::Devices;
use crate::service::memory::Memory;
use crate::service::notifier::Notifiers;
use crate::service::page::Pages;
use crate::session::Then;
use crate::shard::{self, Arrivals, Doors, Thread};
use crate::source::memory::{FrameStore, MemoryConfig, MemorySource, SwapFile};
use crate::vigil::Vigil;
use crate::watchdog;

/// Why a host agent did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A socket could not be listened on.
    #[error("cannot listen on {address}")]
    Listen {
        /// Which.
        address: ListenAddr,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// The memory for the frames could not be had.
    #[error("cannot make the frame store of {frames} frames")]
    Frames {
        /// How many.
        frames: usize,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// The swap file could not be made.
    #[error("cannot make the swap file {path}")]
    Swap {
        /// Which.
        path: std::path::PathBuf,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// A thread could not be started.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    /// The state directory could not be had.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The reflection service could not be made of the protocol's descriptors.
    #[error("cannot build the reflection service")]
    Reflection(#[source] tonic_reflection::server::Error),
}

/// A host agent that runs. Dropped without [`Running::shutdown`] it stops at once: connections are
/// cut, devices find their sessions lost and fail closed.
#[derive(Debug)]
pub struct Running {
    host: Host,
    memory: MemorySource<Host>,
    frames: Arc<FrameStore>,
    addresses: Addresses,
    shards: Vec<Thread>,
    control: Thread,
    /// Where the memory source's operations run.
    paging: Thread,
    health: HealthReporter,
    /// Stops everything when it is dropped.
    stop: DropGuard,
    drain_timeout: Duration,
}

/// Where a host agent listens, with the ports that the kernel chose.
#[derive(Debug, Clone, Default)]
pub struct Addresses {
    /// For devices.
    pub device: Vec<ListenAddr>,
    /// For sources.
    pub source: Vec<ListenAddr>,
    /// For administrators.
    pub admin: Vec<ListenAddr>,
}

/// Starts a host agent: everything there is, top to bottom in the order in which it is needed.
///
/// # Errors
/// [`StartError`]; what was started before the failure is stopped.
pub fn start(config: Config) -> Result<Running, StartError> {
    let Config {
        listen,
        source_listen,
        admin_listen,
        insecure,
        connections,
        allow_uids,
        shards: shard_count,
        busy_poll,
        memory_frames,
        memory_limit_frames,
        swap,
        drain_timeout,
        state,
        mut host,
    } = config;
    let takeover = takeover(state.as_ref())?;
    // Sockets first: a second daemon on the same ones must fail before it does anything.
    let mut addresses = Addresses::default();
    let device = bind(&listen, Callers::Devices { insecure }, takeover, &mut addresses.device)?;
    let source = bind(&source_listen, Callers::Privileged, takeover, &mut addresses.source)?;
    let admin = bind(&admin_listen, Callers::Privileged, takeover, &mut addresses.admin)?;
    let frames = FrameStore::new(memory_frames)
        .map_err(|error| StartError::Frames { frames: memory_frames, error })?;
    let swap = swap
        .map(|(path, slots)| SwapFile::create(&path, slots).map_err(|error| StartError::Swap { path, error }))
        .transpose()?;

    // The control plane has a runtime of its own: it answers while every shard is busy.
    let stop = CancellationToken::new();
    let stopped = stop.clone();
    let control = Thread::start("control".to_owned(), move || async move { stopped.cancelled().await })
        .map_err(StartError::Thread)?;
    // The memory source reads and writes files, which may take as long as a disk takes: nobody else waits.
    let stopped = stop.clone();
    let paging = Thread::start("memory".to_owned(), move || async move { stopped.cancelled().await })
        .map_err(StartError::Thread)?;
    // From here on a failure, which drops it, stops what was started.
    let stop_on_drop = stop.clone().drop_guard();

    // After the sockets, which fail more often: what a planned end left is good for one run.
    let (restart, history) = remember(state, Writer::Thread, Arc::new(Disk), &mut host)?;
    let host = Host::restarted(host, control.handle.clone(), restart);
    // Before anybody can register, subscribe or ask.
    Restart::bring_back(&host, history);
    let clock = host.clock();
    let mut memory_config = MemoryConfig::new(Arc::new(move || clock.now()), paging.handle.clone());
    memory_config.limit_frames = memory_limit_frames;
    memory_config.swap = swap.map(Arc::new);
    let memory = MemorySource::new(Arc::new(host.clone()), Arc::clone(&frames), memory_config);

    let (health, health_service) = tonic_health::server::health_reporter();
    let mut shards = Vec::with_capacity(shard_count);
    let mut doors = Vec::with_capacity(shard_count);
    for index in 0..shard_count {
        let (door, arrivals) = shard::doors();
        let vigil = Arc::new(Vigil::new(busy_poll, host.clock()));
        let services = Services {
            devices: Devices { host: host.clone(), shard_index: index, vigil },
            pages: Pages { host: host.clone(), frames: Arc::clone(&frames) },
            notifiers: Notifiers { host: host.clone() },
            memory: Memory { memory: memory.clone() },
            health: health_service.clone(),
            // Checked here, where it can fail the start; a shard's thread could not.
            reflection: reflection()?,
        };
        let stop = stop.clone();
        let thread = Thread::start(format!("shard-{index}"), move || serve_shard(arrivals, services, stop))
            .map_err(StartError::Thread)?;
        shards.push(thread);
        doors.push(door);
    }

    let (control_tasks, stopping) = (&control.handle, host.stopping());
    let to_devices: Vec<_> = doors.iter().map(|doors| doors.device.clone()).collect();
    let to_sources: Vec<_> = doors.iter().map(|doors: &Doors| doors.source.clone()).collect();
    let (admin_tx, admin_rx) = mpsc::channel(ADMIN_QUEUE);
    let counted = Admits::Counted(Connections::new(connections, host.clock()), host.patience());
    let everybody = Admits::Everybody(Leave { uids: allow_uids.into() });
    start_accepting(device, &counted, &to_devices, stopping, control_tasks);
    start_accepting(source, &everybody, &to_sources, stopping, control_tasks);
    start_accepting(admin, &everybody, &[admin_tx], &stop, control_tasks);
    let admin = Admin { host: host.clone() };
    control_tasks.spawn(serve_admin(admin_rx, admin, health_service, reflection()?, stop.clone()));
    control_tasks.spawn(watchdog::run(host.clone(), stop.clone()));

    Ok(Running {
        host,
        memory,
        frames,
        addresses,
        shards,
        control,
        paging,
        health,
        stop: stop_on_drop,
        drain_timeout,
    })
}

/// Whether somebody is taken over from: not before it is known that it can be done, because its sockets
/// are taken first.
fn takeover(state: Option<&StateConfig>) -> Result<Takeover, JournalError> {
    let Some(StateConfig { dir, takeover }) = state else { return Ok(Takeover::Never) };
    if *takeover == Takeover::IfHeld {
        journal::inspect(dir)?;
    }
    Ok(*takeover)
}

/// Takes the state directory, and finds out which run this is and what the runs before left.
pub(crate) fn remember(
    state: Option<StateConfig>,
    writer: Writer,
    medium: Arc<dyn Medium>,
    host: &mut HostConfig,
) -> Result<(Restart, History), JournalError> {
    let Some(StateConfig { dir, takeover }) = state else { return Ok((Restart::none(), History::default())) };
    let now = || BootMoment { boot_id: Clock::id(), at: host.clock.now() };
    let opened = Journal::open(medium, &dir, takeover, writer, host.incarnation, host.session.lease, now)?;
    host.incarnation = opened.run.incarnation;
    Ok(Restart::on(opened))
}

/// Administrators that were accepted and not served yet.
const ADMIN_QUEUE: usize = 16;

impl Running {
    /// The host agent's rules and state; it is a [`crate::source::Notifier`].
    #[must_use]
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// The embedded memory source.
    #[must_use]
    pub fn memory(&self) -> &MemorySource<Host> {
        &self.memory
    }

    /// The frames that PageService reads and writes.
    #[must_use]
    pub fn frames(&self) -> &Arc<FrameStore> {
        &self.frames
    }

    /// Where it listens.
    #[must_use]
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// The runtimes of the shards. A source that runs on the one shard there is, beside its devices,
    /// saves two hops between cores a round.
    pub fn shards(&self) -> impl Iterator<Item = &tokio::runtime::Handle> {
        self.shards.iter().map(|shard| &shard.handle)
    }

    /// Returns when the state directory is not this host agent's any more; [`Running::loss`] tells why. By then every
    /// stream was ended; what is left is [`Running::abandon`].
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn superseded(&self) {
        self.host.restart().superseded().cancelled().await;
    }

    /// Why it may not act any more, if that was found.
    #[must_use]
    pub fn loss(&self) -> Option<Loss> {
        self.host.restart().loss()
    }

    /// Stops without waiting for anybody: nobody is told that devices have stopped.
    pub async fn abandon(self) {
        let Self { host, shards, control, paging, stop, .. } = self;
        host.stopping().cancel();
        drop(stop);
        join(host, shards, control, paging, Then::Leave).await;
    }

    /// Stops, in this order: nothing new is accepted; devices are told to finish and leave; rounds and
    /// sessions are waited for, but not for longer than the drain time-out; then all is cut. With a state
    /// directory devices are told to come back to a successor, only rounds are waited for, and what the
    /// successor needs to go on is written down. A round
    /// that is not complete by then is never answered: its pages are not released.
    pub async fn shutdown(self) {
        let Self { host, memory, shards, control, paging, health, stop, drain_timeout, .. } = self;
        health.set_service_status("", tonic_health::ServingStatus::NotServing).await;
        health.set_not_serving::<DeviceServiceServer<Devices>>().await;
        host.stopping().cancel();
        let then = if host.restart().journal().is_some() { Then::Resume } else { Then::Leave };
        for session in host.registry().list() {
            session.drain(drain_timeout, then);
        }
        host.tasks().close();
        let all_left = async {
            memory.drain().await;
            match then {
                Then::Leave => host.tasks().wait().await,
                Then::Resume => handover::quiet(&host).await,
            }
        };
        if tokio::time::timeout(drain_timeout, all_left).await.is_err() {
            let (sessions, rounds) = (host.registry().list().len(), host.rounds_in_flight());
            tracing::warn!(
                sessions,
                rounds,
                "the drain time-out passed; sessions are cut, their rounds not released"
            );
        }
        if then == Then::Resume {
            host.registry().list().iter().for_each(|session| session.cut());
        }
        drop(stop);
        join(host, shards, control, paging, then).await;
    }
}

async fn join(host: Host, shards: Vec<Thread>, control: Thread, paging: Thread, then: Then) {
    let threads = tokio::task::spawn_blocking(move || {
        shards.into_iter().for_each(Thread::join);
        control.join();
        paging.join();
        // Last: what the others still had to say is in it.
        if let Some(journal) = host.restart().journal() {
            let drained = (then == Then::Resume && host.is_current()).then(|| handover::record(&host));
            journal.clone().close(drained);
        }
    });
    drop(threads.await);
}

struct Services<H, R: ServerReflection> {
    devices: Devices,
    pages: Pages,
    notifiers: Notifiers,
    memory: Memory,
    health: HealthServer<H>,
    reflection: ServerReflectionServer<R>,
}

async fn serve_shard<H: Health, R: ServerReflection>(
    arrivals: Arrivals,
    services: Services<H, R>,
    stop: CancellationToken,
) {
    let Services { devices, pages, notifiers, memory, health, reflection } = services;
    let for_devices = serve::for_devices(devices, pages)
        .add_service(health.clone())
        .add_service(reflection.clone())
        .serve_with_incoming_shutdown(incoming(arrivals.device), stop.clone().cancelled_owned());
    let for_sources = serve::for_sources(notifiers)
        .add_service(MemoryServiceServer::new(memory).max_decoding_message_size(MOST_PAGE_BYTES))
        .add_service(health)
        .add_service(reflection)
        .serve_with_incoming_shutdown(incoming(arrivals.source), stop.clone().cancelled_owned());
    tokio::join!(
        shard::until_stopped(for_devices, stop.clone(), "devices"),
        shard::until_stopped(for_sources, stop, "sources"),
    );
}

async fn serve_admin<H: Health, R: ServerReflection>(
    arrivals: mpsc::Receiver<Accepted>,
    admin: Admin,
    health: HealthServer<H>,
    reflection: ServerReflectionServer<R>,
    stop: CancellationToken,
) {
    let serving = serve::for_administrators(admin)
        .add_service(health)
        .add_service(reflection)
        .serve_with_incoming_shutdown(incoming(arrivals), stop.clone().cancelled_owned());
    shard::until_stopped(serving, stop, "administrators").await;
}

fn reflection() -> Result<ServerReflectionServer<impl ServerReflection>, StartError> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(v1::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .map_err(StartError::Reflection)
}

fn incoming(arrivals: mpsc::Receiver<Accepted>) -> impl Stream<Item = io::Result<Connection>> {
    ReceiverStream::new(arrivals).map(Connection::adopt)
}

/// For whom a listener is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Callers {
    Devices {
        /// They may be on other machines.
        insecure: bool,
    },
    /// Known by their credentials.
    Privileged,
}

impl Callers {
    /// What the settings cannot tell of a socket that is passed.
    fn check(self, address: &ListenAddr) -> io::Result<()> {
        let wrong = match (self, address) {
            (Self::Privileged, ListenAddr::Tcp(_)) => "it is no Unix socket, which privileged callers need",
            (Self::Devices { insecure: false }, address) if !address.is_local() => {
                "it can be reached from other machines, and there is no encryption; pass one on loopback, or say --insecure"
            }
            _ => return Ok(()),
        };
        Err(io::Error::new(io::ErrorKind::InvalidInput, wrong))
    }
}

fn bind(
    addresses: &[ListenAddr],
    callers: Callers,
    takeover: Takeover,
    bound: &mut Vec<ListenAddr>,
) -> Result<Vec<Listener>, StartError> {
    let mut listeners = Vec::with_capacity(addresses.len());
    for address in addresses {
        let refused = |error| StartError::Listen { address: address.clone(), error };
        let privileged = callers == Callers::Privileged;
        for listener in Listener::bind(address, privileged, takeover).map_err(refused)? {
            let at = listener.address().map_err(refused)?;
            callers.check(&at).map_err(refused)?;
            bound.push(at);
            listeners.push(listener);
        }
    }
    Ok(listeners)
}

/// Which connections come in, and what they have leave for.
#[derive(Clone)]
enum Admits {
    /// They are known by their credentials, and few.
    Everybody(Leave),
    /// As many as may be, whoever they are, and how long one may take nothing of what is sent to it.
    Counted(Arc<Connections>, Duration),
}

fn start_accepting(
    listeners: Vec<Listener>,
    admits: &Admits,
    doors: &[mpsc::Sender<Accepted>],
    stop: &CancellationToken,
    on: &tokio::runtime::Handle,
) {
    for listener in listeners {
        on.spawn(accept(listener, admits.clone(), doors.to_vec(), stop.clone()));
    }
}

/// Gives each connection to the next door.
async fn accept(
    listener: Listener,
    admits: Admits,
    doors: Vec<mpsc::Sender<Accepted>>,
    stop: CancellationToken,
) {
    let (leave, patience) = match &admits {
        // On Unix sockets only.
        Admits::Everybody(leave) => (leave.clone(), Duration::ZERO),
        Admits::Counted(_, patience) => (Leave { uids: [].into() }, *patience),
    };
    let acceptor = match Acceptor::new(listener, leave, patience) {
        Ok(acceptor) => acceptor,
        Err(error) => {
            tracing::error!(%error, "a listener could not be used; the host agent must be restarted");
            return;
        }
    };
    let mut next = doors.iter().cycle();
    loop {
        let accepted = tokio::select! {
            biased;
            // First: nothing is accepted once the host agent stops.
            () = stop.cancelled() => return,
            accepted = acceptor.accept() => accepted,
        };
        match accepted {
            Ok(mut connection) => {
                if let Admits::Counted(connections, _) = &admits {
                    connection.place = connections.try_admit();
                    if connection.place.is_none() {
                        continue;
                    }
                }
                let door = next.next().expect("there is at least one shard");
                if door.send(connection).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                // Most often too many open files: the listener works again when some are closed.
                tracing::error!(%error, "a connection could not be accepted; raise the limit of open files");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Between two tries to accept when the machine has nothing left: an accept that fails leaves its
/// connection in the queue, so trying at once would spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
