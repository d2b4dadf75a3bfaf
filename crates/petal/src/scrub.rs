//! Scrub (P7): every block of this server's disks is read now and then, so that what went bad is found while another
//! copy is good, and not when that one is gone.
//!
//! ```text
//!  round:    idle --due, or asked for--> walking (pages of the PMap) --all looked at--> idle
//!
//!  element:  Loading -> Reading --good--> done
//!                          |  ^
//!                          v  | a moment later: what was just written may not be there yet
//!                        Again
//!                          `--bad again--> Repairing (`repair.rs`) -> done, repaired or not
//! ```
//!
//! A round takes two weeks unless the configuration says otherwise: its elements are spread evenly over that time, one
//! read at a time. A round that somebody asked for goes as fast as a few reads side by side get; while clients are
//! served it is one at a time, and the disk rests after each for as long as it took. So nothing of this may be felt.
//!
//! What is bad goes the way of every bad block. The round waits for that, at most [`REPAIR_PATIENCE`], and counts
//! what was found and what was repaired.
//!
//! Where a round is, is written down now and then among the durable metadata (`Record`), and goes on there after a
//! restart; a few elements are then read twice.
//!
//! How it fails: an element that cannot be loaded is passed over: its disk is about to be taken for failed. A wall
//! clock takes part, in what people are told and in when the next round is due, nowhere else (P9).
//!
//! Not looked at: the journal (a start reads it) and free blocks. Pages of the PMap are checked as they are read.
//! Design 2.7, 2.10.

use crate::data_access::{Context, DataAccess, LoadWaiter, ReadOwner, SlotIndex, family_ended};
use crate::ids::*;
use crate::message::{ScrubOrder, ScrubRound, ScrubStatus};
use crate::store::{Change, DiskError, Loaded, ReadBlocks, ReadError, ReadId};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use stdx::{Duration, Instant};

/// How long a round takes by default: two weeks.
pub const PERIOD_DEFAULT: Duration = Duration::from_secs(14 * 24 * 3600);
/// Elements asked for at a time.
const STEP: usize = 64;
/// Elements read side by side in a round that was asked for, while nobody else asks for anything: 512 KiB.
const READS_IDLE: usize = 8;
/// Elements that wait for their repair at most; then nothing new is looked at.
const REPAIRS_MAX: usize = 32;
/// Clients count as being served for so long after the last sign of them.
const BUSY_FOR: Duration = Duration::from_millis(20);
/// An element that looks bad is read again after so long, and so often.
const AGAIN_AFTER: Duration = Duration::from_millis(100);
const TRIES: u32 = 2;
/// How long a round waits for a repair: longer than a repair asks the other members.
const REPAIR_PATIENCE: Duration = Duration::from_secs(30);
/// Time that a paced round may make up for at once.
const CATCH_UP: Duration = Duration::from_secs(1);
/// Bounds of the time between two notes of how far a round is.
const SAVE_MIN: Duration = Duration::from_secs(1);
const SAVE_MAX: Duration = Duration::from_secs(600);
/// A walk that failed is tried again after so long.
const WALK_AGAIN: Duration = Duration::from_secs(10);
/// Key of the durable metadata, and its format.
const KEY: &[u8] = b"scrub";
const FORMAT: u8 = 1;

/// How a server scrubs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScrubConfig {
    /// Time of a round; `None`: only when somebody asks for one.
    pub period: Option<Duration>,
    /// Seconds since 1970 when the server starts: for people, and for when the next round is due.
    pub unix_seconds: u64,
}

impl Default for ScrubConfig {
    fn default() -> Self {
        ScrubConfig { period: Some(PERIOD_DEFAULT), unix_seconds: 0 }
    }
}

/// What is kept across restarts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    present: Option<ScrubRound>,
    is_full: bool,
    /// Everything up to here was looked at in the present round.
    after: Option<ElementKey>,
    last: Option<ScrubRound>,
}

/// Where an element that is being looked at is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    Loading { tries: u32 },
    Reading { read: ReadId, blocks: u64, tries: u32, since: Instant },
    Again { at: Instant, tries: u32 },
    Repairing { until: Instant, blocks: u64 },
}

