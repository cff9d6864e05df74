//! `shootdownd admin`: what a host agent that runs has and waits for, and the way out when it waits for a device
//! that will not stop by itself. A client of `AdminService`, for people and for scripts.
//!
//! It speaks to the host agent and touches nothing of it: not its settings, not its state directory.

mod report;

use std::error::Error;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use shootdown_proto::error::Reason;
use shootdown_proto::v1;
use shootdown_proto::v1::admin_service_client::AdminServiceClient;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use crate::config::Span;

/// Where `docs/faults.md` has the host agent listen for administrators.
const DEFAULT_ENDPOINT: &str = "unix:/run/shootdown/admin";

/// A host agent answers at once, unless it hangs or is stopped.
const DEFAULT_TIMEOUT: &str = "10s";

/// Asks a host agent that runs, and ends sessions of devices that do not come back.
#[derive(Debug, Clone, Args)]
pub struct AdminArgs {
    /// Where the host agent listens for administrators: unix:/PATH
    #[arg(long, env = "SHOOTDOWND_ADMIN_ENDPOINT", default_value = DEFAULT_ENDPOINT, global = true)]
    endpoint: AdminEndpoint,
    /// How long the host agent may take to be reached, and then to answer
    #[arg(long, default_value = DEFAULT_TIMEOUT, global = true)]
    timeout: Span,
    /// How the answer is written
    #[arg(long, value_enum, default_value_t = Output::Text, global = true)]
    output: Output,
    #[command(subcommand)]
    command: AdminCommand,
}

#[derive(Debug, Clone, Subcommand)]
enum AdminCommand {
    /// The sessions: which devices there are, how they stand, and who is waited for
    Sessions,
    /// The rounds that wait, and for which devices
    Rounds {
        /// Only those of this address space
        #[arg(long, value_name = "ID", value_parser = clap::value_parser!(u64).range(1..))]
        address_space: Option<u64>,
    },
    /// The pages that callers keep because a round was not quiesced in time
    Quarantine,
    /// The address spaces
    AddressSpaces,
    /// End a session; its rounds wait until its lease is over, unless the device is cut off
    Evict {
        /// Which, as `sessions` lists it
        #[arg(value_parser = clap::value_parser!(u64).range(1..))]
        session_id: u64,
        /// Vouch that the device cannot reach the memory any more, not even by an access that has begun: nothing
        /// waits for it from here on
        #[arg(long)]
        cut_off: bool,
    },
}

/// How an answer is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// A Unix socket: administrators are known by their credentials.
#[derive(Debug, Clone, PartialEq, Eq)]
struct AdminEndpoint(PathBuf);

#[derive(Debug, thiserror::Error)]
#[error("an administrator's endpoint is a Unix socket: unix:/PATH")]
struct EndpointError;

impl FromStr for AdminEndpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        let path = text.strip_prefix("unix:").ok_or(EndpointError)?;
        let path = path.strip_prefix("//").unwrap_or(path);
        if path.starts_with('/') { Ok(Self(path.into())) } else { Err(EndpointError) }
    }
}

/// Why there is no answer; each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// There is no such file.
    #[error(
        "there is no socket {path}; start shootdownd with --admin-listen unix:{path}, or name the one that it has with --endpoint",
        path = path.display()
    )]
    NoSocket {
        /// Which.
        path: PathBuf,
    },
    /// A socket file was left behind.
    #[error("nobody listens on {path}: the host agent has ended; start it again", path = path.display())]
    NobodyListens {
        /// Which.
        path: PathBuf,
    },
    /// The socket is another user's.
    #[error("no leave to open {path}; run this as root or as the user of shootdownd", path = path.display())]
    NoLeave {
        /// Which.
        path: PathBuf,
    },
    /// It could not be connected to for another reason.
    #[error("cannot connect to {path}", path = path.display())]
    Connect {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        error: tonic::transport::Error,
    },
    /// It does not answer.
    #[error(
        "the host agent on {path} does not answer within {limit:?}; if it hangs, kill it and start it again, or start one with --take-over",
        path = path.display()
    )]
    Late {
        /// Which.
        path: PathBuf,
        /// How long was waited.
        limit: Duration,
    },
    /// The caller's user has no leave.
    #[error("{message}")]
    Denied {
        /// The host agent's words.
        message: String,
    },
    /// The session is over, or never was.
    #[error(
        "there is no session {session_id} that could be ended; `shootdownd admin sessions` lists those there are"
    )]
    NoSession {
        /// Which.
        session_id: u64,
    },
    /// The address space has ended, or never was.
    #[error(
        "there is no address space {address_space_id}; `shootdownd admin address-spaces` lists those there are"
    )]
    NoAddressSpace {
        /// Which.
        address_space_id: u64,
    },
    /// The host agent refused, or went away.
    #[error("the call failed: {}", .0.message())]
    Call(Box<Status>),
    /// The answer could not be written.
    #[error("the answer could not be written")]
    Write(#[source] io::Error),
}

/// Asks, and writes the answer to `out`.
///
/// # Errors
/// [`AdminError`]; nothing was written then, unless it is [`AdminError::Write`].
///
/// # Cancel safety
/// Dropped while a session is ended, that may have happened.
pub async fn run(args: &AdminArgs, out: &mut impl Write) -> Result<(), AdminError> {
    let AdminArgs { endpoint: AdminEndpoint(path), timeout: Span(limit), output, command } = args;
    let mut agent = HostAgent { client: connect(path, *limit).await?, path, limit: *limit };
    let answer = match *command {
        AdminCommand::Sessions => report::sessions(&agent.sessions().await?),
        AdminCommand::Rounds { address_space } => {
            report::rounds(&agent.rounds(address_space.unwrap_or_default()).await?)
        }
        AdminCommand::Quarantine => report::quarantine(&agent.quarantine().await?),
        AdminCommand::AddressSpaces => report::address_spaces(&agent.address_spaces().await?),
        AdminCommand::Evict { session_id, cut_off } => {
            agent.evict(session_id, cut_off).await?;
            report::evicted(session_id, cut_off)
        }
    };
    let written = match output {
        Output::Text => out.write_all(answer.text.as_bytes()),
        Output::Json => writeln!(out, "{:#}", answer.json),
    };
    written.and_then(|()| out.flush()).map_err(AdminError::Write)
}

