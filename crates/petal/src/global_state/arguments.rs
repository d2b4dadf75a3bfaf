//! What a command may ask for: names, sizes, addresses, the disks of a server that starts. Looked at when the
//! command is applied, so every server says the same; what is wrong is refused in words for whoever asked.

use super::command::{Attachment, CommandError};
use super::state::ServerState;
use crate::ids::*;
use crate::limits::*;
use std::collections::BTreeMap;

/// Smallest and largest stripe unit.
const STRIPE_UNITS: std::ops::RangeInclusive<u64> = ELEMENT_SIZE..=1 << 30;

/// Whether an attachment stands in the way of another.
pub(super) fn conflict(wanted: Attachment, present: Attachment) -> bool {
    use Attachment::{Exclusive, Import, ReadOnly, Shared};
    match (wanted, present) {
        (ReadOnly, _) | (_, ReadOnly) | (Shared, Shared) => false,
        (Exclusive | Import, _) | (_, Exclusive | Import) => true,
    }
}

/// Names are words of a command line, of a URL and of an NBD export; `@` stands between a disk and a snapshot of
/// it, each of which has such a name.
pub fn check_name(name: &str) -> Result<(), CommandError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let why = if name.is_empty() {
        "it is empty".into()
    } else if name.len() > NAME_MAX {
        format!("it has {} bytes, and {NAME_MAX} is the most", name.len())
    } else if name.contains('@') {
        "'@' stands between the names of a disk and of a snapshot of it, and is in neither".into()
    } else if let Some(c) = name.chars().find(|c| !allowed(*c)) {
        format!("{c:?} is not allowed; use letters, digits, '.', '_' and '-'")
    } else if name.starts_with(['-', '.']) {
        "it must not begin with '-' or '.'".into()
    } else {
        return Ok(());
    };
    let name = name.chars().take(NAME_MAX).collect();
    Err(CommandError::BadName { name, why })
}

/// The disk's part of a name, and the snapshot's, if it names one.
pub fn split_name(name: &str) -> (&str, Option<&str>) {
    match name.split_once('@') {
        Some((disk, snapshot)) => (disk, Some(snapshot)),
        None => (name, None),
    }
}

/// Whether a disk can have so many bytes.
pub fn check_size(size: u64) -> Result<(), CommandError> {
    let why = if size == 0 {
        "a disk has at least 512 bytes".into()
    } else if !size.is_multiple_of(512) {
        "it must be a multiple of 512 bytes".into()
    } else if size > DISK_SIZE_MAX {
        format!("the largest disk has {DISK_SIZE_MAX} bytes")
    } else {
        return Ok(());
    };
    Err(CommandError::BadSize { size, why })
}

pub(super) fn valid_stripe_unit(bytes: u64) -> bool {
    bytes.is_power_of_two() && STRIPE_UNITS.contains(&bytes)
}

pub(super) fn check_addresses(addresses: &[String]) -> Result<(), CommandError> {
    if addresses.len() > ADDRESSES_MAX {
        let why = format!("{} addresses of one server; {ADDRESSES_MAX} at most", addresses.len());
        return Err(CommandError::Malformed(why));
    }
    match addresses.iter().find(|a| a.is_empty() || a.len() > TEXT_MAX) {
        Some(a) => Err(CommandError::Malformed(format!("an address of {} bytes; 1 to {TEXT_MAX}", a.len()))),
        None => Ok(()),
    }
}

impl ServerState {
    /// All disks that the cluster knows must be there, and none may have missed a life of the server. A
    /// disk may have seen a life that the cluster never heard of (the server stopped before its
    /// `ServerUp` was decided); such a life changed nothing.
    pub(super) fn check_disks(
        &self,
        server: ServerId,
        incarnation: Incarnation,
        found: &BTreeMap<DiskId, (Lives, u64)>,
    ) -> Result<(), CommandError> {
        for (disk, known) in &self.disks {
            let (lives, _) = found.get(disk).ok_or(CommandError::DiskMissing { server, disk: *disk })?;
            if !lives.saw(known.incarnation) {
                let (disk, found, known) = (*disk, lives.last, known.incarnation);
                return Err(CommandError::DiskFromThePast { server, disk, found, known });
            }
        }
        match found.values().map(|(lives, _)| lives.last).find(|last| *last >= incarnation) {
            Some(known) => Err(CommandError::OldIncarnation { server, known, given: incarnation }),
            None => Ok(()),
        }
    }
}
