//! The bytes of one connection that have come in, and the requests in them.
//!
//! The socket is read in large chunks, and a chunk holds many requests. The payload of a write is a
//! slice of its chunk, without a copy; only one that is longer than half a chunk gets a buffer of its
//! own, and its rest is read from the socket straight into that.
//!
//! Chunks belong to the server, not to the connection: a connection without unread bytes holds none,
//! so thousands of idle ones cost little. A chunk is used again once no write holds a slice of it.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncReadExt};

/// Bytes of a chunk: what a client at depth 32 with 4 KiB writes sends in a round, and as much again.
const CHUNK: usize = 256 << 10;
/// Payloads up to this length are slices of a chunk.
const SLICE_MAX: usize = CHUNK / 2;
/// A read of the socket gets at least this much room.
const ROOM_MIN: usize = 32 << 10;
/// Chunks that are kept for later, for the whole server (8 MiB).
const KEPT_MAX: usize = 32;
/// Kept chunks that are looked at before a new one is made.
const TRIES: usize = 4;

/// Chunks that no connection reads into now.
#[derive(Default)]
pub(crate) struct Chunks(RefCell<VecDeque<BytesMut>>);

impl Chunks {
    /// A chunk with room for `room` bytes.
    fn take(&self, room: usize) -> BytesMut {
        let mut kept = self.0.borrow_mut();
        for _ in 0..TRIES.min(kept.len()) {
            let Some(mut chunk) = kept.pop_front() else { break };
            // Of a chunk that writes still hold, the part behind them can be used.
            if chunk.try_reclaim(CHUNK) || chunk.capacity() >= room {
                return chunk;
            }
            kept.push_back(chunk);
        }
        BytesMut::with_capacity(CHUNK)
    }

    fn give(&self, mut chunk: BytesMut) {
        let mut kept = self.0.borrow_mut();
        if kept.len() < KEPT_MAX {
            chunk.clear();
            // Newest first out: its memory is still in the processor's caches.
            kept.push_front(chunk);
        }
    }
}

/// A payload that is longer than a slice of a chunk may be.
struct Long {
    data: BytesMut,
    missing: usize,
}

/// Bytes that were received and not yet used.
pub(crate) struct Inbox {
    chunks: Rc<Chunks>,
    buffer: BytesMut,
    long: Option<Long>,
    /// Bytes still to come that nobody wants.
    skip: u64,
}

impl Inbox {
    /// An inbox that begins with `bytes`.
    pub(crate) fn new(chunks: Rc<Chunks>, bytes: &[u8]) -> Self {
        let mut buffer = BytesMut::new();
        if !bytes.is_empty() {
            buffer = chunks.take(CHUNK);
            buffer.extend_from_slice(bytes);
        }
        Inbox { chunks, buffer, long: None, skip: 0 }
    }

    /// The next `length` bytes, left where they are; `None` until they have come.
    pub(crate) fn peek(&self, length: usize) -> Option<&[u8]> {
        self.buffer.get(..length)
    }

    /// Takes a header and its payload, once both are there; the payload comes back. A payload of over
    /// half a chunk is never there: see [`Inbox::begin_long`].
    pub(crate) fn message(&mut self, header: usize, payload: usize) -> Option<Bytes> {
        if self.buffer.len() < header + payload {
            return None;
        }
        self.buffer.advance(header);
        Some(if payload == 0 { Bytes::new() } else { self.buffer.split_to(payload).freeze() })
    }

    /// True if a payload of that length needs a buffer of its own.
    pub(crate) fn is_long(payload: usize) -> bool {
        payload > SLICE_MAX
    }

    /// Begins to receive a long payload, behind its header.
    pub(crate) fn begin_long(&mut self, header: usize, payload: usize) {
        self.buffer.advance(header);
        let mut data = BytesMut::with_capacity(payload);
        data.extend_from_slice(&self.buffer.split_to(payload.min(self.buffer.len())));
        self.long = Some(Long { missing: payload - data.len(), data });
    }

    /// Takes the long payload, once it is complete.
    pub(crate) fn take_long(&mut self) -> Option<Bytes> {
        self.long.take_if(|long| long.missing == 0).map(|long| long.data.freeze())
    }

    /// True if nothing has come in that was not used.
    pub(crate) fn is_empty(&self) -> bool {
        self.buffer.is_empty() && self.long.is_none()
    }

    /// Drops the next `length` bytes, whenever they come.
    pub(crate) fn skip(&mut self, length: u64) {
        self.skip += length;
        self.skip_some();
    }

    /// True if nothing is left to be skipped.
    pub(crate) fn skipped(&self) -> bool {
        self.skip == 0
    }

    fn skip_some(&mut self) {
        let now = self.skip.min(self.buffer.len() as u64);
        self.buffer.advance(now as usize);
        self.skip -= now;
    }

    /// Receives bytes, so that at least `wanted` can be there in the end: how many came, 0 at the
    /// end of the stream.
    pub(crate) fn poll_receive<S: AsyncRead + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        stream: &mut S,
        wanted: usize,
    ) -> Poll<io::Result<usize>> {
        if let Some(long) = &mut self.long {
            let mut room = (&mut long.data).limit(long.missing);
            let received = pin!(stream.read_buf(&mut room)).poll(cx);
            if let Poll::Ready(Ok(n)) = received {
                long.missing -= n;
            }
            return received;
        }
        self.make_room(wanted);
        let received = pin!(stream.read_buf(&mut self.buffer)).poll(cx);
        self.skip_some();
        if self.buffer.is_empty() && received.is_pending() {
            self.chunks.give(std::mem::take(&mut self.buffer));
        }
        received
    }

    fn make_room(&mut self, wanted: usize) {
        let room = wanted.saturating_sub(self.buffer.len()).max(ROOM_MIN);
        if self.buffer.capacity() - self.buffer.len() >= room {
            return;
        }
        if self.buffer.capacity() > 0 && self.buffer.try_reclaim(room) {
            return;
        }
        let mut chunk = self.chunks.take(self.buffer.len() + room);
        chunk.extend_from_slice(&self.buffer);
        let old = std::mem::replace(&mut self.buffer, chunk);
        if old.capacity() > 0 {
            self.chunks.give(old);
        }
    }
}
