//! `petal disk flatten`: a clone that needs nothing of its parents any more.
//!
//! Every element that holds data gets a row of the clone's own, which refers to the same blocks; then one command
//! cuts the clone off. Nothing that anybody reads changes, and no data moves. It may be interrupted and repeated.

use super::disk::find;
use crate::connect::{Connection, Disk};
use crate::progress::Progress;
use anyhow::{Result, bail, ensure};
use petal::global_state::{Attachment, Command};
use petal::translator::vdir::Lineage;

/// Bytes that are asked for at one time.
const STEP: u64 = 1 << 30;

/// Does it.
pub async fn flatten(connection: &Connection, name: &str) -> Result<()> {
    let state = connection.state().await?;
    let disk = find(&state, name)?;
    ensure!(!disk.is_snapshot(), "'{name}' is a snapshot, and never changes; name a disk");
    let family = &state.families[&disk.family];
    if family.ancestors(disk.lineage).next().is_none() {
        bail!("'{name}' is no clone, or needs nothing of its parents already");
    }
    // Said before all the work; the command itself looks again.
    if let Some(first) = state.members(disk.family).find(|m| m.is_snapshot() && m.lineage == disk.lineage) {
        bail!(
            "'{name}' has snapshots ('{}'), which need what it inherits; delete them first: `petal snapshot delete {}`",
            first.name,
            first.name
        );
    }
    let branched = |l: &Lineage| l.parent.is_some_and(|(parent, _)| parent == disk.lineage);
    if family.lineages.values().any(branched) {
        bail!(
            "clones of '{name}' need what it inherits; flatten or delete them first: `petal snapshot list` shows them"
        );
    }
    let cut_off = async |attached: &Disk| -> Result<()> {
        let mut progress = Progress::begin(format!("flatten {name}"), disk.size);
        for at in (0..disk.size).step_by(STEP as usize) {
            progress.at(at);
            attached.inherit(at, STEP.min(disk.size - at)).await?;
        }
        progress.end();
        connection.execute(Command::Flatten { vdisk: disk.id, lineage: disk.lineage }).await?;
        Ok(())
    };
    connection.attached(name, Attachment::ReadOnly, "petal disk flatten", false, cut_off).await?;
    println!("Disk {name} needs nothing of its parents any more.");
    Ok(())
}
