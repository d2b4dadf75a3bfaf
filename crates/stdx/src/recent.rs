//! How long something took lately: a smoothed value, and the time that all but a few stay below.
//!
//! For decisions that follow the load by themselves: when a read has waited so long that another copy is asked,
//! which disk is slower than the others. Costs 300 bytes and a few nanoseconds for each sample; a quantile of a
//! window forgets a bad minute completely, which a decaying one does not.

use crate::Duration;

/// Samples that the quantile is taken from.
const WINDOW: usize = 64;
/// New samples between two looks at the window.
const LOOK_EVERY: usize = 8;
/// A new sample's weight in the smoothed value: one in eight.
const WEIGHT: u64 = 8;

/// Times of one kind.
#[derive(Clone, Debug)]
pub struct Recent {
    /// In microseconds, the newest in the place of the oldest.
    window: [u32; WINDOW],
    count: usize,
    /// Smoothed, in nanoseconds.
    smoothed: u64,
    p95: u32,
}

impl Default for Recent {
    fn default() -> Self {
        Recent { window: [0; WINDOW], count: 0, smoothed: 0, p95: 0 }
    }
}

impl Recent {
    /// It took so long.
    pub fn add(&mut self, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).max(1);
        self.smoothed = match self.count {
            0 => nanos,
            _ => self.smoothed - self.smoothed / WEIGHT + nanos / WEIGHT,
        };
        self.window[self.count % WINDOW] = u32::try_from(nanos.div_ceil(1000)).unwrap_or(u32::MAX);
        self.count += 1;
        if self.count.is_multiple_of(LOOK_EVERY) {
            let mut window = self.window;
            let known = &mut window[..self.count.min(WINDOW)];
            let place = known.len() * 95 / 100;
            self.p95 = *known.select_nth_unstable(place).1;
        }
    }

    /// It has taken so long and is not over: counts only if that is news.
    pub fn at_least(&mut self, time: Duration) {
        if time > self.smoothed() {
            self.add(time);
        }
    }

    /// Smoothed; zero before the first sample.
    pub fn smoothed(&self) -> Duration {
        Duration::from_nanos(self.smoothed)
    }

    /// What 95 of 100 stay below; `None` before there are a few samples.
    pub fn p95(&self) -> Option<Duration> {
        (self.count >= LOOK_EVERY).then(|| Duration::from_micros(self.p95.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_quantile_is_that_of_the_last_samples_and_forgets_older_ones() {
        let mut recent = Recent::default();
        for n in 1..=7 {
            recent.add(Duration::from_millis(n));
        }
        assert_eq!(recent.p95(), None);
        for n in 1..=1000 {
            recent.add(Duration::from_millis(n));
        }
        // The last look was at the sample before the last seven: 930 to 993.
        assert_eq!(recent.p95(), Some(Duration::from_millis(990)));
        for _ in 0..WINDOW + LOOK_EVERY {
            recent.add(Duration::from_micros(10));
        }
        assert_eq!(recent.p95(), Some(Duration::from_micros(10)));
    }

    #[test]
    fn a_wait_that_is_not_over_counts_only_if_it_is_longer_than_usual() {
        let mut recent = Recent::default();
        recent.add(Duration::from_millis(8));
        recent.at_least(Duration::from_millis(7));
        assert_eq!(recent.smoothed(), Duration::from_millis(8));
        recent.at_least(Duration::from_millis(80));
        assert_eq!(recent.smoothed(), Duration::from_millis(17));
    }

    #[test]
    fn the_longest_and_the_shortest_times_do_no_harm() {
        let mut recent = Recent::default();
        for time in [Duration::ZERO, Duration::MAX, Duration::from_secs(1 << 40)].repeat(9) {
            recent.add(time);
            recent.at_least(time);
        }
        assert!(recent.p95().is_some());
    }
}
