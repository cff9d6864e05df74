//! Sockets that whoever started this process listens on, and passes: `--listen fd://NAME`, as systemd's
//! socket activation does (`sd_listen_fds(3)`). They outlive the process, so that connections which come
//! while it restarts wait in the kernel's queue.

use std::io;
use std::net::TcpListener;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;

use rustix::net::{AddressFamily, sockopt};

use crate::listen::Listener;

/// The sockets of that name, at least one. They are copies: the passed ones stay open until the process
/// ends, so a second host agent in it finds them, too.
///
/// # Errors
/// When none was passed, or one does not listen.
pub(crate) fn listeners(name: &str) -> io::Result<Vec<Listener>> {
    let mut listeners = Vec::new();
    for (fd, found) in sd_notify::listen_fds_with_names()? {
        if found == name {
            listeners.push(listener(copy(fd)?)?);
        }
    }
    if listeners.is_empty() {
        return Err(io::Error::new(
            io::ErrorKind::NotFound,
            "no socket of that name was passed; LISTEN_PID, LISTEN_FDS and LISTEN_FDNAMES say what was (FileDescriptorName= in a systemd socket unit)",
        ));
    }
    Ok(listeners)
}

/// Safe code cannot do it: a descriptor that was inherited is a number and nothing else.
#[allow(unsafe_code, reason = "the one place where a number becomes a descriptor")]
fn copy(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the descriptor is open: `listen_fds_with_names` has just set its close-on-exec flag, which
    // fails if it is not. It stays open for the length of the call: who started this process passed it for
    // this use (LISTEN_PID names this process), so nothing else here owns it, and nothing closes it.
    unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()
}

fn listener(fd: OwnedFd) -> io::Result<Listener> {
    if !sockopt::socket_acceptconn(&fd)? {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the socket that was passed does not listen",
        ));
    }
    let family = sockopt::socket_domain(&fd)?;
    if family == AddressFamily::UNIX {
        let listener = UnixListener::from(fd);
        listener.set_nonblocking(true)?;
        return Ok(Listener::Unix(None, listener));
    }
    if family == AddressFamily::INET || family == AddressFamily::INET6 {
        let listener = TcpListener::from(fd);
        listener.set_nonblocking(true)?;
        return Ok(Listener::Tcp(listener));
    }
    Err(io::Error::new(io::ErrorKind::InvalidInput, "the socket that was passed is neither TCP nor Unix"))
}
