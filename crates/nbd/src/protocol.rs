//! The protocol's numbers, and bytes to requests and back. No I/O, no state.
//!
//! Everything is big-endian. A request is a header, behind which a write carries its payload:
//!
//! ```text
//!   compact    magic:4 flags:2 type:2 cookie:8 offset:8 length:4     = 28 bytes
//!   extended   magic:4 flags:2 type:2 cookie:8 offset:8 length:8     = 32 bytes
//!
//!   simple reply      magic:4 error:4 cookie:8                               = 16 bytes [+ data read]
//!   structured chunk  magic:4 flags:2 type:2 cookie:8 length:4               = 20 bytes + payload
//!   extended chunk    magic:4 flags:2 type:2 cookie:8 offset:8 length:8      = 32 bytes + payload
//! ```

/// Largest payload of a read or write, in bytes (32 MiB, what clients assume without being told).
pub const PAYLOAD_MAX: u64 = 32 << 20;
/// Longest payload that is read and thrown away, so that the connection survives a write that is too
/// long. Beyond it, closing the connection is cheaper for both.
pub(crate) const PAYLOAD_SKIP_MAX: u64 = 64 << 20;
/// Block size that we advertise as preferred, in bytes.
pub(crate) const PREFERRED_BLOCK: u32 = 4096;
/// Longest data of an option that is looked at: 15 times the largest string. More is skipped.
pub(crate) const OPTION_DATA_MAX: u32 = 64 << 10;
/// Longest data of an option that is skipped; beyond it the connection is closed.
pub(crate) const OPTION_SKIP_MAX: u32 = 32 << 20;
/// Longest string (export names, error texts), in bytes.
pub(crate) const STRING_MAX: usize = 4096;
/// Extents in one answer: 64 KiB compact, 128 KiB extended. Clients ask on from where an answer ends.
pub(crate) const EXTENTS_MAX: usize = 8192;

pub(crate) const MAGIC_SERVER: u64 = 0x4e42_444d_4147_4943; // "NBDMAGIC"
pub(crate) const MAGIC_OPTION: u64 = 0x4948_4156_454f_5054; // "IHAVEOPT"
pub(crate) const MAGIC_OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const MAGIC_REQUEST: u32 = 0x2560_9513;
const MAGIC_REQUEST_EXTENDED: u32 = 0x21e4_1c71;
const MAGIC_SIMPLE: u32 = 0x6744_6698;
const MAGIC_STRUCTURED: u32 = 0x668e_33ef;
const MAGIC_EXTENDED: u32 = 0x6e8a_278c;

/// Handshake flags; the client's have the same bits.
pub(crate) const HANDSHAKE_FIXED_NEWSTYLE: u16 = 1 << 0;
pub(crate) const HANDSHAKE_NO_ZEROES: u16 = 1 << 1;

/// Options.
pub(crate) mod option {
    pub(crate) const EXPORT_NAME: u32 = 1;
    pub(crate) const ABORT: u32 = 2;
    pub(crate) const LIST: u32 = 3;
    pub(crate) const STARTTLS: u32 = 5;
    pub(crate) const INFO: u32 = 6;
    pub(crate) const GO: u32 = 7;
    pub(crate) const STRUCTURED_REPLY: u32 = 8;
    pub(crate) const LIST_META_CONTEXT: u32 = 9;
    pub(crate) const SET_META_CONTEXT: u32 = 10;
    pub(crate) const EXTENDED_HEADERS: u32 = 11;
}

/// Replies to options.
pub(crate) mod rep {
    pub(crate) const ACK: u32 = 1;
    pub(crate) const SERVER: u32 = 2;
    pub(crate) const INFO: u32 = 3;
    pub(crate) const META_CONTEXT: u32 = 4;
    const ERR: u32 = 1 << 31;
    pub(crate) const ERR_UNSUP: u32 = ERR + 1;
    pub(crate) const ERR_POLICY: u32 = ERR + 2;
    pub(crate) const ERR_INVALID: u32 = ERR + 3;
    pub(crate) const ERR_PLATFORM: u32 = ERR + 4;
    pub(crate) const ERR_UNKNOWN: u32 = ERR + 6;
    pub(crate) const ERR_SHUTDOWN: u32 = ERR + 7;
    pub(crate) const ERR_TOO_BIG: u32 = ERR + 9;
    pub(crate) const ERR_EXT_HEADER_REQD: u32 = ERR + 10;
}

