//! What the host agent's process has open: its kernel closes it in order when it is killed. The runtime, when it
//! is dropped, would do so in an order that depends on what else this test does.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use turmoil::net::TcpStream;

/// Every socket of a process, in the order in which it was opened.
#[derive(Debug, Default)]
pub struct Sockets(Mutex<Vec<Arc<Mutex<Option<TcpStream>>>>>);

/// One of them. Dropped, it is closed.
pub struct Socket(Arc<Mutex<Option<TcpStream>>>);

impl Sockets {
    pub fn add(&self, stream: TcpStream) -> Socket {
        let stream = Arc::new(Mutex::new(Some(stream)));
        self.0.lock().push(Arc::clone(&stream));
        Socket(stream)
    }

    /// The process ends.
    pub fn close_all(&self) {
        for socket in self.0.lock().drain(..) {
            drop(socket.lock().take());
        }
    }
}

impl Socket {
    fn with<T>(&self, act: impl FnOnce(Pin<&mut TcpStream>) -> Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        match &mut *self.0.lock() {
            Some(stream) => act(Pin::new(stream)),
            None => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        drop(self.0.lock().take());
    }
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.with(|stream| stream.poll_read(cx, buf))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.with(|stream| stream.poll_write(cx, buf))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|stream| stream.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|stream| stream.poll_shutdown(cx))
    }
}
