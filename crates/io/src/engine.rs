//! The narrow door between the driver and whatever carries out [`DiskCommand`]s.
//!
//! The driver hands over every command of a round with [`DiskEngine::submit`], then says
//! [`DiskEngine::flush`] once: the engine turns the whole batch into as few system calls as it can.
//! Answers wait in the engine until the driver fetches them with [`DiskEngine::completions`], which
//! it does whenever [`DiskEngine::poll_ready`] says so, and also on every other round (a look costs
//! no system call). Each operation gets exactly one answer, in any order; a failure is an answer.
//!
//! The engine lives on the reactor's own thread: nothing here is `Send`. Work that must block (redb)
//! goes to a thread of the engine's own, which wakes the waker of `poll_ready`.

use petal::store::{DiskCommand, DiskResult, OpId};
use std::future::Future;
use std::task::{Context, Poll};

/// Carries out the disk commands of one server, for all of its disks.
pub trait DiskEngine {
    /// Takes one command for disk number `disk` (the order in which the disks were opened). May wait
    /// for `flush` before anything happens.
    fn submit(&mut self, disk: usize, op: OpId, command: DiskCommand);

    /// No more commands come in this round: begin everything that was submitted.
    fn flush(&mut self);

    /// Appends every answer that is there, as `(disk, op, result)`. Never waits.
    fn completions(&mut self, out: &mut Vec<(usize, OpId, DiskResult)>);

    /// Ready when `completions` may have something to tell (saying so too often is allowed, missing
    /// an answer is not). Keeps the waker of the last call otherwise.
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<()>;

    /// `poll_ready` as a future. Dropping it loses nothing.
    fn ready(&mut self) -> impl Future<Output = ()>
    where
        Self: Sized,
    {
        std::future::poll_fn(move |cx| self.poll_ready(cx))
    }
}

/// An engine for servers without disks (tests of the driver): there is nothing that it could be asked.
#[derive(Debug, Default)]
pub struct NoDisks;

impl DiskEngine for NoDisks {
    fn submit(&mut self, disk: usize, op: OpId, command: DiskCommand) {
        panic!("operation {op} for disk {disk} of a server without disks: {command:?}");
    }
    fn flush(&mut self) {}
    fn completions(&mut self, _out: &mut Vec<(usize, OpId, DiskResult)>) {}
    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<()> {
        Poll::Pending
    }
}
