//! `petal snapshot`: states of disks that stay as they were.

use super::disk::{find, find_disk, plural};
use crate::connect::{self, Connection, NotSettled, refusal};
use crate::freeze::{self, Frozen, Mounted};
use crate::output;
use crate::place::Place;
use crate::space::{Counting, FamilySpace};
use crate::tree;
use anyhow::{Context, Result, bail, ensure};
use petal::global_state::{Command as Change, CommandError, Outcome, SnapshotOf, State, split_name};
use petal::ids::VdiskId;
use petal::translator::vdir::{Policy, Vdisk};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use stdx::calendar::Utc;

/// `petal snapshot`
#[derive(clap::Subcommand)]
#[command(after_help = "\
Examples:
  petal snapshot create vol0 --name monday     vol0@monday; takes no room until vol0 changes
  petal snapshot create data log --protect     both at one instant
  petal snapshot list vol0 --space
  petal snapshot delete vol0@monday vol0@tuesday --dry-run
  petal snapshot policy vol0 --hourly 24 --daily 7 --weekly 4
  petal clone vol0@monday copy                 a disk that begins with what the snapshot holds
  petal rollback vol0 --to monday

A snapshot is read like a disk, by its name: `petal attach vol0@monday`, nbd+unix:///vol0@monday?socket=...")]
pub enum Command {
    /// Make snapshots of disks, all of one instant
    Create(CreateArguments),
    /// Disks, their snapshots, and the clones under the snapshot that they came from
    List {
        /// Only this disk, or this snapshot, and what hangs on it
        disk: Option<String>,
        /// Tell what each uses, and what would come back if it alone were deleted
        #[arg(long)]
        space: bool,
        #[command(flatten)]
        format: output::Format,
    },
    /// Delete snapshots, all or none; space comes back in the background
    Delete {
        /// Which, as DISK@SNAPSHOT
        #[arg(required = true, value_name = "SNAPSHOT")]
        snapshots: Vec<String>,
        /// Delete nothing; tell what would come back
        #[arg(long)]
        dry_run: bool,
        #[command(flatten)]
        format: output::Format,
    },
    /// Give a snapshot another name
    Rename {
        /// Which, as DISK@SNAPSHOT
        snapshot: String,
        /// Its new name, without the disk's
        new_name: String,
        #[command(flatten)]
        format: output::Format,
    },
    /// Protect snapshots (or disks) from deletion
    Protect {
        /// Which
        #[arg(required = true, value_name = "SNAPSHOT")]
        snapshots: Vec<String>,
        #[command(flatten)]
        format: output::Format,
    },
    /// Take protection back
    Release {
        /// Which
        #[arg(required = true, value_name = "SNAPSHOT")]
        snapshots: Vec<String>,
        #[command(flatten)]
        format: output::Format,
    },
    /// Which snapshots the cluster makes of a disk by itself; without options: tell
    Policy(PolicyArguments),
}

/// `petal snapshot create`
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  petal snapshot create vol0                   vol0@2026-11-29T02-15-07Z
  petal snapshot create data log --name before-upgrade --protect
  petal snapshot create vol0 --freeze          no journal to replay in it (vol0 mounted here, root)

All disks that are named are snapshotted at one instant. Work goes on meanwhile. Without --freeze a file system in
a snapshot is as after a power cut: consistent, and repaired by its journal when it is mounted.")]
pub struct CreateArguments {
    /// Of which disks
    #[arg(required = true, value_name = "DISK")]
    disks: Vec<String>,
    /// Name of the snapshots, without the disk's (default: the time, as 2026-11-29T02-15-07Z)
    #[arg(long)]
    name: Option<String>,
    /// They cannot be deleted until they are released
    #[arg(long)]
    protect: bool,
    /// Hold the file systems on the disks still meanwhile (attached here by `petal attach`, and mounted; root)
    #[arg(long)]
    freeze: bool,
    #[command(flatten)]
    format: output::Format,
}

/// `petal snapshot policy`
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  petal snapshot policy vol0 --hourly 24 --daily 7 --weekly 4
  petal snapshot policy vol0 --hourly 0        no more hourly ones; those that there are stay
  petal snapshot policy vol0 --none
  petal snapshot policy vol0                   what it is

The cluster makes one in every hour, day and week of UTC, and deletes its own oldest beyond these numbers, but none
that is protected or attached. What was missed while the cluster was down is not made up for.")]
pub struct PolicyArguments {
    /// Of which disk
    disk: String,
    /// Keep so many hourly ones
    #[arg(long, value_name = "N")]
    hourly: Option<u16>,
    /// Keep so many daily ones
    #[arg(long, value_name = "N")]
    daily: Option<u16>,
    /// Keep so many weekly ones
    #[arg(long, value_name = "N")]
    weekly: Option<u16>,
    /// Make none any more, and delete none
    #[arg(long, conflicts_with_all = ["hourly", "daily", "weekly"])]
    none: bool,
    #[command(flatten)]
    format: output::Format,
}

