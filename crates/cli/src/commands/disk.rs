//! `petal disk`: the virtual disks of a cluster.

use super::snapshot;
use crate::connect::{self, Connection, Disk};
use crate::output;
use crate::place::Place;
use crate::space::{Counting, FamilySpace};
use crate::tree::Tree;
use anyhow::{Result, anyhow, bail, ensure};
use petal::global_state::{Attachment, Command as Change, Outcome, State};
use petal::ids::{ELEMENT_SIZE, SessionId, VdiskId};
use petal::limits::STRIPE_UNIT_DEFAULT;
use petal::message::no_such_disk;
use petal::translator::gmap::Scheme;
use petal::translator::vdir::Vdisk;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::io::{IsTerminal, Write};
use stdx::calendar::Utc;

/// `petal disk`
#[derive(clap::Subcommand)]
#[command(after_help = "\
Examples:
  petal disk create db 100GiB              two copies of everything
  petal disk create scratch 1TiB --copies 1
  petal disk list
  petal disk info db --space
  petal disk resize db 200GiB
  petal disk resize db 50GiB --shrink      what lies beyond is gone
  petal disk set db --copies 3             a third copy of everything, made while it is used
  petal disk rename db database
  petal disk delete database
  petal disk delete database --with-snapshots --dry-run")]
pub enum Command {
    /// Make a disk; it takes room only as it is written
    Create {
        /// Its name
        name: String,
        /// Its size, as 512M, 10GiB or 1T
        #[arg(value_parser = output::parse_size, required_unless_present = "size_option")]
        size: Option<u64>,
        /// Its size, for those who like to name it
        #[arg(long = "size", id = "size_option", value_name = "SIZE", value_parser = output::parse_size, conflicts_with = "size")]
        size_option: Option<u64>,
        /// Copies of its data, on so many servers
        #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=3))]
        copies: u8,
        /// How much of it goes to one set of servers before the next (a power of two)
        #[arg(long, value_parser = output::parse_size)]
        stripe_unit: Option<u64>,
        #[command(flatten)]
        format: output::Format,
    },
    /// All disks
    List {
        #[command(flatten)]
        format: output::Format,
    },
    /// All about one disk, or one snapshot
    Info {
        /// Its name
        name: String,
        /// Tell what it uses, and what would come back if it alone were deleted
        #[arg(long)]
        space: bool,
        #[command(flatten)]
        format: output::Format,
    },
    /// Give a disk another size
    Resize {
        /// Its name
        name: String,
        /// The new size
        #[arg(value_parser = output::parse_size)]
        size: u64,
        /// Smaller is meant: what lies beyond is thrown away
        #[arg(long)]
        shrink: bool,
    },
    /// How many copies a disk has, while it is used
    Set(super::copies::Arguments),
    /// Give a disk another name
    Rename {
        /// Its name
        name: String,
        /// Its new name
        new_name: String,
    },
    /// Make a clone need nothing of its parents any more; nothing that anybody reads changes
    Flatten(super::flatten::Arguments),
    /// Delete a disk and its data
    Delete {
        /// Its name
        name: String,
        /// Do not ask
        #[arg(long)]
        yes: bool,
        /// All of its snapshots, too; clones of them stay
        #[arg(long)]
        with_snapshots: bool,
        /// Delete nothing; tell what would come back
        #[arg(long)]
        dry_run: bool,
        #[command(flatten)]
        format: output::Format,
    },
}

