//! The host agent: the notifier methods on one side, the devices' sessions on the other.

mod notifier;
mod admission;
mod answer;
mod release;

use std::sync::Arc;
use std::time::Duration;

use shootdown_core::session::SessionConfig;
use shootdown_core::{AddressSpaceId, Incarnation};
use shootdown_proto::message::SessionError;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::clock::Clock;
use crate::directory::Directory;
use crate::fence::{FencerRule, Fencers};
use crate::quarantine::{Quarantine, QuarantineBudget};
use crate::restart::Restart;
use crate::session::handshake;
use crate::session::registry::Registry;
use crate::source::rpc::registrations::Registrations;
use crate::source::rpc::releases::Releases;
use crate::source::{NotifyError, Strictness, Translate};

/// What a host agent allows and expects.
#[derive(Debug, Clone)]
pub struct HostConfig {
    /// Leases, windows and quotas of each session.
    pub session: SessionConfig,
    /// Sessions at a time.
    pub max_sessions: usize,
    /// Address spaces at a time.
    pub max_address_spaces: usize,
    /// Rounds in flight at a time, in one address space. A source that can wait waits for a place.
    pub max_rounds_in_flight: usize,
    /// Who cuts devices off that owe an ack; the first rule that means a device is its own.
    pub fencers: Vec<FencerRule>,
    /// How much may be quarantined before callers have to wait.
    pub quarantine: QuarantineBudget,
    /// Ask the devices to say when they received and flushed each notice. Costs a report an ack.
    pub stage_timing: bool,
    /// How long a source may take to answer a fault over `ServeFaults`.
    pub source_fault_timeout: Duration,
    /// This run of the host agent: higher than that of any earlier run.
    pub incarnation: Incarnation,
    /// What leases and rounds are measured on.
    pub clock: Clock,
}

/// A host agent's rules and state, without its listeners. Cheap to clone.
///
/// Everything is reached through here and nothing is global. The price is one `Arc` more on each
/// path; what it buys is that a VMM can embed several, and that a test owns the one it looks at.
#[derive(Debug, Clone)]
pub struct Host(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    config: HostConfig,
    directory: Directory,
    registry: Registry,
    registrations: Registrations,
    releases: Releases,
    fencers: Fencers,
    quarantine: Arc<Quarantine>,
    /// What the runs before left, and what the next will find.
    restart: Arc<Restart>,
    /// Owns the rounds, the faults, the sessions, the attempts to fence.
    tasks: TaskTracker,
    /// Cancelled when the host agent begins to stop.
    stopping: CancellationToken,
    /// Where tasks run that belong to no session.
    control: tokio::runtime::Handle,
}

impl Host {
    /// A host agent that knows of nothing yet. Tasks that belong to no session run on `control`.
    #[must_use]
    pub fn new(config: HostConfig, control: tokio::runtime::Handle) -> Self {
        Self::restarted(config, control, Restart::none())
    }

    /// The same, on a journal.
    pub(crate) fn restarted(config: HostConfig, control: tokio::runtime::Handle, restart: Restart) -> Self {
        let first = restart.first_number();
        let (spaces, rounds) = (config.max_address_spaces, config.max_rounds_in_flight);
        let directory = Directory::new(spaces, rounds, first, config.incarnation);
        let registry = Registry::new(config.max_sessions, first);
        let fencers = Fencers::new(config.fencers.clone());
        let quarantine = Arc::new(Quarantine::new(config.quarantine));
        Self(Arc::new(Inner {
            config,
            directory,
            registry,
            registrations: Registrations::default(),
            releases: Releases::default(),
            fencers,
            quarantine,
            restart: Arc::new(restart),
            tasks: TaskTracker::new(),
            stopping: CancellationToken::new(),
            control,
        }))
    }

    pub(crate) fn directory(&self) -> &Directory {
        &self.0.directory
    }

    pub(crate) fn registry(&self) -> &Registry {
        &self.0.registry
    }

    pub(crate) fn registrations(&self) -> &Registrations {
        &self.0.registrations
    }

    pub(crate) fn releases(&self) -> &Releases {
        &self.0.releases
    }

    pub(crate) fn fencers(&self) -> &Fencers {
        &self.0.fencers
    }

