//! Space reserved ahead (2.6 step 1): how many blocks one server may have on their way to another.
//!
//! A replica that ran out of space after the primary had stored a write would leave the two copies
//! different, and the client with an error for a write that may be read. So a replica keeps blocks free
//! for each primary (`granted`), tells how many with every acknowledgement, and the primary keeps what
//! is not acknowledged within it. The replica lowers the number only by what the same acknowledgement
//! releases and by what the primary has given back, so the primary's books and the replica's never
//! contradict each other.
//!
//! A primary that sends nothing would keep its blocks while the disk fills up, and nobody could have
//! them. So they are asked back (`Credit::keep`) as room gets scarce; it gives back what it does not use
//! (`CreditReturned`). Both sides count what was given back in all, so that neither an acknowledgement
//! that was on its way meanwhile nor a lost connection makes it count twice or not at all.
//!
//! A disk that is nearly full takes only overwrites (`Takes`): they give back as much as they take, once
//! they are stable, so what is stored can always be written over.

use crate::ids::*;
use crate::limits::SLOT_UNFINISHED_MAX;
use crate::message::{Credit, Takes};
use std::collections::BTreeMap;
use stdx::{Duration, Instant};

/// How long a peer that was asked to give back may let everybody wait for it.
const RETURN_WITHIN: Duration = Duration::from_secs(1);

/// The window between this server and one other, in both directions.
#[derive(Debug)]
pub struct Window {
    /// The other's life that the books are about.
    pub incarnation: Incarnation,
    /// As primary: blocks that may be on their way to it.
    limit: u64,
    /// As primary: blocks on their way to it.
    pub in_flight: u64,
    /// As primary: blocks given back to it, in all.
    pub returned: u64,
    /// As primary: what it takes.
    pub takes: Takes,
    /// As replica: blocks that the other may have on their way to here.
    granted: u64,
    /// As replica: of these, already staged and not yet answered.
    pub staged: u64,
    /// As replica: stable, to be told with the next acknowledgement.
    pub released: u64,
    /// As replica: what the other has given back, in all.
    taken_back: u64,
    /// As replica: it is to be asked, was asked at this moment and has not answered, and was left this much.
    ask_due: bool,
    asked: Option<Instant>,
    asked_for: u64,
    /// As replica: what it was told last.
    told: Takes,
}

/// What a replica can offer one primary.
#[derive(Clone, Copy, Debug)]
pub struct Offer {
    /// Blocks that would be its fair share.
    pub target: u64,
    /// Blocks that are free beyond all reservations for others.
    pub available: u64,
    /// Only overwrites are taken.
    pub is_full: bool,
    /// Something is on its way after which more may be free.
    pub may_free: bool,
}

impl Offer {
    /// To one who has so much already.
    pub fn to(&self, window: &Window) -> Offer {
        Offer { available: self.available + window.reserved(), ..*self }
    }
}

impl Default for Window {
    fn default() -> Self {
        Window::new(Incarnation(0))
    }
}

impl Window {
    /// Nothing granted yet in this life of the other.
    pub fn new(incarnation: Incarnation) -> Window {
        Window {
            incarnation,
            limit: 0,
            in_flight: 0,
            returned: 0,
            takes: Takes::Everything,
            granted: 0,
            staged: 0,
            released: 0,
            taken_back: 0,
            ask_due: false,
            asked: None,
            asked_for: u64::MAX,
            told: Takes::Everything,
        }
    }

    /// Blocks that must stay free here for the other.
    pub fn reserved(&self) -> u64 {
        self.granted.saturating_sub(self.staged)
    }

    /// True if a write of `cost` blocks may be sent.
    pub fn admits(&self, cost: u64) -> bool {
        cost == 0 || self.in_flight + cost <= self.limit
    }

    /// As primary: what the other tells. Something is to be given back if it asks for that.
    pub fn on_credit(&mut self, credit: Credit) -> Option<u64> {
        self.limit = credit.window.saturating_sub(self.returned.saturating_sub(credit.returned));
        self.takes = credit.takes;
        let back = self.limit.saturating_sub(credit.keep?.max(self.in_flight));
        self.limit -= back;
        self.returned = self.returned.saturating_add(back);
        Some(self.returned)
    }

    /// As replica: the other has given back so much in all.
    pub fn on_returned(&mut self, blocks: u64) {
        let back = blocks.saturating_sub(self.taken_back);
        self.taken_back += back;
        self.granted = self.granted.saturating_sub(back);
        self.asked = None;
    }

    fn grant(&mut self, offer: &Offer) {
        // Reservation after lowering to the floor is what it was; anything above is taken from what is free.
        let floor = self.granted.saturating_sub(self.released);
        self.staged = self.staged.saturating_sub(self.released);
        self.released = 0;
        self.granted = floor;
        self.granted = self.would_have(offer);
        if self.granted > floor {
            self.asked_for = u64::MAX;
        }
    }

