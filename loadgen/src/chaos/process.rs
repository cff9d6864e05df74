//! Processes that are stopped, killed and cut off, and the sockets that outlive them.

use std::fs::{File, OpenOptions};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use command_fds::{CommandFdExt as _, FdMapping};
use rustix::net::SocketAddrAny;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, Signal, kill_process, pidfd_getfd, pidfd_open};
use tokio::process::{Child, Command};

use super::netns::Network;
use super::plan::{ChaosArgs, DevicePlan, Places};
use super::{CHAOS_DEVICE, CHAOS_HOST};

/// How much of a process's log is told when it fails.
const TOLD_BYTES: usize = 4096;

/// How long a signal that ends or stops a process may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// How often is looked whether a process has stopped.
const TICK: Duration = Duration::from_millis(1);

/// The first file descriptor of those that a process is started with (systemd's protocol).
const FIRST_FD: i32 = 3;

/// Says to a process whose child it is.
const PARENT: &str = "SHOOTDOWN_CHAOS_PARENT";

/// Whether the process that started this one is still there. One that has just asked the kernel to end it
/// with its parent asks this next: the parent may have been killed before.
#[must_use]
pub fn has_its_parent() -> bool {
    let said = std::env::var(PARENT).ok().and_then(|pid| pid.parse().ok());
    said.is_some_and(|pid: i32| Pid::as_raw(rustix::process::getppid()) == pid)
}

