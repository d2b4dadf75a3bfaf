//! How a block of an element is named.

use super::{BlockSum, ElementImage, RowImage};
use crate::ids::*;
use serde::{Deserialize, Serialize};

/// A block of an element, by the row that it belongs to: rows come and go, so their positions say nothing later.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct Place {
    /// The row.
    pub lineage: LineageId,
    /// The row.
    pub epoch: Epoch,
    /// The block, below 16.
    pub block: u8,
}

impl ElementImage {
    /// Places of blocks given as `(row, block)`, rows as positions in this image.
    pub fn places(&self, blocks: &[(u16, u8)]) -> Vec<Place> {
        let place = |(row, block): &(u16, u8)| {
            let row = &self.rows[usize::from(*row)];
            Place { lineage: row.lineage, epoch: row.epoch, block: *block }
        };
        blocks.iter().map(place).collect()
    }
    /// The row of exactly this epoch.
    pub fn row(&self, lineage: LineageId, epoch: Epoch) -> Option<&RowImage> {
        let at = self.rows.binary_search_by_key(&(lineage, epoch), |r| (r.lineage, r.epoch)).ok()?;
        Some(&self.rows[at])
    }
    /// What the image says of a block.
    pub fn sum(&self, place: Place) -> Option<BlockSum> {
        self.row(place.lineage, place.epoch)?.sums.get(usize::from(place.block)).copied()
    }
}
