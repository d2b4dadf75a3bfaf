//! The queue of one element: operations on the same blocks run one after the other, others side by side.
//!
//! A mask has bit n set for block n. An operation may start when no block of its mask is held by a
//! running operation or wanted by one that waits in front of it (first come, first served, so nobody
//! starves).

use super::OpNumber;
use smallvec::SmallVec;
use std::collections::VecDeque;

/// What runs and waits on one element.
#[derive(Debug, Default)]
pub struct ElementQueue {
    held: u16,
    waiting: VecDeque<(OpNumber, u16)>,
}

impl ElementQueue {
    /// True if an operation on `mask` may start now.
    pub fn is_free(&self, mask: u16) -> bool {
        self.waiting.iter().fold(self.held, |taken, (_, wanted)| taken | wanted) & mask == 0
    }

    /// Blocks of running operations.
    pub fn held(&self) -> u16 {
        self.held
    }

    /// Takes the blocks for a running operation.
    pub fn hold(&mut self, mask: u16) {
        debug_assert_eq!(self.held & mask, 0, "blocks are held once");
        self.held |= mask;
    }

    /// Puts an operation at the end.
    pub fn wait(&mut self, op: OpNumber, mask: u16) {
        self.waiting.push_back((op, mask));
    }

    /// Gives back the blocks of an operation that is finished.
    pub fn release(&mut self, mask: u16) {
        debug_assert_eq!(self.held & mask, mask, "only held blocks are released");
        self.held &= !mask;
    }

    /// The operations that may start now, taken out in order. `holds` says whether an operation will
    /// hold its blocks (a write) or not (a read, which captures at once).
    pub fn take_startable(&mut self, mut holds: impl FnMut(OpNumber) -> bool) -> SmallVec<[OpNumber; 4]> {
        let mut started = SmallVec::new();
        let mut taken = self.held;
        self.waiting.retain(|(op, mask)| {
            let free = taken & mask == 0;
            if free {
                started.push(*op);
            }
            if !free || holds(*op) {
                taken |= mask;
            }
            !free
        });
        started
    }

    /// Removes an operation that no longer waits.
    pub fn forget(&mut self, op: OpNumber) {
        self.waiting.retain(|(other, _)| *other != op);
    }

    /// True if nothing runs and nothing waits.
    pub fn is_idle(&self) -> bool {
        self.held == 0 && self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_blocks_wait_in_order_and_other_blocks_pass() {
        let mut q = ElementQueue::default();
        assert!(q.is_free(0b0011));
        q.hold(0b0011);
        assert!(!q.is_free(0b0010));
        q.wait(1, 0b0110);
        assert!(!q.is_free(0b0100), "somebody in front wants it");
        assert!(q.is_free(0b1000));
        q.wait(2, 0b0100);
        q.release(0b0011);
        assert_eq!(q.take_startable(|_| true).as_slice(), &[1]);
        q.hold(0b0110);
        q.release(0b0110);
        assert_eq!(q.take_startable(|_| true).as_slice(), &[2]);
    }

    #[test]
    fn reads_that_wait_together_start_together() {
        let mut q = ElementQueue::default();
        q.hold(1);
        q.wait(1, 1);
        q.wait(2, 1);
        q.wait(3, 1);
        q.release(1);
        assert_eq!(q.take_startable(|op| op == 3).as_slice(), &[1, 2, 3]);
        assert!(q.is_idle());
    }
}