/// Does it.
pub fn run(place: &Place, command: Command) -> Result<()> {
    let place = place.clone();
    connect::block_on(async move {
        let connection = Connection::open(&place).await?;
        match command {
            Command::Create { name, size, size_option, copies, stripe_unit, format } => {
                let size = size.or(size_option).expect("the command line has one of them");
                let id = create(&connection, &name, size, copies, stripe_unit).await?;
                if format.json {
                    let state = connection.state_with(id).await?;
                    return output::print_json(&describe(&state, find(&state, &name)?));
                }
                println!("Made disk {name} ({}, {copies} copies, {id}).", output::size(size));
                Ok(())
            }
            Command::List { format } => list(&connection.state().await?, format),
            Command::Info { name, space, format } => info(&connection, &name, space, format).await,
            Command::Resize { name, size, shrink } => resize(&connection, &name, size, shrink).await,
            Command::Set(arguments) => super::copies::set(&connection, arguments).await,
            Command::Rename { name, new_name } => {
                let vdisk = find_disk(&connection.state().await?, &name)?.id;
                connection.execute(Change::RenameDisk { vdisk, name: new_name.clone() }).await?;
                println!("Disk {name} is called {new_name} now.");
                Ok(())
            }
            Command::Flatten(arguments) => super::flatten::flatten(&connection, arguments).await,
            Command::Delete { name, yes, with_snapshots, dry_run, format } => {
                delete(&connection, &name, yes, with_snapshots, dry_run, format).await
            }
        }
    })
}

/// Makes a disk.
pub async fn create(
    connection: &Connection,
    name: &str,
    size: u64,
    copies: u8,
    stripe_unit: Option<u64>,
) -> Result<VdiskId> {
    let scheme = match copies {
        1 => Scheme::Striped,
        2 => Scheme::Chained,
        3 => Scheme::Chained3,
        n => bail!("{n} copies cannot be had; choose 1, 2 or 3"),
    };
    let stripe_unit = stripe_unit.unwrap_or(STRIPE_UNIT_DEFAULT);
    match connection.execute(Change::CreateDisk { name: name.into(), size, scheme, stripe_unit }).await? {
        Outcome::Disk(id) => Ok(id),
        other => bail!("the cluster answered {other:?} to the creation of {name}"),
    }
}

/// The disk or snapshot of a name.
pub fn find<'a>(state: &'a State, name: &str) -> Result<&'a Vdisk> {
    state.vdisk_named(name).ok_or_else(|| anyhow!(no_such_disk(name)))
}

/// The disk of a name, where a snapshot will not do.
pub fn find_disk<'a>(state: &'a State, name: &str) -> Result<&'a Vdisk> {
    let found = find(state, name)?;
    ensure!(
        !found.is_snapshot(),
        "'{name}' is a snapshot, and this is for disks; `petal snapshot --help` shows what can be done with it, and \
         `petal clone {name} NAME` makes a disk of it"
    );
    Ok(found)
}

/// `1 snapshot`, `2 snapshots`.
pub fn plural(count: usize, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}

/// A disk or snapshot as JSON.
pub fn describe(state: &State, disk: &Vdisk) -> Value {
    describe_in(state, &Tree::new(state), disk)
}

fn describe_in(state: &State, tree: &Tree, disk: &Vdisk) -> Value {
    let family = state.families.get(&disk.family);
    let scheme = family.and_then(|f| state.gmaps.get(&f.gmap)).map(|g| g.scheme);
    let sessions = state.attachments(disk);
    json!({
        "name": disk.name,
        "id": disk.id.to_string(),
        "kind": if disk.is_snapshot() { "snapshot" } else { "disk" },
        "size": disk.size,
        "copies": scheme.map(Scheme::copies),
        "stripe_unit": family.map(|f| f.stripe_unit),
        "read_only": disk.is_snapshot(),
        "snapshot_of": disk.snapshot_of.and_then(|of| state.vdisk(of)).map(|of| of.name.clone()),
        "snapshots": tree.snapshots(disk.id).len(),
        "origin": tree.origin(disk).json(),
        "protected": disk.protected,
        "import_unfinished": disk.is_importing(),
        "import_reached": disk.is_importing().then(|| disk.reached.map_or(0, |r| r.below.saturating_mul(ELEMENT_SIZE))),
        "flattening": super::flatten::json(state, disk),
        "made": disk.made,
        "policy": snapshot::policy_json(disk.policy),
        "attached": sessions.map(|s| json!({
            "session": s.id.to_string(),
            "mode": format!("{:?}", s.mode).to_lowercase(),
            "holder": s.holder,
        })).collect::<Vec<_>>(),
    })
}

