//! The model as the checker sees it, and what each action makes of a state.

use shootdown_core::DeviceId;
use stateright::{Model, Property};

use crate::actions::{self, Action};
use crate::config::Config;
use crate::device::Welcome;
use crate::host::device_id;
use crate::mutations::Mutation;
use crate::state::{Running, State, Subscription};
use crate::waits::Task;
use crate::{properties, reaches};

/// One search: a configuration, and the rule that is broken in it.
#[derive(Clone, Debug)]
pub(crate) struct Shootdown {
    pub(crate) config: Config,
    pub(crate) mutation: Option<Mutation>,
    /// The one property to look for; `None`: all, and that what should be reachable is.
    pub(crate) only: Option<&'static str>,
    device_ids: Vec<DeviceId>,
}

/// A state on its way to the next one.
pub(crate) struct World<'a> {
    pub(crate) config: &'a Config,
    pub(crate) device_ids: &'a [DeviceId],
    mutation: Option<Mutation>,
    pub(crate) state: State,
}

impl World<'_> {
    /// Whether this rule is the one that is broken.
    pub(crate) fn broken(&self, mutation: Mutation) -> bool {
        self.mutation == Some(mutation)
    }
}

impl Shootdown {
    pub(crate) fn new(config: Config, mutation: Option<Mutation>, only: Option<&'static str>) -> Self {
        let device_ids = (0..config.devices.len()).map(device_id).collect();
        Self { config, mutation, only, device_ids }
    }
}

impl Model for Shootdown {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State::first(&self.config)]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        actions::time(&self.config, state, actions);
        actions::of_source(&self.config, state, actions);
        actions::of_devices(&self.config, state, actions);
        actions::of_hosts(&self.config, state, actions);
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        let (config, mutation) = (&self.config, self.mutation);
        let mut world = World { config, device_ids: &self.device_ids, mutation, state: state.clone() };
        world.step(action)?;
        world.forget_the_dead();
        (world.state != *state).then_some(world.state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let always = properties::ALWAYS.iter().filter(|(name, _)| self.only.is_none_or(|only| only == *name));
        let reaches = reaches::SOMETIMES
            .iter()
            .filter(|(name, _)| self.only.is_none() && self.config.reaches.contains(name));
        always
            .map(|&(name, holds)| Property::always(name, holds))
            .chain(reaches.map(|&(name, is_so)| Property::sometimes(name, is_so)))
            .collect()
    }
}

