//! What the superblocks of all disks of a server are told while it runs.

use super::{Stores, disk};
use crate::ids::Lives;

impl Stores {
    /// Writes to every disk the lives that were found there, as if this life had never been: the cluster
    /// would have none of it. Nothing else may be asked afterwards; `Event::LifeTakenBack` follows.
    pub fn take_life_back(&mut self, found: &[Lives]) {
        assert_eq!(found.len(), self.disks.len());
        self.taking_back = self.disks.len();
        self.disks.iter_mut().zip(found).for_each(|(disk, lives)| disk.write_lives(lives.clone()));
    }

    /// Notes on every disk, outside of its journal, how far that is durable: one that ends before is damaged.
    pub fn mark_journals(&mut self) {
        self.disks.iter_mut().for_each(disk::Disk::mark_journal);
    }

    /// Notes on every disk that the cluster has taken this life.
    pub fn note_taken(&mut self) {
        self.disks.iter_mut().for_each(disk::Disk::note_taken);
    }

    /// What was to be noted so is stable.
    pub fn are_labelled(&self) -> bool {
        self.disks.iter().all(disk::Disk::is_labelled)
    }
}
