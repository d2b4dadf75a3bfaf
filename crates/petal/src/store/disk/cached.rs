//! An entry in memory, and what of it the PMap store does not have yet.

use super::*;

/// How an entry in memory relates to the PMap store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cleanness {
    /// The same.
    Clean,
    /// Newer, and the next checkpoint has it.
    Dirty,
    /// The checkpoint on its way has it.
    Saving,
}

#[derive(Debug)]
pub struct Cached {
    pub entry: Entry,
    pub clean: Cleanness,
    /// Used since the clock hand last passed.
    pub used: bool,
    /// Stays until another disk has said what it knows of the element. Without this, many elements that
    /// wait for two disks each push one another out for ever.
    pub pinned: bool,
    /// Rows in the PMap store that the entry no longer has. Ascending, for there can be thousands.
    pub stale_rows: Rows,
    /// Rows that the PMap store does not have as they are. Ascending.
    pub new_rows: Rows,
}

impl Cached {
    /// These are to be deleted from the PMap store.
    pub fn note_stale(&mut self, rows: impl IntoIterator<Item = (LineageId, Epoch)>) {
        for row in rows {
            move_row(row, &mut self.new_rows, &mut self.stale_rows);
        }
    }
    /// These are to be written to the PMap store. (One that was deleted before is written after that.)
    pub fn note_new(&mut self, rows: impl IntoIterator<Item = (LineageId, Epoch)>) {
        for row in rows {
            move_row(row, &mut self.stale_rows, &mut self.new_rows);
        }
    }
}

type Rows = SmallVec<[(LineageId, Epoch); 1]>;

fn move_row(row: (LineageId, Epoch), from: &mut Rows, to: &mut Rows) {
    if let Ok(at) = from.binary_search(&row) {
        from.remove(at);
    }
    if let Err(at) = to.binary_search(&row) {
        to.insert(at, row);
    }
}
