//! The requests in flight of one connection: futures in slots, polled by the connection's own task.
//!
//! Why not a task per request: spawning, waking and reaping a task costs more than a request that is
//! answered at once, and its reply would have to cross a channel. A slot is a box that is filled
//! again and again, with a waker that sets one bit and wakes the connection's task once per round.
//!
//! ```text
//!   free ──start()──> running ──poll gives Ready──> free
//!                     │    ^
//!              Pending│    │woken: bit in `ready`, task woken
//!                     └────┘
//! ```

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

/// Slots at most: two words of bits.
pub(crate) const SLOTS_MAX: usize = 128;
const WORDS: usize = SLOTS_MAX / 64;

/// What the wakers of slots share with the connection's task.
struct Wakes {
    /// One bit per slot that wants to be polled.
    ready: [AtomicU64; WORDS],
    /// The connection's task.
    task: Mutex<Option<Waker>>,
}

impl Wakes {
    fn wake_task(&self) {
        if let Some(task) = &*self.task.lock().unwrap_or_else(PoisonError::into_inner) {
            task.wake_by_ref();
        }
    }
}

impl Wake for Wakes {
    fn wake(self: Arc<Self>) {
        self.wake_task();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.wake_task();
    }
}

struct SlotWake {
    wakes: Arc<Wakes>,
    slot: usize,
}

impl Wake for SlotWake {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let bit = 1 << (self.slot % 64);
        let before = self.wakes.ready[self.slot / 64].fetch_or(bit, Ordering::AcqRel);
        // Where a bit was set already, the task has been woken and has not yet looked.
        if before == 0 {
            self.wakes.wake_task();
        }
    }
}

struct Slot<F> {
    future: Pin<Box<Option<F>>>,
    waker: Waker,
}

/// Up to [`SLOTS_MAX`] futures of one type.
pub(crate) struct Slots<F: Future> {
    slots: Vec<Slot<F>>,
    free: Vec<usize>,
    wakes: Arc<Wakes>,
}

impl<F: Future> Slots<F> {
    /// No slots yet: they are made as the depth of the client asks for them.
    pub(crate) fn new() -> Self {
        let wakes = Wakes { ready: [const { AtomicU64::new(0) }; WORDS], task: Mutex::new(None) };
        Slots { slots: Vec::new(), free: Vec::new(), wakes: Arc::new(wakes) }
    }

    /// Futures that run.
    pub(crate) fn busy(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Says which task to wake. To be called in each poll of it before slots are polled.
    pub(crate) fn register(&mut self, task: &Waker) {
        let mut registered = self.wakes.task.lock().unwrap_or_else(PoisonError::into_inner);
        match &*registered {
            Some(known) if known.will_wake(task) => {}
            _ => *registered = Some(task.clone()),
        }
    }

    /// Starts a future: its output at once, or it goes on in a slot. Panics if all slots are busy.
    pub(crate) fn start(&mut self, future: F) -> Option<F::Output> {
        let slot = self.free.pop().unwrap_or_else(|| self.grow());
        self.slots[slot].future.set(Some(future));
        self.poll_slot(slot)
    }

    /// Polls the slots that were woken; outputs go to `done`.
    pub(crate) fn poll_woken(&mut self, mut done: impl FnMut(F::Output)) {
        for word in 0..WORDS {
            if self.wakes.ready[word].load(Ordering::Relaxed) == 0 {
                continue;
            }
            let mut bits = self.wakes.ready[word].swap(0, Ordering::AcqRel);
            while bits != 0 {
                let slot = word * 64 + bits.trailing_zeros() as usize;
                bits &= bits - 1;
                if let Some(output) = self.poll_slot(slot) {
                    done(output);
                }
            }
        }
    }

    /// A waker of the connection's task that stays right when the task's own one changes.
    pub(crate) fn task_waker(&self) -> Waker {
        Waker::from(self.wakes.clone())
    }

    fn grow(&mut self) -> usize {
        let slot = self.slots.len();
        assert!(slot < SLOTS_MAX, "the caller counts the requests in flight");
        let waker = Waker::from(Arc::new(SlotWake { wakes: self.wakes.clone(), slot }));
        self.slots.push(Slot { future: Box::pin(None), waker });
        slot
    }

    /// Polls one slot. A waker that outlived its future finds none, or another one to poll in vain.
    fn poll_slot(&mut self, slot: usize) -> Option<F::Output> {
        let Slot { future, waker } = &mut self.slots[slot];
        let running = future.as_mut().as_pin_mut()?;
        match running.poll(&mut Context::from_waker(waker)) {
            Poll::Ready(output) => {
                future.set(None);
                self.free.push(slot);
                Some(output)
            }
            Poll::Pending => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;
    use std::sync::atomic::AtomicUsize;

    struct Count(AtomicUsize);
    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn many_wakes_of_one_round_wake_the_task_once() {
        let count = Arc::new(Count(AtomicUsize::new(0)));
        let kept: std::rc::Rc<std::cell::RefCell<Vec<Waker>>> = Default::default();
        let mut slots = Slots::new();
        slots.register(&Waker::from(count.clone()));
        for n in 0..20 {
            let kept = kept.clone();
            let mut polled = false;
            let output = slots.start(poll_fn(move |cx| {
                if polled {
                    return Poll::Ready(n);
                }
                polled = true;
                kept.borrow_mut().push(cx.waker().clone());
                Poll::Pending
            }));
            assert_eq!(output, None);
        }
        for waker in kept.borrow().iter() {
            waker.wake_by_ref();
        }
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
        let mut outputs = Vec::new();
        slots.poll_woken(|o| outputs.push(o));
        assert_eq!(outputs, (0..20).collect::<Vec<_>>());
        assert_eq!(slots.busy(), 0);
        // Wakers that outlive their futures do no harm.
        kept.borrow()[3].wake_by_ref();
        slots.poll_woken(|o| outputs.push(o));
        assert_eq!(outputs.len(), 20);
    }
}
