//! The 32 bytes in front of every frame. Their layout never changes, in no version: two programs
//! that share no version can still tell each other so.

use crate::WireError;
use stdx::checksum::{crc32c, crc32c_append};
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Length of a header in bytes.
pub const HEADER_LENGTH: usize = 32;
/// First bytes of every frame.
pub const MAGIC: [u8; 4] = *b"PETL";

/// What a frame is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Kind {
    /// First frame in each direction.
    Hello = 1,
    /// The sender will not go on; it closes the connection behind this.
    Reject = 2,
    /// A `petal::message::Message`.
    Message = 3,
}

/// A header as it travels. Little-endian.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    /// `PETL`.
    magic: [u8; 4],
    /// Hello and reject: highest version of the sender. Message: the agreed version.
    version: U16,
    /// [`Kind`].
    kind: u8,
    /// Zero.
    flags: u8,
    /// Bytes of body behind the header.
    body_length: U32,
    /// Bytes of payload behind the body.
    payload_length: U32,
    /// Zero.
    reserved: [u8; 12],
    /// CRC-32C of the 28 bytes before and the body. The payload has checksums of its own in the body.
    crc: U32,
}

const CRC_OFFSET: usize = HEADER_LENGTH - 4;

/// A header that was looked at: magic, kind and reserved bits are right. Lengths are claims.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// See the layout.
    pub version: u16,
    /// What follows.
    pub kind: Kind,
    /// Bytes of body.
    pub body_length: usize,
    /// Bytes of payload.
    pub payload_length: usize,
    crc: u32,
}

impl Header {
    /// Reads the first 32 bytes. The checksum is not looked at: that needs the body.
    pub fn parse(bytes: &[u8; HEADER_LENGTH]) -> Result<Header, WireError> {
        let raw = Raw::ref_from_bytes(bytes).expect("32 bytes are 32 bytes");
        if raw.magic != MAGIC {
            return Err(WireError::NotPetal(raw.magic));
        }
        let kind = match raw.kind {
            1 => Kind::Hello,
            2 => Kind::Reject,
            3 => Kind::Message,
            other => return Err(WireError::UnknownKind(other)),
        };
        // A hello of a later version may use them; it must still be understood as a hello.
        if kind == Kind::Message && (raw.flags != 0 || raw.reserved != [0; 12]) {
            return Err(WireError::ReservedBits);
        }
        Ok(Header {
            version: raw.version.get(),
            kind,
            body_length: raw.body_length.get() as usize,
            payload_length: raw.payload_length.get() as usize,
            crc: raw.crc.get(),
        })
    }

    /// Compares the checksum with `frame`, which begins with this header and has the whole body.
    pub fn check(&self, frame: &[u8]) -> Result<(), WireError> {
        let found = frame_crc(&frame[..HEADER_LENGTH + self.body_length]);
        if found == self.crc { Ok(()) } else { Err(WireError::Checksum { expected: self.crc, found }) }
    }
}

/// Fills in the header in front of `frame`, whose first 32 bytes are free and whose rest is the body.
pub fn seal(frame: &mut [u8], version: u16, kind: Kind, payload_length: u32) {
    let body_length = u32::try_from(frame.len() - HEADER_LENGTH).expect("bounded by the caller");
    let raw = Raw {
        magic: MAGIC,
        version: version.into(),
        kind: kind as u8,
        flags: 0,
        body_length: body_length.into(),
        payload_length: payload_length.into(),
        reserved: [0; 12],
        crc: 0.into(),
    };
    frame[..HEADER_LENGTH].copy_from_slice(raw.as_bytes());
    let crc = frame_crc(frame);
    frame[CRC_OFFSET..HEADER_LENGTH].copy_from_slice(&crc.to_le_bytes());
}

fn frame_crc(frame: &[u8]) -> u32 {
    crc32c_append(crc32c(&frame[..CRC_OFFSET]), &frame[HEADER_LENGTH..])
}
