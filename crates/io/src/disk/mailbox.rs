//! How the engine's threads tell the reactor that something is done: a list and an eventfd.
//!
//! The same eventfd is registered with the ring, so that the reactor waits for one thing. It is
//! watched edge-triggered: each signal is a new edge, so nobody needs to read the counter (which would
//! cost a system call per wake-up; the counter would overflow after 2^64 - 2 signals).

#![allow(unsafe_code)]

use petal::store::{DiskResult, OpId};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use tokio::io::unix::AsyncFd;

/// An answer: which disk, which operation, what became of it.
pub type Answer = (usize, OpId, DiskResult);

/// The threads' end; shared by all of them.
pub struct Mailbox {
    answers: Mutex<Vec<Answer>>,
    /// True while `answers` is not empty: a look costs no lock.
    any: AtomicBool,
    signal: Arc<OwnedFd>,
}

impl Mailbox {
    /// Puts answers in and wakes the reactor once.
    pub fn put(&self, answers: impl IntoIterator<Item = Answer>) {
        let mut list = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        list.extend(answers);
        self.any.store(!list.is_empty(), Ordering::Release);
        drop(list);
        // Cannot fail but by overflow of the counter, and then the reactor is being woken anyway.
        let _ = rustix::io::write(&*self.signal, &1u64.to_ne_bytes());
    }

    /// Appends what is there to `out`.
    pub fn take(&self, out: &mut Vec<Answer>) {
        if self.any.load(Ordering::Acquire) {
            let mut list = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
            self.any.store(false, Ordering::Release);
            out.append(&mut list);
        }
    }

    /// True if `take` would find something.
    pub fn any(&self) -> bool {
        self.any.load(Ordering::Acquire)
    }
}

/// The reactor's end.
pub struct Doorbell {
    signal: Arc<OwnedFd>,
    /// Made at the first `poll`, which is the first moment when a tokio runtime must be there.
    watched: Option<AsyncFd<SharedFd>>,
}

struct SharedFd(Arc<OwnedFd>);

impl AsRawFd for SharedFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Doorbell {
    /// A doorbell, and the mailbox that rings it.
    pub fn new() -> io::Result<(Doorbell, Arc<Mailbox>)> {
        let signal = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let mailbox = Mailbox { answers: Mutex::new(Vec::new()), any: AtomicBool::new(false), signal: signal.clone() };
        Ok((Doorbell { signal, watched: None }, Arc::new(mailbox)))
    }

    /// The eventfd, to be registered with a ring.
    pub fn raw_fd(&self) -> RawFd {
        self.signal.as_raw_fd()
    }

    /// Ready once for each time (or several times) that it was rung.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let watched = self.watched.get_or_insert_with(|| {
            let (signal, interest) = (SharedFd(self.signal.clone()), tokio::io::Interest::READABLE);
            // SAFETY: `SharedFd` owns a share of the descriptor and always tells the same one, so it stays
            // open for as long as the `AsyncFd` lives.
            let watched = unsafe { AsyncFd::register_with_interest(signal, interest) };
            watched.unwrap_or_else(|error| panic!("the eventfd cannot be watched: {error}"))
        });
        match watched.poll_read_ready(cx) {
            Poll::Ready(Ok(mut guard)) => {
                guard.clear_ready();
                Poll::Ready(())
            }
            // The runtime is shutting down: nothing will be waited for again.
            Poll::Ready(Err(_)) => Poll::Ready(()),
            Poll::Pending => Poll::Pending,
        }
    }

    /// Blocks until it is rung: for tests and tools without a reactor.
    pub fn wait(&self) {
        let mut fds = [PollFd::new(&*self.signal, PollFlags::IN)];
        while poll(&mut fds, None).is_err() {}
        let mut count = [0; 8];
        let _ = rustix::io::read(&*self.signal, &mut count);
    }
}
