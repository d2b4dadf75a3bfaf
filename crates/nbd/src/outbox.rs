//! The replies of one connection that wait to be sent, gathered into as few system calls as possible.
//!
//! Headers are written one behind the other into `text`; payloads stay where they are. `parts` says
//! in which order they go out:
//!
//! ```text
//!   text   [h1 h2 h3][h4][h5 h6]
//!   parts  Text(48)  Payload(4096)  Text(16)  Zeros(65536)  Text(32)
//! ```

use bytes::Bytes;
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::AsyncWrite;

/// Payloads up to this many bytes are copied behind their header: cheaper than a slice of their own.
const COPY_MAX: usize = 512;
/// Slices in one system call.
const SLICES_MAX: usize = 128;
/// Text that is kept between rounds, and that is moved to the front once it was sent, in bytes.
const TEXT_KEPT: usize = 16 << 10;

static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

enum Part {
    /// So many bytes of `text`.
    Text(usize),
    /// Bytes of an export.
    Payload(Bytes),
    /// Zeros.
    Zeros(u64),
}

/// The queue of replies.
#[derive(Default)]
pub(crate) struct Outbox {
    text: Vec<u8>,
    /// Where unsent text begins.
    text_sent: usize,
    parts: VecDeque<Part>,
    unsent: u64,
}

impl Outbox {
    /// Bytes that wait.
    pub(crate) fn unsent(&self) -> u64 {
        self.unsent
    }

    /// Appends what `write` writes.
    pub(crate) fn text(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        let before = self.text.len();
        write(&mut self.text);
        let added = self.text.len() - before;
        self.unsent += added as u64;
        match self.parts.back_mut() {
            Some(Part::Text(length)) => *length += added,
            _ => self.parts.push_back(Part::Text(added)),
        }
    }

    /// Appends data.
    pub(crate) fn payload(&mut self, bytes: Bytes) {
        if bytes.len() <= COPY_MAX {
            return self.text(|out| out.extend_from_slice(&bytes));
        }
        self.unsent += bytes.len() as u64;
        self.parts.push_back(Part::Payload(bytes));
    }

    /// Appends zeros.
    pub(crate) fn zeros(&mut self, length: u64) {
        self.unsent += length;
        self.parts.push_back(Part::Zeros(length));
    }

    /// Sends until nothing is left or the socket takes no more.
    pub(crate) fn poll_send<S: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        stream: &mut S,
    ) -> Poll<io::Result<()>> {
        while self.unsent > 0 {
            let sent = ready!(self.poll_send_some(cx, stream))?;
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.advance(sent);
        }
        Poll::Ready(Ok(()))
    }

    fn poll_send_some<S: AsyncWrite + Unpin>(&self, cx: &mut Context<'_>, stream: &mut S) -> Poll<io::Result<usize>> {
        let mut slices = [IoSlice::new(&[]); SLICES_MAX];
        let mut text = &self.text[self.text_sent..];
        let mut count = 0;
        for part in self.parts.iter().take(SLICES_MAX) {
            slices[count] = match part {
                Part::Text(length) => {
                    let (now, later) = text.split_at(*length);
                    text = later;
                    IoSlice::new(now)
                }
                Part::Payload(bytes) => IoSlice::new(bytes),
                Part::Zeros(length) => IoSlice::new(&ZEROS[..ZEROS.len().min(*length as usize)]),
            };
            count += 1;
            // What follows long zeros waits until they are sent; they go out in several calls.
            if matches!(part, Part::Zeros(length) if *length > ZEROS.len() as u64) {
                break;
            }
        }
        Pin::new(stream).poll_write_vectored(cx, &slices[..count])
    }

    fn advance(&mut self, mut sent: usize) {
        self.unsent -= sent as u64;
        while sent > 0 {
            let front = self.parts.front_mut().expect("the socket took no more than it was given");
            let (now, done) = match front {
                Part::Text(length) => {
                    let now = sent.min(*length);
                    *length -= now;
                    self.text_sent += now;
                    (now, *length == 0)
                }
                Part::Payload(bytes) => {
                    let now = sent.min(bytes.len());
                    bytes::Buf::advance(bytes, now);
                    (now, bytes.is_empty())
                }
                Part::Zeros(length) => {
                    let now = (sent as u64).min(*length);
                    *length -= now;
                    (now as usize, *length == 0)
                }
            };
            sent -= now;
            if done {
                self.parts.pop_front();
            }
        }
        self.tidy();
    }

    /// Forgets text that was sent.
    fn tidy(&mut self) {
        if self.unsent == 0 {
            self.text.clear();
            self.text_sent = 0;
            self.text.shrink_to(TEXT_KEPT);
        } else if self.text_sent > TEXT_KEPT {
            self.text.drain(..self.text_sent);
            self.text_sent = 0;
        }
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        *self = Outbox::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::Waker;

    /// Takes a few bytes at a time, from the first slices only.
    struct Narrow {
        taken: Vec<u8>,
        width: usize,
    }

    impl AsyncWrite for Narrow {
        fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
            let n = bytes.len().min(self.width);
            self.taken.extend_from_slice(&bytes[..n]);
            Poll::Ready(Ok(n))
        }
        fn poll_write_vectored(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            slices: &[IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            let mut left = self.width;
            for slice in slices {
                let n = slice.len().min(left);
                left -= n;
                self.taken.extend_from_slice(&slice[..n]);
            }
            Poll::Ready(Ok(self.width - left))
        }
        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[test]
    fn bytes_leave_in_order_however_few_the_socket_takes() {
        for width in [1, 7, 1000, 70_000, 1 << 20] {
            let mut outbox = Outbox::default();
            let mut expected = Vec::new();
            for round in 0..20u8 {
                outbox.text(|out| out.extend_from_slice(&[round; 16]));
                expected.extend_from_slice(&[round; 16]);
                let payload = vec![round; 100 * usize::from(round)];
                expected.extend_from_slice(&payload);
                outbox.payload(payload.into());
            }
            outbox.zeros(140_000);
            expected.extend_from_slice(&vec![0; 140_000]);
            outbox.text(|out| out.push(9));
            expected.push(9);
            let mut narrow = Narrow { taken: Vec::new(), width };
            let sent = outbox.poll_send(&mut Context::from_waker(Waker::noop()), &mut narrow);
            assert!(matches!(sent, Poll::Ready(Ok(()))));
            assert!(narrow.taken == expected, "width {width}");
            assert_eq!(outbox.unsent(), 0);
        }
    }
}
