//! Fencers: who makes certain that a device which owes an ack cannot reach the memory any more.
//!
//! ```text
//!   Live -- T_ack --> Suspect                      (or Severed, and told of something for T_ack)
//!                        |  Effect::AskFencer
//!                        v
//!              a place among the attempts          at most [`ATTEMPTS_AT_A_TIME`]
//!                        |
//!              attempt, with a time limit -- confirmed --> Fenced
//!                        |
//!                   not confirmed                  status, signal, time limit, transport, any other word
//!                        |
//!              pause, doubled each time            until the session is over, or owes nothing
//! ```
//!
//! A fencer is a program ([`command`]) or a gRPC service ([`service`]) of whoever controls the access path.
//! Without one a device is fenced by the end of its lease, if it enforces it, or not at all.
//!
//! Only its confirmation counts (FenceIsPositive): [`Confirmed`] has one maker in each of the two. An attempt
//! that has begun is let go to its end, also when the session is over meanwhile: to stop it half way would
//! leave the access path in a state that nobody asked for.

mod command;
mod service;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use shootdown_core::{DeviceId, Epoch, Incarnation, SessionId};
use shootdown_proto::endpoint::Endpoint;
use shootdown_proto::v1;
use tokio::sync::Semaphore;

use crate::embed;
use crate::host::Host;
use crate::session::SessionHandle;

/// Attempts at a time, of all devices: a rack that loses its power makes every device of it suspect at once.
/// A fencer that hangs holds a place for its time limit, then the next in line has it.
const ATTEMPTS_AT_A_TIME: usize = 16;

/// After the first attempt that was not confirmed, and doubled after each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// The longest pause: a fencer that works again is asked within that time.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Who is asked to cut devices off, and which.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FencerRule {
    /// The devices that it is for.
    pub devices: Vec<DevicePattern>,
    /// Who is asked.
    pub fencer: Fencer,
    /// How long one attempt may take; then it is not confirmed.
    pub time_limit: Duration,
}

/// Who cuts a device off.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fencer {
    /// A program: exit status 0 confirms.
    Command(PathBuf),
    /// A `FencerService`: the outcome CONFIRMED does.
    Service(Endpoint),
    /// The same, over connections of the program that the host agent is part of.
    Embedded(embed::FencerConnector),
}

/// A device's name in which each `*` stands for any text, the empty one too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DevicePattern(String);

impl DevicePattern {
    /// Every device.
    #[must_use]
    pub fn every() -> Self {
        Self("*".to_owned())
    }

    /// A pattern.
    #[must_use]
    pub fn new(pattern: &str) -> Self {
        Self(pattern.to_owned())
    }

    /// Whether it means this device.
    #[must_use]
    pub fn matches(&self, device: &DeviceId) -> bool {
        let mut parts = self.0.split('*');
        let first = parts.next().expect("a text has a first part");
        let Some(mut rest) = device.as_str().strip_prefix(first) else { return false };
        let Some(last) = parts.next_back() else { return rest.is_empty() };
        for part in parts {
            // The earliest place leaves the most for the parts after it.
            let Some(at) = rest.find(part) else { return false };
            rest = &rest[at + part.len()..];
        }
        rest.ends_with(last)
    }
}

/// Every fencer of a host agent.
#[derive(Debug)]
pub(crate) struct Fencers {
    rules: Vec<FencerRule>,
    places: Semaphore,
}

impl Fencers {
    pub(crate) fn new(rules: Vec<FencerRule>) -> Self {
        Self { rules, places: Semaphore::new(ATTEMPTS_AT_A_TIME) }
    }

    /// The device's: that of the first rule which means it.
    pub(crate) fn of(&self, device: &DeviceId) -> Option<FencerRule> {
        let means_it = |rule: &&FencerRule| rule.devices.iter().any(|pattern| pattern.matches(device));
        self.rules.iter().find(means_it).cloned()
    }

    /// The longest time limit of an attempt; zero where there is no fencer.
    pub(crate) fn longest_attempt(&self) -> Duration {
        self.rules.iter().map(|rule| rule.time_limit).max().unwrap_or_default()
    }
}

/// Whom a fencer is asked to cut off. A later run of the same device is not meant.
#[derive(Debug, Clone)]
struct Subject {
    device: DeviceId,
    device_incarnation: Incarnation,
    session: SessionId,
    epoch: Epoch,
    host_incarnation: Incarnation,
}

/// The fencer's word that no access of the device reaches the memory any more. Made where it was given, and
/// nowhere else.
#[derive(Debug)]
struct Confirmed(());