/// Does it.
pub fn run(place: &Place, command: Command) -> Result<()> {
    let place = place.clone();
    connect::block_on(async move {
        let connection = Connection::open(&place).await?;
        match command {
            Command::Create(arguments) => create(&connection, &place, arguments).await,
            Command::List { disk, space, format } => list(&connection, disk.as_deref(), space, format).await,
            Command::Delete { snapshots, dry_run, format } => delete(&connection, snapshots, dry_run, format).await,
            Command::Rename { snapshot, new_name, format } => rename(&connection, &snapshot, &new_name, format).await,
            Command::Protect { snapshots, format } => protect(&connection, snapshots, true, format).await,
            Command::Release { snapshots, format } => protect(&connection, snapshots, false, format).await,
            Command::Policy(arguments) => policy(&connection, arguments).await,
        }
    })
}

// ------------------------------------------------------------------------------------------------
// Create.

async fn create(connection: &Connection, place: &Place, arguments: CreateArguments) -> Result<()> {
    let disks: BTreeSet<String> = arguments.disks.iter().cloned().collect();
    let disks: Vec<String> = disks.into_iter().collect();
    for disk in &disks {
        if let (of, Some(name)) = split_name(disk) {
            let name = arguments.name.as_deref().unwrap_or(name);
            bail!("'{disk}' names a snapshot; name the disk alone: `petal snapshot create {of} --name {name}`");
        }
    }
    // What is wrong with the names is an error before anything stands still.
    let state = connection.state().await?;
    disks.iter().try_for_each(|disk| find_disk(&state, disk).map(drop))?;
    let made = output::unix_seconds();
    let ids = if arguments.freeze {
        let mounts = freeze::find(place, &state, &disks)?;
        create_frozen(connection, &disks, &arguments, made, mounts).await?
    } else {
        make(connection, &disks, &arguments, made, false).await?
    };
    let state = connection.state().await?;
    let names: Vec<String> = ids.iter().filter_map(|id| state.vdisk(*id)).map(|v| v.name.clone()).collect();
    if arguments.format.json {
        let all = ids.iter().filter_map(|id| state.vdisk(*id)).map(|v| super::disk::describe(&state, v));
        return output::print_json(&Value::Array(all.collect()));
    }
    let how = if arguments.freeze { ", with the file systems standing still" } else { "" };
    println!("Made {}{how}.", names.join(" and "));
    Ok(())
}

/// The command; the snapshots in the order of the disks.
async fn make(
    connection: &Connection,
    disks: &[String],
    arguments: &CreateArguments,
    made: u64,
    is_frozen: bool,
) -> Result<Vec<VdiskId>> {
    let command = |state: &State| {
        let name = match &arguments.name {
            Some(name) => name.clone(),
            None => free_name(state, disks, "", made),
        };
        let of = |disk: &String| -> Result<SnapshotOf> {
            let disk = find_disk(state, disk)?;
            Ok(SnapshotOf { vdisk: disk.id, epoch: disk.epoch, name: name.clone() })
        };
        let of = disks.iter().map(of).collect::<Result<Vec<_>>>()?;
        Ok(Change::Snapshot { of, made, protected: arguments.protect })
    };
    // What is written before it is settled may be in the snapshot: with that the file systems must not go on.
    match connection.execute_on_present(command, is_frozen).await? {
        Outcome::Disks(ids) => Ok(ids),
        other => bail!("the cluster answered {other:?} to the creation of a snapshot"),
    }
}

/// The time behind a prefix, with a number behind it if one of the disks has such a snapshot.
pub fn free_name(state: &State, disks: &[String], prefix: &str, made: u64) -> String {
    let name = format!("{prefix}{}", Utc::at(made).name());
    let is_free = |name: &String| disks.iter().all(|disk| state.vdisk_named(&format!("{disk}@{name}")).is_none());
    let numbered = (2..).map(|n| format!("{name}-{n}"));
    std::iter::once(name.clone()).chain(numbered).find(is_free).expect("numbers do not end")
}