/// The scrub of a server.
pub(crate) struct Scrub {
    config: ScrubConfig,
    started: Instant,
    /// The server serves; else nothing moves.
    is_on: bool,
    record: Record,
    scan: Option<ReadId>,
    /// Found by the walk, not begun.
    queue: VecDeque<ElementKey>,
    /// The walk goes on after this one.
    walked: Option<ElementKey>,
    is_walked: bool,
    looks: BTreeMap<ElementKey, Look>,
    /// No other element before this moment.
    next_at: Instant,
    next_round: Option<Instant>,
    save_at: Instant,
    last_busy: Option<Instant>,
}

impl Scrub {
    /// Of a server that begins its life.
    pub fn new(now: Instant, config: ScrubConfig) -> Scrub {
        Scrub {
            config,
            started: now,
            is_on: false,
            record: Record::default(),
            scan: None,
            queue: VecDeque::new(),
            walked: None,
            is_walked: false,
            looks: BTreeMap::new(),
            next_at: now,
            next_round: None,
            save_at: now,
            last_busy: None,
        }
    }

    /// What people are told.
    pub fn status(&self) -> ScrubStatus {
        ScrubStatus {
            present: self.record.present.clone(),
            is_full: self.record.is_full,
            last: self.record.last.clone(),
            period_seconds: self.config.period.map_or(0, |p| p.as_secs()),
        }
    }

    /// True if the walk was asked for by this.
    pub fn owns(&self, scan: ReadId) -> bool {
        self.scan == Some(scan)
    }

    /// When something is due.
    pub fn next_timeout(&self) -> Option<Instant> {
        if !self.is_on {
            return None;
        }
        if self.record.present.is_none() {
            return self.next_round;
        }
        let due = |look: &Look| match look {
            Look::Again { at, .. } | Look::Repairing { until: at, .. } => Some(*at),
            Look::Loading { .. } | Look::Reading { .. } => None,
        };
        let looks = self.looks.values().filter_map(due);
        let more = (self.has_more() && self.may_begin()).then_some(self.next_at);
        looks.chain(more).chain([self.save_at]).min()
    }

    /// There is something to begin, to ask for, or to end.
    fn has_more(&self) -> bool {
        self.scan.is_none() && (!self.queue.is_empty() || !self.is_walked || self.looks.is_empty())
    }

    /// As far as its bounds and its pace are concerned.
    fn may_begin(&self) -> bool {
        let most = if self.record.is_full && self.last_busy.is_none() { READS_IDLE } else { 1 };
        let repairing = self.looks.values().filter(|l| matches!(l, Look::Repairing { .. })).count();
        let is_paced = self.record.is_full || self.config.period.is_some();
        is_paced && repairing < REPAIRS_MAX && self.looks.len() - repairing < most
    }

    fn unix(&self, now: Instant) -> u64 {
        self.config.unix_seconds + now.since(self.started).as_secs()
    }

    fn begin_round(&mut self, now: Instant, elements: u64, is_full: bool) {
        let number = [&self.record.present, &self.record.last].into_iter().flatten().map(|r| r.number).max();
        let began = self.unix(now);
        let round = ScrubRound { number: number.unwrap_or(0) + 1, began, of: elements, ..ScrubRound::default() };
        self.record = Record { present: Some(round), is_full, after: None, last: self.record.last.take() };
        self.walk_from(now, None);
        self.save_at = now;
    }

    fn walk_from(&mut self, now: Instant, after: Option<ElementKey>) {
        // A page that was asked for before is of no interest any more.
        (self.scan, self.queue, self.walked, self.is_walked) = (None, VecDeque::new(), after, false);
        self.next_at = now;
    }

    fn end_round(&mut self, now: Instant) {
        let unix = self.unix(now);
        if let Some(mut round) = self.record.present.take() {
            round.ended = Some(unix);
            self.record.last = Some(round);
        }
        (self.record.is_full, self.record.after) = (false, None);
        self.plan_round(now);
        self.save_at = now;
    }

    /// A period after the last one began; a wall clock that went back must not put it off for longer.
    fn plan_round(&mut self, now: Instant) {
        let waits = |period: Duration| match &self.record.last {
            None => Duration::ZERO,
            Some(last) => {
                Duration::from_secs((last.began + period.as_secs()).saturating_sub(self.unix(now))).min(period)
            }
        };
        self.next_round = self.config.period.map(|period| now + waits(period).max(AGAIN_AFTER));
    }

