//! Why settings make no configuration.

use std::io;
use std::path::PathBuf;

use shootdown_proto::endpoint::Endpoint;

use crate::listen::ListenAddr;

/// Why settings make no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read the config file {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// The file is not what it should be.
    #[error("the config file {path} is not valid")]
    Parse {
        /// Which.
        path: PathBuf,
        /// Where and why.
        #[source]
        error: Box<toml::de::Error>,
    },
    /// Nothing to listen on.
    #[error("nothing to listen on; give --listen, for example --listen 127.0.0.1:7400")]
    NoListener,
    /// A TCP address for privileged callers.
    #[error(
        "{address} is no Unix socket; sources and administrators are known by their credentials, which TCP does not have"
    )]
    NotUnix {
        /// Which.
        address: ListenAddr,
    },
    /// Plaintext that leaves the machine.
    #[error(
        "{address} can be reached from other machines, and there is no encryption; listen on loopback or a Unix socket, or say --insecure"
    )]
    Plaintext {
        /// Which.
        address: ListenAddr,
    },
    /// A fencer on another machine.
    #[error(
        "the fencer at {endpoint} may be on another machine, and there is no encryption: whoever is in between could confirm; use loopback, localhost or a Unix socket, or say --insecure"
    )]
    FencerInPlaintext {
        /// Which.
        endpoint: Endpoint,
    },
    /// A fencer that is no one, or two.
    #[error("the fencer of {devices:?} must have either a command or an endpoint")]
    Fencer {
        /// Of which devices.
        devices: Vec<String>,
    },
    /// There is no such program.
    #[error("fence_command is {path}, which cannot be looked at: no device could be cut off")]
    FenceCommand {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// It could never be started.
    #[error(
        "fence_command is {path}, which is no executable file for this user: no device could be cut off; make it one (chmod +x)"
    )]
    FenceCommandNotExecutable {
        /// Which.
        path: PathBuf,
    },
    /// Nobody is asked within it.
    #[error(
        "fence_timeout is set and there is no fencer; give --fence-command, --fence-endpoint or a [[fencer]]"
    )]
    FenceTimeoutOfNobody,
    /// Nobody can be taken over from.
    #[error("--take-over needs --state-dir: the state directory is what is taken over")]
    NothingToTakeOver,
    /// A number that cannot work.
    #[error("{setting} is {value}; it must be {expected}")]
    Value {
        /// Which.
        setting: &'static str,
        /// What it is.
        value: String,
        /// What would do.
        expected: &'static str,
    },
}
