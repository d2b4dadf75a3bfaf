//! A server's own clock: not the world's, and not quite as fast.
//!
//! Every machine's CLOCK_BOOTTIME has its own origin and its own rate; promise P9 allows rates within
//! 1 %. Nothing may compare the clocks of two machines, and a core that did would be found out here.

use stdx::Instant;

/// A clock with an origin and a rate of its own.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    origin: u64,
    /// Parts per million that it runs fast (or, negative, slow).
    drift: i64,
}

impl Clock {
    /// A clock that shows `origin` at the world's zero and runs `drift` parts per million fast.
    pub fn new(origin: u64, drift: i64) -> Clock {
        assert!(drift.abs() < 500_000, "a clock that runs twice as fast is broken");
        Clock { origin, drift }
    }

    /// What it shows when the world's time is `world`.
    pub fn local(self, world: Instant) -> Instant {
        Instant::from_nanos(self.origin + scale(world.as_nanos(), self.drift))
    }

    /// The first moment of the world at which it shows `local` or more.
    pub fn world(self, local: Instant) -> Instant {
        let wanted = local.as_nanos().saturating_sub(self.origin);
        let rate = i128::from(1_000_000 + self.drift);
        let mut world = u64::try_from(i128::from(wanted) * 1_000_000 / rate).unwrap_or(u64::MAX);
        while scale(world, self.drift) < wanted && world < u64::MAX {
            world += 1;
        }
        Instant::from_nanos(world)
    }
}

fn scale(nanos: u64, drift: i64) -> u64 {
    let shifted = i128::from(nanos) + i128::from(nanos) * i128::from(drift) / 1_000_000;
    u64::try_from(shifted).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timer_of_a_drifting_clock_never_fires_early() {
        for drift in [-10_000, -1, 0, 3, 10_000] {
            let clock = Clock::new(77, drift);
            for local in [77, 78, 1_000, 123_456_789, 9_876_543_210] {
                let world = clock.world(Instant::from_nanos(local));
                assert!(clock.local(world).as_nanos() >= local, "drift {drift}, local {local}");
                if let Some(before) = world.as_nanos().checked_sub(1) {
                    assert!(clock.local(Instant::from_nanos(before)).as_nanos() < local);
                }
            }
        }
    }
}
