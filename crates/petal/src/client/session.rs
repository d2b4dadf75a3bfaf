//! What a client knows of an attached disk: its map as hinted, what replies said since (needs), and
//! the numbers of its requests (I6).

use crate::global_state::Attachment;
use crate::ids::*;
use crate::limits::{RETRY_MAX, RETRY_MIN, SESSION_NUMBERS_MAX};
use crate::message::{Hints, Tag};
use crate::translator::gmap::slot_of_element;
use smallvec::SmallVec;
use std::collections::{BTreeSet, VecDeque};
use stdx::{Duration, Instant};

/// Numbers that are given out in order and finished in any order.
///
/// ```text
///   1 .. below-1 | below        ..          next-1
///   all finished | unfinished, finished, unfinished, ...
/// ```
#[derive(Debug)]
pub(super) struct Numbers {
    below: u64,
    finished: VecDeque<bool>,
    spread_max: usize,
}

impl Numbers {
    /// Numbers from 1, of which at most `spread_max` lie between the oldest unfinished and the newest.
    pub fn new(spread_max: usize) -> Self {
        Numbers { below: 1, finished: VecDeque::new(), spread_max }
    }
    /// A number that was never given before; `None` while the oldest unfinished one is too far behind.
    pub fn next(&mut self) -> Option<u64> {
        if self.finished.len() >= self.spread_max {
            return None;
        }
        self.finished.push_back(false);
        Some(self.below + self.finished.len() as u64 - 1)
    }
    /// How many may be given out now.
    pub fn room(&self) -> usize {
        self.spread_max - self.finished.len()
    }
    /// Will never be sent again.
    pub fn finish(&mut self, number: u64) {
        let flag = number.checked_sub(self.below).and_then(|n| self.finished.get_mut(n as usize));
        let flag = flag.expect("a number that was given and is not finished");
        assert!(!*flag, "a number is finished once");
        *flag = true;
        while self.finished.front() == Some(&true) {
            self.finished.pop_front();
            self.below += 1;
        }
    }
    /// Every number below is finished. Never falls.
    pub fn finished_below(&self) -> u64 {
        self.below
    }
    /// True if a number is given out and not finished.
    pub fn is_open(&self, number: u64) -> bool {
        number.checked_sub(self.below).and_then(|n| self.finished.get(n as usize)) == Some(&false)
    }
}

/// What is known of a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    /// In sync, acting primary first.
    pub in_sync: SmallVec<[ServerId; 3]>,
    /// Term of the hint.
    pub hinted: Term,
    /// Highest term heard of.
    pub known: Term,
}

/// An attached disk.
#[derive(Debug)]
pub(super) struct Session {
    pub vdisk: VdiskId,
    pub name: String,
    pub mode: Attachment,
    pub size: u64,
    pub numbers: Numbers,
    /// Operations that wait for a number.
    pub without_number: VecDeque<u32>,
    /// Data requests that are begun and not answered.
    pub open: u32,
    /// No new requests are taken.
    pub detaching: bool,
    /// A server that knows enough said that the disk is gone.
    pub ended: bool,
    pub refresh: Refresh,
    /// When a person was last told that it waits.
    pub warned: Option<Instant>,
    /// Grows when another server acts in some slot: walks begin anew.
    pub map_changes: u64,
    slots: Vec<Slot>,
    gmap: GmapId,
    stripe_unit: u64,
    shift: u32,
    state_index: StateIndex,
    revision_hinted: Revision,
    revision_known: Revision,
}

/// Fetching hints: one call at a time, not too often.
#[derive(Debug)]
pub(super) struct Refresh {
    pub wanted: bool,
    pub call: Option<Tag>,
    pub not_before: Instant,
    pub pause: Duration,
    /// Who answered last, if that told nothing new: it may be cut off from the others, so another one is asked next.
    pub fruitless: Option<ServerId>,
}

impl Refresh {
    /// The next one begins not before the pause is over; pauses grow as long as nothing new is learnt.
    pub fn asked(&mut self, now: Instant, call: Tag) {
        self.wanted = false;
        self.call = Some(call);
        self.not_before = now + self.pause;
        self.pause = (self.pause * 2).min(RETRY_MAX);
    }

    /// Something newer was heard of: no long pause.
    pub fn hurry(&mut self, now: Instant) {
        self.pause = RETRY_MIN;
        if self.not_before > now + RETRY_MIN {
            self.not_before = now + RETRY_MIN;
            self.wanted = false;
        }
    }
}

/// True if hints have the shape that the rest relies on.
pub(super) fn hints_make_sense(hints: &Hints) -> bool {
    let slots = hints.slots.len();
    slots.is_power_of_two()
        && slots <= crate::limits::SLOTS_MAX as usize
        && hints.family.stripe_unit.is_power_of_two()
        && hints.family.stripe_unit >= ELEMENT_SIZE
}

impl Session {
    /// A session that began with the command of index `begun`. The hints make sense.
    pub fn new(now: Instant, hints: &Hints, mode: Attachment, begun: StateIndex) -> Session {
        let mut session = Session {
            vdisk: hints.vdisk.id,
            name: String::new(),
            mode,
            size: 0,
            numbers: Numbers::new(SESSION_NUMBERS_MAX),
            without_number: VecDeque::new(),
            open: 0,
            detaching: false,
            ended: false,
            refresh: Refresh { wanted: false, call: None, not_before: now, pause: RETRY_MIN, fruitless: None },
            warned: None,
            map_changes: 0,
            slots: Vec::new(),
            gmap: hints.family.gmap,
            stripe_unit: hints.family.stripe_unit,
            shift: 0,
            state_index: 0,
            revision_hinted: 0,
            revision_known: begun,
        };
        session.adopt(hints);
        session
    }