    /// Time between two elements of a paced round.
    fn interval(&self) -> Duration {
        match (self.config.period, &self.record.present) {
            (Some(period), Some(round)) if !self.record.is_full => period / (round.of.clamp(1, 1 << 31) as u32),
            _ => Duration::ZERO,
        }
    }

    /// Everything up to here was looked at, as far as it is one piece.
    fn done_through(&self) -> Option<ElementKey> {
        let first = self.looks.keys().chain(self.queue.front()).min();
        first.map_or(self.walked, |first| key_before(*first))
    }

    fn finish(&mut self, now: Instant, element: ElementKey, blocks: u64) {
        let since = match self.looks.remove(&element) {
            Some(Look::Reading { since, .. }) => since,
            _ => now,
        };
        if let Some(round) = &mut self.record.present {
            round.elements += 1;
            round.blocks += blocks;
        }
        if self.last_busy.is_some() {
            self.next_at = self.next_at.max(now + now.since(since));
        }
    }
}

impl DataAccess {
    /// The server begins to serve, or stops.
    pub fn run_scrub(&mut self, ctx: &mut Context, is_on: bool) {
        let scrub = &mut self.scrub;
        if std::mem::replace(&mut scrub.is_on, is_on) || !is_on {
            return;
        }
        let kept = ctx.stores.meta(KEY);
        let kept = kept.as_deref().and_then(|b| b.strip_prefix(&[FORMAT])).and_then(|b| postcard::from_bytes(b).ok());
        scrub.record = kept.unwrap_or_default();
        scrub.walk_from(ctx.now, scrub.record.after);
        scrub.save_at = ctx.now + SAVE_MIN;
        scrub.plan_round(ctx.now);
    }

    /// Somebody asks how far it is, or wants it faster or slower.
    pub fn on_scrub_order(&mut self, ctx: &mut Context, order: ScrubOrder) -> ScrubStatus {
        let elements = ctx.stores.elements();
        let scrub = &mut self.scrub;
        match order {
            ScrubOrder::Tell => {}
            // Who joins a round in the middle has not had everything read.
            ScrubOrder::Begin if scrub.record.is_full => {}
            ScrubOrder::Begin => scrub.begin_round(ctx.now, elements, true),
            ScrubOrder::Slow => {
                scrub.record.is_full = false;
                scrub.save_at = ctx.now;
            }
        }
        scrub.status()
    }

    /// What of it is known without asking for anything.
    pub fn scrub_status(&self) -> ScrubStatus {
        self.scrub.status()
    }

    /// Called after every round of inputs.
    pub(crate) fn advance_scrub(&mut self, ctx: &mut Context) {
        let now = ctx.now;
        // Streams count, too: who is a secondary only serves clients as well.
        let is_busy = self.operations() > 0 || !self.tickets.is_empty();
        let scrub = &mut self.scrub;
        scrub.last_busy = if is_busy { Some(now) } else { scrub.last_busy.filter(|at| now.since(*at) < BUSY_FOR) };
        if scrub.next_timeout().is_none_or(|at| at > now) {
            return;
        }
        if scrub.record.present.is_none() {
            scrub.begin_round(now, ctx.stores.elements(), false);
        }
        self.look_again(ctx);
        while self.scrub.next_at <= now && self.scrub.has_more() && self.scrub.may_begin() {
            let scrub = &mut self.scrub;
            match scrub.queue.pop_front() {
                Some(element) => {
                    // What could not be done in time is not made up for in a rush.
                    let behind = Instant::from_nanos(now.as_nanos().saturating_sub(CATCH_UP.as_nanos() as u64));
                    scrub.next_at = scrub.next_at.max(behind) + scrub.interval();
                    scrub.looks.insert(element, Look::Loading { tries: 0 });
                    self.look_at(ctx, element, 0);
                }
                None if !scrub.is_walked => scrub.scan = Some(ctx.stores.scan_all(scrub.walked, STEP)),
                None => {
                    scrub.end_round(now);
                    break;
                }
            }
        }
        self.save_scrub(ctx);
    }