/// Why a process is of no use.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// It could not be started.
    #[error("{name} could not be started")]
    Start {
        /// Which.
        name: String,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// A signal could not be sent, or what became of it not be read.
    #[error("{name} could not be {done}")]
    Signal {
        /// Which.
        name: String,
        /// What was to be done.
        done: &'static str,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// It took too long.
    #[error("{name} was not {done} within {PATIENCE:?}")]
    Late {
        /// Which.
        name: String,
        /// What was to be done.
        done: &'static str,
    },
    /// It ended, and was not asked to.
    #[error("{name} ended by itself ({status}); it said:\n{said}")]
    Ended {
        /// Which.
        name: String,
        /// How.
        status: ExitStatus,
        /// The end of its log.
        said: String,
    },
}

/// A process of the run. Dropped, it is killed, stopped or not.
#[derive(Debug)]
pub(crate) struct Process {
    name: String,
    child: Child,
    pid: Pid,
    log: PathBuf,
}

impl Process {
    fn start(
        name: String,
        mut command: Command,
        places: &Places,
        verbose: bool,
    ) -> Result<Self, ProcessError> {
        let failed = |error| ProcessError::Start { name: name.clone(), error };
        let log = places.directory.join(format!("{name}.log"));
        let stderr = match verbose {
            true => Stdio::inherit(),
            false => Stdio::from(OpenOptions::new().append(true).create(true).open(&log).map_err(failed)?),
        };
        // A group of its own: Ctrl-C is for the program whose memory it is, which ends the others.
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr).process_group(0).kill_on_drop(true);
        command.env(PARENT, std::process::id().to_string());
        let child = command.spawn().map_err(failed)?;
        let pid = child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
        let pid = pid.ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
        Ok(Self { name, child, pid, log })
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    fn signal(&self, signal: Signal, done: &'static str) -> Result<(), ProcessError> {
        kill_process(self.pid, signal).map_err(|error| ProcessError::Signal {
            name: self.name.clone(),
            done,
            error: error.into(),
        })
    }

    /// Stops it; every thread of it has stopped when this returns.
    pub(crate) async fn stop(&self) -> Result<(), ProcessError> {
        self.signal(Signal::STOP, "stopped")?;
        let stopped = async {
            loop {
                match has_stopped(self.pid) {
                    Ok(true) => return Ok(()),
                    Ok(false) => tokio::time::sleep(TICK).await,
                    Err(error) => {
                        return Err(ProcessError::Signal {
                            name: self.name.clone(),
                            done: "seen to stop",
                            error,
                        });
                    }
                }
            }
        };
        let late = |_| ProcessError::Late { name: self.name.clone(), done: "stopped" };
        tokio::time::timeout(PATIENCE, stopped).await.map_err(late)?
    }

    pub(crate) fn go_on(&self) -> Result<(), ProcessError> {
        self.signal(Signal::CONT, "made to go on")
    }

    /// Kills it (-9); it is gone when this returns.
    pub(crate) async fn kill(&mut self) -> Result<(), ProcessError> {
        let failed = |error| ProcessError::Signal { name: self.name.clone(), done: "killed", error };
        self.child.start_kill().map_err(failed)?;
        let late = |_| ProcessError::Late { name: self.name.clone(), done: "killed" };
        tokio::time::timeout(PATIENCE, self.child.wait()).await.map_err(late)?.map_err(failed)?;
        Ok(())
    }

    pub(crate) fn ask_to_end(&self) -> Result<(), ProcessError> {
        self.signal(Signal::TERM, "asked to end")
    }

    /// How it ended, if it does in this time.
    pub(crate) async fn ended(&mut self, within: Duration) -> Option<ExitStatus> {
        tokio::time::timeout(within, self.child.wait()).await.ok()?.ok()
    }

    /// Fails where it has ended by itself.
    pub(crate) fn check(&mut self) -> Result<(), ProcessError> {
        match self.child.try_wait() {
            Ok(Some(status)) => {
                Err(ProcessError::Ended { name: self.name.clone(), status, said: end_of(&self.log) })
            }
            _ => Ok(()),
        }
    }

    /// Resets its TCP connections to `peer`; how many. Both ends hear of it at once.
    pub(crate) fn reset_connections(&self, peer: SocketAddr) -> io::Result<usize> {
        let pidfd = pidfd_open(self.pid, PidfdFlags::empty())?;
        let mut reset = 0;
        for entry in std::fs::read_dir(format!("/proc/{}/fd", self.pid.as_raw_nonzero()))? {
            let entry = entry?;
            let target = std::fs::read_link(entry.path()).unwrap_or_default();
            let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
            let Some(number) = number.filter(|_| target.to_string_lossy().starts_with("socket:")) else {
                continue;
            };
            // It may have been closed meanwhile.
            let Ok(socket) = pidfd_getfd(pidfd.as_fd(), number, PidfdGetfdFlags::empty()) else { continue };
            if peer_of(&socket) == Some(peer) {
                // TCP resets a connection whose end is told to forget its peer.
                rustix::net::connect_unspec(&socket)?;
                reset += 1;
            }
        }
        Ok(reset)
    }
}

fn peer_of(socket: &OwnedFd) -> Option<SocketAddr> {
    let peer: SocketAddrAny = rustix::net::getpeername(socket).ok()??;
    SocketAddr::try_from(peer).ok()
}

/// Whether all of its threads have.
fn has_stopped(pid: Pid) -> io::Result<bool> {
    for task in std::fs::read_dir(format!("/proc/{}/task", pid.as_raw_nonzero()))? {
        // A thread may end meanwhile.
        let Ok(stat) = std::fs::read_to_string(task?.path().join("stat")) else { continue };
        let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
        if state != Some('T') {
            return Ok(false);
        }
    }
    Ok(true)
}

fn end_of(log: &Path) -> String {
    let said = std::fs::read(log).unwrap_or_default();
    String::from_utf8_lossy(&said[said.len().saturating_sub(TOLD_BYTES)..]).trim_end().to_owned()
}

/// The sockets that the host agents listen on, one after the other: they are this process's, so that
/// nobody is refused while there is no host agent.
#[derive(Debug)]
pub(crate) struct Sockets {
    source: UnixListener,
    devices: Vec<TcpListener>,
}

impl Sockets {
    pub(crate) fn new(places: &Places, addresses: &[SocketAddr]) -> io::Result<Self> {
        let source = UnixListener::bind(places.source_socket())?;
        source.set_nonblocking(true)?;
        let mut devices = Vec::new();
        for address in addresses {
            let listener = TcpListener::bind(address)?;
            listener.set_nonblocking(true)?;
            devices.push(listener);
        }
        Ok(Self { source, devices })
    }

    /// Where a device finds the host agent.
    pub(crate) fn address(&self, device: usize) -> io::Result<SocketAddr> {
        self.devices[device.min(self.devices.len() - 1)].local_addr()
    }

    /// Duplicates, and their names.
    fn hand_over(&self) -> io::Result<Vec<(String, OwnedFd)>> {
        let mut sockets = vec![("source".to_owned(), OwnedFd::from(self.source.try_clone()?))];
        for (index, device) in self.devices.iter().enumerate() {
            sockets.push((format!("device-{index}"), device.try_clone()?.into()));
        }
        Ok(sockets)
    }
}

/// Whether a host agent replaces one that may still be there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Start {
    /// There is none.
    Alone,
    /// There is one that is stopped.
    TakeOver,
}