    /// Takes hints over, unless they are older than what is known. True if another server acts in a
    /// slot, or a copy came or went.
    pub fn adopt(&mut self, hints: &Hints) -> bool {
        debug_assert!(hints_make_sense(hints));
        if hints.state_index < self.state_index {
            return false;
        }
        let same_gmap = hints.family.gmap == self.gmap && hints.slots.len() == self.slots.len();
        let slots = hints.slots.iter().enumerate().map(|(n, hint)| {
            // What replies told of the slot's term since stays known.
            let known = if same_gmap { self.slots[n].known } else { 0 };
            Slot { in_sync: hint.in_sync.iter().copied().collect(), hinted: hint.term, known: known.max(hint.term) }
        });
        let slots: Vec<Slot> = slots.collect();
        let changed = !same_gmap || slots.iter().zip(&self.slots).any(|(new, old)| new.in_sync != old.in_sync);
        self.map_changes += u64::from(changed);
        self.slots = slots;
        self.gmap = hints.family.gmap;
        self.stripe_unit = hints.family.stripe_unit;
        self.shift = hints.family.shift;
        self.name.clone_from(&hints.vdisk.name);
        self.size = hints.vdisk.size;
        self.state_index = hints.state_index;
        self.revision_hinted = hints.revision;
        self.revision_known = self.revision_known.max(hints.revision);
        changed
    }

    /// Slot of an element.
    pub fn slot_number(&self, element: u64) -> u32 {
        slot_of_element(element, self.stripe_unit, self.shift, self.slots.len() as u32)
    }
    /// Every server that holds a copy of something.
    pub fn servers(&self) -> impl Iterator<Item = ServerId> + '_ {
        self.slots.iter().flat_map(|s| s.in_sync.iter().copied())
    }
    /// What is known of the slot of an element.
    pub fn slot(&self, element: u64) -> &Slot {
        &self.slots[self.slot_number(element) as usize]
    }
    /// Who acts in a slot by the hints; `None` if there is no such slot or nobody.
    pub fn acting(&self, slot: u32) -> Option<ServerId> {
        self.slots.get(slot as usize)?.in_sync.first().copied()
    }
    /// What a message about an element relies on.
    pub fn need(&self, element: u64) -> Need {
        Need { revision: self.revision_known, term: self.slot(element).known }
    }
    /// What a message about no slot relies on.
    pub fn need_of_disk(&self) -> Need {
        Need { revision: self.revision_known, term: 0 }
    }
    /// Merges what a reply about an element relied on. True if it is newer than the hints.
    pub fn merge(&mut self, now: Instant, element: u64, need: Need) -> bool {
        let slot = self.slot_number(element) as usize;
        let slot = &mut self.slots[slot];
        if need.term > slot.known || need.revision > self.revision_known {
            self.refresh.hurry(now);
        }
        slot.known = slot.known.max(need.term);
        self.revision_known = self.revision_known.max(need.revision);
        need.term > slot.hinted || need.revision > self.revision_hinted
    }
    /// True if something newer than the hints was heard of.
    pub fn is_behind(&self) -> bool {
        self.revision_known > self.revision_hinted || self.slots.iter().any(|s| s.known > s.hinted)
    }
    /// The slots of elements `first..end`, each once.
    fn slots_of(&self, first: u64, end: u64) -> impl Iterator<Item = u32> {
        let per_unit = self.stripe_unit / ELEMENT_SIZE;
        let (first_unit, last_unit) = (first / per_unit, (end - 1) / per_unit);
        let count = (last_unit - first_unit).saturating_add(1).min(self.slots.len() as u64);
        (0..count).map(move |n| self.slot_number((first_unit + n) * per_unit))
    }
    /// True if a server ought to answer, by the hints, for one of these slots in elements `first..end`.
    pub fn misses(&self, server: ServerId, slots: &[u32], first: u64, end: u64) -> bool {
        let slots: BTreeSet<u32> = slots.iter().copied().filter(|s| self.acting(*s) == Some(server)).collect();
        !slots.is_empty() && self.slots_of(first, end).any(|slot| slots.contains(&slot))
    }
    /// The servers that act in the slots of elements `first..end`, ascending; `None` if nobody acts in
    /// one of them.
    pub fn acting_in(&self, first: u64, end: u64) -> Option<Vec<ServerId>> {
        let slots = self.slots_of(first, end);
        let mut servers = slots.map(|slot| self.acting(slot)).collect::<Option<Vec<ServerId>>>()?;
        servers.sort_unstable();
        servers.dedup();
        Some(servers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finished_below_waits_for_the_oldest_and_never_falls() {
        let mut numbers = Numbers::new(4);
        let given: Vec<u64> = (0..4).map(|_| numbers.next().unwrap()).collect();
        assert_eq!(given, [1, 2, 3, 4]);
        assert_eq!(numbers.next(), None, "the spread is bounded");
        numbers.finish(2);
        numbers.finish(4);
        assert_eq!(numbers.finished_below(), 1);
        numbers.finish(1);
        assert_eq!(numbers.finished_below(), 3);
        assert_eq!(numbers.next(), Some(5));
        numbers.finish(3);
        assert_eq!(numbers.finished_below(), 5);
        assert!(numbers.is_open(5) && !numbers.is_open(4));
    }
}