/// The same while file systems stand still; they go on whatever comes of it.
async fn create_frozen(
    connection: &Connection,
    disks: &[String],
    arguments: &CreateArguments,
    made: u64,
    mounts: Vec<Mounted>,
) -> Result<Vec<VdiskId>> {
    let frozen = tokio::task::spawn_blocking(move || Frozen::freeze(mounts)).await??;
    let result = tokio::time::timeout(freeze::HOLD_LIMIT, make(connection, disks, arguments, made, true)).await;
    let thawed = tokio::task::spawn_blocking(move || frozen.thaw()).await?;
    let ids = result.with_context(|| {
        format!(
            "the cluster did not answer within {} s, and the file systems go on; whether the snapshot was made \
             `petal snapshot list` shows",
            freeze::HOLD_LIMIT.as_secs()
        )
    })?;
    let ids = ids.map_err(|error| match error.is::<NotSettled>() {
        true => error.context(
            "the snapshot was made, and the file systems go on although not every server has heard of it: it is consistent as \
             after a power cut, and maybe not more",
        ),
        false => error,
    })?;
    thawed.context("the snapshot was made; it is consistent as after a power cut, and maybe not more")?;
    Ok(ids)
}

// ------------------------------------------------------------------------------------------------
// The others.

async fn list(connection: &Connection, root: Option<&str>, with_space: bool, format: output::Format) -> Result<()> {
    let state = connection.state().await?;
    let root = root.map(|name| find(&state, name)).transpose()?;
    let space = if with_space {
        let families = match root {
            Some(root) => BTreeSet::from([root.family]),
            None => state.families.keys().copied().collect(),
        };
        Some(Counting::new(connection).families(families).await?)
    } else {
        None
    };
    if format.json {
        return output::print_json(&tree::json(&state, root, space.as_ref()));
    }
    tree::print(&state, root, space.as_ref());
    if let (Some(space), Some(root)) = (&space, root)
        && let Some(family) = space.get(&root.family)
    {
        println!("\n{}", family_sentence(family));
    }
    Ok(())
}

/// What a whole family uses.
pub fn family_sentence(family: &FamilySpace) -> String {
    format!(
        "Together with all that it shares with: {}, {} with {}.",
        output::size(family.used),
        output::size(family.used * family.copies),
        plural(family.copies as usize, "copy", "copies")
    )
}

/// The snapshot of a name.
pub fn find_snapshot<'a>(state: &'a State, name: &str) -> Result<&'a Vdisk> {
    let found = find(state, name)?;
    ensure!(
        found.is_snapshot(),
        "'{name}' is a disk; name a snapshot of it as {name}@NAME (`petal snapshot list {name}`), or see `petal disk --help` \
         for what is done with disks"
    );
    Ok(found)
}

async fn delete(connection: &Connection, names: Vec<String>, dry_run: bool, format: output::Format) -> Result<()> {
    let state = connection.state().await?;
    let mut going = BTreeSet::new();
    for name in &names {
        going.insert(find_snapshot(&state, name)?.id);
    }
    let names: BTreeSet<String> = names.into_iter().collect();
    let names: Vec<String> = names.into_iter().collect();
    let what = plural(names.len(), "snapshot", "snapshots");
    if dry_run {
        return tell_given_back(connection, &state, &going, &names, &what, format).await;
    }
    connection.end_dead_readers().await?;
    delete_all(connection, &connection.state().await?, going, None).await?;
    if format.json {
        return output::print_json(&json!({"deleted": names}));
    }
    println!("Deleted {what}; space comes back in the background.");
    Ok(())
}

/// What a deletion would give back, and whether anything is in its way.
pub async fn tell_given_back(
    connection: &Connection,
    state: &State,
    going: &BTreeSet<VdiskId>,
    names: &[String],
    what: &str,
    format: output::Format,
) -> Result<()> {
    let (once, pool) = Counting::new(connection).given_back(state, going).await?;
    let in_the_way = in_the_way(state, going);
    if format.json {
        return output::print_json(
            &json!({"would_delete": names, "bytes": once, "pool_bytes": pool, "in_the_way": in_the_way}),
        );
    }
    println!("Would delete {what}; {} would come back ({} with all copies).", output::size(once), output::size(pool));
    in_the_way.iter().for_each(|why| println!("  In the way: {why}."));
    Ok(())
}

/// Why the cluster would refuse to delete them.
fn in_the_way(state: &State, going: &BTreeSet<VdiskId>) -> Vec<String> {
    let disks: Vec<&Vdisk> = going.iter().filter_map(|id| state.vdisk(*id)).collect();
    let protected = disks.iter().filter(|d| d.protected).map(|d| format!("{} is protected", d.name));
    let attached = disks.iter().filter(|d| state.attached_by(d).is_some()).map(|d| format!("{} is attached", d.name));
    protected.chain(attached).collect()
}