/// All disks as JSON, without their snapshots.
pub fn describe_all(state: &State) -> Vec<Value> {
    let tree = Tree::new(state);
    state.vdisks.values().filter(|d| !d.is_snapshot()).map(|d| describe_in(state, &tree, d)).collect()
}

fn list(state: &State, format: output::Format) -> Result<()> {
    if format.json {
        return output::print_json(&describe_all(state).into());
    }
    print_disks(state);
    Ok(())
}

/// The table of all disks.
pub fn print_disks(state: &State) {
    let tree = Tree::new(state);
    let disks: Vec<&Vdisk> = state.vdisks.values().filter(|d| !d.is_snapshot()).collect();
    if disks.is_empty() {
        return println!("No disks; `petal disk create NAME SIZE` makes one.");
    }
    let mut table = output::table(&["disk", "size", "copies", "snapshots", "attached by", ""]);
    for disk in disks {
        let about = describe_in(state, &tree, disk);
        let holders: Vec<String> = state.attachments(disk).map(|s| s.holder.clone()).collect();
        let protected = if disk.protected { "protected".into() } else { String::new() };
        let unfinished = if disk.is_importing() { "import unfinished".into() } else { String::new() };
        let notes = [tree.origin(disk).words(), protected, unfinished, super::flatten::note(state, disk)];
        let notes = notes.into_iter().filter(|n| !n.is_empty());
        table.add_row([
            disk.name.clone(),
            output::size(disk.size),
            about["copies"].to_string(),
            tree.snapshots(disk.id).len().to_string(),
            holders.join("; "),
            notes.collect::<Vec<_>>().join(", "),
        ]);
    }
    output::right(&mut table, &[1, 2, 3]);
    output::print_table(&table);
}

async fn info(connection: &Connection, name: &str, with_space: bool, format: output::Format) -> Result<()> {
    let state = connection.state().await?;
    let disk = find(&state, name)?;
    let mut about = describe(&state, disk);
    let space = if with_space {
        let space = Counting::new(connection).family(disk.family, &BTreeSet::from([disk.id])).await?;
        let (used, _) = space.members.get(&disk.id).copied().unwrap_or_default();
        let FamilySpace { used: family, copies, back: exclusive, .. } = space;
        about["space"] = json!({
            "used": used, "exclusive": exclusive, "family": family, "pool": family * copies,
            "hidden": if disk.is_snapshot() { 0 } else { exclusive.saturating_sub(used) },
        });
        Some((used, exclusive, space))
    } else {
        None
    };
    if format.json {
        return output::print_json(&about);
    }
    let is_snapshot = disk.is_snapshot();
    println!("{} {name} ({})", if is_snapshot { "snapshot    " } else { "disk        " }, disk.id);
    println!("size         {}", output::size(disk.size));
    println!("copies       {}", about["copies"]);
    println!("stripe unit  {}", output::size(about["stripe_unit"].as_u64().unwrap_or(0)));
    if disk.made > 0 {
        println!("made         {}", Utc::at(disk.made));
    }
    let tree = Tree::new(&state);
    let origin = tree.origin(disk).words();
    if !origin.is_empty() {
        println!("origin       {origin}");
    }
    if disk.is_importing() {
        println!("import       unfinished: repeat `petal import FILE {name}`, roll back, or delete the disk");
    }
    if state.flattening(disk.id).is_some() {
        println!("flatten      {}", super::flatten::note(&state, disk));
    }
    if disk.protected {
        println!("protected    `petal snapshot release {name}` takes that back");
    }
    if !is_snapshot {
        println!("snapshots    {}", tree.snapshots(disk.id).len());
    }
    if !disk.policy.is_empty() {
        println!("policy       {}", snapshot::policy_sentence(name, disk.policy));
    }
    for session in about["attached"].as_array().into_iter().flatten() {
        let text = |key: &str| session[key].as_str().unwrap_or_default().to_string();
        println!("attached     {} by {} ({})", text("mode"), text("holder"), text("session"));
    }
    if let Some((used, exclusive, family)) = space {
        println!("used         {} of one copy", output::size(used));
        println!("exclusive    {}: what would come back if it alone were deleted", output::size(exclusive));
        if !is_snapshot && exclusive > used {
            let hidden = output::size(exclusive - used);
            println!(
                "hidden       at least {hidden} of what it came from, which it covers; `petal disk flatten {name}` frees that"
            );
        }
        println!("{}", snapshot::family_sentence(&family));
    }
    Ok(())
}

