//! Room for requests and replies of all connections together.
//!
//! Who finds none waits in a queue and is woken when others have given some back: first come, first served, so
//! that a large request is not passed over for ever by small ones. A connection that holds nothing may always
//! begin one small request without asking: clients that take no replies can keep the others slow, not still.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::task::Waker;

/// Longest request that a connection which holds nothing begins without asking for room.
pub(crate) const SMALL_MAX: u64 = 64 << 10;

/// The room of a server.
pub(crate) struct Room {
    max: u64,
    taken: Cell<u64>,
    waiting: RefCell<VecDeque<(u64, Waker)>>,
    next: Cell<u64>,
}

impl Room {
    /// Room for that many bytes.
    pub(crate) fn new(max: u64) -> Room {
        Room { max, taken: Cell::new(0), waiting: RefCell::default(), next: Cell::new(0) }
    }

    /// A connection's part of it: nothing yet. `waker` wakes the connection.
    pub(crate) fn share(&self, waker: Waker) -> Share<'_> {
        let id = self.next.replace(self.next.get() + 1);
        Share { room: self, id, bytes: 0, waits: Cell::new(false), waker }
    }

    fn wake_first(&self) {
        if let Some((_, waker)) = self.waiting.borrow().front() {
            waker.wake_by_ref();
        }
    }
}

/// What one connection holds of a [`Room`]; given back when dropped.
pub(crate) struct Share<'a> {
    room: &'a Room,
    id: u64,
    bytes: u64,
    waits: Cell<bool>,
    waker: Waker,
}

impl Share<'_> {
    /// The connection holds that many bytes now.
    pub(crate) fn set(&mut self, bytes: u64) {
        let taken = &self.room.taken;
        taken.set(taken.get() - self.bytes + bytes);
        let less = bytes < self.bytes;
        self.bytes = bytes;
        if less {
            self.room.wake_first();
        }
    }

    /// True if the connection may come to hold `bytes`. If not, it is woken when it may be so.
    pub(crate) fn may_hold(&self, bytes: u64) -> bool {
        let first = self.room.waiting.borrow().front().is_none_or(|(id, _)| *id == self.id);
        let others = self.room.taken.get() - self.bytes;
        // More than there is in all is let through by itself.
        if first && (others == 0 || others + bytes <= self.room.max) {
            self.leave_queue();
            return true;
        }
        if !self.waits.replace(true) {
            self.room.waiting.borrow_mut().push_back((self.id, self.waker.clone()));
        }
        false
    }

    /// The connection does not wait for room any more.
    pub(crate) fn leave_queue(&self) {
        if self.waits.replace(false) {
            self.room.waiting.borrow_mut().retain(|(id, _)| *id != self.id);
            self.room.wake_first();
        }
    }
}

impl Drop for Share<'_> {
    fn drop(&mut self) {
        self.leave_queue();
        self.set(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl std::task::Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn share(room: &Room) -> (Share<'_>, Arc<Count>) {
        let count = Arc::new(Count::default());
        (room.share(Waker::from(count.clone())), count)
    }

    #[test]
    fn who_came_first_is_served_first_and_no_smaller_one_passes() {
        let room = Room::new(100);
        let ((mut a, _), (mut b, wakes_b), (c, wakes_c)) = (share(&room), share(&room), share(&room));
        assert!(a.may_hold(80));
        a.set(80);
        assert!(!b.may_hold(30));
        assert!(!c.may_hold(10), "it would fit, and waits behind the other");
        a.set(70);
        assert_eq!((wakes_b.0.load(Ordering::Relaxed), wakes_c.0.load(Ordering::Relaxed)), (1, 0));
        assert!(b.may_hold(30));
        b.set(30);
        assert_eq!(wakes_c.0.load(Ordering::Relaxed), 1, "it is the first now");
        assert!(!c.may_hold(10));
        drop(b);
        assert!(c.may_hold(10));
    }

    #[test]
    fn who_ends_while_it_waits_lets_the_next_one_go_on() {
        let room = Room::new(100);
        let ((mut a, _), (b, _), (c, wakes_c)) = (share(&room), share(&room), share(&room));
        a.set(80);
        assert!(!b.may_hold(90) && !c.may_hold(10));
        drop(b);
        assert!(wakes_c.0.load(Ordering::Relaxed) > 0);
        assert!(c.may_hold(10));
    }

    #[test]
    fn more_than_there_is_goes_through_by_itself() {
        let room = Room::new(100);
        let ((mut a, _), (b, wakes_b)) = (share(&room), share(&room));
        a.set(1);
        assert!(!b.may_hold(500));
        a.set(0);
        assert!(wakes_b.0.load(Ordering::Relaxed) > 0);
        assert!(b.may_hold(500));
    }
}
