//! A network of its own for a device: a namespace, a pair of interfaces into the host's, and nftables rules
//! that drop everything while the device is cut off. Neither end hears of it: no reset, no refusal.

use std::io::{self, Write as _};
use std::net::Ipv4Addr;
use std::process::{Command, Output, Stdio};

/// What a namespace's name begins with; the pid of its run follows.
const PREFIX: &str = "shootdown-chaos-";

/// What drops everything that comes in and goes out.
const CUT: &str = "table inet chaos {
    chain in { type filter hook input priority 0; policy drop; }
    chain out { type filter hook output priority 0; policy drop; }
}";

const HEAL: &str = "delete table inet chaos";

/// Why there is no network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// Not root.
    #[error("it needs root")]
    NotRoot,
    /// A program is missing or fails.
    #[error("`{command}` {failed}")]
    Command {
        /// The command.
        command: String,
        /// How it failed.
        failed: String,
    },
}

/// A namespace. Dropped, it is removed, and its interfaces with it.
#[derive(Debug)]
pub(crate) struct Network {
    name: String,
    host: Ipv4Addr,
}

impl Network {
    /// Makes one, and tries whether it can be cut off.
    pub(crate) fn new(index: usize) -> Result<Self, NetworkError> {
        if !rustix::process::geteuid().is_root() {
            return Err(NetworkError::NotRoot);
        }
        let pid = std::process::id();
        let name = format!("{PREFIX}{pid}-{index}");
        // 198.18.0.0/15 is for tests between networks; each run takes 32 addresses of it.
        let base = u32::from(Ipv4Addr::new(198, 18, 0, 0)) + (pid % 4096) * 32 + (index as u32) * 4;
        let (host, device) = (Ipv4Addr::from(base + 1), Ipv4Addr::from(base + 2));
        // Interfaces have 15 letters at most.
        let (outer, inner) = (format!("sdc{pid:x}h{index}"), format!("sdc{pid:x}d{index}"));
        ip(&["netns", "add", &name])?;
        let network = Self { name, host };
        let name = network.name.as_str();
        ip(&["link", "add", &outer, "type", "veth", "peer", "name", &inner, "netns", name])?;
        ip(&["address", "add", &format!("{host}/30"), "dev", &outer])?;
        ip(&["link", "set", &outer, "up"])?;
        ip(&["-n", name, "address", "add", &format!("{device}/30"), "dev", &inner])?;
        ip(&["-n", name, "link", "set", &inner, "up"])?;
        ip(&["-n", name, "link", "set", "lo", "up"])?;
        network.cut()?;
        network.heal()?;
        Ok(network)
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The host's end.
    pub(crate) fn host(&self) -> Ipv4Addr {
        self.host
    }

    /// Nothing goes in or out any more. Takes some milliseconds.
    pub(crate) fn cut(&self) -> Result<(), NetworkError> {
        self.nft(CUT)
    }

    pub(crate) fn heal(&self) -> Result<(), NetworkError> {
        self.nft(HEAL)
    }

    fn nft(&self, script: &str) -> Result<(), NetworkError> {
        run("ip", &["netns", "exec", &self.name, "nft", "-f", "-"], script)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // Nothing can be done about it; the next run tries again.
        drop(ip(&["netns", "delete", &self.name]));
    }
}

/// Removes what runs left behind that were killed.
pub(crate) fn remove_leftovers() {
    let Ok(names) = std::fs::read_dir("/run/netns") else { return };
    for name in names.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        let pid = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        if pid.is_some_and(|pid| !std::path::Path::new("/proc").join(pid).exists()) {
            drop(ip(&["netns", "delete", &name]));
        }
    }
}

fn ip(args: &[&str]) -> Result<(), NetworkError> {
    run("ip", args, "")
}

fn run(program: &str, args: &[&str], input: &str) -> Result<(), NetworkError> {
    let failed =
        |failed: String| NetworkError::Command { command: format!("{program} {}", args.join(" ")), failed };
    let output =
        output_of(program, args, input).map_err(|error| failed(format!("cannot be run: {error}")))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(failed(format!("failed ({}): {}", output.status, said.trim())))
}

fn output_of(program: &str, args: &[&str], input: &str) -> io::Result<Output> {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    // A program that has failed does not read it, and says why.
    let written = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output()?;
    if output.status.success() { written.map(|()| output) } else { Ok(output) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Without root there is nothing to be tried but the refusal.
    #[test]
    fn a_network_is_there_until_it_is_dropped() {
        match Network::new(7) {
            Ok(network) => {
                let place = std::path::Path::new("/run/netns").join(network.name());
                assert!(place.exists());
                assert!(network.heal().is_err(), "it is not cut off");
                network.cut().unwrap();
                drop(network);
                assert!(!place.exists());
            }
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
}