async fn connect(path: &Path, limit: Duration) -> Result<AdminServiceClient<Channel>, AdminError> {
    let failed = |error: tonic::transport::Error| {
        let path = path.to_owned();
        match kind(&error) {
            Some(io::ErrorKind::NotFound) => AdminError::NoSocket { path },
            Some(io::ErrorKind::ConnectionRefused) => AdminError::NobodyListens { path },
            Some(io::ErrorKind::PermissionDenied) => AdminError::NoLeave { path },
            _ => AdminError::Connect { path, error },
        }
    };
    let endpoint = Endpoint::from_shared(format!("unix:{}", path.display())).map_err(failed)?;
    let connected = tokio::time::timeout(limit, endpoint.connect()).await;
    let late = |_| AdminError::Late { path: path.to_owned(), limit };
    let channel = connected.map_err(late)?.map_err(failed)?;
    Ok(AdminServiceClient::new(channel).max_decoding_message_size(usize::MAX))
}

/// What the system said, wherever in the chain.
fn kind(error: &tonic::transport::Error) -> Option<io::ErrorKind> {
    let mut chain = std::iter::successors(error.source(), |error| (*error).source());
    chain.find_map(|error| error.downcast_ref::<io::Error>()).map(io::Error::kind)
}

struct HostAgent<'a> {
    client: AdminServiceClient<Channel>,
    path: &'a Path,
    /// Of each call.
    limit: Duration,
}

/// Every page of a listing, which ends with an empty token.
macro_rules! every_page {
    ($self:ident, $call:ident, $request:expr, $entries:ident) => {{
        let mut all = Vec::new();
        let mut request = $request;
        loop {
            let page = answer($self.path, $self.limit, $self.client.$call(request.clone())).await?;
            all.extend(page.$entries);
            if page.next_page_token.is_empty() {
                break all;
            }
            request.page_token = page.next_page_token;
        }
    }};
}

impl HostAgent<'_> {
    async fn sessions(&mut self) -> Result<Vec<v1::Session>, AdminError> {
        Ok(every_page!(self, list_sessions, v1::ListSessionsRequest::default(), sessions))
    }

    async fn address_spaces(&mut self) -> Result<Vec<v1::AddressSpace>, AdminError> {
        Ok(every_page!(self, list_address_spaces, v1::ListAddressSpacesRequest::default(), address_spaces))
    }

    /// Of one address space, or with 0 of all.
    async fn rounds(&mut self, address_space_id: u64) -> Result<Vec<v1::Round>, AdminError> {
        let request = v1::ListRoundsRequest { address_space_id, ..v1::ListRoundsRequest::default() };
        let listed: Result<_, AdminError> =
            async { Ok(every_page!(self, list_rounds, request, rounds)) }.await;
        listed.map_err(|error| match error {
            AdminError::Call(status) if Reason::of_status(&status) == Some(Reason::AddressSpaceUnknown) => {
                AdminError::NoAddressSpace { address_space_id }
            }
            error => error,
        })
    }

    /// Every page as one; the sums are those of the last.
    async fn quarantine(&mut self) -> Result<v1::ListQuarantineResponse, AdminError> {
        let mut request = v1::ListQuarantineRequest::default();
        let mut all = Vec::new();
        loop {
            let mut page = answer(self.path, self.limit, self.client.list_quarantine(request)).await?;
            all.append(&mut page.quarantined);
            if page.next_page_token.is_empty() {
                return Ok(v1::ListQuarantineResponse { quarantined: all, ..page });
            }
            request = v1::ListQuarantineRequest { page_token: page.next_page_token, page_size: 0 };
        }
    }

    async fn evict(&mut self, session_id: u64, is_cut_off: bool) -> Result<(), AdminError> {
        let request = v1::EvictSessionRequest { session_id, is_cut_off };
        let evicted = answer(self.path, self.limit, self.client.evict_session(request)).await;
        evicted.map(drop).map_err(|error| match error {
            AdminError::Call(status) if Reason::of_status(&status) == Some(Reason::SessionUnknown) => {
                AdminError::NoSession { session_id }
            }
            error => error,
        })
    }
}

async fn answer<T>(
    path: &Path,
    limit: Duration,
    call: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, AdminError> {
    let answered = tokio::time::timeout(limit, call).await;
    let answered = answered.map_err(|_| AdminError::Late { path: path.to_owned(), limit })?;
    answered.map(tonic::Response::into_inner).map_err(|status| match Reason::of_status(&status) {
        Some(Reason::PermissionDenied) => AdminError::Denied { message: status.message().to_owned() },
        _ => AdminError::Call(Box::new(status)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_a_unix_socket() {
        let parsed = |text: &str| text.parse::<AdminEndpoint>().ok();
        assert_eq!(parsed("unix:/a/b"), Some(AdminEndpoint("/a/b".into())));
        assert_eq!(parsed("unix:///a/b"), Some(AdminEndpoint("/a/b".into())));
        for wrong in ["/a/b", "unix:a", "127.0.0.1:1", "tcp://127.0.0.1:1", ""] {
            assert_eq!(parsed(wrong), None, "{wrong}");
        }
    }
}
