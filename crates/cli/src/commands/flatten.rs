//! `petal disk flatten`: a clone that needs nothing of its parents any more.
//!
//! The cluster does it, in the background (`global_state/flatten.rs` in the core); this begins it, tells how far it is until
//! it is done, and may be interrupted: it goes on.

use super::disk::find;
use crate::connect::{Connection, refusal};
use crate::output;
use crate::progress::Progress;
use anyhow::{Result, bail, ensure};
use petal::global_state::{Command, CommandError, State};
use petal::ids::StateIndex;
use petal::translator::vdir::Vdisk;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// Time between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Where nothing is done for so long, that is said; and again after six times that.
const TELL_AFTER: Duration = Duration::from_secs(10);

/// `petal disk flatten`
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  petal disk flatten copy            begin, or join in, and wait until it is done; Ctrl-C ends only the waiting
  petal disk flatten copy --detach   begin, and do not wait: `petal status` tells how far it is
  petal disk flatten copy --stop

No data move, and the disk is used as ever. Nothing is made of it meanwhile: no snapshot, no clone.")]
pub struct Arguments {
    /// The disk: a clone, or one that was rolled back
    name: String,
    /// Begin, and do not wait for the end
    #[arg(long, conflicts_with = "stop")]
    detach: bool,
    /// Stop it; what is done need not be done again
    #[arg(long)]
    stop: bool,
    #[command(flatten)]
    format: output::Format,
}

/// Does it.
pub async fn flatten(connection: &Connection, arguments: Arguments) -> Result<()> {
    let Arguments { name, detach, stop, format } = arguments;
    let state = connection.state().await?;
    let disk = find(&state, &name)?.clone();
    ensure!(!disk.is_snapshot(), "'{name}' is a snapshot, and never changes; name a disk");
    let begun = match connection.executed(Command::Flatten { vdisk: disk.id, wanted: !stop }).await {
        // As good as done: whoever says it again after an interruption need not know whether it was.
        Err(error) if matches!(refusal(&error), Some(CommandError::StandsByItself { .. })) => {
            if format.json {
                return output::print_json(&json!({ "disk": name, "flattening": false, "done": true }));
            }
            println!("Disk {name} is no clone, or needs nothing of its parents already.");
            return Ok(());
        }
        begun => begun?,
    };
    if stop || detach {
        let what = if stop { "no longer flattened" } else { "being flattened, in the background" };
        if format.json {
            return output::print_json(&json!({ "disk": name, "flattening": !stop, "done": false }));
        }
        println!("Disk {name} is {what}.");
        return Ok(());
    }
    wait(connection, &disk, begun.index).await?;
    if format.json {
        return output::print_json(&json!({ "disk": name, "flattening": false, "done": true }));
    }
    println!("Disk {name} needs nothing of its parents any more.");
    Ok(())
}

async fn wait(connection: &Connection, disk: &Vdisk, begun: StateIndex) -> Result<()> {
    let name = &disk.name;
    let mut progress: Option<Progress> = None;
    // Since when so many are left.
    let mut stands = (usize::MAX, Instant::now());
    loop {
        let state = connection.state().await?;
        if state.index < begun {
            // From a server that is behind.
            tokio::time::sleep(LOOK_EVERY).await;
            continue;
        }
        let Some((all, left)) = state.flattening(disk.id) else {
            if let Some(progress) = progress {
                progress.end();
            }
            return ended(&state, disk);
        };
        if left != stands.0 {
            stands = (left, Instant::now());
        } else if stands.1.elapsed() >= TELL_AFTER {
            eprintln!(
                "{}: {left} of {all} slots wait; nobody serves them, or they are slow: see `petal status`",
                disk.name
            );
            stands.1 = Instant::now() + TELL_AFTER * 5;
        }
        let of = all as u64;
        let progress = progress.get_or_insert_with(|| Progress::begin_counted(format!("flatten {name}"), of, "slots"));
        progress.at(of - left as u64);
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// It is flattened no longer: because it is done?
fn ended(state: &State, disk: &Vdisk) -> Result<()> {
    let name = &disk.name;
    let Some(now) = state.vdisk(disk.id) else { bail!("'{name}' was deleted meanwhile") };
    ensure!(now.lineage == disk.lineage, "'{name}' was rolled back meanwhile, which ended the flattening");
    let inherits = state.family(now.family).is_some_and(|f| f.ancestors(now.lineage).next().is_some());
    ensure!(!inherits, "somebody has stopped the flattening of '{name}'; `petal disk flatten {name}` goes on with it");
    Ok(())
}

/// How far a disk is, in words; nothing if it is not being flattened.
pub fn note(state: &State, disk: &Vdisk) -> String {
    let words = |(all, left): (usize, usize)| format!("being flattened: {} of {all} slots", all - left);
    state.flattening(disk.id).map_or_else(String::new, words)
}

/// The same for programs.
pub fn json(state: &State, disk: &Vdisk) -> Value {
    state.flattening(disk.id).map_or(Value::Null, |(all, left)| json!({ "slots": all, "left": left }))
}

/// One sentence for each disk that is being flattened (`petal status`).
pub fn sentences(state: &State) -> Vec<String> {
    let disks = state.flattenings.keys().filter_map(|id| state.vdisk(*id));
    disks.map(|disk| format!("{} is {}.", disk.name, note(state, disk))).collect()
}
