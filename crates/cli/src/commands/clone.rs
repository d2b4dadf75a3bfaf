//! `petal clone`: a disk that begins with what a snapshot or a disk holds.

use super::disk::{describe, find};
use crate::connect::{self, Connection};
use crate::output;
use crate::place::Place;
use anyhow::{Result, bail};
use petal::global_state::{Command, Outcome, State};

/// `petal clone`
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  petal clone vol0@monday test       a disk `test`, writable at once; takes no room until it or vol0 changes
  petal clone vol0 test              what vol0 holds now

The snapshot, and the disk that it is of, may be deleted while the clone lives.")]
pub struct Arguments {
    /// A snapshot (DISK@SNAPSHOT) or a disk
    source: String,
    /// Name of the new disk
    name: String,
    #[command(flatten)]
    format: output::Format,
}

/// Does it.
pub fn run(place: &Place, arguments: Arguments) -> Result<()> {
    let place = place.clone();
    connect::block_on(async move {
        let Arguments { source, name, format } = arguments;
        let connection = Connection::open(&place).await?;
        let made = output::unix_seconds();
        let command = |state: &State| {
            let from = find(state, &source)?;
            Ok(Command::Clone { source: from.id, epoch: from.epoch, name: name.clone(), made })
        };
        let outcome = connection.execute_on_present(command, false).await?;
        let Outcome::Disk(id) = outcome else { bail!("the cluster answered {outcome:?} to a clone") };
        if format.json {
            let state = connection.state_with(id).await?;
            return output::print_json(&describe(&state, find(&state, &name)?));
        }
        println!("Made disk {name}, a clone of {source} ({id}).");
        Ok(())
    })
}