    /// What waited for its time.
    fn look_again(&mut self, ctx: &mut Context) {
        let is_due = |look: &Look| match look {
            Look::Again { at, .. } | Look::Repairing { until: at, .. } => *at <= ctx.now,
            Look::Loading { .. } | Look::Reading { .. } => false,
        };
        let due: Vec<(ElementKey, Look)> =
            self.scrub.looks.iter().filter(|(_, l)| is_due(l)).map(|(e, l)| (*e, *l)).collect();
        for (element, look) in due {
            match look {
                Look::Again { tries, .. } => self.look_at(ctx, element, tries),
                // It goes on by itself; the round does not wait for it any longer.
                _ => {
                    let (found, repaired) = self.repairs.progress(element);
                    self.on_scrub_repaired(ctx.now, element, found, repaired);
                }
            }
        }
    }

    fn save_scrub(&mut self, ctx: &mut Context) {
        let scrub = &mut self.scrub;
        if scrub.save_at > ctx.now {
            return;
        }
        scrub.record.after = scrub.done_through().filter(|_| scrub.record.present.is_some());
        let every = scrub.config.period.map_or(SAVE_MAX, |period| period / 64);
        scrub.save_at = ctx.now + if scrub.record.is_full { SAVE_MIN * 10 } else { every.clamp(SAVE_MIN, SAVE_MAX) };
        let value: Bytes =
            postcard::to_extend(&scrub.record, vec![FORMAT]).expect("a record can be written to memory").into();
        // A journal that is full for the moment: the next note will do.
        let _ = ctx.stores.stage(Change::Meta { key: Bytes::from_static(KEY), value: Some(value) });
    }

    /// A page of the walk.
    pub(crate) fn on_scrub_scanned(&mut self, now: Instant, elements: Result<Vec<(ElementKey, Version)>, DiskError>) {
        let scrub = &mut self.scrub;
        scrub.scan = None;
        match elements {
            Ok(elements) => {
                scrub.is_walked = elements.len() < STEP;
                scrub.walked = elements.last().map(|(key, _)| *key).or(scrub.walked);
                scrub.queue = elements.into_iter().map(|(key, _)| key).collect();
            }
            Err(_) => scrub.next_at = now + WALK_AGAIN,
        }
    }

    fn scrubbed_slot(&self, ctx: &Context, element: ElementKey) -> Option<SlotIndex> {
        let slot = ctx.state.slot_of(element.family, element.element)?;
        let index = self.by_id.get(&slot).copied().filter(|index| self.slots[*index].is_member);
        index.filter(|_| !family_ended(ctx.state, element.family))
    }

    /// Loading -> Reading; what is of no slot of this server is about to be dropped.
    fn look_at(&mut self, ctx: &mut Context, element: ElementKey, tries: u32) {
        if self.scrubbed_slot(ctx, element).is_none() {
            return self.scrub.finish(ctx.now, element, 0);
        }
        match ctx.stores.load(element) {
            Loaded::Ready => {}
            Loaded::Pending => {
                self.scrub.looks.insert(element, Look::Loading { tries });
                return self.wait_for_load(element, LoadWaiter::Scrub);
            }
            Loaded::Failed => return self.scrub.finish(ctx.now, element, 0),
        }
        let blocks = ctx.stores.stored(element);
        if blocks.is_empty() {
            return self.scrub.finish(ctx.now, element, 0);
        }
        let read = ctx.stores.read_places(element, &blocks);
        self.reads.insert(read, ReadOwner::Scrub(element));
        let look = Look::Reading { read, blocks: blocks.len() as u64, tries, since: ctx.now };
        self.scrub.looks.insert(element, look);
    }

    /// An element's entry is in memory.
    pub(crate) fn on_scrub_loaded(&mut self, ctx: &mut Context, element: ElementKey) {
        if let Some(Look::Loading { tries }) = self.scrub.looks.get(&element).copied() {
            self.look_at(ctx, element, tries);
        }
    }

    /// Reading -> done, Again or Repairing.
    pub(crate) fn on_scrub_read(
        &mut self,
        ctx: &mut Context,
        element: ElementKey,
        read: ReadId,
        result: &Result<ReadBlocks, ReadError>,
    ) {
        let Some(Look::Reading { read: expected, blocks, tries, .. }) = self.scrub.looks.get(&element).copied() else {
            return;
        };
        if expected != read {
            return;
        }
        if result.is_ok() {
            return self.scrub.finish(ctx.now, element, blocks);
        }
        let again = Look::Again { at: ctx.now + AGAIN_AFTER, tries: tries + 1 };
        let Some(slot) = self.scrubbed_slot(ctx, element).filter(|_| tries + 1 >= TRIES) else {
            self.scrub.looks.insert(element, again);
            return;
        };
        self.scrub.looks.insert(element, Look::Repairing { until: ctx.now + REPAIR_PATIENCE, blocks });
        if !self.repair_for_scrub(ctx, slot, element) {
            self.scrub.looks.insert(element, again); // Many others are repaired at the moment.
        }
    }

