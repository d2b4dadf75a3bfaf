//! The clock: CLOCK_BOOTTIME, which also counts the time that a machine sleeps.
//!
//! Promise P9: no wall clock takes part in correctness. `std::time::Instant` stops while a laptop
//! or a suspended machine sleeps; a lease that it measured would outlive its time. A hypervisor that
//! stops a machine without its clock noticing is outside of what this can see.

use rustix::time::{ClockId, clock_gettime};
use stdx::Instant;

/// The time now. The origin is the start of the machine: instants of two processes on one machine
/// compare, those of two machines do not.
pub fn now() -> Instant {
    let t = clock_gettime(ClockId::Boottime);
    Instant::from_nanos((t.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(t.tv_nsec as u64))
}

/// The wall clock, in seconds since 1970: for names and ages (P9).
pub fn unix_seconds() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| d.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_never_goes_back_and_does_go_on() {
        let first = now();
        let mut last = first;
        while last.since(first) < std::time::Duration::from_micros(50) {
            let next = now();
            assert!(next >= last);
            last = next;
        }
    }
}
