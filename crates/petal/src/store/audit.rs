//! I8 looked at from outside: every address in use is referred to by exactly one element, every other
//! block is free.

use super::disk::Disk;
use super::element::{Address, Row};
use super::keys;
use crate::ids::ElementKey;
use bytes::Bytes;
use std::collections::BTreeMap;

/// Compares entries (in memory where they are there, else as saved) with the free map.
pub(super) fn audit(disk: &Disk, rows: &[(Bytes, Bytes)]) -> Vec<String> {
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
