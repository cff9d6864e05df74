//! Everything that anybody may do next. What turns out not to be possible is no step; what is seen at a glance not to
//! be is not listed, since to try it is to copy the world.

use shootdown_core::session::Phase;

use crate::config::Config;
use crate::device::Welcome;
use crate::host::Confirms;
use crate::state::{CallState, Host, Page, Running, State};

/// One step of anybody.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Action {
    /// The host's clock moves, and the watchdog of each host agent that runs looks.
    HostTick,
    DeviceTick,
    Start(Page),
    StartNonBlockable,
    Deadline(u8),
    Answer(u8, u8),
    TakeAnswer(u8),
    End(u8),
    Register,
    Retry(u8),
    Fault(usize, Page),
    FaultForWriting(usize, Page),
    /// The bracket that a fault waits for has ended.
    FaultGoesOn(u8, u8),
    Commit(u8, usize),
    ToDevice(usize),
    ToHost(u8, u8),
    FlushDone(usize, usize),
    Heartbeat(usize),
    Use(usize, Page),
    BeginAccess(usize, Page),
    EndAccess(usize, usize),
    Publish(u8, u8),
    ReadSequence(u8, u8),
    Unsubscribe(usize),
    GracePeriodEnds(u8, u8),
    Lose(usize),
    /// The device finds its stream ended.
    Disconnect(usize),
    /// The host agent does.
    Sever(u8, u8),
    Connect(usize, u8, Welcome),
    /// The device gives its session up, and flushes everything.
    Close(usize),
    DeviceCrash(usize),
    Fencer(u8, u8, Confirms),
    Tell(u8, usize),
    HostCrash(u8),
    HostStop(u8),
    HostStart,
    Pause(u8),
    Wake(u8),
    TakeOver,
    /// The next step of its start.
    StartOn(u8),
    Watchdog(u8),
}

pub(crate) fn time(config: &Config, state: &State, actions: &mut Vec<Action>) {
    // An access by way of the host agent ends; how long it takes is not in the bound of a round.
    let untold = state.hosts.iter().flat_map(|host| &host.sessions);
    let waits = untold.into_iter().any(|session| session.phase == Phase::Fenced && !session.told);
    // Before the first session there is nothing that time could change.
    if state.journal.next_session == 1 {
        return;
    }
    let ahead = config.skew == 0 || state.host_clock < state.device_clock + config.skew;
    if state.host_clock < config.horizon && ahead && !waits {
        actions.push(Action::HostTick);
    }
    if state.device_clock < config.horizon && state.device_clock < state.host_clock + config.skew {
        actions.push(Action::DeviceTick);
    }
}

pub(crate) fn of_source(config: &Config, state: &State, actions: &mut Vec<Action>) {
    if state.source.events.len() < usize::from(config.events) {
        actions.extend((0..config.pages).map(Action::Start));
    }
    if config.non_blockable {
        actions.push(Action::StartNonBlockable);
    }
    if state.hosts.last().is_some_and(|host| host.registration > state.source.registered) {
        actions.push(Action::Register);
    }
    for (called, call) in (0..).zip(&state.source.events) {
        if call.answer.is_some() {
            actions.push(Action::TakeAnswer(called));
        } else if call.state != CallState::Released {
            let knows = |host: &&Host| host.rounds.iter().any(|open| open.event == called);
            let hosts = state.hosts.iter().filter(knows);
            actions.extend(hosts.map(|host| Action::Answer(host.process, called)));
        }
        if call.registration < state.source.registered {
            actions.push(Action::Retry(called));
        }
        if !call.bracket_ended && call.state != CallState::Waiting {
            actions.push(Action::End(called));
        }
        if state.spent.deadlines < config.deadlines {
            actions.push(Action::Deadline(called));
        }
    }
}

