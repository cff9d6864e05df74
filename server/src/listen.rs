//! Sockets: where the host agent listens, what it knows of a peer, and who has leave.

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::str::FromStr;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use crate::connections::{Asked, Place, Tenancy};
use crate::journal::Takeover;
use shootdown_proto::error::{Reason, status};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::server::Connected;
use tonic::{Request, Status};

/// Where to listen: `HOST:PORT`, `tcp://HOST:PORT`, `unix:PATH` or `fd://NAME`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ListenAddr {
    /// TCP. Port 0 takes a free one.
    Tcp(SocketAddr),
    /// A Unix socket. A socket file that nobody listens on is replaced.
    Unix(PathBuf),
    /// Sockets that were passed by whoever started the process, by their name in LISTEN_FDNAMES.
    Inherited(String),
}

/// A text that names no place to listen at.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no listen address; write IP:PORT, tcp://IP:PORT, unix:/PATH, or fd://NAME")]
pub struct ListenAddrError {
    text: String,
}

impl FromStr for ListenAddr {
    type Err = ListenAddrError;

    fn from_str(text: &str) -> Result<Self, ListenAddrError> {
        let error = || ListenAddrError { text: text.to_owned() };
        if let Some(path) = text.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            return if path.starts_with('/') { Ok(Self::Unix(path.into())) } else { Err(error()) };
        }
        if let Some(name) = text.strip_prefix("fd://") {
            return if name.is_empty() { Err(error()) } else { Ok(Self::Inherited(name.to_owned())) };
        }
        let address = text.strip_prefix("tcp://").unwrap_or(text);
        address.parse().map(Self::Tcp).map_err(|_| error())
    }
}

impl fmt::Display for ListenAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "tcp://{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Inherited(name) => write!(f, "fd://{name}"),
        }
    }
}

impl ListenAddr {
    /// Whether what is sent there stays on this machine. A socket that is passed tells when it is there.
    #[must_use]
    pub fn is_local(&self) -> bool {
        match self {
            Self::Tcp(address) => address.ip().is_loopback(),
            Self::Unix(_) | Self::Inherited(_) => true,
        }
    }
}

/// A socket that listens.
#[derive(Debug)]
pub(crate) enum Listener {
    Tcp(TcpListener),
    /// With its file, unless that is another's to remove.
    Unix(Option<SocketFile>, UnixListener),
}

/// Who may do more than a device may.
#[derive(Debug, Clone)]
pub(crate) struct Leave {
    /// The uids that have it.
    pub(crate) uids: Arc<[u32]>,
}

impl Listener {
    /// Listens, on one socket or on as many as were passed. A Unix socket for `privileged` callers is its owner's alone.
    pub(crate) fn bind(address: &ListenAddr, privileged: bool, takeover: Takeover) -> io::Result<Vec<Self>> {
        match address {
            ListenAddr::Tcp(address) => {
                let listener =
                    TcpListener::bind(address).map_err(|error| match (error.kind(), takeover) {
                        (io::ErrorKind::AddrInUse, Takeover::IfHeld) => {
                            io::Error::new(error.kind(), PORT_IS_HELD)
                        }
                        _ => error,
                    })?;
                listener.set_nonblocking(true)?;
                Ok(vec![Self::Tcp(listener)])
            }
            ListenAddr::Unix(path) => {
                remove_stale(path, takeover)?;
                let listener = UnixListener::bind(path)?;
                if privileged {
                    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
                }
                listener.set_nonblocking(true)?;
                Ok(vec![Self::Unix(Some(SocketFile::of(path)?), listener)])
            }
            ListenAddr::Inherited(name) => crate::inherited::listeners(name),
        }
    }

    /// Where it listens, with the port that the kernel chose.
    pub(crate) fn address(&self) -> io::Result<ListenAddr> {
        match self {
            Self::Tcp(listener) => listener.local_addr().map(ListenAddr::Tcp),
            Self::Unix(Some(file), _) => Ok(ListenAddr::Unix(file.path.clone())),
            Self::Unix(None, listener) => {
                let address = listener.local_addr()?;
                Ok(ListenAddr::Unix(address.as_pathname().unwrap_or(Path::new("")).to_owned()))
            }
        }
    }
}

