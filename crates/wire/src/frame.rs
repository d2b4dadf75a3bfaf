//! Frames into a buffer, and out of one.
//!
//! ```text
//!   0        32                32 + body_length
//!   +--------+-----------------+-----------------------------+
//!   | header | body (postcard) | payload (bulk data as it is)|
//!   +--------+-----------------+-----------------------------+
//! ```
//!
//! Encoding appends header and body to a buffer and leaves the payload's pieces where they are, for
//! a vectored write. Decoding takes complete frames from the front of a buffer; a payload becomes a
//! slice of that buffer, so that nothing is copied between socket and disk.

use crate::header::{HEADER_LENGTH, Header, Kind, seal};
use crate::hello::{self, Hello, Reject, SENTENCE_MAX};
use crate::{VERSION, WireError, validate};
use bytes::{Buf, BufMut, BytesMut};
use petal::ids::ELEMENT_SIZE;
use petal::limits::{FRAME_BODY_MAX, FRAME_PAYLOAD_MAX};
use petal::message::{Message, Payload};
use postcard::ser_flavors::Flavor;

/// Longest body of a message from a client: names, addresses, and one checksum per block.
pub const CLIENT_BODY_MAX: usize = 64 << 10;
/// Longest body before the hello: a hello, or a reject with its sentence, of any version.
pub const GREETING_BODY_MAX: usize = 4096;
const _: () = assert!(SENTENCE_MAX + 4 <= GREETING_BODY_MAX);

/// What the peer may send now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of body.
    pub body: usize,
    /// Bytes of payload.
    pub payload: usize,
    /// The version agreed on; `None` before the hello.
    pub version: Option<u16>,
}

impl Limits {
    /// Before the hello.
    pub const GREETING: Limits = Limits { body: GREETING_BODY_MAX, payload: 0, version: None };

    /// From a client: requests, each of one element.
    pub const fn from_client(version: u16) -> Limits {
        Limits { body: CLIENT_BODY_MAX, payload: ELEMENT_SIZE as usize, version: Some(version) }
    }

    /// From a server.
    pub const fn from_server(version: u16) -> Limits {
        Limits { body: FRAME_BODY_MAX, payload: FRAME_PAYLOAD_MAX, version: Some(version) }
    }
}

/// A frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// The first in each direction.
    Hello(Hello),
    /// The last, perhaps.
    Reject(Reject),
    /// Everything else.
    Message(Message),
}

/// What the front of a buffer holds.
// A frame on the heap would cost an allocation per message; `Decoded` itself is never kept.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decoded {
    /// A frame, which has been taken out.
    Frame(Frame),
    /// A part of one. The buffer must hold at least this many bytes before it is worth asking again:
    /// a claim within the limits; make room as bytes really come.
    Need(usize),
}

/// Takes one frame from the front of `buffer`.
pub fn decode(buffer: &mut BytesMut, limits: &Limits) -> Result<Decoded, WireError> {
    let Some(first) = buffer.first_chunk::<HEADER_LENGTH>() else {
        return short_of_header(buffer);
    };
    let header = Header::parse(first)?;
    check_limits(&header, limits)?;
    let body_end = HEADER_LENGTH + header.body_length;
    let frame_end = body_end + header.payload_length;
    if buffer.len() < frame_end {
        return Ok(Decoded::Need(frame_end));
    }
    header.check(buffer)?;
    let body = &buffer[HEADER_LENGTH..body_end];
    let frame = match header.kind {
        Kind::Hello => Frame::Hello(hello::read_hello(body)?),
        Kind::Reject => Frame::Reject(hello::read_reject(body)?),
        Kind::Message => Frame::Message(read_message(body)?),
    };
    buffer.advance(body_end);
    let payload = if header.payload_length == 0 {
        Payload::default()
    } else {
        Payload(vec![buffer.split_to(header.payload_length).freeze()])
    };
    attach_payload(frame, payload).map(Decoded::Frame)
}

/// A peer that speaks something else is told so at once, not when it has sent 32 bytes.
fn short_of_header(buffer: &BytesMut) -> Result<Decoded, WireError> {
    match buffer.first_chunk::<4>() {
        Some(magic) if *magic != crate::header::MAGIC => Err(WireError::NotPetal(*magic)),
        _ => Ok(Decoded::Need(HEADER_LENGTH)),
    }
}

