//! `petal down`: stops everything that `petal up` started, and what was attached; or single servers, which hand
//! over to the others first.

use super::what_if::Loss;
use crate::cluster_folder::{ClusterFile, ClusterFolder};
use crate::place::{self, Place};
use crate::processes::ProcessFile;
use crate::{output, supervisor};
use anyhow::{Result, bail, ensure};
use petal::ids::ServerId;

/// `petal down`
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  petal down                       stop the cluster in ./petal-data; its data stay
  petal --cluster /srv/p down
  petal down s2                    stop one server as planned: the others take over at once

Single servers are not stopped where a part of the data could not be served without them (`petal what-if` says more), but
with --force. What was acknowledged is on the disks; `petal up` continues.")]
pub struct Arguments {
    /// Only these servers
    #[arg(value_name = "SERVER", value_parser = output::parse_server)]
    servers: Vec<ServerId>,
    /// Stop single servers although a part of the data is unavailable without them
    #[arg(long, requires = "servers")]
    force: bool,
}

/// Stops the cluster.
pub fn run(place: &Place, arguments: Arguments) -> Result<()> {
    let folder = place.folder()?;
    let file = folder.read()?;
    if !arguments.servers.is_empty() {
        return stop_some(place, &folder, &file, &arguments);
    }
    // First what lives on the disks: a mounted file system must not lose its device.
    for disk in folder.all_attached() {
        super::detach::detach(place, &folder, &disk)?;
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
fn stop_some(place: &Place, folder: &ClusterFolder, file: &ClusterFile, arguments: &Arguments) -> Result<()> {
    let Arguments { servers, force } = arguments;
    for server in servers {
        let known = file.servers.iter().any(|s| s.server() == *server);
        ensure!(known, "there is no server {server} in {}; `petal status` shows the servers", folder.path().display());
    }
    let runs = servers.iter().any(|server| supervisor::process(folder, *server).is_some());
    if runs && !force {
        // A cluster that does not answer serves nothing that could be lost.
        match Loss::ask(place, servers) {
            Ok(loss) if loss.is_worse_than_now() => {
                bail!(
                    "{}; nothing was stopped. --force stops them anyway, `{} up` goes on",
                    loss.complaint(),
                    place::petal(folder)
                )
            }
            Ok(_) => {}
            Err(error) => tracing::warn!("the cluster does not say whether it can do without: {error:#}"),
        }
    }
    for server in servers {
        let ran = supervisor::stop_one(folder, *server);
        let petal = place::petal(folder);
        println!("{server} {}; `{petal} up` starts it again.", if ran { "is stopped" } else { "did not run" });
    }
    Ok(())
}
