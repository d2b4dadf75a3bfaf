//! Space reserved ahead (2.6 step 1): how many blocks one server may have on their way to another.
//!
//! A replica that ran out of space after the primary had stored a write would leave the two copies
//! different, and the client with an error for a write that may be read. So a replica keeps blocks free
//! for each primary (`granted`), tells how many with every acknowledgement, and the primary keeps what
//! is not acknowledged within it. The replica lowers the number only by what the same acknowledgement
//! releases, so the primary's books and the replica's never contradict each other.

use crate::ids::*;
use crate::limits::SLOT_UNFINISHED_MAX;
use std::collections::BTreeMap;

/// The window between this server and one other, in both directions.
#[derive(Debug, Default)]
pub struct Window {
    /// The other's life that the books are about.
    pub incarnation: Incarnation,
    /// As primary: blocks that may be on their way to it.
    pub limit: u64,
    /// As primary: blocks on their way to it.
    pub in_flight: u64,
    /// As primary: it is small because the other is full.
    pub full: bool,
    /// As replica: blocks that the other may have on their way to here.
    pub granted: u64,
    /// As replica: of these, already staged and not yet answered.
    pub staged: u64,
    /// As replica: stable, to be told with the next acknowledgement.
    pub released: u64,
    /// As replica: the other was told that there is no room; it must hear when there is again.
    pub told_full: bool,
}

impl Window {
    /// Blocks that must stay free here for the other.
    pub fn reserved(&self) -> u64 {
        self.granted.saturating_sub(self.staged)
    }

    /// True if a write of `cost` blocks may be sent. One write may always be under way, whatever its
    /// size, unless the other is full.
    pub fn admits(&self, cost: u64) -> bool {
        cost == 0 || self.in_flight + cost <= self.limit
    }

    /// As replica: the number to tell now. `available` is what is free here beyond all reservations.
    pub fn grant(&mut self, target: u64, available: u64) -> u64 {
        let floor = self.granted.saturating_sub(self.released);
        self.staged = self.staged.saturating_sub(self.released);
        self.released = 0;
        // Reservation after lowering to the floor is what it was; anything above is taken from what is free.
        self.granted = floor;
        let room = available.saturating_sub(self.reserved());
        self.granted = if target > floor { floor + (target - floor).min(room) } else { floor };
        self.granted
    }
}

/// Is there room for a write, here and at every receiver?
pub enum Room {
    /// Yes.
    Yes,
    /// Not now, but when what is on its way has been answered.
    Later,
    /// Somebody is full.
    No,
}

/// Room for a write of `cost` blocks here, where `free` are free, and at every receiver.
pub fn room(
    windows: &BTreeMap<ServerId, Window>,
    me: ServerId,
    receivers: &[ServerId],
    unfinished: usize,
    free: u64,
    cost: u64,
) -> Room {
    if unfinished >= SLOT_UNFINISHED_MAX {
        return Room::Later;
    }
    if cost == 0 {
        return Room::Yes;
    }
    let reserved: u64 = windows.values().map(Window::reserved).sum();
    if free < reserved + cost {
        return Room::No;
    }
    for receiver in receivers.iter().filter(|r| **r != me) {
        let Some(window) = windows.get(receiver) else { return Room::Later };
        if !window.admits(cost) {
            return if window.full && window.in_flight == 0 { Room::No } else { Room::Later };
        }
    }
    Room::Yes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grant_never_promises_more_than_is_free_and_never_takes_back_what_may_be_on_its_way() {
        let mut w = Window::default();
        assert_eq!(w.grant(100, 60), 60);
        assert_eq!(w.reserved(), 60);
        // 20 blocks arrive and become stable; meanwhile somebody else filled the disk.
        w.staged += 20;
        assert_eq!(w.reserved(), 40);
        w.released += 20;
        assert_eq!(w.grant(100, 40), 40, "only what the acknowledgement released is lowered");
        assert_eq!(w.reserved(), 40);
        assert_eq!(w.grant(0, 40), 40, "what may be on its way is never taken back");
    }
}