impl World<'_> {
    fn step(&mut self, action: Action) -> Option<()> {
        match action {
            Action::HostTick => self.host_tick(),
            Action::DeviceTick => self.state.device_clock += 1,
            Action::Start(page) => self.start(page)?,
            Action::StartNonBlockable => self.start_non_blockable()?,
            Action::Deadline(called) => {
                self.state.spent.deadlines += 1;
                self.deadline(called)?;
            }
            Action::Answer(process, called) => self.answer(process, called)?,
            Action::TakeAnswer(called) => self.take_answer(called)?,
            Action::End(called) => self.end(called)?,
            Action::Register => self.register()?,
            Action::Retry(called) => self.retry(called)?,
            Action::Fault(device, page) => self.on_fault(device, page)?,
            Action::FaultForWriting(device, page) => self.on_fault_for_writing(device, page)?,
            Action::FaultGoesOn(process, id) => self.fault_goes_on(process, id)?,
            Action::Commit(process, index) => self.commit(process, index)?,
            Action::ToDevice(device) => self.deliver_down(device)?,
            Action::ToHost(process, id) => self.deliver_up(process, id)?,
            Action::FlushDone(device, index) => self.flush_done(device, index)?,
            Action::Heartbeat(device) => self.heartbeat(device)?,
            Action::Use(device, page) => self.use_page(device, page)?,
            Action::BeginAccess(device, page) => self.begin_access(device, page)?,
            Action::EndAccess(device, run) => self.state.devices[device].runs[run].access = None,
            Action::Publish(process, id) => self.publish(process, id)?,
            Action::ReadSequence(process, id) => self.read_sequence(process, id)?,
            Action::Unsubscribe(device) => self.unsubscribe(device)?,
            Action::GracePeriodEnds(process, id) => self.grace_period_ends(process, id)?,
            Action::Close(device) => self.close(device)?,
            Action::Fencer(process, id, says) => self.on_fencer(process, id, says)?,
            Action::Tell(process, index) => {
                let at = self.acts(process)?;
                self.tell(at, index);
            }
            _ => self.trouble(action)?,
        }
        Some(())
    }

    /// What a configuration counts: the rare things.
    fn trouble(&mut self, action: Action) -> Option<()> {
        match action {
            Action::Lose(device) => {
                self.state.spent.losses += 1;
                let link = self.run_mut(device).link.as_mut().filter(|link| !link.down.is_empty())?;
                link.down.remove(0);
            }
            Action::Disconnect(device) => {
                self.spend_disconnect(self.host_has_left(device))?;
                self.disconnect(device);
            }
            Action::Sever(process, id) => {
                let at = self.acts(process)?;
                self.spend_disconnect(self.device_has_left(at, id))?;
                self.sever(at, id);
            }
            Action::Connect(device, process, welcome) => {
                match welcome {
                    Welcome::Arrives => {}
                    Welcome::IsLost => self.state.spent.disconnects += 1,
                    Welcome::IsNotSent => self.state.spent.host_crashes += 1,
                }
                self.connect(device, process, welcome)?;
            }
            Action::DeviceCrash(device) => {
                self.state.spent.device_crashes += 1;
                self.crash(device)?;
            }
            Action::HostCrash(process) => {
                self.state.spent.host_crashes += 1;
                self.state.hosts.retain(|host| host.process != process);
            }
            Action::HostStop(process) => {
                self.state.spent.planned_restarts += 1;
                self.stop_as_planned(process)?;
            }
            Action::HostStart | Action::TakeOver => self.start_host(),
            Action::StartOn(process) => self.start_on(process)?,
            Action::Pause(process) => {
                self.state.spent.pauses += 1;
                self.set_running(process, Running::Paused);
            }
            Action::Wake(process) => self.set_running(process, Running::Yes),
            Action::Watchdog(process) => {
                let at = self.acts(process)?;
                self.watchdog(at);
            }
            _ => return None,
        }
        Some(())
    }

    fn host_tick(&mut self) {
        self.state.host_clock += 1;
        if self.config.skew == 0 {
            self.state.device_clock += 1;
        }
        let processes: Vec<u8> = self.state.hosts.iter().map(|host| host.process).collect();
        for process in processes {
            if let Some(at) = self.acts(process) {
                self.watchdog(at);
            }
        }
    }

    fn set_running(&mut self, process: u8, running: Running) {
        self.state
            .hosts
            .iter_mut()
            .filter(|host| host.process == process)
            .for_each(|host| host.running = running);
    }

    /// The second end of a stream that finds it ended is no second failure.
    fn spend_disconnect(&mut self, other_end_has_left: bool) -> Option<()> {
        if !other_end_has_left {
            self.state.spent.disconnects += 1;
        }
        (self.state.spent.disconnects <= self.config.disconnects).then_some(())
    }

    fn host_has_left(&self, device: usize) -> bool {
        let run = self.run(device);
        let host = run.link.as_ref().and_then(|link| self.state.host(link.process));
        let session = run.session_id().and_then(|id| host.and_then(|host| host.session(id)));
        session.is_none_or(|session| !session.phase.has_stream())
    }

    fn device_has_left(&self, at: usize, id: u8) -> bool {
        let host = &self.state.hosts[at];
        host.session(id).is_none_or(|session| {
            let run = &self.state.devices[session.device].runs[session.run];
            let linked = run.link.as_ref().is_some_and(|link| link.process == host.process);
            !linked || run.session_id() != Some(id)
        })
    }

    /// `server/src/directory.rs::subscribe`: published first, then the sequence is read.
    fn publish(&mut self, process: u8, id: u8) -> Option<()> {
        let sequence_first = self.broken(Mutation::SequenceBeforePublish);
        let at = self.acts(process)?;
        let session = self.state.hosts[at].session_mut(id).filter(|session| session.phase.has_stream())?;
        session.subscription = match session.subscription {
            Subscription::None if !sequence_first => Subscription::Published,
            Subscription::Unpublished(read) => Subscription::Subscribed(read),
            _ => return None,
        };
        Some(())
    }

    fn read_sequence(&mut self, process: u8, id: u8) -> Option<()> {
        let sequence_first = self.broken(Mutation::SequenceBeforePublish);
        let at = self.acts(process)?;
        let read = self.read_last_seq(at);
        let session = self.state.hosts[at].session_mut(id).filter(|session| session.phase.has_stream())?;
        session.subscription = match session.subscription {
            Subscription::Published => Subscription::Subscribed(read),
            Subscription::None if sequence_first => Subscription::Unpublished(read),
            _ => return None,
        };
        Some(())
    }

    /// `server/src/session/subscription.rs::unsubscribe`: no round counts on the leaver any more.
    fn grace_period_ends(&mut self, process: u8, id: u8) -> Option<()> {
        let at_once = self.broken(Mutation::UnsubscribedAtOnce);
        let at = self.acts(process)?;
        let waits = properties::rounds_that_wait_for(&self.state.hosts[at], id).next().is_some();
        let session = self.state.hosts[at].session_mut(id)?;
        if session.subscription != Subscription::Leaving || waits && !at_once {
            return None;
        }
        session.subscription = Subscription::Unsubscribed;
        session.reader = Task::Works;
        Some(())
    }

    /// A run that crashed and can reach nothing any more is as if it had never been.
    fn forget_the_dead(&mut self) {
        for device in 0..self.state.devices.len() {
            for run in 0..self.state.devices[device].runs.len() - 1 {
                let dead = &self.state.devices[device].runs[run];
                if !self.state.can_use(self.config, device, dead) && dead.access.is_none() {
                    let next = crate::state::Run::new(self.config);
                    self.state.devices[device].runs[run] = next;
                }
            }
        }
    }
}