    fn would_have(&self, offer: &Offer) -> u64 {
        let room = offer.available.saturating_sub(self.reserved());
        self.granted + offer.target.saturating_sub(self.granted).min(room)
    }

    fn takes(&self, offer: &Offer) -> Takes {
        match offer.is_full {
            false => Takes::Everything,
            true if self.would_have(offer) < WINDOW_MIN && !offer.may_free => Takes::Nothing,
            true => Takes::Overwrites,
        }
    }

    /// As replica: what to tell now.
    pub fn credit(&mut self, now: Instant, offer: &Offer) -> Credit {
        self.grant(offer);
        self.told = self.takes(offer);
        let keep = std::mem::take(&mut self.ask_due).then_some(offer.target);
        if keep.is_some() {
            (self.asked, self.asked_for) = (Some(now), offer.target);
        }
        Credit { window: self.granted, returned: self.taken_back, keep, takes: self.told }
    }

    /// As replica: true if the other should hear of its window although nothing else is to be told: it has far more
    /// than is fair, it waits and can have more, or something else is taken than it knows.
    pub fn is_due(&mut self, offer: &Offer) -> bool {
        let has_too_much = self.reserved() * 2 > offer.target * 3;
        self.ask_due = has_too_much && offer.target * 4 <= self.asked_for.saturating_mul(3);
        let (has, would_have) = (self.granted, self.would_have(offer));
        let is_large_enough_now = has < WINDOW_MIN && would_have >= WINDOW_MIN;
        let more = has < WINDOW_USEFUL && would_have >= 2 * has.max(WINDOW_MIN / 2);
        self.ask_due || is_large_enough_now || more || self.told != self.takes(offer)
    }

    /// As replica: the other was asked not long ago, and has not answered.
    pub fn may_return(&self, now: Instant) -> bool {
        self.asked.is_some_and(|at| now.since(at) < RETURN_WITHIN)
    }

    /// As replica: the other was asked, and has not answered in time.
    pub fn is_silent(&self, now: Instant) -> bool {
        self.asked.is_some() && !self.may_return(now)
    }

    /// The connection is gone, and what was asked on it.
    pub fn on_disconnected(&mut self) {
        (self.asked, self.asked_for) = (None, u64::MAX);
    }
}

/// The largest write of one element: so much everybody can have while anything is free.
pub const WINDOW_MIN: u64 = BLOCKS_PER_ELEMENT as u64;
/// Who has less than four of these may be waiting for more.
const WINDOW_USEFUL: u64 = 4 * WINDOW_MIN;

/// Is there room for a write, here and at every receiver?
#[derive(Debug, PartialEq, Eq)]
pub enum Room {
    /// Yes.
    Yes,
    /// Not now, but when what is on its way has been answered.
    Later,
    /// Somebody is full.
    No,
}

/// The room that there is at a primary.
#[derive(Clone, Copy, Debug)]
pub struct Space {
    /// Blocks that are free, also what is reserved.
    pub free: u64,
    /// Of these, what writes of new blocks may take.
    pub growth: u64,
    /// It is full, and takes only overwrites.
    pub is_full: bool,
    /// Something is on its way after which more may be free.
    pub may_free: bool,
    /// The write has waited so long that it is refused, if anybody is full.
    pub is_late: bool,
}