/// What became of an attempt that did not confirm: the device may still reach the memory.
#[derive(Debug, thiserror::Error)]
enum NotConfirmed {
    #[error("it took longer than {0:?}")]
    TimeLimit(Duration),
    #[error("the program could not be started")]
    Start(#[source] std::io::Error),
    #[error("the program's end could not be waited for")]
    Wait(#[source] std::io::Error),
    #[error("the program ended with {0}")]
    Ended(std::process::ExitStatus),
    #[error("the service could not be reached")]
    Unreachable(#[source] tonic::transport::Error),
    #[error("the call failed")]
    Call(#[source] Box<tonic::Status>),
    #[error("the service answered {}", .0.as_str_name())]
    Answered(v1::FenceOutcome),
}

/// Starts the task that asks the session's fencer whenever there is reason to, until the session is over. It
/// runs on the control runtime, for a shard has no timers, and the host agent's task tracker owns it.
pub(crate) fn watch_over(host: &Host, session: &Arc<SessionHandle>) {
    if let Some(rule) = session.fencer.clone() {
        let watching = until_over(host.clone(), Arc::clone(session), rule);
        drop(host.tasks().spawn_on(watching, host.control()));
    }
}

async fn until_over(host: Host, session: Arc<SessionHandle>, rule: FencerRule) {
    loop {
        tokio::select! {
            biased;
            // First: a session that is over needs no fencer.
            () = session.over() => return,
            () = session.fencer_asked() => insist(&host, &session, &rule).await,
        }
    }
}

/// Asks until the fencer confirms, or there is no reason any more.
async fn insist(host: &Host, session: &SessionHandle, rule: &FencerRule) {
    let subject = Subject {
        device: session.device.clone(),
        device_incarnation: session.incarnation,
        session: session.id,
        epoch: session.epoch,
        host_incarnation: host.incarnation(),
    };
    let mut pause = FIRST_PAUSE;
    while session.wants_fencer() {
        let place = host.fencers().places.acquire().await.expect("nobody closes it");
        // It may have been a long wait; and what a successor has granted the device is not this one's to cut.
        if !session.wants_fencer() || !host.is_current() {
            return;
        }
        let attempt = rule.fencer.fence(&subject, rule.time_limit).await;
        drop(place);
        let (id, device) = (session.id.get(), session.device.as_str());
        match attempt {
            Ok(confirmed) => {
                tracing::warn!(session = id, device, "a fencer confirmed that a device is cut off");
                return session.on_fence_confirmed(&confirmed);
            }
            Err(error) => {
                let error = anyhow::Error::from(error);
                tracing::warn!(session = id, device, fencer = %rule.fencer, error = format!("{error:#}"), again_in = ?pause, "a fence is not confirmed");
            }
        }
        tokio::select! {
            biased;
            // First: nobody is to wait for a pause.
            () = session.over() => return,
            () = tokio::time::sleep(pause) => {}
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

impl Fencer {
    /// One attempt.
    ///
    /// # Cancel safety
    /// Dropped, a program is killed with all that it started in its process group.
    async fn fence(&self, subject: &Subject, limit: Duration) -> Result<Confirmed, NotConfirmed> {
        match self {
            Self::Command(program) => command::fence(program, subject, limit).await,
            Self::Service(endpoint) => service::fence(service::connect(endpoint), subject, limit).await,
            Self::Embedded(connector) => service::fence(connector.connect(), subject, limit).await,
        }
    }
}

impl fmt::Display for Fencer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Command(program) => write!(f, "{}", program.display()),
            Self::Service(endpoint) => write!(f, "{endpoint}"),
            Self::Embedded(_) => f.write_str("embedded"),
        }
    }
}

impl SessionHandle {
    /// Its device is cut off. The session is Fenced, which PageService sees, and its accesses to frames have
    /// ended, before a round hears of it (FenceReachesReuse).
    fn on_fence_confirmed(&self, _: &Confirmed) {
        self.fence();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_means_the_devices_that_it_spells() {
        let matches = |pattern: &str, device: &str| {
            DevicePattern::new(pattern).matches(&DeviceId::new(device).expect("a device's name"))
        };
        for (pattern, device) in [
            ("gpu0", "gpu0"),
            ("gpu*", "gpu"),
            ("gpu*", "gpu0"),
            ("*", "x"),
            ("*-a*b", "gpu-a-ab"),
            ("a*b*b", "abb"),
        ] {
            assert!(matches(pattern, device), "{pattern} {device}");
        }
        for (pattern, device) in
            [("gpu", "gpu0"), ("gpu*", "xgpu"), ("*0", "gpu01"), ("a*a", "a"), ("a*b*b", "ab"), ("", "x")]
        {
            assert!(!matches(pattern, device), "{pattern} {device}");
        }
    }

    #[test]
    fn the_first_rule_that_means_a_device_is_its_fencer() {
        let rule = |pattern: &str, program: &str| FencerRule {
            devices: vec![DevicePattern::new(pattern)],
            fencer: Fencer::Command(program.into()),
            time_limit: Duration::from_secs(1),
        };
        let fencers =
            Fencers::new(vec![rule("gpu*", "/first"), rule("gpu1", "/second"), rule("nic", "/third")]);
        let of = |device: &str| fencers.of(&DeviceId::new(device).expect("a device's name"));
        assert_eq!(of("gpu1").map(|rule| rule.fencer), Some(Fencer::Command("/first".into())));
        assert_eq!(of("nic").map(|rule| rule.fencer), Some(Fencer::Command("/third".into())));
        assert_eq!(of("fpga"), None);
    }
}