    pub(crate) fn quarantine(&self) -> &Arc<Quarantine> {
        &self.0.quarantine
    }

    pub(crate) fn restart(&self) -> &Arc<Restart> {
        &self.0.restart
    }

    /// Whether the state directory is still this host agent's. When it is not, this ends every stream.
    pub(crate) fn is_current(&self) -> bool {
        let Err(loss) = self.0.restart.look() else { return true };
        if self.0.restart.on_loss(loss) {
            tracing::error!("{loss}");
            self.0.stopping.cancel();
            for session in self.registry().list() {
                let SessionError { reason, message, .. } = handshake::superseded();
                session.end(reason, message);
            }
        }
        false
    }

    /// Whether it was found that one has.
    pub(crate) fn is_superseded(&self) -> bool {
        self.0.restart.superseded().is_cancelled()
    }

    /// Where tasks run that belong to no session.
    pub(crate) fn control(&self) -> &tokio::runtime::Handle {
        &self.0.control
    }

    pub(crate) fn tasks(&self) -> &TaskTracker {
        &self.0.tasks
    }

    pub(crate) fn stopping(&self) -> &CancellationToken {
        &self.0.stopping
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.0.stopping.is_cancelled()
    }

    pub(crate) fn session_config(&self) -> SessionConfig {
        self.0.config.session
    }

    pub(crate) fn wants_timing(&self) -> bool {
        self.0.config.stage_timing
    }

    pub(crate) fn source_fault_timeout(&self) -> Duration {
        self.0.config.source_fault_timeout
    }

    /// Which run this is.
    #[must_use]
    pub fn incarnation(&self) -> Incarnation {
        self.0.config.incarnation
    }

    /// What leases and rounds are measured on.
    #[must_use]
    pub fn clock(&self) -> Clock {
        self.0.config.clock
    }

    /// `T_ack + T_fence`: when a round is answered that waits for a device which is not certain to stop
    /// (BoundedResolution). `T_fence` is what a device that enforces its lease takes to be fenced, or one
    /// attempt of the slowest fencer, whichever is longer.
    pub(crate) fn bound(&self) -> Duration {
        let session = self.session_config();
        session.ack_timeout + session.lease.host_duration().max(self.fencers().longest_attempt())
    }

    /// After this a device that takes nothing of what it is told is Suspect, and its lease is over: nothing is lost with
    /// its connection any more.
    pub(crate) fn patience(&self) -> Duration {
        let session = self.session_config();
        session.ack_timeout + session.lease.host_duration()
    }

    /// Makes an address space known. By [`Notifier::register`](crate::source::Notifier::register) it is strict.
    ///
    /// # Errors
    /// [`NotifyError::TooManyAddressSpaces`], [`NotifyError::Stopping`].
    pub fn register_address_space(
        &self,
        name: &str,
        source: Arc<dyn Translate>,
        strictness: Strictness,
    ) -> Result<AddressSpaceId, NotifyError> {
        if self.is_stopping() {
            return Err(NotifyError::Stopping);
        }
        let space = self.directory().register(name, source, strictness, self.0.restart.survivors())?;
        tracing::debug!(address_space = space.id.get(), name, source = space.source.source(), "registered");
        Ok(space.id)
    }

    /// Rounds that wait for a target, in all address spaces.
    #[must_use]
    pub fn rounds_in_flight(&self) -> usize {
        self.directory().list().iter().map(|space| space.rounds_in_flight()).sum()
    }

    /// Makes an address space known by the name that an earlier run of the host agent gave it, so that the
    /// devices which know that name find it again.
    ///
    /// # Errors
    /// [`NotifyError::AddressSpaceTaken`], [`NotifyError::OtherStrictness`], and as [`Notifier::register`](crate::source::Notifier::register).
    pub fn take_back(
        &self,
        id: AddressSpaceId,
        name: &str,
        source: Arc<dyn Translate>,
        strictness: Strictness,
    ) -> Result<(), NotifyError> {
        if self.is_stopping() {
            return Err(NotifyError::Stopping);
        }
        let forget = |id| self.releases().forget(id);
        let survivors = self.0.restart.survivors();
        let space = self.directory().take_back(id, name, source, strictness, survivors, forget)?;
        tracing::debug!(address_space = id.get(), name, source = space.source.source(), "taken back");
        Ok(())
    }
}