/// Room for a write of `cost` blocks here and at every receiver. `grows` tells whether it takes more than it gives back.
pub fn room(
    windows: &BTreeMap<ServerId, Window>,
    me: ServerId,
    receivers: &[ServerId],
    unfinished: usize,
    space: Space,
    cost: u64,
    grows: impl FnOnce() -> bool,
) -> Room {
    if unfinished >= SLOT_UNFINISHED_MAX {
        return Room::Later;
    }
    if cost == 0 {
        return Room::Yes;
    }
    let others = || receivers.iter().filter(|r| **r != me);
    let is_full = |r: &ServerId| windows.get(r).is_some_and(|w| w.takes != Takes::Everything);
    let reserved: u64 = windows.values().map(Window::reserved).sum();
    let wait = if space.may_free && !space.is_late { Room::Later } else { Room::No };
    let is_full = space.is_full || others().any(is_full);
    if (is_full || space.growth < reserved + cost) && grows() {
        return if is_full { Room::No } else { wait };
    }
    if space.free < reserved + cost {
        return wait;
    }
    for receiver in others() {
        let Some(window) = windows.get(receiver) else { return Room::Later };
        if !window.admits(cost) {
            let is_hopeless = window.takes == Takes::Nothing && window.in_flight == 0;
            let is_late = window.takes != Takes::Everything && space.is_late;
            return if is_hopeless || is_late { Room::No } else { Room::Later };
        }
    }
    Room::Yes
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Instant = Instant::ZERO;
    const ME: ServerId = ServerId(1);
    const OTHER: ServerId = ServerId(2);

    fn offer(target: u64, available: u64) -> Offer {
        Offer { target, available, is_full: false, may_free: false }
    }

    fn told(w: &mut Window, target: u64, available: u64) -> Credit {
        w.credit(NOW, &offer(target, available))
    }

    #[test]
    fn a_grant_never_promises_more_than_is_free_and_never_takes_back_what_may_be_on_its_way() {
        let mut w = Window::new(Incarnation(1));
        assert_eq!(told(&mut w, 100, 60).window, 60);
        assert_eq!(w.reserved(), 60);
        // 20 blocks arrive and become stable; meanwhile somebody else filled the disk.
        w.staged += 20;
        assert_eq!(w.reserved(), 40);
        w.released += 20;
        assert_eq!(told(&mut w, 100, 40).window, 40, "only what the acknowledgement released is lowered");
        assert_eq!(w.reserved(), 40);
        assert_eq!(told(&mut w, 0, 40).window, 40, "what may be on its way is never taken back");
    }

    #[test]
    fn what_is_not_used_is_given_back_when_it_is_asked_for_and_counts_once() {
        let (mut replica, mut primary) = (Window::new(Incarnation(1)), Window::new(Incarnation(1)));
        assert_eq!(primary.on_credit(told(&mut replica, 1000, 5000)), None);
        primary.in_flight = 150;
        assert!(!replica.is_due(&offer(700, 5000)), "not far more than is fair");
        assert!(replica.is_due(&offer(100, 500)));
        let asks = told(&mut replica, 100, 500);
        assert_eq!(asks.keep, Some(100));
        assert!(replica.may_return(NOW) && !replica.may_return(NOW + RETURN_WITHIN));
        assert!(!replica.is_due(&offer(100, 500)), "asked once");
        // Another acknowledgement was on its way before it came back.
        let meanwhile = told(&mut replica, 100, 500);
        assert_eq!(primary.on_credit(asks), Some(850), "what is on its way is kept");
        assert_eq!(primary.on_credit(meanwhile), None);
        assert!(primary.admits(0) && !primary.admits(1), "an older word gives nothing back twice");
        replica.on_returned(850);
        replica.on_returned(850);
        assert_eq!(replica.reserved(), 150);
        assert!(!replica.may_return(NOW));
        primary.on_credit(told(&mut replica, 100, 500));
        primary.in_flight = 0;
        assert!(primary.admits(150) && !primary.admits(151));
    }

    #[test]
    fn a_full_disk_takes_overwrites_and_nothing_else() {
        let mut windows = BTreeMap::from([(OTHER, Window::new(Incarnation(1)))]);
        let space = Space { free: 100, growth: 100, is_full: false, may_free: false, is_late: false };
        let room_for = |windows: &BTreeMap<ServerId, Window>, space, cost, grows| {
            room(windows, ME, &[ME, OTHER], 0, space, cost, || grows)
        };
        let credit = |window, takes| Credit { window, returned: 0, keep: None, takes };
        let full = Space { growth: 8, ..space };
        windows.get_mut(&OTHER).unwrap().on_credit(credit(20, Takes::Everything));
        assert_eq!(room_for(&windows, space, 16, true), Room::Yes);
        assert_eq!(room_for(&windows, full, 16, true), Room::No);
        assert_eq!(room_for(&windows, Space { may_free: true, ..full }, 16, true), Room::Later);
        assert_eq!(room_for(&windows, full, 16, false), Room::Yes);
        assert_eq!(room_for(&windows, Space { is_full: true, may_free: true, ..space }, 16, true), Room::No);
        assert_eq!(room_for(&windows, Space { is_full: true, ..space }, 16, false), Room::Yes);
        windows.get_mut(&OTHER).unwrap().on_credit(credit(20, Takes::Overwrites));
        assert_eq!(room_for(&windows, space, 16, true), Room::No);
        assert_eq!(room_for(&windows, space, 16, false), Room::Yes);
        assert_eq!(room_for(&windows, full, 101, false), Room::No);
        assert_eq!(room_for(&windows, Space { may_free: true, ..full }, 101, false), Room::Later);
        assert_eq!(room_for(&windows, Space { may_free: true, is_late: true, ..full }, 101, false), Room::No);
        windows.get_mut(&OTHER).unwrap().on_credit(credit(8, Takes::Overwrites));
        assert_eq!(room_for(&windows, space, 16, false), Room::Later, "it may get more");
        assert_eq!(room_for(&windows, Space { is_late: true, ..space }, 16, false), Room::No);
        windows.get_mut(&OTHER).unwrap().on_credit(credit(8, Takes::Nothing));
        assert_eq!(room_for(&windows, space, 16, false), Room::No);
    }

    #[test]
    fn who_waits_for_more_than_it_has_hears_of_it() {
        let mut w = Window::new(Incarnation(1));
        assert_eq!(told(&mut w, 15, 15).window, 15);
        assert!(!w.is_due(&offer(15, 100)));
        assert!(w.is_due(&offer(16, 100)), "one write of sixteen blocks");
    }
}
