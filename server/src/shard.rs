//! Shards: threads with a current-thread runtime each. A connection is given to one shard and stays
//! there, with its session, its faults and the rounds that wait for it: an ack wakes its round without
//! leaving the core.
//!
//! Why not one multi-thread runtime: a notice and its ack take a third longer there, because work
//! hops between cores that must first be woken (docs/performance.md).

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::listen::Accepted;
use crate::vigil::Vigil;

/// A shard, as its sessions know it.
#[derive(Debug, Clone)]
pub(crate) struct Shard {
    pub(crate) index: usize,
    pub(crate) runtime: Handle,
    pub(crate) vigil: Arc<Vigil>,
}

/// Connections that were accepted and not taken over yet. When it is full the acceptor waits, and
/// further ones wait in the kernel's queue.
const ACCEPTED_QUEUE: usize = 64;

/// A thread with a runtime of its own. It runs until its future is done.
#[derive(Debug)]
pub(crate) struct Thread {
    pub(crate) handle: Handle,
    join: JoinHandle<()>,
}

impl Thread {
    /// Starts a thread that runs what `main` makes, in a current-thread runtime.
    pub(crate) fn start<F>(name: String, main: impl FnOnce() -> F + Send + 'static) -> io::Result<Self>
    where
        F: Future<Output = ()>,
    {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let join = std::thread::Builder::new().name(name).spawn(move || {
            runtime.block_on(async move { main().await });
            // Tasks that are left belong to sessions whose devices did not leave in time. They are
            // dropped, which acks nothing.
            runtime.shutdown_background();
        })?;
        Ok(Self { handle, join })
    }

    /// Waits for the thread. Blocks, so it must not be called in a runtime.
    pub(crate) fn join(self) {
        // A panic in there was reported by the thread itself.
        drop(self.join.join());
    }
}

/// The way to a shard: connections by what their listener offers.
#[derive(Debug, Clone)]
pub(crate) struct Doors {
    pub(crate) device: mpsc::Sender<Accepted>,
    pub(crate) source: mpsc::Sender<Accepted>,
}

/// The shard's end of its doors.
#[derive(Debug)]
pub(crate) struct Arrivals {
    pub(crate) device: mpsc::Receiver<Accepted>,
    pub(crate) source: mpsc::Receiver<Accepted>,
}

pub(crate) fn doors() -> (Doors, Arrivals) {
    let (device_tx, device_rx) = mpsc::channel(ACCEPTED_QUEUE);
    let (source_tx, source_rx) = mpsc::channel(ACCEPTED_QUEUE);
    (Doors { device: device_tx, source: source_tx }, Arrivals { device: device_rx, source: source_rx })
}

/// Serves until told to stop, then for a moment more: a bidirectional stream that is open keeps a
/// graceful shutdown from ever returning.
pub(crate) async fn until_stopped(
    serving: impl Future<Output = Result<(), tonic::transport::Error>>,
    stop: CancellationToken,
    what: &'static str,
) {
    tokio::pin!(serving);
    tokio::select! {
        // Not biased: both ends end this.
        served = &mut serving => if let Err(error) = served {
            tracing::error!(%error, what, "a server ended by itself; the host agent must be restarted");
        },
        () = stop.cancelled() => {
            drop(tokio::time::timeout(GRACE, serving).await);
        }
    }
}

/// For the last answers to reach the wire.
const GRACE: std::time::Duration = std::time::Duration::from_millis(200);
