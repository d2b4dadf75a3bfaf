//! How fast members are brought back while clients are served (2.7): copies give way to what clients wait for, and keep
//! a floor rate.
//!
//! ```text
//!  nobody has asked for anything lately: no limit
//!  else a rate, which begins at the floor; after every step in which something was copied:
//!      clients waited much longer than usual -> half of it (not below the floor)
//!      they did not                          -> a quarter more
//! ```
//!
//! *Usual* is what reads and writes of clients took here, each for itself. What is quicker is learnt soon, what is
//! slower slowly; and not at all while something is copied above the floor, or copying would become the habit itself.
//! At the floor it is: what is slow there has other reasons (clients ask for more at a time, a disk is worn), and
//! copies would stay there for ever.
//!
//! Copies come in bursts: many small ones side by side share what makes them durable, and each alone would stand in the
//! way of everybody else's. New terms are asked for together, too.
//!
//! Never fails. A rate is kept by the time at which what was begun is paid for.

use stdx::{Duration, Instant};

/// Bytes per second that one primary copies however long clients wait: 1.4 TB in a day, and the slots of a lost server
/// have several primaries.
const FLOOR: u64 = 16 << 20;
/// More than any disk writes: from here on there is no limit to speak of.
const CEILING: u64 = 4 << 30;
/// What a question about an element costs, and a copy beside its blocks: entries, messages, journal records.
const ELEMENT_COST: u64 = 8 << 10;
/// How often the rate is looked at.
const STEP: Duration = Duration::from_millis(100);
/// Nobody asked for so long: no limit.
const IDLE_AFTER: Duration = Duration::from_millis(200);
/// What a burst may cost, and what was not used is saved up: so much of the rate. Measured with 4 KiB writes at depth 4
/// on one disk: 1 ms 1,450 writes/s, 30 ms 1,650, 60 ms 1,750, with 5 s of copying each.
const BURST: Duration = Duration::from_millis(60);
/// What was copied while nobody asked for anything is not made up for when somebody does: so much of the rate at most.
const DEBT_MAX: Duration = Duration::from_millis(250);
/// Time between two proposals.
const PROPOSE_EVERY: Duration = Duration::from_millis(200);

/// The pace of one primary's copies.
#[derive(Debug)]
pub(crate) struct Pace {
    rate: u64,
    /// What was begun is paid for.
    paid_at: Instant,
    /// In a burst.
    is_open: bool,
    /// The last proposal.
    proposed_at: Option<Instant>,
    /// Something waits for its time.
    wake_at: Option<Instant>,
    /// A client was answered.
    busy_at: Option<Instant>,
    /// The present step ends.
    step_ends: Instant,
    /// Something was copied in it.
    has_copied: bool,
    reads: Waits,
    writes: Waits,
}

/// How long clients waited for one kind of request, in nanoseconds.
#[derive(Debug, Default)]
struct Waits {
    /// Unknown: zero.
    usual: u64,
    count: u64,
    sum: u64,
}

impl Default for Pace {
    fn default() -> Self {
        Pace {
            rate: FLOOR,
            paid_at: Instant::default(),
            is_open: false,
            proposed_at: None,
            wake_at: None,
            busy_at: None,
            step_ends: Instant::default(),
            has_copied: false,
            reads: Waits::default(),
            writes: Waits::default(),
        }
    }
}

impl Pace {
    /// A client was answered, after so long.
    pub fn answered(&mut self, now: Instant, is_write: bool, took: Duration) {
        self.busy_at = Some(now);
        let waits = if is_write { &mut self.writes } else { &mut self.reads };
        waits.count += 1;
        waits.sum = waits.sum.saturating_add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
    }

    /// Clients are served, `operations` of them at the moment.
    pub fn is_busy(&self, now: Instant, operations: usize) -> bool {
        operations > 0 || self.busy_at.is_some_and(|at| now.since(at) < IDLE_AFTER)
    }

    /// While clients are served: may another copy begin? Notes when it may.
    pub fn admits(&mut self, now: Instant) -> bool {
        let opens_at = self.paid_at + BURST;
        self.is_open = now >= if self.is_open { self.paid_at } else { opens_at };
        if !self.is_open {
            self.wake(opens_at);
        }
        self.is_open
    }

