//! Copies are equal when nothing is busy (I2), and nobody holds what it should not.
//!
//! At rest every write is complete and every watermark has arrived, so in-sync replicas hold the same:
//! versions and the checksum of every block. Request ids may differ, since replicas forget them at
//! different moments; an entry of nothing but zeros may be gone at one and not yet at another.

use petal::global_state::State;
use petal::ids::{ElementKey, ServerId};
use petal::store::{BlockSum, ElementImage, RowImage};
use petal::translator::gmap::slot_of_element;
use std::collections::{BTreeMap, BTreeSet};

/// What each server's disks hold.
pub type Found = BTreeMap<ServerId, BTreeMap<ElementKey, ElementImage>>;

/// Compares the copies of everything.
pub fn compare(state: &State, found: &Found) -> Vec<String> {
    let keys: BTreeSet<ElementKey> = found.values().flat_map(|f| f.keys().copied()).collect();
    keys.into_iter().flat_map(|key| compare_element(state, found, key)).collect()
}

fn compare_element(state: &State, found: &Found, key: ElementKey) -> Vec<String> {
    let Some(family) = state.families.get(&key.family) else { return leftovers(found, key) };
    let Some(slots) = state.slots.get(&family.gmap) else {
        return vec![format!("{} has no slots", family.gmap)];
    };
    let slot = slot_of_element(key.element, family.stripe_unit, family.shift, slots.len() as u32);
    let slot = &slots[slot as usize];
    let mut complaints = Vec::new();
    let members: Vec<ServerId> = slot.in_sync().filter(|s| found.contains_key(s)).collect();
    if let Some((first, others)) = members.split_first() {
        let reference = content(found[first].get(&key));
        for other in others {
            let theirs = content(found[other].get(&key));
            if theirs != reference {
                complaints.push(format!("{key:?} differs: {first} has {reference:?}, {other} has {theirs:?}"));
            }
        }
    }
    for (server, elements) in found {
        if elements.contains_key(&key) && slot.member(*server).is_none() {
            complaints.push(format!("{server} holds {key:?} and is no member of its slot"));
        }
    }
    complaints
}

/// Elements of a family that ended have been dropped.
fn leftovers(found: &Found, key: ElementKey) -> Vec<String> {
    let holders: Vec<ServerId> = found.iter().filter(|(_, e)| e.contains_key(&key)).map(|(s, _)| *s).collect();
    vec![format!("{key:?} is of a family that is gone, and still held by {holders:?}")]
}

/// Version and rows, without what may differ.
fn content(image: Option<&ElementImage>) -> Option<(petal::ids::Version, Vec<&RowImage>)> {
    let image = image?;
    let rows: Vec<&RowImage> = image.rows.iter().filter(|r| r.sums.iter().any(|s| *s != BlockSum::Zero)).collect();
    (!rows.is_empty()).then_some((image.version, rows))
}