/// Kinds of information in INFO and GO.
pub(crate) mod info {
    pub(crate) const EXPORT: u16 = 0;
    pub(crate) const NAME: u16 = 1;
    pub(crate) const DESCRIPTION: u16 = 2;
    pub(crate) const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags.
pub(crate) mod export_flag {
    pub(crate) const HAS_FLAGS: u16 = 1 << 0;
    pub(crate) const READ_ONLY: u16 = 1 << 1;
    pub(crate) const SEND_FLUSH: u16 = 1 << 2;
    pub(crate) const SEND_FUA: u16 = 1 << 3;
    pub(crate) const SEND_TRIM: u16 = 1 << 5;
    pub(crate) const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub(crate) const SEND_DF: u16 = 1 << 7;
    pub(crate) const CAN_MULTI_CONN: u16 = 1 << 8;
    pub(crate) const SEND_CACHE: u16 = 1 << 10;
    pub(crate) const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Flags of a request.
pub(crate) mod command_flag {
    pub(crate) const FUA: u16 = 1 << 0;
    pub(crate) const NO_HOLE: u16 = 1 << 1;
    pub(crate) const DF: u16 = 1 << 2;
    pub(crate) const REQ_ONE: u16 = 1 << 3;
    pub(crate) const FAST_ZERO: u16 = 1 << 4;
    pub(crate) const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Types of chunks.
mod chunk {
    pub(super) const NONE: u16 = 0;
    pub(super) const OFFSET_DATA: u16 = 1;
    pub(super) const OFFSET_HOLE: u16 = 2;
    pub(super) const BLOCK_STATUS: u16 = 5;
    pub(super) const BLOCK_STATUS_EXT: u16 = 6;
    pub(super) const ERROR: u16 = (1 << 15) + 1;
}

/// The one metadata context that we have, and the id under which its extents come.
pub(crate) const CONTEXT_NAME: &str = "base:allocation";
pub(crate) const CONTEXT_ID: u32 = 1;
/// Status of an unallocated range: hole, and reads as zeros.
const STATUS_HOLE_ZERO: u64 = 3;

/// What was negotiated about headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Mode {
    /// Simple replies only.
    Simple,
    /// Compact requests, structured replies.
    Structured,
    /// Extended requests and replies.
    Extended,
}

impl Mode {
    /// Bytes of a request's header.
    pub(crate) fn header_length(self) -> usize {
        if self == Mode::Extended { 32 } else { 28 }
    }
}

/// The type of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Read,
    Write,
    Disconnect,
    Flush,
    Trim,
    Cache,
    WriteZeroes,
    BlockStatus,
    Unknown(u16),
}

impl Command {
    fn from_wire(n: u16) -> Command {
        match n {
            0 => Command::Read,
            1 => Command::Write,
            2 => Command::Disconnect,
            3 => Command::Flush,
            4 => Command::Trim,
            5 => Command::Cache,
            6 => Command::WriteZeroes,
            7 => Command::BlockStatus,
            other => Command::Unknown(other),
        }
    }
}

/// A request's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) command: Command,
    pub(crate) flags: u16,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

impl Request {
    /// Reads a header. `None`: the magic is wrong, and nothing behind it can be trusted.
    ///
    /// Panics if `bytes` is shorter than the mode's header.
    pub(crate) fn parse(mode: Mode, bytes: &[u8]) -> Option<Request> {
        let magic = if mode == Mode::Extended { MAGIC_REQUEST_EXTENDED } else { MAGIC_REQUEST };
        if be32(bytes, 0) != magic {
            return None;
        }
        let length = if mode == Mode::Extended { be64(bytes, 24) } else { u64::from(be32(bytes, 24)) };
        Some(Request {
            flags: be16(bytes, 4),
            command: Command::from_wire(be16(bytes, 6)),
            cookie: be64(bytes, 8),
            offset: be64(bytes, 16),
            length,
        })
    }

