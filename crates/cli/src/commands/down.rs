//! `petal down`: stops everything that `petal up` started, and what was attached.

use crate::place::Place;
use crate::processes::ProcessFile;
use crate::supervisor;
use anyhow::Result;

/// `petal down`
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  petal down                       stop the cluster in ./petal-data; its data stay
  petal --cluster /srv/p down

What was acknowledged is on the disks; `petal up` continues.")]
pub struct Arguments {}

/// Stops the cluster.
pub fn run(place: &Place, _: Arguments) -> Result<()> {
    let folder = place.folder()?;
    let file = folder.read()?;
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
    println!("{what} The data are in {}; `petal up` continues.", folder.path().display());
    Ok(())
}
