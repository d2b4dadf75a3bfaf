//! The hello in each direction. The dialler speaks first.

use super::connection::Greeted;
use super::socket::{Shutdown, Socket};
use super::{PeerInfo, Shared};
use bytes::{Buf, BytesMut};
use petal::ids::ServerId;
use petal_wire::{
    Decoded, Frame, Hello, Limits, Reject, RejectCode, WireError, check_hello, decode, encode_hello, encode_reject,
};
use std::future::Future;
use std::io::{self, IoSlice};
use std::time::Duration;

/// How long a rejected peer may take to read why.
const FAREWELL: Duration = Duration::from_millis(500);

/// Why there was no connection.
#[derive(Debug)]
pub(super) enum GreetError {
    Io(io::Error),
    /// Nothing came in time.
    Timeout,
    Wire(WireError),
    /// The other side would not.
    Rejected(Reject),
    /// We would not.
    Refused(Reject),
}

impl From<io::Error> for GreetError {
    fn from(e: io::Error) -> Self {
        GreetError::Io(e)
    }
}

impl Shared {
    /// As the dialler.
    pub async fn greet_as_dialler(
        &self,
        socket: Socket,
        address: String,
        key: ServerId,
        strict: bool,
    ) -> Result<Greeted, GreetError> {
        let ours = Hello { expects: strict.then_some(key), ..self.hello };
        let mut bytes = BytesMut::new();
        encode_hello(&ours, &mut bytes);
        let mut buffer = BytesMut::new();
        let theirs = self
            .in_time(async {
                write_all(&socket, bytes).await?;
                read_hello(&socket, &mut buffer).await
            })
            .await?;
        let version = match check_hello(&ours, &theirs).and_then(|v| self.may_enter(theirs.role).map(|()| v)) {
            Ok(version) => version,
            Err(reject) => {
                farewell(&socket, &reject).await;
                return Err(GreetError::Refused(reject));
            }
        };
        let peer = PeerInfo { hello: theirs, version, address, dialled: Some(key) };
        Ok(Greeted { peer, socket, buffer })
    }

    /// As the one who was called.
    pub async fn greet_as_listener(&self, socket: Socket, address: String) -> Result<Greeted, GreetError> {
        let mut buffer = BytesMut::new();
        let checked = match self.in_time(read_hello(&socket, &mut buffer)).await {
            Ok(theirs) => check_hello(&self.hello, &theirs)
                .and_then(|version| self.may_enter(theirs.role).map(|()| (theirs, version))),
            Err(GreetError::Wire(error)) => Err(Reject::new(RejectCode::Malformed, error.to_string())),
            Err(GreetError::Timeout) => Err(Reject::new(RejectCode::TooSlow, "no hello came in time".to_string())),
            Err(other) => return Err(other),
        };
        let (theirs, version) = match checked {
            Ok(both) => both,
            Err(reject) => {
                farewell(&socket, &reject).await;
                return Err(GreetError::Refused(reject));
            }
        };
        let mut bytes = BytesMut::new();
        encode_hello(&self.hello, &mut bytes);
        self.in_time(async { Ok(write_all(&socket, bytes).await?) }).await?;
        // Others may have come in while this one's hello was on its way.
        self.may_enter(theirs.role).map_err(GreetError::Refused)?;
        let peer = PeerInfo { hello: theirs, version, address, dialled: None };
        Ok(Greeted { peer, socket, buffer })
    }

    async fn in_time<T>(&self, f: impl Future<Output = Result<T, GreetError>>) -> Result<T, GreetError> {
        tokio::time::timeout(self.bounds.hello_timeout, f).await.unwrap_or(Err(GreetError::Timeout))
    }
}

async fn read_hello(socket: &Socket, buffer: &mut BytesMut) -> Result<Hello, GreetError> {
    loop {
        match decode(buffer, &Limits::GREETING).map_err(GreetError::Wire)? {
            Decoded::Frame(Frame::Hello(hello)) => return Ok(hello),
            Decoded::Frame(Frame::Reject(reject)) => return Err(GreetError::Rejected(reject)),
            Decoded::Frame(Frame::Message(_)) => return Err(GreetError::Wire(WireError::MessageBeforeHello)),
            Decoded::Need(_) => {
                buffer.reserve(256);
                if socket.read_buf(buffer).await? == 0 {
                    return Err(GreetError::Io(io::ErrorKind::UnexpectedEof.into()));
                }
            }
        }
    }
}

async fn write_all(socket: &Socket, mut bytes: BytesMut) -> io::Result<()> {
    while !bytes.is_empty() {
        let write = || socket.try_write(&[IoSlice::new(&bytes)]);
        let n = match write() {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => socket.room()?.write(write).await?,
            other => other?,
        };
        bytes.advance(n);
    }
    Ok(())
}

/// Says why, and lets the peer read it: a socket that is closed with unread bytes in it is reset, and
/// what it had sent is lost.
async fn farewell(socket: &Socket, reject: &Reject) {
    let mut bytes = BytesMut::new();
    encode_reject(reject, &mut bytes);
    let said = async {
        write_all(socket, bytes).await?;
        socket.shutdown(Shutdown::Write);
        let mut rest = BytesMut::with_capacity(1024);
        while socket.read_buf(&mut rest).await? > 0 {
            rest.clear();
        }
        Ok::<(), io::Error>(())
    };
    // Whether it was read is the peer's affair.
    let _ = tokio::time::timeout(FAREWELL, said).await;
}