    /// True if `flag` is set.
    pub(crate) fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// Bytes that follow the header, whether they make sense or not.
    pub(crate) fn payload_length(&self, mode: Mode) -> u64 {
        let counts_payload = mode == Mode::Extended && self.has(command_flag::PAYLOAD_LEN);
        if self.command == Command::Write || counts_payload { self.length } else { 0 }
    }

    /// Bytes of memory that the request holds until its reply is sent.
    pub(crate) fn cost(&self) -> u64 {
        match self.command {
            Command::Read | Command::Write => self.length,
            _ => 0,
        }
    }
}

/// `u16` at `at`.
pub(crate) fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

/// `u32` at `at`.
pub(crate) fn be32(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_be_bytes(word)
}

/// `u64` at `at`.
pub(crate) fn be64(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_be_bytes(word)
}

/// A simple reply's header; `error` 0 is success.
pub(crate) fn simple_header(cookie: u64, error: u32) -> [u8; 16] {
    let mut h = [0; 16];
    h[0..4].copy_from_slice(&MAGIC_SIMPLE.to_be_bytes());
    h[4..8].copy_from_slice(&error.to_be_bytes());
    h[8..16].copy_from_slice(&cookie.to_be_bytes());
    h
}

/// Writes the headers of chunks in one mode.
pub(crate) struct Chunk<'a> {
    /// Structured or extended.
    pub(crate) mode: Mode,
    /// What it answers.
    pub(crate) request: &'a Request,
    /// The last of its reply.
    pub(crate) last: bool,
}

impl Chunk<'_> {
    fn header(&self, out: &mut Vec<u8>, kind: u16, length: u64) {
        let extended = self.mode == Mode::Extended;
        let mut h = [0; 32];
        h[0..4].copy_from_slice(&if extended { MAGIC_EXTENDED } else { MAGIC_STRUCTURED }.to_be_bytes());
        h[4..6].copy_from_slice(&u16::from(self.last).to_be_bytes());
        h[6..8].copy_from_slice(&kind.to_be_bytes());
        h[8..16].copy_from_slice(&self.request.cookie.to_be_bytes());
        if extended {
            h[16..24].copy_from_slice(&self.request.offset.to_be_bytes());
            h[24..32].copy_from_slice(&length.to_be_bytes());
            out.extend_from_slice(&h);
        } else {
            h[16..20].copy_from_slice(&(length as u32).to_be_bytes());
            out.extend_from_slice(&h[..20]);
        }
    }

    /// Success, nothing to tell.
    pub(crate) fn none(&self, out: &mut Vec<u8>) {
        self.header(out, chunk::NONE, 0);
    }

    /// Header of data; `length` bytes of it must follow.
    pub(crate) fn data(&self, out: &mut Vec<u8>, offset: u64, length: u64) {
        self.header(out, chunk::OFFSET_DATA, 8 + length);
        out.extend_from_slice(&offset.to_be_bytes());
    }

    /// A range that reads as zeros.
    pub(crate) fn hole(&self, out: &mut Vec<u8>, offset: u64, length: u64) {
        self.header(out, chunk::OFFSET_HOLE, 12);
        out.extend_from_slice(&offset.to_be_bytes());
        out.extend_from_slice(&(length as u32).to_be_bytes());
    }

    /// An error, with a text for people.
    pub(crate) fn error(&self, out: &mut Vec<u8>, error: u32, text: &str) {
        let text = cut(text);
        self.header(out, chunk::ERROR, 6 + text.len() as u64);
        out.extend_from_slice(&error.to_be_bytes());
        out.extend_from_slice(&(text.len() as u16).to_be_bytes());
        out.extend_from_slice(text.as_bytes());
    }

    /// Extents of `base:allocation`, which [`tidy_extents`] has made fit.
    pub(crate) fn extents(&self, out: &mut Vec<u8>, extents: &[(u64, bool)]) {
        let status = |allocated: &bool| if *allocated { 0 } else { STATUS_HOLE_ZERO };
        if self.mode == Mode::Extended {
            self.header(out, chunk::BLOCK_STATUS_EXT, 8 + 16 * extents.len() as u64);
            out.extend_from_slice(&CONTEXT_ID.to_be_bytes());
            out.extend_from_slice(&(extents.len() as u32).to_be_bytes());
            for (length, allocated) in extents {
                out.extend_from_slice(&length.to_be_bytes());
                out.extend_from_slice(&status(allocated).to_be_bytes());
            }
        } else {
            self.header(out, chunk::BLOCK_STATUS, 4 + 8 * extents.len() as u64);
            out.extend_from_slice(&CONTEXT_ID.to_be_bytes());
            for (length, allocated) in extents {
                out.extend_from_slice(&(*length as u32).to_be_bytes());
                out.extend_from_slice(&(status(allocated) as u32).to_be_bytes());
            }
        }
    }
}

