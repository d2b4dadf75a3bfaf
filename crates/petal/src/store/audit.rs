//! I8 looked at from outside: every address in use is referred to by exactly one element, every other
//! block is free.

use super::disk::Disk;
use super::element::{Address, NOWHERE, Row};
use super::{Place, Stores, keys};
use crate::ids::ElementKey;
use bytes::Bytes;
use std::collections::BTreeMap;

impl Stores {
    /// Blocks that count as used, on all disks.
    pub fn books(&self) -> crate::message::Books {
        let changes = self.disks.iter().map(|d| d.allocator.changes()).sum();
        crate::message::Books { changes, used: self.disks.iter().map(|d| d.allocator.referenced()).sum() }
    }

    /// Of the stored blocks of a loaded element, those that count as free (I8).
    pub fn counted_free(&self, element: ElementKey, places: &[Place]) -> Vec<Place> {
        let Some((home, entry)) = self.home(element).zip(self.entry(element)) else { return Vec::new() };
        let allocator = &self.disks[home].allocator;
        let address = |p: &Place| entry.row(p.lineage, p.epoch).map(|row| row.addresses[usize::from(p.block)]);
        let is_free = |p: &&Place| address(p).is_some_and(|a| a != NOWHERE && !allocator.is_referenced(a));
        places.iter().filter(is_free).copied().collect()
    }

    /// Compares a disk's entries with its free map (I8); one sentence for each contradiction. `rows` is
    /// its whole table of rows. Only where nothing is staged.
    pub fn audit(&self, disk: usize, rows: &[(Bytes, Bytes)]) -> Vec<String> {
        audit(&self.disks[disk], rows)
    }
}

/// Compares entries (in memory where they are there, else as saved) with the free map.
fn audit(disk: &Disk, rows: &[(Bytes, Bytes)]) -> Vec<String> {
    let mut owners: BTreeMap<Address, ElementKey> = BTreeMap::new();
    let mut complaints = Vec::new();
    let mut refer = |complaints: &mut Vec<String>, element: ElementKey, addresses: Vec<Address>| {
        for address in addresses {
            match owners.insert(address, element) {
                Some(other) if other != element => {
                    complaints.push(format!("block {address} belongs to {other:?} and to {element:?}"));
                }
                _ => {}
            }
            if !disk.allocator.is_referenced(address) {
                complaints.push(format!("block {address} of {element:?} counts as free"));
            }
        }
    };
    for (key, value) in rows {
        let Some((element, (lineage, epoch))) = keys::row_element(key).zip(keys::row_ids(key)) else {
            complaints.push(format!("{key:?} is no key of a row"));
            continue;
        };
        if disk.knows(element) {
            continue;
        }
        if let Some(row) = Row::decode(lineage, epoch, value) {
            refer(&mut complaints, element, row.used().collect());
        }
    }
    disk.each_cached(|element, entry| refer(&mut complaints, element, entry.addresses()));
    if owners.len() as u64 != disk.allocator.referenced() {
        complaints.push(format!(
            "{} blocks count as used and {} are referred to",
            disk.allocator.referenced(),
            owners.len()
        ));
    }
    complaints
}
