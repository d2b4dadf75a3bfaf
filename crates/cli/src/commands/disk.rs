//! `petal disk`: the virtual disks of a cluster.

use crate::connect::{self, Connection};
use crate::output;
use crate::place::Place;
use anyhow::{Result, bail, ensure};
use petal::global_state::Attachment;
use petal::global_state::{Command as Change, Outcome, State};
use petal::ids::SessionId;
use petal::ids::VdiskId;
use petal::limits::STRIPE_UNIT_DEFAULT;
use petal::translator::gmap::Scheme;
use petal::translator::vdir::Vdisk;
use serde_json::{Value, json};
use std::io::{IsTerminal, Write};

/// `petal disk`
#[derive(clap::Subcommand)]
#[command(after_help = "\
Examples:
  petal disk create db 100GiB              two copies of everything
  petal disk create scratch 1TiB --copies 1
  petal disk list
  petal disk resize db 200GiB
  petal disk resize db 50GiB --shrink      what lies beyond is gone
  petal disk rename db database
  petal disk delete database")]
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
        format: Format,
    },
    /// All disks
    List {
        #[command(flatten)]
        format: Format,
    },
    /// All about one disk
    Info {
        /// Its name
        name: String,
        #[command(flatten)]
        format: Format,
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
    /// Give a disk another name
    Rename {
        /// Its name
        name: String,
        /// Its new name
        new_name: String,
    },
    /// Delete a disk and its data
    Delete {
        /// Its name
        name: String,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
}

/// For people or for programs.
#[derive(clap::Args, Clone, Copy)]
pub struct Format {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
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
                    let state = connection.state().await?;
                    return output::print_json(&describe(&state, find(&state, &name)?));
                }
                println!("Made disk {name} ({}, {copies} copies, {id}).", output::size(size));
                Ok(())
            }
            Command::List { format } => list(&connection.state().await?, format),
            Command::Info { name, format } => info(&connection.state().await?, &name, format),
            Command::Resize { name, size, shrink } => resize(&connection, &name, size, shrink).await,
            Command::Rename { name, new_name } => {
                let vdisk = find(&connection.state().await?, &name)?.id;
                connection.execute(Change::RenameDisk { vdisk, name: new_name.clone() }).await?;
                println!("Disk {name} is called {new_name} now.");
                Ok(())
            }
            Command::Delete { name, yes } => delete(&connection, &name, yes).await,
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

/// The disk of a name.
pub fn find<'a>(state: &'a State, name: &str) -> Result<&'a Vdisk> {
    match state.vdisks.values().find(|d| d.name == name) {
        Some(disk) => Ok(disk),
        None => bail!("there is no disk named '{name}'; `petal disk list` shows the disks"),
    }
}

/// A disk as JSON.
pub fn describe(state: &State, disk: &Vdisk) -> Value {
    let family = state.families.get(&disk.family);
    let scheme = family.and_then(|f| state.gmaps.get(&f.gmap)).map(|g| g.scheme);
    let sessions = disk.sessions.iter().filter_map(|id| state.sessions.get(id));
    json!({
        "name": disk.name,
        "id": disk.id.to_string(),
        "size": disk.size,
        "copies": scheme.map(Scheme::copies),
        "stripe_unit": family.map(|f| f.stripe_unit),
        "read_only": disk.is_snapshot(),
        "attached": sessions.map(|s| json!({
            "session": s.id.to_string(),
            "mode": format!("{:?}", s.mode).to_lowercase(),
            "holder": s.holder,
        })).collect::<Vec<_>>(),
    })
}

fn list(state: &State, format: Format) -> Result<()> {
    if format.json {
        let disks: Vec<Value> = state.vdisks.values().map(|d| describe(state, d)).collect();
        return output::print_json(&disks.into());
    }
    print_disks(state);
    Ok(())
}

/// The table of all disks.
pub fn print_disks(state: &State) {
    if state.vdisks.is_empty() {
        return println!("No disks; `petal disk create NAME SIZE` makes one.");
    }
    let mut table = output::table(&["disk", "size", "copies", "attached by"]);
    for disk in state.vdisks.values() {
        let about = describe(state, disk);
        let holders = disk.sessions.iter().filter_map(|id| state.sessions.get(id)).map(|s| s.holder.clone());
        let holders: Vec<String> = holders.collect();
        table.add_row([disk.name.clone(), output::size(disk.size), about["copies"].to_string(), holders.join("; ")]);
    }
    output::right(&mut table, &[1, 2]);
    output::print_table(&table);
}

fn info(state: &State, name: &str, format: Format) -> Result<()> {
    let about = describe(state, find(state, name)?);
    if format.json {
        return output::print_json(&about);
    }
    println!("disk         {name} ({})", about["id"].as_str().unwrap_or_default());
    println!("size         {}", output::size(about["size"].as_u64().unwrap_or(0)));
    println!("copies       {}", about["copies"]);
    println!("stripe unit  {}", output::size(about["stripe_unit"].as_u64().unwrap_or(0)));
    for session in about["attached"].as_array().into_iter().flatten() {
        let text = |key: &str| session[key].as_str().unwrap_or_default().to_string();
        println!("attached     {} by {} ({})", text("mode"), text("holder"), text("session"));
    }
    Ok(())
}

async fn resize(connection: &Connection, name: &str, size: u64, shrink: bool) -> Result<()> {
    let state = connection.state().await?;
    let disk = find(&state, name)?;
    let old = output::size(disk.size);
    ensure!(
        size >= disk.size || shrink,
        "{name} has {old}; a smaller size throws away what lies beyond, so say --shrink if you mean it"
    );
    if size < disk.size {
        // Nobody else may write between the discard and the command: else a disk that grows again would
        // show old bytes.
        let holder = format!("petal disk resize (pid {})", std::process::id());
        let attached = connection.client.disk(name).holder(holder).attach(Attachment::Exclusive).await?;
        attached.zero(size, disk.size - size).await?;
        let change = Change::ResizeDisk { vdisk: disk.id, size, session: attached.session() };
        let result = connection.execute(change).await;
        attached.detach().await?;
        result?;
    } else {
        connection.execute(Change::ResizeDisk { vdisk: disk.id, size, session: SessionId(0) }).await?;
    }
    println!("Disk {name} has {} now (before: {old}).", output::size(size));
    Ok(())
}

async fn delete(connection: &Connection, name: &str, yes: bool) -> Result<()> {
    let state = connection.state().await?;
    let disk = find(&state, name)?;
    if !yes {
        ensure!(
            std::io::stdin().is_terminal(),
            "this deletes '{name}' and its data for ever; say --yes if you mean it"
        );
        print!("This deletes '{name}' ({}) and its data for ever. Type its name to go on: ", output::size(disk.size));
        std::io::stdout().flush()?;
        let mut line = String::new();
        std::io::stdin().read_line(&mut line)?;
        ensure!(line.trim() == name, "nothing was deleted");
    }
    connection.execute(Change::DeleteDisk { vdisk: disk.id }).await?;
    println!("Deleted disk {name}.");
    Ok(())
}
