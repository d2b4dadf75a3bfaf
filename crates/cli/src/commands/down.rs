//! `petal down`: stops everything that `petal up` started, and what was attached; or single servers, which hand
//! over to the others first.

use crate::cluster_folder::{ClusterFile, ClusterFolder};
use crate::place::{self, Place};
use crate::processes::ProcessFile;
use crate::{output, supervisor};
use anyhow::{Result, ensure};
use petal::ids::ServerId;

/// `petal down`
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  petal down                       stop the cluster in ./petal-data; its data stay
  petal --cluster /srv/p down
  petal down s2                    stop one server as planned: the others take over at once

What was acknowledged is on the disks; `petal up` continues.")]
pub struct Arguments {
    /// Only these servers
    #[arg(value_name = "SERVER", value_parser = output::parse_server)]
    servers: Vec<ServerId>,
}

/// Stops the cluster.
pub fn run(place: &Place, arguments: Arguments) -> Result<()> {
    let folder = place.folder()?;
    let file = folder.read()?;
    if !arguments.servers.is_empty() {
        return stop_some(&folder, &file, &arguments.servers);
    }
    // First what lives on the disks: a mounted file system must not lose its device.
    for disk in folder.all_attached() {
        super::detach::detach(&folder, &disk)?;
        println!("Detached {disk}.");
    }
    let supervised = supervisor::stop(ProcessFile::alive_at(&folder.supervisor()), "the supervisor");
    // The supervisor stops its servers; these are the ones of a supervisor that was killed.
    let servers = supervisor::stop_all(&folder, &file);
    let _ = std::fs::remove_file(folder.supervisor());
    let what = if supervised || servers > 0 { "Stopped." } else { "Nothing was running." };
    println!("{what} The data are in {}; `{} up` continues.", folder.path().display(), place::petal(&folder));
    Ok(())
}

/// One after the other: each hands over to those that are left.
fn stop_some(folder: &ClusterFolder, file: &ClusterFile, servers: &[ServerId]) -> Result<()> {
    for server in servers {
        let known = file.servers.iter().any(|s| s.server() == *server);
        ensure!(known, "there is no server {server} in {}; `petal status` shows the servers", folder.path().display());
    }
    for server in servers {
        let ran = supervisor::stop_one(folder, *server);
        let petal = place::petal(folder);
        println!("{server} {}; `{petal} up` starts it again.", if ran { "is stopped" } else { "did not run" });
    }
    Ok(())
}
