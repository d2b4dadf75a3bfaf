//! Copies are equal when nothing is busy (I2), and nobody holds what it should not.
//!
//! At rest every write is complete and every watermark has arrived, so in-sync replicas hold the same:
//! versions and the checksum of every block, of every state in time that somebody sees. Request ids may differ, since
//! replicas forget them at different moments, and so may rows that nobody sees any more; an entry of nothing but
//! zeros may be gone at one and not yet at another.

use petal::global_state::State;
use petal::ids::{ElementKey, ServerId, Version};
use petal::store::{BlockSum, ElementImage, RowImage};
use petal::translator::gmap::slot_of_element;
use petal::translator::vdir::Family;
use petal::translator::visible::Visible;
use std::collections::{BTreeMap, BTreeSet};

/// What each server's disks hold.
pub type Found = BTreeMap<ServerId, BTreeMap<ElementKey, ElementImage>>;

/// Compares the copies of everything.
pub fn compare(state: &State, found: &Found) -> Vec<String> {
    let keys: BTreeSet<ElementKey> = found.values().flat_map(|f| f.keys().copied()).collect();
    keys.into_iter().flat_map(|key| compare_element(state, found, key)).collect()
}

fn compare_element(state: &State, found: &Found, key: ElementKey) -> Vec<String> {
    let (Some(family), Some(visible)) = (state.families.get(&key.family), state.visible(key.family)) else {
        return leftovers(found, key);
    };
    let Some(slots) = state.slots.get(&family.gmap) else {
        return vec![format!("{} has no slots", family.gmap)];
    };
    let slot = slot_of_element(key.element, family.stripe_unit, family.shift, slots.len() as u32);
    let slot = &slots[slot as usize];
    let mut complaints = Vec::new();
    let members: Vec<ServerId> = slot.in_sync().filter(|s| found.contains_key(s)).collect();
    if let Some((first, others)) = members.split_first() {
        let reference = content(family, visible, found[first].get(&key));
        for other in others {
            let theirs = content(family, visible, found[other].get(&key));
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
fn content<'a>(
    family: &Family,
    visible: &Visible,
    image: Option<&'a ElementImage>,
) -> Option<(Version, Vec<&'a RowImage>)> {
    let image = image?;
    let kept = visible.kept(image.rows.iter().map(|r| (r.lineage, r.epoch)));
    let seen = image.rows.iter().zip(kept).filter(|(_, kept)| *kept).map(|(row, _)| row);
    let mut rows: Vec<&RowImage> = Vec::new();
    for row in seen {
        // Zeros where there was nothing before are the same as no row: unless they hide what a parent has.
        let hides = rows.last().is_some_and(|last| last.lineage == row.lineage)
            || family.lineages.get(&row.lineage).is_none_or(|l| l.parent.is_some());
        if hides || row.sums.iter().any(|s| *s != BlockSum::Zero) {
            rows.push(row);
        }
    }
    (!rows.is_empty()).then_some((image.version, rows))
}

#[cfg(test)]
mod tests {
    use super::*;
    use petal::ids::{Epoch, FamilyId, GmapId, LineageId};
    use petal::translator::vdir::Lineage;
    use std::collections::BTreeMap;

    /// A family of a line and a clone of it, of which only the parent of the clone is seen.
    fn family() -> Family {
        let parent = Some((LineageId(1), Epoch(3)));
        let lineages = BTreeMap::from([(LineageId(1), Lineage { parent: None }), (LineageId(2), Lineage { parent })]);
        let (id, gmap, next_lineage) = (FamilyId(1), GmapId(1), LineageId(3));
        Family { id, gmap, stripe_unit: 65536, shift: 0, revision: 0, lineages, next_lineage }
    }

    fn image(rows: &[(u32, u32, u32)]) -> ElementImage {
        let row = |(lineage, epoch, crc): &(u32, u32, u32)| {
            let mut sums = [BlockSum::Zero; 16];
            sums[3] = if *crc == 0 { BlockSum::Zero } else { BlockSum::Crc(*crc) };
            RowImage { lineage: LineageId(*lineage), epoch: Epoch(*epoch), sums }
        };
        ElementImage { rows: rows.iter().map(row).collect(), ..ElementImage::default() }
    }

    fn are_equal(a: &[(u32, u32, u32)], b: &[(u32, u32, u32)]) -> bool {
        let (family, a, b) = (family(), image(a), image(b));
        let visible = Visible::new(&family, std::iter::empty());
        content(&family, &visible, Some(&a)) == content(&family, &visible, Some(&b))
    }

    #[test]
    fn rows_that_nobody_sees_may_differ_and_others_may_not() {
        assert!(are_equal(&[(1, 1, 7), (1, 2, 8), (1, 4, 9)], &[(1, 2, 8)]));
        assert!(!are_equal(&[(1, 1, 7), (1, 2, 8)], &[(1, 1, 7)]));
        assert!(!are_equal(&[(1, 2, 8)], &[(1, 2, 9)]));
        assert!(!are_equal(&[(1, 2, 8)], &[]));
    }

    #[test]
    fn zeros_are_nothing_unless_they_hide_something() {
        assert!(are_equal(&[(1, 2, 0)], &[]));
        let v = |rows: &[(u32, u32, u32)]| {
            let (family, image) = (family(), image(rows));
            let mut members = family.clone();
            members.lineages.insert(LineageId(3), Lineage { parent: Some((LineageId(2), Epoch(1))) });
            members.lineages.insert(LineageId(4), Lineage { parent: Some((LineageId(1), Epoch(1))) });
            let visible = Visible::new(&members, std::iter::empty());
            content(&family, &visible, Some(&image)).map_or(0, |(_, rows)| rows.len())
        };
        assert_eq!(v(&[(1, 1, 7), (1, 2, 0)]), 2);
        assert_eq!(v(&[(1, 1, 7), (2, 1, 0)]), 2);
    }
}
