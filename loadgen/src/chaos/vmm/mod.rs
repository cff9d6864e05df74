//! The program whose memory it is: it moves pages to other frames, gives the old ones away when they are
//! quiesced and not earlier, and answers the devices' faults from its page table.

mod memory;
mod ledger;
mod room;
mod call;
mod faults;
mod moves;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use shootdown_client::Clock;
use shootdown_proto::error::Reason;
use shootdown_proto::v1;
use shootdown_proto::v1::notifier_service_client::NotifierServiceClient;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};

use super::content::Frames;
use super::plan::{Broken, Limits, Places};
use super::process::Process;
use super::shared::{Shared, tell};
use super::stall::StallWatch;
use crate::check::table::TableError;
use ledger::HostView;
use memory::Memory;
use room::Room;

pub(crate) use faults::serve;
pub(crate) use ledger::Ledger;
pub(crate) use moves::run as keep_moving;

/// A connection that says nothing is asked so often, and given up after as long again: a host agent that is
/// stopped for a moment keeps its connections, one that hangs does not.
const KEEPALIVE: Duration = Duration::from_millis(250);

/// Between two tries.
const BACKOFF: Duration = Duration::from_millis(10);

/// Why the program could not go on.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The source's socket.
    #[error("the host agent's socket for sources cannot be one")]
    Socket(#[source] tonic::transport::Error),
    /// The frames.
    #[error("the frames cannot be used")]
    Frames(#[from] io::Error),
    /// What the processes share.
    #[error(transparent)]
    Shared(#[from] TableError),
    /// The host agent refuses what it must not.
    #[error("the host agent refused {call}")]
    Refused {
        /// What was called.
        call: &'static str,
        /// Its answer.
        #[source]
        status: Box<tonic::Status>,
    },
    /// A task was stopped.
    #[error("a task ended by itself")]
    Task,
}

/// What its tasks share.
#[derive(Debug)]
pub(crate) struct Vmm {
    pub(crate) clock: Clock,
    pub(crate) shared: Arc<Shared>,
    pub(crate) ledger: Mutex<Ledger>,
    stalls: StallWatch,
    host: Mutex<HostView>,
    places: Places,
    shape: Shape,
    client: NotifierServiceClient<Channel>,
    memory: Mutex<Memory>,
    room: Room,
    frames: Frames,
    address_space: watch::Sender<u64>,
    moving: CancellationToken,
    stop: CancellationToken,
}

/// Sizes of a run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) pages: usize,
    pub(crate) devices: usize,
    /// Counters of a page that are in use.
    pub(crate) slots: usize,
    pub(crate) deadline: Duration,
    pub(crate) seed: u64,
    pub(crate) rule: Option<Broken>,
    /// What the host agent has room for; `None`: for more than there can be.
    pub(crate) limits: Option<Limits>,
}

/// What a host agent that is started knows of the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Before {
    /// There was none, or it crashed, or was taken over from.
    Nothing,
    /// It goes on where that one stopped: to its callers it is the same one. If it does not know the address space it
    /// says so.
    PlannedEnd,
}

/// What a host agent answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Probed {
    pub(crate) host_incarnation: u64,
    pub(crate) verdict: v1::Verdict,
}

