//! The superblock of an open disk, written one copy at a time: with two on their way a crash could tear both.
//!
//! Once in a while it is told how far the journal is durable. Nothing in the journal shows that its end, or all of it, was
//! overwritten: it would pass for one that ends earlier, and what was acknowledged since would be gone without a word.

use super::{Disk, DiskEvent, Pending, Superblock};
use crate::ids::Lives;
use crate::store::{DiskCommand, DiskError};
use bytes::Bytes;

#[derive(Debug, Default)]
pub(super) struct Label {
    /// A copy is on its way.
    busy: bool,
    /// Changed since that was issued.
    changed: bool,
    /// `Identified` is to be told when it is written.
    told: bool,
}

impl Disk {
    /// Writes the superblock with other lives; `Identified` follows, whether that worked or not.
    pub fn write_lives(&mut self, lives: Lives) {
        self.superblock.set_lives(lives);
        self.label.told = true;
        self.write_label();
    }

    /// Notes that the cluster has taken this life.
    pub fn note_taken(&mut self) {
        let mut lives = self.superblock.lives();
        lives.take(lives.last);
        self.superblock.set_lives(lives);
        self.write_label();
    }

    /// Notes how far the journal is durable.
    pub fn mark_journal(&mut self) {
        if self.is_open() && !self.label.told && self.superblock.journal_mark < self.durable_through {
            self.superblock.journal_mark = self.durable_through;
            self.write_label();
        }
    }

    /// Nothing of the superblock is on its way.
    pub fn is_labelled(&self) -> bool {
        !self.label.busy || self.failed.is_some()
    }

    fn write_label(&mut self) {
        self.label.changed = self.label.busy;
        if self.label.busy {
            return;
        }
        self.label.busy = true;
        self.superblock.generation += 1;
        let (offset, piece) = (Superblock::copy_offset(self.superblock.generation), self.superblock.encode());
        self.issue_label(offset, piece, false);
    }

    fn issue_label(&mut self, offset: u64, piece: Bytes, again: bool) {
        let pieces = vec![piece.clone()];
        self.issue(Pending::Label { offset, piece, again }, DiskCommand::Write { offset, pieces });
    }

    pub(super) fn on_labelled(&mut self, offset: u64, piece: Bytes, again: bool, result: Result<(), DiskError>) {
        if result.is_err() && !again {
            // At the same place: the other copy is the only good one now.
            return self.issue_label(offset, piece, true);
        }
        self.label.busy = false;
        match result {
            Ok(()) if self.label.changed => self.write_label(),
            _ if std::mem::take(&mut self.label.told) => self.events.push_back(DiskEvent::Identified),
            Ok(()) => {}
            Err(error) => self.fail(format!("the superblock cannot be written: {error}")),
        }
    }
}
