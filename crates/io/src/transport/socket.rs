//! A stream socket of either family.
//!
//! Why not tokio's own streams: they ask the kernel to tell of room to write as well as of bytes to
//! read, always. Each time the peer reads something there is room, so every message would wake its
//! sender once more, for nothing. Here a socket asks for bytes to read; only a writer that found no
//! room asks for room, for as long as it waits.

use super::address::Address;
use bytes::BytesMut;
use rustix::net::{SendAncillaryBuffer, SendFlags};
use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};
use tokio::net::{TcpStream, UnixStream};

pub(super) use rustix::net::Shutdown;

/// Asked of the kernel for unix sockets, which do not grow by themselves: a few large requests in one
/// system call. The kernel gives what net.core.wmem_max allows.
const UNIX_BUFFER: usize = 1 << 20;
/// A peer whose machine is gone is noticed although nothing is sent to it.
const KEEPALIVE: Duration = Duration::from_secs(10);

/// A connected stream socket, not blocking.
#[derive(Debug)]
pub(super) struct Socket {
    fd: AsyncFd<OwnedFd>,
}

/// Says that a socket may be read, until it was read empty.
pub(super) type Readable<'a> = AsyncFdReadyGuard<'a, OwnedFd>;

impl Socket {
    /// Small messages must not wait for each other (Nagle). Options that the kernel refuses cost speed,
    /// not correctness.
    pub fn from_tcp(stream: TcpStream) -> io::Result<Socket> {
        let _ = stream.set_nodelay(true);
        let keepalive = socket2::TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE / 2);
        let _ = socket2::SockRef::from(&stream).set_tcp_keepalive(&keepalive);
        Ok(Socket { fd: watch(stream.into_std()?.into(), Interest::READABLE)? })
    }

    pub fn from_unix(stream: UnixStream) -> io::Result<Socket> {
        let _ = socket2::SockRef::from(&stream).set_send_buffer_size(UNIX_BUFFER);
        Ok(Socket { fd: watch(stream.into_std()?.into(), Interest::READABLE)? })
    }

    pub async fn connect(address: &Address) -> io::Result<Socket> {
        match address {
            Address::Tcp(text) => Socket::from_tcp(TcpStream::connect(text.as_str()).await?),
            Address::Unix(path) => Socket::from_unix(UnixStream::connect(path).await?),
        }
    }

    /// Ready when a read would tell something. Touches no buffer.
    pub fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<Readable<'_>>> {
        self.fd.poll_read_ready(cx)
    }

    /// Reads once into the free room of `buffer`, of which there is some. `None`: nothing was there.
    #[allow(unsafe_code)]
    pub fn read(&self, mut readable: Readable<'_>, buffer: &mut BytesMut) -> io::Result<Option<usize>> {
        let room = buffer.spare_capacity_mut();
        let asked = room.len();
        match rustix::io::read(self.fd.get_ref(), room) {
            Ok((filled, _)) => {
                let n = filled.len();
                // A short read has emptied the socket: no need for another one to hear so.
                if n < asked {
                    readable.clear_ready();
                }
                // SAFETY: `read` has initialised the first `n` bytes behind the buffer's length.
                unsafe { buffer.set_len(buffer.len() + n) };
                Ok(Some(n))
            }
            Err(rustix::io::Errno::AGAIN) => {
                readable.clear_ready();
                Ok(None)
            }
            Err(rustix::io::Errno::INTR) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// Waits for bytes and reads them; 0 = the other side will send no more.
    pub async fn read_buf(&self, buffer: &mut BytesMut) -> io::Result<usize> {
        std::future::poll_fn(|cx| {
            loop {
                let readable = ready!(self.poll_readable(cx))?;
                if let Some(n) = self.read(readable, buffer)? {
                    return Poll::Ready(Ok(n));
                }
            }
        })
        .await
    }

    /// Writes what the socket takes at once; `WouldBlock` if that is nothing.
    pub fn try_write(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        Ok(rustix::net::sendmsg(self.fd.get_ref(), slices, &mut SendAncillaryBuffer::default(), flags)?)
    }

    /// Something to wait with for room. Exists while a writer waits: see the head of the file.
    pub fn room(&self) -> io::Result<Room> {
        let second = rustix::io::fcntl_dupfd_cloexec(self.fd.get_ref(), 0)?;
        Ok(Room(watch(second, Interest::WRITABLE)?))
    }

    /// Ends the connection in the given directions; whoever waits for it on this side is woken.
    pub fn shutdown(&self, how: Shutdown) {
        let _ = rustix::net::shutdown(self.fd.get_ref(), how);
    }
}

/// Waits for room to write.
#[derive(Debug)]
pub(super) struct Room(AsyncFd<OwnedFd>);

impl Room {
    /// Waits until `write` does not find the socket full.
    pub async fn write<T>(&self, mut write: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        loop {
            let mut room = self.0.writable().await?;
            match write() {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => room.clear_ready(),
                done => return done,
            }
        }
    }
}

#[allow(unsafe_code)]
fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the `AsyncFd` owns the descriptor, which nothing here takes out or closes before it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}
