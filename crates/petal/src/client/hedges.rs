//! Reads that may be asked of a second copy, in the order in which they were sent, and how many of them may be.
//!
//! A read is hedged when it has taken longer than 95 of 100 (`link::hedge_after`). That would be one in twenty by
//! definition, and all of them while something is slow for everybody, which is when asking twice hurts most: so
//! hedges are paid from a purse into which every read puts a small part of the price.

use crate::limits::HEDGES_WATCHED_MAX;
use crate::message::Tag;
use std::collections::VecDeque;
use stdx::Instant;

/// One read in so many may be hedged.
const SHARE: u32 = 32;
/// Hedges that may be saved up: what was on its way to a server that stops answering.
const SAVED_MAX: u32 = 16;

#[derive(Debug)]
pub(super) struct Hedges {
    /// When another copy is to be asked for what has this tag.
    watched: VecDeque<(Instant, Tag)>,
    /// In parts of `SHARE`.
    saved: u32,
}

impl Default for Hedges {
    fn default() -> Self {
        Hedges { watched: VecDeque::new(), saved: SAVED_MAX * SHARE }
    }
}

impl Hedges {
    /// A read was sent. Times may go back a little between one and the next; then the later one waits for the
    /// earlier.
    pub fn read_sent(&mut self, due: Instant, tag: Tag) {
        self.saved = (self.saved + 1).min(SAVED_MAX * SHARE);
        if self.watched.len() < HEDGES_WATCHED_MAX {
            self.watched.push_back((due, tag));
        }
    }
    /// The read sent first of those watched, which may be answered by now.
    pub fn next(&self) -> Option<(Instant, Tag)> {
        self.watched.front().copied()
    }
    /// It is watched no more.
    pub fn pop(&mut self) {
        self.watched.pop_front();
    }
    /// Pays for a hedge; false if there is not enough.
    pub fn take(&mut self) -> bool {
        let left = self.saved.checked_sub(SHARE);
        self.saved = left.unwrap_or(self.saved);
        left.is_some()
    }
}
