//! A stream socket of either family, in two halves.

use super::address::Address;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::{TcpStream, UnixStream, tcp, unix};

/// Asked of the kernel for unix sockets, which do not grow by themselves: a few large requests in one
/// system call. The kernel gives what net.core.wmem_max allows.
const UNIX_BUFFER: usize = 1 << 20;
/// A peer whose machine is gone is noticed although nothing is sent to it.
const KEEPALIVE: Duration = Duration::from_secs(10);

/// The half that reads.
#[derive(Debug)]
pub(super) enum ReadHalf {
    Tcp(tcp::OwnedReadHalf),
    Unix(unix::OwnedReadHalf),
}

/// The half that writes.
#[derive(Debug)]
pub(super) enum WriteHalf {
    Tcp(tcp::OwnedWriteHalf),
    Unix(unix::OwnedWriteHalf),
}

/// Splits a TCP connection. Small messages must not wait for each other (Nagle).
pub(super) fn split_tcp(stream: TcpStream) -> (ReadHalf, WriteHalf) {
    // Options that the kernel refuses cost speed, not correctness.
    let _ = stream.set_nodelay(true);
    let keepalive = socket2::TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE / 2);
    let _ = socket2::SockRef::from(&stream).set_tcp_keepalive(&keepalive);
    let (r, w) = stream.into_split();
    (ReadHalf::Tcp(r), WriteHalf::Tcp(w))
}

/// Splits a unix connection.
pub(super) fn split_unix(stream: UnixStream) -> (ReadHalf, WriteHalf) {
    let _ = socket2::SockRef::from(&stream).set_send_buffer_size(UNIX_BUFFER);
    let (r, w) = stream.into_split();
    (ReadHalf::Unix(r), WriteHalf::Unix(w))
}

/// Connects.
pub(super) async fn connect(address: &Address) -> io::Result<(ReadHalf, WriteHalf)> {
    match address {
        Address::Tcp(text) => Ok(split_tcp(TcpStream::connect(text.as_str()).await?)),
        Address::Unix(path) => Ok(split_unix(UnixStream::connect(path).await?)),
    }
}

impl ReadHalf {
    /// Ready when a read would tell something. Registers the waker, and touches no buffer.
    pub fn poll_read_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            ReadHalf::Tcp(s) => s.as_ref().poll_read_ready(cx),
            ReadHalf::Unix(s) => s.as_ref().poll_read_ready(cx),
        }
    }
}

impl AsyncRead for ReadHalf {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            ReadHalf::Tcp(s) => Pin::new(s).poll_read(cx, buf),
            ReadHalf::Unix(s) => Pin::new(s).poll_read(cx, buf),
        }
    }
}

impl WriteHalf {
    pub fn try_write_vectored(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            WriteHalf::Tcp(s) => s.try_write_vectored(slices),
            WriteHalf::Unix(s) => s.try_write_vectored(slices),
        }
    }

    pub async fn writable(&self) -> io::Result<()> {
        match self {
            WriteHalf::Tcp(s) => s.writable().await,
            WriteHalf::Unix(s) => s.writable().await,
        }
    }

    /// Ends the connection in the given directions; whoever waits for it on this side is woken.
    pub fn shutdown(&self, how: std::net::Shutdown) {
        let _ = match self {
            WriteHalf::Tcp(s) => socket2::SockRef::from(s.as_ref()).shutdown(how),
            WriteHalf::Unix(s) => socket2::SockRef::from(s.as_ref()).shutdown(how),
        };
    }
}