/// Starts a host agent.
pub(crate) fn start_host_agent(
    args: &ChaosArgs,
    places: &Places,
    sockets: &Sockets,
    start: Start,
) -> Result<Process, ProcessError> {
    let name = "host-agent".to_owned();
    let failed = |error| ProcessError::Start { name: name.clone(), error };
    let handed = sockets.hand_over().map_err(failed)?;
    // LISTEN_PID is the pid of the process itself, which nobody knows before it is there.
    let mut command = std::process::Command::new("sh");
    command.arg("-c").arg("export LISTEN_PID=$$; exec \"$0\" \"$@\"");
    command.arg(std::env::current_exe().map_err(failed)?).arg(CHAOS_HOST);
    for (name, _) in &handed {
        let option = if name == "source" { "--source-listen" } else { "--listen" };
        command.args([option, &format!("fd://{name}")]);
    }
    command.arg("--state-dir").arg(places.state());
    if start == Start::TakeOver {
        command.arg("--take-over");
    }
    let time = |time: Duration| humantime::format_duration(time).to_string();
    command.args(["--lease", &time(args.lease), "--lease-margin", &time(args.lease_terms().margin)]);
    command.args(["--ack-timeout", &time(args.ack_timeout)]);
    if let Some(limits) = args.limits() {
        command.args(["--max-rounds-in-flight", &limits.rounds.to_string()]);
        command.args(["--quarantine-pages", &limits.pages.to_string()]);
    }
    // Plaintext, on addresses that the run made for itself or on loopback.
    command.args(["--insecure", "--shards", "1", "--memory-frames", "1", "--drain-timeout", "2s"]);
    let names: Vec<&str> = handed.iter().map(|(name, _)| name.as_str()).collect();
    command.env("LISTEN_FDNAMES", names.join(":")).env("LISTEN_FDS", handed.len().to_string());
    let mappings = (FIRST_FD..)
        .zip(handed)
        .map(|(child_fd, (_, parent_fd))| FdMapping { parent_fd, child_fd })
        .collect();
    command.fd_mappings(mappings).map_err(|error| failed(io::Error::other(error)))?;
    Process::start(name, Command::from(command), places, args.verbose)
}

/// Starts a device agent, in its own network where it has one.
pub(crate) fn start_device(
    plan: &DevicePlan,
    network: Option<&Network>,
    verbose: bool,
) -> Result<Process, ProcessError> {
    let name = format!("device-{}", plan.index);
    let failed = |error| ProcessError::Start { name: name.clone(), error };
    let program = std::env::current_exe().map_err(failed)?;
    let mut command = match network {
        Some(network) => {
            let mut command = Command::new("ip");
            command.args(["netns", "exec", network.name()]).arg(program);
            command
        }
        None => Command::new(program),
    };
    let plan_text = serde_json::to_string(plan).map_err(|error| failed(io::Error::other(error)))?;
    command.arg(CHAOS_DEVICE).arg(plan_text);
    Process::start(name, command, &plan.places, verbose)
}

/// Removes the host agent's journal: what `--break no-grace` does.
pub(crate) fn remove_journal(places: &Places) -> io::Result<()> {
    for entry in std::fs::read_dir(places.state())? {
        std::fs::remove_file(entry?.path())?;
    }
    File::open(places.state())?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    fn places(dir: &Path) -> Places {
        Places { directory: dir.into() }
    }

    #[tokio::test]
    async fn a_process_that_was_stopped_has_stopped_and_goes_on_and_is_killed_when_it_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let mut sleeper = Command::new("sleep");
        sleeper.arg("60");
        let mut process = Process::start("sleeper".to_owned(), sleeper, &places(dir.path()), false).unwrap();
        process.stop().await.unwrap();
        assert!(has_stopped(process.pid).unwrap());
        process.go_on().unwrap();
        process.check().unwrap();
        process.stop().await.unwrap();
        process.kill().await.unwrap();
        assert!(matches!(process.check(), Err(ProcessError::Ended { .. })));
    }

    #[tokio::test]
    async fn a_connection_of_another_process_is_reset() {
        let dir = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let mut client = Command::new("bash");
        client.arg("-c").arg(format!("exec 9<>/dev/tcp/127.0.0.1/{}; read -u 9; sleep 60", address.port()));
        let process = Process::start("client".to_owned(), client, &places(dir.path()), false).unwrap();
        let (mut accepted, _) = listener.accept().unwrap();
        accepted.set_read_timeout(Some(PATIENCE)).unwrap();
        let other = "127.0.0.1:9".parse().unwrap();
        assert_eq!(process.reset_connections(other).unwrap(), 0, "no other one");
        assert_eq!(process.reset_connections(address).unwrap(), 1);
        let error = accepted.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }
}
