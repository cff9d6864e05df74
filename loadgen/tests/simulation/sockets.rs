//! What the host agent's process has open: its kernel closes it in order when it is killed. The runtime, when it
//! is dropped, would do so in an order that depends on what else this test does.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use turmoil::net::TcpStream;

use crate::process::Standstill;

/// Every socket of a process, in the order in which it was opened.
#[derive(Debug)]
pub struct Sockets {
    open: Mutex<Vec<Arc<Mutex<Option<TcpStream>>>>>,
    standstill: Arc<Standstill>,
}

/// One of them. Dropped, it is closed.
pub struct Socket {
    stream: Arc<Mutex<Option<TcpStream>>>,
    standstill: Arc<Standstill>,
}

impl Sockets {
    pub fn new(standstill: Arc<Standstill>) -> Self {
        Self { open: Mutex::default(), standstill }
    }

    pub fn add(&self, stream: TcpStream) -> Socket {
        let stream = Arc::new(Mutex::new(Some(stream)));
        self.open.lock().push(Arc::clone(&stream));
        Socket { stream, standstill: Arc::clone(&self.standstill) }
    }

    /// The process ends.
    pub fn close_all(&self) {
        for socket in self.open.lock().drain(..) {
            drop(socket.lock().take());
        }
    }
}

impl Socket {
    fn with<T>(
        &self,
        cx: &mut Context<'_>,
        act: impl FnOnce(Pin<&mut TcpStream>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        std::task::ready!(self.standstill.poll(cx));
        let act = |stream| act(stream, cx);
        match &mut *self.stream.lock() {
            Some(stream) => act(Pin::new(stream)),
            None => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        drop(self.stream.lock().take());
    }
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.with(cx, |stream, cx| stream.poll_read(cx, buf))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.with(cx, |stream, cx| stream.poll_write(cx, buf))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(cx, |stream, cx| stream.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(cx, |stream, cx| stream.poll_shutdown(cx))
    }
}
