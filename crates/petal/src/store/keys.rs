//! Keys and small values of the PMap store's tables. Big-endian, so that order of bytes is order of keys.

use crate::ids::*;
use bytes::Bytes;

fn joined<const N: usize>(parts: [&[u8]; N]) -> Bytes {
    parts.concat().into()
}

/// Key of a head.
pub fn head(e: ElementKey) -> Bytes {
    joined([&e.family.0.to_be_bytes(), &e.element.to_be_bytes()])
}

/// The element of a head's key.
pub fn element(key: &[u8]) -> Option<ElementKey> {
    let (family, element) = key.split_at_checked(8)?;
    Some(ElementKey {
        family: FamilyId(u64::from_be_bytes(family.try_into().ok()?)),
        element: u64::from_be_bytes(element.try_into().ok()?),
    })
}

/// Key of a row.
pub fn row(e: ElementKey, lineage: LineageId, epoch: Epoch) -> Bytes {
    joined([&head(e), &lineage.0.to_be_bytes(), &epoch.0.to_be_bytes()])
}

/// Range of the rows of an element.
pub fn rows_of(e: ElementKey) -> (Bytes, Bytes) {
    // Longer than any row's key, so the last possible row is inside.
    (row(e, LineageId(0), Epoch(0)), joined([&head(e), &[0xff; 9]]))
}

/// Lineage and epoch of a row's key.
pub fn row_ids(key: &[u8]) -> Option<(LineageId, Epoch)> {
    let ids = key.get(16..24)?;
    let (lineage, epoch) = ids.split_at(4);
    Some((LineageId(u32::from_be_bytes(lineage.try_into().ok()?)), Epoch(u32::from_be_bytes(epoch.try_into().ok()?))))
}

/// The element of a row's key.
pub fn row_element(key: &[u8]) -> Option<ElementKey> {
    element(key.get(..16)?)
}

fn slot_bytes(slot: SlotId) -> Bytes {
    joined([&slot.gmap.0.to_be_bytes(), &slot.slot.to_be_bytes()])
}

fn slot_from(bytes: &[u8]) -> Option<SlotId> {
    let (gmap, slot) = bytes.split_at_checked(8)?;
    Some(SlotId {
        gmap: GmapId(u64::from_be_bytes(gmap.try_into().ok()?)),
        slot: u32::from_be_bytes(slot.try_into().ok()?),
    })
}

fn version_bytes(v: Version) -> [u8; 16] {
    ((u128::from(v.term) << 64) | u128::from(v.sequence)).to_be_bytes()
}

fn version_from(bytes: &[u8]) -> Option<Version> {
    let both = u128::from_be_bytes(bytes.try_into().ok()?);
    Some(Version { term: (both >> 64) as u64, sequence: both as u64 })
}

/// Key of a change.
pub fn change(slot: SlotId, version: Version, e: ElementKey) -> Bytes {
    joined([&slot_bytes(slot), &version_bytes(version), &head(e)])
}

/// Parts of a change's key.
pub fn change_parts(key: &[u8]) -> Option<(SlotId, Version, ElementKey)> {
    Some((slot_from(key.get(..12)?)?, version_from(key.get(12..28)?)?, element(key.get(28..44)?)?))
}

/// Key of a chunk of the free map.
pub fn chunk(index: u32) -> Bytes {
    Bytes::copy_from_slice(&index.to_be_bytes())
}

/// Key of a slot's watermark and floor, in the table of metadata.
pub fn watermark(slot: SlotId) -> Bytes {
    joined([b"w", &slot_bytes(slot)])
}

/// The slot of such a key.
pub fn watermark_slot(key: &[u8]) -> Option<SlotId> {
    slot_from(key.strip_prefix(b"w")?)
}

/// Two versions.
pub fn versions(a: Version, b: Version) -> Bytes {
    joined([&version_bytes(a), &version_bytes(b)])
}

/// Two versions.
pub fn versions_from(bytes: &[u8]) -> Option<(Version, Version)> {
    Some((version_from(bytes.get(..16)?)?, version_from(bytes.get(16..32)?)?))
}

/// Key of a metadata value.
pub fn meta(key: &[u8]) -> Bytes {
    joined([b"m", key])
}

/// Key and value of what a disk knows of a family that left a GMap for another one, in the table of metadata. Not among what
/// is copied from disk to disk: it is about this disk's own watermarks and changes.
pub fn split(family: FamilyId, from: GmapId, to: GmapId) -> (Bytes, Bytes) {
    (joined([b"s", &family.0.to_be_bytes()]), joined([&from.0.to_be_bytes(), &to.0.to_be_bytes()]))
}

/// The parts of that; none if it is something else.
pub fn split_parts(key: &[u8], value: &[u8]) -> Option<(FamilyId, GmapId, GmapId)> {
    let number = |bytes: &[u8]| bytes.try_into().ok().map(u64::from_be_bytes);
    let family = FamilyId(number(key.strip_prefix(b"s")?)?);
    Some((family, GmapId(number(value.get(..8)?)?), GmapId(number(value.get(8..)?)?)))
}

/// Key of what the last checkpoint reached.
pub fn reached() -> Bytes {
    Bytes::from_static(b"reached")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_read_as_they_were_made() {
        let e = ElementKey { family: FamilyId(3), element: 1 << 47 };
        let slot = SlotId { gmap: GmapId(9), slot: 77 };
        let version = Version { term: 5, sequence: 6 };
        assert_eq!(element(&head(e)), Some(e));
        assert_eq!(change_parts(&change(slot, version, e)), Some((slot, version, e)));
        assert_eq!(watermark_slot(&watermark(slot)), Some(slot));
        assert_eq!(versions_from(&versions(version, Version::ZERO)), Some((version, Version::ZERO)));
        let last = row(e, LineageId(u32::MAX), Epoch(u32::MAX));
        let (from, to) = rows_of(e);
        assert!(from <= last && last < to);
        assert_eq!(row_element(&last), Some(e));
        assert_eq!(row_ids(&last), Some((LineageId(u32::MAX), Epoch(u32::MAX))));
    }
}
