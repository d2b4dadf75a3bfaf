//! `petal rollback`: a disk goes back to what one of its snapshots holds.

use super::disk::find_disk;
use super::snapshot::{find_snapshot, free_name, not_while_attached};
use crate::connect::{self, Connection};
use crate::output;
use crate::place::Place;
use anyhow::{Result, ensure};
use petal::global_state::{Command, State, split_name};
use serde_json::json;
use std::cell::{Cell, RefCell};

/// `petal rollback`
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  petal rollback vol0 --to vol0@monday         what vol0 holds now is kept as vol0@before-rollback-...
  petal rollback vol0 --to monday --keep broken
  petal rollback vol0 --to monday --discard    what vol0 holds now is gone

Nobody may have the disk attached. No snapshot is lost: newer ones stay, too. The disk gets the size that the
snapshot has.")]
pub struct Arguments {
    /// The disk
    disk: String,
    /// One of its snapshots, with or without the disk's name
    #[arg(long, value_name = "SNAPSHOT")]
    to: String,
    /// Keep what it holds now as a snapshot of this name (default: a name with the time)
    #[arg(long, value_name = "NAME")]
    keep: Option<String>,
    /// Do not keep what it holds now
    #[arg(long, conflicts_with = "keep")]
    discard: bool,
    #[command(flatten)]
    format: output::Format,
}

/// Does it.
pub fn run(place: &Place, arguments: Arguments) -> Result<()> {
    let place = place.clone();
    connect::block_on(async move {
        let Arguments { disk, to, keep, discard, format } = arguments;
        let to = match split_name(&to) {
            ("", Some(name)) | (name, None) => format!("{disk}@{name}"),
            _ => to,
        };
        if let Some(keep) = &keep {
            let (of, name) = split_name(keep);
            ensure!(
                name.is_none(),
                "'{keep}' names a snapshot; leave '{of}@' out: --keep {}",
                name.unwrap_or_default()
            );
        }
        let connection = Connection::open(&place).await?;
        let made = output::unix_seconds();
        let kept = RefCell::new(None);
        let sizes = Cell::new((0, 0));
        let command = |state: &State| {
            let (vdisk, snapshot) = (find_disk(state, &disk)?, find_snapshot(state, &to)?);
            let keep = match (&keep, discard) {
                (Some(name), _) => Some(name.clone()),
                (None, true) => None,
                (None, false) => Some(free_name(state, std::slice::from_ref(&disk), "before-rollback-", made)),
            };
            kept.replace(keep.clone());
            sizes.set((vdisk.size, snapshot.size));
            Ok(Command::Rollback { vdisk: vdisk.id, epoch: vdisk.epoch, to: snapshot.id, keep, made })
        };
        connection.execute_on_present(command, false).await.map_err(not_while_attached)?;
        let kept = kept.into_inner().map(|name| format!("{disk}@{name}"));
        if format.json {
            return output::print_json(&json!({"disk": disk, "to": to, "kept": kept, "size": sizes.get().1}));
        }
        if let (before, now) = sizes.get()
            && before != now
        {
            println!("{disk} has {} again, as {to} has; it had {}.", output::size(now), output::size(before));
        }
        match kept {
            Some(kept) => println!("{disk} holds what {to} holds; what it held before is {kept}."),
            None => println!("{disk} holds what {to} holds; what it held before is gone."),
        }
        Ok(())
    })
}