async fn resize(connection: &Connection, name: &str, size: u64, shrink: bool) -> Result<()> {
    let state = connection.state().await?;
    let disk = find_disk(&state, name)?;
    let old = output::size(disk.size);
    ensure!(
        size >= disk.size || shrink,
        "{name} has {old}; a smaller size throws away what lies beyond, so say --shrink if you mean it"
    );
    if size < disk.size {
        // Nobody else may write between the discard and the command: else a disk that grows again would
        // show old bytes.
        let cut = async |attached: &Disk| -> Result<Outcome> {
            attached.zero(size, disk.size - size).await?;
            connection.execute(Change::ResizeDisk { vdisk: disk.id, size, session: attached.session() }).await
        };
        connection.attached(name, Attachment::Exclusive, "petal disk resize", false, cut).await?;
    } else {
        connection.execute(Change::ResizeDisk { vdisk: disk.id, size, session: SessionId(0) }).await?;
    }
    println!("Disk {name} has {} now (before: {old}).", output::size(size));
    Ok(())
}

async fn delete(
    connection: &Connection,
    name: &str,
    yes: bool,
    with_snapshots: bool,
    dry_run: bool,
    format: output::Format,
) -> Result<()> {
    let state = connection.state().await?;
    let disk = find(&state, name)?;
    ensure!(!disk.is_snapshot(), "'{name}' is a snapshot; `petal snapshot delete {name}` deletes it");
    let snapshots: BTreeSet<VdiskId> = state.snapshots_of(disk).map(|s| s.id).collect();
    if !with_snapshots && let Some(first) = state.snapshots_of(disk).next() {
        bail!(
            "'{name}' has {} ('{}' is one); delete them first, or with it: `petal disk delete {name} --with-snapshots`",
            plural(snapshots.len(), "snapshot", "snapshots"),
            first.name
        );
    }
    let mut what = format!("'{name}'");
    if !snapshots.is_empty() {
        what = format!("{what} and its {}", plural(snapshots.len(), "snapshot", "snapshots"));
    }
    if dry_run {
        let going: BTreeSet<VdiskId> = snapshots.into_iter().chain([disk.id]).collect();
        let names: Vec<String> = going.iter().filter_map(|id| state.vdisk(*id)).map(|d| d.name.clone()).collect();
        return snapshot::tell_given_back(connection, &state, &going, &names, &what, format).await;
    }
    if !yes {
        ensure!(std::io::stdin().is_terminal(), "this deletes {what} and the data for ever; say --yes if you mean it");
        print!("This deletes {what} ({}) and the data for ever. Type its name to go on: ", output::size(disk.size));
        std::io::stdout().flush()?;
        let mut line = String::new();
        std::io::stdin().read_line(&mut line)?;
        ensure!(line.trim() == name, "nothing was deleted");
    }
    // It can go only with the last of them.
    connection.end_dead_readers().await?;
    snapshot::delete_all(connection, &connection.state().await?, snapshots, Some(disk.id)).await?;
    if format.json {
        return output::print_json(&json!({"deleted": name}));
    }
    println!("Deleted {what}.");
    Ok(())
}
