//! `petal diff`: where two members of a family differ, from their maps alone.

use super::disk::find;
use crate::connect::{self, Connection};
use crate::output;
use crate::place::Place;
use anyhow::{Result, ensure};
use petal::global_state::Attachment;
use petal::ids::VdiskId;
use petal_io::client::Disk;
use serde_json::json;

/// `petal diff`
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  petal diff vol0@monday vol0@tuesday      what was written in between
  petal diff vol0@monday vol0              what was written since
  petal diff vol0@monday copy --json       [{\"offset\": 65536, \"length\": 4096}, ...]

No data is read: blocks that were written again with the same bytes differ, too.")]
pub struct Arguments {
    /// A snapshot or disk
    from: String,
    /// Another one of the same family
    to: String,
    #[command(flatten)]
    format: output::Format,
}

/// Does it.
pub fn run(place: &Place, arguments: Arguments) -> Result<()> {
    let place = place.clone();
    connect::block_on(async move {
        let Arguments { from, to, format } = arguments;
        let connection = Connection::open(&place).await?;
        let state = connection.state().await?;
        let (older, newer) = (find(&state, &from)?, find(&state, &to)?);
        ensure!(
            older.family == newer.family,
            "'{from}' and '{to}' have nothing in common: neither is a snapshot or clone of the other or of the same disk"
        );
        let differ = async |disk: &Disk| extents(disk, Some(older.id), disk.size()).await;
        let mut found = connection.attached(&to, Attachment::ReadOnly, "petal diff", false, differ).await?;
        if older.size > newer.size {
            // There is nothing of it any more.
            found.push((newer.size, older.size - newer.size));
        }
        let bytes: u64 = found.iter().map(|(_, length)| length).sum();
        if format.json {
            let extents: Vec<_> =
                found.iter().map(|(offset, length)| json!({ "offset": offset, "length": length })).collect();
            return output::print_json(&extents.into());
        }
        for (offset, length) in &found {
            output::line(format_args!("{offset:>20} {length:>14}"));
        }
        eprintln!("{} in {} extents differ.", output::size(bytes), found.len());
        Ok(())
    })
}

/// `(offset, length)` of everything that a disk stores, or in which it differs from another member of its family;
/// ascending, apart.
pub async fn extents(disk: &Disk, than: Option<VdiskId>, size: u64) -> Result<Vec<(u64, u64)>> {
    let mut found: Vec<(u64, u64)> = Vec::new();
    let mut at = 0;
    while at < size {
        let next = match than {
            Some(than) => disk.changes(than, at, size - at).await?,
            None => disk.extents(at, size - at).await?,
        };
        for extent in next {
            match found.last_mut() {
                _ if !extent.allocated => {}
                Some((offset, length)) if *offset + *length == at => *length += extent.length,
                _ => found.push((at, extent.length)),
            }
            at += extent.length;
        }
    }
    Ok(found)
}