/// Makes an export's extents fit a reply: neighbours of one kind joined, cut to the request, to
/// [`EXTENTS_MAX`] (one if the client asked for one), and to 32-bit lengths in compact replies.
/// Empty if the export's answer makes no progress.
pub(crate) fn tidy_extents(mode: Mode, request: &Request, extents: Vec<(u64, bool)>) -> Vec<(u64, bool)> {
    // Largest multiple of the block size: an extent that ended elsewhere would ask for unaligned requests.
    let length_max = if mode == Mode::Extended { u64::MAX } else { u64::from(u32::MAX) & !4095 };
    let count_max = if request.has(command_flag::REQ_ONE) { 1 } else { EXTENTS_MAX };
    let mut tidy: Vec<(u64, bool)> = Vec::new();
    let mut left = request.length;
    for (length, allocated) in extents {
        let length = length.min(left);
        if length == 0 {
            continue;
        }
        let full = tidy.len() == count_max;
        match tidy.last_mut() {
            Some(last) if last.1 == allocated => last.0 += length,
            _ if full => break,
            _ => tidy.push((length, allocated)),
        }
        left -= length;
    }
    // An answer may end early, so a length that does not fit simply ends it.
    if let Some(long) = tidy.iter().position(|e| e.0 > length_max) {
        tidy.truncate(long + 1);
        tidy[long].0 = length_max;
    }
    tidy
}

/// At most [`STRING_MAX`] bytes of `text`, in whole characters.
pub(crate) fn cut(text: &str) -> &str {
    let mut end = text.len().min(STRING_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status_request(length: u64, flags: u16) -> Request {
        Request { command: Command::BlockStatus, flags, cookie: 7, offset: 0, length }
    }

    #[test]
    fn header_with_another_modes_magic_is_refused() {
        let mut bytes = [0; 32];
        bytes[..4].copy_from_slice(&MAGIC_REQUEST.to_be_bytes());
        assert!(Request::parse(Mode::Simple, &bytes).is_some());
        assert!(Request::parse(Mode::Extended, &bytes).is_none());
    }

    #[test]
    fn neighbouring_extents_of_one_kind_become_one() {
        let r = status_request(100, 0);
        let tidy = tidy_extents(Mode::Structured, &r, vec![(10, true), (20, true), (0, false), (5, true), (90, false)]);
        assert_eq!(tidy, [(35, true), (65, false)]);
    }

    #[test]
    fn one_requested_extent_is_one_and_ends_within_the_request() {
        let r = status_request(100, command_flag::REQ_ONE);
        assert_eq!(tidy_extents(Mode::Structured, &r, vec![(10, true), (20, false)]), [(10, true)]);
        assert_eq!(tidy_extents(Mode::Structured, &r, vec![(1000, true)]), [(100, true)]);
    }

    #[test]
    fn extent_beyond_32_bits_ends_a_compact_answer_at_a_block() {
        let r = status_request(1 << 40, 0);
        let extents = vec![(4096, true), (1 << 35, false), (4096, true)];
        assert_eq!(tidy_extents(Mode::Structured, &r, extents.clone()), [(4096, true), (0xffff_f000, false)]);
        assert_eq!(tidy_extents(Mode::Extended, &r, extents.clone()), extents);
    }

    #[test]
    fn text_is_cut_between_characters() {
        let text = "ä".repeat(3000);
        assert_eq!(cut(&text).len(), 4096);
        let text = format!("x{text}");
        assert_eq!(cut(&text).len(), 4095);
    }
}