/// What becomes of `--take-over` there.
const PORT_IS_HELD: &str = "another process listens on this port, and --take-over cannot take a TCP port from it: have the socket passed by a service manager (fd://NAME), or kill the other one";

/// A socket file outlives a host agent that was killed. One that answers is in use, and stays; so does
/// whatever is no socket.
fn remove_stale(path: &Path, takeover: Takeover) -> io::Result<()> {
    match UnixStream::connect(path) {
        // Its connections stay; new ones come to the successor.
        Ok(_) if takeover == Takeover::IfHeld => std::fs::remove_file(path),
        Ok(_) => Err(io::Error::new(io::ErrorKind::AddrInUse, "another process listens on this socket")),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            if !std::fs::symlink_metadata(path)?.file_type().is_socket() {
                return Err(io::Error::new(io::ErrorKind::AddrInUse, "there is a file that is no socket"));
            }
            std::fs::remove_file(path)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// A socket file that this process made; removed when it is dropped, unless another has taken its place.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), identity: identity(path)? })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|now| now == self.identity) {
            // It was there a moment ago; if it is gone by now, all the better.
            drop(std::fs::remove_file(&self.path));
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = std::fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// An accepted connection that is not tied to a runtime yet: a shard takes it over.
#[derive(Debug)]
pub(crate) struct Accepted {
    socket: AcceptedSocket,
    peer: Peer,
    /// Among those that there may be, where they are counted.
    pub(crate) place: Option<Place>,
}

#[derive(Debug)]
enum AcceptedSocket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// What is known of a peer.
#[derive(Debug, Clone)]
pub(crate) struct Peer {
    /// Its user, where the socket tells.
    uid: Option<u32>,
    /// Whether it may do more than a device may.
    has_leave: bool,
    /// Whether it has asked anything yet.
    asked: Asked,
}

impl Peer {
    /// Nothing is known of it.
    pub(crate) fn device() -> Self {
        Self { uid: None, has_leave: false, asked: Asked::default() }
    }

    /// Somebody who knows it gives it leave.
    pub(crate) fn with_leave() -> Self {
        Self { has_leave: true, ..Self::device() }
    }

    pub(crate) fn on_request(&self) {
        if !self.asked.initialized() {
            // Another request may have been first.
            drop(self.asked.set(()));
        }
    }
}

/// A tokio listener.
#[derive(Debug)]
pub(crate) enum Acceptor {
    Tcp {
        listener: tokio::net::TcpListener,
        patience: Duration,
    },
    Unix {
        /// Before the listener: gone by the time at which connections are refused, so that a successor
        /// never mistakes it for one that was left behind.
        _file: Option<SocketFile>,
        listener: tokio::net::UnixListener,
        leave: Leave,
    },
}

impl Acceptor {
    /// Must be called in a runtime. A TCP connection whose peer is there and takes nothing is kept for `patience`.
    pub(crate) fn new(listener: Listener, leave: Leave, patience: Duration) -> io::Result<Self> {
        match listener {
            Listener::Tcp(listener) => {
                tokio::net::TcpListener::from_std(listener).map(|listener| Self::Tcp { listener, patience })
            }
            Listener::Unix(file, listener) => tokio::net::UnixListener::from_std(listener)
                .map(|listener| Self::Unix { _file: file, listener, leave }),
        }
    }

    /// # Cancel safety
    /// Cancel safe: a connection that was not returned stays in the kernel's queue.
    pub(crate) async fn accept(&self) -> io::Result<Accepted> {
        match self {
            Self::Tcp { listener, patience } => {
                let (stream, _) = listener.accept().await?;
                // Notices and acks are small, and each is waited for.
                stream.set_nodelay(true)?;
                find_vanished(&stream, *patience)?;
                let socket = AcceptedSocket::Tcp(stream.into_std()?);
                Ok(Accepted { socket, peer: Peer::device(), place: None })
            }
            Self::Unix { listener, leave, .. } => {
                let (stream, _) = listener.accept().await?;
                let uid = stream.peer_cred()?.uid();
                let has_leave = leave.uids.contains(&uid);
                let peer = Peer { uid: Some(uid), has_leave, asked: Asked::default() };
                Ok(Accepted { socket: AcceptedSocket::Unix(stream.into_std()?), peer, place: None })
            }
        }
    }
}

/// How long a TCP connection may be silent before the kernel asks whether the peer is still there, and how often it
/// asks. A peer that vanished without a word is found within the sum.
const TCP_IDLE: Duration = Duration::from_secs(10);
const TCP_PROBE: Duration = Duration::from_secs(2);
const TCP_PROBES: u32 = 3;

/// Something that is sent may be unacknowledged for as long as the sum, too; or for `patience`, if that is longer: to the
/// kernel (`tcp_probe_timer`) a peer that reads nothing and has no room left is the same as one that is gone, and how
/// slow a device may be its session says. The keepalive's last word comes no sooner, either.
fn find_vanished(stream: &tokio::net::TcpStream, patience: Duration) -> io::Result<()> {
    use rustix::net::sockopt;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, TCP_IDLE)?;
    sockopt::set_tcp_keepintvl(stream, TCP_PROBE)?;
    sockopt::set_tcp_keepcnt(stream, TCP_PROBES)?;
    let unacknowledged = (TCP_IDLE + TCP_PROBE * TCP_PROBES).max(patience);
    sockopt::set_tcp_user_timeout(stream, longest_that_fits(unacknowledged))?;
    Ok(())
}

/// In milliseconds. The kernel takes it for a signed number (`tcp_sock_set_user_timeout`), 24 days at most.
fn longest_that_fits(unacknowledged: Duration) -> u32 {
    u32::try_from(unacknowledged.as_millis()).unwrap_or(u32::MAX).min(i32::MAX.unsigned_abs())
}

/// A connection on a shard.
#[derive(Debug)]
pub(crate) struct Connection {
    socket: Socket,
    peer: Peer,
    tenancy: Option<Tenancy>,
}

#[derive(Debug)]
enum Socket {
    Tcp(tokio::net::TcpStream),
    Unix(tokio::net::UnixStream),
}

impl Connection {
    /// Ties an accepted connection to the runtime that this is called in.
    pub(crate) fn adopt(accepted: Accepted) -> io::Result<Self> {
        let Accepted { socket, peer, place } = accepted;
        let socket = match socket {
            AcceptedSocket::Tcp(stream) => Socket::Tcp(tokio::net::TcpStream::from_std(stream)?),
            AcceptedSocket::Unix(stream) => Socket::Unix(tokio::net::UnixStream::from_std(stream)?),
        };
        let tenancy = place.map(|place| Tenancy::begin(place, Arc::clone(&peer.asked)));
        Ok(Self { socket, peer, tenancy })
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

/// # Errors
/// PERMISSION_DENIED unless the caller's credentials give it leave.
pub(crate) fn require_leave<T>(request: &Request<T>) -> Result<(), Status> {
    let peer = request.extensions().get::<Peer>();
    if peer.is_some_and(|peer| peer.has_leave) {
        return Ok(());
    }
    let uid = peer.and_then(|peer| peer.uid).map_or("unknown".to_owned(), |uid| uid.to_string());
    let message = format!("user {uid} has no leave here; add it with --allow-uid");
    Err(status(Reason::PermissionDenied, message, &[("uid", uid)]))
}

macro_rules! forward {
    ($self:ident, $cx:ident, $stream:ident => $call:expr) => {{
        let this = $self.get_mut();
        if let Some(tenancy) = &mut this.tenancy {
            tenancy.poll($cx)?;
        }
        match &mut this.socket {
            Socket::Tcp($stream) => $call,
            Socket::Unix($stream) => $call,
        }
    }};
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        forward!(self, cx, stream => Pin::new(stream).poll_read(cx, buf))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        forward!(self, cx, stream => Pin::new(stream).poll_write(cx, buf))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        forward!(self, cx, stream => Pin::new(stream).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        forward!(self, cx, stream => Pin::new(stream).poll_shutdown(cx))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        forward!(self, cx, stream => Pin::new(stream).poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_in_each_form_and_told_in_one() {
        let parsed = |text: &str| text.parse::<ListenAddr>().map(|address| address.to_string());
        assert_eq!(parsed("127.0.0.1:7400"), Ok("tcp://127.0.0.1:7400".to_owned()));
        assert_eq!(parsed("tcp://[::1]:7400"), Ok("tcp://[::1]:7400".to_owned()));
        assert_eq!(parsed("unix:/run/s.sock"), Ok("unix:/run/s.sock".to_owned()));
        assert_eq!(parsed("unix:///run/s.sock"), Ok("unix:/run/s.sock".to_owned()));
        assert!(parsed("unix:relative.sock").is_err());
        assert_eq!(parsed("fd://device"), Ok("fd://device".to_owned()));
        assert!(parsed("fd://").is_err());
        assert!(parsed("localhost").is_err());
    }

    /// Nothing is sent to a device that has nothing to hear, so without this nobody would ask whether it is there.
    #[tokio::test]
    async fn the_kernel_asks_a_silent_tcp_peer_whether_it_is_there_and_gives_up_one_that_is_not() {
        use rustix::net::sockopt;
        // With a lease that is over before the kernel's first question, and with one that is not for long.
        for (patience, given_up) in [(6, 16_000), (61, 61_000), (30 * 86_400, 2_147_483_647)] {
            let bound =
                Listener::bind(&"127.0.0.1:0".parse().unwrap(), false, Takeover::Never).unwrap().remove(0);
            let ListenAddr::Tcp(address) = bound.address().unwrap() else { panic!("it is TCP") };
            let patience = Duration::from_secs(patience);
            let acceptor = Acceptor::new(bound, Leave { uids: [].into() }, patience).unwrap();
            let _peer = TcpStream::connect(address).unwrap();
            let connection = Connection::adopt(acceptor.accept().await.unwrap()).unwrap();
            let Socket::Tcp(stream) = &connection.socket else { panic!("it is TCP") };
            assert!(stream.nodelay().unwrap() && sockopt::socket_keepalive(stream).unwrap());
            let idle = sockopt::tcp_keepidle(stream).unwrap();
            let asked = sockopt::tcp_keepintvl(stream).unwrap() * sockopt::tcp_keepcnt(stream).unwrap();
            // The bound of docs/faults.md, whether there is something to send or not.
            assert_eq!(idle + asked, Duration::from_secs(16));
            assert_eq!(sockopt::tcp_user_timeout(stream).unwrap(), given_up);
        }
    }

    #[test]
    fn a_socket_file_that_nobody_listens_on_is_replaced_and_a_live_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let address = ListenAddr::Unix(folder.path().join("s.sock"));
        drop(Listener::bind(&address, true, Takeover::Never).unwrap());
        let live = Listener::bind(&address, true, Takeover::Never).expect("the stale file is replaced");
        let refused = Listener::bind(&address, true, Takeover::Never).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::AddrInUse);
        drop(live);
    }

    #[test]
    fn a_file_that_is_no_socket_is_never_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notes.txt");
        std::fs::write(&path, "precious").unwrap();
        let refused = Listener::bind(&ListenAddr::Unix(path.clone()), false, Takeover::Never).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::AddrInUse);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
        // Nor is a file that took the place of the socket.
        std::fs::remove_file(&path).unwrap();
        let listener = Listener::bind(&ListenAddr::Unix(path.clone()), false, Takeover::Never).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "precious").unwrap();
        drop(listener);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    }
}