/// Deletes, in as many commands as it takes: all or none if it is one. If it is more, what would be refused is found before
/// the first of them.
pub async fn delete_all(
    connection: &Connection,
    state: &State,
    going: BTreeSet<VdiskId>,
    last: Option<VdiskId>,
) -> Result<()> {
    let ids: Vec<VdiskId> = going.into_iter().chain(last).collect();
    if ids.len() > VdiskId::AT_ONCE_MAX {
        let in_the_way = in_the_way(state, &ids.iter().copied().collect());
        ensure!(in_the_way.is_empty(), "nothing was deleted: {}", in_the_way.join("; "));
    }
    for part in ids.chunks(VdiskId::AT_ONCE_MAX) {
        let mut vdisks = part.to_vec();
        vdisks.sort_unstable();
        let result = connection.execute(Change::DeleteDisks { vdisks }).await;
        result.map(drop).map_err(not_while_attached)?;
    }
    Ok(())
}

/// Who is in the way of a deletion or a rollback cannot be taken over from.
pub fn not_while_attached(error: anyhow::Error) -> anyhow::Error {
    match refusal(&error) {
        Some(CommandError::InUse { name, holder, session }) if split_name(name).1.is_none() => anyhow::anyhow!(
            "'{name}' is attached by {holder}; detach it there first (`petal detach {name}` for what `petal attach` \
             began; an NBD client by disconnecting), or, if that program is gone, end its session with \
             `petal detach --session {session}`"
        ),
        _ => error,
    }
}

async fn rename(connection: &Connection, name: &str, new_name: &str, format: output::Format) -> Result<()> {
    let snapshot = find_snapshot(&connection.state().await?, name)?.clone();
    let disk = split_name(&snapshot.name).0.to_string();
    let new_name = match split_name(new_name) {
        (of, Some(new_name)) => {
            ensure!(of == disk, "'{name}' is a snapshot of {disk}, and cannot become one of {of}");
            new_name
        }
        (new_name, None) => new_name,
    };
    connection.execute(Change::RenameDisk { vdisk: snapshot.id, name: new_name.into() }).await?;
    let full = format!("{disk}@{new_name}");
    if format.json {
        return output::print_json(&json!({"name": full, "was": name}));
    }
    println!("{name} is called {full} now.");
    Ok(())
}

async fn protect(connection: &Connection, names: Vec<String>, protected: bool, format: output::Format) -> Result<()> {
    let state = connection.state().await?;
    let ids = names.iter().map(|name| find(&state, name).map(|d| d.id)).collect::<Result<Vec<_>>>()?;
    for vdisk in ids {
        connection.execute(Change::Protect { vdisk, protected }).await?;
    }
    if format.json {
        return output::print_json(&json!({"names": names, "protected": protected}));
    }
    let how = if protected { "protected: it cannot be deleted until it is released" } else { "released" };
    names.iter().for_each(|name| println!("{name} is {how}."));
    Ok(())
}

async fn policy(connection: &Connection, arguments: PolicyArguments) -> Result<()> {
    let PolicyArguments { disk, hourly, daily, weekly, none, format } = arguments;
    let state = connection.state().await?;
    let present = find_disk(&state, &disk)?;
    let mut policy = if none { Policy::default() } else { present.policy };
    for (kept, asked) in [(&mut policy.hourly, hourly), (&mut policy.daily, daily), (&mut policy.weekly, weekly)] {
        *kept = asked.unwrap_or(*kept);
    }
    if none || hourly.is_some() || daily.is_some() || weekly.is_some() {
        connection.execute(Change::SetPolicy { vdisk: present.id, policy }).await?;
    }
    if format.json {
        return output::print_json(&json!({"disk": disk, "policy": policy_json(policy)}));
    }
    println!("{}", policy_sentence(&disk, policy));
    Ok(())
}

/// A policy for programs.
pub fn policy_json(policy: Policy) -> Value {
    json!({"hourly": policy.hourly, "daily": policy.daily, "weekly": policy.weekly})
}

/// A policy for people.
pub fn policy_sentence(disk: &str, policy: Policy) -> String {
    let kinds = [(policy.hourly, "hourly"), (policy.daily, "daily"), (policy.weekly, "weekly")];
    let kept: Vec<String> = kinds.iter().filter(|(n, _)| *n > 0).map(|(n, kind)| format!("{n} {kind}")).collect();
    match kept.is_empty() {
        true => format!("The cluster makes no snapshots of {disk} by itself."),
        false => format!("The cluster makes snapshots of {disk} by itself, and keeps {}.", kept.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_are_told_in_a_sentence() {
        let policy = Policy { hourly: 24, daily: 0, weekly: 4 };
        assert_eq!(
            policy_sentence("db", policy),
            "The cluster makes snapshots of db by itself, and keeps 24 hourly, 4 weekly."
        );
        assert!(policy_sentence("db", Policy::default()).contains("no snapshots"));
    }
}
