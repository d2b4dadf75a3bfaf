//! `petal disk set`: how many copies a disk has (2.8).

use super::disk::find_disk;
use super::placement::{Plan, held};
use crate::connect::Connection;
use crate::output;
use crate::space::Counting;
use anyhow::{Context, Result, ensure};
use petal::global_state::Command;
use petal::replan::replan;
use petal::translator::gmap::{Gmap, Scheme};
use serde_json::json;
use std::collections::BTreeSet;

/// `petal disk set`
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  petal disk set vol0 --copies 3 --dry-run     what would be copied, and where to
  petal disk set vol0 --copies 3               it is used meanwhile; `petal reconfigure status` shows how far it is

The disk's snapshots and clones share its blocks, so they get as many copies. While copies are made there are never fewer than
before, and while some are given up never fewer than are asked for.")]
pub struct Arguments {
    /// Its name
    name: String,
    /// On how many servers each block is
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=3))]
    copies: u8,
    /// Only tell what would be copied
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    format: output::Format,
}

/// Says what is wanted; the ring's leader plans and moves.
pub async fn set(connection: &Connection, arguments: Arguments) -> Result<()> {
    let Arguments { name, copies, dry_run, format } = arguments;
    let state = connection.state().await?;
    let disk = find_disk(&state, &name)?;
    let family = state.family(disk.family).context("the disk is gone")?;
    let from = state.gmaps.get(&family.gmap).context("the disk is gone")?;
    let scheme = [Scheme::Striped, Scheme::Chained, Scheme::Chained3][usize::from(copies) - 1];
    let moves = state.reconfigurations.get(&from.id).is_some_and(|r| !r.turns_back) || state.replan.contains(&from.id);
    // What was turned back half way is asked for anew.
    let lacks = from.slots.iter().any(|tuple| tuple.len() != usize::from(copies));
    let is_new = from.scheme != scheme || lacks && !moves;
    let wanted = Gmap { scheme, ..from.clone() };
    let to = if is_new { replan(from.id, &wanted, &state.candidates())? } else { from.clone() };
    ensure!(
        !state.reconfigurations.contains_key(&from.id) || !is_new,
        "data of {} is being moved; wait until that has ended (`petal status`), or turn it back (`petal reconfigure abort`)",
        from.id
    );
    let used = Counting::new(connection).family(disk.family, &BTreeSet::new()).await?.used;
    let plan = Plan::of_copies(held(connection, &state).await?, from, &to, used.div_ceil(from.slots.len() as u64));
    plan.check_room()?;
    let others: Vec<&str> = state.members(disk.family).filter(|v| v.id != disk.id).map(|v| v.name.as_str()).collect();
    if format.json {
        let mut about = plan.json();
        about["copies_before"] = json!(from.scheme.copies());
        about["copies"] = json!(copies);
        about["with_it"] = json!(others);
        output::print_json(&about)?;
    } else if is_new {
        if !others.is_empty() {
            println!("With it, since they share its blocks: {}.", others.join(", "));
        }
        plan.print();
    }
    if dry_run {
        return Ok(());
    }
    if is_new {
        connection.execute(Command::SetCopies { vdisk: disk.id, scheme }).await?;
    }
    if !format.json {
        match (is_new, lacks) {
            (true, _) => {
                println!("It begins now and goes on by itself; `petal reconfigure status` shows how far it is.")
            }
            (false, true) => println!("That is under way; `petal reconfigure status` shows how far it is."),
            (false, false) => println!("Disk {name} has {copies} of everything already."),
        }
    }
    Ok(())
}