    /// While clients are served: may what is done be proposed? Notes when it may.
    pub fn may_propose(&mut self, now: Instant) -> bool {
        match self.proposed_at.map(|at| at + PROPOSE_EVERY).filter(|at| *at > now) {
            Some(at) => self.wake(at),
            None => self.proposed_at = Some(now),
        }
        self.proposed_at == Some(now)
    }

    fn wake(&mut self, at: Instant) {
        self.wake_at = Some(self.wake_at.map_or(at, |present| present.min(at)));
    }

    /// When something may be that was put off.
    pub fn next_timeout(&self) -> Option<Instant> {
        self.wake_at
    }

    /// A question about an element, or a copy of it, is on its way.
    pub fn element(&mut self, now: Instant) {
        self.spend(now, ELEMENT_COST);
    }

    /// So many bytes of one are copied.
    pub fn spend(&mut self, now: Instant, bytes: u64) {
        self.has_copied = true;
        let takes = bytes.saturating_mul(1_000_000_000) / self.rate;
        let earliest = Instant::from_nanos(now.as_nanos().saturating_sub(BURST.as_nanos() as u64));
        self.paid_at = (self.paid_at.max(earliest) + Duration::from_nanos(takes)).min(now + DEBT_MAX);
    }

    /// Called after every round of inputs: looks at the rate when it is time.
    pub fn look(&mut self, now: Instant) {
        self.wake_at = None;
        if now < self.step_ends {
            return;
        }
        self.step_ends = now + STEP;
        let has_copied = std::mem::take(&mut self.has_copied);
        let learns = !has_copied || self.rate == FLOOR;
        let mut expected = 0u64;
        let mut waited = 0u64;
        for waits in [&mut self.reads, &mut self.writes] {
            if let Some(mean) = waits.sum.checked_div(waits.count) {
                // Where it is not known what is usual nobody can say that it took long.
                if waits.usual > 0 {
                    waited = waited.saturating_add(waits.sum);
                    expected = expected.saturating_add(waits.usual.saturating_mul(waits.count));
                }
                waits.learn(mean, learns);
            }
            (waits.count, waits.sum) = (0, 0);
        }
        self.rate = match has_copied {
            false => FLOOR,
            // Nobody waited, or it is not known yet what is usual.
            true if waited == 0 => self.rate,
            true if waited > expected.saturating_add(expected / 2) => self.rate / 2,
            true => self.rate + self.rate / 4,
        };
        self.rate = self.rate.clamp(FLOOR, CEILING);
    }
}