    /// Repairing -> done: so many blocks were bad, and so many of them are good again.
    pub(crate) fn on_scrub_repaired(&mut self, now: Instant, element: ElementKey, found: u64, repaired: u64) {
        let Some(Look::Repairing { blocks, .. }) = self.scrub.looks.get(&element).copied() else { return };
        if let Some(round) = &mut self.scrub.record.present {
            round.bad += found;
            round.repaired += repaired.min(found);
        }
        self.scrub.finish(now, element, blocks);
    }
}

/// The last key that is smaller.
fn key_before(key: ElementKey) -> Option<ElementKey> {
    match (key.family, key.element.checked_sub(1)) {
        (family, Some(element)) => Some(ElementKey { family, element }),
        (family, None) => Some(ElementKey { family: FamilyId(family.0.checked_sub(1)?), element: u64::MAX }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scrub(period: Option<Duration>) -> Scrub {
        let mut scrub = Scrub::new(Instant::ZERO, ScrubConfig { period, unix_seconds: 1000 });
        scrub.is_on = true;
        scrub
    }

    fn key(element: u64) -> ElementKey {
        ElementKey { family: FamilyId(7), element }
    }

    #[test]
    fn a_round_is_spread_over_its_period_unless_somebody_asked_for_it() {
        let mut scrub = scrub(Some(Duration::from_secs(100)));
        scrub.begin_round(Instant::ZERO, 50, false);
        assert_eq!(scrub.interval(), Duration::from_secs(2));
        scrub.begin_round(Instant::ZERO, 50, true);
        assert_eq!(scrub.interval(), Duration::ZERO);
    }

    #[test]
    fn while_clients_are_served_one_element_is_read_at_a_time() {
        let mut scrub = scrub(None);
        scrub.begin_round(Instant::ZERO, 50, true);
        scrub.looks.insert(key(1), Look::Loading { tries: 0 });
        assert!(scrub.may_begin());
        scrub.last_busy = Some(Instant::ZERO);
        assert!(!scrub.may_begin());
    }

    #[test]
    fn many_repairs_hold_up_the_round() {
        let mut scrub = scrub(None);
        scrub.begin_round(Instant::ZERO, 50, true);
        for n in 0..REPAIRS_MAX as u64 {
            assert!(scrub.may_begin());
            scrub.looks.insert(key(n), Look::Repairing { until: Instant::ZERO, blocks: 16 });
        }
        assert!(!scrub.may_begin());
    }

    #[test]
    fn a_round_goes_on_before_the_first_element_that_is_not_done() {
        let mut scrub = scrub(None);
        scrub.begin_round(Instant::ZERO, 50, true);
        scrub.walked = Some(key(90));
        assert_eq!(scrub.done_through(), Some(key(90)));
        scrub.queue.push_back(key(50));
        scrub.looks.insert(key(3), Look::Loading { tries: 0 });
        assert_eq!(scrub.done_through(), Some(key(2)));
        scrub.looks.insert(key(0), Look::Loading { tries: 0 });
        assert_eq!(scrub.done_through(), Some(ElementKey { family: FamilyId(6), element: u64::MAX }));
    }

    #[test]
    fn the_next_round_begins_a_period_after_the_last_whatever_the_wall_clock_says() {
        let period = Duration::from_secs(100);
        let mut scrub = scrub(Some(period));
        let now = Instant::ZERO + Duration::from_secs(30);
        let last = |began| Some(ScrubRound { began, ended: Some(began), ..ScrubRound::default() });
        scrub.record.last = last(1010);
        scrub.plan_round(now);
        assert_eq!(scrub.next_round, Some(Instant::ZERO + Duration::from_secs(110)));
        scrub.record.last = last(9_999_999);
        scrub.plan_round(now);
        assert_eq!(scrub.next_round, Some(now + period));
        scrub.record.last = last(3);
        scrub.plan_round(now);
        assert_eq!(scrub.next_round, Some(now + AGAIN_AFTER));
    }
}