fn check_limits(header: &Header, limits: &Limits) -> Result<(), WireError> {
    let (body, payload) = match (header.kind, limits.version) {
        (Kind::Message, None) => return Err(WireError::MessageBeforeHello),
        (Kind::Hello, Some(_)) => return Err(WireError::SecondHello),
        (Kind::Message, Some(agreed)) if header.version != agreed => {
            return Err(WireError::Version { theirs: header.version, agreed });
        }
        (Kind::Message, Some(_)) => (limits.body, limits.payload),
        (Kind::Hello | Kind::Reject, _) => (GREETING_BODY_MAX, 0),
    };
    if header.body_length > body {
        return Err(WireError::BodyTooLong { length: header.body_length, limit: body });
    }
    if header.payload_length > payload {
        return Err(WireError::PayloadTooLong { length: header.payload_length, limit: payload });
    }
    Ok(())
}

fn read_message(body: &[u8]) -> Result<Message, WireError> {
    // postcard grows a list as its members come (serde caps what it believes of a claimed length), so
    // memory stays within a small multiple of the body.
    let (message, rest) = postcard::take_from_bytes::<Message>(body).map_err(WireError::Body)?;
    if rest.is_empty() { Ok(message) } else { Err(WireError::TrailingBytes(rest.len())) }
}

fn attach_payload(frame: Frame, payload: Payload) -> Result<Frame, WireError> {
    let Frame::Message(mut message) = frame else {
        return Ok(frame);
    };
    match message.body.payload_mut() {
        Some(place) => *place = payload,
        None if payload.is_empty() => {}
        None => return Err(WireError::UnexpectedPayload(validate::name(&message.body))),
    }
    validate::validate(&message)?;
    Ok(Frame::Message(message))
}

/// Appends header and body of `message` to `out` and returns the length of its payload, whose pieces
/// the caller sends behind it. An error leaves `out` as it was: the message is too long to be sent.
pub fn encode(message: &Message, version: u16, out: &mut BytesMut) -> Result<usize, WireError> {
    debug_assert_eq!(validate::validate(message), Ok(()), "a core sends what a core would refuse: {message:?}");
    let start = out.len();
    out.put_bytes(0, HEADER_LENGTH);
    let written = postcard::serialize_with_flavor(message, Appending(out));
    let body = out.len() - start - HEADER_LENGTH;
    let payload = message.body.payload().map_or(0, Payload::len);
    let result = match written {
        Err(e) => Err(WireError::Body(e)),
        Ok(()) if body > FRAME_BODY_MAX => Err(WireError::BodyTooLong { length: body, limit: FRAME_BODY_MAX }),
        Ok(()) if payload > FRAME_PAYLOAD_MAX => {
            Err(WireError::PayloadTooLong { length: payload, limit: FRAME_PAYLOAD_MAX })
        }
        Ok(()) => Ok(payload),
    };
    match result {
        Ok(payload) => seal(&mut out[start..], version, Kind::Message, payload as u32),
        Err(_) => out.truncate(start),
    }
    result
}

/// Appends a hello.
pub fn encode_hello(hello: &Hello, out: &mut BytesMut) {
    let start = out.len();
    out.put_bytes(0, HEADER_LENGTH);
    out.put_slice(&hello::write_hello(hello));
    seal(&mut out[start..], hello.version_max, Kind::Hello, 0);
}

/// Appends a reject.
pub fn encode_reject(reject: &Reject, out: &mut BytesMut) {
    let start = out.len();
    out.put_bytes(0, HEADER_LENGTH);
    hello::write_reject(reject, out);
    seal(&mut out[start..], VERSION, Kind::Reject, 0);
}

/// postcard's output goes straight behind what the buffer already holds.
struct Appending<'a>(&'a mut BytesMut);

impl Flavor for Appending<'_> {
    type Output = ();
    fn try_extend(&mut self, data: &[u8]) -> postcard::Result<()> {
        self.0.put_slice(data);
        Ok(())
    }
    fn try_push(&mut self, data: u8) -> postcard::Result<()> {
        self.0.put_u8(data);
        Ok(())
    }
    fn finalize(self) -> postcard::Result<()> {
        Ok(())
    }
}
