//! A program as a fencer: exit status 0 confirms, nothing else does.
//!
//! It is started as `PROGRAM --device-id=ID --device-incarnation=N --session-id=N --epoch=N
//! --host-incarnation=N`, with the same as `SHOOTDOWN_DEVICE_ID` and so on in its environment, with nothing on
//! its standard input, and in a process group of its own: at its time limit the whole group is killed, and the
//! attempt is not confirmed. What it leaves running when it ends by itself goes on.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::process::{Child, Command};

use super::{Confirmed, NotConfirmed, Subject};

pub(super) async fn fence(
    program: &Path,
    subject: &Subject,
    limit: Duration,
) -> Result<Confirmed, NotConfirmed> {
    let mut command = Command::new(program);
    for (name, value) in words(subject) {
        // With its name before it, a device called `--force` is not taken for an option.
        command.arg(format!("--{name}={value}"));
        command.env(format!("SHOOTDOWN_{}", name.replace('-', "_").to_uppercase()), value);
    }
    let child =
        command.stdin(Stdio::null()).stdout(Stdio::null()).process_group(0).kill_on_drop(true).spawn();
    let mut running = Running { child: child.map_err(NotConfirmed::Start)? };
    match tokio::time::timeout(limit, running.child.wait()).await {
        Ok(Ok(status)) if status.success() => Ok(Confirmed(())),
        Ok(Ok(status)) => Err(NotConfirmed::Ended(status)),
        Ok(Err(error)) => Err(NotConfirmed::Wait(error)),
        Err(_) => Err(NotConfirmed::TimeLimit(limit)),
    }
}

fn words(subject: &Subject) -> [(&'static str, String); 5] {
    [
        ("device-id", subject.device.as_str().to_owned()),
        ("device-incarnation", subject.device_incarnation.get().to_string()),
        ("session-id", subject.session.get().to_string()),
        ("epoch", subject.epoch.get().to_string()),
        ("host-incarnation", subject.host_incarnation.get().to_string()),
    ]
}

/// A program that runs. Dropped before its end was seen, it is killed with its process group; the runtime
/// reaps it.
struct Running {
    child: Child,
}

impl Drop for Running {
    fn drop(&mut self) {
        // No id: its end was seen, and the number may be another process's by now.
        let group = self.child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        if let Some(group) = group
            && let Err(error) = kill_process_group(group, Signal::KILL)
        {
            tracing::warn!(%error, group = group.as_raw_nonzero().get(), "a fencing program could not be killed");
        }
    }
}