pub(crate) fn of_devices(config: &Config, state: &State, actions: &mut Vec<Action>) {
    for (device, it) in state.devices.iter().enumerate() {
        let Some(run) = it.runs.last() else { continue };
        if config.accesses {
            let accesses = it.runs.iter().enumerate().filter(|(_, run)| run.access.is_some());
            actions.extend(accesses.map(|(run, _)| Action::EndAccess(device, run)));
        }
        for page in 0..config.pages {
            if config.faults && run.link.is_some() && run.tlb[usize::from(page)].is_none() {
                actions.push(Action::Fault(device, page));
            }
            if config.breaks && run.link.is_some() {
                actions.push(Action::FaultForWriting(device, page));
            }
            if config.young {
                actions.push(Action::Use(device, page));
            }
            if config.accesses {
                actions.push(Action::BeginAccess(device, page));
            }
        }
        actions.extend((0..run.flushing.len()).map(|index| Action::FlushDone(device, index)));
        if run.session.is_some() {
            actions.push(Action::Close(device));
            if state.spent.device_crashes < config.device_crashes {
                actions.push(Action::DeviceCrash(device));
            }
        }
        if run.link.is_none() {
            let processes = state.hosts.iter().filter(|host| host.serves()).map(|host| host.process);
            actions.extend(processes.clone().map(|host| Action::Connect(device, host, Welcome::Arrives)));
            if state.spent.disconnects < config.disconnects {
                let lost = |host| Action::Connect(device, host, Welcome::IsLost);
                actions.extend(processes.clone().map(lost));
            }
            if state.spent.host_crashes < config.host_crashes {
                actions.extend(processes.map(|host| Action::Connect(device, host, Welcome::IsNotSent)));
            }
            continue;
        }
        actions.push(Action::Disconnect(device));
        if run.link.as_ref().is_some_and(|link| !link.down.is_empty()) {
            actions.push(Action::ToDevice(device));
        }
        if config.heartbeats {
            actions.push(Action::Heartbeat(device));
        }
        if config.subscriptions {
            actions.push(Action::Unsubscribe(device));
        }
        if state.spent.losses < config.losses {
            actions.push(Action::Lose(device));
        }
    }
}

pub(crate) fn of_hosts(config: &Config, state: &State, actions: &mut Vec<Action>) {
    for host in &state.hosts {
        let process = host.process;
        actions.extend((0..host.tickets.len()).map(|index| Action::Commit(process, index)));
        for (index, session) in host.sessions.iter().enumerate() {
            let id = session.id;
            if !session.up.is_empty() {
                actions.push(Action::ToHost(process, id));
            }
            if session.phase.has_stream() {
                actions.push(Action::Sever(process, id));
            }
            if config.devices[session.device].fencer && !session.phase.is_over() {
                actions.extend([Confirms::Yes, Confirms::No].map(|says| Action::Fencer(process, id, says)));
            }
            if session.fault.is_some() {
                actions.push(Action::FaultGoesOn(process, id));
            }
            if session.phase == Phase::Fenced && !session.told {
                actions.push(Action::Tell(process, index));
            }
            if config.subscriptions {
                actions.extend([
                    Action::Publish(process, id),
                    Action::ReadSequence(process, id),
                    Action::GracePeriodEnds(process, id),
                ]);
            }
        }
        if state.spent.host_crashes < config.host_crashes {
            actions.push(Action::HostCrash(process));
        }
        if state.spent.planned_restarts < config.planned_restarts {
            actions.push(Action::HostStop(process));
        }
        if host.running == Running::Yes && !host.start.is_empty() {
            actions.push(Action::StartOn(process));
        }
        if config.pauses > 0 {
            if state.spent.pauses < config.pauses && host.running == Running::Yes {
                actions.push(Action::Pause(process));
            }
            if host.running == Running::Paused {
                actions.push(Action::Wake(process));
            } else if host.serves() {
                actions.push(Action::Watchdog(process));
            }
        }
    }
    match state.hosts.last() {
        None => actions.push(Action::HostStart),
        Some(host) if host.running == Running::Paused => actions.push(Action::TakeOver),
        Some(_) => {}
    }
}
