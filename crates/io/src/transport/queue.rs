//! What waits to be written to one socket: pieces that nobody copies together.

use bytes::{Buf, Bytes};
use std::collections::VecDeque;
use std::io::IoSlice;

/// Pieces per system call. More gain nothing: the kernel's own buffer is full before.
pub(super) const SLICES_MAX: usize = 64;
/// An idle connection keeps no more room than this for its next burst.
const IDLE_PIECES: usize = 32;

/// The pieces, in order.
#[derive(Debug, Default)]
pub(super) struct OutQueue {
    pieces: VecDeque<Bytes>,
    bytes: usize,
}

impl OutQueue {
    pub fn push(&mut self, piece: Bytes) {
        if !piece.is_empty() {
            self.bytes += piece.len();
            self.pieces.push_back(piece);
        }
    }

    /// Bytes that wait.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Hands the first pieces to `write`, which says how many bytes it took.
    pub fn write_with<E>(&mut self, write: impl FnOnce(&[IoSlice<'_>]) -> Result<usize, E>) -> Result<usize, E> {
        let mut slices = [IoSlice::new(&[]); SLICES_MAX];
        let count = self.pieces.len().min(SLICES_MAX);
        for (slice, piece) in slices.iter_mut().zip(&self.pieces) {
            *slice = IoSlice::new(piece);
        }
        let written = write(&slices[..count])?;
        self.advance(written);
        Ok(written)
    }

    fn advance(&mut self, mut written: usize) {
        self.bytes -= written;
        while let Some(first) = self.pieces.front_mut() {
            if written < first.len() {
                first.advance(written);
                return;
            }
            written -= first.len();
            self.pieces.pop_front();
        }
        if self.pieces.capacity() > IDLE_PIECES * 8 {
            self.pieces.shrink_to(IDLE_PIECES);
        }
    }

    pub fn clear(&mut self) {
        *self = OutQueue::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    #[test]
    fn whatever_the_socket_takes_the_bytes_stay_in_order() {
        let all: Vec<u8> = (0..1000).map(|n| (n % 251) as u8).collect();
        let mut queue = OutQueue::default();
        for piece in all.chunks(7) {
            queue.push(Bytes::copy_from_slice(piece));
        }
        queue.push(Bytes::new());
        let (mut out, mut take) = (Vec::new(), 1);
        while !queue.is_empty() {
            let write = |slices: &[IoSlice<'_>]| {
                let joined: Vec<u8> = slices.iter().flat_map(|s| s.iter().copied()).collect();
                let n = take.min(joined.len());
                out.extend_from_slice(&joined[..n]);
                Ok::<usize, Infallible>(n)
            };
            let Ok(_) = queue.write_with(write);
            take = take * 3 % 101 + 1;
            assert_eq!(queue.bytes(), all.len() - out.len());
        }
        assert_eq!(out, all);
    }
}