impl Waits {
    fn learn(&mut self, mean: u64, learns: bool) {
        let weight = match () {
            () if self.usual == 0 => 1,
            () if mean < self.usual => 16,
            () if learns => 64,
            () => return,
        };
        self.usual = self.usual - self.usual / weight + mean / weight;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Instant {
        Instant::from_nanos(millis * 1_000_000)
    }

    /// Steps of 100 ms in which something is copied as fast as admitted, or nothing is, and a hundred writes take so
    /// long each; returns the bytes.
    fn steps(pace: &mut Pace, from: u64, steps: u64, copies: bool, write: Duration) -> u64 {
        let mut copied = 0;
        for ms in from..from + steps * 100 {
            pace.look(at(ms));
            pace.answered(at(ms), true, write);
            while copies && pace.admits(at(ms)) {
                pace.spend(at(ms), 64 << 10);
                copied += 64 << 10;
            }
        }
        copied
    }

    const USUAL: Duration = Duration::from_micros(800);

    #[test]
    fn a_rate_grows_until_clients_wait_longer_and_then_falls_to_the_floor() {
        let mut pace = Pace::default();
        steps(&mut pace, 0, 10, false, USUAL);
        let first = steps(&mut pace, 1000, 10, true, USUAL);
        let second = steps(&mut pace, 2000, 10, true, USUAL * 14 / 10);
        assert!(first > FLOOR && second > 4 * first, "{first}, {second}");
        steps(&mut pace, 3000, 10, true, USUAL * 2);
        let slow = steps(&mut pace, 4000, 10, true, USUAL * 2);
        assert!((FLOOR * 9 / 10..FLOOR * 12 / 10).contains(&slow), "{slow}");
    }

    #[test]
    fn what_is_slow_at_the_floor_becomes_usual_and_what_was_slow_for_the_copies_does_not() {
        let mut pace = Pace::default();
        steps(&mut pace, 0, 10, false, USUAL);
        steps(&mut pace, 1000, 10, true, USUAL);
        let (usual, rate) = (pace.writes.usual, pace.rate);
        steps(&mut pace, 2000, 2, true, USUAL * 2);
        assert!(pace.rate > FLOOR && pace.rate < rate);
        assert_eq!(pace.writes.usual, usual);
        steps(&mut pace, 2200, 200, true, USUAL * 2);
        assert!(pace.rate > 2 * FLOOR, "it is not the copies");
    }

    #[test]
    fn a_pause_of_copying_begins_again_at_the_floor_and_nothing_is_saved_up() {
        let mut pace = Pace::default();
        steps(&mut pace, 0, 10, false, USUAL);
        steps(&mut pace, 1000, 20, true, USUAL);
        assert!(pace.rate > 8 * FLOOR);
        steps(&mut pace, 3000, 2, false, USUAL);
        let first = steps(&mut pace, 3200, 1, true, USUAL);
        assert!(first < FLOOR / 5, "{first}");
    }

    #[test]
    fn what_was_copied_while_nobody_asked_is_not_made_up_for() {
        let mut pace = Pace::default();
        (0..10_000).for_each(|_| pace.spend(at(1000), 64 << 10));
        assert!(!pace.admits(at(1001)));
        assert!(pace.admits(at(1000) + DEBT_MAX + BURST));
    }

    #[test]
    fn copies_come_in_bursts_and_proposals_one_in_a_while() {
        let mut pace = Pace::default();
        let mut bursts = Vec::new();
        let mut proposals = 0;
        for ms in 1000..2000 {
            pace.look(at(ms));
            proposals += u32::from(pace.may_propose(at(ms)));
            let mut begun = 0;
            while pace.admits(at(ms)) {
                pace.spend(at(ms), 4096);
                begun += 1;
            }
            bursts.extend((begun > 0).then_some(begun));
        }
        assert_eq!(proposals, 5);
        assert!((15..18).contains(&bursts.len()) && bursts.iter().all(|b| *b > 200), "{bursts:?}");
        assert!(pace.next_timeout().is_some_and(|wake| wake > at(1999)));
    }

    #[test]
    fn reads_and_writes_are_each_measured_by_their_own_kind() {
        let mut pace = Pace::default();
        steps(&mut pace, 0, 10, false, USUAL);
        for ms in 1000..2000 {
            pace.look(at(ms));
            pace.answered(at(ms), false, USUAL / 8);
        }
        steps(&mut pace, 2000, 10, true, USUAL);
        assert!(pace.rate > 4 * FLOOR, "writes are slower than reads, and as quick as writes are");
    }

    #[test]
    fn what_is_not_known_yet_does_not_slow_copies_down() {
        let mut pace = Pace::default();
        steps(&mut pace, 0, 10, false, USUAL);
        steps(&mut pace, 1000, 10, true, USUAL);
        let rate = pace.rate;
        assert!(rate > FLOOR);
        // The first reads ever, in the same step as writes that take as long as usual.
        pace.answered(at(2000), false, USUAL * 20);
        steps(&mut pace, 2000, 1, true, USUAL);
        pace.look(at(2100));
        assert!(pace.rate > rate, "{} after {rate}", pace.rate);
    }

    #[test]
    fn nobody_waits_and_nothing_is_known_and_copies_still_go_on_at_the_floor() {
        let mut pace = Pace::default();
        let mut copied = 0;
        for ms in 0..1000 {
            pace.look(at(ms));
            while pace.admits(at(ms)) {
                pace.spend(at(ms), 64 << 10);
                copied += 64 << 10;
            }
            assert!(pace.next_timeout().is_some_and(|wake| wake > at(ms)), "it waits for a time to come");
        }
        assert_eq!(pace.rate, FLOOR);
        assert!((FLOOR * 9 / 10..FLOOR * 12 / 10).contains(&copied), "{copied}");
    }

    #[test]
    fn who_waits_unanswered_is_served_and_nobody_is_a_moment_after_the_last() {
        let mut pace = Pace::default();
        assert!(!pace.is_busy(at(0), 0) && pace.is_busy(at(0), 1));
        pace.answered(at(10), false, USUAL);
        assert!(pace.is_busy(at(209), 0) && !pace.is_busy(at(210), 0));
    }
}