impl Vmm {
    /// Its memory, with every page in a frame. No host agent is asked for anything yet.
    pub(crate) fn new(places: &Places, shared: Arc<Shared>, shape: Shape) -> Result<Self, VmmError> {
        let endpoint = Endpoint::from_shared(format!("unix:{}", places.source_socket().display()))
            .map_err(VmmError::Socket)?
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE)
            .keep_alive_while_idle(true);
        // Each page in a frame, and as many to move to: one that is given away is used again soon.
        let frames = Frames::create(&places.frames(), 2 * shape.pages)?;
        let memory = Memory::new(&frames, shape.pages)?;
        Ok(Self {
            clock: Clock::boottime(),
            shared,
            ledger: Mutex::default(),
            stalls: StallWatch::start(Clock::boottime())?,
            host: Mutex::default(),
            places: places.clone(),
            shape,
            client: NotifierServiceClient::new(endpoint.connect_lazy()),
            memory: Mutex::new(memory),
            room: Room::new(shape.limits),
            frames,
            address_space: watch::Sender::new(0),
            moving: CancellationToken::new(),
            stop: CancellationToken::new(),
        })
    }

    /// The address space, once a host agent knows it.
    pub(crate) async fn registered(&self) -> u64 {
        let mut address_space = self.address_space.subscribe();
        let known = address_space.wait_for(|id| *id != 0).await;
        known.map_or(0, |id| *id)
    }

    /// No page is moved any more, once those are done that are under way.
    pub(crate) fn stop_moving(&self) {
        self.moving.cancel();
    }

    /// Faults are answered no more.
    pub(crate) fn stop(&self) {
        self.stop.cancel();
    }

    /// A host agent was started.
    pub(crate) fn on_host_started(&self, host: &Process, after: Before) {
        self.stalls.follow(host.pid());
        match after {
            Before::Nothing => self.on_forgotten(),
            Before::PlannedEnd => {}
        }
    }

    /// The host agent knows nothing of the calls before.
    fn on_forgotten(&self) {
        self.host.lock().on_forgotten();
    }

    /// A host agent has stopped, and stands still from now on.
    pub(crate) fn on_host_stopped(&self) {
        let now = self.clock.now();
        self.host.lock().on_stopped(now);
    }

    /// It is about to go on, or it is replaced.
    pub(crate) fn on_host_goes_on(&self) {
        let now = self.clock.now();
        self.host.lock().on_went_on(now);
    }

    /// A host agent that was replaced goes on beside its successor.
    pub(crate) fn on_replaced_goes_on(&self) {
        self.host.lock().on_replaced_goes_on();
    }

    /// And has ended.
    pub(crate) fn on_replaced_ended(&self) {
        self.host.lock().on_replaced_ended();
    }

    /// The longest that the machine kept this process from running.
    pub(crate) fn longest_stall(&self) -> Duration {
        self.stalls.longest()
    }

    fn found(&self, what: &str) -> io::Result<()> {
        let at = self.clock.now().as_nanos();
        tell(&self.places.findings(), &format!("{at} host: {what}"))
    }

    /// Asks for a range that nobody has, on a connection of its own, without waiting for anybody: so that it is not
    /// for want of room that it is refused. `None`: there was no answer, or a refusal.
    pub(crate) async fn probe(&self, client: &mut NotifierServiceClient<Channel>) -> Option<Probed> {
        let address_space_id = *self.address_space.borrow();
        let request = v1::InvalidateRangeStartRequest {
            address_space_id,
            range: Some(v1::AddressRange { start: 0x1000, end: 0x2000, all: false }),
            cause: v1::Cause::Migrate.into(),
            non_blockable: true,
            ..v1::InvalidateRangeStartRequest::default()
        };
        let result = client.invalidate_range_start(request).await.ok()?.into_inner().result?;
        if result.seq != 0 {
            let (seq, host_incarnation) = (result.seq, result.host_incarnation);
            let request_id = String::new();
            let end = v1::InvalidateRangeEndRequest { address_space_id, seq, host_incarnation, request_id };
            // Nobody has the range: a bracket that stays for want of an answer holds nobody up.
            drop(client.invalidate_range_end(end).await);
        }
        Some(Probed { host_incarnation: result.host_incarnation, verdict: result.verdict() })
    }

    /// A connection to whichever host agent takes it now.
    pub(crate) async fn connect(&self) -> Option<NotifierServiceClient<Channel>> {
        let target = format!("unix:{}", self.places.source_socket().display());
        let channel = Endpoint::from_shared(target).ok()?.connect().await.ok()?;
        Some(NotifierServiceClient::new(channel))
    }
}

fn reason(status: &tonic::Status) -> Option<Reason> {
    Reason::of_status(status)
}

#[cfg(test)]
mod tests;
